"""The encoder-decoder against a plain numpy one; what its two sides have to do with each other; decoding."""

import dataclasses
import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.batch import Batch
from llmjax.errors import UserError
from llmjax.inference.generate import generate
from llmjax.models import registry
from llmjax.models.encdec import EncDecConfig
from llmjax.nn import losses
from llmjax.parallel import axes
from tests.batches import packed

VOCAB = 50
V11 = EncDecConfig(
    vocab_size=VOCAB,
    vocab_multiple=16,
    start_id=0,
    num_layers=2,
    num_decoder_layers=3,
    embed=32,
    num_heads=4,
    head_dim=6,
    mlp=48,
    relative_buckets=8,
    relative_distance=20,
)
V10 = dataclasses.replace(V11, activation="relu", gated=False, tie_embeddings=True)
BOTH = pytest.mark.parametrize("config", [V11, V10], ids=["v1.1", "v1.0"])


def paired(rows: int, seq: int, source_seq: int, *, first_sample: int = 0) -> Batch:
    """Packed targets, each document with a source of a length of its own, and padding on both sides."""
    batch = packed(rows, seq, VOCAB, first_sample=first_sample)
    names = ("source", "source_segments", "source_positions")
    sides = {name: np.zeros((rows, source_seq), np.int32) for name in names}
    for row in range(rows):
        rng = np.random.default_rng((7, first_sample + row))
        count = batch.segments[row].max()
        edges = np.sort(rng.choice(np.arange(1, source_seq - 2), size=count, replace=False))
        for number, (start, stop) in enumerate(zip(np.r_[0, edges[:-1]], edges, strict=True), 1):
            sides["source"][row, start:stop] = rng.integers(1, VOCAB, stop - start)
            sides["source_segments"][row, start:stop] = number
            sides["source_positions"][row, start:stop] = np.arange(stop - start)
    return dataclasses.replace(batch, **sides)


