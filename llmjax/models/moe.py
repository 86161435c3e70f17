"""Decoder with mixtures of experts: Mixtral, Qwen3-MoE, gpt-oss and DeepSeek-V3, from one config."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from llmjax.batch import Output
from llmjax.data.config import LABELLED
from llmjax.errors import UserError
from llmjax.models.decoder import Block, Cache, Decoder, Rope
from llmjax.models.decoder_config import DecoderConfig
from llmjax.nn import moe, rotary, stack
from llmjax.nn.dispatch import GLU_ACTIVATIONS
from llmjax.nn.latent_attention import LatentAttention
from llmjax.nn.moe import MoeMlp, Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig(DecoderConfig):
    """A decoder in whose layers each token goes through a few of many feed-forward networks. No token is dropped.

    It has every field of the family "decoder", but `gated` must be True, and with `latent` the fields num_kv_heads,
    attention_sinks, qk_norm, score_softcap, window and biases must keep their defaults.

    family              "moe"
    num_experts         number of experts in a layer
    experts_per_token   number of experts that a token goes through
    expert_mlp          width of an expert; 0: mlp
    expert_activation   of the experts: one that `activation` can be, or clamped_swiglu (as in gpt-oss); "": activation
    shared_experts      number of experts that every token goes through, computed as one network of their total width
    dense_layers        number of first layers that have a feed-forward network of width mlp instead of experts
    router              softmax (over all experts) or sigmoid (each expert by itself)
    renormalise         whether the weights of a token's experts are scaled to sum 1 (Mixtral, gpt-oss)
    router_scale        factor of the weights, applied last
    router_groups       number of groups of consecutive experts
    router_top_groups   number of groups from which a token's experts come: those with the highest sum of their two best
                        scores. 1 and 1: no groups
    expert_bias         whether a bias takes part in the selection of experts, not in their weights. The optimizer moves
                        it against each expert's load by optimizer.expert_bias_update_rate per update (DeepSeek-V3)
    balance_loss        coefficient of the load-balance loss, which is 1 for an evenly loaded layer: computed for each
                        row and layer, weighted by the row's tokens, summed over layers
    router_z_loss       coefficient of the squared log of the router's partition function, summed over tokens and layers
    latent              width of the vector from which keys and values of all heads are computed, and which is cached
                        instead of them (multi-head latent attention); 0: grouped-query attention
    query_latent        width of the vector from which queries are computed; 0: from the residual stream
    rope_dim            width of the rotated part of a query, in addition to head_dim, which is not rotated; all heads
                        share its key
    value_dim           width of a head's value; 0: head_dim. These four are unused without `latent`
    """

    objectives: ClassVar[tuple[str, ...]] = ("causal", "prefix", "fim", *LABELLED)
    choices: ClassVar = {
        **DecoderConfig.choices,
        "expert_activation": (*GLU_ACTIVATIONS, ""),
        "router": ("softmax", "sigmoid"),
    }
    minimums: ClassVar = {
        **DecoderConfig.minimums,
        "num_experts": 1,
        "experts_per_token": 1,
        "expert_mlp": 0,
        "shared_experts": 0,
        "dense_layers": 0,
        "balance_loss": 0,
        "router_z_loss": 0,
        "latent": 0,
        "query_latent": 0,
        "value_dim": 0,
    }
    above_zero: ClassVar = (*DecoderConfig.above_zero, "router_scale")

    family: str = "moe"
    num_experts: int = 8
    experts_per_token: int = 2
    expert_mlp: int = 0
    expert_activation: str = ""
    shared_experts: int = 0
    dense_layers: int = 0
    router: str = "softmax"
    renormalise: bool = True
    router_scale: float = 1.0
    router_groups: int = 1
    router_top_groups: int = 1
    expert_bias: bool = False
    balance_loss: float = 0.01
    router_z_loss: float = 0.001
    latent: int = 0
    query_latent: int = 0
    rope_dim: int = 64
    value_dim: int = 0

    def __post_init__(self):
        super().__post_init__()
        _check_experts(self)
        _check_router(self)
        _check_latent(self)

    @property
    def expert_size(self) -> int:
        """Width of an expert."""
        return self.expert_mlp or self.mlp_size

    @property
    def value_size(self) -> int:
        """Width of a head's value."""
        return self.value_dim or self.head_size

    @property
    def attention_needs(self) -> dict[str, str]:
        """Also heads of latent attention, which are wider in queries and keys than in values."""
        if not self.latent:
            return super().attention_needs
        width = self.head_size + self.rope_dim
        wide = {"wide_heads": f"model.rope_dim={self.rope_dim}"} if width > 128 else {}
        return super().attention_needs | wide | {"value_width": f"model.latent={self.latent}"}

    @property
    def latent_scale(self) -> float:
        """The factor of latent attention's scores if score_scale is 0."""
        return (self.head_size + self.rope_dim) ** -0.5

    @property
    def routing(self) -> Routing:
        """How a layer's router selects experts."""
        return Routing(
            num_experts=self.num_experts,
            experts_per_token=self.experts_per_token,
            score=self.router,
            renormalise=self.renormalise,
            scale=self.router_scale,
            groups=self.router_groups,
            top_groups=self.router_top_groups,
        )

    def check(self, *, seq_len: int, tensor: int) -> None:
        """UserError where the model cannot read rows of `seq_len` tokens, or cannot be cut over `tensor` devices."""
        super().check(seq_len=seq_len, tensor=1)
        counts = {"num_heads": self.num_heads, "expert_mlp": self.expert_size}
        counts |= {} if self.latent else {"num_kv_heads": self.kv_heads}
        counts |= {"mlp": self.mlp_size} if self.dense_layers else {}
        self.check_tensor_shards(tensor, counts)

    def check_mesh(self, mesh: Mapping[str, int]) -> None:
        """UserError where the experts cannot be split over the axes (axis -> size) of a mesh."""
        if self.num_experts % mesh.get("expert", 1):
            raise UserError(f"mesh.expert={mesh['expert']}: must divide model.num_experts={self.num_experts}")

    @property
    def matmul_params(self) -> int:
        """Number of weights that one token is multiplied with: of all experts, only its own count."""
        if self.latent:
            per_head = self.head_size + self.rope_dim
            from_query = self.embed * (self.query_latent or self.num_heads * per_head)
            from_query += self.query_latent * self.num_heads * per_head
            from_latent = self.latent * self.num_heads * (self.head_size + self.value_size)
            attention = from_query + self.embed * (self.latent + self.rope_dim) + from_latent
            attention += self.num_heads * self.value_size * self.embed
        else:
            attention = self.embed * (2 * self.num_heads + 2 * self.kv_heads) * self.head_size
        experts = self.experts_per_token + self.shared_experts
        moe = self.embed * (self.num_experts + 3 * experts * self.expert_size)
        dense = 3 * self.embed * self.mlp_size
        layers = self.num_layers * attention + (self.num_layers - self.dense_layers) * moe + self.dense_layers * dense
        return layers + self.embed * self.head_outputs

    @property
    def score_width(self) -> int:
        """Multiplications that a head does for each key it sees."""
        return self.head_size + self.rope_dim + self.value_size if self.latent else super().score_width

    @property
    def inactive_params(self) -> int:
        """Number of parameters of the experts that one token does not go through."""
        per_expert = 3 * self.embed * self.expert_size
        per_expert += 2 * self.expert_size + self.embed if self.biases == "all" else 0
        return (self.num_layers - self.dense_layers) * (self.num_experts - self.experts_per_token) * per_expert


