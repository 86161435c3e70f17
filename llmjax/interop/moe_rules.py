"""Tensors of checkpoints with mixtures of experts."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from llmjax.interop import decoder_rules
from llmjax.interop.decoder_rules import LAYER
from llmjax.interop.layouts import matrix, transposed
from llmjax.interop.mapping import Rule
from llmjax.models.moe import MoeConfig

_MTP = "model.layers.61."  # of DeepSeek-V3: a layer that predicts the token after the next, and is not run here


def mixtral(config: MoeConfig) -> list[Rule]:
    """w1, w2 and w3 are gate, down and up."""
    return [
        *decoder_rules.ends(config),
        *decoder_rules.norms(config),
        *decoder_rules.attention(config),
        *_experts(config, "block_sparse_moe", ("w1", "w3", "w2")),
    ]


def qwen3(config: MoeConfig) -> list[Rule]:
    """As Mixtral, with norms of queries and keys, and perhaps first layers without experts."""
    both = decoder_rules.norms(config) + decoder_rules.attention(config)
    return decoder_rules.ends(config) + _layers(config, both, decoder_rules.mlp(config), _gated_experts(config))


def deepseek(config: MoeConfig) -> list[Rule]:
    """Latent attention, shared experts, and first layers without experts."""
    both = decoder_rules.norms(config) + _latent_attention(config)
    bias = Rule(LAYER + "mlp.gate.e_score_correction_bias", ("blocks.mlp.router.expert_bias",))
    embed, width = (config.embed,), (config.shared_experts * config.expert_size,)
    shared = [
        Rule(f"{LAYER}mlp.shared_experts.{name}_proj.weight", (f"blocks.mlp.shared.{name}.weight",), **matrix(*ends))
        for name, ends in {"gate": (embed, width), "up": (embed, width), "down": (width, embed)}.items()
    ]
    experts = [*_gated_experts(config), bias, *(shared if config.shared_experts else [])]
    return decoder_rules.ends(config) + _layers(config, both, decoder_rules.mlp(config), experts)


def deepseek_name(name: str) -> str | None:
    """The layer that predicts a further token is left out, as transformers does."""
    return None if name.startswith(_MTP) else name


def gpt_oss(config: MoeConfig) -> list[Rule]:
    """All experts of a layer in one tensor, whose last dimension has gate and up by turns."""
    turns = {
        "take": lambda tensor: (tensor[..., 0::2], tensor[..., 1::2]),
        "give": lambda gate, up: np.stack([gate, up], axis=-1).reshape(*gate.shape[:-1], -1),
    }
    block, ours = LAYER + "mlp.", "blocks.mlp."
    names = lambda suffix: (f"{ours}experts.gate{suffix}", f"{ours}experts.up{suffix}")
    return [
        *decoder_rules.ends(config),
        *decoder_rules.norms(config),
        *decoder_rules.attention(config),
        Rule(block + "router.weight", (ours + "router.weight",), **transposed()),
        Rule(block + "router.bias", (ours + "router.bias",)),
        Rule(block + "experts.gate_up_proj", names(""), **turns),
        Rule(block + "experts.gate_up_proj_bias", names("_bias"), **turns),
        Rule(block + "experts.down_proj", (ours + "experts.down",)),
        Rule(block + "experts.down_proj_bias", (ours + "experts.down_bias",)),
    ]


def _gated_experts(config: MoeConfig) -> list[Rule]:
    return _experts(config, "mlp", ("gate_proj", "up_proj", "down_proj"))


def _experts(config: MoeConfig, module: str, names: tuple[str, str, str]) -> list[Rule]:
    """The router, and each expert's three matrices in tensors of their own; `names` of gate, up and down."""
    embed, width = (config.embed,), (config.expert_size,)
    shapes = zip(("gate", "up", "down"), names, ((embed, width), (embed, width), (width, embed)), strict=True)
    router = Rule(f"{LAYER}{module}.gate.weight", ("blocks.mlp.router.weight",), **transposed())
    return [router] + [
        Rule(f"{LAYER}{module}.experts.{{expert}}.{theirs}.weight", (f"blocks.mlp.experts.{ours}",), **matrix(*ends))
        for ours, theirs, ends in shapes
    ]


