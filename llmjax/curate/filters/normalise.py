"""Text normalisation: fix encodings, entities, newlines, control and zero-width characters; apply NFC."""

from collections import Counter
import html
from html.entities import html5
import re
import unicodedata

from ftfy import fix_encoding
from ftfy.badness import is_bad

from llmjax.curate.config import NormaliseConfig

_DEFAULTS = NormaliseConfig()

# UTF-8 read as an encoding of one byte a character leaves runs of these (Latin, Greek, Cyrillic, frames, mathematics),
# or one with a no-break space that became a plain one.
_MOJIBAKE = re.compile("[\x80-\u04ff\u2200-\u25ff][\x80-\u04ff\u2010-\u25ff]|[\x80-\x9fÂÃ]")
# Escaped any number of times: &amp;amp;lt;
_ENTITY = re.compile(r"&(?:amp;)*(#[0-9]{1,7};|#[xX][0-9a-fA-F]{1,6};|[a-zA-Z][a-zA-Z0-9]{1,31};)")
_SURROGATE = re.compile("[\ud800-\udfff]")
_NEWLINE = re.compile("\r\n|[\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_SPACE = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f]")
_CONTROL = re.compile("[\x01-\x08\x0e-\x1b\x1f\x7f-\x9f\ufffe\uffff]")
# Soft hyphens, marks of direction, joiners; those two stay where they form letters and emoji: inside other scripts.
_ZERO_WIDTH = re.compile(
    "[\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]"
    "|(?<![^\0-\x7f\u200c\u200d])[\u200c\u200d]|[\u200c\u200d](?![^\0-\x7f\u200c\u200d])"
)
# Sorting a run of marks for NFC takes time that grows with its square. Unicode's stream-safe format ends it at 30.
_MAX_MARKS = 30
_MARK = "[" + "".join(chr(code) for code in range(0x300, 0x10000) if unicodedata.combining(chr(code))) + "]"
_STACKED = re.compile(f"{_MARK}{_MARK}{{{_MAX_MARKS},}}")
# One look that most texts pass: nothing but printable characters, \n and \t, and none that the patterns above name.
_SUSPECT = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\xa0\xad\u061c\u1680\u180e\u2000-\u200f\u2028-\u202f\u205f-\u2069\ufeff\ufffe\uffff"
    "\ud800-\udfff]"
)


def normalise(text: str, config: NormaliseConfig = _DEFAULTS) -> tuple[str, dict[str, int]]:
    """The repaired text, and how often each repair was made.

    surrogates   halves of a character: joined where both are there, else U+FFFD, counted by the half
    mojibake     lines in a wrong encoding
    entities     HTML entities written as characters
    newlines     \\r\\n, \\r, form feeds and other separators written as \\n
    spaces       spaces of another width written as plain ones
    nul, control, zero_width, stacked_marks   characters removed; of marks on one letter, those after the thirtieth
    nfc          1 where the text was not in NFC
    edges        characters removed at the ends: empty lines before, any space after

    Only what happened is in the counts.
    """
    counts: Counter[str] = Counter()
    if not text.isascii():
        text = _joined(text, counts)
        if config.mojibake and _MOJIBAKE.search(text) and is_bad(text):
            text = _decoded(text, counts)
    if config.entities and "&" in text:
        text = _unescaped(text, counts)
    if _SUSPECT.search(text):
        text = _replaced(_NEWLINE, "\n", text, "newlines", counts)
        if config.spaces:
            text = _replaced(_SPACE, " ", text, "spaces", counts)
        counts["nul"] = text.count("\0")
        text = text.replace("\0", "")
        text = _replaced(_CONTROL, "", text, "control", counts)
        text = _replaced(_ZERO_WIDTH, "", text, "zero_width", counts)
    if not text.isascii():
        text = _composed(text, counts)
    size = len(text)
    text = text.strip("\n").rstrip()
    counts["edges"] = size - len(text)
    return text, {name: count for name, count in counts.items() if count}


def _replaced(pattern: re.Pattern, by: str, text: str, name: str, counts: Counter) -> str:
    text, counts[name] = pattern.subn(by, text)
    return text


def _joined(text: str, counts: Counter) -> str:
    """Without surrogates. They come from JSON such as "\\ud83d" and from file names."""
    if halves := len(_SURROGATE.findall(text)):
        counts["surrogates"] = halves
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _decoded(text: str, counts: Counter) -> str:
    lines = text.split("\n")
    for index, line in enumerate(lines):
        if not line.isascii() and (fixed := fix_encoding(line)) != line:
            lines[index] = fixed
            counts["mojibake"] += 1
    return _joined("\n".join(lines), counts)


def _unescaped(text: str, counts: Counter) -> str:
    def character(match: re.Match) -> str:
        name = match[1]
        plain = html.unescape(f"&{name}") if name[0] == "#" else html5.get(name, f"&{name}")
        counts["entities"] += plain != match[0]
        return plain

    lines = text.split("\n")
    for index, line in enumerate(lines):
        if "&" in line and "<" not in line:
            lines[index] = _ENTITY.sub(character, line)
    return "\n".join(lines)


def _composed(text: str, counts: Counter) -> str:
    if stacked := _STACKED.findall(text):
        counts["stacked_marks"] = sum(len(marks) - _MAX_MARKS for marks in stacked)
        text = _STACKED.sub(lambda marks: marks[0][:_MAX_MARKS], text)
    if not unicodedata.is_normalized("NFC", text):
        counts["nfc"] = 1
        text = unicodedata.normalize("NFC", text)
    return text
