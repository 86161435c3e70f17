"""Classes that differ from those of a family by their head alone: BertModel, LlamaForSequenceClassification, ..."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, NamedTuple, NoReturn

from llmjax.errors import UserError
from llmjax.interop.mapping import Architecture, Rule, transposed

# Prefixes of the tensors of heads for other tasks. Those that llmjax does not have are left out.
_TASK_HEADS = ("classifier.", "score.")


class TaskHeadFormat(NamedTuple):
    """The head of {stem}ForSequenceClassification: a linear layer on one position.

    name      of the layer
    has_bias  whether it has a bias
    pooled    whether it reads the first position through BERT's pooler, instead of the last one
    """

    name: str
    has_bias: bool
    pooled: bool


SCORE = TaskHeadFormat("score", has_bias=False, pooled=False)
CLASSIFIER = TaskHeadFormat("classifier", has_bias=True, pooled=True)


class Labels(NamedTuple):
    """What a model predicts of a text.

    classes      in the order of their numbers; (): a number
    multi_label  whether a text has several classes, or none
    """

    classes: tuple[str, ...]
    multi_label: bool

    @property
    def num_outputs(self) -> int:
        """Outputs of the head."""
        return len(self.classes) or 1


def read_labels(hf: dict[str, Any]) -> Labels:
    """The labels in config.json, with the names and the number of transformers where it has none.

    One label is a number unless problem_type says otherwise. Raises UserError for names that are not one text a number.
    """
    problem, names = hf.get("problem_type"), hf.get("id2label")
    if problem not in (None, "regression", "single_label_classification", "multi_label_classification"):
        raise UserError(f"config.json: problem_type={problem!r} is not known")
    if names is None:
        count = hf.get("num_labels", 2)
        if type(count) is not int or not 1 <= count <= 1 << 20:
            raise UserError(f"config.json: num_labels={count!r}: expected a number of labels")
        names = {str(number): f"LABEL_{number}" for number in range(count)}
    numbers = [str(number) for number in range(len(names))] if isinstance(names, dict) else []
    if not numbers or sorted(names) != sorted(numbers) or not all(isinstance(name, str) for name in names.values()):
        raise UserError('config.json: id2label: expected the name of each label from 0 on, such as {"0": "no"}')
    classes = tuple(names[number] for number in numbers)
    if problem == "regression" or (problem is None and len(classes) == 1):
        if len(classes) > 1:
            raise UserError(f"config.json: problem_type='regression' of {len(classes)} numbers: only 1 is supported")
        return Labels((), False)
    if len(set(classes)) < len(classes):
        raise UserError("config.json: id2label gives two labels one name; rename one of them")
    return Labels(classes, problem == "multi_label_classification")


def write_labels(labels: Labels) -> dict[str, Any]:
    """The fields of config.json that `read_labels` reads."""
    names = labels.classes or ("LABEL_0",)
    kind = "multi_label" if labels.multi_label else "single_label"
    return {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": f"{kind}_classification" if labels.classes else "regression",
    }


def add_variants(
    architectures: dict[str, Architecture],
    base: str,
    stem: str,
    prefix: str,
    head: tuple[str, ...],
    task_head: TaskHeadFormat | None = SCORE,
) -> dict[str, Architecture]:
    """`architectures` and the variants of its class `base`: {stem}Model, which has no head, and those of other tasks.

    prefix     of the tensors below the head, which {stem}Model does not write
    head       prefixes of the tensors of the head of `base`
    task_head  of the class for labels of texts; None: another function than the head of llmjax, so that it is left out
    """
    architecture, bare = architectures[base], f"{stem}Model"
    rename = _add_prefix(prefix, head, architecture.rename)
    without_head = dataclasses.replace(architecture, base=base, rename=rename, missing=head)
    left_out = dataclasses.replace(without_head, left_out=_TASK_HEADS, exported_as=bare)
    by_text, by_token = f"{stem}ForSequenceClassification", f"{stem}ForTokenClassification"
    if task_head is None:
        refuse = lambda config: _refuse_to_write(by_text)
        classifier = dataclasses.replace(left_out, write_config=refuse, predicts_labels=True)
    else:
        classifier = _make_classifier(architecture, by_text, base, rename, head, task_head)
    return {
        **architectures,
        bare: dataclasses.replace(without_head, publish=lambda name: name.removeprefix(prefix)),
        by_text: classifier,
        by_token: left_out,
    }


def _make_classifier(
    architecture: Architecture,
    name: str,
    base: str,
    rename: Callable[[str], str | None],
    head: tuple[str, ...],
    task_head: TaskHeadFormat,
) -> Architecture:
    """The class `name`, whose head is that of llmjax.nn.task_head."""

    def read(hf: dict[str, Any]) -> dict[str, Any]:
        return architecture.read_config(hf) | {"num_outputs": read_labels(hf).num_outputs}

    def write(config: Any) -> dict[str, Any]:
        if task_head.pooled and not config.pooler:
            raise UserError(f"model.pooler=False: a checkpoint of {name} has a pooler below its head")
        names = tuple(f"LABEL_{number}" for number in range(config.num_outputs))
        return architecture.write_config(config) | write_labels(Labels(names, False))

    def make_rules(config: Any) -> list[Rule]:
        rules = architecture.rules(config)
        if not config.num_outputs:
            return rules
        own = [Rule(f"{task_head.name}.weight", ("task_head.weight",), **transposed())]
        own += [Rule(f"{task_head.name}.bias", ("task_head.bias",))] if task_head.has_bias else []
        return [rule for rule in rules if not rule.hf_name.startswith(head)] + own

    return dataclasses.replace(
        architecture,
        base=base,
        read_config=read,
        write_config=write,
        rules=make_rules,
        rename=lambda name: name if name.startswith(f"{task_head.name}.") else rename(name),
        left_out=head,  # transformers does not read it, either
        predicts_labels=True,
    )


def _refuse_to_write(name: str) -> NoReturn:
    raise UserError(f"{name} has further layers below its head, which a model of llmjax does not have")


def _add_prefix(prefix: str, head: Sequence[str], rename: Callable[[str], str | None]) -> Callable[[str], str | None]:
    """`rename`, after a prefix for the tensors that lack it."""
    return lambda name: rename(name if name.startswith((prefix, *head)) else prefix + name)
