"""Decoder with mixtures of experts: Mixtral, Qwen3-MoE, gpt-oss and DeepSeek-V3, from one config."""

from typing import Any

import jax
import jax.numpy as jnp

from llmjax.batch import Batch, Output
from llmjax.models import parametrization
from llmjax.models.decoder import Angles, Block, Cache, Decoder
from llmjax.models.moe_config import MoeConfig
from llmjax.nn import moe, rotary, stack
from llmjax.nn.latent_attention import LatentAttention
from llmjax.nn.moe import MoeMlp


class DenseBlock(Block):
    """A layer with a plain feed-forward network, such as some models begin with."""

    @staticmethod
    def make_attention(config: Any, key: jax.Array) -> Any:
        if not config.latent:
            return Block.make_attention(config, key)
        return LatentAttention(
            key,
            config.embed,
            num_heads=config.num_heads,
            latent=config.latent,
            query_rank=config.query_latent,
            head_dim=config.head_size,
            rope_dim=config.rope_dim,
            value_dim=config.value_size,
            scale=config.residual_init_scale,
            score_scale=parametrization.score_scale(config, config.score_scale or config.latent_scale),
            kernel=config.attention,
            dtype=config.param_dtype,
        )


class MoeBlock(DenseBlock):
    """A layer with a mixture of experts."""

    @staticmethod
    def make_mlp(config: Any, key: jax.Array) -> Any:
        return MoeMlp(
            key,
            config.embed,
            config.expert_size,
            routing=config.routing,
            shared=config.shared_experts * config.expert_size,
            activation=config.activation,
            expert_activation=config.expert_activation or config.activation,
            bias=config.biases == "all",
            expert_bias=config.expert_bias,
            scale=config.residual_init_scale,
            dtype=config.param_dtype,
        )


class MoeDecoder(Decoder):
    """Batch -> Output with hidden states [batch, seq, embed], the routers' losses and what they count.

    Parameters: those of Decoder, and dense_blocks (stacked as blocks are) for the dense layers at the beginning.
    """

    block = MoeBlock
    config: MoeConfig

    def make_blocks(self, keys: jax.Array) -> Any:
        dense, config = self.config.dense_layers, self.config
        self.dense_blocks = jax.vmap(lambda key: DenseBlock(config, key))(keys[:dense]) if dense else None
        return super().make_blocks(keys[dense:])

    def cache(self, batch: int, slots: int) -> Cache:
        """Empty keys and values as in Decoder, or latents and rotated keys, [layers, batch, slots, width]."""
        config = self.config
        if not config.latent:
            return super().cache(batch, slots)
        empty = lambda width: jnp.zeros((config.num_layers, batch, slots, width), config.dtype)
        return empty(config.latent), empty(config.rope_dim)

    def _feed(self, mlp: Any, x: jax.Array, batch: Batch | None) -> tuple[jax.Array, Any]:
        if not isinstance(mlp, MoeMlp):
            return mlp(x), None
        out, load = mlp(x, jnp.ones(x.shape[:2], bool) if batch is None else batch.segments > 0)
        return out, None if batch is None else load

    def _output(self, hidden: jax.Array, fed: Any) -> Output:
        config, expert_bias = self.config, self.blocks.mlp.router.expert_bias
        penalty, stats = moe.losses(
            fed,
            None if expert_bias is None else expert_bias[...],
            config.routing,
            balance_loss=config.balance_loss,
            router_z_loss=config.router_z_loss,
        )
        return Output(hidden=hidden, aux_loss=penalty, aux_metrics=stats)

    def _angles(self, positions: jax.Array, local: bool) -> Angles:
        config = self.config
        if not config.latent:
            return super()._angles(positions, local)
        return rotary.angles(positions, config.rope_dim, config.rope_base, config.scaling)

    def _run(self, layer: Any, x: jax.Array, data: Any, remat: str) -> tuple[jax.Array, Any]:
        dense, first = self.config.dense_layers, None
        if dense:
            head = jax.tree.map(lambda leaf: leaf[:dense], data)
            data = jax.tree.map(lambda leaf: leaf[dense:], data)
            x, (first, _) = stack.run(layer, x, (self.dense_blocks, head), scan=self.config.scan, remat=remat)
        x, (attended, fed) = super()._run(layer, x, data, remat)
        if dense:
            attended = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, attended)
        return x, (attended, fed)
