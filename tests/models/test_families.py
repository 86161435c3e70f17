"""What every family promises, whatever it is made of: documents that do not see each other, order, exactness, costs."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.models import registry
from llmjax.models.decoder_config import DecoderConfig
from llmjax.models.encdec import EncDecConfig
from llmjax.models.encoder import EncoderConfig
from llmjax.models.moe import MoeConfig
from llmjax.models.recurrent import RecurrentConfig
from llmjax.nn import losses
from llmjax.nn.stack import REMAT
from llmjax.parallel import axes
from tests.batches import suiting

VOCAB, SEQ = 50, 24
SMALL = dict(vocab_size=VOCAB, vocab_multiple=16, num_layers=2, embed=32)
# One small config for each kind of thing that a family can be made of.
VARIANTS = {
    "llama": DecoderConfig(**SMALL, num_heads=4, num_kv_heads=2),
    "gpt2": DecoderConfig(
        **SMALL,
        num_heads=4,
        activation="gelu_tanh",
        gated=False,
        norm="layernorm",
        positions="learned",
        max_positions=64,
        tie_embeddings=True,
        biases="all",
    ),
    "gemma": DecoderConfig(
        **SMALL,
        num_heads=4,
        num_kv_heads=2,
        activation="gelu_tanh",
        norm="rmsnorm1p",
        norm_position="both",
        qk_norm="head",
        window=3,
        attention_pattern="lg",
        rope_local_base=100.0,
        rope_scaling="linear",
        rope_factor=8.0,
        score_scale=0.3,
        score_softcap=5.0,
        logit_softcap=8.0,
        embed_multiplier=32**0.5,
        tie_embeddings=True,
    ),
    "olmo": DecoderConfig(
        **SMALL,
        num_heads=4,
        norm_position="inner",
        qk_norm="all",
        rope_scaling="yarn",
        rope_factor=4.0,
        rope_original=8,
    ),
    "mixtral": MoeConfig(
        **SMALL, num_heads=4, num_kv_heads=2, mlp=24, num_experts=4, balance_loss=0.0, router_z_loss=0.0
    ),
    "bert": EncoderConfig(**SMALL, num_heads=4, token_types=2, pooler=True),
    "modernbert": EncoderConfig(
        **SMALL,
        num_heads=4,
        gated=True,
        norm_position="pre",
        positions="rotary",
        window=3,
        attention_pattern="gl",
        rope_local_base=100.0,
        biases="none",
    ),
    "t5": EncDecConfig(**SMALL, num_heads=4, relative_buckets=8, relative_distance=16),
    "rnn": RecurrentConfig(**SMALL, cell="rnn", hidden=48),
    "lstm": RecurrentConfig(**SMALL, cell="lstm", norm="layernorm", tie_embeddings=True),
    "gru": RecurrentConfig(**SMALL, cell="gru", norm="none", residual=False, unroll=2),
    "rglru": RecurrentConfig(**SMALL, cell="rglru", recurrence="associative", mlp=64, gate_blocks=2),
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


@functools.cache
def parts(config):
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
        out = model(batch, key)
        sums = losses.cross_entropy(out.hidden, model.unembed, batch.targets, batch.weights, chunk=8, z_loss=1e-3)
        return sums.nats + sums.z + out.aux_loss

    return jax.value_and_grad(loss)(params)


def assert_close(found, expected, rtol):
    """Every leaf within `rtol` of its largest value, or of 1: some gradients are 0 but for rounding."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(1.0, np.abs(b).max()))


def swapped(batch, part, source_part=None):
    """The batch with other tokens in `part` of it."""
    swap = lambda tokens, where: np.where(where, (tokens + 7) % VOCAB, tokens).astype(np.int32)
    changed = dataclasses.replace(batch, inputs=swap(batch.inputs, part), targets=swap(batch.targets, part))
    if source_part is not None and batch.source is not None:
        changed = dataclasses.replace(changed, source=swap(batch.source, source_part))
    return changed


