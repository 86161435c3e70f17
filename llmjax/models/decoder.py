"""Decoder-only transformer: GPT-2, Llama, Qwen3, Gemma, OLMo and what lies between them, from one config."""

from collections.abc import Callable, Mapping
import functools
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from llmjax.batch import Batch, Output
from llmjax.models.base import make_task_head
from llmjax.models.decoder_config import DecoderConfig
from llmjax.nn import attention, dropout, embedding, rotary, stack, weights
from llmjax.nn.attention import Attention, Cache, Rope
from llmjax.nn.dropout import Dropout
from llmjax.nn.embedding import Embedding
from llmjax.nn.kernels import KERNELS
from llmjax.nn.mlp import Mlp
from llmjax.nn.norm import NORMS

_NO_DROPOUT = Dropout(None, 0.0)


def make_norm(config: DecoderConfig, dims: int | Mapping[str, int]) -> Any:
    """The config's norm over `dims` (a width, or logical axis -> size)."""
    return NORMS[config.norm](dims, eps=config.norm_eps, bias=config.biases == "all", dtype=config.param_dtype)


class Block(nnx.Module):
    """One layer: attention and feed-forward, each with its norms, residual and dropout.

    A family with other parts overrides `make_attention`, or `make_mlp` and `feed_forward`, and sets `Decoder.block`.
    """

    def __init__(self, config: DecoderConfig, key: jax.Array):
        k_attention, k_mlp = jax.random.split(key)
        both = config.norm_position == "both"
        self.attention_norm, self.mlp_norm = make_norm(config, config.embed), make_norm(config, config.embed)
        self.attention_post_norm = make_norm(config, config.embed) if both else None
        self.mlp_post_norm = make_norm(config, config.embed) if both else None
        self.attention = self.make_attention(config, k_attention)
        self.mlp = self.make_mlp(config, k_mlp)
        self.norm_position = config.norm_position

    @staticmethod
    def make_attention(config: DecoderConfig, key: jax.Array) -> Any:
        """The attention sub-block, with the interface of `nn.attention.Attention`."""
        head = {"head_dim": config.head_size}
        norm_dims = {
            "none": (None, None),
            "head": (head, head),
            "all": ({"heads": config.num_heads, **head}, {"kv_heads": config.kv_heads, **head}),
        }
        query_norm, key_norm = (dims and make_norm(config, dims) for dims in norm_dims[config.qk_norm])
        return Attention(
            key,
            config.embed,
            num_heads=config.num_heads,
            num_kv_heads=config.kv_heads,
            head_dim=config.head_size,
            bias=config.biases != "none",
            scale=config.residual_init_scale,
            dtype=config.param_dtype,
            score_scale=config.mup_score_scale(config.score_scale or config.head_size**-0.5, config.head_size),
            softcap=config.score_softcap or None,
            sinks=config.attention_sinks,
            query_norm=query_norm,
            key_norm=key_norm,
        )

    @staticmethod
    def make_mlp(config: DecoderConfig, key: jax.Array) -> Any:
        """The feed-forward sub-block."""
        return Mlp(
            key,
            config.embed,
            config.mlp_size,
            activation=config.activation,
            gated=config.gated,
            bias=config.biases == "all",
            scale=config.residual_init_scale,
            dtype=config.param_dtype,
        )

    def __call__(
        self,
        x: jax.Array,
        rope: Rope,
        mask: Any,
        drop: Dropout,
        *,
        cache: Cache | None = None,
        start: jax.Array | None = None,
        token_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None, Any]:
        """x [batch, seq, embed] -> (x, cache, statistics of the feed-forward, such as the router's load).

        mask        `nn.kernels.Mask`; with a cache, bool [batch, seq, slots]
        cache       of this layer, extended from position `start` [batch] on; None: x is the whole sequence
        token_mask  bool [batch, seq], False for padding; None: no statistics
        """
        y = self._pre_norm(self.attention_norm, x)
        if cache is None:
            y = self.attention(y, rope, mask)
        else:
            y, cache = self.attention.decode(y, rope, mask, cache, start)
        x = self._add_residual(x, y, self.attention_norm, self.attention_post_norm, drop.at(0))
        y, aux = self.feed_forward(self._pre_norm(self.mlp_norm, x), token_mask)
        return self._add_residual(x, y, self.mlp_norm, self.mlp_post_norm, drop.at(1)), cache, aux

    def feed_forward(self, x: jax.Array, token_mask: jax.Array | None) -> tuple[jax.Array, Any]:
        """x [batch, seq, embed] -> (same, statistics over the tokens in `token_mask`)."""
        return self.mlp(x), None

    def _pre_norm(self, norm: Any, x: jax.Array) -> jax.Array:
        return norm(x) if self.norm_position in ("pre", "both") else x

    def _add_residual(self, x: jax.Array, y: jax.Array, norm: Any, post_norm: Any, drop: Dropout) -> jax.Array:
        """x plus the output y of a sub-block, with the norms after the sub-block or after the addition."""
        if self.norm_position in ("inner", "both"):
            y = (post_norm or norm)(y)
        x = x + drop(y)
        return norm(x) if self.norm_position == "post" else x


