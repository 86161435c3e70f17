"""Write a GGUF file, which llama.cpp and Ollama run, tensor by tensor."""

from collections.abc import Callable
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from llmjax.errors import UserError
from llmjax.interop import gguf_models, sharded_io
from llmjax.interop.gguf_import import require_gguf, tensor_name_map
from llmjax.interop.gguf_models import ROPE_FACTORS, Form
from llmjax.interop.mapping import ParamMapping, Tensor
from llmjax.parallel import hosts

DTYPES = ("f32", "f16", "q8_0")
# Numbers of general.file_type.
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}
# Small tensors that llama.cpp reads as float32 alone, besides all of one dimension.
_FLOAT32 = ("token_types.weight", "position_embd.weight", "ffn_gate_inp.weight", "attn_rel_b.weight")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A GGUF file before it is written.

    architecture  general.architecture
    metadata      by key
    tensors       name in the file -> its form, and its Hugging Face tensors by expert (None: it has none)
    shapes        name in the file -> shape as it is stored
    types         name in the file -> gguf.GGMLQuantizationType
    rope_factors  the tensor ROPE_FACTORS, if the model needs it
    left_out      Hugging Face tensors that the architecture does not have
    """

    architecture: str
    metadata: dict[str, Any]
    tensors: dict[str, tuple[Form, dict[int | None, Tensor]]]
    shapes: dict[str, tuple[int, ...]]
    types: dict[str, Any]
    rope_factors: np.ndarray | None
    left_out: list[str]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(_count_bytes(self.shapes[name], kind) for name, kind in self.types.items())


def plan(
    name: str, table: ParamMapping, hf: dict[str, Any], publish: Callable[[str], str], *, dtype: str, title: str
) -> Plan:
    """Plan the file of architecture `name` for a model with this config.json, without the tokenizer's metadata.

    publish  of the class; see Architecture
    dtype    of DTYPES, for matrices; q8_0 falls back to f16 where rows are no multiple of 32 long
    title    general.name
    Raises UserError for a tensor that the architecture does not have.
    """
    blocks = max(hf.get(f) or 0 for f in ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"))
    name_map = tensor_name_map(name, blocks)
    tensors: dict[str, tuple[Form, dict[int | None, Tensor]]] = {}
    shapes, left_out = {}, []
    for tensor in table.written_tensors():
        if tensor.hf_names[0].startswith(gguf_models.ARCHITECTURES[name].left_out):
            left_out.append(tensor.hf_names[0])
            continue
        place = gguf_models.name_tensor(name_map, tensor, publish)
        if place is None:
            raise UserError(f"--format=gguf: the architecture {name} of llama.cpp has no tensor {tensor.hf_names[0]}")
        stored, expert = place
        form = gguf_models.ARCHITECTURES[name].form(stored, hf)
        parts = tensors.setdefault(stored, (form, {}))[1]
        parts[expert] = tensor
        shape = table.hf_shape(tensor)[::-1] if form.transposed else table.hf_shape(tensor)
        shapes[stored] = shape if expert is None else (len(parts), *shape)
    general = {"general.type": "model", "general.name": title, "general.quantization_version": 2}
    return Plan(
        name,
        {**general, "general.file_type": _FILE_TYPES[dtype], **gguf_models.write_config(name, hf)},
        tensors,
        shapes,
        {stored: _choose_type(stored, shape, dtype) for stored, shape in shapes.items()},
        gguf_models.find_rope_factors(hf),
        left_out,
    )


def write(path: Path, plan: Plan, gatherer: sharded_io.TensorGatherer) -> None:
    """Write a planned file, with one tensor at a time in memory. A collective: process 0 writes."""
    gguf = require_gguf()
    progress, writer = sharded_io.Progress("writing", plan.nbytes), None
    if hosts.is_primary():
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(path, plan.architecture)
        for key, value in plan.metadata.items():
            _add(writer, key, value)
        if plan.rope_factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, plan.rope_factors.shape, np.dtype("f4"), plan.rope_factors.nbytes)
        for stored, shape in plan.shapes.items():
            kind = plan.types[stored]
            writer.add_tensor_info(stored, shape, np.dtype("f4"), _count_bytes(shape, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if plan.rope_factors is not None:
            writer.write_tensor_data(plan.rope_factors)
    for stored, (form, parts) in plan.tensors.items():
        experts = sorted(parts, key=lambda expert: expert or 0)
        arrays = [form.store(gatherer.gather(parts[expert], jnp.float32)) for expert in experts]
        if writer is not None:
            data = gguf.quantize(
                np.ascontiguousarray(arrays[0] if None in parts else np.stack(arrays)), plan.types[stored]
            )
            writer.write_tensor_data(data)
            progress.add(data.nbytes)
    if writer is not None:
        writer.close()


def _choose_type(name: str, shape: tuple[int, ...], dtype: str) -> Any:
    types = require_gguf().GGMLQuantizationType
    if dtype == "f32" or len(shape) == 1 or name.endswith(_FLOAT32):
        return types.F32
    return types.Q8_0 if dtype == "q8_0" and shape[-1] % 32 == 0 else types.F16


def _count_bytes(shape: tuple[int, ...], kind: Any) -> int:
    block, nbytes = require_gguf().GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * nbytes


def _add(writer: Any, key: str, value: Any) -> None:
    """Add a value of the metadata in the type that llama.cpp expects: uint32 for numbers, float32 for fractions."""
    kinds = require_gguf().GGUFValueType
    if isinstance(value, list):
        if value:
            items = {float: kinds.FLOAT32, int: kinds.INT32, str: kinds.STRING}
            writer.add_key_value(key, value, kinds.ARRAY, items[type(value[0])])
    elif isinstance(value, bytes):
        if value:
            writer.add_key_value(key, value, kinds.ARRAY)
    else:
        kind = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}[type(value)]
        writer.add_key_value(key, value, kind)
