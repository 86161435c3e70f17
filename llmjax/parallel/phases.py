"""What a process is doing, how long it may take, and which process holds up the others. No clock: time is passed in."""

import collections
import dataclasses
import json
import math
import statistics

from llmjax.errors import UserError

# In the order in which a process passes through them: before training, in a step, after training.
PHASES = ("setup", "compile", "restore", "data", "step", "profile", "save", "eval", "report", "done")
SILENT_SECONDS = 15.0  # a process that has not reported for this long is named
# Phases in which a running process reports. In the others, a compiler or a tokenizer may hold Python's lock for long.
DEAD_PHASES = ("restore", "save", "eval")
_STEP_FACTOR = 10  # a step may take this many times the median
_STEP_WINDOW = 64  # steps, or seconds of short steps, of which the median is taken
_SLOW_WINDOW, _SLOW_SHARE = 60, 0.25  # reports of which a share is taken; a slow host's share above that of the others
_SAMPLE_SECONDS = 0.5  # the least time between two samples of a share


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """How long a process may stay in one phase of training before the job ends with exit status 75; 0: no limit.

    A limit of 0 is for a debugger. Saving and restoring are limited by checkpoint.timeout_seconds. The time in which
    the process or its machine was suspended does not count.

    setup_seconds    preparing the token store, while the other processes wait, and opening it
    compile_seconds  compiling with the first execution, and sampling and the report after training
    data_seconds     waiting for a batch
    step_seconds     a step, or 10 times the median of the recent ones if that is longer
    eval_seconds     a batch of an evaluation
    """

    setup_seconds: int = 86400
    compile_seconds: int = 3600
    data_seconds: int = 60
    step_seconds: int = 60
    eval_seconds: int = 300

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 0:
                raise UserError(f"watchdog.{name}={value}: must not be negative; 0 means no limit")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a process says about itself.

    beat        number of this report; it rises as long as the process runs
    seconds     how long the process is in this phase
    limit       seconds that the phase may take; 0: no limit
    limit_name  the config field of the limit
    data_share  share of the recent time in which the process waited for data
    """

    phase: str = "setup"
    step: int = 0
    beat: int = 0
    seconds: float = 0.0
    limit: float = 0.0
    limit_name: str = ""
    data_share: float = 0.0

    def to_json(self) -> str:
        """The report as text, for `from_json`."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Read what `to_json` returned."""
        return cls(**json.loads(text))

    @property
    def position(self) -> tuple[int, int]:
        """How far the process is, which can be compared with that of other processes."""
        return (self.step, PHASES.index(self.phase)) if self.phase != "done" else (1 << 62, 0)


class PhaseTimer:
    """How long this process is in its phase.

    save_seconds   limit of saving and of restoring (checkpoint.timeout_seconds)
    """

    def __init__(self, config: WatchdogConfig, save_seconds: int):
        self._config, self._save_seconds = config, save_seconds
        self._phase = self._seen = ("setup", 0)
        self._seconds, self._beat = 0.0, 0
        self._step_began: int | None = None  # the step whose duration is being measured
        self._step_time = self._sample_time = 0.0
        self._step_seconds: collections.deque[float] = collections.deque(maxlen=_STEP_WINDOW)
        self._waits_for_data: collections.deque[bool] = collections.deque(maxlen=_SLOW_WINDOW)
        self._forgets = False

    def enter(self, phase: str, step: int) -> None:
        """The process begins a phase, or begins it again. Costs a fraction of a microsecond."""
        self._phase = (phase, step)  # a new tuple each time, so `tick` sees that it was entered again

    def forget_steps(self) -> None:
        """Steps so far don't tell how long later ones take."""
        self._forgets = True  # `tick`, in another thread, reads the durations

    def tick(self, seconds: float) -> Report:
        """Count `seconds` in which the process ran, and report."""
        if self._forgets:
            self._forgets, self._step_began = False, None
            self._step_seconds.clear()
        phase, step = current = self._phase
        self._seconds = self._seconds + seconds if current is self._seen else 0.0
        self._seen = current
        self._beat += 1
        if phase in ("data", "step"):
            self._measure_steps(step, seconds)
        self._sample_time += seconds
        if self._sample_time >= _SAMPLE_SECONDS:
            self._sample_time = 0.0
            self._waits_for_data.append(phase == "data")
        limit, name = self._limit(phase)
        full = len(self._waits_for_data) == _SLOW_WINDOW
        return Report(
            phase=phase,
            step=step,
            beat=self._beat,
            seconds=self._seconds,
            limit=limit,
            limit_name=name,
            data_share=sum(self._waits_for_data) / _SLOW_WINDOW if full else 0.0,
        )

    def _measure_steps(self, step: int, seconds: float) -> None:
        self._step_time += seconds
        if self._step_began is None:
            self._step_began, self._step_time = step, 0.0
        elif step > self._step_began:
            self._step_seconds.append(self._step_time / (step - self._step_began))
            self._step_began, self._step_time = step, 0.0

    def _limit(self, phase: str) -> tuple[float, str]:
        """The limit of a phase and its field. Until a step was measured, a step may take as long as compiling it."""
        config = self._config
        if phase == "step" and self._step_seconds and config.step_seconds:
            median = statistics.median(self._step_seconds)
            return max(float(config.step_seconds), _STEP_FACTOR * median), "watchdog.step_seconds"
        if phase in ("save", "restore"):
            return self._save_seconds, "checkpoint.timeout_seconds"
        if phase in ("setup", "data", "eval"):
            return getattr(config, f"{phase}_seconds"), f"watchdog.{phase}_seconds"
        is_off = phase == "done" or (phase == "step" and not config.step_seconds)
        return (0, "") if is_off else (config.compile_seconds, "watchdog.compile_seconds")


