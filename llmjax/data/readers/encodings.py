"""Decode bytes to text: byte order mark, UTF-8, the declared encoding, else the likeliest; fixes are counted."""

import codecs
from collections.abc import Iterator
import itertools
import re
from typing import NamedTuple

from llmjax.data.readers import streams

# The longest first: UTF-32's mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Names that browsers read as a larger encoding, since pages use them for it (encoding.spec.whatwg.org, "Names and
# labels").
_WIDER = {
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "tis-620": "cp874",
}
# Codecs of Python that are no encodings of text, and UTF-7, which browsers refuse to read.
_NO_CHARSETS = frozenset(["unicode-escape", "raw-unicode-escape", "undefined", "idna", "punycode", "utf-7"])
_SAMPLE = 1 << 15  # bytes that the detector reads
_MIN_SAMPLE = 40  # bytes; from fewer no encoding can be detected
_MULTIBYTE = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
_HIGH = re.compile(rb"[\x80-\xff]")
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Non-ASCII characters of cp1252 in western European text, that text in cp1250 could hardly consist of.
_WESTERN = frozenset(
    "àâäåçéèêëîïôöùúûüÿœæñáíóßÀÂÄÅÇÉÈÊËÎÏÔÖÙÚÛÜŒÆÑÁÍÓ"
    "€«»°£©®§¿¡·\xa0\u2018\u2019\u201c\u201d\u201e\u2013\u2014\u2026\u2022"
)
# In a page's head: <meta charset=x>, <meta http-equiv=... content="text/html; charset=x">, <?xml encoding="x"?>.
_PAGE_DECLARATION = re.compile(
    rb"""(?:<meta[^>]{0,200}?charset|<\?xml[^>]{0,200}?encoding)\s*=\s*["']?\s*([\w.:-]{2,40})""", re.I
)
_HEADER_DECLARATION = re.compile(r"""charset\s*=\s*["']?\s*([\w.:-]{2,40})""", re.I)

REPLACED = "bad bytes replaced"
SURROGATES = "lone surrogates replaced"


class Decoded(NamedTuple):
    """Text, and what was repaired: name -> count; `text` is None if the bytes are no text at all."""

    text: str | None
    notes: dict[str, int]


def decode(data: bytes, declared: str = "") -> Decoded:
    """The text of some bytes. Never raises.

    In this order: a byte order mark; UTF-16 without a mark; UTF-8; the encoding that was declared; UTF-8 with a few bad
    bytes, replaced by U+FFFD; the encoding that charset-normalizer finds likeliest; cp1252.
    """
    for mark, name in _MARKS:
        if data.startswith(mark):
            return _decode_as(data[len(mark) :], name)
    if b"\0" in data[:_SAMPLE] and (name := _detect_utf16(data)):
        return _decode_as(data, name)
    try:
        return Decoded(data.decode(), {})
    except UnicodeDecodeError:
        pass
    if not _looks_like_text(data):
        return Decoded(None, {})
    codec = find_codec(declared)
    if codec and codec != "utf-8":
        try:
            return Decoded(data.decode(codec), {f"decoded from {codec}": 1})
        except UnicodeDecodeError:
            pass
    return _decode_as(data, detect_encoding(data))


def detect_encoding(data: bytes) -> str:
    """The likeliest encoding of bytes of text that carry no mark and no declaration."""
    high = len(_HIGH.findall(data))
    if not high or 2 * sum(map(len, _MULTIBYTE.findall(data))) > high:
        return "utf-8"
    # Long texts are mostly ASCII: the sample begins near the first byte that is not.
    first = _HIGH.search(data)
    begin = max(first.start() - 1000, 0) if first else 0
    return detect_legacy_encoding(data[begin : begin + _SAMPLE])


