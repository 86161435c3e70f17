"""Objectives: nothing leaves its document, rates are as asked, rows fit, draws are keyed by row and seed."""

import dataclasses
import math

import numpy as np
import pytest

from llmjax.data.batches.packing import Rows, fill_rows, open_packing
from llmjax.data.batches.pipeline import EvalData, TrainData
from llmjax.data.batches.rng import CounterRng
from llmjax.data.config import DataConfig, SourceConfig
from llmjax.data.objectives.row_chunks import build_causal_batch
from llmjax.errors import UserError
from tests.data.objectives.masks import (
    BYTES,
    CASES,
    EOS,
    SEQ_LEN,
    assert_share,
    build_case,
    documents,
    make,
    rows_of,
    segments_of,
    write_folder,
)
from tests.data.stores import BOS, EOS as STORE_EOS, write_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("objectives"))


class TestCausal:
    """What is predicted, from what, and what counts."""

    def test_first_tokens_and_ends_are_targets_and_padding_is_not(self, tmp_path):
        store = write_store(tmp_path / "s", [np.array([10, 11, STORE_EOS]), np.array([20, STORE_EOS])])
        plan = open_packing(store, 8, "best_fit", tmp_path / "plans")
        batch = build_causal_batch(fill_rows(store, plan.chunks(np.arange(1)), 1, 8), np.array([(5 << 32) + 7]))
        np.testing.assert_array_equal(batch.inputs, [[BOS, 10, 11, BOS, 20, 0, 0, 0]])
        np.testing.assert_array_equal(batch.targets, [[10, 11, STORE_EOS, 20, STORE_EOS, 0, 0, 0]])
        np.testing.assert_array_equal(batch.weights, [[1, 1, 1, 1, 1, 0, 0, 0]])
        np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 2, 2, 0, 0, 0]])
        np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 0, 1, 0, 0, 0]])
        np.testing.assert_array_equal(batch.sample, [[5, 7]])

    def test_continued_document_is_predicted_from_its_own_past(self, tmp_path):
        store = write_store(tmp_path / "s", [np.array([10, 11, 12, 13, 14, STORE_EOS])])
        for algorithm in ("best_fit", "concat"):
            plan = open_packing(store, 4, algorithm, tmp_path / "plans")
            batch = build_causal_batch(fill_rows(store, plan.chunks(np.arange(2)), 2, 4), np.arange(2))
            np.testing.assert_array_equal(batch.inputs, [[BOS, 10, 11, 12], [13, 14, 0, 0]])
            np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 3], [0, 1, 0, 0]])
            assert batch.weights.sum() == 6


@pytest.mark.parametrize(("case", "trained"), [("source prefix", [BYTES.bos_id, 65, 66]), ("span", [65, 66, 259])])
def test_prompt_has_the_form_of_training_or_is_plain_text(case, trained):
    """A source that begins, a source with a gap at its end; plain, both are the text and EOS."""
    text = np.array([65, 66], np.int32)
    assert make(case).prompt(text).tolist() == trained
    plain = make(case, prompt_form="plain")
    assert plain.prompt(text).tolist() == [65, 66, EOS] and plain.prompt(text).dtype == np.int32
    assert plain.fingerprint == make(case).fingerprint, "a run goes on whatever its prompts look like"


