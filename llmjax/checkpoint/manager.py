"""Checkpoints: saved asynchronously and atomically, and verified by fingerprint before they are used.

WORKDIR/checkpoints/<step>/ holds one Orbax item for each part (`params`, `opt_state`) and `meta`, a JSON object.
A part is any tree of arrays. Neither Orbax nor TensorStore detects a flipped bit, so every checkpoint contains the
fingerprints of its parts, which are computed again after each restore.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import gc
import json
import logging
import sys
from typing import Any
import zlib

from etils import epath
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from llmjax.atomic import is_remote
from llmjax.checkpoint.fingerprint import digests, leaf_name
from llmjax.errors import UserError
from llmjax.parallel import hosts

logger = logging.getLogger(__name__)

_FULL_DISK_WORDS = ("No space left", "RESOURCE_EXHAUSTED", "File too large", "Disk quota", "ENOSPC")


def _means_full_disk(text: str) -> bool:
    return any(words in text for words in _FULL_DISK_WORDS)


def _is_not_about_full_disk(record: logging.LogRecord) -> bool:
    """A filter of Orbax's log: its threads log pages about a full disk, and the error that they raise is one line."""
    error = record.exc_info[1] if record.exc_info else None
    return not _means_full_disk(f"{record.getMessage()} {error}")


