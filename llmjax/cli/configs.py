"""`llmjax configs`: the configs that ship with llmjax, with their sizes."""

import inspect
import pathlib
import textwrap

from llmjax.binding import load_module, shipped_files
from llmjax.cli.flags import make_parser
from llmjax.errors import UserError, suggest


def configs(arguments: list[str]) -> int:
    """List the shipped configs."""
    parser = make_parser(
        "configs",
        """\
        List the configs that ship with llmjax: the name for --config, its sizes, what it trains. With a NAME, print its
        commands and its file, which you can copy, change and use as --config=FILE.py.""",
        "llmjax configs\n  llmjax configs llama",
        overrides=False,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="print one config in detail")
    flags = parser.parse_args(arguments)
    files = shipped_files()
    if flags.name is None:
        for name, path in files.items():
            print(_describe(name, path))
        return 0
    if flags.name not in files:
        near = suggest(flags.name.lower(), files)
        raise UserError(f"there is no config {flags.name!r}{near}; choose one of {', '.join(files)}")
    path = files[flags.name]
    module = load_module(path)
    print(f"{inspect.getdoc(module)}\n")
    if sizes := ", ".join(getattr(module, "SIZES", ())):
        print(f"sizes: {sizes}")
    print(f"file:  {path}")
    return 0


def _describe(name: str, path: pathlib.Path) -> str:
    """`name   summary`, and below it the sizes."""
    module = load_module(path)
    lines = [f"{name:<12} {(inspect.getdoc(module) or '').splitlines()[0]}"]
    if sizes := ", ".join(getattr(module, "SIZES", ())):
        lines += textwrap.wrap(f"sizes: {sizes}", 108, initial_indent=" " * 13, subsequent_indent=" " * 20)
    return "\n".join(lines)
