"""Real jobs as launchers start them, killed, preempted and resumed: all bits equal those of an unbroken run.

A host of the cloud is a process of this machine. What the cloud would give it (variables, DNS names, a bucket) comes
from the test. tests/slurm has the same test on a real Slurm.
"""

import ast
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml

from tests import jobs
from tests.launch.emulation import DEADLINE_SECONDS, FakeCloud, wait_for

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(sys.platform != "linux", reason="the hosts are Linux machines"),
]
STEPS, SAVE_EVERY = 40, 8
NUM_HOSTS = 2
# llmjax, of which one process is killed at a step of the first start, and gets SIGTERM at one of the second. At step 18
# the checkpoint of step 8 is complete: the save of step 16 waited for it.
INTERRUPTED = """
import os, pathlib, signal, sys
from llmjax.train.logger import MetricsLogger

starts, victim = pathlib.Path(sys.argv.pop()), sys.argv.pop()
log, signals = MetricsLogger.record, {}
if os.environ["LLMJAX_PROCESS_ID"] == victim:
    with starts.open("a") as file:
        file.write("x")
    signals = {1: {18: signal.SIGKILL}, 2: {26: signal.SIGTERM}}.get(len(starts.read_text()), {})

def record_and_stop(logger, step, *arguments):
    log(logger, step, *arguments)
    if signals and step >= min(signals):
        os.environ["SLOW_AFTER"] = "0"  # from now on
        os.kill(os.getpid(), signals.pop(min(signals)))

MetricsLogger.record = record_and_stop
"""


def write_config(path: pathlib.Path, settings: dict) -> None:
    """A config file with these fields, whose names have dots."""
    sections: dict = {}
    for name, value in settings.items():
        *parents, field = name.split(".")
        section = sections
        for parent in parents:
            section = section.setdefault(parent, {})
        section[field] = ast.literal_eval(value) if value in ("()", "False") else value
    function = f"def get_config() -> ConfigDict:\n    return ConfigDict({sections})"
    path.write_text(f"from ml_collections import ConfigDict\n\n\n{function}\n")


