"""A checkpoint is restored bit for bit on any mesh; a damaged one is detected, reported and set aside."""

import gc
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
from jax.experimental import multihost_utils
import numpy as np
import pytest

from llmjax.checkpoint.fingerprint import fingerprint
from llmjax.checkpoint.manager import CheckpointConfig, Checkpoints
from llmjax.errors import UserError
from tests.checkpoint.state import abstract, make_mesh, state, tree
from tests.parallel.test_hosts import launch

ROOT = pathlib.Path(__file__).resolve().parents[2]
MESH = make_mesh(2, 2, 2)


@pytest.fixture(autouse=True)
def _log_level(caplog):
    caplog.set_level(logging.INFO, logger="llmjax")


@pytest.fixture(scope="module", autouse=True)
def keep_garbage_collection_short():
    """A damaged restore collects garbage; objects that exist before these tests need not be visited each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> pathlib.Path:
    """A folder with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("template") / "checkpoints"
    save(folder, 1, 2)
    return folder


@pytest.fixture
def folder(template, tmp_path) -> pathlib.Path:
    """A copy of that folder, free to be damaged."""
    return pathlib.Path(shutil.copytree(template, tmp_path / "checkpoints"))


def save(folder, *steps: int, **config) -> None:
    checkpoints = Checkpoints(folder, CheckpointConfig(**config))
    for step in steps:
        checkpoints.save(step, state(MESH, step), {"data_state": {"next_sample": 8 * step}, "sizes": (1, 2)})
    checkpoints.close()


def assert_same(parts, step: int) -> None:
    """Bitwise equality with `tree(step)`, types of containers included."""
    expected = tree(step)
    assert jax.tree.structure(parts) == jax.tree.structure(expected)
    for leaf, value in zip(jax.tree.leaves(parts), jax.tree.leaves(expected), strict=True):
        assert np.asarray(leaf).dtype == value.dtype
        assert np.asarray(leaf).tobytes() == np.asarray(value).tobytes()


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def restore(folder, **options):
    return Checkpoints(folder).restore_latest_good(abstract(MESH), **options)


def test_meta_with_integer_keys_is_not_taken_for_damaged(tmp_path):
    """JSON makes texts of them, in whose order 10 comes before 2."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state(MESH, 3), {"evaluations": {2: 0.5, 10: 0.25}})
    checkpoints.close()
    assert Checkpoints(tmp_path).read_meta(3)["evaluations"] == {"2": 0.5, "10": 0.25}


def test_restore_returns_the_saved_parts_and_meta(folder):
    restored = restore(folder)
    assert restored.step == 2
    assert_same(restored.parts, 2)
    assert restored.meta == {
        "data_state": {"next_sample": 16},
        "sizes": [1, 2],
        "fingerprint": fingerprint(**tree(2)),
    }
    assert Checkpoints(folder).read_meta(1)["fingerprint"] == fingerprint(**tree(1))
    assert_same(Checkpoints(folder).restore(1, abstract(MESH)).parts, 1)


def test_one_part_is_restored_without_the_others(folder):
    restored = Checkpoints(folder).restore(2, {"params": abstract(MESH)["params"]})
    assert_same({**tree(2), "params": restored.parts["params"]}, 2)
    assert list(restored.parts) == ["params"]


def test_a_restore_onto_another_mesh_is_bitwise(tmp_path):
    parts, shapes = state(make_mesh(8, 1, 1), 1), [(1, 8, 1), (2, 2, 2), (1, 1, 1), (4, 1, 2)]
    for step, shape in enumerate(shapes, 1):
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        checkpoints.save(step, parts, {})
        checkpoints.close()
        target = abstract(make_mesh(*shape))
        parts = Checkpoints(tmp_path / "checkpoints").restore(step, target).parts
        assert jax.tree.map(lambda x: x.sharding, parts) == jax.tree.map(lambda x: x.sharding, target)
        assert_same(parts, 1)


def test_arrays_may_be_donated_once_save_returns(tmp_path):
    checkpoints, parts = Checkpoints(tmp_path), state(MESH, 1)
    checkpoints.save(1, parts, {})
    jax.jit(lambda parts: jax.tree.map(lambda x: x + x, parts), donate_argnums=0)(parts)
    checkpoints.close()
    assert_same(Checkpoints(tmp_path).restore(1, abstract(MESH)).parts, 1)


def test_keep_and_keep_every_decide_which_checkpoints_remain(tmp_path):
    save(tmp_path, *range(1, 8), keep=2, keep_every=3)
    assert Checkpoints(tmp_path).steps() == [3, 6, 7]
    assert Checkpoints(tmp_path).latest() == 7


def test_a_save_does_not_take_part_in_the_choice_of_the_step_to_stop_at_after_a_signal(tmp_path, monkeypatch):
    """A job of several processes would miss that step: JAX remembers one count, and Orbax's is that of the step."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: asked.append(step) or False)
    save(tmp_path, 1, 2)
    assert Checkpoints(tmp_path).steps() == [1, 2]
    assert asked == []


