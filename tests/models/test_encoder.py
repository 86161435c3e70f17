"""The encoder against a plain numpy one, and against itself in every form that must not matter."""

import dataclasses
import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.batch import Batch
from llmjax.models import registry
from llmjax.models.encoder import EncoderConfig
from llmjax.nn import losses
from llmjax.nn.stack import REMAT
from llmjax.parallel import axes
from tests.batches import packed

VOCAB = 50
BERT = EncoderConfig(
    vocab_size=VOCAB,
    vocab_multiple=16,
    num_layers=2,
    embed=32,
    num_heads=4,
    max_positions=40,
    token_types=3,
    pooler=True,
)
MODERN = EncoderConfig(
    vocab_size=VOCAB,
    vocab_multiple=16,
    num_layers=4,
    embed=32,
    num_heads=4,
    mlp=48,
    gated=True,
    norm_eps=1e-5,
    norm_position="pre",
    positions="rotary",
    rope_base=160_000.0,
    window=4,
    attention_pattern="gll",
    rope_local_base=100.0,
    biases="none",
)
BOTH = pytest.mark.parametrize("config", [BERT, MODERN], ids=["bert", "modernbert"])


def masked(rows: int, seq: int, vocab: int = VOCAB) -> Batch:
    """Packed rows of which every third token or so is hidden behind the last id and scored; with token types."""
    batch = packed(rows, seq, vocab - 1)
    rng = np.random.default_rng(7)
    hidden = (rng.random(batch.inputs.shape) < 0.35) & (batch.segments > 0)
    return dataclasses.replace(
        batch,
        inputs=np.where(hidden, vocab - 1, batch.inputs).astype(np.int32),
        targets=batch.inputs,
        weights=hidden.astype(np.float32),
        token_types=rng.integers(0, 3, batch.inputs.shape).astype(np.int32),
    )


@functools.cache
def parts(config: EncoderConfig):
    """Graph and parameters, moved off their start so that no bias is 0 and no scale is 1."""
    params = jax.jit(lambda key: registry.init(config, key))(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    leaves = [jnp.asarray(p + 0.1 * rng.normal(size=p.shape).astype(np.float32), p.dtype) for p in leaves]
    return registry.abstract(config)[0], tree.unflatten(leaves)


@functools.partial(jax.jit, static_argnums=0)
def logits(graph, params, batch, key=None):
    model = nnx.merge(graph, params)
    return model.unembed(model(batch, key).hidden)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(graph, params, batch, key=None):
    def loss(params):
        model = nnx.merge(graph, params)
        hidden = model(batch, key).hidden
        sums = losses.cross_entropy(hidden, model.unembed, batch.targets, batch.weights, chunk=8, z_loss=1e-3)
        return sums.nats + sums.z

    return jax.value_and_grad(loss)(params)


def assert_close(found, expected, rtol):
    """Every leaf within `rtol` of its largest value, or of 1: gradients of a key's bias are 0 but for rounding."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(1.0, np.abs(b).max()))


def oracle(config: EncoderConfig, params: dict, row: Batch) -> tuple[np.ndarray, np.ndarray]:
    """(logits [seq, vocab], pooled [embed]) of a batch of one row in float64, one head at a time."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    tokens, segments, positions, types = (
        np.asarray(x[0]) for x in (row.inputs, row.segments, row.positions, row.token_types)
    )
    size = config.head_size

    def norm(x, w):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * w["scale"] + w.get("bias", 0)

    def turn(x, base):
        if config.positions == "learned":
            return x
        out = np.empty_like(x)
        for i in range(size // 2):
            angle = positions * base ** (-2 * i / size)
            a, b = x[:, i], x[:, i + size // 2]
            out[:, i] = a * np.cos(angle) - b * np.sin(angle)
            out[:, i + size // 2] = a * np.sin(angle) + b * np.cos(angle)
        return out

    gelu = lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))
    linear = lambda w, x: x @ w["weight"] + w.get("bias", 0)

    def attend(x, w, local):
        base = config.rope_local_base if local else config.rope_base
        part = lambda name, head: x @ w[name]["weight"][:, head] + w[name].get("bias", np.zeros((99, 1)))[head]
        out = np.zeros_like(x)
        seen = segments[:, None] == segments
        if local:
            seen &= np.abs(positions[:, None] - positions) < config.window
        for head in range(config.num_heads):
            q, k, v = turn(part("query", head), base), turn(part("key", head), base), part("value", head)
            scores = q @ k.T / np.sqrt(size)
            weights = np.exp(np.where(seen, scores, -np.inf) - scores.max())
            out += weights / weights.sum(-1, keepdims=True) @ v @ w["out"]["weight"][head]
        return out + w["out"].get("bias", 0)

    def feed(x, w):
        h = gelu(linear(w["gate"], x)) * linear(w["up"], x) if "gate" in w else gelu(linear(w["up"], x))
        return linear(w["down"], h)

    x = p["embed"]["table"][tokens]
    if config.positions == "learned":
        x = x + p["positions"]["table"][positions] + p["token_types"]["table"][types]
    x = norm(x, p["embed_norm"])
    for layer in range(config.num_layers):
        local = config.window > 0 and (config.attention_pattern * config.num_layers)[layer] == "l"
        if config.norm_position == "post":
            w = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["blocks"])
            x = norm(x + attend(x, w["attention"], local), w["attention_norm"])
            x = norm(x + feed(x, w["mlp"]), w["mlp_norm"])
        else:
            stacked, at = (p["first"], 0) if layer == 0 else (p["blocks"], layer - 1)
            w = jax.tree.map(lambda leaf, at=at: leaf[at], stacked)
            x = x + attend(norm(x, w["attention_norm"]) if layer else x, w["attention"], local)
            x = x + feed(norm(x, w["mlp_norm"]), w["mlp"])
    x = norm(x, p["norm"]) if "norm" in p else x
    pooled = np.tanh(linear(p["pooler"], x[0])) if "pooler" in p else x[0]
    head = p["head"]
    return norm(gelu(linear(head["dense"], x)), head["norm"]) @ p["embed"]["table"].T + head["bias"], pooled


