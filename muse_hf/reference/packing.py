"""Sorting items into groups and laying every group out in tiles of fixed size.

Three stages need it: the keys of a cluster (one tile each), the queries that share a centroid, and the
(query, cluster) pairs of retrieval. A tile belongs to one group, so a ragged product "each item with the
matrix of its group" becomes one batched matrix product over tiles.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

# A tile of items meets one matrix: small tiles leave few slots empty, large ones make better products.
_SMALLEST_TILE, _LARGEST_TILE = 16, 128


def tile_size(num_items: int, num_groups: int) -> int:
    """Slots a tile for groups of uneven size: half a mean group, within bounds."""
    return min(max(num_items // num_groups // 2, _SMALLEST_TILE), _LARGEST_TILE)


class Packing:
    """Where each of P items lies in tiles of its group, and which item lies in each slot.

    Every shape starts with a batch dimension X whose entries are packed independently; nothing is atomic
    or random, and no size depends on data.

    Args:
        group: (X, P) integers; items of group `num_groups` or above are left out.
        num_groups: Number of groups G.
        tile_size: Items in a tile T.
        single_tile: Give each group exactly one tile, which is for groups known to hold at most T items.
            Otherwise a group gets as many tiles as it needs out of a shared budget of ceil(P / T) + G.

    Attributes:
        num_tiles: Number of tiles per batch entry, empty ones included.
        tile_group: (X, num_tiles) group of each tile.
        slot_of_item: (X, P) position of each item among the num_tiles * T slots, behind the last one for an
            item left out.
        item_of_slot: (X, num_tiles * T) item in each slot, -1 if empty.
    """

    def __init__(self, group: torch.Tensor, num_groups: int, tile_size: int, single_tile: bool = False):
        batch, num_items = group.shape
        device = group.device
        self.tile_size = tile_size
        sorted_group, order = group.clamp(max=num_groups).sort(dim=1, stable=True)
        bounds = torch.arange(num_groups + 1, device=device).expand(batch, -1).contiguous()
        first_item = torch.searchsorted(sorted_group, bounds)
        count = first_item.diff(dim=1)
        tiles = torch.ones_like(count) if single_tile else -(-count // tile_size)
        tiles_through = tiles.cumsum(1)
        self.num_tiles = num_groups if single_tile else -(-num_items // tile_size) + num_groups
        if device.type == "cpu":  # where looking costs nothing, drop the tiles that nothing needs
            self.num_tiles = int(tiles_through[:, -1].max())
        # The group "left out" starts behind the last slot.
        first_slot = torch.cat([tiles_through - tiles, tiles_through[:, -1:]], dim=1) * tile_size

        rank = torch.arange(num_items, device=device) - first_item.gather(1, sorted_group)
        slot = first_slot.gather(1, sorted_group) + rank
        num_slots = self.num_tiles * tile_size
        slot = slot.masked_fill(sorted_group == num_groups, num_slots)
        item_of_slot = torch.full((batch, num_slots + 1), -1, device=device)
        self.item_of_slot = item_of_slot.scatter(1, slot, order)[:, :num_slots]
        self.slot_of_item = torch.empty_like(order).scatter(1, order, slot)
        tile = torch.arange(self.num_tiles, device=device).expand(batch, -1).contiguous()
        self.tile_group = torch.searchsorted(tiles_through, tile, right=True).clamp(max=num_groups - 1)

    @property
    def filled(self) -> torch.Tensor:
        """(X, num_tiles, T) True where a slot holds an item."""
        return (self.item_of_slot >= 0).unflatten(1, (self.num_tiles, self.tile_size))

    def pack(self, rows: torch.Tensor, repeat: int = 1) -> torch.Tensor:
        """Lay rows (X, P / repeat, D) out as tiles (X, num_tiles, T, D), zero where a slot is empty.

        With `repeat`, that many consecutive items share a row.
        """
        return _Pack.apply(rows, self, repeat).unflatten(1, (self.num_tiles, self.tile_size))

    def unpack(self, tiles: torch.Tensor) -> torch.Tensor:
        """The inverse of `pack`, (X, num_tiles, T, D) back to (X, P, D), if no item was left out."""
        return _Unpack.apply(tiles.flatten(1, 2), self)

    def group_rows(self, table: torch.Tensor) -> torch.Tensor:
        """The entry of each tile's group: (X, G, ...) to (X, num_tiles, ...)."""
        return take(table.flatten(0, 1), flat_index(self.tile_group, table.shape[1]))

    def row_of_slot(self, repeat: int = 1) -> torch.Tensor:
        """(X, num_tiles * T) index into `with_empty_row` of rows (X, P / repeat, D), for each slot."""
        num_rows = self.slot_of_item.shape[1] // repeat
        flat = flat_index(torch.div(self.item_of_slot, repeat, rounding_mode="floor"), num_rows)
        return flat.masked_fill_(self.item_of_slot < 0, flat.shape[0] * num_rows)

    def to_slots(self, rows: torch.Tensor, repeat: int) -> torch.Tensor:
        """Rows (X, P / repeat, D) to slots (X, num_tiles * T, D), without recording gradients."""
        return take(with_empty_row(rows), self.row_of_slot(repeat))

    def to_rows(self, slots: torch.Tensor, repeat: int, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Slots of all batch entries to rows (X, P / repeat, D), summed over the items of a row.

        Args:
            slots: (X * num_tiles * T, D), with one more for the items left out if there are any.
            weights: (X, P / repeat, repeat) a factor on each item.
        """
        batch = self.slot_of_item.shape[0]
        num_slots = self.item_of_slot.shape[1]
        index = flat_index(self.slot_of_item, num_slots)
        index = index.masked_fill_(self.slot_of_item == num_slots, batch * num_slots)
        if repeat == 1:
            return take(slots, index)
        weights = None if weights is None else weights.flatten(0, 1)
        rows = embedding_bag(index.view(-1, repeat), slots, mode="sum", per_sample_weights=weights)
        return rows.unflatten(0, (batch, -1))


class _Pack(torch.autograd.Function):
    """Rows to slots. An item lies in one slot, so both directions are gathers and nothing is scattered:
    the same input gives the same bits on every device."""

    @staticmethod
    def forward(ctx, rows, packing, repeat):
        ctx.packing, ctx.repeat = packing, repeat
        return packing.to_slots(rows, repeat)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.packing.to_rows(grad.flatten(0, 1), ctx.repeat), None, None


class _Unpack(torch.autograd.Function):
    """Slots to rows, the transpose of `_Pack`."""

    @staticmethod
    def forward(ctx, slots, packing):
        ctx.packing = packing
        return packing.to_rows(slots.flatten(0, 1), repeat=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.packing.to_slots(grad, repeat=1), None


def flat_index(index: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Index (X, S) into the `num_rows` rows of each batch entry, as one into those of all entries."""
    return index + torch.arange(index.shape[0], device=index.device)[:, None] * num_rows


def with_empty_row(rows: torch.Tensor) -> torch.Tensor:
    """Rows (X, R, ...) of all batch entries, and behind them one of zeros: (X * R + 1, ...)."""
    return torch.cat([rows.flatten(0, 1), rows.new_zeros(1, *rows.shape[2:])])


def take(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """table[index] along the first dimension, by row copies that are much faster on the CPU."""
    return table.index_select(0, index.flatten()).unflatten(0, index.shape)
