"""Find personal data and secrets in a text and replace them by typed placeholders.

Every kind has a character that is cheap to find (an @, a digit, a marker); its patterns are matched only there. Names
and postal addresses of people are not found: no pattern distinguishes them from other words.
"""

from collections.abc import Iterable, Iterator
import ipaddress
import itertools
import re
from typing import NamedTuple

from llmjax.curate.filters import secrets

# In order of priority, for spans that overlap.
KINDS = ("secret", "email", "iban", "card", "ssn", "ip", "phone")


class Span(NamedTuple):
    """Personal data in a text: its kind, begin and end."""

    kind: str
    begin: int
    end: int

    @property
    def placeholder(self) -> str:
        """What replaces it in a text, such as <EMAIL>."""
        return f"<{self.kind.upper()}>"


def find_spans(text: str, kinds: Iterable[str] = KINDS) -> list[Span]:
    """Personal data in order, without overlaps: of two that overlap, the kind that is earlier in KINDS is kept."""
    selected = frozenset(kinds)
    spans: list[Span] = []
    if "secret" in selected:
        spans += (Span("secret", *span) for span in secrets.find_secrets(text))
    if not text.isascii():
        text = _fold_to_ascii(text)
    if "@" in text and selected & {"email", "secret"}:
        spans += (span for span in _find_emails(text) if span.kind in selected)
    if "iban" in selected:
        spans += _find_ibans(text)
    if selected & {"card", "ssn", "ip", "phone"}:
        for run in _DIGIT_RUN.finditer(text):
            spans += _find_in_digit_run(text, run.start(), run.end(), selected)
    if "ip" in selected and ":" in text:
        spans += _find_ipv6(text)
    return _remove_overlaps(spans) if len(spans) > 1 else spans


def replace_spans(text: str, spans: list[Span]) -> str:
    """The text with placeholders such as <EMAIL> in place of the spans."""
    parts, last = [], 0
    for span in spans:
        parts += (text[last : span.begin], span.placeholder)
        last = span.end
    return "".join([*parts, text[last:]])


def mask_context(text: str, spans: list[Span], index: int, width: int = 40) -> str:
    """The context of span `index` for a report: `width` characters on each side, with all spans and digits replaced."""
    span = spans[index]
    low, high = max(span.begin - width, 0), min(span.end + width, len(text))
    nearby = [other for other in spans[max(index - width, 0) : index + width] if other.end > low and other.begin < high]
    low, high = min(low, nearby[0].begin), max(high, nearby[-1].end)
    shifted = [Span(other.kind, other.begin - low, other.end - low) for other in nearby]
    return " ".join(re.sub("[0-9]", "#", replace_spans(text[low:high], shifted)).split())


def mask_excerpt(text: str, limit: int) -> str:
    """The beginning of a text for a report, at most `limit` characters, with personal data of all kinds replaced."""
    # A value at the end of the excerpt may continue after it.
    text = text[: 2 * limit + 200]
    return replace_spans(text, find_spans(text))[:limit]


# Characters that are equivalent to one ASCII character in addresses and numbers.
_ASCII_OF = {chr(code + 0xFEE0): chr(code) for code in (*range(0x30, 0x3B), *range(0x40, 0x5B), *range(0x61, 0x7B))}
_ASCII_OF |= dict(zip("\uff0b\uff08\uff09\uff0d\uff0e\uff0f\uff3f\uff61\ufe6b", "+()-./_\u3002@", strict=True))
_ASCII_OF |= dict.fromkeys("\u00a0\u2002\u2003\u2005\u2007\u2008\u2009\u200a\u202f\u3000", " ")
_ASCII_OF |= {chr(zero + digit): str(digit) for zero in (0x660, 0x6F0, 0x966) for digit in range(10)}
_DASHES = "\u2010-\u2015\u2212\ufe58\ufe63\uff0d"
_TO_FOLD = re.compile(f"[{''.join(_ASCII_OF)}{_DASHES}]")
_BESIDE_DASH = frozenset("0123456789() ")


def _fold_to_ascii(text: str) -> str:
    """The text with full-width letters, digits of all scripts, dashes and spaces in ASCII; positions stay the same."""
    return _TO_FOLD.sub(_to_ascii, text)


