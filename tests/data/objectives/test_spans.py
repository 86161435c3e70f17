"""Spans and middles that are moved: nothing is lost, both sides fit, lengths are as solved."""

import numpy as np
import pytest

from llmjax.data.batches.packing import Rows
from llmjax.data.batches.pipeline import TrainData
from llmjax.data.batches.rng import CounterRng
from llmjax.data.config import DataConfig, SourceConfig
from llmjax.data.objectives import spans
from llmjax.errors import UserError
from tests.data.objectives.masks import (
    BYTES,
    EOS,
    SEQ_LEN,
    assert_share,
    build_case,
    make,
    rows_of,
    segments_of,
    write_folder,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("objectives"))


class TestInfill:
    """Rearranging gives the text back."""

    @pytest.mark.parametrize("rate", [0.5, 1.0])
    def test_every_token_is_kept(self, folder, rate):
        objective, rows, batch = build_case(folder, "fim", fim_rate=rate)
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
            segments_of(rows.targets, rows.segments),
            segments_of(rows.inputs, rows.segments),
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
    def test_every_token_is_kept(self, folder, case):
        objective, rows, batch = build_case(folder, case)
        ids = objective.vocabulary.ids
        sentinels = [i for i in ids if objective.vocabulary.names[i].startswith("<extra_id_")]
        modes, hidden, total, drawn_modes = ids[len(sentinels) :], 0, 0, []
        for source, target, inputs, tokens in zip(
            segments_of(batch.source, batch.source_segments),
            segments_of(batch.targets, batch.segments),
            segments_of(batch.inputs, batch.segments),
            segments_of(rows.targets, rows.segments),
            strict=True,
        ):
            assert inputs == [BYTES.bos_id, *target[:-1]]
            if modes:
                mode, *source = source
                drawn_modes.append(objective.vocabulary.names[mode])
            *target, end = target
            assert end == EOS
            parts: dict[int, list[int]] = {}
            for token in target:
                if token in sentinels:
                    parts[token] = []
                else:
                    parts[list(parts)[-1]].append(token)
            # Sentinels rise, each once in source and target, and hide at least a token.
            assert list(parts) == sentinels[: len(parts)] == [token for token in source if token in sentinels]
            assert all(parts.values())
            assert [t for token in source for t in parts.get(token, [token])] == tokens
            if modes and drawn_modes[-1] == "[S]":
                assert len(parts) == 1 and source[-1] == sentinels[0]
            hidden, total = hidden + sum(map(len, parts.values())), total + len(tokens)
        if case != "ul2":
            rate = 0.15 if case == "span" else 0.5
            assert hidden / total == pytest.approx(rate, abs=0.03)  # at least one token of the shortest chunks
        else:
            assert_share(np.array(drawn_modes) == "[R]", 2 / 7)
            assert_share(np.array(drawn_modes) == "[S]", 1 / 7)

    def test_every_position_can_be_masked(self):
        """Over many samples every position of a chunk is corrupted equally often, except the few next to its ends."""
        objective, size = make("span"), 40
        count, tokens = 4000, np.arange(65, 65 + size, dtype=np.int32)
        ones = np.ones((count, size), np.int32)
        positions = ones * np.arange(size, dtype=np.int32)
        rows = Rows(targets=ones * tokens, inputs=ones, segments=ones, positions=positions, scored=ones > 0)
        batch = objective.build_batch(rows, np.arange(count), CounterRng(2))
        intact = np.bincount(batch.source.ravel(), minlength=128)[65 : 65 + size] / count
        assert 1 - intact.mean() == pytest.approx(6 / size)
        assert (abs(1 - intact[3:-3] - 0.16) < 0.03).all() and (1 - intact > 0.04).all()

    def test_sentinels_are_at_most_a_hundred(self):
        denoiser = spans.Denoiser(rate=0.5, mean_span=1.0)
        noise, count = denoiser.count_spans(np.arange(1, 5000))
        assert count.max() == 100 and noise[-1] == 2500 and (count >= 1).all() and (count <= noise).all()

    @pytest.mark.parametrize("rate", [0.01, 0.15, 0.5, 0.9])
    @pytest.mark.parametrize("mean", [1.0, 3.0, 64.0])
    @pytest.mark.parametrize("seq_len", [4, 31, 512])
    def test_planned_lengths_fit_source_and_target(self, rate, mean, seq_len):
        one = spans.Denoiser(rate=rate, mean_span=mean)
        span_lengths = spans.plan_lengths("span", [one], seq_len=seq_len, target_len=0, modes=False)
        lengths = np.arange(1, span_lengths.row_budget.longest + 1)
        noise, count = one.count_spans(lengths)
        costs = span_lengths.row_budget.cost(lengths)
        assert (lengths - noise + count <= costs).all() and (costs <= seq_len).all()
        assert ((noise + count + 1) * seq_len <= costs * span_lengths.target_len).all()
        assert span_lengths.target_len % 8 == 0 and span_lengths.sentinels == count.max()
        assert span_lengths.row_budget.capacity >= span_lengths.row_budget.longest

    def test_explicit_target_length_is_used(self, folder):
        objective = make("span", target_len=17)
        rows, samples = rows_of(folder, objective)
        assert objective.build_batch(rows, samples, CounterRng(0)).targets.shape[1] == objective.target_len == 17
        with pytest.raises(
            UserError, match=r"data\.seq_len=96 with objective\.target_len=2: .*cannot fit even one token"
        ):
            make("span", target_len=2)

    def test_windows_are_refused(self, folder):
        for case in ("span", "ul2", "fim"):
            objective = make(case)
            with pytest.raises(UserError, match=rf"data\.packing='concat': objective\.name='{case}'"):
                TrainData(
                    folder,
                    DataConfig(sources={"books": SourceConfig()}, seq_len=SEQ_LEN, packing="concat"),
                    seed=0,
                    global_batch=2,
                    objective=objective,
                )
