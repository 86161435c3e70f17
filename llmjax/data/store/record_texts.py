"""Records of several texts that are read apart from each other, such as pairs: stored one after the other."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import math
from typing import Any, ClassVar

import numpy as np

from llmjax.data.config import DataConfig
from llmjax.data.readers.documents import Document
from llmjax.data.store import labels
from llmjax.data.store.labels import LabelFormat, find_frame
from llmjax.data.store.preferences import PreferencesFormat, find_template
from llmjax.data.store.tokenizer import Tokenizer
from llmjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextsFormat:
    """How such records are stored: the tokens of their texts, then EOS; the label holds the number of tokens of each,
    and the score if the records have one.

    num_texts  texts of a record
    has_score  whether records have the similarity of their texts
    seq_len    positions of the row that a record gets, in which each text has its own frame; longer texts are cut
    """

    name: ClassVar[str] = "texts"

    num_texts: int
    has_score: bool
    seq_len: int

    def settings(self) -> dict[str, Any]:
        """What decides the stored tokens and labels."""
        return dataclasses.asdict(self)

    def check(self, document: Document) -> None:
        """Raise UserError for a document whose score is none."""
        self._parse_score(document)

    def _parse_score(self, document: Document) -> list[float]:
        """The score, or nothing where records have none."""
        if not self.has_score:
            return []
        try:
            score = float(document.label)
        except (TypeError, ValueError):
            score = math.nan
        if not -1 <= score <= 1 or isinstance(document.label, bool):
            raise UserError(
                f"{document.id}: the score {document.label!r} is not a number from -1 to 1, as cosines are; scale the "
                "scores"
            )
        return [score]

    def encode(
        self, documents: Sequence[Document], encode_texts: Callable, tokenizer: Tokenizer
    ) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
        """As `LabelFormat.encode`. The longest text is cut first, at its end."""
        free = self.seq_len - max(1, self.num_texts * sum(map(len, find_frame(tokenizer))))
        if free < self.num_texts:
            needed = self.seq_len + self.num_texts - free
            raise UserError(
                f"data.seq_len={self.seq_len}: has no positions for {self.num_texts} texts; set it to {needed} or more"
            )
        texts = ([document.text, *document.others] for document in documents)
        columns = [encode_texts(column) for column in zip(*texts, strict=True)]
        for document, *ids in zip(documents, *columns, strict=True):
            lengths = [len(text) for text in ids]
            kept = cut_longest(lengths, free)
            parts = [text[:count] for text, count in zip(ids, kept, strict=True)]
            joined = np.concatenate([*parts, [tokenizer.eos_id]]).astype(np.int32)
            yield joined, np.array([*kept, *self._parse_score(document)], np.float32), kept != lengths


def cut_longest(lengths: Sequence[int], total: int) -> list[int]:
    """The lengths, at most `total` together: where they are more, the longest ones become equal."""
    free = total
    for rank, length in enumerate(sorted(lengths)):
        share = free // (len(lengths) - rank)
        if length > share:
            return [min(n, share) for n in lengths]
        free -= length
    return list(lengths)


RecordFormat = LabelFormat | TextsFormat | PreferencesFormat


def make_format(config: DataConfig) -> RecordFormat | None:
    """How the records of a config's sources are stored; None: they are plain documents.

    Raises UserError if the sources have different kinds of records.
    """
    sources = config.sources.items()
    if any(source.chosen_field for _, source in sources):
        if other := next((name for name, source in sources if not source.chosen_field), None):
            raise UserError(f"data.sources.{other}.chosen_field is not set: set it for all sources, or for none")
        return PreferencesFormat(seq_len=config.seq_len, template=find_template(config.tokenizer))
    counts = {name: _count_texts(source.pair_field, source.negative_field) for name, source in sources}
    if any(source.label_field for _, source in sources) or not any(count > 1 for count in counts.values()):
        return labels.make_format(config)
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(
            f"data.sources: the records have different numbers of texts ({listed}); set pair_field and negative_field "
            "for all sources alike"
        )
    if config.classes or config.multi_label:
        raise UserError("data.classes and data.multi_label: no source has labels; set data.sources.NAME.label_field")
    has_score = {bool(source.score_field) for _, source in sources}
    if len(has_score) > 1:
        raise UserError("data.sources: only some have a score_field; set it for all sources, or for none")
    return TextsFormat(num_texts=max(counts.values()), has_score=has_score.pop(), seq_len=config.seq_len)


def _count_texts(*others: str) -> int:
    """Texts of a record whose texts besides the first are in these fields."""
    return 1 + sum(map(bool, others))
