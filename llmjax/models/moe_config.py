"""Settings of a decoder whose feed-forward layers are mixtures of experts, their limits, and what they cost."""

import dataclasses
from typing import ClassVar

from llmjax.errors import UserError, suggest
from llmjax.models.decoder_config import DecoderConfig
from llmjax.nn.moe import GLU_ACTIVATIONS, Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig(DecoderConfig):
    """A decoder in whose layers each token goes through a few of many feed-forward networks. No token is ever dropped.

    Every field of the family "decoder" holds here too, with two limits: `gated` is gated, and where `latent` is set,
    heads have no num_kv_heads, sinks, qk_norm, score_softcap, window or biases. Added are:

    objectives          (of the class) objectives that it can be trained with
    generates           (of the class) whether it continues text

    family              "moe"
    num_experts         number of experts in a layer
    experts_per_token   number of them that a token goes through
    expert_mlp          width of an expert; 0: mlp
    expert_activation   of the experts: one that `activation` can be, or clamped_swiglu (as in gpt-oss); "": activation
    shared_experts      experts that every token goes through, whatever the router says, as one network of their width
                        in all
    dense_layers        so many first layers have a plain feed-forward network of width mlp
    router              softmax (over all experts) or sigmoid (each expert by itself)
    renormalise         whether the weights of a token's experts sum to 1 (Mixtral, gpt-oss) or stay what they are
    router_scale        what the weights are multiplied by last
    router_groups       experts lie in so many groups of neighbours, and
    router_top_groups   a token's experts come from so many of them: those whose two best scores sum highest. 1 and 1:
                        no groups
    expert_bias     whether a bias takes part in choosing experts, though not in weighing them, which the optimizer
                        moves against each expert's load by optimizer.expert_bias_update_rate an update (DeepSeek-V3)
    balance_loss        coefficient of the balance loss, which is 1 for an evenly loaded layer; of each row and layer,
                        weighed by the row's tokens, summed over layers
    router_z_loss       coefficient of the squared log of the router's partition function, of each token and layer,
                        summed over layers
    latent              width of the vector that keys and values of all heads are made from, and which is all that is
                        cached (multi-head latent attention); 0: grouped-query attention
    query_latent        width of the vector that queries are made from; 0: they are made from the residual stream
    rope_dim            width of the rotated part of a query, beside head_dim, which is not rotated; its key is one for
                        all heads
    value_dim           width of a head's value; 0: head_dim. Those four are unused without `latent`
    """

    objectives: ClassVar[tuple[str, ...]] = ("causal", "prefix", "fim")
    generates: ClassVar[bool] = True

    family: str = "moe"
    num_experts: int = 8
    experts_per_token: int = 2
    expert_mlp: int = 0
    expert_activation: str = ""
    shared_experts: int = 0
    dense_layers: int = 0
    router: str = "softmax"
    renormalise: bool = True
    router_scale: float = 1.0
    router_groups: int = 1
    router_top_groups: int = 1
    expert_bias: bool = False
    balance_loss: float = 0.01
    router_z_loss: float = 0.001
    latent: int = 0
    query_latent: int = 0
    rope_dim: int = 64
    value_dim: int = 0

    def __post_init__(self):
        super().__post_init__()
        _check_experts(self)
        _check_router(self)
        _check_latent(self)

    @property
    def expert_size(self) -> int:
        """Width of an expert."""
        return self.expert_mlp or self.mlp_size

    @property
    def value_size(self) -> int:
        """Width of a head's value."""
        return self.value_dim or self.head_size

    @property
    def latent_scale(self) -> float:
        """What latent attention multiplies its scores by, where score_scale is 0."""
        return (self.head_size + self.rope_dim) ** -0.5

    @property
    def routing(self) -> Routing:
        """How a layer's router chooses."""
        return Routing(
            experts=self.num_experts,
            chosen=self.experts_per_token,
            score=self.router,
            renormalise=self.renormalise,
            scale=self.router_scale,
            groups=self.router_groups,
            top_groups=self.router_top_groups,
        )

    def check(self, *, seq_len: int, tensor: int) -> None:
        """UserError where the model cannot read rows of `seq_len` tokens, or cannot be cut over `tensor` devices."""
        super().check(seq_len=seq_len, tensor=1)
        counts = {"num_heads": self.num_heads, "expert_mlp": self.expert_size}
        counts |= {} if self.latent else {"num_kv_heads": self.kv_heads}
        counts |= {"mlp": self.mlp_size} if self.dense_layers else {}
        for field, count in counts.items():
            if count % tensor:
                raise UserError(f"mesh.tensor={tensor}: must divide model.{field}={count}")

    @property
    def matmul_params(self) -> int:
        """Number of weights that one token is multiplied with: of the experts, those that it goes through."""
        if self.latent:
            per_head = self.head_size + self.rope_dim
            from_query = self.embed * (self.query_latent or self.num_heads * per_head)
            from_query += self.query_latent * self.num_heads * per_head
            from_latent = self.latent * self.num_heads * (self.head_size + self.value_size)
            attention = from_query + self.embed * (self.latent + self.rope_dim) + from_latent
            attention += self.num_heads * self.value_size * self.embed
        else:
            attention = self.embed * (2 * self.num_heads + 2 * self.kv_heads) * self.head_size
        experts = self.experts_per_token + self.shared_experts
        moe = self.embed * (self.num_experts + 3 * experts * self.expert_size)
        dense = 3 * self.embed * self.mlp_size
        layers = self.num_layers * attention + (self.num_layers - self.dense_layers) * moe + self.dense_layers * dense
        return layers + self.embed * self.vocab_size

    @property
    def score_width(self) -> int:
        """Multiplications that a head does for each key it sees."""
        return self.head_size + self.rope_dim + self.value_size if self.latent else super().score_width

    @property
    def inactive_params(self) -> int:
        """Number of parameters that one token does not meet: those of the experts that it does not go through."""
        one = 3 * self.embed * self.expert_size
        one += 2 * self.expert_size + self.embed if self.biases == "all" else 0
        return (self.num_layers - self.dense_layers) * (self.num_experts - self.experts_per_token) * one