def _check_experts(config: MoeConfig) -> None:
    if not config.gated:
        raise UserError(f"model.gated={config.gated!r}: experts are gated; set it to True")
    if config.dense_layers >= config.num_layers:
        raise UserError(
            f"model.dense_layers={config.dense_layers}: must be below model.num_layers={config.num_layers}; "
            "a model without experts is of model.family='decoder'"
        )


def _check_router(config: MoeConfig) -> None:
    groups, top = config.router_groups, config.router_top_groups
    if groups < 1 or config.num_experts % groups:
        raise UserError(f"model.router_groups={groups}: must divide model.num_experts={config.num_experts}")
    if not 1 <= top <= groups:
        raise UserError(f"model.router_top_groups={top}: must be from 1 to model.router_groups={groups}")
    if groups > 1 and config.num_experts // groups < 2:
        raise UserError(
            f"model.router_groups={groups}: leaves one expert in a group, whose two best are compared; use fewer groups"
        )
    available = config.num_experts // groups * top
    if config.experts_per_token > available:
        raise UserError(
            f"model.experts_per_token={config.experts_per_token}: must be at most {available}, the available experts"
        )


def _check_latent(config: MoeConfig) -> None:
    if not config.latent:
        for field in ("query_latent", "value_dim"):
            if getattr(config, field):
                raise UserError(f"model.{field}={getattr(config, field)}: unused without model.latent; leave it 0")
        return
    if config.rope_dim < 2 or config.rope_dim % 2:
        raise UserError(f"model.rope_dim={config.rope_dim}: rotary positions pair dimensions, so it must be even")
    defaults = {field.name: field.default for field in dataclasses.fields(MoeConfig)}
    for field in ("num_kv_heads", "attention_sinks", "qk_norm", "score_softcap", "window", "biases", "positions"):
        if getattr(config, field) != defaults[field]:
            raise UserError(
                f"model.{field}={getattr(config, field)!r}: is not supported with latent attention; leave it at "
                f"{defaults[field]!r}, or set model.latent=0"
            )


