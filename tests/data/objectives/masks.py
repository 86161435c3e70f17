"""Objectives over a small store of bytes, and what they make of it, for tests."""

import math

import numpy as np
import pytest

from llmjax.data.batches.packing import Rows
from llmjax.data.batches.pipeline import PackedSource
from llmjax.data.batches.rng import CounterRng
from llmjax.data.config import DataConfig, ObjectiveConfig
from llmjax.data.objectives.objective import open_objective
from llmjax.data.store.tokenizer import Bytes
from tests.data.stores import write_store

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


def rows_of(folder, objective, split="train") -> tuple[Rows, np.ndarray]:
    source = PackedSource(
        folder, "books", split, DataConfig(seq_len=objective.row_budget.seq_len), objective.row_budget
    )
    return source.fill(np.arange(source.rows)), np.arange(source.rows) + (7 << 32) - 5


def segments_of(values: np.ndarray, segments: np.ndarray) -> list[list[int]]:
    """The values of every segment of every row, in order."""
    return [v[s == n].tolist() for v, s in zip(values, segments, strict=True) for n in range(1, s.max(initial=0) + 1)]


def build_case(folder, case: str, **fields):
    objective = make(case, **fields)
    rows, samples = rows_of(folder, objective)
    return objective, rows, objective.build_batch(rows, samples, CounterRng("t", 3))


def write_folder(folder):
    """Two sources of random documents, each with two splits."""
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


def assert_share(selected: np.ndarray, share: float) -> None:
    """The mean of booleans is `share` within five standard deviations."""
    assert selected.mean() == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / selected.size) + 1e-12)
