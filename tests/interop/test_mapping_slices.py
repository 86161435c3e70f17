"""A slice of a transformed tensor is read from the smallest box that holds it, and equals the slice of the full one."""

import math

import numpy as np
import pytest

from llmjax.interop import mapping
from llmjax.interop.mapping import conv1d, linear, transposed, vector

EMBED, HEADS, HEAD_DIM = 6, 4, 5
LAYOUTS = {
    "linear": ((HEADS * HEAD_DIM, EMBED), linear((EMBED,), (HEADS, HEAD_DIM))["from_hf"]),
    "linear out": ((EMBED, HEADS * HEAD_DIM), linear((HEADS, HEAD_DIM), (EMBED,))["from_hf"]),
    "conv1d": ((EMBED, HEADS * HEAD_DIM), conv1d((EMBED,), (HEADS, HEAD_DIM))["from_hf"]),
    "vector": ((HEADS * HEAD_DIM,), vector((HEADS, HEAD_DIM))["from_hf"]),
    "transposed": ((7, EMBED), transposed()["from_hf"]),
    "joined": (
        (EMBED, 3 * HEADS * HEAD_DIM),
        lambda t: tuple(t.reshape(EMBED, 3, HEADS, HEAD_DIM)[:, i] for i in range(3)),
    ),
    "interleaved": ((8, 10, EMBED), lambda t: (t[:, ::2], t[:, 1::2])),
    "one row": ((1, EMBED), lambda t: (t,)),
    "scalar": ((), lambda t: (t,)),
    "a copy": ((4, 6), lambda t: (t.T.reshape(3, 8),)),
    "merged": ((4, 6), lambda t: (t.reshape(24),)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_slices_equal_slices_of_the_full_tensor(name):
    shape, take = LAYOUTS[name]
    tensor = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    rng = np.random.default_rng(0)
    for position, full in enumerate(take(tensor)):
        for _ in range(20):
            starts = [int(rng.integers(0, size)) for size in full.shape]
            sizes = zip(starts, full.shape, strict=True)
            bounds = tuple((start, int(rng.integers(start + 1, size + 1))) for start, size in sizes)
            index = tuple(slice(*pair) for pair in bounds)
            tensor_slice = mapping.find_slice(take, shape, position, bounds)
            read = tensor[tensor_slice.box]
            part = take(read)[position][index] if tensor_slice.reads_all else tensor_slice.view(read)
            np.testing.assert_array_equal(part, full[index])
            assert not tensor_slice.reads_all or name in ("a copy", "merged", "scalar")


def test_only_the_needed_slices_are_read():
    """A quarter of the heads are a quarter of the rows; half of the inputs are half of the columns."""
    shape, take = LAYOUTS["linear"]
    tensor_slice = mapping.find_slice(take, shape, 0, ((0, 3), (1, 2), (0, 5)))
    assert tensor_slice.box == (slice(5, 10), slice(0, 3)) and not tensor_slice.reads_all
    shape, take = LAYOUTS["joined"]
    tensor_slice = mapping.find_slice(take, shape, 1, ((2, 4), (0, 4), (0, 5)))
    assert tensor_slice.box == (slice(2, 4), slice(20, 40))


def test_finding_a_slice_allocates_no_memory():
    """4 TB are reserved and never touched."""
    tensor_slice = mapping.find_slice(
        linear((1 << 20,), (1 << 11, 1 << 11))["from_hf"], (1 << 22, 1 << 20), 0, ((3, 5),) * 3
    )
    assert tensor_slice.box == (slice(3 * 2048 + 3, 4 * 2048 + 5), slice(3, 5))
