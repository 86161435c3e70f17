"""Bidirectional encoder with a masked-LM head: BERT, ModernBERT and what lies between them, from one config."""

import dataclasses
import functools
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from llmjax.batch import Batch, Output
from llmjax.data.config import EMBEDDING, LABELLED
from llmjax.models.base import SingleStackConfig, make_task_head
from llmjax.nn import dropout, embedding, rotary, stack, weights
from llmjax.nn.attention import Attention, Rope
from llmjax.nn.dropout import Dropout
from llmjax.nn.embedding import Embedding
from llmjax.nn.kernels import KERNELS, Mask
from llmjax.nn.linear import Linear
from llmjax.nn.mlp import ACTIVATIONS, Mlp
from llmjax.nn.norm import LayerNorm
from llmjax.parallel.axes import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(SingleStackConfig):
    """A bidirectional encoder with a masked-LM head: BERT, ModernBERT and what lies between them.

    activation      also that of the masked-LM head
    window          of a local layer: counted on both sides of a token
    norm_position   post (after each residual addition) or pre (before each sub-block but the first attention, which
                    reads the normed embedding as it is; and once at the end)
    token_types     number of token types (which of two texts a token belongs to), each with an embedding; 0: none
    pooler          whether `pool` and a head for labels apply a linear map and tanh to a text's first token, as BERT
                    does. Masked LM does not train them
    biases          all (every linear map and layer norm) or none; the vocabulary's bias in the head is always there
    """

    objectives: ClassVar[tuple[str, ...]] = ("masked", *LABELLED, *EMBEDDING)
    bidirectional: ClassVar[bool] = True
    choices: ClassVar = {
        **SingleStackConfig.choices,
        "norm_position": ("post", "pre"),
        "biases": ("all", "none"),
    }
    minimums: ClassVar = {**SingleStackConfig.minimums, "token_types": 0}

    family: str = "encoder"
    activation: str = "gelu"
    gated: bool = False
    norm_eps: float = 1e-12
    norm_position: str = "post"
    positions: str = "learned"
    max_positions: int = 512
    attention_pattern: str = "gll"
    token_types: int = 0
    pooler: bool = False
    biases: str = "all"

    @property
    def num_unnormed(self) -> int:
        """Number of first layers without attention norm, because the embedding is normed."""
        return 1 if self.norm_position == "pre" else 0

    def check(self, *, seq_len: int, tensor: int) -> None:
        """UserError where the model cannot read rows of `seq_len` tokens, or cannot be cut over `tensor` devices."""
        self.check_seq_len(seq_len)
        self.check_tensor_shards(tensor, {"num_heads": self.num_heads, "mlp": self.mlp_size})

    def flops_per_token(self, seq_len: int) -> float:
        """Model flops of one training token, for model flops utilisation.

        6 flops for each weight of a matmul (2 forward, 4 backward; with the head, for every token though only masked
        ones are scored; without lookups, and without a pooler that is not used), plus attention's two products:
        12 heads head_dim keys a layer. A token has seq_len keys in a global layer, and in a local one the 2 window - 1
        nearest, at most seq_len. Recomputation is not counted.
        """
        matrices = 3 if self.gated else 2
        width = self.num_heads * self.head_size
        block = self.embed * (4 * width + matrices * self.mlp_size)
        head = self.embed * (self.embed if not self.num_outputs or self.pooler else 0) + self.embed * self.head_outputs
        weights = self.num_layers * block + head
        keys = sum(min(seq_len, 2 * self.window - 1) if local else seq_len for local in self.local_layers)
        return 6.0 * weights + 12.0 * width * keys