@BOTH
def test_equals_the_numpy_oracle(config):
    graph, params = parts(config)
    row = masked(1, 24)
    found, (expected, pooled) = np.asarray(logits(graph, params, row))[0], oracle(config, params, row)
    assert found.dtype == np.float32
    # float32 against float64 over a few layers: some 1e-6 of the largest logit
    np.testing.assert_allclose(found[:, :VOCAB], expected[:, :VOCAB], atol=1e-5 * np.abs(expected).max())
    assert (found[:, VOCAB:] == np.float32(-1e30)).all()
    model = nnx.merge(graph, params)
    np.testing.assert_allclose(model.pool(model(row).hidden)[0], pooled, atol=1e-5)


def test_types_left_out_are_all_0():
    graph, params = parts(BERT)
    row = masked(1, 24)
    zeros = dataclasses.replace(row, token_types=np.zeros_like(row.inputs))
    none = dataclasses.replace(row, token_types=None)
    np.testing.assert_array_equal(logits(graph, params, none), logits(graph, params, zeros))
    assert np.abs(logits(graph, params, row) - logits(graph, params, zeros))[..., :VOCAB].max() > 0.1


@BOTH
def test_a_later_token_changes_an_earlier_ones_logits(config):
    """So does an earlier token a later one's; in a model that is all local, only as far as the windows reach."""
    graph, params = parts(config)
    row = masked(1, 24)
    (place,) = np.nonzero(row.segments[0] == row.segments[0, 12])
    for changed, watched in ((place[-1], place[0]), (place[0], place[-1])):
        inputs = row.inputs.copy()
        inputs[0, changed] = (inputs[0, changed] + 5) % VOCAB
        difference = logits(graph, params, dataclasses.replace(row, inputs=inputs)) - logits(graph, params, row)
        assert np.abs(difference[0, watched, :VOCAB]).max() > 1e-4


def test_local_layers_see_their_window_only():
    """With the global layers cut off, 3 local layers of window 4 carry a token at most 3 * (4 - 1) places."""
    graph, params = parts(dataclasses.replace(MODERN, attention_pattern="glll"))
    for name in ("attention", "mlp"):
        out = params["first"][name]["out" if name == "attention" else "down"]
        out["weight"] = jnp.zeros_like(out["weight"])
    flat = masked(1, 24)
    row = dataclasses.replace(
        flat, segments=np.ones_like(flat.segments), positions=np.arange(24)[None].astype(np.int32)
    )
    inputs = row.inputs.copy()
    inputs[0, 12] = (inputs[0, 12] + 5) % VOCAB
    difference = logits(graph, params, dataclasses.replace(row, inputs=inputs)) - logits(graph, params, row)
    moved = np.abs(np.asarray(difference)[0, :, :VOCAB]).max(-1) > 0
    np.testing.assert_array_equal(np.nonzero(moved)[0], np.arange(12 - 9, 12 + 10))


@BOTH
def test_documents_of_a_row_do_not_see_each_other(config):
    """Changing all tokens of one document leaves logits and gradients of the others bitwise alone."""
    graph, params = parts(config)
    row = masked(1, 24)
    changed_part = row.segments == 2
    kept = dataclasses.replace(row, weights=row.weights * ~changed_part)
    assert changed_part.any() and kept.weights.sum() > 2
    swap = lambda tokens: np.where(changed_part, (tokens + 7) % VOCAB, tokens)
    changed = dataclasses.replace(kept, inputs=swap(row.inputs), targets=swap(row.targets))
    before, after = logits(graph, params, kept), logits(graph, params, changed)
    np.testing.assert_array_equal(before[~changed_part], after[~changed_part])
    assert (before[changed_part] != after[changed_part]).any()
    # A masked score is exp(-1e30) = 0 exactly, so every term from the other document is an exact 0.
    jax.tree.map(
        np.testing.assert_array_equal, loss_and_grads(graph, params, kept), loss_and_grads(graph, params, changed)
    )


