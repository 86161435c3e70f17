"""The main text of an HTML page, by trafilatura where it is installed, else by a plain extractor that needs nothing."""

import functools
import html as entities
import importlib.metadata
import importlib.util
import re
from typing import NamedTuple

from llmjax.config import UserError, suggest
from llmjax.curate import markup
from llmjax.curate.config import ExtractConfig
from llmjax.curate.markup import Block

METHODS = ("auto", "trafilatura", "plain")
_TITLE = re.compile(r"<title[^>]{0,200}>([^<]{1,1000})", re.I)
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]")  # letters of words without spaces, two to a word
_FEW = 8  # words of running text with fewer are no paragraph
_GAP = 12.0  # words of text that a block of furniture outweighs


class Extracted(NamedTuple):
    """The text of a page: paragraphs parted by line ends, '' where it has none; its title; the method that ran."""

    text: str
    title: str
    method: str


def check(config: ExtractConfig, where: str = "curate.extract") -> None:
    """Raises UserError for a method that is not offered, or not installed."""
    if config.method not in METHODS:
        raise UserError(
            f"{where}.method={config.method!r}: expected one of {', '.join(METHODS)}{suggest(config.method, METHODS)}"
        )
    if config.method == "trafilatura" and not _installed():
        raise UserError(
            f"{where}.method='trafilatura': it is not installed; run `pip install llmjax[web]`, or use 'auto'"
        )


def main_text(page: str, url: str = "", method: str = "auto") -> Extracted:
    """The main text of a page. The same page gives the same text, by the same method and version.

    Where trafilatura fails on a page, or finds nothing, the plain extractor is used, and named.
    Raises UserError where `method` demands what is not installed.
    """
    check(ExtractConfig(method=method))
    found = _TITLE.search(page)
    title = " ".join(entities.unescape(found[1]).split()) if found else ""
    if method != "plain" and _installed() and (text := _by_trafilatura(page, url)):
        return Extracted(text, title, "trafilatura")
    return Extracted(_plainly(page), title, "plain")


def version(method: str) -> str:
    """What `method` stands for here: another one may extract another text."""
    if method == "plain" or not _installed():
        return "plain"
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("trafilatura", "lxml"))


@functools.cache
def _installed() -> bool:
    # trafilatura needs lxml_html_clean, by an extra that lxml 6.1 does not have, so that it may be absent.
    return all(importlib.util.find_spec(name) for name in ("trafilatura", "lxml_html_clean"))


def _by_trafilatura(page: str, url: str) -> str:
    import trafilatura  # pyright: ignore[reportMissingImports]

    try:
        # For precision, as FineWeb was made (arXiv 2406.17557, section 3.1).
        return trafilatura.extract(page, url=url or None, favor_precision=True, include_comments=False) or ""
    except Exception:  # whatever a parser of broken pages raises, the page is read by the other extractor
        return ""


def _plainly(page: str) -> str:
    """The stretch of blocks with most running text, without its furniture.

    A block counts its words where it is running text, and less than nothing where it is links, a button or a caption;
    the main text is the stretch with the largest sum (Pasternack and Roth, Extracting article text from the web with
    maximum subsequence segmentation, WWW 2009).
    """
    blocks = markup.blocks(page)
    scores = [_score(block) for block in blocks]
    begin, end = _best_stretch(scores)
    kept = [
        block.text for block, score in zip(blocks[begin:end], scores[begin:end], strict=True) if _stays(block, score)
    ]
    return "\n".join(kept)


def _score(block: Block) -> float:
    words = len(block.text.split()) + len(_UNSPACED.findall(block.text)) / 2
    if block.furniture or block.linked * 2 > len(block.text):
        return -_GAP
    if block.tag in markup.HEADINGS:
        return 0.0
    if words < _FEW:
        return -_GAP / 4
    return words * (1.0 if block.tag in ("p", "pre", "blockquote") else 0.5)


def _stays(block: Block, score: float) -> bool:
    return score >= 0 or (not block.furniture and block.tag in ("p", "li", "pre", "blockquote") and not block.linked)


def _best_stretch(scores: list[float]) -> tuple[int, int]:
    """(begin, end) of the stretch with the largest sum; the first of several; empty where no score is positive."""
    best, total, start, found = 0.0, 0.0, 0, (0, 0)
    for index, score in enumerate(scores):
        total += score
        if total <= 0:
            total, start = 0.0, index + 1
        elif total > best:
            best, found = total, (start, index + 1)
    return found