class Block(nnx.Module):
    """One layer: attention and feed-forward, each with its norm, residual and dropout.

    normed   whether the attention has a norm
    """

    def __init__(self, config: EncoderConfig, key: jax.Array, *, normed: bool):
        k_attention, k_mlp = jax.random.split(key)
        bias, dtype = config.biases == "all", config.param_dtype
        scale = config.residual_init_scale
        self.attention_norm = _norm(config) if normed else None
        self.mlp_norm = _norm(config)
        self.attention = Attention(
            k_attention,
            config.embed,
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads,
            head_dim=config.head_size,
            bias=bias,
            scale=scale,
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

    def __call__(self, x: jax.Array, rope: Rope, mask: Mask, drop: Dropout) -> jax.Array:
        """x [batch, seq, embed] -> same; `mask` from the attention kernel's `make_mask`."""
        attention_norm = self.attention_norm or (lambda y: y)
        if self.norm_position == "pre":
            x = x + drop.at(0)(self.attention(attention_norm(x), rope, mask))
            return x + drop.at(1)(self.mlp(self.mlp_norm(x)))
        x = attention_norm(x + drop.at(0)(self.attention(x, rope, mask)))
        return self.mlp_norm(x + drop.at(1)(self.mlp(x)))


class Head(nnx.Module):
    """hidden [..., embed] -> norm(activation(dense(hidden))), the input of the token embedding that gives the logits.

    Parameters: dense, norm, bias (of the logits).
    """

    def __init__(self, config: EncoderConfig, key: jax.Array):
        self.dense = _embed_to_embed(config, key)
        self.norm = _norm(config)
        self.bias = weights.constant(0.0, {"vocab": config.padded_vocab}, dtype=config.param_dtype)
        self.activation = config.activation

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., embed] -> same."""
        # Gather before the norm, whose parameters are sharded over fsdp, while the output of dense is over tensor.
        y = constrain(self.dense(hidden), "batch", *(None,) * (hidden.ndim - 1))
        return self.norm(ACTIVATIONS[self.activation](y))


class Encoder(nnx.Module):
    """Batch -> Output with hidden states [batch, seq, embed], ready for `unembed` and `pool`.

    BERT: Devlin et al., 2018, arXiv 1810.04805. ModernBERT: Warner et al., 2024, arXiv 2412.13663.

    Parameters: embed, positions (learned only), token_types (if there are any), embed_norm, first (the first layer,
    without attention norm; pre-norm only) and blocks (every leaf of both with a leading "layers" dimension), norm
    (pre-norm only), head, or task_head in its place, pooler (if the config has one).
    """

    def __init__(self, config: EncoderConfig, key: jax.Array):
        k_embed, k_positions, k_types, k_blocks, k_head, k_pooler = jax.random.split(key, 6)
        dtype, first = config.param_dtype, config.num_unnormed
        # No rule shards the axis "entries", so that rows can be looked up.
        table = lambda key, entries: Embedding(key, entries, config.embed, entries="entries", dtype=dtype)
        self.config = config
        self.embed = Embedding(k_embed, config.padded_vocab, config.embed, entries="vocab", dtype=dtype)
        self.positions = table(k_positions, config.max_positions) if config.positions == "learned" else None
        self.token_types = table(k_types, config.token_types) if config.token_types else None
        self.embed_norm = _norm(config)
        keys = jax.random.split(k_blocks, config.num_layers)
        blocks = lambda keys, normed: jax.vmap(lambda k: Block(config, k, normed=normed))(keys) if len(keys) else None
        self.first, self.blocks = blocks(keys[:first], False), blocks(keys[first:], True)
        self.norm = _norm(config) if config.norm_position == "pre" else None
        self.head = None if config.num_outputs else Head(config, k_head)
        self.task_head = make_task_head(config, key)
        self.pooler = _embed_to_embed(config, k_pooler) if config.pooler else None

    def __call__(self, batch: Batch, key: jax.Array | None = None) -> Output:
        """Hidden states in the compute type; `key` switches dropout on, with draws by (key, sample, layer, site)."""
        config, drop = self.config, dropout.for_samples(key, batch.sample, self.config.dropout)
        kernel = KERNELS[config.choose_attention(batch.inputs.shape[1]).kernel]
        make_mask = functools.partial(kernel.make_mask, block=config.attention_block)
        window = lambda local: config.window if local else None
        kinds = stack.by_kind(
            lambda local: (
                self._rope(batch.positions, local),
                make_mask(batch.segments, batch.positions, causal=False, window=window(local)),
            ),
            config.local_layers,
        )

        def layer(x, item):
            block, index, local = item
            rope, mask = stack.select(kinds, local)
            return block(x, rope, mask, drop.at(index + 1)), None

        x = drop.at(0)(self._embed(batch))
        index, local, split = jnp.arange(config.num_layers), jnp.array(config.local_layers), config.num_unnormed
        for blocks, part in ((self.first, slice(split)), (self.blocks, slice(split, None))):
            if blocks is not None:
                items = (blocks, index[part], local[part])
                x, _ = stack.run(
                    layer, x, items, scan=config.scan, remat=config.remat, quantization=config.quantization
                )
        x = x if self.norm is None else self.norm(x)
        if self.task_head is None:
            return Output(hidden=x)
        return Output(hidden=drop.at(config.num_layers + 1)(x if self.pooler is None else jnp.tanh(self.pooler(x))))

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., embed] -> float32 logits [..., padded vocab]; padding ids get the lowest one. With a head
        for labels: its outputs."""
        if self.task_head is not None:
            return self.task_head(hidden)
        assert self.head is not None
        table, scale = self.embed.table[...].T, 1 / self.config.width_multiplier
        logits = embedding.logits(self.head(hidden), table, vocab_size=self.config.vocab_size, scale=scale)
        return logits + self.head.bias[...].astype(jnp.float32)

    def pool(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [batch, seq, embed] -> [batch, embed]: each row's first token, through the pooler if there is
        one.

        In a packed row it represents the first segment only, so give each text its own row.
        """
        first = hidden[:, 0]
        return first if self.pooler is None else jnp.tanh(self.pooler(first))

    def _embed(self, batch: Batch) -> jax.Array:
        dtype = self.config.dtype
        x = self.embed(batch.inputs, dtype)
        if self.positions is not None:
            x = x + self.positions(batch.positions, dtype)
        if self.token_types is not None:
            x = x + self.token_types(
                jnp.zeros_like(batch.inputs) if batch.token_types is None else batch.token_types, dtype
            )
        return self.embed_norm(x)

    def _rope(self, positions: jax.Array, local: bool) -> Rope:
        config = self.config
        base = config.rope_local_base or config.rope_base if local else config.rope_base
        return rotary.angles(positions, config.head_size, base) if config.positions == "rotary" else None


def _norm(config: EncoderConfig) -> LayerNorm:
    return LayerNorm(config.embed, eps=config.norm_eps, bias=config.biases == "all", dtype=config.param_dtype)


def _embed_to_embed(config: EncoderConfig, key: jax.Array) -> Linear:
    """A map from embed to embed. Its output axis is "mlp", as a parameter cannot have one axis twice."""
    bias, dtype = config.biases == "all", config.param_dtype
    return Linear(key, {"embed": config.embed}, {"mlp": config.embed}, bias=bias, dtype=dtype)
