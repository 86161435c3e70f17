"""Answers equal those of one forward pass a request, in any batch, on any mesh and in the order of the input."""

import dataclasses
import functools
import types
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.batch import Batch
from llmjax.errors import UserError
from llmjax.evals.requests import LanguageModel, split_windows
from llmjax.inference.sampling import Sampling
from llmjax.models import registry
from llmjax.parallel import axes
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.run import config as run_config
from llmjax.run.loading import Loaded
from tests.evals.tasks.models import wrap
from tests.serve import runs
from tests.train.trainer import one_device

RNG = np.random.default_rng(0)
LENGTHS = [(1, 1), (5, 3), (0, 4), (20, 17), (63, 1), (60, 5), (200, 9), (3, 64), (0, 64), (30, 0), (2, 33), (7, 2)]
PAIRS = [(RNG.integers(0, 256, before).tolist(), RNG.integers(0, 256, after).tolist()) for before, after in LENGTHS]
TEXTS = [RNG.integers(0, 256, length).tolist() for length in (0, 1, 63, 64, 65, 127, 128, 150, 200)]


def make_loaded(family: str = "decoder") -> Loaded:
    if family in runs.FAMILIES:
        config, params = runs.make_config(family), runs.make_params(family)
    else:
        tree = {"model": {"family": family, "num_layers": 2, "embed": 32}, "data": {"seq_len": 64}}
        config = run_config.with_vocabulary(run_config.apply_overrides(tree, []), runs.BYTES.vocab_size)
        params = jax.jit(lambda key: registry.init(config.model, key))(jax.random.key(0))
    return wrap(config, params)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return make_loaded()


@pytest.fixture(scope="module")
def mesh():
    with axes.use_mesh(one_device(), runs.make_config().parallel.rules):
        yield


@pytest.fixture(scope="module")
def model(loaded, mesh) -> LanguageModel:
    return LanguageModel(loaded, 4)


def log_probabilities(loaded: Loaded, ids: list[int]) -> np.ndarray:
    """Of each next token, float64 [tokens, vocab], by one forward pass of the tokens alone."""
    inputs = jnp.asarray(ids, jnp.int32)[None]
    ones = jnp.ones_like(inputs)
    row = Batch(
        inputs=inputs,
        targets=0 * ones,
        weights=ones.astype(jnp.float32),
        segments=ones,
        positions=jnp.arange(len(ids))[None],
        sample=jnp.zeros((1, 2), jnp.uint32),
    )
    logits = np.asarray(_forward(loaded.graph, loaded.params, row), np.float64)[0]
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@functools.partial(jax.jit, static_argnums=0)
def _forward(graph, params, row: Batch) -> jax.Array:
    module = nnx.merge(graph, params)
    return module.unembed(module(row).hidden)


@pytest.fixture(scope="module")
def expected(loaded, mesh) -> list[tuple[float, bool]]:
    return loop(loaded, PAIRS)


def loop(loaded: Loaded, pairs) -> list[tuple[float, bool]]:
    """Answer one request after another; padded to one length after the tokens, which a causal model does not see."""
    answers = []
    for context, continuation in pairs:
        ids = [*(context or [256]), *continuation][-65:]
        scores = log_probabilities(loaded, ids[:-1] + [0] * (65 - len(ids)))
        at = range(len(ids) - 1 - len(continuation), len(ids) - 1)
        answers.append(
            (
                sum(scores[i, token] for i, token in zip(at, continuation, strict=True)),
                all(scores[i].argmax() == token for i, token in zip(at, continuation, strict=True)),
            )
        )
    return answers


def assert_equal(answers, expected):
    assert len(answers) == len(expected)
    for (score, is_greedy), (other, other_greedy) in zip(answers, expected, strict=True):
        assert score == pytest.approx(other, abs=2e-4, rel=1e-6) and is_greedy == other_greedy


def test_loglikelihoods_equal_a_forward_pass_of_each_request(model, expected):
    cut = model.num_cut
    assert_equal(model.loglikelihoods(PAIRS), expected)
    assert model.num_cut - cut == 2  # 65 tokens fit, since the last one is not read
    assert expected[9] == (0, True)


def test_the_first_tokens_that_greedy_decoding_would_write(loaded, model):
    context, greedy = PAIRS[3][0], []
    for _ in range(4):
        ids = [*context, *greedy]
        greedy.append(int(log_probabilities(loaded, ids + [0] * (64 - len(ids)))[len(ids) - 1].argmax()))
    one, two, three, four = greedy
    pairs = [(context, greedy), (context, [one, two, 255 - three, four]), (context, [255 - one, two]), (context, [])]
    assert model.count_greedy(pairs) == [4, 2, 0, 0]