class TestEveryObjective:
    """What all of them promise."""

    @pytest.mark.parametrize("case", CASES)
    def test_layout(self, folder, case):
        """Types, widths, positions from 0 in each segment, nothing in the padding, and ids that the model has."""
        objective, rows, batch = build_case(folder, case)
        sides = [("inputs", "targets", "weights", "segments", "positions")]
        sides += [("source", "source_segments", "source_positions")] if batch.source is not None else []
        assert (batch.source is not None) == CASES[case][1]
        for names in sides:
            fields = {name: getattr(batch, name) for name in names}
            width = objective.target_len if "inputs" in names else SEQ_LEN
            segments, positions = fields[names[-2]], fields[names[-1]]
            for name, value in fields.items():
                assert value.shape == (len(rows.targets), width)
                assert value.dtype == (np.float32 if name == "weights" else np.int32)
                assert not value[segments == 0].any()
                if name in ("inputs", "targets", "source"):
                    assert value.min() >= 0 and value.max() < objective.min_vocab_size
            for numbers in segments_of(positions, segments):
                assert numbers == list(range(len(numbers))) and numbers
            used = (segments > 0).sum(axis=1)
            assert (segments[np.arange(width) < used[:, None]] > 0).all()
            np.testing.assert_array_equal(segments.max(axis=1), rows.segments.max(axis=1))
        assert batch.weights.sum() > 0

    @pytest.mark.parametrize("case", CASES)
    def test_a_row_depends_on_itself_and_its_sample_alone(self, folder, case):
        objective, rows, batch = build_case(folder, case)
        _, samples = rows_of(folder, objective)
        rng = np.random.default_rng(0)
        for size in (1, 3, len(samples)):
            chosen = rng.permutation(len(samples))[:size]
            some = Rows.combine(lambda value, chosen=chosen: value[chosen], rows)
            part = objective.build_batch(some, samples[chosen], CounterRng("t", 3))
            for name, value in vars(batch).items():
                if isinstance(value, np.ndarray):
                    np.testing.assert_array_equal(value[chosen], getattr(part, name), err_msg=name)

    @pytest.mark.parametrize("case", [case for case in CASES if case != "causal"])
    def test_draws_depend_on_seed_and_sample(self, folder, case):
        objective, rows, batch = build_case(folder, case)
        _, samples = rows_of(folder, objective)
        for other in (
            objective.build_batch(rows, samples, CounterRng("t", 4)),
            objective.build_batch(rows, samples + len(samples), CounterRng("t", 3)),
        ):
            assert (other.inputs != batch.inputs).any() or (other.weights != batch.weights).any()

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("seq_len", [8, 33, 256])
    def test_every_row_fits(self, folder, case, seq_len):
        objective = make(case, seq_len)
        rows, samples = rows_of(folder, objective)
        batch = objective.build_batch(rows, samples, CounterRng(0))  # asserts that no row is too full
        total = sum(map(len, documents(0)))
        assert (rows.segments > 0).sum() == total
        assert batch.targets.shape == (len(samples), objective.target_len)

    @pytest.mark.parametrize("case", CASES)
    def test_batches_do_not_depend_on_hosts_and_prefetch(self, folder, case):
        objective = make(case)
        config = DataConfig(
            sources={"books": SourceConfig(weight=0.7), "code": SourceConfig(weight=0.3)}, seq_len=SEQ_LEN, prefetch=0
        )
        open_data = lambda config: TrainData(folder, config, seed=1, global_batch=6, objective=objective)
        take = lambda data, rows: [
            next(stream)[0] for stream in [data.batches(data.start(), lambda _: rows)] for _ in range(6)
        ]
        full = take(open_data(config), np.arange(6))
        for rows, ahead in ((np.array([5, 0, 3]), 3), (np.arange(6), 2)):
            data = open_data(dataclasses.replace(config, prefetch=ahead))
            for batch, local in zip(full, take(data, rows), strict=True):
                for name, value in vars(batch).items():
                    if isinstance(value, np.ndarray):
                        np.testing.assert_array_equal(value[rows], getattr(local, name), err_msg=name)
            data.close()

    @pytest.mark.parametrize("case", CASES)
    def test_evaluation_repeats_itself(self, folder, case):
        """The same positions are masked at every evaluation and batch size, and no padding."""
        objective, config = make(case), DataConfig(seq_len=SEQ_LEN)
        evaluations = []
        for batch in (4, 7):
            data = EvalData(folder, config, split="validation", source="code", batch=batch, objective=objective)
            batches = list(data.batches(np.arange(batch)))
            for name in ("inputs", "targets", "weights", "segments"):
                rows = np.concatenate([getattr(b, name) for b in batches])
                assert not rows[data.rows :].any()
                evaluations.append(rows[: data.rows])
        for one, other in zip(evaluations[:4], evaluations[4:], strict=True):
            np.testing.assert_array_equal(one, other)

    def test_error_names_the_change_on_resume(self, folder):
        config = DataConfig(sources={"books": SourceConfig()}, seq_len=SEQ_LEN)
        open_data = lambda case, **f: TrainData(folder, config, seed=1, global_batch=6, objective=make(case, **f))
        state = open_data("causal").start()
        assert state.fingerprint.count(":") == 2
        with pytest.raises(UserError, match=r"the objective changed since .*: causal then, masked rate=0\.15 now"):
            open_data("masked").check(state)
        with pytest.raises(UserError, match=r"masked rate=0\.15 then, masked rate=0\.3 now"):
            open_data("masked", rate=0.3).check(open_data("masked").start())
        open_data("span").check(open_data("span").start())


