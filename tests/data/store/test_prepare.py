"""Preparation: the same bytes by any number of workers and after any kill, honest counts, one line for bad input."""

import dataclasses
import errno
import gzip
import hashlib
import json
import os
from pathlib import Path
import random
import shutil
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmjax.data.config import DataConfig, SourceConfig, SplitConfig, TokenizerConfig
from llmjax.data.readers import sources
from llmjax.data.store import prepare as preparing, stages
from llmjax.data.store.prepare import check_store, prepare, read_manifest
from llmjax.data.store.token_store import TokenStore
from llmjax.data.store.tokenizer import load_tokenizer
from llmjax.data.store.workers import Workers
from llmjax.errors import UserError
from tests.data.stores import log_lines

BYTES = TokenizerConfig(kind="bytes")
SMALL = TokenizerConfig(vocab_size=300)
SPLITS = ("train", "validation", "test")


def config(path, **fields):
    return DataConfig(sources={"main": SourceConfig(path=str(path))}, **{"tokenizer": BYTES, "workers": 1, **fields})


def make(config, folder):
    """(manifest, lines that were logged)"""
    with log_lines() as lines:
        return prepare(config, folder), lines


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def decoded(folder, source="main"):
    """The texts of every split, as the store gives them back; EOS where it belongs."""
    made, found = load_tokenizer(folder), {}
    for split in SPLITS:
        store, texts = TokenStore(folder / source / split), []
        for start, length in zip(store.starts().tolist(), store.lengths().tolist(), strict=True):
            ids = store.read(start, length)
            assert ids[-1] == made.eos_id and not (ids[:-1] == made.eos_id).any()
            texts.append(made.decode(ids[:-1]))
        assert sum(len(text.encode()) for text in texts) == store.text_bytes
        found[split] = texts
    return found


def everything(found):
    return [text for texts in found.values() for text in texts]


def sentence(rng, words):
    return " ".join("".join(rng.choices("abcdefgh", k=4)) for _ in range(words))


