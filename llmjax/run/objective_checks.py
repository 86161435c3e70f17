"""Refuse a config whose objective does not fit its labels, its texts, the packing, the head or the step."""

from typing import TYPE_CHECKING

from llmjax.data.config import LABELLED, SEVERAL_TEXTS
from llmjax.data.objectives.text_fields import check_text_fields
from llmjax.errors import UserError

if TYPE_CHECKING:  # it calls `check`
    from llmjax.run.config import RunConfig


def check(config: "RunConfig") -> None:
    """Raise UserError for the first misfit."""
    _check_labels(config)
    _check_chat(config)
    _check_texts(config)


def _check_labels(config: "RunConfig") -> None:
    """UserError where the objective, the labels of the sources, and the head of the model do not fit."""
    name, classes, model = config.objective.name, config.data.classes, config.model
    if name not in LABELLED:
        for source, fields in config.data.sources.items():
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
    if unlabelled := [source for source, fields in config.data.sources.items() if not fields.label_field]:
        raise UserError(f"objective.name={name!r}: set data.sources.{unlabelled[0]}.label_field")
    if config.data.packing not in ("best_fit", "none"):
        raise UserError(
            f"data.packing={config.data.packing!r}: objective.name={name!r} needs whole documents; set it to "
            "'best_fit' or 'none'"
        )
    weights = config.objective.class_weights
    if weights and (len(weights) != len(classes) or config.data.multi_label):
        raise UserError(
            f"objective.class_weights={weights}: expected one for each of the {len(classes)} classes, and "
            "data.multi_label=False"
        )
    if model.reads_source:
        values = [config.data.multi_label, weights, model.num_outputs]
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


def _check_chat(config: "RunConfig") -> None:
    """UserError where the objective or the packing cannot use dialogues."""
    for source, fields in config.data.sources.items():
        if not fields.chat:
            continue
        field = f"data.sources.{source}.chat={fields.chat!r}"
        if config.objective.name != "causal":
            raise UserError(
                f"objective.name={config.objective.name!r}: {field} needs 'causal', which scores the assistant's "
                "turns; set it, or unset chat"
            )
        if config.data.packing not in ("best_fit", "none"):
            raise UserError(
                f"data.packing={config.data.packing!r}: {field} needs whole dialogues; set it to 'best_fit' or 'none'"
            )


def _check_texts(config: "RunConfig") -> None:
    """UserError where the objective and the texts of the records do not fit, or where a step would be another."""
    name, train = config.objective.name, config.train
    check_text_fields(name, config.data.sources)
    if name not in SEVERAL_TEXTS:
        return
    if config.data.packing != "none":
        raise UserError(
            f"data.packing={config.data.packing!r}: objective.name={name!r} needs one record in each row; set it to "
            "'none'"
        )
    if train.z_loss:
        raise UserError(f"train.z_loss={train.z_loss}: objective.name={name!r} has no term for it; set it to 0")
    if name == "dpo" and config.model.dropout:
        raise UserError(
            f"model.dropout={config.model.dropout}: objective.name='dpo' compares with a reference model without "
            "dropout; set it to 0"
        )
    if name == "contrastive":
        _check_negatives(config)


def _check_negatives(config: "RunConfig") -> None:
    """UserError where a step would not compare each record with all others of the global batch."""
    train = config.train
    if train.accumulation > 1:
        raise UserError(
            f"train.accumulation={train.accumulation}: objective.name='contrastive' compares each record with all "
            "others of the global batch, which a microbatch does not have; set it to 1"
        )
    if config.parallel.backend == "pmap":
        raise UserError(
            "parallel.backend='pmap': objective.name='contrastive' compares each record with those of all devices; "
            "use 'jit'"
        )
    for field, size in train.batch_sizes.fields:
        if size < 2:
            raise UserError(
                f"{field}={size}: objective.name='contrastive' compares records with others; set it to 2 or more"
            )
