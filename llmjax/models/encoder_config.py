"""The encoder's settings, their limits, and what they cost."""

import dataclasses
from typing import ClassVar

from llmjax.errors import UserError
from llmjax.models import checks, parametrization
from llmjax.nn.mlp import ACTIVATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """A bidirectional encoder with a masked-LM head: BERT, ModernBERT and what lies between them.

    objectives      (of the class) objectives that an encoder can be trained with
    generates       (of the class) False: it fills gaps (`llmjax fill`) and continues no text

    family          "encoder"
    vocab_size      number of token ids; 0: the tokenizer's and those of the objective, filled in by the run
    vocab_multiple  embedding and head are padded to a multiple of this many ids, so that they can be sharded;
                    padding is never predicted
    num_layers      number of blocks
    embed           width of the residual stream
    num_heads       number of attention heads, a divisor of embed
    mlp             width of the feed-forward layer; 0: 4 embed when plain, 8/3 embed rounded up to a multiple of 128
                    when gated
    activation      of the feed-forward layer and of the masked-LM head: gelu (by erf), gelu_tanh, silu, relu, relu2
    gated           feed-forward layer: plain (one matrix in, one out) or gated (two matrices in, one out)
    norm_eps        added to the variance in a layer norm
    norm_position   post (after each residual addition) or pre (before each sub-block but the first attention, which
                    reads the normed embedding as it is; and once at the end)
    positions       learned (added to the token embedding) or rotary (in every attention)
    max_positions   number of learned positions; the longest sequence a learned table can read; unused with rotary
                    positions
    rope_base       base of the rotary frequencies; unused with learned positions
    window          a local layer sees tokens less than this many positions away, on both sides; 0: all layers see all
    global_every    every so many layers, from the first one on, a layer sees all; the others are local. Unused without
                    a window
    local_rope_base  base of the rotary frequencies in local layers; unused without a window
    types           number of token types (which of two texts a token belongs to), each with an embedding; 0: none
    pooler          what `pool` makes of a row's first token: none (as it is) or tanh (a linear map and tanh, BERT's).
                    Masked LM does not train it
    biases          all (every linear map and layer norm) or none; the vocabulary's bias in the head is always there
    parametrization standard, or mup: rates tuned at width base_embed serve every width (docs/optimizers.md)
    base_embed      mup: the width at which both parametrizations are the same
    dropout         rate after the embedding and at the end of each sub-block; from 0 to below 1
    scan            True: blocks compiled once and scanned; False: unrolled, for debugging and for short stacks
    remat           what the backward pass keeps of a block: none (everything), dots (matmul outputs), attention (its
                    output), full (nothing)
    dtype           type of activations and matmuls: float32 or bfloat16 (softmax, norms and logits are always float32)
    param_dtype     type in which parameters are stored: float32 or bfloat16
    """

    objectives: ClassVar[tuple[str, ...]] = ("masked",)
    generates: ClassVar[bool] = False

    family: str = "encoder"
    vocab_size: int = 0
    vocab_multiple: int = 128
    num_layers: int = 4
    embed: int = 256
    num_heads: int = 4
    mlp: int = 0
    activation: str = "gelu"
    gated: str = "plain"
    norm_eps: float = 1e-12
    norm_position: str = "post"
    positions: str = "learned"
    max_positions: int = 512
    rope_base: float = 10_000.0
    window: int = 0
    global_every: int = 3
    local_rope_base: float = 10_000.0
    types: int = 0
    pooler: str = "none"
    biases: str = "all"
    parametrization: str = "standard"
    base_embed: int = 256
    dropout: float = 0.0
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        parametrization.check(self)
        checks.names(self, _NAMES)
        _check_numbers(self)

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.embed // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Width of the feed-forward layer."""
        return self.mlp or (4 * self.embed if self.gated == "plain" else checks.round_up(-(-8 * self.embed // 3), 128))

    @property
    def padded_vocab(self) -> int:
        """Number of rows of the embedding."""
        return checks.round_up(self.vocab_size, self.vocab_multiple)

    @property
    def max_seq_len(self) -> int | None:
        """The longest sequence that the model can read; None: no limit."""
        return self.max_positions if self.positions == "learned" else None

    @property
    def bare_layers(self) -> int:
        """Leading layers whose attention has no norm of its own, as the embedding is normed already."""
        return 1 if self.norm_position == "pre" else 0

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """For each layer whether it sees its window only."""
        return tuple(bool(self.window and layer % self.global_every) for layer in range(self.num_layers))

    def check(self, *, seq_len: int, tensor: int) -> None:
        """UserError where the model cannot read rows of `seq_len` tokens, or cannot be cut over `tensor` devices."""
        if self.max_seq_len is not None and seq_len > self.max_seq_len:
            raise UserError(
                f"data.seq_len={seq_len}: the model has only model.max_positions={self.max_positions} learned positions"
            )
        for field, count in {"num_heads": self.num_heads, "mlp": self.mlp_size}.items():
            if count % tensor:
                raise UserError(f"mesh.tensor={tensor}: must divide model.{field}={count}")

    def flops_per_token(self, seq_len: int) -> float:
        """Model flops of one training token, for model flops utilisation.

        6 flops for each weight of a matmul (2 forward, 4 backward; the head counts, for every token though only hidden
        ones are scored; lookups and the pooler, which masked LM leaves alone, do not), plus attention's two products:
        12 embed keys a layer, with seq_len keys for each token in a layer that sees all and the 2 window - 1 nearest
        in a local one (at most seq_len). Recomputation is not counted.
        """
        matrices = 3 if self.gated == "gated" else 2
        block = self.embed * (4 * self.embed + matrices * self.mlp_size)
        weights = self.num_layers * block + self.embed * (self.embed + self.vocab_size)
        keys = sum(min(seq_len, 2 * self.window - 1) if local else seq_len for local in self.local_layers)
        return 6.0 * weights + 12.0 * self.embed * keys


_NAMES = {
    "activation": tuple(ACTIVATIONS),
    "gated": ("plain", "gated"),
    "norm_position": ("post", "pre"),
    "positions": ("learned", "rotary"),
    "pooler": ("none", "tanh"),
    "biases": ("all", "none"),
}
_AT_LEAST = {
    "num_heads": 1,
    "mlp": 0,
    "max_positions": 1,
    "window": 0,
    "types": 0,
}


def _check_numbers(config: EncoderConfig) -> None:
    checks.numbers(config, _AT_LEAST, ("norm_eps", "rope_base", "local_rope_base"))
    if config.embed % config.num_heads:
        raise UserError(f"model.num_heads={config.num_heads}: must divide model.embed={config.embed}")
    if config.positions == "rotary" and config.head_size % 2:
        raise UserError(
            f"model.num_heads={config.num_heads}: rotary positions pair dimensions, so a head's width "
            f"{config.head_size} must be even"
        )
    if config.window and config.global_every < 2:
        raise UserError(
            f"model.global_every={config.global_every}: must be at least 2 with a window; for layers that all see all, "
            "set model.window=0"
        )
