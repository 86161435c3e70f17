"""Encoders with a head_dim other than embed / num_heads against plain einsums in float32: loss and gradients."""

from collections.abc import Callable
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.batch import Batch
from llmjax.models.base import TransformerConfig
from llmjax.models.encdec import EncDecConfig
from llmjax.models.encoder import EncoderConfig
from tests.batches import packed_for
from tests.models.programs import assert_close, init_model, loss_and_grads
from tests.models.variants import BERT, MODERNBERT, T5_V11, VOCAB

# embed / num_heads is 8 in all of them.
CONFIGS = {
    "bert": dataclasses.replace(BERT, head_dim=6),
    "modernbert": dataclasses.replace(MODERNBERT, head_dim=12),
    "t5": dataclasses.replace(T5_V11, head_dim=12),
}
GELU_TANH = lambda x: 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
GELU = lambda x: 0.5 * x * (1 + jax.scipy.special.erf(x / math.sqrt(2)))


def linear(w: dict, x: jax.Array) -> jax.Array:
    return x @ w["weight"] + w.get("bias", 0)


def layer_norm(config: TransformerConfig, w: dict, x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return rms_norm(config, w, x) + w.get("bias", 0)


def rms_norm(config: TransformerConfig, w: dict, x: jax.Array) -> jax.Array:
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * w["scale"]


def mlp(w: dict, x: jax.Array, activation: Callable) -> jax.Array:
    hidden = activation(linear(w["gate"], x)) * linear(w["up"], x) if "gate" in w else activation(linear(w["up"], x))
    return linear(w["down"], hidden)


def attention(w, x, source, mask, scale, bias=0.0, rotate=lambda x: x) -> jax.Array:
    """x [batch, s, embed] attends to source [batch, t, embed]; mask bool [batch, s, t]."""
    project = lambda name, x: jnp.einsum("bse,ehd->bshd", x, w[name]["weight"]) + w[name].get("bias", 0)
    q, k, v = rotate(project("query", x)), rotate(project("key", source)), project("value", source)
    scores = jnp.einsum("bshd,bthd->bhst", q, k) * scale + bias
    probabilities = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1)
    return jnp.einsum("bhst,bthd,hde->bse", probabilities, v, w["out"]["weight"]) + w["out"].get("bias", 0)


def rotation(positions: np.ndarray, head_dim: int, base: float) -> Callable:
    """The rotation of x [batch, seq, heads, head_dim] by its positions."""
    angle = (positions[..., None] * base ** (-np.arange(0, head_dim, 2) / head_dim))[:, :, None].astype(np.float32)

    def rotate(x):
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate(
            [a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)], axis=-1
        )

    return rotate


def encoder_logits(config: EncoderConfig, params: dict, batch: Batch) -> jax.Array:
    same_segment = batch.segments[:, :, None] == batch.segments[:, None]
    distance = np.abs(batch.positions[:, :, None] - batch.positions[:, None])
    x = params["embed"]["table"][batch.inputs]
    if config.positions == "learned":
        x = x + params["positions"]["table"][batch.positions] + params["token_types"]["table"][batch.token_types]
    x = layer_norm(config, params["embed_norm"], x)
    num_first = 1 if "first" in params else 0
    for layer, is_local in enumerate(config.local_layers):
        stack, index = (params["first"], 0) if layer < num_first else (params["blocks"], layer - num_first)
        w = jax.tree.map(lambda leaf, index=index: leaf[index], stack)
        mask = same_segment & (distance < config.window) if is_local else same_segment
        base = config.rope_local_base if is_local else config.rope_base
        rotate = rotation(batch.positions, config.head_dim, base) if config.positions == "rotary" else lambda x: x
        attend = lambda x, w=w["attention"], mask=mask, rotate=rotate: attention(
            w, x, x, mask, config.head_dim**-0.5, rotate=rotate
        )
        if config.norm_position == "post":
            x = layer_norm(config, w["attention_norm"], x + attend(x))
            x = layer_norm(config, w["mlp_norm"], x + mlp(w["mlp"], x, GELU))
        else:
            x = x + attend(layer_norm(config, w["attention_norm"], x) if "attention_norm" in w else x)
            x = x + mlp(w["mlp"], layer_norm(config, w["mlp_norm"], x), GELU)
    x = layer_norm(config, params["norm"], x) if "norm" in params else x
    head = params["head"]
    x = layer_norm(config, head["norm"], GELU(linear(head["dense"], x)))
    return x @ params["embed"]["table"].T + head["bias"]


def relative_bias(config: EncDecConfig, table: jax.Array, positions: np.ndarray, bidirectional: bool) -> jax.Array:
    """Biases [batch, heads, seq, seq] of T5 (Raffel et al., 2020, arXiv 1910.10683), by logarithms as in its code."""
    distance = positions[:, None] - positions[:, :, None]
    count = config.relative_buckets // 2 if bidirectional else config.relative_buckets
    exact = count // 2
    length = np.abs(distance) if bidirectional else np.maximum(-distance, 0)
    steps = np.log(np.maximum(length, 1) / exact) / math.log(config.relative_distance / exact) * (count - exact)
    bucket = np.where(length < exact, length, np.minimum(exact + (steps + 1e-9).astype(int), count - 1))
    return jnp.moveaxis(table[bucket + count * (distance > 0) * bidirectional], -1, 1)


def encdec_logits(config: EncDecConfig, params: dict, batch: Batch) -> jax.Array:
    def run(side, tokens, segments, positions, source=None, source_segments=None):
        is_decoder = source is not None
        mask = segments[:, :, None] == segments[:, None]
        if is_decoder:
            mask &= positions[:, :, None] >= positions[:, None]
        bias = relative_bias(config, side["bias"]["table"], positions, bidirectional=not is_decoder)
        x = params["embed"]["table"][tokens]
        for layer in range(config.decoder_layers if is_decoder else config.num_layers):
            w = jax.tree.map(lambda leaf, layer=layer: leaf[layer], side["blocks"])
            y = rms_norm(config, w["attention_norm"], x)
            x = x + attention(w["attention"], y, y, mask, 1.0, bias)
            if is_decoder:
                cross_mask = segments[:, :, None] == source_segments[:, None]
                x = x + attention(w["cross"], rms_norm(config, w["cross_norm"], x), source, cross_mask, 1.0)
            x = x + mlp(w["mlp"], rms_norm(config, w["mlp_norm"], x), GELU_TANH)
        return rms_norm(config, side["norm"], x)

    source = run(params["encoder"], batch.source, batch.source_segments, batch.source_positions)
    hidden = run(params["decoder"], batch.inputs, batch.segments, batch.positions, source, batch.source_segments)
    return hidden @ params["head"]


@pytest.mark.parametrize("name", CONFIGS)
def test_explicit_head_dim_equals_the_einsum_reference(name):
    """Two packed rows of several documents; cross-entropy and z-loss, and the gradient of every parameter."""
    config = CONFIGS[name]
    graph, params = init_model(config)
    batch = packed_for(config, 2, 24, VOCAB)
    assert config.head_dim * config.num_heads != config.embed
    assert batch.segments.max() > 1
    reference_logits = encdec_logits if isinstance(config, EncDecConfig) else encoder_logits

    @jax.jit
    def reference_loss(params):
        logits = reference_logits(config, params, batch)[..., :VOCAB]
        log_z = jax.scipy.special.logsumexp(logits, axis=-1)
        target = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
        return jnp.sum(batch.weights * (log_z - target + 1e-3 * log_z**2))

    expected = jax.value_and_grad(reference_loss)(params)
    assert_close(loss_and_grads(graph, params, batch), expected, rtol=1e-5)
