"""Vectors are pooled hidden states, whatever the other texts are, as the published files say."""

import functools
import json
import types

from etils import epath
from flax import nnx
import jax
import numpy as np
import pytest

from llmjax.data.config import POOLINGS
from llmjax.data.store.tokenizer import Bytes
from llmjax.errors import UserError
from llmjax.inference import embed
from llmjax.inference.embed import Embedding
from llmjax.models import registry
from llmjax.models.decoder_config import DecoderConfig
from llmjax.models.encdec import EncDecConfig
from llmjax.models.encoder import EncoderConfig
from llmjax.parallel import axes

TEXTS = ["a", "Two words", "é" * 20, "a text of more than sixteen tokens, which has another length", ""]
SMALL = {"vocab_size": 260, "num_layers": 1, "embed": 32, "num_heads": 4}
CONFIGS = {
    "encoder": EncoderConfig(**SMALL, max_positions=64),
    "decoder": DecoderConfig(**SMALL),
    "encdec": EncDecConfig(**SMALL, start_id=256),
}


@functools.cache
def load(config):
    auto = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), axis_types=auto, devices=jax.devices()[:1])
    params = jax.jit(lambda key: jax.tree.map(lambda p: p * 2, registry.init(config, key)))(jax.random.key(0))
    return mesh, types.SimpleNamespace(
        graph=registry.abstract(config)[0], params=params, config=types.SimpleNamespace(model=config), tokenizer=Bytes()
    )


def vectors(config, texts, **options):
    mesh, loaded = load(config)
    with axes.use_mesh(mesh):
        return embed.embed(loaded, texts, Embedding(**options))


@pytest.mark.parametrize("family", CONFIGS)
def test_pooled_hidden_states(family):
    """Each text alone, in a row without padding."""
    config, texts = CONFIGS[family], TEXTS[1:3]
    poolings = {
        "mean": lambda x: x.mean(axis=0),
        "first": lambda x: x[0],
        "last": lambda x: x[-1],
        "max": lambda x: x.max(axis=0),
    }
    mesh, loaded = load(config)
    with axes.use_mesh(mesh):
        model = nnx.merge(loaded.graph, loaded.params)
        rows = [np.array([256, *text.encode()], np.int32) for text in texts]
        compute = jax.jit(functools.partial(embed.hidden_states, reads_source=config.reads_source))
        hidden = [compute(model, embed.pad_rows([row], (1, len(row))))[0] for row in rows]
    for pooling in POOLINGS if family == "encoder" else ("mean", "last"):
        actual, cut = vectors(config, texts, pooling=pooling)
        assert cut == 0 and actual.dtype == np.float32
        for vector, states in zip(actual, hidden, strict=True):
            np.testing.assert_allclose(vector, poolings[pooling](np.asarray(states)), atol=2e-5)


def test_a_vector_does_not_depend_on_the_other_texts():
    together, _ = vectors(CONFIGS["encoder"], TEXTS * 70)  # more than one batch of a length
    alone, _ = vectors(CONFIGS["encoder"], TEXTS[3:4])
    assert all(np.array_equal(together[number], alone[0]) for number in range(3, len(together), len(TEXTS)))


def test_texts_are_cut_and_counted():
    """The maximum counts BOS; learned positions are a maximum, too."""
    config = CONFIGS["encoder"]
    actual, cut = vectors(config, [TEXTS[3], "a text", "x" * 300], max_tokens=7)
    assert cut == 2
    np.testing.assert_array_equal(actual[0], vectors(config, ["a text"])[0][0])
    assert vectors(config, ["x" * 300, "x" * 63])[1] == 1
    with pytest.raises(UserError, match="max_tokens=1: must be above 1, the number of special tokens"):
        vectors(config, ["a"], max_tokens=1)


def test_special_tokens_in_texts_are_text():
    actual, _ = vectors(CONFIGS["encoder"], ["<s>", "</s>"], max_tokens=3)
    assert np.array_equal(actual[0], vectors(CONFIGS["encoder"], ["<s"])[0][0])


def test_normalized_vectors():
    plain, _ = vectors(CONFIGS["encoder"], TEXTS[:2])
    unit, _ = vectors(CONFIGS["encoder"], TEXTS[:2], normalize=True)
    np.testing.assert_allclose(unit, plain / np.linalg.norm(plain, axis=1, keepdims=True), rtol=1e-6)


def write_modules(folder, kinds=("Transformer", "Pooling", "Normalize"), **files):
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": paths.get(kind, "3_Dense")} for kind in kinds]
    contents = {
        "modules.json": modules,
        "1_Pooling/config.json": {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True},
        "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False},
        **{name.replace("__", "/") + ".json": content for name, content in files.items()},
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return epath.Path(folder)


def test_the_files_of_sentence_transformers(tmp_path):
    assert embed.read_embedding(epath.Path(tmp_path)) is None
    assert embed.read_embedding(write_modules(tmp_path)) == Embedding(pooling="mean", normalize=True, max_tokens=256)
    newer = write_modules(tmp_path, ("Transformer", "Pooling"), **{"1_Pooling__config": {"pooling_mode": "lasttoken"}})
    assert embed.read_embedding(newer) == Embedding(pooling="last", normalize=False, max_tokens=256)
    first = write_modules(tmp_path, **{"1_Pooling__config": {"pooling_mode_cls_token": True}})
    assert embed.read_embedding(first) == Embedding(pooling="first", normalize=True, max_tokens=256)


REFUSED = {
    "module": ({"kinds": ("Transformer", "Pooling", "Dense")}, "the module Dense is not supported"),
    "two poolings": (
        {"1_Pooling__config": {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}},
        "pooling cls_token and max_tokens is not supported",
    ),
    "unknown pooling": ({"1_Pooling__config": {"pooling_mode": "weighted"}}, "pooling weighted is not supported"),
    "prompt": ({"config_sentence_transformers": {"default_prompt_name": "query"}}, "default_prompt_name='query'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused(case, tmp_path):
    changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        embed.read_embedding(write_modules(tmp_path, **changes))


def test_an_unknown_pooling_is_refused():
    with pytest.raises(
        UserError, match=r"pooling='meen' \(did you mean 'mean'\?\): choose one of mean, first, last, max"
    ):
        Embedding(pooling="meen")
