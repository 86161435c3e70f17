"""Decoder-only transformer: GPT-2, Llama and what lies between them, from one config."""

from collections.abc import Callable
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from llmjax.batch import Batch, Output
from llmjax.models.decoder_config import DecoderConfig
from llmjax.nn import attention, dropout, embedding, rotary, stack, weights
from llmjax.nn.attention import Attention
from llmjax.nn.dropout import Dropout
from llmjax.nn.embedding import Embedding
from llmjax.nn.mlp import Mlp
from llmjax.nn.norm import NORMS

Cache = tuple[jax.Array, jax.Array]
Step = Callable[[Any, jax.Array], tuple[jax.Array, Any]]


class Block(nnx.Module):
    """One layer: attention and feed-forward, each with its norm, residual and dropout.

    A family with other parts overrides `make_attention` or `make_mlp`, and names its block in `Decoder.block`.
    """

    def __init__(self, config: DecoderConfig, key: jax.Array):
        k_attention, k_mlp = jax.random.split(key)
        bias, dtype = config.biases == "all", config.param_dtype
        norm = lambda: NORMS[config.norm](config.embed, eps=config.norm_eps, bias=bias, dtype=dtype)
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention = self.make_attention(config, k_attention)
        self.mlp = self.make_mlp(config, k_mlp)
        self.norm_position = config.norm_position

    @staticmethod
    def make_attention(config: DecoderConfig, key: jax.Array) -> Any:
        """The attention sub-block, of the interface of `nn.attention.Attention`."""
        return Attention(
            key,
            config.embed,
            num_heads=config.num_heads,
            num_kv_heads=config.kv_heads,
            head_dim=config.head_size,
            bias=config.biases == "all",
            scale=config.branch_scale,
            kernel=config.attention,
            dtype=config.param_dtype,
        )

    @staticmethod
    def make_mlp(config: DecoderConfig, key: jax.Array) -> Any:
        """The feed-forward sub-block, which `Decoder._feed` calls."""
        return Mlp(
            key,
            config.embed,
            config.mlp_size,
            activation=config.activation,
            gated=config.gated == "gated",
            bias=config.biases == "all",
            scale=config.branch_scale,
            dtype=config.param_dtype,
        )

    def __call__(self, x: jax.Array, attend: Step, feed: Step, drop: Dropout) -> tuple[jax.Array, tuple[Any, Any]]:
        """x [batch, seq, embed] -> (x, (what `attend` gave beside its output, what `feed` gave)).

        `attend(attention, x)` and `feed(mlp, x)` return (output, anything): with or without a cache, with or without
        what a router counts.
        """
        if self.norm_position == "pre":
            y, attended = attend(self.attention, self.attention_norm(x))
            x = x + drop.at(0)(y)
            y, fed = feed(self.mlp, self.mlp_norm(x))
            return x + drop.at(1)(y), (attended, fed)
        y, attended = attend(self.attention, x)
        x = self.attention_norm(x + drop.at(0)(y))
        y, fed = feed(self.mlp, x)
        return self.mlp_norm(x + drop.at(1)(y)), (attended, fed)


