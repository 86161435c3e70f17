"""Published quality filters: scores are computed once, and thresholds are applied to them.

Sources of the rules, thresholds and word lists:
  Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher", arXiv 2112.11446,
      appendix A.1.1 and table A1;
  Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
      arXiv 1910.10683, section 2.2 and the code of its data set, C4;
  Penedo et al. 2024, "The FineWeb Datasets", arXiv 2406.17557, section 3.6.
Details that the papers leave open (which characters end a line, what counts as a repeat) follow datatrove, the code of
FineWeb. One thing differs: words are separated by white space, and in scripts without spaces (Chinese, Japanese, Thai)
every letter is a word. In datatrove every punctuation mark is also a word.
"""

# ruff: noqa: RUF001  (letters and marks of other scripts are intended)

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
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
_SENTENCE_PUNCTUATION = ".,;:?!()\"'“”‘’«»–—-。，、；：？！（）「」『』"
_TOP_NGRAMS, _DUPLICATE_NGRAMS = (2, 3, 4), (5, 6, 7, 8, 9, 10)  # of Gopher

# The end of a sentence, in many scripts.
_SENTENCE_ENDS = tuple(".?!。．｡？！﹖﹗‼‽⁇⁈⁉⸮؟۔।॥։።፧፨၊။។៕᠃᠉᙮꓿꘎꘏꤯꩝꩞꩟꫰꫱꯫")
_INNER_END = re.compile(r"""[.?!]["'”’)\]]*[^\S\n]+(?=\S)|[。？！](?=[^\s」』”’）])""")
_PARAGRAPH = re.compile("\n{2,}")
_BULLETS, _ELLIPSES = ("•", "-"), ("...", "…")
_SHORT_LINE = 30  # characters, as in FineWeb

_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_C4_ENDS = (".", "?", "!", '"', "'", "”", "’")


@dataclasses.dataclass(frozen=True)
class Rule:
    """A bound on a score.

    name          SET_min_SCORE or SET_max_SCORE: the field of QualityConfig with the bound, and the reason for a drop
    published     the bound in the source
    english_only  applies to English only
    spaced_only   applies only to scripts that separate words by spaces: elsewhere every letter counts as a word
    """

    name: str
    published: float
    english_only: bool = False
    spaced_only: bool = False

    @property
    def rule_set(self) -> str:
        """The set of rules that it belongs to, such as gopher."""
        return self.name.split("_")[0]

    @property
    def is_minimum(self) -> bool:
        """Whether the bound is a minimum; otherwise it is a maximum."""
        return self.name.split("_")[1] == "min"

    @property
    def score(self) -> str:
        """The name of the score that it bounds."""
        return self.name.split("_", 2)[2]


RULES = (
    # Rae et al. 2021, A.1.1
    Rule("gopher_min_words", 50),
    Rule("gopher_max_words", 100_000),
    Rule("gopher_min_mean_word_length", 3, english_only=True),
    Rule("gopher_max_mean_word_length", 10, spaced_only=True),
    Rule("gopher_max_hashes", 0.1),
    Rule("gopher_max_ellipses", 0.1),
    Rule("gopher_max_bullet_lines", 0.9),
    Rule("gopher_max_ellipsis_lines", 0.3),
    Rule("gopher_min_alphabetic", 0.8),
    Rule("gopher_min_stop_words", 2, english_only=True),
    # Rae et al. 2021, table A1
    Rule("repetition_max_duplicate_lines", 0.3),
    Rule("repetition_max_duplicate_paragraphs", 0.3),
    Rule("repetition_max_duplicate_line_chars", 0.2),
    Rule("repetition_max_duplicate_paragraph_chars", 0.2),
    Rule("repetition_max_top_2gram", 0.2, spaced_only=True),
    Rule("repetition_max_top_3gram", 0.18, spaced_only=True),
    Rule("repetition_max_top_4gram", 0.16, spaced_only=True),
    *(Rule(f"repetition_max_duplicate_{n}gram", (20 - n) / 100, spaced_only=True) for n in _DUPLICATE_NGRAMS),
    # Raffel et al. 2020, 2.2
    Rule("c4_min_sentences", 5),
    Rule("c4_max_lorem_ipsum", 0),
    Rule("c4_max_curly_brackets", 0),
    # Penedo et al. 2024, 3.6
    Rule("fineweb_min_punctuated_lines", 0.12),
    Rule("fineweb_max_short_lines", 0.67),
    Rule("fineweb_max_duplicate_text_chars", 0.01),
    Rule("fineweb_max_newlines", 0.3),
)


