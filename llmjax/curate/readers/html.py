"""Extract the main text of HTML pages with trafilatura; detect pages among untyped records."""

import html as entities
import importlib.metadata
import re
from typing import NamedTuple

_TITLE = re.compile(r"<title[^>]{0,200}>([^<]{1,1000})", re.I)
_ROOT = re.compile(r"<(?:html|body)\b", re.I)


class Extracted(NamedTuple):
    """The text of a page: paragraphs separated by line ends, "" where it has none; and its title."""

    text: str
    title: str


def main_text(page: str, url: str = "") -> Extracted:
    """The main text of a page or a part of one. The same page gives the same text, by the same version."""
    import trafilatura

    found = _TITLE.search(page)
    title = " ".join(entities.unescape(found[1]).split()) if found else ""
    if not _ROOT.search(page):  # lxml would take the first element for the root
        page = f"<html><body>{page}</body></html>"
    try:
        # For precision, as FineWeb was made (arXiv 2406.17557, section 3.1).
        text = trafilatura.extract(page, url=url or None, favor_precision=True, include_comments=False)
    except Exception:  # whatever a parser raises for a broken page
        text = None
    return Extracted(text or "", title)


def version() -> str:
    """What extraction depends on: another version may extract another text."""
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("trafilatura", "lxml"))