class DenseBlock(Block):
    """A layer with a plain feed-forward network, like the first layers of some models."""

    @staticmethod
    def make_attention(config: Any, key: jax.Array) -> Any:
        """Latent attention if the config has a latent, else that of Decoder."""
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
            score_scale=config.mup_score_scale(config.score_scale or config.latent_scale, config.head_size),
            dtype=config.param_dtype,
        )


class MoeBlock(DenseBlock):
    """A layer with a mixture of experts."""

    @staticmethod
    def make_mlp(config: Any, key: jax.Array) -> Any:
        """The experts and their router."""
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

    def feed_forward(self, x: jax.Array, token_mask: jax.Array | None) -> tuple[jax.Array, Any]:
        """x [batch, seq, embed] -> (same, the router's statistics over the tokens in `token_mask`)."""
        if token_mask is None:
            return self.mlp(x, jnp.ones(x.shape[:2], bool))[0], None
        return self.mlp(x, token_mask)


class MoeDecoder(Decoder):
    """Batch -> Output with hidden states [batch, seq, embed], the routers' losses and metrics.

    Parameters: those of Decoder, and dense_blocks (stacked as blocks are) for the dense layers at the beginning.
    """

    block = MoeBlock
    config: MoeConfig

    def make_blocks(self, keys: jax.Array) -> Any:
        """Stacked blocks with experts; those of the dense layers go to `dense_blocks`."""
        dense, config = self.config.dense_layers, self.config
        self.dense_blocks = jax.vmap(lambda key: DenseBlock(config, key))(keys[:dense]) if dense else None
        return super().make_blocks(keys[dense:])

    def cache(self, batch: int, slots: int) -> Cache:
        """Empty keys and values as in Decoder, or latents and rotated keys [layers, batch, slots, width]."""
        config = self.config
        if not config.latent:
            return super().cache(batch, slots)
        empty = lambda width: jnp.zeros((config.num_layers, batch, slots, width), config.dtype)
        return empty(config.latent), empty(config.rope_dim)

    def _output(self, hidden: jax.Array, aux: Any) -> Output:
        config, expert_bias = self.config, self.blocks.mlp.router.expert_bias
        aux_loss, aux_metrics = moe.losses(
            aux,
            None if expert_bias is None else expert_bias[...],
            config.routing,
            balance_loss=config.balance_loss,
            router_z_loss=config.router_z_loss,
        )
        return Output(hidden=hidden, aux_loss=aux_loss, aux_metrics=aux_metrics)

    def _rope(self, positions: jax.Array, local: bool) -> Rope:
        config = self.config
        if not config.latent:
            return super()._rope(positions, local)
        return rotary.angles(positions, config.rope_dim, config.rope_base, config.scaling)

    def _run_layers(self, layer: Callable, x: jax.Array, per_layer: Any, remat: str) -> tuple[jax.Array, Any]:
        dense, first_cache = self.config.dense_layers, None
        if dense:
            first = jax.tree.map(lambda leaf: leaf[:dense], per_layer)
            per_layer = jax.tree.map(lambda leaf: leaf[dense:], per_layer)
            scan, quantization = self.config.scan, self.config.quantization
            x, (first_cache, _) = stack.run(
                layer, x, (self.dense_blocks, first), scan=scan, remat=remat, quantization=quantization
            )
        x, (cache, router_stats) = super()._run_layers(layer, x, per_layer, remat)
        if dense:
            cache = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first_cache, cache)
        return x, (cache, router_stats)
