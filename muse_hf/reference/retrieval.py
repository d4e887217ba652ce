"""Retrieval: exact attention of every query to the keys of the clusters it chose.

The (query, cluster) pairs are tiled by cluster, so that a tile of queries meets the m keys of one cluster in
one small exact attention. The partial outputs of a query are merged over its r clusters, in their order.

Shapes: X batch entries, P queries, r clusters chosen by each of J.
"""

import torch

from muse_hf.reference.blocks import KeyBlocks
from muse_hf.reference.exact import exact_forward, softmax_backward
from muse_hf.reference.packing import Packing, tile_size

# Stands for minus infinity at missing members of a cluster, so that an empty cluster gives no NaN.
_ABSENT = -1e30


class Retrieval:
    """The clusters that queries (X, P, D) retrieve from the key blocks they see.

    Args:
        choice: (X, P, r) indices among the clusters of `seen`, in the order of their logits.
    """

    def __init__(self, query: torch.Tensor, choice: torch.Tensor, seen: list[KeyBlocks]):
        self.num_chosen = choice.shape[2]
        keys, values, filled = _members(seen)
        self.num_clusters = keys.shape[1]
        self.packing = Packing(
            choice.flatten(1), self.num_clusters, tile_size(choice[0].numel(), self.num_clusters)
        )
        self.query = self._to_tiles(query)
        self.keys, self.values = (self.packing.group_rows(t).flatten(0, 1) for t in (keys, values))
        bias = torch.zeros(filled.shape, dtype=query.dtype, device=query.device)
        bias.masked_fill_(~filled, _ABSENT)
        self.bias = self.packing.group_rows(bias).flatten(0, 1)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Numerator (X, P, D), denominator (X, P) and shift (X, P) of the retrieved part of the softmax."""
        output, lse = exact_forward(self.query, self.keys, self.values, is_causal=False, bias=self.bias)
        output = self.packing.unpack(self._from_tiles(output.squeeze(1))).unflatten(1, (-1, self.num_chosen))
        lse = self.packing.unpack(self._from_tiles(lse.transpose(1, 2))).unflatten(1, (-1, self.num_chosen))
        shift = lse.amax((2, 3))
        weights = (lse - shift[..., None, None]).exp()
        return (weights * output).sum(2), weights.sum((2, 3)), shift

    def backward(
        self, grad: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of the queries (X, P, D) and of all clusters' keys and values (X, J, m, D).

        Args:
            grad: (X, P, D) of the merged output. lse, delta: (X, P) λ and Δ = do·o of the merged attention.
        """
        grad, lse, delta = (
            self._to_tiles(rows).squeeze(1) for rows in (grad, lse[..., None], delta[..., None])
        )
        query = self.query.squeeze(1)
        logits = torch.baddbmm(self.bias[:, None], query, self.keys.transpose(1, 2))
        tiles = softmax_backward(
            grad, query, self.keys, self.values, logits, lse.squeeze(-1), delta.squeeze(-1)
        )
        grad_query = self.packing.to_rows(self._from_tiles(tiles[0]).flatten(1, 2), self.num_chosen)
        grad_members = []
        for tile in tiles[1:]:
            tile = tile.unflatten(0, (-1, self.packing.num_tiles))
            total = tile.new_zeros(tile.shape[0], self.num_clusters, *tile.shape[2:])
            self.packing.add_to_groups(tile, total)
            grad_members.append(total)
        return grad_query, *grad_members

    def _to_tiles(self, rows: torch.Tensor) -> torch.Tensor:
        """(X, P, D) to (X * num_tiles, 1, T, D), the layout of exact attention."""
        return self.packing.pack(rows, repeat=self.num_chosen).flatten(0, 1)[:, None]

    def _from_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        return tiles.unflatten(0, (-1, self.packing.num_tiles))


def split_members(tensor: torch.Tensor, seen: list[KeyBlocks]) -> list[torch.Tensor]:
    """Undo the joining of `seen`: gradients (X, J, m, D) to one (X, n, C, m', D) for each kind of block."""
    parts = tensor.split([blocks.filled.shape[1] * blocks.filled.shape[2] for blocks in seen], dim=1)
    return [
        part.unflatten(1, blocks.filled.shape[1:3])[..., : blocks.filled.shape[3], :]
        for part, blocks in zip(parts, seen)
    ]


def _members(seen: list[KeyBlocks]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values (X, J, m, D) and mask (X, J, m) of all clusters seen, in the order of their logits."""
    keys, values, filled = zip(
        *((b.keys.flatten(1, 2), b.values.flatten(1, 2), b.filled.flatten(1, 2)) for b in seen)
    )
    largest = max(mask.shape[2] for mask in filled)

    def join(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        if len(tensors) == 1:
            return tensors[0]
        room = [largest - tensor.shape[2] for tensor in tensors]
        after = (0, 0) * (tensors[0].ndim - 3)
        return torch.cat([torch.nn.functional.pad(t, (*after, 0, r)) for t, r in zip(tensors, room)], dim=1)

    return join(keys), join(values), join(filled)
