"""Refuse objectives that do not fit the labels or dialogues, the packing, a teacher, or the head of the model."""

from llmjax.data.config import LABELLED, SEVERAL_TEXTS, DataConfig, ObjectiveConfig
from llmjax.errors import UserError
from llmjax.models.registry import ModelConfig
from llmjax.nn.distillation import DistillConfig


def check_labels(objective: ObjectiveConfig, data: DataConfig, model: ModelConfig) -> None:
    """Raise UserError where the objective, the labels of the sources, and the head of the model do not fit."""
    name, classes = objective.name, data.classes
    if name not in LABELLED:
        for source, fields in data.sources.items():
            if fields.label_field:
                raise UserError(
                    f"data.sources.{source}.label_field={fields.label_field!r}: objective.name={name!r} has no use "
                    "for labels; unset it, or set objective.name='classify' or 'regress'"
                )
        if model.num_outputs and name != "reward":
            raise UserError(
                f"model.num_outputs={model.num_outputs}: a model with this head predicts no tokens, so "
                f"objective.name={name!r} cannot train it; set objective.name='classify' or 'regress', or "
                "model.num_outputs=0"
            )
        return
    if (name == "classify") != bool(classes):
        hint = "name the classes in data.classes" if name == "classify" else "use 'classify', or unset data.classes"
        raise UserError(f"objective.name={name!r}: {hint}")
    if unlabelled := [source for source, fields in data.sources.items() if not fields.label_field]:
        raise UserError(f"objective.name={name!r}: set data.sources.{unlabelled[0]}.label_field")
    if data.packing not in ("best_fit", "none"):
        raise UserError(
            f"data.packing={data.packing!r}: objective.name={name!r} needs whole documents; set it to "
            "'best_fit' or 'none'"
        )
    weights = objective.class_weights
    if weights and (len(weights) != len(classes) or data.multi_label):
        raise UserError(
            f"objective.class_weights={weights}: expected one for each of the {len(classes)} classes, and "
            "data.multi_label=False"
        )
    if model.reads_source:
        values = [data.multi_label, weights, model.num_outputs]
        fields = ("data.multi_label", "objective.class_weights", "model.num_outputs")
        for field, value in zip(fields, values, strict=True):
            if value:
                family = f"model.family={model.family!r}"
                raise UserError(f"{field}={value!r}: {family} writes the name of one class, without a head; unset it")
        return
    num_outputs = len(classes) or 1
    if model.num_outputs not in (0, num_outputs):
        raise UserError(
            f"model.num_outputs={model.num_outputs}: the labels need {num_outputs}; set it to 0, which takes these"
        )


def check_chat(objective: ObjectiveConfig, data: DataConfig) -> None:
    """Raise UserError where the objective or the packing cannot use dialogues."""
    for source, fields in data.sources.items():
        if not fields.chat:
            continue
        field = f"data.sources.{source}.chat={fields.chat!r}"
        if objective.name != "causal":
            raise UserError(
                f"objective.name={objective.name!r}: {field} needs 'causal', which scores the assistant's "
                "turns; set it, or unset chat"
            )
        if data.packing not in ("best_fit", "none"):
            raise UserError(
                f"data.packing={data.packing!r}: {field} needs whole dialogues; set it to 'best_fit' or 'none'"
            )


def check_distillation(distill: DistillConfig, objective: ObjectiveConfig, data: DataConfig) -> None:
    """Raise UserError where the objective has no softmax whose probabilities a teacher could give."""
    if not distill.teacher:
        return
    field = f"distill.teacher={distill.teacher}"
    if objective.name in SEVERAL_TEXTS or objective.name == "regress":
        raise UserError(
            f"{field}: objective.name={objective.name!r} predicts no tokens or classes, of which a teacher gives "
            "probabilities; unset it"
        )
    if data.multi_label:
        raise UserError(f"{field}: data.multi_label=True decides each class by itself, without a softmax; unset it")
