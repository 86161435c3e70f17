"""Recurrent language model: a stack of RNN, LSTM, GRU or RG-LRU layers, from one config."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from llmjax.batch import Batch, Output
from llmjax.data.config import LABELLED, SEVERAL_TEXTS
from llmjax.errors import UserError
from llmjax.models.base import BaseModelConfig, make_task_head
from llmjax.nn import dropout, embedding, recurrent, rglru, stack, weights
from llmjax.nn.dropout import Dropout
from llmjax.nn.embedding import Embedding
from llmjax.nn.mlp import Mlp
from llmjax.nn.norm import NORMS
from llmjax.nn.recurrent import CELLS
from llmjax.nn.rglru import RECURRENCES


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentConfig(BaseModelConfig):
    """A stack of recurrent layers.


    family          "recurrent"
    embed           width of the residual stream, and of the embedding
    cell            rnn (tanh), lstm, gru, or rglru (Griffin's block with its linear recurrence)
    hidden          width of the state; 0: embed. rnn, lstm and gru project another width back to embed
    mlp             width of a gated feed-forward sub-block after each cell; 0: none
    gate_blocks     rglru: number of blocks on the diagonal of its gates' matrices, a divisor of the state's width
    norm            before each sub-block and once at the end: none, rmsnorm or layernorm
    residual        whether each sub-block's output is added to its input; False: it replaces the input
    tie_embeddings  whether the head is the token embedding instead of a matrix of its own
    recurrence      over time: sequential (token by token, any cell) or associative (a parallel scan, rglru alone)
    unroll          tokens in one turn of the sequential loop; more compile longer and may run faster
    """

    objectives: ClassVar[tuple[str, ...]] = ("causal", "fim", *LABELLED, *SEVERAL_TEXTS)
    choices: ClassVar = {
        **BaseModelConfig.choices,
        "cell": (*CELLS, "rglru"),
        "norm": ("none", *NORMS),
        "recurrence": RECURRENCES,
    }
    minimums: ClassVar = {**BaseModelConfig.minimums, "hidden": 0, "mlp": 0, "gate_blocks": 1, "unroll": 1}

    family: str = "recurrent"
    num_layers: int = 2
    cell: str = "lstm"
    hidden: int = 0
    mlp: int = 0
    gate_blocks: int = 1
    norm: str = "rmsnorm"
    residual: bool = True
    tie_embeddings: bool = False
    recurrence: str = "sequential"
    unroll: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.cell != "rglru" and self.gate_blocks != 1:
            raise UserError(f"model.gate_blocks={self.gate_blocks}: only model.cell='rglru' has them; leave it at 1")
        if self.state_size % self.gate_blocks:
            raise UserError(
                f"model.gate_blocks={self.gate_blocks}: must divide the state's width, model.hidden={self.state_size}"
            )
        if self.recurrence == "associative" and self.cell != "rglru":
            raise UserError(
                f"model.recurrence='associative': the state of model.cell={self.cell!r} passes through a nonlinearity "
                "at every token; use cell='rglru', or recurrence='sequential'"
            )
        if self.recurrence == "associative" and self.unroll != 1:
            raise UserError(f"model.unroll={self.unroll}: an associative recurrence has no loop; leave it at 1")

    @property
    def state_size(self) -> int:
        """Width of the state."""
        return self.hidden or self.embed

    def check(self, *, seq_len: int, tensor: int) -> None:
        """UserError where the model cannot be cut over `tensor` devices; rows may have any length."""
        del seq_len
        counts = {"hidden": self.state_size, "mlp": self.mlp}
        if self.cell == "rglru":
            counts["gate_blocks"] = self.gate_blocks
        self.check_tensor_shards(tensor, counts)

    def check_mesh(self, mesh: Mapping[str, int]) -> None:
        """UserError where the family has no use for an axis (axis -> size) of a mesh."""
        super().check_mesh(mesh)
        if (size := mesh.get("sequence", 1)) > 1:
            raise UserError(
                f"mesh.sequence={size}: model.family={self.family!r} passes a state from each token to the next, so "
                "devices cannot share a row; set it to 1 and use mesh.fsdp"
            )

    def flops_per_token(self, seq_len: int) -> float:
        """Model flops of one training token, for model flops utilisation: 6 for each weight of a matmul.

        2 forward and 4 backward; the head counts, the embedding lookup and elementwise work (gates, taps, the linear
        recurrence) do not, and recomputation neither. No term grows with the length.
        """
        del seq_len
        embed, hidden = self.embed, self.state_size
        if self.cell == "rglru":
            block = 3 * embed * hidden + 2 * hidden * hidden // self.gate_blocks
        else:
            block = len(CELLS[self.cell].gates) * hidden * (embed + hidden)
            block += hidden * embed if hidden != embed else 0
        return 6.0 * (self.num_layers * (block + 3 * embed * self.mlp) + embed * self.head_outputs)


Cache = tuple[jax.Array, ...]


class Block(nnx.Module):
    """One layer: a cell and an optional feed-forward, each with its norm, residual and dropout."""

    def __init__(self, config: RecurrentConfig, key: jax.Array):
        k_cell, k_mlp = jax.random.split(key)
        self.residual, dtype = config.residual, config.param_dtype
        # So that the sum of all residual branches has variance 1.
        scale = (config.num_layers * (2 if config.mlp else 1)) ** -0.5 if self.residual else 1.0
        self.cell_norm = _norm(config)
        shape: dict[str, Any] = dict(scale=scale, unroll=config.unroll, dtype=dtype)
        if config.cell == "rglru":
            self.cell = rglru.RgLru(
                k_cell,
                config.embed,
                config.state_size,
                blocks=config.gate_blocks,
                recurrence=config.recurrence,
                **shape,
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

    def __call__(self, x: jax.Array, run_cell: Callable, drop: Dropout) -> tuple[jax.Array, Any]:
        """x [batch, seq, embed] -> (x, second result of `run_cell`).

        `run_cell(cell, x)` returns (output, anything). It starts from a state of 0 or from a cached one.
        """
        y, out = run_cell(self.cell, _apply_norm(self.cell_norm, x))
        x = self._add_residual(x, drop.at(0)(y))
        if self.mlp is not None:
            x = self._add_residual(x, drop.at(1)(self.mlp(_apply_norm(self.mlp_norm, x))))
        return x, out

    def _add_residual(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return x + y if self.residual else y


class Recurrent(nnx.Module):
    """Batch -> Output with hidden states [batch, seq, embed], ready for `unembed`.

    The state passes along a document and is 0 at every position 0: documents of a row don't see each other. A chunk
    that continues a document of another row starts from 0, because rows are shuffled.

    Parameters: embed, blocks (every leaf with a leading "layers" dimension), norm (where the config has one), head
    (untied only), or task_head in its place.
    """

    def __init__(self, config: RecurrentConfig, key: jax.Array):
        k_embed, k_blocks, k_head = jax.random.split(key, 3)
        dtype, vocab = config.param_dtype, config.padded_vocab
        self.config = config
        self.embed = Embedding(k_embed, vocab, config.embed, entries="vocab", dtype=dtype)
        self.blocks = jax.vmap(lambda k: Block(config, k))(jax.random.split(k_blocks, config.num_layers))
        self.norm = _norm(config)
        self.task_head = make_task_head(config, key)
        untied = not config.tie_embeddings and self.task_head is None
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
        x = _apply_norm(self.norm, x)
        return Output(hidden=x if self.task_head is None else drop.at(self.config.num_layers + 1)(x))

    def prefill(self, tokens: jax.Array, lengths: jax.Array, max_tokens: int) -> tuple[jax.Array, Cache, jax.Array]:
        """Read prompts: tokens [batch, seq] with `lengths` [batch].

        Returns the hidden state [batch, embed] that predicts the next token, the state after the last token before the
        padding, and the next token's position [batch]. `max_tokens` is unused: the size of a state does not depend on
        the length of the text.
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
        """(hidden states, state) of tokens [batch, seq] at the next consecutive positions [batch, seq]."""
        return self._advance(tokens, positions, cache, jnp.full(tokens.shape[0], tokens.shape[1] - 1))

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., embed] -> float32 logits [..., padded vocab]; padding ids get the lowest one. With a head
        for labels: its outputs."""
        if self.task_head is not None:
            return self.task_head(hidden)
        table = self.embed.table[...].T if self.head is None else self.head[...]
        scale = 1 / self.config.width_multiplier
        return embedding.logits(hidden, table, vocab_size=self.config.vocab_size, scale=scale)

    def _advance(
        self, tokens: jax.Array, positions: jax.Array, cache: Cache, last: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """(hidden states, state after token `last` [batch] of each row)."""
        no_dropout = Dropout(None, 0.0)

        def layer(x, item):
            block, state = item
            return block(x, lambda cell, y: cell.advance(y, positions, state, last), no_dropout)

        x, cache = self._run(layer, self.embed(tokens, self.config.dtype), (self.blocks, cache), "none")
        return _apply_norm(self.norm, x), cache

    def _run(self, layer: Callable, x: jax.Array, stacked: Any, remat: str) -> tuple[jax.Array, Any]:
        scan, quantization = self.config.scan, self.config.quantization
        return stack.run(layer, x, stacked, scan=scan, remat=remat, quantization=quantization)


def _norm(config: RecurrentConfig) -> nnx.Module | None:
    if config.norm == "none":
        return None
    return NORMS[config.norm](config.embed, eps=config.norm_eps, bias=True, dtype=config.param_dtype)


def _apply_norm(norm: Any, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)
