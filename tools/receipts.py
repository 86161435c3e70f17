"""What the compiler makes of each shipped config's step: one small text file per (config, topology), kept in git.

    python tools/receipts.py            write tests/receipts/*.txt
    python tools/receipts.py --check    compile again, and fail on a difference beyond the margin, naming what moved
    python tools/receipts.py --only=llama_8B

A receipt shows what no test of results can: an all-gather too many, a state that is no longer donated, an attention
kernel that runs twice. Each is the optimized program of a real TPU compiler, without a TPU: extra `plan`.
"""

import argparse
import dataclasses
import pathlib
import sys

from llmjax.plan import plan as plans, topology as topologies
from llmjax.plan.plan import Plan
from llmjax.plan.topology import Topology
from llmjax.run import config as run_config
from llmjax.run.config import RunConfig

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "tests" / "receipts"
MARGIN = 0.02  # of a quantity; counts of kernels and collectives are exact


@dataclasses.dataclass(frozen=True)
class Case:
    """A config on a topology, with `rows` per device. Vocabularies are those of the published models."""

    config: str
    topology: str
    rows: int
    overrides: tuple[tuple[str, str], ...] = ()
    slices: int = 1

    @property
    def name(self) -> str:
        """The name of its file, without the ending."""
        slices = f"_{self.slices}slices" if self.slices > 1 else ""
        return f"{self.config}_{self.topology}{slices}".replace(":", "_").replace(".", "-")


# The first ones are what the tests compile again.
CASES = (
    Case("gpt2:124M", "v5e:2x4", 32),
    Case("llama:1B", "v5e:4x4", 1, (("data.seq_len", "2048"),)),
    Case("t5:base", "v5e:2x4", 16, (("model.scan", "True"),)),
    Case("llama:8B", "v6e:16x16", 4),
    Case("llama:8B", "v5p:4x4x4", 2),
    Case("llama:8B", "v6e:16x16", 4, (("mesh.slice", "2"),), slices=2),
    Case("llama:70B", "v6e:16x16", 2, (("mesh.tensor", "1"),)),
    Case("mixtral:8x7B", "v5p:4x4x8", 12, (("data.seq_len", "4096"), ("model.param_dtype", "bfloat16"))),
    Case("gemma:3-1B", "v5e:4x4", 1, (("data.seq_len", "2048"),)),
    Case("modernbert:base", "v5e:2x4", 16),
)
QUICK = CASES[:3]


def resolve(case: Case) -> tuple[RunConfig, Topology]:
    """The config and the machine of a case."""
    topology = topologies.parse(case.topology, case.slices)
    vocab_size = run_config.published_vocab_size(case.config)
    rows = case.rows * topology.num_chips
    overrides = (("model.vocab_size", str(vocab_size)), ("train.global_batch", str(rows)), *case.overrides)
    return run_config.resolve(case.config, overrides), topology


def make_receipt(case: Case) -> dict[str, float]:
    """Compile a case and return its figures by name, in the order of the file."""
    config, topology = resolve(case)
    return figures(plans.make_plan(config, topology, quick=True))


def figures(plan: Plan) -> dict[str, float]:
    """What a receipt holds, of one device and step."""
    costs, memory = plan.costs, plan.program.memory
    found = {
        "fits": float(bool(plan.fits)),
        "hbm_bytes": memory.total,
        "argument_bytes": memory.arguments,
        "executed_over_model_flops": costs.executed_flops / plan.model_flops,
        "host_copy_bytes": costs.host_bytes,
    }
    for kind, total in sorted(costs.collectives.items()):
        name = kind.replace(" ", "_")
        found[f"{name}_count"] = total.count
        found[f"{name}_wire_bytes"] = total.ici_bytes + total.dcn_bytes
    for kernel, calls in sorted(costs.kernels.items()):
        found[f"kernel_{kernel}_calls"] = calls
    return found


def to_text(case: Case, found: dict[str, float]) -> str:
    """The content of a receipt's file."""
    changed = "".join(f" --config.{field}={value}" for field, value in case.overrides)
    head = f"# {case.config} on {case.slices} x {case.topology}, {case.rows} rows a device{changed}"
    compiler = topologies.compiler_version(topologies.parse(case.topology, case.slices))
    lines = [head, f"# {compiler}; by python tools/receipts.py"]
    return "\n".join([*lines, *(f"{name} {_number(value)}" for name, value in found.items())]) + "\n"


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.4f}" if value < 1e3 else f"{value:.0f}"


def from_text(text: str) -> dict[str, float]:
    """The figures of a receipt's file."""
    pairs = (line.split() for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def differences(old: dict[str, float], new: dict[str, float]) -> list[str]:
    """One line for each figure that moved: counts by anything, quantities by more than the margin."""
    lines = []
    for name in dict.fromkeys((*old, *new)):
        before, after = old.get(name, 0.0), new.get(name, 0.0)
        margin = 0 if name.endswith(("_count", "_calls", "fits")) else MARGIN * max(abs(before), 1e-3)
        if abs(after - before) > margin:
            change = f" ({after / before - 1:+.1%})" if before else ""
            lines.append(f"{name}: {_number(before)} -> {_number(after)}{change}")
    return lines


def main() -> int:
    """Write the receipts, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    flags = parser.parse_args()
    failed = False
    for case in (case for case in CASES if flags.only in case.name):
        file, found = FOLDER / f"{case.name}.txt", make_receipt(case)
        if not flags.check:
            FOLDER.mkdir(exist_ok=True)
            file.write_text(to_text(case, found))
            print(f"{case.name}: written", flush=True)
            continue
        moved = differences(from_text(file.read_text()), found) if file.exists() else ["there is no receipt yet"]
        failed |= bool(moved)
        print(f"{case.name}: {'; '.join(moved) or 'unchanged'}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
