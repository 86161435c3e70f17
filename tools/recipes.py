"""Train the recipes that read the standard library, and compare each with the expected score of its config.

python tools/recipes.py [NAME ...] [--folder=runs/recipes]      # such as: python tools/recipes.py bert recurrent:gru

A config file states the scores of its sizes in EXPECTED_SCORE: size -> (field of the validation scores, bound). Bits
per byte must come out below the bound, an accuracy above it. Finished runs are not trained again.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

from llmjax.binding import load_module
from llmjax.errors import suggest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def recipes() -> dict[str, tuple[str, str, float]]:
    """Name, such as "bert:tiny" -> (spec for --config, field of the scores, bound)."""
    recipes = {}
    for path in sorted((ROOT / "configs").glob("*.py")):
        for size, (field, bound) in getattr(load_module(path), "EXPECTED_SCORE", {}).items():
            name, spec = (f"{path.stem}:{size}", f"{path}:{size}") if size else (path.stem, str(path))
            recipes[name] = (spec, field, bound)
    return recipes


def train(spec: str, workdir: pathlib.Path) -> None:
    """Train the recipe, with its output on the terminal."""
    llmjax = pathlib.Path(sys.executable).with_name("llmjax")
    command = [str(llmjax), "train", f"--config={spec}", f"--workdir={workdir}"]
    if (status := subprocess.run(command, check=False).returncode) != 0:
        raise SystemExit(f"{spec}: training ended with status {status}")


def result(workdir: pathlib.Path) -> tuple[dict, dict]:
    """(total validation scores at the last step, run.json) of a finished run."""
    last = max((workdir / "eval").iterdir(), key=lambda path: int(path.name))
    scores = json.loads((last / "validation.json").read_text())["total"]
    return scores, json.loads((workdir / "run.json").read_text())


def main() -> None:
    all_recipes = recipes()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(all_recipes)} (default: all)")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "runs" / "recipes", help="where the runs go")
    flags = parser.parse_args()
    chosen = {}
    for name in flags.names or all_recipes:
        matching = {full: recipe for full, recipe in all_recipes.items() if full == name or full.split(":")[0] == name}
        if not matching:
            near = suggest(name, all_recipes)
            raise SystemExit(f"no recipe {name!r}{near}: choose of {', '.join(all_recipes)}")
        chosen |= matching
    lines, failed = [], []
    for name, (spec, field, bound) in chosen.items():
        print(f"\n=== {name} ===", flush=True)
        workdir, began = flags.folder / name.replace(":", "-"), time.monotonic()
        train(spec, workdir)
        scores, run = result(workdir)
        value = scores[field]
        passed = value < bound if field == "bits_per_byte" else value > bound
        failed += [] if passed else [name]
        baseline = scores.get("baseline_accuracy")
        note = "" if field == "bits_per_byte" else f" (majority-class baseline: {baseline:.3f})"
        lines.append(
            f"{name:<20} {run['parameters']:>12,} {time.monotonic() - began:8.0f} s   {field.replace('_', ' '):<14}"
            f"{value:7.3f} {'<' if field == 'bits_per_byte' else '>'} {bound:.3f}  {'ok' if passed else 'FAILED'}{note}"
        )
    print(f"\n{'recipe':<20} {'parameters':>12} {'time':>10}   score")
    print("\n".join(lines))
    if failed:
        raise SystemExit(f"expected scores not reached: {', '.join(failed)}")


if __name__ == "__main__":
    main()
