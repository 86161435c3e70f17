"""Config fields that model families share, their checks, and width scaling (muP)."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import ClassVar

import jax

from llmjax.errors import UserError, suggest
from llmjax.nn.kernels import KERNELS, Choice, resolve_attention
from llmjax.nn.lora import LoraConfig
from llmjax.nn.mlp import ACTIVATIONS
from llmjax.nn.quantized import QUANTIZATIONS
from llmjax.nn.splash import LANES
from llmjax.nn.stack import REMAT
from llmjax.nn.task_head import TaskHead
from llmjax.parallel import axes

MAX_LAYERS = 1 << 12  # far above every published model
PARAMETRIZATIONS = ("standard", "mup")
_DTYPES = ("float32", "bfloat16")
_MUP_HEAD_DIM = 64  # the head width at which muP scales attention scores as the standard parametrization does


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseModelConfig:
    """Fields of every family.

    family          name of the family
    vocab_size      number of token ids; 0: the tokenizer's, filled in by the run
    vocab_multiple  embedding and head are padded to a multiple of this many ids, so that they can be sharded;
                    padding ids are never predicted
    num_outputs     outputs of a head for labels (classes, or 1 for a number) in place of the language model's; 0: none.
                    Filled in by the run
    num_layers      number of blocks
    embed           width of the residual stream
    norm_eps        added to the variance (rmsnorm: to the mean square) in a norm
    parametrization standard, or mup: learning rates tuned at width base_embed hold at every width (docs/optimizers.md)
    base_embed      mup: the width at which both parametrizations are equal
    dropout         rate after the embedding and at the end of each sub-block; from 0 to below 1
    scan            True: blocks are compiled once and scanned; False: unrolled, for debugging and for short stacks
    remat           what the backward pass keeps of a block besides its input; it computes everything else again:
                    auto               the fastest of these whose step fits in a device's memory; the start of a run
                                       compiles the step with each to find it (docs/plan.md)
                    none               everything, nothing is computed again
                    full               nothing
                    attention          the output of attention or of the recurrence
                    attention_qkv      also queries, keys and values, or the inputs of the recurrence
                    attention_mlp      attention, and the gate and up outputs of the feed-forward layer or the experts
                    attention_qkv_mlp  all of these
                    dots               the outputs of matmuls, but of no attention kernel
                    dots_attention     the outputs of matmuls and of attention
                    offload_input      attention; the input is in the host's memory until the backward pass
                    offload            attention, queries, keys, values and the input are in the host's memory. On a CPU
                                       device and host share one memory, so that both only copy
    quantization    type to which the linear layers of blocks quantize the operands of their matmuls, except those of
                    the parameters' gradients: none (not quantized), int8 (fast on TPU v5e and v5p) or float8 (for
                    chips that compute in it). Attention, recurrences, experts, their router and the head are not
                    quantized. Needs the extra `quantization`
    dtype           type of activations and matmuls: float32 or bfloat16 (softmax, norms, recurrent states, gates and
                    logits are always float32)
    param_dtype     type in which parameters are stored: float32 or bfloat16 (adapters are float32)
    lora            adapters of linear layers
    """

    # Facts of a family: the objectives that it supports, whether each position sees those after it, and whether an
    # encoder reads a source and a decoder writes targets.
    objectives: ClassVar[tuple[str, ...]] = ()
    bidirectional: ClassVar[bool] = False
    reads_source: ClassVar[bool] = False
    # Checks of fields: their allowed values, their smallest values, and those that must be above 0.
    choices: ClassVar[Mapping[str, Sequence[str]]] = {
        "remat": (*REMAT, "auto"),
        "quantization": QUANTIZATIONS,
        "dtype": _DTYPES,
        "param_dtype": _DTYPES,
        "parametrization": PARAMETRIZATIONS,
    }
    minimums: ClassVar[Mapping[str, float]] = {
        "vocab_size": 0,
        "num_outputs": 0,
        "vocab_multiple": 1,
        "num_layers": 1,
        "embed": 1,
        "base_embed": 1,
        "dropout": 0,
    }
    above_zero: ClassVar[tuple[str, ...]] = ("norm_eps",)

    family: str = ""
    vocab_size: int = 0
    num_outputs: int = 0
    vocab_multiple: int = 128
    num_layers: int = 4
    embed: int = 256
    norm_eps: float = 1e-5
    parametrization: str = "standard"
    base_embed: int = 256
    dropout: float = 0.0
    scan: bool = True
    remat: str = "none"
    quantization: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"
    lora: LoraConfig = LoraConfig()

    def __post_init__(self):
        for field, allowed in {"family": (type(self).family,), **self.choices}.items():
            value = getattr(self, field)
            if value not in allowed:
                listed = ", ".join(name or "''" for name in allowed)
                raise UserError(f"model.{field}={value!r}: choose one of {listed}{suggest(value, allowed)}")
        for field, minimum in self.minimums.items():
            if not getattr(self, field) >= minimum:
                raise UserError(f"model.{field}={getattr(self, field)}: must be at least {minimum}")
        if not self.dropout < 1:
            raise UserError(f"model.dropout={self.dropout}: must be at least 0 and below 1")
        if self.num_layers > MAX_LAYERS:
            raise UserError(f"model.num_layers={self.num_layers}: must be at most {MAX_LAYERS}")
        for field in self.above_zero:
            if not getattr(self, field) > 0:
                raise UserError(f"model.{field}={getattr(self, field)}: must be above 0")

    @property
    def padded_vocab(self) -> int:
        """Number of rows of the embedding."""
        return round_up(self.vocab_size, self.vocab_multiple)

    @property
    def generates(self) -> bool:
        """Whether the model continues text."""
        return not self.num_outputs and not self.bidirectional

    @property
    def head_outputs(self) -> int:
        """Outputs of the head, without padding: those for labels, or the vocabulary."""
        return self.num_outputs or self.vocab_size

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

    def choose_attention(self, seq_len: int, *, has_prefix: bool = False) -> Choice | None:
        """The attention kernel for rows of `seq_len` tokens on this platform; None: the family has no attention."""
        return None

    def mup_score_scale(self, standard: float, head_dim: int) -> float:
        """Scale of the attention scores, given the `standard` one: muP's equals it at a head_dim of 64."""
        return standard if self.parametrization != "mup" else standard * (_MUP_HEAD_DIM / head_dim) ** 0.5

    def check_tensor_shards(self, tensor: int, sizes: Mapping[str, int]) -> None:
        """UserError where a size (field -> size) cannot be split over `tensor` devices."""
        for field, size in sizes.items():
            if size % tensor:
                raise UserError(f"mesh.tensor={tensor}: must divide model.{field}={size}")

    def check_mesh(self, mesh: Mapping[str, int]) -> None:
        """UserError where the family has no use for an axis (axis -> size) of a mesh."""
        if (size := mesh.get("expert", 1)) > 1:
            raise UserError(
                f"mesh.expert={size}: model.family={self.family!r} has no experts; set it to 1 and use mesh.fsdp"
            )

    def check_seq_len(self, seq_len: int) -> None:
        """UserError where the model cannot read rows of `seq_len` tokens."""
        if self.max_seq_len is not None and seq_len > self.max_seq_len:
            raise UserError(
                f"data.seq_len={seq_len}: the model has only model.max_positions={self.max_seq_len} learned positions"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(BaseModelConfig):
    """Fields of every family with attention.

    num_heads       number of (query) heads
    head_dim        width of a head; 0: embed / num_heads
    mlp             width of the feed-forward layer; 0: 4 embed, or if gated 8/3 embed rounded up to a multiple of 128
    activation      of the feed-forward layer: silu, gelu (by erf), gelu_tanh, relu, relu2 (relu squared)
    gated           feed-forward layer: True: two matrices in, one out; False: one in, one out
    attention       kernel: dot (all scores at once, for short rows), blockwise (memory linear in the length of a row,
                    and faster for long ones), splash (TPU), cudnn (GPU), or auto, which chooses by platform, length and
                    what the model needs; their results are equal but for rounding
    attention_block queries and keys that splash and blockwise compute at a time, a multiple of 128; 0: the kernel's
                    default
    """

    choices: ClassVar = {
        **BaseModelConfig.choices,
        "activation": tuple(ACTIVATIONS),
        "attention": ("auto", *KERNELS),
    }
    minimums: ClassVar = {
        **BaseModelConfig.minimums,
        "num_heads": 1,
        "head_dim": 0,
        "mlp": 0,
        "attention_block": 0,
    }

    num_heads: int = 4
    head_dim: int = 0
    mlp: int = 0
    activation: str = "silu"
    gated: bool = True
    attention: str = "auto"
    attention_block: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not self.head_dim and self.embed % self.num_heads:
            raise UserError(
                f"model.num_heads={self.num_heads}: must divide model.embed={self.embed}, or set model.head_dim"
            )
        if self.attention_block % LANES:
            raise UserError(f"model.attention_block={self.attention_block}: must be a multiple of {LANES}")
        if self.attention != "auto":
            unsupported = KERNELS[self.attention].find_unsupported(self.attention_needs)
            if unsupported:
                raise UserError(f"model.attention={self.attention!r}: {unsupported}; set it to 'auto' or 'blockwise'")

    @property
    def attention_needs(self) -> dict[str, str]:
        """Features of `nn.kernels.FEATURES` that the model uses, each with the setting that asks for it."""
        needs = {"float32": "model.dtype='float32'"} if self.dtype == "float32" else {}
        return needs | ({"wide_heads": f"model.head_dim={self.head_size}"} if self.head_size > 128 else {})

    def choose_attention(self, seq_len: int, *, has_prefix: bool = False) -> Choice:
        """The attention kernel for rows of `seq_len` tokens on the devices of the mesh.

        has_prefix   whether the objective gives each document a prefix that all its positions see

        Raises UserError where the configured kernel cannot be used.
        """
        needs = self.attention_needs
        if has_prefix:
            needs["prefix"] = "objective.name='prefix'"
        if (shards := axes.num_shards("seq")) > 1:
            needs["sequence"] = f"mesh.sequence={shards}"
        return resolve_attention(self.attention, needs, axes.device().platform, seq_len)

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.head_dim or self.embed // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Width of the feed-forward layer."""
        if self.mlp:
            return self.mlp
        return round_up(-(-8 * self.embed // 3), 128) if self.gated else 4 * self.embed


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleStackConfig(TransformerConfig):
    """Fields of decoders and encoders: one stack of layers, with learned or rotary positions and local attention.

    positions          rotary (in every attention) or learned (added to the token embedding)
    max_positions      number of learned positions, and so the longest sequence; unused with rotary positions
    rope_base          base of the rotary frequencies; unused with learned positions
    rope_local_base    base of the rotary frequencies in local layers; 0: rope_base
    window             a local layer attends only to tokens less than this many positions away; 0: no layer is local
    attention_pattern  one letter a layer, repeated over the layers: l (local) or g (global); unused without a window
    """

    choices: ClassVar = {**TransformerConfig.choices, "positions": ("rotary", "learned")}
    minimums: ClassVar = {**TransformerConfig.minimums, "max_positions": 1, "rope_local_base": 0, "window": 0}
    above_zero: ClassVar = (*TransformerConfig.above_zero, "rope_base")

    positions: str = "rotary"
    max_positions: int = 1024
    rope_base: float = 10_000.0
    rope_local_base: float = 0.0
    window: int = 0
    attention_pattern: str = "l"

    def __post_init__(self):
        if not self.attention_pattern or set(self.attention_pattern) - set("lg"):
            raise UserError(
                f"model.attention_pattern={self.attention_pattern!r}: one letter a layer, l (local) or g (global), "
                "such as 'lg'"
            )
        super().__post_init__()
        if self.positions == "rotary" and self.head_size % 2:
            raise UserError(f"model.head_dim={self.head_size}: rotary positions pair dimensions, so it must be even")
        if self.positions == "learned" and self.rope_local_base:
            raise UserError(
                f"model.rope_local_base={self.rope_local_base}: model.positions='learned' has no rotary frequencies; "
                "set it to 0"
            )
        if self.rope_local_base and not any(self.local_layers):
            raise UserError(f"model.rope_local_base={self.rope_local_base}: no layer is local; set model.window")

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """For each layer whether it attends only to its window."""
        pattern = self.attention_pattern if self.window else "g"
        return tuple(pattern[layer % len(pattern)] == "l" for layer in range(self.num_layers))

    @property
    def attention_needs(self) -> dict[str, str]:
        """Also windows, and windows that differ between layers."""
        local = self.local_layers
        window = {"window": f"model.window={self.window}"} if any(local) else {}
        pattern = {"pattern": f"model.attention_pattern={self.attention_pattern!r}"} if len(set(local)) > 1 else {}
        return super().attention_needs | window | pattern

    @property
    def max_seq_len(self) -> int | None:
        """The longest sequence that the model can read; None: no limit."""
        return self.max_positions if self.positions == "learned" else None

    @property
    def residual_init_scale(self) -> float:
        """First scale of what each of the 2 num_layers residual branches adds, so that the sum has variance 1."""
        return (2 * self.num_layers) ** -0.5


def make_task_head(config: BaseModelConfig, key: jax.Array) -> TaskHead | None:
    """The head for labels, if the config has outputs for it. `key` is that of the model.

    That of a causal model has no bias, as in transformers, so that it can be exported.
    """
    if not config.num_outputs:
        return None
    scale = 1 / config.width_multiplier
    key = jax.random.fold_in(key, 1)
    bias = config.bidirectional
    return TaskHead(key, config.embed, config.num_outputs, bias=bias, scale=scale, dtype=config.param_dtype)


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple
