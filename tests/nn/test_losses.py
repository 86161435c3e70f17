"""Chunked cross-entropy against the plain form over all logits: losses and gradients."""

from collections.abc import Callable
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.models import registry
from llmjax.models.decoder_config import DecoderConfig
from llmjax.nn.losses import LossSums, batch_loss, cross_entropy
from llmjax.parallel import axes
from tests.batches import packed
from tests.models.programs import loss_and_grads

BATCH, SEQ, EMBED, VOCAB = 3, 13, 8, 32


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(BATCH, SEQ, EMBED)), dtype)
    table = jnp.asarray(rng.normal(size=(EMBED, VOCAB)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=VOCAB), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB, (BATCH, SEQ)), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 2, (BATCH, SEQ)) * rng.uniform(0.5, 2, (BATCH, SEQ)), jnp.float32)
    return hidden, table, bias, targets, weights


def unembed(table, bias) -> Callable:
    return lambda hidden: jnp.matmul(hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32) + bias


def plain(hidden, unembed, targets, weights, *, z_loss: float) -> LossSums:
    """No chunks, no rules of its own: log_softmax and JAX's gradients."""
    logits = unembed(hidden)
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return LossSums(
        nats=jnp.sum(weights * nats),
        z=z_loss * jnp.sum(weights * log_z**2),
        weight=jnp.sum(weights),
        correct=jnp.sum(weights * (logits.argmax(-1) == targets)),
    )


def objective(form, hidden, table, bias, targets, weights):
    sums = form(hidden, unembed(table, bias), targets, weights)
    return 0.3 * (sums.nats + sums.z), sums


gradients = lambda form: jax.jit(jax.grad(functools.partial(objective, form), argnums=(0, 1, 2), has_aux=True))


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [0, 1, 4, 13, 99])
def test_chunked_cross_entropy_equals_the_plain_form(chunk, z_loss):
    """13 positions in chunks of 4 leave a rest of 1; the bias shows that each parameter of the head gets a gradient."""
    args = inputs()
    actual = gradients(functools.partial(cross_entropy, chunk=chunk, z_loss=z_loss))(*args)
    expected = gradients(functools.partial(plain, z_loss=z_loss))(*args)
    # float32 sums over 39 tokens and 32 ids, added in another order
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), actual, expected)
    sums = jax.jit(lambda h, t, b, *rest: cross_entropy(h, unembed(t, b), *rest, chunk=chunk, z_loss=z_loss))(*args)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6), sums, actual[1])


@pytest.mark.parametrize("multi_label", [True, False])
@pytest.mark.parametrize("chunk", [0, 4])
def test_losses_of_labels_equal_the_plain_form(chunk, multi_label):
    hidden, table, bias, targets, weights = inputs()
    table, bias = table[:, :5], bias[:5]
    rng = np.random.default_rng(1)
    numbers = jnp.asarray(rng.normal(size=(BATCH, SEQ, 5)), jnp.float32)
    labels = (numbers > 0).astype(jnp.float32) if multi_label else numbers
    batch = dataclasses.replace(
        packed(BATCH, SEQ, VOCAB), targets=targets, weights=weights, labels=labels, multi_label=multi_label
    )

    def plain_labels(hidden, unembed, _, weights):
        y = unembed(hidden)
        p = jax.nn.sigmoid(y)
        error = -(labels * jnp.log(p) + (1 - labels) * jnp.log(1 - p)) if multi_label else (y - labels) ** 2
        right = jnp.mean((y > 0) == (labels > 0), axis=-1)
        correct = jnp.sum(weights * right) if multi_label else None
        nats = jnp.sum(weights * jnp.mean(error, axis=-1))
        return LossSums(nats=nats, z=jnp.zeros(()), weight=jnp.sum(weights), correct=correct)

    def chunked(hidden, unembed, _, weights):
        return batch_loss(hidden, unembed, dataclasses.replace(batch, weights=weights), chunk=chunk, z_loss=0.1)

    args = hidden, table, bias, targets, weights
    actual, expected = gradients(chunked)(*args), gradients(plain_labels)(*args)
    # float32 sums over 39 tokens and 5 outputs, added in another order
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), actual, expected)


@pytest.mark.parametrize("chunk", [0, 4])
def test_a_tied_head_equals_the_plain_form(chunk):
    """An embedding table [vocab, embed], which the head reads transposed."""
    hidden, table, bias, targets, weights = inputs()

    def tied_objective(form, hidden, table):
        head = lambda h: unembed(table.T, bias)(h)  # transposed inside, as models do
        sums = form(hidden, head, targets, weights, z_loss=0.1)
        return 0.3 * (sums.nats + sums.z), sums

    gradients = lambda form: jax.jit(jax.grad(functools.partial(tied_objective, form), argnums=(0, 1), has_aux=True))
    actual = gradients(functools.partial(cross_entropy, chunk=chunk))(hidden, table.T)
    expected = gradients(plain)(hidden, table.T)
    # float32 sums over 39 tokens and 32 ids, added in another order
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), actual, expected)


def test_sums_add_over_rows():
    hidden, table, bias, targets, weights = inputs()
    score = lambda rows: cross_entropy(
        hidden[rows], unembed(table, bias), targets[rows], weights[rows], chunk=4, z_loss=0.01
    )
    parts = jax.tree.map(jnp.add, score(slice(0, 1)), score(slice(1, 3)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), score(slice(0, 3)), parts)


