"""`llmjax export`: write a checkpoint as a folder that transformers loads, or as a GGUF file."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import itertools
import json
import logging
import operator
from pathlib import Path
import shutil
import tempfile
from typing import Any

from etils import epath
import jax.numpy as jnp
import numpy as np

from llmjax import atomic
from llmjax.binding import bind
from llmjax.data.chat_template import copy_template
from llmjax.data.objectives import vocabulary
from llmjax.data.store import prepare
from llmjax.data.store.labels import find_frame
from llmjax.data.store.token_store import TokenStore
from llmjax.data.store.tokenizer import FILE_NAMES, Tokenizer
from llmjax.errors import UserError
from llmjax.interop import files, gguf_export, gguf_models, gguf_tokenizers, heads, peft, sharded_io, tokenizers
from llmjax.interop.hf_checkpoint import ARCHITECTURES, FAMILIES
from llmjax.interop.hf_config import RESOLVED
from llmjax.interop.mapping import Architecture, ParamMapping
from llmjax.models import registry
from llmjax.parallel import hosts
from llmjax.report import model_card
from llmjax.run import config as run_config, loading, workdir as workdirs
from llmjax.run.loading import IMPORTED, Loaded

logger = logging.getLogger(__name__)

HF_DTYPES = {"float32": "F32", "bfloat16": "BF16"}
# Fields that say how a model is run, trained and stored, not what it computes: config.json does not hold them.
_RUNTIME_FIELDS = {
    "family", "scan", "remat", "quantization", "attention", "dtype", "param_dtype", "dropout", "vocab_multiple",
}  # fmt: skip
# What is compared of a field of two configs, where that is not its value: a field may be unused beside others, and
# several values may mean the same.
_EFFECTS: dict[str, Callable[[Any], Any]] = {
    "base_embed": lambda config: config.width_multiplier,
    "window": lambda config: any(config.local_layers) and config.window,
    "attention_pattern": lambda config: config.local_layers,
    "rope_local_base": lambda config: any(config.local_layers) and (config.rope_local_base or config.rope_base),
    "rope_low": lambda config: config.scaling,
    "rope_high": lambda config: config.scaling,
    "rope_attention_factor": lambda config: config.scaling,
}
_DOCUMENTS_TO_COMPARE = 20  # of each source, on which a tokenizer and its converted form must agree


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written: class name, step, which parameters, tensor files, bytes; descriptions of tokenizer and card."""

    architecture: str
    step: int
    parameters: str
    files: list[str]
    nbytes: int
    tokenizer: str
    card: str = ""


def export(
    workdir: epath.Path,
    to: Path,
    *,
    step: int | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = 5_000_000_000,
    overrides: Sequence[tuple[str, str]] = (),
) -> Exported:
    """Write a checkpoint as the folder `to`: config.json, tensors, tokenizer. The folder appears once it is complete.

    dtype   a type of HF_DTYPES, or of gguf_export.DTYPES: then `to` is a GGUF file, in one piece
    Raises UserError if `to` exists, or if no class of transformers expresses the model, naming the field. A collective:
    all processes call it, and process 0 writes.
    """
    if to.exists():
        raise UserError(f"--to={to}: already exists; give a new one")
    write = _write_gguf if dtype in gguf_export.DTYPES else functools.partial(_write_folder, max_shard_bytes)
    with loading.load(workdir, step=step, overrides=overrides) as loaded, atomic.name_in_errors(to):
        return write(workdir, to, loading.merge_adapters(loaded), dtype)


def export_adapter(
    workdir: epath.Path, to: Path, *, step: int | None = None, overrides: Sequence[tuple[str, str]] = ()
) -> tuple[str, int, int]:
    """Write the adapters alone as the folder `to`, in PEFT's format; returns (class name, step, adapted layers).

    Raises UserError as `export` does, and where there are no adapters or other parameters were trained as well.
    """
    if to.exists():
        raise UserError(f"--to={to}: already exists; give a new folder")
    with loading.load(workdir, step=step, overrides=overrides) as loaded, atomic.name_in_errors(to):
        model, trained = loaded.config.model, loaded.config.optimizer.trainable
        if model.num_outputs:
            raise UserError(
                f"--adapter: model.num_outputs={model.num_outputs}: an adapter does not hold the head for labels; "
                "leave the flag out"
            )
        if not model.lora.rank:
            raise UserError(f"--adapter: step {loaded.step} of {workdir} has no adapters; leave the flag out")
        if trained:
            raise UserError(
                f"--adapter: optimizer.trainable={trained} trained other parameters as well, which an adapter does not "
                "hold; leave the flag out"
            )
        import_record = workdirs.read_json(workdir / workdirs.IMPORT) or {}
        base = registry.without_adapters(model)
        name, architecture, _ = choose_class(base, import_record.get("architecture"))
        table = ParamMapping(architecture.rules(base), base)
        partial = to.with_name(f"{to.name}.partial")
        if hosts.is_primary():
            shutil.rmtree(partial, ignore_errors=True)  # left by an export that was interrupted
            partial.mkdir(parents=True)
        count = peft.write(partial, model, loaded.params, table, name, import_record.get("from", ""))
        if hosts.is_primary():
            partial.rename(to)
        hosts.barrier("exported")
        return name, loaded.step, count


