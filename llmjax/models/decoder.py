"""Decoder-only transformer: GPT-2, Llama, Qwen3, Gemma, OLMo and what lies between them, from one config."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from llmjax.batch import Batch, Output
from llmjax.models import parametrization
from llmjax.models.decoder_config import DecoderConfig
from llmjax.nn import attention, dropout, embedding, rotary, stack, weights
from llmjax.nn.attention import Attention
from llmjax.nn.dropout import Dropout
from llmjax.nn.embedding import Embedding
from llmjax.nn.mlp import Mlp
from llmjax.nn.norm import NORMS

Cache = tuple[jax.Array, jax.Array]
Angles = tuple[jax.Array, jax.Array] | None
Step = Callable[[Any, jax.Array], tuple[jax.Array, Any]]


def make_norm(config: DecoderConfig, dims: int | Mapping[str, int]) -> Any:
    """A norm as the config has them, over `dims` (a width, or logical axis -> size)."""
    return NORMS[config.norm](dims, eps=config.norm_eps, bias=config.biases == "all", dtype=config.param_dtype)


class Block(nnx.Module):
    """One layer: attention and feed-forward, each with its norms, residual and dropout.

    A family with other parts overrides `make_attention` or `make_mlp`, and names its block in `Decoder.block`.
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
        """The attention sub-block, of the interface of `nn.attention.Attention`."""
        head = {"head_dim": config.head_size}
        each = {
            "none": (None, None),
            "head": (head, head),
            "all": ({"heads": config.num_heads, **head}, {"kv_heads": config.kv_heads, **head}),
        }
        query_norm, key_norm = (dims and make_norm(config, dims) for dims in each[config.qk_norm])
        return Attention(
            key,
            config.embed,
            num_heads=config.num_heads,
            num_kv_heads=config.kv_heads,
            head_dim=config.head_size,
            bias=config.biases != "none",
            scale=config.residual_init_scale,
            kernel=config.attention,
            dtype=config.param_dtype,
            score_scale=parametrization.score_scale(config, config.score_scale or config.head_size**-0.5),
            softcap=config.score_softcap or None,
            sinks=config.sinks == "learned",
            query_norm=query_norm,
            key_norm=key_norm,
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
            scale=config.residual_init_scale,
            dtype=config.param_dtype,
        )

    def __call__(self, x: jax.Array, attend: Step, feed: Step, drop: Dropout) -> tuple[jax.Array, tuple[Any, Any]]:
        """x [batch, seq, embed] -> (x, (what `attend` gave beside its output, what `feed` gave)).

        `attend(attention, x)` and `feed(mlp, x)` return (output, anything): with or without a cache, with or without
        what a router counts.
        """
        run = lambda x: attend(self.attention, x)
        x, attended = self._add(x, run, self.attention_norm, self.attention_post_norm, drop.at(0))
        run = lambda x: feed(self.mlp, x)
        x, fed = self._add(x, run, self.mlp_norm, self.mlp_post_norm, drop.at(1))
        return x, (attended, fed)

    def _add(self, x: jax.Array, run, norm, post_norm, drop: Dropout) -> tuple[jax.Array, Any]:
        """x and what a sub-block makes of it, normed where `norm_position` says."""
        before, inside = self.norm_position in ("pre", "both"), self.norm_position in ("inner", "both")
        y, out = run(norm(x) if before else x)
        if inside:
            y = (post_norm or norm)(y)
        x = x + drop(y)
        return (norm(x) if self.norm_position == "post" else x), out


