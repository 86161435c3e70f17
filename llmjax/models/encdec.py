"""Encoder-decoder transformer: T5, T5 v1.1 and Flan-T5, from one config, over packed sources and targets."""

from collections.abc import Callable
import dataclasses
from typing import Any, ClassVar, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from llmjax.batch import Batch, Output
from llmjax.errors import UserError
from llmjax.models.base import TransformerConfig
from llmjax.nn import dropout, embedding, quantized, stack, weights
from llmjax.nn.cross_attention import CrossAttention, KeysValues
from llmjax.nn.dropout import Dropout
from llmjax.nn.embedding import Embedding
from llmjax.nn.kernels import KERNELS, Kernel, Mask
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
    relative_distance   distance from which all distances share the last bucket
    tie_embeddings      whether the head is the token embedding, applied to hidden states times embed^-1/2, or a matrix
                        of its own, applied to unscaled ones
    dropout             rate after the embeddings, at the end of each sub-block and after the last norms; from 0 to
                        below 1
    """

    objectives: ClassVar[tuple[str, ...]] = ("span", "ul2", "prefix", "classify")
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
    def attention_needs(self) -> dict[str, str]:
        """Also a bias, and attention to the source."""
        family = f"model.family={self.family!r}"
        return super().attention_needs | {"bias": family, "cross": family}

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
        """Model flops of one scored target and its share of the source tokens, for model flops utilisation.

        Rows have `seq_len` positions for the source and `target_len` for the target (0: the same number), equally full,
        so each target has seq_len / target_len source tokens. For example, in span corruption 15% of 568 tokens in
        spans of 3 give a source of 512 and a target of 114, so each target has 4.5 source tokens.

        Counted are 6 flops (2 forward, 4 backward) for each weight that a token is multiplied with. For a target these
        are the decoder's blocks, without the keys and values of the cross-attention, and the head; for a source token
        the encoder's blocks, and its keys and values in every decoder block. Attention's two products are 12 layers
        heads head_dim times the number of keys, halved if causal. Recomputation is not counted. (Chowdhery et al.,
        2022, PaLM, appendix B, arXiv 2204.02311, which does not halve.)
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
    """The state of decoding.

    targets      keys and values of the targets so far, each [layers, batch, slots, heads, head_dim]
    source       keys and values of the encoded source, each [layers, batch, source_seq, heads, head_dim]
    source_mask  bool [batch, source_seq]: True for the source's tokens, False for padding
    """

    targets: KeysValues
    source: KeysValues
    source_mask: jax.Array


class Block(nnx.Module):
    """One pre-norm layer: self-attention, cross-attention (only in the decoder) and feed-forward."""

    def __init__(self, config: EncDecConfig, key: jax.Array, *, is_decoder: bool):
        k_attention, k_cross, k_mlp = jax.random.split(key, 3)
        dtype = config.param_dtype
        norm = lambda: RMSNorm(config.embed, eps=config.norm_eps, bias=False, dtype=dtype)
        attention = lambda k: CrossAttention(
            k,
            config.embed,
            num_heads=config.num_heads,
            head_dim=config.head_size,
            score_scale=config.mup_score_scale(1.0, config.head_size),
            dtype=dtype,
        )
        self.attention_norm, self.attention = norm(), attention(k_attention)
        self.cross_norm, self.cross = (norm(), attention(k_cross)) if is_decoder else (None, None)
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

    def attend_to_itself(self, x: jax.Array, mask: Mask, bias: jax.Array, drop: Dropout) -> jax.Array:
        """x [batch, seq, embed] plus the output of self-attention; `bias` in the form of the mask's kernel."""
        y = self.attention_norm(x)
        return x + drop(self.attention(y, self.attention.keys_values(y), mask, bias))

    def attend_to_source(
        self, x: jax.Array, source: KeysValues, mask: Mask, has_source: jax.Array, drop: Dropout
    ) -> jax.Array:
        """x [batch, s, embed] plus the cross-attention's output, 0 where `has_source` bool [batch, s or 1] is False."""
        assert self.cross is not None and self.cross_norm is not None
        y = self.cross(self.cross_norm(x), source, mask)
        return x + drop(jnp.where(has_source[:, :, None], y, 0))

    def feed_forward(self, x: jax.Array, drop: Dropout) -> jax.Array:
        """x [batch, seq, embed] plus the output of the feed-forward layer."""
        return x + drop(self.mlp(self.mlp_norm(x)))