def _check_experts(config: MoeConfig) -> None:
    at_least = dict(num_experts=1, experts_per_token=1, expert_mlp=0, shared_experts=0, dense_layers=0)
    for field, least in at_least.items():
        if getattr(config, field) < least:
            raise UserError(f"model.{field}={getattr(config, field)}: must be at least {least}")
    if config.gated != "gated":
        raise UserError(f"model.gated={config.gated!r}: experts are gated; set 'gated'")
    names = ("", *GLU_ACTIVATIONS)
    if config.expert_activation not in names:
        near = suggest(config.expert_activation, names)
        raise UserError(
            f"model.expert_activation={config.expert_activation!r}: choose one of {', '.join(GLU_ACTIVATIONS)}, or ''{near}"
        )
    if config.dense_layers >= config.num_layers:
        raise UserError(
            f"model.dense_layers={config.dense_layers}: must be below model.num_layers={config.num_layers}; "
            "a model without experts is of model.family='decoder'"
        )


def _check_router(config: MoeConfig) -> None:
    if config.router not in ("softmax", "sigmoid"):
        raise UserError(f"model.router={config.router!r}: choose softmax or sigmoid")
    for field in ("balance_loss", "router_z_loss"):
        if not getattr(config, field) >= 0:
            raise UserError(f"model.{field}={getattr(config, field)}: must be at least 0")
    if not config.router_scale > 0:
        raise UserError(f"model.router_scale={config.router_scale}: must be above 0")
    groups, top = config.router_groups, config.router_top_groups
    if groups < 1 or config.num_experts % groups:
        raise UserError(f"model.router_groups={groups}: must divide model.num_experts={config.num_experts}")
    if not 1 <= top <= groups:
        raise UserError(f"model.router_top_groups={top}: must be from 1 to model.router_groups={groups}")
    if groups > 1 and config.num_experts // groups < 2:
        raise UserError(f"model.router_groups={groups}: leaves a group one expert; it is judged by its best two")
    open_experts = config.num_experts // groups * top
    if config.experts_per_token > open_experts:
        raise UserError(f"model.experts_per_token={config.experts_per_token}: only {open_experts} are open to a token")


def _check_latent(config: MoeConfig) -> None:
    for field in ("latent", "query_latent", "value_dim"):
        if getattr(config, field) < 0:
            raise UserError(f"model.{field}={getattr(config, field)}: must be at least 0")
    if not config.latent:
        for field in ("query_latent", "value_dim"):
            if getattr(config, field):
                raise UserError(f"model.{field}={getattr(config, field)}: unused without model.latent; leave it 0")
        return
    if config.rope_dim < 2 or config.rope_dim % 2:
        raise UserError(f"model.rope_dim={config.rope_dim}: rotary positions pair dimensions, so it must be even")
    defaults = {field.name: field.default for field in dataclasses.fields(MoeConfig)}
    for field in ("num_kv_heads", "sinks", "qk_norm", "score_softcap", "window", "biases", "positions"):
        if getattr(config, field) != defaults[field]:
            raise UserError(
                f"model.{field}={getattr(config, field)!r}: latent attention has no such thing; leave it at "
                f"{defaults[field]!r}, or set model.latent=0"
            )