def _write_folder(max_shard_bytes: int, workdir: epath.Path, to: Path, loaded: Loaded, dtype: str) -> Exported:
    model = loaded.config.model
    import_record = workdirs.read_json(workdir / workdirs.IMPORT) or {}
    name, architecture, hf = choose_class(model, _preferred_class(import_record, loaded))
    table = ParamMapping(architecture.rules(model), model, architecture.missing)
    tensors = {architecture.publish(tensor.hf_names[0]): tensor for tensor in table.written_tensors()}
    specs = {name: (HF_DTYPES[dtype], table.hf_shape(tensor)) for name, tensor in tensors.items()}
    total = sum(files.count_bytes(spec) for spec in specs.values())
    logger.info(
        "%s: the %s of step %d, %d tensors, %.2f GB", name, loaded.params_name, loaded.step, len(tensors), total / 1e9
    )
    if left_out := sorted(
        {tensor.rule.hf_name for tensor in table.tensors} - {t.rule.hf_name for t in tensors.values()}
    ):
        logger.info("  note: not written, since %s does not hold them: %s", name, ", ".join(left_out))
    partial = to.with_name(f"{to.name}.partial")
    if hosts.is_primary():
        shutil.rmtree(partial, ignore_errors=True)  # left by an export that was interrupted
        partial.mkdir(parents=True)
    gatherer, progress = sharded_io.TensorGatherer(table, loaded.params), sharded_io.Progress("writing", total)
    paths = files.write_folder(
        partial,
        specs,
        lambda name: gatherer.gather(tensors[name], jnp.dtype(dtype)),
        limit=max_shard_bytes,
        report_bytes=progress.add,
        primary=hosts.is_primary(),
    )
    tokenizer_summary = card_summary = ""
    if hosts.is_primary():
        bos_id = None if _has_imported_tokenizer(loaded, import_record) else _find_trained_bos_id(loaded)
        token_ids = _collect_token_ids(loaded, import_record, bos_id)
        config = _complete_config(hf, name, loaded, dtype) | token_ids | _describe_labels(loaded, token_ids)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tokenizer_summary = _write_tokenizer(workdir, loaded, partial, import_record, bos_id)
        if model.generates:
            _write_generation_config(partial, hf, token_ids)
        card_summary = _write_card(workdir, loaded, partial, name)
        partial.rename(to)
    hosts.barrier("exported")
    written = [path.name for path in paths]
    return Exported(name, loaded.step, loaded.params_name, written, total, tokenizer_summary, card_summary)


def _write_card(workdir: epath.Path, loaded: Loaded, to: Path, name: str) -> str:
    """Write README.md: that of the workdir where a person edited it. Returns which it is."""
    edited = model_card.find_edited(workdir)
    text = edited or model_card.make_card(workdir, step=loaded.step, transformers_class=name)
    (to / model_card.FILE).write_text(text)
    if edited:
        return f"{workdir / model_card.FILE}, which you wrote"
    return f"{model_card.FILE}, from the files of the run; to change it, edit that of `llmjax card`"


def _write_gguf(workdir: epath.Path, to: Path, loaded: Loaded, dtype: str) -> Exported:
    model = loaded.config.model
    import_record = workdirs.read_json(workdir / workdirs.IMPORT) or {}
    name, architecture, hf = _choose_gguf_class(model, _preferred_class(import_record, loaded))
    table = ParamMapping(architecture.rules(model), model, architecture.missing)
    gguf_name = gguf_models.find_architecture(name)
    assert gguf_name is not None
    plan = gguf_export.plan(gguf_name, table, hf, architecture.publish, dtype=dtype, title=workdir.name)
    _check_gguf(model, plan)
    logger.info(
        "%s: the %s of step %d, %d tensors, %.2f GB",
        f"general.architecture={gguf_name}", loaded.params_name, loaded.step, len(plan.shapes), plan.nbytes / 1e9,
    )  # fmt: skip
    if plan.left_out:
        logger.info("  note: not written, since %s does not hold them: %s", gguf_name, ", ".join(plan.left_out))
    bos_id = None if _has_imported_tokenizer(loaded, import_record) else _find_trained_bos_id(loaded)
    with tempfile.TemporaryDirectory() as scratch:
        _write_tokenizer(workdir, loaded, Path(scratch), import_record, bos_id)
        token_ids = _collect_token_ids(loaded, import_record, bos_id)
        token_ids["eos_token_id"] = list(loaded.tokenizer.stop_ids)
        frame = loaded.tokenizer.prompt_frame or (() if bos_id is None else (bos_id,), ())
        plan.metadata.update(gguf_tokenizers.read_files(Path(scratch), token_ids, frame, hf["vocab_size"]))
    partial = to.with_name(f"{to.name}.partial")
    gguf_export.write(partial, plan, sharded_io.TensorGatherer(table, loaded.params))
    if hosts.is_primary():
        partial.rename(to)
    hosts.barrier("exported")
    kind = f"tokenizer.ggml.model={plan.metadata['tokenizer.ggml.model']}"
    return Exported(f"general.architecture={gguf_name}", loaded.step, loaded.params_name, [to.name], plan.nbytes, kind)


