"""The predicted step of our configs on TPU slices, beside MaxText's on the same compiler and the physical limit.

    python tools/bench_tpu_plan.py                   every case to the end: minutes each
    python tools/bench_tpu_plan.py --quick           stop at the optimized programs: seconds each
    python tools/bench_tpu_plan.py --only=e
    python tools/bench_tpu_plan.py --only=abe --quick --set=model.quantization=int8     with another value of a field
    python tools/bench_tpu_plan.py --only=abde --remat         the policy of model.remat=auto beside ours
    python tools/bench_tpu_plan.py --only=a --chips=16,64,256,1024,4096 --quick     how case a grows

No TPU is needed (extra `plan`). Rows are packed and carry segment ids. MaxText's figures are those of commit e591f30,
compiled with libtpu 0.0.52 and priced by the same model (docs/plan.md): with another version they do not compare, and
the tool says so. The limit is the model's FLOPs at the chip's peak, or the wire bytes of FSDP at the full link rate.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import multiprocessing
import pathlib
import resource
import sys

import receipts

from llmjax.plan import plan as plans, predict, remat_choice, topology as topologies
from llmjax.plan.plan import Plan

ROOT = pathlib.Path(__file__).resolve().parents[1]
PEER_COMPILER = "libtpu 0.0.52"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(receipts.Case):
    """A case of the table: MaxText's step and memory, the limit, our target.

    seconds of a step, GiB of a device
    """

    key: str
    peer_seconds: float
    peer_gib: float
    limit: float
    target: float
    note: str = ""


CASES = (
    Case(
        key="a",
        config="llama:8B",
        topology="v6e:16x16",
        rows=4,
        peer_seconds=4.56,
        peer_gib=27.7,
        limit=1.84,
        target=3.87,
        overrides=(("model.remat", "attention"),),
        note="MaxText keeps 28 GiB more on the host",
    ),
    Case(
        key="b",
        config="llama:8B",
        topology="v5p:4x4x4",
        rows=2,
        peer_seconds=2.40,
        peer_gib=57.5,
        limit=1.84,
        target=2.16,
        overrides=(("model.remat", "dots_attention"),),
    ),
    Case(
        key="c",
        config="llama:70B",
        topology="v6e:16x16",
        rows=2,
        peer_seconds=18.3,
        peer_gib=20.0,
        limit=8.02,
        target=15.6,
        overrides=(
            ("model.remat", "offload"),
            ("mesh.data", "1"),
            ("mesh.fsdp", "-1"),
            ("mesh.tensor", "1"),
        ),
        note="MaxText extrapolated, 20 GiB more on the host",
    ),
    Case(
        key="d",
        config="mixtral:8x7B",
        topology="v5p:4x4x8",
        rows=12,
        peer_seconds=16.95,
        peer_gib=51.3,
        limit=8.54,
        target=16.4,
        overrides=(("model.remat", "attention"), ("data.seq_len", "4096"), ("model.param_dtype", "bfloat16")),
        note="grouped matmuls at a constant 73% of the peak in both columns",
    ),
    Case(
        key="e",
        config="gpt2:124M",
        topology="v5e:2x4",
        rows=32,
        peer_seconds=0.63,
        peer_gib=14.5,
        limit=0.133,
        target=0.28,
        overrides=(("mesh.data", "-1"), ("mesh.fsdp", "1"), ("model.remat", "attention_qkv_mlp")),
    ),
    Case(
        key="f",
        config="llama:8B",
        topology="v6e:16x16",
        slices=2,
        rows=4,
        peer_seconds=4.77,
        peer_gib=23.0,
        limit=1.84,
        target=4.0,
        overrides=(("model.remat", "attention"), ("mesh.slice", "2")),
    ),
)
HEADER = (
    "| case | GiB | executed / model | matmul + other + attention + grouped s | ICI GB | exposed s | step s | MFU | "
    "MaxText s, GiB | limit s | target s | / MaxText | compile CPU s |"
)


def make_plan(case: Case, *, quick: bool) -> tuple[Plan, float]:
    """Compile a case: its plan and the compiler's CPU seconds, which depend little on what else the machine does."""
    config, topology = receipts.resolve(case)
    before = _child_cpu_seconds()
    plan = plans.make_plan(config, topology, quick=quick)
    return plan, _child_cpu_seconds() - before


def _child_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def to_row(case: Case, plan: Plan, compile_seconds: float) -> str:
    """A row of the table."""
    gib, ratio = plan.program.memory.total / 2**30, plan.costs.executed_flops / plan.model_flops
    fixed = f"{case.peer_seconds}, {case.peer_gib} | {case.limit} | {case.target}"
    name = f"{case.key} {case.config} {case.slices if case.slices > 1 else ''}{case.topology}"
    if plan.time is None:
        return f"| {name} | {gib:.1f}: does not fit | {ratio:.2f} | | | | | | {fixed} | | {compile_seconds:.0f} |"
    time = plan.time
    parts = f"{time.matmul:.2f} + {time.elementwise:.2f} + {time.attention:.2f} + {time.grouped:.2f}"
    return (
        f"| {name} | {gib:.1f} | {ratio:.2f} | {parts} | {plan.costs.ici_bytes / 1e9:.1f} | {time.exposed:.2f} | "
        f"{time.total:.3g} | {plan.mfu:.1%} | {fixed} | {time.total / case.peer_seconds:.2f} | "
        f"{compile_seconds:.0f} |"
    )


