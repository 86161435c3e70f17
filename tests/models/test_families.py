"""Properties of every family: isolated documents, causality, exact alternatives, and costs."""

from collections.abc import Iterable
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.models import registry
from llmjax.nn import blockwise
from llmjax.nn.kernels import KERNELS
from llmjax.nn.stack import REMAT
from tests.batches import packed_for
from tests.models.programs import (
    assert_close,
    document_alone,
    init_model,
    logits,
    loss_and_grads,
    replace_tokens,
    sharded_loss_and_grads,
)
from tests.models.variants import FAMILIES, SEQ, VOCAB

every_variant = pytest.mark.parametrize("name", FAMILIES)
# Block structure differs between these and not between the others: for what the stack of blocks does.
STACKS = ["gemma", "deepseek", "bert", "modernbert", "t5", "lstm", "rglru"]


def some_of(variants: Iterable[str], *names: str) -> pytest.MarkDecorator:
    """Every variant as a parameter, of which those that are not named run in `make test-exhaustive` alone."""
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=() if name in names else pytest.mark.exhaustive) for name in variants]
    )


@pytest.mark.parametrize(("name", "attention"), [("gemma", "blockwise"), ("llama", "dot")])
def test_rows_of_one_document_need_no_segments(name, attention):
    """Loss and gradients of a row with one document and padding, with and without segments."""
    config = dataclasses.replace(FAMILIES[name], attention=attention)
    graph, params = init_model(config)
    batch = document_alone(packed_for(config, 1, SEQ, VOCAB), 1)
    expected = loss_and_grads(graph, params, batch)
    # Exact zeros join the float32 sums, and padding, whose values differ, sends no gradient: only the order may differ.
    assert_close(loss_and_grads(graph, params, dataclasses.replace(batch, one_segment=True)), expected, 1e-6)


@every_variant
def test_documents_of_a_row_do_not_attend_to_each_other(name):
    """Changing all tokens of one document leaves logits and gradients of the others unchanged, bitwise."""
    config = FAMILIES[name]
    if config.family == "moe":
        # The router losses are means over whole rows.
        config = dataclasses.replace(config, balance_loss=0.0, router_z_loss=0.0, expert_bias=False)
    graph, params = init_model(config)
    batch = packed_for(config, 1, SEQ, VOCAB)
    other = batch.segments == 1
    assert other.any() and (batch.segments > 1).any()
    batch = dataclasses.replace(batch, weights=batch.weights * ~other)
    changed = replace_tokens(batch, other, VOCAB, batch.source_segments == 1 if config.reads_source else None)
    before, after = (np.asarray(logits(graph, params, each)) for each in (batch, changed))
    assert np.abs(before[other] - after[other]).max() > 0.01
    grads, expected_grads = loss_and_grads(graph, params, changed), loss_and_grads(graph, params, batch)
    if config.family == "moe":
        # The other document's tokens move this one's to other rows of an expert's batch, where a matmul may round its
        # sums differently.
        np.testing.assert_allclose(before[~other], after[~other], atol=1e-5)
        assert_close(grads, expected_grads, 1e-5)
        return
    # A masked score is exp(-1e30) = 0 exactly, so every term from the other document is an exact 0; a recurrent state
    # is multiplied by an exact 0 at the first token of a document.
    np.testing.assert_array_equal(before[~other], after[~other])
    jax.tree.map(np.testing.assert_array_equal, grads, expected_grads)


@every_variant
def test_packed_row_has_the_loss_of_its_separate_documents(name):
    config = FAMILIES[name]
    graph, params = init_model(config)
    batch = packed_for(config, 1, SEQ, VOCAB)
    together = np.asarray(logits(graph, params, batch))[0, :, :VOCAB]
    for number in range(1, batch.segments.max() + 1):
        (where,) = np.nonzero(batch.segments[0] == number)
        alone = np.asarray(logits(graph, params, document_alone(batch, number)))[0, : len(where), :VOCAB]
        # The same sums with their zeros elsewhere: rounding of float32 only.
        np.testing.assert_allclose(alone, together[where], atol=1e-5 * np.abs(alone).max())


