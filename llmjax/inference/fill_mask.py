"""Predict masked tokens with a masked-LM checkpoint, most probable first."""

from collections.abc import Sequence
import dataclasses
import functools
import re
from typing import Any

from flax import nnx
import jax
from jax.sharding import Mesh
import numpy as np

from llmjax.batch import Batch
from llmjax.data.objectives import vocabulary
from llmjax.data.objectives.prompts import encode_prompt, frame_prompt
from llmjax.data.store.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.models.registry import ModelConfig
from llmjax.parallel import axes

# Texts are padded to a multiple of this many tokens, so that few lengths are compiled.
_BUCKET = 32


@dataclasses.dataclass(frozen=True)
class Filler:
    """One token that fits a gap: its text (a space in front included), and the model's probability of it."""

    text: str
    probability: float


def fill(
    texts: Sequence[str],
    *,
    graph: Any,
    params: dict,
    model: ModelConfig,
    mesh: Mesh,
    rules: axes.LogicalRules,
    tokenizer: Tokenizer,
    count: int,
) -> list[list[list[Filler]]]:
    """For each text, for each of its masks, the `count` likeliest tokens.

    A mask is written [MASK] or as the tokenizer names it, and stands for one token. A space before it belongs to the
    token, as tokenizers have it. UserError for a family that fills no gaps, a model without an id for the mask, a text
    without a mask or with special tokens that the tokenizer does not know, and one that is too long for learned
    positions.
    """
    known = vocabulary.build_vocab(tokenizer, vocabulary.MASK)
    if "masked" not in model.objectives:
        raise UserError(
            f"model.family={model.family!r} predicts no masked tokens: use one that supports the objective 'masked', "
            "such as encoder"
        )
    if known.size > model.vocab_size:
        raise UserError(
            f"model.vocab_size={model.vocab_size} has no id for {known.names[known.ids[0]]}: take a model that was "
            "trained with objective.name='masked'"
        )
    rows = [_tokens(text, tokenizer, known) for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if model.max_seq_len is not None and len(row) > model.max_seq_len:
            raise UserError(
                f"text {text[:40]!r} has {len(row)} tokens, its start included, and the model only {model.max_seq_len} "
                "learned positions: shorten it"
            )
    batch = _batch(rows)
    places = np.nonzero((batch.inputs == known.ids[0]) & (batch.segments > 0))
    with jax.set_mesh(mesh), axes.use_rules(rules):
        found = _likeliest(nnx.merge(graph, params), batch, places, count=min(count, model.vocab_size))
    ids, probabilities = jax.device_get(found)
    filled: list[list[list[Filler]]] = [[] for _ in texts]
    for row, numbers, shares in zip(places[0].tolist(), ids.tolist(), probabilities.tolist(), strict=True):
        filled[row].append([Filler(_name(i, tokenizer, known), p) for i, p in zip(numbers, shares, strict=True)])
    return filled


def _tokens(text: str, tokenizer: Tokenizer, known: vocabulary.Vocabulary) -> np.ndarray:
    """The ids of a text with each mask as one id: behind the id that starts documents, or as an imported tokenizer
    frames it."""
    mask = known.ids[0]
    marks = dict.fromkeys((known.names[mask], vocabulary.MASK[0][0]))
    imported = tokenizer.prompt_frame is not None and known.names[mask] in tokenizer.special_tokens
    # Ids are whole words with their space; but a byte is a byte, and its space one of its own. An imported tokenizer
    # has its own rule for the space before its mask.
    space = "" if imported or tokenizer.kind == "bytes" else " ?"
    parts = re.split(f"{space}(?:{'|'.join(map(re.escape, marks))})", text)
    if len(parts) == 1:
        raise UserError(f"text {text[:40]!r} has no mask: write {' or '.join(marks)} where a token is to be found")
    if imported:
        return frame_prompt(tokenizer, encode_prompt(tokenizer, known.names[mask].join(parts)), known.bos_id)
    first, *others = [encode_prompt(tokenizer, part) for part in parts]
    ids = np.concatenate([first, *(np.append(mask, ids) for ids in others)])
    return frame_prompt(tokenizer, ids, known.bos_id)


def _batch(rows: Sequence[np.ndarray]) -> Batch:
    """One text a row, padded; nothing is scored."""
    shape = len(rows), -(-max(map(len, rows)) // _BUCKET) * _BUCKET
    inputs, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for number, row in enumerate(rows):
        inputs[number, : len(row)], segments[number, : len(row)] = row, 1
    return Batch(
        inputs=inputs,
        targets=np.zeros_like(inputs),
        weights=np.zeros(shape, np.float32),
        segments=segments,
        positions=np.arange(shape[1], dtype=np.int32) * segments,
        sample=np.zeros((len(rows), 2), np.uint32),
    )


@functools.partial(jax.jit, static_argnames="count")
def _likeliest(model, batch: Batch, places: tuple[np.ndarray, np.ndarray], *, count: int):
    """Ids and probabilities, [masks, count] each, of the `count` likeliest tokens at `places` (rows, columns)."""
    logits = model.unembed(model(batch).hidden[places])
    probabilities, ids = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), count)
    return ids, probabilities


def _name(number: int, tokenizer: Tokenizer, known: vocabulary.Vocabulary) -> str:
    """What an id reads as; those beyond the tokenizer and the objective, which only round the vocabulary, have none."""
    if number in known.names:
        return known.names[number]
    return tokenizer.piece(number).decode(errors="replace") if number < known.text_size else f"<id {number}>"
