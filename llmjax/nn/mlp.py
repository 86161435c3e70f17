"""Feed-forward sub-block, gated or plain."""

import functools

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from llmjax.nn.linear import Linear
from llmjax.parallel.axes import constrain

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


class Mlp(nnx.Module):
    """down(activation(gate x) * up x), or down(activation(up x)) without a gate.  [batch, seq, embed] -> same.

    Gated form: Shazeer, 2020, arXiv 2002.05202.
    """

    def __init__(
        self,
        key: jax.Array,
        embed: int,
        mlp: int,
        *,
        activation: str,
        gated: bool,
        bias: bool,
        scale: float,
        dtype: str,
    ):
        k_gate, k_up, k_down = jax.random.split(key, 3)
        self.gate = Linear(k_gate, {"embed": embed}, {"mlp": mlp}, bias=bias, dtype=dtype) if gated else None
        self.up = Linear(k_up, {"embed": embed}, {"mlp": mlp}, bias=bias, dtype=dtype)
        self.down = Linear(k_down, {"mlp": mlp}, {"embed": embed}, bias=bias, dtype=dtype, scale=scale)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [batch, seq, embed] -> same."""
        activation = ACTIVATIONS[self.activation]
        if self.gate is None:
            h = activation(checkpoint_name(self.up(x), "mlp"))
        else:
            gate, up = checkpoint_name((self.gate(x), self.up(x)), "mlp")
            h = activation(gate) * up
        return self.down(constrain(h, "batch", "seq", "mlp"))
