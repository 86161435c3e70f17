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

    Raises UserError where another process then reads no store (the folder is neither shared nor copied), or another.
    """
    problem = ""
    if hosts.is_primary():
        try:
            prepare.prepare(config.data, folder)
        except UserError as error:
            problem = str(error)
    if problem := _wait_for_primary(problem):
        raise UserError(problem)
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while (manifest := prepare.read_manifest(folder)) is None and time.monotonic() < deadline:
        time.sleep(0.5)
    hosts.all_equal("token store", manifest["fingerprint"] if manifest else f"no store in {folder}")
    assert manifest is not None
    prepare.check_store(folder, manifest)  # a host may have a copy of its own
    return manifest


def _wait_for_primary(problem: str) -> str:
    """The error of process 0, or "", on all processes. Processes that wait for it print that every 30 s."""
    answered = threading.Event()

    def report_waiting() -> None:
        began = time.monotonic()
        while not answered.wait(30):
            print(f"waiting for process 0 to prepare the token store ({time.monotonic() - began:.0f} s)", flush=True)

    if not hosts.is_primary():
        threading.Thread(target=report_waiting, daemon=True).start()
    try:
        return hosts.broadcast("prepare", problem, timeout_seconds=_PREPARE_SECONDS)
    finally:
        answered.set()
