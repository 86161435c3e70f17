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
from llmjax.inference.generate import generate
from llmjax.inference.sampling import Sampling
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


def test_a_repetition_penalty_counts_the_prompt_and_the_new_tokens():
    settings, penalty = config(), 0.2
    graph, params = parts(settings)
    prompt = [3, 1, 4, 1, 5]
    sampling = Sampling(max_tokens=10, temperature=0, repetition_penalty=penalty)
    new = generate(graph, params, settings, [prompt, [7]], sampling, stop_ids=[NO_EOS])[0]
    full = logits_of(graph, params, prompt + new).copy()
    for i, token in enumerate(new):
        scores = full[len(prompt) - 1 + i]
        seen = list(set(prompt + new[:i]))
        scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
        assert token == scores.argmax()
    free = generate(graph, params, settings, [prompt], Sampling(max_tokens=10, temperature=0), stop_ids=[NO_EOS])[0]
    assert new != free


def test_decoding_looks_for_stop_texts_and_draws_the_same_tokens():
    settings = config()
    graph, params = parts(settings)
    prompts, sampling = [[1, 2], [9]], Sampling(max_tokens=40, seed=4)
    free = generate(graph, params, settings, prompts, sampling, stop_ids=[NO_EOS])
    looks = []

    def has_stop(row, ids):
        looks.append((row, len(ids)))
        return row == 0 and free[0][20] in ids

    stopped = generate(graph, params, settings, prompts, sampling, stop_ids=[NO_EOS], has_stop=has_stop)
    assert stopped[1] == free[1] and looks == [(0, 16), (1, 16), (0, 32), (1, 32)][: len(looks)]
    assert 20 < len(stopped[0]) <= 32 and stopped[0] == free[0][: len(stopped[0])]


def test_samples_of_a_prompt_differ_and_the_first_one_is_that_without_others():
    settings = config()
    graph, params = parts(settings)
    sampling = Sampling(max_tokens=12, seed=3)
    rows = [(1, 0), (1, 1), (1, 2), (0, 1)]
    samples = generate(graph, params, settings, [[1, 2]] * 4, sampling, stop_ids=[NO_EOS], rows=rows)
    assert len({tuple(sample) for sample in samples}) == 4
    alone = generate(graph, params, settings, [[5], [1, 2]], sampling, stop_ids=[NO_EOS])[1]
    padded = generate(graph, params, settings, [[1, 2]], sampling, stop_ids=[NO_EOS], rows=rows[1:2], shape=(3, 64))
    assert samples[0] == alone and padded == [samples[1]]
