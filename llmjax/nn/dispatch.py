"""Send tokens to experts and combine the results, on one device or on several that share the experts."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llmjax.batch import Params
from llmjax.nn.grouped import grouped_matmul
from llmjax.nn.mlp import ACTIVATIONS
from llmjax.parallel import axes


def clamped_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """(up + 1) gate sigmoid(1.702 gate), gate clamped above at 7, up at both sides (OpenAI, 2025, arXiv 2508.10925)."""
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)


def _gated(activation: Callable) -> Callable:
    return lambda gate, up: activation(gate) * up


# Activation -> function of the outputs of an expert's two inner maps, gate and up.
GLU_ACTIVATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    **{name: _gated(activation) for name, activation in ACTIVATIONS.items()},
    "clamped_swiglu": clamped_swiglu,
}


@dataclasses.dataclass(frozen=True)
class Shard:
    """The part of the experts that a device holds.

    adds_bias     whether it adds the output bias: the first of the devices that share the width of an expert
    first_expert  index of its first expert; None: it holds all of them
    gather_axes   mesh axes along which devices have other experts and other rows
    sum_axes      mesh axes along which devices have other experts and the same rows
    """

    adds_bias: Any = True
    first_expert: jax.Array | None = None
    gather_axes: tuple[str, ...] = ()
    sum_axes: tuple[str, ...] = ()


def apply_experts(
    x: jax.Array, ids: jax.Array, combine_weights: jax.Array, experts: Params, activation: str, shard: Shard
) -> jax.Array:
    """Arguments and result of `dispatch_and_combine`, for the tokens of one device and experts that several share.

    Each device applies its experts to the tokens of the whole group; the results are summed where the tokens are. Every
    array has the same shape for any routing, so no token is dropped. Sending tokens to their experts instead needs room
    for the case that all tokens of all devices choose the experts of one: as much memory, and as many bytes on the wire
    where a device holds no more experts than a token chooses.
    """
    if shard.gather_axes:
        gather = lambda y: jax.lax.all_gather(y, shard.gather_axes, axis=0, tiled=True)
        x, ids, combine_weights = gather(x), gather(ids), gather(combine_weights)
    out = dispatch_and_combine(x, ids, combine_weights, experts, activation, shard)
    if shard.gather_axes:
        out = jax.lax.psum_scatter(out, shard.gather_axes, scatter_dimension=0, tiled=True)
    return jax.lax.psum(out, shard.sum_axes) if shard.sum_axes else out


def _select_local(
    ids: jax.Array, combine_weights: jax.Array, first_expert: jax.Array, num_local: int
) -> tuple[jax.Array, jax.Array]:
    """The choices of each token among the `num_local` experts from `first_expert` on, at most num_local of them.

    ids and combine_weights [tokens, experts_per_token] -> the same [tokens, min(experts_per_token, num_local)], with
    ids from 0 on; where a token has fewer choices here, the id is num_local and the weight is 0.
    """
    is_local = (ids >= first_expert) & (ids < first_expert + num_local)
    ids, combine_weights = jnp.where(is_local, ids - first_expert, num_local), jnp.where(is_local, combine_weights, 0)
    if num_local >= ids.shape[1]:
        return ids, combine_weights
    local_first = jnp.argsort(ids, axis=1, stable=True)[:, :num_local]
    return jnp.take_along_axis(ids, local_first, axis=1), jnp.take_along_axis(combine_weights, local_first, axis=1)


def dispatch_and_combine(
    x: jax.Array, ids: jax.Array, combine_weights: jax.Array, experts: Params, activation: str, shard: Shard
) -> jax.Array:
    """Send x [tokens, embed] through experts `ids` [tokens, experts_per_token] and sum by combine_weights -> like x.

    (token, expert) pairs are sorted by expert, so that each map of all experts is one grouped matmul. Only the experts
    of `shard` take part; pairs of other experts come last and count as 0.
    """
    num_experts = experts["gate"].shape[0]
    if shard.first_expert is not None:
        ids, combine_weights = _select_local(ids, combine_weights, shard.first_expert, num_experts)
    expert_of_pair = ids.reshape(-1)
    order = jnp.argsort(expert_of_pair, stable=True)
    positions = jnp.arange(len(order), dtype=order.dtype)
    inverse = jnp.zeros_like(order).at[order].set(positions, unique_indices=True)
    expert_of_row = expert_of_pair[order]
    sizes = jnp.bincount(expert_of_pair, length=num_experts).astype(jnp.int32)
    # A grouped matmul leaves rows of no group undefined.
    mask = lambda rows: rows
    if shard.first_expert is not None:
        mask = lambda rows: jnp.where((expert_of_row < num_experts)[:, None], rows, 0)

    # The weights multiply the inputs of "down", whose gradient the backward pass computes anyway. If they multiplied
    # its outputs, their gradient would need these, and remat would compute this matmul once more.
    weight = _permute(combine_weights.reshape(-1), order, inverse)[:, None]

    def linear(rows, name):
        product = grouped_matmul(rows, experts[name].astype(rows.dtype), sizes)
        bias = experts.get(f"{name}_bias")
        if bias is None:
            return product
        if name == "down":
            return product + (jnp.where(shard.adds_bias, bias, 0)[expert_of_row] * weight).astype(rows.dtype)
        return product + bias.astype(rows.dtype)[expert_of_row]

    rows = mask(_dispatch(x, order, inverse))
    gate, up = checkpoint_name((linear(rows, "gate"), linear(rows, "up")), "mlp")
    inner = (GLU_ACTIVATIONS[activation](gate, up) * weight).astype(x.dtype)
    return _combine(mask(linear(inner, "down")), order, inverse, ids.shape[1])


@jax.custom_vjp
def _permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Reorder rows. JAX's gradient of a gather is a scatter; that of a permutation is the inverse permutation."""
    return x[order]


