"""Write the table of remat policies in docs/models.md: what each keeps, its memory and FLOPs by the TPU compiler.

python tools/remat_table.py [--case=8B] [--write]     # minutes of CPU a case; needs libtpu, but no TPU
"""

import argparse
import dataclasses
import os
import pathlib
import re

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the child process compiles for the TPU

from llmjax.nn.stack import REMAT
from llmjax.plan import count, plan as plans, topology as topologies
from llmjax.run import config as run_config

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "models.md"
START, END = "<!-- remat table: tools/remat_table.py --write -->", "<!-- end of the remat table -->"
# Name -> (config, topology, rows a chip, overrides).
CASES = {
    "8B": ("llama:8B", "v5p:4x4x4", 2, {"model.vocab_size": "128256"}),
    "1B": ("llama:1B", "v6e:4x4", 4, {"model.vocab_size": "128256"}),
    "124M": ("gpt2:124M", "v5e:2x4", 32, {"model.vocab_size": "50304", "mesh.data": "-1", "mesh.fsdp": "1"}),
}


def rows(case: str) -> list[str]:
    """The table of one case: a line for each policy."""
    spec, name, per_chip, overrides = CASES[case]
    topology = topologies.parse(name)
    overrides = {**overrides, "train.global_batch": str(per_chip * topology.num_chips)}
    config = run_config.resolve(spec, tuple(overrides.items()))
    layers, hbm = config.model.num_layers, topology.chip.hbm / 2**30 if topology.chip else 0
    lines = [
        f"`{spec}` on {name}, {per_chip} rows of {config.data.seq_len:,} a chip, {hbm:.1f} GiB of HBM, "
        f"model.attention={vars(config.model)['attention']}:",
        "",
        "| model.remat | kept, MiB a layer and row | HBM, GiB | host, GiB | executed / model FLOPs | kernels a layer |",
        "|---|---|---|---|---|---|",
    ]
    # The kernel of a TPU is not traced here; blockwise keeps the same tensors: its output and logarithms of sums.
    blockwise = dataclasses.replace(config.model, attention="blockwise")
    residuals = count.residual_bytes(dataclasses.replace(config, model=blockwise))
    for policy in REMAT:
        plan = plans.make_plan(run_config.with_fields(config, [("model.remat", policy)]), topology, quick=True)
        kept = (residuals[policy].device + residuals[policy].host) / layers / 2**20
        total = f"{plan.program.memory.total / 2**30:.1f}" + ("" if plan.fits else " (too much)")
        cells = (policy, f"{kept:.0f}", total, f"{plan.program.memory.host / 2**30:.1f}")
        flops, calls = plan.costs.executed_flops / plan.model_flops, plan.costs.attention_calls / layers
        lines.append(f"| {' | '.join(cells)} | {flops:.2f} | {calls:.0f} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, help="one of the three (default: all)")
    parser.add_argument("--write", action="store_true", help="replace the table in docs/models.md")
    args = parser.parse_args()
    table = "\n\n".join("\n".join(rows(case)) for case in ([args.case] if args.case else CASES))
    print(f"\n{table}")
    if args.write:
        text = PAGE.read_text()
        assert START in text and END in text, f"{PAGE} has no place for the table"
        PAGE.write_text(re.sub(f"{START}.*{END}", lambda _: f"{START}\n\n{table}\n\n{END}", text, flags=re.S))


if __name__ == "__main__":
    main()
