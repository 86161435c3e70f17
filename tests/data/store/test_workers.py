"""Worker processes: any number gives the same store, and they end without noise."""

import os
import signal
import subprocess
import sys
import time

import pytest

from llmjax.data.readers import sources
from llmjax.data.store.workers import Workers
from llmjax.errors import UserError
from tests.data.preparation import SMALL, config, contents, run_prepare


def test_store_does_not_depend_on_the_number_of_workers(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MIN_UNIT_BYTES", 20_000)
    for workers in (1, 3):
        run_prepare(config(corpus[0], tokenizer=SMALL, workers=workers), tmp_path / f"s{workers}")
    assert len(list((tmp_path / "s1/main/train").glob("tokens-*.bin"))) > 4
    assert contents(tmp_path / "s1") == contents(tmp_path / "s3")


def test_a_worker_that_dies_is_named():
    with Workers(1) as pool, pytest.raises(UserError, match=r"ended with status 7 .*data\.workers"):
        list(pool.map(os._exit, [(7,)]))


def test_errors_of_workers_arrive_as_they_are():
    with Workers(2) as pool:
        with pytest.raises(FileNotFoundError):
            list(pool.map(os.listdir, [("/absent",)]))
        assert sorted(pool.map(divmod, [(7, 2), (9, 4), (5, 5)])) == [(0, (3, 1)), (1, (2, 1)), (2, (1, 0))]


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
        "        time.sleep(1)\n"  # a traceback of a worker would arrive now
        "        print('stopped', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout and process.stdout.readline() == "begun\n"
    time.sleep(1)  # the tasks are under way
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30) == ("stopped\n", "")
