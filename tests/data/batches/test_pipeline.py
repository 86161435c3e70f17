"""Batches are a pure function of the data state: hosts and restarts change nothing; evaluation misses nothing."""

import dataclasses
import itertools
import json
import threading

import numpy as np
import pytest

from llmjax.data.batches.packing import ALGORITHMS
from llmjax.data.batches.pipeline import DataState, EvalData, TrainData
from llmjax.data.config import DataConfig, SourceConfig
from llmjax.data.objectives.objective import make_causal_objective
from llmjax.errors import UserError
from tests.data.stores import BOS, EOS, random_documents, write_store

SEQ_LEN, BATCH = 16, 6
WEIGHTED = {"books": SourceConfig(weight=0.7), "code": SourceConfig(weight=0.3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    for seed, name in enumerate(("books", "code", "tiny", "empty")):
        for split in ("train", "validation"):
            documents = random_documents(seed, {"tiny": 1, "empty": 0}.get(name, 200), {"tiny": 9}.get(name, 40))
            write_store(folder / name / split, documents, shards=2, source=name, split=split)
    return folder


def settings(sources=None, **fields) -> DataConfig:
    return DataConfig(sources=sources or WEIGHTED, seq_len=SEQ_LEN, mixture_block=32, **fields)


def train(folder, sources=None, *, seed=0, global_batch=BATCH, schedule=(), **fields) -> TrainData:
    objective = make_causal_objective(SEQ_LEN)
    sizes = {"global_batch": global_batch, "schedule": schedule}
    return TrainData(folder, settings(sources, **fields), seed=seed, objective=objective, **sizes)


def evaluation(folder, source, *, batch, **fields) -> EvalData:
    objective = make_causal_objective(SEQ_LEN)
    return EvalData(folder, settings(**fields), split="validation", source=source, batch=batch, objective=objective)


def take(data, number, state=None, rows=None):
    stream = data.batches(state or data.start(), np.arange if rows is None else lambda size: rows)
    batches = list(itertools.islice(stream, number))
    stream.close()
    return batches


def samples(batch):
    return (batch.sample[:, 0].astype(np.int64) << 32) + batch.sample[:, 1]


def fields(batch):
    return {name: value for name, value in vars(batch).items() if isinstance(value, np.ndarray)}


def assert_same(one, other):
    assert len(one) == len(other)
    for (batch, state), (batch2, state2) in zip(one, other, strict=True):
        assert state == state2
        for name, value in fields(batch).items():
            np.testing.assert_array_equal(value, getattr(batch2, name), err_msg=name)


@pytest.mark.parametrize("packing", ALGORITHMS)
def test_batches_do_not_depend_on_prefetch(folder, packing):
    plain = take(train(folder, packing=packing, prefetch=0), 30)
    for prefetch in (1, 2, 7):
        assert_same(plain, take(train(folder, packing=packing, prefetch=prefetch), 30))


@pytest.mark.parametrize("hosts", [[[0, 1, 2], [3, 4, 5]], [[0], [1, 2], [3], [4, 5]], [[5, 0, 3], [4, 1], [2]]])
def test_batches_do_not_depend_on_hosts(folder, hosts):
    full = take(train(folder), 20)
    for rows in hosts:
        part = take(train(folder), 20, rows=np.array(rows))
        for (batch, state), (local, local_state) in zip(full, part, strict=True):
            assert state == local_state
            for name, value in fields(batch).items():
                np.testing.assert_array_equal(value[rows], getattr(local, name), err_msg=name)


def test_resuming_is_bitwise_exact(folder):
    full = take(train(folder), 25)
    state = DataState.from_json(json.loads(json.dumps(full[9][1].to_json())))
    assert_same(full[10:], take(train(folder), 15, state))


def test_global_batch_may_change_during_a_run(folder):
    full = np.concatenate([batch.targets for batch, _ in take(train(folder), 10)])
    _, state = take(train(folder), 5)[-1]
    more = take(train(folder, global_batch=10), 3, state)
    np.testing.assert_array_equal(np.concatenate([batch.targets for batch, _ in more]), full[30:60])
    assert more[-1][1].next_sample == 60 and more[-1][1].global_batch == 10


SCHEDULE = ((20, 10), (55, 4))


@pytest.mark.parametrize("skip", [(), ((4, 9), (30, 41))], ids=["", "skip"])
def test_a_batch_schedule_skips_and_repeats_no_sample(folder, skip):
    """The samples are those of constant batches, also where the run is resumed in the middle."""
    constant = np.concatenate([samples(batch) for batch, _ in take(train(folder, skip=skip), 12)])
    ramp = take(train(folder, skip=skip, schedule=SCHEDULE), 10)
    sizes = [state.global_batch for _, state in ramp]
    assert sizes == [len(batch.targets) for batch, _ in ramp] and set(sizes) == {BATCH, 10, 4}
    np.testing.assert_array_equal(np.concatenate([samples(batch) for batch, _ in ramp]), constant[: sum(sizes)])
    for number in (2, 5, 8):
        state = DataState.from_json(json.loads(json.dumps(ramp[number - 1][1].to_json())))
        assert_same(ramp[number:], take(train(folder, skip=skip, schedule=SCHEDULE), 10 - number, state))


def test_the_end_of_the_data_with_a_batch_schedule(folder):
    data = train(folder, at_source_end="redistribute", schedule=SCHEDULE)
    total, count = data.remaining(data.start()), 0
    with pytest.raises(UserError, match=rf"{total} batches from sample 0"):
        for count, (_, state) in enumerate(data.batches(data.start(), np.arange), 1):
            assert data.remaining(state) == total - count
    assert count == total


def test_state_is_small_and_points_after_its_batch(folder):
    for number, (batch, state) in enumerate(take(train(folder), 5)):
        np.testing.assert_array_equal(samples(batch), np.arange(number * BATCH, (number + 1) * BATCH))
        assert state.next_sample == (number + 1) * BATCH
        assert len(json.dumps(state.to_json())) < 1024


def test_an_epoch_holds_every_token_once(folder):
    data = train(folder, {"books": SourceConfig()}, global_batch=1)
    source = data._sources[0]
    orders = []
    for epoch in range(2):
        start = data.at(epoch * source.rows)
        batches = [batch for batch, _ in take(data, source.rows, start)]
        tokens = np.concatenate([batch.targets[batch.weights > 0] for batch in batches])
        np.testing.assert_array_equal(np.sort(tokens), np.sort(source.store.read(0, source.store.tokens)))
        orders.append([tuple(batch.targets[0]) for batch in batches])
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_seeds_give_other_orders(folder):
    one, two = take(train(folder, seed=0), 3), take(train(folder, seed=1), 3)
    assert all((a.targets != b.targets).any() for (a, _), (b, _) in zip(one, two, strict=True))


def test_sources_come_in_their_shares(folder):
    data = train(folder)
    (_, state) = take(data, 64)[-1]
    report = data.summary(state)
    counts = {name: report[name]["samples"] for name in report}
    assert counts == {"books": pytest.approx(0.7 * 384, abs=1), "code": pytest.approx(0.3 * 384, abs=1)}
    assert report["code"]["epochs"] == counts["code"] / report["code"]["rows"]
    assert 0.9 < report["books"]["density"] <= 1


def test_order_of_the_named_entries_does_not_matter(folder):
    assert_same(take(train(folder), 5), take(train(folder, dict(reversed(WEIGHTED.items()))), 5))


class TestSkip:
    """Spans are skipped; the other samples keep their order and indices."""

    def test_other_samples_are_unchanged(self, folder):
        full = np.concatenate([batch.targets for batch, _ in take(train(folder), 20)])
        skipped = take(train(folder, skip=((12, 18), (31, 40))), 12)
        index = np.concatenate([samples(batch) for batch, _ in skipped])
        assert index.tolist() == [i for i in range(87) if not (12 <= i < 18 or 31 <= i < 40)]
        np.testing.assert_array_equal(np.concatenate([batch.targets for batch, _ in skipped]), full[index])

    def test_skipped_batch_is_followed_by_the_batches_of_the_plain_run(self, folder):
        """A run that skipped batch 3 has the batches and states of the plain run, one batch earlier."""
        plain = take(train(folder), 12)
        skipped = take(train(folder, skip=((3 * BATCH, 4 * BATCH),)), 11)
        assert_same(plain[:3] + plain[4:], skipped)

    def test_prefetch_and_later_weights_may_change_on_resume(self, folder):
        _, state = take(train(folder), 4)[-1]
        data = train(folder, skip=((0, 3), (24, 30)))
        data.check(state)
        np.testing.assert_array_equal(samples(take(data, 1, state)[0][0]), np.arange(30, 36))


def test_rows_of_one_segment(folder):
    """ "none" has one document in a row; "stream" has the tokens of "concat", seen as one text."""
    none, stream, concat = (take(train(folder, packing=name), 30) for name in ("none", "stream", "concat"))
    places = np.arange(SEQ_LEN)
    for batch, _ in (*none, *stream):
        lengths = (batch.segments > 0).sum(axis=1, keepdims=True)
        np.testing.assert_array_equal(batch.segments, places < lengths)
        np.testing.assert_array_equal(batch.positions, np.where(places < lengths, places, 0))
    assert all((batch.inputs[:, 1:] != BOS).all() for batch, _ in none)
    assert any((batch.inputs[:, 1:] == BOS).any() for batch, _ in stream)
    for (batch, _), (windows, _) in zip(stream, concat, strict=True):
        for name in ("inputs", "targets", "weights", "sample"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(windows, name), err_msg=name)
    assert any((batch.segments > 1).any() for batch, _ in concat)


class TestCheck:
    """A state is refused where the samples before it would not have been the same."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"seed": 5}, "seed changed since the checkpoint: 0 then, 5 now"),
            ({"packing": "concat"}, r"data\.packing changed since the checkpoint: best_fit then, concat now"),
            ({"packing": "none"}, r"data\.packing changed since the checkpoint: best_fit then, none now"),
            ({"sources": {"books": SourceConfig()}}, "training texts or tokenizer"),
            ({"sources": {"books": SourceConfig(weight=1), "code": SourceConfig(weight=1)}}, "the mixture"),
            ({"weight_schedule": ((23, (("code", 1),)),)}, "the mixture"),
            ({"at_source_end": "redistribute"}, "the mixture"),
        ],
    )
    def test_error_names_the_change(self, folder, change, message):
        _, state = take(train(folder), 4)[-1]
        data = train(folder, **change)
        for use in (data.check, lambda state: data.batches(state, np.arange)):
            with pytest.raises(UserError, match=message):
                use(state)

    def test_a_change_of_mixture_block_or_seq_len_is_refused(self, folder):
        state = train(folder).start()
        config = settings()
        for name, value, message in (
            ("mixture_block", 64, "the mixture"),
            ("seq_len", 8, r"data\.seq_len.*16 then, 8 now"),
        ):
            changed = dataclasses.replace(config, **{name: value})
            objective = make_causal_objective(changed.seq_len)
            data = TrainData(folder, changed, seed=0, global_batch=2, objective=objective)
            with pytest.raises(UserError, match=message):
                data.check(state)

    def test_other_text(self, folder, tmp_path):
        for name in ("books", "code"):
            write_store(tmp_path / name / "train", random_documents(9, 50, 30), source=name)
        with pytest.raises(UserError, match="training texts or tokenizer"):
            train(tmp_path).check(train(folder).start())

    def test_settings_of_future_samples_may_change(self, folder):
        _, state = take(train(folder), 4)[-1]
        later = ((24, (("code", 1),)),)
        train(folder, weight_schedule=later, global_batch=12, prefetch=0, skip=((1, 5),)).check(state)

    def test_a_state_of_another_version(self, folder):
        record = train(folder).start().to_json() | {"version": 9}
        with pytest.raises(UserError, match="version 9"):
            DataState.from_json(record)


class TestEnds:
    """Few rows, no rows, and the end of the data."""

    def test_fewer_rows_than_a_batch(self, folder):
        data = train(folder, {"tiny": SourceConfig()}, global_batch=5)
        assert data._sources[0].rows == 1
        for batch, _ in take(data, 3):
            assert batch.targets.shape == (5, SEQ_LEN)
            assert (batch.targets == batch.targets[0]).all()

    def test_redistribute_ends_with_complete_batches_and_an_error(self, folder):
        data = train(folder, at_source_end="redistribute")
        total = sum(source.rows for source in data._sources)
        assert data.remaining(data.start()) == total // BATCH
        stream, num_samples = data.batches(data.start(), np.arange), 0
        with pytest.raises(UserError, match=rf"training data end after {total} samples.*train\.steps"):
            for batch, state in stream:
                num_samples += len(batch.targets)
                assert data.remaining(state) == (total - num_samples) // BATCH
        assert num_samples == total // BATCH * BATCH

    def test_repeat_continues_with_the_next_epoch(self, folder):
        data = train(folder)
        assert data.remaining(data.start()) is None
        far = data.at(10**9)
        np.testing.assert_array_equal(samples(take(data, 2, far)[1][0]), np.arange(10**9 + BATCH, 10**9 + 2 * BATCH))
        beyond = data.at((1 << 32) - 3)
        np.testing.assert_array_equal(samples(take(data, 1, beyond)[0][0]), np.arange((1 << 32) - 3, (1 << 32) + 3))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"sources": {"empty": SourceConfig()}}, "no training tokens in empty"),
            ({"sources": {"absent": SourceConfig()}}, r"absent/train: no manifest\.json"),
            ({"sources": {"books": SourceConfig(weight=1), "code": SourceConfig()}}, r"code\.weight is not set"),
            ({"global_batch": 0}, r"train\.global_batch=0"),
            ({"prefetch": -1}, r"data\.prefetch=-1"),
            ({"skip": ((5, 5),)}, r"data\.skip entry \(5, 5\)"),
            ({"packing": "first_fit"}, r"data\.packing='first_fit'"),
        ],
    )
    def test_invalid_settings_are_refused(self, folder, change, message):
        with pytest.raises(UserError, match=message):
            train(folder, **change)

    def test_no_sources(self, folder):
        with pytest.raises(UserError, match=r"data\.sources is empty"):
            TrainData(folder, DataConfig(), seed=0, global_batch=1, objective=make_causal_objective(SEQ_LEN))


def test_damage_reaches_the_loop_as_a_user_error_through_the_thread(folder, tmp_path):
    write_store(tmp_path / "main" / "train", random_documents(0, 200, 40))
    path = tmp_path / "main" / "train" / "tokens-00000.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"tokens-00000\.bin is damaged"):
        take(train(tmp_path, {"main": SourceConfig()}, prefetch=3), 1)


def test_close_ends_the_threads(folder):
    data = train(folder, prefetch=3)
    streams = [data.batches(data.start(), np.arange) for _ in range(3)]
    for stream in streams:
        next(stream)
    prefetching = [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]
    assert len(prefetching) >= 3
    data.close()
    for thread in prefetching:
        thread.join(timeout=10)
        assert not thread.is_alive()


class TestEval:
    """Every document of the split exactly once, on any number of hosts."""

    @pytest.mark.parametrize("packing", ALGORITHMS)
    @pytest.mark.parametrize("batch", [1, 4, 7, 1000])
    def test_every_token_once(self, folder, packing, batch):
        data = evaluation(folder, "code", batch=batch, packing=packing)
        batches = list(data.batches(np.arange(batch)))
        assert len(batches) == data.num_batches
        scored = np.concatenate([b.targets[b.weights > 0] for b in batches])
        store = data._source.store
        np.testing.assert_array_equal(np.sort(scored), np.sort(store.read(0, store.tokens)))
        assert data.tokens == scored.size and data.text_bytes == store.text_bytes
        assert sum((b.inputs == BOS).sum() for b in batches) == data.documents == 200
        assert sum(((b.targets == EOS) & (b.weights > 0)).sum() for b in batches) == 200
        assert all(b.targets.shape == (batch, SEQ_LEN) for b in batches)
        padded = batches[-1].segments[(data.rows - 1) % batch + 1 :]
        assert not padded.any() and not batches[-1].weights[(data.rows - 1) % batch + 1 :].any()

    def test_batches_do_not_depend_on_hosts(self, folder):
        data = evaluation(folder, "code", batch=8)
        full = list(data.batches(np.arange(8)))
        for rows in (np.arange(3), np.arange(3, 8)):
            for batch, local in zip(full, data.batches(rows), strict=True):
                for name, value in fields(batch).items():
                    np.testing.assert_array_equal(value[rows], getattr(local, name), err_msg=name)

    def test_an_empty_split_has_no_batches(self, folder):
        data = evaluation(folder, "empty", batch=4)
        assert data.num_batches == data.documents == data.tokens == 0
        assert list(data.batches(np.arange(4))) == []
