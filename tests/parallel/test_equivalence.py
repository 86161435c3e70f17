"""Loss and gradients on every mesh equal those of one device, in float32: the matrix of tests/parallel/equivalence.py."""

import pytest

from tests.parallel.equivalence import Cell, cells, compare

# float32 sums of some 400 tokens, 32 positions and 16 devices in another order. Rounding of 6e-8 a term adds up to some
# 1e-6 of the largest value of a leaf; where a gradient is a difference of larger sums, to ten times that. A wrong mask,
# a lost row or a sum taken twice is above 1e-3.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-6, 2e-5


@pytest.mark.parametrize("cell", cells(), ids=str)
def test_mesh_equals_one_device(cell: Cell):
    loss, gradients = compare(cell)
    assert loss < LOSS_TOLERANCE and gradients < GRADIENT_TOLERANCE, (loss, gradients)
