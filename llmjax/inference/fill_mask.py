"""Predict masked tokens with a masked-LM checkpoint, most probable first."""

from collections.abc import Sequence
import dataclasses
import functools
import re

from flax import nnx
import jax
import numpy as np

from llmjax.batch import Batch
from llmjax.data.objectives import vocabulary
from llmjax.data.objectives.prompts import encode_prompt, frame_prompt
from llmjax.data.store.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.run.loading import Loaded

# Texts are padded to a multiple of this many tokens, so that few lengths are compiled.
_BUCKET = 32


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One candidate token for a mask: its text (a leading space included) and the model's probability of it."""

    text: str
    probability: float


def fill(loaded: Loaded, texts: Sequence[str], count: int) -> list[list[list[Prediction]]]:
    """For each text, for each of its masks, the `count` most probable tokens. Runs on the mesh of `use_mesh`.

    A mask is written [MASK] or as the tokenizer names it, and stands for one token. A space before it belongs to the
    token, as in tokenizers. Raises UserError for a family without the objective "masked", a model without an id for the
    mask, a text without a mask or with special tokens that the tokenizer does not know, and one that is too long for
    learned positions.
    """
    model, tokenizer = loaded.config.model, loaded.tokenizer
    vocab = vocabulary.build_vocab(tokenizer, vocabulary.MASK)
    mask = vocab.ids[0]
    if model.num_outputs:
        raise UserError("the model has a head for labels, so it predicts no tokens: use `llmjax predict`")
    if "masked" not in model.objectives:
        raise UserError(
            f"model.family={model.family!r} does not predict masked tokens: use `llmjax generate`, or a model that was "
            "trained with objective.name='masked'"
        )
    if vocab.size > model.vocab_size:
        raise UserError(
            f"model.vocab_size={model.vocab_size} has no id for {vocab.names[mask]}: use a model that was trained with "
            "objective.name='masked'"
        )
    rows = [_encode(text, tokenizer, vocab) for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if model.max_seq_len is not None and len(row) > model.max_seq_len:
            raise UserError(
                f"text {text[:40]!r} has {len(row)} tokens, its start included, and the model only {model.max_seq_len} "
                "learned positions: shorten it"
            )
    batch = _pad(rows)
    positions = np.nonzero((batch.inputs == mask) & (batch.segments > 0))
    ids, probabilities = jax.device_get(
        _most_probable(nnx.merge(loaded.graph, loaded.params), batch, positions, count=min(count, model.vocab_size))
    )
    predictions: list[list[list[Prediction]]] = [[] for _ in texts]
    for row, row_ids, row_probs in zip(positions[0].tolist(), ids.tolist(), probabilities.tolist(), strict=True):
        candidates = zip(row_ids, row_probs, strict=True)
        predictions[row].append([Prediction(_token_text(i, tokenizer, vocab), p) for i, p in candidates])
    return predictions


def _encode(text: str, tokenizer: Tokenizer, vocab: vocabulary.Vocabulary) -> np.ndarray:
    """The ids of a text, with one id for each mask, and BOS or EOS as in documents."""
    mask = vocab.ids[0]
    marks = dict.fromkeys((vocab.names[mask], vocabulary.MASK[0][0]))
    imported = tokenizer.prompt_frame is not None and vocab.names[mask] in tokenizer.special_tokens
    # An id of a subword tokenizer is a whole word with its leading space, so a mask replaces the space too. In a byte
    # tokenizer the space is a token of its own, and an imported tokenizer has its own rule for the space before a mask.
    space = "" if imported or tokenizer.kind == "bytes" else " ?"
    parts = re.split(f"{space}(?:{'|'.join(map(re.escape, marks))})", text)
    if len(parts) == 1:
        raise UserError(f"text {text[:40]!r} has no mask: write {' or '.join(marks)} in place of the token to predict")
    if imported:
        return frame_prompt(tokenizer, encode_prompt(tokenizer, vocab.names[mask].join(parts)), vocab.bos_id)
    first, *others = [encode_prompt(tokenizer, part) for part in parts]
    ids = np.concatenate([first, *(np.append(mask, ids) for ids in others)])
    return frame_prompt(tokenizer, ids, vocab.bos_id)


def _pad(rows: Sequence[np.ndarray]) -> Batch:
    """One text a row, padded; no target is scored."""
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
def _most_probable(model, batch: Batch, positions: tuple[np.ndarray, np.ndarray], *, count: int):
    """Ids and probabilities, [masks, count] each, of the most probable tokens at `positions` (rows, columns)."""
    logits = model.unembed(model(batch).hidden[positions])
    probabilities, ids = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), count)
    return ids, probabilities


def _token_text(token_id: int, tokenizer: Tokenizer, vocab: vocabulary.Vocabulary) -> str:
    """The text of an id; "<id 50300>" for an id that only pads the vocabulary."""
    if token_id in vocab.names:
        return vocab.names[token_id]
    return tokenizer.piece(token_id).decode(errors="replace") if token_id < vocab.text_size else f"<id {token_id}>"
