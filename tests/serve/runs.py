"""Small models of random parameters on bytes, for chat and serve."""

from collections.abc import Sequence
import functools
import pathlib
from typing import Any

from etils import epath
import jax
import numpy as np

from llmjax.data.chat_template import ChatTemplate
from llmjax.data.objectives.prompts import decode_continuation
from llmjax.data.store.tokenizer import read_tokenizer
from llmjax.inference.embed import Embedding, embed
from llmjax.inference.generate import Tokens, generate
from llmjax.inference.sampling import Sampling
from llmjax.models import registry
from llmjax.run import config as run_config, loading, workdir as workdirs
from llmjax.run.loading import Loaded
from llmjax.serve.app import Service
from llmjax.serve.embedder import Embedder
from llmjax.serve.engine import Engine

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = ChatTemplate(TEMPLATE, {}, "a test")
BYTES = read_tokenizer("bytes", b"")
MODEL = {"num_layers": 1, "embed": 32, "num_heads": 4, "mlp": 64}
FAMILIES = {
    "decoder": {"model": {**MODEL, "family": "decoder", "num_kv_heads": 2}},
    "encoder": {"model": {**MODEL, "family": "encoder"}, "objective": {"name": "masked"}},
}


@functools.cache
def make_config(family: str = "decoder") -> run_config.RunConfig:
    tree = {**FAMILIES[family], "data": {"tokenizer": {"kind": "bytes"}, "seq_len": 64}}
    mask = int(family == "encoder")  # one more id
    return run_config.with_vocabulary(run_config.apply_overrides(tree, []), BYTES.vocab_size + mask)


@functools.cache
def make_params(family: str = "decoder") -> Any:
    """Parameters far larger than at the start of training, so that the text varies."""
    model = make_config(family).model
    return jax.jit(lambda key: jax.tree.map(lambda p: p * 3, registry.init(model, key)))(jax.random.key(0))


def make_engine(*, slots: int, context: int, waiting: int = 0) -> Engine:
    """An engine on one device."""
    model = make_config().model
    graph = registry.abstract(model)[0]
    return Engine(graph, make_params(), model, slots=slots, context=context, waiting=waiting, stop_ids=BYTES.stop_ids)


def make_embedder(family: str = "decoder", *, context: int, waiting: int = 0, **embedding: Any) -> Embedder:
    """An embedder of a model."""
    model = make_config(family).model
    graph, params = registry.abstract(model)[0], make_params(family)
    return Embedder(graph, params, model, BYTES, Embedding(**embedding), context=context, waiting=waiting)


def make_service() -> Service:
    """Two slots, and two requests that may wait."""
    engine, embedder = make_engine(slots=2, context=128, waiting=2), make_embedder(context=128, waiting=1)
    return Service("tiny", engine, embedder, BYTES, run_config.objective(make_config(), BYTES), CHAT)


def generate_texts(prompts: Sequence[Tokens], sampling: Sampling) -> list[str]:
    """What `llmjax generate` writes after these prompts, on one device."""
    model = make_config().model
    graph = registry.abstract(model)[0]
    new = generate(graph, make_params(), model, prompts, sampling, stop_ids=BYTES.stop_ids)
    return [decode_continuation(BYTES, prompt, ids) for prompt, ids in zip(prompts, new, strict=True)]


def embed_texts(texts: Sequence[str], family: str = "decoder", **embedding: Any) -> np.ndarray:
    """What `llmjax embed` writes for these texts, on one device."""
    config = make_config(family)
    loaded = Loaded(
        config=config,
        step=0,
        graph=registry.abstract(config.model)[0],
        params=make_params(family),
        params_name="",
        tokenizer=BYTES,
        objective=run_config.objective(config, BYTES),
        store=pathlib.Path(),
        fingerprint="",
    )
    return embed(loaded, texts, Embedding(**embedding))[0]


def write_run(folder: pathlib.Path, family: str = "decoder", *, template: str | None = TEMPLATE) -> epath.Path:
    """A workdir with the model, as `llmjax import` writes it."""
    workdir, config = epath.Path(folder), make_config(family)
    (workdir / workdirs.TOKENIZER).mkdir(parents=True)
    if template is not None:
        (workdir / workdirs.TOKENIZER / "chat_template.jinja").write_text(template)
    fingerprint = loading.save_imported(workdir, config, make_params(family), "a test", BYTES)
    fields = run_config.to_json(config)
    record = {"from": "a test", "fingerprint": fingerprint, "model": fields["model"]}
    workdirs.write_json(workdir / workdirs.IMPORT, record | {"tokenizer": {"kind": "bytes", "sha256": BYTES.sha256}})
    workdirs.write_json(workdir / workdirs.CONFIG, fields)
    return workdir
