"""Published quality filters: scores are computed once, and thresholds are applied to them.

Sources of the rules, thresholds and word lists:
  Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher", arXiv 2112.11446,
      appendix A.1.1 and table A1;
  Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
      arXiv 1910.10683, section 2.2 and the code of its data set, C4;
  Penedo et al. 2024, "The FineWeb Datasets", arXiv 2406.17557, section 3.6.
Where a paper leaves something open (which line ends count, what a second copy is) it is settled as in datatrove, the
code of FineWeb, but for words: those are what white space parts, and in scripts that use none (Chinese, Japanese, Thai,
...) each letter. datatrove makes every punctuation mark a word of its own.
"""

# ruff: noqa: RUF001  (letters and marks of other scripts are meant)

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import itertools
import re
from typing import Any

import numpy as np

from llmjax.curate.filters.quality_config import QualityConfig

_DEFAULTS = QualityConfig()
_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_STOP_FORMS = {form for word in _STOP_WORDS for form in (word, word.capitalize(), word.upper())}
_SPACELESS = (  # Thai to Tibetan, Burmese, Khmer, kana, Han
    "\u0e01-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3031-\u3035\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uaa60-\uaadf\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
_HAS_SPACELESS = re.compile(f"[{_SPACELESS}]")
_WORD = re.compile(f"[{_SPACELESS}]|[^\\s{_SPACELESS}]+")
_LETTER = re.compile(r"[^\W\d_]")
_DIGIT = re.compile(r"\d")
_MARKS_OF_SENTENCES = ".,;:?!()\"'“”‘’«»–—-。，、；：？！（）「」『』"
_TOP, _REPEATED = (2, 3, 4), (5, 6, 7, 8, 9, 10)  # words of the runs that Gopher looks for

# What ends a sentence, in many scripts.
_ENDS = tuple(".?!。．｡？！﹖﹗‼‽⁇⁈⁉⸮؟۔।॥։።፧፨၊။។៕᠃᠉᙮꓿꘎꘏꤯꩝꩞꩟꫰꫱꯫")
_INNER_END = re.compile(r"""[.?!]["'”’)\]]*[^\S\n]+(?=\S)|[。？！](?=[^\s」』”’）])""")
_PARAGRAPH = re.compile("\n{2,}")
_BULLETS, _ELLIPSES = ("•", "-"), ("...", "…")
_SHORT_LINE = 30  # characters, of FineWeb

_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_C4_ENDS = (".", "?", "!", '"', "'", "”", "’")


@dataclasses.dataclass(frozen=True)
class Rule:
    """A bound on a score.

    name       of the rule, of the field of QualityConfig that holds its bound, and of the reason for dropping a text
    score      that it reads
    published  the bound that its source gives
    english    asked of English only
    spaced     asked only of text in scripts with spaces between words: in others a run of ten letters is no run of ten
               words, and each repeats
    """

    name: str
    score: str
    published: float
    source: str
    english: bool = False
    spaced: bool = False

    @property
    def rule_set(self) -> str:
        """The set of rules it is from, such as gopher."""
        return self.name.split("_")[0]

    @property
    def least(self) -> bool:
        """Whether the bound is the least that the score may be, else it is the most."""
        return self.name.split("_")[1] == "min"


_GOPHER, _C4, _FINEWEB = "Rae et al. 2021, A.1.1", "Raffel et al. 2020, 2.2", "Penedo et al. 2024, 3.6"
_TABLE = "Rae et al. 2021, table A1"
RULES = (
    Rule("gopher_min_words", "words", 50, _GOPHER),
    Rule("gopher_max_words", "words", 100_000, _GOPHER),
    Rule("gopher_min_mean_word", "mean_word", 3, _GOPHER, english=True),
    Rule("gopher_max_mean_word", "mean_word", 10, _GOPHER, spaced=True),
    Rule("gopher_max_hashes", "hashes", 0.1, _GOPHER),
    Rule("gopher_max_ellipses", "ellipses", 0.1, _GOPHER),
    Rule("gopher_max_bullet_lines", "bullet_lines", 0.9, _GOPHER),
    Rule("gopher_max_ellipsis_lines", "ellipsis_lines", 0.3, _GOPHER),
    Rule("gopher_min_alphabetic", "alphabetic", 0.8, _GOPHER),
    Rule("gopher_min_stop_words", "stop_words", 2, _GOPHER, english=True),
    Rule("repetition_max_lines", "duplicate_lines", 0.3, _TABLE),
    Rule("repetition_max_paragraphs", "duplicate_paragraphs", 0.3, _TABLE),
    Rule("repetition_max_line_chars", "duplicate_line_chars", 0.2, _TABLE),
    Rule("repetition_max_paragraph_chars", "duplicate_paragraph_chars", 0.2, _TABLE),
    *(
        Rule(f"repetition_max_top_{n}", f"top_{n}", p, _TABLE, spaced=True)
        for n, p in zip(_TOP, (0.2, 0.18, 0.16), strict=True)
    ),
    *(
        Rule(f"repetition_max_{n}", f"repeated_{n}", p, _TABLE, spaced=True)
        for n, p in zip(_REPEATED, (0.15, 0.14, 0.13, 0.12, 0.11, 0.1), strict=True)
    ),
    Rule("c4_min_sentences", "sentences", 5, _C4),
    Rule("c4_max_lorem_ipsum", "lorem_ipsum", 0, _C4),
    Rule("c4_max_curly_brackets", "curly_brackets", 0, _C4),
    Rule("fineweb_min_punctuated_lines", "punctuated_joined_lines", 0.12, _FINEWEB),
    Rule("fineweb_max_short_lines", "short_lines", 0.67, _FINEWEB),
    Rule("fineweb_max_line_chars", "duplicate_text_line_chars", 0.01, _FINEWEB),
    Rule("fineweb_max_newlines", "newlines", 0.3, _FINEWEB),
)


def broken(score: Callable[[str], Any], english: Any, config: QualityConfig) -> Iterator[tuple[str, Any]]:
    """(name of a rule, whether it is broken), for the rules that apply, in the order of RULES.

    score     of a name, that of one text, or an array of those of many
    english   whether rules for English are asked: of the text, or of each, bool [texts]

    Rules read scores alone: a changed threshold needs no text. A score that is missing, NaN, breaks none.
    """
    spaceless = np.greater(score("spaceless"), 0.5)
    for rule in RULES:
        bound = getattr(config, rule.name)
        if bound is None or rule.rule_set not in config.rules:
            continue
        beyond = np.less(score(rule.score), bound) if rule.least else np.greater(score(rule.score), bound)
        beyond = beyond & english if rule.english else beyond
        yield rule.name, beyond & ~spaceless if rule.spaced else beyond
    if config.min_classifier is not None:
        yield "min_classifier", np.less(score("classifier"), config.min_classifier)


def failures(scores: Mapping[str, float], config: QualityConfig = _DEFAULTS, language: str = "en") -> list[str]:
    """Names of the rules that a text with these scores breaks, in the order of RULES.

    language   code of the text's; English-only rules are asked where it is "en"
    """
    return [name for name, fails in broken(scores.__getitem__, language == "en", config) if fails]


def split_words(text: str) -> list[str]:
    """What white space parts; in scripts that are written without it, each letter."""
    return _WORD.findall(text) if not text.isascii() and _HAS_SPACELESS.search(text) else text.split()


def scores(text: str) -> dict[str, float]:
    """All that the rules read, and `longest_word` besides. Every value is finite; a text without words has zeros.

    words, sentences, stop_words   numbers; words without a letter or digit are not counted, sentences are at least the
                                   lines, stop words are the different ones of the eight
    mean_word, longest_word        characters
    spaceless                      fraction of words that are a letter of a script without spaces
    hashes, ellipses, newlines     per word
    lorem_ipsum, curly_brackets    occurrences
    all others                     fractions of lines, words or characters, as their rules say
    """
    words = split_words(text)
    return _words(words, len(text)) | _lines(text, len(words))


def _words(words: list[str], chars: int) -> dict[str, float]:
    """Scores of the words of a text of so many characters."""
    known: dict[str, int] = {}
    # A word is known by the place where it first stands: `setdefault` keeps that.
    ids = np.fromiter(map(known.setdefault, words, itertools.count()), np.int64, len(words))
    first = np.fromiter(known.values(), np.int64, len(known))
    size = np.fromiter(map(len, known), np.int64, len(known))
    count = np.bincount(ids, minlength=1)[first]
    kind = np.fromiter(map(_kind, known), np.int8, len(known))
    solid = kind >= _DIGITS
    number, counted = int(count[solid].sum()), int(count[kind > _PUNCTUATION].sum())
    spaceless = int(count[kind == _LETTERS_WITHOUT_SPACES].sum())
    by_place = np.zeros(len(words), np.int64)
    by_place[first] = size
    return {
        "words": number,
        "mean_word": int((size * count)[solid].sum()) / max(1, number),
        "longest_word": int(size.max(initial=0)),
        "alphabetic": int(count[kind >= _LETTERS].sum()) / max(1, counted),
        "spaceless": spaceless / max(1, number),
        "stop_words": len({form.lower() for form in _STOP_FORMS.intersection(known)}),
    } | _runs(ids, by_place[ids], max(1, chars))


_PUNCTUATION, _SYMBOLS, _DIGITS, _LETTERS, _LETTERS_WITHOUT_SPACES = range(5)


def _kind(word: str) -> int:
    """Of what a word is: the first of letters, digits and symbols that is in it."""
    if not word.isascii() and _HAS_SPACELESS.match(word):
        return _LETTERS_WITHOUT_SPACES
    if _LETTER.search(word):
        return _LETTERS
    if _DIGIT.search(word):
        return _DIGITS
    return _SYMBOLS if word.strip(_MARKS_OF_SENTENCES) else _PUNCTUATION


def _runs(ids: np.ndarray, sizes: np.ndarray, chars: int) -> dict[str, float]:
    """Fractions of a text's characters in its most frequent run of n words, and in runs that occurred before.

    ids     int64 [words]; equal words have equal ones, below the number of words
    sizes   int64 [words], characters
    chars   of the text, white space included

    A run can occur twice only if the two runs in it that are a word shorter do: at each length only the places of
    those are looked at, and in ordinary text few are left after three words.
    """
    found = {f"top_{n}": 0.0 for n in _TOP} | {f"repeated_{n}": 0.0 for n in _REPEATED}
    ends = np.concatenate([[0], np.cumsum(sizes)])
    places, kinds = np.arange(len(ids)), ids
    for n in range(2, max(_REPEATED) + 1):
        follows = np.flatnonzero(places[1:] == places[:-1] + 1)
        if not follows.size:
            break
        places, keys = places[follows], kinds[follows] * len(ids) + kinds[follows + 1]
        _, kinds, counts = np.unique(keys, return_inverse=True, return_counts=True)
        counts = counts[kinds]
        twice = counts > 1
        places, kinds, counts = places[twice], kinds[twice], counts[twice]
        if not places.size:
            break
        if n in _TOP:
            top = int(counts.argmax())  # the first of those that are as frequent
            size = int(ends[places[top] + n] - ends[places[top]]) + n - 1
            found[f"top_{n}"] = size * int(counts[top]) / chars
        if n in _REPEATED:
            found[f"repeated_{n}"] = _repeated(places, kinds, ends[places + n] - ends[places], n) / chars
    return found


def _repeated(places: np.ndarray, kinds: np.ndarray, sizes: np.ndarray, n: int) -> int:
    """Characters in runs of n words that occurred before, none counted twice: after a copy the search goes on behind
    it. All arrays are int64 [runs that occur at least twice], in the order of the text."""
    seen: set[int] = set()
    total, free = 0, 0
    for place, kind, size in zip(places.tolist(), kinds.tolist(), sizes.tolist(), strict=True):
        if place < free:
            continue
        if kind in seen:
            total += size
            free = place + n
        else:
            seen.add(kind)
    return total


def _lines(text: str, parts: int) -> dict[str, float]:
    """Scores of the lines, paragraphs and characters of a text of so many words."""
    lines = text.split("\n")
    newlines = len(lines) - 1
    if newlines and not lines[-1]:
        lines.pop()
    filled = [line for line in lines if line and not line.isspace()]
    paragraphs = [part for part in _PARAGRAPH.split(text.strip("\n")) if part] if "\n\n" in text else [text]
    copies, copied = _copies(filled)
    paragraph_copies, paragraphs_copied = _copies(paragraphs)
    ellipses = text.count("...") + text.count("…")
    ended = [line.rstrip().endswith(_ENDS) for line in lines]
    goes_on = sum(not end and bool(line) and after[:1].islower() for end, line, after in _pairs(ended, lines))
    return {
        "sentences": len(filled) + len(_INNER_END.findall(text)),
        "hashes": text.count("#") / max(1, parts),
        "ellipses": ellipses / max(1, parts),
        "newlines": newlines / max(1, parts),
        "bullet_lines": sum(line.lstrip().startswith(_BULLETS) for line in filled) / len(lines),
        "ellipsis_lines": sum(line.rstrip().endswith(_ELLIPSES) for line in filled) / len(lines) if ellipses else 0.0,
        "short_lines": sum(len(line) <= _SHORT_LINE for line in filled) / max(1, len(filled)),
        "punctuated_lines": sum(ended) / max(1, len(filled)),
        "punctuated_joined_lines": sum(ended) / max(1, len(filled) - goes_on),
        "duplicate_lines": copies / max(1, len(filled)),
        "duplicate_line_chars": copied / max(1, len(text)),
        "duplicate_paragraphs": paragraph_copies / max(1, len(paragraphs)),
        "duplicate_paragraph_chars": paragraphs_copied / max(1, len(text)),
        "duplicate_text_line_chars": copied / max(1, len(text) - newlines),
        "lorem_ipsum": text.lower().count("lorem ipsum"),
        "curly_brackets": text.count("{"),
    }


def _pairs(ended: list[bool], lines: list[str]) -> Iterable[tuple[bool, str, str]]:
    return zip(ended, lines, lines[1:], strict=False)


def _copies(parts: list[str]) -> tuple[int, int]:
    """(number, characters) of those that equal an earlier one."""
    first = set(parts)
    if len(first) == len(parts):
        return 0, 0
    return len(parts) - len(first), sum(map(len, parts)) - sum(map(len, first))


def clean_lines(text: str, config: QualityConfig = _DEFAULTS) -> tuple[str, dict[str, int]]:
    """A text without the lines that C4 removes, and their number by reason, as C4 tries them; only what happened.

    long_word              a word of more than c4_max_word characters
    terminal_punctuation   no sentence ends at its end
    few_words              fewer than c4_min_line_words
    javascript, policy     mentions javascript; cookies, privacy or terms of use
    citations              marks taken out of lines, which stay

    Where C4 is not among the rules the text is as it was. Empty lines stay: they part paragraphs.
    """
    if "c4" not in config.rules:
        return text, {}
    counts: Counter[str] = Counter()
    lower = text.lower()
    citations = config.c4_citations and "[" in text
    javascript = config.c4_javascript and "javascript" in lower
    policy = [phrase for phrase in _POLICY if phrase in lower] if config.c4_policy else []
    long = re.compile(f"[^\\s{_SPACELESS}]{{{config.c4_max_word + 1}}}")

    def reason(line: str, words: int) -> str:
        if len(line) > config.c4_max_word and long.search(line):
            return "long_word"
        if config.c4_terminal_punctuation and not _ends_a_sentence(line):
            return "terminal_punctuation"
        if words < config.c4_min_line_words:
            return "few_words"
        if javascript and "javascript" in line.lower():
            return "javascript"
        if policy and any(phrase in line.lower() for phrase in policy):
            return "policy"
        return ""

    kept = []
    for line in text.split("\n"):
        if not line or line.isspace():
            kept.append(line)
            continue
        words = len(split_words(line)) if config.c4_min_line_words > 1 else 1
        if citations and "[" in line:
            line, taken = _CITATION.subn("", line)
            counts["citations"] += taken
        if why := reason(line, words):
            counts[why] += 1
        else:
            kept.append(line)
    return "\n".join(kept).strip("\n"), {name: count for name, count in counts.items() if count}


def _ends_a_sentence(line: str) -> bool:
    line = line.rstrip()
    return line.endswith(_C4_ENDS) and not line.endswith("...")
