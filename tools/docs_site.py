"""MkDocs hook that generates the site's page of the README and the API reference, one page per package.

`make docs` runs it through mkdocs.yml.
"""

import pathlib
import re

from mkdocs.config.defaults import MkDocsConfig  # pyright: ignore[reportMissingImports]  (the extra `docs`)
from mkdocs.structure.files import File, Files  # pyright: ignore[reportMissingImports]

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llmjax"
OVERVIEW = "overview.md"


def packages() -> list[pathlib.Path]:
    """The package itself and its subpackages that hold code, in alphabetical order."""
    folders = sorted({path.parent for path in PACKAGE.rglob("*.py") if path.stat().st_size})
    return [folder for folder in folders if public_modules(folder)]


def public_modules(folder: pathlib.Path) -> list[str]:
    """Dotted names of a package's own modules; empty files, `__init__` and names that begin with _ are left out."""
    paths = sorted(path for path in folder.glob("*.py") if path.stat().st_size and not path.name.startswith("_"))
    return [dotted(path.with_suffix("")) for path in paths]


def dotted(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).parts)


def page_name(folder: pathlib.Path) -> str:
    return f"reference/{dotted(folder)}.md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the added pages into the navigation."""
    reference = [{dotted(folder): page_name(folder)} for folder in packages()]
    config.nav = [{"Overview": OVERVIEW}, *(config.nav or []), {"API reference": reference}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages themselves."""
    files.append(File.generated(config, OVERVIEW, content=readme()))
    for folder in packages():
        content = f"# {dotted(folder)}\n\n" + "\n".join(f"::: {module}" for module in public_modules(folder)) + "\n"
        files.append(File.generated(config, page_name(folder), content=content))
    return files


def readme() -> str:
    """The README as a page of docs/. Links to files outside docs/, such as the licence, become plain text."""
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"(?<!!)\[([^\]]*)\]\((?!docs/|https?:|#)[^)]*\)", r"\1", text)
    return text.replace("](docs/", "](")
