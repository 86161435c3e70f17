"""Compare loss and gradients on every mesh with one device, and write the table of docs/meshes.md.

python tools/equivalence_table.py

It runs the cells of tests/parallel/equivalence.py on eight emulated devices, and takes some minutes.
"""

import pathlib
import sys

import jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "meshes.md"
BEGIN, END = "<!-- begin: python tools/equivalence_table.py -->\n", "<!-- end -->\n"


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    sys.path.insert(0, str(ROOT))
    from tests.parallel.equivalence import FAMILIES, cells, compare

    rows: dict[str, dict[str, str]] = {}
    for cell in cells():
        loss, gradients = compare(cell)
        print(f"{cell}: loss {loss:.1e}, gradients {gradients:.1e}", flush=True)
        rows.setdefault(cell.mesh, {})[cell.family] = f"{loss:.0e} / {gradients:.0e} ({cell.variant})"
    lines = [f"| mesh | {' | '.join(FAMILIES)} |", "|---" * (1 + len(FAMILIES)) + "|"]
    lines += [f"| {mesh} | {' | '.join(row.get(family, '-') for family in FAMILIES)} |" for mesh, row in rows.items()]
    page = PAGE.read_text()
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(head + BEGIN + "\n" + "\n".join(lines) + "\n\n" + END + tail)


if __name__ == "__main__":
    main()
