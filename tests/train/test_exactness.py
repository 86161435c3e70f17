"""Bitwise resume, also on other meshes and process counts, with real processes that are killed."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from llmjax.run import inspection
from tests import jobs
from tests.train.layouts_worker import LAYOUTS

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    return jobs.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def common(tmp_path_factory, corpus) -> dict:
    """Settings of all jobs: one prepared store, and one compilation cache, as a workdir has for its restarts."""
    workdir = tmp_path_factory.mktemp("prepared")
    jobs.run(jobs.command("prepare", workdir, corpus))
    return {"data__store": workdir / "store", "train__compilation_cache": workdir / "compiled"}


@pytest.fixture(scope="module")
def train(corpus, common, tmp_path_factory):
    """Run a job to its last step (memoised by its settings) and return its workdir."""
    workdirs: dict = {}

    def run(*, processes: int = 1, devices: int = 8, **changes) -> pathlib.Path:
        key = (processes, devices, *sorted(changes.items()))
        if key not in workdirs:
            workdir = tmp_path_factory.mktemp("run")
            arguments = jobs.command("train", workdir, corpus, **common, **changes)
            if processes == 1:
                jobs.run(arguments, LLMJAX_CPU_DEVICES=str(devices))
            else:
                jobs.run(jobs.launch(arguments, processes, devices))
            workdirs[key] = workdir
        return workdirs[key]

    return run


def fingerprints(workdir: pathlib.Path) -> dict[int, tuple]:
    return {step: (entry["fingerprint"], str(entry["data_state"])) for step, entry in jobs.checkpoints(workdir).items()}


@pytest.mark.usefixtures("users_compiler")  # the tests below compare bits with runs of their own alone
def test_a_killed_and_resumed_run_equals_an_uninterrupted_run(train, corpus, common, tmp_path):
    """SIGKILL in the middle of a run, then the same command: losses, digests, parameters and optimizer state agree."""
    uninterrupted = train(mesh__data=1, mesh__fsdp=8)
    resumed = tmp_path / "resumed"
    arguments = jobs.command("train", resumed, corpus, mesh__data=1, mesh__fsdp=8, **common)
    # The kill is after the checkpoint of step 4 and before the last step.
    jobs.kill_after_checkpoint(arguments, resumed / "checkpoints" / "4", LLMJAX_CPU_DEVICES="8")
    assert jobs.metrics(resumed)[-1]["step"] < 12
    printed = jobs.run(arguments, LLMJAX_CPU_DEVICES="8")
    assert "resuming at step" in printed
    assert jobs.trace(resumed) == jobs.trace(uninterrupted)
    assert fingerprints(resumed) == fingerprints(uninterrupted)
    assert "nothing left to train" in jobs.run(arguments, LLMJAX_CPU_DEVICES="8")
    run = json.loads((resumed / "run.json").read_text())
    assert len(run["restarts"]) == 1, "a start with no steps left is no restart"
    starts = run["starts"]
    assert [start["num_devices"] for start in starts] == [8, 8] and starts[1]["step"] == run["restarts"][0]["step"]
    assert all(0 < start["seconds"] < 600 for start in starts), "the killed start has the time of its last line"
    assert run["attention"].startswith("dot (cpu") and f"attention: {run['attention']}" in printed


# The second group is for the exhaustive tests.
GROUPS = (("data8", "pmap"), tuple(name for name in LAYOUTS if name not in ("data8", "pmap")))


@pytest.fixture(scope="module")
def layouts(corpus, tmp_path_factory):
    """Train on every mesh of a group of LAYOUTS in one job of a process layout (memoised); returns a mesh's workdir."""
    folders: dict[tuple, pathlib.Path] = {}
    store = tmp_path_factory.mktemp("layouts") / "store"

    def run(processes: int, name: str) -> pathlib.Path:
        (group,) = (group for group in GROUPS if name in group)
        if (processes, group) not in folders:
            out = tmp_path_factory.mktemp("layout")
            command = [sys.executable, "-m", "tests.train.layouts_worker", str(out), str(corpus), str(store), *group]
            jobs.run(jobs.launch(command, processes, 8 // processes), timeout=600, PYTHONPATH=str(jobs.ROOT))
            folders[processes, group] = out
        return folders[processes, group] / name

    return run


@pytest.mark.timeout(1800)  # the first one starts three jobs
@pytest.mark.parametrize(
    "name", [*GROUPS[0], *(pytest.param(name, marks=pytest.mark.exhaustive) for name in GROUPS[1])]
)
def test_two_and_four_processes_agree_bitwise_on_every_mesh(layouts, name):
    """2 processes x 4 devices and 4 x 2: the same bits on every mesh. One process x 8: the same batches, losses within
    1e-6.

    XLA's collectives inside one process add in another order than gloo's between processes, so there bits may differ.
    """
    one, two, four = (layouts(processes, name) for processes in (1, 2, 4))
    assert jobs.trace(two) == jobs.trace(four)
    assert read_checkpoints(two) == read_checkpoints(four)
    for (_, loss, digest, _), (_, expected, expected_digest, _) in zip(jobs.trace(one), jobs.trace(two), strict=True):
        assert digest == expected_digest
        assert loss == pytest.approx(expected, rel=1e-6)


def read_checkpoints(workdir: pathlib.Path) -> list[tuple]:
    """(step, fingerprint, data state) of every checkpoint."""
    checkpoints = inspection.inspect(workdir)["checkpoints"]
    assert checkpoints
    return [(entry["step"], entry["fingerprint"], entry["data_state"]) for entry in checkpoints]


def test_a_run_of_two_processes_is_resumed_by_one_on_another_mesh(train, corpus, common, tmp_path):
    """Half on 2 processes x 4 devices (2 x 4), half on one (fsdp 8): same batches, the same state at restore."""
    shape = {"mesh__data": 2, "mesh__fsdp": 4}
    uninterrupted = train(processes=2, devices=4, **shape)
    moved = tmp_path / "moved"
    settings = {**common, "checkpoint__every": 6}
    first = jobs.command("train", moved, corpus, train__stop_at=6, **shape, **settings)
    jobs.run(jobs.launch(first, 2, 4))
    saved = jobs.checkpoints(moved)[6]["fingerprint"]
    second = jobs.command("train", moved, corpus, mesh__data=1, mesh__fsdp=8, **settings)
    printed = jobs.run(second, LLMJAX_CPU_DEVICES="8")
    # The fingerprint printed at resume was computed from the arrays after the restore.
    assert f"resuming at step 6, fingerprint {saved}" in printed
    assert [line[2] for line in jobs.trace(moved)] == [line[2] for line in jobs.trace(uninterrupted)]
    for line, expected in zip(jobs.trace(moved), jobs.trace(uninterrupted), strict=True):
        # The second half adds in another order, and the differences grow with every step.
        assert line[1] == pytest.approx(expected[1], rel=1e-4)


def test_pmap_over_two_processes_agrees_with_jit(layouts):
    """pmap's host-local state is saved as global arrays, which jit restores on any layout."""
    mapped, plain = layouts(2, "pmap"), layouts(2, "data8")
    for (_, loss, digest, _), (_, expected, expected_digest, _) in zip(
        jobs.trace(mapped), jobs.trace(plain), strict=True
    ):
        assert digest == expected_digest
        assert loss == pytest.approx(expected, rel=1e-6)
    assert [entry[0] for entry in read_checkpoints(mapped)] == [entry[0] for entry in read_checkpoints(plain)]
    printed = jobs.run([*jobs.command("eval", mapped), "--split=train"], LLMJAX_CPU_DEVICES="8")
    assert "bits per byte" in printed


def test_prefetch_and_microbatches_change_no_batch(train):
    plain = train(mesh__data=1, mesh__fsdp=8)
    other = train(mesh__data=1, mesh__fsdp=8, data__prefetch=1, train__accumulation=2)
    assert [line[2] for line in jobs.trace(plain)] == [line[2] for line in jobs.trace(other)]


def test_data_skip_leaves_out_exactly_its_samples(train, corpus, common, tmp_path):
    """Set at a resume, it leaves out these samples: the batches after them are those of the uninterrupted run."""
    uninterrupted = train(mesh__data=1, mesh__fsdp=8)
    workdir = tmp_path / "skipping"
    settings = {**common, "mesh__data": 1, "mesh__fsdp": 8}
    jobs.run(jobs.command("train", workdir, corpus, train__stop_at=4, **settings), LLMJAX_CPU_DEVICES="8")
    skipping = jobs.command("train", workdir, corpus, train__stop_at=6, data__skip=((64, 96),), **settings)
    jobs.run(skipping, LLMJAX_CPU_DEVICES="8")
    digests = {line[0]: line[2] for line in jobs.trace(workdir)}
    expected = {line[0]: line[2] for line in jobs.trace(uninterrupted)}
    assert digests[5] == expected[7] and digests[6] == expected[8]


def read_batches(workdir: pathlib.Path) -> dict[int, tuple[int, int]]:
    """(samples used, size of the last batch) at each checkpoint."""
    states = {step: entry["data_state"] for step, entry in jobs.checkpoints(workdir).items()}
    return {step: (state["next_sample"], state["global_batch"]) for step, state in states.items()}


def test_a_batch_schedule_is_exact_across_a_resume(train, corpus, common, tmp_path):
    """16 rows, 32 from sample 48, 8 from sample 150: steps 1 to 3, 4 to 7, and 8 to 12. Stopped in the middle."""
    ramp = {"train__batch_schedule": "((48,32),(150,8))", "checkpoint__every": 2}
    unbroken, resumed = train(**ramp), tmp_path / "resumed"
    for stop in (6, 12):
        jobs.run(jobs.command("train", resumed, corpus, **common, **ramp, train__stop_at=stop), LLMJAX_CPU_DEVICES="8")
    assert jobs.trace(resumed) == jobs.trace(unbroken) and fingerprints(resumed) == fingerprints(unbroken)
    sizes = {2: (32, 16), 4: (80, 32), 6: (144, 32), 8: (184, 8), 10: (200, 8), 12: (216, 8)}
    assert read_batches(unbroken) == sizes
    pmap = jobs.metrics(train(**ramp, parallel__backend="pmap"))
    assert [line["batch_digest"] for line in pmap] == [line["batch_digest"] for line in jobs.metrics(unbroken)]


# Steps 1 to 3, 4 to 7 and 8 to 12: more rows of another mixture, then longer rows at a learning rate of their own.
PHASES = {
    "phases__mix__after_step": 3,
    "phases__mix__global_batch": 24,
    "phases__mix__weights__other": 1,
    "phases__long__after_step": 7,
    "phases__long__seq_len": 128,
    "phases__long__global_batch": 8,
    "phases__long__learning_rate": 5e-4,
    "phases__long__skip": "((3, 9),)",
    "data__skip": "((50, 57),)",
    "data__sources__main__weight": 3,
    "data__sources__other__weight": 1,
    "checkpoint__every": 1,
    "checkpoint__keep": 20,
    "model__num_layers": 1,
}


@pytest.fixture(scope="module")
def train_in_phases(corpus, common, tmp_path_factory):
    """Train runs, each up to some steps in turn, by one job; the folder that has their workdirs."""
    folder = tmp_path_factory.mktemp("phases")
    other = f"{jobs.write_corpus(folder / 'other', 20)}/*.txt"
    paths = {"data__sources__main__path": f"{corpus}/*.txt", "data__sources__other__path": other}
    settings = {**common, **PHASES, **paths, "data__store": folder / "store"}
    worker = [sys.executable, "-m", "tests.train.phases_worker", str(folder)]

    def run(*runs: str, processes: int = 1, devices: int = 2, status: int = 0, **changes) -> tuple[pathlib.Path, str]:
        fields = {**jobs.TINY, **{k.replace("__", "."): str(v) for k, v in {**settings, **changes}.items()}}
        arguments = [*worker, json.dumps(fields), *runs]
        launched = jobs.launch(arguments, processes, devices) if processes > 1 else arguments
        env = {"LLMJAX_CPU_DEVICES": str(devices)} if processes == 1 else {}
        return folder, jobs.run(launched, status=status, **env, **jobs.CACHE_ALL_PROGRAMS)

    return run


def test_phases_are_exact_across_resumes_at_and_beside_their_boundaries(train_in_phases):
    folder, printed = train_in_phases("unbroken:12", "stopped:2,3,4,6,7,8,12")
    unbroken, stopped = folder / "unbroken", folder / "stopped"
    assert "phase long, steps 8 to 12: 8 rows of 128 tokens a step" in printed
    assert jobs.trace(stopped) == jobs.trace(unbroken) and fingerprints(stopped) == fingerprints(unbroken)
    assert json.loads((stopped / "data.json").read_text()) == json.loads((unbroken / "data.json").read_text())
    # Samples 50 to 56 and 3 to 8 are left out; sample indices of longer rows start at 0.
    assert read_batches(unbroken) == {
        1: (16, 16), 2: (32, 16), 3: (48, 16), 4: (79, 24), 5: (103, 24), 6: (127, 24), 7: (151, 24),
        8: (14, 8), 9: (22, 8), 10: (30, 8), 11: (38, 8), 12: (46, 8),
    }  # fmt: skip
    rates = [line["learning_rate"] for line in jobs.metrics(unbroken)]
    assert rates[7] == pytest.approx(5e-4) and max(rates[7:]) == rates[7] < min(rates[1:4])
    # A run is evaluated on rows of its last phase, in training and by the command.
    scores = json.loads((unbroken / "eval" / "12" / "validation.json").read_text())
    (unbroken / "eval" / "12" / "validation.json").unlink()
    jobs.run([str(jobs.LLMJAX), "eval", f"--workdir={unbroken}"], LLMJAX_CPU_DEVICES="8")
    again = json.loads((unbroken / "eval" / "12" / "validation.json").read_text())
    assert again["total"]["loss"] == pytest.approx(scores["total"]["loss"], rel=1e-6)


def test_a_phase_that_has_begun_cannot_be_changed(train_in_phases):
    folder, _ = train_in_phases("changed:5")
    changes = [
        ({"phases__mix__after_step": 4}, "phases.mix.after_step: 3 -> 4"),
        ({"phases__mix__weights__other": 2}, "phases.mix.weights.other: 1.0 -> 2.0"),
        ({"train__global_batch": 8}, "samples then"),
    ]
    for change, message in changes:
        assert message in train_in_phases("changed:6", status=1, **change)[1]
    # A later one can, and the rate of any.
    later = {"phases__long__after_step": 8, "phases__mix__learning_rate": 1e-3, "train__steps": 13}
    _, printed = train_in_phases("changed:6", **later)
    assert "changed since the checkpoint: train.steps: 12 -> 13" in printed
    assert re.search(r"the learning rate of step 6 goes from 0.00\d+ to 0.001\n", printed)
    # An accepted change goes on where its config would be, so that the next start needs no acceptance.
    earlier = {**later, "phases__mix__after_step": 2}
    train_in_phases("changed:7", checkpoint__accept_changes=True, **earlier)
    train_in_phases("changed:8", **earlier)
    assert [line["step"] for line in jobs.metrics(folder / "changed")] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_job_of_two_processes_goes_on_with_the_next_phase(train_in_phases):
    layout = {"mesh__data": 2, "mesh__fsdp": 2}
    folder, _ = train_in_phases("unbroken2:12", "stopped2:7,12", processes=2, devices=2, **layout)
    unbroken, stopped = folder / "unbroken2", folder / "stopped2"
    assert jobs.trace(stopped) == jobs.trace(unbroken) and fingerprints(stopped) == fingerprints(unbroken)
    train_in_phases("pmap:9", parallel__backend="pmap")
    digests = [[line["batch_digest"] for line in jobs.metrics(workdir)[:9]] for workdir in (folder / "pmap", unbroken)]
    assert digests[0] == digests[1]


def test_a_global_batch_that_changes_on_purpose_continues_at_the_next_sample(train, corpus, common, tmp_path):
    """4 steps of 16 rows, then steps of 32: as the schedule that says so, except for the size of evaluations."""
    workdir = tmp_path / "run"
    for stop, changes in ((4, {}), (12, {"train__global_batch": 32})):
        arguments = jobs.command("train", workdir, corpus, **common, **changes, train__stop_at=stop)
        printed = jobs.run(arguments, LLMJAX_CPU_DEVICES="8")
    assert "changed since the checkpoint: train.global_batch: 16 -> 32" in printed
    expected = train(train__batch_schedule="((64,32),)")
    assert jobs.trace(workdir) == jobs.trace(expected) and read_batches(workdir) == read_batches(expected)


def test_a_terminated_job_saves_and_is_resumed(train, corpus, common, tmp_path):
    """After SIGTERM both processes save one step and exit with 85; the resumed run equals an uninterrupted one.

    Processes and launcher get many signals, of which the first one counts.
    """
    layout = {"mesh__data": 2, "mesh__fsdp": 4}
    uninterrupted = train(processes=2, devices=4, **layout)
    stopped = tmp_path / "stopped"
    arguments = jobs.command("train", stopped, corpus, **common, **layout)
    job = subprocess.Popen(
        jobs.launch([sys.executable, "-c", jobs.SLOW_TRAINING, *arguments[1:]], 2, 4, "--grace=200"),
        env=jobs.environment(SLOW_AFTER="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline, metrics = time.monotonic() + 200, stopped / "metrics.jsonl"
    while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):  # until a step is logged
        time.sleep(0.05)
    children = pathlib.Path(f"/proc/{job.pid}/task/{job.pid}/children")
    targets = [*map(int, children.read_text().split() if children.exists() else ()), job.pid]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        for target in reversed(targets):
            os.kill(target, number)
    printed = job.communicate(timeout=240)[0]
    assert job.returncode == 85, printed
    assert jobs.checkpoints(stopped), printed
    jobs.run(jobs.launch(arguments, 2, 4))
    assert jobs.trace(stopped) == jobs.trace(uninterrupted)
