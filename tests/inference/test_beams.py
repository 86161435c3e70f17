"""Beam search finds what an enumeration of all outputs finds, and rows do not depend on each other."""

import functools
import itertools

import jax
import numpy as np
import pytest

from llmjax.batch import Batch
from llmjax.errors import UserError
from llmjax.inference.beams import BeamSearch, search
from llmjax.inference.generate import generate
from llmjax.inference.sampling import Sampling
from llmjax.models import registry
from llmjax.models.decoder_config import DecoderConfig
from llmjax.models.encdec import EncDecConfig
from tests.models.programs import logits

STOP, START, VOCAB = 1, 0, 4
CONFIG = EncDecConfig(
    vocab_size=VOCAB, vocab_multiple=4, num_layers=1, embed=16, num_heads=2, start_id=START, relative_buckets=4
)
SOURCES = [[2, 3, 3], [3, 2, 2, 2, 3, 3, 2]]


@functools.cache
def parts():
    params = jax.jit(lambda key: jax.tree.map(lambda p: p * 2, registry.init(CONFIG, key)))(jax.random.key(1))
    return registry.abstract(CONFIG)[0], params


def find(sources, **fields) -> list:
    tokens, lengths = np.zeros((len(sources), 32), np.int32), np.array([len(source) for source in sources], np.int32)
    for row, source in zip(tokens, sources, strict=True):
        row[: len(source)] = source
    return search(*parts(), CONFIG, tokens, lengths, BeamSearch(**fields), [STOP])


def enumerate_outputs(source: list[int], max_tokens: int, penalty: float) -> dict[tuple[int, ...], float]:
    """Every output and its score, from a full forward pass over it."""
    ordinary = [token for token in range(VOCAB) if token != STOP]
    outputs = [
        (*ids, *end)
        for length in range(max_tokens + 1)
        for ids in itertools.product(ordinary, repeat=length)
        for end in ([(STOP,)] if length < max_tokens else [()])
    ]
    lengths = np.array([len(output) for output in outputs])
    targets = np.array([[*output, *[0] * (max_tokens - len(output))] for output in outputs], np.int32)
    ones, zeros = np.ones_like(targets), np.zeros((len(outputs), 2), np.uint32)
    positions = np.broadcast_to(np.arange(max_tokens, dtype=np.int32), targets.shape)
    sources = np.array([source] * len(outputs), np.int32)
    batch = Batch(
        inputs=np.concatenate([np.full((len(outputs), 1), START, np.int32), targets[:, :-1]], axis=1),
        targets=targets,
        weights=ones.astype(np.float32),
        segments=ones,
        positions=positions,
        sample=zeros,
        source=sources,
        source_segments=np.ones_like(sources),
        source_positions=np.broadcast_to(np.arange(len(source), dtype=np.int32), sources.shape),
    )
    log_probs = jax.nn.log_softmax(logits(*parts(), batch), axis=-1)
    chosen = np.take_along_axis(np.asarray(log_probs), targets[:, :, None], axis=-1)[:, :, 0]
    totals = np.where(np.arange(max_tokens) < lengths[:, None], chosen, 0).sum(axis=1)
    return dict(zip(outputs, totals / lengths**penalty, strict=True))


def test_a_wide_search_finds_all_outputs():
    expected = [enumerate_outputs(source, 3, 0.0) for source in SOURCES]
    found = find(SOURCES, max_tokens=3, beams=len(expected[0]), length_penalty=0.0)
    for outputs, best in zip(expected, found, strict=True):
        ordered = sorted(outputs.items(), key=lambda item: -item[1])
        np.testing.assert_allclose([score for _, score in best], [score for _, score in ordered], atol=2e-5)
        assert best[0][0] == [token for token in ordered[0][0] if token != STOP]
        assert {tuple(ids) for ids, _ in best} == {tuple(t for t in ids if t != STOP) for ids in outputs}


@pytest.mark.parametrize("penalty", [-2.0, 2.0])
def test_the_length_penalty_favours_long_or_short_outputs(penalty):
    for source, best in zip(SOURCES, find(SOURCES, max_tokens=3, beams=3, length_penalty=penalty), strict=True):
        outputs = enumerate_outputs(source, 3, penalty)
        for ids, score in best:
            output = (*ids, STOP) if len(ids) < 3 else tuple(ids)
            assert score == pytest.approx(outputs[output], abs=2e-5)
        assert [score for _, score in best] == sorted((score for _, score in best), reverse=True)


def test_one_beam_is_greedy_and_rows_are_independent():
    found = find(SOURCES, max_tokens=6, beams=1)
    greedy = generate(*parts(), CONFIG, SOURCES, Sampling(max_tokens=6, temperature=0), stop_ids=[STOP])
    assert [best[0][0] for best in found] == greedy
    together = find([*SOURCES, [2]], max_tokens=6, beams=3)
    for row, best in zip(find(SOURCES, max_tokens=6, beams=3), together, strict=False):
        assert [ids for ids, _ in row] == [ids for ids, _ in best]
        np.testing.assert_allclose([score for _, score in row], [score for _, score in best], atol=1e-5)


def test_other_models_and_settings_out_of_range_are_refused():
    config = DecoderConfig(vocab_size=9)
    with pytest.raises(UserError, match=r"beams=4: model.family='decoder' is not an encoder-decoder"):
        BeamSearch().check_model(config)
    with pytest.raises(UserError, match="beams=0"):
        BeamSearch(beams=0)
    with pytest.raises(UserError, match="length_penalty=nan"):
        BeamSearch(length_penalty=float("nan"))
    with pytest.raises(UserError, match="max_tokens=0"):
        BeamSearch(max_tokens=0)
