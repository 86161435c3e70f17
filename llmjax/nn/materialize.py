"""Values that a CPU should compute once and store, where XLA would compute them inside their readers."""

import jax


def materialize(x: jax.Array) -> jax.Array:
    """x; on a CPU it is computed once and stored. Other platforms compile it as if this call were not there.

    XLA:CPU (jax 0.10.2) has two habits that cost more than the store. It folds a transpose into the matmul that reads
    it, and matmuls with a transposed left operand miss its fast library: they take 1.3 times as long, batched ones 3
    to 4 times. And it computes what looks cheap again in every fusion that reads it, such as the cosines of rotary
    angles once for each head and layer.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)
