"""The head of a model that predicts labels of documents: classes, or numbers."""

from flax import nnx
import jax
import jax.numpy as jnp

from llmjax.nn import weights
from llmjax.nn.linear import project


class TaskHead(nnx.Module):
    """hidden [..., embed] -> float32 outputs [..., num_outputs]: logits of classes, or numbers.

    bias   whether there is one
    scale  of the hidden states
    """

    def __init__(self, key: jax.Array, embed: int, num_outputs: int, *, bias: bool, scale: float, dtype: str):
        self.weight = weights.normal(key, {"embed": embed, "outputs": num_outputs}, std=0.02, dtype=dtype)
        self.bias = weights.constant(0.0, {"outputs": num_outputs}, dtype=dtype) if bias else None
        self.scale = scale

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., embed] -> float32 [..., num_outputs]."""
        if self.scale != 1:
            hidden = hidden * jnp.asarray(self.scale, hidden.dtype)
        outputs = project(hidden, self.weight[...], 1, jnp.float32)
        return outputs if self.bias is None else outputs + self.bias[...].astype(jnp.float32)
