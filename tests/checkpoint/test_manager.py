"""Checkpoints: what is saved comes back bit for bit on any mesh, or is noticed, set aside and told."""

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
from jax.sharding import AxisType, Mesh
import numpy as np
import pytest

from llmjax.checkpoint.fingerprint import fingerprint
from llmjax.checkpoint.manager import Checkpoints
from llmjax.errors import UserError
from tests.checkpoint.state import abstract, state, tree
from tests.parallel.test_hosts import launch

ROOT = pathlib.Path(__file__).resolve().parents[2]
AXES = ("data", "fsdp", "tensor")


def mesh(*shape: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


MESH = mesh(2, 2, 2)


@pytest.fixture(autouse=True)
def _log_level(caplog):
    caplog.set_level(logging.INFO, logger="llmjax")


@pytest.fixture(scope="module", autouse=True)
def light_collector():
    """A damaged restore collects garbage; what was there before need not be walked each time."""
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


def save(folder, *steps: int, **options) -> None:
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, state(MESH, step), {"data_state": {"next_sample": 8 * step}, "sizes": (1, 2)})
    checkpoints.close()


def assert_same(parts, step: int) -> None:
    """Bitwise equality with `tree(step)`, types of containers included."""
    expected = tree(step)
    assert jax.tree.structure(parts) == jax.tree.structure(expected)
    for found, value in zip(jax.tree.leaves(parts), jax.tree.leaves(expected), strict=True):
        assert np.asarray(found).dtype == value.dtype
        assert np.asarray(found).tobytes() == np.asarray(value).tobytes()


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def restore(folder, **options):
    return Checkpoints(folder).restore_latest_good(abstract(MESH), **options)


def test_what_is_saved_comes_back(folder):
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


def test_parts_can_be_restored_alone(folder):
    restored = Checkpoints(folder).restore(2, {"params": abstract(MESH)["params"]})
    assert_same({**tree(2), "params": restored.parts["params"]}, 2)
    assert list(restored.parts) == ["params"]


def test_restore_onto_other_meshes_is_bitwise(tmp_path):
    parts, shapes = state(mesh(8, 1, 1), 1), [(1, 8, 1), (2, 2, 2), (1, 1, 1), (4, 1, 2)]
    for step, shape in enumerate(shapes, 1):
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        checkpoints.save(step, parts, {})
        checkpoints.close()
        wanted = abstract(mesh(*shape))
        parts = Checkpoints(tmp_path / "checkpoints").restore(step, wanted).parts
        assert jax.tree.map(lambda x: x.sharding, parts) == jax.tree.map(lambda x: x.sharding, wanted)
        assert_same(parts, 1)


def test_the_arrays_may_be_donated_once_save_returns(tmp_path):
    checkpoints, parts = Checkpoints(tmp_path), state(MESH, 1)
    checkpoints.save(1, parts, {})
    jax.jit(lambda parts: jax.tree.map(lambda x: x + x, parts), donate_argnums=0)(parts)
    checkpoints.close()
    assert_same(Checkpoints(tmp_path).restore(1, abstract(MESH)).parts, 1)


def test_old_ones_are_removed_but_for_the_multiples(tmp_path):
    save(tmp_path, *range(1, 8), keep=2, keep_every=3)
    assert Checkpoints(tmp_path).steps() == [3, 6, 7]
    assert Checkpoints(tmp_path).latest() == 7


