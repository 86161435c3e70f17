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


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputConfig:
    """One named input of documents.

    path        a file, a glob (`**` crosses folders), `tfds:NAME[:SPLIT][@DATA_DIR]`, or `stdlib:` (Python's sources)
    format      "text", "lines" (a document a line), "jsonl", "json" (arrays, or objects over several lines),
                "parquet", "csv", "tsv", "html" or "warc" (ARC too); empty: JSON by its content, others by the name
    text_field  the field or column that holds the text in JSONL, Parquet, CSV, TSV and TFDS records
    id_field    the field that holds a record's id; a record without one is named after its file and place
    max_record_bytes  a longer record, page or row is left out and counted; text files are no records
    content     what text_field holds: "text", "html", or "auto": HTML where a text is a page or a part of one, such as
                `<div class=a><p>...</div>`; code, XML, Markdown and prose in which tags occur stay as they are
    encoding    of text, CSV, TSV and JSONL files that are not UTF-8; empty: it is detected (in JSONL, refused)
    columns     names of the columns of CSV and TSV files that have no header line
    fields      other fields of a record that are carried through, beside its text; ("*",): all
    weight      relative share of the kept tokens; None: as many as there are (give all inputs a weight, or none)
    max_tokens  of the input that stay at most, about; 0: no limit
    licence     of the whole input, carried through with every record that states none
    origin      where the input comes from, such as an address; carried through with every record that states none
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
class PersonalConfig:
    """Personal data and secrets in a text.

    kinds   what is looked for: "email", "ip", "phone", "card" (payment cards), "iban", "ssn" (US social security
            numbers), "secret" (keys, tokens, passwords)
    action  "replace" by typed placeholders such as <EMAIL>, "drop" the document, or "count" only
    """

    kinds: tuple[str, ...] = ("email", "ip", "phone", "card", "iban", "ssn", "secret")
    action: str = "replace"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormaliseConfig:
    """What is repaired in every text.

    mojibake   undo UTF-8 that was decoded as another encoding, such as "cafÃ©" (ftfy)
    entities   write HTML entities such as "&eacute;" as characters, but in lines that hold a "<": those show markup
    spaces     write the many widths of space as the plain one
    """

    mojibake: bool = True
    entities: bool = True
    spaces: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Which languages stay.

    keep            codes such as ("en", "de"); empty: all
    min_confidence  probability from 0 to 1 of the language found; a text below it is dropped where `keep` names any
    characters      read at most from a text, from `places` that are spread over it
    places          number of places
    """

    keep: tuple[str, ...] = ()
    min_confidence: float = 0.5
    characters: int = 1200
    places: int = 4

    def __post_init__(self):
        if not 0 <= self.min_confidence <= 1:
            raise UserError(f"curate.language.min_confidence={self.min_confidence}: expected a value from 0 to 1")
        if not 1 <= self.places <= self.characters:
            raise UserError(
                f"curate.language.places={self.places}: expected 1 up to curate.language.characters={self.characters}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DuplicatesConfig:
    """Copies: of a cluster what stayed before stays, else what is of the first input in the config.

    exact       look for texts that are equal but for letter case and spacing
    near        look for texts that are alike
    similarity  of 5-word shingles (Jaccard, estimated from 112 MinHash values) from which two texts are alike
    """

    exact: bool = True
    near: bool = True
    similarity: float = 0.6

    def __post_init__(self):
        if not 0 < self.similarity <= 1:
            raise UserError(f"curate.duplicates.similarity={self.similarity}: expected a value above 0 and up to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecontaminateConfig:
    """Documents that share runs of words with evaluation sets are dropped.

    against    files of evaluation sets: JSONL, JSON, CSV, Parquet (every text in a record), or text (paragraphs)
    words      in a run
    min_words  of an example that is shorter than a run, to be looked for as a whole
    min_hits   runs that a document shares with a set before it is dropped
    """

    against: tuple[str, ...] = ()
    words: int = 13
    min_words: int = 8
    min_hits: int = 1

    def __post_init__(self):
        if not 1 <= self.min_words <= self.words:
            raise UserError(
                f"curate.decontaminate.min_words={self.min_words}: expected 1 up to words={self.words}, its longest run"
            )
        if self.min_hits < 1:
            raise UserError(f"curate.decontaminate.min_hits={self.min_hits}: must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Balance: inputs give no more than their `max_tokens`, and tokens in proportion to their `weight`.

    terms  files of word lists, with lines such as `gender/women: she, her`; empty: a small list that llmjax brings
    seed   another seed, another choice of documents where an input gives only some
    """

    terms: tuple[str, ...] = ()
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Changed copies of training documents, for small sets that a model is fine-tuned on.

    copies   of each document, named ID~1, ID~2 and so on
    drop     fraction of words that are left out
    swap     fraction of words that change place with the next one
    case     probability that a whole copy is in small letters
    seed     another seed, other copies
    """

    copies: int = 1
    drop: float = 0.05
    swap: float = 0.05
    case: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if self.copies < 1:
            raise UserError(
                f"curate.augment.copies={self.copies}: must be at least 1; or leave 'augment' out of stages"
            )
        for name in ("drop", "swap", "case"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise UserError(f"curate.augment.{name}={value}: expected a fraction from 0 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """From raw text to a corpus.

    inputs            named entries; a name that is new gets InputConfig's defaults
    stages            that run, in this order: read extract normalise language quality duplicates decontaminate
                      personal_data sample split augment (augment only where it is asked for)
    max_bad_fraction  of records that cannot be read before the command stops; they are counted, and kept in dropped/
    workers           processes of --runner=local; 0: one a core
    """

    inputs: Mapping[str, InputConfig] = dataclasses.field(default_factory=dict)
    stages: tuple[str, ...] = STAGES[:-1]
    normalise: NormaliseConfig = NormaliseConfig()
    language: LanguageConfig = LanguageConfig()
    quality: QualityConfig = QualityConfig()
    duplicates: DuplicatesConfig = DuplicatesConfig()
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    personal_data: PersonalConfig = PersonalConfig()
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
                    f"curate.stages names {name!r}{suggest(str(name), STAGES)}: known are {', '.join(STAGES)}"
                )
        if len(set(self.stages)) < len(self.stages):
            raise UserError(f"curate.stages={self.stages!r}: names a stage twice; name each once")
        order = {name: place for place, name in enumerate(self.stages)}
        for first, later, why in _ORDER:
            if first in order and later in order and order[first] > order[later]:
                raise UserError(f"curate.stages={self.stages!r}: {first} must come before {later}, {why}")
        if "augment" in order and "split" not in order:
            raise UserError("curate.stages has augment without split: copies of test documents would be trained on")
        numbers = {"workers": self.workers, "sample.seed": self.sample.seed, "augment.seed": self.augment.seed}
        for name, given in self.inputs.items():
            if not re.fullmatch(r"[\w-]+", name):
                raise UserError(f"curate.inputs: {name!r} cannot name files; use letters, digits, _ and -")
            numbers |= {f"inputs.{name}.weight": given.weight or 0, f"inputs.{name}.max_tokens": given.max_tokens}
        for name, value in numbers.items():
            if value < 0:
                raise UserError(f"curate.{name}={value}: must not be negative")
            if value >= 1 << 63:
                raise UserError(f"curate.{name}={value}: must be below 2^63")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"curate.max_bad_fraction={self.max_bad_fraction}: expected a fraction from 0 to 1")


# Pairs of stages that make no sense the other way round.
_ORDER = (
    ("extract", "normalise", "which reads text, not pages"),
    ("extract", "language", "which reads text, not pages"),
    ("extract", "quality", "which judges text, not pages"),
    ("duplicates", "split", "which keeps copies together"),
    ("split", "augment", "which changes training documents only"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curation:
    """A config file of `llmjax curate`."""

    curate: CurateConfig = CurateConfig()
