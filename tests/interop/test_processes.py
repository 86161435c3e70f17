"""Several processes import and export one checkpoint together: the same fingerprint, the same bits on disk."""

import json

import pytest

from tests import jobs
from tests.interop import published


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_processes_import_and_export_the_same_bits(tmp_path):
    tensors = published.random_tensors(published.llama_shapes())
    source = published.write_folder(tmp_path / "in", published.LLAMA, tensors, limit=30_000)
    prints = []
    for processes, devices in ((1, 1), (2, 2)):
        run, out = tmp_path / f"run-{processes}", tmp_path / f"out-{processes}"
        mesh = [f"--config.mesh.{axis}={size}" for axis, size in (("data", 1), ("fsdp", -1), ("tensor", 1))]
        for verb, arguments in (
            ("import", [f"--from={source}", f"--workdir={run}", *mesh]),
            ("export", [f"--workdir={run}", f"--to={out}", "--max_shard_bytes=40000"]),
        ):
            jobs.run(jobs.launch([str(jobs.LLMJAX), verb, *arguments], processes, devices))
        prints.append(json.loads((run / "import.json").read_text())["fingerprint"])
        back = published.read_tensors(out)
        assert set(back) == set(tensors)
        assert all(published.same_bits(back[name], tensor) for name, tensor in tensors.items())
    assert prints[0] == prints[1]
