"""Log to Weights & Biases as well, for `train.wandb_project`; the extra `wandb` installs the package."""

from collections.abc import Mapping
import importlib.util
import logging
import pathlib
from typing import Any

from llmjax import atomic
from llmjax.errors import UserError
from llmjax.parallel import hosts
from llmjax.run import config as run_config, workdir as workdirs
from llmjax.run.config import TrainConfig
from llmjax.train.context import TrainContext

logger = logging.getLogger(__name__)


def check_wandb(train: TrainConfig) -> None:
    """Raise UserError where `train.wandb_project` is set and the package is missing."""
    if not train.wandb_project:
        return
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # no origin: a folder that W&B wrote, not the package
        raise UserError(
            f"train.wandb_project={train.wandb_project}: the package wandb is not installed; run "
            "`pip install 'llmjax[wandb]'`, or set train.wandb_project=''"
        )


def start_wandb(context: TrainContext) -> None:
    """Log the run's scalars to W&B as well, on the primary process, where `train.wandb_project` is set."""
    project = context.config.train.wandb_project
    if not project or not hosts.is_primary():
        return
    run_id = workdirs.read_json(context.workdir / workdirs.RUN)["run_id"]
    folder = None if atomic.is_remote(context.workdir) else str(context.workdir)
    wandb_run = WandbRun(project, run_id, context.workdir.name, folder, run_config.to_json(context.config))
    logger.info("  W&B: run %s of project %s, %s", run_id, project, wandb_run.address)
    context.log.add_sink(wandb_run)


class WandbRun:
    """One W&B run; the same `run_id` continues it.

    name      shown by W&B
    folder    W&B writes to FOLDER/wandb; None: where W&B itself chooses
    config    the resolved config, JSON-ready
    address   where the run can be seen: a folder or a URL

    The step is logged as a value, since W&B's own step counter drops the steps that a resumed run repeats.
    Raises UserError where W&B refuses the run or cannot be reached.
    """

    def __init__(self, project: str, run_id: str, name: str, folder: str | None, config: dict[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports]

        # console="off": W&B would copy what is printed, and redraw the progress line.
        settings = wandb.Settings(console="off", quiet=True)
        try:
            self._run = wandb.init(
                project=project, id=run_id, name=name, dir=folder, config=config, resume="allow", settings=settings
            )
        except wandb.Error as error:
            raise UserError(
                f"train.wandb_project={project}: W&B does not start ({error}); run `wandb login`, set "
                "WANDB_MODE=offline in the environment, or set train.wandb_project=''"
            ) from error
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        offline_folder = pathlib.Path(self._run.dir).parent
        self.address = f"offline in {offline_folder}" if self._run.offline else self._run.url or "disabled"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers of one step."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Upload the rest and end the run."""
        self._run.finish()
