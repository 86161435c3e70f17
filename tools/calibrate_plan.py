"""Predict the step of published training runs, and print it beside the measured one: how far `llmjax plan` is off.

    python tools/calibrate_plan.py                   the quick depth of every run: minutes
    python tools/calibrate_plan.py --full            compile to the end: minutes each
    python tools/calibrate_plan.py --only=8B-v6e-8

No TPU is needed (extra `plan`). The runs are MaxText's: each is a step time or TFLOP/s that its authors measured and
published, with its model, chips, rows and arguments. What is compiled is our step of the same model, mesh, rows and
sequence. Its remat policy is the one that fits and whose executed FLOPs are nearest: `full` for runs that recompute
attention, `offload` where that does not fit, `attention_mlp` for the two that keep the results of matmuls. So a ratio
mixes two things: how far the predictor is off, and how much our program differs from theirs, which an older compiler
compiled too.

Left out: Mixtral, whose published runs drop tokens, and Gemma 3, because the program's text does not tell how often a
layer takes its local and its global branch.

`llmjax plan` states the result (llmjax/plan/predict.py), and docs/plan.md holds the table.
"""

import argparse
import dataclasses
import datetime
import statistics
import sys

from llmjax.models.decoder_config import DecoderConfig
from llmjax.plan import plan as plans, topology as topologies
from llmjax.plan.plan import Plan
from llmjax.run import config as run_config
from llmjax.run.config import RunConfig

# github.com/AI-Hypercomputer/tpu-recipes, commit c8cfe2f: arguments and the log line of each run.
_RECIPES = "tpu-recipes training/trillium/"
# github.com/AI-Hypercomputer/maxtext, commit 48445cf: tables of TFLOP/s; arguments in the .sh files beside them.
_CONFIGS = "maxtext src/MaxText/configs/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A published run and our nearest config.

    seconds   of a step, as published; None: from the TFLOP/s
    tflops    a chip and second, as published; MaxText counted attention without the causal half
    rows      of a chip
    remat     our policy nearest to the run's
    source    file that publishes it
    """

    key: str
    config: str
    topology: str
    rows: int
    seq_len: int
    vocab_size: int
    remat: str
    source: str
    seconds: float | None = None
    tflops: float | None = None
    overrides: tuple[tuple[str, str], ...] = ()

    def resolve(self) -> RunConfig:
        """Our config, sharded over all chips as the published runs are."""
        given = (
            ("model.vocab_size", str(self.vocab_size)),
            ("model.remat", self.remat),
            ("data.seq_len", str(self.seq_len)),
            ("train.global_batch", str(self.rows * topologies.parse(self.topology).num_chips)),
            ("mesh.data", "1"),
            ("mesh.fsdp", "-1"),
            ("mesh.tensor", "1"),
            *self.overrides,
        )
        return run_config.resolve(self.config, given)

    def measured_seconds(self, config: RunConfig) -> float:
        """Seconds of a step, as published or by MaxText's count of FLOPs."""
        if self.seconds is not None:
            return self.seconds
        model = config.model
        assert self.tflops is not None and isinstance(model, DecoderConfig)
        attention = 12 * model.num_layers * model.num_heads * model.head_size * self.seq_len
        flops = (6 * model.matmul_params + attention) * self.rows * self.seq_len
        return flops / (self.tflops * 1e12)


def _llama_8b(chips: int, topology: str, rows: int, seconds: float) -> Run:
    """MaxText moves the layers' inputs, q, k, v and the projected attention to the host, and runs the kernel twice."""
    return Run(
        key=f"8B-v6e-{chips}",
        config="llama:8B",
        topology=topology,
        rows=rows,
        seq_len=8192,
        vocab_size=128_256,
        remat="full",
        seconds=seconds,
        source=f"{_RECIPES}Llama3.1-8B-MaxText/v6e-{chips}/README.md",
    )


def _llama_70b(chips: int, topology: str, rows: int, seconds: float, *overrides: tuple[str, str]) -> Run:
    """MaxText moves the layers' inputs, q, k and v to the host; ours moves the attention's output as well."""
    return Run(
        key=f"70B-v6e-{chips}",
        config="llama:70B",
        topology=topology,
        rows=rows,
        seq_len=8192,
        vocab_size=128_256,
        remat="offload",
        seconds=seconds,
        overrides=overrides,
        source=f"{_RECIPES}Llama3.1-70B-MaxText/v6e-{chips}/README.md",
    )


def _scaled(
    size: str, topology: str, rows: int, tflops: float, remat: str, *shape: tuple[str, str], tensor: int = 1
) -> Run:
    """One of MaxText's decoders for benchmarks: `global_parameter_scale` multiplies the sizes of its base.yml."""
    chip, chips = topology.partition(":")[0], topologies.parse(topology).num_chips
    fixed = (("model.num_heads", "64"), ("model.num_kv_heads", "64"), ("model.head_dim", "128"), ("model.mlp", "28672"))
    return Run(
        key=f"{size}-{chip}-{chips}",
        config="llama:8B",
        topology=topology,
        rows=rows,
        seq_len=2048,
        vocab_size=32_000,
        remat=remat,
        tflops=tflops,
        overrides=(*fixed, *shape, ("mesh.tensor", str(tensor))),
        source=f"{_CONFIGS}{chip}/README.md",
    )


