"""Settings of the quality filters and of the classifier."""

import dataclasses

from llmjax.errors import UserError, suggest

RULE_SETS = ("gopher", "repetition", "c4", "fineweb")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """Published quality rules and their bounds: a text that violates one is dropped. None switches a rule off.

    A rule is named like its field, and so is the reason of a dropped text. Defaults are the published bounds (with
    sources in quality.RULES), except those marked *: these would drop prose and documentation.

    rules  sets of rules in effect: gopher and repetition (Rae et al. 2021), c4 (Raffel et al. 2020), fineweb (Penedo et
           al. 2024)

    Lines that c4 removes before a text is scored:
    c4_remove_citations              * remove marks such as [3], [edit], [citation needed] from lines (on in FineWeb);
                                     also the index of a[3] in code
    c4_require_terminal_punctuation  * remove lines that do not end in . ? ! " or ' (off in FineWeb too)
    c4_min_line_words                * remove lines of fewer words (3); empty lines stay, they separate paragraphs
    c4_max_word_length               remove lines with a longer word, in characters
    c4_remove_javascript             * remove lines that mention javascript (on in FineWeb); also texts about it
    c4_remove_policy                 remove lines that mention cookies, privacy or terms of use

    Bounds:
    gopher_min_words, gopher_max_words        number of words * (100,000: web pages; books are longer)
    gopher_min_mean_word_length               characters per word; for English only
    gopher_max_mean_word_length               characters per word
    gopher_max_hashes, gopher_max_ellipses    of "#", of "..." and "…", per word
    gopher_max_bullet_lines                   fraction of lines that begin with a bullet
    gopher_max_ellipsis_lines                 fraction of lines that end in an ellipsis
    gopher_min_alphabetic                     fraction of words with a letter
    gopher_min_stop_words                     how many of eight English words occur; for English only
    repetition_max_duplicate_lines            fraction of lines that equal an earlier one
    repetition_max_duplicate_paragraphs       the same for paragraphs
    repetition_max_duplicate_line_chars       fraction of characters in those lines
    repetition_max_duplicate_paragraph_chars  fraction of characters in those paragraphs
    repetition_max_top_2gram to 4gram         fraction of characters in the most frequent n-gram
    repetition_max_duplicate_5gram to 10gram  fraction of characters in n-grams that occurred before
    c4_min_sentences                          number of sentences
    c4_max_lorem_ipsum, c4_max_curly_brackets * occurrences of "lorem ipsum", of "{" (0: no code at all)
    fineweb_min_punctuated_lines              * fraction of lines that end a sentence; lines that one sentence continues
                                              over, with a small letter, count as one
    fineweb_max_short_lines                   fraction of lines of at most 30 characters
    fineweb_max_duplicate_text_chars          * fraction of characters, without newlines, in lines that equal an earlier
                                              one (0.01: code repeats short lines, and long texts repeat more)
    fineweb_max_newlines                      newlines per word

    classifier            file of a model that `llmjax curate classifier` saved; empty: none
    min_classifier_score  the model's minimum probability from 0 to 1 that a text is good; None: no bound
    """

    rules: tuple[str, ...] = RULE_SETS
    c4_remove_citations: bool = False
    c4_require_terminal_punctuation: bool = False
    c4_min_line_words: int = 1
    c4_max_word_length: int = 1000
    c4_remove_javascript: bool = False
    c4_remove_policy: bool = True
    gopher_min_words: float | None = 50
    gopher_max_words: float | None = None
    gopher_min_mean_word_length: float | None = 3
    gopher_max_mean_word_length: float | None = 10
    gopher_max_hashes: float | None = 0.1
    gopher_max_ellipses: float | None = 0.1
    gopher_max_bullet_lines: float | None = 0.9
    gopher_max_ellipsis_lines: float | None = 0.3
    gopher_min_alphabetic: float | None = 0.8
    gopher_min_stop_words: float | None = 2
    repetition_max_duplicate_lines: float | None = 0.3
    repetition_max_duplicate_paragraphs: float | None = 0.3
    repetition_max_duplicate_line_chars: float | None = 0.2
    repetition_max_duplicate_paragraph_chars: float | None = 0.2
    repetition_max_top_2gram: float | None = 0.2
    repetition_max_top_3gram: float | None = 0.18
    repetition_max_top_4gram: float | None = 0.16
    repetition_max_duplicate_5gram: float | None = 0.15
    repetition_max_duplicate_6gram: float | None = 0.14
    repetition_max_duplicate_7gram: float | None = 0.13
    repetition_max_duplicate_8gram: float | None = 0.12
    repetition_max_duplicate_9gram: float | None = 0.11
    repetition_max_duplicate_10gram: float | None = 0.1
    c4_min_sentences: float | None = 5
    c4_max_lorem_ipsum: float | None = 0
    c4_max_curly_brackets: float | None = None
    fineweb_min_punctuated_lines: float | None = 0.12
    fineweb_max_short_lines: float | None = 0.67
    fineweb_max_duplicate_text_chars: float | None = 0.1
    fineweb_max_newlines: float | None = 0.3
    classifier: str = ""
    min_classifier_score: float | None = None

    def __post_init__(self):
        for name in self.rules:
            if name not in RULE_SETS:
                raise UserError(
                    f"curate.quality.rules names {name!r}{suggest(str(name), RULE_SETS)}: choose from "
                    f"{', '.join(RULE_SETS)}"
                )
        for name in ("c4_min_line_words", "c4_max_word_length"):
            if not 1 <= (value := getattr(self, name)) <= 1_000_000:
                raise UserError(f"curate.quality.{name}={value}: expected 1 up to 1,000,000")
        if self.min_classifier_score is not None and not self.classifier:
            raise UserError(
                f"curate.quality.min_classifier_score={self.min_classifier_score}: there is no model; set "
                "curate.quality.classifier"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """How the linear classifier of good and bad texts is trained.

    num_buckets        hash buckets of the features (words, word pairs, four-byte pieces); a power of two
    max_characters     of a text, from its beginning
    epochs             passes over the texts
    batch_size         texts per step
    learning_rate      of AdaGrad
    held_out_fraction  of the texts, chosen by a hash, that evaluates a first model; the final model trains on all texts
    seed               of the hashes and of the order of the texts
    """

    num_buckets: int = 1 << 18
    max_characters: int = 5000
    epochs: int = 5
    batch_size: int = 32
    learning_rate: float = 0.3
    held_out_fraction: float = 0.2
    seed: int = 0

    def __post_init__(self):
        if self.num_buckets < 2 or self.num_buckets & (self.num_buckets - 1):
            raise UserError(f"num_buckets={self.num_buckets} of the classifier: expected a power of two")
        for name in ("max_characters", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} of the classifier: expected at least 1")
        if not 0 <= self.held_out_fraction < 1:
            raise UserError(
                f"held_out_fraction={self.held_out_fraction} of the classifier: expected a fraction from 0 to below 1"
            )