@every_variant
def test_documents_of_a_row_do_not_see_each_other(name):
    """Changing all tokens of one document leaves logits and gradients of the others alone, bitwise."""
    config = VARIANTS[name]
    graph, params = parts(config)
    batch = suiting(config, 1, SEQ, VOCAB)
    other = batch.segments == 1
    assert other.any() and (batch.segments > 1).any()
    kept = dataclasses.replace(batch, weights=batch.weights * ~other)
    changed = swapped(kept, other, None if kept.source is None else kept.source_segments == 1)
    before, after = (np.asarray(logits(graph, params, each)) for each in (kept, changed))
    assert np.abs(before[other] - after[other]).max() > 0.01
    found, expected = loss_and_grads(graph, params, changed), loss_and_grads(graph, params, kept)
    if config.family == "moe":
        # Another document's tokens move this one's to other places among an expert's rows, where a matmul may round
        # its sums otherwise; its router losses, which are of whole rows, are switched off here.
        np.testing.assert_allclose(before[~other], after[~other], atol=1e-5)
        assert_close(found, expected, 1e-5)
        return
    # A masked score is exp(-1e30) = 0 exactly, so every term from the other document is an exact 0.
    np.testing.assert_array_equal(before[~other], after[~other])
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@every_variant
def test_order(name):
    """A causal family's logits do not depend on what comes later; those of one that learns "masked" do."""
    config = VARIANTS[name]
    graph, params = parts(config)
    batch = suiting(config, 1, SEQ, VOCAB)
    (places,) = np.nonzero(batch.segments[0] == np.bincount(batch.segments[0])[1:].argmax() + 1)
    assert len(places) > 3
    later = np.zeros_like(batch.segments, bool)
    later[0, places[-1]] = True
    before, after = (np.asarray(logits(graph, params, each)) for each in (batch, swapped(batch, later)))
    moved = np.abs(before - after)[0, places[:-1]].max()
    if "masked" in config.objectives:
        assert moved > 0.01
    else:
        assert moved <= (1e-5 if config.family == "moe" else 0)  # see above
    assert (before[0, places[-1]] != after[0, places[-1]]).any()


@every_variant
def test_scan_equals_unrolled(name):
    config = dataclasses.replace(VARIANTS[name], dropout=0.2)
    graph, params = parts(config)
    unrolled = registry.abstract(dataclasses.replace(config, scan=not config.scan))[0]
    batch, key = suiting(config, 2, SEQ, VOCAB), jax.random.key(1)
    # The same sums, fused otherwise: rounding of float32 through two layers.
    assert_close(loss_and_grads(unrolled, params, batch, key), loss_and_grads(graph, params, batch, key), 2e-5)


@pytest.mark.slow
@every_variant
@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_remat_changes_no_number(name, remat):
    config = dataclasses.replace(VARIANTS[name], dropout=0.2)
    graph, params = parts(config)
    other = registry.abstract(dataclasses.replace(config, remat=remat))[0]
    batch, key = suiting(config, 2, SEQ, VOCAB), jax.random.key(1)
    assert_close(loss_and_grads(other, params, batch, key), loss_and_grads(graph, params, batch, key), 2e-5)


@pytest.mark.slow
@every_variant
def test_bfloat16_is_near_float32(name):
    config = VARIANTS[name]
    graph, params = parts(config)
    half = registry.abstract(dataclasses.replace(config, dtype="bfloat16"))[0]
    batch = suiting(config, 2, SEQ, VOCAB)
    found, exact = logits(half, params, batch), logits(graph, params, batch)
    assert found.dtype == jnp.float32
    real = batch.segments > 0
    found, exact = np.asarray(found)[real][:, :VOCAB], np.asarray(exact)[real][:, :VOCAB]
    # 8 bits of mantissa through two layers: about 1% of the largest logit, and not 0
    assert 0 < np.abs(found - exact).max() < 0.06 * np.abs(exact).max()


