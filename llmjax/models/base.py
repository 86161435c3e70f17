"""Fields, checks and width scaling that every model family shares."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import ClassVar

from llmjax.errors import UserError, suggest
from llmjax.nn.stack import REMAT

PARAMETRIZATIONS = ("standard", "mup")
_DTYPES = ("float32", "bfloat16")
_CHOICES = {
    "remat": tuple(REMAT),
    "dtype": _DTYPES,
    "param_dtype": _DTYPES,
    "parametrization": PARAMETRIZATIONS,
}
_AT_LEAST = {"vocab_size": 0, "vocab_multiple": 1, "num_layers": 1, "embed": 1, "base_embed": 1}
_MUP_HEAD_DIM = 64  # the head width at which muP scales attention scores as the standard parametrization does


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseModelConfig:
    """Fields of every family.

    objectives      (of the class) objectives that the family supports
    generates       (of the class) whether it continues text
    reads_source    (of the class) whether an encoder reads a source and a decoder writes targets

    family          name of the family
    vocab_size      number of token ids; 0: the tokenizer's, filled in by the run
    vocab_multiple  embedding and head are padded to a multiple of this many ids, so that they can be sharded;
                    padding ids are never predicted
    num_layers      number of blocks
    embed           width of the residual stream
    parametrization standard, or mup: learning rates tuned at width base_embed hold at every width (docs/optimizers.md)
    base_embed      mup: the width at which both parametrizations are equal
    dropout         rate after the embedding and at the end of each sub-block; from 0 to below 1
    scan            True: blocks are compiled once and scanned; False: unrolled, for debugging and for short stacks
    remat           what the backward pass keeps of a block: none (everything), dots (matmul outputs), attention (its
                    output, or that of the recurrence), full (nothing)
    dtype           type of activations and matmuls: float32 or bfloat16 (softmax, norms, recurrent states, gates and
                    logits are always float32)
    param_dtype     type in which parameters are stored: float32 or bfloat16
    """

    objectives: ClassVar[tuple[str, ...]] = ()
    generates: ClassVar[bool] = True
    reads_source: ClassVar[bool] = False

    family: str = ""
    vocab_size: int = 0
    vocab_multiple: int = 128
    num_layers: int = 4
    embed: int = 256
    parametrization: str = "standard"
    base_embed: int = 256
    dropout: float = 0.0
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"

    @property
    def padded_vocab(self) -> int:
        """Number of rows of the embedding."""
        return round_up(self.vocab_size, self.vocab_multiple)

    @property
    def max_seq_len(self) -> int | None:
        """The longest sequence that the model can read; None: no limit."""
        return None

    @property
    def decoder_start_id(self) -> int | None:
        """The token that the decoder reads first, -1 while unknown; None for a family without a source."""
        return None

    @property
    def width_multiplier(self) -> float:
        """The model's width over the base width under muP, else 1. Logits are divided by it.

        muP (Yang et al., 2022, arXiv 2203.03466): every activation changes by the same amount per step at any width.
        Besides the usual initial variance of 1 / fan-in, that takes three things: logits divided by the width
        multiplier, a smaller learning rate for hidden matrices (optim.optimizer.WIDTH_POWERS), and attention scores
        divided by head_dim instead of its root (`mup_score_scale`). All widths are assumed to grow with `embed`.
        """
        return self.embed / self.base_embed if self.parametrization == "mup" else 1.0

    def mup_score_scale(self, standard: float, head_dim: int) -> float:
        """Scale of the attention scores, given the `standard` one: muP's equals it at a head_dim of 64."""
        return standard if self.parametrization != "mup" else standard * (_MUP_HEAD_DIM / head_dim) ** 0.5

    def check_tensor_shards(self, tensor: int, sizes: Mapping[str, int]) -> None:
        """UserError where a size (field -> size) cannot be split over `tensor` devices."""
        for field, size in sizes.items():
            if size % tensor:
                raise UserError(f"mesh.tensor={tensor}: must divide model.{field}={size}")

    def check_seq_len(self, seq_len: int) -> None:
        """UserError where the model cannot read rows of `seq_len` tokens."""
        if self.max_seq_len is not None and seq_len > self.max_seq_len:
            raise UserError(
                f"data.seq_len={seq_len}: the model has only model.max_positions={self.max_seq_len} learned positions"
            )

    def check_choices(self, choices: Mapping[str, Sequence[str]]) -> None:
        """UserError for a field whose value is not one of its `choices`; shared fields are checked too."""
        for field, allowed in {"family": (type(self).family,), **choices, **_CHOICES}.items():
            value = getattr(self, field)
            if value not in allowed:
                raise UserError(f"model.{field}={value!r}: choose one of {', '.join(allowed)}{suggest(value, allowed)}")

    def check_ranges(self, at_least: Mapping[str, float], above_zero: Sequence[str]) -> None:
        """UserError for a field below its minimum, or not above 0; shared fields are checked too."""
        for field, least in {**_AT_LEAST, **at_least}.items():
            if not getattr(self, field) >= least:
                raise UserError(f"model.{field}={getattr(self, field)}: must be at least {least}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout={self.dropout}: must be at least 0 and below 1")
        for field in above_zero:
            if not getattr(self, field) > 0:
                raise UserError(f"model.{field}={getattr(self, field)}: must be above 0")


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


def default_mlp_size(embed: int, gated: bool) -> int:
    """Width of a feed-forward layer whose config leaves it open: 4 embed, or 8/3 embed if gated, rounded up to 128."""
    return round_up(-(-8 * embed // 3), 128) if gated else 4 * embed
