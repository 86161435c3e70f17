"""Config of the optimizer: name, schedule and hyperparameters, with their checks."""

from collections.abc import Callable
import dataclasses
from typing import Any

from llmjax.errors import UserError, suggest
from llmjax.optim.moments import MOMENT_DTYPES

# The values of fields that are None, by optimizer. A field that is missing does not exist for that optimizer.
DEFAULTS: dict[str, dict[str, float | str]] = {
    "adamw": dict(learning_rate=1e-3, schedule="cosine", weight_decay=0.1, b1=0.9, b2=0.95, eps=1e-8),
    "adafactor": dict(learning_rate=1e-2, schedule="cosine", weight_decay=0.0, eps=1e-30),
    "lion": dict(learning_rate=2e-4, schedule="cosine", weight_decay=0.5, b1=0.9, b2=0.99),
    "muon": dict(learning_rate=1e-3, schedule="cosine", weight_decay=0.1, b1=0.9, b2=0.95, eps=1e-8, momentum=0.95),
    "sgd": dict(learning_rate=0.1, schedule="cosine", weight_decay=0.0, momentum=0.9),
    "schedule_free_adamw": dict(learning_rate=2.5e-3, schedule="constant", weight_decay=0.1, b1=0.9, b2=0.99, eps=1e-8),
}
HAS_MOMENT_DTYPE = ("adamw", "lion")
# The learning rate of a run that starts from pretrained parameters, as a fraction of the optimizer's: that of the
# parameters, and that of adapters, which start at zero. With adamw 2e-5 (Devlin et al., 2018, appendix A.3) and 2e-4
# (Dettmers et al., 2023, arXiv 2305.14314, table 9).
_FINETUNING_FRACTION, _ADAPTER_FRACTION = 1 / 50, 1 / 5
SCHEDULES = ("cosine", "wsd", "linear", "inverse_sqrt", "constant")


