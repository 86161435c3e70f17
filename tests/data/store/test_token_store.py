"""The token store gives back what was written, opens fast and lazily, and notices every kind of damage."""

import json
import os

import numpy as np
import pytest

from llmjax.data.store import checked_file, token_store as store_module
from llmjax.data.store.shards import read_shard_info, token_dtype, write_shard
from llmjax.data.store.token_store import TokenStore, write_manifest
from llmjax.errors import UserError
from tests.data.stores import EOS, SHARD, VOCAB, random_documents, write_store


@pytest.mark.parametrize("vocab_size", [500, 70_000])
def test_reads_what_was_written_across_shards(tmp_path, vocab_size):
    documents = random_documents(0, 50, 40)
    store = write_store(tmp_path, documents, shards=4, vocab_size=vocab_size)
    flat = np.concatenate(documents)
    assert store.documents == 50 and store.tokens == flat.size
    np.testing.assert_array_equal(store.lengths(), [len(d) for d in documents])
    np.testing.assert_array_equal(store.starts(), np.cumsum([0] + [len(d) for d in documents[:-1]]))
    np.testing.assert_array_equal(store.read(0, store.tokens), flat)
    starts, lengths = np.array([7, 0, flat.size - 5, 100]), np.array([flat.size // 2, 3, 5, 0])
    expected = np.concatenate([flat[a : a + n] for a, n in zip(starts, lengths, strict=True)])
    np.testing.assert_array_equal(store.gather(starts, lengths), expected)
    assert store.verify() == sum(path.stat().st_size for path in tmp_path.glob("tokens-*")) + 8 * (50 + 4)
    with pytest.raises(IndexError):
        store.read(flat.size - 1, 2)


def test_starts_between_equals_a_filter_of_all_starts(tmp_path):
    store = write_store(tmp_path, random_documents(1, 60, 9), shards=5)
    starts = store.starts()
    for a in range(0, store.tokens, 7):
        b = min(a + 31, store.tokens)
        np.testing.assert_array_equal(store.starts_between(a, b), starts[(starts >= a) & (starts < b)])


def test_document_groups_hold_every_document_once(tmp_path):
    store = write_store(tmp_path, random_documents(1, 60, 9), shards=5)
    groups = list(store.document_groups(store.tokens // 2))
    assert len(groups) > 1
    np.testing.assert_array_equal(np.concatenate([starts for starts, _ in groups]), store.starts())
    np.testing.assert_array_equal(np.concatenate([lengths for _, lengths in groups]), store.lengths())


def test_two_bytes_up_to_65536_ids():
    assert token_dtype(65_536).itemsize == 2 and token_dtype(65_537).itemsize == 4


def test_number_of_open_shards_is_bounded(tmp_path):
    documents = random_documents(2, 40, 20)
    write_store(tmp_path, documents, shards=20)
    store = TokenStore(tmp_path, max_open=3)
    np.testing.assert_array_equal(store.read(0, store.tokens), np.concatenate(documents))
    assert sum(file._file is not None for file in store._files) <= 3


def test_opening_reads_no_shard(tmp_path, monkeypatch):
    write_store(tmp_path, random_documents(2, 40, 20), shards=20)
    monkeypatch.setattr(checked_file.os, "open", lambda *a, **k: pytest.fail("a shard was opened"))
    monkeypatch.setattr(store_module.np, "load", lambda *a, **k: pytest.fail("offsets were read at open"))
    TokenStore(tmp_path)


def test_fingerprint_depends_on_content_and_not_on_folder(tmp_path):
    documents = random_documents(3, 10, 20)
    one, two = write_store(tmp_path / "a", documents), write_store(tmp_path / "b", documents)
    assert one.fingerprint == two.fingerprint
    documents[4] = documents[4].copy()
    documents[4][0] += 1
    assert write_store(tmp_path / "c", documents).fingerprint != one.fingerprint


def test_shards_may_be_written_in_any_order(tmp_path):
    documents = random_documents(3, 10, 20)
    infos = [write_shard(tmp_path, i, documents[5 * i : 5 * i + 5], **SHARD) for i in (1, 0)]
    identity = {"vocab_size": VOCAB, "eos_id": EOS, "bos_id": None, "source": "s", "split": "train"}
    write_manifest(tmp_path, infos, **identity, tokenizer_sha256="x")
    store = TokenStore(tmp_path)
    np.testing.assert_array_equal(store.read(0, store.tokens), np.concatenate(documents))


def test_files_of_a_killed_writer_are_ignored(tmp_path):
    def killed():
        yield np.array([3, EOS])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, 0, killed(), **SHARD)
    assert read_shard_info(tmp_path, 0) is None
    info = write_shard(tmp_path, 0, [np.array([3, EOS])], **SHARD)
    assert read_shard_info(tmp_path, 0) == info
    (tmp_path / "tokens-00007.bin.partial-1").write_bytes(b"half")
    write_manifest(
        tmp_path, [info], vocab_size=VOCAB, eos_id=EOS, bos_id=None, source="s", split="train", tokenizer_sha256="x"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "manifest.json",
        "offsets-00000.npy",
        "shard-00000.json",
        "tokens-00000.bin",
    ]
    (tmp_path / "tokens-00000.bin").write_bytes(b"x")
    assert read_shard_info(tmp_path, 0) is None


@pytest.mark.parametrize("document", [np.array([], np.int32), np.array([3, VOCAB]), np.array([-1, 3])])
def test_invalid_documents_are_not_written(tmp_path, document):
    with pytest.raises(ValueError, match="document 1"):
        write_shard(tmp_path, 0, [np.array([3, EOS]), document], **SHARD)


def test_an_empty_split_is_a_store(tmp_path):
    store = write_store(tmp_path, [], shards=1)
    assert store.documents == store.tokens == 0
    assert store.lengths().size == store.starts().size == store.read(0, 0).size == 0
    store.verify()
    write_manifest(
        tmp_path / "none", [], vocab_size=9, eos_id=1, bos_id=None, source="s", split="test", tokenizer_sha256="x"
    )
    assert TokenStore(tmp_path / "none").read(0, 0).size == 0


def overwrite(path, content):
    """Write into the file itself, at a later time than before even where the clock is coarse."""
    before = path.stat().st_mtime_ns
    with open(path, "r+b") as file:
        file.write(content)
    os.utime(path, ns=(before, max(before + 1, path.stat().st_mtime_ns)))


class TestDamage:
    """Each kind raises UserError that names the shard; nothing damaged is ever handed out."""

    def test_flipped_bit_is_detected_by_the_first_read(self, tmp_path, monkeypatch):
        monkeypatch.setattr(checked_file, "BLOCK_BYTES", 64)
        documents = random_documents(4, 100, 20)
        write_store(tmp_path, documents, shards=2)
        path = tmp_path / "tokens-00001.bin"
        data = bytearray(path.read_bytes())
        data[130] ^= 1  # another id of the vocabulary, most likely: only the checksum can tell
        path.write_bytes(data)
        store = TokenStore(tmp_path)
        first = int(store.shards[0]["tokens"])
        np.testing.assert_array_equal(store.read(0, first + 60), np.concatenate(documents)[: first + 60])
        with pytest.raises(UserError, match=r"tokens-00001\.bin is damaged.*llmjax prepare"):
            store.read(first + 64, 1)
        with pytest.raises(UserError, match=r"tokens-00001\.bin is damaged"):
            store.verify()

    def test_id_outside_the_vocabulary(self, tmp_path):
        """Written by another program, checksums and all."""
        write_shard(tmp_path, 0, [np.array([3, VOCAB, EOS])], **SHARD | {"vocab_size": VOCAB + 1})
        info = read_shard_info(tmp_path, 0)
        identity = {"vocab_size": VOCAB, "eos_id": EOS, "bos_id": None, "source": "s", "split": "train"}
        write_manifest(tmp_path, [info], **identity, tokenizer_sha256="x")
        with pytest.raises(UserError, match=rf"tokens-00000\.bin holds id {VOCAB} at offset 1,"):
            TokenStore(tmp_path).read(0, 3)

    def test_truncated_shard(self, tmp_path):
        write_store(tmp_path, random_documents(4, 100, 20), shards=2)
        path = tmp_path / "tokens-00001.bin"
        size = path.stat().st_size
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(UserError, match=rf"tokens-00001\.bin has {size - 3} bytes, expected {size}"):
            TokenStore(tmp_path)

    @pytest.mark.parametrize("size", [0, 1, 20, -1], ids="{} bytes left".format)
    def test_shard_truncated_while_it_is_open(self, tmp_path, size):
        """A mapping of it would kill the process with SIGBUS."""
        store = write_store(tmp_path, random_documents(4, 5000, 20))
        store.read(0, store.tokens)
        path = tmp_path / "tokens-00000.bin"
        os.truncate(path, size % path.stat().st_size)
        for start in (0, store.tokens - 1):
            with pytest.raises(UserError, match=r"tokens-00000\.bin has \d+ bytes, expected \d+: it was truncated"):
                store.read(start, 1)

    def test_shard_overwritten_while_it_is_open(self, tmp_path):
        store = write_store(tmp_path, random_documents(4, 100, 20), shards=2)
        expected = store.read(0, store.tokens)
        path = tmp_path / "tokens-00001.bin"
        content = path.read_bytes()
        overwrite(path, content)
        np.testing.assert_array_equal(store.read(0, store.tokens), expected)  # the same bytes are no damage
        overwrite(path, content[2:] + content[:2])
        with pytest.raises(UserError, match=r"tokens-00001\.bin is damaged between bytes 0 and"):
            store.read(store.tokens - 1, 1)
        np.testing.assert_array_equal(store.read(0, 5), expected[:5])  # the other shard is good

    def test_shard_written_to_while_it_is_read(self, tmp_path, monkeypatch):
        """What is read after a write is never returned, even where its block had been compared before."""
        store = write_store(tmp_path, random_documents(4, 100, 20))
        store.read(0, store.tokens)
        path, read = tmp_path / "tokens-00000.bin", checked_file._OpenFile.read
        content = path.read_bytes()

        def late(file, start, end):
            overwrite(path, content[2:] + content[:2])
            return read(file, start, end)

        monkeypatch.setattr(checked_file._OpenFile, "read", late)
        with pytest.raises(UserError, match=r"tokens-00000\.bin is damaged"):
            store.read(0, 5)

    @pytest.mark.parametrize("harm", ["removed", "replaced"])
    def test_open_shard_survives_its_deletion(self, tmp_path, harm):
        store = write_store(tmp_path, random_documents(4, 100, 20))
        expected = store.read(0, store.tokens)
        path = tmp_path / "tokens-00000.bin"
        path.unlink()
        if harm == "replaced":
            path.write_bytes(b"other")
        np.testing.assert_array_equal(store.read(0, store.tokens), expected)
        with pytest.raises(UserError, match=r"tokens-00000\.bin"):
            TokenStore(tmp_path).read(0, 1)

    def test_a_shard_of_another_tokenizer(self, tmp_path):
        """Same sizes and valid checksums, as two simultaneous preparations once produced."""
        infos = [
            write_shard(tmp_path, i, [np.array([3, EOS])], **SHARD | {"tokenizer_sha256": sha})
            for i, sha in enumerate("xy")
        ]
        identity = {"vocab_size": VOCAB, "eos_id": EOS, "bos_id": None, "source": "s", "split": "train"}
        with pytest.raises(UserError, match=r"tokens-00001\.bin holds ids of another tokenizer \(sha256 y, .* is x\)"):
            write_manifest(tmp_path, infos, **identity, tokenizer_sha256="x")
        write_manifest(tmp_path, infos[:1], **identity, tokenizer_sha256="x")
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        forged = manifest | {"tokenizer_sha256": "y"}
        (tmp_path / "manifest.json").write_text(json.dumps(forged))
        with pytest.raises(UserError, match=r"manifest\.json is not what was written"):
            TokenStore(tmp_path)
        forged["fingerprint"] = store_module.compute_fingerprint(forged)
        (tmp_path / "manifest.json").write_text(json.dumps(forged))
        with pytest.raises(UserError, match=r"tokens-00000\.bin holds ids of another tokenizer"):
            TokenStore(tmp_path)

    def test_a_shard_that_another_writer_replaced(self, tmp_path):
        info = write_shard(tmp_path, 0, [np.array([3, EOS])], **SHARD)
        write_shard(tmp_path, 0, [np.array([4, EOS])], **SHARD)
        identity = {"vocab_size": VOCAB, "eos_id": EOS, "bos_id": None, "source": "s", "split": "train"}
        with pytest.raises(UserError, match=r"tokens-00000\.bin is not the one that was written"):
            write_manifest(tmp_path, [info], **identity, tokenizer_sha256="x")

    @pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000, b"{}"])
    def test_damaged_manifest_is_refused(self, tmp_path, content):
        write_store(tmp_path, random_documents(4, 3, 20))
        (tmp_path / "manifest.json").write_bytes(content)
        with pytest.raises(UserError, match=r"manifest\.json|format version None"):
            TokenStore(tmp_path)

    def test_missing_shards_are_all_listed(self, tmp_path):
        write_store(tmp_path, random_documents(4, 100, 20), shards=5)
        for name in ("tokens-00001.bin", "offsets-00003.npy", "tokens-00004.bin"):
            (tmp_path / name).unlink()
        with pytest.raises(UserError, match=r"3 files.*tokens-00001\.bin, offsets-00003\.npy, tokens-00004\.bin"):
            TokenStore(tmp_path)

    def test_damaged_offsets(self, tmp_path):
        store = write_store(tmp_path, random_documents(4, 100, 20))
        path = tmp_path / "offsets-00000.npy"
        data = bytearray(path.read_bytes())
        data[-8] ^= 1
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"offsets-00000\.npy are damaged"):
            store.lengths()

    def test_no_manifest_and_another_version(self, tmp_path):
        with pytest.raises(UserError, match=r"no manifest\.json"):
            TokenStore(tmp_path)
        write_store(tmp_path, random_documents(4, 3, 20))
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))
        with pytest.raises(UserError, match="version 99"):
            TokenStore(tmp_path)
