"""The decoder against a plain numpy one, and against itself in every form that must not matter."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.models import registry
from llmjax.models.decoder import Decoder
from llmjax.models.decoder_config import DecoderConfig
from llmjax.nn import losses
from llmjax.parallel import axes
from tests.batches import packed
from tests.models import decoder_oracle

VOCAB = 50
LLAMA = DecoderConfig(vocab_size=VOCAB, vocab_multiple=16, num_layers=2, embed=32, num_heads=4, num_kv_heads=2)
GPT2 = dataclasses.replace(
    LLAMA,
    num_kv_heads=0,
    activation="gelu_tanh",
    gated=False,
    norm="layernorm",
    positions="learned",
    max_positions=64,
    tie_embeddings=True,
    biases="all",
)
POST = dataclasses.replace(LLAMA, norm_position="post", activation="relu2", gated=False, num_kv_heads=1, head_dim=10)
QWEN3 = dataclasses.replace(
    LLAMA, qk_norm="head", head_dim=10, rope_scaling="llama3", rope_factor=8.0, rope_original=24, tie_embeddings=True
)
GEMMA = dataclasses.replace(
    LLAMA,
    num_layers=3,
    embed_multiplier=32**0.5,
    score_scale=0.4,
    score_softcap=0.7,
    qk_norm="head",
    window=3,
    attention_pattern="lg",
    activation="gelu_tanh",
    norm="rmsnorm1p",
    norm_position="both",
    rope_base=1e5,
    rope_local_base=50.0,
    rope_scaling="linear",
    rope_factor=3.0,
    tie_embeddings=True,
    logit_softcap=1.5,
)
OLMO = dataclasses.replace(
    LLAMA,
    norm_position="inner",
    qk_norm="all",
    window=4,
    attention_pattern="gl",
    rope_local_base=1e4,
    rope_scaling="yarn",
    rope_factor=4.0,
    rope_original=16,
)
OSS = dataclasses.replace(
    LLAMA,
    attention_sinks=True,
    biases="attention",
    window=3,
    attention_pattern="l",
    rope_scaling="yarn",
    rope_factor=4.0,
    rope_original=64,
    rope_high=8.0,
    rope_truncate=False,
    rope_attention_factor=1.5,
)
MODELS = {"llama": LLAMA, "gpt2": GPT2, "post": POST, "qwen3": QWEN3, "gemma": GEMMA, "olmo": OLMO, "oss": OSS}


@functools.cache
def parts(config: DecoderConfig):
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


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_numpy_oracle(name):
    config = MODELS[name]
    graph, params = parts(config)
    row = packed(1, 24, VOCAB)
    found, expected = np.asarray(logits(graph, params, row))[0], decoder_oracle.logits(config, params, row)
    assert found.dtype == np.float32
    # float32 against float64 over two layers: some 1e-6 of the largest logit
    np.testing.assert_allclose(found[:, :VOCAB], expected[:, :VOCAB], atol=1e-5 * np.abs(expected).max())
    assert (found[:, VOCAB:] == np.float32(-1e30)).all()


OFF = {
    "window": (GEMMA, dict(window=0, rope_local_base=0.0)),
    "pattern": (GEMMA, dict(attention_pattern="gl")),
    "local base": (GEMMA, dict(rope_local_base=0.0)),
    "local base, unscaled": (OLMO, dict(rope_local_base=0.0)),
    "score softcap": (GEMMA, dict(score_softcap=0.0)),
    "logit softcap": (GEMMA, dict(logit_softcap=0.0)),
    "score scale": (GEMMA, dict(score_scale=0.0)),
    "embed multiplier": (GEMMA, dict(embed_multiplier=1.0)),
    "linear": (GEMMA, dict(rope_factor=1.0)),
    "llama3": (QWEN3, dict(rope_factor=1.0)),
    "yarn": (OSS, dict(rope_factor=1.0)),
    "truncation": (OSS, dict(rope_truncate=True)),
    "attention factor": (OSS, dict(rope_attention_factor=0.0)),
}


@pytest.mark.parametrize("name", OFF)
def test_every_setting_without_parameters_changes_logits(name):
    """The oracle's agreement says nothing of a setting that does not bite at these sizes."""
    config, off = OFF[name]
    graph, params = parts(config)
    row = packed(1, 24, VOCAB)
    without = registry.abstract(dataclasses.replace(config, **off))[0]
    difference = np.abs(logits(graph, params, row) - logits(without, params, row))[..., :VOCAB].max()
    assert difference > 1e-3