@BOTH
def test_scan_equals_unrolled(config):
    dropped = dataclasses.replace(config, dropout=0.2)
    graph, params = parts(dropped)
    unrolled = registry.abstract(dataclasses.replace(dropped, scan=False))[0]
    batch, key = masked(2, 24), jax.random.key(1)
    assert_close(loss_and_grads(unrolled, params, batch, key), loss_and_grads(graph, params, batch, key), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_remat_changes_no_number(remat):
    dropped = dataclasses.replace(MODERN, dropout=0.2)
    graph, params = parts(dropped)
    other = registry.abstract(dataclasses.replace(dropped, remat=remat))[0]
    batch, key = masked(2, 24), jax.random.key(1)
    # Recomputed values may be fused otherwise, so: rounding of float32.
    assert_close(loss_and_grads(other, params, batch, key), loss_and_grads(graph, params, batch, key), 1e-5)


@pytest.mark.slow
@BOTH
def test_bfloat16_is_near_float32_and_logits_stay_float32(config):
    graph, params = parts(config)
    half = registry.abstract(dataclasses.replace(config, dtype="bfloat16"))[0]
    batch = masked(2, 24)
    found, exact = logits(half, params, batch), logits(graph, params, batch)
    assert found.dtype == jnp.float32
    found, exact = np.asarray(found)[..., :VOCAB], np.asarray(exact)[..., :VOCAB]
    # 8 bits of mantissa through a few layers: about 1% of the largest logit, and not 0
    assert 0 < np.abs(found - exact).max() < 0.05 * np.abs(exact).max()
    assert_close(loss_and_grads(half, params, batch)[0], loss_and_grads(graph, params, batch)[0], 0.01)


def test_dropout_belongs_to_the_sample():
    graph, params = parts(dataclasses.replace(BERT, dropout=0.3))
    key, batch = jax.random.key(5), masked(4, 24)
    whole = np.asarray(logits(graph, params, batch, key))
    part = jax.tree.map(lambda x: x[np.array([3, 2])], batch)
    np.testing.assert_allclose(np.asarray(logits(graph, params, part, key)), whole[[3, 2]], rtol=1e-5, atol=1e-4)
    assert np.abs(np.asarray(logits(graph, params, batch)) - whole).max() > 0.1


def test_every_parameter_names_its_axes():
    _, shapes, names = registry.abstract(MODERN)
    is_axes = lambda x: isinstance(x, tuple)
    for shape, axis in zip(jax.tree.leaves(shapes), jax.tree.leaves(names, is_leaf=is_axes), strict=True):
        assert len(shape.shape) == len(axis)
    assert "attention_norm" not in names["first"]
    assert shapes["first"]["mlp_norm"]["scale"].shape == (1, 32)
    assert shapes["blocks"]["attention_norm"]["scale"].shape == (3, 32)
    assert names["first"]["attention"]["query"]["weight"] == ("layers", "embed", "heads", "head_dim")
    names = registry.abstract(BERT)[2]
    assert names["token_types"]["table"] == ("seq", "embed")
    assert names["head"]["dense"]["weight"] == names["pooler"]["weight"] == ("embed", "mlp")
    assert names["head"]["bias"] == ("vocab",)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 1, 4), (2, 2, 2)])
@BOTH
def test_a_mesh_changes_no_number_and_replicates_nothing(config, shape, capfd):
    config = dataclasses.replace(config, vocab_size=64)
    graph, params = parts(config)
    batch = masked(8, 16)
    expected = loss_and_grads(graph, params, batch)
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    shardings = axes.shardings(mesh, registry.abstract(config)[2], params)
    capfd.readouterr()
    with jax.set_mesh(mesh):
        rows = jax.tree.map(
            lambda x: jax.device_put(x, jax.NamedSharding(mesh, axes.spec(("batch",), mesh=mesh))), batch
        )
        found = loss_and_grads(graph, jax.device_put(params, shardings), rows)
    assert_close(found, expected, 1e-5)
    assert "ematerialization" not in capfd.readouterr().err


@pytest.mark.slow
def test_flops_are_those_of_the_compiler():
    """A forward pass is a third of a training step's flops; norms, softmax and activations are not counted."""
    config = dataclasses.replace(BERT, num_layers=2, embed=256, max_positions=128, vocab_size=512, scan=False)
    graph, shapes, _ = registry.abstract(config)
    batch = masked(1, 128)
    found = logits.lower(graph, shapes, batch).compile().cost_analysis()["flops"] / batch.inputs.size
    assert 1.0 < found / (config.flops_per_token(128) / 3) < 1.05
