"""Bidirectional encoder with a masked-LM head: BERT, ModernBERT and what lies between them, from one config."""

import dataclasses
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from llmjax.batch import Batch, Output
from llmjax.errors import UserError
from llmjax.models.base import BaseModelConfig, default_mlp_size
from llmjax.nn import attention, dropout, embedding, rotary, stack, weights
from llmjax.nn.attention import Attention
from llmjax.nn.dropout import Dropout
from llmjax.nn.embedding import Embedding
from llmjax.nn.linear import Linear
from llmjax.nn.mlp import ACTIVATIONS, Mlp
from llmjax.nn.norm import LayerNorm
from llmjax.parallel.axes import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(BaseModelConfig):
    """A bidirectional encoder with a masked-LM head: BERT, ModernBERT and what lies between them.


    family          "encoder"
    num_heads       number of attention heads, a divisor of embed
    mlp             width of the feed-forward layer; 0: 4 embed when plain, 8/3 embed rounded up to a multiple of 128
                    when gated
    activation      of the feed-forward layer and of the masked-LM head: gelu (by erf), gelu_tanh, silu, relu, relu2
    gated           feed-forward layer: True: two matrices in, one out; False: one in, one out
    norm_eps        added to the variance in a layer norm
    norm_position   post (after each residual addition) or pre (before each sub-block but the first attention, which
                    reads the normed embedding as it is; and once at the end)
    positions       learned (added to the token embedding) or rotary (in every attention)
    max_positions   number of learned positions; the longest sequence a learned table can read; unused with rotary
                    positions
    rope_base       base of the rotary frequencies; unused with learned positions
    window          a local layer sees tokens less than this many positions away, on both sides; 0: all layers see all
    global_every    every so many layers, from the first one on, a layer sees all; the others are local. Unused without
                    a window
    rope_local_base  base of the rotary frequencies in local layers; unused without a window
    types           number of token types (which of two texts a token belongs to), each with an embedding; 0: none
    pooler          what `pool` makes of a row's first token: none (as it is) or tanh (a linear map and tanh, BERT's).
                    Masked LM does not train it
    biases          all (every linear map and layer norm) or none; the vocabulary's bias in the head is always there
    """

    objectives: ClassVar[tuple[str, ...]] = ("masked",)
    generates: ClassVar[bool] = False

    family: str = "encoder"
    num_heads: int = 4
    mlp: int = 0
    activation: str = "gelu"
    gated: bool = False
    norm_eps: float = 1e-12
    norm_position: str = "post"
    positions: str = "learned"
    max_positions: int = 512
    rope_base: float = 10_000.0
    window: int = 0
    global_every: int = 3
    rope_local_base: float = 10_000.0
    types: int = 0
    pooler: str = "none"
    biases: str = "all"

    def __post_init__(self):
        self.check_choices(_NAMES)
        _check_numbers(self)

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.embed // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Width of the feed-forward layer."""
        return self.mlp or default_mlp_size(self.embed, self.gated)

    @property
    def max_seq_len(self) -> int | None:
        """The longest sequence that the model can read; None: no limit."""
        return self.max_positions if self.positions == "learned" else None

    @property
    def bare_layers(self) -> int:
        """Leading layers whose attention has no norm of its own, as the embedding is normed already."""
        return 1 if self.norm_position == "pre" else 0

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """For each layer whether it sees its window only."""
        return tuple(bool(self.window and layer % self.global_every) for layer in range(self.num_layers))

    def check(self, *, seq_len: int, tensor: int) -> None:
        """UserError where the model cannot read rows of `seq_len` tokens, or cannot be cut over `tensor` devices."""
        self.check_seq_len(seq_len)
        self.check_tensor_shards(tensor, {"num_heads": self.num_heads, "mlp": self.mlp_size})

    def flops_per_token(self, seq_len: int) -> float:
        """Model flops of one training token, for model flops utilisation.

        6 flops for each weight of a matmul (2 forward, 4 backward; the head counts, for every token though only hidden
        ones are scored; lookups and the pooler, which masked LM leaves alone, do not), plus attention's two products:
        12 embed keys a layer, with seq_len keys for each token in a layer that sees all and the 2 window - 1 nearest
        in a local one (at most seq_len). Recomputation is not counted.
        """
        matrices = 3 if self.gated else 2
        block = self.embed * (4 * self.embed + matrices * self.mlp_size)
        weights = self.num_layers * block + self.embed * (self.embed + self.vocab_size)
        keys = sum(min(seq_len, 2 * self.window - 1) if local else seq_len for local in self.local_layers)
        return 6.0 * weights + 12.0 * self.embed * keys