_permute.defvjp(lambda x, order, inverse: (x[order], inverse), lambda inverse, dy: (dy[inverse], None, None))


@jax.custom_vjp
def _dispatch(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x [tokens, embed] -> [pairs, embed]: each token once for each of its experts, sorted by expert."""
    return x[order // (len(order) // len(x))]


def _dispatch_forward(x, order, inverse):
    return _dispatch(x, order, inverse), (order, inverse, x[:, :0])


def _dispatch_backward(saved, dy):
    order, inverse, tokens = saved
    return _combine(dy, order, inverse, len(order) // len(tokens)), None, None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _combine(rows: jax.Array, order: jax.Array, inverse: jax.Array, per_token: int) -> jax.Array:
    """rows [pairs, embed], sorted by expert -> [tokens, embed]: the sum of each token's rows.

    They are gathered as [per_token, tokens, embed]; a TPU would change the layout of [tokens, per_token, embed].
    """
    by_choice = rows[inverse.reshape(-1, per_token).T]
    return jnp.sum(by_choice, axis=0, dtype=jnp.float32).astype(rows.dtype)


def _combine_forward(rows, order, inverse, per_token):
    return _combine(rows, order, inverse, per_token), (order, inverse)


def _combine_backward(per_token, saved, dy):
    del per_token
    order, inverse = saved
    return _dispatch(dy, order, inverse), None, None


_combine.defvjp(_combine_forward, _combine_backward)


def map_shards(
    shard_fn: Callable, x: jax.Array, token_mask: jax.Array, router: Params, experts: Params
) -> tuple[jax.Array, Any]:
    """Apply `shard_fn` to the tokens of each device, so that sorting moves no token to another device.

    `shard_fn` takes the other arguments and a Shard, and returns (like x, sums over the tokens of each row).
    Tokens are sharded like "batch" and "seq", the experts like "experts", and their width like "mlp": each device
    computes a part of the sum over the width.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(mesh.manual_axes) == set(mesh.axis_names):
        return shard_fn(x, token_mask, router, experts, Shard())
    rows, seq = axes.spec(("batch", "seq"), x.shape[:2])
    expert, width = axes.spec(("experts", "mlp"), experts["down"].shape[:2])
    specs = {name: P(expert, None, width) for name in ("gate", "up")} | {"down": P(expert, width)}
    specs |= {"gate_bias": P(expert, width), "up_bias": P(expert, width), "down_bias": P(expert)}

    def local(x, token_mask, router, experts):
        shard = Shard(adds_bias=True if width is None else jax.lax.axis_index(width) == 0)
        if expert is not None:
            shard = _expert_shard(shard, _names(expert), _names(rows), experts["gate"].shape[0])
        out, stats = shard_fn(x, token_mask, router, experts, shard)
        return out[None], stats if seq is None else jax.lax.psum(stats, seq)

    out, stats = jax.shard_map(
        local,
        in_specs=(P(rows, seq), P(rows, seq), P(), {name: specs[name] for name in experts}),
        out_specs=(P(width, rows, seq), P(rows)),
        check_vma=False,
    )(x, token_mask, router, experts)
    return axes.constrain(jnp.sum(out, axis=0, dtype=jnp.float32).astype(x.dtype), "batch", "seq", None), stats


def _expert_shard(shard: Shard, expert: tuple[str, ...], rows: tuple[str, ...], num_local: int) -> Shard:
    """`shard` of a device whose experts are sharded over the mesh axes `expert`, and its rows over `rows`."""
    return dataclasses.replace(
        shard,
        first_expert=jax.lax.axis_index(expert) * num_local,
        gather_axes=tuple(axis for axis in expert if axis in rows),
        sum_axes=tuple(axis for axis in expert if axis not in rows),
    )


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of an entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else entry