def _to_ascii(match: re.Match) -> str:
    character = match[0]
    if plain := _ASCII_OF.get(character):
        return plain
    # A dash in a number, not between words.
    around = match.string[match.start() - 1 : match.start()] + match.string[match.end() : match.end() + 1]
    return "-" if {_ASCII_OF.get(c, c) for c in around} <= _BESIDE_DASH else character


def _remove_overlaps(spans: list[Span]) -> list[Span]:
    """The spans in order, without overlaps."""
    spans.sort(key=lambda span: (span.begin, span.end))
    if all(a.end <= b.begin for a, b in itertools.pairwise(spans)):
        return spans
    kept: list[Span] = []
    for span in spans:
        while kept and kept[-1].end > span.begin:
            if KINDS.index(kept[-1].kind) <= KINDS.index(span.kind):
                break
            kept.pop()
        else:
            kept.append(span)
    return kept


# E-mail addresses, and passwords in URLs.

# Letters of scripts without spaces between words, and all other letters with their marks. Without spaces, only the
# script separates an address from the words beside it.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1100-\u11ff"
_UNSPACED += "\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_UNSPACED += "\U00020000-\U0003ffff"
_MARKS = "\u0300-\u036f\u0483-\u0487\u0591-\u05c7\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff\u200c\u200d"
_WORD = rf"\w{_MARKS}\u0e00-\u0e4e"
_SPACED = rf"(?:(?![{_UNSPACED}])[{_WORD}.%+&'\u2019-])"
_LOCAL = re.compile(rf"(?<![{_WORD}.%+&'\u2019-])[{_WORD}.%+&'\u2019-]{{1,64}}\Z")
_LOCAL_SPACED = re.compile(rf"{_SPACED}*[A-Za-z0-9]{_SPACED}*\Z")
_LABEL = rf"[{_WORD}](?:[{_WORD}-]{{0,61}}[{_WORD}])?"
# Top-level domains in scripts without spaces, which a word may follow directly.
_UNSPACED_TLD = "\u516c\u53f8|\u4e2d\u56fd|\u4e2d\u570b|\u7f51\u7edc|\u7f51\u5740|\u7f51\u7ad9"
_UNSPACED_TLD += "|\u5728\u7ebf|\u9999\u6e2f|\u53f0\u6e7e|\u53f0\u7063|\ud55c\uad6d|\ub2f7\ucef4|\u307f\u3093\u306a"
_TLD = (
    r"xn--[A-Za-z0-9-]{2,59}|[A-Za-z\u00c0-\u024f]{2,24}(?![A-Za-z0-9_\u00c0-\u024f])"
    rf"|{_UNSPACED_TLD}|[{_UNSPACED}]{{1,24}}|(?:(?![A-Za-z0-9_\u00c0-\u024f{_UNSPACED}])[{_WORD}]){{2,24}}"
)
_DOMAIN = re.compile(
    rf"@(?:(?:{_LABEL}\.){{1,8}}({_TLD})|(?:{_LABEL}\u3002){{1,8}}([A-Za-z]{{2,24}}(?![A-Za-z0-9])|{_UNSPACED_TLD}))"
)
_DOMAIN_REST = re.compile(r"(?:\.[A-Za-z0-9-]*[A-Za-z][0-9]+)(?![\w.])", re.ASCII)
_URL_PASSWORD = re.compile(r"://[^\s/:@]{0,64}:([^\s/:@]{1,128})\Z")
# File names such as icon@2x.png, and decorators in code.
_FILE_SUFFIXES = "png jpg jpeg gif svg webp ico css js jsx ts tsx py rb html htm json xml md txt"
_NOT_TLDS = frozenset(_FILE_SUFFIXES.split())


