"""The recurrent model's settings, their limits, and what they cost."""

import dataclasses
from typing import ClassVar

from llmjax.errors import UserError
from llmjax.models import checks, parametrization
from llmjax.nn.norm import NORMS
from llmjax.nn.recurrent import CELLS
from llmjax.nn.rglru import RECURRENCES


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentConfig:
    """A stack of recurrent layers.

    objectives      (of the class) objectives that it can be trained with
    generates       (of the class) whether it continues text

    family          "recurrent"
    vocab_size      number of token ids; 0: the tokenizer's, filled in by the run
    vocab_multiple  embedding and head are padded to a multiple of this many ids, so that they can be sharded;
                    padding is never predicted
    num_layers      number of blocks
    embed           width of the residual stream, and of the embedding
    cell            rnn (tanh), lstm, gru, or rglru (Griffin's block with its linear recurrence)
    hidden          width of the state; 0: embed. rnn, lstm and gru project another width back to embed
    mlp             width of a gated feed-forward sub-block after each cell; 0: none
    gate_blocks     rglru: number of blocks on the diagonal of its gates' matrices, a divisor of the state's width
    norm            before each sub-block and once at the end: none, rmsnorm or layernorm
    norm_eps        added to the variance in a norm
    residual        add (each sub-block's output is added to its input) or none (it replaces it)
    tied            tied (the head is the token embedding) or untied (a matrix of its own)
    recurrence      over time: sequential (token by token, any cell) or associative (a parallel scan, rglru alone)
    unroll          tokens in one turn of the sequential loop; more compile longer and may run faster
    parametrization standard, or mup: rates tuned at width base_embed serve every width (docs/optimizers.md)
    base_embed      mup: the width at which both parametrizations are the same
    dropout         rate after the embedding and at the end of each sub-block, never on the way from token to token;
                    from 0 to below 1
    scan            True: blocks compiled once and scanned; False: unrolled, for debugging and for short stacks
    remat           what the backward pass keeps of a block: none (everything), dots (matmul outputs), attention (what
                    the recurrence gave, so that it is not run again), full (nothing)
    dtype           type of activations and matmuls: float32 or bfloat16 (states, gates, norms and logits are always
                    float32)
    param_dtype     type in which parameters are stored: float32 or bfloat16
    """

    objectives: ClassVar[tuple[str, ...]] = ("causal", "fim")
    generates: ClassVar[bool] = True

    family: str = "recurrent"
    vocab_size: int = 0
    vocab_multiple: int = 128
    num_layers: int = 2
    embed: int = 256
    cell: str = "lstm"
    hidden: int = 0
    mlp: int = 0
    gate_blocks: int = 1
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    residual: str = "add"
    tied: str = "untied"
    recurrence: str = "sequential"
    unroll: int = 1
    parametrization: str = "standard"
    base_embed: int = 256
    dropout: float = 0.0
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        parametrization.check(self)
        _check_names(self)
        _check_numbers(self)

    @property
    def state_size(self) -> int:
        """Width of the state."""
        return self.hidden or self.embed

    @property
    def padded_vocab(self) -> int:
        """Number of rows of the embedding."""
        return checks.round_up(self.vocab_size, self.vocab_multiple)

    @property
    def max_seq_len(self) -> None:
        """The longest sequence that the model can read: no limit."""
        return None

    def check(self, *, seq_len: int, tensor: int) -> None:
        """UserError where the model cannot be cut over `tensor` devices; rows may have any length."""
        del seq_len
        counts = {"hidden": self.state_size, "mlp": self.mlp}
        if self.cell == "rglru":
            counts["gate_blocks"] = self.gate_blocks
        for field, count in counts.items():
            if count % tensor:
                raise UserError(f"mesh.tensor={tensor}: must divide model.{field}={count}")

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
        return 6.0 * (self.num_layers * (block + 3 * embed * self.mlp) + embed * self.vocab_size)


_NAMES = {
    "cell": (*CELLS, "rglru"),
    "norm": ("none", *NORMS),
    "residual": ("add", "none"),
    "tied": ("tied", "untied"),
    "recurrence": RECURRENCES,
}
_AT_LEAST = {
    "hidden": 0,
    "mlp": 0,
    "gate_blocks": 1,
    "unroll": 1,
}


def _check_names(config: RecurrentConfig) -> None:
    checks.names(config, _NAMES)
    if config.recurrence == "associative" and config.cell != "rglru":
        raise UserError(
            f"model.recurrence='associative': the state of model.cell={config.cell!r} passes through a nonlinearity "
            "at every token; take cell='rglru', or recurrence='sequential'"
        )


def _check_numbers(config: RecurrentConfig) -> None:
    checks.numbers(config, _AT_LEAST, ("norm_eps",))
    if config.cell != "rglru" and config.gate_blocks != 1:
        raise UserError(f"model.gate_blocks={config.gate_blocks}: only model.cell='rglru' has them; leave it at 1")
    if config.state_size % config.gate_blocks:
        raise UserError(
            f"model.gate_blocks={config.gate_blocks}: must divide the state's width, model.hidden={config.state_size}"
        )
    if config.recurrence == "associative" and config.unroll != 1:
        raise UserError(f"model.unroll={config.unroll}: an associative recurrence has no loop; leave it at 1")
