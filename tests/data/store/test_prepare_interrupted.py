"""Preparation after a kill, a full disk or a change of the files, and of one store by two processes."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from llmjax.data.readers import sources
from llmjax.data.store import prepare as preparing
from llmjax.data.store.prepare import check_store, read_manifest
from llmjax.errors import UserError
from tests.data.preparation import all_texts, config, contents, read_texts, run_prepare, sentence


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_preparation_resumes(corpus, tmp_path):
    """SIGKILL at several moments; each run resumes the last one, and the store is that of an uninterrupted run."""
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
    for stage in ("reading", "training a", "tokenizing", "nothing"):
        process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "killed"], stdout=subprocess.PIPE, text=True)
        assert process.stdout
        for line in process.stdout:
            if line.startswith(stage) or (stage == "tokenizing" and line.startswith("training the tokenizer")):
                while stage == "tokenizing" and not list((tmp_path / "killed").glob("*/*/tokens-*.bin*")):
                    time.sleep(0.001)  # into the stage that follows this line: a first shard is begun
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
        process.wait()
        process.stdout.close()
        time.sleep(0.2)  # so that its workers notice its end
        assert (read_manifest(tmp_path / "killed") is None) == (stage != "nothing")
        if stage == "tokenizing":
            (tmp_path / "killed/manifest.json.partial-1").touch()  # as a kill at the last moment leaves it
    assert kills == 3
    assert contents(tmp_path / "killed") == contents(tmp_path / "quiet")


def test_finished_shards_are_kept_and_damaged_ones_written_again(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MIN_UNIT_BYTES", 20_000)
    run_prepare(config(corpus[0]), tmp_path / "quiet")
    with monkeypatch.context() as patch:
        patch.setattr(preparing._Preparation, "_compress", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_prepare(config(corpus[0]), tmp_path / "s")
    shards = sorted((tmp_path / "s/main/train").glob("tokens-*.bin"))
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    (tmp_path / "s/main/train/tokens-00009.bin.partial-1").write_bytes(b"left by a killed writer")
    times = {shard: shard.stat().st_mtime_ns for shard in shards[1:]}
    _, lines = run_prepare(config(corpus[0]), tmp_path / "s")
    assert lines[0] == "resuming the interrupted preparation"
    assert times == {shard: shard.stat().st_mtime_ns for shard in shards[1:]}
    assert contents(tmp_path / "s") == contents(tmp_path / "quiet")


def test_an_interrupted_preparation_of_other_text_starts_over(corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(preparing._Preparation, "_compress", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_prepare(config(corpus[0]), tmp_path / "s")
    corpus[0].write_text(corpus[0].read_text() + json.dumps({"text": "one more"}) + "\n")
    _, lines = run_prepare(config(corpus[0]), tmp_path / "s")
    assert "starting over" in lines[0]
    assert "one more" in all_texts(read_texts(tmp_path / "s"))


def test_no_space_left_is_one_line(corpus, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(preparing.token_store, "write_manifest", full)
    with pytest.raises(UserError, match=r"no space left for the token store at .*finished shards are kept"):
        run_prepare(config(corpus[0]), tmp_path / "s")
    monkeypatch.undo()
    assert run_prepare(config(corpus[0]), tmp_path / "s")[1][0] == "resuming the interrupted preparation"


def test_file_that_changes_between_stages_is_refused(corpus, tmp_path, monkeypatch):
    def change(self):
        with open(corpus[0], "a") as file:
            file.write(json.dumps({"text": "late"}) + "\n")

    monkeypatch.setattr(preparing._Preparation, "_make_tokenizer", change)
    with pytest.raises(UserError, match=r"a\.jsonl changed while it was read"):
        run_prepare(config(corpus[0]), tmp_path / "s")


@pytest.mark.parametrize("stage", ["_check_rejects", "_tokenize", "_compress"])
def test_a_store_that_is_renamed_while_it_is_prepared(tmp_path, monkeypatch, stage):
    (tmp_path / "a.txt").write_text("one line\n\n" * 500)
    with monkeypatch.context() as patch:
        original = getattr(preparing._Preparation, stage)

        def remove_folder(self, *arguments):
            (tmp_path / "s").rename(tmp_path / "away")
            return original(self, *arguments)

        patch.setattr(preparing._Preparation, stage, remove_folder)
        with pytest.raises(UserError, match="was removed or renamed while"):
            run_prepare(config(tmp_path / "a.txt"), tmp_path / "s")
    run_prepare(config(tmp_path / "a.txt"), tmp_path / "s")  # nothing is in the way of the next run


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
tokenizer = TokenizerConfig(vocab_size=int(sys.argv[4]))
config = DataConfig(sources={"main": source}, tokenizer=tokenizer, workers=1)
try:
    manifest = prepare.prepare(config, sys.argv[2])
    print("done", manifest["fingerprint"])
except UserError as error:
    print(error)
    sys.exit(78)
"""


@pytest.mark.multiprocess
def test_second_preparation_of_one_store_waits(corpus, tmp_path):
    """Then it uses the store if the settings are the same, and never changes it."""

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
    output, _ = first.communicate("go\n", timeout=120)
    fingerprint = output.split()[-1]
    before = contents(tmp_path / "s/main")
    assert same.communicate(timeout=120)[0].split() == ["done", fingerprint] and same.returncode == 0
    refused = other.communicate(timeout=120)[0]
    assert other.returncode == 78 and "data.tokenizer.vocab_size: 300 -> 310" in refused
    assert contents(tmp_path / "s/main") == before and not (tmp_path / "s/prepare.lock").exists()
    check_store(tmp_path / "s", read_manifest(tmp_path / "s") or {})
