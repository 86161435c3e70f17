"""One process of the jobs in test_compilation_cache.py: programs_worker.py FOLDER... (of the cache, one a process).

Prints `connected` after `make_mesh`, then runs programs that sum over every group of mesh axes, and prints how many of
them were in the cache.
"""

import sys

from llmjax.parallel import hosts

hosts.initialize()

import jax
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np

from llmjax.parallel import compilation_cache
from llmjax.parallel.mesh import MeshConfig, make_mesh

events: list[str] = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rpartition("/")[2]))
compilation_cache.enable(sys.argv[1 + jax.process_index()], hosts.CPU_THREADS)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # these programs are too small to take any time

mesh = make_mesh(MeshConfig(data=2, tensor=2))
print("connected", flush=True)
sums = []
for spec in (P("data"), P("tensor"), P(("data", "tensor"))):
    sharding = NamedSharding(mesh, spec)
    x = jax.make_array_from_callback((8,), sharding, lambda index: np.arange(8, dtype=np.float32)[index])
    sums.append(float(jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, P()))(x)))
counts = {name: events.count(f"cache_{name}") for name in ("hits", "misses")}
print("sums", *sums, "hits", counts["hits"], "misses", counts["misses"], flush=True)
