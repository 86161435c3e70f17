#!/usr/bin/env python3
"""When a job is started again: its exit status, a limit per time window, and its progress decide.

local.py uses `Policy` itself. slurm/train.sbatch and tpu_vm/tpu.sh run this file after each end of a job:

  restarts.py --state=FILE --limit=R --window=S --statuses="85 75" [--newest=STEP] [--preempted] [-- COMMAND ...]

It prints one line: the exit status of the job, the seconds until its next start, or - for no further start, and why.
"""

from __future__ import annotations  # a login node may have an old Python

import argparse
import dataclasses
import json
import pathlib
import sys
import time

DONE, HANG, DIVERGED, HARDWARE, BAD_INPUT, PREEMPTED = 0, 75, 76, 77, 78, 85  # exit statuses, docs/launch.md
STOPPED = (129, 130, 143)  # by SIGHUP, Ctrl-C or SIGTERM outside the training loop
NEVER = (DIVERGED, HARDWARE, BAD_INPUT)  # someone has to look first
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before a restart after a crash; doubled each time
MAX_FRUITLESS = 2  # restarts in a row without a newer checkpoint


def job_status(statuses: list[int]) -> int:
    """The exit status of a job from those of its processes, in the order in which they ended.

    The highest that no restart can help, else the first with a meaning, else that of the first crash; 0 if all are 0.
    """
    if fatal := [status for status in statuses if status in NEVER]:
        return max(fatal)  # in whichever order hosts end, and their lines arrive
    with_meaning = [status for status in statuses if status in (HANG, PREEMPTED, *STOPPED)]
    failed = [status for status in statuses if status != DONE]
    return next(iter([*with_meaning, *failed]), DONE)


@dataclasses.dataclass
class Policy:
    """Decides after each end of a job. All fields but the first two are its memory.

    limit       restarts within `window` seconds
    restarts    times of the restarts within the window, in seconds
    newest      step of the newest checkpoint at the last end; -1: none
    pause       seconds before the next restart after a crash
    fruitless   restarts in a row that wrote no newer checkpoint
    is_first    no start has ended yet
    """

    limit: int
    window: float
    restarts: list[float] = dataclasses.field(default_factory=list)
    newest: int = -1
    pause: float = FIRST_PAUSE
    fruitless: int = 0
    is_first: bool = True

    def decide(
        self, status: int, now: float, newest: int | None, *, preempted: bool = False
    ) -> tuple[float | None, str]:
        """Seconds until the next start, or None for no further start; and a line that says why.

        now         time in seconds, of the same clock at each call
        newest      step of the newest checkpoint, -1 for none; None: unknown, so progress is not considered
        preempted   the machines were taken away: a restart is not counted
        """
        if status == DONE:
            return None, "done"
        if status in NEVER:
            return None, f"exit status {status}: a restart cannot help"
        if self.limit == 0:
            return None, f"exit status {status}: no restarts"
        if preempted:
            return 0.0, f"exit status {status}: starting again on other machines"
        has_progress = self._note_progress(newest)
        self.restarts = [time for time in self.restarts if now - time < self.window]
        count = len(self.restarts)
        if count >= self.limit:
            return None, f"exit status {status}: {count} restarts within {self.window:g} s are the limit"
        if self.fruitless >= MAX_FRUITLESS:
            where = f"the newest is of step {newest}" if newest != -1 else "there is none"
            return None, f"exit status {status}: {self.fruitless} restarts in a row wrote no newer checkpoint ({where})"
        if has_progress or status == PREEMPTED:
            self.pause = FIRST_PAUSE
        pause = 0.0
        if status != PREEMPTED:
            pause, self.pause = self.pause, min(2 * self.pause, LONGEST_PAUSE)
        self.restarts.append(now + pause)
        when = f"in {pause:g} s" if pause else "at once"
        return pause, f"exit status {status}: starting again {when} (restart {count + 1} of {self.limit})"

    def _note_progress(self, newest: int | None) -> bool:
        """Count a restart without a newer checkpoint. Returns whether there is a newer one."""
        is_first, self.is_first = self.is_first, False
        if newest is None:
            return False
        has_progress, self.newest = newest > self.newest, newest
        self.fruitless = 0 if has_progress or is_first else self.fruitless + 1
        return has_progress


def find_workdir(command: list[str]) -> pathlib.Path | None:
    """The value of --workdir in a command line, if it is a path of this machine."""
    for index, word in enumerate(command):
        flag, equals, value = word.partition("=")
        if flag == "--workdir" and (equals or index + 1 < len(command)):
            value = value if equals else command[index + 1]
            return None if "://" in value else pathlib.Path(value).expanduser()
    return None


def newest_step(workdir: pathlib.Path | None) -> int | None:
    """The newest complete checkpoint: llmjax renames its folder to the step when all of it is written. -1: none."""
    if workdir is None:
        return None
    steps = [path.name for path in workdir.glob("checkpoints/*") if path.name.isdecimal()]
    return max(map(int, steps), default=-1)


def main(arguments: list[str]) -> None:
    """Decide for a launcher in shell, whose job's memory is a file."""
    parser = argparse.ArgumentParser(prog="launch/restarts.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--state", required=True, type=pathlib.Path, metavar="FILE", help="memory of the job")
    parser.add_argument("--limit", required=True, type=int, metavar="R", help="restarts in a window")
    parser.add_argument("--window", required=True, type=float, metavar="S", help="its seconds")
    parser.add_argument("--statuses", required=True, help="exit statuses of the processes, in the order of their ends")
    parser.add_argument("--newest", type=int, metavar="STEP", help="newest checkpoint, instead of looking for it")
    parser.add_argument("--preempted", action="store_true", help="the machines were taken away")
    parser.add_argument("command", nargs="*", metavar="-- COMMAND", help="its --workdir has the checkpoints")
    options = parser.parse_args(arguments)
    is_new = not options.state.exists() or not options.state.stat().st_size
    policy = Policy(options.limit, options.window, **({} if is_new else json.loads(options.state.read_text())))
    newest = newest_step(find_workdir(options.command)) if options.newest is None else options.newest
    status = job_status([int(word) for word in options.statuses.split()])
    pause, line = policy.decide(status, time.time(), newest, preempted=options.preempted)
    memory = dataclasses.asdict(policy)
    del memory["limit"], memory["window"]
    options.state.write_text(json.dumps(memory))
    print(status, "-" if pause is None else f"{pause:g}", line)


if __name__ == "__main__":
    main(sys.argv[1:])
