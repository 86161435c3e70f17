"""Encoder-decoder transformer: T5, T5 v1.1 and Flan-T5, from one config, over packed sources and targets."""

import dataclasses
from typing import ClassVar, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from llmjax.batch import Batch, Output
from llmjax.errors import UserError
from llmjax.models.base import TransformerConfig
from llmjax.nn import attention, dropout, embedding, stack, weights
from llmjax.nn.cross_attention import CrossAttention, KeysValues
from llmjax.nn.dropout import Dropout
from llmjax.nn.embedding import Embedding
from llmjax.nn.mlp import Mlp
from llmjax.nn.norm import RMSNorm
from llmjax.nn.relative import RelativeBias


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncDecConfig(TransformerConfig):
    """An encoder-decoder transformer: T5, T5 v1.1 and Flan-T5. (Raffel et al., 2020, arXiv 1910.10683)

    The encoder reads the source in both directions; the decoder reads the targets before each place, and attends to the
    source of its own segment. Norms are RMS norms, before each sub-block and at the end of each stack; no linear map
    has a bias; positions enter by a learned bias for the distance, one table for the encoder and one for the decoder.


    family              "encdec"
    start_id            the token that the decoder reads first; -1: the tokenizer's, filled in by the run
    num_layers          number of blocks of the encoder
    num_decoder_layers  number of blocks of the decoder; 0: num_layers
    relative_buckets    number of biases that a head has for distances
    relative_distance   distance from which all share the last bucket
    tie_embeddings      whether the head is the token embedding, which reads hidden states times embed^-1/2, instead of
                        a matrix of its own, which reads them unscaled
    dropout             rate after the embeddings, at the end of each sub-block and after the last norms; from 0 to
                        below 1
    """

    objectives: ClassVar[tuple[str, ...]] = ("span", "ul2", "prefix")
    reads_source: ClassVar[bool] = True
    minimums: ClassVar = {**TransformerConfig.minimums, "start_id": -1, "num_decoder_layers": 0, "relative_buckets": 4}

    family: str = "encdec"
    start_id: int = -1
    num_decoder_layers: int = 0
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6
    relative_buckets: int = 32
    relative_distance: int = 128
    tie_embeddings: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.relative_distance <= self.relative_buckets // 2:
            raise UserError(
                f"model.relative_distance={self.relative_distance}: must be above half of "
                f"model.relative_buckets={self.relative_buckets}, which hold one distance each"
            )
        if self.vocab_size and self.start_id >= self.vocab_size:
            raise UserError(f"model.start_id={self.start_id}: must be below model.vocab_size={self.vocab_size}")

    @property
    def decoder_start_id(self) -> int:
        """The token that the decoder reads first; -1: not known yet."""
        return self.start_id

    @property
    def decoder_layers(self) -> int:
        """Number of blocks of the decoder."""
        return self.num_decoder_layers or self.num_layers

    def check(self, *, seq_len: int, tensor: int) -> None:
        """UserError where the model cannot be cut over `tensor` devices; rows may be of any length."""
        self.check_tensor_shards(tensor, {"num_heads": self.num_heads, "mlp": self.mlp_size})

    def flops_per_token(self, seq_len: int, target_len: int = 0) -> float:
        """Model flops of one scored target, for model flops utilisation: the source tokens that go with it included.

        Rows have `seq_len` places for the source and `target_len` for the target (0: as many), equally full, so that a
        target bears seq_len / target_len source tokens. So it is in span corruption: 15% of 568 tokens in spans of 3
        make a source of 512 and a target of 114, and each target pays for 4.5 source tokens.

        6 flops for each weight of a matmul (2 forward, 4 backward) that a token meets. A target meets the decoder's
        blocks, but for the keys and values of the cross-attention, and the head; a source token meets the encoder's
        blocks, and every decoder block's keys and values of it. Attention's two products are 12 layers heads head_dim
        times the length of what is attended to, halved where it is causal. Recomputation is not counted. (Chowdhery et
        al., 2022, PaLM, appendix B, arXiv 2204.02311, which does not halve.)
        """
        target_len = target_len or seq_len
        width = self.num_heads * self.head_size
        projection = self.embed * width
        mlp = (3 if self.gated else 2) * self.embed * self.mlp_size
        layers, decoder_layers = self.num_layers, self.decoder_layers
        source = 6.0 * (layers * (4 * projection + mlp) + decoder_layers * 2 * projection)
        source += 12.0 * layers * width * seq_len
        target = 6.0 * (decoder_layers * (6 * projection + mlp) + self.embed * self.vocab_size)
        target += decoder_layers * width * (6.0 * target_len + 12.0 * seq_len)
        return target + source * seq_len / target_len


