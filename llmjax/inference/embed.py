"""Embed texts: one vector for each, pooled from a model's hidden states."""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import json
from typing import Any

from etils import epath
from flax import nnx
import jax
import numpy as np

from llmjax.batch import Batch
from llmjax.data.config import EMBEDDING, POOLINGS, ObjectiveConfig
from llmjax.data.objectives import vocabulary
from llmjax.data.objectives.prompts import frame_prompt
from llmjax.data.store.tokenizer import Tokenizer
from llmjax.errors import UserError, suggest
from llmjax.inference.text_batches import BATCH_TOKENS, group_by_length
from llmjax.models.registry import ModelConfig
from llmjax.nn.pooling import pool
from llmjax.run import config as run_config, workdir as workdirs
from llmjax.run.config import RunConfig
from llmjax.run.loading import Loaded

Tokens = Sequence[int] | np.ndarray

# Names of poolings in 1_Pooling/config.json of sentence-transformers -> here.
_PUBLISHED_POOLINGS = {"mean_tokens": "mean", "cls_token": "first", "lasttoken": "last", "max_tokens": "max"}
_PUBLISHED_MODES = {"mean": "mean", "cls": "first", "lasttoken": "last", "max": "max"}  # the newer field pooling_mode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedding:
    """How a vector is made of a text.

    pooling      mean (of the hidden states of all tokens), first, last (that of one token) or max (of each dimension)
    normalize    whether vectors are divided by their length
    max_tokens   longer texts are cut, special tokens included; None: to what the model can read
    lowercase    whether texts are lowercased before they are encoded
    """

    pooling: str = "mean"
    normalize: bool = False
    max_tokens: int | None = None
    lowercase: bool = False

    def __post_init__(self):
        if self.pooling not in POOLINGS:
            raise UserError(
                f"pooling={self.pooling!r}{suggest(self.pooling, POOLINGS)}: choose one of {', '.join(POOLINGS)}"
            )


def read_embedding(folder: epath.Path) -> Embedding | None:
    """What the files of sentence-transformers in a folder say; None if there are none.

    Raises UserError for a module, a pooling or a prompt that is not supported.
    """
    if not (folder / "modules.json").exists():
        return None
    modules = json.loads((folder / "modules.json").read_bytes())
    kinds = {module["type"].rpartition(".")[2]: module["path"] for module in modules}
    for kind in kinds.keys() - {"Transformer", "Pooling", "Normalize"}:
        raise UserError(f"modules.json: the module {kind} is not supported, only Transformer, Pooling and Normalize")
    prompts = _read_optional(folder / "config_sentence_transformers.json")
    if name := prompts.get("default_prompt_name"):
        raise UserError(
            f"config_sentence_transformers.json: default_prompt_name={name!r} is not supported; put the prompt into "
            "the texts, and set it to null"
        )
    sentence = _read_optional(folder / "sentence_bert_config.json")
    return Embedding(
        pooling=_read_pooling(_read_optional(folder / kinds.get("Pooling", "1_Pooling") / "config.json")),
        normalize="Normalize" in kinds,
        max_tokens=sentence.get("max_seq_length"),
        lowercase=bool(sentence.get("do_lower_case")),
    )


def choose(
    workdir: epath.Path, objective: ObjectiveConfig, *, pooling: str | None = None, max_tokens: int | None = None
) -> Embedding:
    """The embedding of the folder that was imported into a workdir, else mean pooling; with the given fields.

    objective   of the run; one that trains vectors has the pooling that was trained, and without an import also unit
                length
    """
    embedding = read_embedding(workdir / workdirs.TOKENIZER)
    if embedding is None:
        embedding = Embedding(normalize=objective.name in EMBEDDING)
    if objective.pooling:
        embedding = dataclasses.replace(embedding, pooling=objective.pooling)
    changes = {"pooling": pooling, "max_tokens": max_tokens}
    return dataclasses.replace(embedding, **{name: value for name, value in changes.items() if value is not None})


def with_pooling(config: RunConfig, workdir: epath.Path) -> RunConfig:
    """The config with the pooling filled in where the objective trains vectors: that of the folder that was imported
    into a workdir, else mean."""
    if config.objective.name not in EMBEDDING or config.objective.pooling:
        return config
    pooling = choose(workdir, config.objective).pooling
    return run_config.with_fields(config, [("objective.pooling", pooling)])


