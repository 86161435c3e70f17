"""Which part of a tensor on disk a part of a parameter needs, told by the strides of a view before any byte is read."""

from collections.abc import Callable
import dataclasses
import math
import mmap
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Window:
    """The box of a tensor that holds a wanted part, and where the part lies inside that box.

    box       a slice for each dimension of the tensor on disk
    steps     for each dimension of the part: (dimension of the tensor, step along it)
    shape     of the part
    whole     the layout is no view of the tensor (it merges dimensions that do not lie together): read it all, then
              lay it out and cut it
    """

    box: tuple[slice, ...]
    steps: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    whole: bool = False

    def view(self, read: np.ndarray) -> np.ndarray:
        """The wanted part of `read`, the content of the box; nothing is copied."""
        read = np.ascontiguousarray(read)
        strides = [step * read.strides[dimension] for dimension, step in self.steps]
        return np.lib.stride_tricks.as_strided(read, self.shape, strides, writeable=False)


def find(
    take: Callable[[Any], tuple[Any, ...]], shape: tuple[int, ...], position: int, index: tuple[slice, ...]
) -> Window:
    """The window of `take(tensor)[position][index]`, for a tensor of `shape`.

    `take` is tried on a tensor that is reserved and never touched, so this costs no memory where `take` makes views.
    """
    nothing = reserved(shape)
    part = take(nothing)[position][index]
    everything = Window(tuple(slice(0, size) for size in shape), (), part.shape, whole=True)
    if part.size == 0 or not np.may_share_memory(part, nothing):
        return everything
    offset = part.__array_interface__["data"][0] - nothing.__array_interface__["data"][0]
    start = [int(coordinate) for coordinate in np.unravel_index(offset, shape)] if shape else []
    strides = [math.prod(shape[dimension + 1 :]) for dimension in range(len(shape))]
    stop, steps = [coordinate + 1 for coordinate in start], []
    for size, stride in zip(part.shape, part.strides, strict=True):
        if size == 1:
            steps.append((0, 0))
            continue
        fits = [d for d in range(len(shape)) if shape[d] > 1 and 0 < strides[d] <= stride]
        if not fits or stride % strides[fits[0]]:
            return everything
        steps.append((fits[0], stride // strides[fits[0]]))
        stop[fits[0]] += (size - 1) * steps[-1][1]
    if any(end > size for end, size in zip(stop, shape, strict=True)):  # a dimension that runs over a row's end
        return everything
    return Window(tuple(slice(a, b) for a, b in zip(start, stop, strict=True)), tuple(steps), part.shape)


def reserved(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros, uint8, that take addresses but no memory, however many: the system accounts for no read-only pages."""
    size = math.prod(shape)
    pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    return np.frombuffer(pages, np.uint8)[:size].reshape(shape)
