"""FLOPs that a compiled program executes: matmuls, attention kernels and grouped matmuls.

A multiply and an add are two. Attention kernels count the blocks that they execute, masked elements of these included.
"""

import dataclasses
import json
import math
import re

import numpy as np

from llmjax.plan.hlo import Array, Instruction, Module

KERNEL_TARGETS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu_v2")
_ATTENTION = re.compile(r"splash|flash|attention|fmha|mha", re.IGNORECASE)
_GROUPED = re.compile(r"ragged[-_]dot|gmm|megablox", re.IGNORECASE)


def matmul_flops(module: Module, instruction: Instruction) -> float:
    """FLOPs of one execution of a dot, a convolution or a call of a GPU's matmul library; 0 for other instructions."""
    match instruction.opcode:
        case "dot":
            contracted = _indices(instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
            left = module.operand(instruction, 0).dims
            return 2.0 * instruction.arrays[0].size * math.prod(left[i] for i in contracted)
        case "convolution":
            return _convolution_flops(
                instruction, module.operand(instruction, 0), module.operand(instruction, 1), instruction.arrays[0]
            )
        case "ragged-dot":
            return 2.0 * instruction.arrays[0].size * module.operand(instruction, 0).dims[-1]
        case "custom-call" if "$matmul" in target(instruction) or "$gemm" in target(instruction):
            contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
            left = module.operand(instruction, 0).dims
            indices = _indices(contracted[1].replace('"', "")) if contracted else [len(left) - 1]
            return 2.0 * instruction.arrays[0].size * math.prod(left[i] for i in indices)
    return 0.0


def has_int8_operands(module: Module, instruction: Instruction) -> bool:
    """Whether a matmul multiplies integers of 8 bits."""
    return all(module.operand(instruction, i).dtype in ("s8", "u8") for i in (0, 1))


def _convolution_flops(instruction: Instruction, left: Array, right: Array, out: Array) -> float:
    """TPU programs write every matmul as a convolution; batch dimensions may become dilated windows."""
    labels = instruction.attribute(r"dim_labels=(\S+?)(?:,|$)")
    left_labels, right_labels, out_labels = re.split(r"_|->", labels)
    window = dict(item.split("=") for item in instruction.attribute(r"window=\{([^}]*)\}").split() if "=" in item)
    batch_groups = int(instruction.attribute(r"batch_group_count=(\d+)") or 1)
    positions = 1
    for dim in (label for label in out_labels if label.isdigit()):
        i = int(dim)
        positions *= _valid_positions(
            left=left.dims[left_labels.index(dim)],
            kernel=right.dims[right_labels.index(dim)],
            out=out.dims[out_labels.index(dim)],
            stride=_window_entry(window, "stride", i, 1),
            pad=_window_entry(window, "pad", i, 0),
            left_dilation=_window_entry(window, "lhs_dilate", i, 1),
            kernel_dilation=_window_entry(window, "rhs_dilate", i, 1),
        )
    inputs = right.dims[right_labels.index("i")]  # already divided by the number of feature groups
    outputs, batch = right.dims[right_labels.index("o")], left.dims[left_labels.index("b")] // batch_groups
    return 2.0 * batch * inputs * outputs * positions


def _window_entry(window: dict[str, str], key: str, dim: int, default: int) -> int:
    if key not in window:
        return default
    return int(window[key].split("x")[dim].split("_")[0])  # of padding "low_high" the low one


def _valid_positions(
    *, left: int, kernel: int, out: int, stride: int, pad: int, left_dilation: int, kernel_dilation: int
) -> int:
    """Pairs (output, kernel element) of a spatial dimension that read an input and no padding or hole of dilation."""
    index = np.arange(out)[:, None] * stride - pad + np.arange(kernel)[None, :] * kernel_dilation
    return int(np.sum((index >= 0) & (index < (left - 1) * left_dilation + 1) & (index % left_dilation == 0)))


def target(instruction: Instruction) -> str:
    """The target of a custom call; "" for other instructions."""
    return instruction.attribute(r'custom_call_target="([^"]*)"') if instruction.opcode == "custom-call" else ""


def kernel_name(instruction: Instruction) -> str:
    """The name of a hand-written kernel or of a library's attention, without the number of the call; "" for others."""
    if target(instruction) in KERNEL_TARGETS:
        return re.sub(r"(\.\d+|\.clone)+$", "", instruction.name)
    return target(instruction) if "fmha" in target(instruction) else ""


def is_attention(name: str) -> bool:
    """Whether a kernel of that name computes attention."""
    return bool(_ATTENTION.search(name))


def is_grouped_matmul(name: str) -> bool:
    """Whether a kernel of that name multiplies each group of rows by its own matrix."""
    return bool(_GROUPED.search(name)) and "metadata" not in name


def grouped_matmul_flops(module: Module, instruction: Instruction) -> float:
    """FLOPs of a grouped matmul, every row in one group: of x [rows, inputs] by matrices, or the matrices' gradient."""
    arrays = [a for a in module.operand_arrays(instruction) if not a.dtype.startswith(("s", "u", "pred"))]
    rows_by_inputs = next(a for a in arrays if len(a.dims) == 2)
    out = next(a for a in instruction.arrays if len(a.dims) in (2, 3))
    if len(out.dims) == 2:
        return 2.0 * out.size * rows_by_inputs.dims[1]
    matrix = math.prod(out.dims[1:])  # gradient: [groups, inputs, outputs], each row adds to one of the groups
    return 2.0 * matrix * next(rows for rows in rows_by_inputs.dims if rows not in out.dims[1:])


@dataclasses.dataclass(frozen=True)
class KernelWork:
    """What executions of an attention kernel do.

    elements    pairs (query, key) of the blocks that it executes, masked ones included; 0 if only the FLOPs are known
    grid_steps  blocks, skipped ones included
    rows        queries of all heads
    """

    flops: float = 0
    elements: float = 0
    grid_steps: float = 0
    rows: float = 0

    def __add__(self, other: "KernelWork") -> "KernelWork":
        return KernelWork(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def times(self, count: float) -> "KernelWork":
        """The work of that many executions."""
        return KernelWork(*(count * value for value in dataclasses.astuple(self)))


def is_backward(name: str) -> bool:
    """Whether an attention kernel of that name computes gradients."""
    return "dkv" in name or "dq" in name or "bwd" in name or "backward" in name


def attention_work(module: Module, instruction: Instruction) -> KernelWork | None:
    """The work of one execution of an attention kernel; None if nothing in the text tells.

    The blocks of splash attention come from the mask that is one of its operands, [heads or 1, query blocks, key
    blocks] with 0 for a block that is skipped; without a mask it executes all. Where devices share the queries of a
    row, the work is their average. Of other kernels their estimate (`pl.CostEstimate`) is read.
    """
    floats = [a for a in module.operand_arrays(instruction) if a.dtype in ("bf16", "f16", "f32") and len(a.dims) >= 3]
    if "splash" not in kernel_name(instruction) or len(floats) < 3:
        estimate = instruction.attribute(r'"flops":"?(\d+)')
        return KernelWork(float(estimate)) if estimate and int(estimate) else None
    q, k, v = floats[:3]
    name, blocks = kernel_name(instruction), _block_sizes(instruction)
    suffix = "_dkv" if "dkv" in name else "_dq" if "dq" in name else ""
    block_q = blocks.get(f"block_q{suffix}") or q.dims[-2]
    block_kv = blocks.get(f"block_kv{suffix}") or k.dims[-2]
    mask = _block_mask(module, instruction)
    if mask is None:
        mask = np.ones((1, -(-q.dims[-2] // block_q), -(-k.dims[-2] // block_kv)))
    repeats = math.prod(q.dims[:-2]) / mask.shape[0]
    elements = float(np.sum(mask)) * block_q * block_kv * repeats
    # Two products forward: scores and values. Backward: scores, the gradients of weights, v and k, and that of q.
    qk, pv = 2.0 * q.dims[-1], 2.0 * v.dims[-1]
    if suffix == "_dkv":
        per_element = (3 if blocks.get("use_fused_bwd_kernel") else 2) * qk + 2 * pv
    else:
        per_element = 2 * qk + pv if suffix else qk + pv
    return KernelWork(elements * per_element, elements, mask.size * repeats, math.prod(q.dims[:-1]))


def _block_mask(module: Module, instruction: Instruction) -> np.ndarray | None:
    """Share of the devices that execute each block of splash attention, float [heads or 1, query blocks, key blocks].

    It takes (data_next, block_mask, ...) of these shapes as its first operands. A device cuts its part out of a larger
    constant where it shares the queries of a row with others.
    """
    if len(instruction.operands) < 2 or len(module.instructions[instruction.operands[1]].arrays) != 1:
        return None
    array, origin = module.operand(instruction, 1), module.origin(instruction.operands[1])
    while origin.opcode in ("fusion", "dynamic-slice"):
        is_fusion = origin.opcode == "fusion"
        source = module.roots[origin.callees["calls"][0]].name if is_fusion else origin.operands[0]
        origin = module.origin(source)
    if origin.opcode != "constant" or len(array.dims) != 3 or array.dtype not in ("s8", "s32"):
        return None
    numbers = np.array([int(text) for text in re.findall(r"-?\d+", origin.literal)])
    if len(numbers) == 1:  # the text of an array of one element, or of equal ones, may be a scalar
        return np.full(array.dims, float(numbers[0] != 0))
    if len(numbers) % array.size:
        return None
    return np.mean((numbers != 0).reshape(array.dims[0], -1, *array.dims[1:]), axis=1)


def _block_sizes(instruction: Instruction) -> dict[str, int]:
    """The block sizes that splash attention writes into its metadata."""
    text = instruction.attribute(r'"xprof_metadata":\s*"((?:[^"\\]|\\.)*)"')
    return json.loads(text.replace('\\"', '"')) if text else {}


def _indices(text: str) -> list[int]:
    return [int(index) for index in text.split(",") if index]


def has_matmul(module: Module, instruction: Instruction) -> bool:
    """Whether an instruction is a matmul or a kernel, or a fusion with one inside."""
    inner = [instruction]
    if instruction.opcode == "fusion":
        inner = [i for name in instruction.callees["calls"] for i in module.computations[name]]
    return any(matmul_flops(module, i) > 0 or kernel_name(i) for i in inner)