class Decoder(nnx.Module):
    """Batch -> Output with hidden states [batch, seq, embed], ready for `unembed`.

    Parameters: embed, positions (learned only), blocks (every leaf with a leading "layers" dimension), norm (not if
    norm_position is post), head (untied only), or task_head in its place.

    Global and local layers differ in their mask and in their rotary frequencies. Both kinds are computed once, and a
    flag that is scanned along with the blocks selects one.

    A family that is a decoder with another block (a mixture of experts) sets `block` and overrides `_output`.
    """

    block: ClassVar[type[Block]] = Block

    def __init__(self, config: DecoderConfig, key: jax.Array):
        k_embed, k_positions, k_blocks, k_head = jax.random.split(key, 4)
        dtype, vocab = config.param_dtype, config.padded_vocab
        self.config = config
        self.embed = Embedding(k_embed, vocab, config.embed, entries="vocab", dtype=dtype)
        table = lambda: Embedding(k_positions, config.max_positions, config.embed, entries="entries", dtype=dtype)
        self.positions = table() if config.positions == "learned" else None
        self.blocks = self.make_blocks(jax.random.split(k_blocks, config.num_layers))
        self.norm = make_norm(config, config.embed) if config.norm_position != "post" else None
        self.task_head = make_task_head(config, key)
        untied = not config.tie_embeddings and self.task_head is None
        self.head = (
            weights.normal(k_head, {"embed": config.embed, "vocab": vocab}, std=0.02, dtype=dtype) if untied else None
        )

    def make_blocks(self, keys: jax.Array) -> Any:
        """Stacked blocks, one for each key."""
        return jax.vmap(lambda key: self.block(self.config, key))(keys)

    def __call__(self, batch: Batch, key: jax.Array | None = None) -> Output:
        """Hidden states in the compute type; `key` switches dropout on, with draws by (key, sample, layer, site)."""
        config, token_mask, segments = self.config, batch.segments > 0, batch.causal_segments
        choice = config.choose_attention(batch.inputs.shape[1], has_prefix=batch.prefix is not None)
        make_mask = functools.partial(KERNELS[choice.kernel].make_mask, block=config.attention_block)
        drop = dropout.for_samples(key, batch.sample, config.dropout)
        window = lambda local: config.window if local else None
        kinds = stack.by_kind(
            lambda local: (
                self._rope(batch.positions, local),
                make_mask(segments, batch.positions, causal=True, prefix=batch.prefix, window=window(local)),
            ),
            config.local_layers,
        )

        def layer(x, item):
            block, (index, local) = item
            rope, mask = stack.select(kinds, local)
            x, _, aux = block(x, rope, mask, drop.at(index + 1), token_mask=token_mask)
            return x, (None, aux)

        x = drop.at(0)(self._embed(batch.inputs, batch.positions))
        index, local = jnp.arange(config.num_layers), jnp.array(config.local_layers)
        x, (_, aux) = self._run_layers(layer, x, (index, local), config.remat)
        x = x if self.norm is None else self.norm(x)
        return self._output(x if self.task_head is None else drop.at(config.num_layers + 1)(x), aux)

    def prefill(self, tokens: jax.Array, lengths: jax.Array, max_tokens: int) -> tuple[jax.Array, Cache, jax.Array]:
        """Read prompts: tokens [batch, seq] with `lengths` [batch], into a cache with slots for `max_tokens` more.

        Returns the hidden state [batch, embed] that predicts the next token, the cache, and that token's position
        [batch]. Later tokens overwrite the cached padding before anything attends to it.
        """
        batch, seq = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(seq), tokens.shape)
        hidden, cache = self.cached(tokens, positions, self.cache(batch, seq + max_tokens))
        return hidden[jnp.arange(batch), lengths - 1], cache, lengths

    def cache(self, batch: int, slots: int) -> Cache:
        """Empty keys and values, each [layers, batch, slots, kv_heads, head_dim] in the compute type."""
        config = self.config
        shape = (config.num_layers, batch, slots, config.kv_heads, config.head_size)
        return jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)

    def cached(self, tokens: jax.Array, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """(hidden states, cache) of tokens [batch, seq] at the next consecutive positions [batch, seq]."""
        slots, start = jax.tree.leaves(cache)[0].shape[2], positions[:, 0]
        window = lambda local: self.config.window if local else None
        kinds = stack.by_kind(
            lambda local: (self._rope(positions, local), attention.cache_mask(positions, slots, window(local))),
            self.config.local_layers,
        )

        def layer(x, item):
            block, (local, layer_cache) = item
            rope, mask = stack.select(kinds, local)
            x, layer_cache, _ = block(x, rope, mask, _NO_DROPOUT, cache=layer_cache, start=start)
            return x, (layer_cache, None)

        local = jnp.array(self.config.local_layers)
        x, (cache, _) = self._run_layers(layer, self._embed(tokens, positions), (local, cache), "none")
        return (x if self.norm is None else self.norm(x)), cache

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., embed] -> float32 logits [..., padded vocab]; padding ids get the lowest one. With a head
        for labels: its outputs."""
        if self.task_head is not None:
            return self.task_head(hidden)
        table = self.embed.table[...].T if self.head is None else self.head[...]
        config = self.config
        scale, softcap = 1 / config.width_multiplier, config.logit_softcap or None
        return embedding.logits(hidden, table, vocab_size=config.vocab_size, scale=scale, softcap=softcap)

    def _output(self, hidden: jax.Array, aux: Any) -> Output:
        """The output; `aux` has the statistics of the feed-forwards, stacked over layers."""
        return Output(hidden=hidden)

    def _embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x = self.embed(tokens, self.config.dtype)
        if self.config.embed_multiplier != 1:
            x = x * jnp.asarray(self.config.embed_multiplier, x.dtype)
        return x if self.positions is None else x + self.positions(positions, self.config.dtype)

    def _rope(self, positions: jax.Array, local: bool) -> Rope:
        config = self.config
        if config.positions != "rotary":
            return None
        if local and config.rope_local_base:
            return rotary.angles(positions, config.head_size, config.rope_local_base)
        return rotary.angles(positions, config.head_size, config.rope_base, config.scaling)

    def _run_layers(self, layer: Callable, x: jax.Array, per_layer: Any, remat: str) -> tuple[jax.Array, Any]:
        """Fold layer(x, (block, item)) over the blocks and over `per_layer`, whose leaves have a leading "layers"
        dimension. `layer` returns (x, (cache, aux)); both are stacked over layers."""
        scan, quantization = self.config.scan, self.config.quantization
        return stack.run(layer, x, (self.blocks, per_layer), scan=scan, remat=remat, quantization=quantization)