def _find_emails(text: str) -> Iterator[Span]:
    at = text.find("@")
    while at >= 0:
        if password := _URL_PASSWORD.search(text, max(at - 200, 0), at):
            if not secrets.is_placeholder(password[1]):
                yield Span("secret", password.start(1), at)
        elif (domain := _DOMAIN.match(text, at)) and (local := _LOCAL.search(text, max(at - 65, 0), at)):
            begin, end = _find_local_begin(local, domain[0].isascii()), domain.end()
            # To hide too much is better than to leave half of an address.
            if rest := _DOMAIN_REST.match(text, end):
                end = rest.end()
            if begin < at and (domain[1] or domain[2]).lower() not in _NOT_TLDS and text[begin:at] != "git":
                yield Span("email", begin, end)
        at = text.find("@", at + 1)


def _find_local_begin(local: re.Match, is_ascii_domain: bool) -> int:
    """The begin of the part before the @: after quotes, an ellipsis, and words of a script without spaces."""
    begin, end = local.span()
    if is_ascii_domain and (spaced := _LOCAL_SPACED.search(local.string, begin, end)):
        begin = spaced.start()
    if (dots := local.string.rfind("...", begin, end)) >= 0:
        begin = dots + 3
    while begin < end and local.string[begin] in ".'\u2019&":
        begin += 1
    return begin


# IBAN: ISO 13616, lengths by country from the SWIFT registry, check digits by ISO 7064, mod 97.

_IBAN_COUNTRIES = {
    15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK", 21: "CH HR LI LV",
    22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG",
    25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
    29: "BR EG PS QA UA", 30: "JO KW MU YE", 31: "MT SC", 32: "LC", 33: "RU",
}  # fmt: skip
_IBAN_LENGTH = {country: length for length, listed in _IBAN_COUNTRIES.items() for country in listed.split()}
# Begins at the digits, so that a text of letters is skipped fast; the two letters are checked by a lookbehind.
_IBAN = re.compile(r"[0-9]{2}(?<=\b[A-Za-z]{2}[0-9]{2})(?:[ -]?[A-Za-z0-9]){11,29}", re.ASCII)


def _find_ibans(text: str) -> Iterator[Span]:
    for match in _IBAN.finditer(text):
        begin = match.start() - 2
        length = _IBAN_LENGTH.get(text[begin : begin + 2].upper())
        if not length:
            continue
        end, characters = begin, []
        while end < match.end() and len(characters) < length:
            if text[end] not in " -":
                characters.append(text[end])
            end += 1
        if len(characters) == length and not text[end : end + 1].isalnum() and _mod_97("".join(characters)) == 1:
            yield Span("iban", begin, end)


def _mod_97(iban: str) -> int:
    return int("".join(str(int(c, 36)) for c in iban[4:] + iban[:4])) % 97


# Numbers: each run of digits and separators is examined once, for all kinds.

