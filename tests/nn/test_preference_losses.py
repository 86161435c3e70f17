"""The losses of preferences and their gradients equal NumPy's; at the reference the DPO loss is exactly log 2."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.batch import Batch
from llmjax.nn.preference_losses import answer_log_likelihoods, dpo_loss, preference_loss

RECORDS, SEQ, EMBED, VOCAB, BETA = 4, 12, 8, 20, 0.3


def make_batch() -> Batch:
    """Rows of two segments and padding; the last three positions of each segment are scored."""
    rng = np.random.default_rng(0)
    segments, weights = np.zeros((RECORDS, SEQ), np.int32), np.zeros((RECORDS, SEQ), np.float32)
    for row in range(RECORDS):
        first, second = 4 + row % 2, 4 + row // 2
        segments[row, :first], segments[row, first : first + second] = 1, 2
        weights[row, first - 3 : first] = weights[row, first + second - 3 : first + second] = 1
    return Batch(
        inputs=np.zeros_like(segments),
        targets=rng.integers(0, VOCAB, segments.shape).astype(np.int32),
        weights=weights,
        segments=segments,
        positions=np.zeros_like(segments),
        sample=np.zeros((RECORDS, 2), np.uint32),
        num_texts=2,
    )


def numpy_log_likelihoods(hidden, table, batch):
    """(float32 [records, 2], gradient of their weighted sum by hidden and table as a function of the weights)"""
    logits = hidden @ table
    exponents = np.exp(logits - logits.max(-1, keepdims=True))
    p = exponents / exponents.sum(-1, keepdims=True)
    one_hot = np.eye(VOCAB, dtype=np.float32)[batch.targets]
    scores = np.log((p * one_hot).sum(-1)) * batch.weights
    sums = np.stack([(scores * (batch.segments == n)).sum(1) for n in (1, 2)], axis=1)

    def gradient(weights):
        of_segment = np.where(batch.segments == 1, weights[:, :1], weights[:, 1:]) * batch.weights
        d_logits = (one_hot - p) * of_segment[..., None]
        return d_logits @ table.T, np.einsum("bse,bsv->ev", hidden, d_logits)

    return sums, gradient


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(1)
    shapes = (RECORDS, SEQ, EMBED), (EMBED, VOCAB), (RECORDS, 2)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("chunk", [5, 64])
def test_dpo_and_its_gradient_equal_numpys(arrays, chunk):
    hidden, table, noise = arrays
    batch = make_batch()
    sums, gradient = numpy_log_likelihoods(hidden, table, batch)
    reference = sums + noise
    is_record = np.array([True, True, False, True])

    @jax.jit
    def loss(hidden, table):
        actual = answer_log_likelihoods(hidden, lambda h: h @ table, batch, chunk=chunk)
        sums = dpo_loss(actual, reference, is_record, beta=BETA)
        return sums.nats, (sums, actual)

    (nats, (totals, actual)), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, table)
    np.testing.assert_allclose(actual, sums, rtol=1e-5)
    margin = BETA * ((sums - reference)[:, 0] - (sums - reference)[:, 1])
    np.testing.assert_allclose(nats, np.log1p(np.exp(-margin))[is_record].sum(), rtol=1e-5)
    np.testing.assert_allclose(totals.margin, margin[is_record].sum(), rtol=1e-4)
    assert totals.weight == 3 and totals.correct == (margin[is_record] > 0).sum()
    factor = np.where(is_record, -BETA / (1 + np.exp(margin)), 0)
    expected = gradient(np.stack([factor, -factor], axis=1))
    for a, b in zip(grads, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_at_the_reference_the_loss_is_log_2(arrays):
    likelihoods = 1e4 * arrays[2]
    sums = jax.jit(lambda x: dpo_loss(x, x, jnp.ones(RECORDS, bool), beta=BETA))(likelihoods)
    assert sums.nats / sums.weight == np.float32(np.log(2)) and sums.margin == 0 and sums.correct == 0


def test_the_loss_of_rewards_and_its_gradient():
    margin = np.array([0.5, -2.0, 80.0, -80.0], np.float32)
    loss = lambda margin: preference_loss(margin, jnp.ones(4, bool)).nats
    value, gradient = jax.jit(jax.value_and_grad(loss))(margin)
    np.testing.assert_allclose(value, np.logaddexp(0, -margin).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, -1 / (1 + np.exp(margin.astype(np.float64))), rtol=1e-5, atol=1e-12)