@pytest.fixture
def corpus(tmp_path):
    """300 text documents of all kinds of spaces, in JSONL, and the folder that they are in."""
    rng = random.Random(0)
    texts = [f"{i}\r\n\tdef f():\n    pass  # \u2581 é 😀\n" + sentence(rng, 60) for i in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path / "a.jsonl", texts


def test_documents_come_back_from_the_store(corpus, tmp_path):
    path, texts = corpus
    manifest, _ = make(config(path, tokenizer=SMALL), tmp_path / "s")
    found = decoded(tmp_path / "s")
    assert sorted(everything(found)) == sorted(texts) and all(found.values())
    assert manifest == read_manifest(tmp_path / "s")
    assert manifest["tokenizer"]["lossless"] and manifest["tokenizer"]["vocab_size"] == 300
    record = manifest["sources"]["main"]
    assert {s: record[s]["documents"] for s in SPLITS} == {s: len(found[s]) for s in SPLITS}
    assert record["train"]["tokens"] == TokenStore(tmp_path / "s/main/train").tokens
    validation = [text.encode() for text in found["validation"]]
    measured = manifest["compressors"]["gzip -9"]
    assert measured["concatenated"] == len(gzip.compress(b"".join(validation), 9))
    assert measured["per_document"] == sum(len(gzip.compress(text, 9)) for text in validation)
    assert 0 < manifest["compressors"]["xz -9"]["concatenated"] < sum(map(len, validation))
    assert not (tmp_path / "s/unfinished").exists()


def test_a_finished_store_is_taken_as_it_is(corpus, tmp_path):
    made, _ = make(config(corpus[0]), tmp_path / "s")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")}
    again, lines = make(config(corpus[0], seq_len=99, workers=2), tmp_path / "s")
    assert again == made and not lines
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")}


def test_other_settings_are_refused_with_the_differences(corpus, tmp_path):
    make(config(corpus[0]), tmp_path / "s")
    other = config(corpus[0], split=SplitConfig(test=0.2))
    with pytest.raises(UserError, match=r"data\.split\.test: 0\.05 -> 0\.2\); use another --workdir"):
        make(other, tmp_path / "s")


def test_the_number_of_workers_changes_nothing(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MIN_UNIT_BYTES", 20_000)
    for workers in (1, 3):
        make(config(corpus[0], tokenizer=SMALL, workers=workers), tmp_path / f"s{workers}")
    assert len(list((tmp_path / "s1/main/train").glob("tokens-*.bin"))) > 4
    assert contents(tmp_path / "s1") == contents(tmp_path / "s3")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_preparation_goes_on(corpus, tmp_path):
    """SIGKILL at several moments, each run taking up what the last one left; the store is that of a quiet run."""
    rng = random.Random(1)
    for part in range(6):
        (tmp_path / f"b{part}.txt").write_text("\n\n".join(sentence(rng, 200) for _ in range(300)))
    code = (
        "import logging, sys; from llmjax.data.readers import sources; sources.MIN_UNIT_BYTES = 100_000\n"
        "logging.basicConfig(format='%(message)s', stream=sys.stdout); logging.getLogger('llmjax').setLevel('INFO')\n"
        "from llmjax.data.config import *; from llmjax.data.store.prepare import prepare\n"
        f"c = DataConfig(sources={{'main': SourceConfig(path={str(tmp_path / 'b*.txt')!r}),"
        f"'more': SourceConfig(path={str(corpus[0])!r})}}, "
        "tokenizer=TokenizerConfig(vocab_size=300, training_bytes=300_000), workers=2)\n"
        "prepare(c, sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "quiet"], check=True, capture_output=True)
    kills = 0
    for wanted in ("reading", "training a", "tokenizing", "nothing"):
        process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "killed"], stdout=subprocess.PIPE, text=True)
        assert process.stdout
        for line in process.stdout:
            if line.startswith(wanted) or (wanted == "tokenizing" and line.startswith("training the tokenizer")):
                while wanted == "tokenizing" and not list((tmp_path / "killed").glob("*/*/tokens-*.bin*")):
                    time.sleep(0.001)  # into the stage that follows this line: a first shard is begun
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
        process.wait()
        process.stdout.close()
        time.sleep(0.2)  # for its workers to see that it is gone
        assert (read_manifest(tmp_path / "killed") is None) == (wanted != "nothing")
        if wanted == "tokenizing":
            (tmp_path / "killed/manifest.json.partial-1").touch()  # as a kill at the last moment leaves it
    assert kills == 3
    assert contents(tmp_path / "killed") == contents(tmp_path / "quiet")


def test_finished_shards_are_kept_and_damaged_ones_made_again(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MIN_UNIT_BYTES", 20_000)
    make(config(corpus[0]), tmp_path / "quiet")
    with monkeypatch.context() as patch:
        patch.setattr(preparing._Preparation, "_compress", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(config(corpus[0]), tmp_path / "s")
    shards = sorted((tmp_path / "s/main/train").glob("tokens-*.bin"))
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    (tmp_path / "s/main/train/tokens-00009.bin.partial-1").write_bytes(b"left by a killed writer")
    kept = {shard: shard.stat().st_mtime_ns for shard in shards[1:]}
    _, lines = make(config(corpus[0]), tmp_path / "s")
    assert lines[0] == "resuming the interrupted preparation"
    assert kept == {shard: shard.stat().st_mtime_ns for shard in shards[1:]}
    assert contents(tmp_path / "s") == contents(tmp_path / "quiet")


def test_an_interrupted_preparation_of_other_text_starts_over(corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(preparing._Preparation, "_compress", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(config(corpus[0]), tmp_path / "s")
    corpus[0].write_text(corpus[0].read_text() + json.dumps({"text": "one more"}) + "\n")
    _, lines = make(config(corpus[0]), tmp_path / "s")
    assert "starting over" in lines[0]
    assert "one more" in everything(decoded(tmp_path / "s"))


def test_near_copies_stay_on_one_side_even_across_sources(tmp_path):
    rng = random.Random(5)
    originals = [sentence(rng, 200) for _ in range(150)]
    for name, ending in (("a", ""), ("b", " and a word more")):
        lines = (json.dumps({"text": text + ending}) + "\n" for text in originals)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    both = {name: SourceConfig(path=str(tmp_path / f"{name}.jsonl")) for name in "ab"}
    fractions = SplitConfig(validation=0.2, test=0.2)
    make(DataConfig(sources=both, tokenizer=BYTES, split=fractions, workers=1), tmp_path / "s")
    a, b = decoded(tmp_path / "s", "a"), decoded(tmp_path / "s", "b")
    assert all(len(a[split]) > 10 for split in SPLITS)
    assert {s: [text + " and a word more" for text in a[s]] for s in SPLITS} == b
    apart = SplitConfig(validation=0.2, test=0.2, near_copies=False)
    make(DataConfig(sources=both, tokenizer=BYTES, split=apart, workers=1), tmp_path / "t")
    assert len(decoded(tmp_path / "t", "a")["test"]) and decoded(tmp_path / "t", "b") != b


def test_a_single_book_is_cut_into_parts(tmp_path):
    rng = random.Random(6)
    book = "\r\n\r\n".join(sentence(rng, rng.randrange(20, 300)) for _ in range(400))
    (tmp_path / "book.txt").write_bytes(book.encode())
    manifest, lines = make(config(tmp_path / "book.txt"), tmp_path / "s")
    found = decoded(tmp_path / "s")
    assert all(found[split] for split in SPLITS)
    size = manifest["sources"]["main"]["part_bytes"]
    assert 1024 <= size <= 16384
    assert any("too few documents for data.split (1)" in line and "cut at blank lines" in line for line in lines)
    parts = everything(found)
    # Put together in their order in the book, the parts are the book.
    assert "".join(sorted(parts, key=book.index)) == book
    assert all(size <= len(part.encode()) <= 2 * size for part in sorted(parts, key=book.index)[:-1])


def test_a_note_is_too_little_for_three_splits(tmp_path):
    (tmp_path / "note.txt").write_text("just a note\n")
    manifest, lines = make(config(tmp_path / "note.txt"), tmp_path / "s")
    assert [manifest["sources"]["main"][split]["documents"] for split in SPLITS] == [1, 0, 0]
    assert any("too little text for a validation and a test split" in line for line in lines)
    assert manifest["compressors"] is None


def test_rejects_are_counted_and_kept(tmp_path):
    lines = [json.dumps({"text": f"text {i}"}) for i in range(97)] + ["{no", '{"text": 3}', '{"text": ""}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"2 of 99 records cannot be used .*1 not JSON.*max_bad_fraction=0\.01"):
        make(config(tmp_path / "a.jsonl"), tmp_path / "s")
    kept = [json.loads(line) for line in (tmp_path / "s/rejects.jsonl").read_text().splitlines()]
    assert [record["reason"] for record in kept] == ["not JSON", "field 'text' is not a text", "empty"]
    assert kept[0]["excerpt"] == "{no" and kept[0]["where"].endswith("a.jsonl:98") and kept[0]["source"] == "main"
    # The limit decides on no content, so raising it goes on with what was read.
    manifest, said = make(config(tmp_path / "a.jsonl", max_bad_fraction=0.03), tmp_path / "s")
    assert said[0] == "resuming the interrupted preparation"
    assert manifest["sources"]["main"]["rejected"] == {"empty": 1, "field 'text' is not a text": 1, "not JSON": 1}


@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_an_empty_corpus(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    for near_copies in (True, False):
        with pytest.raises(UserError, match=r"holds no text \(1 empty\)"):
            make(config(tmp_path / "*.txt", split=SplitConfig(near_copies=near_copies)), tmp_path / "s")


def test_no_space_left_is_one_line(corpus, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(preparing.token_store, "write_manifest", full)
    with pytest.raises(UserError, match=r"no space left for the token store at .*finished shards are kept"):
        make(config(corpus[0]), tmp_path / "s")
    monkeypatch.undo()
    assert make(config(corpus[0]), tmp_path / "s")[1][0] == "resuming the interrupted preparation"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sources": {}}, "data.sources is empty"),
        ({"sources": {"a/b": SourceConfig()}}, "'a/b' cannot name a folder"),
        ({"sources": {"plans": SourceConfig()}}, "'plans' cannot name a folder"),
        ({"tokenizer": TokenizerConfig(kind="huggingface")}, "data.tokenizer.path is empty"),
        ({"tokenizer": TokenizerConfig(kind="byte")}, "did you mean 'bytes'"),
        ({"tokenizer": TokenizerConfig(path="/absent.model")}, "no such file"),
        ({"tokenizer": TokenizerConfig(vocab_size=10**6)}, "vocab_size=1000000: cannot be trained"),
        ({"split": SplitConfig(test=2.0)}, "data.split.test=2.0"),
    ],
)
def test_settings_that_cannot_be(corpus, tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        make(dataclasses.replace(config(corpus[0]), **fields), tmp_path / "s")


def test_a_given_tokenizer_that_loses_text_is_named(corpus, tmp_path):
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1, "abcd": 2}, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(["</s>", "<unk>"])
    model.save(str(tmp_path / "t.json"))
    given = TokenizerConfig(kind="huggingface", path=str(tmp_path / "t.json"))
    manifest, lines = make(config(corpus[0], tokenizer=given), tmp_path / "s")
    assert manifest["tokenizer"]["lossy_documents"] == 300 and not load_tokenizer(tmp_path / "s").lossless
    assert any("loses text: 300 documents" in line for line in lines)
    # Another file under the same name is another setting; a file that is gone is not, since the store has its copy.
    (tmp_path / "t.json").write_text((tmp_path / "t.json").read_text() + "\n")
    with pytest.raises(UserError, match=r"data\.tokenizer\.sha256"):
        make(config(corpus[0], tokenizer=given), tmp_path / "s")
    (tmp_path / "t.json").unlink()
    assert make(config(corpus[0], tokenizer=given), tmp_path / "s")[0] == manifest


def test_the_corpus_hash_and_fingerprint_know_no_paths(corpus, tmp_path):
    shutil.copytree(corpus[0].parent, tmp_path / "moved", ignore=shutil.ignore_patterns("moved"))
    one, _ = make(config(corpus[0]), tmp_path / "s")
    two, _ = make(config(tmp_path / "moved/a.jsonl"), tmp_path / "t")
    assert (one["fingerprint"], one["corpus_sha256"]) == (two["fingerprint"], two["corpus_sha256"])
    table = pa.table({"text": [*corpus[1][:-1], "changed"]})
    pq.write_table(table, tmp_path / "b.parquet")
    three, _ = make(config(tmp_path / "b.parquet"), tmp_path / "u")
    assert three["corpus_sha256"] != one["corpus_sha256"] and three["fingerprint"] != one["fingerprint"]


def test_a_file_that_changes_between_the_passes_is_noticed(corpus, tmp_path, monkeypatch):
    def change(self):
        with open(corpus[0], "a") as file:
            file.write(json.dumps({"text": "late"}) + "\n")
        return "bytes", self.folder / "tokenizer.bytes"

    monkeypatch.setattr(preparing._Preparation, "_tokenizer", change)
    with pytest.raises(UserError, match=r"a\.jsonl changed while it was read"):
        make(config(corpus[0]), tmp_path / "s")


def test_a_worker_that_dies_is_named():
    with Workers(1) as pool, pytest.raises(UserError, match=r"ended with status 7 .*data\.workers"):
        list(pool.map(os._exit, [(7,)]))


def test_errors_of_workers_arrive_as_they_are():
    with Workers(2) as pool:
        with pytest.raises(FileNotFoundError):
            list(pool.map(os.listdir, [("/absent",)]))
        assert sorted(pool.map(divmod, [(7, 2), (9, 4), (5, 5)])) == [(0, (3, 1)), (1, (2, 1)), (2, (1, 0))]


def test_xz_needs_what_its_ninth_level_needs():
    import lzma

    for size in (0, 10, 5000, 200_000):
        data = random.Random(size).randbytes(size // 2) * 2
        assert len(stages._xz(data)) == len(lzma.compress(data, preset=9))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["peps/*.jsonl.gz", "gutenberg/[df]*.txt.gz", "tldr/tldr-12*.jsonl.gz"])
def test_every_kept_document_of_public_text_comes_back(shared_data, tmp_path, pattern):
    trained = TokenizerConfig(vocab_size=4096, training_bytes=2_000_000)
    manifest, _ = make(config(shared_data / pattern, tokenizer=trained, workers=2), tmp_path / "s")
    assert manifest["tokenizer"]["lossless"] and manifest["tokenizer"]["lossy_documents"] == 0
    units = sources.list_units("main", SourceConfig(path=str(shared_data / pattern)))
    part_bytes = manifest["sources"]["main"]["part_bytes"]
    wanted = [record.text for unit in units for record in stages.read_unit(unit, part_bytes) if hasattr(record, "text")]
    assert sorted(everything(decoded(tmp_path / "s"))) == sorted(wanted)


def test_ctrl_c_ends_the_pool_quietly():
    """A terminal sends SIGINT to the whole process group; the workers have one of their own."""
    code = (
        "import signal, time\nfrom llmjax.data.store.workers import Workers\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job inherits none
        "with Workers(2) as pool:\n"
        "    try:\n"
        "        print('begun', flush=True)\n"
        "        list(pool.map(time.sleep, [(99,), (99,)]))\n"
        "    except KeyboardInterrupt:\n"
        "        time.sleep(1)\n"  # what a worker has to say would be said now
        "        print('stopped', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout and process.stdout.readline() == "begun\n"
    time.sleep(1)  # the tasks are under way
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30) == ("stopped\n", "")


def test_records_that_name_their_split_stay_in_it(tmp_path):
    given = {f"text {number} of {split}": split for split in SPLITS for number in range(5)}
    lines = [json.dumps({"text": text, "split": split}) for text, split in given.items()]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"text": "lost", "split": "dev"}', '{"text": "none"}']))
    source = SourceConfig(path=str(tmp_path / "a.jsonl"), split_field="split")
    found = DataConfig(sources={"main": source}, tokenizer=BYTES, workers=1, max_bad_fraction=0.2)
    manifest, lines = make(found, tmp_path / "store")
    assert {text: split for split, texts in decoded(tmp_path / "store").items() for text in texts} == given
    assert manifest["sources"]["main"]["rejected"] == {"field 'split' names no split": 2}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "text", "is no JSONL; leave it unset"),
        ("a.jsonl", '{"text": "one", "split": "test"}', "no record names the split train or validation"),
    ],
)
def test_splits_that_records_cannot_give(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    source = SourceConfig(path=str(tmp_path / name), split_field="split")
    with pytest.raises(UserError, match=message):
        make(DataConfig(sources={"main": source}, tokenizer=BYTES, workers=1), tmp_path / "store")


def test_a_store_of_another_format_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one line\n\n" * 500)
    make(config(tmp_path / "a.txt"), tmp_path / "s")
    path = tmp_path / "s" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 7}))
    with pytest.raises(UserError, match=r"format version 7, this llmjax reads 2; .*prepare it again"):
        make(config(tmp_path / "a.txt"), tmp_path / "s")


