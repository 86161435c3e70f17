"""Find secrets: keys and tokens with an issuer's prefix, and values assigned to a name such as password."""

from collections.abc import Iterator
import math
import re

_KEY_END = r"-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
# (substrings of which a text must contain one, pattern)
_PREFIXED: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("-----BEGIN ",),
        r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
        rf"(?s:.{{0,16384}}?{_KEY_END}|(?:\s{{0,4}}[A-Za-z0-9+/=]{{16,}}){{0,999}})",
    ),
    (("AKIA", "ASIA", "ABIA", "ACCA"), r"\bA(?:KIA|SIA|BIA|CCA)[A-Z2-7]{16}\b"),  # Amazon
    (("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"\bgh[pousr]_[A-Za-z0-9]{36,251}\b"),  # GitHub
    (("github_pat_",), r"\bgithub_pat_[A-Za-z0-9_]{60,100}\b"),
    (("glpat-",), r"\bglpat-[A-Za-z0-9_-]{20,}"),  # GitLab
    (("xox",), r"\bxox[abeoprs]-[A-Za-z0-9-]{10,250}"),  # Slack
    (("xapp-",), r"\bxapp-[0-9]-[A-Za-z0-9-]{10,250}"),
    (("hooks.slack.com/services/",), r"hooks\.slack\.com/services/T[A-Z0-9]{5,}/B[A-Z0-9]{5,}/[A-Za-z0-9]{20,}"),
    (("AIza",), r"\bAIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"),  # Google
    (("ya29.",), r"\bya29\.[A-Za-z0-9_-]{20,}"),
    (("GOCSPX-",), r"\bGOCSPX-[A-Za-z0-9_-]{28}"),
    (("eyJ",), r"\beyJ[A-Za-z0-9_-]{8,4000}\.eyJ[A-Za-z0-9_-]{8,8000}(?:\.[A-Za-z0-9_-]{0,4000})?"),  # JSON web tokens
    (("sk_live_", "rk_live_", "sk_test_"), r"\b[sr]k_(?:live|test)_[A-Za-z0-9]{16,}"),  # Stripe
    (("sk-",), r"\bsk-(?:[A-Za-z0-9]{2,8}-)*[A-Za-z0-9_]{20,200}"),  # model services
    (("hf_",), r"\bhf_[A-Za-z0-9]{30,}\b"),  # Hugging Face
    (("npm_",), r"\bnpm_[A-Za-z0-9]{36}\b"),
    (("pypi-",), r"\bpypi-[A-Za-z0-9_-]{50,}"),
    (("SG.",), r"\bSG\.[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{32,64}"),  # SendGrid
)
_PREFIXED_PATTERNS = tuple((prefixes, re.compile(pattern, re.ASCII)) for prefixes, pattern in _PREFIXED)
_NAMES = ("password", "passwd", "passphrase", "pwd", "secret", "token", "api_key", "apikey", "api-key", "access_key")
_NAMES += ("accesskey", "private_key", "auth_key", "credential")
_ASSIGNED = re.compile(
    r"""[A-Za-z0-9_-]{0,24}["']?\]?[ \t]{0,4}(?::=|=>|[:=])[ \t]{0,4}(["'`]?)([^\s"'`,;<>(){}\[\]]{6,256})(.?)""",
    re.ASCII,
)
_PLACEHOLDER = re.compile(
    r"\$|%[sd(]|your|example|change.?me|placeholder|x{4}|\*{3}|\.{3}|://|[{}<>]"
    r"|^(?:none|null|true|false|undefined|pass|passwd|password|pwd|secret)$",
    re.I,
)
_DIGIT_BESIDE_LETTER = re.compile(r"[0-9][A-Za-z]|[A-Za-z][0-9]")


def find_secrets(text: str) -> Iterator[tuple[int, int]]:
    """(begin, end) of secrets; they may overlap."""
    for prefixes, pattern in _PREFIXED_PATTERNS:
        if any(prefix in text for prefix in prefixes):
            for match in pattern.finditer(text):
                yield match.span()
    if "=" in text or ":" in text:
        yield from _find_assigned(text)


def _find_assigned(text: str) -> Iterator[tuple[int, int]]:
    lower = text.lower()
    if len(lower) != len(text):  # a few letters, such as U+0130, become two characters
        lower = "".join(c.lower() if c.isascii() else c for c in text)
    for name in _NAMES:
        at = lower.find(name)
        while at >= 0:
            match = _ASSIGNED.match(text, at + len(name))
            if match and _is_secret(match[2], name.startswith("pass") or name == "pwd", bool(match[1]), match[3]):
                yield match.span(2)
            at = lower.find(name, match.end() if match else at + len(name))


def is_placeholder(value: str) -> bool:
    """Whether a value only stands for a secret, such as `your_key` or `${KEY}`."""
    return bool(_PLACEHOLDER.search(value))


def _is_secret(value: str, is_password: bool, is_quoted: bool, following: str) -> bool:
    """Whether a value is likely a secret: letters and digits that look random, not a name or a call in code.

    For passwords less is required: a quoted one only has to differ from a plain word.
    """
    if is_placeholder(value) or following in ("(", "["):
        return False
    digits, letters = sum(c.isdigit() for c in value), sum(c.isalpha() for c in value)
    if is_password:
        if is_quoted:
            has_symbol = any(not c.isalnum() and c not in "._-/" for c in value)
            return letters > 0 and (digits > 0 or has_symbol)
        return digits > 0 and letters > 0 and len(value) >= 8 and _compute_entropy(value) > 2.5
    return (
        len(value) >= 16
        and digits > 1
        and len(_DIGIT_BESIDE_LETTER.findall(value)) > 1
        and _compute_entropy(value) > 3.0
    )


def _compute_entropy(value: str) -> float:
    """Shannon entropy of the characters, in bits per character."""
    counts = [value.count(c) for c in set(value)]
    return -sum(n / len(value) * math.log2(n / len(value)) for n in counts)
