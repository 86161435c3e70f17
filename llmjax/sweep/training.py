"""A training run as a process of its own, watched through the files of its workdir."""

from collections.abc import Callable, Sequence
import dataclasses
import logging
import math
import os
import shlex
import subprocess
import sys
import time

from etils import epath

from llmjax.errors import UserError
from llmjax.evals import results
from llmjax.metrics import read_metrics
from llmjax.report.cost import measure_seconds
from llmjax.run import workdir as workdirs

SUCCESS, PREEMPTED = 0, 85  # exit statuses of `llmjax train`
LOG = "train.log"  # what it prints, in the workdir
_POLL_SECONDS = 0.5
_STOP_SECONDS = 120.0  # for a run that was asked to save and stop
_ERROR = "llmjax: error: "

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit status, whether `should_stop` ended it, its seconds, and the reason of a failure."""

    status: int
    was_stopped: bool
    seconds: float
    error: str = ""


def command(config: str | None, workdir: epath.PathLike, overrides: Sequence[tuple[str, str]]) -> list[str]:
    """`llmjax train` with the interpreter of this process."""
    words = [sys.executable, "-m", "llmjax", "train", f"--workdir={os.fspath(workdir)}"]
    return [*words, *([f"--config={config}"] if config else []), *write_flags(overrides)]


def write_flags(overrides: Sequence[tuple[str, str]]) -> list[str]:
    """(FIELD, TEXT) as words of a command line."""
    return [f"--config.{field}={text}" for field, text in overrides]


def quote_flags(overrides: Sequence[tuple[str, str]]) -> str:
    """(FIELD, TEXT) as they are pasted into a shell."""
    return " ".join(f"--config.{field}={shlex.quote(text)}" for field, text in overrides)


def run(words: Sequence[str], workdir: epath.Path, should_stop: Callable[[], bool] = lambda: False) -> Outcome:
    """Run a training command to its end; it prints into WORKDIR/train.log.

    should_stop  called twice a second; true: the run saves and stops
    An exception, such as that of a signal, also lets the run save and stop before it continues.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    log, began = workdir / LOG, time.monotonic()
    with log.open("ab") as file:
        start = file.tell()
        # A session of its own: Ctrl-C reaches this process alone, which then stops the run in order.
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    was_stopped = False
    try:
        while process.poll() is None:
            if not was_stopped and should_stop():
                was_stopped = True
                _stop(process)
            time.sleep(_POLL_SECONDS)
    except BaseException:
        _stop(process)
        raise
    status = process.returncode
    error = "" if status == SUCCESS or was_stopped else _find_error(log, start, status)
    return Outcome(status, was_stopped, time.monotonic() - began, error)


def _stop(process: subprocess.Popen) -> None:
    """Let a run save and end, or kill it where it does not."""
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _find_error(log: epath.Path, start: int, status: int) -> str:
    """The error that a run printed since byte `start`, or its last line."""
    with log.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
    last = errors[-1] if errors else lines[-1] if lines else ""
    if status < 0:
        last = f"killed by signal {-status}{': ' * bool(last)}{last}"
    return last or f"exit status {status}"


def read_seconds(workdir: epath.Path) -> float | None:
    """Seconds of all starts of a run, by its files; None where they do not say, as before its first step.

    A start that was killed counts up to the last line of its metrics, and not at all before its first one.
    """
    starts = (workdirs.read_json(workdir / workdirs.RUN) or {}).get("starts", [])
    measured = [each for each in measure_seconds(starts, read_metrics(workdir)) if each is not None] if starts else []
    return sum(measured) if measured else None


def read_scores(workdir: epath.Path, metric: str) -> dict[int, float]:
    """Step -> `metric` of the evaluations that a run has written: of the validation split, or TASK/METRIC of a task.

    Raises UserError where a run has scores, and `metric` is none of them.
    """
    task, is_of_task, name = metric.partition("/")
    scores: dict[int, float] = {}
    for path in (workdir / workdirs.EVAL).glob(f"*/{task if is_of_task else 'validation'}.json"):
        record = workdirs.read_json(path)
        if record is None or not path.parent.name.isdecimal():
            continue
        if is_of_task:
            table = {key: number["value"] for key, number in record["metrics"].items()}
        else:
            table, name = record["total"], metric
        if name not in table:
            raise UserError(f"eval.metric={metric!r}: {path} has {', '.join(table)}; choose one of these")
        value = table[name]
        scores[int(path.parent.name)] = math.nan if value is None else float(value)
    return dict(sorted(scores.items()))


def find_score(scores: dict[int, float], metric: str, *, keeps_best: bool) -> float:
    """The score of a run: that of its last evaluation, or of its best one where its checkpoint is kept; nan: none."""
    finite = [value for value in scores.values() if math.isfinite(value)]
    if keeps_best and finite:
        return min(finite) if results.is_eval_metric_lower_better(metric) else max(finite)
    return list(scores.values())[-1] if scores else math.nan
