"""Objectives: packed rows become the Batch that a model learns from. Pure numpy on the host."""

from collections.abc import Callable
import dataclasses

import numpy as np

from llmjax.batch import Batch
from llmjax.data.batches.packing import Room, Rows
from llmjax.data.batches.rng import Draws, below, pick
from llmjax.data.config import ObjectiveConfig
from llmjax.data.objectives import infill, spans, vocabulary
from llmjax.data.objectives.prompts import frame_prompt
from llmjax.data.objectives.row_chunks import halves, take_apart
from llmjax.data.objectives.vocabulary import Vocabulary
from llmjax.data.store.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """One objective, ready for rows of one length.

    name        as in the config
    key         all that shapes its batches beside text, packing and seed, in words; resuming with another is refused
    room        what chunks take of a row
    target_len  places in a row of targets
    vocabulary  the ids that it knows; None: any, nothing is added to the text
    make        (rows, int64 sample indices [rows], draws) -> Batch; a row's places depend on nothing but the row, its
                sample index and the key of the draws
    prompt      ids of a text -> what a model is given so that it continues the text
    answers     what the model writes is a text of its own, no continuation of the prompt
    """

    name: str
    key: str
    room: Room
    target_len: int
    vocabulary: Vocabulary | None
    make: Callable[[Rows, np.ndarray, Draws], Batch]
    prompt: Callable[[np.ndarray], np.ndarray]
    answers: bool = False

    @property
    def start(self) -> int:
        """The id that a decoder reads first; -1 where the text alone decides."""
        return self.vocabulary.begin if self.vocabulary else -1

    @property
    def size(self) -> int:
        """The least vocabulary that a model needs; 0 where the text alone decides."""
        return self.vocabulary.size if self.vocabulary else 0


def causal_objective(seq_len: int, known: Vocabulary | None = None) -> Objective:
    """The objective `causal`, which needs no tokenizer (but for prompts)."""
    return Objective(
        name="causal",
        key="causal",
        room=Room(seq_len=seq_len),
        target_len=seq_len,
        vocabulary=known,
        make=lambda rows, samples, draws: causal(rows, samples),
        prompt=lambda ids: np.concatenate([[known.begin] if known else [], ids]).astype(np.int32),
    )


def open_objective(
    config: ObjectiveConfig, tokenizer: Tokenizer, *, seq_len: int, start_id: int | None = None
) -> Objective:
    """The objective of a config, with prompts in the form that it names.

    start_id  of a model that reads a source with an encoder: the id that its decoder reads first; -1: the id that
              documents start with. None: the model has no such sides
    Raises UserError where no chunk fits a row of seq_len tokens.
    """
    made = _open(config, tokenizer, seq_len, start_id)
    if config.prompt_form == "plain":
        before, after = tokenizer.prompt_frame or ((), (tokenizer.eos_id,))
        prompt = lambda ids: np.concatenate([before, ids, after]).astype(np.int32)
        return dataclasses.replace(made, prompt=prompt, answers=True)
    return made


def _open(config: ObjectiveConfig, tokenizer: Tokenizer, seq_len: int, start_id: int | None) -> Objective:
    """The objective with prompts as it trains them."""
    text_ids = vocabulary.of(tokenizer)
    prompt = lambda ids: frame_prompt(tokenizer, ids, text_ids.begin)
    plain = dataclasses.replace(causal_objective(seq_len, text_ids), prompt=prompt)
    if config.name == "causal":
        return plain
    if config.name == "masked":
        known = vocabulary.of(tokenizer, vocabulary.MASK)
        rate = 0.15 if config.rate is None else config.rate
        ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size, dtype=np.int32), [*tokenizer.special_tokens.values()])
        edges = vocabulary.word_edges(tokenizer) if config.whole_words else None
        make = lambda rows, samples, draws: masked(rows, samples, draws, rate, known, ordinary, edges)
        words = ", whole words" if config.whole_words else ""
        return dataclasses.replace(
            plain, name="masked", key=f"masked rate={rate:g}{words}", vocabulary=known, make=make
        )
    if config.name in ("span", "ul2"):
        assert start_id is not None, "the config lets only encoder-decoders through"
        return _denoising(config, tokenizer, seq_len, start_id)
    if config.name == "fim":
        known, room = vocabulary.of(tokenizer, vocabulary.FIM), infill.room(seq_len)
        rate = 0.5 if config.fim_rate is None else config.fim_rate
        make = lambda rows, samples, draws: infill.infill(rows, samples, draws, rate, room, known)
        return dataclasses.replace(
            plain, name="fim", key=f"fim fim_rate={rate:g}", room=room, vocabulary=known, make=make
        )
    assert config.name == "prefix"
    if start_id is None:
        return dataclasses.replace(plain, name="prefix", key="prefix", make=prefix)
    known, target_len = _starting(vocabulary.of(tokenizer), start_id), config.target_len or seq_len
    room = spans.halves_room(seq_len, target_len)
    return dataclasses.replace(
        plain,
        name="prefix",
        key=f"prefix target={target_len}",
        room=room,
        target_len=target_len,
        vocabulary=known,
        make=lambda rows, samples, draws: spans.halve(rows, samples, draws, seq_len, target_len, known),
    )


