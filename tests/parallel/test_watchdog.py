"""Decisions of the watchdog, with a clock that the tests move."""

import dataclasses

import pytest

from llmjax.errors import UserError
from llmjax.parallel.phases import SILENT_SECONDS, Observer, PhaseTimer, Report, WatchdogConfig

CONFIG = WatchdogConfig(data_seconds=60, step_seconds=60, compile_seconds=3600, eval_seconds=300)


class Job:
    """Processes with a timer each, and the observer of process 0. `run` moves time by ticks of one second."""

    def __init__(self, processes: int, config: WatchdogConfig = CONFIG):
        self.timers = [PhaseTimer(config, save_seconds=600) for _ in range(processes)]
        self.observer = Observer(list(range(processes)))
        self.stopped: set[int] = set()

    def enter(self, phase: str, step: int, *processes: int) -> None:
        for process in processes or range(len(self.timers)):
            self.timers[process].enter(phase, step)

    def run(self, seconds: int) -> list[int]:
        """The first processes that are stuck within `seconds`; [] if none is."""
        for _ in range(seconds):
            reports = {p: timer.tick(1.0) for p, timer in enumerate(self.timers) if p not in self.stopped}
            self.observer.update(reports, 1.0)
            if stuck := self.observer.stuck():
                return stuck
        return []

    def train(self, steps: int, seconds: int = 1) -> None:
        """Steps that all processes take together."""
        for step in range(1, steps + 1):
            self.enter("compile" if step == 1 else "step", step)
            assert self.run(seconds) == []


@pytest.mark.parametrize(
    ("phase", "limit"), [("data", 60), ("save", 600), ("restore", 600), ("eval", 300), ("compile", 3600)]
)
def test_a_phase_has_its_limit(phase, limit):
    job = Job(1)
    job.enter(phase, 1)
    assert job.run(limit) == []
    assert job.run(3) == [0]


def test_entering_a_phase_again_starts_its_time_again():
    job = Job(1)
    for _ in range(10):
        job.enter("eval", 5)
        assert job.run(299) == []


@pytest.mark.parametrize(("seconds", "limit"), [(1, 60), (20, 200)])
def test_a_step_may_take_ten_times_the_median(seconds, limit):
    job = Job(1)
    job.train(6, seconds)
    job.enter("step", 7)
    assert job.run(limit) == []
    assert job.run(3) == [0]


def test_a_step_may_take_as_long_as_compiling_until_one_is_measured():
    job = Job(1)
    job.train(1)
    job.enter("step", 2)
    assert job.run(3600) == []
    assert job.run(3) == [0]


def test_steps_of_another_size_are_measured_anew():
    """After the median is forgotten, a step may again take as long as compiling."""
    job = Job(1)
    job.train(6, 1)
    job.timers[0].forget_steps()
    job.enter("step", 7)
    assert job.run(3600) == []
    assert job.run(3) == [0]


def test_many_short_steps_within_a_tick_are_measured():
    job = Job(1)
    for step in range(1, 500, 10):
        job.enter("step", step)
        assert job.run(1) == []
    job.enter("step", 500)
    assert job.run(60) == [] and job.run(3) == [0]


def test_the_process_that_waits_for_data_is_stuck_and_not_those_that_wait_for_it():
    job = Job(3)
    job.train(5)
    job.enter("step", 6, 0, 2)
    job.enter("data", 6, 1)
    assert job.run(70) == [1]
    assert job.observer.describe(1) == "process 1: phase data of step 6 for 61 s, limit watchdog.data_seconds=60"
    assert job.observer.describe_others([1]) == "2 processes in phase step of step 6"


@pytest.mark.parametrize(("phase", "limit"), [("save", 600), ("compile", 3600)])
def test_processes_wait_for_one_that_is_within_its_limit(phase, limit):
    """Process 1 saves step 6 or compiles for step 7, while the others wait in the collectives of step 7."""
    job = Job(3)
    job.train(6)
    job.enter("step", 7, 0, 2)
    job.enter(phase, 6 if phase == "save" else 7, 1)
    assert job.run(limit) == []
    assert job.run(3) == [1]


def test_a_collective_that_not_all_processes_run_is_found():
    job = Job(2)
    job.train(6)
    job.enter("step", 7, 0)
    assert job.run(62) == [1]  # process 1 did not go beyond step 6
    assert "phase step of step 6" in job.observer.describe(1)


