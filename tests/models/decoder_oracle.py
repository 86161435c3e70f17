"""The decoder in plain numpy: float64, one row, one head and one pair of dimensions at a time, nothing shared."""

from collections.abc import Callable
import math

import jax
import numpy as np

from llmjax.batch import Batch
from llmjax.models.decoder_config import DecoderConfig


def logits(config: DecoderConfig, params: dict, row: Batch) -> np.ndarray:
    """Logits [seq, padded vocab] of a batch of one row."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    tokens, segments, positions = (np.asarray(x[0]) for x in (row.inputs, row.segments, row.positions))
    x = p["embed"]["table"][tokens] * config.embed_multiplier
    if config.positions == "learned":
        x = x + p["positions"]["table"][positions]
    for layer in range(config.num_layers):
        w = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["blocks"])
        local = config.window > 0 and (config.attention_pattern * config.num_layers)[layer] == "l"
        see = lambda x, w=w["attention"], local=local: attention(config, x, w, segments, positions, local)
        x = add(config, x, see, w["attention_norm"], w.get("attention_post_norm"))
        x = add(config, x, lambda x, w=w["mlp"]: mlp(config, x, w), w["mlp_norm"], w.get("mlp_post_norm"))
    x = x if config.norm_position == "post" else norm(config, x, p["norm"])
    return cap(x @ (p["embed"]["table"].T if config.tie_embeddings else p["head"]), config.logit_softcap)


def add(config: DecoderConfig, x: np.ndarray, run: Callable, first: dict, second: dict | None) -> np.ndarray:
    if config.norm_position == "pre":
        return x + run(norm(config, x, first))
    if config.norm_position == "inner":
        return x + norm(config, run(x), first)
    if config.norm_position == "both":
        return x + norm(config, run(norm(config, x, first)), second)
    return norm(config, x + run(x), first)


def cap(x: np.ndarray, limit: float) -> np.ndarray:
    return limit * np.tanh(x / limit) if limit else x


def norm(config: DecoderConfig, x: np.ndarray, w: dict, dims: int = 1) -> np.ndarray:
    last = tuple(range(-dims, 0))
    if config.norm == "layernorm":
        x = x - x.mean(last, keepdims=True)
    scale = w["scale"] + (1 if config.norm == "rmsnorm1p" else 0)
    return x / np.sqrt((x**2).mean(last, keepdims=True) + config.norm_eps) * scale + w.get("bias", 0)


def frequency(config: DecoderConfig, pair: int, local: bool) -> float:
    """Radians a position."""
    size, original = config.head_size, config.rope_original
    if local and config.rope_local_base:
        return config.rope_local_base ** (-2 * pair / size)
    fast = config.rope_base ** (-2 * pair / size)
    slow = fast / config.rope_factor
    if config.rope_scaling in ("none", "linear"):
        return slow
    low = config.rope_low or 1
    if config.rope_scaling == "llama3":
        high, wavelength = config.rope_high or 4, 2 * math.pi / fast
        if wavelength < original / high:
            return fast
        if wavelength > original / low:
            return slow
        blend = (original / wavelength - low) / (high - low)
        return (1 - blend) * slow + blend * fast
    find_dimension = lambda turns: size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_base))
    start, end = find_dimension(config.rope_high or 32), find_dimension(low)
    if config.rope_truncate:
        start, end = math.floor(start), math.ceil(end)
    start, end = max(start, 0), min(end, size - 1)
    ramp = min(max((pair - start) / (end - start), 0), 1)
    return slow * ramp + fast * (1 - ramp)


def rotate(config: DecoderConfig, x: np.ndarray, positions: np.ndarray, local: bool) -> np.ndarray:
    if config.positions == "learned":
        return x
    out, half, factor = np.empty_like(x), config.head_size // 2, 1.0
    if config.rope_scaling == "yarn" and not (local and config.rope_local_base):
        factor = config.rope_attention_factor or 0.1 * math.log(config.rope_factor) + 1
    for i in range(half):
        angle = positions * frequency(config, i, local)
        a, b = x[:, i], x[:, i + half]
        out[:, i] = factor * (a * np.cos(angle) - b * np.sin(angle))
        out[:, i + half] = factor * (a * np.sin(angle) + b * np.cos(angle))
    return out


def attention(
    config: DecoderConfig, x: np.ndarray, w: dict, segments: np.ndarray, positions: np.ndarray, local: bool
) -> np.ndarray:
    project = lambda name: np.einsum("se,ehd->shd", x, w[name]["weight"]) + w[name].get("bias", 0)
    q, k, v = project("query"), project("key"), project("value")
    if config.qk_norm != "none":
        dims = 2 if config.qk_norm == "all" else 1
        q, k = norm(config, q, w["query_norm"], dims), norm(config, k, w["key_norm"], dims)
    out = np.zeros_like(x)
    distance = positions[:, None] - positions
    is_visible = (distance >= 0) & (segments[:, None] == segments)
    if local:
        is_visible &= distance < config.window
    for head in range(config.num_heads):
        shared = head // (config.num_heads // config.kv_heads)
        turned = [rotate(config, each, positions, local) for each in (q[:, head], k[:, shared])]
        scores = turned[0] @ turned[1].T * (config.score_scale or config.head_size**-0.5)
        scores = cap(scores, config.score_softcap)
        weights = np.where(is_visible, np.exp(scores), 0)
        total = weights.sum(-1, keepdims=True) + (np.exp(w["sinks"][head]) if config.attention_sinks else 0)
        out += weights / total @ v[:, shared] @ w["out"]["weight"][head]
    return out + w["out"].get("bias", 0)


def mlp(config: DecoderConfig, x: np.ndarray, w: dict) -> np.ndarray:
    linear = lambda name, y: y @ w[name]["weight"] + w[name].get("bias", 0)
    activation = {
        "silu": lambda x: x / (1 + np.exp(-x)),
        "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        "relu2": lambda x: np.maximum(x, 0) ** 2,
    }[config.activation]
    h = activation(linear("gate", x)) * linear("up", x) if "gate" in w else activation(linear("up", x))
    return linear("down", h)
