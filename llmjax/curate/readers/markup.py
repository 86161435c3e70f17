"""Detect HTML: a page or fragment, as opposed to prose, code or XML that contains tags."""

from html import unescape
import re

_SAMPLE = 1 << 17  # characters that are examined
_MAX_OUTSIDE = 0.25  # fraction of the visible characters that are outside of elements
_MAX_UNKNOWN = 0.1  # fraction of the tags
_HTML_TAGS = """
    a abbr acronym address applet area article aside audio b base basefont bdi bdo big blink blockquote body br button
    canvas caption center cite code col colgroup data datalist dd del details dfn dialog dir div dl dt em embed fieldset
    figcaption figure font footer form frame frameset h1 h2 h3 h4 h5 h6 head header hgroup hr html i iframe img input
    ins kbd label legend li link main map mark marquee menu meta meter nav nobr noframes noscript object ol optgroup
    option output p param picture pre progress q rp rt ruby s samp script search section select slot small source span
    strike strong style sub summary sup table tbody td textarea tfoot th thead time title tr track tt u ul var video wbr
"""
_BLOCK_TAGS = """
    address article aside blockquote body center dd div dl dt fieldset figure footer form h1 h2 h3 h4 h5 h6 header html
    li main nav ol p pre section table tbody td th tr ul
"""
_VOID_TAGS = "area base basefont br col embed frame hr img input link meta param source track wbr"
_OPTIONAL_END_TAGS = "html head body p li dt dd td th tr tbody thead tfoot option colgroup"
_HTML, _BLOCKS = frozenset(_HTML_TAGS.split()), frozenset(_BLOCK_TAGS.split())
_VOID, _OPTIONAL_END = frozenset(_VOID_TAGS.split()), frozenset(_OPTIONAL_END_TAGS.split())
_TAG = re.compile(r"<(/?)([a-zA-Z][\w:.-]*)((?:\s[^<>]*)?)>")
_PROLOG = re.compile(r"\ufeff?\s*(<\?xml\b[^<>]*>\s*)?((?:<!--(?s:.*?)-->\s*|<!doctype html\b[^<>]*>\s*)*)", re.I)
# Parts that a browser does not show.
_INVISIBLE = re.compile(r"<!--.*?(?:-->|\Z)|<(script|style|svg)\b[^<>]*>.*?(?:</\1\s*>|\Z)|<![^<>]*>", re.I | re.S)
# Server templates, and formulas, which extraction would lose.
_TEMPLATE = re.compile(r"<\?(?:php|=)|<%|\{%|<math\b")
# Components: JSX, Vue, Svelte, Angular.
_COMPONENT = re.compile(
    r"\{\{|<template\b"
    r"|<[a-zA-Z][^<>]*\s(?:className=|[\w:@.-]+=\{|\{\.\.\.|v-[a-z]+[=:]|\*ng[A-Z]|@[a-z]+=|:[a-z-]+=)"
)
# Code and Markdown between tags.
_CODE = re.compile(r"""[{};=`\\]|\]\(|^\s{0,3}(?:\#{1,6}\s|[-*+]\s|>|\d+\.\s|import\b|from\b|def\b)""", re.M)


def detect_html(text: str) -> str | None:
    """The text if it is HTML, otherwise None; unescaped if all of it is escaped (`&lt;p&gt;` for `<p>`).

    A text is HTML if its tags are HTML tags, it has closed block elements, and nearly all of it is inside elements.
    Time is linear in the text.
    """
    if "<" not in text and text.lstrip()[:4] == "&lt;":
        text = unescape(text)
    return text if "<" in text and _is_html(text[:_SAMPLE]) else None


def _is_html(text: str) -> bool:
    prolog = _PROLOG.match(text)
    begin = prolog.end() if prolog else 0
    root = _TAG.match(text, begin)
    if prolog and prolog[1] and not (root and root[2].lower() == "html"):
        return False  # XML of another kind
    first = root or _TAG.search(text, begin)
    if not first or first[2].lower() not in _HTML:
        return False
    visible_html = _INVISIBLE.sub(" ", text[begin:])
    if _TEMPLATE.search(visible_html):
        return False
    if first[2].lower() == "html" and root:
        return True
    if _COMPONENT.search(visible_html):
        return False
    return _is_mostly_elements(visible_html)


def _is_mostly_elements(html: str) -> bool:
    """Whether the text has closed blocks, few unknown tags, and little text outside of elements."""
    outside, num_visible, depth, last = [], 0, 0, 0
    num_tags = num_unknown = num_opened = num_closed = num_blocks = 0
    for tag in _TAG.finditer(html):
        gap, last = html[last : tag.start()].strip(), tag.end()
        num_visible += len(gap)
        if depth == 0 and gap:
            outside.append(gap)
        name, is_end = tag[2].lower(), bool(tag[1])
        num_tags += 1
        num_unknown += name not in _HTML and "-" not in name  # a name with a hyphen is a custom element
        if name in _VOID or tag[3].endswith("/"):
            continue
        depth = max(depth - 1, 0) if is_end else depth + 1
        num_blocks += is_end and name in _BLOCKS
        if name not in _OPTIONAL_END:
            num_opened, num_closed = num_opened + (not is_end), num_closed + is_end
    rest = html[last:].strip()
    outside += [rest] if rest and depth == 0 else []
    text_outside = "\n".join(outside)
    return (
        num_blocks > 0
        and num_unknown <= _MAX_UNKNOWN * num_tags
        and 2 * num_closed >= num_opened
        and len(text_outside) <= _MAX_OUTSIDE * (num_visible + len(rest))
        and not _CODE.search(text_outside)
    )
