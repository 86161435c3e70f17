"""Objectives: nothing is lost, nothing leaves its document, rates are as asked, rows fit, draws are keyed."""

import dataclasses
import math

import numpy as np
import pytest

from llmjax.config import UserError
from llmjax.data import spans
from llmjax.data.config import OBJECTIVES, DataConfig, ObjectiveConfig, SourceConfig
from llmjax.data.draws import Draws, below, pick
from llmjax.data.objectives import causal, open_objective
from llmjax.data.packing import Rows, fill, open_packing
from llmjax.data.pieces import Pieces, compose
from llmjax.data.pipeline import EvalData, TrainData
from llmjax.data.tokenizer import Bytes
from llmjax.run_config import RunConfig, with_vocabulary
from tests.data.stores import BOS, EOS as STORE_EOS, write_store

BYTES = Bytes()
EOS, SEQ_LEN = BYTES.eos_id, 96
# One-sided objectives, then those with an encoder.
CASES = {
    "causal": ({}, False),
    "prefix": ({}, False),
    "masked": ({}, False),
    "fim": ({}, False),
    "source prefix": ({"name": "prefix"}, True),
    "short source prefix": ({"name": "prefix", "target_len": 40}, True),
    "span": ({}, True),
    "long spans": ({"name": "span", "rate": 0.5, "mean_span": 8.0}, True),
    "ul2": ({}, True),
}


def make(case: str, seq_len: int = SEQ_LEN, **fields):
    changes, encoder_decoder = CASES[case]
    config = ObjectiveConfig(**{"name": case, **changes, **fields})
    return open_objective(config, BYTES, seq_len=seq_len, start_id=-1 if encoder_decoder else None)


def documents(seed: int = 0, number: int = 300, longest: int = 300) -> list[np.ndarray]:
    """Documents of byte ids of all lengths from 1 up, EOS included."""
    rng = np.random.default_rng(seed)
    sizes = np.concatenate([np.arange(12), rng.integers(0, longest, number)])
    return [np.append(rng.integers(32, 127, size), EOS).astype(np.int32) for size in sizes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objectives")
    for seed, name in enumerate(("books", "code")):
        for split in ("train", "validation"):
            write_store(
                folder / name / split,
                documents(seed),
                shards=2,
                source=name,
                split=split,
                bos_id=BYTES.bos_id,
                vocab_size=259,
            )
    return folder


def rows_of(folder, objective, split="train") -> tuple[Rows, np.ndarray]:
    from llmjax.data.pipeline import PackedSource

    source = PackedSource(folder, "books", split, DataConfig(seq_len=objective.room.seq_len), objective.room)
    return source.fill(np.arange(source.rows)), np.arange(source.rows) + (7 << 32) - 5


def segments_of(values: np.ndarray, segments: np.ndarray) -> list[list[int]]:
    """The values of every segment of every row, in order."""
    return [v[s == n].tolist() for v, s in zip(values, segments, strict=True) for n in range(1, s.max(initial=0) + 1)]


def made(folder, case: str, **fields):
    objective = make(case, **fields)
    rows, samples = rows_of(folder, objective)
    return objective, rows, objective.make(rows, samples, Draws("t", 3))


class TestCausal:
    """What is foretold, from what, and what counts."""

    def test_first_tokens_and_ends_are_targets_and_padding_is_not(self, tmp_path):
        store = write_store(tmp_path / "s", [np.array([10, 11, STORE_EOS]), np.array([20, STORE_EOS])])
        plan = open_packing(store, 8, "best_fit", tmp_path / "plans")
        batch = causal(fill(store, plan.chunks(np.arange(1)), 1, 8), np.array([(5 << 32) + 7]))
        np.testing.assert_array_equal(batch.inputs, [[BOS, 10, 11, BOS, 20, 0, 0, 0]])
        np.testing.assert_array_equal(batch.targets, [[10, 11, STORE_EOS, 20, STORE_EOS, 0, 0, 0]])
        np.testing.assert_array_equal(batch.weights, [[1, 1, 1, 1, 1, 0, 0, 0]])
        np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 2, 2, 0, 0, 0]])
        np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 0, 1, 0, 0, 0]])
        np.testing.assert_array_equal(batch.sample, [[5, 7]])

    def test_a_continued_document_is_foretold_from_its_own_past(self, tmp_path):
        store = write_store(tmp_path / "s", [np.array([10, 11, 12, 13, 14, STORE_EOS])])
        for algorithm in ("best_fit", "concat"):
            plan = open_packing(store, 4, algorithm, tmp_path / "plans")
            batch = causal(fill(store, plan.chunks(np.arange(2)), 2, 4), np.arange(2))
            np.testing.assert_array_equal(batch.inputs, [[BOS, 10, 11, 12], [13, 14, 0, 0]])
            np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 3], [0, 1, 0, 0]])
            assert batch.weights.sum() == 6