def _starting(known: Vocabulary, start_id: int) -> Vocabulary:
    """The same ids for a decoder that reads `start_id` first; -1: what documents start with."""
    return known if start_id < 0 else dataclasses.replace(known, begin=start_id)


def _denoising(config: ObjectiveConfig, tokenizer: Tokenizer, seq_len: int, start_id: int) -> Objective:
    """Span corruption, or the mixture of denoisers."""
    mixture = config.name == "ul2"
    one = spans.Denoiser(
        rate=0.15 if config.rate is None else config.rate,
        mean_span=3.0 if config.mean_span is None else config.mean_span,
    )
    denoisers = spans.UL2 if mixture else (one,)
    sides = spans.solve(config.name, denoisers, seq_len=seq_len, target_len=config.target_len, modes=mixture)
    wanted = (vocabulary.sentinels(sides.sentinels), *((vocabulary.MODES,) if mixture else ()))
    known = _starting(vocabulary.of(tokenizer, *wanted), start_id)
    # A prompt goes on where its last mark stands; the mixture knows that by the mode of its S-denoiser.
    before = [known.ids[sides.sentinels + 1]] if mixture else []
    return Objective(
        name=config.name,
        key=sides.room.name,
        room=sides.room,
        target_len=sides.target_len,
        vocabulary=known,
        make=lambda rows, samples, draws: spans.corrupt(rows, samples, draws, denoisers, sides, known),
        prompt=lambda ids: np.concatenate([before, ids, known.ids[:1]]).astype(np.int32),
    )


def causal(rows: Rows, samples: np.ndarray) -> Batch:
    """Next-token prediction: every token, the first and the EOS included, is foretold from those before it.

    samples  the rows' global sample indices, int64 [batch]
    """
    return Batch(
        inputs=rows.before,
        targets=rows.tokens,
        weights=(rows.segments > 0).astype(np.float32),
        segments=rows.segments,
        positions=rows.positions,
        sample=halves(samples),
    )


def prefix(rows: Rows, samples: np.ndarray, draws: Draws) -> Batch:
    """Prefix language modelling (Raffel et al., 2019, arXiv 1910.10683): a chunk's begin is seen from everywhere, the
    rest is foretold as by `causal`. The first p inputs are the prefix, every p from 1 to the chunk's length alike; the
    last of them foretells the first token that none of them shows."""
    pieces = take_apart(rows, samples)
    given = 1 + pick(draws.bits(pieces.sample, 0, pieces.column), pieces.length)
    real = rows.segments > 0
    lengths = np.zeros(rows.segments.shape, np.int64)
    lengths[real] = np.repeat(given, pieces.length)
    return dataclasses.replace(
        causal(rows, samples),
        weights=(real & (rows.positions >= lengths - 1)).astype(np.float32),
        prefix=rows.positions < lengths,
    )


def masked(
    rows: Rows,
    samples: np.ndarray,
    draws: Draws,
    rate: float,
    known: Vocabulary,
    ordinary: np.ndarray,
    edges: tuple[np.ndarray, np.ndarray] | None,
) -> Batch:
    """Masked language modelling (Devlin et al., 2018, arXiv 1810.04805): each token is hidden by chance and scored.

    The text is `rows.before`, so that a chunk starts with BOS in the role of CLS, which is never hidden, and no token
    but a document's EOS is left out. Of the hidden, 80% read as the mask, 10% as one of `ordinary`, 10% as they are.

    edges  where words end (`vocabulary.word_edges`): a word's tokens are hidden together; None: each by itself
    """
    text, real = rows.before, rows.segments > 0
    begins = (rows.positions == 0) & (text == known.begin)
    own, places = samples[:, None], np.arange(text.shape[1])
    hidden = below(draws.bits(own, 0, places), rate)
    if edges is not None:
        goes_on, gone_on_with = edges
        joined = np.zeros_like(real)
        joined[:, 1:] = goes_on[text[:, 1:]] & gone_on_with[text[:, :-1]] & (rows.positions[:, 1:] > 0)
        first = np.maximum.accumulate(np.where(joined, 0, places), axis=1)
        hidden = np.take_along_axis(hidden, first, axis=1)
    hidden &= real & ~begins
    row, column = np.nonzero(hidden)
    kind = draws.bits(samples[row], 1, column)
    noise = ordinary[pick(draws.bits(samples[row], 2, column), len(ordinary))]
    inputs = text.copy()
    inputs[row, column] = np.where(below(kind, 0.8), known.ids[0], np.where(below(kind, 0.9), noise, text[row, column]))
    return Batch(
        inputs=inputs,
        targets=text,
        weights=hidden.astype(np.float32),
        segments=rows.segments,
        positions=rows.positions,
        sample=halves(samples),
    )