def _choose_gguf_class(model: Any, preferred: str | None) -> tuple[str, Architecture, dict[str, Any]]:
    """The class that expresses a model and that GGUF has. UserError if there is none."""
    chosen = choose_class(model, preferred)
    if gguf_models.find_architecture(chosen[0]) is not None:
        return chosen
    for name, architecture in ARCHITECTURES.items():
        if architecture.base == chosen[0] and gguf_models.find_architecture(name) is not None:
            return name, architecture, architecture.write_config(model)
    known = ", ".join(name for gguf in gguf_models.ARCHITECTURES.values() for name in gguf.classes)
    raise UserError(f"--format=gguf: {chosen[0]} is not supported; supported are {known}")


def _check_gguf(model: Any, plan: gguf_export.Plan) -> None:
    """UserError if llmjax would read another model from the planned file."""
    hf = gguf_models.read_config(plan.architecture, plan.metadata, plan.shapes, plan.rope_factors)
    architecture = ARCHITECTURES[hf["architectures"][0]]
    if reason := _first_difference(model, architecture.read_config(hf), architecture.unused_fields):
        raise UserError(f"--format=gguf: general.architecture={plan.architecture}: {reason}")


def _preferred_class(import_record: dict[str, Any], loaded: Loaded) -> str | None:
    """The class of the imported checkpoint, or of its family with the head if the model was trained since."""
    name = import_record.get("architecture")
    if name not in ARCHITECTURES:
        return None
    architecture = ARCHITECTURES[name]
    is_trained = loaded.params_name != IMPORTED
    return (architecture.base if is_trained else architecture.exported_as) or name


def choose_class(model: Any, preferred: str | None = None) -> tuple[str, Architecture, dict[str, Any]]:
    """(class name, architecture, config.json) of the first class that expresses a model; `preferred` is tried first.

    Of classes that differ by their head alone, only `preferred` and the one with the model's kind of head are tried. A
    class expresses a model if its config.json, read back, gives the same model. Raises UserError with the first
    difference of each class.
    """
    architectures = FAMILIES.get(model.family, {})
    classes_by_reason: dict[str, list[str]] = {}
    if model.num_outputs:
        names = [name for name, architecture in architectures.items() if architecture.predicts_labels]
    else:
        names = [name for name, architecture in architectures.items() if name == preferred or not architecture.base]
    base_of = lambda name: (name in architectures and architectures[name].base) or name
    for name in sorted(names, key=lambda name: (name != preferred, base_of(name) != base_of(preferred))):
        architecture = architectures[name]
        try:
            hf = architecture.write_config(model)
            reason = _first_difference(model, architecture.read_config(hf), architecture.unused_fields)
            if not reason:
                return name, architecture, hf
        except UserError as error:
            reason = str(error)
        classes_by_reason.setdefault(reason, []).append(name)
    reasons = [f"{', '.join(names)}: {reason}" for reason, names in classes_by_reason.items()]
    raise UserError(
        "no class of transformers expresses this model "
        f"({'; '.join(reasons) or f'none is known for model.family={model.family!r}'})"
    )


def _first_difference(model: Any, section: dict[str, Any], unused_fields: tuple[str, ...]) -> str:
    """The first field in which a model and the section read back from its config.json differ; "" if there is none."""
    read_back = bind(type(model), {"family": model.family, **section}, "model")
    # The window first: other fields have no effect without it, and would hide it.
    for field in sorted(dataclasses.fields(model), key=lambda field: field.name != "window"):
        effect = _EFFECTS.get(field.name, operator.attrgetter(RESOLVED.get(field.name, field.name)))
        if effect(model) != effect(read_back) and field.name not in _RUNTIME_FIELDS and field.name not in unused_fields:
            return f"it cannot express model.{field.name}={getattr(model, field.name)!r}"
    return ""


