"""RG-LRU: a linear recurrence computed by a parallel scan, and Griffin's recurrent block around it."""

import functools

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from llmjax.nn import weights
from llmjax.nn.linear import Linear
from llmjax.parallel.axes import constrain

RECURRENCES = ("sequential", "associative")
TAPS = 4  # of the convolution
SHARPNESS = 8.0  # the paper's c
# Keeps the slope of sqrt(1 - a^2) below 1000 as a goes to 1.
_LEAST = 2.5e-7

State = tuple[jax.Array, jax.Array]


def _fold(decay: jax.Array, inputs: jax.Array, how: str, unroll: int, reverse: bool) -> jax.Array:
    if how == "associative":
        # Applying (a, b) and then (c, d) to a state h: c (a h + b) + d.
        both = lambda first, second: (first[0] * second[0], second[0] * first[1] + second[1])
        return jax.lax.associative_scan(both, (decay, inputs), axis=1, reverse=reverse)[1]

    def step(h, item):
        a, b = item
        h = a * h + b
        return h, h

    items = (decay.swapaxes(0, 1), inputs.swapaxes(0, 1))
    return jax.lax.scan(step, jnp.zeros_like(inputs[:, 0]), items, reverse=reverse, unroll=unroll)[1].swapaxes(0, 1)


def linear_scan(decay: jax.Array, inputs: jax.Array, how: str, unroll: int = 1) -> jax.Array:
    """h with h_t = decay_t h_{t-1} + inputs_t from h = 0, elementwise over [batch, seq, width].

    `how`: "sequential" takes seq steps of one multiply and add; "associative" takes 2 log2(seq) passes over whole
    sequences (Blelloch, 1990; Martin and Cundy, 2018, arXiv 1709.04057), which wide hardware does sooner. The gradient
    is a recurrence of the same kind from the end to the start, so it is made the same way and keeps only h.
    """
    return _linear_scan(decay, inputs, how, unroll)  # type: ignore[return-value]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _linear_scan(decay, inputs, how, unroll):
    return _fold(decay, inputs, how, unroll, False)


def _forward(decay, inputs, how, unroll):
    h = checkpoint_name(_fold(decay, inputs, how, unroll, False), "attention")
    return h, (decay, h)


def _backward(how, unroll, saved, cotangent):
    decay, h = saved
    later = jnp.concatenate([decay[:, 1:], jnp.zeros_like(decay[:, :1])], axis=1)
    d_inputs = _fold(later, cotangent, how, unroll, True)
    before = jnp.concatenate([jnp.zeros_like(h[:, :1]), h[:, :-1]], axis=1)
    return d_inputs * before, d_inputs


_linear_scan.defvjp(_forward, _backward)