class Observer:
    """Decides from the reports of processes which of them is stuck, silent or slow.

    processes       those whose reports are observed
    silent_seconds  a process whose reports do not change for this long is silent
    dead_seconds    a process that is silent for this long in a phase of DEAD_PHASES is lost
    """

    def __init__(self, processes: list[int], silent_seconds: float = SILENT_SECONDS, dead_seconds: float = math.inf):
        self._reports = {process: Report() for process in processes}
        self._silence = dict.fromkeys(processes, 0.0)
        self._silent_seconds, self._dead_seconds = silent_seconds, dead_seconds
        self._named: set[int] = set()

    def update(self, reports: dict[int, Report], seconds: float) -> None:
        """Take the newest reports; `seconds` have passed since the last call."""
        for process, old in self._reports.items():
            new = reports.get(process, old)
            self._silence[process] = self._silence[process] + seconds if new.beat == old.beat else 0.0
            self._reports[process] = new

    def quiet(self) -> list[int]:
        """Processes that have not reported for a third of `silent_seconds`: after an error, those that have died."""
        return [process for process in self._reports if self._is_silent(process, self._silent_seconds / 3)]

    def silent(self) -> list[int]:
        """Processes that have not reported for `silent_seconds`: dead, stopped or unreachable."""
        return [process for process in self._reports if self._is_silent(process, self._silent_seconds)]

    def newly_silent(self) -> list[int]:
        """Those of `silent` that were not silent at the last call."""
        silent = set(self.silent())
        new, self._named = silent - self._named, silent
        return sorted(new)

    def lost(self) -> list[int]:
        """Processes that are silent for longer than their last phase may take, or for so long that they are dead."""
        return [p for p in self.silent() if 0 < self._silence_limit(p) < self._silence[p]]

    def stuck(self) -> list[int]:
        """Processes that are beyond the limit of their phase and wait for no other process, and those of `lost`.

        A process that waits for another one, as in a step's collectives, is not stuck while the process that is
        furthest behind is within its own limit. Time without a report counts as time in the last phase, and where a
        process has become quiet, the others are taken to wait for it: its own limit decides.
        """
        behind, quiet = min(report.position for report in self._reports.values()), self.quiet()

        def waits(process: int) -> bool:
            report = self._reports[process]
            return report.phase != "data" and (report.position != behind or (bool(quiet) and process not in quiet))

        late = [p for p, r in self._reports.items() if 0 < r.limit < self._seconds(p) and not waits(p)]
        return sorted({*late, *self.lost()})

    def slow(self) -> list[int]:
        """Processes that wait for data much more than most others, which therefore wait for them."""
        shares = sorted(report.data_share for report in self._reports.values())
        usual = shares[(len(shares) - 1) // 2]
        return [p for p, report in self._reports.items() if report.data_share > usual + _SLOW_SHARE]

    def data_share(self, process: int) -> float:
        """Share of the recent time in which a process waited for data."""
        return self._reports[process].data_share

    def describe(self, process: int) -> str:
        """What a process is doing and since when, in a few words."""
        report, silence = self._reports[process], self._silence[process]
        where = f"process {process}: phase {report.phase} of step {report.step}"
        if process in self.quiet():
            return f"{where}, no report for {silence:.0f} s (dead, stopped or unreachable)"
        limit = f", limit {report.limit_name}={report.limit:.0f}" if self._seconds(process) > report.limit > 0 else ""
        return f"{where} for {self._seconds(process):.0f} s{limit}"

    def describe_ended(self, process: int) -> str:
        """As `describe`, of a process whose connection has closed, and what the others are doing."""
        report, others = self._reports[process], self.describe_others([process])
        where = f"process {process}: phase {report.phase} of step {report.step}"
        return f"{where}, its connection closed (dead or unreachable)" + (f" (meanwhile {others})" if others else "")

    def is_done(self, process: int) -> bool:
        """Whether a process has said that it ends."""
        return self._reports[process].phase == "done"

    def describe_others(self, named: list[int]) -> str:
        """The phases of all other processes, those in the same one together."""
        groups: dict[tuple[str, int], list[int]] = {}
        for process, report in self._reports.items():
            if process not in named:
                groups.setdefault((report.phase, report.step), []).append(process)
        parts = []
        for (phase, step), processes in groups.items():
            who = f"process {processes[0]}" if len(processes) == 1 else f"{len(processes)} processes"
            parts.append(f"{who} in phase {phase} of step {step}")
        return "; ".join(parts)

    def _silence_limit(self, process: int) -> float:
        report = self._reports[process]
        return min(report.limit, self._dead_seconds) if report.phase in DEAD_PHASES else report.limit

    def _is_silent(self, process: int, seconds: float) -> bool:
        return self._silence[process] > seconds and self._reports[process].phase != "done"

    def _seconds(self, process: int) -> float:
        return self._reports[process].seconds + self._silence[process]
