"""The config of decoder-only models: fields, checks and cost."""

import dataclasses
from typing import ClassVar

from llmjax.data.config import LABELLED, SEVERAL_TEXTS
from llmjax.errors import UserError
from llmjax.models.base import SingleStackConfig
from llmjax.nn import rotary
from llmjax.nn.norm import NORMS
from llmjax.nn.rotary import SCALINGS


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(SingleStackConfig):
    """A decoder-only transformer.

    family          "decoder"
    embed_multiplier  what a token's embedding is multiplied by as it enters the stream; Gemma: sqrt(embed)
    num_kv_heads    number of key and value heads, a divisor of num_heads; 0: num_heads
    score_scale     what the products of queries and keys are multiplied by; 0: 1 / sqrt(head_dim)
    score_softcap   attention scores become c tanh(score / c); 0: they are not capped
    attention_sinks whether each head has a learned score that takes part in the softmax and has no value (gpt-oss)
    qk_norm         norm of queries and keys before they are rotated: none, head (each head by itself, as in Qwen3) or
                    all (all heads of the layer together, as in OLMo 2)
    norm            rmsnorm, rmsnorm1p (multiplies by 1 + scale, as Gemma does) or layernorm
    norm_position   of each sub-block f with residual stream x: pre (x + f(norm(x)), as in Llama), both (x +
                    norm(f(norm(x))), as in Gemma), inner (x + norm(f(x)), as in OLMo 2) or post (norm(x + f(x)), as in
                    the first transformers); all but post have one more norm at the end
    rope_scaling    how frequencies are lowered so that longer texts can be read: none, linear, llama3 or yarn; never in
                    local layers with a base of their own. This and the next fields are unused with learned positions
    rope_factor     frequencies are divided by it: all (linear), or the slow ones (llama3, yarn)
    rope_original   llama3, yarn: number of positions of the text that the model was first trained on
    rope_low        llama3, yarn: frequencies that turn less often than this over rope_original positions are divided;
    rope_high       those that turn more often than this are kept; in between they are blended. 0: the paper's (1 and 4
                    for llama3, 1 and 32 for yarn)
    rope_truncate   yarn: the blend begins and ends at whole dimensions
    rope_attention_factor  yarn: what cos and sin are multiplied by; 0: 0.1 log(rope_factor) + 1
    tie_embeddings  whether the head is the token embedding instead of a matrix of its own
    logit_softcap   logits become c tanh(logit / c); 0: they are not capped
    biases          all (every linear map of the blocks, and layernorm), attention (its four linear maps) or none
    """

    objectives: ClassVar[tuple[str, ...]] = ("causal", "prefix", "fim", *LABELLED, *SEVERAL_TEXTS)
    choices: ClassVar = {
        **SingleStackConfig.choices,
        "qk_norm": ("none", "head", "all"),
        "norm": tuple(NORMS),
        "norm_position": ("pre", "both", "inner", "post"),
        "rope_scaling": ("none", *SCALINGS),
        "biases": ("none", "attention", "all"),
    }
    minimums: ClassVar = {
        **SingleStackConfig.minimums,
        "num_kv_heads": 0,
        "score_scale": 0,
        "score_softcap": 0,
        "rope_factor": 1,
        "rope_original": 0,
        "rope_low": 0,
        "rope_high": 0,
        "rope_attention_factor": 0,
        "logit_softcap": 0,
    }
    above_zero: ClassVar = (*SingleStackConfig.above_zero, "embed_multiplier")

    family: str = "decoder"
    embed_multiplier: float = 1.0
    num_kv_heads: int = 0
    score_scale: float = 0.0
    score_softcap: float = 0.0
    attention_sinks: bool = False
    qk_norm: str = "none"
    norm: str = "rmsnorm"
    norm_position: str = "pre"
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_original: int = 0
    rope_low: float = 0.0
    rope_high: float = 0.0
    rope_truncate: bool = True
    rope_attention_factor: float = 0.0
    tie_embeddings: bool = False
    logit_softcap: float = 0.0
    biases: str = "none"

    def __post_init__(self):
        super().__post_init__()
        if self.num_heads % self.kv_heads:
            raise UserError(f"model.num_kv_heads={self.kv_heads}: must divide model.num_heads={self.num_heads}")
        _check_rope_scaling(self)

    @property
    def attention_needs(self) -> dict[str, str]:
        """Also another scale, a soft-cap and sinks."""
        fields = {"scale": "score_scale", "softcap": "score_softcap", "sinks": "attention_sinks"}
        values = {feature: (field, getattr(self, field)) for feature, field in fields.items()}
        return super().attention_needs | {f: f"model.{field}={value}" for f, (field, value) in values.items() if value}

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def scaling(self) -> rotary.Scaling | None:
        """How the rotary frequencies are lowered."""
        if self.rope_scaling == "none":
            return None
        low, high = SCALINGS[self.rope_scaling]
        yarn = self.rope_scaling == "yarn"
        return rotary.Scaling(
            kind=self.rope_scaling,
            factor=self.rope_factor,
            original=self.rope_original,
            low=self.rope_low or low,
            high=self.rope_high or high,
            truncate=self.rope_truncate,
            attention_factor=(self.rope_attention_factor or rotary.yarn_attention_factor(self.rope_factor))
            if yarn
            else 1.0,
        )

    def check(self, *, seq_len: int, tensor: int) -> None:
        """UserError where the model cannot read rows of `seq_len` tokens, or cannot be cut over `tensor` devices."""
        self.check_seq_len(seq_len)
        counts = {"num_heads": self.num_heads, "num_kv_heads": self.kv_heads, "mlp": self.mlp_size}
        self.check_tensor_shards(tensor, counts)

    @property
    def matmul_params(self) -> int:
        """Number of weights that one token is multiplied with; the head counts, the embedding lookup does not."""
        heads = 2 * self.num_heads + 2 * self.kv_heads
        matrices = 3 if self.gated else 2
        block = self.embed * (heads * self.head_size + matrices * self.mlp_size)
        return self.num_layers * block + self.embed * self.head_outputs

    def flops_per_token(self, seq_len: int) -> float:
        """Model flops of one training token, for model flops utilisation.

        6 flops for each weight of a matmul (2 forward, 4 backward), plus attention's two products, 12 heads head_dim
        for each key that a query sees: seq_len, or the window in local layers, less what a causal model has not to
        see, which without a window is half. Recomputation is not counted. (Chowdhery et al., 2022, PaLM, appendix B,
        arXiv 2204.02311, which does not halve.)
        """
        keys = 0.0
        for local in self.local_layers:
            reach = min(self.window, seq_len) if local else seq_len
            keys += reach - reach * reach / (2 * seq_len)
        return 6.0 * self.matmul_params + 6.0 * self.num_heads * self.score_width * keys

    @property
    def score_width(self) -> int:
        """Multiplications that a head does for each key it sees: one product with the key, one with the value."""
        return 2 * self.head_size


def _check_rope_scaling(config: DecoderConfig) -> None:
    if config.positions == "learned" and config.rope_scaling != "none":
        raise UserError(
            f"model.rope_scaling={config.rope_scaling!r}: model.positions='learned' has no rotary frequencies; set it "
            "to 'none'"
        )
    if config.rope_scaling in ("llama3", "yarn"):
        scaling = config.scaling
        assert scaling is not None
        if not config.rope_original:
            raise UserError(f"model.rope_original=0: model.rope_scaling={config.rope_scaling!r} needs it")
        if scaling.low >= scaling.high:
            raise UserError(f"model.rope_low={scaling.low}: must be below model.rope_high={scaling.high}")
    elif config.rope_original or config.rope_low or config.rope_high:
        raise UserError(
            f"model.rope_scaling={config.rope_scaling!r}: has no use for rope_original, rope_low and rope_high"
        )
    if config.rope_scaling == "none" and config.rope_factor != 1:
        raise UserError(f"model.rope_factor={config.rope_factor}: name a model.rope_scaling, or leave it 1")
    if config.rope_scaling != "yarn" and (config.rope_attention_factor or not config.rope_truncate):
        raise UserError("model.rope_attention_factor and model.rope_truncate: only model.rope_scaling='yarn' has them")
