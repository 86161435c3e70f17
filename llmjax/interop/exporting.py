"""`llmjax export`: write a checkpoint as a folder that transformers loads."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import itertools
import json
from pathlib import Path
import shutil
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from llmjax.binding import bind
from llmjax.data.objectives import vocabulary
from llmjax.data.store import prepare
from llmjax.data.store.token_store import TokenStore
from llmjax.data.store.tokenizer import FILE_NAMES, Tokenizer
from llmjax.errors import UserError
from llmjax.interop import files, sharded_io, tokenizers
from llmjax.interop.hf_checkpoint import FAMILIES
from llmjax.interop.mapping import Architecture, ParamMapping
from llmjax.models import registry
from llmjax.parallel import hosts
from llmjax.run import config as run_config, loading, workdir as workdirs
from llmjax.run.loading import Loaded

TYPES = {"float32": "F32", "bfloat16": "BF16"}
# How a model is run, trained and stored, not what it computes: config.json says nothing of it.
_FREE = {"family", "scan", "remat", "attention", "dtype", "param_dtype", "dropout", "vocab_multiple"}
# Fields that several values of say the same in: what they make of the config is compared.
_MEANS = {
    "pattern": "local_layers",
    "global_every": "local_layers",
    "rope_low": "scaling",
    "rope_high": "scaling",
    "rope_attention_factor": "scaling",
}
_TRIED_DOCUMENTS = 20  # of each source, on which a tokenizer and its other form must agree


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written: class name, step, which parameters, files of tensors, bytes, and a line on the tokenizer."""

    architecture: str
    step: int
    parameters: str
    files: list[str]
    nbytes: int
    tokenizer: str


def export(
    workdir: epath.Path,
    to: Path,
    *,
    step: int | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = 5_000_000_000,
    overrides: Sequence[tuple[str, str]] = (),
    say: Callable[[str], None] = print,
) -> Exported:
    """Write the folder `to`, whole or not at all: config.json, tensors, tokenizer.

    Raises UserError where `to` exists and where no class of transformers expresses the model, naming the field. A
    collective: all processes call it, and process 0 writes.
    """
    if to.exists():
        raise UserError(f"--to={to}: exists already; give a new folder")
    with loading.load(workdir, step=step, overrides=overrides) as loaded:
        return _write_folder(workdir, to, loaded, dtype, max_shard_bytes, say)


def _write_folder(
    workdir: epath.Path, to: Path, loaded: Loaded, dtype: str, max_shard_bytes: int, say: Callable[[str], None]
) -> Exported:
    model = loaded.config.model
    imported = workdirs.read_json(workdir / workdirs.IMPORT) or {}
    name, architecture, hf = choose(model, imported.get("architecture"))
    table = ParamMapping(architecture.rules(model), model)
    tensors = {tensor.hf_names[0]: tensor for tensor in table.tensors}
    specs = {name: (TYPES[dtype], table.hf_shape(tensor)) for name, tensor in tensors.items()}
    total = sum(files.nbytes(spec) for spec in specs.values())
    say(f"{name}: the {loaded.params_name} of step {loaded.step}, {len(tensors)} tensors, {total / 1e9:.2f} GB")
    partial = to.with_name(f"{to.name}.partial")
    if hosts.is_primary():
        shutil.rmtree(partial, ignore_errors=True)  # what an export left that was stopped
        partial.mkdir(parents=True)
    parameters, progress = sharded_io.Parameters(table, loaded.params), sharded_io.Progress("writing", total, say)
    paths = files.write_folder(
        partial,
        specs,
        lambda name: parameters.tensor(tensors[name], jnp.dtype(dtype)),
        limit=max_shard_bytes,
        wrote=progress.add,
        primary=hosts.is_primary(),
    )
    said = ""
    if hosts.is_primary():
        begin = None if _is_imported(loaded.tokenizer, imported) else _begin(loaded)
        token_ids = _token_ids(loaded, imported, begin)
        config = _config(hf, name, loaded, dtype, token_ids)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        said = _write_tokenizer(workdir, loaded, partial, imported, begin)
        if model.generates:
            _write_generation_config(partial, hf, token_ids)
        partial.rename(to)
    hosts.barrier("exported")
    return Exported(name, loaded.step, loaded.params_name, [path.name for path in paths], total, said)


def choose(model: Any, preferred: str | None = None) -> tuple[str, Architecture, dict[str, Any]]:
    """(class name, architecture, config.json) of the first class that expresses a model; `preferred` is tried first.

    A class expresses it where its config.json, read again, gives the same model. Raises UserError with each class's
    first difference.
    """
    known = FAMILIES.get(model.family, {})
    refused: dict[str, list[str]] = {}  # reason -> classes
    for name in sorted(known, key=lambda name: name != preferred):
        try:
            hf = known[name].write_config(model)
            difference = _difference(model, known[name].read_config(hf), known[name].free)
        except UserError as error:
            difference = str(error)
        if not difference:
            return name, known[name], hf
        refused.setdefault(difference, []).append(name)
    listed = (
        "; ".join(f"{', '.join(names)}: {reason}" for reason, names in refused.items())
        or f"none is known for model.family={model.family!r}"
    )
    raise UserError(f"no class of transformers expresses this model ({listed})")


