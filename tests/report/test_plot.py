"""Curves, axes and numbers of the report."""

import math

import pytest

from llmjax.report import plot
from llmjax.report.markup import escape, format_number


def test_thinning_keeps_spikes():
    points = [(float(i), math.sin(i / 500)) for i in range(100_000)]
    points[77_777] = (77_777.0, 50.0)
    thinned = plot.thin(points)
    assert len(thinned) <= plot.MAX_POINTS + 2
    assert (77_777.0, 50.0) in thinned and thinned == sorted(thinned) and set(thinned) <= set(points)


def test_smoothing_is_unbiased_at_the_start_and_skips_nan():
    assert plot.smooth([(1, 4.0), (2, math.nan), (3, 4.0)], 10) == [(1, 4.0), (3, 4.0)]
    (_, first), (_, second) = plot.smooth([(1, 0.0), (2, 1.0)], 2)
    assert first == 0.0 and second == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (2.03, 2.31, [2.1, 2.2, 2.3]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert plot.choose_ticks(low, high, 5) == pytest.approx(expected)


def test_log_ticks_are_round():
    assert plot.choose_log_ticks(0.9, 120) == pytest.approx([1, 2, 5, 10, 20, 50, 100])
    assert plot.choose_log_ticks(1e-6, 1.5) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1])


@pytest.mark.parametrize(
    ("value", "formatted"),
    [
        (None, "—"),
        (3.41234, "3.412"),
        (1834.4, "1,834"),
        (12_345, "12.3\u202fk"),
        (4.567e6, "4.57\u202fM"),
        (0.000291, "0.000291"),
        (7, "7"),
        (2e12, "2\u202fT"),
        (math.inf, "inf"),
        (-12_345, "-12.3\u202fk"),
        (0.0, "0"),
    ],
)
def test_numbers_have_four_significant_digits(value, formatted):
    assert format_number(value) == formatted


def test_escaping_keeps_harmless_text():
    assert escape("naïve 漢字 🙂\n\tx") == "naïve 漢字 🙂\n\tx"