@every_variant
def test_causality(name):
    """A causal family's logits do not depend on later tokens; those of a family that supports "masked" do."""
    config = FAMILIES[name]
    graph, params = init_model(config)
    batch = packed_for(config, 1, SEQ, VOCAB)
    (where,) = np.nonzero(batch.segments[0] == np.bincount(batch.segments[0])[1:].argmax() + 1)
    assert len(where) > 3
    last = np.zeros_like(batch.segments, bool)
    last[0, where[-1]] = True
    before, after = (np.asarray(logits(graph, params, each)) for each in (batch, replace_tokens(batch, last, VOCAB)))
    difference = np.abs(before - after)[0, where[:-1]].max()
    if "masked" in config.objectives:
        assert difference > 1e-4
    else:
        assert difference <= (1e-5 if config.family == "moe" else 0)  # rounding of the experts' sums, as above
    assert (before[0, where[-1]] != after[0, where[-1]]).any()


@pytest.mark.slow
@some_of(FAMILIES, "gpt2", "mixtral", "bert", "t5", "rglru")
def test_dropout_is_keyed_by_the_sample(name):
    """The mask of a row does not depend on its index in the batch, and differs between sample indices."""
    config = dataclasses.replace(FAMILIES[name], dropout=0.3)
    graph, params = init_model(config)
    batch, key = packed_for(config, 4, SEQ, VOCAB, first_sample=2**32 - 2), jax.random.key(5)
    full = np.asarray(logits(graph, params, batch, key))[..., :VOCAB]
    rows = np.array([3, 2, 1, 0])
    reordered = jax.tree.map(lambda x: x[rows], batch)
    scored = batch.segments > 0
    actual = np.asarray(logits(graph, params, reordered, key))[..., :VOCAB][rows]
    np.testing.assert_allclose(actual[scored], full[scored], rtol=1e-5, atol=1e-4)
    copies = jax.tree.map(lambda x: x[np.zeros(4, int)], batch)
    copies = dataclasses.replace(copies, sample=batch.sample)
    outputs = np.asarray(logits(graph, params, copies, key))[..., :VOCAB]
    assert all(np.abs(outputs[0] - output).max() > 0.1 for output in outputs[1:])
    assert np.abs(np.asarray(logits(graph, params, batch))[..., :VOCAB] - full).max() > 0.1


@pytest.mark.slow
@some_of(STACKS, "gemma", "deepseek", "rglru")  # test_equivalence.py has the others
def test_scan_equals_unrolled(name):
    config = dataclasses.replace(FAMILIES[name], dropout=0.2)
    graph, params = init_model(config)
    unrolled = registry.abstract(dataclasses.replace(config, scan=not config.scan))[0]
    batch, key = packed_for(config, 2, SEQ, VOCAB), jax.random.key(1)
    # The same sums, fused differently: rounding of float32 through a few layers.
    assert_close(loss_and_grads(unrolled, params, batch, key), loss_and_grads(graph, params, batch, key), 2e-5)


POLICIES = [name for name in REMAT if name != "none"]
# A family for each policy in turn, and another one in the exhaustive tests.
REMAT_PAIRS = [(STACKS[i % len(STACKS)], policy) for i, policy in enumerate(POLICIES)]
REMAT_PAIRS += [
    pytest.param(STACKS[(i + 3) % len(STACKS)], policy, marks=pytest.mark.exhaustive)
    for i, policy in enumerate(POLICIES)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "remat"), REMAT_PAIRS)
def test_remat_does_not_change_results(name, remat):
    config = dataclasses.replace(FAMILIES[name], dropout=0.2)
    graph, params = init_model(config)
    other = registry.abstract(dataclasses.replace(config, remat=remat))[0]
    batch, key = packed_for(config, 2, SEQ, VOCAB), jax.random.key(1)
    # The same sums, fused differently: rounding of float32 through a few layers.
    assert_close(loss_and_grads(other, params, batch, key), loss_and_grads(graph, params, batch, key), 2e-5)


