"""Refinement: what fine queries make of the summaries of key blocks.

Shapes: X batch entries, P queries (those of all G query heads, head by head), n blocks of C clusters.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from muse_hf.reference.blocks import KeyBlocks
from muse_hf.reference.clustering import nearest_centroid
from muse_hf.reference.packing import Packing, tile_size


class Refinement(NamedTuple):
    """What queries (X, P, D) make of J summaries. `logits` and `combine` are differentiable.

    Attributes:
        logits: (X, P, J) ℓ_qj = L_aj + δ·k̃_aj.
        combine: From weights (X, P, J) to Σ_j p_qj ṽ_aj with the dipole correction (X, P, D).
        score: Gives ℓ_qj + ½ Σ_d δ_d² Var_d(k) (X, P, J), the logits to second order.
    """

    logits: torch.Tensor
    combine: Callable[[torch.Tensor], torch.Tensor]
    score: Callable[[], torch.Tensor]


def refine(query: torch.Tensor, groups: int, blocks: KeyBlocks) -> Refinement:
    """Refine the summaries of n blocks of C clusters, J = n * C, for queries (X, P, D).

    Args:
        groups: G query heads, each with P / G of the queries.
    """
    if blocks.centroids is None:
        return _refine_plain(query, blocks)
    return _refine_tilted(query, groups, blocks)


def _refine_plain(query: torch.Tensor, blocks: KeyBlocks) -> Refinement:
    """One centroid at zero: δ = q, and every query sees the same summaries."""
    log_mass, key_mean, value_mean = (tensor.flatten(1, 3) for tensor in blocks[:3])
    logits = torch.baddbmm(log_mass[:, None], query, key_mean.transpose(1, 2))

    def score() -> torch.Tensor:
        variance = blocks.key_variance.flatten(1, 3).transpose(1, 2)
        return torch.baddbmm(logits, query.square(), variance, alpha=0.5)

    return Refinement(logits, lambda weights: weights @ value_mean, score)


def _refine_tilted(query: torch.Tensor, groups: int, blocks: KeyBlocks) -> Refinement:
    """Every query expands around its nearest centroid of each block; queries are tiled by centroid."""
    batch, num_queries = query.shape[:2]
    num_blocks, num_centroids, num_clusters = blocks.log_mass.shape[1:]
    log_mass, key_mean, value_mean = (tensor.flatten(0, 1) for tensor in blocks[:3])
    centroids = blocks.centroids.flatten(0, 1)
    queries = query[:, None].expand(-1, num_blocks, -1, -1).flatten(0, 1)

    packing = Packing(
        _nearest_own_centroid(queries, centroids, groups),
        num_centroids,
        tile_size(num_queries, num_centroids),
    )
    offset = packing.pack(queries) - packing.group_rows(centroids)[:, :, None]

    def by_query(tiles: torch.Tensor) -> torch.Tensor:
        rows = packing.unpack(tiles).unflatten(0, (batch, num_blocks))
        return rows.transpose(1, 2).flatten(2)

    def score() -> torch.Tensor:
        variance = packing.group_rows(blocks.key_variance.flatten(0, 1))
        return by_query(logits + offset.square() @ variance.transpose(-1, -2) / 2)

    def combine(weights: torch.Tensor) -> torch.Tensor:
        weights = weights.unflatten(2, (num_blocks, num_clusters)).transpose(1, 2).flatten(0, 1)
        tiles = packing.pack(weights)
        values = tiles @ packing.group_rows(value_mean)
        if blocks.dipole is not None:
            tensor = packing.group_rows(blocks.dipole.flatten(0, 1))
            values = values + tiles.sum(-1, keepdim=True) * (offset @ tensor.transpose(-1, -2))
        return packing.unpack(values).unflatten(0, (batch, num_blocks)).sum(1)

    logits = packing.group_rows(log_mass)[:, :, None]
    logits = logits + offset @ packing.group_rows(key_mean).transpose(-1, -2)
    return Refinement(by_query(logits), combine, score)


def _nearest_own_centroid(queries: torch.Tensor, centroids: torch.Tensor, groups: int) -> torch.Tensor:
    """Nearest centroid (Y, P) of each query (Y, P, D) among those of its own query head."""
    own_queries = queries.detach().unflatten(1, (groups, -1)).flatten(0, 1)
    own_centroids = centroids.unflatten(1, (groups, -1)).flatten(0, 1)
    nearest, _ = nearest_centroid(own_queries, own_centroids)
    first = torch.arange(groups, device=queries.device)[:, None] * own_centroids.shape[1]
    return (nearest.unflatten(0, (-1, groups)) + first).flatten(1)
