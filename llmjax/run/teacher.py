"""The teacher of distillation (distill.teacher): the config of its run, and what it adds to a train state."""

import dataclasses

from etils import epath
import jax

from llmjax.data.config import LABELLED
from llmjax.errors import UserError
from llmjax.models import registry
from llmjax.parallel import axes
from llmjax.run import config as run_config, workdir as workdirs
from llmjax.run.config import RunConfig
from llmjax.run.state import StateSpec


def teacher_workdir(config: RunConfig) -> epath.Path:
    """The workdir of distill.teacher, which must be set."""
    return epath.Path(config.distill.teacher).expanduser()


def read_teacher_config(config: RunConfig) -> RunConfig | None:
    """The config of the teacher's run, whose model keeps nothing for a backward pass; None without a teacher.

    Raises UserError where there is no such run, and where it learned another task than the config's.
    """
    if not config.distill.teacher:
        return None
    field = f"distill.teacher={config.distill.teacher}"
    tree = workdirs.read_run_config(teacher_workdir(config))
    if tree is None:
        raise UserError(f"{field}: no config.json there; give the workdir of a run, trained or imported")
    try:
        teacher = run_config.apply_overrides(tree, [])
    except UserError as error:
        raise UserError(f"{field}: {error}; another version of llmjax wrote this run: train it again") from error
    _check_task(config, teacher, field)
    return run_config.with_fields(teacher, [("model.remat", "none")])


def _check_task(config: RunConfig, teacher: RunConfig, field: str) -> None:
    """Raise UserError where the teacher's predictions are not of what the batches of `config` ask."""
    name = config.objective.name
    values = {
        "objective.name": lambda config: config.objective.name,
        "data.classes": lambda config: config.data.classes,
        "encoder-decoder": lambda config: config.model.reads_source,
    }
    if name in LABELLED:  # a document's label is at its first position or at its last
        values["bidirectional attention"] = lambda config: config.model.bidirectional
    for what, value_of in values.items():
        own, other = value_of(config), value_of(teacher)
        if own != other:
            raise UserError(
                f"{field}: its run has {what} {other!r}, and this one {own!r}; give a teacher with {own!r}, or change "
                "this run"
            )


def check_vocabulary(config: RunConfig, teacher: RunConfig) -> None:
    """Raise UserError where the logits of the teacher and of the model, whose vocabulary is known, differ in number."""
    field = "num_outputs" if teacher.model.num_outputs else "vocab_size"
    own, other = (getattr(each.model, field) for each in (config, teacher))
    if own != other:
        raise UserError(
            f"model.{field}={own}: distill.teacher={config.distill.teacher} has {other} logits; set it to {other}"
        )


def add_teacher(spec: StateSpec, teacher: RunConfig) -> StateSpec:
    """The spec of a train state that carries the teacher's parameters, sharded by the rules of `use_mesh`."""
    graph, shapes, names = registry.abstract(teacher.model)
    return dataclasses.replace(
        spec,
        teacher=graph,
        shapes=dataclasses.replace(spec.shapes, teacher=shapes),
        shardings=dataclasses.replace(spec.shardings, teacher=axes.shardings(names, shapes)),
    )


def teacher_bytes(config: RunConfig) -> int:
    """Bytes of the teacher's parameters over all devices; 0 without a teacher. Nothing is allocated."""
    teacher = read_teacher_config(config)
    if teacher is None:
        return 0
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(registry.abstract(teacher.model)[1]))


def teacher_flops_per_token(config: RunConfig, teacher: RunConfig | None, target_len: int) -> float:
    """FLOPs of the teacher's forward pass at one position of a row of `config`, a third of those of training."""
    if teacher is None:
        return 0.0
    return run_config.flops_per_token(dataclasses.replace(config, model=teacher.model), target_len) / 3
