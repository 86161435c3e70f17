"""Train a small IsoFLOP grid, fit L = E + A / N^alpha + B / D^beta to it, and compare its advice with `llmjax size`.

python tools/fit_scaling.py [--flops 4e10 1.2e11 3.6e11] [--sizes=5] [--folder=runs/scaling]

For each budget the sizes nearest to 20 tokens a parameter are trained, each to the end of its own cosine schedule, on
the source files of Python's standard library as bytes. N counts the weights that a token is multiplied with (the head,
not the lookup of the embedding), D the tokens of all steps, and a budget is 6 N D. Widths share one learning rate by
muP. Finished runs are read, so a longer grid continues a shorter one. The default took 11 minutes on
one core of a busy machine.
"""

import argparse
import math
import pathlib
import time

from etils import epath

from llmjax.binding import shipped_files
from llmjax.models.decoder_config import DecoderConfig
from llmjax.parallel import hosts
from llmjax.plan import budget as budgets, scaling_law
from llmjax.plan.units import short
from llmjax.run import config as run_config, workdir as workdirs
from llmjax.train import loop

ROOT = pathlib.Path(__file__).resolve().parents[1]
SEQ_LEN, ROWS = 128, 8
VOCABULARY = 259  # bytes and three special tokens
# (layers, width), in order of parameters.
SHAPES = ((1, 16), (1, 32), (2, 32), (2, 48), (2, 64), (3, 64), (3, 80), (4, 96), (4, 128), (5, 160), (6, 192))
TOKENS_PER_PARAMETER = 20  # what Hoffmann et al. found; the grid lies around it
MAX_TOKENS = 12e6  # of a run, or the text of the standard library would repeat several times
SHARED = {
    "data.tokenizer.kind": "bytes",
    "data.seq_len": SEQ_LEN,
    "data.split.near_copies": False,
    "model.scan": False,
    "model.tie_embeddings": False,
    "model.parametrization": "mup",
    "model.base_embed": 32,
    "optimizer.learning_rate": 1e-2,
    "optimizer.schedule": "cosine",
    "optimizer.end_fraction": 0.1,
    "train.global_batch": ROWS,
    "train.log_every": 100,
    "eval.every": 0,
    "eval.batch": 64,
    "sample.prompts": "()",
}


def shape_settings(layers: int, embed: int) -> dict[str, object]:
    """The fields of a model whose heads have 16 dimensions."""
    return {
        "model.num_layers": layers,
        "model.embed": embed,
        "model.num_heads": embed // 16,
        "model.mlp": 8 * round(embed / 3),  # three matrices of this size have the weights of two of 4 x embed
    }


def count_weights(layers: int, embed: int) -> int:
    """N of a shape."""
    fields = {name.removeprefix("model."): value for name, value in shape_settings(layers, embed).items()}
    return DecoderConfig(**fields, vocab_size=VOCABULARY).matmul_params  # pyright: ignore[reportArgumentType]


def choose_shapes(flops: float, count: int) -> list[tuple[int, int]]:
    """The `count` shapes whose tokens per parameter, at this budget, are nearest to 20 by ratio."""

    def distance(shape: tuple[int, int]) -> float:
        weights = count_weights(*shape)
        return abs(math.log(flops / 6 / weights**2 / TOKENS_PER_PARAMETER))

    affordable = [shape for shape in SHAPES if flops / 6 / count_weights(*shape) <= MAX_TOKENS]
    return sorted(sorted(affordable, key=distance)[:count], key=lambda shape: count_weights(*shape))


