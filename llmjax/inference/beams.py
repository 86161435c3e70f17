"""Beam search: the most likely outputs of an encoder-decoder, scored and stopped as transformers does it."""

from collections.abc import Sequence
import dataclasses
import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from llmjax.batch import Graph, Params
from llmjax.errors import UserError
from llmjax.models.encdec import Cache
from llmjax.models.registry import ModelConfig

_WORST = -1e9  # the score of a beam that does not exist


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearch:
    """How outputs are searched.

    max_tokens      tokens of an output at most
    beams           outputs that are continued at the same time
    length_penalty  the log-probability of an output is divided by its length to this power: above 0, a higher one
                    favours long outputs
    """

    max_tokens: int = 100
    beams: int = 4
    length_penalty: float = 1.0

    def __post_init__(self):
        if self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens}: must be at least 1")
        if self.beams < 1:
            raise UserError(f"beams={self.beams}: must be at least 1")
        if not -10 <= self.length_penalty <= 10:
            raise UserError(f"length_penalty={self.length_penalty}: must be from -10 to 10")

    def check_model(self, config: ModelConfig) -> None:
        """UserError for a model whose outputs cannot be searched."""
        if not config.reads_source:
            raise UserError(
                f"beams={self.beams}: model.family={config.family!r} is not an encoder-decoder, and only these have a "
                "beam search; leave it out"
            )


class _Beams(NamedTuple):
    """Outputs of each prompt, best first.

    tokens    int32 [batch, beams, max_tokens]
    scores    float32 [batch, beams]
    lengths   int32 [batch, beams]: tokens before the stop id
    """

    tokens: jax.Array
    scores: jax.Array
    lengths: jax.Array

    def select(self, index: jax.Array) -> "_Beams":
        """Those with the numbers [batch, n]."""
        tokens = jnp.take_along_axis(self.tokens, index[:, :, None], axis=1)
        return _Beams(tokens, *(jnp.take_along_axis(array, index, axis=1) for array in (self.scores, self.lengths)))


def search(
    graph: Graph,
    params: Params,
    config: ModelConfig,
    tokens: np.ndarray,
    lengths: np.ndarray,
    method: BeamSearch,
    stop_ids: Sequence[int],
) -> list[list[tuple[list[int], float]]]:
    """For each prompt (tokens [batch, seq] with `lengths` [batch]) its (new ids, score), best first: `beams` of them.

    A score is the sum of the log-probabilities of the ids and of the stop id, divided by their number to the power of
    the length penalty. The search of a prompt ends when no continued beam, at its present length, scores above the
    worst of its finished ones, as in transformers with early_stopping=False. Ids end before one of `stop_ids`.
    """
    method.check_model(config)
    model = nnx.merge(graph, params)
    found = jax.device_get(_search(model, tokens, lengths, method=method, stop_ids=tuple(stop_ids)))
    return [
        [(row[:length].tolist(), float(score)) for row, score, length in zip(*prompt, strict=True)]
        for prompt in zip(*found, strict=True)
    ]


@functools.partial(jax.jit, static_argnames=("method", "stop_ids"))
def _search(model, tokens: jax.Array, lengths: jax.Array, *, method: BeamSearch, stop_ids: tuple[int, ...]) -> _Beams:
    """The finished beams of each prompt."""
    beams, max_tokens = method.beams, method.max_tokens
    hidden, cache, first = model.prefill(tokens, lengths, max_tokens)
    # All beams of a prompt start equal. That only the first has the score 0 keeps them from continuing equally.
    logits, cache = jnp.repeat(model.unembed(hidden), beams, axis=0), _repeat(cache, beams)
    first = jnp.repeat(first, beams)
    empty = _Beams(
        tokens=jnp.zeros((len(tokens), beams, max_tokens), jnp.int32),
        scores=jnp.full((len(tokens), beams), _WORST),
        lengths=jnp.zeros((len(tokens), beams), jnp.int32),
    )
    running = empty._replace(scores=empty.scores.at[:, 0].set(0))

    def is_unfinished(state):
        i, *_, can_improve = state
        return (i < max_tokens) & jnp.any(can_improve)

    def step(state):
        i, logits, cache, running, finished, can_improve = state
        candidates, parents, ended = _extend(running, logits, i, method, stop_ids)
        is_ranked = jnp.arange(ended.shape[1]) < beams  # the others are spare, for beams that end
        scores = candidates.scores / jnp.power(jnp.float32(i + 1), method.length_penalty)
        scores = jnp.where(ended & is_ranked & can_improve[:, None], scores, _WORST)
        merged = jax.tree.map(
            lambda old, new: jnp.concatenate([old, new], 1), finished, candidates._replace(scores=scores)
        )
        finished = merged.select(jax.lax.top_k(merged.scores, beams)[1])
        open_beams = candidates._replace(scores=jnp.where(ended, _WORST, candidates.scores))
        index = jax.lax.top_k(open_beams.scores, beams)[1]
        running = open_beams.select(index)
        best = running.scores[:, 0] / jnp.power(jnp.float32(i + 1), method.length_penalty)
        worst = jnp.min(finished.scores, axis=1)  # _WORST while fewer outputs than beams are finished
        can_improve &= best > worst
        rows = jnp.take_along_axis(parents, index, axis=1) + beams * jnp.arange(len(parents))[:, None]
        cache = _select(cache, rows.reshape(-1))
        token = running.tokens[:, :, i].reshape(-1, 1)
        hidden, cache = model.cached(token, (first + i)[:, None], cache)
        return i + 1, model.unembed(hidden[:, 0]), cache, running, finished, can_improve

    start = (jnp.int32(0), logits, cache, running, empty, jnp.ones(len(tokens), bool))
    return jax.lax.while_loop(is_unfinished, step, start)[4]


def _extend(
    running: _Beams, logits: jax.Array, i: jax.Array, method: BeamSearch, stop_ids: tuple[int, ...]
) -> tuple[_Beams, jax.Array, jax.Array]:
    """(the best continuations by token `i`, the number of the beam of each, whether it ends the output).

    There are as many that at least `beams` of them do not end with a stop id. logits [batch * beams, vocab].
    """
    batch, beams = running.scores.shape
    log_probs = jax.nn.log_softmax(logits, axis=-1).reshape(batch, beams, -1) + running.scores[:, :, None]
    vocab = log_probs.shape[-1]
    scores, index = jax.lax.top_k(log_probs.reshape(batch, -1), max(2, 1 + len(stop_ids)) * beams)
    parents, tokens = index // vocab, (index % vocab).astype(jnp.int32)
    is_stop = jnp.isin(tokens, jnp.array(stop_ids, jnp.int32))
    candidates = running.select(parents)
    candidates = _Beams(
        tokens=candidates.tokens.at[:, :, i].set(tokens), scores=scores, lengths=candidates.lengths + ~is_stop
    )
    return candidates, parents, is_stop | (i + 1 == method.max_tokens)


def _repeat(cache: Cache, count: int) -> Cache:
    """The cache with each row `count` times."""
    repeat = lambda axis: functools.partial(jnp.repeat, repeats=count, axis=axis)
    return Cache(
        jax.tree.map(repeat(1), cache.targets), jax.tree.map(repeat(1), cache.source), repeat(0)(cache.source_mask)
    )


def _select(cache: Cache, rows: jax.Array) -> Cache:
    """The cache whose row r continues row `rows[r]` of the same prompt: the source is the same."""
    return cache._replace(targets=jax.tree.map(lambda array: jnp.take(array, rows, axis=1), cache.targets))