def test_every_remat_policy_computes_the_same_bits():
    """Primitive by primitive, so that each is compiled once for all policies, and nothing is fused differently."""
    config = dataclasses.replace(FAMILIES["llama"], scan=False, num_layers=1)
    _, params = init_model(config)
    batch = packed_for(config, 1, SEQ, VOCAB)

    def value_and_grad(remat):
        graph = registry.abstract(dataclasses.replace(config, remat=remat))[0]
        return jax.value_and_grad(lambda params: jnp.sum(nnx.merge(graph, params)(batch).hidden ** 2))(params)

    expected = value_and_grad("none")
    for remat in POLICIES:
        jax.tree.map(np.testing.assert_array_equal, value_and_grad(remat), expected)


@pytest.mark.slow
@some_of(FAMILIES, "gemma", "mixtral", "modernbert", "t5", "lstm")
def test_bfloat16_is_near_float32(name):
    config = FAMILIES[name]
    graph, params = init_model(config)
    half = registry.abstract(dataclasses.replace(config, dtype="bfloat16"))[0]
    batch = packed_for(config, 2, SEQ, VOCAB)
    actual, expected = logits(half, params, batch), logits(graph, params, batch)
    assert actual.dtype == np.float32
    scored = batch.segments > 0
    difference = np.abs(np.asarray(actual - expected)[scored][:, :VOCAB])
    largest = np.abs(np.asarray(expected)[scored][:, :VOCAB]).max()
    if config.family == "moe":
        # A router that reads activations of 8 bits may choose another expert for a token now and then: the mean.
        assert 0 < difference.mean() < 0.02 * largest
    else:
        # 8 bits of mantissa through a few layers: about 1% of the largest logit, and not 0.
        assert 0 < difference.max() < 0.06 * largest


@pytest.mark.slow
@some_of(FAMILIES, "gemma", "deepseek", "modernbert", "t5", "rglru")
def test_results_are_equal_on_a_mesh_and_nothing_is_replicated(name, capfd):
    """With every kind of layer; tests/parallel/test_equivalence.py has the other meshes."""
    config = dataclasses.replace(FAMILIES[name], vocab_size=64)
    graph, params = init_model(config)
    batch = packed_for(config, 8, SEQ, VOCAB)
    expected = loss_and_grads(graph, params, batch)
    capfd.readouterr()
    actual = sharded_loss_and_grads(config, params, batch, (2, 2, 2))
    # float32 sums of some 200 tokens in another order
    assert_close(actual, expected, 2e-5)
    if config.family != "moe":
        assert "ematerialization" not in capfd.readouterr().err, (
            "XLA's warning that it replicates an array to reshard it"
        )


WITH_KERNEL = [name for name, config in FAMILIES.items() if hasattr(config, "attention")]


@some_of(WITH_KERNEL, "gemma", "deepseek", "gpt_oss", "modernbert", "t5")
def test_blockwise_attention_equals_dot(name, monkeypatch):
    """On rows of three blocks."""
    monkeypatch.setattr(blockwise, "BLOCK", 8)
    graph, params = init_model(FAMILIES[name])
    config = dataclasses.replace(FAMILIES[name], attention="blockwise")
    batch = packed_for(config, 8, SEQ, VOCAB)
    actual = loss_and_grads(registry.abstract(config)[0], params, batch)
    # float32 sums of some 200 tokens in another order, as on another mesh
    assert_close(actual, loss_and_grads(graph, params, batch), 2e-5)


