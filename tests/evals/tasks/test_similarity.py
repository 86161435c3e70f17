"""Similarity of texts: a loop over tokens by the published formulas gives the same scores as batches."""

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

from flax import nnx
import jax
import numpy as np
import pytest
import scipy.stats

from llmjax.data.store.tokenizer import Bytes
from llmjax.errors import UserError
from llmjax.evals.config import TaskConfig
from llmjax.evals.results import Options
from llmjax.evals.tasks import run, similarity
from llmjax.inference import embed
from llmjax.inference.embed import Embedding
from llmjax.models import registry
from llmjax.parallel import axes
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.run import config as run_config
from llmjax.run.loading import Loaded
from tests.evals.tasks.models import evaluate, make_loaded, wrap, write_records
from tests.serve import runs
from tests.train.trainer import one_device

RNG = np.random.default_rng(0)
WORDS = ["".join(RNG.choice(list("abcdefgh "), size)) for size in RNG.choice([3, 8, 13, 27], 24)]
PAIRS = list(zip(WORDS[::2], WORDS[1::2], strict=True))
OBJECTIVES = {"decoder": "causal", "encoder": "masked", "recurrent": "causal", "encdec": "span"}
ALL = np.ones(runs.make_config().model.vocab_size, np.float32)


@pytest.fixture(scope="module", autouse=True)
def mesh():
    with axes.use_mesh(one_device(), runs.make_config().parallel.rules):
        yield


@functools.cache
def load(family: str) -> Loaded:
    """A model with random parameters, on bytes."""
    if family == "decoder":
        return make_loaded()
    tree = {"model": {**runs.MODEL, "family": family}, "objective": {"name": OBJECTIVES[family]}}
    if family == "recurrent":
        tree["model"] = {"family": family, "num_layers": 1, "embed": 32}
    config = run_config.apply_overrides({**tree, "data": {"tokenizer": {"kind": "bytes"}, "seq_len": 64}}, [])
    objective = run_config.objective(config, runs.BYTES)
    config = run_config.with_objective(config, objective)
    params = jax.jit(lambda key: jax.tree.map(lambda p: p * 3, registry.init(config.model, key)))(jax.random.key(0))
    return wrap(config, params, fingerprint=family)


compute_states = jax.jit(embed.hidden_states, static_argnames="reads_source")


def read_states(loaded: Loaded, text: str) -> tuple[np.ndarray, np.ndarray]:
    """(vector by mean pooling, states [bytes, embed]) of a text alone, in a row without padding."""
    content = text.encode()
    before, after = loaded.tokenizer.prompt_frame or ((256,), ())
    row = np.array([*before, *content, *after], np.int32)
    model, reads_source = nnx.merge(loaded.graph, loaded.params), loaded.config.model.reads_source
    states = np.asarray(compute_states(model, embed.pad_rows([row], (1, len(row))), reads_source=reads_source))[0]
    return states.mean(axis=0), states[len(before) :][: len(content)]


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def score_by_loop(loaded: Loaded, pair: tuple[str, str], weights: dict[int, float]) -> list[float]:
    """[cosine, precision, recall, F1] by the formulas of section 3 of the paper, one token after another.

    F1, a harmonic mean, is 0 unless precision and recall are positive.
    """
    (vector, states), (other_vector, other_states) = (read_states(loaded, text) for text in pair)
    candidate, reference = (text.encode() for text in pair)
    precision = recall = 0.0
    for token, state in zip(candidate, states, strict=True):
        precision += weights[token] * max(cosine(state, other) for other in other_states)
    for token, state in zip(reference, other_states, strict=True):
        recall += weights[token] * max(cosine(state, other) for other in states)
    precision /= sum(weights[token] for token in candidate)
    recall /= sum(weights[token] for token in reference)
    f1 = 2 * precision * recall / (precision + recall) if min(precision, recall) > 0 else 0.0
    return [cosine(vector, other_vector), precision, recall, f1]


def write_pairs(folder: pathlib.Path, pairs: list[tuple[str, str]] = PAIRS, **fields: list[Any]) -> str:
    records = [{"text": text, "reference": reference} for text, reference in pairs]
    for name, values in fields.items():
        for record, value in zip(records, values, strict=True):
            record[name] = value
    return write_records(folder / "a.jsonl", records)


