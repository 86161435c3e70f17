"""The examples of a task that a run was scored on: their results, and their records in the task's file."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from etils import epath
import numpy as np

from llmjax.binding import bind
from llmjax.errors import UserError, suggest
from llmjax.evals import results
from llmjax.evals.config import TaskConfig
from llmjax.evals.results import Line
from llmjax.evals.tasks.classify import join_pair, read_texts
from llmjax.evals.tasks.examples import Example, read_examples
from llmjax.run import workdir as workdirs

# The number of each example by which answers are ordered, the worst one first.
_LOSSES = {
    "classify": "log_loss",
    "generate": "token_f1",
    "pairs": "nats_difference",
    "perplexity": "bits_per_byte",
    "regress": "squared_error",
}
_ERRORS = {"classify": "accuracy", "generate": "exact_match", "pairs": "acc"}  # 1 minus this is the error
KINDS = ("choice", *_LOSSES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskExamples:
    """A scored task.

    record    the content of eval/<step>/<task>.json
    task      its config when it was scored
    lines     of eval/<step>/<task>.jsonl
    examples  the records of the task's file, in the same order
    texts     what each example says: the text of a record, without a prompt around it
    losses    float64 [examples], larger is worse
    errors    float64 [examples]: 0 or 1 where an answer is right or wrong; else the losses
    classes   of classify; () of other kinds
    labels    int64 [examples], numbers of `classes`; empty without classes
    """

    name: str
    step: int
    record: Mapping[str, Any]
    task: TaskConfig
    lines: Sequence[Line]
    examples: Sequence[Example]
    texts: Sequence[str]
    losses: np.ndarray
    errors: np.ndarray
    classes: tuple[str, ...]
    labels: np.ndarray

    @property
    def has_answers(self) -> bool:
        """Whether an answer is right or wrong."""
        return self.task.kind == "choice" or self.task.kind in _ERRORS


def find_step(workdir: epath.Path, name: str, step: int | None) -> int:
    """The step whose results are read: the newest that has some. Raises UserError where there are none."""
    found: dict[str, list[int]] = {}
    for path in workdir.glob(f"{workdirs.EVAL}/*/*.json"):
        if path.parent.name.isdecimal() and "metrics" in (workdirs.read_json(path) or {}):
            found.setdefault(path.stem, []).append(int(path.parent.name))
    if name not in found:
        listed = ", ".join(sorted(found)) or "none"
        raise UserError(
            f"--task={name}{suggest(name, found)}: {workdir / workdirs.EVAL} has no results of this task (it has: "
            f"{listed}); run `llmjax eval --workdir={workdir} --tasks={name}` first"
        )
    if step is not None and step not in found[name]:
        raise UserError(
            f"--step={step}: the task {name!r} was not scored at this step, only at "
            f"{', '.join(map(str, sorted(found[name])))}"
        )
    return max(found[name]) if step is None else step


def read(workdir: epath.Path, name: str, step: int | None = None) -> TaskExamples:
    """Read a scored task. Raises UserError for missing and damaged files, and where the task's file has changed."""
    step = find_step(workdir, name, step)
    path = workdirs.eval_path(workdir, step, name)
    record = workdirs.read_json(path)
    task = _read_task(name, path, record)
    lines = _read_lines(path.with_suffix(".jsonl"), f"llmjax eval --workdir={workdir} --tasks={name}")
    examples = read_examples(name, task)[task.shots :]
    texts = [_read_text(task, example) for example in examples]
    _check_same(path, task, lines, texts)
    classes = tuple(record.get("classes", ())) if task.kind == "classify" else ()
    losses = np.array([_find_loss(task, line) for line in lines])
    right = _find_right(record, task)
    return TaskExamples(
        name=name,
        step=step,
        record=record,
        task=task,
        lines=lines,
        examples=examples,
        texts=texts,
        losses=losses,
        errors=np.array([1.0 - line[right] for line in lines]) if right else losses,
        classes=classes,
        labels=np.array([classes.index(line["target"]) for line in lines] if classes else [], np.int64),
    )


def list_fields(scored: TaskExamples) -> dict[str, list[str]]:
    """Name -> values of the fields by which the examples may be sliced: the class, and short fields of the records that
    the model did not read."""
    task, fields = scored.task, {}
    if scored.classes:
        fields["class"] = [scored.classes[label] for label in scored.labels]
    used = {task.text_name, task.pair_name, task.label_field, task.answer_field, task.good_field, task.bad_field}
    for name in dict.fromkeys(key for example in scored.examples for key in example.fields):
        values = [example.fields.get(name) for example in scored.examples]
        if isinstance(name, str) and name not in used and all(isinstance(v, str | int) or v is None for v in values):
            fields[name] = ["(none)" if value is None else str(value) for value in values]
    return fields


def _read_task(name: str, path: epath.Path, record: Mapping[str, Any]) -> TaskConfig:
    settings = dict(record.get("settings", {}))
    settings.pop("embedding", None)
    if settings.get("kind") not in KINDS:
        kind = settings.get("kind", "a task of lm-eval")
        raise UserError(f"--task={name}: {path} has kind {kind!r}; error analysis reads {', '.join(KINDS)}")
    if record.get("multi_label"):
        raise UserError(
            f"--task={name}: {path} has examples of several classes; error analysis reads those of one class"
        )
    return bind(TaskConfig, settings, f"eval.tasks.{name}")


def _read_lines(path: epath.Path, command: str) -> list[Line]:
    if not path.exists():
        raise UserError(f"{path}: no per-example results there; run `{command}` again")
    lines = results.read_lines(path, f" and run `{command}`")
    if not lines:
        raise UserError(f"{path}: has no examples; remove the file, and run `{command}`")
    return lines


def _check_same(path: epath.Path, task: TaskConfig, lines: Sequence[Line], texts: Sequence[str]) -> None:
    """Raise UserError where the task's file is not the one that was scored."""
    problem = f"has {len(texts)} examples, and {len(lines)} were scored" if len(texts) != len(lines) else ""
    for line, text in zip(lines, texts, strict=False) if not problem else ():
        if task.kind in ("perplexity", "regress") or (task.kind == "classify" and not task.choices):
            shown = line["input"]
            if isinstance(shown, str) and shown != text:
                problem = f"example {line['index']} is not the one that was scored"
                break
    if problem:
        raise UserError(f"eval.tasks.{path.stem}.path={task.path!r}: {problem}; run `llmjax eval --tasks` again")


def _read_text(task: TaskConfig, example: Example) -> str:
    if task.kind == "pairs":
        return example.text("good_field", task.good_field)
    if task.prompt and example.fields.get(task.text_name) is None:
        return example.fill("prompt", task.prompt)
    return join_pair(read_texts(task, [example])[0])


def _find_right(record: Mapping[str, Any], task: TaskConfig) -> str:
    """The field of a line that is 1 for a right answer; "": there is none."""
    return record["main"] if task.kind == "choice" else _ERRORS.get(task.kind, "")


def _find_loss(task: TaskConfig, line: Line) -> float:
    if task.kind == "choice":  # of the right choice, among all choices
        nats = np.array(line["nats"])
        shifted = nats - nats.max()
        return float(np.log(np.exp(shifted).sum()) - shifted[line["choices"].index(line["target"])])
    value = float(line[_LOSSES[task.kind]])
    return {"generate": 1 - value, "pairs": -value}.get(task.kind, value)
