"""What the README and the docs say is so: the tree, every command line, every test and file they name.

python -m tests.test_readme    writes the tree and the table of models into README.md
"""

import ast
import os
import pathlib
import re
import shlex

import pytest

from llmjax import cli, config, flags, run_config
from llmjax.curate.config import Curation
from llmjax.interop import exporting
from llmjax.models import registry

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "launch").glob("*.md"))]
FOLDERS = ("llmjax", "configs", "launch", "tools")


def tree() -> str:
    """The annotated tree: folders, and files with the first line of their docstring. Empty files are left out."""
    lines = []

    def show(folder: pathlib.Path, indent: str) -> None:
        lines.append(f"{indent}{folder.name}/")
        for path in sorted(path for path in folder.glob("*.py") if path.stat().st_size):
            lines.append(f"{indent}  {path.name}".ljust(26) + caption(path))
        for inner in sorted(path for path in folder.iterdir() if any(path.glob("*.py"))):
            show(inner, indent + "  ")

    for name in FOLDERS:
        show(ROOT / name, "")
    return "\n".join(lines)


def models() -> str:
    """The table of models: every config file, by family, with the classes of transformers that its sizes become."""
    lines = ["| family | config | what | sizes | objectives | transformers |", "|---|---|---|---|---|---|"]
    for family in registry.FAMILIES:
        for path in run_config.files(ROOT / "configs"):
            specs = config.specs(path)
            found = [run_config.with_vocabulary(run_config.resolve(spec, []), 1000).model for spec in specs]
            if found[0].family != family or path.stem == "quickstart":
                continue
            sizes = ", ".join(spec.rpartition(":")[2] for spec in specs[1:])
            what = re.split(r"[:;]| in its | from |,? and a tiny", re.sub(r" \([^)]*\)", "", caption(path)))[0]
            classes = dict.fromkeys(f"`{exporting.choose(model)[0]}`" for model in found if expressible(model))
            told = (family, f"`configs/{path.name}`", what, sizes, ", ".join(found[0].objectives), ", ".join(classes))
            lines.append(f"| {' | '.join(told)} |")
    return "\n".join(lines)


def expressible(model) -> bool:
    try:
        exporting.choose(model)
    except config.UserError:
        return False
    return True


def caption(path: pathlib.Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, f"{path} opens with no caption"
    return docstring.splitlines()[0]


def blocks(page: pathlib.Path) -> list[str]:
    """The fenced blocks of a page."""
    return re.findall(r"^```\w*\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: pathlib.Path) -> list[list[str]]:
    """The arguments of every `llmjax ...` line in a page's fenced blocks, continued lines joined."""
    found = []
    for block in blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(\w+=\S* )?(srun )?(llmjax|launch/local.py) ", line):
                words = shlex.split(line, comments=True)
                found.append(words[words.index("llmjax") + 1 :])
    return found


COMMANDS = [(page.name, arguments) for page in PAGES for arguments in commands(page)]


class Parsed(Exception):
    """Stops a verb once its flags are read."""


def test_the_tree_is_that_of_the_files():
    assert any(block == tree() + "\n" for block in blocks(README)), "run python -m tests.test_readme"


def test_the_table_of_models_is_that_of_the_registry():
    assert models() in README.read_text(), "run python -m tests.test_readme"


def test_commands_were_found():
    """The first page shows every verb."""
    assert {arguments[0] for name, arguments in COMMANDS if name == "README.md"} == set(cli.VERBS)


@pytest.mark.parametrize("arguments", [c for _, c in COMMANDS], ids=[f"{n}: {' '.join(c)[:60]}" for n, c in COMMANDS])
def test_every_command_is_understood(arguments, monkeypatch):
    """Its flags exist, and so do its config file and fields, with values of the right types."""
    parse = flags.Parser.parse_args

    def stop(parser, rest):
        raise Parsed(parse(parser, rest))

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(flags.Parser, "parse_args", stop)
    with pytest.raises(Parsed) as parsed:
        cli.run(arguments)
    given = parsed.value.args[0]
    words = [word.removeprefix("--config.") for word in arguments if word.startswith("--config.")]
    overrides = [(field, value) for field, _, value in (word.partition("=") for word in words)]
    if arguments[0] == "curate":
        tree = config.as_tree(config.load_file("configs/curate.py"))
        assert config.bind_overridden(Curation, tree, overrides, inputs="curate.inputs").curate.inputs
        return
    resolved = run_config.resolve(getattr(given, "config", None) or "configs/quickstart.py", overrides)
    assert arguments[0] == "size" or all(source.path for source in resolved.data.sources.values())


def test_every_section_asked_for_exists(capsys):
    for _, arguments in COMMANDS:
        if arguments[0] == "fields":
            assert cli.run(arguments) == 0
            assert "--config." in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_and_files_exist(page):
    text = page.read_text()
    for file, test in re.findall(r"`(tests/\S+?\.py)::(\w+)`", text):
        assert f"def {test}(" in (ROOT / file).read_text(), f"{page.name} names {file}::{test}"
    for file in re.findall(r"`((?:llmjax|configs|launch|tools|tests)/[\w/.]+\.py)`", text):
        assert (ROOT / file).is_file(), f"{page.name} names {file}"
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert os.path.exists(page.parent / target), f"{page.name} links to {target}"


def test_every_environment_variable_is_documented():
    sources = [path.read_text() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    used = {name for text in sources for name in re.findall(r"LLMJAX_[A-Z_]+\b", text)}
    documented = set(re.findall(r"LLMJAX_[A-Z_]+\b", (ROOT / "docs" / "running.md").read_text()))
    assert used == documented


if __name__ == "__main__":
    shown = next(block for block in blocks(README) if block.startswith(("llmjax/\n", "TREE")))
    text = README.read_text().replace(f"```\n{shown}```", f"```\n{tree()}\n```")
    README.write_text(re.sub(r"(?m)^\| family \| config .*\n(\|.*\n)*", models() + "\n", text))