def train(flops: float, shape: tuple[int, int], folder: epath.Path) -> tuple[float, float, float]:
    """(N, D, validation loss in nats per token) of one run."""
    weights = count_weights(*shape)
    steps = max(round(flops / 6 / weights / (ROWS * SEQ_LEN)), 10)
    settings = {
        **SHARED,
        **shape_settings(*shape),
        "data.store": str(folder / "store"),
        "train.steps": steps,
        "checkpoint.every": steps,
        "optimizer.warmup_steps": max(steps // 20, 1),
    }
    workdir = folder / f"{flops:.3g}-{shape[0]}x{shape[1]}"
    result = workdirs.eval_path(workdir, steps, "validation")
    if not result.exists():
        config = run_config.resolve(str(shipped_files()["quickstart"]), [(k, str(v)) for k, v in settings.items()])
        if status := loop.train(config, workdir):
            raise SystemExit(f"{workdir}: training ended with status {status}")
    return weights, float(steps * ROWS * SEQ_LEN), workdirs.read_json(result)["total"]["loss"]


def describe(rows: list[tuple[float, float, float, float]], draws: int) -> list[str]:
    """The fit of (budget, N, D, loss), with intervals, and its advice beside that of `llmjax size`."""
    columns = [[row[i] for row in rows] for i in (1, 2, 3)]
    law = scaling_law.fit(*columns)
    laws = scaling_law.bootstrap(*columns, draws=draws)
    lines = [f"L = E + A / N^alpha + B / D^beta, {len(rows)} runs; 95% intervals of {draws} resamples of the runs"]
    for name in ("E", "A", "B", "alpha", "beta", "exponent"):
        low, high = scaling_law.interval([getattr(each, name) for each in laws])
        lines.append(f"  {name:<9}{getattr(law, name):10.4g}   [{low:.4g}, {high:.4g}]")
    errors = [abs(math.log(law.loss(n, d) / loss)) for _, n, d, loss in rows]
    lines += [f"  largest error of a run {max(errors):.2%}, mean {sum(errors) / len(errors):.2%}", ""]
    low, high = budgets.for_flops(1e20).parameters, budgets.for_flops(1e22).parameters
    lines += [
        f"compute-optimal parameters grow as FLOPs^{law.exponent:.3f}; `llmjax size`: {math.log10(high / low) / 2:.3f}"
    ]
    lines += [
        "",
        "| FLOPs | N, this law | N, parabola | N, `llmjax size` | tokens a parameter, this law | `llmjax size` |",
    ]
    lines += ["|---|---|---|---|---|---|"]
    spent = sorted({row[0] for row in rows})
    for flops in [*spent, 10 * spent[-1]]:
        runs = [(n, loss) for budget, n, _, loss in rows if budget == flops]
        lowest = scaling_law.parabola_minimum([n for n, _ in runs], [loss for _, loss in runs])
        best, advice = law.optimal_parameters(flops), budgets.for_flops(flops)
        ends = scaling_law.interval([each.optimal_parameters(flops) for each in laws])
        cells = [f"{flops:.3g}", f"{short(best)} [{short(ends[0])}, {short(ends[1])}]"]
        cells += [short(lowest) if lowest else "\u2014", short(advice.parameters), f"{flops / 6 / best**2:.1f}"]
        lines.append(f"| {' | '.join([*cells, f'{advice.tokens / advice.parameters:.1f}'])} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--flops", type=float, nargs="+", default=[4e10, 1.2e11, 3.6e11], help="the budgets, each 6 N D"
    )
    parser.add_argument("--sizes", type=int, default=5, help="models of each budget (default 5)")
    parser.add_argument("--draws", type=int, default=200, help="resamples for the intervals (default 200)")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "runs" / "scaling", help="where the runs go")
    flags = parser.parse_args()
    hosts.initialize(hosts.CPU_THREADS)
    rows, began = [], time.monotonic()
    for flops in flags.flops:
        for shape in choose_shapes(flops, flags.sizes):
            weights, tokens, loss = train(flops, shape, epath.Path(flags.folder))
            rows.append((flops, weights, tokens, loss))
            seconds = time.monotonic() - began
            print(
                f"{flops:.3g} FLOPs, {shape[0]} layers of {shape[1]}: N {weights:,.0f}, D {tokens:,.0f}, "
                f"loss {loss:.4f}, {seconds:.0f} s since the start",
                flush=True,
            )
    print("\n" + "\n".join(describe(rows, flags.draws)))


if __name__ == "__main__":
    main()
