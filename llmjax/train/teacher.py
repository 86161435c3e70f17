"""Open the teacher of distillation: choose its checkpoint, check that it fits, and read its parameters on this mesh."""

import dataclasses
import logging
import pathlib
from typing import Any

from etils import epath
import jax

from llmjax.batch import Params
from llmjax.checkpoint.manager import Checkpoints
from llmjax.data.objectives.objective import Objective
from llmjax.data.store.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.parallel import hosts
from llmjax.run import config as run_config, loading, workdir as workdirs
from llmjax.run.config import RunConfig
from llmjax.run.teacher import check_vocabulary, read_teacher_config, teacher_flops_per_token, teacher_workdir

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A checkpoint whose predictions a run learns. `config` is that of its own run."""

    workdir: str
    step: int
    fingerprint: str
    config: RunConfig

    def __str__(self) -> str:
        return _describe(self.workdir, self.step, self.fingerprint)

    def to_json(self, config: RunConfig, target_len: int) -> dict[str, Any]:
        """The record in run.json of a run with this config."""
        return {
            "workdir": self.workdir,
            "step": self.step,
            "fingerprint": self.fingerprint,
            "forward_flops_per_token": teacher_flops_per_token(config, self.config, target_len),
        }


def open_teacher(
    config: RunConfig, workdir: epath.Path, tokenizer: Tokenizer, objective: Objective, *, resumes: bool
) -> Teacher | None:
    """The teacher of a run, None where distill.teacher is empty. A collective: all processes call it.

    resumes   whether there are steps to go on from: then the step that run.json records is kept

    Raises UserError where the teacher is missing or has another task, tokenizer or vocabulary, and where a run that
    goes on had another teacher at its start, or none.
    """
    recorded = (workdirs.read_json(workdir / workdirs.RUN) or {}).get("teacher") if resumes else None
    config_of_teacher = read_teacher_config(config)
    teacher = None
    if config_of_teacher is not None:
        teacher = _find(config, config_of_teacher, tokenizer, recorded)
        check_vocabulary(config, config_of_teacher)
        theirs = run_config.objective(config_of_teacher, tokenizer)
        if theirs.vocabulary != objective.vocabulary:
            raise UserError(
                f"distill.teacher={config.distill.teacher}: its objective has other special ids "
                f"({theirs.fingerprint}) than this run's ({objective.fingerprint}); set the same data.seq_len and "
                "objective fields"
            )
    hosts.all_equal("teacher", str(teacher))
    if resumes:
        _check_unchanged(config, teacher, recorded)
    return teacher


def _find(config: RunConfig, teacher: RunConfig, tokenizer: Tokenizer, recorded: dict[str, Any] | None) -> Teacher:
    path = config.distill.teacher
    checkpoints = Checkpoints(teacher_workdir(config) / workdirs.CHECKPOINTS)
    is_kept = config.distill.step is None and recorded is not None and recorded["workdir"] == path
    step = recorded["step"] if is_kept and recorded is not None else config.distill.step
    step = checkpoints.latest() if step is None else step
    if step is None or step not in checkpoints.steps():
        raise UserError(
            f"distill.teacher={path}: no checkpoint {'' if step is None else f'of step {step} '}there; the steps there "
            f"are {checkpoints.steps() or 'none'}"
        )
    meta = checkpoints.read_meta(step)
    if (sha256 := meta["tokenizer_sha256"]) != tokenizer.sha256:
        raise UserError(
            f"distill.teacher={path}: its tokenizer (sha256 {sha256[:12]}) is not this run's "
            f"({tokenizer.sha256[:12]}); set data.tokenizer to the teacher's, or data.store to a store with it"
        )
    return Teacher(path, step, meta["fingerprint"], teacher)


def _check_unchanged(config: RunConfig, teacher: Teacher | None, recorded: dict[str, Any] | None) -> None:
    if (recorded or {}).get("fingerprint") == (teacher.fingerprint if teacher else None):
        return
    before = "no teacher" if recorded is None else _describe(*(recorded[k] for k in ("workdir", "step", "fingerprint")))
    change = f"{before} -> {teacher or 'no teacher'}"
    if not config.checkpoint.accept_changes:
        raise UserError(
            f"distill.teacher={config.distill.teacher!r}: the teacher changed since the start of this run ({change}): "
            "undo it, give a new --workdir, or accept it with --config.checkpoint.accept_changes=true"
        )
    logger.info("  accepted change: teacher: %s", change)


def _describe(workdir: str, step: int, fingerprint: str) -> str:
    return f"{workdir}, step {step}, fingerprint {fingerprint}"


def load_teacher(teacher: Teacher, config: RunConfig, tokenizer: Tokenizer, store: pathlib.Path) -> Params:
    """The parameters that the teacher's run evaluates, on the mesh of `use_mesh`.

    Raises UserError where the checkpoint is damaged, and where the teacher cannot read rows of `config` on this mesh.
    """
    mesh = jax.sharding.get_mesh().shape
    try:
        teacher.config.model.check(seq_len=config.data.seq_len, tensor=mesh["tensor"])
        teacher.config.model.check_mesh(mesh)
    except UserError as error:
        raise UserError(f"distill.teacher={teacher.workdir}: {error}") from error
    workdir = teacher_workdir(config)
    loaded = loading.restore(teacher.config, workdir, teacher.step, store, tokenizer, only_params=True)
    logger.info("  distilling from %s (%s)", teacher, loaded.params_name)
    return loaded.params
