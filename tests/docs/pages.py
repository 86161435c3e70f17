"""The pages that the tests of the documentation read, and what they contain."""

import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [path for folder in (ROOT, DOCS, ROOT / "launch") for path in sorted(folder.glob("*.md"))]
SOURCE_FOLDERS = ("llmjax", "configs", "launch", "tools")


def fenced_blocks(page: pathlib.Path) -> list[str]:
    """The contents of a page's fenced code blocks."""
    return re.findall(r"^```\w*\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def launcher_lines(page: pathlib.Path) -> list[list[str]]:
    """The words of every line in a page's fenced code blocks that starts a script of launch/; without redirections."""
    found = []
    for block in fenced_blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(\S+/python )?launch/", line):
                words = shlex.split(line, comments=True)
                found.append(words[: words.index(">")] if ">" in words else words)
    return found


def commands(page: pathlib.Path) -> list[list[str]]:
    """The arguments of every `llmjax ...` line in a page's fenced code blocks, with or without a launcher."""
    found = [words[words.index("--") + 2 :] for words in launcher_lines(page) if "--" in words]
    for block in fenced_blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(\w+=\S* )?(srun |sbatch .* )?llmjax ", line):
                words = shlex.split(line, comments=True)
                found.append(words[words.index("llmjax") + 1 :])
    return found
