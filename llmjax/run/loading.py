"""Load a checkpoint from a workdir onto the available mesh, for evaluation, generation and export."""

from collections.abc import Callable, Sequence
import dataclasses
import pathlib
from typing import Any

from etils import epath
import jax
from jax.sharding import Mesh

from llmjax.checkpoint.manager import Checkpoints
from llmjax.data.store import prepare
from llmjax.data.store.tokenizer import FILE_NAMES, Tokenizer, load_tokenizer, read_tokenizer_file
from llmjax.errors import UserError
from llmjax.parallel import hosts, mesh as meshes
from llmjax.run import config as run_config, state as states, workdir as workdirs
from llmjax.run.config import RunConfig

IMPORT, TOKENIZER = "import.json", "tokenizer"  # what `llmjax import` leaves in a workdir beside a run's own files


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint, ready to be used. `parameters` names which weights `params` are: live ones, an average, or those
    that were imported. The store may not be there yet where they are."""

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
    path = pathlib.Path(folder).expanduser()
    if path.is_file():
        raise UserError(f"data.store={folder}: this is a file; give the folder of a token store, or of one to be made")
    return path


def read_config(workdir: epath.Path, overrides: Sequence[tuple[str, str]] = ()) -> RunConfig:
    """The resolved config that training wrote, with command-line overrides. Raises UserError where there is none."""
    return run_config.apply_overrides(_trained(workdir, _config_tree(workdir)), overrides)


def initialize(workdir: epath.Path, overrides: Sequence[tuple[str, str]] = ()) -> None:
    """Join the job, with the CPU threads of the run in `workdir`; must run before anything touches a device."""
    hosts.initialize(read_config(workdir, overrides).parallel.cpu_threads)


def _trained(workdir: epath.Path, tree: dict[str, Any] | None) -> dict[str, Any]:
    if tree is None:
        raise UserError(f"--workdir={workdir}: no config.json there, so nothing was trained; run `llmjax train` first")
    return tree


def _config_tree(workdir: epath.Path) -> dict[str, Any] | None:
    """A workdir's config.json, None where there is none. Raises UserError for that of a corpus."""
    tree = workdirs.read_json(workdir / "config.json")
    if tree is not None and "curate" in tree:
        raise UserError(f"--workdir={workdir}: contains a corpus, not a training run; give another folder")
    return tree


def resolve(
    file: str | None, workdir: epath.Path, overrides: Sequence[tuple[str, str]], say: Callable[[str], None] = print
) -> RunConfig:
    """The config of `--config=FILE[:ARG]`, for a run in `workdir`; without a file, that of the workdir's config.json.

    Where parameters were imported, the model and the tokenizer are theirs. Overrides hold over both. Raises UserError
    where there is neither a file nor a config.json.
    """
    kept = _config_tree(workdir)
    imported = workdirs.read_json(workdir / IMPORT)
    if file is None and kept is not None:
        # What was accepted once holds for that start alone.
        kept.get("checkpoint", {}).pop("accept_changes", None)
    if imported is None:
        if file is None and kept is not None:
            say(f"  config: {workdir / 'config.json'}")
            return run_config.apply_overrides(kept, overrides)
        if file is None:
            raise UserError(
                "--config is missing: give a Python file with get_config(), or a name of `llmjax configs`, such as "
                "--config=quickstart"
            )
        return run_config.resolve(file, overrides)
    tree = _trained(workdir, kept) if file is None else run_config.read_file(file)
    tree["model"] = dict(imported["model"])
    tree.setdefault("data", {})["tokenizer"] = tokenizer_section(workdir, imported["tokenizer"]["kind"])
    say(f"  model and tokenizer are those that were imported from {imported['from']}")
    return run_config.apply_overrides(tree, overrides)


def tokenizer_section(workdir: epath.Path, kind: str) -> dict[str, str]:
    """The config of the tokenizer that was imported into a workdir."""
    path = workdir / TOKENIZER / FILE_NAMES[kind]
    return {"kind": kind, "path": str(path if "://" in str(path) else path.resolve())}


def _tokenizer(workdir: epath.Path, store: pathlib.Path) -> Tokenizer:
    """The token store's tokenizer, or the one that was imported where there is no store yet."""
    if (manifest := prepare.read_manifest(store)) is not None:
        prepare.check_store(store, manifest)
        return load_tokenizer(store)
    imported = workdirs.read_json(workdir / IMPORT)
    if imported is None:
        raise UserError(f"{store}: no token store there; run `llmjax prepare` or set --config.data.store")
    kind = imported["tokenizer"]["kind"]
    return read_tokenizer_file(kind, workdir / TOKENIZER / FILE_NAMES[kind])


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
    tokenizer = _tokenizer(workdir, store)
    asked = any(field.startswith("mesh.") for field, _ in overrides)
    mesh = meshes.make_mesh(config.mesh) if asked else mesh_or_default(config, say)
    rules = config.parallel.rules
    spec = states.make_state_spec(config.model, config.optimizer, horizon=config.train.steps, mesh=mesh, rules=rules)
    checkpoints = Checkpoints(workdir / "checkpoints")
    abstract = states.to_checkpoint(spec.abstract())
    bare = _is_import(checkpoints, step)
    if bare:
        del abstract["opt_state"]
    if step is None:
        restored = checkpoints.restore_latest_good(abstract, say=say, set_aside=False)
    else:
        restored = checkpoints.restore(step, abstract)
    if restored is None:
        raise UserError(f"{workdir / 'checkpoints'}: no checkpoint there; run `llmjax train` first")
    _check_tokenizer(restored.meta["tokenizer_sha256"], tokenizer, store)
    parts = restored.parts
    return Loaded(
        config=config,
        step=restored.step,
        mesh=mesh,
        graph=spec.graph,
        params=parts["params"] if bare else spec.optimizer.eval_params(parts["params"], parts["opt_state"]),
        parameters="imported parameters" if bare else spec.optimizer.eval_params_name,
        tokenizer=tokenizer,
        store=store,
        fingerprint=restored.meta["fingerprint"],
    )


def _is_import(checkpoints: Checkpoints, step: int | None) -> bool:
    """Whether a checkpoint (None: the newest) holds parameters alone, as `llmjax import` writes them."""
    steps = checkpoints.steps()
    step = max(steps, default=None) if step is None else step
    return step in steps and "imported" in checkpoints.read_meta(step)


def _check_tokenizer(expected: str, tokenizer: Tokenizer, store: pathlib.Path) -> None:
    if expected != tokenizer.sha256:
        raise UserError(
            f"{store}: its tokenizer (sha256 {tokenizer.sha256[:12]}) is not the checkpoint's ({expected[:12]}); "
            "point data.store at the store that the checkpoint was trained on"
        )


def mesh_or_default(config: RunConfig, say: Callable[[str], None]) -> Mesh:
    """The run's own mesh where it fits these devices; otherwise all of them become fsdp shards, and that is said."""
    try:
        return meshes.make_mesh(config.mesh)
    except UserError:
        say(f"  the run's mesh does not fit these {jax.device_count()} devices: using mesh.fsdp={jax.device_count()}")
        return meshes.make_mesh(meshes.MeshConfig(data=1, fsdp=-1, tensor=1))
