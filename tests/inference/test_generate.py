"""Cached decoding equals the full forward pass, rows are independent, and draws follow the sampling settings."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.batch import Batch
from llmjax.errors import UserError
from llmjax.inference.generate import Sampling, draw, generate
from llmjax.models import registry
from llmjax.models.decoder_config import DecoderConfig

VOCAB = 61
NO_EOS = -1


def config(**fields) -> DecoderConfig:
    base = DecoderConfig(vocab_size=VOCAB, vocab_multiple=16, num_layers=2, embed=32, num_heads=4, num_kv_heads=2)
    return dataclasses.replace(base, **fields)


@functools.cache
def parts(settings: DecoderConfig):
    # Parameters far larger than at the start of training, so that logits differ clearly and positions matter.
    params = jax.jit(lambda key: jax.tree.map(lambda p: p * 3, registry.init(settings, key)))(jax.random.key(0))
    return registry.abstract(settings)[0], params


def logits_of(graph, params, tokens) -> np.ndarray:
    """Full forward pass over one sequence."""
    row = np.asarray(tokens, np.int32)[None]
    ones = np.ones_like(row)
    positions = np.arange(row.shape[1], dtype=np.int32)[None]
    batch = Batch(
        inputs=row, targets=row, weights=ones, segments=ones, positions=positions, sample=np.zeros((1, 2), np.uint32)
    )
    return np.asarray(forward(graph, params, batch)[0])


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, params, batch):
    model = nnx.merge(graph, params)
    return model.unembed(model(batch).hidden)


@jax.jit
def cached(model, tokens, positions, cache):
    hidden, cache = model.cached(tokens, positions, cache)
    return model.unembed(hidden), cache


@pytest.mark.parametrize("fields", [{}, {"positions": "learned", "scan": False, "norm": "layernorm", "biases": "all"}])
def test_cached_logits_equal_the_full_forward_pass(fields):
    settings = config(**fields)
    graph, params = parts(settings)
    model = nnx.merge(graph, params)
    tokens = np.random.default_rng(0).integers(0, VOCAB, 12)
    full = logits_of(graph, params, tokens)
    cache, parts_of_logits = model.cache(1, 16), []
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 12)):
        part = jnp.asarray(tokens[None, start:stop], jnp.int32)
        logits, cache = cached(model, part, jnp.arange(start, stop)[None], cache)
        parts_of_logits.append(np.asarray(logits[0]))
    # Same float32 sums in another order over at most 128 terms: a few hundred ulps of the largest logit.
    np.testing.assert_allclose(
        np.concatenate(parts_of_logits)[:, :VOCAB], full[:, :VOCAB], atol=3e-5 * np.abs(full[:, :VOCAB]).max()
    )


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_greedy_tokens_equal_the_full_forward_pass(positions):
    settings = config(positions=positions)
    graph, params = parts(settings)
    prompt = [3, 1, 4, 1, 5]
    new = generate(graph, params, settings, [prompt], Sampling(max_tokens=10, temperature=0), stop_ids=[NO_EOS])[0]
    full = logits_of(graph, params, prompt + new)
    assert new == full[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert len(set(new)) > 2, "a constant output would prove nothing"


def test_a_row_does_not_depend_on_its_neighbours():
    settings = config()
    graph, params = parts(settings)
    prompt, long = [7, 2, 9], list(range(1, 40))
    run = lambda prompts: generate(graph, params, settings, prompts, Sampling(max_tokens=8, seed=3), stop_ids=[NO_EOS])
    alone = run([prompt])[0]
    assert run([prompt, long])[0] == alone
    assert run([long, prompt])[0] == run([long])[0]


def test_prompts_of_unequal_lengths_equal_single_prompts():
    settings = config()
    graph, params = parts(settings)
    prompts = [[5], list(range(1, 40)), [8, 8, 3]]
    run = lambda prompts: generate(
        graph, params, settings, prompts, Sampling(max_tokens=9, temperature=0), stop_ids=[NO_EOS]
    )
    assert run(prompts) == [run([prompt])[0] for prompt in prompts]


def test_the_seed_decides_the_text():
    settings = config()
    graph, params = parts(settings)
    run = lambda seed: generate(
        graph, params, settings, [[1, 2]], Sampling(max_tokens=20, seed=seed), stop_ids=[NO_EOS]
    )
    assert run(1) == run(1)
    assert run(1) != run(2)


def test_a_row_stops_at_eos_and_other_rows_continue():
    settings = config()
    graph, params = parts(settings)
    free = generate(
        graph, params, settings, [[3, 1], [9, 9, 4]], Sampling(max_tokens=12, temperature=0), stop_ids=[NO_EOS]
    )
    eos = free[0][4]
    stopped = generate(
        graph, params, settings, [[3, 1], [9, 9, 4]], Sampling(max_tokens=12, temperature=0), stop_ids=[eos]
    )
    assert stopped == [row[: row.index(eos)] if eos in row else row for row in free]


def test_padding_ids_are_never_drawn():
    settings = config(vocab_size=2, vocab_multiple=64)
    graph, params = parts(settings)
    new = generate(graph, params, settings, [[0], [1]], Sampling(max_tokens=40, temperature=50.0), stop_ids=[NO_EOS])
    assert {token for row in new for token in row} == {0, 1}


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


@pytest.mark.parametrize(
    ("prompts", "fields", "words"),
    [
        ([], {}, "no prompt"),
        ([[1], []], {}, "prompt 1 has no tokens"),
        ([[1, VOCAB]], {}, f"token id {VOCAB}"),
        ([[-1]], {}, "token id -1"),
        ([[1]], {"max_tokens": 0}, "max_tokens=0"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[1]], {"top_k": -1}, "top_k=-1"),
        ([[1]], {"top_p": 0.0}, "top_p=0.0"),
        ([[1] * 10], {"max_tokens": 8}, "at most 7 new tokens fit"),
    ],
)
def test_a_bad_prompt_or_setting_is_refused(prompts, fields, words):
    settings = config(positions="learned", max_positions=16)
    graph, params = parts(settings)
    with pytest.raises(UserError, match=words):
        generate(graph, params, settings, prompts, Sampling(**{"max_tokens": 4, **fields}), stop_ids=[NO_EOS])


def test_the_last_learned_position_can_be_used():
    settings = config(positions="learned", max_positions=16)
    graph, params = parts(settings)
    assert len(generate(graph, params, settings, [[1] * 10], Sampling(max_tokens=7), stop_ids=[NO_EOS])[0]) == 7
