"""cuDNN's fused attention on GPU, through JAX's public interface, with a mask of queries x keys."""

import jax
from jax.ad_checkpoint import checkpoint_name


def cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    softcap: None = None,
    sinks: None = None,
    bias: None = None,
) -> jax.Array:
    """Attention with the result of `nn.attention.dot`, to rounding, in bfloat16, for queries that see a key.

    Shapes and arguments as in `dot`; the kernel has no soft-cap, no sinks, no gradient of a bias that is summed over
    rows, and no values of another width than the keys. JAX's interface has no segments, so `mask` is dense: 2 bytes for
    each pair of a query and a key of a row. The output carries the checkpoint name "attention"; the logarithm of the
    softmax's sum is not accessible, so that a remat policy that keeps the output computes the forward pass again.
    """
    out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale, implementation="cudnn")
    return checkpoint_name(out, "attention")
