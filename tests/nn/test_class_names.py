"""Names of classes score as a decoder that writes each of them, in packed rows and on a mesh."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.data.batches.packing import Rows
from llmjax.data.objectives.labelled import LabelTask, build_named_batch
from llmjax.models.encdec import EncDecConfig
from llmjax.nn.class_names import make_class_batch, score_names
from llmjax.parallel import axes
from llmjax.parallel.mesh import MeshConfig, make_mesh
from tests.models.programs import init_model

SEQ, TARGETS, START, EOS = 24, 10, 3, 1
NAMES = np.array([[5, EOS, -1, -1], [6, 7, 8, EOS], [5, 7, EOS, -1]], np.int32)
TASK = LabelTask(num_outputs=3, multi_label=False, is_number=False, first=False, before=(), after=(EOS,), eos_id=EOS)
CONFIG = EncDecConfig(vocab_size=40, num_layers=2, embed=32, num_heads=4, head_dim=8, mlp=64)


def make_rows(documents: list[list[np.ndarray]], classes: list[list[int]]) -> Rows:
    """Rows of documents, each with its class."""
    shape = len(documents), SEQ
    targets, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    labels = np.zeros((*shape, 1), np.float32)
    for row, texts in enumerate(documents):
        start = 0
        for number, ids in enumerate(texts):
            at = slice(start, start + len(ids))
            targets[row, at], segments[row, at], positions[row, at] = ids, number + 1, np.arange(len(ids))
            labels[row, start] = classes[row][number]
            start += len(ids)
    scored = segments > 0
    return Rows(targets=targets, inputs=targets, segments=segments, positions=positions, scored=scored, labels=labels)


def build(documents, classes):
    return build_named_batch(
        make_rows(documents, classes), np.arange(len(documents)), TASK, NAMES, (SEQ, TARGETS), START
    )


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [np.r_[rng.integers(9, 40, size), EOS].astype(np.int32) for size in (7, 3, 12, 1)]


@jax.jit
def score(params, batch):
    return score_names(nnx.merge(init_model(CONFIG)[0], params), batch, jnp.asarray(NAMES))


@jax.jit
def written_log_likelihoods(params, batch):
    """Of the scored targets of each row, in plain jax.numpy."""
    model = nnx.merge(init_model(CONFIG)[0], params)
    log_likelihoods = jax.nn.log_softmax(model.unembed(model(batch).hidden))
    chosen = jnp.take_along_axis(log_likelihoods, batch.targets[..., None], axis=-1)[..., 0]
    return jnp.sum(batch.weights * chosen, axis=1)


def test_packed_names_score_as_each_written_alone(texts):
    params = init_model(CONFIG)[1]
    scores = score(params, build([texts[:2], texts[2:]], [[0, 2], [1, 0]]))
    assert scores.shape == (2, TARGETS // 4, 3)
    alone = [written_log_likelihoods(params, build([[text]], [[name]]))[0] for text in texts for name in range(3)]
    # float32 through two layers, added in another order
    np.testing.assert_allclose(np.ravel(scores), alone, rtol=1e-5)


def test_the_class_of_a_batch_is_read_from_its_targets(texts):
    batch = jax.jit(make_class_batch)(build([texts[:2], texts[2:3]], [[0, 2], [1]]), jnp.asarray(NAMES))
    np.testing.assert_array_equal(batch.weights, [[1, 1], [1, 0]])
    np.testing.assert_array_equal(np.where(batch.weights > 0, batch.targets, 0), [[0, 2], [1, 0]])


def test_scores_do_not_depend_on_the_class_of_the_batch(texts):
    params = init_model(CONFIG)[1]
    first, second = (score(params, build([texts[:2]], [classes])) for classes in ([0, 0], [1, 2]))
    np.testing.assert_array_equal(first, second)


def test_a_mesh_agrees_with_one_device(texts):
    params = init_model(CONFIG)[1]
    batch = build([texts[:2], texts[2:]] * 4, [[0, 2], [1, 0]] * 4)
    expected = score(params, batch)
    with axes.use_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        spec = jax.sharding.PartitionSpec(("data", "fsdp"))
        sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec)
        arrays = {k: v for k, v in vars(batch).items() if isinstance(v, np.ndarray)}
        sharded = dataclasses.replace(batch, **{k: jax.device_put(v, sharding) for k, v in arrays.items()})
        actual = jax.jit(score.__wrapped__)(params, sharded)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)