_NAMES = {
    "activation": tuple(ACTIVATIONS),
    "norm_position": ("post", "pre"),
    "positions": ("learned", "rotary"),
    "pooler": ("none", "tanh"),
    "biases": ("all", "none"),
}
_AT_LEAST = {
    "num_heads": 1,
    "mlp": 0,
    "max_positions": 1,
    "window": 0,
    "types": 0,
}


def _check_numbers(config: EncoderConfig) -> None:
    config.check_ranges(_AT_LEAST, ("norm_eps", "rope_base", "rope_local_base"))
    if config.embed % config.num_heads:
        raise UserError(f"model.num_heads={config.num_heads}: must divide model.embed={config.embed}")
    if config.positions == "rotary" and config.head_size % 2:
        raise UserError(
            f"model.num_heads={config.num_heads}: rotary positions pair dimensions, so a head's width "
            f"{config.head_size} must be even"
        )
    if config.window and config.global_every < 2:
        raise UserError(
            f"model.global_every={config.global_every}: must be at least 2 with a window; for layers that all see all, "
            "set model.window=0"
        )


Angles = tuple[jax.Array, jax.Array] | None


class Block(nnx.Module):
    """One layer: attention and feed-forward, each with its norm, residual and dropout.

    `bare`: the attention has no norm before it.
    """

    def __init__(self, config: EncoderConfig, key: jax.Array, *, bare: bool):
        k_attention, k_mlp = jax.random.split(key)
        bias, dtype = config.biases == "all", config.param_dtype
        scale = (2 * config.num_layers) ** -0.5  # each residual branch adds its share of variance
        self.attention_norm = None if bare else _norm(config)
        self.mlp_norm = _norm(config)
        self.attention = Attention(
            k_attention,
            config.embed,
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads,
            head_dim=config.head_size,
            bias=bias,
            scale=scale,
            kernel="dot",
            dtype=dtype,
            score_scale=config.mup_score_scale(config.head_size**-0.5, config.head_size),
        )
        self.mlp = Mlp(
            k_mlp,
            config.embed,
            config.mlp_size,
            activation=config.activation,
            gated=config.gated,
            bias=bias,
            scale=scale,
            dtype=dtype,
        )
        self.norm_position = config.norm_position

    def __call__(self, x: jax.Array, angles: Angles, mask: jax.Array, drop: Dropout) -> jax.Array:
        """x [batch, seq, embed], mask bool [batch, seq, seq] -> same as x."""
        norm = self.attention_norm or (lambda y: y)
        if self.norm_position == "pre":
            x = x + drop.at(0)(self.attention(norm(x), angles, mask))
            return x + drop.at(1)(self.mlp(self.mlp_norm(x)))
        x = norm(x + drop.at(0)(self.attention(x, angles, mask)))
        return self.mlp_norm(x + drop.at(1)(self.mlp(x)))


class Head(nnx.Module):
    """hidden [..., embed] -> norm(activation(dense(hidden))), which the token embedding then turns into logits.

    Parameters: dense, norm, bias (of each id's logit).
    """

    def __init__(self, config: EncoderConfig, key: jax.Array):
        self.dense = _square(config, key)
        self.norm = _norm(config)
        self.bias = weights.constant(0.0, {"vocab": config.padded_vocab}, dtype=config.param_dtype)
        self.activation = config.activation

    def __call__(self, hidden: jax.Array) -> jax.Array:
        # Gathered before the norm: a norm's own parameters are cut by fsdp, the map's output by tensor.
        y = constrain(self.dense(hidden), "batch", *(None,) * (hidden.ndim - 1))
        return self.norm(ACTIVATIONS[self.activation](y))