def _difference(model: Any, section: dict[str, Any], free: tuple[str, ...]) -> str:
    """The first field in which a model and what was read back differ; "" where there is none."""
    back = bind(type(model), {"family": model.family, **section}, "model")
    for field in dataclasses.fields(model):
        was, now = getattr(model, field.name), getattr(back, field.name)
        if was == now or field.name in _FREE or field.name in free or _idle(model, back, field.name):
            continue
        if was == 0 and _is_size(model, field.name, now):
            continue
        return f"it cannot express model.{field.name}={was!r}"
    return ""


def _idle(model: Any, back: Any, field: str) -> bool:
    """Whether a field, though it differs, makes no difference beside the others of both configs."""
    if field == "base_embed":
        return model.parametrization == back.parametrization == "standard"
    if field == "window":
        return not any(any(config.local_layers) for config in (model, back))
    meaning = _MEANS.get(field, "")
    return hasattr(model, meaning) and getattr(model, meaning) == getattr(back, meaning)


def _is_size(model: Any, field: str, value: Any) -> bool:
    """Whether 0 in a field stands for a size that follows from others, which is `value`: it gives the same shapes, and
    some other value gives others."""

    def shapes(number: Any) -> Any:
        try:
            _, found, _ = registry.abstract(dataclasses.replace(model, **{field: number}))
        except (UserError, TypeError, ValueError, ZeroDivisionError):
            return None
        return jax.tree.map(lambda leaf: leaf.shape, found)

    if type(value) is not int or shapes(value) != shapes(0):
        return False
    return any(shapes(number) not in (None, shapes(0)) for number in (1, 2 * value))


def _config(hf: dict[str, Any], name: str, loaded: Loaded, dtype: str, token_ids: dict[str, Any]) -> dict[str, Any]:
    """config.json, with what it needs to know of the tokenizer and of the rows that were trained on."""
    longest = "max_position_embeddings"
    if loaded.config.model.max_seq_len is None and longest in hf:  # a hint there: nothing limits the length
        hf = {**hf, longest: max(hf[longest], loaded.config.data.seq_len)}
    return {"architectures": [name], **hf, **token_ids, "dtype": dtype, "torch_dtype": dtype}


def _token_ids(loaded: Loaded, imported: dict[str, Any], begin: int | None) -> dict[str, Any]:
    """Special ids for config.json and generation_config.json: those of an import come back as they were."""
    tokenizer = loaded.tokenizer
    stop_ids = list(tokenizer.stop_ids)
    ids = {
        "bos_token_id": tokenizer.bos_id if begin is None else begin,
        "eos_token_id": stop_ids[0] if len(stop_ids) == 1 else stop_ids,
        "pad_token_id": tokenizer.pad_id,
    }
    return ids | imported.get("token_ids", {}) if _is_imported(tokenizer, imported) else ids


def _is_imported(tokenizer: Tokenizer, imported: dict[str, Any]) -> bool:
    return imported.get("tokenizer", {}).get("sha256") == tokenizer.sha256


def _begin(loaded: Loaded) -> int | None:
    """The id that every document was trained behind; None where the objective has none."""
    objective = run_config.objective(loaded.config, loaded.tokenizer)
    framed, begin = objective.prompt(np.array([], np.int32)).tolist(), vocabulary.build_vocab(loaded.tokenizer).bos_id
    return begin if framed == [begin] else None


def _write_generation_config(to: Path, hf: dict[str, Any], token_ids: dict[str, Any]) -> None:
    """What transformers stops generation by: the file of an import, completed, or a new one."""
    path = to / "generation_config.json"
    start = {"decoder_start_token_id": hf["decoder_start_token_id"]} if "decoder_start_token_id" in hf else {}
    told = {name: value for name, value in {**token_ids, **start}.items() if value is not None}
    kept = json.loads(path.read_text()) if path.exists() else {}
    if kept and kept.get("eos_token_id") is not None:
        return
    path.write_text(json.dumps({**told, **kept, "eos_token_id": told["eos_token_id"]}, indent=2) + "\n")


def _write_tokenizer(workdir: epath.Path, loaded: Loaded, to: Path, imported: dict[str, Any], begin: int | None) -> str:
    tokenizer, folder = loaded.tokenizer, epath.Path(to)
    if _is_imported(tokenizer, imported):
        content = (workdir / workdirs.TOKENIZER / FILE_NAMES[tokenizer.kind]).read_bytes()
        return tokenizers.give_back(content, imported["tokenizer"]["name"], workdir, folder)
    content = b"" if tokenizer.kind == "bytes" else (loaded.store / FILE_NAMES[tokenizer.kind]).read_bytes()
    texts = _some_texts(loaded.store, tokenizer)
    return tokenizers.write(
        tokenizer, content, folder, texts=texts, longest=loaded.config.model.max_seq_len, begin=begin
    )


def _some_texts(store: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """The first documents of each source's training split."""
    manifest = prepare.read_manifest(store)
    for name, source in (manifest or {"sources": {}})["sources"].items():
        if source["train"]["documents"]:
            opened = TokenStore(store / name / "train")
            starts, lengths = next(opened.document_groups(1))
            for start, length in itertools.islice(zip(starts, lengths, strict=True), _TRIED_DOCUMENTS):
                yield tokenizer.decode(opened.read(int(start), int(length) - 1))
