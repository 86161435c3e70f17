"""Config of evaluation tasks on the user's own files."""

from collections.abc import Mapping
import dataclasses
import re

from llmjax.errors import UserError, suggest

_PROMPT_FIELDS = ("prompt", "text_field", "shots", "chat")
# The fields of TaskConfig that each kind of task uses, besides those of _ALL.
KINDS: dict[str, tuple[str, ...]] = {
    "choice": (*_PROMPT_FIELDS, "choices", "choices_field", "answer_field", "normalize"),
    "generate": (*_PROMPT_FIELDS, "answer_field", "max_tokens", "stop", "metrics", "embedder"),
    "truthful": ("prompt", "text_field", "best_field", "correct_field", "incorrect_field", "separator"),
    "consistency": (
        *("text_field", "pair_field", "methods", "verify_prompt", "choices", "label_field", "labels"),
        *("prompt", "write_text", "samples", "temperature", "max_tokens", "stop"),
    ),
    "classify": (*_PROMPT_FIELDS, "pair_field", "label_field", "choices", "labels"),
    "regress": ("text_field", "pair_field", "label_field"),
    "similarity": ("text_field", "pair_field", "score_field", "idf"),
    "pairs": ("good_field", "bad_field"),
    "stereotypes": ("stereotype_field", "other_field"),
    "perplexity": ("text_field",),
    "memorisation": ("prompt_tokens", "continuation_tokens", "canaries", "alternatives"),
}
# The scores of each kind, without those of classes, groups and other parts (SCORE/PART); `list_scores` adds those that
# options bring. A kind that is missing here is checked at the first evaluation.
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
    "stereotypes": ("prefers_stereotype", "nats_gap"),
    "truthful": ("mc1", "mc2"),
    "perplexity": ("bits_per_byte", "perplexity"),
}
_SCORES_OF_CLASS_SETS = (
    *("f1_macro", "precision_macro", "recall_macro", "precision_micro", "recall_micro", "f1_micro"),
    *("subset_accuracy", "roc_auc", "pr_auc"),
)
_SCORES_OF_CLASSES = ("precision", "recall", "f1")  # /CLASS, of the kind classify
_COMMON = ("kind", "limit")
_FILE = ("path", "format", "columns", "group_field")  # of every kind but memorisation, which reads the token store
NORMALIZATIONS = ("raw", "bytes", "tokens")
SIMILARITIES = ("cosine", "bertscore")  # of generated text, by the states of an embedder
METRICS = ("bleu", "chrf", "rouge1", "rouge2", "rougeL", *SIMILARITIES)
METHODS = ("support", "entailment", "samples")
_RESERVED = ("train", "validation", "test")  # files of the splits, in the same folder
_QUESTIONS = ("choice", "generate", "truthful")
_MINIMA = {
    **{"shots": 0, "limit": 0, "max_tokens": 1, "samples": 1},
    **{"prompt_tokens": 1, "continuation_tokens": 1, "alternatives": 1},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One named task on a file of examples, for `llmjax eval --tasks=NAME`.

    kind           choice (which of several texts is the likeliest after a prompt), generate (write the answer),
                   classify (the class, by the head of a run with objective.name="classify", else by the likelihood of
                   the classes' names), regress (the number, by the head of a run with objective.name="regress"),
                   similarity (of a text to its reference, in the hidden states of the model), truthful (the likelihood
                   of true and false answers, as TruthfulQA), consistency (of a text with a source), pairs (which of two
                   texts is more likely), stereotypes (the same of pairs as in CrowS-Pairs), perplexity (of texts) or
                   memorisation (of the training documents in the run's token store)
    path           a file or a glob: JSONL, JSON, CSV, TSV or Parquet; for perplexity also plain text; memorisation has
                   none
    format         as data.sources.NAME.format; empty: by each file's content
    columns        names of the columns of CSV and TSV files without a header line
    text_field     the field or column of the text; empty: "question" for choice, generate and truthful, else "text"
    pair_field     classify, regress: the field of the second text of a pair; empty: one text. similarity: the field of
                   the reference; empty: "reference". consistency: the field of the source; empty: "source"
    prompt         what the model reads, with a field of the record for each {field}; spaces at its end belong to the
                   answer. Empty: the text, and a space. consistency: after which the model writes samples, or the text
    shots          choice, generate, classify: the first records of the file are examples, written with their answers
                   before each prompt, and are not scored
    chat           choice, generate, classify: whether the model's chat template writes the prompts, as turns of a user
                   and without spaces at their end; shots are earlier turns
    choices        choice: the texts to choose from, with a field of the record for each {field}; classify: how the
                   classes are named after the prompt, where the run has no head for them; consistency: how no and yes
                   are written after `verify_prompt`; empty: "No" and "Yes"
    choices_field  choice: the field with a list of the texts to choose from, if `choices` is empty
    answer_field   generate: the field of the answer, or of a list of right answers; choice: the field of the right
                   choice, as its text, its number from 0 or its letter; empty: the first choice is right
    label_field    classify, regress: the field of the label; consistency: the field that says whether a person found
                   the text consistent; without such a field nothing is compared with labels
    labels         classify: the labels of the file in the order of the classes; empty: the classes' own names.
                   consistency: the labels of inconsistent and consistent texts; empty: 0 and 1, false and true, no and
                   yes
    score_field    similarity: the field of the scores that people gave, with which every measure is correlated; empty:
                   there are none
    idf            similarity: whether tokens that many references contain count less in BERTScore
    good_field, bad_field  pairs: the fields of the text that should be more likely, and of the other one
    stereotype_field, other_field  stereotypes: the fields of the text that stereotypes more, and of the other one
    best_field, correct_field, incorrect_field  truthful: the fields of the best answer, and of lists of all correct
                   and all incorrect ones
    separator      truthful: what separates the answers of a list that is written as one text
    methods        consistency: how it is measured: support (names, numbers and words that the source has), entailment
                   (the log-odds of yes after `verify_prompt`), samples (agreement with what the model writes after
                   `prompt`)
    verify_prompt  consistency: asks whether the text is right, with a field of the record for each {field}; empty: it
                   shows the source and the text, and asks whether the source supports the text
    write_text     consistency: whether the model writes the text after `prompt`, in place of reading it from the file
    samples        consistency: texts that the method `samples` draws of each prompt
    temperature    consistency: of these draws
    metrics        generate: further scores: bleu, chrf, rouge1, rouge2, rougeL, cosine, bertscore; the first of them is
                   the main score
    embedder       generate: the workdir of a run, such as an imported MiniLM, whose hidden states cosine and bertscore
                   compare
    group_field    the main score is also reported for each value of this field, such as a domain; of classify also the
                   gap between the groups; empty: it is not
    normalize      choice: by what the log-likelihoods of choices are divided for the main score: raw (nothing), bytes
                   or tokens; the other two scores are reported as well
    max_tokens     generate, consistency: tokens of an answer at most
    stop           generate, consistency: texts that end an answer, and are not part of it
    prompt_tokens, continuation_tokens  memorisation: tokens that the model reads of a document, and those after them
                   that it has to continue with
    canaries       memorisation: texts with digits that were planted in the training data, as they stand there
    alternatives   memorisation: random texts that each canary is ranked among, with other digits in place of its own
    limit          examples to score, from the beginning of the file; 0: all. memorisation: documents of each split,
                   drawn at random; 0: 1,000
    """

    kind: str = ""
    path: str = ""
    format: str = ""
    columns: tuple[str, ...] = ()
    text_field: str = ""
    pair_field: str = ""
    prompt: str = ""
    shots: int = 0
    chat: bool = False
    choices: tuple[str, ...] = ()
    choices_field: str = "choices"
    answer_field: str = "answer"
    label_field: str = "label"
    labels: tuple[str, ...] = ()
    score_field: str = ""
    idf: bool = True
    good_field: str = "good"
    bad_field: str = "bad"
    stereotype_field: str = "sent_more"
    other_field: str = "sent_less"
    best_field: str = "best_answer"
    correct_field: str = "correct_answers"
    incorrect_field: str = "incorrect_answers"
    separator: str = ";"
    methods: tuple[str, ...] = ("support", "entailment")
    verify_prompt: str = ""
    write_text: bool = False
    samples: int = 5
    temperature: float = 1.0
    metrics: tuple[str, ...] = ()
    embedder: str = ""
    group_field: str = ""
    normalize: str = "raw"
    max_tokens: int = 64
    stop: tuple[str, ...] = ("\n",)
    prompt_tokens: int = 32
    continuation_tokens: int = 32
    canaries: tuple[str, ...] = ()
    alternatives: int = 1000
    limit: int = 0

    @property
    def text_name(self) -> str:
        """The field of the text, with its default."""
        return self.text_field or ("question" if self.kind in _QUESTIONS else "text")

    @property
    def pair_name(self) -> str:
        """The field of the second text, with its default; empty: one text."""
        return self.pair_field or {"similarity": "reference", "consistency": "source"}.get(self.kind, "")

    @property
    def reads_store(self) -> bool:
        """Whether the examples are documents of the run's token store, not records of a file."""
        return self.kind == "memorisation"


def check_name(task: str, where: str) -> None:
    """Raise UserError for a task whose name cannot be that of its files. `where` begins the message."""
    if not re.fullmatch(r"\w[\w.-]*", task) or task in _RESERVED:
        raise UserError(
            f"{where}: {task!r} cannot name files of results; use letters, digits, '_', '-' and '.', and none of "
            f"{', '.join(_RESERVED)}, which hold the scores of splits"
        )


def list_scores(task: TaskConfig, *, multi_label: bool = False) -> tuple[str, ...]:
    """The names of a task's scores, without those of parts; () for a kind whose scores depend on its examples.

    multi_label   data.multi_label of the run
    """
    if task.kind == "classify" and multi_label:
        return _SCORES_OF_CLASS_SETS
    scores = _SCORES.get(task.kind, ())
    if task.kind == "similarity" and task.score_field:
        scores += tuple(f"{name}_{end}" for name in scores[:4] for end in ("spearman", "pearson"))
    if task.kind == "generate":
        scores += task.metrics
    if task.kind == "classify" and task.group_field:
        scores += tuple(f"{name}_{end}" for name in ("accuracy", "f1_macro") for end in ("worst_group", "gap"))
    return scores


def check_metric(metric: str, tasks: Mapping[str, TaskConfig], *, multi_label: bool = False) -> None:
    """Raise UserError where eval.metric=TASK/SCORE or TASK/SCORE/PART names none of the tasks, or no score of one."""
    name, _, score = metric.partition("/")
    if name not in tasks:
        raise UserError(
            f"eval.metric={metric!r}: eval.during_training does not name the task {name!r}{suggest(name, tasks)}; add "
            "it there"
        )
    task = tasks[name]
    known, (score, _, part) = list_scores(task, multi_label=multi_label), score.partition("/")
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
        if not task.path and not task.reads_store:
            raise UserError(f"{where}.path is not set: give a file of examples")
        _check_fields(task, where)


def _check_fields(task: TaskConfig, where: str) -> None:
    used = (*_COMMON, *KINDS[task.kind], *(() if task.reads_store else _FILE))
    for field in dataclasses.fields(task):
        value = getattr(task, field.name)
        if field.name not in used and value != field.default:
            raise UserError(f"{where}.{field.name}={value!r}: kind={task.kind!r} does not use it; unset it")
    for field, least in _MINIMA.items():
        if (value := getattr(task, field)) < least:
            raise UserError(f"{where}.{field}={value}: must be at least {least}")
    if task.normalize not in NORMALIZATIONS:
        raise UserError(f"{where}.normalize={task.normalize!r}: choose one of {', '.join(NORMALIZATIONS)}")
    if task.labels and task.choices and len(task.labels) != len(task.choices):
        raise UserError(f"{where}.labels={task.labels}: give one for each of the {len(task.choices)} choices")
    for field, known in (("methods", METHODS), ("metrics", METRICS)):
        for name in getattr(task, field):
            if name not in known:
                raise UserError(f"{where}.{field}: {name!r}{suggest(name, known)}: choose from {', '.join(known)}")
    for field in ("choices", "labels"):
        values = getattr(task, field)
        if values and (len(values) < 2 or len(set(values)) < len(values)):
            raise UserError(f"{where}.{field}={values}: expected two or more different texts")
    if task.stop and not all(task.stop):
        raise UserError(f"{where}.stop={task.stop}: an empty text would end every answer; remove it")
    is_compared = [name for name in task.metrics if name in SIMILARITIES]
    if is_compared and not task.embedder:
        raise UserError(
            f"{where}.embedder is not set: {is_compared[0]} needs the workdir of a run whose states it compares"
        )
    if task.embedder and not is_compared:
        raise UserError(
            f"{where}.embedder={task.embedder!r}: add one of {', '.join(SIMILARITIES)} to metrics, or unset it"
        )
    if task.kind == "consistency":
        _check_consistency(task, where)
    if task.kind == "truthful" and not task.separator:
        raise UserError(f"{where}.separator='': give the text between two answers, such as ';'")
    if bare := next((text for text in task.canaries if not re.search("[0-9]", text)), None):
        raise UserError(f"{where}.canaries: {bare!r} has no digits; alternatives have other digits, so plant some")


def _check_consistency(task: TaskConfig, where: str) -> None:
    if not task.methods:
        raise UserError(f"{where}.methods=(): choose from {', '.join(METHODS)}")
    if bool(task.prompt) != (task.write_text or "samples" in task.methods):
        hint = "unset it, or set write_text=True or the method samples" if task.prompt else "the model writes after it"
        raise UserError(f"{where}.prompt={task.prompt!r}: {hint}")
    for field in ("choices", "labels"):
        if (values := getattr(task, field)) and len(values) != 2:
            raise UserError(f"{where}.{field}={values}: expected two texts, that of no and that of yes")
    if not 0 < task.temperature <= 10:
        raise UserError(f"{where}.temperature={task.temperature}: must be above 0 and at most 10")
