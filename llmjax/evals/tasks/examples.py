"""The examples of a task: records of a file, their fields, and the prompts that are made of them."""

from collections.abc import Iterator, Sequence
import math
import re
from typing import Any, NamedTuple

from llmjax.data.chat_template import ChatTemplate
from llmjax.data.readers import formats, raw_records, streams
from llmjax.data.readers.raw_records import ColumnsError, Fault, RawRecord, ReadOptions
from llmjax.data.readers.sources import Item, make_units
from llmjax.errors import UserError, suggest
from llmjax.evals.config import TaskConfig

_FIELD = re.compile(r"\{([^{}]+)\}")
_SHOTS_END = "\n\n"  # after the answer of an example in a prompt


class Example(NamedTuple):
    """One record.

    place   the file and the line or row, for messages
    fields  as in the file
    where   the config of its task, for messages: "eval.tasks.NAME"
    """

    place: str
    fields: dict[str, Any]
    where: str

    def value(self, option: str, name: str) -> Any:
        """The value of the field `name`, which `option` of the task names. Raises UserError where there is none."""
        if self.fields.get(name) is None:
            has = ", ".join(map(str, self.fields))[:300]
            raise UserError(
                f"{self.where}.{option}: {self.place} has no {name!r}; name one of its fields: {has}"
                f"{suggest(name, map(str, self.fields))}"
            )
        return self.fields[name]

    def text(self, option: str, name: str) -> str:
        """The same of a text or a number, as text."""
        return self._as_text(option, name, self.value(option, name))

    def texts(self, option: str, name: str) -> list[str]:
        """The same of a text or a list of texts, as a list of one or more."""
        value = self.value(option, name)
        values = value if isinstance(value, list) else [value]
        if not values:
            raise UserError(f"{self.where}.{option}: {self.place} has an empty list in {name!r}")
        return [self._as_text(option, name, item) for item in values]

    def number(self, option: str, name: str) -> float:
        """The same of a finite number."""
        value = self.value(option, name)
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"{self.where}.{option}: {self.place} has {value!r} in {name!r}, which is not a number")
        return number

    def fill(self, option: str, template: str) -> str:
        """The template with the text of a field for each {field}."""
        return _FIELD.sub(lambda match: self.text(option, match[1]), template)

    def _as_text(self, option: str, name: str, value: Any) -> str:
        try:
            value = value.decode() if isinstance(value, bytes) else value
            if isinstance(value, str):
                value.encode()  # a lone surrogate of JSON is no text
        except UnicodeError:
            raise UserError(f"{self.where}.{option}: {self.place} is not UTF-8 in {name!r}; fix the record") from None
        if not isinstance(value, str | int | float):
            raise UserError(f"{self.where}.{option}: {self.place} has {value!r} in {name!r}, which is not a text")
        return str(value)


def read_examples(name: str, task: TaskConfig) -> list[Example]:
    """The examples of a task in the order of its files: the shots, and those to score.

    Raises UserError for a record that cannot be read, and where there are no examples to score.
    """
    where = f"eval.tasks.{name}"
    field = f"{where}.path={task.path!r}"
    if task.format not in ("", *formats.FORMATS):
        raise UserError(
            f"{where}.format={task.format!r}{suggest(task.format, formats.FORMATS)}: expected one of "
            f"{', '.join(formats.FORMATS)}"
        )
    examples: list[Example] = []
    most = task.shots + task.limit if task.limit else math.inf
    for unit in make_units(name, task, where, formats.FORMATS):
        if unit.kind == "text" and task.kind != "perplexity":
            raise UserError(f"{field}: {unit.items[0].path} is text, which has no fields; give JSONL, CSV or Parquet")
        for item in unit.items:
            for place, record in _read_item(unit.kind, item, where, task):
                if len(examples) == most:
                    return examples
                examples.append(Example(place, record, where))
    if not examples:
        raise UserError(f"{field}: has no examples; give a file that has some")
    if len(examples) <= task.shots:
        raise UserError(f"{where}.shots={task.shots}: the {len(examples)} examples of {task.path} leave none to score")
    return examples


def _read_item(kind: str, item: Item, where: str, task: TaskConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, fields) of each record; of a text file the one field that the task reads."""
    # A table whose header is cut at another sign than a comma is recognised by the name of a column.
    column = _first_column(task) if kind in ("csv", "tsv") else ""
    options = ReadOptions(where, column, columns=task.columns, fields=("*",))
    try:
        for raw in raw_records.read_item(kind, item, options):
            place = _describe_place(kind, item, raw)
            if isinstance(raw.content, Fault):
                raise UserError(f"{place}: {raw.content.reason}; fix the record, or remove it")
            if isinstance(raw.content, str):
                if raw.content.strip():
                    yield place, {task.text_name: raw.content}
                continue
            yield place, raw.content
    except ColumnsError as error:
        raise UserError(f"{where}: {item.path} has no column {column!r}: it {error}") from None
    except streams.DamageError as damage:
        raise UserError(f"{item.path}: damaged ({damage}); get the file again") from None


def _describe_place(kind: str, item: Item, raw: RawRecord) -> str:
    if raw.line:
        return f"{item.path}:{raw.line}"
    if kind in raw_records.COLUMN_FORMATS and raw.location:
        return f"{item.path}, row {int(raw.location[1:]) + 1}"
    return item.path + raw.location.replace("@", " byte ")


def _first_column(task: TaskConfig) -> str:
    """A column that every record of the task needs."""
    if task.kind in ("pairs", "stereotypes"):
        return task.good_field if task.kind == "pairs" else task.stereotype_field
    names = _FIELD.findall(task.prompt)
    return names[0] if names else task.text_name


def make_prompt(task: TaskConfig, example: Example) -> str:
    """What the model reads before an answer, without shots."""
    if task.prompt:
        return example.fill("prompt", task.prompt)
    texts = [example.text("text_field", task.text_name)]
    if task.pair_field:
        texts.append(example.text("pair_field", task.pair_field))
    return "\n".join(texts) + " "


def make_prompts(
    task: TaskConfig, examples: Sequence[Example], shown: Sequence[str], template: ChatTemplate | None
) -> tuple[list[str], list[str]]:
    """(prompts, what the model reads of each) of the examples that are scored, after the first `shots` of them.

    shown   the answers of the first `shots`
    """
    prompts = [make_prompt(task, example) for example in examples]
    shots = list(zip(prompts[: task.shots], shown, strict=True))
    prompts = prompts[task.shots :]
    return prompts, write_prompts(prompts, shots, template)


def write_prompts(prompts: Sequence[str], shots: Sequence[tuple[str, str]], template: ChatTemplate | None) -> list[str]:
    """What the model reads of each prompt: the shots (prompt, answer), a blank line after each, and the prompt.

    template   of a chat: each shot is two turns, the prompt a third one, and the answer begins the assistant's turn
    """
    if template is None:
        beginning = "".join(prompt + answer + _SHOTS_END for prompt, answer in shots)
        return [beginning + prompt for prompt in prompts]
    turns = []
    for prompt, answer in shots:
        turns += [{"role": "user", "content": prompt.rstrip(" ")}, {"role": "assistant", "content": answer}]
    return [template.render([*turns, {"role": "user", "content": prompt.rstrip(" ")}]) for prompt in prompts]
