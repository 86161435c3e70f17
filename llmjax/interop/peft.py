"""Adapters in the format of the library PEFT: adapter_config.json and adapter_model.safetensors.

A published tensor may hold several of our weights (GPT-2's c_attn, DeepSeek's kv_b_proj). Its adapter then has the
ranks of theirs side by side, and the outputs of each have zeros for the others' ranks. The other way round, each weight
gets the whole first matrix and its own rows of the second one.
"""

from collections.abc import Iterator
import dataclasses
import json
from pathlib import Path
import re
from typing import Any

from flax import nnx
import jax
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np

from llmjax.batch import Params
from llmjax.errors import UserError
from llmjax.interop import files
from llmjax.interop.mapping import ParamMapping, Tensor, flatten
from llmjax.models import registry
from llmjax.models.registry import ModelConfig
from llmjax.nn import lora
from llmjax.nn.lora import LoraConfig
from llmjax.parallel import axes, hosts

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TASKS = {"CausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
# Fields of adapter_config.json that change what an adapter computes, and the values that are supported.
_REQUIRED = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),  # others change the base as well
}


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where the entries of weights [inputs, outputs] lie in a published tensor.

    name_of, output_of   for each published output: position of the weight in the rule's names, and its output there
    input_of             for each weight: for each published input, its input there
    is_transposed        the tensor is [inputs, outputs], as in GPT-2, and not torch's [outputs, inputs]
    """

    name_of: np.ndarray
    output_of: np.ndarray
    input_of: list[np.ndarray]
    is_transposed: bool


def _find_layout(tensor: Tensor, sizes: list[tuple[int, int]], shapes: list[tuple[int, ...]]) -> _Layout:
    """The layout of a tensor of weights with `sizes` (inputs, outputs) and `shapes`, from its rule's transform."""
    offsets = np.cumsum([0, *(outputs for _, outputs in sizes)])
    inputs, outputs = [], []
    for (n_in, n_out), shape, offset in zip(sizes, shapes, offsets[:-1], strict=True):
        grid = np.indices((n_in, n_out), np.int32, sparse=True)
        inputs.append(np.broadcast_to(grid[0], (n_in, n_out)).reshape(shape))
        outputs.append(np.broadcast_to(grid[1] + np.int32(offset), (n_in, n_out)).reshape(shape))
    of_input, of_output = tensor.rule.to_hf(*inputs), tensor.rule.to_hf(*outputs)
    is_transposed = not (of_output == of_output[:, :1]).all()
    if is_transposed:
        of_input, of_output = of_input.T, of_output.T
    assert (of_output == of_output[:, :1]).all(), f"{tensor.hf_names[0]} mixes the inputs and outputs of a weight"
    name_of = np.searchsorted(offsets, of_output[:, 0], side="right") - 1
    input_of = [of_input[np.argmax(name_of == position)] for position in range(len(sizes))]
    return _Layout(name_of, of_output[:, 0] - offsets[name_of], input_of, is_transposed)


