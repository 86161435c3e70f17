"""One process of the jobs in test_manager.py: saves or restores a small state, and writes a report of it.

worker.py save|restore|fill_disk FOLDER OUT [PROCESS]

PROCESS alone reads a damaged checkpoint 3 (restore), or has a full disk at step 2 (fill_disk).
"""

import json
import logging
import pathlib
import resource
import sys
import time

from llmjax.parallel import hosts

hosts.initialize()

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from llmjax.checkpoint.manager import CheckpointConfig, Checkpoints
from llmjax.errors import UserError
from tests.checkpoint.state import abstract, state

command, folder, out = sys.argv[1:4]
mesh = Mesh(np.array(jax.devices()).reshape(-1, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
checkpoints = Checkpoints(folder, CheckpointConfig(timeout_seconds=60))
report: dict = {"log": []}
recorder = logging.Handler()
recorder.emit = lambda record: report["log"].append(record.getMessage())
logging.getLogger("llmjax").addHandler(recorder)
logging.getLogger("llmjax").setLevel(logging.INFO)
if command == "save":
    for step in (1, 2, 3):
        report["fingerprint"] = checkpoints.save(step, state(mesh, step), {"data_state": {"next_sample": 8 * step}})
    checkpoints.close()
elif command == "fill_disk":
    checkpoints.save(1, state(mesh, 1), {})
    checkpoints.wait()
    if sys.argv[4:] == [str(jax.process_index())]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 9, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    began = time.monotonic()
    try:
        checkpoints.save(2, state(mesh, 2), {})
        checkpoints.wait()
    except UserError as error:
        report["error"], report["seconds"] = str(error), time.monotonic() - began
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
else:
    if sys.argv[4:] == [str(jax.process_index())]:
        read_part = checkpoints._read_part

        def fail_at_step_3(step, name, tree):
            if step == 3:
                raise OSError("Input/output error")
            return read_part(step, name, tree)

        checkpoints._read_part = fail_at_step_3
    try:
        restored = checkpoints.restore_latest_good(abstract(mesh))
        assert restored is not None
        replicated = NamedSharding(mesh, P())
        report["step"], report["meta"] = restored.step, restored.meta
        total = jax.jit(
            lambda parts: jax.tree.map(lambda x: x.astype("float32").sum(), parts), out_shardings=replicated
        )
        report["sums"] = [float(x) for x in jax.tree.leaves(total(restored.parts))]
    except UserError as error:
        report["error"] = str(error)
(pathlib.Path(out) / f"{command}-{jax.process_index()}.json").write_text(json.dumps(report))
hosts.barrier("end")