@pytest.mark.parametrize("idf", [True, False], ids=["idf", "equal weights"])
def test_the_published_formulas(tmp_path, idf):
    loaded, counts = make_loaded(), [sum(byte in reference.encode() for _, reference in PAIRS) for byte in range(256)]
    weights = {byte: -math.log((1 + count) / (1 + len(PAIRS))) if idf else 1.0 for byte, count in enumerate(counts)}
    record, lines = evaluate(tmp_path, loaded, TaskConfig(kind="similarity", path=write_pairs(tmp_path), idf=idf))
    expected = np.array([score_by_loop(loaded, pair, weights) for pair in PAIRS])
    actual = np.array([[line[name] for name in similarity.MEASURES] for line in lines])
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert [line["input"] for line in lines] == [list(pair) for pair in PAIRS]
    # The baseline: each text with the reference of another example.
    others = similarity.draw_others(len(PAIRS))
    assert sorted(others) == list(range(len(PAIRS))) and all(others != np.arange(len(PAIRS)))
    random_pairs = [(PAIRS[number][0], PAIRS[other][1]) for number, other in enumerate(others)]
    baseline = np.mean([score_by_loop(loaded, pair, weights) for pair in random_pairs], axis=0)
    assert list(record["baseline"].values()) == pytest.approx(baseline.tolist(), abs=1e-5)
    assert (record["main"], record["n"], record["note"]) == ("f1", len(PAIRS), similarity.NOTE)
    for name, column, b in zip(similarity.MEASURES, expected.T, baseline, strict=True):
        assert record["metrics"][name]["value"] == pytest.approx(column.mean(), abs=1e-5)
        if name != "cosine":
            rescaled = (column - b) / (1 - b)
            assert [line[f"{name}_rescaled"] for line in lines] == pytest.approx(rescaled.tolist(), abs=1e-4)


def test_generated_text_is_compared_in_the_states_of_another_run(tmp_path):
    runs.write_run(tmp_path / "embedder", "encoder")
    records = [
        {"question": word, "answer": [word[::-1], word] if number else word} for number, word in enumerate(WORDS[:3])
    ]
    task = TaskConfig(
        kind="generate",
        path=write_records(tmp_path / "a.jsonl", records),
        max_tokens=6,
        stop=("never",),
        metrics=("bertscore", "cosine"),
        embedder=str(tmp_path / "embedder"),
    )
    record, lines = evaluate(tmp_path, make_loaded(), task)
    assert record["main"] == "bertscore" and any(line["prediction"] for line in lines)
    embedder, weights = wrap(runs.make_config("encoder"), runs.make_params("encoder")), dict.fromkeys(range(256), 1.0)
    for line in lines:
        if line["prediction"]:
            scores = np.array([score_by_loop(embedder, (line["prediction"], each), weights) for each in line["target"]])
            assert [line["cosine"], line["bertscore"]] == pytest.approx(scores.max(axis=0)[[0, 3]].tolist(), abs=1e-5)
    assert record["metrics"]["cosine"]["value"] == pytest.approx(np.mean([line["cosine"] for line in lines]))


@pytest.mark.parametrize("family", ["encoder", "recurrent", "encdec"])
def test_families(family):
    loaded = load(family)
    vocab_size = loaded.config.model.vocab_size
    weights, is_word = np.ones(vocab_size, np.float32), np.arange(vocab_size) < 256
    rows, _ = embed.encode_texts([text for pair in PAIRS[:2] for text in pair], runs.BYTES, Embedding(), None)
    actual = similarity.score_pairs(loaded, "mean", rows[::2], rows[1::2], weights, is_word)
    expected = [score_by_loop(loaded, pair, dict.fromkeys(range(256), 1.0)) for pair in PAIRS[:2]]
    np.testing.assert_allclose(actual, expected, atol=1e-5)


class Framed(Bytes):
    """As an imported tokenizer that puts one token before a text and one after it."""

    prompt_frame = (256,), (257,)


def test_tokens_around_a_text_match_nothing(tmp_path):
    loaded = dataclasses.replace(make_loaded(), tokenizer=Framed())
    task = TaskConfig(kind="similarity", path=write_pairs(tmp_path, PAIRS[:4]), idf=False)
    _, lines = evaluate(tmp_path, loaded, task)
    expected = [score_by_loop(loaded, pair, dict.fromkeys(range(256), 1.0)) for pair in PAIRS[:4]]
    assert [[line[name] for name in similarity.MEASURES] for line in lines] == pytest.approx(
        np.array(expected), abs=1e-5
    )


def test_a_pair_does_not_depend_on_the_other_pairs():
    rows, _ = embed.encode_texts([*WORDS, *WORDS[::-1], "x" * 40], Bytes(), Embedding(), None)
    args = (ALL, np.arange(len(ALL)) < 256)
    together = similarity.score_pairs(make_loaded(), "mean", rows * 6, rows[::-1] * 6, *args)
    alone = [
        similarity.score_pairs(make_loaded(), "mean", [row], [other], *args)[0]
        for row, other in zip(rows, rows[::-1], strict=True)
    ]
    np.testing.assert_array_equal(together, np.tile(alone, (6, 1)))


def test_any_mesh_gives_the_same_scores():
    loaded, config = make_loaded(), make_loaded().config
    rows, _ = embed.encode_texts([*WORDS, "x" * 300], Bytes(), Embedding(), None)
    args = ("mean", rows, rows[::-1], ALL, np.arange(len(ALL)) < 256)
    expected = similarity.score_pairs(loaded, *args)
    with axes.use_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), config.parallel.rules):
        _, shapes, names = registry.abstract(config.model)
        params = jax.device_put(loaded.params, axes.shardings(names, shapes))
        actual = similarity.score_pairs(dataclasses.replace(loaded, params=params), *args)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_text_is_as_similar_to_itself_as_can_be(tmp_path):
    path = write_pairs(tmp_path, [(text, text) for text in WORDS])
    record, lines = evaluate(tmp_path, make_loaded(), TaskConfig(kind="similarity", path=path))
    scores = [[line[name] for name in (*similarity.MEASURES, "f1_rescaled")] for line in lines]
    np.testing.assert_allclose(scores, 1, atol=1e-5)
    assert record["baseline"]["f1"] < 0.99
    path = write_pairs(tmp_path, [("the same", "the same")] * 3)
    record, _ = evaluate(tmp_path, make_loaded(), TaskConfig(kind="similarity", path=path))
    assert record["metrics"]["f1_rescaled"]["value"] is None