@functools.cache
def parts(config: EncDecConfig):
    """Graph and parameters, moved off their start so that no scale is 1 and every distance counts."""
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
    """Every leaf within `rtol` of its largest value, or of 1."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(1.0, np.abs(b).max()))


def oracle(config: EncDecConfig, params: dict, row: Batch) -> np.ndarray:
    """Logits of a batch of one row in float64: one document, one head and one pair of places at a time."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    out = np.zeros((row.inputs.shape[1], config.padded_vocab))

    def norm(x, w):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * w["scale"]

    def bucket(distance, both_ways):
        count, shift = config.relative_buckets, 0
        if both_ways:
            count //= 2
            shift = count if distance > 0 else 0
        far = abs(distance) if both_ways else max(-distance, 0)
        if far < count // 2:
            return shift + far
        steps = math.log(far / (count // 2)) / math.log(config.relative_distance / (count // 2)) * (count - count // 2)
        return shift + min(count // 2 + int(steps + 1e-9), count - 1)

    def attend(x, source, w, table=None, decodes=False):
        result = np.zeros_like(x)
        for head in range(config.num_heads):
            q, k, v = (
                side @ w[name]["weight"][:, head] for side, name in ((x, "query"), (source, "key"), (source, "value"))
            )
            scores = q @ k.T
            for i, j in np.ndindex(*scores.shape):
                if table is not None:
                    scores[i, j] += table[bucket(j - i, not decodes), head]
                if decodes and j > i:
                    scores[i, j] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            result += weights / weights.sum(-1, keepdims=True) @ v @ w["out"]["weight"][head]
        return result

    def feed(x, w):
        up = x @ w["up"]["weight"]
        if not config.gated:
            return np.maximum(up, 0) @ w["down"]["weight"]
        gate = x @ w["gate"]["weight"]
        gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        return (gelu * up) @ w["down"]["weight"]

    def run(x, side, layers, source=None):
        table = side["bias"]["table"]
        for layer in range(layers):
            w = jax.tree.map(lambda leaf, layer=layer: leaf[layer], side["blocks"])
            y = norm(x, w["attention_norm"])
            x = x + attend(y, y, w["attention"], table, source is not None)
            if source is not None:
                x = x + attend(norm(x, w["cross_norm"]), source, w["cross"])
            x = x + feed(norm(x, w["mlp_norm"]), w["mlp"])
        return norm(x, side["norm"])

    for number in range(1, row.segments.max() + 1):
        (here,), (there,) = np.nonzero(row.segments[0] == number), np.nonzero(row.source_segments[0] == number)
        source = run(p["embed"]["table"][row.source[0, there]], p["encoder"], config.num_layers)
        x = run(p["embed"]["table"][row.inputs[0, here]], p["decoder"], config.decoder_layers, source)
        out[here] = x @ p["head"] if not config.tie_embeddings else x / math.sqrt(config.embed) @ p["embed"]["table"].T
    return out


@BOTH
def test_equals_the_numpy_oracle(config):
    graph, params = parts(config)
    row = paired(1, 40, 56)
    found, expected = np.asarray(logits(graph, params, row))[0], oracle(config, params, row)
    assert found.dtype == np.float32
    real = row.segments[0] > 0
    # float32 against float64 over five layers: a few 1e-6 of the largest logit
    np.testing.assert_allclose(found[real, :VOCAB], expected[real, :VOCAB], atol=1e-5 * np.abs(expected).max())
    assert (found[:, VOCAB:] == np.float32(-1e30)).all()


@BOTH
@pytest.mark.parametrize("side", ["source", "inputs"])
def test_documents_of_a_row_do_not_see_each_other(config, side):
    """Changing all tokens of one document, on either side, leaves logits and gradients of the others bitwise alone."""
    graph, params = parts(config)
    row = paired(1, 24, 40)
    assert row.segments.max() > 1
    here, there = row.segments == 1, row.source_segments == 1
    kept = dataclasses.replace(row, weights=row.weights * ~here)
    where = there if side == "source" else here
    swapped = np.where(where, (getattr(row, side) + 7) % VOCAB, getattr(row, side))
    changed = dataclasses.replace(kept, **{side: swapped})
    before, after = np.asarray(logits(graph, params, kept)), np.asarray(logits(graph, params, changed))
    np.testing.assert_array_equal(before[~here], after[~here])
    assert (before[here] != after[here]).any()
    # A masked score is exp(-1e30) = 0 exactly, so every term from the other document is an exact 0.
    jax.tree.map(
        np.testing.assert_array_equal, loss_and_grads(graph, params, kept), loss_and_grads(graph, params, changed)
    )


def test_a_document_without_a_source_sees_no_other():
    graph, params = parts(V11)
    row = paired(1, 24, 40)
    bare = dataclasses.replace(row, source_segments=np.where(row.source_segments == 1, 0, row.source_segments))
    other = dataclasses.replace(bare, source=np.where(bare.source_segments > 0, 1, bare.source))
    here = row.segments == 1
    before, after = np.asarray(logits(graph, params, bare)), np.asarray(logits(graph, params, other))
    np.testing.assert_array_equal(before[here], after[here])
    assert (before[row.segments > 1] != after[row.segments > 1]).any()


def test_a_packed_row_scores_as_its_documents_alone():
    graph, params = parts(V11)
    row = paired(1, 24, 40)
    together = np.asarray(logits(graph, params, row))[0]
    for number in range(1, row.segments.max() + 1):

        def alone(x, segments, number=number):
            piece = x[:, segments[0] == number]
            return np.pad(piece, [(0, 0), (0, x.shape[1] - piece.shape[1])])

        targets = ("inputs", "targets", "weights", "segments", "positions")
        fields = {name: alone(getattr(row, name), row.segments) for name in targets}
        for name in ("source", "source_segments", "source_positions"):
            fields[name] = alone(getattr(row, name), row.source_segments)
        found = np.asarray(logits(graph, params, dataclasses.replace(row, **fields)))[0]
        here = row.segments[0] == number
        expected = together[here, :VOCAB]
        # The same sums with their zeros elsewhere: rounding of float32 only.
        np.testing.assert_allclose(found[: here.sum(), :VOCAB], expected, atol=1e-5 * np.abs(expected).max())


def test_the_decoder_is_causal():
    graph, params = parts(V11)
    row = paired(1, 24, 40)
    place = 5
    assert row.segments[0, place] == row.segments[0, place + 1]
    inputs = row.inputs.copy()
    inputs[0, place + 1 :] = (inputs[0, place + 1 :] + 3) % VOCAB
    before = np.asarray(logits(graph, params, row))[0]
    after = np.asarray(logits(graph, params, dataclasses.replace(row, inputs=inputs)))[0]
    np.testing.assert_array_equal(before[: place + 1], after[: place + 1])
    assert (before[place + 1] != after[place + 1]).any()


def test_dropout_belongs_to_the_sample():
    graph, params = parts(dataclasses.replace(V11, dropout=0.3))
    key = jax.random.key(5)
    batch = paired(4, 24, 40)
    whole = np.asarray(logits(graph, params, batch, key))
    part = jax.tree.map(lambda x: x[np.array([3, 1])], batch)
    np.testing.assert_allclose(np.asarray(logits(graph, params, part, key)), whole[[3, 1]], rtol=1e-5, atol=1e-4)
    assert np.abs(np.asarray(logits(graph, params, batch)) - whole)[..., :VOCAB].max() > 0.1


@jax.jit
def prefill(model, tokens, lengths):
    hidden, cache, first = model.prefill(tokens, lengths, 9)
    return model.unembed(hidden), cache, first


@jax.jit
def cached(model, tokens, positions, cache):
    hidden, cache = model.cached(tokens, positions, cache)
    return model.unembed(hidden), cache


@pytest.mark.parametrize("config", [V11, dataclasses.replace(V10, scan=False)], ids=["v1.1", "v1.0"])
def test_cached_decoding_equals_the_full_pass(config):
    """Prompts of unequal length; the target in steps of one token and of several."""
    graph, params = parts(config)
    model = nnx.merge(graph, params)
    rng = np.random.default_rng(1)
    lengths = np.array([3, 16, 9], np.int32)
    source, target = (rng.integers(1, VOCAB, shape).astype(np.int32) for shape in ((3, 16), (3, 10)))
    target[:, 0] = config.start_id
    sides = np.broadcast_to(np.arange(16, dtype=np.int32), source.shape)
    ones = np.ones_like(target)
    full = Batch(
        inputs=target,
        targets=target,
        weights=ones.astype(np.float32),
        segments=ones,
        positions=np.broadcast_to(np.arange(10, dtype=np.int32), target.shape),
        sample=np.zeros((3, 2), np.uint32),
        source=source,
        source_segments=(sides < lengths[:, None]).astype(np.int32),
        source_positions=sides,
    )
    expected = np.asarray(logits(graph, params, full))[..., :VOCAB]
    first, cache, position = prefill(model, source, lengths)
    np.testing.assert_array_equal(position, [1, 1, 1])
    found = [np.asarray(first)[:, None]]
    for start, stop in ((1, 2), (2, 3), (3, 7), (7, 10)):
        places = jnp.broadcast_to(jnp.arange(start, stop), (3, stop - start))
        piece, cache = cached(model, target[:, start:stop], places, cache)
        found.append(np.asarray(piece))
    # Same float32 sums in another order: a few hundred ulps of the largest logit.
    np.testing.assert_allclose(np.concatenate(found, 1)[..., :VOCAB], expected, atol=3e-5 * np.abs(expected).max())


def test_unequal_prompts_give_what_each_gives_alone():
    graph, params = parts(V11)
    prompts = [[5], list(range(1, 40)), [8, 8, 3]]
    go = lambda some: generate(graph, params, V11, some, max_tokens=9, temperature=0, stop_ids=[-1])
    together = go(prompts)
    assert together == [go([prompt])[0] for prompt in prompts]
    assert len({tuple(row) for row in together}) == 3, "the prompts must matter"


def test_the_cache_holds_the_target_and_no_prompt():
    """A slot for the start token and each new one, however long the source."""
    graph, params = parts(V11)
    model, lengths = nnx.merge(graph, params), np.array([30, 500])
    _, cache, _ = jax.eval_shape(lambda tokens: model.prefill(tokens, lengths, 7), np.zeros((2, 512), np.int32))
    heads = (V11.num_heads, V11.head_size)
    assert [leaf.shape for leaf in cache.targets] == [(V11.decoder_layers, 2, 8, *heads)] * 2
    assert [leaf.shape for leaf in cache.source] == [(V11.decoder_layers, 2, 512, *heads)] * 2


def test_what_is_missing_is_named():
    graph, params = parts(V11)
    with pytest.raises(UserError, match=r"batch has no source"):
        logits(graph, params, packed(1, 24, VOCAB))
    unset = dataclasses.replace(V11, start_id=-1)
    with pytest.raises(UserError, match=r"model.start_id=-1"):
        generate(registry.abstract(unset)[0], params, unset, [[5]], max_tokens=2, stop_ids=[-1])


def test_every_parameter_names_its_axes():
    _, shapes, names = registry.abstract(V11)
    is_axes = lambda x: isinstance(x, tuple)
    for shape, axis in zip(jax.tree.leaves(shapes), jax.tree.leaves(names, is_leaf=is_axes), strict=True):
        assert len(shape.shape) == len(axis)
    assert names["decoder"]["blocks"]["cross"]["query"]["weight"] == ("layers", "embed", "heads", "head_dim")
    assert names["encoder"]["blocks"]["mlp"]["down"]["weight"] == ("layers", "mlp", "embed")
    assert names["encoder"]["bias"]["table"] == ("seq", "heads")
    assert names["decoder"]["norm"]["scale"] == ("embed",)
    assert shapes["encoder"]["blocks"]["attention"]["query"]["weight"].shape[0] == 2
    assert shapes["decoder"]["blocks"]["attention"]["query"]["weight"].shape[0] == 3
    assert "head" not in registry.abstract(V10)[1]


@pytest.mark.slow
def test_a_mesh_changes_no_number_and_replicates_nothing(capfd):
    config = dataclasses.replace(V11, vocab_size=64)
    graph, params = parts(config)
    batch = paired(8, 16, 24)
    expected = loss_and_grads(graph, params, batch)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    shardings = axes.shardings(mesh, registry.abstract(config)[2], params)
    capfd.readouterr()
    with jax.set_mesh(mesh):
        rows = jax.tree.map(
            lambda x: jax.device_put(x, jax.NamedSharding(mesh, axes.spec(("batch",), mesh=mesh))), batch
        )
        found = loss_and_grads(graph, jax.device_put(params, shardings), rows)
    assert_close(found, expected, 1e-5)
    assert "ematerialization" not in capfd.readouterr().err
