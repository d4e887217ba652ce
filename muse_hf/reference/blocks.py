"""Far blocks of keys: clustered, and each cluster summed up.

Shapes: X batch entries (one a key/value head), n blocks of s tokens, C clusters of at most m keys, A query
centroids over all G query heads that share the key head (1 with plain summaries), head_dim D.
"""

from typing import NamedTuple

import torch

from muse_hf.config import MuseConfig
from muse_hf.reference.clustering import assign_with_capacity, cluster_sizes, kmeans_centroids
from muse_hf.reference.packing import Packing
from muse_hf.reference.precision import matmul


class KeyBlocks(NamedTuple):
    """Key blocks of one size. `log_mass` to `dipole`, `keys` and `values` are differentiable.

    Attributes:
        log_mass: (X, n, A, C) L: logsumexp of the logits of a cluster's keys at the centroid, -inf if empty.
        key_mean: (X, n, A, C, D) mean key under the softmax of those logits.
        value_mean: (X, n, A, C, D) mean value likewise.
        dipole: (X, n, A, D, D) covariance of values with keys inside clusters, mean over the clusters.
        key_variance: (X, n, A, C, D) variance of the keys around `key_mean`, dimension by dimension. It only
            decides which clusters are retrieved and has no gradient; None without retrieval.
        keys, values: (X, n, C, m, D) the members of each cluster, zero where there is none.
        filled: (X, n, C, m) True where there is a member.
        centroids: (X, n, A, D) the query centroids that summaries are expanded around; None means zero.
    """

    log_mass: torch.Tensor
    key_mean: torch.Tensor
    value_mean: torch.Tensor
    dipole: torch.Tensor | None
    key_variance: torch.Tensor | None
    keys: torch.Tensor
    values: torch.Tensor
    filled: torch.Tensor
    centroids: torch.Tensor | None

    def narrow(self, first: int, last: int) -> "KeyBlocks":
        """The blocks from `first` up to but not including `last`."""
        return KeyBlocks(*(None if tensor is None else tensor[:, first:last] for tensor in self))


def build_key_blocks(
    key: torch.Tensor,
    value: torch.Tensor,
    query: torch.Tensor,
    query_length: torch.Tensor | None,
    config: MuseConfig,
) -> KeyBlocks:
    """Cluster the keys of each block and sum up the clusters.

    Args:
        key, value: (X, n, s, D).
        query: (X, G, n, t, D) the queries whose centroids tilted summaries are expanded around.
        query_length: (n,) how many of the t queries of each block exist, if not all.
    """
    batch, num_blocks, length, _ = key.shape
    num_clusters, capacity = config.clusters_for(length), config.capacity_for(length)
    with torch.no_grad():
        points = key.flatten(0, 1)
        key_centroids = kmeans_centroids(points, num_clusters, config.kmeans_iters)
        cluster = assign_with_capacity(points, key_centroids, capacity)
        if config.cluster_cap is None:  # the one size here that depends on the keys
            capacity = int(cluster_sizes(cluster, num_clusters).max())
        centroids = _query_centroids(query, query_length, config) if config.summaries == "tilted" else None
    packing = Packing(cluster, num_clusters, capacity, single_tile=True)
    keys, values = packing.pack(key.flatten(0, 1)), packing.pack(value.flatten(0, 1))
    spread = config.num_retrieved > 0
    if centroids is None:
        summaries = plain_summaries(keys, values, packing.filled, spread)
    else:
        dipole = config.multipole == "dipole"
        summaries = tilted_summaries(keys, values, packing.filled, centroids.flatten(0, 1), dipole, spread)
    tensors = (*summaries, keys, values, packing.filled)
    blocks = (None if tensor is None else tensor.unflatten(0, (batch, num_blocks)) for tensor in tensors)
    return KeyBlocks(*blocks, centroids)