class TestEveryObjective:
    """What all of them promise."""

    @pytest.mark.parametrize("case", CASES)
    def test_layout(self, folder, case):
        """Types, widths, positions from 0 in each segment, nothing in the padding, and ids that the model has."""
        objective, rows, batch = made(folder, case)
        sides = [("inputs", "targets", "weights", "segments", "positions")]
        sides += [("source", "source_segments", "source_positions")] if batch.source is not None else []
        assert (batch.source is not None) == CASES[case][1]
        for names in sides:
            fields = {name: getattr(batch, name) for name in names}
            width = objective.target_len if "inputs" in names else SEQ_LEN
            segments, positions = fields[names[-2]], fields[names[-1]]
            for name, value in fields.items():
                assert value.shape == (len(rows.tokens), width)
                assert value.dtype == (np.float32 if name == "weights" else np.int32)
                assert not value[segments == 0].any()
                if name in ("inputs", "targets", "source"):
                    assert value.min() >= 0 and value.max() < objective.size
            for numbers in segments_of(positions, segments):
                assert numbers == list(range(len(numbers))) and numbers
            used = (segments > 0).sum(axis=1)
            assert (segments[np.arange(width) < used[:, None]] > 0).all()
            np.testing.assert_array_equal(segments.max(axis=1), rows.segments.max(axis=1))
        assert batch.weights.sum() > 0

    @pytest.mark.parametrize("case", CASES)
    def test_a_row_depends_on_itself_and_its_sample_alone(self, folder, case):
        objective, rows, batch = made(folder, case)
        _, samples = rows_of(folder, objective)
        rng = np.random.default_rng(0)
        for size in (1, 3, len(samples)):
            chosen = rng.permutation(len(samples))[:size]
            some = Rows(**{name: value[chosen] for name, value in vars(rows).items()})
            part = objective.make(some, samples[chosen], Draws("t", 3))
            for name, value in vars(batch).items():
                if value is not None:
                    np.testing.assert_array_equal(value[chosen], getattr(part, name), err_msg=name)

    @pytest.mark.parametrize("case", [case for case in CASES if case != "causal"])
    def test_other_seeds_and_samples_draw_otherwise(self, folder, case):
        objective, rows, batch = made(folder, case)
        _, samples = rows_of(folder, objective)
        for other in (
            objective.make(rows, samples, Draws("t", 4)),
            objective.make(rows, samples + len(samples), Draws("t", 3)),
        ):
            assert (other.inputs != batch.inputs).any() or (other.weights != batch.weights).any()

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("seq_len", [8, 33, 256])
    def test_every_row_fits(self, folder, case, seq_len):
        objective = make(case, seq_len)
        rows, samples = rows_of(folder, objective)
        batch = objective.make(rows, samples, Draws(0))  # asserts that no row is too full
        total = sum(map(len, documents(0)))
        assert (rows.segments > 0).sum() == total
        assert batch.targets.shape == (len(samples), objective.target_len)

    @pytest.mark.parametrize("case", CASES)
    def test_hosts_and_prefetch_change_nothing(self, folder, case):
        objective = make(case)
        config = DataConfig(
            sources={"books": SourceConfig(weight=0.7), "code": SourceConfig(weight=0.3)}, seq_len=SEQ_LEN, prefetch=0
        )
        open_data = lambda config: TrainData(folder, config, seed=1, global_batch=6, objective=objective)
        take = lambda data, rows: [next(stream)[0] for stream in [data.batches(data.start(), rows)] for _ in range(6)]
        whole = take(open_data(config), np.arange(6))
        for rows, ahead in ((np.array([5, 0, 3]), 3), (np.arange(6), 2)):
            data = open_data(dataclasses.replace(config, prefetch=ahead))
            for batch, local in zip(whole, take(data, rows), strict=True):
                for name, value in vars(batch).items():
                    if value is not None:
                        np.testing.assert_array_equal(value[rows], getattr(local, name), err_msg=name)
            data.close()

    @pytest.mark.parametrize("case", CASES)
    def test_evaluation_repeats_itself(self, folder, case):
        """The same places at every evaluation, by any batch size, and none of the padding."""
        objective, config = make(case), DataConfig(seq_len=SEQ_LEN)
        found = []
        for batch in (4, 7):
            data = EvalData(folder, config, split="validation", source="code", batch=batch, objective=objective)
            batches = list(data.batches(np.arange(batch)))
            for name in ("inputs", "targets", "weights", "segments"):
                rows = np.concatenate([getattr(b, name) for b in batches])
                assert not rows[data.rows :].any()
                found.append(rows[: data.rows])
        for one, other in zip(found[:4], found[4:], strict=True):
            np.testing.assert_array_equal(one, other)

    def test_a_change_on_resume_is_named(self, folder):
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
    """A decoder's prefix is seen from both sides and not scored."""

    def test_marks_and_weights(self, folder):
        _, rows, batch = made(folder, "prefix")
        np.testing.assert_array_equal(batch.inputs, rows.before)
        np.testing.assert_array_equal(batch.targets, rows.tokens)
        lengths, given = [], []
        for marks, weights in zip(
            segments_of(batch.prefix, batch.segments), segments_of(batch.weights, batch.segments), strict=True
        ):
            size = sum(marks)
            assert marks == [True] * size + [False] * (len(marks) - size) and size >= 1
            # The last place of the prefix is the first that is scored: nothing shows its target.
            assert weights == [0] * (size - 1) + [1] * (len(marks) - size + 1)
            lengths.append(len(marks))
            given.append((size - 0.5) / len(marks))
        assert not batch.prefix[batch.segments == 0].any()
        assert np.mean(given) == pytest.approx(0.5, abs=5 / math.sqrt(12 * len(given)))

    @pytest.mark.parametrize("case", ["source prefix", "short source prefix"])
    def test_source_and_target_are_the_text(self, folder, case):
        objective, rows, batch = made(folder, case)
        chunks = zip(
            segments_of(batch.source, batch.source_segments),
            segments_of(batch.targets, batch.segments),
            segments_of(batch.inputs, batch.segments),
            segments_of(rows.before, rows.segments),
            segments_of(rows.tokens, rows.segments),
            strict=True,
        )
        for source, target, inputs, before, tokens in chunks:
            assert source + target[:-1] == before and target[-1] == tokens[-1]
            assert inputs == [BYTES.bos_id, *target[:-1]]
        assert objective.target_len == (40 if case.startswith("short") else SEQ_LEN)


