"""The error of a simple classifier by the number of its training examples, and what more of them would bring."""

import dataclasses

import numpy as np

_MIN_EXAMPLES = 40  # for training
_NUM_SIZES, _REPEATS = 6, 3
MAX_TRAIN = 8000
_DRAWS = 500
_EXPONENTS = np.linspace(0.05, 2.0, 40)
_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
    """The predicted error at a number of training examples, and the gain against all present ones, with 95% intervals.

    error, gain      values; gain is the error now minus this one
    low, high        of the gain
    """

    size: int
    error: float
    gain: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningCurve:
    """Errors of logistic regression on vectors of texts.

    sizes, errors   training examples, and the share of test examples that it has wrong, mean of _REPEATS draws
    fitted          the fitted law at these sizes
    law             (a, b, c) of a * size ** -b + c
    forecasts       at twice and at four times the examples
    num_test        examples on which the error was measured
    """

    sizes: list[int]
    errors: list[float]
    fitted: list[float]
    law: tuple[float, float, float]
    forecasts: list[Forecast]
    num_test: int


def measure_curve(train, train_labels: np.ndarray, test, test_labels: np.ndarray) -> LearningCurve | None:
    """Fit logistic regression to growing parts of the training examples; None where these are too few.

    train, test   vectors [examples, dimensions], arrays or sparse matrices
    labels        int [examples]
    """
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(_SEED)
    count = min(len(train_labels), MAX_TRAIN)
    if count < _MIN_EXAMPLES or not len(test_labels):
        return None
    sizes = np.unique(np.geomspace(max(20, count // 32), count, _NUM_SIZES).astype(int))
    wrong = np.zeros((len(sizes), _REPEATS, len(test_labels)))
    for repeat in range(_REPEATS):
        order = rng.permutation(len(train_labels))[:count]
        for number, size in enumerate(sizes):
            chosen = order[:size]
            if len(np.unique(train_labels[chosen])) < 2:
                wrong[number, repeat] = test_labels != train_labels[chosen[0]]
                continue
            model = LogisticRegression(max_iter=1000).fit(train[chosen], train_labels[chosen])
            wrong[number, repeat] = model.predict(test) != test_labels
    return summarize_curve(sizes, wrong)


def summarize_curve(sizes: np.ndarray, wrong: np.ndarray) -> LearningCurve:
    """The curve and its forecasts. wrong: 0 or 1, float [sizes, repeats, test examples].

    The intervals are those of _DRAWS bootstrap samples of the test examples and, for each size, of the repeats.
    """
    errors = wrong.mean(axis=(1, 2))
    law = fit_power_law(sizes, errors)
    repeats, count = wrong.shape[1:]
    rng = np.random.default_rng(_SEED)
    laws = []
    for _ in range(_DRAWS):
        weights = np.bincount(rng.integers(0, count, count), minlength=count)
        by_repeat = wrong @ weights / count  # [sizes, repeats]
        drawn = np.take_along_axis(by_repeat, rng.integers(0, repeats, by_repeat.shape), axis=1)
        laws.append(fit_power_law(sizes, drawn.mean(axis=1)))
    now = int(sizes[-1])
    forecasts = []
    for factor in (2, 4):
        gains = [predict_error(each, now) - predict_error(each, factor * now) for each in laws]
        low, high = np.quantile(gains, [0.025, 0.975])
        error = predict_error(law, factor * now)
        forecasts.append(
            Forecast(
                size=factor * now,
                error=error,
                gain=predict_error(law, now) - error,
                low=float(low),
                high=float(high),
            )
        )
    return LearningCurve(
        sizes=sizes.tolist(),
        errors=errors.tolist(),
        fitted=[predict_error(law, size) for size in sizes.tolist()],
        law=law,
        forecasts=forecasts,
        num_test=count,
    )


def fit_power_law(sizes: np.ndarray, errors: np.ndarray) -> tuple[float, float, float]:
    """(a, b, c) of the least squares fit error = a * size ** -b + c with a, c >= 0 (Hestness et al., 2017,
    arXiv:1712.00409): for each b of a grid, a and c have a closed form."""
    x = np.asarray(sizes, np.float64)[None, :] ** -_EXPONENTS[:, None]  # [exponents, sizes]
    y = np.asarray(errors, np.float64)
    centered = x - x.mean(axis=1, keepdims=True)
    a = (centered * (y - y.mean())).sum(axis=1) / (centered**2).sum(axis=1)
    c = y.mean() - a * x.mean(axis=1)
    a = np.where(c < 0, (x * y).sum(axis=1) / (x**2).sum(axis=1), a)
    c = np.where(c < 0, 0.0, c)
    c = np.where(a < 0, y.mean(), c)
    a = np.maximum(a, 0.0)
    best = int((((a[:, None] * x + c[:, None]) - y) ** 2).sum(axis=1).argmin())
    return float(a[best]), float(_EXPONENTS[best]), float(c[best])


def predict_error(law: tuple[float, float, float], size: float) -> float:
    """a * size ** -b + c."""
    a, b, c = law
    return a * size**-b + c
