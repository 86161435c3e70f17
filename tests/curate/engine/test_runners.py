"""Local processes and a Ray cluster give the same results, byte-identical."""

import json
import os
import pathlib
import signal
import subprocess

import numpy as np
import pytest

from llmjax.curate.engine import runners
from llmjax.errors import UserError
from tests import jobs
from tests.curate import corpora

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


def _double(number: int) -> int:
    return 2 * number


def _refuse(number: int) -> int:
    if number == 2:
        raise UserError("field=2: not offered")
    return number


def _wait_for_two_nodes(number: int, folder: pathlib.Path) -> str:
    """Return the node's id after tasks have run on two nodes, so that a fast node cannot run them all."""
    import time

    node = ray.get_runtime_context().get_node_id()
    (folder / node).touch()
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    return node


def _die_once(number: int, marker: pathlib.Path) -> int:
    if number == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 10 * number


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _partition(begin: int) -> dict[int, np.ndarray]:
    numbers = np.arange(begin, begin + 100)
    return {remainder: numbers[numbers % 3 == remainder] for remainder in range(3)}


def _partition_from(minimum: int, begin: int) -> dict[int, np.ndarray]:
    return {} if begin < minimum else _partition(begin)


def _sum(rows: np.ndarray, factor: int) -> tuple[int, int, int]:
    return int(rows[0]) % 3, len(rows), factor * int(rows.sum())


@pytest.fixture(scope="module")
def cluster():
    """Two nodes on this machine, each with its own workers and object store."""
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = os.pathsep.join([str(jobs.ROOT), os.environ.get("PYTHONPATH", "")])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="module")
def ray_runner(cluster):
    with runners.RayRunner(cluster) as runner:
        yield runner


def test_map_returns_every_result(ray_runner):
    assert dict(ray_runner.map(_double, [(n,) for n in range(9)])) == {n: 2 * n for n in range(9)}


def test_tasks_run_on_both_nodes(ray_runner, tmp_path):
    assert len({node for _, node in ray_runner.map(_wait_for_two_nodes, [(n, tmp_path) for n in range(4)])}) == 2


def test_a_task_can_raise_a_user_error(ray_runner):
    with pytest.raises(UserError, match="field=2"):
        list(ray_runner.map(_refuse, [(n,) for n in range(4)]))


def test_the_task_of_a_dead_worker_is_rerun(ray_runner, tmp_path):
    results = dict(ray_runner.map(_die_once, [(n, tmp_path / "died") for n in range(3)]))
    assert (tmp_path / "died").exists() and results == {0: 0, 1: 10, 2: 20}


def test_a_task_that_kills_every_worker_is_reported(ray_runner):
    with pytest.raises(UserError, match="died repeatedly"):
        list(ray_runner.map(_die, [()]))


def test_both_runners_exchange_the_same_rows(ray_runner, tmp_path):
    tasks = [(100 * n,) for n in range(5)]
    with runners.LocalRunner(2) as local:
        expected = sorted(local.exchange(_partition, tasks, _sum, (2,), tmp_path / "exchange"))
    assert sorted(ray_runner.exchange(_partition, tasks, _sum, (2,), tmp_path / "unused")) == expected
    assert [count for _, count, _ in expected] == [167, 167, 166]


@pytest.mark.parametrize(("minimum", "counts"), [(250, [66, 67, 67]), (1000, [])])
def test_tasks_may_have_no_rows(minimum, counts, ray_runner, tmp_path):
    tasks = [(minimum, 100 * n) for n in range(5)]
    with runners.LocalRunner(1) as local:
        expected = sorted(local.exchange(_partition_from, tasks, _sum, (1,), tmp_path / "exchange"))
    assert sorted(count for _, count, _ in expected) == counts
    assert sorted(ray_runner.exchange(_partition_from, tasks, _sum, (1,), tmp_path / "unused")) == expected


def test_both_runners_write_byte_identical_files(cluster, tmp_path):
    """Paths are relative to a folder that is not the current one of the cluster's processes."""
    texts = corpora.documents()
    for part in range(3):
        many = {f"{part}-{n}": corpora.replace_words(text, 2 + n % 5, n + part) for n, text in enumerate(texts[:300])}
        corpora.write_jsonl(tmp_path / f"{part}.jsonl", many)
    inputs = {f"in{part}": f"{part}.jsonl" for part in range(3)}
    corpora.write_jsonl(tmp_path / "quiz.jsonl", {"q": texts[7]})
    settings = {"quality__rules": "('gopher',)", "decontaminate__against": "('quiz.jsonl',)"}
    for name, flags in (("local", []), ("ray", ["--runner=ray", f"--ray_address={cluster}"])):
        command = [str(jobs.LLMJAX), *corpora.curate_arguments(pathlib.Path(name), inputs, **settings), *flags]
        subprocess.run(command, env=jobs.environment(), check=True, stdout=subprocess.DEVNULL, cwd=tmp_path)
    local_files = corpora.read_files(tmp_path / "local")
    assert corpora.read_files(tmp_path / "ray") == local_files and len(local_files) > 6
    reports = [(tmp_path / name / "report.json").read_text() for name in ("local", "ray")]
    assert reports[0] == reports[1] and json.loads(reports[0])["contamination"]["quiz"]["dropped"]


def test_a_missing_cluster_is_one_line(tmp_path):
    command = [
        str(jobs.LLMJAX),
        *corpora.curate_arguments(tmp_path, {"a": "stdlib:"}),
        "--runner=ray",
        "--ray_address=127.0.0.1:1",
    ]
    process = subprocess.run(command, env=jobs.environment(), capture_output=True, text=True)
    assert process.returncode == 78 and "no cluster answers" in process.stderr and "Traceback" not in process.stderr