_DIGIT_RUN = re.compile(r"[0-9][0-9 .()/-]{5,}[0-9]")
_IPV4 = re.compile(r"(?<![\w.])([0-9]{1,3})\.([0-9]{1,3})\.([0-9]{1,3})\.([0-9]{1,3})(?![\w]|\.[0-9])", re.ASCII)
_SSN = re.compile(r"(?<![\w-])(?!000|666|9)[0-9]{3}([- ])(?!00)[0-9]{2}\1(?!0000)[0-9]{4}(?![\w]|-[0-9])", re.ASCII)
_CARD = re.compile(
    r"""(?<![\w.+-])(?:
        [0-9]{12,19}
      | [0-9]{4}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{4}(?:\1[0-9]{3})?
      | 3[0-9]{3}([ -])[0-9]{6}\2[0-9]{4,5}
    )(?!\w|[.,-][0-9])""",
    re.ASCII | re.VERBOSE,
)
# Number of digits -> first digits of the networks: ISO/IEC 7812 ranges of Visa, Mastercard, Maestro, American Express,
# Diners Club, Discover, JCB, UnionPay.
_MAESTRO = r"5[06-8]|6"
_NETWORKS = {
    12: re.compile(_MAESTRO),
    13: re.compile(rf"4|{_MAESTRO}"),
    14: re.compile(rf"30[0-5]|309|3[689]|{_MAESTRO}"),
    15: re.compile(rf"3[47]|1800|2131|{_MAESTRO}"),
    16: re.compile(rf"4|5[1-5]|2(?:22[1-9]|2[3-9]|[3-6]|7[01]|720)|35|3[0689]|{_MAESTRO}"),
    17: re.compile(_MAESTRO),
    18: re.compile(_MAESTRO),
    19: re.compile(rf"4|{_MAESTRO}"),
}
_PHONE = re.compile(
    r"""(?<![\w.,/$€£+=-])(?:
        \+[1-9][0-9]{0,2}[ ]?[./-]?[ ]?(?:\(0?[0-9]{0,4}\)[ ./-]?)?[0-9]{1,5}(?:(?:[ ]?[./-][ ]?|[ ])?[0-9]{2,5}){1,4}
      | (?:(?:\+?1|001)[ .-]?)?(?:\([2-9][0-9]{2}\)[ ]?|[2-9][0-9]{2}[ .-])[2-9][0-9]{2}[.-][0-9]{4}  # North America
      | 8[ -]?\([0-9]{3,5}\)[ -]?[0-9]{1,3}(?:[ -]?[0-9]{2}){2}                               # Russia, trunk 8
      | \(0[0-9]{1,4}\)[ .-]?[0-9]{3,4}[ .-]?[0-9]{3,4}                                       # with an area code
      | 0[1-9][0-9]{0,3}(?:[ ][0-9]{2,4}){2,4} | 0[1-9](?:[.-][0-9]{2}){4}                         # national, trunk 0
    )(?:[ ]?(?:x|ext\.?[ ]?)[0-9]{1,5})?(?!\w|[.,/-][0-9])""",
    re.ASCII | re.VERBOSE,
)
# 7 to 12 digits in any other format are a number only beside words about telephones.
_LOOSE_PHONE = re.compile(
    r"(?<![\w.,/$+=-])(?:\([0-9][0-9 ]{1,4}\)[ ./-]{0,3}(?:[0-9] (?=[0-9]{2}))?|[78][ -])?"
    r"[0-9]{2,}(?:(?: ?[./-] ?| ?\((?:0\))? ?| ?\) ?-? ?| )[0-9]{2,})*(?:[ ]?x[0-9]{1,5})?(?!\w|[.,/-][0-9])",
    re.ASCII,
)
_PHONE_WORD_BEFORE = re.compile(
    r"(?:\b(?:(?:tele)?phone|tel|mobile|cell(?:ular)?|fax|call(?:ed|ing)?|desk|office|dial|whatsapp|hotline|sms|ring|reach"
    r"|contact|answering|messages|telefono?|téléphone|tél|móvil|handy|mobil|portable|appele[rz]|celular|telefone|telefoon"
    r"|rufnummer|erreichen|cellulare|teléfono|тел|телефон|моб|факс|звоните|τηλ|τηλέφωνο|κινητό|טלפון|נייד|هاتف|جوال|تلفن"
    r"|फ़ोन|फोन)\b|电话|電話|手机|手機|热线|熱線|传真|傳真|携帯|联系方式|전화|휴대폰|연락처|โทร)[^0-9\n]{0,24}\n?[^0-9\n]{0,4}\Z",
    re.I,
)
_PHONE_WORD_AFTER = re.compile(r"[\s,-]{0,3}[(]?(?:office|fax|mobile|cell|home|work)\b", re.I)
_VERSION_BEFORE = re.compile(r"(?:\b(?:v|ver|version|release|section|sect?\.|chapter)|§)[ .:]{0,2}\Z", re.I)
_NETWORK_WORD = re.compile(r"\bip|addr|host|server|ping|dns|://", re.I)
_DATE = re.compile(
    r"(?:19|20)[0-9]{2}[-./ ][01]?[0-9][-./ ][0-3]?[0-9]\b|[0-3]?[0-9][-./][0-3]?[0-9][-./](?:19|20)[0-9]{2}\b"
)


