"""k-means without random numbers or atomics: the same tokens always cluster the same way.

Nothing here is differentiated. Shapes start with a batch X of independent point sets.
"""

import torch

from muse_hf.reference.packing import Packing

# Rounds in which the keys that found a cluster full try the next nearest. The few keys that are still
# homeless afterwards take the free places in order, so the work is bounded and no size depends on data.
_CAPACITY_ROUNDS = 4
# Entries of a points x centroids table held at once, which bounds memory for many clusters.
_TABLE_ENTRIES = 1 << 24


def kmeans_centroids(
    points: torch.Tensor, num_clusters: int, iters: int, num_valid: torch.Tensor | None = None
) -> torch.Tensor:
    """Centroids (X, C, D) of points (X, N, D) after `iters` updates, starting from evenly spaced points.

    Args:
        num_valid: (X,) how many leading points count, if not all N.
    """
    batch, num_points, dim = points.shape
    counted = torch.full((batch,), num_points, device=points.device) if num_valid is None else num_valid
    start = torch.arange(num_clusters, device=points.device) * counted[:, None] // num_clusters
    centroids = points.gather(1, start[..., None].expand(-1, -1, dim))
    ignored = torch.arange(num_points, device=points.device) >= counted[:, None]
    for _ in range(iters):
        nearest, _ = nearest_centroid(points, centroids)
        nearest = nearest.masked_fill(ignored, num_clusters)
        centroids = _means(points, nearest, centroids)
    return centroids


def nearest_centroid(
    points: torch.Tensor, centroids: torch.Tensor, closed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest centroid by Euclidean distance.

    Args:
        points: (X, N, D).
        centroids: (X, C, D).
        closed: (X, C) True at centroids that take no more points.

    Returns:
        (X, N) indices, and (X, N) closeness: minus half the squared distance.
    """
    bias = -0.5 * centroids.square().sum(-1)
    if closed is not None:
        bias = bias.masked_fill(closed, -torch.inf)
    rows = max(1, _TABLE_ENTRIES // (centroids.shape[0] * centroids.shape[1]))
    best = [
        torch.baddbmm(bias[:, None], chunk, centroids.transpose(1, 2)).max(-1)
        for chunk in points.split(rows, dim=1)
    ]
    affinity = torch.cat([values for values, _ in best], dim=1)
    index = torch.cat([indices for _, indices in best], dim=1)
    return index, affinity - 0.5 * points.square().sum(-1)


def assign_with_capacity(points: torch.Tensor, centroids: torch.Tensor, capacity: int) -> torch.Tensor:
    """Cluster (X, N) of each point such that none holds more than `capacity`.

    A full cluster keeps its nearest points and the others go to their nearest cluster with room, for a few
    rounds; then what is left fills the free places in order. `capacity * C` must be at least N.
    """
    if capacity >= points.shape[1]:  # none can be full
        return nearest_centroid(points, centroids)[0]
    num_clusters = centroids.shape[1]
    cluster = torch.full(points.shape[:2], num_clusters, device=points.device)
    room = torch.full(centroids.shape[:2], capacity, device=points.device)
    for _ in range(_CAPACITY_ROUNDS):
        homeless = cluster == num_clusters
        choice, closeness = nearest_centroid(points, centroids, closed=room == 0)
        choice = choice.masked_fill(~homeless, num_clusters)
        rank, count = _rank_within(choice, closeness, num_clusters)
        no_room = room.new_zeros(room.shape[0], 1)
        accepted = rank < torch.cat([room, no_room], dim=1).gather(1, choice)
        cluster = torch.where(accepted, choice, cluster)
        room = room - torch.minimum(count, room)
    homeless = cluster == num_clusters
    place = homeless.cumsum(1) - 1
    filled = torch.searchsorted(room.cumsum(1), place.clamp(min=0), right=True)
    return torch.where(homeless, filled, cluster)


def cluster_sizes(cluster: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """How many of the points (X, N) each cluster has: (X, C)."""
    counts = cluster.new_zeros(cluster.shape[0], num_clusters)
    return counts.scatter_add_(1, cluster, torch.ones_like(cluster))


def _means(points: torch.Tensor, cluster: torch.Tensor, fallback: torch.Tensor) -> torch.Tensor:
    """Mean of each cluster's points, or its fallback row where it has none: (X, C, D)."""
    num_clusters = fallback.shape[1]
    packing = Packing(cluster, num_clusters, max(1, points.shape[1] // num_clusters))
    tile_sums = packing.pack(points).sum(2)
    tile_counts = packing.filled.sum(2)
    of_cluster = packing.tile_group[:, None] == torch.arange(num_clusters, device=points.device)[:, None]
    of_cluster = of_cluster.to(points.dtype)
    count = of_cluster @ tile_counts[..., None].to(points.dtype)
    return torch.where(count > 0, of_cluster @ tile_sums / count.clamp(min=1), fallback)


def _rank_within(
    choice: torch.Tensor, closeness: torch.Tensor, num_clusters: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank (X, N) of each point among those with the same choice, nearest first, and the counts (X, C)."""
    by_closeness = closeness.argsort(dim=1, descending=True, stable=True)
    sorted_choice, order = choice.gather(1, by_closeness).sort(dim=1, stable=True)
    order = by_closeness.gather(1, order)
    bounds = torch.arange(num_clusters + 1, device=choice.device).expand(choice.shape[0], -1).contiguous()
    first = torch.searchsorted(sorted_choice, bounds)
    rank = torch.arange(choice.shape[1], device=choice.device) - first.gather(1, sorted_choice)
    return torch.empty_like(rank).scatter(1, order, rank), first.diff(dim=1)
