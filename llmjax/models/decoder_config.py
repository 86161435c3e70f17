"""The decoder's settings, their limits, and what they cost."""

import dataclasses
from typing import ClassVar

from llmjax.config import UserError, suggest
from llmjax.nn.attention import KERNELS
from llmjax.nn.mlp import ACTIVATIONS
from llmjax.nn.norm import NORMS
from llmjax.nn.stack import REMAT


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only transformer.

    objectives      (of the class) objectives that a decoder can be trained with
    generates       (of the class) whether it continues text

    family          "decoder"
    vocab_size      number of token ids; 0: the tokenizer's, filled in by the run
    vocab_multiple  embedding and head are padded to a multiple of this many ids, so that they can be sharded;
                    padding is never predicted
    num_layers      number of blocks
    embed           width of the residual stream
    num_heads       number of query heads
    num_kv_heads    number of key and value heads, a divisor of num_heads; 0: num_heads
    head_dim        width of a head; 0: embed / num_heads
    mlp             width of the feed-forward layer; 0: 4 embed when plain, 8/3 embed rounded up to a multiple of 128
                    when gated
    activation      of the feed-forward layer: silu, gelu (by erf), gelu_tanh, relu, relu2 (relu squared)
    gated           feed-forward layer: gated (two matrices in, one out) or plain (one in, one out)
    norm            rmsnorm or layernorm
    norm_eps        added to the variance in a norm
    norm_position   pre (before each sub-block, and once at the end) or post (after each residual addition)
    positions       rotary (in every attention) or learned (added to the token embedding)
    rope_base       base of the rotary frequencies; unused with learned positions
    max_positions   number of learned positions; the longest sequence a learned table can read; unused with rotary
                    positions
    tied            tied (the head is the token embedding) or untied (a matrix of its own)
    biases          all (every linear map of the blocks, and layernorm) or none
    dropout         rate after the embedding and at the end of each sub-block; from 0 to below 1
    scan            True: blocks compiled once and scanned; False: unrolled, for debugging and for short stacks
    remat           what the backward pass keeps of a block: none (everything), dots (matmul outputs), attention (its
                    output), full (nothing)
    attention       kernel: dot
    dtype           type of activations and matmuls: float32 or bfloat16 (softmax, norms and logits are always float32)
    param_dtype     type in which parameters are stored: float32 or bfloat16
    """

    objectives: ClassVar[tuple[str, ...]] = ("causal", "prefix", "fim")
    generates: ClassVar[bool] = True

    family: str = "decoder"
    vocab_size: int = 0
    vocab_multiple: int = 128
    num_layers: int = 4
    embed: int = 256
    num_heads: int = 4
    num_kv_heads: int = 0
    head_dim: int = 0
    mlp: int = 0
    activation: str = "silu"
    gated: str = "gated"
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    norm_position: str = "pre"
    positions: str = "rotary"
    rope_base: float = 10_000.0
    max_positions: int = 1024
    tied: str = "untied"
    biases: str = "none"
    dropout: float = 0.0
    scan: bool = True
    remat: str = "none"
    attention: str = "dot"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        _check_names(self)
        _check_numbers(self)

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.head_dim or self.embed // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Width of the feed-forward layer."""
        return self.mlp or (4 * self.embed if self.gated == "plain" else _round_up(-(-8 * self.embed // 3), 128))

    @property
    def branch_scale(self) -> float:
        """First scale of what each of the 2 num_layers residual branches adds, so that the sum has variance 1."""
        return (2 * self.num_layers) ** -0.5

    @property
    def padded_vocab(self) -> int:
        """Number of rows of the embedding."""
        return _round_up(self.vocab_size, self.vocab_multiple)

    @property
    def longest(self) -> int | None:
        """The longest sequence that the model can read; None: no limit."""
        return self.max_positions if self.positions == "learned" else None

    def check(self, *, seq_len: int, tensor: int) -> None:
        """UserError where the model cannot read rows of `seq_len` tokens, or cannot be cut over `tensor` devices."""
        if self.longest is not None and seq_len > self.longest:
            raise UserError(
                f"data.seq_len={seq_len}: the model has only model.max_positions={self.max_positions} learned positions"
            )
        counts = {"num_heads": self.num_heads, "num_kv_heads": self.kv_heads, "mlp": self.mlp_size}
        for field, count in counts.items():
            if count % tensor:
                raise UserError(f"mesh.tensor={tensor}: must divide model.{field}={count}")

    def flops_per_token(self, seq_len: int) -> float:
        """Model flops of one training token, for model flops utilisation.

        6 flops for each weight of a matmul (2 forward, 4 backward; the head counts, the embedding lookup does not),
        plus attention's two products, 12 layers heads head_dim seq_len, halved because a causal model needs half of
        them. Recomputation is not counted. (Chowdhery et al., 2022, PaLM, appendix B, arXiv 2204.02311, which does not
        halve.)
        """
        heads = 2 * self.num_heads + 2 * self.kv_heads
        matrices = 3 if self.gated == "gated" else 2
        block = self.embed * (heads * self.head_size + matrices * self.mlp_size)
        weights = self.num_layers * block + self.embed * self.vocab_size
        return 6.0 * weights + 6.0 * self.num_layers * self.num_heads * self.head_size * seq_len


_NAMES = {
    "family": ("decoder",),
    "activation": tuple(ACTIVATIONS),
    "gated": ("gated", "plain"),
    "norm": tuple(NORMS),
    "norm_position": ("pre", "post"),
    "positions": ("rotary", "learned"),
    "tied": ("tied", "untied"),
    "biases": ("none", "all"),
    "remat": tuple(REMAT),
    "attention": tuple(KERNELS),
    "dtype": ("float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
}
_AT_LEAST = {
    "vocab_size": 0,
    "vocab_multiple": 1,
    "num_layers": 1,
    "embed": 1,
    "num_heads": 1,
    "num_kv_heads": 0,
    "head_dim": 0,
    "mlp": 0,
    "max_positions": 1,
}


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _check_names(config: DecoderConfig) -> None:
    for field, allowed in _NAMES.items():
        value = getattr(config, field)
        if value not in allowed:
            raise UserError(f"model.{field}={value!r}: choose one of {', '.join(allowed)}{suggest(value, allowed)}")


def _check_numbers(config: DecoderConfig) -> None:
    for field, least in _AT_LEAST.items():
        if getattr(config, field) < least:
            raise UserError(f"model.{field}={getattr(config, field)}: must be at least {least}")
    if not 0 <= config.dropout < 1:
        raise UserError(f"model.dropout={config.dropout}: must be at least 0 and below 1")
    for field in ("norm_eps", "rope_base"):
        if not getattr(config, field) > 0:
            raise UserError(f"model.{field}={getattr(config, field)}: must be above 0")
    if config.num_heads % config.kv_heads:
        raise UserError(f"model.num_kv_heads={config.kv_heads}: must divide model.num_heads={config.num_heads}")
    if not config.head_dim and config.embed % config.num_heads:
        raise UserError(
            f"model.num_heads={config.num_heads}: must divide model.embed={config.embed}, or set model.head_dim"
        )
    if config.positions == "rotary" and config.head_size % 2:
        raise UserError(f"model.head_dim={config.head_size}: rotary positions pair dimensions, so it must be even")
