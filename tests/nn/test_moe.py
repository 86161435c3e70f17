"""Routers and experts against plain float64, one token at a time."""

import dataclasses
import functools
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.nn import dispatch, grouped, moe
from llmjax.nn.grouped import grouped_matmul
from llmjax.nn.moe import MoeMlp, RouterStats, Routing
from llmjax.optim.config import OptimizerConfig
from llmjax.optim.optimizer import make_optimizer
from llmjax.parallel import axes

MIXTRAL = Routing(num_experts=4, experts_per_token=2, score="softmax", renormalise=True)
PLAIN = Routing(num_experts=8, experts_per_token=3, score="softmax", renormalise=False)
DEEPSEEK = Routing(
    num_experts=8, experts_per_token=3, score="sigmoid", renormalise=True, scale=2.5, groups=4, top_groups=2
)
GPT_OSS = dataclasses.replace(MIXTRAL, num_experts=5, experts_per_token=3)
CASES = {
    "mixtral": (MIXTRAL, {}),
    "plain": (PLAIN, {}),
    "deepseek": (DEEPSEEK, dict(expert_bias=True, shared=6)),
    "gpt_oss": (GPT_OSS, dict(bias=True, activation="clamped_swiglu")),
}


def layer(routing, *, bias=False, expert_bias=False, shared=0, activation="silu", embed=12, mlp=8):
    """A layer moved off its start, so that no bias is 0."""
    layer = MoeMlp(
        jax.random.key(0), embed, mlp, routing=routing, shared=shared, activation="silu",
        expert_activation=activation, bias=bias,
        expert_bias=expert_bias, scale=1.0, dtype="float32",
    )  # fmt: skip
    graph, state = nnx.split(layer)
    rng = np.random.default_rng(0)
    return graph, jax.tree.map(lambda p: p + 0.3 * rng.normal(size=p.shape).astype(np.float32), nnx.to_pure_dict(state))


def rows(batch=4, seq=10, embed=12):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(batch, seq, embed)), jnp.float32)
    return x, jnp.arange(seq) < jnp.array([seq, seq - 3, 1, 0][:batch])[:, None]


def oracle_choice(logits, expert_bias, routing):
    """(ids, weights) of one token, by the definitions."""
    softmax = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    scores = softmax if routing.score == "softmax" else 1 / (1 + np.exp(-logits))
    ranks = scores + (0 if expert_bias is None else expert_bias)
    groups = np.split(np.arange(routing.num_experts), routing.groups)
    best = sorted(groups, key=lambda group: -np.sort(ranks[group])[-2:].sum())[: routing.top_groups]
    ids = sorted(np.concatenate(best), key=lambda e: -ranks[e])[: routing.experts_per_token]
    weights = scores[ids] / (scores[ids].sum() if routing.renormalise else 1)
    return ids, weights * routing.scale, scores / scores.sum()


