"""Mixture of experts: a router sends each token to a few feed-forward networks; no token is dropped."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llmjax.nn import weights
from llmjax.nn.grouped import grouped_matmul
from llmjax.nn.mlp import ACTIVATIONS, Mlp
from llmjax.parallel import axes

_SMALL = 1e-20  # keeps the sum of the chosen probabilities above 0


def clamped_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """(up + 1) gate sigmoid(1.702 gate), gate clamped above at 7, up at both sides (OpenAI, 2025, arXiv 2508.10925)."""
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)


def _gated(activation: Callable) -> Callable:
    return lambda gate, up: activation(gate) * up


# How an expert joins its two inner layers, by the name of its activation.
GLU_ACTIVATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    **{name: _gated(activation) for name, activation in ACTIVATIONS.items()},
    "clamped_swiglu": clamped_swiglu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """How a router chooses.

    experts      number of them
    chosen       how many each token goes to
    score        softmax (over all experts) or sigmoid (each expert alone)
    renormalise  whether the weights of the chosen sum to 1 (softmax: the same as a softmax over the chosen alone)
    scale        that the weights are multiplied by last
    groups       experts form so many groups of neighbours, and a token's experts come from `top_groups` of them: those
                 with the highest sum of their two best scores (DeepSeek-AI, 2024, arXiv 2412.19437)
    """

    experts: int
    chosen: int
    score: str
    renormalise: bool
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1


class RouterOutput(NamedTuple):
    """What a router says of each token.

    ids            int [..., chosen], different experts
    weights        float32 [..., chosen]
    probabilities  float32 [..., experts], of sum 1: what the balance loss works on
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
        probabilities = scores / (jnp.sum(scores, axis=-1, keepdims=True) + _SMALL)
    # Without an expert bias the logits have the order of the scores, and no two of them round to the same value.
    ranks = jax.lax.stop_gradient(logits if expert_bias is None and routing.groups == 1 else scores)
    if expert_bias is not None:
        ranks += jax.lax.stop_gradient(expert_bias)
    if routing.groups > 1:
        ranks = jnp.where(_open_experts(ranks, routing), ranks, -jnp.inf)
    ids = jax.lax.top_k(ranks, routing.chosen)[1]
    if routing.score == "softmax" and routing.renormalise:
        chosen = jax.nn.softmax(jnp.take_along_axis(logits, ids, axis=-1), axis=-1)
    else:
        chosen = jnp.take_along_axis(scores, ids, axis=-1)
        if routing.renormalise:
            chosen /= jnp.sum(chosen, axis=-1, keepdims=True) + _SMALL
    return RouterOutput(ids, chosen * routing.scale, probabilities)