def find_violations(
    get_score: Callable[[str], Any], is_english: Any, config: QualityConfig
) -> Iterator[tuple[str, Any]]:
    """(name of a rule, whether it is violated) of the rules in effect, in the order of RULES.

    get_score    name -> the score of one text, or an array of the scores of many
    is_english   whether the rules for English apply: one bool, or bool [texts]
    A missing score (NaN) violates no rule.
    """
    is_spaceless = np.greater(get_score("spaceless"), 0.5)
    for rule in RULES:
        bound = getattr(config, rule.name)
        if bound is None or rule.rule_set not in config.rules:
            continue
        is_violated = (np.less if rule.is_minimum else np.greater)(get_score(rule.score), bound)
        if rule.english_only:
            is_violated = is_violated & is_english
        yield rule.name, is_violated & ~is_spaceless if rule.spaced_only else is_violated
    if config.min_classifier_score is not None:
        yield "min_classifier_score", np.less(get_score("classifier"), config.min_classifier_score)


def list_violations(scores: Mapping[str, float], config: QualityConfig = _DEFAULTS, language: str = "en") -> list[str]:
    """Names of the rules that a text with these scores and this language code violates, in the order of RULES."""
    return [name for name, violated in find_violations(scores.__getitem__, language == "en", config) if violated]


def split_words(text: str) -> list[str]:
    """The parts between white space; in scripts without spaces, the letters."""
    return _WORD.findall(text) if not text.isascii() and _HAS_SPACELESS.search(text) else text.split()


def compute_scores(text: str) -> dict[str, float]:
    """The scores that the rules bound. All are finite; a text without words has zeros.

    words, sentences, stop_words   counts; words consist not only of punctuation, a line has at least one sentence, and
                                   each of the eight stop words counts once
    mean_word_length               characters
    spaceless                      fraction of words that are letters of scripts without spaces
    hashes, ellipses, newlines     per word
    lorem_ipsum, curly_brackets    occurrences
    others                         fractions of lines, words or characters, see the rules
    """
    words = split_words(text)
    return _score_words(words, len(text)) | _score_lines(text, len(words))


def _score_words(words: list[str], num_chars: int) -> dict[str, float]:
    first_positions: dict[str, int] = {}
    # The id of a word is the position of its first occurrence, which `setdefault` keeps.
    ids = np.fromiter(map(first_positions.setdefault, words, itertools.count()), np.int64, len(words))
    first = np.fromiter(first_positions.values(), np.int64, len(first_positions))
    lengths = np.fromiter(map(len, first_positions), np.int64, len(first_positions))
    counts = np.bincount(ids, minlength=1)[first]
    kinds = np.fromiter(map(_classify_word, first_positions), np.int8, len(first_positions))
    has_letter_or_digit = kinds >= _DIGITS
    num_words = int(counts[has_letter_or_digit].sum())
    length_by_id = np.zeros(len(words), np.int64)
    length_by_id[first] = lengths
    return {
        "words": num_words,
        "mean_word_length": int((lengths * counts)[has_letter_or_digit].sum()) / max(1, num_words),
        "alphabetic": int(counts[kinds >= _LETTERS].sum()) / max(1, int(counts[kinds > _PUNCTUATION].sum())),
        "spaceless": int(counts[kinds == _SPACELESS_LETTER].sum()) / max(1, num_words),
        "stop_words": len({form.lower() for form in _STOP_FORMS.intersection(first_positions)}),
    } | _score_ngrams(ids, length_by_id[ids], max(1, num_chars))