_NO_DROPOUT = Dropout(None, 0.0)


class Cache(NamedTuple):
    """What decoding keeps.

    own          keys and values of the targets so far, each [layers, batch, slots, heads, head_dim]
    source       keys and values of the encoded source, each [layers, batch, source_seq, heads, head_dim]
    mask         bool [batch, source_seq]: the source's tokens, False for padding
    """

    own: KeysValues
    source: KeysValues
    mask: jax.Array


class Block(nnx.Module):
    """One layer of either stack: attention to itself, in the decoder to the source, and feed-forward; pre-norm."""

    def __init__(self, config: EncDecConfig, key: jax.Array, *, crosses: bool):
        k_attention, k_cross, k_mlp = jax.random.split(key, 3)
        dtype = config.param_dtype
        norm = lambda: RMSNorm(config.embed, eps=config.norm_eps, bias=False, dtype=dtype)
        attend = lambda k: CrossAttention(
            k,
            config.embed,
            num_heads=config.num_heads,
            head_dim=config.head_size,
            score_scale=config.mup_score_scale(1.0, config.head_size),
            dtype=dtype,
        )
        self.attention_norm, self.attention = norm(), attend(k_attention)
        self.cross_norm, self.cross = (norm(), attend(k_cross)) if crosses else (None, None)
        self.mlp_norm = norm()
        self.mlp = Mlp(
            k_mlp,
            config.embed,
            config.mlp_size,
            activation=config.activation,
            gated=config.gated,
            bias=False,
            scale=1.0,
            dtype=dtype,
        )

    def feed(self, x: jax.Array, drop: Dropout) -> jax.Array:
        """x [batch, seq, embed] and what the feed-forward layer adds to it."""
        return x + drop(self.mlp(self.mlp_norm(x)))

    def look(self, x: jax.Array, keys: KeysValues, mask: jax.Array, drop: Dropout) -> jax.Array:
        """x [batch, s, embed] and what it finds in the source; nothing where `mask` [batch, s, t] shows it none."""
        assert self.cross is not None and self.cross_norm is not None
        found = self.cross(self.cross_norm(x), keys, mask)
        return x + drop(jnp.where(jnp.any(mask, axis=-1, keepdims=True), found, 0))


class Stack(nnx.Module):
    """The blocks of the encoder or of the decoder, the position bias that they share, and the norm after them."""

    def __init__(self, config: EncDecConfig, key: jax.Array, num_layers: int, *, decodes: bool):
        k_blocks, k_bias = jax.random.split(key)
        self.blocks = jax.vmap(lambda k: Block(config, k, crosses=decodes))(jax.random.split(k_blocks, num_layers))
        self.bias = RelativeBias(
            k_bias,
            config.num_heads,
            num_buckets=config.relative_buckets,
            max_distance=config.relative_distance,
            both_ways=not decodes,
            std=config.embed**-0.5,
            dtype=config.param_dtype,
        )
        self.norm = RMSNorm(config.embed, eps=config.norm_eps, bias=False, dtype=config.param_dtype)
        self.config, self.num_layers = config, num_layers

    def run(self, layer, x: jax.Array, drop: Dropout, *stacked):
        """Embedded tokens [batch, seq, embed] -> (normed hidden states, what the layers gave).

        `layer(x, block, dropout)` returns (x, anything). With `stacked` arrays, which have a leading "layers"
        dimension, it gets (block, *its slices) for the block.
        """

        def body(x, item):
            index, *rest = item
            return layer(x, rest[0] if len(rest) == 1 else tuple(rest), drop.at(index + 1))

        items = (jnp.arange(self.num_layers), self.blocks, *stacked)
        x, out = stack.run(body, drop.at(0)(x), items, scan=self.config.scan, remat=self.config.remat)
        return drop.at(self.num_layers + 1)(self.norm(x)), out


