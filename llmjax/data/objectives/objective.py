"""Objectives: turn packed rows into the Batch that a model is trained on. Pure numpy on the host."""

from collections.abc import Callable, Sequence
import dataclasses

import numpy as np

from llmjax.batch import Batch
from llmjax.data.batches.packing import RowBudget, Rows
from llmjax.data.batches.rng import CounterRng, bernoulli, randint
from llmjax.data.config import LABELLED, PREFERENCES, SEVERAL_TEXTS, ObjectiveConfig
from llmjax.data.objectives import infill, labelled, preference_batch, record_batch, spans, vocabulary
from llmjax.data.objectives.prompts import frame_prompt
from llmjax.data.objectives.row_chunks import build_causal_batch, unpack_rows
from llmjax.data.objectives.vocabulary import Vocabulary
from llmjax.data.store.labels import find_frame
from llmjax.data.store.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """An objective for rows of one length.

    name         as in the config
    fingerprint  everything that decides its batches besides text, packing and seed; resuming with another is refused
    row_budget   how much of a row a chunk of each length needs
    target_len   positions in a row of targets
    vocabulary   the ids that it uses; None: nothing is added to the text, any ids are possible
    build_batch  (rows, int64 sample indices [rows], rng) -> Batch; a row of it depends only on the row, its sample
                 index and the key of the rng
    prompt       ids of a text -> ids that a model reads to continue the text
    answers      whether the model writes a new text instead of a continuation of the prompt
    answer_begin the ids that the decoder of an encoder-decoder writes before the text that continues a prompt
    num_outputs  outputs of the head that it trains in place of the language model's; 0: it predicts tokens
    class_names  of an encoder-decoder that writes the name of a document's class: from `labelled.encode_names`
    """

    name: str
    fingerprint: str
    row_budget: RowBudget
    target_len: int
    vocabulary: Vocabulary | None
    build_batch: Callable[[Rows, np.ndarray, CounterRng], Batch]
    prompt: Callable[[np.ndarray], np.ndarray]
    answers: bool = False
    answer_begin: tuple[int, ...] = ()
    num_outputs: int = 0
    class_names: np.ndarray | None = None

    @property
    def decoder_start_id(self) -> int:
        """The id that a decoder reads first; -1 if only the text decides."""
        return self.vocabulary.bos_id if self.vocabulary else -1

    @property
    def min_vocab_size(self) -> int:
        """The smallest vocabulary that a model needs; 0 if only the text decides."""
        return self.vocabulary.size if self.vocabulary else 0


def make_causal_objective(seq_len: int, vocab: Vocabulary | None = None) -> Objective:
    """The objective `causal`; only its prompts need the vocabulary."""
    return Objective(
        name="causal",
        fingerprint="causal",
        row_budget=RowBudget(seq_len=seq_len),
        target_len=seq_len,
        vocabulary=vocab,
        build_batch=lambda rows, samples, rng: build_causal_batch(rows, samples),
        prompt=lambda ids: np.concatenate([[vocab.bos_id] if vocab else [], ids]).astype(np.int32),
    )


def open_objective(
    config: ObjectiveConfig,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    start_id: int | None = None,
    one_segment: bool = False,
    classes: Sequence[str] = (),
    multi_label: bool = False,
    labels_first: bool = False,
    num_texts: int = 2,
) -> Objective:
    """Make the objective of a config.

    start_id     for an encoder-decoder the id that its decoder reads first, or -1 for the id that documents start with;
                 None for other models
    classes, multi_label   as in DataConfig, for labelled documents
    labels_first whether a document's label is predicted at its first position, else at its last
    num_texts    texts of a record, for objectives on records of several texts
    one_segment  whether the packing gives no row a second segment (`packing.ONE_SEGMENT`), which batches of documents
                 then state
    Raises UserError if no chunk fits a row of seq_len tokens.
    """
    if config.name in LABELLED and start_id is not None:
        objective = _make_named_objective(config, tokenizer, seq_len, start_id, classes)
    elif config.name in LABELLED:
        objective = _make_labelled_objective(config, tokenizer, seq_len, classes, multi_label, labels_first)
    elif config.name in SEVERAL_TEXTS:
        return _make_texts_objective(config, tokenizer, seq_len, num_texts)
    else:
        objective = _open(config, tokenizer, seq_len, start_id)
    if one_segment:
        build_batch = objective.build_batch
        marked = lambda *arguments: dataclasses.replace(build_batch(*arguments), one_segment=True)
        objective = dataclasses.replace(objective, build_batch=marked)
    if config.prompt_form == "plain":
        return dataclasses.replace(objective, prompt=_make_plain_prompt(tokenizer), answers=True, answer_begin=())
    return objective