_PUNCTUATION, _SYMBOLS, _DIGITS, _LETTERS, _SPACELESS_LETTER = range(5)


def _classify_word(word: str) -> int:
    if not word.isascii() and _HAS_SPACELESS.match(word):
        return _SPACELESS_LETTER
    if _LETTER.search(word):
        return _LETTERS
    if _DIGIT.search(word):
        return _DIGITS
    return _SYMBOLS if word.strip(_SENTENCE_PUNCTUATION) else _PUNCTUATION


def _score_ngrams(ids: np.ndarray, lengths: np.ndarray, num_chars: int) -> dict[str, float]:
    """Fractions of the characters in the most frequent n-gram, and in n-grams that occurred before.

    ids        int64 [words], the same for equal words, below the number of words
    lengths    int64 [words], characters
    num_chars  of the text, white space included

    An n-gram repeats only if both (n-1)-grams in it repeat: each pass looks only at the positions of those. In
    ordinary text few are left after three words.
    """
    scores = {f"top_{n}gram": 0.0 for n in _TOP_NGRAMS} | {f"duplicate_{n}gram": 0.0 for n in _DUPLICATE_NGRAMS}
    ends = np.concatenate([[0], np.cumsum(lengths)])
    positions, grams = np.arange(len(ids)), ids
    for n in range(2, max(_DUPLICATE_NGRAMS) + 1):
        adjacent = np.flatnonzero(positions[1:] == positions[:-1] + 1)
        if not adjacent.size:
            break
        positions, keys = positions[adjacent], grams[adjacent] * len(ids) + grams[adjacent + 1]
        _, grams, counts = np.unique(keys, return_inverse=True, return_counts=True)
        counts = counts[grams]
        repeats = counts > 1
        positions, grams, counts = positions[repeats], grams[repeats], counts[repeats]
        if not positions.size:
            break
        if n in _TOP_NGRAMS:
            top = int(counts.argmax())  # the first of equally frequent ones
            length = int(ends[positions[top] + n] - ends[positions[top]]) + n - 1
            scores[f"top_{n}gram"] = length * int(counts[top]) / num_chars
        if n in _DUPLICATE_NGRAMS:
            num_repeated = _count_repeated_chars(positions, grams, ends[positions + n] - ends[positions], n)
            scores[f"duplicate_{n}gram"] = num_repeated / num_chars
    return scores


def _count_repeated_chars(positions: np.ndarray, grams: np.ndarray, lengths: np.ndarray, n: int) -> int:
    """Characters in n-grams that occurred before, none counted twice: after a repeat the search resumes behind it.

    All arrays are int64 [n-grams that occur at least twice], in the order of the text.
    """
    occurred: set[int] = set()
    total, resume_at = 0, 0
    for position, gram, length in zip(positions.tolist(), grams.tolist(), lengths.tolist(), strict=True):
        if position < resume_at:
            continue
        if gram in occurred:
            total += length
            resume_at = position + n
        else:
            occurred.add(gram)
    return total