def test_reading_a_missing_folder_finds_no_checkpoint_and_creates_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none")
    assert (checkpoints.steps(), checkpoints.latest()) == ([], None)
    assert checkpoints.restore_latest_good(abstract(MESH)) is None
    checkpoints.close()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_step_is_refused_and_the_steps_are_listed(folder):
    with pytest.raises(UserError, match=r"no checkpoint of step 7 in .*; the steps there are \[1, 2\]"):
        Checkpoints(folder).restore(7, abstract(MESH))


def test_a_checkpoint_of_other_shapes_is_refused_and_not_set_aside(folder):
    target = abstract(MESH)
    target["params"]["embed"] = jax.ShapeDtypeStruct((64, 4), np.float32, sharding=target["params"]["embed"].sharding)
    message = (
        r"checkpoint 2 does not fit this config: params.embed is float32\[64, 64\] in the checkpoint, "
        r"but float32\[64, 4\] in the config"
    )
    with pytest.raises(UserError, match=message):
        Checkpoints(folder).restore_latest_good(target)
    with pytest.raises(UserError, match="checkpoint 2 has no 'ema'"):
        Checkpoints(folder).restore(2, {"ema": {}})
    assert Checkpoints(folder).steps() == [1, 2]


def test_a_checkpoint_that_check_refuses_is_not_set_aside(folder):
    def check(meta):
        raise UserError(f"vocabulary changed since sample {meta['data_state']['next_sample']}")

    with pytest.raises(UserError, match="since sample 16"):
        restore(folder, check=check)
    assert Checkpoints(folder).steps() == [1, 2]


def test_a_checkpoint_that_does_not_fit_in_memory_is_not_set_aside(folder, monkeypatch):
    def run_out_of_memory(*_):
        raise MemoryError("Out of memory allocating 12 bytes")

    monkeypatch.setattr(Checkpoints, "_read_part", run_out_of_memory)
    with pytest.raises(MemoryError, match="checkpoint 2"):
        restore(folder)
    assert Checkpoints(folder).steps() == [1, 2]


def test_a_damaged_checkpoint_is_set_aside_and_the_previous_one_restored(folder, caplog):
    (folder / "2" / "params" / "manifest.ocdbt").unlink()
    restored = restore(folder)
    assert restored.step == 1
    assert_same(restored.parts, 1)
    (line,) = caplog.messages
    assert line.startswith(f"checkpoint 2 is damaged and was moved to {folder}/damaged/2-1: ")
    assert "\n" not in line
    assert (folder / "damaged" / "2-1" / "meta").exists()
    save(folder, 2)  # the step is free again
    assert restore(folder).step == 2


@pytest.mark.parametrize("change", ["copied", "linked", "renamed"])
def test_a_checkpoint_under_the_name_of_another_step_counts_as_damaged(folder, change, caplog):
    """Its fingerprint fits, but the run would resume with the data of another step and end with too few updates."""
    if change == "copied":
        shutil.copytree(folder / "2", folder / "7")
    elif change == "linked":
        (folder / "7").symlink_to("2")
    else:
        (folder / "2").rename(folder / "7")
    with pytest.raises(UserError, match=r"7 is damaged: it was saved as step 2, and copied or renamed since"):
        Checkpoints(folder).read_meta(7)
    assert restore(folder).step == (1 if change == "renamed" else 2)
    (line,) = caplog.messages
    assert "checkpoint 7 is damaged and was moved" in line


def test_a_reader_skips_a_damaged_checkpoint_and_leaves_it_in_place(folder, caplog):
    (folder / "2" / "meta" / "metadata").unlink()
    assert restore(folder, set_aside=False).step == 1
    assert caplog.messages[0].startswith("checkpoint 2 is damaged and was skipped: its meta cannot be read")
    assert Checkpoints(folder).steps() == [1, 2]
    with pytest.raises(UserError, match="2 is damaged: its meta cannot be read"):
        Checkpoints(folder).read_meta(2)