class TestMasked:
    """15% hidden, of these 80% masks, 10% others, 10% as they were."""

    @pytest.mark.parametrize(("rate", "words"), [(0.15, False), (0.4, False), (0.15, True)])
    def test_what_is_hidden(self, folder, rate, words):
        objective, rows, batch = made(folder, "masked", rate=rate, whole_words=words)
        (mask,) = objective.vocabulary.ids
        assert (mask, objective.size, objective.vocabulary.names[mask]) == (259, 260, "[MASK]")
        hidden = batch.weights > 0
        np.testing.assert_array_equal(batch.targets, rows.before)
        np.testing.assert_array_equal(batch.inputs[~hidden], batch.targets[~hidden])
        text = (rows.segments > 0) & ~((rows.positions == 0) & (rows.before == BYTES.bos_id))
        assert not hidden[~text].any()
        if not words:
            assert_share(hidden[text], rate)
        assert_share(batch.inputs[hidden] == mask, 0.8)
        noise = batch.inputs[hidden & (batch.inputs != mask)]
        assert noise.max() < 256 and len(np.unique(noise)) > 60
        assert_share(batch.inputs[hidden] == batch.targets[hidden], 0.1 + 0.1 / 256)

    def test_every_token_but_the_ends_can_be_hidden_once(self, folder):
        """Each chunk begins with the token before it, so no token of a cut document is left out or seen twice."""
        _, rows, batch = made(folder, "masked")
        text = (rows.segments > 0) & ~((rows.positions == 0) & (rows.before == BYTES.bos_id))
        expected = np.sort(np.concatenate([document[:-1] for document in documents(0)]))
        np.testing.assert_array_equal(np.sort(batch.targets[text]), expected)

    def test_whole_words(self, folder):
        texts = ["the quick_brown fox; jumps(over) 12th lazy-dog " * 4, "na\u00efve \u4e2d\u6587 words"] * 20
        docs = [np.append(ids, EOS) for ids in BYTES.encode_batch(texts)]
        store = write_store(folder / "words" / "train", docs, bos_id=BYTES.bos_id, vocab_size=259)
        objective = make("masked", 200, whole_words=True)
        plan = open_packing(store, 200, "best_fit", folder / "plans")
        rows = fill(store, plan.chunks(np.arange(plan.rows)), plan.rows, 200)
        batch = objective.make(rows, np.arange(plan.rows), Draws(1))
        seen = set()
        for ids, weights in zip(
            segments_of(batch.targets, batch.segments), segments_of(batch.weights, batch.segments), strict=True
        ):
            joins = [i < 256 and (chr(i).isalnum() or i == ord("_") or i >= 128) for i in ids]
            for i in range(1, len(ids)):
                if joins[i] and joins[i - 1]:
                    assert weights[i] == weights[i - 1]
                else:
                    seen.add((weights[i - 1], weights[i]))
        assert len(seen) == 4
        assert_share(batch.weights[batch.targets == ord(" ")] > 0, 0.15)


