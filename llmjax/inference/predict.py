"""Predict the labels of texts with a checkpoint that has a head for them."""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from llmjax.batch import Batch
from llmjax.data.batches.packing import Rows
from llmjax.data.batches.rng import CounterRng
from llmjax.data.store.labels import find_frame, join_texts
from llmjax.data.store.preferences import PreferencesFormat
from llmjax.data.store.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.inference.text_batches import group_by_length
from llmjax.nn.class_names import score_names
from llmjax.run.config import RunConfig
from llmjax.run.loading import Loaded

_TARGETS = ("inputs", "targets", "weights", "segments", "positions", "token_types", "labels")
_SOURCES = ("source", "source_segments", "source_positions")
Texts = tuple[str, str | None]  # a text, and the second one of a pair


def predict(loaded: Loaded, texts: Sequence[Texts]) -> tuple[list[dict[str, Any]], int]:
    """(for each text its label, number of texts that were cut to data.seq_len). Runs on the mesh of `use_mesh`.

    A class is {"label": name, "probabilities": {name: p, ...}}, several classes {"labels": [name, ...],
    "probabilities": {...}} with those of 0.5 and more, a number {"label": number}. Of a reward model, whose texts are a
    prompt and an answer, it is {"reward": number}. A text is read as in training.
    """
    config = loaded.config
    num_outputs = loaded.objective.num_outputs or len(config.data.classes)
    if not num_outputs:
        raise UserError(
            f"objective.name={config.objective.name!r}: the model predicts no labels; train it with "
            "objective.name='classify', 'regress' or 'reward'"
        )
    is_reward = config.objective.name == "reward"
    encode, make_batch = (_encode_answers, _make_answer_batch) if is_reward else (_encode, _make_batch)
    documents, cut = encode(texts, loaded.tokenizer, config.data.seq_len)
    added = 0 if is_reward else sum(map(len, find_frame(loaded.tokenizer))) - 1
    outputs = np.zeros((len(texts), num_outputs), np.float32)
    module = nnx.merge(loaded.graph, loaded.params)
    lengths = [len(document) + added for document in documents]
    for part, count, length in group_by_length(lengths, config.data.seq_len):
        batch = make_batch([documents[number] for number in part], count, length, loaded)
        names = loaded.objective.class_names
        scored = _head_outputs(module, batch) if names is None else _name_outputs(module, batch, jnp.asarray(names))
        outputs[part] = jax.device_get(scored)[: len(part)]
    return [_describe(row, config) for row in outputs], cut


def _encode(texts: Sequence[Texts], tokenizer: Tokenizer, seq_len: int) -> tuple[list[np.ndarray], int]:
    """(token ids of each text as a token store holds them, number of texts that were cut)"""
    firsts = tokenizer.encode_batch([first for first, _ in texts])
    seconds = tokenizer.encode_batch([second or "" for _, second in texts])
    pairs = [None if text[1] is None else second for text, second in zip(texts, seconds, strict=True)]
    joined = [join_texts(first, pair, tokenizer, seq_len) for first, pair in zip(firsts, pairs, strict=True)]
    return [ids for ids, _ in joined], sum(was_cut for _, was_cut in joined)


def _encode_answers(texts: Sequence[Texts], tokenizer: Tokenizer, seq_len: int) -> tuple[list[np.ndarray], int]:
    """(token ids of each prompt and answer, as a token store holds them, number of them that were cut)"""
    form, (before, _) = PreferencesFormat(seq_len=seq_len, template=None), find_frame(tokenizer)
    prompts = tokenizer.encode_batch([prompt for prompt, _ in texts])
    answers = tokenizer.encode_batch([answer or "" for _, answer in texts])
    end = np.int32(tokenizer.eos_id)
    fitted = [
        form.fit(before, prompt, [np.append(answer, end)], f"text {number}")
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1)
    ]
    return [ids for ids, *_ in fitted], sum(is_cut for *_, is_cut in fitted)


def _make_answer_batch(documents: Sequence[np.ndarray], count: int, length: int, loaded: Loaded) -> Batch:
    """One prompt with its answer a row, scored at its last token."""
    inputs, segments = np.zeros((count, length), np.int32), np.zeros((count, length), np.int32)
    weights = np.zeros((count, length), np.float32)
    for number, ids in enumerate(documents):
        inputs[number, : len(ids)], segments[number, : len(ids)], weights[number, len(ids) - 1] = ids, 1, 1
    return Batch(
        inputs=inputs,
        targets=np.zeros_like(inputs),
        weights=weights,
        segments=segments,
        positions=np.arange(length, dtype=np.int32) * segments,
        sample=np.zeros((count, 2), np.uint32),
    )


def _make_batch(documents: Sequence[np.ndarray], count: int, length: int, loaded: Loaded) -> Batch:
    """One document a row, as the objective frames it; rows without one are padding."""
    width = max(map(len, documents))
    targets, segments = np.zeros((count, width), np.int32), np.zeros((count, width), np.int32)
    for number, document in enumerate(documents):
        targets[number, : len(document)], segments[number, : len(document)] = document, 1
    positions = np.arange(width, dtype=np.int32) * segments
    unread = np.zeros_like(targets)
    rows = Rows(targets=targets, inputs=unread, segments=segments, positions=positions, scored=unread > 0)
    batch = loaded.objective.build_batch(rows, np.zeros(count, np.int64), CounterRng("predict"))
    if (names := loaded.objective.class_names) is not None:
        return _cut(_cut(batch, _TARGETS, names.shape[1]), _SOURCES, length)
    return _cut(batch, _TARGETS, length)


def _cut(batch: Batch, fields: Sequence[str], length: int) -> Batch:
    """The batch with these fields cut to `length` positions: objectives pad to data.seq_len."""
    cut = {name: value[:, :length] for name in fields if (value := getattr(batch, name)) is not None}
    return dataclasses.replace(batch, **cut)


@functools.partial(jax.jit)
def _head_outputs(model: Any, batch: Batch) -> jax.Array:
    """float32 [batch, outputs] at the scored position of each row; those of a padding row have no meaning."""
    hidden = model(batch).hidden
    at = jnp.argmax(batch.weights, axis=1)[:, None, None]
    return model.unembed(jnp.take_along_axis(hidden, at, axis=1))[:, 0]


@functools.partial(jax.jit)
def _name_outputs(model: Any, batch: Batch, names: jax.Array) -> jax.Array:
    """The same of an encoder-decoder: the log-likelihoods of the names of classes, of which softmax makes probabilities
    as of logits."""
    return score_names(model, batch, names)[:, 0]


def _describe(outputs: np.ndarray, config: RunConfig) -> dict[str, Any]:
    """The label of one text as a JSON object."""
    classes = config.data.classes
    if config.objective.name == "reward":
        return {"reward": float(outputs[0])}
    if not classes:
        return {"label": float(outputs[0])}
    logits = outputs.astype(np.float64)
    if config.data.multi_label:
        probabilities = 1 / (1 + np.exp(-logits))
        label: dict[str, Any] = {"labels": [c for c, p in zip(classes, probabilities, strict=True) if p >= 0.5]}
    else:
        exponents = np.exp(logits - logits.max())
        probabilities = exponents / exponents.sum()
        label = {"label": classes[int(np.argmax(logits))]}
    return {**label, "probabilities": dict(zip(classes, probabilities.tolist(), strict=True))}
