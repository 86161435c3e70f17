"""A small parameter tree with every kind of leaf that decoders have, stacked or with each layer on its own."""

import jax
import jax.numpy as jnp
import numpy as np

# Above optax's threshold of 128 for factored moments; mlp != embed, and queries are square, so that both cases occur.
SIZES = {"layers": 3, "vocab": 256, "entries": 16, "embed": 128, "mlp": 136, "heads": 2, "kv_heads": 1, "head_dim": 64}

BLOCK = {
    "norm": ("embed",),
    "query": ("embed", "heads", "head_dim"),
    "query_bias": ("heads", "head_dim"),
    "key": ("embed", "kv_heads", "head_dim"),
    "out": ("heads", "head_dim", "embed"),
    "up": ("embed", "mlp"),
    "up_bias": ("mlp",),
    "down": ("mlp", "embed"),
}
OUTSIDE = {
    "table": ("vocab", "embed"),
    "positions": ("entries", "embed"),
    "norm": ("embed",),
    "head": ("embed", "vocab"),
}
AXES = OUTSIDE | {"blocks": {name: ("layers", *axes) for name, axes in BLOCK.items()}}
UNSTACKED_AXES = OUTSIDE | {f"block_{i}": BLOCK for i in range(SIZES["layers"])}


def random_tree(seed: int, scale: float = 0.05) -> dict:
    """Float32 normal values for AXES; layers differ in size, so that statistics across layers would show."""
    rng = np.random.default_rng(seed)

    def draw(axes):
        values = rng.normal(size=[SIZES[a] for a in axes], scale=scale)
        if axes[0] == "layers":
            values *= (10.0 ** np.arange(SIZES["layers"])).reshape(-1, *[1] * (values.ndim - 1))
        return jnp.asarray(values, jnp.float32)

    return jax.tree.map(draw, AXES, is_leaf=lambda node: isinstance(node, tuple))


def unstack(tree: dict) -> dict:
    """The same parameters with one subtree for each layer."""
    outside = {name: leaf for name, leaf in tree.items() if name != "blocks"}
    return outside | {
        f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], tree["blocks"]) for i in range(SIZES["layers"])
    }


def run(optimizer, params: dict, gradients: list[dict]) -> tuple[dict, dict]:
    """(params, state) after one jitted update for each gradient."""
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for grads in gradients:
        params, state, _ = update(grads, state, params)
    return params, state