@pytest.mark.slow
@every_variant
@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)], ids=["fsdp 8", "2 x 2 x 2"])
def test_a_mesh_changes_no_number(name, shape):
    config = VARIANTS[name]
    graph, params = parts(config)
    batch = suiting(config, 8, SEQ, VOCAB)
    expected = loss_and_grads(graph, params, batch)
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    shardings = axes.shardings(mesh, registry.abstract(config)[2], params)
    with jax.set_mesh(mesh):
        row = jax.NamedSharding(mesh, axes.spec(("batch",), mesh=mesh))
        found = loss_and_grads(graph, jax.device_put(params, shardings), jax.device_put(batch, row))
    # float32 sums of some 200 tokens in another order
    assert_close(found, expected, 2e-5)


@every_variant
def test_cached_decoding_equals_the_full_pass(name):
    """Prompts of unequal length, then token by token: the logits of the whole sequence at once."""
    config = VARIANTS[name]
    if not config.generates:
        pytest.skip(f"{config.family} continues no text")
    if config.family == "encdec":
        pytest.skip("its prompt is the source: tests/models/test_encdec.py")
    graph, params = parts(config)
    rng = np.random.default_rng(1)
    lengths, steps = np.array([9, 4]), 5
    tokens = rng.integers(1, VOCAB, (2, int(lengths.max()) + steps)).astype(np.int32)
    model = nnx.merge(graph, params)
    prompt = np.where(np.arange(lengths.max()) < lengths[:, None], tokens[:, : lengths.max()], 0)
    hidden, cache, places = jax.jit(model.prefill, static_argnums=2)(prompt, lengths, steps)
    found = [model.unembed(hidden)]
    step = jax.jit(model.cached)
    for i in range(steps):
        new = tokens[np.arange(2), lengths + i][:, None]
        hidden, cache = step(new, (places + i)[:, None], cache)
        found.append(model.unembed(hidden[:, 0]))
    for row, length in enumerate(lengths):
        whole = tokens[row : row + 1, : length + steps]
        ones, at = np.ones_like(whole), np.arange(whole.shape[1], dtype=np.int32)[None]
        batch = dataclasses.replace(
            suiting(config, 1, SEQ, VOCAB), inputs=whole, targets=whole, weights=ones, segments=ones, positions=at
        )
        full = np.asarray(logits(graph, params, batch))[0, length - 1 :, :VOCAB]
        one = np.stack([np.asarray(piece)[row, :VOCAB] for piece in found])
        # The same float32 sums in another order over at most 128 terms: a few hundred ulps of the largest logit.
        np.testing.assert_allclose(one, full, atol=3e-5 * np.abs(full).max())


@every_variant
def test_flops_are_near_what_the_compiler_counts(name):
    """Forward pass of one full document, unrolled; what a causal mask or a window hides is computed all the same."""
    if VARIANTS[name].family == "moe":
        pytest.skip("what its grouped matmuls cost depends on the device: tests/models/test_moe.py counts weights")
    config = dataclasses.replace(VARIANTS[name], scan=False, vocab_multiple=1, embed=64)
    if "unroll" in vars(config) and vars(config).get("recurrence") != "associative":
        config = dataclasses.replace(config, unroll=SEQ)  # the compiler counts a loop's body once
    graph, shapes, _ = registry.abstract(config)
    batch = suiting(config, 1, SEQ, VOCAB)
    counted = logits.lower(graph, shapes, batch).compile().cost_analysis()["flops"]
    claimed = config.flops_per_token(SEQ) / 3 * SEQ
    # At this size softmax, norms and the like are a visible part, and attention is small: bounds, not equality.
    assert 0.75 * claimed < counted < 1.6 * claimed


def test_every_family_has_a_variant_here():
    assert {config.family for config in VARIANTS.values()} == set(registry.FAMILIES)