def oracle(params, x, real, routing, activation):
    """(out, counts, probabilities, z) with every expert a plain network in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x, e = np.asarray(x, np.float64), p["experts"]
    batch, seq, _ = x.shape
    out = np.zeros_like(x)
    counts, probabilities, z = (
        np.zeros((batch, routing.num_experts)),
        np.zeros((batch, routing.num_experts)),
        np.zeros(batch),
    )
    silu = lambda h: h / (1 + np.exp(-h))

    def join(gate, up):
        if activation == "silu":
            return silu(gate) * up
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
        return (up + 1) * gate / (1 + np.exp(-1.702 * gate))

    for b in range(batch):
        for s in range(seq):
            logits = x[b, s] @ p["router"]["weight"] + p["router"].get("bias", 0)
            ids, weights, scores = oracle_choice(logits, p["router"].get("expert_bias"), routing)
            for i, weight in zip(ids, weights, strict=True):
                part = lambda name, y, i=i: y @ e[name][i] + (e[f"{name}_bias"][i] if f"{name}_bias" in e else 0)
                out[b, s] += weight * part("down", join(part("gate", x[b, s]), part("up", x[b, s])))
            if "shared" in p:
                w = {name: p["shared"][name]["weight"] for name in ("gate", "up", "down")}
                out[b, s] += (silu(x[b, s] @ w["gate"]) * (x[b, s] @ w["up"])) @ w["down"]
            if real[b, s]:
                counts[b, ids] += 1
                probabilities[b] += scores
                z[b] += np.log(np.exp(logits).sum()) ** 2
    return out, counts, probabilities, z


def dense(params, x, routing, activation):
    """The layer as a differentiable sum over all experts, each weighed by 0 where it is not chosen."""
    router, e = params["router"], params["experts"]
    logits = x @ router["weight"] + router.get("bias", 0)
    choice = moe.route(logits, router.get("expert_bias"), routing)
    gates = jnp.sum(jax.nn.one_hot(choice.ids, routing.num_experts) * choice.weights[..., None], axis=-2)
    linear = lambda name, y: jnp.einsum("bsei,eio->bseo", y, e[name]) + e.get(f"{name}_bias", 0)
    every = jnp.broadcast_to(x[:, :, None], (*x.shape[:2], routing.num_experts, x.shape[-1]))
    h = dispatch.GLU_ACTIVATIONS[activation](linear("gate", every), linear("up", every))
    out = jnp.einsum("bse,bsed->bsd", gates, linear("down", h))
    if "shared" in params:
        w = {name: params["shared"][name]["weight"] for name in ("gate", "up", "down")}
        out += (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]
    return out


@pytest.mark.parametrize("case", CASES)
def test_equals_one_token_at_a_time(case):
    routing, settings = CASES[case]
    graph, params = layer(routing, **settings)
    x, real = rows()
    out, load = jax.jit(lambda p, x, real: nnx.merge(graph, p)(x, real))(params, x, real)
    expected = oracle(params, x, real, routing, settings.get("activation", "silu"))
    np.testing.assert_allclose(out, expected[0], atol=2e-5 * np.abs(expected[0]).max())
    for actual, expected_value in zip(load, expected[1:], strict=True):
        np.testing.assert_allclose(actual, expected_value, rtol=1e-5, atol=1e-5)
    # No token is dropped: every real token is served by as many experts as it chose, and padding by none.
    np.testing.assert_array_equal(load.counts.sum(-1), routing.experts_per_token * real.sum(-1))


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_all_experts_at_once(case):
    routing, settings = CASES[case]
    graph, params = layer(routing, **settings)
    x, real = rows()
    activation = settings.get("activation", "silu")
    direction = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), jnp.float32)
    routed_loss = lambda p, x: jnp.sum(nnx.merge(graph, p)(x, real)[0] * direction)
    dense_loss = lambda p, x: jnp.sum(dense(p, x, routing, activation) * direction)
    actual, expected = (jax.jit(jax.grad(f, (0, 1)))(params, x) for f in (routed_loss, dense_loss))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(b).max()))


def test_remat_computes_no_output_of_an_expert_again():
    """Grouped matmuls of a rematerialised layer on TPU: 3 forward, 2 again, and 2 for the gradient of each of the 3."""
    graph, params = layer(MIXTRAL)
    x, real = rows()
    run = jax.checkpoint(lambda params, x: nnx.merge(graph, params)(x, real)[0])
    gradient = jax.jit(jax.grad(lambda params, x: jnp.sum(run(params, x) ** 2), argnums=(0, 1)))
    text = gradient.trace(params, x).lower(lowering_platforms=("tpu",)).as_text()
    assert len(re.findall(r"call @t?gmm\w*\(", text)) == 3 + 2 + 6


def test_one_expert_can_process_all_tokens():
    graph, params = layer(MIXTRAL)
    params["router"]["weight"] = jnp.zeros_like(params["router"]["weight"])  # equal logits: the first two, for all
    x, _ = rows(batch=4, seq=300)
    out, load = jax.jit(lambda p, x: nnx.merge(graph, p)(x, jnp.ones(x.shape[:2], bool)))(params, x)
    expected = jax.jit(lambda p, x: dense(p, x, MIXTRAL, "silu"))(params, x)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_array_equal(load.counts, np.tile([300.0, 300, 0, 0], (4, 1)))


@pytest.mark.parametrize("sizes", [(5, 0, 700, 1), (0, 0, 0, 6), (1, 1, 1, 1), (130, 128, 0, 127)])
def test_grouped_matmul(sizes):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(sum(sizes), 6)), jnp.float32)
    w, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 6, 5), (sum(sizes), 5)))
    out, back = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.array(sizes)), x, w)
    expected, expected_back = jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, jnp.array(sizes)), x, w)
    for a, b in zip((out, *back(dy)), (expected, *expected_back(dy)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sizes", [(5, 0, 700, 1), (0, 0, 0, 6), (500, 12, 512, 0)])
def test_the_tpu_kernel_agrees_with_ragged_dot(sizes):
    """Interpreted; groups that share a tile of 512 rows, empty ones, and sides that are no multiple of 128.

    Both add up to 700 products of order 1 in float32, in another order: 1e-4 is ten times their difference.
    """
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(sum(sizes), 200)), jnp.float32)
    w, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 200, 130), (sum(sizes), 130)))
    groups = jnp.array(sizes)
    expected, expected_back = jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, groups), x, w)
    out = grouped.tpu_kernel(x, w, groups, interpret=True)
    dx = grouped.tpu_kernel(dy, w, groups, transposed=True, interpret=True)
    dw = grouped.tpu_kernel_gradient(x, w, groups, dy, interpret=True)
    for a, b in zip((out, dx, dw), (expected, *expected_back(dy)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_dispatch_moves_no_token_between_devices():
    """The only collective of a forward pass over a split batch gathers weights; replicated weights need none."""
    graph, params = layer(MIXTRAL)
    x, real = rows()
    x, real = jnp.tile(x, (2, 1, 1)), jnp.tile(real, (2, 1))
    mesh = jax.make_mesh((8, 1, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        put = lambda x: jax.device_put(x, jax.NamedSharding(mesh, axes.spec(("batch",), mesh=mesh)))
        run = jax.jit(lambda p, x, real: nnx.merge(graph, p)(x, real))
        text = run.lower(params, put(x), put(real)).compile().as_text()
    for collective in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
        assert collective not in text, collective


def test_losses_by_hand():
    """Two layers, two rows: one even, one that uses one expert of four and is half as long; and an empty row."""
    routing = Routing(num_experts=4, experts_per_token=1, score="softmax", renormalise=False)
    counts = jnp.array([[[2.0, 2, 2, 2], [4, 0, 0, 0], [0, 0, 0, 0]]] * 2)
    probabilities = jnp.array([[[2.0, 2, 2, 2], [3, 1, 0, 0], [0, 0, 0, 0]]] * 2)
    load = RouterStats(counts, probabilities, jnp.array([[8.0, 4, 0]] * 2))
    expert_bias = jnp.zeros((2, 4))
    actual = functools.partial(moe.losses, load, routing=routing, balance_loss=0.1, router_z_loss=0.01)
    penalty, stats = actual(expert_bias)
    # the even row's balance is 1 over 8 tokens, the other's 4 * 1 * 3/4 over 4
    np.testing.assert_allclose(stats["load_balance_loss"], (2 * (8 + 4 * 3), 24))
    np.testing.assert_allclose(stats["max_expert_load"], (2 * (8 * 0.25 + 4 * 1), 24))
    np.testing.assert_allclose(stats["unused_expert_fraction"], (2 * 4 * 0.75, 24))
    np.testing.assert_allclose(penalty, 0.1 * 40 + 0.01 * 24, rtol=1e-6)
    excess = jax.grad(lambda expert_bias: actual(expert_bias).aux_loss)(expert_bias)
    np.testing.assert_array_equal(excess, [[4 * 6 - 12, 4 * 2 - 12, 4 * 2 - 12, 4 * 2 - 12]] * 2)


def test_the_expert_bias_balances_the_load():
    """The logits favour some experts and no loss corrects that; the updates of the expert bias do."""
    routing = dataclasses.replace(DEEPSEEK, groups=1, top_groups=1)
    logits = np.random.default_rng(0).normal(size=(4, 200, routing.num_experts)) + np.linspace(
        0, 3, routing.num_experts
    )
    config = OptimizerConfig(name="adamw", expert_bias_update_rate=0.005, warmup_steps=0)
    optimizer = make_optimizer(config, horizon=200, axes={"expert_bias": ("layers", "experts")})

    @jax.jit
    def step(params, state):
        def penalty(params):
            ids = moe.route(jnp.float32(logits), params["expert_bias"][0], routing).ids
            counts = jnp.sum(jax.nn.one_hot(ids, routing.num_experts), axis=(1, 2))[None]
            load = RouterStats(counts, jnp.zeros_like(counts), jnp.zeros((1, 4)))
            actual = moe.losses(load, params["expert_bias"], routing, balance_loss=0.0, router_z_loss=0.0)
            loads = jnp.sum(counts[0], axis=0)
            return actual.aux_loss, (actual.aux_loss, jnp.max(loads) / jnp.mean(loads))

        grads, (value, busiest) = jax.grad(penalty, has_aux=True)(params)
        params, state, _ = optimizer.update(grads, state, params)
        return params, state, value, busiest

    params = {"expert_bias": jnp.zeros((1, routing.num_experts))}
    state, busiest = optimizer.init(params), []
    for _ in range(150):
        params, state, value, load = step(params, state)
        busiest.append(float(load))  # the busiest expert's load over the mean load
        assert value == 0
    assert busiest[0] > 1.8
    assert max(busiest[-10:]) < 1.15


def test_sums_over_rows_add_up():
    routing = CASES["plain"][0]
    graph, params = layer(routing)
    x, real = rows()
    stack = lambda load: jax.tree.map(lambda leaf: leaf[None], load)

    @jax.jit
    def of(x, real):
        load = stack(nnx.merge(graph, params)(x, real)[1])
        return moe.losses(load, None, routing, balance_loss=0.1, router_z_loss=0.01)

    full, halves = of(x, real), [of(x[:2], real[:2]), of(x[2:], real[2:])]
    together = jax.tree.map(jnp.add, *halves)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(full), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
