"""Small token stores for tests."""

from collections.abc import Iterator, Sequence
import contextlib
import itertools
import logging
from pathlib import Path

import numpy as np

from llmjax.data.store.shards import write_shard
from llmjax.data.store.token_store import TokenStore, write_manifest

EOS, BOS, VOCAB = 1, 2, 500
SHARD = {"vocab_size": VOCAB, "text_bytes": 1, "tokenizer_sha256": "x"}  # arguments of write_shard for a small shard


def random_documents(seed: int, number: int, longest: int) -> list[np.ndarray]:
    """Documents of 1 to `longest` tokens, EOS included, ids from 3 up inside."""
    rng = np.random.default_rng(seed)
    bodies = [rng.integers(3, VOCAB, rng.integers(0, longest)) for _ in range(number)]
    return [np.append(body, EOS).astype(np.int32) for body in bodies]


def write_store(
    folder: Path,
    documents: Sequence[np.ndarray],
    *,
    shards: int = 1,
    source: str = "main",
    split: str = "train",
    bos_id: int | None = BOS,
    vocab_size: int = VOCAB,
) -> TokenStore:
    """A store of these documents, cut in shards in order, opened."""
    edges = np.linspace(0, len(documents), shards + 1).astype(int)
    infos = [
        write_shard(
            folder,
            i,
            documents[a:b],
            vocab_size=vocab_size,
            text_bytes=4 * sum(map(len, documents[a:b])),
            tokenizer_sha256="0" * 64,
        )
        for i, (a, b) in enumerate(itertools.pairwise(edges))
    ]
    write_manifest(
        folder,
        infos,
        vocab_size=vocab_size,
        eos_id=EOS,
        bos_id=bos_id,
        source=source,
        split=split,
        tokenizer_sha256="0" * 64,
    )
    return TokenStore(folder)


@contextlib.contextmanager
def log_lines() -> Iterator[list[str]]:
    """The lines that llmjax logs inside the block."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    logger, collector = logging.getLogger("llmjax"), Collector()
    level = logger.level
    logger.addHandler(collector)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(collector)
        logger.setLevel(level)
