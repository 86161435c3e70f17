"""Penalties, filters and draws against plain formulas, for rows with settings of their own, too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.errors import UserError
from llmjax.inference.sampling import Sampling, allow, cut_at_stop, draw, draw_rows, make_row_keys, penalize

LOGITS = np.log(np.array([0.05, 0.4, 0.3, 0.05, 0.2], np.float32))


def frequencies(sampling: Sampling, count: int = 4000) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), count)
    drawn = draw(jnp.broadcast_to(LOGITS, (count, 5)), keys, sampling)
    return np.bincount(np.asarray(drawn), minlength=5) / count


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.05, 0.4, 0.3, 0.05, 0.2]),
        (Sampling(temperature=0), [0, 1, 0, 0, 0]),
        (Sampling(top_k=1), [0, 1, 0, 0, 0]),
        (Sampling(top_k=2), [0, 4 / 7, 3 / 7, 0, 0]),
        (Sampling(top_k=99), [0.05, 0.4, 0.3, 0.05, 0.2]),
        (Sampling(top_p=0.01), [0, 1, 0, 0, 0]),
        (Sampling(top_p=0.5), [0, 4 / 7, 3 / 7, 0, 0]),
        (Sampling(top_p=0.85), [0, 4 / 9, 3 / 9, 0, 2 / 9]),
        # of the three most likely, renormalised to 4/9 3/9 2/9, two reach 0.7
        (Sampling(top_k=3, top_p=0.7), [0, 4 / 7, 3 / 7, 0, 0]),
        (Sampling(min_p=0.45), [0, 4 / 9, 3 / 9, 0, 2 / 9]),
        (Sampling(min_p=1.0), [0, 1, 0, 0, 0]),
        # temperature 2 takes the roots, of which that of 0.05 / 0.4 is above 0.35
        (Sampling(min_p=0.35, temperature=2.0), list(np.sqrt(np.exp(LOGITS)) / np.sqrt(np.exp(LOGITS)).sum())),
        (Sampling(min_p=0.6, top_p=0.85), [0, 4 / 7, 3 / 7, 0, 0]),
        # temperature 1/2 squares the probabilities: 16/29 + 9/29 reach 0.8, where 0.4 + 0.3 would not
        (Sampling(temperature=0.5, top_p=0.8), [0, 16 / 25, 9 / 25, 0, 0]),
    ],
)
def test_draws_follow_the_filtered_distribution(sampling, expected):
    observed = frequencies(sampling)
    assert ((observed > 0) == (np.array(expected) > 0)).all()
    # 4000 draws: the standard deviation of a frequency is at most 0.008; fixed keys, so the test is deterministic.
    np.testing.assert_allclose(observed, expected, atol=0.03)


def test_top_k_of_equal_logits_leaves_exactly_k_tokens():
    keys = jax.random.split(jax.random.key(1), 500)
    drawn = draw(jnp.zeros((500, 6)), keys, Sampling(top_k=2))
    assert set(np.asarray(drawn).tolist()) == {0, 1}


def test_a_tiny_temperature_is_greedy():
    keys = jax.random.split(jax.random.key(1), 50)
    for sampling in (Sampling(temperature=1e-6), Sampling(temperature=1e-6, top_p=0.5)):
        assert set(np.asarray(draw(jnp.broadcast_to(1e4 * LOGITS, (50, 5)), keys, sampling)).tolist()) == {1}


@pytest.mark.parametrize("temperature", [-1.0, 1e-7, 1e-39, 1e7, 1e300, float("inf"), float("nan")])
def test_a_temperature_beyond_float32_is_refused(temperature):
    with pytest.raises(UserError, match=r"must be 0 .* or from 1e-6 to 1e6"):
        Sampling(temperature=temperature)


def test_the_penalty_makes_seen_tokens_less_likely_by_row():
    logits = np.array([[2.0, -2.0, 0.0, 3.0]] * 2, np.float32)
    seen = np.array([[True, True, True, False]] * 2)
    actual = np.asarray(penalize(jnp.asarray(logits), jnp.asarray(seen), jnp.array([[2.0], [0.5]])))
    np.testing.assert_array_equal(actual, [[1, -4, 0, 3], [4, -1, 0, 3]])
    np.testing.assert_array_equal(penalize(jnp.asarray(logits[:1]), jnp.asarray(seen[:1]), 2.0), actual[:1])


def test_filters_of_rows_with_settings_of_their_own_equal_plain_ones():
    rng = np.random.default_rng(0)
    scores = -np.sort(rng.exponential(2, (50, 20)), axis=1).astype(np.float32)
    scores -= scores[:, :1]
    top_p, min_p = rng.uniform(0.05, 1, (50, 1)), rng.uniform(0, 0.9, (50, 1))
    actual = np.asarray(allow(jnp.asarray(scores), jnp.asarray(top_p), jnp.asarray(min_p)))
    for row in range(50):
        probabilities = np.exp(scores[row].astype(np.float64))
        probabilities /= probabilities.sum()
        nucleus = 1 + np.searchsorted(np.cumsum(probabilities), top_p[row, 0])  # the fewest that reach it
        likely = (probabilities >= min_p[row, 0] * probabilities[0]).sum()
        assert actual[row].sum() == min(nucleus, likely) and actual[row, : actual[row].sum()].all()


SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.7},
    {"temperature": 0.3},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.9, "top_p": 0.7},
    {"temperature": 1.1, "min_p": 0.13},
    {"temperature": 0.9, "repetition_penalty": 0.6},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
]


@pytest.fixture(scope="module")
def rows():
    """(logits [400, 50], keys [400], seen [400, 50], the draws of rows with all of SETTINGS in turn)"""
    logits, keys = jax.random.normal(jax.random.key(1), (400, 50)) * 3, jax.random.split(jax.random.key(0), 400)
    seen = jax.random.bernoulli(jax.random.key(2), 0.4, (400, 50))
    settings = [Sampling(**SETTINGS[row % len(SETTINGS)]) for row in range(400)]
    column = lambda name: jnp.array([getattr(each, name) for each in settings])
    inverse = jnp.array([np.float32(1) / np.float32(s.temperature) if s.temperature else 0 for s in settings])
    names = ("top_k", "top_p", "min_p", "repetition_penalty")
    columns = {"inverse_temperature": inverse, **{name: column(name) for name in names}}
    return logits, keys, seen, np.asarray(jax.jit(draw_rows)(logits, keys, seen, **columns))


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_rows_with_settings_of_their_own_are_drawn_as_alone(rows, number):
    """Bit for bit."""
    logits, keys, seen, drawn = rows
    sampling = Sampling(**SETTINGS[number])

    def draw_alone(logits: jax.Array, keys: jax.Array, seen: jax.Array) -> jax.Array:
        return draw(penalize(logits, seen, sampling.repetition_penalty), keys, sampling)

    own = slice(number, None, len(SETTINGS))
    expected = np.asarray(jax.jit(draw_alone)(logits[own], keys[own], seen[own]))
    np.testing.assert_array_equal(drawn[own], expected)


def test_keys_differ_by_prompt_and_sample_and_do_not_depend_on_other_rows():
    rows = np.array([(prompt, sample) for prompt in range(20) for sample in range(5)])
    keys = jax.random.key_data(make_row_keys(3, rows))
    assert len({tuple(key) for key in np.asarray(keys)}) == len(rows)
    np.testing.assert_array_equal(jax.random.key_data(make_row_keys(3, rows[7:9])), keys[7:9])
    first = jax.random.fold_in(jax.random.key(3), 4)
    np.testing.assert_array_equal(keys[20], jax.random.key_data(first))


def test_texts_end_before_the_first_stop_text():
    assert cut_at_stop("one two three", ("three", "two")) == "one "
    assert cut_at_stop("one", ()) == cut_at_stop("one", ("two",)) == "one"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"min_p": -0.1}, "min_p=-0.1: must be from 0"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: must be from 1e-3"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty=nan"),
        ({"stop": ("a", "")}, "stop='': every text contains it"),
    ],
)
def test_settings_out_of_range_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        Sampling(**fields)
