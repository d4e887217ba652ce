"""Packing items into tiles of their group."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muse_hf.reference.packing import Packing


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    groups=st.lists(st.lists(st.integers(0, 6), min_size=9, max_size=9), min_size=1, max_size=3),
    tile_size=st.integers(1, 5),
)
def test_every_item_lies_in_one_slot_of_its_group(groups, tile_size):
    """Items of group 5 and 6 are left out, the others keep their order."""
    group = torch.tensor(groups)
    packing = Packing(group, num_groups=5, tile_size=tile_size)
    for row in range(len(groups)):
        slots = packing.item_of_slot[row].unflatten(0, (packing.num_tiles, tile_size))
        for wanted in range(5):
            tiles = slots[packing.tile_group[row] == wanted].flatten()
            assert tiles[tiles >= 0].tolist() == (group[row] == wanted).nonzero().flatten().tolist()
        kept = group[row] < 5
        back = packing.item_of_slot[row][packing.slot_of_item[row][kept]]
        assert back.tolist() == kept.nonzero().flatten().tolist()


@pytest.mark.parametrize("repeat", [1, 3])
def test_pack_gradient(repeat):
    group = torch.tensor([[0, 2, 2, 1, 2, 0], [1, 1, 1, 1, 1, 1]])
    packing = Packing(group, 3, 2)
    rows = torch.randn(2, 6 // repeat, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: packing.pack(rows, repeat=repeat), rows)


def test_unpack_inverts_pack_and_has_its_gradient():
    group = torch.tensor([[0, 2, 2, 1, 2, 0]])
    packing = Packing(group, 3, 2)
    rows = torch.randn(1, 6, 2, dtype=torch.float64)
    tiles = packing.pack(rows)
    assert torch.equal(packing.unpack(tiles), rows)
    assert torch.autograd.gradcheck(packing.unpack, tiles.requires_grad_())


def test_a_single_tile_a_group():
    packing = Packing(torch.tensor([[1, 1, 2]]), 3, tile_size=2, single_tile=True)
    assert packing.filled.tolist() == [[[False, False], [True, True], [True, False]]]


def test_group_rows():
    packing = Packing(torch.tensor([[0, 2, 2, 2, 0]]), 3, tile_size=2)
    table = torch.arange(6.0).view(1, 3, 2)
    tiles = packing.group_rows(table)
    assert torch.equal(tiles, table[:, packing.tile_group[0]])


def test_rows_are_weighted_sums_over_their_items_and_skip_those_left_out():
    packing = Packing(torch.tensor([[0, 2, 1, 0]]), 2, tile_size=2)  # two rows of two items, one left out
    slots = torch.cat([packing.item_of_slot[0].to(torch.float64), torch.zeros(1)])[:, None]
    weights = torch.tensor([[[1.0, 10.0], [100.0, 1000.0]]], dtype=torch.float64)
    rows = packing.to_rows(slots, 2, weights)
    assert rows.flatten().tolist() == [0 * 1, 2 * 100 + 3 * 1000]


def test_empty_slots_are_zero_even_beside_nan():
    packing = Packing(torch.tensor([[0, 1]]), 2, tile_size=2)
    tiles = packing.pack(torch.full((1, 2, 1), torch.nan))
    assert torch.equal(tiles.isnan(), packing.filled[..., None])