def _ignore_closed_loop(hook: Callable[[Any], None], unraisable: Any) -> None:
    """Pass on unraisable errors, except those of TensorStore's writes that end after their save has failed."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        hook(unraisable)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved and which are kept.

    every             steps between two checkpoints; the last step is always saved
    keep              how many of the newest are kept
    keep_every        multiples of this many steps are never removed; 0: none
    keep_best         also save a checkpoint at each evaluation that is the best so far by eval.metric, and keep the
                      best one
    timeout_seconds   how long a save or a restore may take before the job is stopped
    accept_changes    resume although the tokenizer, the data or the optimizer changed; for one start
    """

    every: int = 1000
    keep: int = 3
    keep_every: int = 0
    keep_best: bool = False
    timeout_seconds: int = 600
    accept_changes: bool = False


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified checkpoint: its step, its trees of arrays by name, and the JSON object saved beside them."""

    step: int
    parts: dict[str, Any]
    meta: dict[str, Any]


class CorruptCheckpointError(Exception):
    """A checkpoint that cannot be read, or whose bits are not the ones that were saved."""


class Checkpoints:
    """The checkpoints in one folder (any path that epath supports). Reading creates and removes nothing.

    best   a step that saving does not remove; None: none besides those of the config
    """

    def __init__(self, folder: epath.PathLike, config: CheckpointConfig = CheckpointConfig()):
        self.folder = epath.Path(folder)
        if not is_remote(folder):
            self.folder = self.folder.resolve()  # Orbax requires absolute paths
        self._config = config
        self._manager: ocp.CheckpointManager | None = None
        self._saving: int | None = None  # the step whose save is running
        self._failure = ""  # of the running save, on any process
        self.best: int | None = None

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first."""
        if not self.folder.exists():
            return []
        numbered = (path for path in self.folder.iterdir() if path.name.isdecimal())
        return sorted(int(path.name) for path in numbered if ocp.utils.is_checkpoint_finalized(path))

    def latest(self) -> int | None:
        """The newest step, None where there is none."""
        return max(self.steps(), default=None)

    def save(self, step: int, parts: dict[str, Any], meta: dict[str, Any]) -> str:
        """Start saving and return the fingerprint once the arrays are copied; they may be donated from then on.

        parts   name -> tree of arrays, such as {"params": ..., "opt_state": ...}
        meta    JSON object, the same on every process
        Raises UserError when this save, or the one before it, finds no space. A collective: all processes call it.
        """
        self.wait()
        part_digests = digests(parts)
        body = {
            "step": step,
            "meta": meta,
            "digests": part_digests,
            "leaves": {name: _leaf_types(tree) for name, tree in parts.items()},
            "fingerprint": "".join(part_digests.values()),
        }
        items: dict[str, Any] = {name: ocp.args.StandardSave(_to_nested_dict(tree)) for name, tree in parts.items()}
        items["meta"] = ocp.args.JsonSave({"crc32": _crc32(body), **body})
        self._saving = step
        self._run_save(lambda: self._open().save(step, args=ocp.args.Composite(**items), force=True))
        return body["fingerprint"]

    def wait(self) -> None:
        """Return when the running save is complete. Raises UserError when there was no space for it."""
        if self._manager is not None:
            self._run_save(self._manager.wait_until_finished)
        self._saving = None

    def raise_failure(self) -> None:
        """Raise the error of a save in the background that has failed; costs microseconds, so each step calls it."""
        if self._saving is None or self._manager is None:
            return
        if self._failure or not self._manager.is_saving_in_progress():  # Orbax says that a failed save is in progress
            self.wait()

    def close(self) -> None:
        """Complete the running save and stop the threads."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                manager, self._manager = self._manager, None
                self._run_save(manager.close)

    def read_meta(self, step: int) -> dict[str, Any]:
        """The JSON object saved with `step`, and its "fingerprint". No array is read. Raises UserError if damaged."""
        with self._damage_as_user_error(step):
            return _read_meta(self._read_body(step))

    def restore(self, step: int, abstract: dict[str, Any]) -> Restored:
        """The parts of `step` named in `abstract`, with the shardings of its leaves, verified.

        abstract   name -> tree of ShapeDtypeStruct with shardings, for any mesh and any number of processes
        Raises UserError where the checkpoint is damaged or its arrays have other names, shapes or types.
        """
        if step not in self.steps():
            raise UserError(
                f"no checkpoint of step {step} in {self.folder}; the steps there are {self.steps() or 'none'}"
            )
        with self._damage_as_user_error(step):
            return self._restore(step, abstract)

    @contextlib.contextmanager
    def _damage_as_user_error(self, step: int) -> Iterator[None]:
        try:
            yield
        except CorruptCheckpointError as error:
            raise UserError(f"checkpoint {self.folder / str(step)} is damaged: {error}; use another step") from error

    def restore_latest_good(
        self,
        abstract: dict[str, Any],
        *,
        check: Callable[[dict[str, Any]], None] = lambda meta: None,
        set_aside: bool = True,
    ) -> Restored | None:
        """The newest checkpoint that is good on all processes; None where there is no checkpoint at all.

        check      is called with the checkpoint's meta before its arrays are read; raises UserError to refuse it
        set_aside  move damaged ones to `damaged/`; False for readers, which may run while a run is saving
        Raises UserError where all of them are damaged. A collective: all processes call it.
        """
        steps: list[int] = json.loads(hosts.broadcast("checkpoint steps", json.dumps(self.steps())))
        for step in reversed(steps):
            try:
                return self._restore(step, abstract, check)
            except CorruptCheckpointError as error:
                action = f"was moved to {self._set_aside(step)}" if set_aside else "was skipped"
                logger.info("checkpoint %d is damaged and %s: %s", step, action, error)
        if steps or hosts.broadcast("damaged", str((self.folder / "damaged").exists())) == "True":
            raise UserError(
                f"{self.folder} holds damaged checkpoints and no good one; to start again at step 0, remove that folder"
            )
        return None

    def _restore(
        self, step: int, abstract: dict[str, Any], check: Callable[[dict[str, Any]], None] = lambda meta: None
    ) -> Restored:
        """Restore without a barrier inside, so that a process that fails leaves none of the others waiting."""
        body = self._read_on_all(f"meta of checkpoint {step}", lambda: self._read_body(step))
        check(_read_meta(body))
        _check_leaves(step, body["leaves"], abstract)
        parts = self._read_on_all(
            f"restore of checkpoint {step}",
            lambda: {name: self._read_part(step, name, tree) for name, tree in abstract.items()},
        )
        computed = digests(parts)
        saved = {name: body["digests"][name] for name in computed}
        if not hosts.agree(computed == saved, f"fingerprint of checkpoint {step}"):
            raise CorruptCheckpointError(
                f"its fingerprint is {'-'.join(computed.values())}, but {'-'.join(saved.values())} was saved"
            )
        return Restored(step, parts, _read_meta(body))

    def _read_on_all(self, name: str, read: Callable[[], Any]) -> Any:
        """The result of `read` if it succeeds on all processes; else CorruptCheckpointError on all of them."""
        value, problem = None, ""
        with _orbax_muted():
            try:
                value = read()
            except CorruptCheckpointError as error:
                problem = str(error)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}".splitlines()[0].split(". See full")[0][:200]
            if problem:
                gc.collect()  # abandoned coroutines print when they are collected, so collect them while muted
        problems = hosts.exchange(name, problem, self._config.timeout_seconds)
        failed = [process for process, text in enumerate(problems) if text]
        if any("Out of memory" in text or "MemoryError" in text for text in problems):
            raise MemoryError(f"{name}: process {failed[0]}: {problems[failed[0]]}")
        if failed:
            where = f"process {failed[0]}: " if len(problems) > 1 else ""
            raise CorruptCheckpointError(where + problems[failed[0]])
        return value

    def _read_body(self, step: int) -> dict[str, Any]:
        try:
            body = json.loads((self.folder / str(step) / "meta" / "metadata").read_text())
            checksum = body.pop("crc32")
            if checksum != _crc32(body):
                raise CorruptCheckpointError("its meta differs from what was saved (checksum)")
            saved_as = body["step"]
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CorruptCheckpointError(f"its meta cannot be read ({type(error).__name__})") from error
        if saved_as != step:
            raise CorruptCheckpointError(f"it was saved as step {saved_as}, and copied or renamed since")
        return body

    def _read_part(self, step: int, name: str, tree: Any) -> Any:
        process = jax.process_index()
        this_process_alone = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=this_process_alone)
        nested = handler.restore(self.folder / str(step) / name, args=ocp.args.StandardRestore(_to_nested_dict(tree)))
        handler.close()
        leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
        return jax.tree.unflatten(structure, [_find_leaf(nested, path) for path, _ in leaves])

    def _set_aside(self, step: int) -> epath.Path:
        """Move a damaged checkpoint to damaged/<step>-<n>, on the primary process. Returns that path."""
        folder = self.folder / "damaged"
        count = len(list(folder.glob(f"{step}-*"))) if folder.exists() else 0
        target = folder / f"{step}-{count + 1}"
        hosts.barrier(f"set aside {step}")  # no process reads the folder any more, and all have counted
        if hosts.is_primary():
            folder.mkdir(parents=True, exist_ok=True)
            (self.folder / str(step)).rename(target)
        hosts.barrier(f"set aside {step}")
        if self._manager is not None:
            self._manager.reload()
        return target

    def _open(self) -> ocp.CheckpointManager:
        """The manager; when it starts, it removes the remains of a killed save."""
        if self._manager is None:
            policies: list[Any] = [preservation_policy.LatestN(self._config.keep), _KeepBest(self)]
            if self._config.keep_every:
                policies.append(preservation_policy.EveryNSteps(self._config.keep_every))
            options = ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
                async_options=ocp.options.AsyncOptions(
                    timeout_secs=self._config.timeout_seconds,
                    barrier_sync_fn=self._exchange_failures if jax.process_count() > 1 else None,
                ),
            )
            for name in ("absl", "asyncio"):
                logging.getLogger(name).addFilter(_is_not_about_full_disk)
            sys.unraisablehook = functools.partial(_ignore_closed_loop, sys.unraisablehook)
            self._manager = _Manager(self.folder, options=options)
        return self._manager

    def _exchange_failures(self, *, key: str, timeout_ms: int) -> None:
        """A barrier for Orbax in a job of several processes, which also tells every process why one of them failed.

        A process whose write fails skips the barriers at which the others wait, except the last one, which Orbax calls
        in a `finally`. The n-th calls of all processes meet, whatever their `key`, so the others learn of the error at
        once instead of waiting for `timeout_seconds`.
        """
        error = sys.exc_info()[1]
        if not self._failure:
            texts = hosts.exchange("checkpoint save", _first_line(error) if error else "", timeout_ms / 1000)
            failures = (f"process {process}: {text}" for process, text in enumerate(texts) if text)
            self._failure = next(failures, "")
        if self._failure:
            raise RuntimeError(self._failure)

    def _run_save(self, action: Callable[[], Any]) -> None:
        """Run a part of a save. Raises UserError when there is no space, on any process, else RuntimeError."""
        try:
            action()
        except Exception as error:
            step, text = self._saving, self._failure or _first_line(error)
            latest = self.latest()
            rest = "there is no complete one yet" if latest is None else f"the newest complete one is of step {latest}"
            if _means_full_disk(f"{text} {error}"):
                process = f" ({text.partition(':')[0]})" if self._failure else ""
                raise UserError(
                    f"no space left in {self.folder} for checkpoint {step}{process}; {rest}: free some space"
                ) from error
            raise RuntimeError(f"checkpoint {step} was not saved to {self.folder}; {rest}: {text}") from error


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which does not ask JAX whether a signal arrived.

    JAX counts the calls of such questions to choose the one at which all processes stop (train.preemption). Orbax asks
    with the number of the step, also from a thread. A signal in between would let the job run on until the training
    loop's own count reaches that number.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class _KeepBest:
    """Orbax's policy that keeps the checkpoint `best`."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For each checkpoint whether it is kept."""
        del context
        return [info.step == self._checkpoints.best for info in checkpoints]


