"""Recurrent cells (RNN, LSTM, GRU) and their scan over time; each segment starts from a zero state."""

from collections.abc import Callable
import dataclasses
import functools

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from llmjax.nn import weights
from llmjax.nn.linear import Linear, project
from llmjax.parallel.axes import constrain

State = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One kind of recurrent cell.

    gates               names, in the order of the "gates" dimension
    num_states          number of arrays [batch, hidden] in its state; the first one is its output
    two_bias_gates      gates with a second bias, of the recurrent product, which is not only added to that of the input
    step                (products of the input and of the state, float32 [batch, gates, hidden] each, state) -> next
                        state
    """

    gates: tuple[str, ...]
    num_states: int
    two_bias_gates: tuple[str, ...]
    step: Callable[[jax.Array, jax.Array, State], State]


def _rnn(x: jax.Array, h: jax.Array, state: State) -> State:
    del state
    return (jnp.tanh(x[:, 0] + h[:, 0]),)


def _lstm(x: jax.Array, h: jax.Array, state: State) -> State:
    total = x + h
    input_gate, forget_gate, new, output_gate = (total[:, i] for i in range(4))
    memory = jax.nn.sigmoid(forget_gate) * state[1] + jax.nn.sigmoid(input_gate) * jnp.tanh(new)
    return jax.nn.sigmoid(output_gate) * jnp.tanh(memory), memory


def _gru(x: jax.Array, h: jax.Array, state: State) -> State:
    reset, update = jax.nn.sigmoid(x[:, 0] + h[:, 0]), jax.nn.sigmoid(x[:, 1] + h[:, 1])
    new = jnp.tanh(x[:, 2] + reset * h[:, 2])
    return (new + update * (state[0] - new),)


# Elman, 1990; Hochreiter and Schmidhuber, 1997, with the forget gate of Gers et al.; Cho et al., 2014, with the reset
# gate applied after the product, as in cuDNN and torch, so that one matmul computes all gates.
CELLS = {
    "rnn": Cell(("new",), 1, (), _rnn),
    "lstm": Cell(("input", "forget", "new", "output"), 2, (), _lstm),
    "gru": Cell(("reset", "update", "new"), 1, ("new",), _gru),
}


def run(
    cell: str, inputs: jax.Array, weight: jax.Array, bias: jax.Array, resets: jax.Array, state: State, *, unroll: int
) -> tuple[State, jax.Array]:
    """Scan over time. Returns float32 (states, products).

    The states after each step are arrays [seq, batch, hidden]; products [seq, batch, gates, hidden] are the weight
    times the state before each step, plus bias.

    inputs   products of the inputs [seq, batch, gates, hidden], biases included
    weight   [hidden, gates, hidden] in the type of the recurrent matmul
    bias     float32 [gates, hidden], added to the product
    resets   bool [seq, batch]; True: the state is set to 0 before this token
    state    float32 arrays [batch, hidden] before the first token
    """

    def step(state: State, item):
        x, reset = item
        state = _reset(reset, state)
        product = jnp.einsum("bk,kgh->bgh", state[0].astype(weight.dtype), weight, preferred_element_type=jnp.float32)
        product += bias
        state = CELLS[cell].step(x.astype(jnp.float32), product, state)
        return state, (state, product)

    return jax.lax.scan(step, state, (inputs, resets), unroll=unroll)[1]


def scan(cell: str, unroll: int, inputs: jax.Array, weight: jax.Array, bias: jax.Array, resets: jax.Array) -> jax.Array:
    """The first of the states of `run` from a state of 0: [seq, batch, hidden], float32.

    The backward scan computes only the gradient of the state. That of the weight is one matmul over all steps
    afterwards; JAX's own rule would add a product of `batch` rows to the whole matrix at every step.
    """
    return _scan(cell, unroll, inputs, weight, bias, resets)  # type: ignore[return-value]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(cell, unroll, inputs, weight, bias, resets):
    return run(cell, inputs, weight, bias, resets, _zeros(cell, inputs), unroll=unroll)[0][0]


def _forward(cell, unroll, inputs, weight, bias, resets):
    result = run(cell, inputs, weight, bias, resets, _zeros(cell, inputs), unroll=unroll)
    # With remat "attention" the backward pass does not run the scan a second time.
    states, products = checkpoint_name(result, "attention")
    return states[0], (inputs, weight, resets, states, products)


def _backward(cell, unroll, saved, cotangent):
    inputs, weight, resets, states, products = saved
    before = tuple(jnp.concatenate([jnp.zeros_like(s[:1]), s[:-1]]) for s in states)
    before = _reset(resets, before)

    def step(d_state: State, item):
        x, product, state, reset, d_out = item
        _, pull = jax.vjp(CELLS[cell].step, x.astype(jnp.float32), product, state)
        d_x, d_product, d_before = pull((d_state[0] + d_out, *d_state[1:]))
        d_hidden = jnp.einsum("bgh,kgh->bk", d_product.astype(weight.dtype), weight, preferred_element_type=jnp.float32)
        return _reset(reset, (d_before[0] + d_hidden, *d_before[1:])), (d_x.astype(inputs.dtype), d_product)

    items = (inputs, products, before, resets, cotangent)
    _, (d_inputs, d_products) = jax.lax.scan(step, _zeros(cell, inputs), items, reverse=True, unroll=unroll)
    rows = before[0].astype(weight.dtype).reshape(-1, weight.shape[0])
    columns = d_products.astype(weight.dtype).reshape(rows.shape[0], -1)
    d_weight = jnp.matmul(rows.T, columns, preferred_element_type=jnp.float32).reshape(weight.shape)
    return d_inputs, d_weight.astype(weight.dtype), jnp.sum(d_products, axis=(0, 1)), None


_scan.defvjp(_forward, _backward)


def _zeros(cell: str, inputs: jax.Array) -> State:
    return (jnp.zeros((inputs.shape[1], inputs.shape[3]), jnp.float32),) * CELLS[cell].num_states


def _reset(resets: jax.Array, state: State) -> State:
    return tuple(jnp.where(resets[..., None], 0.0, s) for s in state)


class Recurrence(nnx.Module):
    """x [batch, seq, embed] -> same: a cell over time, and a projection to embed if the state has another width.

    The state is 0 at every position 0, so nothing passes from one segment of a row to the next. A chunk that continues
    a document of another row also starts from 0, because rows are shuffled.

    Each gate has its own weights, which optimizers treat as a matrix; they are concatenated for one matmul. A recurrent
    weight [hidden, hidden] has the axes ("embed", "mlp"), so that its inputs and outputs are sharded differently. The
    products of the inputs are one matmul over the whole sequence, outside the scan. The bias of the forget gate starts
    at 1 (Jozefowicz et al., 2015), all other biases at 0.
    """

    def __init__(self, key: jax.Array, embed: int, hidden: int, *, cell: str, unroll: int, scale: float, dtype: str):
        kind = CELLS[cell]
        k_inputs, k_recurrent, k_out = jax.random.split(key, 3)
        inputs = zip(kind.gates, jax.random.split(k_inputs, len(kind.gates)), strict=True)
        recurrent = zip(kind.gates, jax.random.split(k_recurrent, len(kind.gates)), strict=True)
        width = {"mlp": hidden}
        self.inputs = nnx.Dict({gate: Linear(k, {"embed": embed}, width, bias=True, dtype=dtype) for gate, k in inputs})
        self.recurrent = nnx.Dict(
            {
                gate: Linear(k, {"embed": hidden}, width, bias=gate in kind.two_bias_gates, dtype=dtype)
                for gate, k in recurrent
            }
        )
        if cell == "lstm":
            self.inputs["forget"].bias = weights.constant(1.0, width, dtype=dtype)
        projects = hidden != embed
        self.out = Linear(k_out, width, {"embed": embed}, bias=True, dtype=dtype, scale=scale) if projects else None
        self.cell, self.unroll = cell, unroll

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """positions int [batch, seq]: a segment starts where they are 0."""
        weight, bias = self._concatenate_gates(self.recurrent, x.dtype)
        inputs = checkpoint_name(self._project_in(x), "qkv")
        hidden = scan(self.cell, self.unroll, inputs, weight, bias.astype(jnp.float32), (positions == 0).T)
        return self._project_out(hidden.astype(x.dtype))

    def advance(self, x: jax.Array, positions: jax.Array, state: State, last: jax.Array) -> tuple[jax.Array, State]:
        """The same from a state. Returns (output, the state after token `last` int [batch] of each row)."""
        weight, bias = self._concatenate_gates(self.recurrent, x.dtype)
        inputs, resets = self._project_in(x), (positions == 0).T
        states, _ = run(self.cell, inputs, weight, bias.astype(jnp.float32), resets, state, unroll=self.unroll)
        return self._project_out(states[0].astype(x.dtype)), tuple(s[last, jnp.arange(len(last))] for s in states)

    def _project_in(self, x: jax.Array) -> jax.Array:
        """x [batch, seq, embed] -> [seq, batch, gates, hidden], with time first for the scan."""
        weight, bias = self._concatenate_gates(self.inputs, x.dtype)
        return constrain(project(x.swapaxes(0, 1), weight) + bias, "seq", "batch", None, "mlp")

    def _project_out(self, hidden: jax.Array) -> jax.Array:
        hidden = constrain(hidden.swapaxes(0, 1), "batch", "seq", "mlp")
        return hidden if self.out is None else self.out(hidden)

    def _concatenate_gates(self, maps: nnx.Dict, dtype) -> tuple[jax.Array, jax.Array]:
        """(weights [inputs, gates, hidden], biases [gates, hidden]) of all gates."""
        linears = [maps[gate] for gate in CELLS[self.cell].gates]
        weight = jnp.stack([linear.merged_weight(dtype) for linear in linears], axis=1)
        zero = jnp.zeros(weight.shape[-1], dtype)
        bias = jnp.stack([zero if linear.bias is None else linear.bias[...].astype(dtype) for linear in linears])
        # Gather the weight once, not at every step of the scan.
        return constrain(weight, None, None, "mlp"), bias


def start(cell: str, batch: int, hidden: int) -> State:
    """The state before a document."""
    return (jnp.zeros((batch, hidden), jnp.float32),) * CELLS[cell].num_states
