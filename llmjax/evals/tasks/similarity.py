"""Semantic similarity of texts: the cosine of their vectors, and BERTScore (Zhang et al. 2020, arXiv:1904.09675)."""

from collections.abc import Sequence
import functools
import logging
from typing import Any

from etils import epath
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from llmjax.batch import Batch
from llmjax.checkpoint.manager import Checkpoints
from llmjax.data.objectives import vocabulary
from llmjax.errors import UserError
from llmjax.evals.config import SIMILARITIES, TaskConfig
from llmjax.evals.label_scores import pearson, spearman
from llmjax.evals.tasks.examples import Example
from llmjax.evals.tasks.outcome import Groups, Outcome, Scores, score_means
from llmjax.inference.embed import Embedding, Tokens, choose, encode_texts, find_limit, hidden_states, pad_rows
from llmjax.inference.text_batches import BATCH_TOKENS, group_by_length
from llmjax.nn.pooling import pool
from llmjax.run import loading, workdir as workdirs
from llmjax.run.loading import Loaded

logger = logging.getLogger(__name__)

MEASURES: tuple[str, ...] = ("cosine", "precision", "recall", "f1")
NOTE = (
    "similarity in this model's own hidden states (last layer): do not compare it with the scores of other models, nor "
    "with published BERTScores"
)
_SEED = 0  # of the random pairs


def run(task: TaskConfig, loaded: Loaded, embedding: Embedding, examples: Sequence[Example], groups: Groups) -> Outcome:
    """Score each text against its reference. The score of a group is the mean F1.

    NAME_rescaled is (x - b) / (1 - b) with b the mean of x over texts with the references of other examples. Intervals
    take b as a constant.
    """
    texts = [example.text("text_field", task.text_name) for example in examples]
    references = [example.text("pair_field", task.pair_name) for example in examples]
    people = None
    if task.score_field:
        people = np.array([example.number("score_field", task.score_field) for example in examples])
    limit = find_limit(loaded.config.model, embedding)
    rows, cut = encode_texts([*texts, *references], loaded.tokenizer, embedding, limit)
    candidate_rows, reference_rows = rows[: len(texts)], rows[len(texts) :]
    if cut:
        logger.info("  %d texts were cut to %d tokens", cut, limit)

    vocab_size, is_word = loaded.config.model.vocab_size, _find_words(loaded)
    weights = find_idf(reference_rows, vocab_size) if task.idf else np.ones(vocab_size, np.float32)
    other_rows = [reference_rows[number] for number in draw_others(len(texts))]
    scores, baselines = (
        score_pairs(loaded, embedding.pooling, candidate_rows, against, weights, is_word)
        for against in (reference_rows, other_rows)
    )
    columns: dict[str, np.ndarray] = dict(zip(MEASURES, scores.T, strict=True))
    # A single example has no other reference.
    baseline = baselines.mean(axis=0) if len(texts) > 1 else np.full(len(MEASURES), np.nan)
    for name, mean in zip(MEASURES[1:], baseline[1:], strict=True):
        # Where all texts are the same, the baseline is 1 but for rounding.
        columns[f"{name}_rescaled"] = (columns[name] - mean) / (1 - mean if mean < 1 - 1e-6 else np.nan)

    means = score_means(columns, "f1", groups)

    def score(indices: np.ndarray) -> Scores:
        values: Scores = {}
        if people is not None:
            for name in MEASURES:
                some, expected = columns[name][indices], people[indices]
                values[f"{name}_spearman"] = spearman(some, expected)
                values[f"{name}_pearson"] = pearson(some, expected)
        return values | means(indices)

    lines = [
        {
            "index": index,
            "input": [texts[index], references[index]],
            "target": None if people is None else float(people[index]),
            "prediction": float(columns["f1" if people is None else "cosine"][index]),
            **{name: float(column[index]) for name, column in columns.items()},
        }
        for index in range(len(texts))
    ]
    details = {
        "note": NOTE,
        "baseline": dict(zip(MEASURES, baseline.tolist(), strict=True)),
        "num_cut": cut,
    }
    return Outcome(lines, score, "f1" if people is None else "cosine_spearman", details)


def compare_answers(
    embedder: epath.Path, texts: Sequence[str], answers: Sequence[Sequence[str]]
) -> dict[str, np.ndarray]:
    """cosine and bertscore, the F1 without idf weights, of each text with its most similar answer: float64 [texts].

    embedder   the workdir of the run whose hidden states are compared
    """
    pairs = [(number, text, answer) for number, text in enumerate(texts) for answer in answers[number]]
    numbers, candidates, references = zip(*pairs, strict=True)
    with loading.load(embedder) as loaded:
        embedding = choose(embedder, loaded.config.objective)
        limit = find_limit(loaded.config.model, embedding)
        rows, _ = encode_texts([*candidates, *references], loaded.tokenizer, embedding, limit)
        ones = np.ones(loaded.config.model.vocab_size, np.float32)
        halves = rows[: len(pairs)], rows[len(pairs) :]
        scores = score_pairs(loaded, embedding.pooling, *halves, ones, _find_words(loaded))
    best = {name: np.full(len(texts), -np.inf) for name in SIMILARITIES}
    for name, measure in zip(SIMILARITIES, ("cosine", "f1"), strict=True):
        np.maximum.at(best[name], list(numbers), scores[:, MEASURES.index(measure)])
    return best


