"""A trained model from a workdir, on whatever mesh is at hand: what evaluation, generation and export start from."""

from collections.abc import Callable, Sequence
import dataclasses
import pathlib
from typing import Any

from etils import epath
import jax
from jax.sharding import Mesh

from llmjax import run_config, state as states
from llmjax.checkpoint import Checkpoints
from llmjax.config import UserError
from llmjax.data import prepare
from llmjax.data.tokenizer import Tokenizer, load_tokenizer
from llmjax.parallel import mesh as meshes
from llmjax.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint, ready to be used. `parameters` names which weights `params` are: live ones or an average."""

    config: RunConfig
    step: int
    mesh: Mesh
    graph: Any
    params: dict
    parameters: str
    tokenizer: Tokenizer
    store: pathlib.Path
    fingerprint: str


def store_folder(config: RunConfig, workdir: epath.Path) -> pathlib.Path:
    """The token store of a run: data.store, or WORKDIR/store. It is memory-mapped: a local or shared disk."""
    folder = config.data.store or str(workdir / "store")
    if "://" in folder:
        raise UserError(
            f"data.store={folder}: the token store is memory-mapped; set data.store to a local or shared folder"
        )
    return pathlib.Path(folder)


def read_config(workdir: epath.Path, overrides: Sequence[tuple[str, str]] = ()) -> RunConfig:
    """The resolved config that training wrote, with command-line overrides. Raises UserError where there is none."""
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"--workdir={workdir}: no config.json there, so nothing was trained; run `llmjax train` first")
    return run_config.apply_overrides(run_config.read_json(path), overrides)


def load(
    workdir: epath.Path,
    *,
    step: int | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    say: Callable[[str], None] = print,
) -> Loaded:
    """The checkpoint of `step` (None: the newest good one) on this job's devices."""
    config = read_config(workdir, overrides)
    store = store_folder(config, workdir)
    if prepare.read_manifest(store) is None:
        raise UserError(f"{store}: no token store there; run `llmjax prepare` or set --config.data.store")
    tokenizer = load_tokenizer(store)
    mesh = _fitting_mesh(config, say)
    rules = config.parallel.rules
    plan = states.plan_state(config.model, config.optimizer, horizon=config.train.steps, mesh=mesh, rules=rules)
    checkpoints = Checkpoints(workdir / "checkpoints")
    abstract = states.parts(plan.abstract())
    if step is None:
        restored = checkpoints.restore_latest_good(abstract, say=say, set_aside=False)
    else:
        restored = checkpoints.restore(step, abstract)
    if restored is None:
        raise UserError(f"{workdir / 'checkpoints'}: no checkpoint there; run `llmjax train` first")
    _check_tokenizer(restored.meta["tokenizer_sha256"], tokenizer, store)
    return Loaded(
        config=config,
        step=restored.step,
        mesh=mesh,
        graph=plan.graph,
        params=plan.optimizer.evaluated(restored.parts["params"], restored.parts["opt_state"]),
        parameters=plan.optimizer.evaluated_name,
        tokenizer=tokenizer,
        store=store,
        fingerprint=restored.meta["fingerprint"],
    )


def _check_tokenizer(expected: str, tokenizer: Tokenizer, store: pathlib.Path) -> None:
    if expected != tokenizer.sha256:
        raise UserError(
            f"{store}: its tokenizer (sha256 {tokenizer.sha256[:12]}) is not the checkpoint's ({expected[:12]}); "
            "point data.store at the store that the checkpoint was trained on"
        )


def _fitting_mesh(config: RunConfig, say: Callable[[str], None]) -> Mesh:
    """The run's own mesh where it fits these devices; otherwise all of them become fsdp shards, and that is said."""
    try:
        return meshes.make_mesh(config.mesh)
    except UserError:
        say(f"  the run's mesh does not fit these {jax.device_count()} devices: using mesh.fsdp={jax.device_count()}")
        return meshes.make_mesh(meshes.MeshConfig(data=1, fsdp=-1, tensor=1))
