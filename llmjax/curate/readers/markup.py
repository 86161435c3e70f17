"""Detect HTML: a page or fragment, as opposed to prose, code or XML that contains tags."""

from html import unescape
import re

_SAMPLE = 1 << 17  # characters that decide
_MAX_OUTSIDE = 0.25  # of the visible characters, beside the elements
_MAX_UNKNOWN = 0.1  # of the tags
_NAMES = """
    a abbr acronym address applet area article aside audio b base basefont bdi bdo big blink blockquote body br button
    canvas caption center cite code col colgroup data datalist dd del details dfn dialog dir div dl dt em embed fieldset
    figcaption figure font footer form frame frameset h1 h2 h3 h4 h5 h6 head header hgroup hr html i iframe img input
    ins kbd label legend li link main map mark marquee menu meta meter nav nobr noframes noscript object ol optgroup
    option output p param picture pre progress q rp rt ruby s samp script search section select slot small source span
    strike strong style sub summary sup table tbody td textarea tfoot th thead time title tr track tt u ul var video wbr
"""
_HTML = frozenset(_NAMES.split())
_BLOCK_NAMES = """
    address article aside blockquote body center dd div dl dt fieldset figure footer form h1 h2 h3 h4 h5 h6 header html
    li main nav ol p pre section table tbody td th tr ul
"""
_VOID_NAMES = "area base basefont br col embed frame hr img input link meta param source track wbr"
_UNCLOSED_NAMES = "html head body p li dt dd td th tr tbody thead tfoot option colgroup"  # may lack an end
_BLOCKS, _VOID = frozenset(_BLOCK_NAMES.split()), frozenset(_VOID_NAMES.split())
_UNCLOSED = frozenset(_UNCLOSED_NAMES.split())
_TAG = re.compile(r"<(/?)([a-zA-Z][\w:.-]*)((?:\s[^<>]*)?)>")
_PROLOG = re.compile(r"\ufeff?\s*(<\?xml\b[^<>]*>\s*)?((?:<!--(?s:.*?)-->\s*|<!doctype html\b[^<>]*>\s*)*)", re.I)
# What a reader of the page does not see.
_UNSEEN = re.compile(r"<!--.*?(?:-->|\Z)|<(script|style|svg)\b[^<>]*>.*?(?:</\1\s*>|\Z)|<![^<>]*>", re.I | re.S)
# Templates of servers, and formulas, which extraction would lose.
_TEMPLATE = re.compile(r"<\?(?:php|=)|<%|\{%|<math\b")
# Components: JSX, Vue, Svelte, Angular.
_COMPONENT = re.compile(
    r"\{\{|<template\b"
    r"|<[a-zA-Z][^<>]*\s(?:className=|[\w:@.-]+=\{|\{\.\.\.|v-[a-z]+[=:]|\*ng[A-Z]|@[a-z]+=|:[a-z-]+=)"
)
# What code and Markdown hold between tags, and what hardly begins or ends a page.
_CODE = re.compile(r"""[{};=`\\]|\]\(|^\s{0,3}(?:\#{1,6}\s|[-*+]\s|>|\d+\.\s|import\b|from\b|def\b)""", re.M)


def html_of(text: str) -> str | None:
    """The HTML that a text holds, None where it holds another text.

    HTML is a text whose tags are HTML's, with blocks that are closed, and nearly all of it within them. A text that is
    escaped as a whole, `&lt;p&gt;` for `<p>`, is unescaped. Time is linear in the text.
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
    seen = _UNSEEN.sub(" ", text[begin:])
    if _TEMPLATE.search(seen):
        return False
    if first[2].lower() == "html" and root:
        return True
    if _COMPONENT.search(seen):
        return False
    outside, visible, depth, last = [], 0, 0, 0
    tags = unknown = opened = closed = blocks = 0
    for tag in _TAG.finditer(seen):
        gap, last = seen[last : tag.start()].strip(), tag.end()
        visible += len(gap)
        if depth == 0 and gap:
            outside.append(gap)
        name, is_end = tag[2].lower(), bool(tag[1])
        tags += 1
        unknown += name not in _HTML and "-" not in name  # a name with a hyphen is a custom element
        if name in _VOID or tag[3].endswith("/"):
            continue
        depth = max(depth - 1, 0) if is_end else depth + 1
        blocks += is_end and name in _BLOCKS
        if name not in _UNCLOSED:
            opened, closed = opened + (not is_end), closed + is_end
    rest = seen[last:].strip()
    outside += [rest] if rest and depth == 0 else []
    around = "\n".join(outside)
    return (
        blocks > 0
        and unknown <= _MAX_UNKNOWN * tags
        and 2 * closed >= opened
        and len(around) <= _MAX_OUTSIDE * (visible + len(rest))
        and not _CODE.search(around)
    )
