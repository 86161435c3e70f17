"""HTML read as blocks of text, in linear time whatever the page: a tag is taken as it comes, as browsers do."""

from collections.abc import Iterator
import html
import re
from typing import NamedTuple

HEADINGS = frozenset(["h1", "h2", "h3", "h4", "h5", "h6"])
# Elements that begin and end a block of text.
_BREAKING = """
    address article aside blockquote body caption center dd details dialog dir div dl dt fieldset figcaption figure
    footer form header hr html legend li main menu nav ol p pre section summary table tbody td tfoot th thead tr ul
"""
_BLOCK = HEADINGS | frozenset(_BREAKING.split())
_EMPTY = "area base br col embed hr img input link meta param source track wbr"
_VOID = frozenset(_EMPTY.split())
_RAW = ("script", "style", "textarea", "noscript", "iframe", "title", "template", "svg", "math", "select", "object")
_AROUND_TAGS = "nav footer aside form header button figcaption dialog menu label"
_FURNITURE = frozenset(_AROUND_TAGS.split())
# An element of the same kind, and these, end an open one that lacks its end tag.
_ENDED_BY = {"p": _BLOCK, "li": {"li"}, "dt": {"dt", "dd"}, "dd": {"dt", "dd"}, "td": {"td", "th", "tr"}}
_ENDED_BY |= {"th": {"td", "th", "tr"}, "tr": {"tr", "tbody"}, "option": {"option"}}
# Names of classes and ids of what stands around the main text.
_AROUND = re.compile(
    r"comment|footer|foot-|sidebar|side-bar|\bnav|navbar|navigation|breadcrumb|\bmenu|\bshar(?:e|ing)|social|related"
    r"|recommend|promo|newsletter|subscri|sign-?up|cookie|consent|banner|popup|modal|widget|advert|\bads?\b|\bad-|-ad\b"
    r"|sponsor|outbrain|taboola|disqus|byline|author-|\btags?\b|\bmeta\b|toolbar|pagination|pager|caption|credit|login"
    r"|more-|read-?next|trending|popular|disclaimer|copyright|skip-|screen-reader|visually-hidden|hidden|print-only",
    re.I,
)
_WITHIN = re.compile(r"article|body|content|main|story|post\b|entry|page|text|column|hentry", re.I)
_NAMED = re.compile(
    r"""\b(class|id|role|itemprop|style|hidden|aria-hidden)\b(?:\s*=\s*("[^"]*"|'[^']*'|[^\s"'>]+))?""", re.I
)
_TAG = re.compile(r"</?([a-zA-Z][a-zA-Z0-9:-]{0,40})")
_TAG_END = re.compile(r"""(?:[^"'>]++|"[^"]*+"|'[^']*+')*+>""")
_TAG_BYTES = 1 << 12  # an end of a tag is sought with regard to quotes in so many characters
_RAW_ENDS = {name: re.compile(rf"</{name}\b[^>]*>", re.I) for name in _RAW}
_RUNNING = 80  # characters of a block of running text
# The share of a page's running text that furniture holds at most, and that its comments do.
_MOST, _MOST_COMMENTS = 0.4, 0.9
_SPACES = re.compile(r"\s+")


class Block(NamedTuple):
    """A stretch of text between two tags that break lines.

    tag        the innermost element that breaks lines
    linked     characters of it that are within links
    furniture  whether it stands in an element such as nav, or in one whose class or id says so
    """

    text: str
    tag: str
    linked: int
    furniture: bool


