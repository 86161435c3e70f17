"""The process that compiles a step for `llmjax.plan.compile_ahead`: `python -m llmjax.plan.compile_child`.

It reads a pickled (config, topology, folder) from its standard input and writes into the folder:

facts.json       mesh, the slice of each partition, number of parameters, bytes per device of them and the optimizer,
                 the memory that a GPU reports, and the links of a torus that sums over a mesh axis pass
memory.json      the compiler's memory analysis, once the program is compiled to the end
optimized.txt    on CPU and GPU: the program. The TPU compiler writes its own dump, and so much earlier
error.json       {"error": one line}, if the user can fix it
"""

import json
import math
import os
import pathlib
import pickle
import sys
from typing import Any

import jax
import numpy as np

from llmjax.errors import UserError
from llmjax.parallel import axes, hosts, mesh as meshes
from llmjax.parallel.fixed_tree import DATA, FSDP
from llmjax.parallel.memory import reported_memory
from llmjax.plan import count, topology as topologies, tree_cost
from llmjax.plan.topology import Topology
from llmjax.run import state as states, teacher as teachers
from llmjax.run.config import RunConfig
from llmjax.run.mesh_choice import choose_mesh
from llmjax.train.program import check_program, make_program

FACTS, MEMORY, OPTIMIZED, ERROR = "facts.json", "memory.json", "optimized.txt", "error.json"


def compile_step(config: RunConfig, topology: Topology, folder: pathlib.Path) -> None:
    """Compile the step of a config, and write what the parent process reads."""
    if config.parallel.backend != "jit":
        raise UserError(f"parallel.backend={config.parallel.backend!r}: only 'jit' compiles ahead of time; set it")
    devices = topologies.devices(topology)
    mesh = meshes.make_mesh(choose_mesh(config, devices, frozen_bytes=teachers.teacher_bytes(config)), devices)
    with axes.use_mesh(mesh, config.parallel.rules, config.parallel.gradient_dtype):
        check_program(config)
        spec = states.make_state_spec(config.model, config.optimizer, horizon=config.train.steps)
        if (teacher := teachers.read_teacher_config(config)) is not None:
            teachers.check_vocabulary(config, teacher)
            spec = teachers.add_teacher(spec, teacher)
        largest = config.train.batch_sizes.largest
        batch = count.abstract_batch(config, largest)
        facts = {
            "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(spec.shapes.params)),
            "mesh": dict(mesh.shape),
            "slice_of": [getattr(device, "slice_index", None) or 0 for device in mesh.devices.flat],
            "parameter_bytes": _bytes_per_device(spec.shapes.params, spec.shardings.params),
            "optimizer_bytes": _bytes_per_device(spec.shapes.opt_state, spec.shardings.opt_state),
            "teacher_bytes": _bytes_per_device(spec.shapes.teacher, spec.shardings.teacher),
            "device_memory": _gpu_memory(devices[0]),
            "hops": {
                axis: tree_cost.mean_hops(mesh.devices, mesh.axis_names.index(axis), topology.dims)
                for axis in (DATA, FSDP)
                if topology.platform == "tpu" and topology.slices == 1 and mesh.shape[axis] > 1
            },
        }
        (folder / FACTS).write_text(json.dumps(facts))
        program = make_program(config, spec, np.arange(largest), largest)
        step: Any = program.step  # of the backend jit, the jitted function
        compiled = step.lower(spec.abstract(), batch).compile()
    if topology.platform != "tpu":
        (folder / OPTIMIZED).write_text(compiled.as_text())
    memory = compiled.memory_analysis()
    (folder / MEMORY).write_text(
        json.dumps(
            {
                "arguments": memory.argument_size_in_bytes,
                # The new state takes the place of the old one, which the step donates.
                "temporaries": memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
                "host": memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes,
            }
        )
    )


def _gpu_memory(device: Any) -> int | None:
    """Bytes that a GPU gives to programs; None for devices that may be absent."""
    return reported_memory(device) if device.platform == "gpu" else None


def _bytes_per_device(shapes: Any, shardings: Any) -> int:
    sizes = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize, shapes, shardings
    )
    return sum(jax.tree.leaves(sizes))


def main() -> None:
    """Compile what standard input describes."""
    hosts.end_with_launcher(os.getppid())
    config, topology, folder = pickle.load(sys.stdin.buffer)
    if topology.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", topology.num_chips)
    try:
        compile_step(config, topology, folder)
    except UserError as error:
        (folder / ERROR).write_text(json.dumps({"error": str(error)}))
        sys.exit(1)
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error) and "While setting option" not in str(error):
            raise
        (folder / ERROR).write_text(json.dumps({"error": f"xla.flags: {error}"}))
        sys.exit(1)


if __name__ == "__main__":
    main()