@pytest.mark.slow
@some_of(["gemma", "deepseek", "modernbert"], "gemma", "deepseek")
def test_splash_attention_equals_dot(name, monkeypatch):
    """The TPU kernel, interpreted, through layers whose windows differ, and with values of another width."""
    monkeypatch.setitem(KERNELS, "splash", dataclasses.replace(KERNELS["splash"], platforms=("cpu",)))
    graph, params = init_model(FAMILIES[name])
    config = dataclasses.replace(FAMILIES[name], attention="splash")
    batch = packed_for(config, 2, SEQ, VOCAB)
    actual = loss_and_grads(registry.abstract(config)[0], params, batch)
    # float32 sums of some 200 tokens in another order, as with blockwise
    assert_close(actual, loss_and_grads(graph, params, batch), 2e-5)


@every_variant
def test_cached_decoding_equals_the_full_pass(name):
    """Prompts of unequal length, then token by token past every window: the logits of the whole sequence at once."""
    config = FAMILIES[name]
    if not config.generates:
        pytest.skip(f"{config.family} continues no text")
    if config.reads_source:
        pytest.skip("its prompt is the source: tests/models/test_encdec.py")
    graph, params = init_model(config)
    rng = np.random.default_rng(1)
    lengths, steps = np.array([9, 4]), 7
    tokens = rng.integers(1, VOCAB, (2, int(lengths.max()) + steps)).astype(np.int32)
    model = nnx.merge(graph, params)
    prompt = np.where(np.arange(lengths.max()) < lengths[:, None], tokens[:, : lengths.max()], 0)
    hidden, cache, positions = jax.jit(model.prefill, static_argnums=2)(prompt, lengths, steps)
    outputs = [model.unembed(hidden)]
    decode = jax.jit(model.cached)
    for i in range(steps):
        new = tokens[np.arange(2), lengths + i][:, None]
        hidden, cache = decode(new, (positions + i)[:, None], cache)
        outputs.append(model.unembed(hidden[:, 0]))
    for row, length in enumerate(lengths):
        full = tokens[row : row + 1]
        segments = (np.arange(full.shape[1]) < length + steps).astype(np.int32)[None]
        batch = dataclasses.replace(
            packed_for(config, 1, SEQ, VOCAB),
            inputs=full,
            targets=full,
            weights=segments,
            segments=segments,
            positions=np.arange(full.shape[1], dtype=np.int32)[None],
        )
        expected = np.asarray(logits(graph, params, batch))[0, length - 1 : length + steps, :VOCAB]
        actual = np.stack([np.asarray(output)[row, :VOCAB] for output in outputs])
        # The same float32 sums in another order over at most 128 terms: a few hundred ulps of the largest logit.
        np.testing.assert_allclose(actual, expected, atol=3e-5 * np.abs(expected).max())


@every_variant
def test_flops_are_near_what_the_compiler_counts(name):
    """Forward pass of one full document, unrolled; scores that a causal mask or a window hides are computed anyway."""
    if FAMILIES[name].family == "moe":
        pytest.skip("the cost of its grouped matmuls depends on the device: tests/models/test_moe.py counts weights")
    config = dataclasses.replace(FAMILIES[name], scan=False, vocab_multiple=1, embed=64)
    if "unroll" in vars(config) and vars(config).get("recurrence") != "associative":
        config = dataclasses.replace(config, unroll=SEQ)  # the compiler counts a loop's body once
    graph, shapes, _ = registry.abstract(config)
    batch = packed_for(config, 1, SEQ, VOCAB)
    counted = logits.lower(graph, shapes, batch).compile().cost_analysis()["flops"]
    predicted = config.flops_per_token(SEQ) / 3 * SEQ
    # At this size softmax, norms and the like are a visible part, and attention is small: bounds, not equality.
    assert 0.75 * predicted < counted < 1.6 * predicted


@every_variant
def test_every_parameter_names_its_axes(name):
    _, shapes, names = registry.abstract(FAMILIES[name])
    axes = jax.tree.leaves(names, is_leaf=lambda x: isinstance(x, tuple))
    for shape, axis in zip(jax.tree.leaves(shapes), axes, strict=True):
        assert len(shape.shape) == len(axis)


def test_every_family_has_a_variant():
    assert {config.family for config in FAMILIES.values()} == set(registry.FAMILIES)
