"""Load a checkpoint from a workdir onto the devices of this job, for evaluation, generation and export."""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import logging
import pathlib
import shutil
from typing import Any

from etils import epath
import jax
from jax.sharding import Mesh

import llmjax
from llmjax import atomic
from llmjax.batch import Graph, Params
from llmjax.binding import bind
from llmjax.checkpoint.manager import Checkpoints
from llmjax.data.chat_template import TEMPLATE_FILE, ChatTemplate, read_template
from llmjax.data.objectives.objective import Objective
from llmjax.data.store import prepare
from llmjax.data.store.tokenizer import FILE_NAMES, Tokenizer, load_tokenizer, read_tokenizer_file
from llmjax.errors import UserError
from llmjax.models import registry
from llmjax.nn.lora import LoraConfig
from llmjax.optim.config import finetuning_rate
from llmjax.parallel import axes, hosts, mesh as meshes
from llmjax.run import config as run_config, phases, state as states, workdir as workdirs
from llmjax.run.config import RunConfig
from llmjax.run.mesh_choice import choose_mesh

logger = logging.getLogger(__name__)

IMPORTED = "imported parameters"  # the name of parameters that `llmjax import` wrote


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model, ready to be used.

    params_name   which parameters `params` are: those of the last step, an average of them, or imported ones
    store         folder of the token store, which may be missing for imported parameters
    """

    config: RunConfig
    step: int
    graph: Graph
    params: Params
    params_name: str
    tokenizer: Tokenizer
    objective: Objective
    store: pathlib.Path
    fingerprint: str


def store_folder(config: RunConfig, workdir: epath.Path) -> pathlib.Path:
    """The token store of a run: data.store, or WORKDIR/store. It is memory-mapped: a local or shared disk."""
    folder = config.data.store or str(workdir / workdirs.STORE)
    if atomic.is_remote(folder):
        raise UserError(
            f"data.store={folder}: the token store is memory-mapped; set data.store to a local or shared folder"
        )
    path = pathlib.Path(folder).expanduser()
    if path.is_file():
        raise UserError(f"data.store={folder}: this is a file; give the folder of a token store, or a new folder")
    return path


def read_config(workdir: epath.Path, overrides: Sequence[tuple[str, str]] = ()) -> RunConfig:
    """The config that training wrote to the workdir, with command-line overrides. Raises UserError without one."""
    tree = workdirs.read_run_config(workdir)
    if tree is None:
        raise _no_config_error(workdir)
    return _bind_saved(workdir, tree, overrides)


def initialize(workdir: epath.Path, overrides: Sequence[tuple[str, str]] = ()) -> None:
    """Join the job, with the CPU threads of the run in `workdir`; must run before anything touches a device."""
    hosts.initialize(read_config(workdir, overrides).parallel.cpu_threads)


def resolve(file: str | None, workdir: epath.Path, overrides: Sequence[tuple[str, str]]) -> RunConfig:
    """The config of `--config=FILE[:ARG]`, for a run in `workdir`; without a file, that of the workdir's config.json.

    Imported parameters bring their model and tokenizer, in place of the config's. Overrides come last. Raises UserError
    where there is neither a file nor a config.json.
    """
    saved = workdirs.read_run_config(workdir)
    imported = workdirs.read_json(workdir / workdirs.IMPORT)
    if file is not None:
        tree = run_config.load_run_file(file)
    elif saved is not None:
        saved.get("checkpoint", {}).pop("accept_changes", None)  # accepts the changes of one start
        tree = saved
    elif imported is not None:
        raise _no_config_error(workdir)
    else:
        raise UserError(
            "--config is missing: give a Python file with get_config(), or a name of `llmjax configs`, such as "
            "--config=quickstart"
        )
    if imported is not None:
        if file is not None:  # it may ask for adapters; everything else about the model is decided
            adapters = {"lora": lora} if (lora := tree.get("model", {}).get("lora")) else {}
            tree["model"] = {**imported["model"], **adapters}
        tree.setdefault("data", {})["tokenizer"] = tokenizer_section(workdir, imported["tokenizer"]["kind"])
    if file is not None:
        return run_config.apply_overrides(tree, overrides)
    return _bind_saved(workdir, tree, overrides)


def log_config_source(file: str | None, workdir: epath.Path) -> None:
    """Log where the config of `resolve` comes from; after `initialize`, as the primary process alone logs."""
    if (imported := workdirs.read_json(workdir / workdirs.IMPORT)) is not None:
        logger.info("  model and tokenizer are those that were imported from %s", imported["from"])
    elif file is None:
        logger.info("  config: %s", workdir / workdirs.CONFIG)


def with_finetuning_rate(config: RunConfig, workdir: epath.Path) -> RunConfig:
    """The config with the learning rate filled in, and logged, where the run starts from imported parameters."""
    if config.optimizer.learning_rate is not None or not (workdir / workdirs.IMPORT).exists():
        return config
    rate, pretraining = finetuning_rate(config.optimizer.name, adapters=bool(config.model.lora.rank))
    logger.info(
        "  optimizer.learning_rate=%g: lower than the default of pretraining (%g), since the run starts from imported "
        "parameters; set it to choose another",
        rate,
        pretraining,
    )
    return run_config.with_fields(config, [("optimizer.learning_rate", rate)])


def tokenizer_section(workdir: epath.Path, kind: str) -> dict[str, str]:
    """The config of the tokenizer that was imported into a workdir."""
    if kind == "bytes":
        return {"kind": kind}
    path = workdir / workdirs.TOKENIZER / FILE_NAMES[kind]
    return {"kind": kind, "path": str(path if atomic.is_remote(path) else path.resolve())}


@contextlib.contextmanager
def load(
    workdir: epath.Path, *, step: int | None = None, overrides: Sequence[tuple[str, str]] = ()
) -> Iterator[Loaded]:
    """The checkpoint of `step` (None: the newest good one), inside the mesh that holds its parameters."""
    config = read_config(workdir, overrides)
    if config.model.remat == "auto":  # an override: there is no backward pass here, which alone depends on it
        config = run_config.with_fields(config, [("model.remat", "none")])
    store = store_folder(config, workdir)
    tokenizer = _load_tokenizer(workdir, store)
    is_mesh_overridden = any(field.startswith("mesh.") for field, _ in overrides)
    mesh = meshes.make_mesh(choose_mesh(config, jax.devices())) if is_mesh_overridden else mesh_or_default(config)
    with axes.use_mesh(mesh, config.parallel.rules):
        yield restore(config, workdir, step, store, tokenizer)


def merge_adapters(loaded: Loaded) -> Loaded:
    """The same model without adapters, whose weights have them merged in, in float32. Inside the mesh of `load`."""
    model = loaded.config.model
    if not model.lora.rank:
        return loaded
    base = registry.without_adapters(model)
    return dataclasses.replace(
        loaded,
        config=dataclasses.replace(loaded.config, model=base),
        graph=registry.abstract(base)[0],
        params=states.merge_adapters(model, loaded.params),
        params_name=f"{loaded.params_name} with adapters merged",
    )


def save_imported(workdir: epath.Path, config: RunConfig, params: Params, origin: str, tokenizer: Tokenizer) -> str:
    """Write parameters without optimizer state as checkpoint 0 of a workdir, and return their fingerprint.

    origin   where they come from, for messages
    """
    checkpoints = Checkpoints(workdir / workdirs.CHECKPOINTS, config.checkpoint)
    meta = {
        "config": run_config.to_json(config),
        "imported": origin,
        "tokenizer_sha256": tokenizer.sha256,
        "total_targets": 0,
        "skipped": 0,
        "versions": {"llmjax": llmjax.__version__, "jax": jax.__version__},
    }
    fingerprint = checkpoints.save(0, {"params": params}, meta)
    checkpoints.close()
    return fingerprint


def copy_import(workdir: epath.Path, folder: epath.Path) -> None:
    """Let a run in `folder` start from the parameters that were imported into `workdir`, on the same local disk."""
    if (folder / workdirs.IMPORT).exists():
        return
    for name in (workdirs.TOKENIZER, f"{workdirs.CHECKPOINTS}/0"):
        shutil.copytree(workdir / name, folder / name, dirs_exist_ok=True)
    workdirs.write_json(folder / workdirs.IMPORT, workdirs.read_json(workdir / workdirs.IMPORT))  # last: all is there


def mesh_or_default(config: RunConfig) -> Mesh:
    """The run's own mesh where it fits these devices, else one on which all of them are fsdp shards."""
    try:
        return meshes.make_mesh(choose_mesh(config, jax.devices()))
    except UserError:
        count = jax.device_count()
        logger.info("  the run's mesh does not fit these %d devices: using mesh.fsdp=%d", count, count)
        return meshes.make_mesh(meshes.MeshConfig(data=1, fsdp=-1, tensor=1))