class TestInfill:
    """Rearranging gives the text back."""

    @pytest.mark.parametrize("rate", [0.5, 1.0])
    def test_nothing_is_lost(self, folder, rate):
        objective, rows, batch = made(folder, "fim", fim_rate=rate)
        first, middle, last = objective.vocabulary.ids
        assert [objective.vocabulary.names[i] for i in (first, middle, last)] == [
            "<|fim_prefix|>",
            "<|fim_middle|>",
            "<|fim_suffix|>",
        ]
        kinds, shares = [], []
        for got, inputs, tokens, before in zip(
            segments_of(batch.targets, batch.segments),
            segments_of(batch.inputs, batch.segments),
            segments_of(rows.tokens, rows.segments),
            segments_of(rows.before, rows.segments),
            strict=True,
        ):
            assert inputs[1:] == got[:-1]
            kinds.append(got[0] == first)
            if got[0] != first:
                assert got == tokens and inputs == before
                continue
            assert inputs[0] == BYTES.bos_id and got[-1] == EOS
            body, p, m, s = got[:-1], 0, got.index(middle), got.index(last)
            if s == 1:  # suffix first; where its prefix ends cannot be told, nor need it
                text = body[m + 1 :] + body[2:m]
            else:
                assert p < s < m
                text = body[1:s] + body[m + 1 :] + body[s + 1 : m]
                shares.append(len(body) - m - 1)
            assert text == (tokens[:-1] if tokens[-1] == EOS else tokens)
        assert_share(np.array(kinds), rate)
        # Suffix-prefix-middle is as frequent; an empty prefix of the other order looks the same.
        assert 0.4 < len(shares) / sum(kinds) < 0.6
        assert (batch.weights == (batch.segments > 0)).all()


