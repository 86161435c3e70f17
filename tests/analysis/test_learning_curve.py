"""Learning curves: the fit recovers known laws, and the interval covers the truth."""

import numpy as np
import pytest

from llmjax.analysis.learning_curve import fit_power_law, measure_curve, predict_error, summarize_curve

SIZES = np.array([50, 100, 200, 400, 800, 1600])


@pytest.mark.parametrize("law", [(2.0, 0.5, 0.1), (1.0, 0.3, 0.0), (4.0, 1.0, 0.05)])
def test_an_exact_law_is_recovered(law):
    fitted = fit_power_law(SIZES, predict_error(law, SIZES))
    assert fitted == pytest.approx(law, rel=1e-6, abs=1e-9)


def test_a_curve_that_does_not_fall_predicts_no_gain():
    a, _, c = fit_power_law(SIZES, np.array([0.2, 0.21, 0.22, 0.2, 0.22, 0.23]))
    assert a == 0 and c == pytest.approx(0.2133, abs=1e-3)
    assert fit_power_law(SIZES, np.zeros(6))[0] == 0


def test_the_interval_of_the_gain_covers_the_truth():
    law = (2.0, 0.5, 0.1)
    rates = predict_error(law, SIZES)
    wrong = (np.random.default_rng(0).random((6, 3, 3000)) < rates[:, None, None]).astype(float)
    curve = summarize_curve(SIZES, wrong)
    twice = curve.forecasts[0]
    truth = predict_error(law, 1600) - predict_error(law, 3200)
    assert twice.size == 3200 and twice.low <= truth <= twice.high and twice.low <= twice.gain <= twice.high
    assert curve.errors == pytest.approx(rates.tolist(), abs=0.02)


def test_errors_of_a_classifier_fall_with_examples():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 900)
    vectors = rng.normal(size=(900, 30)) + 0.5 * labels[:, None] * (np.arange(30) < 10)
    curve = measure_curve(vectors[:700], labels[:700], vectors[700:], labels[700:])
    assert curve is not None
    assert curve.sizes[-1] == 700 and curve.num_test == 200 and curve.errors[-1] < curve.errors[0] - 0.05
    assert measure_curve(vectors[:20], labels[:20], vectors[700:], labels[700:]) is None