def blocks(page: str) -> list[Block]:
    """The blocks of a page, in order."""
    found: list[Block] = []
    roots: list[tuple[int, ...]] = []  # of each block: the pieces of furniture that it stands in, by number
    comments: set[int] = set()
    open_tags: list[str] = []
    around: list[tuple[int, ...]] = []  # of each open tag, likewise
    number = 0
    parts: list[str] = []
    linked, links = 0, 0

    def flush() -> None:
        nonlocal linked
        if not parts:
            return
        text = html.unescape("".join(parts))
        tag = next((tag for tag in reversed(open_tags) if tag in _BLOCK), "body")
        text = text.strip("\n").rstrip() if tag == "pre" else _SPACES.sub(" ", text).strip()
        if text:
            found.append(Block(text, tag, min(linked, len(text)), False))
            roots.append(around[-1] if around else ())
        parts.clear()
        linked = 0

    def close(index: int) -> None:
        nonlocal links
        links -= open_tags[index:].count("a")
        del open_tags[index:], around[index:]

    for text, name, ending, attributes in _tokens(page):
        if text:
            parts.append(text)
            linked += len(text) if links else 0
        if not name:
            continue
        breaks = name in _BLOCK
        if breaks or name == "br":
            if name == "br" and "pre" not in open_tags[-3:]:
                parts.append(" ")
                continue
            if name == "br":
                parts.append("\n")
                continue
            flush()
        if ending:
            if name in open_tags[-64:]:
                close(len(open_tags) - 1 - open_tags[::-1].index(name))
            continue
        if name in _VOID or (attributes.endswith("/") and not breaks):
            continue
        for index in range(len(open_tags) - 1, max(len(open_tags) - 8, -1), -1):
            if name in _ENDED_BY.get(open_tags[index], ()):
                close(index)
                break
            if open_tags[index] in _BLOCK:
                break
        if len(open_tags) < 2000:
            open_tags.append(name)
            within = around[-1] if around else ()
            if kind := _furniture(name, attributes):
                number += 1
                within = (*within[-30:], number)
                if kind == "comments":
                    comments.add(number)
            around.append(within)
            links += name == "a"
    flush()
    true = _true_furniture(found, roots, comments)
    return [
        block._replace(furniture=not true.isdisjoint(within)) if within else block
        for block, within in zip(found, roots, strict=True)
    ]


def _true_furniture(found: list[Block], roots: list[tuple[int, ...]], comments: set[int]) -> set[int]:
    """The pieces of furniture that hold little of the page's running text: what holds much of it is misnamed."""
    total, held = 0, dict.fromkeys((root for within in roots for root in within), 0)
    for block, within in zip(found, roots, strict=True):
        if len(block.text) >= _RUNNING and block.linked * 2 <= len(block.text):
            total += len(block.text)
            for root in within:
                held[root] += len(block.text)
    return {root for root, size in held.items() if size <= (_MOST_COMMENTS if root in comments else _MOST) * total}


def _furniture(name: str, attributes: str) -> str:
    """ "comments", "furniture", or "" for what may hold the main text."""
    if name in _FURNITURE:
        return "furniture"
    if name in ("body", "html", "main", "article") or not attributes:
        return ""
    names = []
    for found in _NAMED.finditer(attributes[:_TAG_BYTES]):
        key, value = found[1].lower(), (found[2] or "").strip("\"'")
        if key in ("hidden", "aria-hidden"):
            if value.lower() in ("", "true", "hidden"):
                return "furniture"
        elif key == "style":
            if "display:none" in value.replace(" ", "").lower():
                return "furniture"
        else:
            names.append(value)
    said = " ".join(names)
    if not _AROUND.search(said) or _WITHIN.search(said):
        return ""
    return "comments" if "comment" in said.lower() else "furniture"


def _tokens(page: str) -> Iterator[tuple[str, str, bool, str]]:
    """(text before a tag, tag name or "", whether it is an end tag, its attributes); scripts and comments left out."""
    at, text_from = 0, 0
    endless: set[str] = set()  # raw elements that nothing ends from here on
    while (begin := page.find("<", at)) >= 0:
        if page.startswith("<!--", begin):
            yield page[text_from:begin], "", False, ""
            end = page.find("-->", begin + 4)
            if end < 0:
                return
            at = text_from = end + 3
            continue
        tag = _TAG.match(page, begin)
        if not tag:
            if page.startswith(("<!", "<?", "</"), begin):
                yield page[text_from:begin], "", False, ""
                end = page.find(">", begin)
                if end < 0:
                    return
                at = text_from = end + 1
            else:
                at = begin + 1  # a bare <
            continue
        end = _TAG_END.match(page, tag.end(), tag.end() + _TAG_BYTES)
        stop = end.end() if end else page.find(">", tag.end()) + 1
        if not stop:
            yield page[text_from:begin], "", False, ""
            return
        name, ending = tag[1].lower(), page[begin + 1] == "/"
        if name in _RAW_ENDS and not ending:
            yield page[text_from:begin], "", False, ""
            close = None if name in endless else _RAW_ENDS[name].search(page, stop)
            if close is None:
                endless.add(name)
            if close is None and name in ("script", "style", "textarea", "title"):
                return
            at = text_from = close.end() if close else stop
            continue
        yield page[text_from:begin], name, ending, page[tag.end() : stop - 1]
        at = text_from = stop
    yield page[text_from:], "", False, ""
