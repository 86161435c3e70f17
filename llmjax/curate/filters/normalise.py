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

# UTF-8 that was decoded as a single-byte encoding contains pairs of these characters (Latin, Greek, Cyrillic, box
# drawing, mathematics), or one of them beside a no-break space that became a plain one.
_MOJIBAKE = re.compile("[\x80-\u04ff\u2200-\u25ff][\x80-\u04ff\u2010-\u25ff]|[\x80-\x9fÂÃ]")
# Escaped any number of times: &amp;amp;lt;
_ENTITY = re.compile(r"&(?:amp;)*(#[0-9]{1,7};|#[xX][0-9a-fA-F]{1,6};|[a-zA-Z][a-zA-Z0-9]{1,31};)")
_SURROGATE = re.compile("[\ud800-\udfff]")
_NEWLINE = re.compile("\r\n|[\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_SPACE = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f]")
_CONTROL = re.compile("[\x01-\x08\x0e-\x1b\x1f\x7f-\x9f\ufffe\uffff]")
# Soft hyphens, direction marks, joiners. Joiners between non-ASCII characters stay: they form letters and emoji.
_ZERO_WIDTH = re.compile(
    "[\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]"
    "|(?<![^\0-\x7f\u200c\u200d])[\u200c\u200d]|[\u200c\u200d](?![^\0-\x7f\u200c\u200d])"
)
# NFC sorts the marks on a letter in quadratic time. Unicode's stream-safe format allows 30.
_MAX_MARKS = 30
_MARK = "[" + "".join(chr(code) for code in range(0x300, 0x10000) if unicodedata.combining(chr(code))) + "]"
_STACKED = re.compile(f"{_MARK}{_MARK}{{{_MAX_MARKS},}}")
# A fast check that most texts pass: only printable characters, \n and \t, and none of the patterns above.
_SUSPECT = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\xa0\xad\u061c\u1680\u180e\u2000-\u200f\u2028-\u202f\u205f-\u2069\ufeff\ufffe\uffff"
    "\ud800-\udfff]"
)


def normalise(text: str, config: NormaliseConfig = _DEFAULTS) -> tuple[str, dict[str, int]]:
    """(the repaired text, number of repairs by name, without zeros).

    surrogates                 joined to a character, or replaced by U+FFFD if its other half is missing
    mojibake                   lines with a wrong encoding
    entities                   HTML entities replaced by characters
    newlines                   \\r\\n, \\r, form feeds and other separators replaced by \\n
    spaces                     other Unicode spaces replaced by the ASCII space
    nul, control, zero_width   removed characters
    stacked_marks              removed marks: those after the thirtieth on one letter
    nfc                        1 if the text was not in NFC
    surrounding_space          removed characters: empty lines at the beginning, any space at the end
    """
    counts: Counter[str] = Counter()
    if not text.isascii():
        text = _join_surrogates(text, counts)
        if config.mojibake and _MOJIBAKE.search(text) and is_bad(text):
            text = _fix_mojibake(text, counts)
    if config.entities and "&" in text:
        text = _unescape_entities(text, counts)
    if _SUSPECT.search(text):
        text = _substitute(_NEWLINE, "\n", text, "newlines", counts)
        if config.spaces:
            text = _substitute(_SPACE, " ", text, "spaces", counts)
        counts["nul"] = text.count("\0")
        text = text.replace("\0", "")
        text = _substitute(_CONTROL, "", text, "control", counts)
        text = _substitute(_ZERO_WIDTH, "", text, "zero_width", counts)
    if not text.isascii():
        text = _compose(text, counts)
    size = len(text)
    text = text.strip("\n").rstrip()
    counts["surrounding_space"] = size - len(text)
    return text, {name: count for name, count in counts.items() if count}


def _substitute(pattern: re.Pattern, replacement: str, text: str, name: str, counts: Counter) -> str:
    text, counts[name] = pattern.subn(replacement, text)
    return text


def _join_surrogates(text: str, counts: Counter) -> str:
    """Surrogates come from JSON such as "\\ud83d" and from file names."""
    if num_surrogates := len(_SURROGATE.findall(text)):
        counts["surrogates"] = num_surrogates
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _fix_mojibake(text: str, counts: Counter) -> str:
    lines = text.split("\n")
    for index, line in enumerate(lines):
        if not line.isascii() and (fixed := fix_encoding(line)) != line:
            lines[index] = fixed
            counts["mojibake"] += 1
    return _join_surrogates("\n".join(lines), counts)


def _unescape_entities(text: str, counts: Counter) -> str:
    def unescape(match: re.Match) -> str:
        name = match[1]
        character = html.unescape(f"&{name}") if name[0] == "#" else html5.get(name, f"&{name}")
        counts["entities"] += character != match[0]
        return character

    lines = text.split("\n")
    for index, line in enumerate(lines):
        if "&" in line and "<" not in line:
            lines[index] = _ENTITY.sub(unescape, line)
    return "\n".join(lines)


def _compose(text: str, counts: Counter) -> str:
    if stacked := _STACKED.findall(text):
        counts["stacked_marks"] = sum(len(marks) - _MAX_MARKS for marks in stacked)
        text = _STACKED.sub(lambda marks: marks[0][:_MAX_MARKS], text)
    if not unicodedata.is_normalized("NFC", text):
        counts["nfc"] = 1
        text = unicodedata.normalize("NFC", text)
    return text
