"""Clustering of key blocks: k-means, capacity, and the members of each cluster with their means.

The algorithm is that of `muse_hf.reference.clustering`. A key block of one key/value head is a *problem* of s
points and C clusters. No random numbers and no floating-point atomics: the same keys always cluster alike.

A point's label is -1 while it is homeless, c once it has chosen cluster c, and c + C once c has accepted it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from muse_hf.kernels.common import largest, load_rows, ordered, power_of_two

CAPACITY_ROUNDS = 4
# Rows behind the last summary that a tile of summaries may read.
PADDING = 128
# Leading bits of a closeness that tell nearer from farther when a cluster is full.
_BITS = tl.constexpr(20)


class Clusters(NamedTuple):
    """Clusters of all key blocks: J = F * C of at most m keys for each of Hkv key/value heads.

    Attributes:
        members: (Hkv, J, m) int32 token ids, -1 where there is none.
        count: (Hkv, J) int32 number of members.
        log_mass: (Hkv, J) float32 log of the count, -inf if empty.
        key_mean, value_mean: (Hkv, J, D) in the dtype of the keys.
        key_variance: (Hkv, J, D) variance of the keys around their mean, bfloat16 for inputs of 16 bits.

    The last four have PADDING more entries behind the last, so that tiles need no masks to read beyond it.
    """

    members: torch.Tensor
    count: torch.Tensor
    log_mass: torch.Tensor
    key_mean: torch.Tensor
    value_mean: torch.Tensor
    key_variance: torch.Tensor


@triton.jit
def _choose_kernel(
    key, key_start, centroids, room, label, closeness,
    stride_b, stride_h, stride_n, length, size, num_clusters,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """Homeless points choose their nearest cluster with room. One program a tile of points.

    FIRST: every point is homeless and every cluster has room.
    """
    block, tile, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    problem = (head * tl.num_programs(0) + block).to(tl.int64)
    points = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = points < size
    labels = label + problem * size + points
    homeless = inside
    if not FIRST:
        homeless = inside & (tl.load(labels, mask=inside, other=0) < 0)
    if tl.max(homeless.to(tl.int32), 0) > 0:
        x = load_rows(
            key, tl.load(key_start + block) + points, inside, head, stride_b, stride_h, stride_n, length,
            HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        best = tl.full([BLOCK_N], -float("inf"), tl.float32)
        choice = tl.zeros([BLOCK_N], tl.int32)
        dims = tl.arange(0, BLOCK_D)
        for first in range(0, num_clusters, BLOCK_C):
            clusters = first + tl.arange(0, BLOCK_C)
            exists = clusters < num_clusters
            c = tl.load(
                centroids + (problem * num_clusters + clusters)[:, None] * HEAD_DIM + dims[None, :],
                mask=exists[:, None] & (dims < HEAD_DIM)[None, :],
                other=0,
            )
            is_open = exists
            if not FIRST:
                is_open = tl.load(room + problem * num_clusters + clusters, mask=exists, other=0) > 0
            bias = tl.where(is_open, -0.5 * tl.sum(c * c, 1), -float("inf"))
            affinity = tl.dot(x, tl.trans(c.to(x.dtype)), input_precision="ieee") + bias[None, :]
            top, at = tl.max(affinity, 1, return_indices=True)
            choice = tl.where(top > best, first + at, choice)
            best = tl.maximum(best, top)
        wide = x.to(tl.float32)
        tl.store(labels, choice, mask=homeless)
        near = best - 0.5 * tl.sum(wide * wide, 1)
        tl.store(closeness + problem * size + points, near, mask=homeless)


@triton.jit
def _means_kernel(
    key, key_start, centroids, label, stride_b, stride_h, stride_n, length, size, num_clusters,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Move the centroids to the means of the points that chose them. One program a tile of clusters."""
    block, tile, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    problem = (head * tl.num_programs(0) + block).to(tl.int64)
    clusters = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    count = tl.zeros([BLOCK_C], tl.float32)
    start = tl.load(key_start + block)
    for first in range(0, size, BLOCK_N):
        points = first + tl.arange(0, BLOCK_N)
        inside = points < size
        x = load_rows(
            key, start + points, inside, head, stride_b, stride_h, stride_n, length, HEAD_DIM, BLOCK_D
        )
        labels = tl.load(label + problem * size + points, mask=inside, other=-1)
        chosen = labels[None, :] == clusters[:, None]
        total += tl.dot(chosen.to(x.dtype), x, input_precision="ieee")
        count += tl.sum(chosen.to(tl.float32), 1)
    dims = tl.arange(0, BLOCK_D)
    at = centroids + (problem * num_clusters + clusters)[:, None] * HEAD_DIM + dims[None, :]
    filled = (clusters < num_clusters) & (count > 0)
    mean = total / tl.maximum(count, 1)[:, None]
    tl.store(at, mean, mask=filled[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit
def _accept_kernel(label, closeness, room, size, num_clusters, BLOCK_N: tl.constexpr):
    """A cluster accepts the nearest points that chose it, as many as it has room for; others are homeless.

    One program a cluster. It owns the labels of the points that chose it, so programs do not interfere.
    """
    block, cluster, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    problem = (head * tl.num_programs(0) + block).to(tl.int64)
    place = room + problem * num_clusters + cluster
    left = tl.load(place)
    points = tl.arange(0, BLOCK_N)
    inside = points < size
    labels = label + problem * size + points
    asks = inside & (tl.load(labels, mask=inside, other=-1) == cluster)
    count = tl.sum(asks.to(tl.int32), 0)
    tl.debug_barrier()  # no label may change before every thread has read its own
    if count == 0:
        return
    if count <= left:
        tl.store(labels, tl.full([BLOCK_N], 0, tl.int32) + cluster + num_clusters, mask=asks)
        tl.store(place, left - count)
    else:
        near = tl.load(closeness + problem * size + points, mask=asks, other=0)
        keys = tl.where(asks, ordered(near) >> (32 - _BITS), 0)
        accepted = largest(keys, left, _BITS)
        tl.store(labels, tl.where(accepted, cluster + num_clusters, -1), mask=asks)
        tl.store(place, 0)


@triton.jit
def _settle_kernel(label, room, size, num_clusters, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Points that are still homeless take the free places in order. One program a problem."""
    problem = tl.program_id(0).to(tl.int64)
    clusters = tl.arange(0, BLOCK_C)
    free = tl.load(room + problem * num_clusters + clusters, mask=clusters < num_clusters, other=0)
    free_through = tl.cumsum(free, 0)
    before = 0
    for first in range(0, size, BLOCK_N):
        points = first + tl.arange(0, BLOCK_N)
        labels = label + problem * size + points
        homeless = tl.load(labels, mask=points < size, other=0) < 0
        many = tl.sum(homeless.to(tl.int32), 0)
        if many > 0:
            order = before + tl.cumsum(homeless.to(tl.int32), 0) - 1
            at = tl.sum((free_through[None, :] <= order[:, None]).to(tl.int32), 1)
            tl.store(labels, at + num_clusters, mask=homeless)
        before += many


@triton.jit
def _collect_kernel(
    key, value, key_start, label, members, count, log_mass, key_mean, value_mean, key_variance,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, length, size, num_clusters, capacity,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write down a cluster's members in order and their means. One program a cluster."""
    block, cluster, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    problem = (head * tl.num_programs(0) + block).to(tl.int64)
    start = tl.load(key_start + block)
    row = problem * num_clusters + cluster
    held = 0
    for first in range(0, size, BLOCK_N):
        points = first + tl.arange(0, BLOCK_N)
        inside = points < size
        labels = tl.load(label + problem * size + points, mask=inside, other=-1)
        mine = labels == cluster + num_clusters
        place = held + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(members + row * capacity + place, start + points, mask=mine & (place < capacity))
        held += tl.sum(mine.to(tl.int32), 0)
    tl.store(count + row, held)
    tl.store(log_mass + row, tl.where(held > 0, tl.log(held.to(tl.float32)), -float("inf")))
    tl.debug_barrier()
    places = tl.arange(0, BLOCK_M)
    filled = places < held
    tokens = tl.load(members + row * capacity + places, mask=filled, other=0)
    dims = tl.arange(0, BLOCK_D)
    many = tl.maximum(held, 1).to(tl.float32)
    k = load_rows(key, tokens, filled, head, stride_kb, stride_kh, stride_kn, length, HEAD_DIM, BLOCK_D)
    k = k.to(tl.float32)
    mean = tl.sum(k, 0) / many
    from_mean = tl.where(filled[:, None], k - mean[None, :], 0)
    variance = tl.sum(from_mean * from_mean, 0) / many
    tl.store(key_mean + row * HEAD_DIM + dims, mean, mask=dims < HEAD_DIM)
    tl.store(key_variance + row * HEAD_DIM + dims, variance, mask=dims < HEAD_DIM)
    v = load_rows(value, tokens, filled, head, stride_vb, stride_vh, stride_vn, length, HEAD_DIM, BLOCK_D)
    tl.store(value_mean + row * HEAD_DIM + dims, tl.sum(v.to(tl.float32), 0) / many, mask=dims < HEAD_DIM)


def cluster_keys(
    key: torch.Tensor, value: torch.Tensor, key_start: torch.Tensor,
    size: int, num_clusters: int, capacity: int, iters: int,
) -> Clusters:  # fmt: skip
    """Cluster the key blocks of `size` tokens that begin at token ids `key_start` (F,).

    Args:
        key, value: (B, Hkv, N, D), any strides but 1 in the last dimension.
    """
    _, heads, length, head_dim = key.shape
    blocks, device = key_start.shape[0], key.device
    problems = heads * blocks
    label = torch.empty(problems, size, dtype=torch.int32, device=device)
    closeness = torch.empty(problems, size, dtype=torch.float32, device=device)
    room = torch.full((problems, num_clusters), capacity, dtype=torch.int32, device=device)
    dims = {"HEAD_DIM": head_dim, "BLOCK_D": power_of_two(head_dim)}
    tiles = {"BLOCK_N": min(128, power_of_two(size)), "BLOCK_C": min(64, power_of_two(num_clusters))}
    strides = key.stride()[:3]

    first = (torch.arange(num_clusters, device=device) * size) // num_clusters
    tokens = (key_start[:, None] + first).flatten().long()
    centroids = key[tokens // length, :, tokens % length]
    centroids = centroids.unflatten(0, (blocks, num_clusters)).permute(2, 0, 1, 3).float().contiguous()

    def choose(**flags) -> None:
        grid = (blocks, triton.cdiv(size, tiles["BLOCK_N"]), heads)
        _choose_kernel[grid](
            key, key_start, centroids, room, label, closeness, *strides, length, size, num_clusters,
            **dims, **tiles, **flags,
        )  # fmt: skip

    choose(FIRST=True)
    for _ in range(iters):
        _means_kernel[(blocks, triton.cdiv(num_clusters, tiles["BLOCK_C"]), heads)](
            key, key_start, centroids, label, *strides, length, size, num_clusters, **dims, **tiles
        )
        choose(FIRST=True)
    for number in range(CAPACITY_ROUNDS):
        if number:
            choose(FIRST=False)
        _accept_kernel[(blocks, num_clusters, heads)](
            label,
            closeness,
            room,
            size,
            num_clusters,
            BLOCK_N=power_of_two(size),
            num_warps=max(1, power_of_two(size) // 1024),
        )
    _settle_kernel[(problems,)](
        label, room, size, num_clusters, BLOCK_N=64, BLOCK_C=power_of_two(num_clusters)
    )
    members = torch.full((heads, blocks * num_clusters, capacity), -1, dtype=torch.int32, device=device)
    count = torch.empty(heads, blocks * num_clusters, dtype=torch.int32, device=device)
    log_mass = _padded(heads, blocks * num_clusters, dtype=torch.float32, device=device)
    spread = torch.float32 if key.dtype == torch.float32 else torch.bfloat16  # float16 would overflow
    key_mean, value_mean, key_variance = (
        _padded(heads, blocks * num_clusters, head_dim, dtype=dtype, device=device)
        for dtype in (key.dtype, key.dtype, spread)
    )
    _collect_kernel[(blocks, num_clusters, heads)](
        key, value, key_start, label, members, count, log_mass, key_mean, value_mean, key_variance,
        *strides, *value.stride()[:3],
        length, size, num_clusters, capacity,
        **dims, BLOCK_N=min(1024, power_of_two(size)), BLOCK_M=power_of_two(capacity),
    )  # fmt: skip
    return Clusters(members, count, log_mass, key_mean, value_mean, key_variance)


def _padded(heads: int, rows: int, *width: int, **options) -> torch.Tensor:
    """Zeros (heads, rows, *width) followed in memory by PADDING more rows of zeros."""
    flat = torch.zeros(heads * rows + PADDING, *width, **options)
    return flat[: heads * rows].unflatten(0, (heads, rows))