_LAYERS_32, _LAYERS_64 = ("model.num_layers", "32"), ("model.num_layers", "64")
_EMBED_4096, _EMBED_8192 = ("model.embed", "4096"), ("model.embed", "8192")
RUNS = (
    _llama_8b(8, "v6e:2x4", 3, 3.443),
    _llama_8b(16, "v6e:4x4", 3, 3.393),
    _llama_8b(32, "v6e:4x8", 3, 3.495),
    _llama_8b(64, "v6e:8x8", 5, 5.652),
    _llama_8b(128, "v6e:8x16", 4, 4.602),
    _llama_8b(256, "v6e:16x16", 4, 4.546),
    _llama_70b(32, "v6e:4x8", 2, 17.790, ("model.param_dtype", "bfloat16")),
    _llama_70b(64, "v6e:8x8", 2, 18.688),
    _llama_70b(128, "v6e:8x16", 4, 34.786),
    _llama_70b(256, "v6e:16x16", 5, 42.656),
    Run(
        key="Llama2-70B-v6e-256",
        config="llama:70B",
        topology="v6e:16x16",
        rows=2,  # the tokens of its log line; its README says 3
        seq_len=4096,
        vocab_size=32_000,
        remat="full",
        seconds=9.052,
        source=f"{_RECIPES}Llama2-70B-MaxText/README.md",
    ),
    Run(
        key="Mistral-7B-v6e-8",
        config="mistral:7B",
        topology="v6e:2x4",
        rows=6,
        seq_len=8192,
        vocab_size=32_000,
        remat="offload",
        seconds=6.320,
        overrides=(("model.window", "0"),),  # MaxText's has no window
        source=f"{_RECIPES}Mistral-7B-MaxText/README.md",
    ),
    _scaled("16B", "v5e:16x16", 6, 120, "full", _LAYERS_32, _EMBED_4096),
    _scaled("32B", "v5e:16x16", 4, 132, "full", _LAYERS_32, _EMBED_8192),
    _scaled("32B", "v5p:4x4x4", 6, 328, "attention_mlp", _LAYERS_32, _EMBED_8192, tensor=4),
    _scaled("64B", "v5p:4x4x4", 3, 323, "attention_mlp", _LAYERS_64, _EMBED_8192, tensor=4),
)
HEADER = "| run | rows | remat | GiB | executed / model | predicted s | published s | predicted / published |"


def to_row(run: Run, plan: Plan) -> str:
    """A row of the table."""
    measured, gib = run.measured_seconds(plan.config), plan.program.memory.total / 2**30
    executed = plan.costs.executed_flops / plan.model_flops
    head = f"| {run.key} | {run.rows} | {run.remat} | {gib:.1f} | {executed:.2f}"
    if plan.step_seconds is None:
        return f"{head} | does not fit | {measured:.2f} | |"
    return f"{head} | {plan.step_seconds:.2f} | {measured:.2f} | {plan.step_seconds / measured:.2f} |"


def summarize(ratios: list[float]) -> str:
    """The line that predict.QUICK_CALIBRATION and FULL_CALIBRATION repeat."""
    return (
        f"runs {len(ratios)}, median {statistics.median(ratios):.2f}, lowest {min(ratios):.2f}, "
        f"highest {max(ratios):.2f}"
    )


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="compile to the end: minutes each")
    parser.add_argument("--only", default="", help="keys of runs, with commas")
    flags = parser.parse_args()
    known = {run.key: run for run in RUNS}
    keys = flags.only.split(",") if flags.only else list(known)
    if unknown := set(keys) - set(known):
        parser.error(f"--only={','.join(sorted(unknown))}: choose of {', '.join(known)}")
    depth = "full depth" if flags.full else "quick depth"
    compiler = topologies.compiler_version(topologies.parse("v5e:2x4"))
    print(f"{compiler}, {depth}, {datetime.date.today():%d %B %Y}\n")
    print(HEADER + "\n" + "| --- " * HEADER.count(" | ") + "| --- |", flush=True)
    ratios = []
    for key in keys:
        plan = plans.make_plan(known[key].resolve(), topologies.parse(known[key].topology), quick=not flags.full)
        print(to_row(known[key], plan), flush=True)
        if plan.step_seconds is not None:
            ratios.append(plan.step_seconds / known[key].measured_seconds(plan.config))
    if ratios:
        print(f"\n{summarize(ratios)}")
    print("\n" + "\n".join(f"{key}: {known[key].source}" for key in keys), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
