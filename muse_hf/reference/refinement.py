"""Refinement: what fine queries make of the summaries of key blocks.

Shapes: X batch entries, P queries (those of all G query heads, head by head), n blocks of C clusters.
"""

from collections.abc import Callable

import torch

from muse_hf.reference.blocks import KeyBlocks
from muse_hf.reference.clustering import nearest_centroid
from muse_hf.reference.packing import Packing, tile_size


def refine(
    query: torch.Tensor, groups: int, blocks: KeyBlocks
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Logits of queries (X, P, D) on the summaries of some blocks, and how weights on them become values.

    Args:
        groups: G query heads, each with P / G of the queries.

    Returns:
        ℓ_qj = L_aj + δ·k̃_aj (X, P, n * C), and the function from weights of that shape to Σ_j p_qj ṽ_aj
        with the dipole correction (X, P, D). Both are differentiable.
    """
    if blocks.centroids is None:
        return _refine_plain(query, blocks)
    return _refine_tilted(query, groups, blocks)


def _refine_plain(query, blocks):
    """One centroid at zero: δ = q, and every query sees the same summaries."""
    log_mass, key_mean, value_mean = (tensor.flatten(1, 3) for tensor in blocks[:3])
    logits = torch.baddbmm(log_mass[:, None], query, key_mean.transpose(1, 2))
    return logits, lambda weights: weights @ value_mean


def _refine_tilted(query, groups, blocks):
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
    logits = packing.group_rows(log_mass)[:, :, None]
    logits = packing.unpack(logits + offset @ packing.group_rows(key_mean).transpose(-1, -2))
    logits = logits.unflatten(0, (batch, num_blocks)).transpose(1, 2).flatten(2)

    def combine(weights: torch.Tensor) -> torch.Tensor:
        weights = weights.unflatten(2, (num_blocks, num_clusters)).transpose(1, 2).flatten(0, 1)
        tiles = packing.pack(weights)
        values = tiles @ packing.group_rows(value_mean)
        if blocks.dipole is not None:
            tensor = packing.group_rows(blocks.dipole.flatten(0, 1))
            values = values + tiles.sum(-1, keepdim=True) * (offset @ tensor.transpose(-1, -2))
        return packing.unpack(values).unflatten(0, (batch, num_blocks)).sum(1)

    return logits, combine


def _nearest_own_centroid(queries: torch.Tensor, centroids: torch.Tensor, groups: int) -> torch.Tensor:
    """Nearest centroid (Y, P) of each query (Y, P, D) among those of its own query head."""
    own_queries = queries.detach().unflatten(1, (groups, -1)).flatten(0, 1)
    own_centroids = centroids.unflatten(1, (groups, -1)).flatten(0, 1)
    nearest, _ = nearest_centroid(own_queries, own_centroids)
    first = torch.arange(groups, device=queries.device)[:, None] * own_centroids.shape[1]
    return (nearest.unflatten(0, (-1, groups)) + first).flatten(1)
