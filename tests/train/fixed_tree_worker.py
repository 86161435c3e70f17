"""The tiny runs of tests/train/test_fixed_tree.py. As a program: a hash of a run's results on each of some layouts.

python -m tests.train.fixed_tree_worker SPEC FIELD=VALUE ... LAYOUT ...      such as llama:tiny model.remat=full 1x1 1x8
"""

import dataclasses
import hashlib
import sys

import jax
import numpy as np

from llmjax.batch import Batch
from llmjax.evals.harness import make_score
from llmjax.parallel import axes, backends, hosts
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.run import config as run_config, state as states
from llmjax.train.program import check_program, make_program

ROWS, SEQ, SHARDS = 16, 64, 8
FIXED = (("parallel.reduction", "fixed_tree"), ("parallel.virtual_shards", SHARDS))
TINY = (
    ("model.vocab_size", "256"),
    ("model.num_layers", "2"),
    ("model.embed", "32"),
    ("model.mlp", "64"),
    ("model.dropout", "0.1"),
    ("data.seq_len", str(SEQ)),
    ("train.global_batch", str(ROWS)),
    ("train.loss_chunk", "32"),
    ("train.z_loss", "1e-3"),
    ("optimizer.warmup_steps", "1"),
)


def resolve(spec: str, changes: tuple = ()) -> run_config.RunConfig:
    """A config of a published architecture with tiny shapes."""
    heads = () if spec.startswith("recurrent") else (("model.num_heads", "4"),)
    return run_config.with_fields(run_config.resolve(spec, TINY + heads + changes), FIXED)


def tiny(spec: str = "llama:tiny", **changes) -> run_config.RunConfig:
    """A config of a published architecture with tiny shapes; `changes` have two underscores for dots."""
    return run_config.with_fields(resolve(spec), [(name.replace("__", "."), value) for name, value in changes.items()])


def run(config, data: int, fsdp: int, steps: int = 3):
    """(metrics of each step, final state, scores of a batch by that state) as numpy arrays."""
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp), jax.devices()[: data * fsdp])
    with axes.use_mesh(mesh):
        check_program(config)
        spec = states.make_state_spec(config.model, config.optimizer, horizon=100)
        rows = hosts.local_rows(backends.batch_sharding(), ROWS)
        program, state = make_program(config, spec, rows, ROWS), states.init_state(spec, config.model, 0)
        batch = lambda step: packed_rows(ROWS, SEQ, step, has_source=config.model.reads_source)
        metrics = []
        for step in range(steps):
            state, of_step = program.step(state, program.shard_batch(batch(step)))
            metrics.append({name: np.asarray(value) for name, value in of_step.items()})
        score = make_score(spec.graph, config, counts_targets=True)
        params = spec.optimizer.eval_params(state.params, state.opt_state)
        scores = score(params, hosts.global_batch(backends.batch_sharding(), batch(steps), rows, ROWS))
    return metrics, *jax.tree.map(np.asarray, (dataclasses.asdict(state), scores))


def packed_rows(rows: int, seq: int, step: int, *, has_source: bool = False) -> Batch:
    """Rows of two documents each, maybe with a source each; other tokens and sample indices for each step."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 256, (rows, seq + 1)).astype(np.int32)
    place, border = np.arange(seq, dtype=np.int32), rng.integers(seq // 3, seq // 2, (rows, 1))
    segments = np.where(place < border, 1, 2).astype(np.int32)
    positions = np.where(place < border, place, place - border).astype(np.int32)
    source = {"source": tokens[:, ::-1][:, :-1], "source_segments": segments, "source_positions": positions}
    return Batch(
        inputs=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=(rng.random((rows, seq)) < 0.9).astype(np.float32),
        segments=segments,
        positions=positions,
        sample=np.stack([np.zeros(rows), np.arange(rows) + step * rows], axis=1).astype(np.uint32),
        **(source if has_source else {}),
    )


def main() -> None:
    """Print a line for each layout: its name and the hash of all metrics and of the whole state."""
    jax.config.update("jax_num_cpu_devices", 8)
    hosts.set_cpu_threads(hosts.CPU_THREADS)
    spec, *rest = sys.argv[1:]
    changes = tuple((field, value) for field, equals, value in (item.partition("=") for item in rest) if equals)
    config = resolve(spec, changes)
    for layout in (item for item in rest if "=" not in item):
        data, fsdp = map(int, layout.split("x"))
        leaves = jax.tree.leaves(run(config, data, fsdp))
        print(layout, hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest(), flush=True)


if __name__ == "__main__":
    main()
