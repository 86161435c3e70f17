"""The generated parts of the documentation: the file tree and the tables of models.

python -m tests.docs.generated    writes them into README.md and docs/
"""

import ast
import functools
import pathlib
import re

from llmjax import binding
from llmjax.interop import exporting
from llmjax.models import registry
from llmjax.run import config as run_config
from tests.docs.pages import DOCS, README, ROOT, SOURCE_FOLDERS

ARCHITECTURE, MODELS = DOCS / "architecture.md", DOCS / "models.md"


def file_tree() -> str:
    """The annotated tree: folders, and files with the first line of their docstring. Empty files are left out."""
    lines = []

    def show(folder: pathlib.Path, indent: str) -> None:
        lines.append(f"{indent}{folder.name}/")
        for path in sorted(path for path in folder.glob("*.py") if path.stat().st_size):
            lines.append(f"{indent}  {path.name}".ljust(26) + summary(path))
        for inner in sorted(path for path in folder.iterdir() if any(path.glob("*.py"))):
            show(inner, indent + "  ")

    for name in SOURCE_FOLDERS:
        show(ROOT / name, "")
    return "\n".join(lines)


def summary(path: pathlib.Path) -> str:
    """The first line of a file's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, f"{path} has no docstring"
    return docstring.splitlines()[0]


@functools.cache
def recipes() -> dict[str, list[tuple[str, list[str], list]]]:
    """For each family its (config file, sizes, resolved model configs), the default size first among the configs."""
    by_family = {family: [] for family in registry.FAMILIES}
    for name, specs in run_config.shipped_specs().items():
        if name == "quickstart":
            continue
        models = [run_config.with_vocabulary(run_config.resolve(spec, []), 1000).model for spec in specs]
        by_family[models[0].family].append((f"{name}.py", [spec.partition(":")[2] for spec in specs[1:]], models))
    return by_family


def models_table() -> str:
    """Every config file with its sizes, its objectives and the classes of transformers that it can be exported to."""
    lines = ["| family | config | model | sizes | objectives | transformers |", "|---|---|---|---|---|---|"]
    for family, files in recipes().items():
        for name, sizes, models in files:
            title = re.sub(r" \([^)]*\)", "", summary(ROOT / "configs" / name))
            title = re.split(r"[:;]| in its | from |,? and a tiny", title)[0]
            classes = dict.fromkeys(f"`{cls}`" for model in models if (cls := transformers_class(model)))
            cells = (family, f"`configs/{name}`", title, ", ".join(sizes), ", ".join(models[0].objectives))
            lines.append(f"| {' | '.join(cells)} | {', '.join(classes)} |")
    return "\n".join(lines)


def transformers_class(model) -> str:
    """The class of transformers that a model config is exported to, or '' if there is none."""
    try:
        return exporting.choose_class(model)[0]
    except binding.UserError:
        return ""


def families_table() -> str:
    """The README's table: one row per family."""
    lines = ["| family | configs | objectives |", "|---|---|---|"]
    for family, files in recipes().items():
        names = ", ".join(f"`{name.removesuffix('.py')}`" for name, _, _ in files)
        lines.append(f"| {family} | {names} | {', '.join(files[0][2][0].objectives)} |")
    return "\n".join(lines)


def replace_table(page: pathlib.Path, table: str) -> None:
    """Replace the table of a page whose header line is that of `table`."""
    header = table.splitlines()[0]
    pattern = rf"(?m)^{re.escape(header)}\n(\|.*\n)*"
    assert re.search(pattern, page.read_text()), f"{page} has no table {header}"
    page.write_text(re.sub(pattern, lambda _: table + "\n", page.read_text()))


def main() -> None:
    replace_table(README, families_table())
    replace_table(MODELS, models_table())
    tree = re.compile(r"(?ms)^```\nllmjax/\n.*?^```$")
    ARCHITECTURE.write_text(tree.sub(lambda _: f"```\n{file_tree()}\n```", ARCHITECTURE.read_text()))


if __name__ == "__main__":
    main()