def test_a_fresh_folder_holds_nothing_and_reading_leaves_no_trace(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none")
    assert (checkpoints.steps(), checkpoints.latest()) == ([], None)
    assert checkpoints.restore_latest_good(abstract(MESH)) is None
    checkpoints.close()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_step_is_told(folder):
    with pytest.raises(UserError, match=r"no checkpoint of step 7 in .*; there are \[1, 2\]"):
        Checkpoints(folder).restore(7, abstract(MESH))


def test_other_shapes_are_no_damage(folder):
    wanted = abstract(MESH)
    wanted["params"]["embed"] = jax.ShapeDtypeStruct((64, 4), np.float32, sharding=wanted["params"]["embed"].sharding)
    message = (
        r"checkpoint 2 does not fit this config: params.embed is float32\[64, 64\] there, but float32\[64, 4\] here"
    )
    with pytest.raises(UserError, match=message):
        Checkpoints(folder).restore_latest_good(wanted)
    with pytest.raises(UserError, match="checkpoint 2 has no 'ema'"):
        Checkpoints(folder).restore(2, {"ema": {}})
    assert Checkpoints(folder).steps() == [1, 2]


def test_a_refused_config_is_no_damage(folder):
    def check(meta):
        raise UserError(f"vocabulary changed since sample {meta['data_state']['next_sample']}")

    with pytest.raises(UserError, match="since sample 16"):
        restore(folder, check=check)
    assert Checkpoints(folder).steps() == [1, 2]


def test_too_little_memory_is_no_damage(folder, monkeypatch):
    def full(*_):
        raise MemoryError("Out of memory allocating 12 bytes")

    monkeypatch.setattr(Checkpoints, "_read_part", full)
    with pytest.raises(MemoryError, match="checkpoint 2"):
        restore(folder)
    assert Checkpoints(folder).steps() == [1, 2]


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(folder, caplog):
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


@pytest.mark.parametrize("how", ["copied", "linked", "renamed"])
def test_a_checkpoint_under_another_steps_name_is_noticed(folder, how, caplog):
    """Its fingerprint fits, but the run would go on from other steps' data and end with too few updates."""
    if how == "copied":
        shutil.copytree(folder / "2", folder / "7")
    elif how == "linked":
        (folder / "7").symlink_to("2")
    else:
        (folder / "2").rename(folder / "7")
    with pytest.raises(UserError, match=r"7 is damaged: it was saved as step 2, and copied or renamed since"):
        Checkpoints(folder).read_meta(7)
    assert restore(folder).step == (1 if how == "renamed" else 2)
    (line,) = caplog.messages
    assert "checkpoint 7 is damaged and was moved" in line


def test_a_reader_skips_damaged_ones(folder, caplog):
    (folder / "2" / "meta" / "metadata").unlink()
    assert restore(folder, set_aside=False).step == 1
    assert caplog.messages[0].startswith("checkpoint 2 is damaged and was skipped: its meta cannot be read")
    assert Checkpoints(folder).steps() == [1, 2]
    with pytest.raises(UserError, match="2 is damaged: its meta cannot be read"):
        Checkpoints(folder).read_meta(2)


def test_with_none_left_it_stops_and_never_starts_at_zero(folder):
    for step in ("1", "2"):
        shutil.rmtree(folder / step / "params")
    for _ in range(2):  # the second time, when all are set aside already
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


def vital(folder: pathlib.Path) -> list[pathlib.Path]:
    """Array files of step 2 that a restore reads. Others are left over: how writes are merged depends on timing."""
    found = []
    for path in files(folder / "2"):
        if path.parent.name == "d":
            path.rename(path.with_suffix(".away"))
            if not restores(folder):
                found.append(path)
            path.with_suffix(".away").rename(path)
    return found


def test_a_flipped_bit_is_noticed_or_harmless(folder, template):
    """Flips bits everywhere; where a restore goes through, every value must be what was saved."""
    rng, noticed, step = np.random.default_rng(0), 0, folder / "2"
    large = max(vital(folder), key=lambda path: path.stat().st_size)
    for turn in range(36):
        path = large if turn % 2 else rng.choice(files(step))
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        noticed += not restores(folder)
        path.write_bytes(whole)
    assert noticed >= 12  # most of the largest file is array data
    assert restores(folder)


@pytest.mark.parametrize("harm", ["cut in half", "emptied", "removed"])
def test_a_harmed_file_is_noticed_or_harmless(folder, harm):
    """Every file in turn. Arrays, manifests and meta must be noticed; what Orbax adds for itself may be harmless."""
    step, noticed = folder / "2", set()
    for path in files(step):
        whole = path.read_bytes()
        if harm == "removed":
            path.unlink()
        else:
            path.write_bytes(whole[: len(whole) // 2 if harm == "cut in half" else 0])
        if not restores(folder):
            noticed.add(path.relative_to(step))
        path.write_bytes(whole)
    manifests = {pathlib.Path(part, "manifest.ocdbt") for part in ("params", "opt_state")}
    assert {pathlib.Path("meta/metadata"), *manifests} <= noticed
    for part in ("params", "opt_state"):
        assert any(path.parts[0] == part and path.parent.name == "d" for path in noticed), f"no array file of {part}"


def test_swapped_arrays_are_noticed(folder, template):
    """Whole and valid files of another step in this step's place."""
    shutil.rmtree(folder / "2" / "params")
    shutil.copytree(template / "1" / "params", folder / "2" / "params")
    with pytest.raises(UserError, match=r"2 is damaged: its fingerprint is .* but .* was saved"):
        Checkpoints(folder).restore(2, abstract(MESH))


CHILD = """
import jax, numpy as np, os, pathlib, resource, signal, sys
from llmjax.checkpoint.manager import Checkpoints
from llmjax.errors import UserError
folder = pathlib.Path(sys.argv[1])
parts = {"params": {"a": jax.numpy.asarray(np.random.default_rng(0).random((SIZE,), np.float32))}}
checkpoints = Checkpoints(folder, timeout_seconds=30)
checkpoints.save(1, parts, {})
checkpoints.wait()
"""


def child(folder, size: int, code: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", CHILD.replace("SIZE", str(size)) + code, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.slow
def test_a_save_that_is_killed_leaves_the_one_before(tmp_path):
    size = 1 << 24  # 64 MB take long enough to be caught on the way
    done = child(
        tmp_path,
        size,
        """
checkpoints.save(2, parts, {})
while not list(folder.glob("2.*tmp*")):
    assert not (folder / "2").exists()
os.kill(os.getpid(), signal.SIGKILL)
""",
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(tmp_path.glob("2.*tmp*"))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {"params": {"a": jax.ShapeDtypeStruct((size,), np.float32, sharding=device)}}
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [1]
    restored = checkpoints.restore_latest_good(wanted)
    assert restored.step == 1
    checkpoints.save(2, restored.parts, {})
    checkpoints.close()
    assert Checkpoints(tmp_path).steps() == [1, 2]
    assert not list(tmp_path.glob("*tmp*"))


@pytest.mark.slow
def test_a_full_disk_is_one_clear_error_and_keeps_the_one_before(tmp_path):
    """A limit on file size stands for the full disk: both fail the write itself."""
    done = child(
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
    assert done.returncode == 0, done.stderr
    message = f"no space left in {tmp_path} for checkpoint 2; the newest complete one is of step 1: free some space"
    assert done.stdout.splitlines() == [message, "[1]", "[1, 3]"]


def job(processes: int, devices: int, verb: str, folder: pathlib.Path, *arguments) -> list[dict]:
    done = launch(processes, devices, "checkpoint/worker.py", verb, folder, folder.parent, *arguments)
    assert done.returncode == 0, done.stdout
    return [json.loads((folder.parent / f"{verb}-{index}.json").read_text()) for index in range(processes)]


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory) -> tuple[pathlib.Path, list[dict]]:
    """Steps 1 to 3, saved by 2 processes x 4 devices."""
    folder = tmp_path_factory.mktemp("job") / "checkpoints"
    return folder, job(2, 4, "save", folder)


@pytest.mark.multiprocess
def test_one_process_restores_what_two_saved(saved_by_two):
    folder, seen = saved_by_two
    assert {one["fingerprint"] for one in seen} == {fingerprint(**tree(3))}
    for shape in [(8, 1, 1), (1, 1, 1)]:
        assert_same(Checkpoints(folder).restore(3, abstract(mesh(*shape))).parts, 3)


@pytest.mark.multiprocess
def test_another_number_of_processes_restores(saved_by_two):
    folder, saved = saved_by_two
    for one in job(4, 2, "restore", folder):
        assert (one["step"], one["log"]) == (3, [])
        assert one["meta"]["fingerprint"] == saved[0]["fingerprint"]


@pytest.mark.multiprocess
def test_processes_agree_though_only_one_sees_the_damage(saved_by_two, tmp_path):
    folder = pathlib.Path(shutil.copytree(saved_by_two[0], tmp_path / "checkpoints"))
    first, second = job(2, 4, "restore", folder, 1)
    assert first["step"] == second["step"] == 2
    assert first["sums"] == second["sums"]
    (line,) = first["log"]
    assert "process 1: OSError: Input/output error" in line
    assert second["log"] == [line]
    assert Checkpoints(folder).steps() == [1, 2]


@pytest.mark.multiprocess
@pytest.mark.parametrize("process", [0, 1])
def test_a_full_disk_on_one_host_ends_the_save_on_all(tmp_path, process):
    """Without waiting for the time limit of a save, which is 60 s in the worker."""
    folder = tmp_path / "checkpoints"
    for one in job(2, 2, "fill", folder, process):
        newest = "the newest complete one is of step 1: free some space"
        assert one["error"] == f"no space left in {folder} for checkpoint 2 (process {process}); {newest}"
        assert one["seconds"] < 30


@pytest.mark.multiprocess
def test_processes_agree_that_none_is_left(saved_by_two, tmp_path):
    folder = pathlib.Path(shutil.copytree(saved_by_two[0], tmp_path / "checkpoints"))
    for step in (folder / name for name in ("1", "2", "3")):
        data = [path for path in files(step / "params") if path.parent.name == "d"]
        for path in data:
            path.write_bytes(path.read_bytes()[:-1])
    for one in job(2, 4, "restore", folder):
        assert "holds damaged checkpoints and no good one" in one["error"]