def test_a_silent_process_is_named_once_and_counts_its_silence_as_time_in_its_phase():
    job = Job(2)
    job.train(6)
    job.enter("data", 7)
    job.run(2)
    job.stopped = {1}
    job.enter("step", 7, 0)
    named = []
    for _ in range(40):
        assert job.run(1) == []
        named += [(process, job.observer.describe(process)) for process in job.observer.newly_silent()]
    (process, line), *others = named
    assert (process, others) == (1, []) and SILENT_SECONDS < 20
    assert line == "process 1: phase data of step 7, no report for 16 s (dead, stopped or unreachable)"
    assert job.run(40) == [1]
    assert job.observer.lost() == []  # its silence alone is not over the limit


@pytest.mark.parametrize(("phase", "seconds"), [("save", 40), ("restore", 40), ("eval", 40), ("data", 60)])
def test_a_process_that_died_is_lost_before_jax_aborts_the_others(phase, seconds):
    job = Job(2)
    job.observer = Observer([0, 1], dead_seconds=40)
    job.train(6)
    job.enter(phase, 7)
    assert job.run(1) == []
    job.stopped = {1}
    job.enter("step", 7, 0)
    assert job.run(seconds - 2) == []
    assert job.run(4) == [1]


@pytest.mark.parametrize("phase", ["setup", "compile"])
def test_a_compiler_or_a_tokenizer_may_stop_the_reports(phase):
    job = Job(2)
    job.observer = Observer([0, 1], dead_seconds=40)
    job.enter(phase, 0)
    job.run(1)
    job.stopped = {1}
    assert job.run(200) == []


def test_a_silent_process_is_stuck_and_not_the_one_that_waits_for_it_in_the_same_step():
    """Even if its last report came late, so that the time of the other one in this step is the longer."""
    job = Job(2)
    job.train(6)
    job.enter("step", 7, 0)
    assert job.run(10) == []
    job.enter("step", 7, 1)
    assert job.run(1) == []
    job.stopped = {1}
    assert job.run(70) == [1]
    assert job.observer.describe(1).startswith("process 1: phase step of step 7, no report for ")


def test_a_process_that_reports_again_is_not_stuck():
    job = Job(2)
    job.train(6)
    job.stopped = {1}
    assert job.run(50) == [] and job.observer.silent() == [1]
    job.stopped = set()
    job.train(100)
    assert job.observer.silent() == []


def test_time_in_which_the_watchdog_did_not_run_does_not_count():
    """The thread passes at most two ticks after a suspension, however long it was."""
    job = Job(1)
    job.train(6)
    job.enter("data", 7)
    assert job.run(30) == []
    job.observer.update({0: job.timers[0].tick(2.0)}, 2.0)
    assert job.run(25) == []


def test_a_process_that_is_done_is_neither_silent_nor_waited_for():
    job = Job(2)
    job.train(6)
    job.enter("done", 6, 1)
    assert job.run(1) == []
    job.stopped = {1}
    job.enter("report", 6, 0)
    assert job.run(3500) == [] and job.observer.silent() == []


def test_a_limit_of_zero_is_off():
    job = Job(1, dataclasses.replace(CONFIG, data_seconds=0, step_seconds=0))
    job.train(6)
    for phase in ("data", "step"):
        job.enter(phase, 7)
        assert job.run(5000) == []


@pytest.mark.parametrize(("share", "slow"), [(0.1, []), (0.5, [2])])
def test_a_process_that_waits_for_data_more_than_the_others_is_slow(share, slow):
    job = Job(3)
    for second in range(120):
        step = second // 10 + 1
        job.enter("step", step)
        if second % 10 < 10 * share:
            job.enter("data", step, 2)
        job.run(1)
        if second < 50:
            assert job.observer.slow() == []  # too early to tell
    assert job.observer.slow() == slow
    assert job.observer.data_share(2) == pytest.approx(share, abs=0.02)


def test_a_report_is_read_as_it_was_published():
    timer = PhaseTimer(CONFIG, save_seconds=600)
    timer.enter("eval", 3)
    report = timer.tick(1.0)
    assert Report.from_json(report.to_json()) == report


def test_a_negative_limit_is_refused():
    with pytest.raises(UserError, match=r"watchdog.data_seconds=-1: must not be negative; 0 means no limit"):
        WatchdogConfig(data_seconds=-1)