def test_unscored_tokens_have_no_gradient():
    args = inputs()
    (d_hidden, _, _), _ = gradients(functools.partial(cross_entropy, chunk=4, z_loss=0.1))(*args)
    unscored = np.asarray(args[-1]) == 0
    assert (np.asarray(d_hidden)[unscored] == 0).all()
    assert (np.asarray(d_hidden)[~unscored] != 0).any()


def test_huge_logits_stay_finite():
    hidden, table, bias, targets, weights = inputs()
    grads, sums = gradients(functools.partial(cross_entropy, chunk=4, z_loss=0.0))(
        1e4 * hidden, table, bias, targets, weights
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((grads, sums)))


def test_bfloat16_hidden_states_get_gradients_of_their_type():
    hidden, *rest = inputs(jnp.bfloat16)
    (d_hidden, d_table, _), sums = gradients(functools.partial(cross_entropy, chunk=4, z_loss=0.0))(hidden, *rest)
    expected, exact = gradients(functools.partial(plain, z_loss=0.0))(hidden.astype(jnp.float32), *rest)
    assert d_hidden.dtype == jnp.bfloat16 and d_table.dtype == jnp.float32 and sums.nats.dtype == jnp.float32
    # products of bfloat16 numbers: 2^-8 relative to the largest
    for a, b in ((d_hidden, expected[0]), (d_table, expected[1])):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=0.02 * np.abs(b).max())
    np.testing.assert_allclose(sums.nats, exact.nats, rtol=0.01)


def test_never_makes_all_logits():
    """The compiled gradient holds no array of [batch, seq, vocab], in any order of dimensions."""
    args = inputs()
    text = gradients(functools.partial(cross_entropy, chunk=1, z_loss=0.1)).lower(*args).compile().as_text()
    assert f"[{BATCH},1,{VOCAB}]" in text or f"[{BATCH},{VOCAB}]" in text
    for shape in (
        f"[{BATCH},{SEQ},{VOCAB}]",
        f"[{SEQ},{BATCH},{VOCAB}]",
        f"[{SEQ},{BATCH},1,{VOCAB}]",
        f"[{BATCH * SEQ},{VOCAB}]",
    ):
        assert shape not in text


def test_sharded_rows_have_the_loss_and_gradients_of_one_device():
    """In bfloat16, where the mesh gathers the float32 table in bfloat16; 13 positions in chunks of 4."""
    rows = [jnp.concatenate([x, x[::-1], x[1:]]) for x in inputs(jnp.bfloat16) if x.shape[:2] == (BATCH, SEQ)]
    args = (rows[0], *inputs()[1:3], *rows[1:])
    run = lambda: gradients(functools.partial(cross_entropy, chunk=4, z_loss=0.1))(*args)
    expected_grads, expected = run()
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with axes.use_mesh(mesh):
        grads, sums = run()
    with axes.use_mesh(mesh, gradient_dtype="bfloat16"):
        (_, d_table, _), _ = run()
    # Four devices' sums, rounded to 8 bits.
    assert (d_table != grads[1]).any()
    np.testing.assert_allclose(d_table, grads[1], rtol=0, atol=2**-7 * np.abs(grads[1]).max())
    # The same logits; float32 sums over 104 tokens in another order
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6), sums, expected)
    # One device rounds the sum over 8 rows of a chunk to bfloat16, four devices round sums over 2 rows: 2^-8 of each.
    for a, b in zip(grads, expected_grads, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())


def collectives_in_loops(text: str) -> list[tuple[str, int]]:
    """(operation, elements of its largest result) of every collective inside a loop of a compiled program's text."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%([\w.-]+) \(.*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    called = lambda body: re.findall(r"(?:body|calls|to_apply)=%([\w.-]+)", body)
    reached, open_ = set(), re.findall(r" while\(.*body=%([\w.-]+)", text)
    assert open_
    while open_:
        name = open_.pop()
        reached.add(name)
        open_ += [other for other in called(bodies[name]) if other not in reached]
    lines = [line for name in reached for line in bodies[name].splitlines()]
    found = [
        re.search(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(", line) for line in lines
    ]
    elements = lambda shapes: max(
        math.prod(map(int, filter(None, d.split(",")))) for d in re.findall(r"\[([\d,]*)\]", shapes)
    )
    return [(match[2], elements(match[1])) for match in found if match]


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("shape", [(1, 4, 2), (2, 4, 1)], ids=["fsdp 4 x tensor 2", "data 2 x fsdp 4"])
def test_the_head_is_gathered_and_its_gradient_summed_outside_the_loop(shape, tied):
    """No collective inside any loop has as many elements as the head has on a device of the tensor axis."""
    embed, vocab, rows, seq = 32, 1024, 8, 32
    config = DecoderConfig(
        vocab_size=vocab, num_layers=2, embed=embed, num_heads=4, mlp=64, tie_embeddings=tied, logit_softcap=20.0
    )
    graph, shapes, names = registry.abstract(config)
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with axes.use_mesh(mesh):
        place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        params = jax.tree.map(place, shapes, axes.shardings(names, shapes))
        batch = jax.tree.map(
            lambda x: place(x, jax.NamedSharding(mesh, axes.spec(("batch",), mesh=mesh))), packed(rows, seq, vocab)
        )
        text = loss_and_grads.lower(graph, params, batch).compile().as_text() or ""
    head = embed * vocab // shape[2]
    assert f"[{embed},{vocab // shape[2]}]" in text or f"[{vocab // shape[2]},{embed}]" in text
    inside = collectives_in_loops(text)
    assert max(size for _, size in inside) < head, inside
