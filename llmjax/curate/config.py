"""Config of curation: inputs, the order of the stages, and the settings of each stage."""

from collections.abc import Mapping
import dataclasses
import re

from llmjax.curate.filters.quality_config import QualityConfig
from llmjax.data.config import FractionsConfig
from llmjax.errors import UserError, suggest

STAGES = (
    "read",
    "extract",
    "normalise",
    "language",
    "quality",
    "duplicates",
    "decontaminate",
    "personal_data",
    "sample",
    "split",
    "augment",
)


def _check_fractions(values: Mapping[str, float]) -> None:
    for field, value in values.items():
        if not 0 <= value <= 1:
            raise UserError(f"curate.{field}={value}: expected a number from 0 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputConfig:
    """One named input of documents.

    path              a file, a glob (`**` matches folders), `tfds:NAME[:SPLIT][@DATA_DIR]`, or `stdlib:` (the source
                      files of Python's standard library)
    format            "text", "lines" (a document per line), "jsonl", "json" (arrays, or objects over several lines),
                      "parquet", "csv", "tsv", "html" or "warc" (also ARC); empty: JSON is recognised by its content,
                      others by the file name
    text_field        field or column of the text in JSONL, Parquet, CSV, TSV and TFDS records
    id_field          field of the id; a record without one is named after its file and position
    max_record_bytes  a longer record, page or row is dropped and counted; text files are not records
    content           of text_field: "text", "html" or "auto", which treats texts that are HTML pages or fragments as
                      HTML; code, XML, Markdown and prose that contain tags stay unchanged
    encoding          of text, CSV, TSV and JSONL files that are not UTF-8; empty: detected (JSONL: lines are dropped)
    columns           column names of CSV and TSV files without a header line
    fields            other fields to copy to the output; ("*",): all
    weight            relative share of the kept tokens; None: no share (set it for all inputs or for none)
    max_tokens        approximate limit of kept tokens; 0: no limit
    licence           of the input; added to records without a field `licence`
    origin            of the input, such as a URL; added to records without a field `origin`
    """

    path: str = "stdlib:"
    format: str = ""
    text_field: str = "text"
    id_field: str = "id"
    max_record_bytes: int = 1 << 26
    content: str = "auto"
    encoding: str = ""
    columns: tuple[str, ...] = ()
    fields: tuple[str, ...] = ("*",)
    weight: float | None = None
    max_tokens: int = 0
    licence: str = ""
    origin: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PersonalDataConfig:
    """Personal data and secrets in a text.

    kinds   kinds to find: "email", "ip", "phone", "card" (payment cards), "iban", "ssn" (US social security numbers),
            "secret" (keys, tokens, passwords)
    action  "replace" by typed placeholders such as <EMAIL>, "drop" the document, or "count" only
    """

    kinds: tuple[str, ...] = ("email", "ip", "phone", "card", "iban", "ssn", "secret")
    action: str = "replace"

    def __post_init__(self):
        kinds = PersonalDataConfig.kinds
        for kind in self.kinds:
            if kind not in kinds:
                raise UserError(
                    f"curate.personal_data.kinds={self.kinds!r}: no kind {kind!r}{suggest(kind, kinds)}; choose from "
                    f"{', '.join(kinds)}"
                )
        if self.action not in ("replace", "drop", "count"):
            raise UserError(f"curate.personal_data.action={self.action!r}: expected 'replace', 'drop' or 'count'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormaliseConfig:
    """Repairs of every text.

    mojibake   undo UTF-8 that was decoded as another encoding, such as "cafÃ©" (ftfy)
    entities   replace HTML entities such as "&eacute;" by characters, except in lines with a "<", which show markup
    spaces     replace the various Unicode spaces by the ASCII space
    """

    mojibake: bool = True
    entities: bool = True
    spaces: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Which languages to keep.

    keep            codes such as ("en", "de"); empty: all
    min_confidence  minimum probability from 0 to 1 of the detected language; not applied if `keep` is empty
    max_characters  maximum number of characters to read, in `num_excerpts` evenly spaced excerpts
    num_excerpts    number of excerpts of a longer text
    """

    keep: tuple[str, ...] = ()
    min_confidence: float = 0.5
    max_characters: int = 1200
    num_excerpts: int = 4

    def __post_init__(self):
        _check_fractions({"language.min_confidence": self.min_confidence})
        if not 1 <= self.num_excerpts <= self.max_characters:
            raise UserError(
                f"curate.language.num_excerpts={self.num_excerpts}: expected 1 up to "
                f"curate.language.max_characters={self.max_characters}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DuplicatesConfig:
    """Removal of duplicates. Of copies, a document kept by an earlier run is kept, else one of the first input.

    exact       remove texts that are equal except for letter case and spacing
    near        remove texts that are similar to a kept one
    similarity  minimum Jaccard similarity of near-duplicates: of 5-word shingles, estimated from 112 MinHash values
    """

    exact: bool = True
    near: bool = True
    similarity: float = 0.6

    def __post_init__(self):
        if not 0 < self.similarity <= 1:
            raise UserError(f"curate.duplicates.similarity={self.similarity}: expected a value above 0 and up to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecontaminateConfig:
    """Removal of documents that share word n-grams with evaluation sets.

    against            files of evaluation sets: JSONL, JSON, CSV, Parquet (all texts of a record), or text (paragraphs)
    ngram_words        n
    min_words          an example of fewer than n words is matched as a whole if it has at least this many
    min_shared_ngrams  number of n-grams shared with one set from which a document is dropped
    """

    against: tuple[str, ...] = ()
    ngram_words: int = 13
    min_words: int = 8
    min_shared_ngrams: int = 1

    def __post_init__(self):
        if not 1 <= self.min_words <= self.ngram_words:
            raise UserError(
                f"curate.decontaminate.min_words={self.min_words}: expected 1 up to ngram_words={self.ngram_words}"
            )
        if self.min_shared_ngrams < 1:
            raise UserError(f"curate.decontaminate.min_shared_ngrams={self.min_shared_ngrams}: must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Balance of the inputs by their `max_tokens` and `weight`, and counts of terms.

    terms  files of word lists, with lines such as `gender/women: she, her`; empty: a small built-in list
    seed   selects the documents of an input of which only some are kept
    """

    terms: tuple[str, ...] = ()
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Changed copies of training documents, for fine-tuning on small sets.

    copies     number of copies of each document, with the ids ID~1, ID~2, ...
    drop       fraction of words to remove
    swap       fraction of words to swap with the next one
    lowercase  probability that a copy is all in lower case
    seed       of the random changes
    """

    copies: int = 1
    drop: float = 0.05
    swap: float = 0.05
    lowercase: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if self.copies < 1:
            raise UserError(
                f"curate.augment.copies={self.copies}: must be at least 1; or remove 'augment' from curate.stages"
            )
        _check_fractions({f"augment.{name}": getattr(self, name) for name in ("drop", "swap", "lowercase")})


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """From raw text to a corpus.

    inputs            inputs by name: section curate.inputs.NAME
    stages            to run, in this order: read extract normalise language quality duplicates decontaminate
                      personal_data sample split, and augment, which is not in the default
    max_bad_fraction  fraction of unreadable records or bytes of an input from which the command stops; fewer are
                      written to dropped/
    workers           processes of --runner=local; 0: one per core
    """

    inputs: Mapping[str, InputConfig] = dataclasses.field(default_factory=dict)
    stages: tuple[str, ...] = STAGES[:-1]
    normalise: NormaliseConfig = NormaliseConfig()
    language: LanguageConfig = LanguageConfig()
    quality: QualityConfig = QualityConfig()
    duplicates: DuplicatesConfig = DuplicatesConfig()
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    personal_data: PersonalDataConfig = PersonalDataConfig()
    sample: SampleConfig = SampleConfig()
    split: FractionsConfig = FractionsConfig()
    augment: AugmentConfig = AugmentConfig()
    max_bad_fraction: float = 0.01
    workers: int = 0

    def __post_init__(self):
        if not self.stages or self.stages[0] != "read":
            raise UserError(f"curate.stages={self.stages!r}: expected a tuple that begins with 'read'")
        for name in self.stages:
            if name not in STAGES:
                raise UserError(
                    f"curate.stages names {name!r}{suggest(str(name), STAGES)}: choose from {', '.join(STAGES)}"
                )
        if len(set(self.stages)) < len(self.stages):
            raise UserError(f"curate.stages={self.stages!r}: names a stage twice; name each once")
        order = {name: index for index, name in enumerate(self.stages)}
        for first, later, why in _ORDER:
            if first in order and later in order and order[first] > order[later]:
                raise UserError(f"curate.stages={self.stages!r}: {first} must come before {later}, {why}")
        if "augment" in order and "split" not in order:
            raise UserError(
                "curate.stages has augment without split: the model would be trained on copies of test documents"
            )
        numbers = {"workers": self.workers, "sample.seed": self.sample.seed, "augment.seed": self.augment.seed}
        for name, config in self.inputs.items():
            if not re.fullmatch(r"[\w-]+", name):
                raise UserError(f"curate.inputs: {name!r} cannot name files; use letters, digits, _ and -")
            numbers |= {f"inputs.{name}.weight": config.weight or 0, f"inputs.{name}.max_tokens": config.max_tokens}
        for name, value in numbers.items():
            if value < 0:
                raise UserError(f"curate.{name}={value}: must not be negative")
            if value >= 1 << 63:
                raise UserError(f"curate.{name}={value}: must be below 2^63")
        _check_fractions({"max_bad_fraction": self.max_bad_fraction})


# (earlier, later, reason): pairs of stages with a required order.
_ORDER = (
    ("extract", "normalise", "which needs text, not pages"),
    ("extract", "language", "which needs text, not pages"),
    ("extract", "quality", "which needs text, not pages"),
    ("duplicates", "split", "which keeps copies together"),
    ("split", "augment", "which changes only training documents"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curation:
    """The config of `llmjax curate`."""

    curate: CurateConfig = CurateConfig()