def detect_legacy_encoding(sample: bytes) -> str:
    """The likeliest name of an 8-bit or East Asian encoding of bytes that are not UTF-8."""
    if len(sample) < _MIN_SAMPLE:
        return "cp1252"
    import charset_normalizer

    best = charset_normalizer.from_bytes(sample[:_SAMPLE]).best()
    name = best.encoding if best else "cp1252"
    name = name.replace("_", "-") if name.startswith(("koi8", "iso8859")) else name
    if name.startswith(("cp125", "iso8859-", "latin", "mac")):
        western = sample.decode("cp1252", "replace")
        if set(filter(lambda c: ord(c) > 127, western)) <= _WESTERN:
            return "cp1252"
    return find_codec(name) or "cp1252"


def find_page_encoding(data: bytes) -> str:
    """The encoding that an HTML page names in its first 2,048 bytes, or ''."""
    match = _PAGE_DECLARATION.search(data, 0, 2048)
    return match[1].decode("ascii") if match else ""


def find_header_encoding(content_type: str) -> str:
    """The encoding that a Content-Type header names, or ''."""
    match = _HEADER_DECLARATION.search(content_type)
    return match[1] if match else ""


def replace_surrogates(text: str) -> Decoded:
    """The text with lone surrogates, which no encoding can hold, replaced by U+FFFD."""
    try:
        text.encode()
        return Decoded(text, {})
    except UnicodeEncodeError:
        # A pair that was escaped as two characters is one.
        joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        repaired, count = _SURROGATE.subn("\ufffd", joined)
        return Decoded(repaired, {SURROGATES: count} if count else {})


def is_wide(head: bytes) -> bool:
    """Whether a file that begins with these bytes is marked as UTF-16 or UTF-32."""
    return any(head.startswith(mark) for mark, name in _MARKS if name != "utf-8")


def convert_to_utf8(data: Iterator[bytes]) -> tuple[Iterator[bytes], dict[str, int]]:
    """(blocks in UTF-8 where a byte order mark says UTF-16 or UTF-32, else as they are; notes)."""
    try:
        first = next(data, b"")
        while 0 < len(first) < 4 and (more := next(data, b"")):
            first += more
    except streams.DamageError as damage:
        return _raise_at_read(damage), {}
    for mark, name in _MARKS[1:]:
        if first.startswith(mark):
            return _transcode(itertools.chain([first[len(mark) :]], data), name), {f"decoded from {name}": 1}
    return itertools.chain([first] if first else [], data), {}


def _raise_at_read(damage: Exception) -> Iterator[bytes]:
    raise damage
    yield b""


def _transcode(data: Iterator[bytes], name: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(name)("replace")
    for block in data:
        if text := decoder.decode(block):
            yield text.encode()
    if text := decoder.decode(b"", final=True):
        yield text.encode()


def _looks_like_text(data: bytes) -> bool:
    """Whether control bytes are rare, as in text; those of UTF-16, archives and pictures are not."""
    sample = data[:_SAMPLE]
    return len(_CONTROL.findall(sample)) * 50 <= len(sample)


def _detect_utf16(data: bytes) -> str:
    """The UTF-16 of bytes without a mark, where the high halves of mostly Latin text are zero; else ''."""
    sample = data[:_SAMPLE]
    for name, zeros in (("utf-16-le", sample[1::2]), ("utf-16-be", sample[::2])):
        if zeros.count(0) * 10 > len(zeros) * 7 and sample.count(0) * 10 < len(sample) * 6:
            return name
    return ""


def _decode_as(data: bytes, name: str) -> Decoded:
    notes = {} if name == "utf-8" else {f"decoded from {name}": 1}
    text = data.decode(name, "replace")
    num_original = data.count(b"\xef\xbf\xbd") if name == "utf-8" else 0  # U+FFFD in the data itself
    if count := text.count("\ufffd") - num_original:
        notes[REPLACED] = count
    return Decoded(text, notes)


def find_codec(name: str) -> str:
    """Python's name for an encoding of text, the wider one that browsers take for it, or '' where it is unknown."""
    try:
        info = codecs.lookup(name) if name else None
    except (LookupError, ValueError):
        return ""
    if info is None or not getattr(info, "_is_text_encoding", True) or info.name.replace("_", "-") in _NO_CHARSETS:
        return ""
    return _WIDER.get(info.name, info.name)