def _no_config_error(workdir: epath.Path) -> UserError:
    return UserError(f"--workdir={workdir}: no config.json there, so nothing was trained; run `llmjax train` first")


def _bind_saved(workdir: epath.Path, tree: dict[str, Any], overrides: Sequence[tuple[str, str]]) -> RunConfig:
    """The config of a workdir's config.json. Raises UserError for one that another version of llmjax wrote."""
    try:
        run_config.apply_overrides(dict(tree), [])
    except UserError as error:
        raise UserError(
            f"{workdir / workdirs.CONFIG}: {error}; another version of llmjax wrote this workdir: use that version, or "
            "give a new --workdir"
        ) from error
    return run_config.apply_overrides(tree, overrides)


def _load_tokenizer(workdir: epath.Path, store: pathlib.Path) -> Tokenizer:
    """The token store's tokenizer, or the imported one where there is no store yet."""
    if (manifest := prepare.read_manifest(store)) is not None:
        prepare.check_store(store, manifest)
        return load_tokenizer(store)
    imported = workdirs.read_json(workdir / workdirs.IMPORT)
    if imported is None:
        raise UserError(f"{store}: no token store there; run `llmjax prepare` or set --config.data.store")
    kind = imported["tokenizer"]["kind"]
    return read_tokenizer_file(kind, workdir / workdirs.TOKENIZER / FILE_NAMES[kind])