@contextlib.contextmanager
def _orbax_muted() -> Iterator[None]:
    """Suppress the pages that Orbax's coroutines print for each file when one of them fails."""
    log, hook = logging.getLogger("asyncio"), sys.unraisablehook
    was_disabled, log.disabled, sys.unraisablehook = log.disabled, True, lambda unraisable: None
    try:
        yield
    finally:
        log.disabled, sys.unraisablehook = was_disabled, hook


def _first_line(error: BaseException) -> str:
    """The first line of an error, and the words that mean a full disk, which may be in a later line."""
    text = f"{type(error).__name__}: {error}"
    words = next((words for words in _FULL_DISK_WORDS if words in text), "")
    return f"{text.splitlines()[0][:200]}{f' ({words})' if words else ''}"


def _read_meta(body: dict[str, Any]) -> dict[str, Any]:
    return {**body["meta"], "fingerprint": body["fingerprint"]}


def _leaf_types(tree: Any) -> dict[str, str]:
    """Leaf name -> 'dtype[shape]' of a tree of arrays or of ShapeDtypeStructs."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {leaf_name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _check_leaves(step: int, saved: dict[str, dict[str, str]], abstract: dict[str, Any]) -> None:
    for part, tree in abstract.items():
        if part not in saved:
            raise UserError(f"checkpoint {step} has no {part!r}: it holds {', '.join(saved)}")
        expected = _leaf_types(tree)
        for name in [*saved[part], *expected]:
            old, new = saved[part].get(name, "missing"), expected.get(name, "missing")
            if old != new:
                raise UserError(
                    f"checkpoint {step} does not fit this config: {part}.{name} is {old} in the checkpoint, but {new} "
                    "in the config; use the config that it was saved with, or another --workdir"
                )


def _crc32(body: dict[str, Any]) -> int:
    as_read = json.loads(json.dumps(body))  # JSON turns integer keys into texts, which sort in another order
    return zlib.crc32(json.dumps(as_read, sort_keys=True).encode())


def _to_nested_dict(tree: Any) -> dict[str, Any]:
    """The tree as plain nested dicts, so that the files on disk depend on no library's container types."""
    nested: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *parents, last = [leaf_name((key,)) for key in path]
        node = nested
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return nested


def _find_leaf(nested: Any, path: tuple) -> Any:
    for key in path:
        nested = nested[leaf_name((key,))]
    return nested