def fingerprint_embedder(embedder: epath.Path) -> str:
    """That of the newest checkpoint of a run."""
    checkpoints = Checkpoints(embedder / workdirs.CHECKPOINTS)
    if (step := checkpoints.latest()) is None:
        raise UserError(f"{embedder}: has no checkpoint; train or import a model there")
    return checkpoints.read_meta(step)["fingerprint"]


def find_idf(references: Sequence[Tokens], vocab_size: int) -> np.ndarray:
    """float32 [vocab] of each token id: -log((1 + number of references with it) / (1 + number of references)).

    Section 3 of the paper, with plus-one smoothing of both counts as in its published code.
    """
    counts = np.zeros(vocab_size)
    for row in references:
        counts[np.unique(row)] += 1
    return -np.log((1 + counts) / (1 + len(references))).astype(np.float32)


def draw_others(count: int) -> np.ndarray:
    """int [count]: for each example the number of another one; each is drawn once."""
    order = np.random.default_rng(_SEED).permutation(count)
    others = np.empty(count, np.int64)
    others[order] = np.roll(order, 1)
    return others


def score_pairs(
    loaded: Loaded,
    pooling: str,
    candidates: Sequence[Tokens],
    references: Sequence[Tokens],
    weights: np.ndarray,
    is_word: np.ndarray,
) -> np.ndarray:
    """float64 [pairs, MEASURES] of rows of token ids. A pair's scores do not depend on the other pairs.

    weights   float32 [vocab]: what each token id counts in precision and recall
    is_word   bool [vocab]: False for special tokens, which count nothing and match nothing
    """
    model, reads_source = nnx.merge(loaded.graph, loaded.params), loaded.config.model.reads_source
    scores = np.zeros((len(candidates), len(MEASURES)))
    lengths = [max(len(one), len(other)) for one, other in zip(candidates, references, strict=True)]
    for part, count, length in group_by_length(lengths, tokens=BATCH_TOKENS // 2):
        empty: list[Tokens] = [()] * (count - len(part))
        rows = [*(candidates[number] for number in part), *empty, *(references[number] for number in part), *empty]
        batch = pad_rows(rows, (2 * count, length))
        values = _score(model, batch, weights, is_word, pooling=pooling, reads_source=reads_source)
        scores[part] = jax.device_get(values)[: len(part)]
    return scores


@functools.partial(jax.jit, static_argnames=("pooling", "reads_source"))
def _score(
    model: Any, batch: Batch, weights: jax.Array, is_word: jax.Array, *, pooling: str, reads_source: bool
) -> jax.Array:
    """float32 [pairs, MEASURES]; the first half of the batch's rows are candidates, the second half their references.

    Precision, recall and F1 are 0 where a text has no words. Where every word of a text has the weight 0, all count
    the same. F1 is 0 unless precision and recall are positive, since a harmonic mean needs positive numbers.
    """
    hidden = hidden_states(model, batch, reads_source=reads_source).astype(jnp.float32)
    is_token, half = batch.segments > 0, len(batch.inputs) // 2
    vectors = _normalize(pool(hidden, is_token, pooling))
    cosine = jnp.sum(vectors[:half] * vectors[half:], axis=-1)

    states = _normalize(hidden)
    matches = jnp.einsum("pce,pre->pcr", states[:half], states[half:], precision=jax.lax.Precision.HIGHEST)
    words = is_word[batch.inputs] & is_token
    # -1 is the lowest cosine, so no word matches a special token or padding.
    matches = jnp.where(words[:half, :, None] & words[half:, None, :], matches, -1.0)
    shares = words * weights[batch.inputs]
    shares = jnp.where(jnp.any(shares > 0, axis=1, keepdims=True), shares, words)
    shares /= jnp.sum(shares, axis=1, keepdims=True).clip(1e-30)
    precision = jnp.sum(shares[:half] * jnp.max(matches, axis=2), axis=1)
    recall = jnp.sum(shares[half:] * jnp.max(matches, axis=1), axis=1)

    has_words = jnp.any(words, axis=1)
    has_words = has_words[:half] & has_words[half:]
    is_positive = (precision > 0) & (recall > 0)
    f1 = jnp.where(is_positive, 2 * precision * recall / jnp.where(is_positive, precision + recall, 1), 0)
    matched = jnp.where(has_words[:, None], jnp.stack([precision, recall, f1], axis=1), 0)
    return jnp.concatenate([cosine[:, None], matched], axis=1)


def _normalize(vectors: jax.Array) -> jax.Array:
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True).clip(1e-12)


def _find_words(loaded: Loaded) -> np.ndarray:
    """bool [vocab]: False for the ids that `encode_texts` puts around a text."""
    before, after = loaded.tokenizer.prompt_frame or ((), ())
    is_word = np.ones(loaded.config.model.vocab_size, bool)
    is_word[[*before, *after, vocabulary.build_vocab(loaded.tokenizer).bos_id]] = False
    return is_word