class Decoder(nnx.Module):
    """Batch -> Output with hidden states [batch, seq, embed], ready for `unembed`.

    Parameters: embed, positions (learned only), blocks (every leaf with a leading "layers" dimension), norm (none where
    norm_position is post: its blocks end normed), head (untied only).

    Layers are of one or two kinds, global and local, which differ in what they see and in their rotary frequencies;
    both are prepared once, and a flag that is scanned along with the blocks chooses.

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
        self.blocks = self.make_blocks(jax.random.split(k_blocks, config.num_layers))
        self.norm = make_norm(config, config.embed) if config.norm_position != "post" else None
        untied = config.tied == "untied"
        self.head = (
            weights.normal(k_head, {"embed": config.embed, "vocab": vocab}, std=0.02, dtype=dtype) if untied else None
        )

    def make_blocks(self, keys: jax.Array) -> Any:
        """Stacked blocks, one for each key."""
        return jax.vmap(lambda key: self.block(self.config, key))(keys)

    def __call__(self, batch: Batch, key: jax.Array | None = None) -> Output:
        """Hidden states in the compute type; `key` switches dropout on, with draws by (key, sample, layer, site)."""
        prepare = attention.KERNELS[self.config.attention].prepare
        drop = dropout.for_samples(key, batch.sample, self.config.dropout)
        choose = self._kinds(
            lambda local: (
                self._angles(batch.positions, local),
                prepare(batch.segments, batch.positions, batch.prefix, self.config.window if local else None),
            )
        )

        def layer(x, item):
            block, (index, local) = item
            angles, prepared = choose(local)
            attend = lambda module, y: (module(y, angles, prepared), None)
            return block(x, attend, lambda mlp, y: self._feed(mlp, y, batch), drop.at(index + 1))

        x = drop.at(0)(self._embed(batch.inputs, batch.positions))
        index, local = jnp.arange(self.config.num_layers), jnp.array(self.config.local)
        x, (_, fed) = self._run(layer, x, (index, local), self.config.remat)
        return self._output(x if self.norm is None else self.norm(x), fed)

    def prefill(self, tokens: jax.Array, lengths: jax.Array, max_tokens: int) -> tuple[jax.Array, Cache, jax.Array]:
        """Read prompts: tokens [batch, seq], of which `lengths` [batch] count, into a cache with room for them
        and for `max_tokens` new ones.

        Returns the hidden state [batch, embed] that predicts the next token, the cache, and that token's position
        [batch]. What padding writes to the cache is overwritten before it is seen.
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
        """(hidden states, cache) of tokens [batch, seq] at consecutive positions [batch, seq], after what the cache
        holds."""
        none, everything = Dropout(None, 0.0), jax.tree.leaves(cache)[0].shape[2]
        reach = lambda local: min(self.config.window, everything) if local else everything
        windowed = any(self.config.local)
        choose = self._kinds(
            lambda local: (self._angles(positions, local), jnp.int32(reach(local)) if windowed else None)
        )

        def layer(x, item):
            block, (local, stored) = item
            angles, window = choose(local)
            attend = lambda module, y: module.cached(y, angles, positions, stored, window)
            return block(x, attend, lambda mlp, y: self._feed(mlp, y, None), none)

        local = jnp.array(self.config.local)
        x, (cache, _) = self._run(layer, self._embed(tokens, positions), (local, cache), "none")
        return (x if self.norm is None else self.norm(x)), cache

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., embed] -> float32 logits [..., padded vocab]; padding ids get one that no softmax
        sees."""
        table = self.embed.table[...].T if self.head is None else self.head[...]
        config = self.config
        scale, softcap = 1 / parametrization.width(config), config.logit_softcap or None
        return embedding.logits(hidden, table, vocab_size=config.vocab_size, scale=scale, softcap=softcap)

    def _feed(self, mlp: Any, x: jax.Array, batch: Batch | None) -> tuple[jax.Array, Any]:
        """(mlp(x), what it counts of the batch's tokens); without a batch, in cached decoding, nothing is counted."""
        return mlp(x), None

    def _output(self, hidden: jax.Array, fed: Any) -> Output:
        """`fed` is what `_feed` counted, stacked over layers."""
        return Output(hidden=hidden)

    def _embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x = self.embed(tokens, self.config.dtype)
        if self.config.embed_multiplier != 1:
            x = x * jnp.asarray(self.config.embed_multiplier, x.dtype)
        return x if self.positions is None else x + self.positions(positions, self.config.dtype)

    def _angles(self, positions: jax.Array, local: bool) -> Angles:
        config = self.config
        if config.positions != "rotary":
            return None
        if local and config.rope_local_base:
            return rotary.angles(positions, config.head_size, config.rope_local_base)
        return rotary.angles(positions, config.head_size, config.rope_base, config.scaling)

    def _kinds(self, make: Callable[[bool], Any]) -> Callable[[jax.Array], Any]:
        """A function of a layer's flag `local` that chooses between make(False) and make(True), each made once."""
        kinds = {local: make(local) for local in sorted(set(self.config.local))}
        if len(kinds) == 1:
            (only,) = kinds.values()
            return lambda local: only
        return lambda local: jax.tree.map(lambda a, b: jnp.where(local, b, a), kinds[False], kinds[True])

    def _run(self, layer: Callable, x: jax.Array, data: Any, remat: str) -> tuple[jax.Array, Any]:
        """Fold layer(x, (block, item)) over the blocks and over `data`, whose leaves have a leading "layers"
        dimension."""
        return stack.run(layer, x, (self.blocks, data), scan=self.config.scan, remat=remat)
