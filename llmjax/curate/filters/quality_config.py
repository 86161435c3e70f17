"""Settings of the quality filters and of the classifier."""

import dataclasses

from llmjax.errors import UserError, suggest

RULE_SETS = ("gopher", "repetition", "c4", "fineweb")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """Published rules of quality, and their bounds: a text that breaks one is dropped. None switches a rule off.

    A field is named as its rule, and so is the reason that a dropped text is given. Defaults are the published bounds
    (quality.RULES has them with their sources) but for those marked *, which prose and documentation would not survive.

    rules  the sets that apply: gopher and repetition (Rae et al. 2021), c4 (Raffel et al. 2020), fineweb (Penedo et
           al. 2024)

    Lines that c4 removes from a text before it is judged:
    c4_citations             * take marks such as [3], [edit], [citation needed] out of lines (on in FineWeb): also the
                             index of a[3] in code
    c4_terminal_punctuation  * remove lines that end in no . ? ! " or ' (off in FineWeb too)
    c4_min_line_words        * remove lines of fewer words (3); empty lines stay, as they part paragraphs
    c4_max_word              remove lines with a longer word, in characters
    c4_javascript            * remove lines that mention javascript (on in FineWeb): also those about the language
    c4_policy                remove lines that speak of cookies, privacy or terms of use

    Bounds:
    gopher_min_words, gopher_max_words            words * (100,000: web pages; books are longer)
    gopher_min_mean_word, gopher_max_mean_word    characters of a word in the mean; the least is asked of English only
    gopher_max_hashes, gopher_max_ellipses        of "#", of "..." and "…", per word
    gopher_max_bullet_lines                       fraction of lines that begin with a bullet
    gopher_max_ellipsis_lines                     fraction of lines that end in an ellipsis
    gopher_min_alphabetic                         fraction of words with a letter
    gopher_min_stop_words                         different ones of eight English words; asked of English only
    repetition_max_lines, _paragraphs             fraction of them that are copies of an earlier one
    repetition_max_line_chars, _paragraph_chars   fraction of characters in those copies
    repetition_max_top_2, _3, _4                  fraction of characters in the most frequent run of so many words
    repetition_max_5 to repetition_max_10         fraction of characters in runs of so many words that occurred before
    c4_min_sentences                              sentences
    c4_max_lorem_ipsum, c4_max_curly_brackets     * occurrences of "lorem ipsum", of "{" (0: no code at all)
    fineweb_min_punctuated_lines                  * fraction of lines that end a sentence; a line whose sentence goes on
                                                  in the next, with a small letter, is one with it
    fineweb_max_short_lines                       fraction of lines of at most 30 characters
    fineweb_max_line_chars                        * fraction of characters in copies of lines (0.01: code repeats short
                                                  lines, and long texts repeat more)
    fineweb_max_newlines                          newlines per word

    classifier      a model that `llmjax curate classifier` saved; empty: none
    min_classifier  its probability from 0 to 1 that a text is good, at least; None: only written beside the text
    """

    rules: tuple[str, ...] = RULE_SETS
    c4_citations: bool = False
    c4_terminal_punctuation: bool = False
    c4_min_line_words: int = 1
    c4_max_word: int = 1000
    c4_javascript: bool = False
    c4_policy: bool = True
    gopher_min_words: float | None = 50
    gopher_max_words: float | None = None
    gopher_min_mean_word: float | None = 3
    gopher_max_mean_word: float | None = 10
    gopher_max_hashes: float | None = 0.1
    gopher_max_ellipses: float | None = 0.1
    gopher_max_bullet_lines: float | None = 0.9
    gopher_max_ellipsis_lines: float | None = 0.3
    gopher_min_alphabetic: float | None = 0.8
    gopher_min_stop_words: float | None = 2
    repetition_max_lines: float | None = 0.3
    repetition_max_paragraphs: float | None = 0.3
    repetition_max_line_chars: float | None = 0.2
    repetition_max_paragraph_chars: float | None = 0.2
    repetition_max_top_2: float | None = 0.2
    repetition_max_top_3: float | None = 0.18
    repetition_max_top_4: float | None = 0.16
    repetition_max_5: float | None = 0.15
    repetition_max_6: float | None = 0.14
    repetition_max_7: float | None = 0.13
    repetition_max_8: float | None = 0.12
    repetition_max_9: float | None = 0.11
    repetition_max_10: float | None = 0.1
    c4_min_sentences: float | None = 5
    c4_max_lorem_ipsum: float | None = 0
    c4_max_curly_brackets: float | None = None
    fineweb_min_punctuated_lines: float | None = 0.12
    fineweb_max_short_lines: float | None = 0.67
    fineweb_max_line_chars: float | None = 0.1
    fineweb_max_newlines: float | None = 0.3
    classifier: str = ""
    min_classifier: float | None = None

    def __post_init__(self):
        for name in self.rules:
            if name not in RULE_SETS:
                raise UserError(
                    f"curate.quality.rules names {name!r}{suggest(str(name), RULE_SETS)}: known are "
                    f"{', '.join(RULE_SETS)}"
                )
        for name in ("c4_min_line_words", "c4_max_word"):
            if not 1 <= (value := getattr(self, name)) <= 1_000_000:
                raise UserError(f"curate.quality.{name}={value}: expected 1 up to 1,000,000")
        if self.min_classifier is not None and not self.classifier:
            raise UserError(
                f"curate.quality.min_classifier={self.min_classifier}: no model given; set curate.quality.classifier"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """How the linear classifier of good and bad texts learns.

    buckets        features (words, pairs of words, pieces of four bytes) are hashed into so many, a power of two
    characters     read of a text at most, from its beginning
    epochs         passes over the texts
    batch          texts of a step
    learning_rate  of AdaGrad
    held_out       fraction of the texts, drawn by their content, to measure a first model by; a second learns from all
    seed           of the hashes and of the order of the texts
    """

    buckets: int = 1 << 18
    characters: int = 5000
    epochs: int = 5
    batch: int = 32
    learning_rate: float = 0.3
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self):
        if self.buckets < 2 or self.buckets & (self.buckets - 1):
            raise UserError(f"buckets={self.buckets} of the classifier: expected a power of two")
        for name in ("characters", "epochs", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} of the classifier: expected at least 1")
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out={self.held_out} of the classifier: expected a fraction from 0 up to below 1")
