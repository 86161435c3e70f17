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
CONV_WIDTH = 4
SHARPNESS = 8.0  # c in the paper
_MIN_VARIANCE = 2.5e-7  # of 1 - a^2: keeps the slope of its root below 1000 as a goes to 1

State = tuple[jax.Array, jax.Array]


def _fold(decay: jax.Array, inputs: jax.Array, recurrence: str, unroll: int, reverse: bool) -> jax.Array:
    if recurrence == "associative":
        # Applying (a, b) and then (c, d) to a state h: c (a h + b) + d.
        compose = lambda first, second: (first[0] * second[0], second[0] * first[1] + second[1])
        return jax.lax.associative_scan(compose, (decay, inputs), axis=1, reverse=reverse)[1]

    def step(h, item):
        a, b = item
        h = a * h + b
        return h, h

    items = (decay.swapaxes(0, 1), inputs.swapaxes(0, 1))
    return jax.lax.scan(step, jnp.zeros_like(inputs[:, 0]), items, reverse=reverse, unroll=unroll)[1].swapaxes(0, 1)


def linear_scan(decay: jax.Array, inputs: jax.Array, recurrence: str, unroll: int = 1) -> jax.Array:
    """h with h_t = decay_t h_{t-1} + inputs_t from h = 0, elementwise over [batch, seq, width].

    `recurrence`: "sequential" takes seq steps of one multiply and add; "associative" takes 2 log2(seq) passes over
    whole sequences (Blelloch, 1990; Martin and Cundy, 2018, arXiv 1709.04057), which is faster on parallel hardware.
    The gradient is a recurrence of the same kind from the end to the start, so only h is saved for it.
    """
    return _linear_scan(decay, inputs, recurrence, unroll)  # type: ignore[return-value]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _linear_scan(decay, inputs, recurrence, unroll):
    return _fold(decay, inputs, recurrence, unroll, False)


def _forward(decay, inputs, recurrence, unroll):
    h = checkpoint_name(_fold(decay, inputs, recurrence, unroll, False), "attention")
    return h, (decay, h)


def _backward(recurrence, unroll, saved, cotangent):
    decay, h = saved
    next_decay = jnp.concatenate([decay[:, 1:], jnp.zeros_like(decay[:, :1])], axis=1)
    d_inputs = _fold(next_decay, cotangent, recurrence, unroll, True)
    previous_h = jnp.concatenate([jnp.zeros_like(h[:, :1]), h[:, :-1]], axis=1)
    return d_inputs * previous_h, d_inputs


_linear_scan.defvjp(_forward, _backward)