class _Modules:
    """The published linear layers of a model, each with the names of our linear layers that it holds."""

    def __init__(self, table: ParamMapping, model: ModelConfig):
        self._table = table
        graph, shapes, _ = registry.abstract(model)
        self.linears = lora.linear_layers(nnx.merge(graph, shapes))

    def __iter__(self) -> Iterator[tuple[str, Tensor, list[str]]]:
        """(published name, tensor, our names)"""
        for tensor in self._table.tensors:
            names = [name.removesuffix(".weight") for name in tensor.rule.names]
            if tensor.hf_names[0].endswith(".weight") and all(name in self.linears for name in names):
                yield tensor.hf_names[0].removesuffix(".weight"), tensor, names

    def layout(self, tensor: Tensor, names: list[str]) -> _Layout:
        shapes = [self._table.unpadded_shape(f"{name}.weight")[len(tensor.index) :] for name in names]
        split = [self.linears[name].num_inputs for name in names]
        flat = [(_size(shape[:n]), _size(shape[n:])) for shape, n in zip(shapes, split, strict=True)]
        return _find_layout(tensor, flat, shapes)


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def write(folder: Path, model: ModelConfig, params: Params, table: ParamMapping, class_name: str, base: str) -> int:
    """Write the adapters of `params` into an existing folder; returns the number of adapted published layers.

    table   that of the model without adapters
    base    where the base model is, for adapter_config.json
    Raises UserError where only a part of a published layer has an adapter with a magnitude. A collective.
    """
    config, tensors, ranks, layout = model.lora, {}, {}, None
    replicated = NamedSharding(jax.sharding.get_mesh(), P())
    adapters = {name: leaf for name, leaf in flatten(params).items() if ".adapter." in name}
    host = jax.tree.map(np.asarray, jax.jit(lambda tree: tree, out_shardings=replicated)(adapters))
    modules = _Modules(table, registry.without_adapters(model))
    for module, tensor, names in modules:
        adapted = [position for position, name in enumerate(names) if f"{name}.adapter.a" in host]
        if not adapted:
            continue
        if config.dora and len(adapted) < len(names):
            raise UserError(
                f"--adapter: {module} of {class_name} holds {', '.join(names)}, and model.lora.dora needs an adapter "
                "of all of them; export without --adapter, which merges them"
            )
        layout = modules.layout(tensor, names)
        get = lambda position, leaf: host[f"{names[position]}.adapter.{leaf}"][tensor.index]  # noqa: B023
        rank = config.rank * len(adapted)
        a = np.zeros((rank, len(layout.input_of[0])), np.float32)
        b = np.zeros((len(layout.output_of), rank), np.float32)
        magnitude = np.zeros(len(layout.output_of), np.float32)
        for number, position in enumerate(adapted):
            own = slice(number * config.rank, (number + 1) * config.rank)
            rows = layout.name_of == position
            a[own] = get(position, "a").reshape(-1, config.rank)[layout.input_of[position]].T
            b[rows, own] = get(position, "b").reshape(config.rank, -1)[:, layout.output_of[rows]].T
            if config.dora:
                magnitude[rows] = get(position, "magnitude").reshape(-1)[layout.output_of[rows]]
        tensors |= {f"{_PREFIX}{module}.lora_A.weight": a, f"{_PREFIX}{module}.lora_B.weight": b}
        if config.dora:
            tensors[f"{_PREFIX}{module}.lora_magnitude_vector"] = magnitude
        ranks[module] = rank
    if layout is None:
        raise UserError(f"--adapter: no adapter belongs to a linear layer of {class_name}; export without --adapter")
    if hosts.is_primary():
        specs = {name: ("F32", array.shape) for name, array in tensors.items()}
        (path,) = files.write_folder(folder, specs, lambda name: tensors[name], limit=1 << 62)
        path.rename(folder / TENSORS)
        other = {module: rank for module, rank in ranks.items() if rank != config.rank}
        settings = {
            "peft_type": "LORA",
            "base_model_name_or_path": base,
            "task_type": next((task for end, task in _TASKS.items() if class_name.endswith(end)), None),
            "inference_mode": True,
            "r": config.rank,
            "lora_alpha": config.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "use_dora": config.dora,
            "fan_in_fan_out": layout.is_transposed,
            "target_modules": list(ranks),
            "rank_pattern": other,
            "alpha_pattern": {module: config.alpha * rank / config.rank for module, rank in other.items()},
        }
        (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    return len(ranks)


def read(folder: Path, model: ModelConfig, params: Params, table: ParamMapping) -> tuple[ModelConfig, Params]:
    """(model with adapters, its parameters) from an adapter and the parameters of the model without it.

    All adapters get the largest rank among them; smaller ones end with zeros. A layer of a stack without an adapter
    gets one that changes nothing. Raises UserError for a folder that is no such adapter, or of another model.
    """
    settings = files.read_json(folder / CONFIG)
    _check_settings(folder, settings)
    entries = {_strip(name): entry for name, entry in files.read_header(folder / TENSORS).items()}
    modules = _Modules(table, model)
    found = {module: (tensor, names) for module, tensor, names in modules if f"{module}.lora_A.weight" in entries}
    known = {f"{module}.{part}" for module in found for part in _parts(settings)}
    if unknown := sorted(set(entries) - known):
        raise UserError(f"--adapter={folder}: {unknown[0]} belongs to no linear layer of this model")
    if missing := sorted(known - set(entries)):
        raise UserError(f"--adapter={folder}: tensor {missing[0]} is missing")
    if not found:
        raise UserError(f"--adapter={folder}: {TENSORS} has no adapter of a linear layer of this model")
    ranks = {module: entries[f"{module}.lora_A.weight"].shape[0] for module in found}
    rank = max(ranks.values())
    scale = _scale(settings, next(module for module in found if ranks[module] == rank), rank)
    layers = tuple(dict.fromkeys(name for _, names in found.values() for name in names))
    config = LoraConfig(rank=rank, alpha=scale * rank, layers=layers, dora=bool(settings.get("use_dora")))
    adapted = dataclasses.replace(model, lora=config)

    _, shapes, names_of = registry.abstract(adapted)
    with_adapters = jax.jit(
        lambda params: registry.add_adapters(adapted, params, jax.random.key(0)),
        out_shardings=axes.shardings(names_of, shapes),
    )(params)
    leaves = {
        name: np.array(leaf) if name.endswith("magnitude") else np.zeros(leaf.shape, np.float32)
        for name, leaf in flatten(with_adapters).items()
        if ".adapter." in name
    }
    for module, (tensor, names) in found.items():
        a, b, *magnitude = (entries[f"{module}.{part}"].read().astype(np.float32) for part in _parts(settings))
        layout, own = modules.layout(tensor, names), ranks[module]
        expected = ((own, len(layout.input_of[0])), (len(layout.output_of), own))
        if (a.shape, b.shape) != expected:
            raise UserError(
                f"--adapter={folder}: lora_A and lora_B of {module} have shapes {list(a.shape)} and {list(b.shape)}; "
                f"expected {list(expected[0])} and {list(expected[1])}"
            )
        b = b * (_scale(settings, module, own) / scale)
        for position, name in enumerate(names):
            rows = np.flatnonzero(layout.name_of == position)
            order = rows[np.argsort(layout.output_of[rows])]
            view = lambda leaf: leaves[f"{name}.adapter.{leaf}"][tensor.index or ...]  # noqa: B023
            flat = view("a").reshape(-1, rank)
            flat[layout.input_of[position], :own] = a.T
            view("b").reshape(rank, -1)[:own] = b[order].T
            if magnitude:
                view("magnitude").reshape(-1)[:] = magnitude[0].reshape(-1)[order]
    put = lambda path, leaf: jax.device_put(leaves[path], leaf.sharding) if path in leaves else leaf
    flattened = flatten(with_adapters)
    return adapted, jax.tree.unflatten(
        jax.tree.structure(with_adapters), [put(name, leaf) for name, leaf in flattened.items()]
    )


def _parts(settings: dict[str, Any]) -> tuple[str, ...]:
    magnitude = ("lora_magnitude_vector",) if settings.get("use_dora") else ()
    return ("lora_A.weight", "lora_B.weight", *magnitude)


def _strip(name: str) -> str:
    name = name.removeprefix(_PREFIX)
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    for field, supported in _REQUIRED.items():
        if (value := settings.get(field)) not in supported:
            raise UserError(
                f"--adapter={folder}: {CONFIG}: {field}={value!r} is not supported; expected {supported[0]!r}"
            )
    if not isinstance(settings.get("lora_alpha"), int | float) or not isinstance(settings.get("r"), int):
        raise UserError(f"--adapter={folder}: {CONFIG}: r and lora_alpha must be numbers")


def _scale(settings: dict[str, Any], module: str, rank: int) -> float:
    """The factor of an adapter: alpha / rank, or with rsLoRA alpha / sqrt(rank)."""
    patterns = settings.get("alpha_pattern") or {}
    alpha = next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)), None)
    alpha = settings["lora_alpha"] if alpha is None else alpha
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)
