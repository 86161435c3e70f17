"""Prepare the token store of a job on process 0, and check that all processes read the same one."""

import pathlib
import threading
import time
from typing import Any

from llmjax.data.store import prepare
from llmjax.errors import UserError
from llmjax.parallel import hosts
from llmjax.run.config import RunConfig

_PREPARE_SECONDS = 24 * 3600  # how long the others wait for process 0
_VISIBLE_SECONDS = 60  # until a finished manifest becomes visible on a shared file system


def prepare_once(config: RunConfig, folder: pathlib.Path) -> dict[str, Any]:
    """The store's manifest; process 0 prepares the store where it is missing.

    Raises UserError where another process then sees no store (the folder is neither shared nor copied), or another one.
    """
    problem = ""
    if hosts.is_primary():
        try:
            prepare.prepare(config.data, folder)
        except UserError as error:
            problem = str(error)
    problem = _wait_for_primary(problem)
    if problem:
        raise UserError(problem)
    manifest = prepare.read_manifest(folder)
    began = time.monotonic()
    while manifest is None and time.monotonic() - began < _VISIBLE_SECONDS:
        time.sleep(0.5)
        manifest = prepare.read_manifest(folder)
    seen = manifest["fingerprint"] if manifest else f"nothing at {folder}"
    hosts.all_equal("token store", seen)
    assert manifest is not None
    prepare.check_store(folder, manifest)  # a host may have a copy of its own
    return manifest


def _wait_for_primary(problem: str) -> str:
    """Process 0's problem ("" where it has none), on all processes; those that wait print so every half minute."""
    done = threading.Event()

    def report_waiting() -> None:
        began = time.monotonic()
        while not done.wait(30):
            print(f"waiting for process 0 to prepare the token store ({time.monotonic() - began:.0f} s)", flush=True)

    if not hosts.is_primary():
        threading.Thread(target=report_waiting, daemon=True).start()
    try:
        return hosts.broadcast("prepare", problem, timeout_seconds=_PREPARE_SECONDS)
    finally:
        done.set()
