"""Recurrent language model: a stack of RNN, LSTM, GRU or RG-LRU layers, from one config."""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from llmjax.batch import Batch, Output
from llmjax.models import parametrization
from llmjax.models.recurrent_config import RecurrentConfig
from llmjax.nn import dropout, embedding, recurrent, rglru, stack, weights
from llmjax.nn.dropout import Dropout
from llmjax.nn.embedding import Embedding
from llmjax.nn.mlp import Mlp
from llmjax.nn.norm import NORMS

Cache = tuple[jax.Array, ...]


class Block(nnx.Module):
    """One layer: a cell and, where asked for, a feed-forward, each with its norm, residual and dropout."""

    def __init__(self, config: RecurrentConfig, key: jax.Array):
        k_cell, k_mlp = jax.random.split(key)
        self.added, dtype = config.residual == "add", config.param_dtype
        # each residual branch adds its share of variance
        scale = (config.num_layers * (2 if config.mlp else 1)) ** -0.5 if self.added else 1.0
        self.cell_norm = _norm(config)
        shape: dict[str, Any] = dict(scale=scale, unroll=config.unroll, dtype=dtype)
        if config.cell == "rglru":
            self.cell = rglru.RgLru(
                k_cell, config.embed, config.state_size, blocks=config.gate_blocks, how=config.recurrence, **shape
            )
        else:
            self.cell = recurrent.Recurrence(k_cell, config.embed, config.state_size, cell=config.cell, **shape)
        self.mlp_norm = _norm(config) if config.mlp else None
        self.mlp = (
            Mlp(
                k_mlp,
                config.embed,
                config.mlp,
                activation="gelu_tanh",
                gated=True,
                bias=True,
                scale=scale,
                dtype=dtype,
            )
            if config.mlp
            else None
        )

    def __call__(self, x: jax.Array, recur: Callable, drop: Dropout) -> tuple[jax.Array, Any]:
        """x [batch, seq, embed] -> (x, what `recur` gave beside its output).

        `recur(cell, x)` returns (output, anything): from a state of 0 or from a given one.
        """
        y, out = recur(self.cell, _apply(self.cell_norm, x))
        x = self._join(x, drop.at(0)(y))
        if self.mlp is not None:
            x = self._join(x, drop.at(1)(self.mlp(_apply(self.mlp_norm, x))))
        return x, out

    def _join(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return x + y if self.added else y


class Recurrent(nnx.Module):
    """Batch -> Output with hidden states [batch, seq, embed], ready for `unembed`.

    The state passes along a document and is 0 at every position 0: documents of a row don't see each other. A chunk
    that continues a document of another row starts from 0, because rows are shuffled.

    Parameters: embed, blocks (every leaf with a leading "layers" dimension), norm (where the config has one), head
    (untied only).
    """

    def __init__(self, config: RecurrentConfig, key: jax.Array):
        k_embed, k_blocks, k_head = jax.random.split(key, 3)
        dtype, vocab = config.param_dtype, config.padded_vocab
        self.config = config
        self.embed = Embedding(k_embed, vocab, config.embed, entries="vocab", dtype=dtype)
        self.blocks = jax.vmap(lambda k: Block(config, k))(jax.random.split(k_blocks, config.num_layers))
        self.norm = _norm(config)
        untied = config.tied == "untied"
        self.head = (
            weights.normal(k_head, {"embed": config.embed, "vocab": vocab}, std=0.02, dtype=dtype) if untied else None
        )

    def __call__(self, batch: Batch, key: jax.Array | None = None) -> Output:
        """Hidden states in the compute type; `key` switches dropout on, with draws by (key, sample, layer, site)."""
        drop = dropout.for_samples(key, batch.sample, self.config.dropout)

        def layer(x, item):
            block, index = item
            return block(x, lambda cell, y: (cell(y, batch.positions), None), drop.at(index + 1))

        x = drop.at(0)(self.embed(batch.inputs, self.config.dtype))
        x, _ = self._run(layer, x, (self.blocks, jnp.arange(self.config.num_layers)), self.config.remat)
        return Output(hidden=_apply(self.norm, x))

    def prefill(self, tokens: jax.Array, lengths: jax.Array, max_tokens: int) -> tuple[jax.Array, Cache, jax.Array]:
        """Read prompts: tokens [batch, seq], of which `lengths` [batch] count.

        Returns the hidden state [batch, embed] that predicts the next token, the state after the last token that
        counts (padding behind it has no part in it), and the next token's position [batch]. `max_tokens` is of no
        account: a state has one size, however long the text.
        """
        batch, seq = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(seq), tokens.shape)
        hidden, cache = self._advance(tokens, positions, self.cache(batch, seq + max_tokens), lengths - 1)
        return hidden[jnp.arange(batch), lengths - 1], cache, lengths

    def cache(self, batch: int, slots: int) -> Cache:
        """The state before a document: float32 arrays [layers, batch, ..., hidden]."""
        del slots
        config = self.config
        if config.cell == "rglru":
            state = rglru.start(batch, config.state_size)
        else:
            state = recurrent.start(config.cell, batch, config.state_size)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (config.num_layers, *x.shape)), state)

    def cached(self, tokens: jax.Array, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """(hidden states, state) of tokens [batch, seq] at consecutive positions [batch, seq], after the state."""
        return self._advance(tokens, positions, cache, jnp.full(tokens.shape[0], tokens.shape[1] - 1))

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., embed] -> float32 logits [..., padded vocab]; padding ids get one that no softmax
        sees."""
        table = self.embed.table[...].T if self.head is None else self.head[...]
        scale = 1 / parametrization.width(self.config)
        return embedding.logits(hidden, table, vocab_size=self.config.vocab_size, scale=scale)

    def _advance(self, tokens, positions, cache, last) -> tuple[jax.Array, Cache]:
        none = Dropout(None, 0.0)

        def layer(x, item):
            block, state = item
            return block(x, lambda cell, y: cell.advance(y, positions, state, last), none)

        x, cache = self._run(layer, self.embed(tokens, self.config.dtype), (self.blocks, cache), "none")
        return _apply(self.norm, x), cache

    def _run(self, layer, x, stacked, remat: str):
        return stack.run(layer, x, stacked, scan=self.config.scan, remat=remat)


def _norm(config: RecurrentConfig) -> nnx.Module | None:
    if config.norm == "none":
        return None
    return NORMS[config.norm](config.embed, eps=config.norm_eps, bias=True, dtype=config.param_dtype)


def _apply(norm: Any, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)