class Stack(nnx.Module):
    """The blocks of the encoder or of the decoder, the position bias that they share, and the norm after them."""

    def __init__(self, config: EncDecConfig, key: jax.Array, num_layers: int, *, is_decoder: bool):
        k_blocks, k_bias = jax.random.split(key)
        self.blocks = jax.vmap(lambda k: Block(config, k, is_decoder=is_decoder))(
            jax.random.split(k_blocks, num_layers)
        )
        self.bias = RelativeBias(
            k_bias,
            config.num_heads,
            num_buckets=config.relative_buckets,
            max_distance=config.relative_distance,
            bidirectional=not is_decoder,
            std=config.embed**-0.5,
            dtype=config.param_dtype,
        )
        self.norm = RMSNorm(config.embed, eps=config.norm_eps, bias=False, dtype=config.param_dtype)
        self.config, self.num_layers = config, num_layers

    def run(self, layer: Callable, x: jax.Array, drop: Dropout, *per_layer: Any) -> tuple[jax.Array, Any]:
        """Embedded tokens [batch, seq, embed] -> (normed hidden states, second results of the layers, stacked).

        `layer(x, block, dropout, *slices)` returns (x, anything). The slices are those of `per_layer`, whose leaves
        have a leading "layers" dimension.
        """

        def body(x, item):
            index, block, *slices = item
            return layer(x, block, drop.at(index + 1), *slices)

        items = (jnp.arange(self.num_layers), self.blocks, *per_layer)
        config = self.config
        x, out = stack.run(
            body, drop.at(0)(x), items, scan=config.scan, remat=config.remat, quantization=config.quantization
        )
        return drop.at(self.num_layers + 1)(self.norm(x)), out


