"""Bidirectional encoder with a masked-LM head: BERT, ModernBERT and what lies between them, from one config."""

from flax import nnx
import jax
import jax.numpy as jnp

from llmjax.batch import Batch, Output
from llmjax.models import parametrization
from llmjax.models.encoder_config import EncoderConfig
from llmjax.nn import attention, dropout, embedding, rotary, stack, weights
from llmjax.nn.attention import Attention
from llmjax.nn.dropout import Dropout
from llmjax.nn.embedding import Embedding
from llmjax.nn.linear import Linear
from llmjax.nn.mlp import ACTIVATIONS, Mlp
from llmjax.nn.norm import LayerNorm
from llmjax.parallel.axes import constrain

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
            score_scale=parametrization.score_scale(config, config.head_size**-0.5),
        )
        self.mlp = Mlp(
            k_mlp,
            config.embed,
            config.mlp_size,
            activation=config.activation,
            gated=config.gated == "gated",
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
        seen = lambda window: attention.visible(batch.segments, batch.positions, causal=False, window=window)
        everywhere = (self._angles(batch.positions, config.rope_base), seen(None))
        nearby = (self._angles(batch.positions, config.local_rope_base), seen(config.window)) if config.window else None

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
        table, scale = self.embed.table[...].T, 1 / parametrization.width(self.config)
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