def _find_source_frame(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids around a whole text that an encoder reads: those of an imported tokenizer, or EOS at its end."""
    return tokenizer.prompt_frame or ((), (tokenizer.eos_id,))


def _make_plain_prompt(tokenizer: Tokenizer) -> Callable[[np.ndarray], np.ndarray]:
    before, after = _find_source_frame(tokenizer)
    return lambda ids: np.concatenate([before, ids, after]).astype(np.int32)


def _open(config: ObjectiveConfig, tokenizer: Tokenizer, seq_len: int, start_id: int | None) -> Objective:
    """Make the objective, with prompts in the form of its training batches."""
    text_ids = vocabulary.build_vocab(tokenizer)
    prompt = lambda ids: frame_prompt(tokenizer, ids, text_ids.bos_id)
    plain = dataclasses.replace(make_causal_objective(seq_len, text_ids), prompt=prompt)
    if config.name == "causal":
        return plain
    if config.name == "masked":
        vocab = vocabulary.build_vocab(tokenizer, vocabulary.MASK)
        rate = 0.15 if config.rate is None else config.rate
        ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size, dtype=np.int32), [*tokenizer.special_tokens.values()])
        edges = vocabulary.find_word_edges(tokenizer) if config.whole_words else None
        build_batch = lambda rows, samples, rng: build_masked_batch(rows, samples, rng, rate, vocab, ordinary, edges)
        fingerprint = f"masked rate={rate:g}{', whole words' if config.whole_words else ''}"
        return dataclasses.replace(
            plain, name="masked", fingerprint=fingerprint, vocabulary=vocab, build_batch=build_batch
        )
    if config.name in ("span", "ul2"):
        assert start_id is not None, "the config accepts these objectives for encoder-decoders only"
        return _make_denoising_objective(config, tokenizer, seq_len, start_id)
    if config.name == "fim":
        vocab, budget = vocabulary.build_vocab(tokenizer, vocabulary.FIM), infill.make_row_budget(seq_len)
        rate = 0.5 if config.fim_rate is None else config.fim_rate
        return dataclasses.replace(
            plain,
            name="fim",
            fingerprint=f"fim fim_rate={rate:g}",
            row_budget=budget,
            vocabulary=vocab,
            build_batch=lambda rows, samples, rng: infill.infill(rows, samples, rng, rate, budget, vocab),
        )
    assert config.name == "prefix"
    if start_id is None:
        return dataclasses.replace(plain, name="prefix", fingerprint="prefix", build_batch=build_prefix_batch)
    vocab, target_len = _replace_bos(vocabulary.build_vocab(tokenizer), start_id), config.target_len or seq_len
    return dataclasses.replace(
        plain,
        name="prefix",
        fingerprint=f"prefix target={target_len}",
        row_budget=spans.make_prefix_budget(seq_len, target_len),
        target_len=target_len,
        vocabulary=vocab,
        build_batch=lambda rows, samples, rng: spans.split_prefix(rows, samples, rng, seq_len, target_len, vocab),
    )


def _make_labelled_objective(
    config: ObjectiveConfig,
    tokenizer: Tokenizer,
    seq_len: int,
    classes: Sequence[str],
    multi_label: bool,
    labels_first: bool,
) -> Objective:
    """Make the objective that predicts the labels of documents."""
    before, after = find_frame(tokenizer)
    is_number = config.name == "regress"
    task = labelled.LabelTask(
        num_outputs=1 if is_number else len(classes),
        multi_label=multi_label,
        is_number=is_number,
        first=labels_first,
        before=before,
        after=after,
        eos_id=tokenizer.eos_id,
    )
    what = "" if is_number else f" {len(classes)} classes{' each by itself' if multi_label else ''}"
    return dataclasses.replace(
        make_causal_objective(seq_len, vocabulary.build_vocab(tokenizer)),
        name=config.name,
        fingerprint=f"{config.name}{what}",
        row_budget=labelled.make_row_budget(task, config.name, seq_len),
        build_batch=lambda rows, samples, rng: labelled.build_labelled_batch(rows, samples, task, seq_len),
        num_outputs=task.num_outputs,
    )


def _make_named_objective(
    config: ObjectiveConfig, tokenizer: Tokenizer, seq_len: int, start_id: int, classes: Sequence[str]
) -> Objective:
    """Make the objective of an encoder-decoder that reads a document and writes the name of its class."""
    before, after = _find_source_frame(tokenizer)
    task = labelled.LabelTask(
        num_outputs=len(classes),
        multi_label=False,
        is_number=False,
        first=False,
        before=before,
        after=after,
        eos_id=tokenizer.eos_id,
    )
    names, target_len = labelled.encode_names(classes, tokenizer), labelled.find_target_len(classes, seq_len)
    vocab = _replace_bos(vocabulary.build_vocab(tokenizer), start_id)
    return Objective(
        name=config.name,
        fingerprint=f"{config.name} by name: {', '.join(classes)}",
        row_budget=labelled.make_row_budget(task, f"{config.name} by name", seq_len, target_len // names.shape[1]),
        target_len=target_len,
        vocabulary=vocab,
        build_batch=lambda rows, samples, rng: labelled.build_named_batch(
            rows, samples, task, names, (seq_len, target_len), vocab.bos_id
        ),
        prompt=_make_plain_prompt(tokenizer),
        answers=True,
        class_names=names,
    )


def _make_texts_objective(config: ObjectiveConfig, tokenizer: Tokenizer, seq_len: int, num_texts: int) -> Objective:
    """Make the objective on records of several texts, each read by itself."""
    plain = make_causal_objective(seq_len, vocabulary.build_vocab(tokenizer))
    if config.name in PREFERENCES:
        return dataclasses.replace(
            plain,
            name=config.name,
            fingerprint=config.name,
            row_budget=preference_batch.make_row_budget(seq_len),
            build_batch=lambda rows, samples, rng: preference_batch.build_preference_batch(
                rows, samples, seq_len, reads_reference=config.name == "dpo"
            ),
            prompt=lambda ids: frame_prompt(tokenizer, ids, vocabulary.build_vocab(tokenizer).bos_id),
            num_outputs=1 if config.name == "reward" else 0,
        )
    before, after = find_frame(tokenizer)
    task = record_batch.TextsTask(
        num_texts=num_texts, has_score=config.name == "similarity", before=before, after=after
    )
    return dataclasses.replace(
        plain,
        name=config.name,
        fingerprint=f"{config.name} {num_texts} texts",
        row_budget=record_batch.make_row_budget(task, config.name, seq_len),
        build_batch=lambda rows, samples, rng: record_batch.build_texts_batch(rows, samples, task, seq_len),
    )


def _replace_bos(vocab: Vocabulary, start_id: int) -> Vocabulary:
    """The vocabulary of a decoder that reads `start_id` first; -1: the id that documents start with."""
    return vocab if start_id < 0 else dataclasses.replace(vocab, bos_id=start_id)


def _make_denoising_objective(config: ObjectiveConfig, tokenizer: Tokenizer, seq_len: int, start_id: int) -> Objective:
    """Make the objective of span corruption, or of the mixture of denoisers."""
    mixture = config.name == "ul2"
    span_corruption = spans.Denoiser(
        rate=0.15 if config.rate is None else config.rate,
        mean_span=3.0 if config.mean_span is None else config.mean_span,
    )
    denoisers = spans.UL2 if mixture else (span_corruption,)
    span_lengths = spans.plan_lengths(
        config.name, denoisers, seq_len=seq_len, target_len=config.target_len, modes=mixture
    )
    groups = (vocabulary.list_sentinels(span_lengths.sentinels), *((vocabulary.MODES,) if mixture else ()))
    vocab = _replace_bos(vocabulary.build_vocab(tokenizer, *groups), start_id)
    # A prompt ends with the sentinel that the model continues; with the mixture it begins with the S-denoiser's mode.
    before = [vocab.ids[span_lengths.sentinels + 1]] if mixture else []
    return Objective(
        name=config.name,
        fingerprint=span_lengths.row_budget.name,
        row_budget=span_lengths.row_budget,
        target_len=span_lengths.target_len,
        vocabulary=vocab,
        build_batch=lambda rows, samples, rng: spans.corrupt(rows, samples, rng, denoisers, span_lengths, vocab),
        prompt=lambda ids: np.concatenate([before, ids, vocab.ids[:1]]).astype(np.int32),
        answer_begin=vocab.ids[:1],
    )


def build_prefix_batch(rows: Rows, samples: np.ndarray, rng: CounterRng) -> Batch:
    """Prefix language modelling (Raffel et al., 2019, arXiv 1910.10683): all positions of a chunk attend to its prefix.

    The rest is predicted as by `causal`. The prefix is the first p inputs, with p uniform from 1 to the length of the
    chunk; its last input predicts the first token that is not in the prefix.
    """
    chunks = unpack_rows(rows, samples)
    prefix_lengths = 1 + randint(rng.bits(chunks.sample, 0, chunks.column), chunks.length)
    real = rows.segments > 0
    lengths = np.zeros(rows.segments.shape, np.int64)
    lengths[real] = np.repeat(prefix_lengths, chunks.length)
    return dataclasses.replace(
        build_causal_batch(rows, samples),
        weights=(real & (rows.positions >= lengths - 1)).astype(np.float32),
        prefix=rows.positions < lengths,
    )


def build_masked_batch(
    rows: Rows,
    samples: np.ndarray,
    rng: CounterRng,
    rate: float,
    vocab: Vocabulary,
    ordinary: np.ndarray,
    edges: tuple[np.ndarray, np.ndarray] | None,
) -> Batch:
    """Masked language modelling (Devlin et al., 2018, arXiv 1810.04805): each token is masked with probability `rate`.

    The text is `rows.inputs`, so a chunk starts with BOS in the role of CLS, which is never masked, and only the EOS of
    a document is missing. Of the masked tokens, which are the scored ones, 80% are replaced by the mask token, 10% by
    a random id of `ordinary`, and 10% are unchanged.

    edges  from `vocabulary.find_word_edges`: the tokens of a word are masked together; None: each by itself
    """
    text, real = rows.inputs, rows.segments > 0
    is_bos = (rows.positions == 0) & (text == vocab.bos_id)
    columns = np.arange(text.shape[1])
    is_masked = bernoulli(rng.bits(samples[:, None], 0, columns), rate)
    if edges is not None:
        continues_word, can_be_continued = edges
        joined = np.zeros_like(real)
        joined[:, 1:] = continues_word[text[:, 1:]] & can_be_continued[text[:, :-1]] & (rows.positions[:, 1:] > 0)
        first = np.maximum.accumulate(np.where(joined, 0, columns), axis=1)  # column of the first token of the word
        is_masked = np.take_along_axis(is_masked, first, axis=1)
    is_masked &= real & ~is_bos
    row, column = np.nonzero(is_masked)
    kind = rng.bits(samples[row], 1, column)
    noise = ordinary[randint(rng.bits(samples[row], 2, column), len(ordinary))]
    inputs = text.copy()
    inputs[row, column] = np.where(
        bernoulli(kind, 0.8), vocab.ids[0], np.where(bernoulli(kind, 0.9), noise, text[row, column])
    )
    batch = build_causal_batch(rows, samples)
    return dataclasses.replace(batch, inputs=inputs, targets=text, weights=is_masked.astype(np.float32))
