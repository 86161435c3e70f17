"""Config of evaluation tasks on the user's own files."""

from collections.abc import Mapping
import dataclasses
import re

from llmjax.errors import UserError, suggest

_PROMPT_FIELDS = ("prompt", "text_field", "shots")
# The fields of TaskConfig that each kind of task uses, besides those of _ALL.
KINDS: dict[str, tuple[str, ...]] = {
    "choice": (*_PROMPT_FIELDS, "choices", "choices_field", "answer_field", "normalize"),
    "generate": (*_PROMPT_FIELDS, "answer_field", "max_tokens", "stop"),
    "classify": (*_PROMPT_FIELDS, "pair_field", "label_field", "choices", "labels"),
    "regress": ("text_field", "pair_field", "label_field"),
    "similarity": ("text_field", "pair_field", "score_field", "idf"),
    "pairs": ("good_field", "bad_field"),
    "perplexity": ("text_field",),
}
# The scores of each kind, without those of classes, groups and other parts (SCORE/PART); similarity has more, see
# `list_scores`. A kind that is missing here is checked at the first evaluation.
_SCORES: dict[str, tuple[str, ...]] = {
    "choice": ("acc", "acc_bytes", "acc_tokens"),
    "generate": ("exact_match", "token_f1"),
    "classify": (
        *("accuracy", "precision_macro", "recall_macro", "f1_macro", "precision_micro", "recall_micro", "f1_micro"),
        *("mcc", "roc_auc", "pr_auc", "ece", "brier", "log_loss", "temperature", "ece_scaled", "log_loss_scaled"),
    ),
    "regress": ("pearson", "spearman", "rmse"),
    "similarity": ("cosine", "precision", "recall", "f1", "precision_rescaled", "recall_rescaled", "f1_rescaled"),
    "pairs": ("acc", "nats_difference"),
    "perplexity": ("bits_per_byte", "perplexity"),
}
_SCORES_OF_CLASSES = ("precision", "recall", "f1")  # /CLASS, of the kind classify
_ALL = ("kind", "path", "format", "columns", "group_field", "limit")
NORMALIZATIONS = ("raw", "bytes", "tokens")
_RESERVED = ("train", "validation", "test")  # files of the splits, in the same folder
_QUESTIONS = ("choice", "generate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One named task on a file of examples, for `llmjax eval --tasks=NAME`.

    kind           choice (which of several texts is the likeliest after a prompt), generate (write the answer),
                   classify (the class, by the head of a run with objective.name="classify", else by the likelihood of
                   the classes' names), regress (the number, by the head of a run with objective.name="regress"),
                   similarity (of a text to its reference, in the hidden states of the model), pairs (which of two texts
                   is more likely) or perplexity (of texts)
    path           a file or a glob: JSONL, JSON, CSV, TSV or Parquet; for perplexity also plain text
    format         as data.sources.NAME.format; empty: by each file's content
    columns        names of the columns of CSV and TSV files without a header line
    text_field     the field or column of the text; empty: "question" for choice and generate, else "text"
    pair_field     classify, regress: the field of the second text of a pair; empty: one text. similarity: the field of
                   the reference; empty: "reference"
    prompt         what the model reads, with a field of the record for each {field}; spaces at its end belong to the
                   answer. Empty: the text, and a space
    shots          choice, generate, classify: the first records of the file are examples, written with their answers
                   before each prompt, and are not scored
    choices        choice: the texts to choose from, with a field of the record for each {field}; classify: how the
                   classes are named after the prompt, where the run has no head for them
    choices_field  choice: the field with a list of the texts to choose from, if `choices` is empty
    answer_field   generate: the field of the answer, or of a list of right answers; choice: the field of the right
                   choice, as its text, its number from 0 or its letter; empty: the first choice is right
    label_field    classify, regress: the field of the label
    labels         classify: the labels of the file in the order of the classes; empty: the classes' own names
    score_field    similarity: the field of the scores that people gave, with which every measure is correlated; empty:
                   there are none
    idf            similarity: whether tokens that many references contain count less in BERTScore
    good_field, bad_field  pairs: the fields of the text that should be more likely, and of the other one
    group_field    the main score is also reported for each value of this field, such as a domain; empty: it is not
    normalize      choice: by what the log-likelihoods of choices are divided for the main score: raw (nothing), bytes
                   or tokens; the other two scores are reported as well
    max_tokens     generate: tokens of an answer at most
    stop           generate: texts that end an answer, and are not part of it
    limit          examples to score, from the beginning of the file; 0: all
    """

    kind: str = ""
    path: str = ""
    format: str = ""
    columns: tuple[str, ...] = ()
    text_field: str = ""
    pair_field: str = ""
    prompt: str = ""
    shots: int = 0
    choices: tuple[str, ...] = ()
    choices_field: str = "choices"
    answer_field: str = "answer"
    label_field: str = "label"
    labels: tuple[str, ...] = ()
    score_field: str = ""
    idf: bool = True
    good_field: str = "good"
    bad_field: str = "bad"
    group_field: str = ""
    normalize: str = "raw"
    max_tokens: int = 64
    stop: tuple[str, ...] = ("\n",)
    limit: int = 0

    @property
    def text_name(self) -> str:
        """The field of the text, with its default."""
        return self.text_field or ("question" if self.kind in _QUESTIONS else "text")

    @property
    def pair_name(self) -> str:
        """The field of the second text, with its default; empty: one text."""
        return self.pair_field or ("reference" if self.kind == "similarity" else "")


def check_name(task: str, where: str) -> None:
    """Raise UserError for a task whose name cannot be that of its files. `where` begins the message."""
    if not re.fullmatch(r"\w[\w.-]*", task) or task in _RESERVED:
        raise UserError(
            f"{where}: {task!r} cannot name files of results; use letters, digits, '_', '-' and '.', and none of "
            f"{', '.join(_RESERVED)}, which hold the scores of splits"
        )


def list_scores(task: TaskConfig) -> tuple[str, ...]:
    """The names of a task's scores, without those of parts; () for a kind whose scores depend on its examples."""
    scores = _SCORES.get(task.kind, ())
    if task.kind != "similarity" or not task.score_field:
        return scores
    measures = scores[:4]
    return (*scores, *(f"{name}_{end}" for name in measures for end in ("spearman", "pearson")))


def check_metric(metric: str, tasks: Mapping[str, TaskConfig]) -> None:
    """Raise UserError where eval.metric=TASK/SCORE or TASK/SCORE/PART names none of the tasks, or no score of one."""
    name, _, score = metric.partition("/")
    if name not in tasks:
        raise UserError(
            f"eval.metric={metric!r}: eval.during_training does not name the task {name!r}{suggest(name, tasks)}; add "
            "it there"
        )
    task = tasks[name]
    known, (score, _, part) = list_scores(task), score.partition("/")
    is_known = score in known or (part and task.kind == "classify" and score in _SCORES_OF_CLASSES)
    if known and not is_known:
        raise UserError(
            f"eval.metric={metric!r}{suggest(score, known)}: the scores of a task of kind={task.kind!r} are "
            f"{', '.join(known)}; choose one"
        )


def check_tasks(tasks: Mapping[str, TaskConfig]) -> None:
    """Raise UserError for a task that no file of examples can make valid."""
    for name, task in tasks.items():
        where = f"eval.tasks.{name}"
        check_name(name, where)
        if task.kind not in KINDS:
            raise UserError(f"{where}.kind={task.kind!r}{suggest(task.kind, KINDS)}: choose one of {', '.join(KINDS)}")
        if not task.path:
            raise UserError(f"{where}.path is not set: give a file of examples")
        _check_fields(task, where)


def _check_fields(task: TaskConfig, where: str) -> None:
    used = (*_ALL, *KINDS[task.kind])
    for field in dataclasses.fields(task):
        value = getattr(task, field.name)
        if field.name not in used and value != field.default:
            raise UserError(f"{where}.{field.name}={value!r}: kind={task.kind!r} does not use it; unset it")
    for field, least in (("shots", 0), ("limit", 0), ("max_tokens", 1)):
        if (value := getattr(task, field)) < least:
            raise UserError(f"{where}.{field}={value}: must be at least {least}")
    if task.normalize not in NORMALIZATIONS:
        raise UserError(f"{where}.normalize={task.normalize!r}: choose one of {', '.join(NORMALIZATIONS)}")
    if task.labels and task.choices and len(task.labels) != len(task.choices):
        raise UserError(f"{where}.labels={task.labels}: give one for each of the {len(task.choices)} choices")
    for field in ("choices", "labels"):
        values = getattr(task, field)
        if values and (len(values) < 2 or len(set(values)) < len(values)):
            raise UserError(f"{where}.{field}={values}: expected two or more different texts")
    if task.stop and not all(task.stop):
        raise UserError(f"{where}.stop={task.stop}: an empty text would end every answer; remove it")