class TestSpans:
    """Interleaving source and target gives the text back."""

    @pytest.mark.parametrize("case", ["span", "long spans", "ul2"])
    def test_nothing_is_lost(self, folder, case):
        objective, rows, batch = made(folder, case)
        ids = objective.vocabulary.ids
        sentinels = [i for i in ids if objective.vocabulary.names[i].startswith("<extra_id_")]
        modes, hidden, total, seen = ids[len(sentinels) :], 0, 0, []
        for source, target, inputs, tokens in zip(
            segments_of(batch.source, batch.source_segments),
            segments_of(batch.targets, batch.segments),
            segments_of(batch.inputs, batch.segments),
            segments_of(rows.tokens, rows.segments),
            strict=True,
        ):
            assert inputs == [BYTES.bos_id, *target[:-1]]
            if modes:
                mode, *source = source
                seen.append(objective.vocabulary.names[mode])
            *target, end = target
            assert end == EOS
            parts: dict[int, list[int]] = {}
            for token in target:
                if token in sentinels:
                    parts[token] = []
                else:
                    parts[list(parts)[-1]].append(token)
            # Sentinels rise, each once on both sides, and hide at least a token.
            assert list(parts) == sentinels[: len(parts)] == [token for token in source if token in sentinels]
            assert all(parts.values())
            assert [t for token in source for t in parts.get(token, [token])] == tokens
            if modes and seen[-1] == "[S]":
                assert len(parts) == 1 and source[-1] == sentinels[0]
            hidden, total = hidden + sum(map(len, parts.values())), total + len(tokens)
        if case != "ul2":
            rate = 0.15 if case == "span" else 0.5
            assert hidden / total == pytest.approx(rate, abs=0.03)  # at least one token of the shortest chunks
        else:
            assert_share(np.array(seen) == "[R]", 2 / 7)
            assert_share(np.array(seen) == "[S]", 1 / 7)

    def test_every_place_can_be_hidden(self):
        """Over many samples the places of a chunk are hidden alike, but for the few next to its ends."""
        objective, size = make("span"), 40
        count, tokens = 4000, np.arange(65, 65 + size, dtype=np.int32)
        ones = np.ones((count, size), np.int32)
        rows = Rows(tokens=ones * tokens, before=ones, segments=ones, positions=ones * np.arange(size, dtype=np.int32))
        batch = objective.make(rows, np.arange(count), Draws(2))
        kept = np.bincount(batch.source.ravel(), minlength=128)[65 : 65 + size] / count
        assert 1 - kept.mean() == pytest.approx(6 / size)
        assert (abs(1 - kept[3:-3] - 0.16) < 0.03).all() and (1 - kept > 0.04).all()

    def test_sentinels_are_at_most_a_hundred(self):
        denoiser = spans.Denoiser(rate=0.5, mean_span=1.0)
        noise, count = denoiser.counts(np.arange(1, 5000))
        assert count.max() == 100 and noise[-1] == 2500 and (count >= 1).all() and (count <= noise).all()

    @pytest.mark.parametrize("rate", [0.01, 0.15, 0.5, 0.9])
    @pytest.mark.parametrize("mean", [1.0, 3.0, 64.0])
    @pytest.mark.parametrize("seq_len", [4, 31, 512])
    def test_solved_lengths_hold_on_both_sides(self, rate, mean, seq_len):
        one = spans.Denoiser(rate=rate, mean_span=mean)
        sides = spans.solve("span", [one], seq_len=seq_len, target_len=0, modes=False)
        lengths = np.arange(1, sides.room.longest + 1)
        noise, count = one.counts(lengths)
        costs = sides.room.cost(lengths)
        assert (lengths - noise + count <= costs).all() and (costs <= seq_len).all()
        assert ((noise + count + 1) * seq_len <= costs * sides.target_len).all()
        assert sides.target_len % 8 == 0 and sides.sentinels == count.max()
        assert sides.room.capacity >= sides.room.longest

    def test_a_given_target_length_is_kept(self, folder):
        objective = make("span", target_len=17)
        rows, samples = rows_of(folder, objective)
        assert objective.make(rows, samples, Draws(0)).targets.shape[1] == objective.target_len == 17
        with pytest.raises(UserError, match=r"data\.seq_len=96 with objective\.target_len=2: not even one token"):
            make("span", target_len=2)

    def test_windows_are_refused(self, folder):
        for case in ("span", "ul2", "fim"):
            objective = make(case)
            with pytest.raises(UserError, match=rf"data\.packing='concat': .* objective\.name='{case}'"):
                TrainData(
                    folder,
                    DataConfig(sources={"books": SourceConfig()}, seq_len=SEQ_LEN, packing="concat"),
                    seed=0,
                    global_batch=2,
                    objective=objective,
                )


class TestDraws:
    """The counter-based generator."""

    def test_uniform_and_keyed(self):
        places = np.arange(100_000)
        bits = Draws("a", 1).bits(np.array([[5], [6]]), 0, places)
        assert bits.shape == (2, 100_000) and len(np.unique(bits)) == bits.size
        for share in (0.01, 0.5, 0.97):
            assert_share(below(bits, share).ravel(), share)
        assert below(bits, 1.0).all()
        counts = np.bincount(pick(bits, 7).ravel(), minlength=8)
        assert counts[7] == 0 and abs(counts[:7] - bits.size / 7).max() < 5 * math.sqrt(bits.size / 7)
        for other in (
            Draws("a", 2).bits(np.array([5]), 0, places),
            Draws("a", 1).bits(np.array([5]), 1, places),
            bits[1],
        ):
            assert abs(np.corrcoef(bits[0].astype(float), other.astype(float))[0, 1]) < 0.02

    def test_compositions_are_alike(self):
        """All ways to write 6 as a sum of 3 parts come equally often."""
        count = 20_000
        number = np.arange(count)
        pieces = Pieces(tokens=number, before=number, length=number, row=number, sample=number, column=number * 0)
        parts = compose(np.full(count, 6), np.full(count, 3), pieces, Draws(0), 0).reshape(-1, 3)
        assert (parts.sum(axis=1) == 6).all() and (parts >= 1).all()
        _, counts = np.unique(parts, axis=0, return_counts=True)
        assert len(counts) == math.comb(5, 2) and abs(counts - count / 10).max() < 5 * math.sqrt(count / 10)