def plain_summaries(
    keys: torch.Tensor, values: torch.Tensor, filled: torch.Tensor, spread: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, torch.Tensor | None]:
    """Means and log of the member count: the expansion around q = 0, so A = 1 in `tilted_summaries`."""
    count = filled.sum(-1)[..., None].to(keys.dtype)
    log_mass = count.squeeze(-1).log()
    members = count.clamp(min=1)
    key_mean, value_mean = keys.sum(2) / members, values.sum(2) / members
    variance = _variance(keys.detach().square().sum(2) / members, key_mean)[:, None] if spread else None
    return log_mass[:, None], key_mean[:, None], value_mean[:, None], None, variance


def tilted_summaries(
    keys: torch.Tensor,
    values: torch.Tensor,
    filled: torch.Tensor,
    centroids: torch.Tensor,
    dipole: bool,
    spread: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Clusters as the query centroids see them: arXiv 2509.10406 in this project's reading.

    With s_ak = q̄_a·k: L_aj = logsumexp_{k in j} s_ak, and means under w_ak = exp(s_ak - L_aj).

    Args:
        keys, values: (Y, C, m, D). filled: (Y, C, m). centroids: (Y, A, D).
        dipole, spread: Whether the last two results are asked for; None otherwise.

    Returns:
        log_mass (Y, A, C), key and value means (Y, A, C, D), the dipole (Y, A, D, D):
        M_a = Σ_j softmax_j(L_aj) Cov_j(v, k) with the unweighted covariance of each cluster, and the variance
        of the keys under w (Y, A, C, D), without gradient.
    """
    num_clusters = keys.shape[1]
    logits = matmul(centroids, keys.flatten(1, 2).transpose(1, 2))
    logits = logits.unflatten(2, (num_clusters, -1)).masked_fill(~filled[:, None], -torch.inf)
    empty = ~filled.any(-1)[:, None]
    # The logsumexp is spelled out so that an empty cluster gives no NaN in the backward pass.
    top = logits.detach().amax(-1).masked_fill(empty, 0)
    weights = (logits - top[..., None]).exp()
    mass = weights.sum(-1).masked_fill(empty, 1)
    log_mass = (top + mass.log()).masked_fill(empty, -torch.inf)
    weights = (weights / mass[..., None]).transpose(1, 2)
    key_mean, value_mean = (matmul(weights, members).transpose(1, 2) for members in (keys, values))
    tensor = variance = None
    if dipole:
        covariance = _covariance(values, keys, filled)
        tensor = matmul(log_mass.softmax(-1), covariance.flatten(2)).unflatten(2, covariance.shape[2:])
    if spread:
        square_mean = (weights.detach() @ keys.detach().square()).transpose(1, 2)
        variance = _variance(square_mean, key_mean)
    return log_mass, key_mean, value_mean, tensor, variance


def _variance(square_mean: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """E k² - (E k)², which rounding may have made negative."""
    return (square_mean - mean.detach().square()).clamp(min=0)


def _covariance(values: torch.Tensor, keys: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
    """Covariance (Y, C, D, D) of values with keys inside each cluster."""
    count = filled.sum(-1)[..., None, None].clamp(min=1).to(keys.dtype)
    values, keys = (
        (members - members.sum(2, keepdim=True) / count).masked_fill(~filled[..., None], 0)
        for members in (values, keys)
    )
    return matmul(values.transpose(-1, -2), keys) / count


def _query_centroids(
    query: torch.Tensor, query_length: torch.Tensor | None, config: MuseConfig
) -> torch.Tensor:
    """k-means centroids of each query head's queries in each block: (X, n, G * A', D)."""
    batch, groups, num_blocks, length, _ = query.shape
    points = query.transpose(1, 2).flatten(0, 2)
    if query_length is not None:
        query_length = query_length[None, :, None].expand(batch, -1, groups).flatten()
    centroids = kmeans_centroids(points, config.clusters_for(length), config.kmeans_iters, query_length)
    return centroids.unflatten(0, (batch, num_blocks, groups)).flatten(2, 3)
