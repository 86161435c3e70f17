"""Fit the scaling law L(N, D) = E + A / N^alpha + B / D^beta to runs of different sizes and lengths.

N: parameters, D: training tokens, L: loss in nats per token. (Hoffmann et al., 2022, arXiv 2203.15556, approach 3)
"""

from collections.abc import Sequence
import dataclasses
import itertools
import math

import numpy as np
import scipy.optimize
import scipy.special

from llmjax.errors import UserError

Values = Sequence[float] | np.ndarray  # one number of each run
_HUBER = 1e-3  # of the logarithm of the loss, as in the paper
_STARTS = 4  # of the optimiser, from the best points of a grid
_MIN_RUNS = 6  # one more than the law has coefficients
_MAX_EXPONENT = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    """The coefficients of L(N, D) = E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats per token."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    @property
    def exponent(self) -> float:
        """a in: the compute-optimal number of parameters grows as FLOPs^a; beta / (alpha + beta)."""
        return self.beta / (self.alpha + self.beta)

    def optimal_parameters(self, flops: float) -> float:
        """The N of the lowest loss for 6 N D = `flops`: ((alpha A) / (beta B))^(1 / (alpha + beta)) (flops / 6)^a."""
        total = self.alpha + self.beta
        scale = np.exp((np.log(self.alpha * self.A) - np.log(self.beta * self.B)) / total)
        return float(scale * (flops / 6) ** self.exponent)


def fit(parameters: Values, tokens: Values, losses: Values) -> ScalingLaw:
    """The law that minimises the Huber loss (delta 1e-3) of log L, from the best points of a grid.

    Raises UserError for fewer than six runs, and for values that are not finite or not above 0.
    """
    columns = _logarithms(parameters, tokens, losses)
    return _make_law(_fit(*columns, _choose_starts(*columns)))


def bootstrap(
    parameters: Values, tokens: Values, losses: Values, *, draws: int = 200, seed: int = 0
) -> list[ScalingLaw]:
    """The laws of `draws` resamples of the runs, with replacement, each with six or more different runs."""
    columns = _logarithms(parameters, tokens, losses)
    start = _fit(*columns, _choose_starts(*columns))
    rng, count, laws = np.random.default_rng(seed), len(losses), []
    while len(laws) < draws:
        chosen = rng.integers(0, count, count)
        if len(np.unique(chosen)) >= min(_MIN_RUNS, count):
            log_n, log_d, log_loss = (column[chosen] for column in columns)
            laws.append(_make_law(_fit(log_n, log_d, log_loss, [start])))
    return laws


def interval(values: Values, level: float = 0.95) -> tuple[float, float]:
    """The ends of the percentile interval."""
    low, high = np.quantile(np.asarray(values), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def parabola_minimum(parameters: Values, losses: Values) -> float | None:
    """The N of the lowest loss by a parabola in log N through the runs of one budget (approach 2 of the paper).

    None where the parabola has no minimum between the smallest and the largest run.
    """
    if len(losses) < 3:
        return None
    log_n = np.log(parameters)
    square, linear, _ = np.polyfit(log_n, losses, 2)
    lowest = -linear / (2 * square) if square > 0 else np.inf
    return float(np.exp(lowest)) if log_n.min() <= lowest <= log_n.max() else None


def _logarithms(parameters: Values, tokens: Values, losses: Values) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    columns = [np.asarray(values, np.float64) for values in (parameters, tokens, losses)]
    if len({column.shape for column in columns}) > 1 or columns[0].ndim != 1:
        raise UserError("a scaling law needs one number of parameters, tokens and loss for each run")
    if len(columns[0]) < _MIN_RUNS:
        raise UserError(f"{len(columns[0])} runs: a law of 5 coefficients needs {_MIN_RUNS} or more; train more sizes")
    for name, column in zip(("parameters", "tokens", "loss"), columns, strict=True):
        if not (np.isfinite(column) & (column > 0)).all():
            raise UserError(f"{name}: a run has a value that is not a number above 0; remove that run")
    log_n, log_d, log_loss = map(np.log, columns)
    return log_n, log_d, log_loss


def _predict(theta: np.ndarray, log_n: np.ndarray, log_d: np.ndarray) -> np.ndarray:
    """The logarithms of the three terms, [3, runs]; theta: log E, log A, log B, exponents."""
    e, a, b, alpha, beta = theta
    return np.stack([np.full_like(log_n, e), a - alpha * log_n, b - beta * log_d])


def _residuals(theta: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, log_loss: np.ndarray) -> np.ndarray:
    """Of log L, [runs]."""
    return scipy.special.logsumexp(_predict(theta, log_n, log_d), axis=0) - log_loss


def _jacobian(theta: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, log_loss: np.ndarray) -> np.ndarray:
    """Of the residuals, [runs, 5]: a term's share of the loss, times the derivative of its logarithm."""
    share = scipy.special.softmax(_predict(theta, log_n, log_d), axis=0)
    return np.stack([*share, -share[1] * log_n, -share[2] * log_d], axis=1)


def _choose_starts(log_n: np.ndarray, log_d: np.ndarray, log_loss: np.ndarray) -> list[np.ndarray]:
    """The points of a grid with the smallest errors. Terms are fractions of the mean loss at the mean run."""
    shares, exponents = log_loss.mean() + np.log([0.02, 0.1, 0.3, 0.6, 0.9]), (0.1, 0.3, 0.5, 0.8, 1.2)
    grid = itertools.product(shares, shares, shares, exponents, exponents)
    starts = [_shift(np.array(point), -log_n.mean(), -log_d.mean()) for point in grid]
    return sorted(starts, key=lambda theta: np.abs(_residuals(theta, log_n, log_d, log_loss)).sum())[:_STARTS]


def _shift(theta: np.ndarray, mean_n: float, mean_d: float) -> np.ndarray:
    """The same law as a function of log N - mean_n and log D - mean_d."""
    e, a, b, alpha, beta = theta
    return np.array([e, a - alpha * mean_n, b - beta * mean_d, alpha, beta])


def _fit(log_n: np.ndarray, log_d: np.ndarray, log_loss: np.ndarray, starts: Sequence[np.ndarray]) -> np.ndarray:
    """theta of the lowest Huber loss: from each start by least squares, whose surface is smooth, and then by Huber's.

    Centred logarithms keep the coefficients of the optimiser of one size, and almost independent.
    """
    mean_n, mean_d = log_n.mean(), log_d.mean()
    bounds = ([-20.0] * 3 + [1e-3] * 2, [10.0] * 3 + [_MAX_EXPONENT] * 2)
    columns = (log_n - mean_n, log_d - mean_d, log_loss)
    results = []
    for start in starts:
        theta = np.clip(_shift(start, mean_n, mean_d), *(np.array(end) for end in bounds))
        for loss in ("linear", "huber"):
            found = scipy.optimize.least_squares(
                _residuals,
                theta,
                jac=_jacobian,  # pyright: ignore[reportArgumentType]  (its stub allows names alone)
                bounds=bounds,
                loss=loss,
                f_scale=_HUBER,
                x_scale="jac",
                args=columns,
            )
            theta = found.x
        results.append(found)
    return _shift(min(results, key=lambda result: result.cost).x, -mean_n, -mean_d)


def _make_law(theta: np.ndarray) -> ScalingLaw:
    e, a, b, alpha, beta = theta.tolist()
    return ScalingLaw(E=math.exp(e), A=math.exp(a), B=math.exp(b), alpha=alpha, beta=beta)
