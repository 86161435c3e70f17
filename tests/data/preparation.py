"""Prepare small token stores in tests, and read them back."""

import hashlib
from pathlib import Path

from llmjax.data.config import DataConfig, SourceConfig, TokenizerConfig
from llmjax.data.store.prepare import prepare
from llmjax.data.store.token_store import TokenStore
from llmjax.data.store.tokenizer import load_tokenizer
from tests.data.stores import log_lines

BYTES = TokenizerConfig(kind="bytes")
SMALL = TokenizerConfig(vocab_size=300)
SPLITS = ("train", "validation", "test")


def config(path, **fields):
    return DataConfig(sources={"main": SourceConfig(path=str(path))}, **{"tokenizer": BYTES, "workers": 1, **fields})


def run_prepare(config, folder):
    """Prepare a store: (manifest, lines that were logged)."""
    with log_lines() as lines:
        return prepare(config, folder), lines


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def read_texts(folder, source="main"):
    """Decode the texts of every split of a store, and check their EOS."""
    tokenizer, by_split = load_tokenizer(folder), {}
    for split in SPLITS:
        store, texts = TokenStore(folder / source / split), []
        for start, length in zip(store.starts().tolist(), store.lengths().tolist(), strict=True):
            ids = store.read(start, length)
            assert ids[-1] == tokenizer.eos_id and not (ids[:-1] == tokenizer.eos_id).any()
            texts.append(tokenizer.decode(ids[:-1]))
        assert sum(len(text.encode()) for text in texts) == store.text_bytes
        by_split[split] = texts
    return by_split


def all_texts(by_split):
    return [text for texts in by_split.values() for text in texts]


def sentence(rng, words):
    return " ".join("".join(rng.choices("abcdefgh", k=4)) for _ in range(words))
