"""From logits to the next token: penalties, filters and draws, each a pure function of the rows of a batch."""

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.errors import UserError
from llmjax.nn.embedding import MASKED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How continuations are sampled: the penalty first, then temperature, top_k, top_p and min_p.

    max_tokens          new tokens of a continuation at most
    temperature         logits are divided by it, from 1e-6 to 1e6; 0: always the most likely token
    top_k               only the k most likely tokens; 0: all
    top_p               only the fewest most likely tokens whose probabilities, after temperature and top_k, reach p
    min_p               only tokens at least this times as likely as the most likely one, after temperature; 0: all
    repetition_penalty  `penalize` tokens that the text contains by it; 1: none
    seed                keys the draws, together with a prompt's index, the sample and the position
    stop                texts that end a continuation, which does not contain them
    """

    max_tokens: int = 100
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        if self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens}: must be at least 1")
        # Beyond these limits, float32 cannot tell one token's score from another's, or from that of an excluded token.
        if self.temperature and not 1e-6 <= self.temperature <= 1e6:
            raise UserError(f"temperature={self.temperature}: must be 0 (the most likely token), or from 1e-6 to 1e6")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k}: must be at least 0 (0: all tokens)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p={self.min_p}: must be from 0 (all tokens) to 1")
        if not 1e-3 <= self.repetition_penalty <= 1e3:
            raise UserError(
                f"repetition_penalty={self.repetition_penalty}: must be from 1e-3 to 1e3 (above 1: fewer repetitions)"
            )
        if "" in self.stop:
            raise UserError("stop='': every text contains it; give a text, or leave it out")


def penalize(logits: jax.Array, seen: jax.Array, penalty: jax.Array | float) -> jax.Array:
    """Logits [batch, vocab] with the repetition penalty of CTRL (Keskar et al., 2019, arXiv 1909.05858).

    Where `seen` bool [batch, vocab] is True, positive logits are divided by the penalty, and negative ones multiplied,
    as in transformers: so a penalty above 1 makes every one of these tokens less likely.

    penalty   one for all rows, or [batch, 1]
    """
    penalty = jnp.asarray(penalty, jnp.float32)
    # By the reciprocal, which the compiler uses for a constant penalty, so that an array of penalties gives equal bits.
    return jnp.where(seen, logits * jnp.where(logits < 0, penalty, 1 / penalty), logits)


def allow(scores: jax.Array, top_p: jax.Array | float, min_p: jax.Array | float) -> jax.Array:
    """Which tokens can be drawn: bool [batch, k], of scores [batch, k] in falling order, the first of which is 0.

    top_p   the fewest tokens whose probabilities reach it (Holtzman et al., 2019, arXiv 1904.09751)
    min_p   tokens whose probability is at least this times the first one's (Nguyen et al., 2024, arXiv 2407.01082)

    Each is one number for all rows, or [batch, 1]. The first token is allowed even where rounding excludes it.
    """
    probabilities = jax.nn.softmax(scores, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    return ((before < top_p) & (scores >= jnp.log(min_p))) | (jnp.arange(scores.shape[-1]) == 0)


def draw(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """One token id for each row of float32 logits [batch, vocab] and keys [batch]; int32 [batch].

    Among equal logits the lowest id comes first, so top_k=k leaves exactly k tokens to draw from. The penalty, which
    depends on the text so far, is that of `penalize`.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Scores are relative to the highest logit, so that no temperature overflows.
    scores = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_k == 0 and sampling.top_p == 1 and sampling.min_p == 0:
        return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)
    scores, ids = jax.lax.top_k(scores, min(sampling.top_k or logits.shape[-1], logits.shape[-1]))
    allowed = allow(scores, sampling.top_p, sampling.min_p)
    index = jax.vmap(jax.random.categorical)(keys, jnp.where(allowed, scores, MASKED))
    return jnp.take_along_axis(ids, index[:, None], axis=-1)[:, 0].astype(jnp.int32)


def draw_rows(
    logits: jax.Array,
    keys: jax.Array,
    seen: jax.Array,
    *,
    inverse_temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    repetition_penalty: jax.Array,
) -> jax.Array:
    """`penalize` and `draw` with settings of each row: int32 [batch], of float32 logits and bool seen [batch, vocab].

    keys [batch] and settings [batch] as in Sampling, but inverse_temperature is 1 / temperature, or 0 for the most
    likely token. What no row needs is not computed.
    """
    penalized = lambda: penalize(logits, seen, repetition_penalty[:, None])
    scores = jax.lax.cond(jnp.any(repetition_penalty != 1), penalized, lambda: logits)
    greedy = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    draw_each = jax.vmap(jax.random.categorical)

    def sample() -> jax.Array:
        relative = (scores - jnp.max(scores, axis=-1, keepdims=True)) * inverse_temperature[:, None]
        free = lambda: draw_each(keys, relative).astype(jnp.int32)
        is_filtered = (top_k > 0) | (top_p < 1) | (min_p > 0)
        # Noise is by token without a filter and by rank with one, as in `draw`.
        filtered = lambda: jnp.where(is_filtered, filter_and_draw(relative), free())
        return jax.lax.cond(jnp.any(is_filtered), filtered, free)

    def filter_and_draw(relative: jax.Array) -> jax.Array:
        ranked, ids = jax.lax.top_k(relative, relative.shape[-1])
        rank = jnp.arange(ranked.shape[-1])
        is_inside = rank < jnp.where(top_k > 0, top_k, len(rank))[:, None]
        is_allowed = allow(jnp.where(is_inside, ranked, -jnp.inf), top_p[:, None], min_p[:, None]) & is_inside
        index = draw_each(keys, jnp.where(is_allowed, ranked, MASKED))
        return jnp.take_along_axis(ids, index[:, None], axis=-1)[:, 0].astype(jnp.int32)

    is_drawn = inverse_temperature > 0
    return jnp.where(is_drawn, jax.lax.cond(jnp.any(is_drawn), sample, lambda: greedy), greedy)


def make_row_keys(seed: int, rows: np.ndarray) -> jax.Array:
    """The key [batch] of each row's draws, from (index of the prompt, number of its sample) uint32 [batch, 2].

    The first sample of a prompt, number 0, is the one that is drawn where there are no others.
    """

    def make_key(row):
        key = jax.random.fold_in(jax.random.key(seed), row[0])
        # Positions, which are folded into the key of a row, are below 2^31.
        return jnp.where(row[1] == 0, key, jax.random.fold_in(key, jnp.uint32(2**31) + row[1]))

    return jax.vmap(make_key)(jnp.asarray(rows, jnp.uint32))


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings in it; all of it if it contains none."""
    return text[: min((at for part in stop if (at := text.find(part)) >= 0), default=len(text))]