class BlockDiagonal(nnx.Module):
    """x [batch, seq, hidden] -> same, with one matrix for each of `blocks` equal parts of the width, and a bias."""

    def __init__(self, key: jax.Array, hidden: int, blocks: int, *, dtype: str):
        size = hidden // blocks
        dims = {"blocks": blocks, "head_dim": size, "embed": size}
        self.weight = weights.normal(key, dims, std=size**-0.5, dtype=dtype)
        self.bias = weights.constant(0.0, {"mlp": hidden}, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [batch, seq, hidden] -> same."""
        weight = self.weight[...].astype(x.dtype)
        parts = x.reshape(*x.shape[:-1], weight.shape[0], weight.shape[1])
        return jnp.einsum("bsnk,nkd->bsnd", parts, weight).reshape(x.shape) + self.bias[...].astype(x.dtype)


class RgLru(nnx.Module):
    """Griffin's recurrent block with its real-gated linear recurrent unit.  x [batch, seq, embed] -> same.

    De et al., 2024, arXiv 2402.19427, section 2.4. It has two branches of width `hidden`. One is GeLU(gate); the other
    is a causal depthwise convolution of width 4 followed by the recurrence

        h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t),   a_t = exp(-8 r_t softplus(decay)),   r, i = sigmoid(gates of u)

    Their product is projected to embed. Decay and gates depend on the input alone, so h is linear in h_{t-1}, and a
    parallel scan computes all steps at once. minGRU (arXiv 2410.01201) has this property too. In this unit, the input
    is scaled so that the variance of h does not depend on the decay, the decay starts near 1 (a^8 uniform in 0.9 to
    0.999) so that it remembers hundreds of tokens from the start, and it is proven in published models of up to 14
    billion parameters.

    As in their code, the input of a segment's first token is not scaled. A position of 0 sets the decay to 0, and the
    convolution reads no token before the segment. A chunk that continues a document of another row also starts from 0,
    because rows are shuffled.
    """

    def __init__(
        self,
        key: jax.Array,
        embed: int,
        hidden: int,
        *,
        blocks: int,
        recurrence: str,
        unroll: int,
        scale: float,
        dtype: str,
    ):
        keys = jax.random.split(key, 7)
        width = {"mlp": hidden}
        self.input = Linear(keys[0], {"embed": embed}, width, bias=True, dtype=dtype)
        self.gate = Linear(keys[1], {"embed": embed}, width, bias=True, dtype=dtype)
        self.out = Linear(keys[2], width, {"embed": embed}, bias=True, dtype=dtype, scale=scale)
        # A row for each distance, like learned positions: optimizers do not treat it as a matrix.
        self.conv = weights.normal(keys[3], {"entries": CONV_WIDTH, "mlp": hidden}, std=CONV_WIDTH**-0.5, dtype=dtype)
        self.conv_bias = weights.constant(0.0, width, dtype=dtype)
        self.input_gate = BlockDiagonal(keys[4], hidden, blocks, dtype=dtype)
        self.decay_gate = BlockDiagonal(keys[5], hidden, blocks, dtype=dtype)
        softplus_decay = -jnp.log(jax.random.uniform(keys[6], (hidden,), minval=0.9, maxval=0.999)) / SHARPNESS
        self.decay = weights.from_array(jnp.log(jnp.expm1(softplus_decay)), ("mlp",), dtype=dtype)
        self.recurrence, self.unroll = recurrence, unroll

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """positions int [batch, seq]: a segment starts where they are 0."""
        empty = jnp.zeros((x.shape[0], CONV_WIDTH - 1, self.conv.shape[-1]), x.dtype)
        u = self._convolve(self._with_past(x, empty), positions)
        decay, inputs = self._decay_and_inputs(u, positions)
        return self._project_out(linear_scan(decay, inputs, self.recurrence, self.unroll), x)

    def advance(self, x: jax.Array, positions: jax.Array, state: State, last: jax.Array) -> tuple[jax.Array, State]:
        """The same from a state. Returns (output, the state after token `last` int [batch] of each row).

        A state is h float32 [batch, hidden] and the last CONV_WIDTH - 1 inputs of the convolution.
        """
        h, past = state
        conv_inputs = self._with_past(x, past.astype(x.dtype))
        decay, inputs = self._decay_and_inputs(self._convolve(conv_inputs, positions), positions)
        h = linear_scan(decay, inputs.at[:, 0].add(decay[:, 0] * h), self.recurrence, self.unroll)
        rows = jnp.arange(x.shape[0])
        past = conv_inputs[rows[:, None], last[:, None] + jnp.arange(1, CONV_WIDTH)]
        return self._project_out(h, x), (h[rows, last], past.astype(jnp.float32))

    def _with_past(self, x: jax.Array, past: jax.Array) -> jax.Array:
        """Inputs of the convolution [batch, CONV_WIDTH - 1 + seq, hidden]."""
        inputs = checkpoint_name(constrain(self.input(x), "batch", "seq", "mlp"), "qkv")
        return jnp.concatenate([past, inputs], axis=1)

    def _convolve(self, conv_inputs: jax.Array, positions: jax.Array) -> jax.Array:
        weight, seq = self.conv[...].astype(conv_inputs.dtype), positions.shape[1]
        total = self.conv_bias[...].astype(conv_inputs.dtype)
        for distance in range(CONV_WIDTH):
            first = CONV_WIDTH - 1 - distance
            in_segment = (positions >= distance)[..., None]
            total += jnp.where(in_segment, conv_inputs[:, first : first + seq], 0) * weight[distance]
        return total

    def _decay_and_inputs(self, u: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """u [batch, seq, hidden] -> decay and inputs of the linear recurrence, float32."""
        sigmoid = lambda y: jax.nn.sigmoid(y.astype(jnp.float32))
        log_decay = -SHARPNESS * sigmoid(self.decay_gate(u)) * jax.nn.softplus(self.decay[...].astype(jnp.float32))
        scale = jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_decay), _MIN_VARIANCE))
        first = (positions == 0)[..., None]
        decay, scale = jnp.where(first, 0.0, jnp.exp(log_decay)), jnp.where(first, 1.0, scale)
        return decay, scale * sigmoid(self.input_gate(u)) * u.astype(jnp.float32)

    def _project_out(self, h: jax.Array, x: jax.Array) -> jax.Array:
        gate = checkpoint_name(constrain(self.gate(x), "batch", "seq", "mlp"), "qkv")
        gate = jax.nn.gelu(gate, approximate=True)
        return self.out(constrain(h.astype(x.dtype), "batch", "seq", "mlp") * gate)


def start(batch: int, hidden: int) -> State:
    """The state before a document."""
    return jnp.zeros((batch, hidden), jnp.float32), jnp.zeros((batch, CONV_WIDTH - 1, hidden), jnp.float32)
