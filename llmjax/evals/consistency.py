"""Agreement of a text with a source or with samples, by rules on words and numbers, and how well a signal finds errors.

No model is used here.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
import decimal
import math
import re
from typing import NamedTuple

import numpy as np

from llmjax.evals.classification import check_lengths, split_halves

KINDS = ("names", "numbers", "dates")
NGRAM = 3  # words, of novel_ngrams
_APOSTROPHES = "'\u2019"
_QUOTES = "\"'`()\u2018\u2019\u201c\u201d"
_WORD = re.compile(rf"[0-9]+(?:[.,][0-9]+)*[^\W_]*|[^\W_]+(?:[{_APOSTROPHES}][^\W_]+)*")
_POSSESSIVE = re.compile(rf"[{_APOSTROPHES}]s?$")
_SENTENCE_START = re.compile(rf"(?:^|[.!?:\n])[\s{_QUOTES}]*$")
_BEFORE = 8  # characters before a word that say whether it begins a sentence
_SUFFIXED = re.compile(r"([0-9]+(?:\.[0-9]+)?)(?:st|nd|rd|th|s|k|m|bn)?")
_SMALL = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_NUMBER_WORDS = {word: str(value) for value, word in enumerate(_SMALL.split(), 1)}
_NUMBER_WORDS |= {word: str(value) for value, word in zip(range(20, 100, 10), _TENS.split(), strict=True)}
_PRONOUNS = {"one"}  # a number in a source, and mostly none in a text
_MONTHS = "january february april june july august september october november december"  # march and may are also verbs
_DAYS = "monday tuesday wednesday thursday friday saturday sunday"
_DATES = {*_MONTHS.split(), *_DAYS.split()}
_NO_NAMES = {"i", "i'm", "i've", "i'd", "i'll", "mr", "mrs", "ms", "dr"}


class Entity(NamedTuple):
    """A name, a number or a word of a date in a text.

    kind   one of KINDS
    text   as it is written
    key    what is looked for in a source: in lower case, without a possessive; of a number its decimal value
    """

    kind: str
    text: str
    key: str


def find_entities(text: str) -> Iterator[Entity]:
    """The names, numbers and words of dates of a text, in its order; each word counts by itself.

    names     words with a capital first letter that do not begin a sentence ("I" and titles such as "Mr" are none)
    numbers   digits, with any commas, decimals and suffixes ("1,000.5", "21st", "1990s"), and the number words "two" to
              "twenty", "thirty", ... "ninety"
    dates     months and days of the week in any case; "may" and "march" count as names, where these have a capital
    """
    for match in _WORD.finditer(text):
        word = match[0]
        key = _strip_possessive(word.casefold())
        if (value := _read_number(key)) is not None:
            if key not in _PRONOUNS:
                yield Entity("numbers", word, value)
        elif key in _DATES:
            yield Entity("dates", word, key)
        elif word[0].isupper() and key not in _NO_NAMES and not _begins_sentence(text, match.start()):
            yield Entity("names", word, key)


def find_unsupported(text: str, source: str) -> dict[str, tuple[list[str], int]]:
    """By kind (the entities of a text that its source lacks, the number of all its entities of that kind).

    A name or a date is in the source if the source has that word in any case; a number, if the source has a number of
    that value, in digits or as a word.
    """
    words = {_strip_possessive(match[0].casefold()) for match in _WORD.finditer(source)}
    values = {value for word in words if (value := _read_number(word)) is not None}
    lacking: dict[str, tuple[list[str], int]] = {}
    entities = list(find_entities(text))
    for kind in KINDS:
        of_kind = [entity for entity in entities if entity.kind == kind]
        known = values if kind == "numbers" else words
        lacking[kind] = [entity.text for entity in of_kind if entity.key not in known], len(of_kind)
    return lacking


def count_novel_ngrams(text: str, source: str, size: int = NGRAM) -> tuple[int, int]:
    """(n-grams of words of the text that the source lacks, all its n-grams), as See et al. 2017 (arXiv:1704.04368).

    A text with fewer words counts as one n-gram.
    """
    words, others = split_words(text), split_words(source)
    size = min(size, len(words))
    if not size:
        return 0, 0
    known = {tuple(others[start : start + size]) for start in range(len(others) - size + 1)}
    grams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    return sum(gram not in known for gram in grams), len(grams)


def unigram_surprise(text: str, samples: Sequence[str]) -> float:
    """Nats per word of a text under the unigrams of the samples and of the text itself; 0 for a text without words.

    The average of SelfCheckGPT with n-grams (Manakul et al. 2023, arXiv:2303.08896, section 5.4), n = 1: the text is
    counted with the samples, so that no word has the probability 0.
    """
    words = split_words(text)
    counts = Counter(words)
    for sample in samples:
        counts.update(split_words(sample))
    total = counts.total()
    return sum(math.log(total / counts[word]) for word in words) / max(len(words), 1)


def split_words(text: str) -> list[str]:
    """Words and numbers of a text in lower case, without punctuation."""
    return [match[0].casefold() for match in _WORD.finditer(text)]


def balanced_accuracy(is_positive: np.ndarray, predicted: np.ndarray) -> float:
    """The mean of the shares of positives and of negatives that were predicted as such (Brodersen et al. 2010).

    is_positive, predicted   bool [n]. nan without positives or without negatives
    """
    check_lengths(predicted, is_positive)
    if is_positive.all() or not is_positive.any():
        return math.nan
    return float((predicted[is_positive].mean() + (~predicted[~is_positive]).mean()) / 2)


def find_threshold(is_positive: np.ndarray, scores: np.ndarray) -> float:
    """The threshold above which scores are best called positive, by balanced accuracy; of equal ones the lowest.

    It lies between two scores, or is -inf or inf, where all or none are positive.
    """
    check_lengths(scores, is_positive)
    order = np.argsort(scores, kind="stable")
    values, positives = scores[order], is_positive[order].astype(np.float64)
    is_edge = np.append(np.diff(values) != 0, True)  # the last of equal scores
    thresholds = np.append((values[:-1] + values[1:]) / 2, math.inf)[is_edge]
    below = np.cumsum(1 - positives)[is_edge] / max(float((1 - positives).sum()), 1)
    missed = np.cumsum(positives)[is_edge] / max(float(positives.sum()), 1)
    gains = np.concatenate([[0.0], below - missed])
    return float(np.concatenate([[-math.inf], thresholds])[gains.argmax()])


def predict_crosswise(is_positive: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """bool [n]: each of `classification.split_halves` by the threshold that is best for the other half."""
    halves, predicted = split_halves(is_positive), np.zeros(len(scores), bool)
    for half in (0, 1):
        own, other = halves == half, halves != half
        if own.any() and other.any():
            predicted[own] = scores[own] > find_threshold(is_positive[other], scores[other])
    return predicted


def _begins_sentence(text: str, start: int) -> bool:
    """Whether nothing but quotes and white space lies between the end of a sentence and this place in the text."""
    return _SENTENCE_START.search(text[max(start - _BEFORE, 0) : start]) is not None


def _strip_possessive(word: str) -> str:
    return _POSSESSIVE.sub("", word)


def _read_number(word: str) -> str | None:
    """The decimal value of a number, an ordinal or a number word in lower case; None for any other word."""
    if word in _NUMBER_WORDS:
        return _NUMBER_WORDS[word]
    match = _SUFFIXED.fullmatch(word.replace(",", ""))
    return format(decimal.Decimal(match[1]).normalize(), "f") if match else None