def finetuning_rate(name: str, *, adapters: bool) -> tuple[float, float]:
    """(learning rate, that of pretraining) of an optimizer by default, for a run from pretrained parameters."""
    pretraining = float(DEFAULTS[name]["learning_rate"])
    return float(f"{pretraining * (_ADAPTER_FRACTION if adapters else _FINETUNING_FRACTION):.3g}"), pretraining


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its learning rate; the horizon of every schedule is `train.steps`.

    A field left at None takes the value that suits the named optimizer (the table in docs/optimizers.md).

    name            "adamw", "adafactor", "lion", "muon", "sgd" or "schedule_free_adamw"
    learning_rate   the peak of the schedule; for adafactor relative to each parameter's own root mean square
    schedule        "cosine", "wsd" (warmup, stable, decay), "linear", "inverse_sqrt" or "constant"; each with warmup
    warmup_steps    updates of linear warmup; None: a tenth of the horizon, at most 2,000
    decay_fraction  wsd: the last part of the horizon, in which the rate falls linearly
    end_fraction    the last learning rate as a fraction of the peak (inverse_sqrt: its floor; constant has none)
    weight_decay    decoupled, times the learning rate; on matrices, not on tables, norm scales or biases
    b1, b2          decay of the first and second moment (schedule_free_adamw: b1 is the interpolation)
    eps             added to the denominator (adafactor: to the squared gradient)
    momentum        sgd and muon: decay of the momentum; 0 for plain sgd
    moment_dtype    adamw and lion: type in which moments are stored: float32, bfloat16 or int8 (with a scale for each
                    block of up to 128 values), rounded at random without bias; None: the type of the parameters,
                    rounded to the nearest value
    trainable       patterns of parameters that are trained, such as ("head", "*.bias"); (): all, or with model.lora
                    none besides the adapters
    frozen          patterns of parameters that are not trained, such as ("embed", "blocks.attention")
    layer_decay     factor of the learning rate for each layer below the top (BERT's fine-tuning: 0.8 to 0.95): the head
                    has 1, the last of n layers layer_decay, the first layer_decay^n, embeddings layer_decay^(n + 1)
    unfreeze_every  updates after which the next layer below starts to train (gradual unfreezing, Howard & Ruder, 2018,
                    arXiv 1801.06146): the head at once, embeddings last; 0: all at once
    clip_norm       largest global norm of the gradient, over all trained parameters; 0: no clipping
    ema_decay       decay of an average of the trained parameters, which is then evaluated and exported; 0: no average
    expert_bias_update_rate  step by which a router's expert bias moves against the load of its expert at each update,
                    without gradient, schedule or weight decay; 0: it does not change
    """

    name: str = "adamw"
    learning_rate: float | None = None
    schedule: str | None = None
    warmup_steps: int | None = None
    decay_fraction: float = 0.2
    end_fraction: float = 0.1
    weight_decay: float | None = None
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    momentum: float | None = None
    moment_dtype: str | None = None
    trainable: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    layer_decay: float = 1.0
    unfreeze_every: int = 0
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    expert_bias_update_rate: float = 1e-3

    def __post_init__(self):
        if self.name not in DEFAULTS:
            raise UserError(
                f"optimizer.name={self.name!r}{suggest(self.name, DEFAULTS)}: choose one of {', '.join(DEFAULTS)}"
            )
        if self.schedule not in (None, *SCHEDULES):
            raise UserError(
                f"optimizer.schedule={self.schedule!r}{suggest(str(self.schedule), SCHEDULES)}: "
                f"choose one of {', '.join(SCHEDULES)}"
            )
        if self.moment_dtype not in (None, *MOMENT_DTYPES):
            raise UserError(
                f"optimizer.moment_dtype={self.moment_dtype!r}{suggest(str(self.moment_dtype), MOMENT_DTYPES)}: "
                f"choose one of {', '.join(MOMENT_DTYPES)}, or None"
            )
        self._check_unused_fields()
        self._check_ranges()

    def _check_unused_fields(self):
        for field in ("b1", "b2", "eps", "momentum"):
            value = getattr(self, field)
            if value is not None and field not in DEFAULTS[self.name]:
                raise UserError(f"optimizer.{field}={value}: unused by optimizer.name={self.name!r}; unset it")
        if self.moment_dtype is not None and self.name not in HAS_MOMENT_DTYPE:
            raise UserError(
                f"optimizer.moment_dtype={self.moment_dtype!r}: optimizer.name={self.name!r} stores moments in the "
                f"type of the parameters; leave it None, or use {' or '.join(HAS_MOMENT_DTYPE)}"
            )
        for field, neutral in (("layer_decay", 1), ("unfreeze_every", 0)):
            if getattr(self, field) != neutral and self.name == "schedule_free_adamw":
                raise UserError(
                    f"optimizer.{field}={getattr(self, field)}: optimizer.name={self.name!r} averages updates of one "
                    f"learning rate; set it to {neutral}, or use another optimizer"
                )
        if self.ema_decay and self.name == "schedule_free_adamw":
            raise UserError(
                f"optimizer.ema_decay={self.ema_decay}: optimizer.name={self.name!r} has its own average; set it to 0"
            )

    def _check_ranges(self):
        def require(is_valid: Callable[[float], bool], field: str, expected: str) -> None:
            value = getattr(self, field)
            if value is not None and not is_valid(value):
                raise UserError(f"optimizer.{field}={value}: must be {expected}")

        require(lambda x: x > 0, "learning_rate", "above 0")
        require(lambda x: 0 < x <= 1, "layer_decay", "above 0 and at most 1")
        for field in ("unfreeze_every", "weight_decay", "clip_norm", "warmup_steps", "expert_bias_update_rate"):
            require(lambda x: x >= 0, field, "0 or more")
        for field in ("b1", "b2", "momentum", "ema_decay"):
            require(lambda x: 0 <= x < 1, field, "at least 0 and below 1")
        require(lambda x: x > 0, "eps", "above 0")
        require(lambda x: 0 <= x <= 1, "end_fraction", "between 0 and 1")
        require(lambda x: 0 < x <= 1, "decay_fraction", "above 0 and at most 1")
        if self.name == "schedule_free_adamw":
            require(lambda x: x > 0, "b1", "above 0 (the averaged point is recovered by dividing by it)")

    def resolved(self) -> Any:
        """The config with the optimizer's values in place of None. Any: its fields are no longer optional."""
        unset = {field: value for field, value in DEFAULTS[self.name].items() if getattr(self, field) is None}
        return dataclasses.replace(self, **unset)