class EncDec(nnx.Module):
    """Batch -> Output with hidden states [batch, seq, embed] of the targets, ready for `unembed`.

    Parameters: embed, shared by both stacks; encoder and decoder, each with blocks (every leaf with a leading "layers"
    dimension), bias and norm; head (untied only).
    """

    def __init__(self, config: EncDecConfig, key: jax.Array):
        k_embed, k_encoder, k_decoder, k_head = jax.random.split(key, 4)
        dtype, vocab = config.param_dtype, config.padded_vocab
        self.config = config
        self.embed = Embedding(k_embed, vocab, config.embed, entries="vocab", dtype=dtype, std=1.0)
        self.encoder = Stack(config, k_encoder, config.num_layers, is_decoder=False)
        self.decoder = Stack(config, k_decoder, config.decoder_layers, is_decoder=True)
        dims = {"embed": config.embed, "vocab": vocab}
        untied = not config.tie_embeddings
        self.head = weights.normal(k_head, dims, std=config.embed**-0.5, dtype=dtype) if untied else None

    def __call__(self, batch: Batch, key: jax.Array | None = None) -> Output:
        """Hidden states in the compute type; `key` switches dropout on, with draws by (key, sample, layer, site)."""
        if batch.source is None:
            raise UserError("model.family='encdec': the batch has no source; use an objective that builds one")
        drop = dropout.for_samples(key, batch.sample, self.config.dropout)
        kernel = self._kernel(max(batch.inputs.shape[1], batch.source.shape[1]))
        source = self._encode(kernel, batch.source, batch.source_segments, batch.source_positions, drop.at(0))
        block = self.config.attention_block
        mask = kernel.make_mask(batch.segments, batch.positions, causal=True, block=block)
        cross_mask = kernel.make_cross_mask(batch.segments, batch.source_segments, block=block)
        has_source = jnp.any(batch.segments[:, :, None] == batch.source_segments[:, None, :], axis=-1)
        bias = kernel.make_bias(self.decoder.bias, batch.positions)

        def layer(x, block, drop):
            x = block.attend_to_itself(x, mask, bias, drop.at(0))
            x = block.attend_to_source(x, block.cross.keys_values(source), cross_mask, has_source, drop.at(1))
            return block.feed_forward(x, drop.at(2)), None

        x, _ = self.decoder.run(layer, self.embed(batch.inputs, self.config.dtype), drop.at(1))
        return Output(hidden=x)

    def encode(self, batch: Batch) -> jax.Array:
        """The source of a batch -> hidden states of the encoder [batch, source_seq, embed]."""
        kernel = self._kernel(batch.source.shape[1])
        return self._encode(kernel, batch.source, batch.source_segments, batch.source_positions, _NO_DROPOUT)

    def _kernel(self, seq_len: int) -> Kernel:
        return KERNELS[self.config.choose_attention(seq_len).kernel]

    def _encode(
        self, kernel: Kernel, tokens: jax.Array, segments: jax.Array, positions: jax.Array, drop: Dropout
    ) -> jax.Array:
        """Source tokens, segments and positions, each [batch, source_seq] -> [batch, source_seq, embed]."""
        mask = kernel.make_mask(segments, positions, causal=False, block=self.config.attention_block)
        bias = kernel.make_bias(self.encoder.bias, positions)

        def layer(x, block, drop):
            x = block.attend_to_itself(x, mask, bias, drop.at(0))
            return block.feed_forward(x, drop.at(2)), None

        return self.encoder.run(layer, self.embed(tokens, self.config.dtype), drop)[0]

    def prefill(self, tokens: jax.Array, lengths: jax.Array, max_tokens: int) -> tuple[jax.Array, Cache, jax.Array]:
        """Encode prompts as sources: tokens [batch, seq] with `lengths` [batch]; then read the start token.

        Returns the hidden state [batch, embed] that predicts the first token of the target, the cache, with slots for
        the start token and `max_tokens` more, and the position [batch] of that first token: 1, as the start token is at
        0.
        """
        if self.config.start_id < 0:
            raise UserError(
                f"model.start_id={self.config.start_id}: set it to the first token of the decoder in training"
            )
        batch, seq = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(seq), tokens.shape)
        mask = positions < lengths[:, None]
        source = self._encode(self._kernel(seq), tokens, mask.astype(jnp.int32), positions, _NO_DROPOUT)
        shape = (self.config.decoder_layers, batch, 1 + max_tokens, self.config.num_heads, self.config.head_size)
        empty = jnp.zeros(shape, self.config.dtype)
        with quantized.use(self.config.quantization):
            keys_values = jax.vmap(lambda block: block.cross.keys_values(source))(self.decoder.blocks)
        start = jnp.full((batch, 1), self.config.start_id, jnp.int32)
        hidden, cache = self.cached(start, jnp.zeros_like(start), Cache((empty, empty), keys_values, mask))
        return hidden[:, 0], cache, jnp.ones(batch, jnp.int32)

    def cached(self, tokens: jax.Array, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """(hidden states, cache) of target tokens [batch, seq] at the next consecutive positions [batch, seq]."""
        bias = self.decoder.bias(positions, jnp.arange(cache.targets[0].shape[2])[None])
        sees = jnp.broadcast_to(cache.source_mask[:, None, :], (*tokens.shape, cache.source_mask.shape[1]))
        has_source = jnp.any(cache.source_mask, axis=-1, keepdims=True)

        def layer(x, block, drop, targets, source):
            y, targets = block.attention.decode(block.attention_norm(x), positions, targets, bias)
            x = block.attend_to_source(x + y, source, Mask(sees, "dot"), has_source, drop)
            return block.feed_forward(x, drop), targets

        x = self.embed(tokens, self.config.dtype)
        x, targets = self.decoder.run(layer, x, _NO_DROPOUT, cache.targets, cache.source)
        return x, cache._replace(targets=targets)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., embed] -> float32 logits [..., padded vocab]; padding ids get the lowest one."""
        scale = 1 / self.config.width_multiplier
        table = self.head[...] if self.head is not None else self.embed.table[...].T
        if self.head is None:
            scale *= self.config.embed**-0.5
        return embedding.logits(hidden, table, vocab_size=self.config.vocab_size, scale=scale)
