"""The fit of a scaling law finds known coefficients, and its optimum is the lowest loss of a budget."""

import numpy as np
import pytest

from llmjax.errors import UserError
from llmjax.plan import scaling_law
from llmjax.plan.scaling_law import ScalingLaw

# Besiroglu et al., 2024 (arXiv 2404.10102), table 1.
PUBLISHED = ScalingLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)


def isoflop_grid() -> tuple[np.ndarray, np.ndarray]:
    """Parameters and tokens of five sizes around the optimum of each of four budgets."""
    sizes = [
        (PUBLISHED.optimal_parameters(flops) * factor, flops)
        for flops in (1e18, 1e19, 1e20, 1e21)
        for factor in (0.25, 0.5, 1, 2, 4)
    ]
    parameters, flops = np.array(sizes).T
    return parameters, flops / 6 / parameters


def losses_of(parameters: np.ndarray, tokens: np.ndarray, noise: float = 0.0) -> np.ndarray:
    exact = np.array([PUBLISHED.loss(n, d) for n, d in zip(parameters, tokens, strict=True)])
    return exact * np.exp(noise * np.random.default_rng(0).standard_normal(len(exact)))


def test_a_fit_of_exact_losses_finds_the_coefficients():
    parameters, tokens = isoflop_grid()
    law = scaling_law.fit(parameters, tokens, losses_of(parameters, tokens))
    assert pytest.approx(PUBLISHED.E, rel=0.01) == law.E
    assert law.alpha == pytest.approx(PUBLISHED.alpha, rel=0.02)
    assert law.beta == pytest.approx(PUBLISHED.beta, rel=0.02)
    assert law.optimal_parameters(1e22) == pytest.approx(PUBLISHED.optimal_parameters(1e22), rel=0.05)


def test_one_outlier_does_not_change_the_fit():
    """The Huber loss, where least squares would be far off."""
    parameters, tokens = isoflop_grid()
    losses = losses_of(parameters, tokens)
    losses[7] *= 1.3
    law = scaling_law.fit(parameters, tokens, losses)
    assert law.alpha == pytest.approx(PUBLISHED.alpha, rel=0.05) and pytest.approx(PUBLISHED.E, rel=0.03) == law.E


def test_bootstrap_intervals_contain_the_coefficients_of_noisy_losses():
    parameters, tokens = isoflop_grid()
    laws = scaling_law.bootstrap(parameters, tokens, losses_of(parameters, tokens, noise=0.002), draws=30)
    for name in ("beta", "exponent"):
        low, high = scaling_law.interval([getattr(law, name) for law in laws])
        assert low < getattr(PUBLISHED, name) < high, name
        assert high - low < 0.1, name


def test_the_optimum_of_a_budget_has_the_lowest_loss():
    best = PUBLISHED.optimal_parameters(1e21)
    losses = [PUBLISHED.loss(n, 1e21 / 6 / n) for n in (0.9 * best, best, 1.1 * best)]
    assert min(losses) == losses[1]
    ratio = PUBLISHED.optimal_parameters(1e22) / best
    assert np.log10(ratio) == pytest.approx(PUBLISHED.exponent) == pytest.approx(0.3658 / (0.3478 + 0.3658))


def test_a_parabola_finds_its_minimum_and_refuses_one_outside_the_runs():
    sizes = np.array([1e5, 1e6, 1e7])
    assert scaling_law.parabola_minimum(sizes, (np.log(sizes) - np.log(2e6)) ** 2) == pytest.approx(2e6)
    assert scaling_law.parabola_minimum(sizes, (np.log(sizes) - np.log(2e9)) ** 2) is None
    assert scaling_law.parabola_minimum(sizes, [1.0, 2.0, 1.0]) is None
    assert scaling_law.parabola_minimum(sizes[:2], [1.0, 2.0]) is None


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        (([1e6] * 5, [1e8] * 5, [3.0] * 5), "5 runs"),
        (([1e6] * 6, [1e8] * 6, [3.0] * 5), "for each run"),
        (([1e6] * 6, [1e8] * 6, [3.0] * 5 + [float("nan")]), "loss: a run has"),
    ],
)
def test_runs_that_cannot_be_fitted_are_named(runs, words):
    with pytest.raises(UserError, match=words):
        scaling_law.fit(*runs)