def test_requests_that_share_their_inputs_have_answers_of_their_own(loaded, model):
    """Of one and of several tokens, one of which is the most likely one."""
    context = PAIRS[3][0]
    best = int(log_probabilities(loaded, context + [0] * (64 - len(context)))[len(context) - 1].argmax())
    pairs = [(context, [token]) for token in (5, best, 7)] + [(context[:8], [1, 2, token]) for token in (3, 4)]
    pairs += [([*context[:8], 1, 2], [3]), PAIRS[2]]
    answers = model.loglikelihoods(pairs)
    assert_equal(answers, loop(loaded, pairs))
    assert [is_greedy for _, is_greedy in answers[:3]] == [False, True, False]


def test_a_batch_of_one_equals_a_batch_of_many(loaded, model, expected):
    assert_equal(LanguageModel(loaded, 1).loglikelihoods(PAIRS), expected)
    assert_equal(LanguageModel(loaded, 64).loglikelihoods(PAIRS[::-1]), expected[::-1])


def test_only_the_most_likely_tokens_are_greedy(loaded, model):
    context, ids = PAIRS[3][0], []
    for _ in range(3):
        row = [*context, *ids]
        ids.append(int(log_probabilities(loaded, row + [0] * (64 - len(row)))[len(row) - 1].argmax()))
    others = [[*ids[:2], (ids[2] + 1) % 256], [(ids[0] + 1) % 256, *ids[1:]]]
    answers = model.loglikelihoods([(context, continuation) for continuation in (ids, *others)])
    assert [is_greedy for _, is_greedy in answers] == [True, False, False]


@pytest.mark.parametrize("family", ["moe", "recurrent"])
def test_other_causal_families_answer(family, mesh):
    loaded, pairs = make_loaded(family), [PAIRS[number] for number in (1, 2, 3, 6)]
    assert_equal(LanguageModel(loaded, 4).loglikelihoods(pairs), loop(loaded, pairs))


def make_encdec(name: str, form: str = "trained") -> Loaded:
    tree = {
        "model": {**runs.MODEL, "family": "encdec", "scan": False},
        "objective": {"name": name, "prompt_form": form},
        "data": {"tokenizer": {"kind": "bytes"}, "seq_len": 64},
    }
    config = run_config.apply_overrides(tree, [])
    config = run_config.with_objective(config, run_config.objective(config, runs.BYTES))
    return wrap(config, jax.jit(lambda key: registry.init(config.model, key))(jax.random.key(0)))


def score_answer(loaded: Loaded, source: list[int], before: list[int], answer: list[int]) -> tuple[float, bool]:
    """By one forward pass of the encoder and the decoder, which reads `before` and the answer."""
    read = [*before, *answer][:-1]
    pad = lambda ids: jnp.asarray(ids + [0] * (72 - len(ids)), jnp.int32)[None]
    real = lambda ids: pad([1] * len(ids))
    row = Batch(
        inputs=pad(read),
        targets=0 * pad(read),
        weights=real(read).astype(jnp.float32),
        segments=real(read),
        positions=jnp.arange(72)[None],
        sample=jnp.zeros((1, 2), jnp.uint32),
        source=pad(source),
        source_segments=real(source),
        source_positions=jnp.arange(72)[None],
    )
    logits = _forward(loaded.graph, loaded.params, row)[0]
    scores = np.asarray(jax.nn.log_softmax(logits), np.float64)[len(before) - 1 :][: len(answer)]
    return float(sum(scores[range(len(answer)), answer])), scores.argmax(-1).tolist() == answer


@pytest.mark.parametrize(("name", "form"), [("span", "trained"), ("prefix", "trained"), ("span", "plain")])
def test_encoder_decoders_score_an_answer_to_their_source(name, form, mesh):
    loaded = make_encdec(name, form)
    model, start = LanguageModel(loaded, 4), loaded.config.model.decoder_start_id
    gap = list(loaded.objective.vocabulary.ids[:1])
    begin, frame = {
        "span": ([start, *gap], lambda ids: [*ids, *gap]),  # what fills the first gap
        "prefix": ([start], lambda ids: [256, *ids]),
        "plain": ([start], lambda ids: [*ids, 257]),
    }[name if form == "trained" else form]
    texts = [("a question", " yes"), ("a question", " yez"), ("spaces  ", "b"), ("", "only this"), ("q", "c" * 40)]
    texts += [("x" * 100, "cut on the left"), ("another question", " yes"), ("a", "")]
    pairs, cut = [model.encode_pair(*pair) for pair in texts], model.num_cut
    sources = [frame(context.rstrip().encode())[-64:] for context, _ in texts]
    answers = [list((context[len(context.rstrip()) :] + text).encode()) for context, text in texts]
    expected = [score_answer(loaded, *each) for each in zip(sources, [begin] * len(texts), answers, strict=True)]
    assert_equal(model.loglikelihoods(pairs), expected)
    assert model.num_cut - cut == 1
    long = [97] * 70  # the first window after an empty prompt, the rest after what it continues
    windows = [(frame([]), long[:64]), (frame([97] * 59), long[64:])]
    scores = [score_answer(loaded, source[-64:], begin, answer)[0] for source, answer in windows]
    assert model.rolling([long, [98]]) == pytest.approx([sum(scores), score_answer(loaded, frame([]), begin, [98])[0]])


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_any_mesh_gives_the_same_answers(loaded, expected, shape):
    config = loaded.config
    with axes.use_mesh(make_mesh(MeshConfig(**{"data": 1, **shape})), config.parallel.rules):
        _, shapes, names = registry.abstract(config.model)
        params = jax.device_put(loaded.params, axes.shardings(names, shapes))
        answers = LanguageModel(dataclasses.replace(loaded, params=params), 8).loglikelihoods(PAIRS)
    assert_equal(answers, expected)


