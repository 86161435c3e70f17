"""Extract the main text of HTML pages with trafilatura."""

import html as entities
import importlib.metadata
import re

_TITLE = re.compile(r"<title[^>]{0,200}>([^<]{1,1000})", re.I)
_ROOT = re.compile(r"<(?:html|body)\b", re.I)


def extract_main_text(page: str, url: str = "") -> tuple[str, str]:
    """(main text, title) of a page or a fragment; "" if it has none. Paragraphs are separated by line ends."""
    import trafilatura

    match = _TITLE.search(page)
    title = " ".join(entities.unescape(match[1]).split()) if match else ""
    if not _ROOT.search(page):  # lxml would use the first element as the root
        page = f"<html><body>{page}</body></html>"
    try:
        # favor_precision: as in FineWeb (arXiv 2406.17557, section 3.1).
        text = trafilatura.extract(page, url=url or None, favor_precision=True, include_comments=False)
    except Exception:  # whatever a parser raises for a broken page
        text = None
    return text or "", title


def get_package_versions() -> str:
    """The packages that the extracted text depends on, with their versions."""
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("trafilatura", "lxml"))
