"""Stand-ins for the Google Cloud CLI and for Slurm's: tpu.sh and train.sbatch on hosts that are local processes."""

from collections.abc import Callable
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from tests import jobs

TPU = jobs.ROOT / "launch" / "tpu_vm" / "tpu.sh"
SBATCH = jobs.ROOT / "launch" / "slurm" / "train.sbatch"
DEADLINE_SECONDS = 200


class FakeCloud:
    """Queued resources, their hosts, and the calls of gcloud (tests/launch/fake_gcloud.py), in a folder."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._bin = folder / "bin"
        self._bin.mkdir(parents=True)
        programs = {
            "gcloud": f'exec "{sys.executable}" -S "{jobs.ROOT}/tests/launch/fake_gcloud.py" "$@"',
            "sleep": "exec /bin/sleep 0.05",  # pauses of tpu.sh, which prints how long they are
        }
        for name, line in programs.items():
            (self._bin / name).write_text(f"#!/bin/sh\n{line}\n")
            (self._bin / name).chmod(0o755)

    def start(self, *arguments: str, **env: str) -> subprocess.Popen:
        """tpu.sh, with stdout and stderr in one stream."""
        environment = jobs.environment(FAKE_GCLOUD=str(self.folder), **env)
        environment["PATH"] = f"{self._bin}:{environment['PATH']}"
        return subprocess.Popen(
            [str(TPU), *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *arguments: str, **env: str) -> tuple[int, str]:
        """Exit status and output of tpu.sh."""
        process = self.start(*arguments, **env)
        out, _ = process.communicate(timeout=DEADLINE_SECONDS)
        return process.returncode, out

    def calls(self) -> list[list[str]]:
        """The arguments of every call of gcloud."""
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self) -> list[str]:
        """What was done with queued resources, without looks at their state."""
        return [call[4] for call in self.calls() if call[3] == "queued-resources" and call[4] != "describe"]

    def set_state(self, name: str, state: str, tpu_vms: str = "READY") -> None:
        """Put a queued resource and its TPUs into a state."""
        (self.folder / f"{name}.json").write_text(json.dumps({"state": state, "tpu_vms": tpu_vms}))

    def home(self, name: str, index: int) -> pathlib.Path:
        """The home folder of a host."""
        return self.folder / "hosts" / f"{name}-{index}"

    def job_process(self, name: str, index: int) -> int:
        """The process id of the command that runs on a host."""
        shell = int((self.home(name, index) / ".llmjax-job" / "pid").read_text())
        return int(pathlib.Path(f"/proc/{shell}/task/{shell}/children").read_text().split()[0])

    def end_jobs(self) -> None:
        """Kill what still runs on the hosts, as after a failed test."""
        for path in self.folder.glob("hosts/*/.llmjax-job/pid"):
            command = pathlib.Path(f"/proc/{path.read_text().strip()}/cmdline")
            if command.exists() and str(self.folder) in command.read_text():  # the id may be another process's by now
                os.killpg(int(path.read_text()), signal.SIGKILL)


# Runs the command as two tasks. As the real one, it names the status of each that failed, and returns the highest.
SRUN = """#!/bin/bash
printf "%s\\n" "$*" >> "$CALLS/srun"
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do
  LLMJAX_PROCESS_ID=$task "$@" &
  pids[task]=$!
done
highest=0
for task in 0 1; do
  wait "${pids[task]}"
  status=$?
  ((status == 0)) || echo "srun: error: n1: task $task: Exited with exit code $status" >&2
  ((status <= highest)) || highest=$status
done
exit "$highest"
"""
SCONTROL = f"""#!/bin/sh
case $1 in
  show) echo "   Command={SBATCH} llmjax train" ;;
  requeue) echo "$2" >> "$CALLS/requeue" ;;
esac
"""


class FakeSlurm:
    """Runs train.sbatch with stand-ins for srun and scontrol, in a folder that is that of the job."""

    def __init__(self, folder: pathlib.Path, srun: str = SRUN):
        self.folder = folder
        folder.mkdir()
        for name, text in (("srun", srun), ("scontrol", SCONTROL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        self.calls = folder / "calls"
        self.calls.mkdir()

    def run(self, command: list[str], restarts: int = 0, **env: str) -> tuple[int, str, int]:
        """Exit status and output of one start, and how often the job has been requeued so far."""
        variables = {"PATH": f"{self.folder}:{os.environ['PATH']}", "CALLS": str(self.calls), "SLURM_JOB_ID": "7"}
        done = subprocess.run(
            ["bash", SBATCH, *command],
            env={**os.environ, **variables, "SLURM_RESTART_COUNT": str(restarts), **env},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        requeues = self.calls / "requeue"
        return done.returncode, done.stdout, len(requeues.read_text().split()) if requeues.exists() else 0


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Wait until the condition holds, while the process runs."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.01)