def test_rolling_scores_each_token_once(loaded, model):
    """Windows of 64 tokens; the last one after as many tokens as fit, as in lm-eval's documentation."""
    assert split_windows(range(10), -1, 4) == [([-1], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    scores = model.rolling_tokens(TEXTS)
    for ids, score, total in zip(TEXTS, scores, model.rolling(TEXTS), strict=True):
        expected = []
        for start in range(0, len(ids), 64):
            end = min(start + 64, len(ids))
            row = ([256, *ids])[max(0, end - 64) : end]
            by_token = log_probabilities(loaded, row + [0] * (64 - len(row)))[: len(row)]
            expected += [by_token[i - end, ids[i]] for i in range(start, end)]
        np.testing.assert_allclose(score, expected, atol=2e-5, rtol=1e-5)
        assert total == pytest.approx(sum(expected), abs=2e-4) and len(score) == len(ids)


def test_generated_text_is_that_of_generate_and_ends_before_a_stop_string(model):
    prompts = [[256, *ids] for ids in (b"a", b"some longer prompt", b"abc", b"x" * 40, b"another")]
    expected = runs.generate_texts(prompts, Sampling(max_tokens=8, temperature=0))
    assert model.generate(prompts, max_tokens=8) == expected
    stop = expected[0][2]
    assert model.generate(prompts, max_tokens=8, stop=[stop]) == [text.split(stop)[0] for text in expected]
    cut = model.num_cut
    long = [256] + [97] * 100
    assert model.generate([long], max_tokens=8) == model.generate([long[-56:]], max_tokens=8)
    assert model.num_cut == cut + 1


PREFIX = {"causal": 256, "seq2seq": 257}


@pytest.mark.parametrize("backend", PREFIX)
def test_pairs_are_split_as_lm_eval_does(backend, model, mesh):
    from lm_eval.api.model import TemplateLM

    if backend == "seq2seq":  # the hf backend puts the end of a text after a source, and nothing around an answer
        model = LanguageModel(make_encdec("span", "plain"), 4)

    def tok_encode(text: str, add_special_tokens: bool | None = None) -> list[int]:
        return model.encode(text) if add_special_tokens is False else model.encode_prompt(text)

    peer: Any = types.SimpleNamespace(tok_encode=tok_encode, prefix_token_id=PREFIX[backend], backend=backend)
    peer._encode_pair = lambda context, continuation: TemplateLM._encode_pair(peer, context, continuation)
    peer._loglikelihood_tokens = lambda requests, **options: [ids for _, *ids in requests]
    texts = [("a question", " an answer"), ("", "only this"), ("spaces  ", "b")]
    texts += [("", "<s>starts"), ("<s>x", "y")] if backend == "causal" else []
    requests: Any = [types.SimpleNamespace(args=pair) for pair in texts]
    expected = TemplateLM.loglikelihood(peer, requests, disable_tqdm=True)
    assert [list(model.encode_pair(*pair)) for pair in texts] == expected


def test_models_and_requests_that_have_no_answer_are_refused(loaded, model, mesh):
    with pytest.raises(UserError, match=r"model\.family='encoder' does not generate text"):
        LanguageModel(make_loaded("encoder"), 4)
    with pytest.raises(UserError, match="request 1: its continuation has 65 tokens, and the model reads 64"):
        model.loglikelihoods([([1], [2]), ([1], [2] * 65)])
    with pytest.raises(UserError, match="request 0 contains a token id outside of 0 to 258"):
        model.loglikelihoods([([1], [259])])
    with pytest.raises(UserError, match="max_tokens=64: must be below 64"):
        model.generate([[1]], max_tokens=64)
    with (
        axes.use_mesh(make_mesh(MeshConfig(data=8)), loaded.config.parallel.rules),
        pytest.raises(UserError, match=r"--batch=3 is not divisible by .* = 8"),
    ):
        LanguageModel(loaded, 3)