class TestPrefix:
    """A decoder attends to its prefix from both sides, and the prefix is not scored."""

    def test_marks_and_weights(self, folder):
        _, rows, batch = build_case(folder, "prefix")
        np.testing.assert_array_equal(batch.inputs, rows.inputs)
        np.testing.assert_array_equal(batch.targets, rows.targets)
        lengths, shares = [], []
        for marks, weights in zip(
            segments_of(batch.prefix, batch.segments), segments_of(batch.weights, batch.segments), strict=True
        ):
            size = sum(marks)
            assert marks == [True] * size + [False] * (len(marks) - size) and size >= 1
            # The last position of the prefix is the first that is scored: no input contains its target.
            assert weights == [0] * (size - 1) + [1] * (len(marks) - size + 1)
            lengths.append(len(marks))
            shares.append((size - 0.5) / len(marks))
        assert not batch.prefix[batch.segments == 0].any()
        assert np.mean(shares) == pytest.approx(0.5, abs=5 / math.sqrt(12 * len(shares)))

    @pytest.mark.parametrize("case", ["source prefix", "short source prefix"])
    def test_source_and_target_are_the_text(self, folder, case):
        objective, rows, batch = build_case(folder, case)
        chunks = zip(
            segments_of(batch.source, batch.source_segments),
            segments_of(batch.targets, batch.segments),
            segments_of(batch.inputs, batch.segments),
            segments_of(rows.inputs, rows.segments),
            segments_of(rows.targets, rows.segments),
            strict=True,
        )
        for source, target, inputs, before, tokens in chunks:
            assert source + target[:-1] == before and target[-1] == tokens[-1]
            assert inputs == [BYTES.bos_id, *target[:-1]]
        assert objective.target_len == (40 if case.startswith("short") else SEQ_LEN)


class TestMasked:
    """15% hidden, of these 80% masks, 10% others, 10% as they were."""

    @pytest.mark.parametrize(("rate", "words"), [(0.15, False), (0.4, False), (0.15, True)])
    def test_share_of_masked_tokens(self, folder, rate, words):
        objective, rows, batch = build_case(folder, "masked", rate=rate, whole_words=words)
        (mask,) = objective.vocabulary.ids
        assert (mask, objective.min_vocab_size, objective.vocabulary.names[mask]) == (259, 260, "[MASK]")
        hidden = batch.weights > 0
        np.testing.assert_array_equal(batch.targets, rows.inputs)
        np.testing.assert_array_equal(batch.inputs[~hidden], batch.targets[~hidden])
        text = (rows.segments > 0) & ~((rows.positions == 0) & (rows.inputs == BYTES.bos_id))
        assert not hidden[~text].any()
        if not words:
            assert_share(hidden[text], rate)
        assert_share(batch.inputs[hidden] == mask, 0.8)
        noise = batch.inputs[hidden & (batch.inputs != mask)]
        assert noise.max() < 256 and len(np.unique(noise)) > 60
        assert_share(batch.inputs[hidden] == batch.targets[hidden], 0.1 + 0.1 / 256)

    def test_every_inner_token_can_be_corrupted(self, folder):
        """Each chunk begins with the token before it, so every token of a cut document is a target exactly once."""
        _, rows, batch = build_case(folder, "masked")
        text = (rows.segments > 0) & ~((rows.positions == 0) & (rows.inputs == BYTES.bos_id))
        expected = np.sort(np.concatenate([document[:-1] for document in documents(0)]))
        np.testing.assert_array_equal(np.sort(batch.targets[text]), expected)

    def test_whole_words(self, folder):
        texts = ["the quick_brown fox; jumps(over) 12th lazy-dog " * 4, "na\u00efve \u4e2d\u6587 words"] * 20
        docs = [np.append(ids, EOS) for ids in BYTES.encode_batch(texts)]
        store = write_store(folder / "words" / "train", docs, bos_id=BYTES.bos_id, vocab_size=259)
        objective = make("masked", 200, whole_words=True)
        plan = open_packing(store, 200, "best_fit", folder / "plans")
        rows = fill_rows(store, plan.chunks(np.arange(plan.rows)), plan.rows, 200)
        batch = objective.build_batch(rows, np.arange(plan.rows), CounterRng(1))
        mask_pairs = set()
        for ids, weights in zip(
            segments_of(batch.targets, batch.segments), segments_of(batch.weights, batch.segments), strict=True
        ):
            joins = [i < 256 and (chr(i).isalnum() or i == ord("_") or i >= 128) for i in ids]
            for i in range(1, len(ids)):
                if joins[i] and joins[i - 1]:
                    assert weights[i] == weights[i - 1]
                else:
                    mask_pairs.add((weights[i - 1], weights[i]))
        assert len(mask_pairs) == 4
        assert_share(batch.weights[batch.targets == ord(" ")] > 0, 0.15)
