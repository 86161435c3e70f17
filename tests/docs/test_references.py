"""Whatever the documentation refers to exists: links, files, folders, tests, make targets and environment variables."""

import os
import re

import pytest

import llmjax
from tests.docs.pages import DOCS, PAGES, README, ROOT, SOURCE_FOLDERS, fenced_blocks

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@every_page
def test_links_point_to_files_and_headings(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        path = page.parent / target if target else page
        assert os.path.exists(path), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", path.read_text())
            assert anchor in map(slug, headings), f"{page.name} links to {target}#{anchor}"


def slug(heading: str) -> str:
    """The anchor of a heading, by the rule that GitHub and MkDocs share for ASCII."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


@every_page
def test_named_tests_objects_files_and_folders_exist(page):
    text = page.read_text()
    for file, test in re.findall(r"`(tests/\S+?\.py)::(\w+)`", text):
        assert f"def {test}(" in (ROOT / file).read_text(), f"{page.name} names {file}::{test}"
    for name, file in re.findall(r"`(\w+)`\s+(?:in|of)\s+`([\w/]+\.py)`", text):
        assert re.search(rf"(?m)^(?:def |class )?{name}\b", (ROOT / file).read_text()), (
            f"{page.name} names {name} in {file}"
        )
    for name in re.findall(r"`((?:llmjax|configs|docs|launch|tools|tests)/[\w/.]*)`", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}"
    for name in re.findall(r"(?:python|bash) ((?:tools|launch|tests)/[\w/.]+)", text):
        assert (ROOT / name).is_file(), f"{page.name} names {name}"


@every_page
def test_no_page_has_a_line_of_a_merge_conflict(page):
    assert re.findall(r"(?m)^(?:<{7}|\|{7}|={7}|>{7})(?: .*)?$", page.read_text()) == []


@every_page
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    code = "\n".join([*fenced_blocks(page), *re.findall(r"`[^`\n]+`", page.read_text())])
    for target in re.findall(r"(?m)^`?make (?:[A-Z]+=\S+ )?([\w-]+)", code):
        assert re.search(rf"(?m)^{target}:", makefile), f"{page.name} names make {target}"


def test_the_citation_names_this_version():
    assert f"version: {llmjax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_workflows_name_make_targets():
    makefile = (ROOT / "Makefile").read_text()
    for workflow in (ROOT / ".github" / "workflows").glob("*.yml"):
        for target in re.findall(r"run: make (?:[A-Z]+=\S+ )?(\w+)", workflow.read_text()):
            assert re.search(rf"(?m)^{target}:", makefile), f"{workflow.name} names make {target}"


def test_every_page_is_listed():
    """In the index of the documentation, and in the navigation of the site."""
    index, site = (DOCS / "index.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for page in DOCS.glob("*.md"):
        assert page.name == "index.md" or f"]({page.name})" in index, f"{page.name} is missing in docs/index.md"
        assert f": {page.name}\n" in site, f"{page.name} is missing in mkdocs.yml"


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= 12 * 1024


def test_every_environment_variable_is_documented():
    sources = [path.read_text() for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*.py")]
    used = {name for text in sources for name in re.findall(r"LLMJAX_[A-Z_]+\b", text)}
    documented = set(re.findall(r"LLMJAX_[A-Z_]+\b", (DOCS / "running.md").read_text()))
    assert used == documented
