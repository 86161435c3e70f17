"""Distillation's loss against the plain form over all logits: values and gradients, with packed documents."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.errors import UserError
from llmjax.models import registry
from llmjax.models.decoder_config import DecoderConfig
from llmjax.nn.distillation import DistillConfig, distillation_loss, make_distillation_loss
from llmjax.train.step import make_loss
from tests.batches import packed

ROWS, SEQ, VOCAB = 3, 13, 16
STUDENT = DecoderConfig(vocab_size=VOCAB, num_layers=1, embed=16, num_heads=2, mlp=16, scan=False)
TEACHER = dataclasses.replace(STUDENT, embed=24, num_layers=2, tie_embeddings=True)


def compile_gradients(model, teacher, **fields):
    """A function (params, teacher's params, batch) -> (gradients, Sums) of the train step's loss."""
    z_loss, distill = fields.pop("z_loss", 0.0), DistillConfig(teacher="runs/teacher", **fields)
    graph, teacher_graph = registry.abstract(model)[0], registry.abstract(teacher)[0]

    def loss(params, teacher_params, batch):
        batch_loss = make_distillation_loss(nnx.merge(teacher_graph, teacher_params), distill)
        return make_loss(graph, seed=0, chunk=4, z_loss=z_loss, batch_loss=batch_loss)(params, batch)

    return jax.jit(jax.grad(loss, has_aux=True))


def plain_loss(params, teacher_params, batch, *, alpha, temperature, z_loss):
    """No chunks, no rules of its own: log_softmax of all logits, and JAX's gradients."""
    logits = []
    for config, values in ((STUDENT, params), (TEACHER, teacher_params)):
        model = nnx.merge(registry.abstract(config)[0], values)
        logits.append(model.unembed(model(batch).hidden))
    log_p, log_q = (jax.nn.log_softmax(x / temperature) for x in (logits[1], logits[0]))
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits[0]), batch.targets[..., None], -1)[..., 0]
    z = z_loss * jax.nn.logsumexp(logits[0], axis=-1) ** 2
    total = lambda x: jnp.sum(batch.weights * x)
    return total((1 - alpha) * nats + alpha * temperature**2 * kl + z), total(kl)


@pytest.fixture(scope="module")
def parameters():
    return registry.init(STUDENT, jax.random.key(0)), registry.init(TEACHER, jax.random.key(1))


@pytest.mark.parametrize(
    ("alpha", "temperature", "z_loss"), [(0.3, 2.0, 0.1), pytest.param(1.0, 0.5, 0.0, marks=pytest.mark.slow)]
)
def test_values_and_gradients_equal_the_plain_form(parameters, alpha, temperature, z_loss):
    """13 positions in chunks of 4 leave a rest of 1; the rows hold several documents and padding."""
    batch = packed(ROWS, SEQ, VOCAB)
    batch = dataclasses.replace(batch, weights=batch.weights * np.linspace(0.5, 2, SEQ, dtype=np.float32))
    fields = dict(alpha=alpha, temperature=temperature, z_loss=z_loss)
    grads, sums = compile_gradients(STUDENT, TEACHER, **fields)(*parameters, batch)
    (total, kl), expected = jax.jit(jax.value_and_grad(functools.partial(plain_loss, **fields), has_aux=True))(
        *parameters, batch
    )
    # float32 sums over 39 positions and 16 ids, added in another order
    np.testing.assert_allclose(sums.loss.nats + sums.loss.z, total, rtol=1e-5)
    np.testing.assert_allclose(sums.loss.kl, kl, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), grads, expected)


def test_a_teacher_that_is_the_model_gives_no_gradient(parameters):
    student, _ = parameters
    grads, sums = compile_gradients(STUDENT, STUDENT, alpha=1.0)(student, student, packed(ROWS, SEQ, VOCAB))
    assert sums.loss.kl == 0 and sums.loss.nats == 0
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(grads))


def test_a_divergence_computed_by_hand():
    """Logits of 0 and 2 log 3 at temperature 2: probabilities 1/4 and 3/4, against 1/2 each."""
    weights = np.eye(1, SEQ, dtype=np.float32)
    batch = dataclasses.replace(packed(1, SEQ, VOCAB), targets=np.zeros((1, SEQ), np.int32), weights=weights)
    logits = jnp.zeros((1, SEQ, 2), jnp.float32)
    teacher = logits.at[..., 1].set(2 * np.log(3))
    same = lambda x: x
    sums = distillation_loss(logits, same, teacher, same, batch, chunk=0, z_loss=0.0, alpha=0.25, temperature=2.0)
    divergence = 0.25 * np.log(0.5) + 0.75 * np.log(1.5)
    assert sums.kl == pytest.approx(divergence, rel=1e-6)
    assert sums.nats == pytest.approx(0.75 * np.log(2) + 0.25 * 4 * divergence, rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 0.3}, r"distill.alpha=0.3: has no use without distill.teacher"),
        ({"teacher": "a", "alpha": 0.0}, r"distill.alpha=0.0: must be above 0 and at most 1"),
        ({"teacher": "a", "temperature": 0.0}, r"distill.temperature=0.0: must be above 0"),
        ({"teacher": "a", "step": -1}, r"distill.step=-1: must be a step of the teacher's run"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        DistillConfig(**fields)