def test_only_damaged_checkpoints_are_an_error_and_not_a_fresh_start(folder):
    for step in ("1", "2"):
        shutil.rmtree(folder / step / "params")
    for _ in range(2):  # the first restore sets them aside, the second one sees the folder `damaged` alone
        with pytest.raises(UserError, match="holds damaged checkpoints and no good one"):
            restore(folder)


def restores(folder: pathlib.Path) -> bool:
    """Whether step 2 restores; where it does, every value must be what was saved."""
    try:
        restored = Checkpoints(folder).restore(2, abstract(MESH))
    except UserError as error:
        assert "checkpoint" in str(error)
        return False
    assert_same(restored.parts, 2)
    assert restored.meta["data_state"] == {"next_sample": 16}
    return True


def files_that_a_restore_reads(folder: pathlib.Path) -> list[pathlib.Path]:
    """Array files of step 2 that a restore needs. It reads no others, as writes are merged depending on timing."""
    needed = []
    for path in files(folder / "2"):
        if path.parent.name == "d":
            path.rename(path.with_suffix(".hidden"))
            if not restores(folder):
                needed.append(path)
            path.with_suffix(".hidden").rename(path)
    return needed


def test_a_flipped_bit_is_detected_or_harmless(folder, template):
    """Flips bits everywhere; where a restore succeeds, every value must be the saved one."""
    rng, detected, step = np.random.default_rng(0), 0, folder / "2"
    large = max(files_that_a_restore_reads(folder), key=lambda path: path.stat().st_size)
    for turn in range(36):
        path = large if turn % 2 else rng.choice(files(step))
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        detected += not restores(folder)
        path.write_bytes(content)
    assert detected >= 12  # most of the largest file is array data
    assert restores(folder)


