"""Mixture of experts: a router sends each token to a few feed-forward networks; no token is dropped."""

import dataclasses
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from llmjax.batch import Params
from llmjax.nn import weights
from llmjax.nn.dispatch import Shard, apply_experts, map_shards
from llmjax.nn.mlp import Mlp

_EPSILON = 1e-20  # keeps a sum of probabilities above 0


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
        out, stats = map_shards(self._forward_shard, x, token_mask, router, experts)
        return out if self.shared is None else out + self.shared(x), stats

    def _forward_shard(
        self, x: jax.Array, token_mask: jax.Array, router: Params, experts: Params, shard: Shard
    ) -> tuple[jax.Array, RouterStats]:
        """The rows of one device, and its part of the experts."""
        batch, _, embed = x.shape
        logits = jnp.matmul(
            x.astype(jnp.float32), router["weight"].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )
        if "bias" in router:
            logits += router["bias"].astype(jnp.float32)
        routed = route(logits, router.get("expert_bias"), self.routing)
        ids = routed.ids.reshape(-1, self.routing.experts_per_token)
        out = apply_experts(
            x.reshape(-1, embed), ids, routed.weights.reshape(ids.shape), experts, self.activation, shard
        )
        is_counted = jnp.broadcast_to(token_mask[..., None], routed.ids.shape).astype(jnp.float32)
        count = lambda ids, ones: jnp.zeros(self.routing.num_experts).at[ids.reshape(-1)].add(ones.reshape(-1))
        stats = RouterStats(
            counts=jax.vmap(count)(routed.ids, is_counted),
            probabilities=jnp.sum(jnp.where(token_mask[..., None], routed.probabilities, 0.0), axis=1),
            z=jnp.sum(jnp.where(token_mask, jax.nn.logsumexp(logits, axis=-1) ** 2, 0.0), axis=1),
        )
        return out.reshape(batch, -1, embed), stats


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
