"""The encoder-decoder's settings, their limits, and what they cost."""

import dataclasses
from typing import ClassVar

from llmjax.errors import UserError
from llmjax.models import checks, parametrization
from llmjax.nn.mlp import ACTIVATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncDecConfig:
    """An encoder-decoder transformer: T5, T5 v1.1 and Flan-T5. (Raffel et al., 2020, arXiv 1910.10683)

    The encoder reads the source in both directions; the decoder reads the targets before each place, and attends to the
    source of its own segment. Norms are RMS norms, before each sub-block and at the end of each stack; no linear map
    has a bias; positions enter by a learned bias for the distance, one table for the encoder and one for the decoder.

    objectives          (of the class) objectives that an encoder-decoder can be trained with
    generates           (of the class) whether it continues text: it reads a prompt as its source and writes the target

    family              "encdec"
    vocab_size          number of token ids; 0: the tokenizer's, filled in by the run
    vocab_multiple      embedding and head are padded to a multiple of this many ids, so that they can be sharded;
                        padding is never predicted
    start_id            the token that the decoder reads first; -1: the tokenizer's, filled in by the run
    num_layers          number of blocks of the encoder
    num_decoder_layers  number of blocks of the decoder; 0: num_layers
    embed               width of the residual streams
    num_heads           number of heads of every attention
    head_dim            width of a head; 0: embed / num_heads
    mlp                 width of the feed-forward layers; 0: 4 embed when plain, 8/3 embed rounded up to a multiple of
                        128 when gated
    activation          of the feed-forward layers: silu, gelu (by erf), gelu_tanh, relu, relu2 (relu squared)
    gated               feed-forward layers: gated (two matrices in, one out) or plain (one in, one out)
    norm_eps            added to the mean square in a norm
    relative_buckets    number of biases that a head has for distances
    relative_distance   distance from which all share the last bucket
    tied                tied (the head is the token embedding, which reads hidden states times embed^-1/2) or untied (a
                        matrix of its own, which reads them as they are)
    parametrization     standard, or mup: rates tuned at width base_embed serve every width (docs/optimizers.md)
    base_embed          mup: the width at which both parametrizations are the same
    dropout             rate after the embeddings, at the end of each sub-block and after the last norms; from 0 to
                        below 1
    scan                True: blocks compiled once and scanned; False: unrolled, for debugging and for short stacks
    remat               what the backward pass keeps of a block: none (everything), dots (matmul outputs), attention
                        (its outputs), full (nothing)
    dtype               type of activations and matmuls: float32 or bfloat16 (softmax, norms and logits are always
                        float32)
    param_dtype         type in which parameters are stored: float32 or bfloat16
    """

    objectives: ClassVar[tuple[str, ...]] = ("span", "ul2", "prefix")
    generates: ClassVar[bool] = True

    family: str = "encdec"
    vocab_size: int = 0
    vocab_multiple: int = 128
    start_id: int = -1
    num_layers: int = 4
    num_decoder_layers: int = 0
    embed: int = 256
    num_heads: int = 4
    head_dim: int = 0
    mlp: int = 0
    activation: str = "gelu_tanh"
    gated: str = "gated"
    norm_eps: float = 1e-6
    relative_buckets: int = 32
    relative_distance: int = 128
    tied: str = "untied"
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
    def decoder_layers(self) -> int:
        """Number of blocks of the decoder."""
        return self.num_decoder_layers or self.num_layers

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.head_dim or self.embed // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Width of the feed-forward layers."""
        return self.mlp or (4 * self.embed if self.gated == "plain" else checks.round_up(-(-8 * self.embed // 3), 128))

    @property
    def padded_vocab(self) -> int:
        """Number of rows of the embedding."""
        return checks.round_up(self.vocab_size, self.vocab_multiple)

    @property
    def max_seq_len(self) -> None:
        """The longest sequence that the model can read; None: no limit."""
        return None

    def check(self, *, seq_len: int, tensor: int) -> None:
        """UserError where the model cannot be cut over `tensor` devices; rows may be of any length."""
        for field, count in {"num_heads": self.num_heads, "mlp": self.mlp_size}.items():
            if count % tensor:
                raise UserError(f"mesh.tensor={tensor}: must divide model.{field}={count}")

    def flops_per_token(self, seq_len: int, target_len: int = 0) -> float:
        """Model flops of one scored target, for model flops utilisation: the source tokens that go with it included.

        Rows have `seq_len` places for the source and `target_len` for the target (0: as many), equally full, so that a
        target bears seq_len / target_len source tokens. So it is in span corruption: 15% of 568 tokens in spans of 3
        make a source of 512 and a target of 114, and each target pays for 4.5 source tokens.

        6 flops for each weight of a matmul (2 forward, 4 backward) that a token meets. A target meets the decoder's
        blocks, but for the keys and values of the cross-attention, and the head; a source token meets the encoder's
        blocks, and every decoder block's keys and values of it. Attention's two products are 12 layers heads head_dim
        times the length of what is attended to, halved where it is causal. Recomputation is not counted. (Chowdhery et
        al., 2022, PaLM, appendix B, arXiv 2204.02311, which does not halve.)
        """
        target_len = target_len or seq_len
        width = self.num_heads * self.head_size
        projection = self.embed * width
        mlp = (3 if self.gated == "gated" else 2) * self.embed * self.mlp_size
        layers, decoder_layers = self.num_layers, self.decoder_layers
        source = 6.0 * (layers * (4 * projection + mlp) + decoder_layers * 2 * projection)
        source += 12.0 * layers * width * seq_len
        target = 6.0 * (decoder_layers * (6 * projection + mlp) + self.embed * self.vocab_size)
        target += decoder_layers * width * (6.0 * target_len + 12.0 * seq_len)
        return target + source * seq_len / target_len


_NAMES = {
    "activation": tuple(ACTIVATIONS),
    "gated": ("gated", "plain"),
    "tied": ("tied", "untied"),
}
_AT_LEAST = {
    "start_id": -1,
    "num_decoder_layers": 0,
    "num_heads": 1,
    "head_dim": 0,
    "mlp": 0,
    "relative_buckets": 4,
}


def _check_numbers(config: EncDecConfig) -> None:
    checks.numbers(config, _AT_LEAST, ("norm_eps",))
    if config.relative_distance <= config.relative_buckets // 2:
        raise UserError(
            f"model.relative_distance={config.relative_distance}: must be above half of "
            f"model.relative_buckets={config.relative_buckets}, which hold one distance each"
        )
    if config.vocab_size and config.start_id >= config.vocab_size:
        raise UserError(f"model.start_id={config.start_id}: must be below model.vocab_size={config.vocab_size}")
    if not config.head_dim and config.embed % config.num_heads:
        raise UserError(
            f"model.num_heads={config.num_heads}: must divide model.embed={config.embed}, or set model.head_dim"
        )