def _open_experts(ranks: jax.Array, routing: Routing) -> jax.Array:
    """Whether each expert's group is among the best: bool [..., experts]."""
    grouped = ranks.reshape(*ranks.shape[:-1], routing.groups, -1)
    best = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
    top = jax.lax.top_k(best, routing.top_groups)[1]
    chosen = jnp.any(top[..., None] == jnp.arange(routing.groups), axis=-2)
    return jnp.repeat(chosen, routing.experts // routing.groups, axis=-1)


class RouterStats(NamedTuple):
    """What a layer's router did with each row, padding left out; float32.

    counts         [batch, experts], tokens that each expert got
    probabilities  [batch, experts], summed over tokens
    z              [batch], squared log of the softmax's denominator, summed over tokens
    """

    counts: jax.Array
    probabilities: jax.Array
    z: jax.Array


class Router(nnx.Module):
    """x [..., embed] -> float32 logits [..., experts].

    bias         one for each logit, learned
    expert_bias  the bias that balances load (Wang et al., 2024, arXiv 2408.15664): it has no gradient of its own. The
                 optimizer moves it against the load of its expert, as it does every parameter of axes ("experts",)
    """

    def __init__(self, key: jax.Array, embed: int, experts: int, *, bias: bool, expert_bias: bool, dtype: str):
        self.weight = weights.normal(key, {"embed": embed, "router": experts}, std=embed**-0.5, dtype=dtype)
        self.bias = weights.constant(0.0, {"router": experts}, dtype=dtype) if bias else None
        self.expert_bias = weights.constant(0.0, {"experts": experts}, dtype="float32") if expert_bias else None


class Experts(nnx.Module):
    """Feed-forward networks of one shape: down(join(gate x, up x)), each map with an optional bias.

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
    """Sum over a token's experts of weight times expert, plus an expert for all tokens.  [batch, seq, embed] -> same.

    The shared expert (DeepSeekMoE: Dai et al., 2024, arXiv 2401.06066) is a gated feed-forward layer of width `shared`;
    0: none. `activation` is its own. `bias` is that of the experts' maps and of the router's logits.
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
        count = routing.experts
        self.router = Router(k_router, embed, count, bias=bias, expert_bias=expert_bias, dtype=dtype)
        self.experts = Experts(k_experts, embed, mlp, count, bias=bias, scale=scale, dtype=dtype)
        self.shared = (
            Mlp(k_shared, embed, shared, activation=activation, gated=True, bias=bias, scale=scale, dtype=dtype)
            if shared
            else None
        )
        self.routing, self.activation = routing, expert_activation

    def __call__(self, x: jax.Array, token_mask: jax.Array) -> tuple[jax.Array, RouterStats]:
        """x [batch, seq, embed], token_mask bool [batch, seq] (False: padding, not counted) -> (like x, stats)."""
        router, experts = (nnx.to_pure_dict(nnx.state(part)) for part in (self.router, self.experts))
        out, stats = _on_shards(self._shard, x, token_mask, router, experts)
        return out if self.shared is None else out + self.shared(x), stats

    def _shard(
        self, x: jax.Array, token_mask: jax.Array, router: dict, experts: dict, is_first_shard: Any
    ) -> tuple[jax.Array, RouterStats]:
        """One shard's rows; `experts` may be a shard of the width, of which one is the first and adds the bias."""
        batch, _, embed = x.shape
        logits = jnp.matmul(
            x.astype(jnp.float32), router["weight"].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )
        if "bias" in router:
            logits += router["bias"].astype(jnp.float32)
        choice = route(logits, router.get("expert_bias"), self.routing)
        chosen = choice.ids.reshape(-1, self.routing.chosen)
        out = dispatch_and_combine(
            x.reshape(-1, embed), chosen, choice.weights.reshape(chosen.shape), experts, self.activation, is_first_shard
        )
        counted = jnp.broadcast_to(token_mask[..., None], choice.ids.shape).astype(jnp.float32)
        count = lambda ids, one: jnp.zeros(self.routing.experts).at[ids.reshape(-1)].add(one.reshape(-1))
        stats = RouterStats(
            counts=jax.vmap(count)(choice.ids, counted),
            probabilities=jnp.sum(jnp.where(token_mask[..., None], choice.probabilities, 0.0), axis=1),
            z=jnp.sum(jnp.where(token_mask, jax.nn.logsumexp(logits, axis=-1) ** 2, 0.0), axis=1),
        )
        return out.reshape(batch, -1, embed), stats


def dispatch_and_combine(
    x: jax.Array, ids: jax.Array, combine_weights: jax.Array, experts: dict, activation: str, is_first_shard: Any
) -> jax.Array:
    """x [tokens, embed] through experts `ids` [tokens, chosen], weighted by combine_weights [tokens, chosen] -> like x.

    (token, expert) pairs are sorted by expert, so that each expert meets its tokens in one matmul.
    """
    flat = ids.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(len(flat), dtype=order.dtype), unique_indices=True)
    expert, sizes = flat[order], jnp.bincount(flat, length=experts["gate"].shape[0]).astype(jnp.int32)

    def linear(rows, name):
        product = grouped_matmul(rows, experts[name].astype(rows.dtype), sizes)
        bias = experts.get(f"{name}_bias")
        if bias is None:
            return product
        return product + (bias if name != "down" else jnp.where(is_first_shard, bias, 0)).astype(rows.dtype)[expert]

    rows = _spread(x, order, inverse)
    out = linear(GLU_ACTIVATIONS[activation](linear(rows, "gate"), linear(rows, "up")), "down")
    out = _permute(out, inverse, order).reshape(*ids.shape, -1)
    return jnp.einsum("sk,skd->sd", combine_weights, out, preferred_element_type=jnp.float32).astype(x.dtype)


@jax.custom_vjp
def _permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Rows of x in another order. JAX's own gradient of a gather is a scatter; that of a permutation is its inverse."""
    return x[order]


_permute.defvjp(lambda x, order, inverse: (x[order], inverse), lambda inverse, dy: (dy[inverse], None, None))