class EncDec(nnx.Module):
    """Batch -> Output with hidden states [batch, seq, embed] of the targets, ready for `unembed`.

    Parameters: embed, which both stacks read; encoder and decoder, each with blocks (every leaf with a leading "layers"
    dimension), bias and norm; head (untied only).
    """

    def __init__(self, config: EncDecConfig, key: jax.Array):
        k_embed, k_encoder, k_decoder, k_head = jax.random.split(key, 4)
        dtype, vocab = config.param_dtype, config.padded_vocab
        self.config = config
        self.embed = Embedding(k_embed, vocab, config.embed, entries="vocab", dtype=dtype, std=1.0)
        self.encoder = Stack(config, k_encoder, config.num_layers, decodes=False)
        self.decoder = Stack(config, k_decoder, config.decoder_layers, decodes=True)
        dims = {"embed": config.embed, "vocab": vocab}
        untied = not config.tie_embeddings
        self.head = weights.normal(k_head, dims, std=config.embed**-0.5, dtype=dtype) if untied else None

    def __call__(self, batch: Batch, key: jax.Array | None = None) -> Output:
        """Hidden states in the compute type; `key` switches dropout on, with draws by (key, sample, layer, site)."""
        if batch.source is None:
            raise UserError("model.family='encdec': the batch has no source; choose an objective that makes one")
        drop = dropout.for_samples(key, batch.sample, self.config.dropout)
        source = self._encode(batch.source, batch.source_segments, batch.source_positions, drop.at(0))
        seen = attention.attention_mask(batch.segments, batch.positions, causal=True)
        crossed = batch.segments[:, :, None] == batch.source_segments[:, None, :]
        bias = self.decoder.bias(batch.positions, batch.positions)

        def layer(x, block, drop):
            y = block.attention_norm(x)
            x = x + drop.at(0)(block.attention(y, block.attention.keys(y), seen, bias))
            x = block.look(x, block.cross.keys(source), crossed, drop.at(1))
            return block.feed(x, drop.at(2)), None

        x, _ = self.decoder.run(layer, self.embed(batch.inputs, self.config.dtype), drop.at(1))
        return Output(hidden=x)

    def _encode(self, tokens: jax.Array, segments: jax.Array, positions: jax.Array, drop: Dropout) -> jax.Array:
        """Source tokens, segments and positions, each [batch, source_seq] -> [batch, source_seq, embed]."""
        seen = attention.attention_mask(segments, positions, causal=False)
        bias = self.encoder.bias(positions, positions)

        def layer(x, block, drop):
            y = block.attention_norm(x)
            x = x + drop.at(0)(block.attention(y, block.attention.keys(y), seen, bias))
            return block.feed(x, drop.at(2)), None

        return self.encoder.run(layer, self.embed(tokens, self.config.dtype), drop)[0]

    def prefill(self, tokens: jax.Array, lengths: jax.Array, max_tokens: int) -> tuple[jax.Array, Cache, jax.Array]:
        """Encode prompts as sources: tokens [batch, seq], of which `lengths` [batch] count; then read the start token.

        Returns the hidden state [batch, embed] that predicts the first token of the target, the cache, which has room
        for the start token and `max_tokens` more (the source lies apart), and the position [batch] of that first token:
        1, as the start token is at 0.
        """
        if self.config.start_id < 0:
            raise UserError(
                f"model.start_id={self.config.start_id}: set it to the token that the decoder read first in training"
            )
        batch, seq = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(seq), tokens.shape)
        mask = positions < lengths[:, None]
        source = self._encode(tokens, mask.astype(jnp.int32), positions, _NO_DROPOUT)
        shape = (self.config.decoder_layers, batch, 1 + max_tokens, self.config.num_heads, self.config.head_size)
        empty = jnp.zeros(shape, self.config.dtype)
        keys = jax.vmap(lambda block: block.cross.keys(source))(self.decoder.blocks)
        start = jnp.full((batch, 1), self.config.start_id, jnp.int32)
        hidden, cache = self.cached(start, jnp.zeros_like(start), Cache((empty, empty), keys, mask))
        return hidden[:, 0], cache, jnp.ones(batch, jnp.int32)

    def cached(self, tokens: jax.Array, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """(hidden states, cache) of target tokens [batch, seq] at consecutive positions [batch, seq], after what the
        cache holds."""
        bias = self.decoder.bias(positions, jnp.arange(cache.own[0].shape[2])[None])
        crossed = jnp.broadcast_to(cache.mask[:, None, :], (*tokens.shape, cache.mask.shape[1]))

        def layer(x, item, drop):
            block, own, source = item
            y, own = block.attention.cached(block.attention_norm(x), positions, own, bias)
            x = block.look(x + y, source, crossed, drop)
            return block.feed(x, drop), own

        x = self.embed(tokens, self.config.dtype)
        x, own = self.decoder.run(layer, x, _NO_DROPOUT, cache.own, cache.source)
        return x, cache._replace(own=own)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., embed] -> float32 logits [..., padded vocab]; padding ids get one that no softmax
        sees."""
        scale = 1 / self.config.width_multiplier
        table = self.head[...] if self.head is not None else self.embed.table[...].T
        if self.head is None:
            scale *= self.config.embed**-0.5
        return embedding.logits(hidden, table, vocab_size=self.config.vocab_size, scale=scale)