class Decoder(nnx.Module):
    """Batch -> Output with hidden states [batch, seq, embed], ready for `unembed`.

    Parameters: embed, positions (learned only), blocks (every leaf with a leading "layers" dimension), norm (pre-norm
    only: post-norm ends normed), head (untied only).

    A family that is a decoder with another block (a mixture of experts) sets `block` and overrides `_feed` and
    `_output`.
    """

    block: ClassVar[type[Block]] = Block

    def __init__(self, config: DecoderConfig, key: jax.Array):
        k_embed, k_positions, k_blocks, k_head = jax.random.split(key, 4)
        dtype, vocab = config.param_dtype, config.padded_vocab
        self.config = config
        self.embed = Embedding(k_embed, vocab, config.embed, entries="vocab", dtype=dtype)
        learned = config.positions == "learned"
        self.positions = (
            Embedding(k_positions, config.max_positions, config.embed, entries="seq", dtype=dtype) if learned else None
        )
        self.blocks = jax.vmap(lambda k: self.block(config, k))(jax.random.split(k_blocks, config.num_layers))
        pre, bias = config.norm_position == "pre", config.biases == "all"
        self.norm = NORMS[config.norm](config.embed, eps=config.norm_eps, bias=bias, dtype=dtype) if pre else None
        untied = config.tied == "untied"
        self.head = (
            weights.normal(k_head, {"embed": config.embed, "vocab": vocab}, std=0.02, dtype=dtype) if untied else None
        )

    def __call__(self, batch: Batch, key: jax.Array | None = None) -> Output:
        """Hidden states in the compute type; `key` switches dropout on, with draws by (key, sample, layer, site)."""
        prepared = attention.KERNELS[self.config.attention].prepare(batch.segments, batch.positions, batch.prefix)
        drop = dropout.for_samples(key, batch.sample, self.config.dropout)
        angles = self._angles(batch.positions)

        def layer(x, item):
            block, index = item
            attend = lambda module, y: (module(y, angles, prepared), None)
            return block(x, attend, lambda mlp, y: self._feed(mlp, y, batch), drop.at(index + 1))

        x = drop.at(0)(self._embed(batch.inputs, batch.positions))
        x, (_, fed) = self._run(layer, x, (self.blocks, jnp.arange(self.config.num_layers)), self.config.remat)
        return self._output(x if self.norm is None else self.norm(x), fed)

    def prefill(self, tokens: jax.Array, lengths: jax.Array, slots: int) -> tuple[jax.Array, Cache, jax.Array]:
        """Read prompts: tokens [batch, seq], of which `lengths` [batch] count, into a cache of `slots` tokens.

        Returns the hidden state [batch, embed] that foretells the next token, the cache, and that token's position
        [batch]. What padding writes to the cache is overwritten before it is seen.
        """
        batch, seq = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(seq), tokens.shape)
        hidden, cache = self.cached(tokens, positions, self.cache(batch, slots))
        return hidden[jnp.arange(batch), lengths - 1], cache, lengths

    def cache(self, batch: int, slots: int) -> Cache:
        """Empty keys and values, each [layers, batch, slots, kv_heads, head_dim] in the compute type."""
        config = self.config
        shape = (config.num_layers, batch, slots, config.kv_heads, config.head_size)
        return jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)

    def cached(self, tokens: jax.Array, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """(hidden states, cache) of tokens [batch, seq] at consecutive positions [batch, seq], after what the cache
        holds."""
        none, angles = Dropout(None, 0.0), self._angles(positions)

        def layer(x, item):
            block, stored = item
            attend = lambda module, y: module.cached(y, angles, positions, stored)
            return block(x, attend, lambda mlp, y: self._feed(mlp, y, None), none)

        x, (cache, _) = self._run(layer, self._embed(tokens, positions), (self.blocks, cache), "none")
        return (x if self.norm is None else self.norm(x)), cache

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., embed] -> float32 logits [..., padded vocab]; padding ids get one that no softmax
        sees."""
        table = self.embed.table[...].T if self.head is None else self.head[...]
        return embedding.logits(hidden, table, vocab_size=self.config.vocab_size)

    def _feed(self, mlp: Any, x: jax.Array, batch: Batch | None) -> tuple[jax.Array, Any]:
        """(mlp(x), what it counts of the batch's tokens); without a batch, in cached decoding, nothing is counted."""
        return mlp(x), None

    def _output(self, hidden: jax.Array, fed: Any) -> Output:
        """`fed` is what `_feed` counted, stacked over layers."""
        return Output(hidden=hidden)

    def _embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x = self.embed(tokens, self.config.dtype)
        return x if self.positions is None else x + self.positions(positions, self.config.dtype)

    def _angles(self, positions: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        if self.config.positions != "rotary":
            return None
        return rotary.angles(positions, self.config.head_size, self.config.rope_base)

    def _run(self, layer, x, stacked, remat: str):
        return stack.run(layer, x, stacked, scan=self.config.scan, remat=remat)