def compare_remat(cases: list[Case]) -> None:
    """The policy of each case beside the one that model.remat=auto takes, in the quick depth."""
    print("| case | model.remat | GiB | step s | auto takes | GiB | step s | refused for memory |")
    print("| --- " * 8 + "|")
    for case in cases:
        config, topology = receipts.resolve(case)
        choice = remat_choice.choose_remat(config, topology)
        cells = [f"{case.key} {case.config} {case.topology}"]
        for policy in (config.model.remat, choice.policy):
            plan = choice.tried[policy]
            seconds = f"{plan.time.total:.3g}" if plan.time else "does not fit"
            cells += [policy, f"{plan.program.memory.total / 2**30:.1f}", seconds]
        refused = [policy for policy, plan in choice.tried.items() if not choice.limits.hold(plan)]
        print(f"| {' | '.join(cells)} | {', '.join(refused)} |", flush=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Growth:
    """A case on one number of chips: GiB of a chip, seconds of a step, CPU seconds and peak GiB of the compiler."""

    chips: int
    gib: float
    seconds: float | None
    compile_seconds: float
    compile_gib: float

    def to_row(self) -> str:
        """A row of the table."""
        step = f"{self.seconds:.3g}" if self.seconds else "does not fit"
        return f"| {self.chips:,} | {self.gib:.1f} | {step} | {self.compile_seconds:.0f} | {self.compile_gib:.1f} |"


def grow(case: Case, chips: int, *, quick: bool) -> Growth:
    """The case on another number of chips; above 256, several slices of 256."""
    slices, side = max(1, chips // 256), round(min(chips, 256) ** 0.5)
    shape = f"{case.topology.partition(':')[0]}:{side}x{side}"
    overrides = (*case.overrides, ("mesh.slice", str(slices)))
    grown = dataclasses.replace(case, topology=shape, slices=slices, overrides=overrides)
    plan, compile_seconds = make_plan(grown, quick=quick)
    return Growth(
        chips=chips,
        gib=plan.program.memory.total / 2**30,
        seconds=plan.step_seconds,
        compile_seconds=compile_seconds,
        compile_gib=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20,
    )


def print_growth(case: Case, counts: list[int], svg: pathlib.Path, *, quick: bool) -> None:
    """The table and the plot of a case's growth."""
    print("| chips | GiB | step s | compile CPU s | peak memory of the compiler GiB |\n| --- | --- | --- | --- | --- |")
    grown = []
    for chips in counts:
        # A process for each: the peak memory of child processes is that of the largest of them.
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            grown.append(pool.submit(grow, case, chips, quick=quick).result())
        print(grown[-1].to_row(), flush=True)
    draw(grown, svg)
    print(f"\nplot: {svg}")


def draw(grown: list[Growth], path: pathlib.Path) -> None:
    """Each figure over the number of chips."""
    import matplotlib  # pyright: ignore[reportMissingImports]  (the extra `bench`)

    matplotlib.use("svg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    panels: dict[str, list[float]] = {
        "step, s": [g.seconds or float("nan") for g in grown],
        "memory of a chip, GiB": [g.gib for g in grown],
        "compile, CPU s": [g.compile_seconds for g in grown],
        "compiler's memory, GiB": [g.compile_gib for g in grown],
    }
    figure, all_axes = pyplot.subplots(1, len(panels), figsize=(12, 3))
    for axes, (title, values) in zip(all_axes, panels.items(), strict=True):
        axes.plot([g.chips for g in grown], values, marker="o", markersize=4)
        axes.set_xscale("log", base=2)
        axes.set(title=title, xlabel="chips", ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="stop at the optimized programs")
    parser.add_argument("--only", default="", help="letters of the cases, such as abe")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="an override of all cases")
    parser.add_argument("--remat", action="store_true", help="compare with model.remat=auto, in the quick depth")
    parser.add_argument("--chips", default="", help="with one case: its growth over these numbers of chips")
    parser.add_argument("--svg", type=pathlib.Path, default=ROOT / "docs" / "growth.svg", help="plot of the growth")
    flags = parser.parse_args()
    compiler = topologies.compiler_version(topologies.parse("v5e:2x4"))
    depth = "quick depth" if flags.quick or flags.remat else "full depth"
    print(f"{compiler}, {depth}, {datetime.date.today():%d %B %Y}\n")
    if compiler != PEER_COMPILER:
        print(f"MaxText's figures are of {PEER_COMPILER}: they do not compare with this compiler\n", file=sys.stderr)
    overrides = tuple((field, value) for field, _, value in (text.partition("=") for text in flags.set))
    cases = [
        dataclasses.replace(case, overrides=(*case.overrides, *overrides))
        for case in CASES
        if not flags.only or case.key in flags.only
    ]
    if flags.chips:
        print_growth(cases[0], [int(number) for number in flags.chips.split(",")], flags.svg, quick=flags.quick)
        return 0
    if flags.remat:
        compare_remat(cases)
        return 0
    print(HEADER + "\n" + "| --- " * HEADER.count(" | ") + "| --- |", flush=True)
    for case in cases:
        print(to_row(case, *make_plan(case, quick=flags.quick)), flush=True)
    print("\n" + "\n".join(f"{case.key}: {case.note}." for case in cases if case.note))
    print(f"Error: {predict.QUICK_CALIBRATION if flags.quick else predict.FULL_CALIBRATION}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
