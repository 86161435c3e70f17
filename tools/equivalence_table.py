"""Compare loss and gradients on every mesh with one device, and write the table of docs/meshes.md.

python tools/equivalence_table.py [--processes=2]

It runs the cells of tests/parallel/equivalence.py on eight emulated devices, which takes some minutes.
"""

import argparse
from concurrent import futures
import multiprocessing
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "meshes.md"
BEGIN, END = "<!-- begin: python tools/equivalence_table.py -->\n", "<!-- end -->\n"

sys.path.insert(0, str(ROOT))

import tests.conftest  # noqa: F401  first, also in the processes: eight emulated devices, and fast compilation
from tests.parallel.equivalence import FAMILIES, cells, compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2, help="cells that are measured at one time")
    args = parser.parse_args()

    rows: dict[str, dict[str, str]] = {}
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        for cell, (loss, gradients) in zip(cells(), pool.map(compare, cells()), strict=True):
            print(f"{cell}: loss {loss:.1e}, gradients {gradients:.1e}", flush=True)
            rows.setdefault(cell.mesh, {})[cell.family] = f"{loss:.0e} / {gradients:.0e} ({cell.variant})"
    lines = [f"| mesh | {' | '.join(FAMILIES)} |", "|---" * (1 + len(FAMILIES)) + "|"]
    lines += [f"| {mesh} | {' | '.join(row.get(family, '-') for family in FAMILIES)} |" for mesh, row in rows.items()]
    page = PAGE.read_text()
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(head + BEGIN + "\n" + "\n".join(lines) + "\n\n" + END + tail)


if __name__ == "__main__":
    main()