class TestVocabulary:
    """Ids that stand for no text."""

    def test_the_models_vocabulary_covers_what_is_added(self):
        for case, added in {"causal": 0, "prefix": 0, "masked": 1, "fim": 3, "span": 5, "ul2": 21}.items():
            objective = make(case)
            assert objective.size == 259 + added, case
            config = with_vocabulary(RunConfig(), objective.size)
            assert config.model.vocab_size == objective.size
        small = dataclasses.replace(RunConfig(), model=dataclasses.replace(RunConfig().model, vocab_size=259))
        with pytest.raises(UserError, match=r"model\.vocab_size=259 is smaller than the 260 ids"):
            with_vocabulary(small, make("masked").size)

    def test_the_tokenizers_own_are_taken(self):
        known = {"<s>": 256, "</s>": 257, "<mask>": 7, "<fim_prefix>": 3, "<fim_middle>": 4, "<fim_suffix>": 5}
        known |= {f"<extra_id_{n}>": 99 - n for n in range(4)} | {"[NLU]": 40, "[S2S]": 41, "[NLG]": 42}

        class Special(Bytes):
            def __init__(self):
                self.special_tokens = known

        open_it = lambda **fields: (
            open_objective(ObjectiveConfig(**fields), Special(), seq_len=SEQ_LEN, start_id=-1).vocabulary
        )
        assert open_it(name="masked").ids == (7,) and open_it(name="masked").size == 259
        assert open_it(name="fim").ids == (3, 4, 5)
        ul2 = open_it(name="ul2")
        assert ul2.ids[:6] == (99, 98, 97, 96, 259, 260) and ul2.ids[-3:] == (40, 41, 42)
        assert ul2.size == 259 + len(ul2.ids) - 3 - 4 and ul2.names[259] == "<extra_id_4>"


class TestConfig:
    """Fields that an objective has no use for, families that it does not suit, values out of range."""

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"name": "mlm"}, r"objective\.name='mlm': known are causal, prefix, masked, span, ul2, fim"),
            ({"name": "mask"}, r"objective\.name='mask' \(did you mean 'masked'\?\)"),
            ({"rate": 0.1}, r"objective\.rate=0\.1: objective\.name='causal' has no use for it, only masked, span"),
            ({"name": "ul2", "mean_span": 3.0}, r"objective\.mean_span=3\.0: .*'ul2' has no use for it, only span"),
            ({"name": "fim", "whole_words": True}, r"objective\.whole_words=True: .* only masked"),
            ({"name": "masked", "rate": 1.0}, r"objective\.rate=1\.0: must be above 0 and below 1"),
            ({"name": "span", "mean_span": 0.5}, r"objective\.mean_span=0\.5: must be at least 1"),
            ({"name": "fim", "fim_rate": 1.5}, r"objective\.fim_rate=1\.5: must be above 0 and at most 1"),
            ({"name": "span", "target_len": -1}, r"objective\.target_len=-1"),
        ],
    )
    def test_refused(self, fields, message):
        with pytest.raises(UserError, match=message):
            ObjectiveConfig(**fields)

    def test_families(self):
        with pytest.raises(UserError, match=r"objective\.name='masked': model\.family='decoder' learns causal, prefix"):
            RunConfig(objective=ObjectiveConfig(name="masked"))
        with pytest.raises(UserError, match=r"objective\.target_len=9: model\.family='decoder' has no decoder beside"):
            RunConfig(objective=ObjectiveConfig(name="prefix", target_len=9))
        for name in OBJECTIVES:
            if name in RunConfig().model.objectives:
                RunConfig(objective=ObjectiveConfig(name=name))

    def test_rows_too_short(self):
        with pytest.raises(UserError, match=r"data\.seq_len=4: objective\.name='fim' adds 4 tokens"):
            make("fim", 4)


def assert_share(found: np.ndarray, share: float) -> None:
    """The mean of booleans is `share` within five standard deviations."""
    assert found.mean() == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / found.size) + 1e-12)