def find_chat_template(workdir: epath.Path, loaded: Loaded) -> ChatTemplate | None:
    """The chat template of a run's dialogues, else that which was imported; None if there is none."""
    return _find_chat_template(workdir, loaded.store, loaded.tokenizer)


def load_chat_template(workdir: epath.Path, loaded: Loaded) -> ChatTemplate:
    """As `find_chat_template`. Raises UserError if there is none."""
    return require_chat_template(workdir, loaded.store, loaded.tokenizer)


def require_chat_template(workdir: epath.Path, store: pathlib.Path, tokenizer: Tokenizer) -> ChatTemplate:
    """The same for the token store and the tokenizer of a run."""
    if (template := _find_chat_template(workdir, store, tokenizer)) is not None:
        return template
    raise UserError(
        f"--workdir={workdir}: it has no chat template; import a chat model, train on dialogues, or put one into "
        f"{workdir / workdirs.TOKENIZER / TEMPLATE_FILE}"
    )


def _find_chat_template(workdir: epath.Path, store: pathlib.Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    found = (read_template(folder, tokenizer) for folder in (store, workdir / workdirs.TOKENIZER))
    return next((template for template in found if template is not None), None)


def restore(
    config: RunConfig,
    workdir: epath.Path,
    step: int | None,
    store: pathlib.Path,
    tokenizer: Tokenizer,
    *,
    only_params: bool = False,
) -> Loaded:
    """As `load`, on the mesh of `use_mesh`, with the config, token store and tokenizer of the run.

    only_params   leave the optimizer's state unread where it holds no average of the parameters
    """
    checkpoints = Checkpoints(workdir / workdirs.CHECKPOINTS)
    config = phases.last_config(config)
    imported = _is_import(checkpoints, step)
    if imported:
        config = _as_imported(config, workdir)
    spec = states.make_state_spec(config.model, config.optimizer, horizon=config.train.steps)
    abstract = states.to_checkpoint(spec.abstract())
    if imported or (only_params and not spec.optimizer.has_average):
        del abstract["opt_state"]
    if step is None:
        restored = checkpoints.restore_latest_good(abstract, set_aside=False)
    else:
        restored = checkpoints.restore(step, abstract)
    if restored is None:
        raise UserError(f"{checkpoints.folder}: no checkpoint there; run `llmjax train` first")
    _check_tokenizer(restored.meta["tokenizer_sha256"], tokenizer, store)
    parts = restored.parts
    return Loaded(
        config=config,
        step=restored.step,
        graph=spec.graph,
        params=spec.eval_params(parts["params"], parts["opt_state"]) if "opt_state" in parts else parts["params"],
        params_name=IMPORTED if imported else spec.optimizer.eval_params_name,
        tokenizer=tokenizer,
        objective=run_config.objective(config, tokenizer),
        store=store,
        fingerprint=restored.meta["fingerprint"],
    )


def _is_import(checkpoints: Checkpoints, step: int | None) -> bool:
    """Whether a checkpoint (None: the newest) holds parameters alone, as `llmjax import` writes them."""
    steps = checkpoints.steps()
    step = max(steps, default=None) if step is None else step
    return step in steps and "imported" in checkpoints.read_meta(step)


def _as_imported(config: RunConfig, workdir: epath.Path) -> RunConfig:
    """The config with the adapters of the imported parameters: training may have added some since."""
    record = workdirs.read_json(workdir / workdirs.IMPORT) or {}
    lora = bind(LoraConfig, record.get("model", {}).get("lora", {}), "model.lora")
    optimizer = dataclasses.replace(config.optimizer, trainable=(), frozen=())  # of the other model
    return dataclasses.replace(config, model=dataclasses.replace(config.model, lora=lora), optimizer=optimizer)


def _check_tokenizer(expected: str, tokenizer: Tokenizer, store: pathlib.Path) -> None:
    if expected != tokenizer.sha256:
        raise UserError(
            f"{store}: its tokenizer (sha256 {tokenizer.sha256[:12]}) is not the checkpoint's ({expected[:12]}); "
            "set data.store to the store that the checkpoint was trained on"
        )