@pytest.mark.parametrize("damage", ["cut in half", "emptied", "removed"])
def test_a_damaged_file_is_detected_or_harmless(folder, damage):
    """Every file in turn. Damage of arrays, manifests and meta must be detected; Orbax's other files may not matter."""
    step, detected = folder / "2", set()
    for path in files(step):
        content = path.read_bytes()
        if damage == "removed":
            path.unlink()
        else:
            path.write_bytes(content[: len(content) // 2 if damage == "cut in half" else 0])
        if not restores(folder):
            detected.add(path.relative_to(step))
        path.write_bytes(content)
    manifests = {pathlib.Path(part, "manifest.ocdbt") for part in ("params", "opt_state")}
    assert {pathlib.Path("meta/metadata"), *manifests} <= detected
    for part in ("params", "opt_state"):
        assert any(path.parts[0] == part and path.parent.name == "d" for path in detected), f"no array file of {part}"


def test_arrays_of_another_step_are_detected(folder, template):
    """Complete and valid files of step 1 replace those of step 2."""
    shutil.rmtree(folder / "2" / "params")
    shutil.copytree(template / "1" / "params", folder / "2" / "params")
    with pytest.raises(UserError, match=r"2 is damaged: its fingerprint is .* but .* was saved"):
        Checkpoints(folder).restore(2, abstract(MESH))


SAVE_STEP_1 = """
import jax, numpy as np, os, pathlib, resource, signal, sys
from llmjax.checkpoint.manager import CheckpointConfig, Checkpoints
from llmjax.errors import UserError
folder = pathlib.Path(sys.argv[1])
parts = {"params": {"a": jax.numpy.asarray(np.random.default_rng(0).random((SIZE,), np.float32))}}
checkpoints = Checkpoints(folder, CheckpointConfig(timeout_seconds=30))
checkpoints.save(1, parts, {})
checkpoints.wait()
"""


def run_in_process(folder, size: int, code: str) -> subprocess.CompletedProcess:
    """Save `size` numbers as step 1 in a process of its own, then run `code` there."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SAVE_STEP_1.replace("SIZE", str(size)) + code, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.slow
def test_a_killed_save_leaves_the_previous_checkpoint(tmp_path):
    size = 1 << 24  # 64 MB: the save takes long enough to be killed before it ends
    process = run_in_process(
        tmp_path,
        size,
        """
checkpoints.save(2, parts, {})
while not list(folder.glob("2.*tmp*")):
    assert not (folder / "2").exists()
os.kill(os.getpid(), signal.SIGKILL)
""",
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert list(tmp_path.glob("2.*tmp*"))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {"params": {"a": jax.ShapeDtypeStruct((size,), np.float32, sharding=device)}}
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [1]
    restored = checkpoints.restore_latest_good(target)
    assert restored.step == 1
    checkpoints.save(2, restored.parts, {})
    checkpoints.close()
    assert Checkpoints(tmp_path).steps() == [1, 2]
    assert not list(tmp_path.glob("*tmp*"))


@pytest.mark.slow
def test_a_full_disk_is_one_clear_error_and_leaves_the_previous_checkpoint(tmp_path):
    """A limit on file size stands for the full disk: both fail the write itself."""
    process = run_in_process(
        tmp_path,
        1 << 18,
        """
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
try:
    checkpoints.save(2, parts, {})
    checkpoints.wait()
except UserError as error:
    print(error)
print(checkpoints.steps())
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
checkpoints.save(3, parts, {})
checkpoints.close()
print(checkpoints.steps())
""",
    )
    assert process.returncode == 0, process.stderr
    message = f"no space left in {tmp_path} for checkpoint 2; the newest complete one is of step 1: free some space"
    assert process.stdout.splitlines() == [message, "[1]", "[1, 3]"]


def run_job(processes: int, devices: int, command: str, folder: pathlib.Path, *arguments) -> list[dict]:
    """The report of every process of a job of checkpoint/worker.py."""
    job = launch(processes, devices, "checkpoint/worker.py", command, folder, folder.parent, *arguments)
    assert job.returncode == 0, job.stdout
    return [json.loads((folder.parent / f"{command}-{index}.json").read_text()) for index in range(processes)]


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory) -> tuple[pathlib.Path, list[dict]]:
    """A folder with steps 1 to 3, saved by 2 processes x 4 devices, and the reports of both."""
    folder = tmp_path_factory.mktemp("job") / "checkpoints"
    return folder, run_job(2, 4, "save", folder)


@pytest.mark.multiprocess
def test_one_process_restores_a_checkpoint_that_two_saved(saved_by_two):
    folder, reports = saved_by_two
    assert {report["fingerprint"] for report in reports} == {fingerprint(**tree(3))}
    for shape in [(8, 1, 1), (1, 1, 1)]:
        assert_same(Checkpoints(folder).restore(3, abstract(make_mesh(*shape))).parts, 3)


@pytest.mark.multiprocess
def test_four_processes_restore_a_checkpoint_that_two_saved(saved_by_two):
    folder, saved = saved_by_two
    for report in run_job(4, 2, "restore", folder):
        assert (report["step"], report["log"]) == (3, [])
        assert report["meta"]["fingerprint"] == saved[0]["fingerprint"]


@pytest.mark.multiprocess
def test_all_processes_restore_the_previous_step_when_one_reads_damage(saved_by_two, tmp_path):
    folder = pathlib.Path(shutil.copytree(saved_by_two[0], tmp_path / "checkpoints"))
    first, second = run_job(2, 4, "restore", folder, 1)
    assert first["step"] == second["step"] == 2
    assert first["sums"] == second["sums"]
    (line,) = first["log"]
    assert "process 1: OSError: Input/output error" in line
    assert second["log"] == [line]
    assert Checkpoints(folder).steps() == [1, 2]


@pytest.mark.multiprocess
@pytest.mark.parametrize("process", [0, 1])
def test_a_full_disk_of_one_process_ends_the_save_on_all(tmp_path, process):
    """Without waiting for the time limit of a save, which is 60 s in the worker."""
    folder = tmp_path / "checkpoints"
    for report in run_job(2, 2, "fill_disk", folder, process):
        newest = "the newest complete one is of step 1: free some space"
        assert report["error"] == f"no space left in {folder} for checkpoint 2 (process {process}); {newest}"
        assert report["seconds"] < 30


@pytest.mark.multiprocess
def test_all_processes_stop_when_every_checkpoint_is_damaged(saved_by_two, tmp_path):
    folder = pathlib.Path(shutil.copytree(saved_by_two[0], tmp_path / "checkpoints"))
    for step in (folder / name for name in ("1", "2", "3")):
        data = [path for path in files(step / "params") if path.parent.name == "d"]
        for path in data:
            path.write_bytes(path.read_bytes()[:-1])
    for report in run_job(2, 4, "restore", folder):
        assert "holds damaged checkpoints and no good one" in report["error"]
