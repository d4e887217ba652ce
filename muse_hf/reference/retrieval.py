"""Retrieval: exact attention of every query to the keys of the clusters it chose.

The (query, cluster) pairs are tiled by cluster, so that a tile of queries meets the m keys of one cluster in
one small exact attention. The partial outputs of a query are merged over its r clusters, in their order.

Shapes: X batch entries, P queries, r clusters chosen.
"""

import torch

from muse_hf.reference.blocks import KeyBlocks
from muse_hf.reference.exact import exact_forward, softmax_backward
from muse_hf.reference.packing import Packing, flat_index, take, tile_size, with_empty_row

# Stands for minus infinity at missing members of a cluster, so that an empty cluster gives no NaN.
_ABSENT = -1e30
# Slots whose tiles are worked through together: what they need and make stays in the cache of a CPU.
_SLOTS_AT_ONCE = 1 << 13


class Retrieval:
    """The clusters that queries (X, P, D) retrieve from blocks `first` up to but not including `last`.

    Args:
        choice: (X, P, r) indices among the clusters of those blocks; others are left out.
    """

    def __init__(self, query: torch.Tensor, choice: torch.Tensor, blocks: KeyBlocks, first: int, last: int):
        self.num_chosen = choice.shape[2]
        num_blocks, clusters_per_block = blocks.filled.shape[1:3]
        num_clusters = (last - first) * clusters_per_block
        choice = choice.masked_fill((choice < 0) | (choice >= num_clusters), num_clusters).flatten(1)
        self.packing = Packing(choice, num_clusters, tile_size(choice.shape[1], num_clusters))
        self.rows = self.packing.row_of_slot(self.num_chosen).view(-1, self.packing.tile_size)
        clusters = self.packing.tile_group + first * clusters_per_block
        self.clusters = flat_index(clusters, num_blocks * clusters_per_block).flatten()
        self.query = with_empty_row(query)
        self.keys, self.values, self.filled = (
            tensor.flatten(0, 2) for tensor in (blocks.keys, blocks.values, blocks.filled)
        )

    def forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Numerator (X, P, D), denominator (X, P) and shift (X, P) of the retrieved part of the softmax."""
        output, output_tiles = self._new_slots(self.query.shape[1], left_out=0)
        lse, lse_tiles = self._new_slots(1, left_out=-torch.inf)
        for tiles in self._parts():
            query, keys, values, bias = self._inputs(tiles)
            part, part_lse = exact_forward(query[:, None], keys, values, is_causal=False, bias=bias)
            output_tiles[tiles], lse_tiles[tiles] = part.squeeze(1), part_lse.transpose(1, 2)
        lse = self.packing.to_rows(lse, repeat=1).unflatten(1, (-1, self.num_chosen)).squeeze(-1)
        shift = lse.amax(2).clamp(min=torch.finfo(lse.dtype).min)
        weights = (lse - shift[..., None]).exp()
        return self.packing.to_rows(output, self.num_chosen, weights), weights.sum(2), shift

    def backward(
        self,
        grad: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        grad_keys: torch.Tensor,
        grad_values: torch.Tensor,
    ) -> torch.Tensor:
        """Gradient of the queries (X, P, D); those of the members are added to `grad_keys`, `grad_values`.

        Args:
            grad: (X, P, D) of the merged output. lse, delta: (X, P) λ and Δ = do·o of the merged attention.
            grad_keys, grad_values: like the keys and values of the blocks.
        """
        grad, lse, delta = (with_empty_row(rows) for rows in (grad, lse, delta))
        grad_keys, grad_values = (tensor.view(self.keys.shape) for tensor in (grad_keys, grad_values))
        grad_query, grad_tiles = self._new_slots(grad.shape[1], left_out=0)
        for tiles in self._parts():
            rows, clusters = self.rows[tiles], self.clusters[tiles]
            query, keys, values, bias = self._inputs(tiles)
            logits = torch.baddbmm(bias[:, None], query, keys.transpose(1, 2))
            grad_tiles[tiles], grad_key, grad_value = softmax_backward(
                take(grad, rows), query, keys, values, logits, lse[rows], delta[rows]
            )
            grad_keys.index_add_(0, clusters, grad_key)
            grad_values.index_add_(0, clusters, grad_value)
        return self.packing.to_rows(grad_query, self.num_chosen)

    def _parts(self) -> list[slice]:
        """Slices of the tiles of all batch entries."""
        num_tiles, size = self.rows.shape
        step = max(1, _SLOTS_AT_ONCE // size)
        return [slice(start, start + step) for start in range(0, num_tiles, step)]

    def _inputs(self, tiles: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (Y, T, D), keys and values (Y, m, D) and a bias on the keys (Y, m) of some tiles."""
        clusters = self.clusters[tiles]
        filled = take(self.filled, clusters)
        bias = self.query.new_zeros(filled.shape).masked_fill_(~filled, _ABSENT)
        return (
            take(self.query, self.rows[tiles]),
            take(self.keys, clusters),
            take(self.values, clusters),
            bias,
        )

    def _new_slots(self, width: int, left_out: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots (S + 1, width), with what an item left out finds in the last, and the others as tiles."""
        slots = self.query.new_empty(self.rows.numel() + 1, width)
        slots[-1] = left_out
        return slots, slots[:-1].view(*self.rows.shape, width)