PREPARE = """
import logging, sys
from llmjax.data.store import prepare
from llmjax.errors import UserError
from llmjax.run import workdir
from llmjax.data.config import *
workdir.REFRESH_SECONDS = 0.1
logging.basicConfig(format="%(message)s", stream=sys.stdout)
logging.getLogger("llmjax").setLevel("INFO")
if sys.argv[3] == "hold":  # with the tokenizer written, until a line comes
    tokenize = prepare._Preparation._tokenize
    def held(self, *arguments):
        print("held", flush=True)
        sys.stdin.readline()
        tokenize(self, *arguments)
    prepare._Preparation._tokenize = held
source = SourceConfig(path=sys.argv[1])
given = TokenizerConfig(vocab_size=int(sys.argv[4]))
config = DataConfig(sources={"main": source}, tokenizer=given, workers=1)
try:
    manifest = prepare.prepare(config, sys.argv[2])
    print("done", manifest["fingerprint"])
except UserError as error:
    print(error)
    sys.exit(78)
"""


@pytest.mark.multiprocess
def test_of_two_that_prepare_one_store_the_second_waits(corpus, tmp_path):
    """Then it takes the store, if it was made with its settings, and never changes it."""

    def begin(mode: str, vocab_size: int) -> subprocess.Popen:
        command = [sys.executable, "-c", PREPARE, str(corpus[0]), str(tmp_path / "s"), mode, str(vocab_size)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    first = begin("hold", 300)
    assert first.stdout and "held\n" in iter(first.stdout.readline, "")
    same, other = begin("go", 300), begin("go", 310)
    for process in (same, other):
        assert process.stdout
        line = process.stdout.readline()
        assert line.startswith(f"waiting for process {first.pid} on ") and str(tmp_path / "s") in line
    told, _ = first.communicate("go\n", timeout=120)
    fingerprint = told.split()[-1]
    before = contents(tmp_path / "s/main")
    assert same.communicate(timeout=120)[0].split() == ["done", fingerprint] and same.returncode == 0
    refused = other.communicate(timeout=120)[0]
    assert other.returncode == 78 and "data.tokenizer.vocab_size: 300 -> 310" in refused
    assert contents(tmp_path / "s/main") == before and not (tmp_path / "s/prepare.lock").exists()
    check_store(tmp_path / "s", read_manifest(tmp_path / "s") or {})


def test_parts_of_two_stores_are_no_store(corpus, tmp_path):
    """Each part is whole in itself; the manifest binds them."""
    for name, vocab_size in (("a", 300), ("b", 310)):
        make(config(corpus[0], tokenizer=TokenizerConfig(vocab_size=vocab_size)), tmp_path / name)
    shutil.copytree(tmp_path / "a", tmp_path / "mixed")
    shutil.copytree(tmp_path / "b/main/test", tmp_path / "mixed/main/test", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"main/test belongs to another store \(tokenizer"):
        make(config(corpus[0], tokenizer=SMALL), tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed/main")
    shutil.copytree(tmp_path / "b/main", tmp_path / "mixed/main")
    with pytest.raises(UserError, match=r"main/train belongs to another store"):
        check_store(tmp_path / "mixed", read_manifest(tmp_path / "mixed") or {})


@pytest.mark.parametrize("content", [b"", b"[]", b'{"version": ', b"[" * 100_000, None])
def test_a_store_whose_manifest_is_damaged_is_not_prepared_again(tmp_path, content):
    (tmp_path / "a.txt").write_text("one line\n\n" * 500)
    make(config(tmp_path / "a.txt"), tmp_path / "s")
    path = tmp_path / "s/manifest.json"
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")}
    with pytest.raises(UserError, match=r"manifest\.json"):
        make(config(tmp_path / "a.txt"), tmp_path / "s")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")}


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "a.txt").write_text("one line\n\n" * 500)
    (tmp_path / "s/main").mkdir(parents=True)
    (tmp_path / "s/main/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"s/main exists, but .* neither a finished token store nor an interrupted one"):
        make(config(tmp_path / "a.txt"), tmp_path / "s")
    assert (tmp_path / "s/main/thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("stage", ["_check_rejects", "_tokenize", "_compress"])
def test_a_store_that_goes_away_while_it_is_prepared(tmp_path, monkeypatch, stage):
    (tmp_path / "a.txt").write_text("one line\n\n" * 500)
    with monkeypatch.context() as patch:
        original = getattr(preparing._Preparation, stage)

        def gone(self, *arguments):
            (tmp_path / "s").rename(tmp_path / "away")
            return original(self, *arguments)

        patch.setattr(preparing._Preparation, stage, gone)
        with pytest.raises(UserError, match="was removed or renamed while"):
            make(config(tmp_path / "a.txt"), tmp_path / "s")
    make(config(tmp_path / "a.txt"), tmp_path / "s")  # nothing is in the way of the next run
