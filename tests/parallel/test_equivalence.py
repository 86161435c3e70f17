"""Loss and gradients on every mesh equal those of one device, in float32 (tests/parallel/equivalence.py)."""

import pytest

from tests.parallel.equivalence import Cell, cells, compare, representative_cells

# float32 sums of some 400 tokens, 32 positions and 8 devices in another order. Roundings of 6e-8 a term add up to some
# 1e-6 of the largest value of a leaf; where a gradient is a difference of larger sums, to ten times that. A wrong mask,
# a lost row or a sum that is taken twice gives more than 1e-3.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-6, 3e-5

REPRESENTATIVE = representative_cells()
CELLS = [pytest.param(cell, id=str(cell), marks=() if cell in REPRESENTATIVE else pytest.mark.slow) for cell in cells()]


@pytest.mark.parametrize("cell", CELLS)
def test_mesh_equals_one_device(cell: Cell):
    loss, gradients = compare(cell)
    assert loss < LOSS_TOLERANCE and gradients < GRADIENT_TOLERANCE, (loss, gradients)


def test_the_matrix_has_every_axis_and_pair_for_every_family():
    for family, axes in (("MoE", 6), ("dense", 5), ("recurrent", 4)):
        meshes = [cell.sizes for cell in cells() if cell.family == family]
        pairs = axes * (axes - 1) // 2
        assert [sum(len(sizes) == count for sizes in meshes) for count in (1, 2)] == [axes, pairs]
