"""The corpus that tests of preparation share; a single worker runs in the process of the test, which starts faster."""

import json
import random

import pytest

from llmjax.data.store import prepare, stages
from llmjax.data.store.workers import Workers
from tests.data.preparation import sentence


class _SameProcess:
    """What a pool of one worker does, without another process."""

    def __enter__(self):
        stages._read_tokenizer_once.cache_clear()  # a new worker has an empty cache
        return self

    def __exit__(self, *_):
        pass

    def map(self, function, tasks):
        return ((index, function(*task)) for index, task in enumerate(tasks))


@pytest.fixture(autouse=True)
def same_process(monkeypatch):
    monkeypatch.setattr(prepare, "Workers", lambda number: Workers(number) if number > 1 else _SameProcess())


@pytest.fixture
def corpus(tmp_path):
    """300 text documents of all kinds of spaces, in JSONL, and the folder that they are in."""
    rng = random.Random(0)
    texts = [f"{i}\r\n\tdef f():\n    pass  # \u2581 é 😀\n" + sentence(rng, 60) for i in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path / "a.jsonl", texts