def _latent_attention(config: MoeConfig) -> list[Rule]:
    embed, heads, plain, rope = config.embed, config.num_heads, config.head_size, config.rope_dim
    latent, value, source = config.latent, config.value_size, config.query_latent or config.embed
    attention, ours = LAYER + "self_attn.", "blocks.attention."

    def take_query(tensor: Any) -> tuple[Any]:
        found = tensor.reshape(heads, plain + rope, source)
        found = np.concatenate([found[:, :plain], _halves(found[:, plain:], 1)], axis=1)
        return (found.transpose(2, 0, 1),)

    def give_query(array: Any) -> Any:
        found = array.transpose(1, 2, 0)
        found = np.concatenate([found[:, :plain], _pairs(found[:, plain:], 1)], axis=1)
        return found.reshape(-1, source)

    def take_key_value(tensor: Any) -> tuple[Any, Any]:
        found = tensor.reshape(heads, plain + value, latent).transpose(2, 0, 1)
        return found[..., :plain], found[..., plain:]

    def give_key_value(key: Any, value: Any) -> Any:
        return np.concatenate([key, value], axis=-1).transpose(1, 2, 0).reshape(-1, latent)

    query = "q_b_proj" if config.query_latent else "q_proj"
    rules = [
        Rule(f"{attention}{query}.weight", (ours + "query.weight",), take_query, give_query),
        Rule(
            attention + "kv_a_proj_with_mqa.weight",
            (ours + "latent.weight", ours + "key_rope.weight"),
            lambda tensor: (tensor[:latent].T, _halves(tensor[latent:], 0).T),
            lambda c, key: np.concatenate([c.T, _pairs(key.T, 0)]),
        ),
        Rule(attention + "kv_a_layernorm.weight", (ours + "latent_norm.scale",)),
        Rule(
            attention + "kv_b_proj.weight", (ours + "key.weight", ours + "value.weight"), take_key_value, give_key_value
        ),
        Rule(attention + "o_proj.weight", (ours + "out.weight",), **matrix((heads, value), (embed,))),
    ]
    if config.query_latent:
        down = matrix((embed,), (config.query_latent,))
        rules.append(Rule(attention + "q_a_proj.weight", (ours + "query_down.weight",), **down))
        rules.append(Rule(attention + "q_a_layernorm.weight", (ours + "query_norm.scale",)))
    return rules


def _halves(tensor: Any, dim: int) -> Any:
    """Rotated dimensions that lie on disk in pairs, x0 y0 x1 y1, in the order that rotary.rotate takes: x0 x1 y0 y1."""
    return _turn(tensor, dim, (-1, 2))


def _pairs(tensor: Any, dim: int) -> Any:
    """The inverse of `_halves`."""
    return _turn(tensor, dim, (2, -1))


def _turn(tensor: Any, dim: int, sizes: Sequence[int]) -> Any:
    shape = tensor.shape
    return tensor.reshape(*shape[:dim], *sizes, *shape[dim + 1 :]).swapaxes(dim, dim + 1).reshape(shape)


def _layers(config: MoeConfig, both: list[Rule], dense: list[Rule], experts: list[Rule]) -> list[Rule]:
    """Rules of layers, `both` of all of them, as those of dense_blocks, which come first on disk, and of blocks."""
    count = config.dense_layers
    rest = range(count, config.num_layers)
    rules = [dataclasses.replace(rule, layers=tuple(rest)) for rule in both + experts]
    if count:
        ours = lambda rule: tuple(name.replace("blocks.", "dense_blocks.", 1) for name in rule.ours)
        rules += [dataclasses.replace(rule, ours=ours(rule)) for rule in both + dense]
    return rules
