"""Run stacked blocks by a scan or unrolled, with a rematerialisation policy chosen by name."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from llmjax.nn import quantized
from llmjax.parallel import fixed_tree

_save = jax.checkpoint_policies.save_only_these_names


def _is_wide_matmul(primitive: Any, *operands: Any, **parameters: Any) -> bool:
    """Whether it is a matmul without batch dimensions whose operands have more than 8 bits."""
    is_matmul = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return is_matmul(primitive, *operands, **parameters) and operands[0].dtype.itemsize > 1


_MATMULS = jax.checkpoint_policies.save_from_both_policies(_is_wide_matmul, _save(quantized.PRODUCT))


def _offload(*names: str, save: tuple[str, ...] = ()) -> Callable[..., Any]:
    """The policy that moves `names` to the host's memory after the forward pass, and back in the backward pass."""
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=save,
        names_which_can_be_offloaded=names,
        offload_src="device",
        offload_dst="pinned_host",
    )


# What each policy saves of a block besides its input; the backward pass computes everything else again. Modules give
# these names to what they compute (`checkpoint_name`):
# input      the input of the block
# qkv        queries, keys and values as a kernel reads them, or the projected inputs of a recurrence
# attention  outputs of the attention kernel, with what its own backward pass needs, or of the recurrence
# mlp        outputs of the first maps of a feed-forward layer or expert, gate and up, before the activation
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": _save("attention"),
    "attention_qkv": _save("attention", "qkv"),
    "attention_mlp": _save("attention", "mlp"),
    "attention_qkv_mlp": _save("attention", "qkv", "mlp"),
    "dots": _MATMULS,
    "dots_attention": jax.checkpoint_policies.save_from_both_policies(_MATMULS, _save("attention")),
    "offload_input": _offload("input", save=("attention",)),
    "offload": _offload("input", "attention", "qkv"),
}


def run(
    body: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
    x: jax.Array,
    stacked: Any,
    *,
    scan: bool,
    remat: str,
    quantization: str = "none",
) -> tuple[jax.Array, Any]:
    """Fold `body(x, layer) -> (x, out)` over the leading "layers" dimension of `stacked`; returns (x, stacked outs).

    The unrolled form reads the same stacked parameters, so checkpoints and optimizers do not depend on it.

    quantization   of the linear layers in `body`, one of `quantized.QUANTIZATIONS`
    """
    with quantized.use(quantization):
        return _run(body, x, stacked, scan=scan, remat=remat)


def _run(body, x, stacked, *, scan: bool, remat: str):
    of_whole = body  # under parallel.reduction="fixed_tree" a layer has parts of its weights
    body = lambda x, layer: of_whole(x, fixed_tree.gather_shards(layer))
    if remat != "none":
        block = body
        body = jax.checkpoint(
            lambda x, layer: block(checkpoint_name(x, "input"), layer), policy=REMAT[remat], prevent_cse=not scan
        )
    if scan:
        return jax.lax.scan(body, x, stacked)
    leaves, tree = jax.tree.flatten(stacked)
    # The gradient of lax.split is one concatenation; that of indexing would sum padded copies of the whole stack.
    slices = [jax.lax.split(leaf, (1,) * leaf.shape[0], axis=0) for leaf in leaves]
    outs = []
    for layer in zip(*slices, strict=True):
        x, out = body(x, tree.unflatten([piece.squeeze(0) for piece in layer]))
        outs.append(out)
    return x, jax.tree.map(lambda *pieces: jnp.stack(pieces), *outs)


def by_kind(make: Callable[[bool], Any], local_layers: Sequence[bool]) -> dict[bool, Any]:
    """make(local) for each kind of layer in `local_layers`: local (True) and global (False)."""
    return {local: make(local) for local in sorted(set(local_layers))}


def select(kinds: dict[bool, Any], local: jax.Array) -> Any:
    """The entry of `kinds` for a traced flag `local`; nothing is computed where there is one kind only.

    Entries are trees of arrays. A node that has a method `select(other, use_other)` selects by it.
    """
    if len(kinds) == 1:
        return next(iter(kinds.values()))
    has_method = lambda node: hasattr(node, "select")
    choose = lambda a, b: a.select(b, local) if has_method(a) else jnp.where(local, b, a)
    return jax.tree.map(choose, kinds[False], kinds[True], is_leaf=has_method)