def _find_in_digit_run(text: str, begin: int, end: int, selected: frozenset[str]) -> Iterator[Span]:
    """Numbers of the selected kinds in text[begin:end], a run of digits, spaces and punctuation."""
    # A number may begin with + or ( and end with an extension, outside of the run.
    low, high = max(begin - 2, 0), min(end + 8, len(text))
    if "ip" in selected and text.count(".", begin, end) >= 3:
        for match in _IPV4.finditer(text, low, high):
            if _is_ip_address(match):
                yield Span("ip", match.start(), match.end())
    if "ssn" in selected and end - begin >= 11:
        for match in _SSN.finditer(text, low, high):
            if match[1] == "-" or re.search(
                r"ssn|social|security", text[max(match.start() - 40, 0) : match.start()], re.I
            ):
                yield Span("ssn", match.start(), match.end())
    if "card" in selected and end - begin >= 12:
        for match in _CARD.finditer(text, low, high):
            if _is_card(match[0]):
                yield Span("card", match.start(), match.end())
    if "phone" in selected:
        yield from _find_phones(text, low, high)


def _is_ip_address(match: re.Match) -> bool:
    """Whether four numbers are an IP address: not local, not a netmask, and likely not a version."""
    octets = [int(octet) for octet in match.groups()]
    if max(octets) > 255 or octets[0] in (0, 127) or octets[0] >= 240:
        return False
    if any(len(octet) > 1 and octet[0] == "0" for octet in match.groups()):
        return False
    before = match.string[max(match.start() - 32, 0) : match.start()]
    # Version and section numbers are small; an address of small numbers needs a word about networks before it.
    return not _VERSION_BEFORE.search(before) and (
        max(octets) >= 20 or octets[0] == 10 or bool(_NETWORK_WORD.search(before))
    )


def _is_card(written: str) -> bool:
    """Whether the length, the first digits and the Luhn check digit (ISO/IEC 7812-1, annex B) are those of a card."""
    digits = written.replace(" ", "").replace("-", "")
    network = _NETWORKS.get(len(digits))
    if not network or not network.match(digits) or len(set(digits)) < 2:
        return False
    numbers = [int(digit) for digit in reversed(digits)]
    return (sum(numbers[::2]) + sum(sum(divmod(2 * number, 10)) for number in numbers[1::2])) % 10 == 0


def _find_phones(text: str, low: int, high: int) -> Iterator[Span]:
    at = low
    while match := _PHONE.search(text, at, high):
        at = match.end()
        digits = sum(c.isdigit() for c in re.split("[xe]", match[0])[0])
        if 8 <= digits <= 15 and not _DATE.match(match[0]):
            yield Span("phone", match.start(), match.end())
    at = low
    while match := _LOOSE_PHONE.search(text, at, high):
        at = match.end()
        digits = sum(c.isdigit() for c in match[0].split("x")[0])
        if not 7 <= digits <= (15 if match[0].startswith("00") else 12) or _DATE.match(match[0]):
            continue
        before = text[max(match.start() - 48, 0) : match.start()]
        if _PHONE_WORD_BEFORE.search(before) or _PHONE_WORD_AFTER.match(text, match.end()):
            yield Span("phone", match.start(), match.end())


_COLONS = re.compile(r":[0-9A-Fa-f]{0,4}:")
_HEX = re.compile(r"[0-9A-Fa-f:]+(?:\.[0-9]{1,3}){0,3}")
_HEX_BEFORE = re.compile(r"[0-9A-Fa-f:]*\Z")


def _find_ipv6(text: str) -> Iterator[Span]:
    last = 0
    for colons in _COLONS.finditer(text):
        if colons.start() < last:
            continue
        before = _HEX_BEFORE.search(text, max(colons.start() - 5, last), colons.start())
        begin = before.start() if before else colons.start()
        match = _HEX.match(text, begin, begin + 60)
        if not match:
            continue
        last = match.end()
        written = match[0].rstrip(":") if not match[0].endswith("::") else match[0]
        # Code contains names such as a::b; an address has digits, and more than two parts.
        if len(written) < 8 or not any(c.isdigit() for c in written) or written.count(":") < 3:
            continue
        around = text[max(begin - 1, 0) : begin] + text[begin + len(written) : begin + len(written) + 1]
        if any(c.isalnum() or c in "_" for c in around):
            continue
        try:
            address = ipaddress.IPv6Address(written)
        except ValueError:
            continue
        if not address.is_loopback and not address.is_unspecified:
            yield Span("ip", begin, begin + len(written))
