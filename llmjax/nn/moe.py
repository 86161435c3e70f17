"""Mixture of experts: a router sends each token to a few feed-forward networks; no token is dropped."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llmjax.batch import Params
from llmjax.nn import weights
from llmjax.nn.grouped import grouped_matmul
from llmjax.nn.mlp import ACTIVATIONS, Mlp
from llmjax.parallel import axes

_EPSILON = 1e-20  # keeps a sum of probabilities above 0


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """How a router selects experts.

    num_experts        number of experts
    experts_per_token  number of experts that each token goes to
    score              softmax (over all experts) or sigmoid (each expert by itself)
    renormalise        whether the weights of the selected experts sum to 1 (with softmax, the softmax over them alone)
    scale              factor of the weights
    groups             consecutive experts form so many groups of equal size. A token's experts come from `top_groups`
                       of them, those with the highest sum of their two best scores (DeepSeek-AI, 2024, arXiv
                       2412.19437)
    """

    num_experts: int
    experts_per_token: int
    score: str
    renormalise: bool
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1


class RouterOutput(NamedTuple):
    """The experts of each token.

    ids            int [..., experts_per_token], different experts
    weights        float32 [..., experts_per_token]
    probabilities  float32 [..., experts] with sum 1, for the load-balance loss
    """

    ids: jax.Array
    weights: jax.Array
    probabilities: jax.Array


def route(logits: jax.Array, expert_bias: jax.Array | None, routing: Routing) -> RouterOutput:
    """Float32 logits [..., experts] -> RouterOutput. `expert_bias` [experts] affects the selection, not the weights."""
    if routing.score == "softmax":
        scores = probabilities = jax.nn.softmax(logits, axis=-1)
    else:
        scores = jax.nn.sigmoid(logits)
        probabilities = scores / (jnp.sum(scores, axis=-1, keepdims=True) + _EPSILON)
    # Without expert bias and groups, select by logits: different ones may round to equal scores.
    selection = jax.lax.stop_gradient(logits if expert_bias is None and routing.groups == 1 else scores)
    if expert_bias is not None:
        selection += jax.lax.stop_gradient(expert_bias)
    if routing.groups > 1:
        selection = jnp.where(_in_top_groups(selection, routing), selection, -jnp.inf)
    ids = jax.lax.top_k(selection, routing.experts_per_token)[1]
    if routing.score == "softmax" and routing.renormalise:
        combine_weights = jax.nn.softmax(jnp.take_along_axis(logits, ids, axis=-1), axis=-1)
    else:
        combine_weights = jnp.take_along_axis(scores, ids, axis=-1)
        if routing.renormalise:
            combine_weights /= jnp.sum(combine_weights, axis=-1, keepdims=True) + _EPSILON
    return RouterOutput(ids, combine_weights * routing.scale, probabilities)


def _in_top_groups(scores: jax.Array, routing: Routing) -> jax.Array:
    """Whether each expert's group is among the top groups: bool [..., experts]."""
    grouped = scores.reshape(*scores.shape[:-1], routing.groups, -1)
    group_scores = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
    top = jax.lax.top_k(group_scores, routing.top_groups)[1]
    is_top = jnp.any(top[..., None] == jnp.arange(routing.groups), axis=-2)
    return jnp.repeat(is_top, routing.num_experts // routing.groups, axis=-1)


class RouterStats(NamedTuple):
    """Sums over the tokens of each row, without padding; float32.

    counts         [batch, experts], tokens that each expert received
    probabilities  [batch, experts], sums of the router's probabilities
    z              [batch], sums of the squared log of the softmax's denominator
    """

    counts: jax.Array
    probabilities: jax.Array
    z: jax.Array


class Router(nnx.Module):
    """Parameters of a router, a linear map from embed to experts.

    bias         whether the logits have learned biases
    expert_bias  whether a bias that balances load takes part in the selection (Wang et al., 2024, arXiv 2408.15664).
                 The optimizer moves it, like every parameter of axes ("experts",), against the load of its expert
    """

    def __init__(self, key: jax.Array, embed: int, experts: int, *, bias: bool, expert_bias: bool, dtype: str):
        self.weight = weights.normal(key, {"embed": embed, "router": experts}, std=embed**-0.5, dtype=dtype)
        self.bias = weights.constant(0.0, {"router": experts}, dtype=dtype) if bias else None
        self.expert_bias = weights.constant(0.0, {"experts": experts}, dtype="float32") if expert_bias else None


class Experts(nnx.Module):
    """Parameters of feed-forward networks down(activation(gate x, up x)) of equal sizes, with optional biases.

    Weights [experts, embed, mlp] and [experts, mlp, embed], biases [experts, mlp] and [experts, embed].
    """

    def __init__(self, key: jax.Array, embed: int, mlp: int, experts: int, *, bias: bool, scale: float, dtype: str):
        k_gate, k_up, k_down = jax.random.split(key, 3)
        inner = {"experts": experts, "embed": embed, "mlp": mlp}
        outer = {"experts": experts, "mlp": mlp, "embed": embed}
        self.gate = weights.normal(k_gate, inner, std=embed**-0.5, dtype=dtype)
        self.up = weights.normal(k_up, inner, std=embed**-0.5, dtype=dtype)
        self.down = weights.normal(k_down, outer, std=scale * mlp**-0.5, dtype=dtype)
        zeros = lambda **dims: weights.constant(0.0, dims, dtype=dtype) if bias else None
        self.gate_bias, self.up_bias = zeros(experts=experts, mlp=mlp), zeros(experts=experts, mlp=mlp)
        self.down_bias = zeros(experts=experts, embed=embed)


class MoeMlp(nnx.Module):
    """Weighted sum of the outputs of a token's experts, plus that of a shared expert.  [batch, seq, embed] -> same.

    shared       width of the shared expert, a gated feed-forward layer for all tokens (DeepSeekMoE: Dai et al., 2024,
                 arXiv 2401.06066); 0: none
    activation   of the shared expert
    bias         whether the experts' maps and the router's logits have biases
    """

    def __init__(
        self,
        key: jax.Array,
        embed: int,
        mlp: int,
        *,
        routing: Routing,
        shared: int,
        activation: str,
        expert_activation: str,
        bias: bool,
        expert_bias: bool,
        scale: float,
        dtype: str,
    ):
        k_router, k_experts, k_shared = jax.random.split(key, 3)
        count = routing.num_experts
        self.router = Router(k_router, embed, count, bias=bias, expert_bias=expert_bias, dtype=dtype)
        self.experts = Experts(k_experts, embed, mlp, count, bias=bias, scale=scale, dtype=dtype)
        self.shared = (
            Mlp(k_shared, embed, shared, activation=activation, gated=True, bias=bias, scale=scale, dtype=dtype)
            if shared
            else None
        )
        self.routing, self.activation = routing, expert_activation

    def __call__(self, x: jax.Array, token_mask: jax.Array) -> tuple[jax.Array, RouterStats]:
        """x [batch, seq, embed], token_mask bool [batch, seq] (False: padding, not in the stats) -> (like x, stats)."""
        router, experts = (nnx.to_pure_dict(nnx.state(module)) for module in (self.router, self.experts))
        out, stats = _map_shards(self._forward_shard, x, token_mask, router, experts)
        return out if self.shared is None else out + self.shared(x), stats

    def _forward_shard(
        self, x: jax.Array, token_mask: jax.Array, router: Params, experts: Params, is_first_shard: Any
    ) -> tuple[jax.Array, RouterStats]:
        """The rows of one device. `experts` may be a shard of the width; the first one adds the output bias."""
        batch, _, embed = x.shape
        logits = jnp.matmul(
            x.astype(jnp.float32), router["weight"].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )
        if "bias" in router:
            logits += router["bias"].astype(jnp.float32)
        routed = route(logits, router.get("expert_bias"), self.routing)
        ids = routed.ids.reshape(-1, self.routing.experts_per_token)
        out = dispatch_and_combine(
            x.reshape(-1, embed), ids, routed.weights.reshape(ids.shape), experts, self.activation, is_first_shard
        )
        is_counted = jnp.broadcast_to(token_mask[..., None], routed.ids.shape).astype(jnp.float32)
        count = lambda ids, ones: jnp.zeros(self.routing.num_experts).at[ids.reshape(-1)].add(ones.reshape(-1))
        stats = RouterStats(
            counts=jax.vmap(count)(routed.ids, is_counted),
            probabilities=jnp.sum(jnp.where(token_mask[..., None], routed.probabilities, 0.0), axis=1),
            z=jnp.sum(jnp.where(token_mask, jax.nn.logsumexp(logits, axis=-1) ** 2, 0.0), axis=1),
        )
        return out.reshape(batch, -1, embed), stats


def dispatch_and_combine(
    x: jax.Array, ids: jax.Array, combine_weights: jax.Array, experts: Params, activation: str, is_first_shard: Any
) -> jax.Array:
    """Send x [tokens, embed] through experts `ids` [tokens, experts_per_token] and sum by combine_weights -> like x.

    (token, expert) pairs are sorted by expert, so that each map of all experts is one grouped matmul.
    """
    expert_of_pair = ids.reshape(-1)
    order = jnp.argsort(expert_of_pair, stable=True)
    positions = jnp.arange(len(order), dtype=order.dtype)
    inverse = jnp.zeros_like(order).at[order].set(positions, unique_indices=True)
    expert_of_row = expert_of_pair[order]
    sizes = jnp.bincount(expert_of_pair, length=experts["gate"].shape[0]).astype(jnp.int32)

    def linear(rows, name):
        product = grouped_matmul(rows, experts[name].astype(rows.dtype), sizes)
        bias = experts.get(f"{name}_bias")
        if bias is None:
            return product
        return (
            product + (bias if name != "down" else jnp.where(is_first_shard, bias, 0)).astype(rows.dtype)[expert_of_row]
        )

    rows = _dispatch(x, order, inverse)
    gate, up = checkpoint_name((linear(rows, "gate"), linear(rows, "up")), "mlp")
    out = _permute(linear(GLU_ACTIVATIONS[activation](gate, up), "down"), inverse, order)
    out = checkpoint_name(out.reshape(*ids.shape, -1), "experts")
    return jnp.einsum("sk,skd->sd", combine_weights, out, preferred_element_type=jnp.float32).astype(x.dtype)


@jax.custom_vjp
def _permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Reorder rows. JAX's gradient of a gather is a scatter; that of a permutation is the inverse permutation."""
    return x[order]


_permute.defvjp(lambda x, order, inverse: (x[order], inverse), lambda inverse, dy: (dy[inverse], None, None))


@jax.custom_vjp
def _dispatch(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x [tokens, embed] -> [pairs, embed]: each token once for each of its experts, sorted by expert."""
    return x[order // (len(order) // len(x))]


def _dispatch_backward(saved, dy):
    inverse, tokens = saved
    return jnp.sum(dy[inverse].reshape(tokens.shape[0], -1, dy.shape[-1]), axis=1), None, None


_dispatch.defvjp(lambda x, order, inverse: (_dispatch(x, order, inverse), (inverse, x[:, :0])), _dispatch_backward)


def _map_shards(
    shard_fn: Callable, x: jax.Array, token_mask: jax.Array, router: Params, experts: Params
) -> tuple[jax.Array, RouterStats]:
    """Apply `shard_fn` to the rows of each device, so that sorting moves no token to another device.

    Rows are sharded like the batch, and the experts' width like "mlp": each device computes a part of the sum over the
    width.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(mesh.manual_axes) == set(mesh.axis_names):
        return shard_fn(x, token_mask, router, experts, True)
    (rows,) = axes.spec(("batch",), x.shape[:1])
    (width,) = axes.spec(("mlp",), experts["down"].shape[1:2])
    specs = {"gate": P(None, None, width), "up": P(None, None, width), "down": P(None, width), "down_bias": P()}
    specs |= {"gate_bias": P(None, width), "up_bias": P(None, width)}

    def local(x, token_mask, router, experts):
        is_first_shard = True if width is None else jax.lax.axis_index(width) == 0
        out, stats = shard_fn(x, token_mask, router, experts, is_first_shard)
        return out[None], stats

    out, stats = jax.shard_map(
        local,
        in_specs=(P(rows), P(rows), P(), {name: specs[name] for name in experts}),
        out_specs=(P(width, rows), P(rows)),
        check_vma=False,
    )(x, token_mask, router, experts)
    return axes.constrain(jnp.sum(out, axis=0, dtype=jnp.float32).astype(x.dtype), "batch", "seq", None), stats


class Losses(NamedTuple):
    """Sums over all layers, as in `Output`."""

    aux_loss: jax.Array
    aux_metrics: dict[str, tuple[jax.Array, jax.Array]]


def losses(
    stats: RouterStats, expert_bias: jax.Array | None, routing: Routing, *, balance_loss: float, router_z_loss: float
) -> Losses:
    """Losses and metrics from `stats`, whose fields have a leading layers dimension.

    load balance  of each row: experts times the sum over experts of (fraction of the row's tokens) x (mean
                  probability), 1 if both are uniform (Fedus et al., 2021, arXiv 2101.03961; per row as in DeepSeek-V3,
                  arXiv 2412.19437). The loss is the sum over layers and rows, weighted by the row's tokens.
    z             squared log of the softmax's denominator (Zoph et al., 2022, arXiv 2202.08906), summed alike
    expert_bias   [layers, experts] or None. It adds a term of value 0, whose gradient is each expert's load above the
                  mean

    The metrics are means over tokens and layers: of both losses, of the fraction of a row's pairs that its most loaded
    expert received, and of the fraction of experts that received no token of the row.
    """
    pairs = jnp.sum(stats.counts, axis=-1)  # (token, expert) pairs [layers, batch]
    tokens = pairs / routing.experts_per_token
    at_least_one = jnp.maximum(tokens, 1.0)[..., None]
    load = stats.counts / (routing.experts_per_token * at_least_one)
    balance = routing.num_experts * jnp.sum(tokens * jnp.sum(load * stats.probabilities / at_least_one, axis=-1))
    z, weight = jnp.sum(stats.z), jnp.sum(tokens)
    aux_loss = balance_loss * balance + router_z_loss * z
    if expert_bias is not None:
        # Times the number of experts, so that these are integers, whose sum does not depend on the order.
        excess = routing.num_experts * jnp.sum(stats.counts, axis=1) - jnp.sum(pairs, axis=1)[:, None]
        aux_loss += jnp.sum(jax.lax.stop_gradient(excess) * (expert_bias - jax.lax.stop_gradient(expert_bias)))
    mean = lambda row_values: (jnp.sum(tokens * row_values), weight)
    metrics = {
        "load_balance_loss": (balance, weight),
        "router_z_loss": (z, weight),
        "max_expert_load": mean(jnp.max(load, axis=-1)),
        "unused_expert_fraction": mean(jnp.mean(stats.counts == 0, axis=-1)),
    }
    return Losses(aux_loss, jax.tree.map(jax.lax.stop_gradient, metrics))