def test_correlations_with_people(tmp_path):
    people = [round(float(score), 1) for score in RNG.uniform(0, 5, len(PAIRS))]
    path = write_pairs(tmp_path, people=people, source=["a", "b"] * (len(PAIRS) // 2))
    task = TaskConfig(kind="similarity", path=path, score_field="people", group_field="source")
    record, lines = evaluate(tmp_path, make_loaded(), task)
    assert record["main"] == "cosine_spearman" and [line["target"] for line in lines] == people
    for name in similarity.MEASURES:
        column = [line[name] for line in lines]
        for kind, statistic in (("spearman", scipy.stats.spearmanr), ("pearson", scipy.stats.pearsonr)):
            metric = record["metrics"][f"{name}_{kind}"]
            assert metric["value"] == pytest.approx(statistic(column, people).statistic, abs=1e-9)
            assert metric["low"] <= metric["value"] <= metric["high"]
    assert record["metrics"]["f1/a"]["value"] == pytest.approx(np.mean([line["f1"] for line in lines[::2]]))


def test_texts_without_words_and_without_rare_words(tmp_path):
    """An empty text matches nothing; a token of every reference counts nothing, unless there are no others."""
    path = write_pairs(tmp_path, [("", "ab"), ("ab", ""), ("aa", "ab")])
    record, lines = evaluate(tmp_path, make_loaded(), TaskConfig(kind="similarity", path=path))
    assert [[line[name] for name in similarity.MEASURES[1:]] for line in lines[:2]] == [[0, 0, 0]] * 2
    path = write_pairs(tmp_path, [("a", "ab")])
    record, (line,) = evaluate(tmp_path, make_loaded(), TaskConfig(kind="similarity", path=path))
    expected = score_by_loop(make_loaded(), ("a", "ab"), dict.fromkeys(range(256), 1.0))
    assert [line[name] for name in similarity.MEASURES] == pytest.approx(expected, abs=1e-5)
    # There is no other reference for a baseline.
    assert record["metrics"]["f1_rescaled"]["value"] is None and record["metrics"]["f1"]["value"] > 0


def test_vectors_are_pooled_as_an_imported_folder_says(tmp_path):
    task, folder = TaskConfig(kind="similarity", path=write_pairs(tmp_path)), tmp_path / "tokenizer" / "1_Pooling"
    evaluate(tmp_path, make_loaded(), task)
    folder.mkdir(parents=True)
    modules = [
        {"type": f"models.{name}", "path": path} for name, path in (("Transformer", ""), ("Pooling", folder.name))
    ]
    (folder.parent / "modules.json").write_text(json.dumps(modules))
    (folder / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    record, lines = evaluate(tmp_path, make_loaded(), task)
    assert record["settings"]["embedding"]["pooling"] == "first"
    # The state of BOS, before which a decoder reads nothing.
    assert [line["cosine"] for line in lines] == pytest.approx([1.0] * len(PAIRS))


@pytest.mark.parametrize("objective", ["classify", "regress"])
def test_a_run_with_a_head_for_labels(tmp_path, objective):
    loaded, path = make_loaded(objective), write_pairs(tmp_path, PAIRS[:3])
    fields = [("eval.tasks.mine.kind", "similarity"), ("eval.tasks.mine.path", path)]
    config = run_config.apply_overrides(run_config.to_json(loaded.config), fields)
    task = run.select_tasks(config, ["mine"], Options())["mine"]
    _, lines = evaluate(tmp_path, loaded, task)
    expected = [cosine(*(read_states(loaded, text)[0] for text in pair)) for pair in PAIRS[:3]]
    assert [line["cosine"] for line in lines] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UserError, match="shots=2: kind='similarity' does not use it"):
        run.select_tasks(config, ["mine"], Options(shots=2))


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        ({"reference": "a"}, {}, r"eval\.tasks\.mine\.text_field: .*a\.jsonl:1 has no 'text'"),
        ({"text": "a", "referense": "b"}, {}, r"pair_field: .* has no 'reference'; .*did you mean 'referense'"),
        ({"text": "a", "reference": "b"}, {"score_field": "score"}, r"score_field: .* has no 'score'"),
        (
            {"text": "a", "reference": "b", "score": "high"},
            {"score_field": "score"},
            r"score_field: .*a\.jsonl:1 has 'high' in 'score', which is not a number",
        ),
    ],
)
def test_bad_records(tmp_path, record, options, message):
    path = write_records(tmp_path / "a.jsonl", [record])
    with pytest.raises(UserError, match=message):
        evaluate(tmp_path, make_loaded(), TaskConfig(kind="similarity", path=path, **options))