@jax.custom_vjp
def _spread(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x [tokens, embed] -> [pairs, embed]: each token once for each of its experts, in the order of the experts."""
    return x[order // (len(order) // len(x))]


def _spread_backward(saved, dy):
    inverse, tokens = saved
    return jnp.sum(dy[inverse].reshape(tokens.shape[0], -1, dy.shape[-1]), axis=1), None, None


_spread.defvjp(lambda x, order, inverse: (_spread(x, order, inverse), (inverse, x[:, :0])), _spread_backward)


def _on_shards(
    shard_fn: Callable, x: jax.Array, token_mask: jax.Array, router: dict, experts: dict
) -> tuple[jax.Array, RouterStats]:
    """`shard_fn` on every device's own rows, so that sorting moves no token to another device.

    Rows are cut as the batch is, the experts' width as "mlp" is: each device gives its part of the sum over the width.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(mesh.manual_axes) == set(mesh.axis_names):
        return shard_fn(x, token_mask, router, experts, True)
    (rows,) = axes.spec(("batch",), x.shape[:1])
    (width,) = axes.spec(("mlp",), experts["down"].shape[1:2])
    cut = {"gate": P(None, None, width), "up": P(None, None, width), "down": P(None, width), "down_bias": P()}
    cut |= {"gate_bias": P(None, width), "up_bias": P(None, width)}

    def local(x, token_mask, router, experts):
        is_first_shard = True if width is None else jax.lax.axis_index(width) == 0
        out, stats = shard_fn(x, token_mask, router, experts, is_first_shard)
        return out[None], stats

    out, stats = jax.shard_map(
        local,
        in_specs=(P(rows), P(rows), P(), {name: cut[name] for name in experts}),
        out_specs=(P(width, rows), P(rows)),
        check_vma=False,
    )(x, token_mask, router, experts)
    return axes.constrain(jnp.sum(out, axis=0, dtype=jnp.float32).astype(x.dtype), "batch", "seq", None), stats


class Losses(NamedTuple):
    """Sums over all layers, as `Output` has them."""

    aux_loss: jax.Array
    aux_metrics: dict[str, tuple[jax.Array, jax.Array]]


def losses(
    stats: RouterStats, expert_bias: jax.Array | None, routing: Routing, *, balance_loss: float, router_z_loss: float
) -> Losses:
    """Sums over rows of `stats`, whose fields have a leading layers dimension; `expert_bias` [layers, experts] or None.

    balance      of each row: experts times the sum over experts of its share of the choices times its mean probability,
                 1 where both are even (Fedus et al., 2021, arXiv 2101.03961; for each row as in DeepSeek-V3, arXiv
                 2412.19437). The loss weights it by the row's tokens and adds the layers up.
    z            squared log of the softmax's denominator (Zoph et al., 2022, arXiv 2202.08906), likewise
    expert_bias  a term of value 0 whose gradient is each expert's load above the mean

    The metrics are means over tokens and layers: of balance and z, of the fraction of the row's choices that its most
    loaded expert received, and of the fraction of experts that received no token of the row.
    """
    chosen = jnp.sum(stats.counts, axis=-1)  # [layers, batch]
    tokens = chosen / routing.chosen
    some = jnp.maximum(tokens, 1.0)[..., None]
    shares = stats.counts / (routing.chosen * some)
    even = routing.experts * jnp.sum(tokens * jnp.sum(shares * stats.probabilities / some, axis=-1))
    z, weight = jnp.sum(stats.z), jnp.sum(tokens)
    aux_loss = balance_loss * even + router_z_loss * z
    if expert_bias is not None:
        # Times the number of experts: whole numbers, which add up to the same in any order.
        excess = routing.experts * jnp.sum(stats.counts, axis=1) - jnp.sum(chosen, axis=1)[:, None]
        aux_loss += jnp.sum(jax.lax.stop_gradient(excess) * (expert_bias - jax.lax.stop_gradient(expert_bias)))
    mean = lambda of_row: (jnp.sum(tokens * of_row), weight)
    metrics = {
        "load_balance_loss": (even, weight),
        "router_z_loss": (z, weight),
        "max_expert_load": mean(jnp.max(shares, axis=-1)),
        "unused_expert_fraction": mean(jnp.mean(stats.counts == 0, axis=-1)),
    }
    return Losses(aux_loss, jax.tree.map(jax.lax.stop_gradient, metrics))
