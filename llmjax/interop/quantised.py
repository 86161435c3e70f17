"""Checkpoints published in fewer bits: what their packed tensors stand for, in float32.

Each class is made from config.json's quantization_config. `shapes` turns the shapes on disk into those of the unpacked
tensors; `parts` names what one of them is packed into, with the types that each may have on disk; `dequantise` gives
one, or None where it lies on disk as it is.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llmjax.errors import UserError

Shapes = dict[str, tuple[int, ...]]
GetTensor = Callable[[str], np.ndarray]

# The values of 4 bits: a sign, two bits of exponent and one of mantissa (Open Compute Project, 2023, Microscaling
# formats 1.0, E2M1).
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4 = np.concatenate([_FP4, -_FP4])
_PAIRS = np.stack([_FP4[np.arange(256) & 15], _FP4[np.arange(256) >> 4]], axis=-1)  # low half first


class Mxfp4:
    """gpt-oss: X_blocks uint8 [experts, outputs, blocks, 16] and X_scales uint8 [experts, outputs, blocks].

    Each byte holds two weights, each block of 32 has one power of two, with 127 added to its exponent. The tensor that
    is meant is X [experts, inputs, outputs].
    """

    def __init__(self, settings: Mapping[str, Any]):
        del settings  # what is packed is seen by its name

    def shapes(self, disk: Mapping[str, tuple[int, ...]]) -> Shapes:
        """Names and shapes of the tensors that are meant."""
        found: Shapes = {}
        for name, shape in disk.items():
            if name.endswith("_scales") and _stem(name) + "_blocks" in disk:
                continue
            if not name.endswith("_blocks"):
                found[name] = shape
                continue
            if len(shape) < 3 or disk.get(_stem(name) + "_scales") != shape[:-1]:
                raise UserError(f"tensor {_stem(name)}_scales is missing or not of shape {list(shape[:-1])}")
            *lead, outputs, blocks, size = shape
            found[_stem(name)] = (*lead, blocks * size * 2, outputs)
        return found

    def parts(self, name: str) -> dict[str, tuple[str, ...]]:
        """The two tensors that X is packed into, and their types."""
        return {f"{name}_blocks": ("U8",), f"{name}_scales": ("U8",)}

    def dequantise(self, name: str, get: GetTensor) -> np.ndarray | None:
        """float32 [experts, inputs, outputs], or None for a tensor that is not packed."""
        try:
            blocks = get(f"{name}_blocks")
        except KeyError:
            return None
        scales = get(f"{name}_scales").astype(np.int32) - 127
        values = np.ldexp(_PAIRS[blocks].reshape(*scales.shape, -1), scales[..., None])
        return values.reshape(*scales.shape[:-1], -1).swapaxes(-1, -2)


class Fp8Blocks:
    """DeepSeek-V3: weights X [outputs, inputs] in 8-bit floats, and in X_scale_inv a factor for each block of them."""

    def __init__(self, settings: Mapping[str, Any]):
        block = settings.get("weight_block_size")
        if not isinstance(block, list | tuple) or [type(size) is int and size > 0 for size in block] != [True, True]:
            raise UserError(
                f"config.json: quantization_config.weight_block_size={block!r} is not supported, only two numbers "
                "such as [128, 128]"
            )
        self.block = tuple(block)

    def shapes(self, disk: Mapping[str, tuple[int, ...]]) -> Shapes:
        """Names and shapes of the tensors that are meant."""
        found: Shapes = {}
        for name, shape in disk.items():
            if name.endswith("_scale_inv"):
                weight = disk.get(name.removesuffix("_scale_inv"))
                tiles = weight and tuple(-(-size // step) for size, step in zip(weight, self.block, strict=False))
                if tiles != shape or len(shape) != len(self.block):
                    raise UserError(f"tensor {name} has shape {list(shape)}; its weight needs {tiles and list(tiles)}")
            else:
                found[name] = shape
        return found

    def parts(self, name: str) -> dict[str, tuple[str, ...]]:
        """X and its factors, and their types."""
        return {name: ("F8_E4M3",), f"{name}_scale_inv": ("F32", "BF16", "F16", "F8_E8M0")}

    def dequantise(self, name: str, get: GetTensor) -> np.ndarray | None:
        """float32 [outputs, inputs], or None for a tensor without factors."""
        try:
            factors = get(f"{name}_scale_inv")
        except KeyError:
            return None
        weight = get(name).astype(np.float32)
        for dim, step in enumerate(self.block):
            factors = np.repeat(factors, step, axis=dim).take(range(weight.shape[dim]), axis=dim)
        return weight * factors.astype(np.float32)


def _stem(name: str) -> str:
    return name.rpartition("_")[0]
