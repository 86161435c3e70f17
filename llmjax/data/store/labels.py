"""Labels of documents: parsed by the reader of a source, and stored beside the tokens as float32 vectors."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import math
from typing import Any, ClassVar

import numpy as np

from llmjax.data.config import DataConfig
from llmjax.data.readers.documents import Document
from llmjax.data.store.tokenizer import Tokenizer
from llmjax.errors import UserError, suggest


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelFormat:
    """How labelled documents are stored.

    classes      in the order of their numbers; (): labels are numbers
    multi_label  a label is a list of classes
    seq_len      tokens that a document may have in a row: a labelled document is one chunk, so a longer one is cut
    """

    name: ClassVar[str] = "labels"

    classes: tuple[str, ...]
    multi_label: bool
    seq_len: int

    @property
    def width(self) -> int:
        """Numbers of a label: 1 (the number of its class, or the number that it is), or one for each class."""
        return len(self.classes) if self.multi_label else 1

    def parse(self, label: Any, where: str) -> np.ndarray:
        """A label as it is stored, float32 [width]. Raises UserError, begun with `where`, for any other value."""
        if self.multi_label:
            if not isinstance(label, list):
                raise UserError(f"{where}: the label {label!r} is not a list of classes (data.multi_label=True)")
            numbers = [self._class_number(name, where) for name in label]
            return np.isin(np.arange(len(self.classes)), numbers).astype(np.float32)
        if self.classes:
            return np.array([self._class_number(label, where)], np.float32)
        try:
            number = float(label)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or isinstance(label, bool):
            raise UserError(f"{where}: the label {label!r} is not a number; set data.classes if labels are classes")
        return np.array([number], np.float32)

    def settings(self) -> dict[str, Any]:
        """What decides the stored tokens and labels."""
        return dataclasses.asdict(self)

    def check(self, document: Document) -> None:
        """Raise UserError for a document whose label is none."""
        self.parse(document.label, document.id)

    def encode(
        self, documents: Sequence[Document], encode_texts: Callable, tokenizer: Tokenizer
    ) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
        """Yield (token ids, label float32 [width], whether it was cut) of each document.

        encode_texts  (a text of each document) -> token ids of each
        """
        firsts = encode_texts([document.text for document in documents])
        seconds = encode_texts(["".join(document.others) for document in documents])
        for document, first, second in zip(documents, firsts, seconds, strict=True):
            ids, is_cut = join_texts(first, second if document.others else None, tokenizer, self.seq_len)
            yield ids, self.parse(document.label, document.id), is_cut

    def _class_number(self, label: Any, where: str) -> int:
        if isinstance(label, bool) or not isinstance(label, str | int) or str(label) not in self.classes:
            near = suggest(str(label), self.classes)
            raise UserError(
                f"{where}: the label {label!r} is not one of data.classes ({', '.join(self.classes)}){near}; fix the "
                "record, or add the class"
            )
        return self.classes.index(str(label))


def make_format(config: DataConfig) -> LabelFormat | None:
    """The format of the labels of a config's sources; None if they have none.

    Raises UserError if only some sources have labels, or if there are classes without labels.
    """
    labelled = [bool(source.label_field) for source in config.sources.values()]
    if not any(labelled):
        if config.classes or config.multi_label:
            raise UserError(
                "data.classes and data.multi_label: no source has labels; set data.sources.NAME.label_field"
            )
        return None
    if not all(labelled):
        name = list(config.sources)[labelled.index(False)]
        raise UserError(f"data.sources.{name}.label_field is not set: give all sources labels, or none")
    if len(set(config.classes)) < len(config.classes) or len(config.classes) == 1:
        raise UserError(f"data.classes={config.classes}: expected two or more different names")
    if config.multi_label and not config.classes:
        raise UserError("data.multi_label=True: name the classes in data.classes")
    return LabelFormat(classes=config.classes, multi_label=config.multi_label, seq_len=config.seq_len)


def find_frame(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids before and after a labelled document: those of a prompt, that is, of an imported tokenizer its own frame,
    else BOS, or EOS if there is no BOS."""
    begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return tokenizer.prompt_frame or ((begin,), ())


def join_texts(ids: np.ndarray, pair: np.ndarray | None, tokenizer: Tokenizer, seq_len: int) -> tuple[np.ndarray, bool]:
    """(ids of a labelled document, whether it was cut): one text, or two with EOS (SEP) between them; EOS at the end.

    Where it does not fit a row of `seq_len` positions, the end of the longer text is cut, and of both once they are
    equally long.
    """
    before, after = find_frame(tokenizer)
    free = seq_len - len(before) - len(after)
    end = [tokenizer.eos_id]
    if pair is None:
        if free < 1:
            raise UserError(f"data.seq_len={seq_len}: has no position for text; set it to {seq_len + 1 - free} or more")
        return np.concatenate([ids[:free], end]).astype(np.int32), len(ids) > free
    free -= 1
    if free < 2:
        raise UserError(
            f"data.seq_len={seq_len}: has no positions for two texts; set it to {seq_len + 2 - free} or more"
        )
    first = min(len(ids), max(-(-free // 2), free - len(pair)))
    joined = np.concatenate([ids[:first], end, pair[: free - first], end]).astype(np.int32)
    return joined, len(ids) + len(pair) > free