class BlockDiagonal(nnx.Module):
    """x [batch, seq, hidden] -> same, by one matrix for each of `blocks` equal parts of the width, and a bias."""

    def __init__(self, key: jax.Array, hidden: int, blocks: int, *, dtype: str):
        size = hidden // blocks
        dims = {"blocks": blocks, "head_dim": size, "embed": size}
        self.weight = weights.normal(key, dims, std=size**-0.5, dtype=dtype)
        self.bias = weights.constant(0.0, {"mlp": hidden}, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.weight[...].astype(x.dtype)
        parts = x.reshape(*x.shape[:-1], weight.shape[0], weight.shape[1])
        return jnp.einsum("bsnk,nkd->bsnd", parts, weight).reshape(x.shape) + self.bias[...].astype(x.dtype)


class RgLru(nnx.Module):
    """Griffin's recurrent block with its real-gated linear recurrent unit.  x [batch, seq, embed] -> same.

    De et al., 2024, arXiv 2402.19427, section 2.4. Two branches of width `hidden`: one through GeLU, the other through
    a causal convolution of four taps in each channel and the recurrence

        h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t),   a_t = exp(-8 r_t softplus(decay)),   r, i = sigmoid(gates of u)

    and their product is projected back. Decay and gates hang on the input alone, so h is linear in h_{t-1}, and a
    parallel scan gives all of it at once. Why this unit and not minGRU (arXiv 2410.01201), which shares that: its input
    is scaled so that h keeps its variance whatever the decay, the decay starts near 1 (a^8 uniform in 0.9 to 0.999) so
    that hundreds of tokens are remembered before anything is learned, and models of up to 14 billion parameters with
    published weights have shown that it trains.

    As in their code the first token of a segment enters unscaled. A position of 0 sets the decay to 0, and the taps
    reach no further back than the segment. A chunk that continues a document of another row starts from 0 as well:
    rows are shuffled.
    """

    def __init__(
        self,
        key: jax.Array,
        embed: int,
        hidden: int,
        *,
        blocks: int,
        how: str,
        unroll: int,
        scale: float,
        dtype: str,
    ):
        keys = jax.random.split(key, 7)
        width = {"mlp": hidden}
        self.enter = Linear(keys[0], {"embed": embed}, width, bias=True, dtype=dtype)
        self.gate = Linear(keys[1], {"embed": embed}, width, bias=True, dtype=dtype)
        self.out = Linear(keys[2], width, {"embed": embed}, bias=True, dtype=dtype, scale=scale)
        # A row for each distance back: like learned positions, to which optimizers have no matrix's claims.
        self.taps = weights.normal(keys[3], {"seq": TAPS, "mlp": hidden}, std=TAPS**-0.5, dtype=dtype)
        self.taps_bias = weights.constant(0.0, width, dtype=dtype)
        self.input_gate = BlockDiagonal(keys[4], hidden, blocks, dtype=dtype)
        self.decay_gate = BlockDiagonal(keys[5], hidden, blocks, dtype=dtype)
        least = -jnp.log(jax.random.uniform(keys[6], (hidden,), minval=0.9, maxval=0.999)) / SHARPNESS
        self.decay = weights.given(jnp.log(jnp.expm1(least)), ("mlp",), dtype=dtype)
        self.how, self.unroll = how, unroll

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """positions int [batch, seq]: a segment starts where they are 0."""
        empty = jnp.zeros((x.shape[0], TAPS - 1, self.taps.shape[-1]), x.dtype)
        u = self._convolve(self._with_past(x, empty), positions)
        decay, inputs = self._recurrence(u, positions)
        return self._leave(linear_scan(decay, inputs, self.how, self.unroll), x)

    def advance(self, x: jax.Array, positions: jax.Array, state: State, last: jax.Array) -> tuple[jax.Array, State]:
        """The same from a state: (output, the state after token `last` int [batch] of each row).

        A state is h float32 [batch, hidden] and the inputs of the convolution's taps but the newest.
        """
        h, past = state
        known = self._with_past(x, past.astype(x.dtype))
        decay, inputs = self._recurrence(self._convolve(known, positions), positions)
        h = linear_scan(decay, inputs.at[:, 0].add(decay[:, 0] * h), self.how, self.unroll)
        rows = jnp.arange(x.shape[0])
        past = known[rows[:, None], last[:, None] + jnp.arange(1, TAPS)]
        return self._leave(h, x), (h[rows, last], past.astype(jnp.float32))

    def _with_past(self, x: jax.Array, past: jax.Array) -> jax.Array:
        """[batch, TAPS - 1 + seq, hidden]: what the taps read."""
        return jnp.concatenate([past, constrain(self.enter(x), "batch", "seq", "mlp")], axis=1)

    def _convolve(self, known: jax.Array, positions: jax.Array) -> jax.Array:
        taps, seq = self.taps[...].astype(known.dtype), positions.shape[1]
        total = self.taps_bias[...].astype(known.dtype)
        for distance in range(TAPS):
            first = TAPS - 1 - distance
            reached = (positions >= distance)[..., None]
            total += jnp.where(reached, known[:, first : first + seq], 0) * taps[distance]
        return total

    def _recurrence(self, u: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """u [batch, seq, hidden] -> decay and inputs of the linear recurrence, float32."""
        sigmoid = lambda y: jax.nn.sigmoid(y.astype(jnp.float32))
        log_decay = -SHARPNESS * sigmoid(self.decay_gate(u)) * jax.nn.softplus(self.decay[...].astype(jnp.float32))
        scale = jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_decay), _LEAST))
        first = (positions == 0)[..., None]
        decay, scale = jnp.where(first, 0.0, jnp.exp(log_decay)), jnp.where(first, 1.0, scale)
        return decay, scale * sigmoid(self.input_gate(u)) * u.astype(jnp.float32)

    def _leave(self, h: jax.Array, x: jax.Array) -> jax.Array:
        gate = jax.nn.gelu(constrain(self.gate(x), "batch", "seq", "mlp"), approximate=True)
        return self.out(constrain(h.astype(x.dtype), "batch", "seq", "mlp") * gate)


def start(batch: int, hidden: int) -> State:
    """The state before a document."""
    return jnp.zeros((batch, hidden), jnp.float32), jnp.zeros((batch, TAPS - 1, hidden), jnp.float32)
