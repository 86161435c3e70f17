"""The contrastive loss and its gradient equal NumPy's; padding does not matter; a row's texts are pooled apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.batch import Batch
from llmjax.data.config import POOLINGS
from llmjax.nn.pair_losses import contrastive_loss, embed_texts, similarity_loss

RECORDS, EMBED, TEMPERATURE = 6, 8, 0.1
REFERENCE = {
    "mean": lambda x: x.mean(axis=0),
    "first": lambda x: x[0],
    "last": lambda x: x[-1],
    "max": lambda x: x.max(axis=0),
}


def random_vectors(texts: int, records: int = RECORDS) -> np.ndarray:
    vectors = np.random.default_rng(texts).normal(size=(records, texts, EMBED)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def numpy_loss(vectors: np.ndarray) -> tuple[float, np.ndarray, int]:
    """(summed loss, its gradient by the vectors, correct records), in float32."""
    first = vectors[:, 0]
    candidates = np.concatenate([vectors[:, number] for number in range(1, vectors.shape[1])])
    logits = first @ candidates.T / np.float32(TEMPERATURE)
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = exponents / exponents.sum(axis=1, keepdims=True)
    own = np.eye(*p.shape, dtype=np.float32)
    d_logits = (p - own) / np.float32(TEMPERATURE)
    d_candidates = (d_logits.T @ first).reshape(-1, len(vectors), vectors.shape[2]).swapaxes(0, 1)
    gradient = np.concatenate([(d_logits @ candidates)[:, None], d_candidates], axis=1)
    return float(-np.log(p[own > 0]).sum()), gradient, int((p.argmax(axis=1) == np.arange(len(p))).sum())


@jax.jit
def loss_and_gradient(vectors, is_record):
    def loss(vectors):
        sums = contrastive_loss(vectors, is_record, temperature=TEMPERATURE)
        return sums.nats, sums

    (_, sums), gradient = jax.value_and_grad(loss, has_aux=True)(vectors)
    return sums, gradient


@pytest.mark.parametrize("texts", [2, 3])
def test_loss_and_gradient_equal_numpys(texts):
    vectors = random_vectors(texts)
    expected, expected_gradient, correct = numpy_loss(vectors)
    sums, gradient = loss_and_gradient(vectors, np.ones(RECORDS, bool))
    np.testing.assert_allclose(sums.nats, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    assert sums.weight == RECORDS and sums.correct == correct


def test_padding_is_no_candidate():
    vectors = random_vectors(3)
    padded = np.concatenate([vectors[:2], 9 * random_vectors(3, 2), vectors[2:]])
    is_record = np.array([True, True, False, False, *[True] * (RECORDS - 2)])
    alone, gradient = loss_and_gradient(vectors, np.ones(RECORDS, bool))
    sums, padded_gradient = loss_and_gradient(padded, is_record)
    np.testing.assert_allclose(sums.nats, alone.nats, rtol=1e-6)
    assert sums.weight == RECORDS and sums.correct == alone.correct
    assert not padded_gradient[~is_record].any()
    np.testing.assert_allclose(padded_gradient[is_record], gradient, rtol=1e-5, atol=1e-6)


def test_a_batch_of_padding_has_no_loss_and_no_gradient():
    sums, gradient = loss_and_gradient(random_vectors(2), np.zeros(RECORDS, bool))
    assert sums.nats == sums.weight == sums.correct == 0 and not np.asarray(gradient).any()


def test_similarity_and_its_gradient_equal_numpys():
    cosines, scores = np.random.default_rng(0).uniform(-1, 1, (2, RECORDS)).astype(np.float32)
    is_record = np.arange(RECORDS) != 2
    loss = lambda cosines: similarity_loss(cosines, scores, is_record).nats
    value, gradient = jax.jit(jax.value_and_grad(loss))(cosines)
    np.testing.assert_allclose(value, np.sum(is_record * (cosines - scores) ** 2), rtol=1e-6)
    np.testing.assert_allclose(gradient, 2 * is_record * (cosines - scores), rtol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_each_text_of_a_row_has_a_vector_of_length_one(pooling):
    hidden = np.random.default_rng(0).normal(size=(2, 9, EMBED)).astype(np.float32)
    segments = np.array([[1, 1, 1, 2, 2, 3, 0, 0, 0], [1, 2, 2, 2, 3, 3, 3, 3, 3]])
    zeros = np.zeros_like(segments)
    batch = Batch(
        inputs=zeros,
        targets=zeros,
        weights=zeros.astype(np.float32),
        segments=segments,
        positions=zeros,
        sample=np.zeros((2, 2), np.uint32),
        num_texts=3,
    )
    vectors = jax.jit(lambda hidden: embed_texts(hidden, batch, pooling))(jnp.asarray(hidden))
    for row in range(2):
        for number in range(3):
            expected = REFERENCE[pooling](hidden[row, segments[row] == number + 1])
            np.testing.assert_allclose(vectors[row, number], expected / np.linalg.norm(expected), rtol=1e-5, atol=1e-6)