@pytest.mark.parametrize("config", [GPT2, GEMMA, OLMO, OSS], ids=["gpt2", "gemma", "olmo", "oss"])
def test_the_cache_holds_all_that_a_token_sees(config):
    """Prompts of two lengths, then token by token past the windows: hidden states of the full pass."""
    graph, params = parts(config)
    model = nnx.merge(graph, params)
    tokens = np.random.default_rng(3).integers(1, VOCAB, (2, 16)).astype(np.int32)
    lengths = np.array([5, 8])
    whole = np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape)
    batch = dataclasses.replace(packed(2, 16, VOCAB), inputs=tokens, segments=np.ones_like(whole), positions=whole)
    expected = np.asarray(jax.jit(lambda batch: model(batch).hidden)(batch))
    hidden, cache, positions = jax.jit(model.prefill, static_argnums=2)(tokens[:, :8], lengths, 8)
    step = jax.jit(model.cached)
    rows = np.arange(2)
    for i in range(8):
        found, at = np.asarray(hidden).reshape(2, -1), np.asarray(positions)
        np.testing.assert_allclose(found, expected[rows, at - 1], rtol=0, atol=2e-6 * np.abs(expected).max())
        hidden, cache = step(tokens[rows, at][:, None], at[:, None], cache)
        positions = lengths + i + 1


def test_a_packed_row_scores_as_its_documents_alone():
    graph, params = parts(LLAMA)
    row = packed(1, 24, VOCAB)
    together = np.asarray(logits(graph, params, row))[0]
    for number in range(1, row.segments.max() + 1):
        (where,) = np.nonzero(row.segments[0] == number)
        front = lambda x, where=where: np.pad(x[:, where], [(0, 0), (0, 24 - len(where))])
        given = {name: x for name, x in vars(row).items() if x is not None and name != "sample"}
        alone = dataclasses.replace(row, **{name: front(x) for name, x in given.items()})
        # The same sums with their zeros elsewhere: rounding of float32 only.
        found = np.asarray(logits(graph, params, alone))[0, : len(where)]
        np.testing.assert_allclose(
            found[:, :VOCAB], together[where, :VOCAB], atol=1e-6 * np.abs(found[:, :VOCAB]).max()
        )


def test_dropout_belongs_to_the_sample():
    graph, params = parts(dataclasses.replace(LLAMA, dropout=0.3))
    key = jax.random.key(5)
    batch = packed(4, 24, VOCAB, first_sample=2**32 - 2)
    whole = np.asarray(logits(graph, params, batch, key))
    for rows in ([0, 1], [3, 2]):
        part = jax.tree.map(lambda x, rows=rows: x[np.array(rows)], batch)
        np.testing.assert_allclose(np.asarray(logits(graph, params, part, key)), whole[rows], rtol=1e-5, atol=1e-4)
    twin = jax.tree.map(lambda x: x[np.array([0, 0, 0, 0])], batch)
    twin = dataclasses.replace(twin, sample=batch.sample)
    rows = np.asarray(logits(graph, params, twin, key))[..., :VOCAB]
    assert all(np.abs(rows[0] - row).max() > 0.1 for row in rows[1:]), "the same tokens under another index drop others"
    assert np.abs(np.asarray(logits(graph, params, batch)) - whole).max() > 0.1


def test_every_parameter_names_its_axes():
    _, shapes, names = registry.abstract(GPT2)
    for shape, axis in zip(
        jax.tree.leaves(shapes), jax.tree.leaves(names, is_leaf=lambda x: isinstance(x, tuple)), strict=True
    ):
        assert len(shape.shape) == len(axis)
    assert names["blocks"]["attention"]["query"]["weight"] == ("layers", "embed", "heads", "head_dim")
    assert names["blocks"]["attention"]["key"]["bias"] == ("layers", "kv_heads", "head_dim")
    assert names["blocks"]["attention"]["out"]["weight"] == ("layers", "heads", "head_dim", "embed")
    assert names["blocks"]["mlp"]["down"]["weight"] == ("layers", "mlp", "embed")
    assert names["blocks"]["mlp_norm"]["scale"] == ("layers", "embed")
    assert names["embed"]["table"] == ("vocab", "embed")
    attention = registry.abstract(dataclasses.replace(OLMO, attention_sinks=True))[2]["blocks"]["attention"]
    assert attention["query_norm"]["scale"] == ("layers", "heads", "head_dim")
    assert attention["key_norm"]["scale"] == ("layers", "kv_heads", "head_dim")
    assert attention["sinks"] == ("layers", "heads")
    assert registry.abstract(LLAMA)[2]["head"] == ("embed", "vocab")


@pytest.mark.slow
def test_parameters_start_alike_with_and_without_jit():
    eager, compiled = (
        registry.init(LLAMA, jax.random.key(3)),
        jax.jit(lambda k: registry.init(LLAMA, k))(jax.random.key(3)),
    )
    assert_close(eager, compiled, 1e-6)
    assert isinstance(registry.build(LLAMA, jax.random.key(3)), Decoder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (LLAMA, (1, 8, 1)),
        (LLAMA, (2, 1, 4)),
        (OSS, (2, 2, 2)),
    ],
)
def test_a_mesh_changes_no_number_and_replicates_nothing(config, shape, capfd):
    config = dataclasses.replace(config, num_kv_heads=4, vocab_size=64)
    graph, params = parts(config)
    batch = packed(8, 16, VOCAB)
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
