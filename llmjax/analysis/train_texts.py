"""The texts that a run was trained on: of its token store, or of a file that the user names."""

from collections.abc import Sequence
import dataclasses
import pathlib

from etils import epath
import numpy as np

from llmjax.analysis.task_examples import TaskExamples
from llmjax.data.config import LABELLED, SEVERAL_TEXTS
from llmjax.data.store import manifest as manifests
from llmjax.data.store.token_store import TokenStore
from llmjax.data.store.tokenizer import Tokenizer, load_tokenizer
from llmjax.errors import UserError
from llmjax.evals.tasks.classify import join_pair, read_texts
from llmjax.evals.tasks.examples import Example, read_examples
from llmjax.run.config import RunConfig
from llmjax.run.loading import store_folder

MAX_TEXTS = 20_000
_MAX_TOKENS = 20_000  # of a document
_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainTexts:
    """Some of the training texts.

    texts      at most MAX_TEXTS of them, drawn at random
    labels     int64 [texts], numbers of the task's classes; None: they have none
    total      training texts that there are
    test       the texts of the task's examples; written by the same tokenizer where the training texts were, so that a
               tokenizer that changes case or spaces makes no difference
    origin     the folder or file
    """

    texts: list[str]
    labels: np.ndarray | None
    total: int
    test: list[str]
    origin: str


def read_file(path: str, scored: TaskExamples) -> TrainTexts:
    """The records of a file with the fields of the task. Raises UserError as `read_examples` does."""
    task = dataclasses.replace(scored.task, path=path, shots=0, limit=0, format="")
    examples = [example._replace(where="--train") for example in read_examples("train", task)]
    total = len(examples)
    examples = [examples[index] for index in _draw(total)]
    if scored.task.kind == "pairs":
        texts = [example.text("good_field", task.good_field) for example in examples]
    else:
        texts = [join_pair(pair) for pair in read_texts(task, examples)]
    labels = _read_labels(scored, examples) if scored.classes else None
    return TrainTexts(texts=texts, labels=labels, total=total, test=list(scored.texts), origin=path)


def read_store(workdir: epath.Path, config: RunConfig, scored: TaskExamples) -> TrainTexts | str:
    """The training split of the run's token store, or why it cannot be compared with the task."""
    objective = config.objective.name
    if objective in SEVERAL_TEXTS:
        return f"objective.name={objective!r} trains on records of several texts"
    if objective not in LABELLED and scored.task.kind != "perplexity":
        return f"the run was trained on text, and kind={scored.task.kind!r} asks questions about it"
    folder = store_folder(config, workdir)
    manifest = manifests.read_manifest(folder)
    if manifest is None:
        return f"there is no token store in {folder}"
    if manifests.has_dialogues(manifest):
        return "the run was trained on dialogues"
    tokenizer = load_tokenizer(folder)
    stores = [TokenStore(folder / name / "train") for name in manifest["sources"]]
    spans = [(store, start, length) for store in stores for start, length in _list_spans(store)]
    chosen = [spans[index] for index in _draw(len(spans))]
    texts, labels = [], []
    for store, start, length in chosen:
        texts.append(_decode(tokenizer, store.read(start, min(length, _MAX_TOKENS))))
        if store.label_width == 1:
            labels.append(store.gather_labels(np.array([start]))[0, 0])
    has_labels = len(labels) == len(texts) and config.data.classes == scored.classes != ()
    test = [_decode(tokenizer, ids[:_MAX_TOKENS]) for ids in tokenizer.encode_batch(list(scored.texts))]
    return TrainTexts(
        texts=texts,
        labels=np.array(labels, np.int64) if has_labels else None,
        total=len(spans),
        test=test,
        origin=str(pathlib.Path(folder)),
    )


def _list_spans(store: TokenStore) -> list[tuple[int, int]]:
    """(start, tokens) of each document."""
    return list(zip(store.starts().tolist(), store.lengths().tolist(), strict=True))


def _draw(count: int) -> list[int]:
    """The indices of at most MAX_TEXTS, drawn at random, in order."""
    return sorted(np.random.default_rng(_SEED).permutation(count)[:MAX_TEXTS].tolist())


def _decode(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """The text without special tokens, which stand between the texts of a pair."""
    special = {*tokenizer.special_tokens.values(), tokenizer.eos_id}
    pieces: list[list[int]] = [[]]
    for token in ids.tolist():
        if token in special:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return "\n".join(tokenizer.decode(piece).strip() for piece in pieces if piece)


def _read_labels(scored: TaskExamples, examples: Sequence[Example]) -> np.ndarray:
    names = list(scored.task.labels or scored.classes)
    labels = []
    for example in examples:
        label = example.text("label_field", scored.task.label_field)
        if label not in names:
            raise UserError(f"--train: {example.place} has the unknown label {label!r}; expected {', '.join(names)}")
        labels.append(names.index(label))
    return np.array(labels, np.int64)