def _complete_config(hf: dict[str, Any], name: str, loaded: Loaded, dtype: str) -> dict[str, Any]:
    """config.json with the class, the types, and a length of at least that of the training rows."""
    length = "max_position_embeddings"
    if loaded.config.model.max_seq_len is None and length in hf:  # only a hint for models without a limit
        hf = {**hf, length: max(hf[length], loaded.config.data.seq_len)}
    return {"architectures": [name], **hf, "dtype": dtype, "torch_dtype": dtype}


def _describe_labels(loaded: Loaded, token_ids: dict[str, Any]) -> dict[str, Any]:
    """The labels, and for a causal model an id for padding: its class predicts at the last token that is not padding.

    That id may not be the last one of a text. {} for a model that predicts tokens.
    """
    model, data, tokenizer = loaded.config.model, loaded.config.data, loaded.tokenizer
    if not model.num_outputs:
        return {}
    fields = heads.write_labels(heads.Labels(data.classes, data.multi_label))
    if model.bidirectional:
        return fields
    last = find_frame(tokenizer)[1][-1:]
    candidates = (token_ids["pad_token_id"], tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id)
    pad_id = next((token_id for token_id in candidates if token_id is not None and token_id not in last), None)
    if pad_id is None:
        logger.info("  note: no special token can pad texts, so that transformers predicts one text at a time")
    return fields | {"pad_token_id": pad_id}


def _collect_token_ids(loaded: Loaded, import_record: dict[str, Any], bos_id: int | None) -> dict[str, Any]:
    """Special ids for config.json and generation_config.json; those of an imported checkpoint are written unchanged."""
    tokenizer = loaded.tokenizer
    stop_ids = list(tokenizer.stop_ids)
    ids = {
        "bos_token_id": tokenizer.bos_id if bos_id is None else bos_id,
        "eos_token_id": stop_ids[0] if len(stop_ids) == 1 else stop_ids,
        "pad_token_id": tokenizer.pad_id,
    }
    return ids | import_record.get("token_ids", {}) if _has_imported_tokenizer(loaded, import_record) else ids


def _has_imported_tokenizer(loaded: Loaded, import_record: dict[str, Any]) -> bool:
    """Whether the tokenizer is that of a published checkpoint; one of a run that was imported is converted."""
    record = import_record.get("tokenizer", {})
    return "name" in record and record["sha256"] == loaded.tokenizer.sha256


def _find_trained_bos_id(loaded: Loaded) -> int | None:
    """The id that the objective put before every document; None if there is none."""
    objective = run_config.objective(loaded.config, loaded.tokenizer)
    empty_prompt = objective.prompt(np.array([], np.int32)).tolist()
    bos_id = vocabulary.build_vocab(loaded.tokenizer).bos_id
    return bos_id if empty_prompt == [bos_id] else None


def _write_generation_config(to: Path, hf: dict[str, Any], token_ids: dict[str, Any]) -> None:
    """Write the ids at which transformers stops, unless the file of the imported checkpoint has them."""
    path = to / "generation_config.json"
    imported_config = json.loads(path.read_text()) if path.exists() else {}
    if imported_config.get("eos_token_id") is not None:
        return
    start = {"decoder_start_token_id": hf["decoder_start_token_id"]} if "decoder_start_token_id" in hf else {}
    ids = {name: value for name, value in {**token_ids, **start}.items() if value is not None}
    config = {**ids, **imported_config, "eos_token_id": ids["eos_token_id"]}
    path.write_text(json.dumps(config, indent=2) + "\n")


def _write_tokenizer(
    workdir: epath.Path, loaded: Loaded, to: Path, import_record: dict[str, Any], bos_id: int | None
) -> str:
    tokenizer, folder = loaded.tokenizer, epath.Path(to)
    name = FILE_NAMES[tokenizer.kind]
    if _has_imported_tokenizer(loaded, import_record):
        content = (workdir / workdirs.TOKENIZER / name).read_bytes()
        summary = tokenizers.restore_original(content, import_record["tokenizer"]["name"], workdir, folder)
    else:
        files_of = loaded.store if (loaded.store / name).exists() else workdir / workdirs.TOKENIZER
        content = b"" if tokenizer.kind == "bytes" else (files_of / name).read_bytes()
        summary = tokenizers.write(
            tokenizer,
            content,
            folder,
            texts=_read_first_documents(loaded.store, tokenizer),
            max_length=loaded.config.model.max_seq_len,
            bos_id=bos_id,
        )
    copy_template(loaded.store, to)
    return summary


def _read_first_documents(store: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """The first documents of each source's training split."""
    manifest = prepare.read_manifest(store)
    for name, source in (manifest or {"sources": {}})["sources"].items():
        if source["train"]["documents"]:
            split = TokenStore(store / name / "train")
            starts, lengths = next(split.document_groups(1))
            for start, length in itertools.islice(zip(starts, lengths, strict=True), _DOCUMENTS_TO_COMPARE):
                yield tokenizer.decode(split.read(int(start), int(length) - 1))
