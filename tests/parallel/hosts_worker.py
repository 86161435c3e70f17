"""One process of the job in test_hosts.py: hosts_worker.py OUT STATUS writes a report to OUT/<process>.json."""

import json
import pathlib
import sys
import time

from llmjax.parallel import hosts

hosts.initialize()

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from llmjax.batch import Batch
from llmjax.errors import UserError


def attempt(action):
    try:
        return action()
    except (UserError, TimeoutError) as error:
        return f"{type(error).__name__}: {error}"


def make_batch(data: int, tensor: int) -> dict:
    """The rows of this process on a (data, tensor) mesh, and shape and sum of the global batch."""
    mesh = Mesh(np.array(jax.devices()).reshape(data, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P("data"))
    rows = hosts.local_rows(sharding, 8)
    tokens = np.arange(8 * 4, dtype=np.int32).reshape(8, 4)[rows]
    local = Batch(
        inputs=tokens,
        targets=tokens + 1,
        weights=np.ones(tokens.shape, np.float32),
        segments=tokens,
        positions=tokens,
        sample=np.stack([rows * 0, rows], 1).astype(np.uint32),
    )
    batch = hosts.global_batch(sharding, local, rows, 8)
    weighted = jax.jit(lambda x: (x * np.arange(1, 9)[:, None]).sum(), out_shardings=NamedSharding(mesh, P()))
    return {"rows": rows.tolist(), "shape": batch.inputs.shape, "sum": int(weighted(batch.inputs))}


me = jax.process_index()
report = {
    "devices": [jax.local_device_count(), jax.device_count()],
    "primary": hosts.is_primary(),
    "exchange": [hosts.exchange("name", f"text {me} {turn}") for turn in range(3)],
    "broadcast": hosts.broadcast("chosen", f"from {me}"),
    "agree": [hosts.agree(True), hosts.agree(me != 1), hosts.agree(False)],
    "same": attempt(lambda: hosts.all_equal("token store", "abc")),
    "different": attempt(lambda: hosts.all_equal("token store", "abc" if me != 1 else "xyz")),
    "batches": [make_batch(data, jax.device_count() // data) for data in (1, 2, 4)],
}
if me == 1:
    time.sleep(3)  # longer than the others wait
    report["late"] = "slept"
else:
    report["late"] = attempt(lambda: hosts.barrier("late", timeout_seconds=1))
(pathlib.Path(sys.argv[1]) / f"{me}.json").write_text(json.dumps(report))
hosts.barrier("end")
if status := int(sys.argv[2]):
    hosts.exit_now(status if me == 1 else 0)
