"""The encoder against a plain numpy implementation, its token types, and its windows."""

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.batch import Batch
from llmjax.models import registry
from llmjax.models.encoder import EncoderConfig
from tests.batches import packed_for
from tests.models.programs import init_model, logits
from tests.models.variants import BERT, MODERNBERT, VOCAB

BOTH = pytest.mark.parametrize("config", [BERT, MODERNBERT], ids=["bert", "modernbert"])


def oracle(config: EncoderConfig, params: dict, row: Batch) -> tuple[np.ndarray, np.ndarray]:
    """(logits [seq, vocab], pooled [embed]) of a batch of one row in float64, one head at a time."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    tokens, segments, positions, types = (
        np.asarray(x[0]) for x in (row.inputs, row.segments, row.positions, row.token_types)
    )
    size = config.head_size

    def norm(x, w):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * w["scale"] + w.get("bias", 0)

    def rotate(x, base):
        if config.positions == "learned":
            return x
        out = np.empty_like(x)
        for i in range(size // 2):
            angle = positions * base ** (-2 * i / size)
            a, b = x[:, i], x[:, i + size // 2]
            out[:, i] = a * np.cos(angle) - b * np.sin(angle)
            out[:, i + size // 2] = a * np.sin(angle) + b * np.cos(angle)
        return out

    gelu = lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))
    linear = lambda w, x: x @ w["weight"] + w.get("bias", 0)

    def attention(x, w, local):
        base = config.rope_local_base if local else config.rope_base
        part = lambda name, head: x @ w[name]["weight"][:, head] + w[name].get("bias", np.zeros((99, 1)))[head]
        out = np.zeros_like(x)
        is_visible = segments[:, None] == segments
        if local:
            is_visible &= np.abs(positions[:, None] - positions) < config.window
        for head in range(config.num_heads):
            q, k, v = rotate(part("query", head), base), rotate(part("key", head), base), part("value", head)
            scores = q @ k.T / np.sqrt(size)
            weights = np.exp(np.where(is_visible, scores, -np.inf) - scores.max())
            out += weights / weights.sum(-1, keepdims=True) @ v @ w["out"]["weight"][head]
        return out + w["out"].get("bias", 0)

    def mlp(x, w):
        h = gelu(linear(w["gate"], x)) * linear(w["up"], x) if "gate" in w else gelu(linear(w["up"], x))
        return linear(w["down"], h)

    x = p["embed"]["table"][tokens]
    if config.positions == "learned":
        x = x + p["positions"]["table"][positions] + p["token_types"]["table"][types]
    x = norm(x, p["embed_norm"])
    for layer in range(config.num_layers):
        local = config.window > 0 and (config.attention_pattern * config.num_layers)[layer] == "l"
        if config.norm_position == "post":
            w = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["blocks"])
            x = norm(x + attention(x, w["attention"], local), w["attention_norm"])
            x = norm(x + mlp(x, w["mlp"]), w["mlp_norm"])
        else:
            stacked, at = (p["first"], 0) if layer == 0 else (p["blocks"], layer - 1)
            w = jax.tree.map(lambda leaf, at=at: leaf[at], stacked)
            x = x + attention(norm(x, w["attention_norm"]) if layer else x, w["attention"], local)
            x = x + mlp(norm(x, w["mlp_norm"]), w["mlp"])
    x = norm(x, p["norm"]) if "norm" in p else x
    pooled = np.tanh(linear(p["pooler"], x[0])) if "pooler" in p else x[0]
    head = p["head"]
    return norm(gelu(linear(head["dense"], x)), head["norm"]) @ p["embed"]["table"].T + head["bias"], pooled


@BOTH
def test_equals_the_numpy_oracle(config):
    graph, params = init_model(config)
    row = packed_for(BERT, 1, 24, VOCAB)
    actual, (expected, pooled) = np.asarray(logits(graph, params, row))[0], oracle(config, params, row)
    assert actual.dtype == np.float32
    # float32 against float64 over a few layers: some 1e-6 of the largest logit
    np.testing.assert_allclose(actual[:, :VOCAB], expected[:, :VOCAB], atol=1e-5 * np.abs(expected).max())
    assert (actual[:, VOCAB:] == np.float32(-1e30)).all()
    model = nnx.merge(graph, params)
    np.testing.assert_allclose(model.pool(model(row).hidden)[0], pooled, atol=1e-5)


def test_absent_token_types_are_0():
    graph, params = init_model(BERT)
    row = packed_for(BERT, 1, 24, VOCAB)
    zeros = dataclasses.replace(row, token_types=np.zeros_like(row.inputs))
    none = dataclasses.replace(row, token_types=None)
    np.testing.assert_array_equal(logits(graph, params, none), logits(graph, params, zeros))
    assert np.abs(logits(graph, params, row) - logits(graph, params, zeros))[..., :VOCAB].max() > 0.1


def test_local_layers_attend_to_their_window_only():
    """With the global layers cut off, 3 local layers of window 4 carry a token at most 3 * (4 - 1) positions."""
    graph, params = init_model(dataclasses.replace(MODERNBERT, attention_pattern="glll"))
    for name in ("attention", "mlp"):
        out = params["first"][name]["out" if name == "attention" else "down"]
        out["weight"] = jnp.zeros_like(out["weight"])
    flat = packed_for(BERT, 1, 24, VOCAB)
    row = dataclasses.replace(
        flat, segments=np.ones_like(flat.segments), positions=np.arange(24)[None].astype(np.int32)
    )
    inputs = row.inputs.copy()
    inputs[0, 12] = (inputs[0, 12] + 5) % VOCAB
    difference = logits(graph, params, dataclasses.replace(row, inputs=inputs)) - logits(graph, params, row)
    moved = np.abs(np.asarray(difference)[0, :, :VOCAB]).max(-1) > 0
    np.testing.assert_array_equal(np.nonzero(moved)[0], np.arange(12 - 9, 12 + 10))


def test_axes_of_parameters():
    _, shapes, names = registry.abstract(MODERNBERT)
    assert "attention_norm" not in names["first"]
    assert shapes["first"]["mlp_norm"]["scale"].shape == (1, 32)
    assert shapes["blocks"]["attention_norm"]["scale"].shape == (3, 32)
    assert names["first"]["attention"]["query"]["weight"] == ("layers", "embed", "heads", "head_dim")
    names = registry.abstract(BERT)[2]
    assert names["token_types"]["table"] == ("entries", "embed")
    assert names["head"]["dense"]["weight"] == names["pooler"]["weight"] == ("embed", "mlp")
    assert names["head"]["bias"] == ("vocab",)


@pytest.mark.slow
def test_flops_are_those_of_the_compiler():
    """A forward pass is a third of a training step's flops; norms, softmax and activations are not counted."""
    config = dataclasses.replace(BERT, num_layers=2, embed=256, max_positions=128, vocab_size=512, scan=False)
    graph, shapes, _ = registry.abstract(config)
    batch = packed_for(BERT, 1, 128, VOCAB)
    actual = logits.lower(graph, shapes, batch).compile().cost_analysis()["flops"] / batch.inputs.size
    assert 1.0 < actual / (config.flops_per_token(128) / 3) < 1.05