class TinyJob:
    """A job that trains in seconds, and what an unbroken run of it on two hosts gives."""

    def __init__(self, folder: pathlib.Path):
        self.config, self.store = folder / "tiny.py", folder / "store"
        corpus = jobs.write_corpus(folder / "corpus")
        self.texts = f"{corpus}/*.txt"
        compiled = folder / "compiled"  # shared, as the workdir of a run shares it with its restarts
        self.venv = folder / "venv"  # has an llmjax that SLOW_AFTER slows down
        program = self.venv / "bin" / "llmjax"
        program.parent.mkdir(parents=True)
        program.write_text(f"#!{sys.executable}\n{jobs.SLOW_TRAINING}")
        program.chmod(0o755)
        changes = {
            "data.sources.main.path": self.texts,
            "data.store": str(self.store),
            "model.num_layers": 1,
            "train.steps": STEPS,
            "checkpoint.every": SAVE_EVERY,
            "train.compilation_cache": str(compiled),
        }
        write_config(self.config, {**jobs.TINY, **changes})
        # Of the launched processes, which do not all start with this environment.
        flags = {"LLMJAX_CPU_DEVICES": "2", "XLA_FLAGS": os.environ["XLA_FLAGS"]}
        self.environment = {**flags, **jobs.CACHE_ALL_PROGRAMS}
        workdir = folder / "unbroken"
        jobs.run(jobs.launch(self.command(workdir), NUM_HOSTS, 2), **self.environment)
        self._unbroken = self._result(workdir)

    def command(self, workdir: pathlib.Path, program: str = str(jobs.LLMJAX)) -> list[str]:
        return [program, "train", f"--config={self.config}", f"--workdir={workdir}"]

    def interrupted(self, workdir: pathlib.Path, victim: int) -> list[str]:
        """The command, of which process `victim` is killed, and then preempted."""
        _, *arguments = self.command(workdir)
        code, starts = INTERRUPTED + jobs.SLOW_TRAINING, workdir.with_name("starts")
        return [sys.executable, "-c", code, *arguments, str(victim), str(starts)]

    def _result(self, workdir: pathlib.Path) -> tuple:
        return jobs.trace(workdir), jobs.final_fingerprint(workdir, STEPS)

    def assert_equals_unbroken(self, workdir: pathlib.Path) -> None:
        assert self._result(workdir) == self._unbroken


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinyJob:
    return TinyJob(tmp_path_factory.mktemp("tiny"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


Start = tuple[list[str], dict]  # arguments and environment of a process


def run_hosts(
    starts: list[Start], cwd: pathlib.Path, send: tuple[signal.Signals, pathlib.Path] | None = None
) -> list[int]:
    """The exit statuses of processes. `send`: the last one gets a signal when a path exists."""
    processes = [
        subprocess.Popen(arguments, env=environment, cwd=cwd, stdin=subprocess.DEVNULL)
        for arguments, environment in starts
    ]
    try:
        if send is not None:
            number, path = send
            wait_for(path.exists, processes[-1])
            processes[-1].send_signal(number)
        deadline = time.monotonic() + DEADLINE_SECONDS
        return [process.wait(timeout=max(0.0, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_local_processes_are_killed_and_preempted_and_end_with_the_same_bits(tiny, tmp_path):
    """kill -9 of process 0: the other ends by itself, and the launcher starts both again. SIGTERM: at once."""
    workdir = tmp_path / "run"
    out = jobs.run(jobs.launch(tiny.interrupted(workdir, 0), NUM_HOSTS, 2, "--restarts=5"), **tiny.environment)
    assert re.search(r"\[local\] exit status (137|75|1): starting again in 1 s \(restart 1 of 5\)", out), out
    assert "[local] exit status 85: starting again at once (restart 2 of 5)" in out, out
    assert out.count("[p0]   resuming at step") == 2
    tiny.assert_equals_unbroken(workdir)


def test_tpu_vms_are_killed_and_preempted_and_end_with_the_same_bits(tiny, tmp_path):
    """kill -9 of one host's process: the other ends by itself, and babysit starts the command again on both."""
    cloud, workdir = FakeCloud(tmp_path / "cloud"), tmp_path / "run"
    flags = ["--name=a", "--zone=z", "--type=v6e-8", "--spot"]
    try:
        status, out = cloud.run("babysit", *flags, "--", *tiny.interrupted(workdir, 1), **tiny.environment)
    finally:
        cloud.end_jobs()
    assert status == 0, out
    assert "] exit status 137\n" in out
    assert len(re.findall(r"(?m)^\[(?!gcloud).*\] exit status 85$", out)) == NUM_HOSTS, out
    assert re.search(r"\[tpu\] exit status (137|75|1): starting again in 1 s", out), out
    assert "[tpu] exit status 85: starting again at once (restart 2 of 20)" in out
    assert cloud.verbs() == ["create", "ssh", "ssh", "ssh"]
    tiny.assert_equals_unbroken(workdir)


def next_checkpoint(workdir: pathlib.Path) -> pathlib.Path:
    """The folder of the next checkpoint of a run."""
    newest = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
    return workdir / "checkpoints" / str((newest // SAVE_EVERY + 1) * SAVE_EVERY)


def pods(manifest: dict, tpu: bool, venv: pathlib.Path) -> list[Start]:
    """What each pod of a JobSet runs, with the variables that its manifest, the Job controller and GKE set."""
    [replicated] = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    first, port = f"{manifest['metadata']['name']}-{replicated['name']}-0-0.{manifest['metadata']['name']}", free_port()
    starts = []
    for job_index in range(replicated["replicas"]):
        for index in range(job["completions"]):
            annotations = {"batch.kubernetes.io/job-completion-index": str(index)}
            environment = jobs.environment(JOB_COMPLETION_INDEX=str(index))
            if tpu:
                environment |= {
                    "TPU_WORKER_ID": str(index),
                    "TPU_WORKER_HOSTNAMES": ",".join(["127.0.0.1"] * job["completions"]),
                    "MEGASCALE_NUM_SLICES": str(replicated["replicas"]),
                    "MEGASCALE_SLICE_ID": str(job_index),
                    "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1",
                    "JAX_COORDINATOR_PORT": str(port),
                }
            for variable in container["env"]:
                if "value" in variable:
                    # There is no DNS of a cluster here.
                    text = variable["value"].replace(f"{first}:8482", f"127.0.0.1:{port}")
                else:
                    text = annotations[variable["valueFrom"]["fieldRef"]["fieldPath"].split("'")[1]]
                environment[variable["name"]] = text
            environment["PATH"] = f"{venv}/bin:{environment['PATH']}"
            starts.append((container["command"], environment))
    return starts


def render(tiny: TinyJob, workdir: pathlib.Path, *flags: str) -> dict:
    render = [sys.executable, str(jobs.ROOT / "launch" / "gke" / "render.py"), "--name=a", "--image=i", *flags, "--"]
    return yaml.safe_load(jobs.run([*render, *tiny.command(workdir, program="llmjax")]))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_jobset_is_preempted_on_slices_and_killed_on_hosts_and_ends_with_the_same_bits(tiny, tmp_path):
    workdir = tmp_path / "run"

    def starts(tpu: bool, *flags: str, **variables: str) -> list[Start]:
        manifest = render(tiny, workdir, *flags)
        more = tiny.environment | variables
        return [(arguments, environment | more) for arguments, environment in pods(manifest, tpu, tiny.venv)]

    slices = starts(True, "--topology=v6e:2x2", "--slices=2", SLOW_AFTER=str(SAVE_EVERY))
    assert len(slices) == NUM_HOSTS
    assert run_hosts(slices, tmp_path, (signal.SIGTERM, workdir / "checkpoints" / str(SAVE_EVERY))) == [85, 85]
    checkpoint = next_checkpoint(workdir)
    hosts = starts(False, "--hosts=2", SLOW_AFTER=checkpoint.name)
    survivor, killed = run_hosts(hosts, tmp_path, (signal.SIGKILL, checkpoint))
    assert (survivor, killed) == (75, -signal.SIGKILL)
    assert run_hosts(starts(False, "--hosts=2"), tmp_path) == [0, 0]
    tiny.assert_equals_unbroken(workdir)


@pytest.mark.slow
def test_nodes_of_skypilot_are_preempted_and_resume_to_the_same_bits(tiny, tmp_path):
    task = yaml.safe_load((jobs.ROOT / "launch" / "sky" / "train.yaml").read_text())
    workdir, home = tmp_path / "bucket" / "runs" / "a", tmp_path / "sky_workdir"
    home.mkdir()
    (home / ".venv").symlink_to(tiny.venv)
    assert task["num_nodes"] == NUM_HOSTS

    def starts(**variables: str) -> list[Start]:
        shared = {
            **{name: str(value) for name, value in task["envs"].items()},
            "CONFIG": str(tiny.config),
            "WORKDIR": str(workdir),
            "STORE": str(tiny.store),
            "TEXTS": tiny.texts,
            "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
            "SKYPILOT_NUM_NODES": str(NUM_HOSTS),
            "LLMJAX_LOCAL_PROCESSES": str(NUM_HOSTS),  # all nodes are this machine, so that loopback will do
            **tiny.environment,
        }
        script = task["run"].replace(":8482", f":{free_port()}")
        return [
            (["bash", "-c", script], jobs.environment(**shared, **variables, SKYPILOT_NODE_RANK=str(rank)))
            for rank in range(NUM_HOSTS)
        ]

    slow = starts(SLOW_AFTER=str(SAVE_EVERY))
    assert run_hosts(slow, home, (signal.SIGTERM, workdir / "checkpoints" / str(SAVE_EVERY))) == [85, 85]
    assert run_hosts(starts(), home) == [0, 0]
    tiny.assert_equals_unbroken(workdir)


def test_skypilot_retries_what_a_restart_can_help():
    task = yaml.safe_load((jobs.ROOT / "launch" / "sky" / "train.yaml").read_text())
    recovery = task["resources"]["job_recovery"]
    assert recovery == {"recover_on_exit_codes": [75, 85], "max_restarts_on_errors": 3}
    assert subprocess.run(["bash", "-n"], input=task["setup"] + task["run"], text=True).returncode == 0