def embed(loaded: Loaded, texts: Sequence[str], embedding: Embedding) -> tuple[np.ndarray, int]:
    """(vectors float32 [texts, embed], number of texts that were cut). Runs on the mesh of `use_mesh`.

    Each text has the tokenizer's own special tokens around it, and no text becomes a special token. Its vector does not
    depend on the other texts. Raises UserError for a maximum without room for a token of the text.
    """
    model = loaded.config.model
    rows, cut = encode_texts(texts, loaded.tokenizer, embedding, find_limit(model, embedding))
    vectors = np.zeros((len(texts), model.embed), np.float32)
    for part, values in embed_rows(nnx.merge(loaded.graph, loaded.params), model, rows, embedding):
        vectors[part] = values
    return vectors, cut


def find_limit(config: ModelConfig, embedding: Embedding) -> int | None:
    """The most tokens that a text may have, special tokens included; None: no limit."""
    return min((n for n in (embedding.max_tokens, config.max_seq_len) if n is not None), default=None)


def embed_rows(
    model: Any, config: ModelConfig, rows: Sequence[Tokens], embedding: Embedding, *, tokens: int = BATCH_TOKENS
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield (indices of some rows of token ids, their vectors float32 [rows, embed]), one batch at a time.

    tokens   of a batch at most, unless one row has more. Another number changes a vector by rounding alone
    """
    for part, count, length in group_by_length([len(row) for row in rows], tokens=tokens):
        batch = pad_rows([rows[number] for number in part], (count, length))
        hidden = _embed(model, batch, pooling=embedding.pooling, reads_source=config.reads_source)
        vectors = jax.device_get(hidden)[: len(part)]
        if embedding.normalize:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
        yield part, vectors


def encode_texts(
    texts: Sequence[str], tokenizer: Tokenizer, embedding: Embedding, limit: int | None
) -> tuple[list[np.ndarray], int]:
    """(ids of each text with those around it, number of texts that were cut to `limit` tokens)

    Raises UserError for a limit without room for a token of the text, and for a text that is not Unicode.
    """
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"text {number}: a half of a surrogate pair ({error.reason}); give valid Unicode") from None
    ids = tokenizer.encode_batch([text.lower() if embedding.lowercase else text for text in texts])
    bos_id = vocabulary.build_vocab(tokenizer).bos_id
    frame = sum(map(len, tokenizer.prompt_frame)) if tokenizer.prompt_frame is not None else 1
    if limit is not None and limit <= frame:
        raise UserError(f"max_tokens={limit}: must be above {frame}, the number of special tokens around a text")
    most = None if limit is None else limit - frame
    rows = [frame_prompt(tokenizer, row[:most], bos_id) for row in ids]
    return rows, sum(most is not None and len(row) > most for row in ids)


def pad_rows(rows: Sequence[Tokens], shape: tuple[int, int]) -> Batch:
    """One text a row, for the encoder too if the model has one; rows without a text are padding."""
    inputs, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for number, row in enumerate(rows):
        inputs[number, : len(row)], segments[number, : len(row)] = row, 1
    positions = np.arange(shape[1], dtype=np.int32) * segments
    return Batch(
        inputs=inputs,
        targets=np.zeros_like(inputs),
        weights=np.zeros(shape, np.float32),
        segments=segments,
        positions=positions,
        sample=np.zeros((shape[0], 2), np.uint32),
        source=inputs,
        source_segments=segments,
        source_positions=positions,
    )


def hidden_states(model: Any, batch: Batch, *, reads_source: bool) -> jax.Array:
    """Those of the last layer [batch, seq, embed], of the encoder if the model has one, for a batch of `pad_rows`."""
    return model.encode(batch) if reads_source else model(batch).hidden


@functools.partial(jax.jit, static_argnames=("pooling", "reads_source"))
def _embed(model: Any, batch: Batch, *, pooling: str, reads_source: bool) -> jax.Array:
    """float32 [batch, embed]; the vector of a row without tokens has no meaning."""
    hidden = hidden_states(model, batch, reads_source=reads_source)
    return pool(hidden, batch.segments > 0, pooling)


def _read_pooling(fields: dict[str, Any]) -> str:
    """The pooling of 1_Pooling/config.json, whose older form has a boolean for each."""
    mode = fields.get("pooling_mode")
    if mode is not None:
        names = {mode} if isinstance(mode, str) else set(mode)
        known = _PUBLISHED_MODES
    else:
        prefix = "pooling_mode_"
        names = {field.removeprefix(prefix) for field, value in fields.items() if field.startswith(prefix) and value}
        known = _PUBLISHED_POOLINGS
    if len(names) != 1 or not names <= known.keys():
        raise UserError(
            f"1_Pooling/config.json: pooling {' and '.join(sorted(names)) or 'none'} is not supported, only one of "
            f"{', '.join(known)}"
        )
    return known[names.pop()]


def _read_optional(path: epath.Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if path.exists() else {}
