"""Choose a model size for a compute budget by published scaling laws."""

import dataclasses

from llmjax.errors import UserError

# L(N, D) = E + A / N^alpha + B / D^beta: Hoffmann et al., 2022 (arXiv 2203.15556), third approach, with the
# coefficients that Besiroglu et al., 2024 (arXiv 2404.10102) fitted to the same data.
_E, _A, _B, _ALPHA, _BETA = 1.8172, 482.01, 2085.43, 0.3478, 0.3658
_G = (_ALPHA * _A / (_BETA * _B)) ** (1 / (_ALPHA + _BETA))
_MAX = 1e40  # of each quantity
STUDIED = (44e6, 16e9)  # parameters of the smallest and largest model in that study
LOSS_SOURCE = "Hoffmann et al. 2022, refitted by Besiroglu et al. 2024 (arXiv 2404.10102)"
STEP_LAW_SOURCE = "Step Law, Li et al. 2025 (arXiv 2503.04715), for AdamW"


@dataclasses.dataclass(frozen=True)
class Budget:
    """A number of parameters and a number of training tokens."""

    parameters: float
    tokens: float

    @property
    def flops(self) -> float:
        """6 N D: a multiply and an add per weight and token forward, twice that backward; without attention."""
        return 6 * self.parameters * self.tokens

    @property
    def loss(self) -> float:
        """Nats per token on the text of the study: for comparing budgets, not a prediction for other text."""
        return _E + _A / self.parameters**_ALPHA + _B / self.tokens**_BETA

    @property
    def learning_rate(self) -> float:
        """Peak learning rate: 1.79 N^-0.713 D^0.307."""
        return 1.79 * self.parameters**-0.713 * self.tokens**0.307

    @property
    def batch_tokens(self) -> float:
        """Tokens per step: 0.58 D^0.571."""
        return 0.58 * self.tokens**0.571


def for_flops(flops: float) -> Budget:
    """The budget with the lowest loss for C FLOPs: N = G (C/6)^(beta/(alpha+beta)), D = C / 6N."""
    parameters = _G * (flops / 6) ** (_BETA / (_ALPHA + _BETA))
    return Budget(parameters, flops / 6 / parameters)


def for_tokens(tokens: float) -> Budget:
    """The budget in which that many tokens are compute-optimal."""
    flops = 6 * (_G * tokens) ** ((_ALPHA + _BETA) / _ALPHA)
    return Budget(flops / 6 / tokens, tokens)


def for_parameters(parameters: float) -> Budget:
    """The budget in which that many parameters are compute-optimal."""
    flops = 6 * (parameters / _G) ** ((_ALPHA + _BETA) / _BETA)
    return Budget(parameters, flops / 6 / parameters)


def choose(*, flops: float | None, tokens: float | None, parameters: float | None) -> Budget:
    """The budget that follows from one or two of the three quantities. Raises UserError for none or all three."""
    quantities = {"--flops (or --budget_hours)": flops, "--tokens": tokens, "--parameters": parameters}
    specified = {name: value for name, value in quantities.items() if value is not None}
    for name, value in specified.items():
        if not 1 <= value <= _MAX:
            raise UserError(f"{name}={value}: must be from 1 to {_MAX:g}")
    match flops, tokens, parameters:
        case (None, None, None):
            raise UserError("give --flops, --budget_hours, --tokens or --parameters, or --config to describe a model")
        case (float(), None, None):
            return for_flops(flops)
        case (None, float(), None):
            return for_tokens(tokens)
        case (None, None, float()):
            return for_parameters(parameters)
        case (float(), float(), None):
            return Budget(flops / 6 / tokens, tokens)
        case (float(), None, float()):
            return Budget(parameters, flops / 6 / parameters)
        case (None, float(), float()):
            return Budget(parameters, tokens)
    raise UserError(f"{', '.join(specified)} together over-determine the size: unset one of them")