class Encoder(nnx.Module):
    """Batch -> Output with hidden states [batch, seq, embed], ready for `unembed` and `pool`.

    BERT: Devlin et al., 2018, arXiv 1810.04805. ModernBERT: Warner et al., 2024, arXiv 2412.13663.

    Parameters: embed, positions (learned only), types (where there are token types), embed_norm, first (the leading
    layer without attention norm, pre-norm only) and blocks (every leaf of both with a leading "layers" dimension),
    norm (pre-norm only: post-norm ends normed), head, pooler (tanh only).
    """

    def __init__(self, config: EncoderConfig, key: jax.Array):
        k_embed, k_positions, k_types, k_blocks, k_head, k_pooler = jax.random.split(key, 6)
        dtype, bare = config.param_dtype, config.bare_layers
        # A table that is looked up has an axis that no rule shards: "seq", for types as well.
        table = lambda key, entries: Embedding(key, entries, config.embed, entries="seq", dtype=dtype)
        self.config = config
        self.embed = Embedding(k_embed, config.padded_vocab, config.embed, entries="vocab", dtype=dtype)
        self.positions = table(k_positions, config.max_positions) if config.positions == "learned" else None
        self.types = table(k_types, config.types) if config.types else None
        self.embed_norm = _norm(config)
        keys = jax.random.split(k_blocks, config.num_layers)
        blocks = lambda keys, bare: jax.vmap(lambda k: Block(config, k, bare=bare))(keys) if len(keys) else None
        self.first, self.blocks = blocks(keys[:bare], True), blocks(keys[bare:], False)
        self.norm = _norm(config) if config.norm_position == "pre" else None
        self.head = Head(config, k_head)
        self.pooler = _square(config, k_pooler) if config.pooler == "tanh" else None

    def __call__(self, batch: Batch, key: jax.Array | None = None) -> Output:
        """Hidden states in the compute type; `key` switches dropout on, with draws by (key, sample, layer, site)."""
        config, drop = self.config, dropout.for_samples(key, batch.sample, self.config.dropout)
        seen = lambda window: attention.attention_mask(batch.segments, batch.positions, causal=False, window=window)
        everywhere = (self._angles(batch.positions, config.rope_base), seen(None))
        nearby = (self._angles(batch.positions, config.rope_local_base), seen(config.window)) if config.window else None

        def layer(x, item):
            block, index, local = item
            chosen = everywhere
            if nearby is not None:
                chosen = jax.tree.map(lambda near, far: jnp.where(local, near, far), nearby, everywhere)
            return block(x, *chosen, drop.at(index + 1)), None

        x = drop.at(0)(self._embed(batch))
        layers, split = (jnp.arange(config.num_layers), jnp.array(config.local_layers)), config.bare_layers
        for blocks, part in ((self.first, slice(split)), (self.blocks, slice(split, None))):
            if blocks is not None:
                items = (blocks, *(each[part] for each in layers))
                x, _ = stack.run(layer, x, items, scan=config.scan, remat=config.remat)
        return Output(hidden=x if self.norm is None else self.norm(x))

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., embed] -> float32 logits [..., padded vocab]; padding ids get one that no softmax
        sees."""
        table, scale = self.embed.table[...].T, 1 / self.config.width_multiplier
        logits = embedding.logits(self.head(hidden), table, vocab_size=self.config.vocab_size, scale=scale)
        return logits + self.head.bias[...].astype(jnp.float32)

    def pool(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [batch, seq, embed] -> [batch, embed]: each row's first token, through the pooler if there is
        one. In a packed row it speaks for the first segment alone: for one vector a text, give each a row of its own.
        """
        first = hidden[:, 0]
        return first if self.pooler is None else jnp.tanh(self.pooler(first))

    def _embed(self, batch: Batch) -> jax.Array:
        dtype = self.config.dtype
        x = self.embed(batch.inputs, dtype)
        if self.positions is not None:
            x = x + self.positions(batch.positions, dtype)
        if self.types is not None:
            x = x + self.types(jnp.zeros_like(batch.inputs) if batch.types is None else batch.types, dtype)
        return self.embed_norm(x)

    def _angles(self, positions: jax.Array, base: float) -> Angles:
        return rotary.angles(positions, self.config.head_size, base) if self.config.positions == "rotary" else None


def _norm(config: EncoderConfig) -> LayerNorm:
    return LayerNorm(config.embed, eps=config.norm_eps, bias=config.biases == "all", dtype=config.param_dtype)


def _square(config: EncoderConfig, key: jax.Array) -> Linear:
    """embed -> embed; its output is named "mlp", as one parameter cannot have an axis twice."""
    bias, dtype = config.biases == "all", config.param_dtype
    return Linear(key, {"embed": config.embed}, {"mlp": config.embed}, bias=bias, dtype=dtype)