def _score_lines(text: str, num_words: int) -> dict[str, float]:
    lines = text.split("\n")
    newlines = len(lines) - 1
    if newlines and not lines[-1]:
        lines.pop()
    filled = [line for line in lines if line and not line.isspace()]
    paragraphs = [part for part in _PARAGRAPH.split(text.strip("\n")) if part] if "\n\n" in text else [text]
    duplicate_lines, duplicate_line_chars = _count_duplicates(filled)
    duplicate_paragraphs, duplicate_paragraph_chars = _count_duplicates(paragraphs)
    ellipses = text.count("...") + text.count("…")
    ends_sentence = [line.rstrip().endswith(_SENTENCE_ENDS) for line in lines]
    # A line whose sentence continues in the next one, with a small letter, is the same line.
    num_continued = sum(
        not ends and bool(line) and following[:1].islower()
        for ends, line, following in zip(ends_sentence, lines, lines[1:], strict=False)
    )
    return {
        "sentences": len(filled) + len(_INNER_END.findall(text)),
        "hashes": text.count("#") / max(1, num_words),
        "ellipses": ellipses / max(1, num_words),
        "newlines": newlines / max(1, num_words),
        "bullet_lines": sum(line.lstrip().startswith(_BULLETS) for line in filled) / len(lines),
        "ellipsis_lines": sum(line.rstrip().endswith(_ELLIPSES) for line in filled) / len(lines) if ellipses else 0.0,
        "short_lines": sum(len(line) <= _SHORT_LINE for line in filled) / max(1, len(filled)),
        "punctuated_lines": sum(ends_sentence) / max(1, len(filled) - num_continued),
        "duplicate_lines": duplicate_lines / max(1, len(filled)),
        "duplicate_line_chars": duplicate_line_chars / max(1, len(text)),
        "duplicate_paragraphs": duplicate_paragraphs / max(1, len(paragraphs)),
        "duplicate_paragraph_chars": duplicate_paragraph_chars / max(1, len(text)),
        "duplicate_text_chars": duplicate_line_chars / max(1, len(text) - newlines),
        "lorem_ipsum": text.lower().count("lorem ipsum"),
        "curly_brackets": text.count("{"),
    }


def _count_duplicates(parts: list[str]) -> tuple[int, int]:
    """(number, characters) of the parts that equal an earlier one."""
    unique = set(parts)
    if len(unique) == len(parts):
        return 0, 0
    return len(parts) - len(unique), sum(map(len, parts)) - sum(map(len, unique))


def remove_c4_lines(text: str, config: QualityConfig = _DEFAULTS) -> tuple[str, dict[str, int]]:
    """(the text without the lines that C4 removes, number of removed lines by reason, in C4's order of checks).

    long_word              a word of more than c4_max_word_length characters
    terminal_punctuation   the line does not end with a sentence
    few_words              fewer than c4_min_line_words
    javascript, policy     mentions javascript; cookies, privacy or terms of use
    citations              citation marks that were removed; their lines are kept

    Without c4 among the rules the text is unchanged. Empty lines are kept: they separate paragraphs.
    """
    if "c4" not in config.rules:
        return text, {}
    counts: Counter[str] = Counter()
    lower = text.lower()
    has_citations = config.c4_remove_citations and "[" in text
    has_javascript = config.c4_remove_javascript and "javascript" in lower
    policy_phrases = [phrase for phrase in _POLICY if phrase in lower] if config.c4_remove_policy else []
    long_word = re.compile(f"[^\\s{_SPACELESS}]{{{config.c4_max_word_length + 1}}}")

    def find_reason(line: str, num_words: int) -> str:
        if len(line) > config.c4_max_word_length and long_word.search(line):
            return "long_word"
        if config.c4_require_terminal_punctuation and not _ends_c4_sentence(line):
            return "terminal_punctuation"
        if num_words < config.c4_min_line_words:
            return "few_words"
        if has_javascript and "javascript" in line.lower():
            return "javascript"
        if policy_phrases and any(phrase in line.lower() for phrase in policy_phrases):
            return "policy"
        return ""

    lines = []
    for line in text.split("\n"):
        if not line or line.isspace():
            lines.append(line)
            continue
        num_words = len(split_words(line)) if config.c4_min_line_words > 1 else 1
        if has_citations and "[" in line:
            line, num_citations = _CITATION.subn("", line)
            counts["citations"] += num_citations
        if reason := find_reason(line, num_words):
            counts[reason] += 1
        else:
            lines.append(line)
    return "\n".join(lines).strip("\n"), {name: count for name, count in counts.items() if count}


def _ends_c4_sentence(line: str) -> bool:
    line = line.rstrip()
    return line.endswith(_C4_ENDS) and not line.endswith("...")
