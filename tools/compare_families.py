"""Train every family with the same compute budget and print its scores, as a guide to choose an architecture.

python tools/compare_families.py [--flops=2e13] [--folder=runs/families] [--svg=docs/families.svg]

All read the same text with the same tokenizer (that of configs/quickstart.py) and have about as many parameters as the
quickstart's decoder; a mixture of experts has as many active parameters. The budget decides the number of steps. Bits
per byte compare the families that predict text. Encoders and encoder-decoders are compared with the majority-class
baseline. Finished runs are not trained again.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import jax

from llmjax.metrics import read_metrics
from llmjax.plan import count
from llmjax.run import config as run_config

ROOT = pathlib.Path(__file__).resolve().parents[1]
LLMJAX = pathlib.Path(sys.executable).with_name("llmjax")
# Label -> (config, overrides of this family alone).
FAMILIES = {
    "decoder": ("configs/quickstart.py", {}),
    "mixture of experts": ("configs/mixtral.py", {}),
    "RG-LRU": ("configs/recurrent.py:rglru", {}),
    "LSTM": ("configs/recurrent.py:lstm", {}),
    "GRU": ("configs/recurrent.py:gru", {}),
    "RNN": ("configs/recurrent.py:rnn", {}),
    "encoder": ("configs/bert.py", {}),
    "encoder-decoder": ("configs/t5.py", {}),
}
TOKENIZER = {
    "data.tokenizer.kind": "sentencepiece",
    "data.tokenizer.algorithm": "bpe",
    "data.tokenizer.vocab_size": 4096,
}
SHARED = {**TOKENIZER, "data.seq_len": 256, "train.global_batch": 8, "train.log_every": 20, "eval.every": 0}


def prepare(folder: pathlib.Path) -> pathlib.Path:
    """The token store of all runs."""
    store = folder / "store"
    command = [
        LLMJAX,
        "prepare",
        "--config=configs/quickstart.py",
        f"--workdir={folder}",
        f"--config.data.store={store}",
    ]
    subprocess.run([str(word) for word in command], check=True, cwd=ROOT)
    return store


def settings_for_budget(spec: str, overrides: dict, flops: float) -> tuple[dict, float, float]:
    """(overrides, which set the steps of the budget, FLOPs per token, FLOPs per step)."""
    settings = {**SHARED, **overrides}
    config = run_config.resolve(spec, [(field, str(value)) for field, value in settings.items()])
    config = run_config.with_vocabulary(config, 4224)
    target_len = count.target_len(config)
    per_token = run_config.flops_per_token(config, target_len)
    per_step = per_token * target_len * config.train.global_batch
    steps = max(20, round(flops / per_step))
    return {**settings, "train.steps": steps, "checkpoint.every": steps}, per_token, per_step


def train(label: str, spec: str, settings: dict, store: pathlib.Path, workdir: pathlib.Path) -> None:
    print(f"\n=== {label}: {spec}, {settings['train.steps']} steps ===", flush=True)
    command = [str(LLMJAX), "train", f"--config={spec}", f"--workdir={workdir}", f"--config.data.store={store}"]
    command += [f"--config.{field}={value}" for field, value in settings.items()]
    subprocess.run([*command, "--config.sample.prompts=()"], check=True, cwd=ROOT)


def row(
    label: str, workdir: pathlib.Path, per_token: float, per_step: float
) -> tuple[list[str], tuple[list[float], list[float]]]:
    """A line of the table, and the training loss over FLOPs."""
    about, lines = json.loads((workdir / "run.json").read_text()), read_metrics(workdir)
    last = max((workdir / "eval").iterdir(), key=lambda path: int(path.name))
    scores = json.loads((last / "validation.json").read_text())["total"]
    seconds = sorted(line["step_seconds"] for line in lines[1:])[len(lines) // 2]
    rate = sorted(line["tokens_per_second"] for line in lines[1:])[len(lines) // 2]
    bits = "" if scores["bits_per_byte"] is None else f"{scores['bits_per_byte']:.3f}"
    baseline = "" if scores["bits_per_byte"] is not None else f" (baseline {scores['baseline_accuracy']:.1%})"
    cells = [label, f"{about['parameters'] / 1e6:.2f} M", f"{per_token / 1e6:.1f} M", f"{lines[-1]['step']:,}"]
    cells += [f"{seconds:.2f} s", f"{rate:,.0f}", bits, f"{scores['accuracy']:.1%}{baseline}"]
    return cells, ([line["step"] * per_step for line in lines], [line["loss"] for line in lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops", type=float, default=2e13, help="of training, each (default 2e13: the quickstart's)")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "runs" / "families", help="where the runs go")
    parser.add_argument("--svg", type=pathlib.Path, default=ROOT / "docs" / "families.svg", help="where the plot goes")
    parser.add_argument("--only", nargs="*", choices=list(FAMILIES), help="train only these")
    flags = parser.parse_args()
    store, rows, curves = prepare(flags.folder), [], {}
    for label in flags.only or FAMILIES:
        spec, overrides = FAMILIES[label]
        settings, per_token, per_step = settings_for_budget(str(ROOT / spec), overrides, flags.flops)
        workdir = flags.folder / label.replace(" ", "-")
        train(label, str(ROOT / spec), settings, store, workdir)
        cells, curves[label] = row(label, workdir, per_token, per_step)
        rows.append(cells)
    print(f"\n{flags.flops:.3g} FLOPs each, {jax.devices()[0].device_kind}\n")
    head = ["family", "parameters", "FLOPs a token", "steps", "a step", "targets/s", "bits per byte", "accuracy"]
    for line in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(line)} |")
    draw(curves, flags.svg)
    print(f"\nplot: {flags.svg}")


def draw(curves: dict[str, tuple[list[float], list[float]]], path: pathlib.Path) -> None:
    """Training loss over FLOPs. Objectives have different targets, so only lines of one style can be compared."""
    import matplotlib  # pyright: ignore[reportMissingImports]  (the extra `bench`)

    matplotlib.use("svg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    figure, axes = pyplot.subplots(figsize=(9, 5))
    for label, (flops, loss) in curves.items():
        axes.plot(flops, loss, label=label, linestyle="--" if label.startswith("encoder") else "-", linewidth=1.3)
    axes.set(xlabel="training FLOPs", ylabel="training loss, nats a target", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(title="dashed: masked tokens or spans")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
