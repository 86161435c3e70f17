"""The encoder-decoder against a plain numpy implementation; attention between its two sides; decoding."""

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.batch import Batch
from llmjax.errors import UserError
from llmjax.inference.generate import generate
from llmjax.inference.sampling import Sampling
from llmjax.models import registry
from llmjax.models.encdec import EncDecConfig
from tests.batches import packed, packed_pairs
from tests.models.programs import init_model, logits
from tests.models.variants import T5_V10, T5_V11, VOCAB

BOTH = pytest.mark.parametrize("config", [T5_V11, T5_V10], ids=["v1.1", "v1.0"])


def oracle(config: EncDecConfig, params: dict, row: Batch) -> np.ndarray:
    """Logits of a batch of one row in float64: one document, one head and one pair of positions at a time."""
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
        (target_columns,), (source_columns,) = (
            np.nonzero(row.segments[0] == number),
            np.nonzero(row.source_segments[0] == number),
        )
        source = run(p["embed"]["table"][row.source[0, source_columns]], p["encoder"], config.num_layers)
        x = run(p["embed"]["table"][row.inputs[0, target_columns]], p["decoder"], config.decoder_layers, source)
        out[target_columns] = (
            x @ p["head"] if not config.tie_embeddings else x / math.sqrt(config.embed) @ p["embed"]["table"].T
        )
    return out


@BOTH
def test_equals_the_numpy_oracle(config):
    graph, params = init_model(config)
    row = packed_pairs(1, 40, 56, VOCAB)
    actual, expected = np.asarray(logits(graph, params, row))[0], oracle(config, params, row)
    assert actual.dtype == np.float32
    real = row.segments[0] > 0
    # float32 against float64 over five layers: a few 1e-6 of the largest logit
    np.testing.assert_allclose(actual[real, :VOCAB], expected[real, :VOCAB], atol=1e-5 * np.abs(expected).max())
    assert (actual[:, VOCAB:] == np.float32(-1e30)).all()


def test_document_without_a_source_attends_to_no_other():
    graph, params = init_model(T5_V11)
    row = packed_pairs(1, 24, 40, VOCAB)
    bare = dataclasses.replace(row, source_segments=np.where(row.source_segments == 1, 0, row.source_segments))
    other = dataclasses.replace(bare, source=np.where(bare.source_segments > 0, 1, bare.source))
    target_columns = row.segments == 1
    before, after = np.asarray(logits(graph, params, bare)), np.asarray(logits(graph, params, other))
    np.testing.assert_array_equal(before[target_columns], after[target_columns])
    assert (before[row.segments > 1] != after[row.segments > 1]).any()


@jax.jit
def prefill(model, tokens, lengths):
    hidden, cache, first = model.prefill(tokens, lengths, 9)
    return model.unembed(hidden), cache, first


@jax.jit
def cached(model, tokens, positions, cache):
    hidden, cache = model.cached(tokens, positions, cache)
    return model.unembed(hidden), cache


@pytest.mark.parametrize("config", [T5_V11, dataclasses.replace(T5_V10, scan=False)], ids=["v1.1", "v1.0"])
def test_cached_decoding_equals_the_full_pass(config):
    """Prompts of unequal length; the target in steps of one token and of several."""
    graph, params = init_model(config)
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
    actual = [np.asarray(first)[:, None]]
    for start, stop in ((1, 2), (2, 3), (3, 7), (7, 10)):
        positions = jnp.broadcast_to(jnp.arange(start, stop), (3, stop - start))
        piece, cache = cached(model, target[:, start:stop], positions, cache)
        actual.append(np.asarray(piece))
    # Same float32 sums in another order: a few hundred ulps of the largest logit.
    np.testing.assert_allclose(np.concatenate(actual, 1)[..., :VOCAB], expected, atol=3e-5 * np.abs(expected).max())


def test_batched_prompts_generate_what_each_generates_alone():
    graph, params = init_model(T5_V11)
    prompts = [[5], list(range(1, 40)), [8, 8, 3]]
    go = lambda some: generate(graph, params, T5_V11, some, Sampling(max_tokens=9, temperature=0), stop_ids=[-1])
    together = go(prompts)
    assert together == [go([prompt])[0] for prompt in prompts]
    assert len({tuple(row) for row in together}) == 3, "the prompts must matter"


def test_the_cache_holds_the_target_and_no_prompt():
    """A slot for the start token and each new one, however long the source."""
    graph, params = init_model(T5_V11)
    model, lengths = nnx.merge(graph, params), np.array([30, 500])
    _, cache, _ = jax.eval_shape(lambda tokens: model.prefill(tokens, lengths, 7), np.zeros((2, 512), np.int32))
    heads = (T5_V11.num_heads, T5_V11.head_size)
    assert [leaf.shape for leaf in cache.targets] == [(T5_V11.decoder_layers, 2, 8, *heads)] * 2
    assert [leaf.shape for leaf in cache.source] == [(T5_V11.decoder_layers, 2, 512, *heads)] * 2


def test_error_names_what_is_missing():
    graph, params = init_model(T5_V11)
    with pytest.raises(UserError, match=r"batch has no source"):
        logits(graph, params, packed(1, 24, VOCAB))
    unset = dataclasses.replace(T5_V11, start_id=-1)
    with pytest.raises(UserError, match=r"model.start_id=-1"):
        generate(registry.abstract(unset)[0], params, unset, [[5]], Sampling(max_tokens=2), stop_ids=[-1])


def test_axes_of_parameters():
    _, shapes, names = registry.abstract(T5_V11)
    assert names["decoder"]["blocks"]["cross"]["query"]["weight"] == ("layers", "embed", "heads", "head_dim")
    assert names["encoder"]["blocks"]["mlp"]["down"]["weight"] == ("layers", "mlp", "embed")
    assert names["encoder"]["bias"]["table"] == ("entries", "heads")
    assert names["decoder"]["norm"]["scale"] == ("embed",)
    assert shapes["encoder"]["blocks"]["attention"]["query"]["weight"].shape[0] == 2
    assert shapes["decoder"]["blocks"]["attention"]["query"]["weight"].shape[0] == 3
    assert "head" not in registry.abstract(T5_V10)[1]
