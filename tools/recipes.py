"""Train the recipes that need no text of their own, and hold each to the score that its config states.

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
    found = {}
    for path in sorted((ROOT / "configs").glob("*.py")):
        for size, (field, bound) in getattr(load_module(path), "EXPECTED_SCORE", {}).items():
            name, spec = (f"{path.stem}:{size}", f"{path}:{size}") if size else (path.stem, str(path))
            found[name] = (spec, field, bound)
    return found


def train(spec: str, workdir: pathlib.Path) -> None:
    """Run the recipe to its end, with its progress on the terminal."""
    llmjax = pathlib.Path(sys.executable).with_name("llmjax")
    command = [str(llmjax), "train", f"--config={spec}", f"--workdir={workdir}"]
    if (status := subprocess.run(command, check=False).returncode) != 0:
        raise SystemExit(f"{spec}: training ended with status {status}")


def result(workdir: pathlib.Path) -> tuple[dict, dict]:
    """(validation scores in all at the last step, run.json) of a finished run."""
    last = max((workdir / "eval").iterdir(), key=lambda path: int(path.name))
    scores = json.loads((last / "validation.json").read_text())["total"]
    return scores, json.loads((workdir / "run.json").read_text())


def main() -> None:
    known = recipes()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)} (default: all)")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "runs" / "recipes", help="where the runs go")
    flags = parser.parse_args()
    chosen = {}
    for name in flags.names or known:
        matching = {full: recipe for full, recipe in known.items() if full == name or full.split(":")[0] == name}
        if not matching:
            raise SystemExit(f"no recipe {name!r}{suggest(name, known)}: known are {', '.join(known)}")
        chosen |= matching
    lines, failed = [], []
    for name, (spec, field, bound) in chosen.items():
        print(f"\n=== {name} ===", flush=True)
        workdir, began = flags.folder / name.replace(":", "-"), time.monotonic()
        train(spec, workdir)
        scores, run = result(workdir)
        value = scores[field]
        good = value < bound if field == "bits_per_byte" else value > bound
        failed += [] if good else [name]
        guess = scores.get("baseline_accuracy")
        beside = "" if field == "bits_per_byte" else f" (commonest target: {guess:.3f})"
        lines.append(
            f"{name:<20} {run['parameters']:>12,} {time.monotonic() - began:8.0f} s   {field.replace('_', ' '):<14}"
            f"{value:7.3f} {'<' if field == 'bits_per_byte' else '>'} {bound:.3f}  {'ok' if good else 'MISSED'}{beside}"
        )
    print(f"\n{'recipe':<20} {'parameters':>12} {'time':>10}   reaches")
    print("\n".join(lines))
    if failed:
        raise SystemExit(f"missed what they state: {', '.join(failed)}")


if __name__ == "__main__":
    main()
