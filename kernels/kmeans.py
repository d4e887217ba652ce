"""k-means of point sets, and the counting sort of their points by cluster.

The algorithm is that of `muse_hf.reference.clustering`: evenly spaced tokens as start, nearest centroid by
Euclidean distance. No random numbers and no floating-point atomics: partial sums of chunks are added in their
order, so the same tokens always cluster alike.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from muse_hf.kernels.common import (
    gather_tokens,
    load_tokens,
    ordered,
    plane_of,
    power_of_two,
    wait_for_previous_kernel,
)
from muse_hf.kernels.launch import ceil_div, launch
from muse_hf.kernels.point_sets import (
    CHUNK_BEGIN,
    CHUNK_END,
    CHUNK_POINT,
    CHUNK_ROW,
    CHUNK_SET,
    CLUSTERS,
    FIRST_COUNT,
    FIRST_POINT,
    FIRST_ROW,
    FIRST_SUM,
    IS_QUERY,
    LENGTH,
    NUM_COUNTS,
    NUM_SUMS,
    ROW,
    START,
    TARGET,
    PointSets,
    chunk_field,
    set_field,
)
from muse_hf.kernels.replay import fill

# Centroids in a tile, and points that are put in their places at once.
_LARGEST_TILE, _SORT_TILE = 64, 256
# Partial results of chunks that are loaded together.
_TOGETHER = tl.constexpr(4)


class Groups(NamedTuple):
    """Points sorted by cluster.

    Attributes:
        order: (H, places) int32 the points of each set by cluster, and in their order within a cluster.
        first: (H, rows) int32 where in `order` a cluster begins, or (1, rows) if heads do not differ in it.
        count: (H, rows) int32 how many points a cluster has.
    """

    order: torch.Tensor
    first: torch.Tensor
    count: torch.Tensor

    def strides(self) -> tuple[int, int, int]:
        """From head to head."""
        return tuple(tensor.stride(0) if tensor.shape[0] > 1 else 0 for tensor in self)


@triton.jit
def tokens_of(
    query, key, table, number, head,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
):  # fmt: skip
    """Where the tokens of a set's batch row begin, and the distance between tokens."""
    is_query = set_field(table, number, IS_QUERY) == 1
    row = set_field(table, number, ROW)
    plane = tl.where(
        is_query,
        plane_of(query, row, head, stride_qb, stride_qh),
        plane_of(key, row, head, stride_kb, stride_kh),
    )
    return plane, tl.where(is_query, stride_qn, stride_kn)


@triton.jit
def _has_head(table, number, head, key_heads):
    return (head < key_heads) | (set_field(table, number, IS_QUERY) == 1)


@triton.jit
def _load_centroids(
    centroids, plane, stride, table, number, head, first, num_rows,
    START_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of centroids and minus half their squares. START_TOKENS: those that k-means starts from."""
    num_clusters = set_field(table, number, CLUSTERS)
    clusters = first + tl.arange(0, BLOCK_C)
    exists = clusters < num_clusters
    if START_TOKENS:
        spacing = clusters.to(tl.int64) * set_field(table, number, LENGTH) // num_clusters
        c = load_tokens(plane, set_field(table, number, START) + spacing, exists, stride, HEAD_DIM, BLOCK_D)
    else:
        rows = head.to(tl.int64) * num_rows + set_field(table, number, FIRST_ROW) + clusters
        c = load_tokens(centroids, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
    wide = c.to(tl.float32)
    return c, tl.where(exists, -0.5 * tl.sum(wide * wide, 1), -float("inf"))


@triton.jit
def nearer(x, c, bias, first, best, label):
    """The best affinity x·c - |c|²/2 and its cluster, after one more tile of centroids."""
    affinity = tl.dot(x, tl.trans(c), input_precision="ieee") + bias[None, :]
    top, at = tl.max(affinity, 1, return_indices=True)
    return tl.maximum(best, top), tl.where(top > best, first + at, label)


@triton.jit
def _sums_kernel(
    query, key, table, chunks, centroids, label, sums, counts,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    key_heads, num_rows, num_points, num_sums,
    START_TOKENS: tl.constexpr, LABELLED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums and counts of the points of a chunk in each of a tile of clusters.

    LABELLED: the points have their labels. Otherwise the tile holds all clusters, and they are made here.
    """
    wait_for_previous_kernel()
    chunk, tile, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    number = chunk_field(chunks, chunk, CHUNK_SET)
    num_clusters = set_field(table, number, CLUSTERS)
    if _has_head(table, number, head, key_heads) & (tile * BLOCK_C < num_clusters):
        plane, stride = tokens_of(
            query, key, table, number, head,
            stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
        )  # fmt: skip
        begin, end = chunk_field(chunks, chunk, CHUNK_BEGIN), chunk_field(chunks, chunk, CHUNK_END)
        clusters = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        if LABELLED:
            labels = label + head.to(tl.int64) * num_points + chunk_field(chunks, chunk, CHUNK_POINT) - begin
        else:
            c, bias = _load_centroids(
                centroids, plane, stride, table, number, head, 0, num_rows,
                START_TOKENS, HEAD_DIM, BLOCK_D, BLOCK_C,
            )  # fmt: skip
        total = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        count = tl.zeros([BLOCK_C, 16], tl.float32)  # in 16 equal columns: as a product it needs no reduction
        for first in range(begin, end, BLOCK_N):
            tokens = first + tl.arange(0, BLOCK_N)
            x = gather_tokens(plane, tl.minimum(tokens, end - 1), stride, HEAD_DIM, BLOCK_D)
            if LABELLED:
                chosen_by = tl.load(labels + tokens, mask=tokens < end, other=-1)
            else:
                nothing = tl.full([BLOCK_N], -float("inf"), tl.float32)
                _, chosen_by = nearer(x, c, bias, 0, nothing, tl.zeros([BLOCK_N], tl.int32))
                chosen_by = tl.where(tokens < end, chosen_by, -1)
            chosen = (chosen_by[None, :] == clusters[:, None]).to(x.dtype)
            total = tl.dot(chosen, x, total, input_precision="ieee")
            count = tl.dot(chosen, tl.full([BLOCK_N, 16], 1, x.dtype), count, input_precision="ieee")
        exists = clusters < num_clusters
        rows = head.to(tl.int64) * num_sums + chunk_field(chunks, chunk, CHUNK_ROW) + clusters
        dims = tl.arange(0, BLOCK_D)
        at = rows[:, None] * HEAD_DIM + dims[None, :]
        tl.store(sums + at, total, mask=exists[:, None] & (dims < HEAD_DIM)[None, :])
        tl.store(counts + rows, tl.max(count, 1).to(tl.int32), mask=exists)


@triton.jit
def _means_kernel(
    query, key, table, centroids, sums, counts,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, key_heads, num_rows, num_sums,
    START_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add up the chunks of a set, for a tile of clusters. A cluster without points keeps its centroid."""
    wait_for_previous_kernel()
    number, tile, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_clusters = set_field(table, number, CLUSTERS)
    if _has_head(table, number, head, key_heads) & (tile * BLOCK_C < num_clusters):
        plane, stride = tokens_of(
            query, key, table, number, head,
            stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
        )  # fmt: skip
        clusters = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        exists = clusters < num_clusters
        c, _ = _load_centroids(
            centroids, plane, stride, table, number, head, tile * BLOCK_C, num_rows,
            START_TOKENS, HEAD_DIM, BLOCK_D, BLOCK_C,
        )  # fmt: skip
        total = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        count = tl.zeros([BLOCK_C], tl.int32)
        rows = head.to(tl.int64) * num_sums + set_field(table, number, FIRST_SUM) + clusters
        num_chunks = set_field(table, number, NUM_SUMS)
        for done in range(0, num_chunks, _TOGETHER):
            for i in tl.static_range(_TOGETHER):  # loads that are under way together
                inside = clusters < tl.where(done + i < num_chunks, num_clusters, 0)
                total += load_tokens(sums, rows, inside, HEAD_DIM, HEAD_DIM, BLOCK_D)
                count += tl.load(counts + rows, mask=inside, other=0)
                rows += num_clusters
        mean = total / tl.maximum(count, 1).to(tl.float32)[:, None]
        mean = tl.where((count > 0)[:, None], mean.to(c.dtype), c)
        dims = tl.arange(0, BLOCK_D)
        at = head.to(tl.int64) * num_rows + set_field(table, number, FIRST_ROW) + clusters
        at = centroids + at[:, None] * HEAD_DIM + dims[None, :]
        tl.store(at, mean, mask=exists[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit
def _assign_kernel(
    query, key, table, chunks, centroids, label, near, rank, counts,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    key_heads, num_rows, num_points, num_counts,
    START_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, ONE_TILE: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Label each point of a chunk with its nearest centroid, and rank it among those of its label.

    ONE_TILE: a tile holds all centroids. Closeness -|x - c|²/2 is written for keys, if at all, and counts of
    labels with ranks.
    """
    wait_for_previous_kernel()
    chunk, head = tl.program_id(0), tl.program_id(1)
    number = chunk_field(chunks, chunk, CHUNK_SET)
    if _has_head(table, number, head, key_heads):
        plane, stride = tokens_of(
            query, key, table, number, head,
            stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
        )  # fmt: skip
        num_clusters = set_field(table, number, CLUSTERS)
        is_key = set_field(table, number, IS_QUERY) == 0
        begin, end = chunk_field(chunks, chunk, CHUNK_BEGIN), chunk_field(chunks, chunk, CHUNK_END)
        first_point = head.to(tl.int64) * num_points + chunk_field(chunks, chunk, CHUNK_POINT) - begin
        running = tl.zeros([BINS], tl.int32)
        if ONE_TILE:
            c, bias = _load_centroids(
                centroids, plane, stride, table, number, head, 0, num_rows,
                START_TOKENS, HEAD_DIM, BLOCK_D, BLOCK_C,
            )  # fmt: skip
        lane = tl.arange(0, BLOCK_N)
        for first_token in range(begin, end, BLOCK_N):
            tokens = first_token + lane
            inside = tokens < end
            x = load_tokens(plane, tokens, inside, stride, HEAD_DIM, BLOCK_D)
            best = tl.full([BLOCK_N], -float("inf"), tl.float32)
            labels = tl.zeros([BLOCK_N], tl.int32)
            for first in range(0, BLOCK_C if ONE_TILE else num_clusters, BLOCK_C):
                if not ONE_TILE:
                    c, bias = _load_centroids(
                        centroids, plane, stride, table, number, head, first, num_rows,
                        START_TOKENS, HEAD_DIM, BLOCK_D, BLOCK_C,
                    )  # fmt: skip
                best, labels = nearer(x, c, bias, first, best, labels)
            labels = tl.minimum(labels, num_clusters - 1)  # whatever NaN chose, it exists
            points = first_point + tokens
            tl.store(label + points, labels, mask=inside)
            if rank is not None:
                before = (labels[:, None] == labels[None, :]) & (lane[None, :] < lane[:, None])
                ranks = tl.gather(running, labels, 0) + tl.sum(before.to(tl.int32), 1)
                running += tl.histogram(labels, BINS, mask=inside)
                tl.store(rank + points, ranks, mask=inside)
            if near is not None and is_key:
                wide = x.to(tl.float32)
                closeness = ordered(best - 0.5 * tl.sum(wide * wide, 1)).to(tl.int32, bitcast=True)
                tl.store(near + points, closeness, mask=inside)
        if rank is not None:
            bins = tl.arange(0, BINS)
            at = head.to(tl.int64) * num_counts + chunk_field(chunks, chunk, CHUNK_ROW) + bins
            tl.store(counts + at, running, mask=bins < num_clusters)


@triton.jit
def _sort_kernel(
    table, chunks, label, near, rank, counts, order, near_sorted, first, count,
    key_heads, num_rows, num_points, num_counts, BLOCK_N: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Put the points of a chunk in their places: behind smaller labels, earlier chunks and smaller ranks."""
    wait_for_previous_kernel()
    chunk, head = tl.program_id(0), tl.program_id(1)
    number = chunk_field(chunks, chunk, CHUNK_SET)
    if _has_head(table, number, head, key_heads):
        num_clusters = set_field(table, number, CLUSTERS)
        own_row = chunk_field(chunks, chunk, CHUNK_ROW)
        bins = tl.arange(0, BINS)
        exists = bins < num_clusters
        row = set_field(table, number, FIRST_COUNT)
        earlier, total = tl.zeros([BINS], tl.int32), tl.zeros([BINS], tl.int32)
        num_chunks = set_field(table, number, NUM_COUNTS)
        for done in range(0, num_chunks, _TOGETHER):
            for i in tl.static_range(_TOGETHER):
                inside = bins < tl.where(done + i < num_chunks, num_clusters, 0)
                many = tl.load(counts + head.to(tl.int64) * num_counts + row + bins, mask=inside, other=0)
                earlier += tl.where(row < own_row, many, 0)
                total += many
                row += num_clusters
        first_point = set_field(table, number, FIRST_POINT)
        starts = first_point + tl.cumsum(total, 0) - total
        begin, end = chunk_field(chunks, chunk, CHUNK_BEGIN), chunk_field(chunks, chunk, CHUNK_END)
        if begin == set_field(table, number, TARGET):
            rows = head.to(tl.int64) * num_rows + set_field(table, number, FIRST_ROW) + bins
            tl.store(first + rows, starts, mask=exists)
            tl.store(count + rows, total, mask=exists)
        starts += earlier
        head_points = head.to(tl.int64) * num_points
        is_key = set_field(table, number, IS_QUERY) == 0
        own_point = chunk_field(chunks, chunk, CHUNK_POINT)
        for i in range(0, end - begin, BLOCK_N):
            places = i + tl.arange(0, BLOCK_N)
            inside = places < end - begin
            points = own_point + places
            labels = tl.load(label + head_points + points, mask=inside, other=0)
            ranks = tl.load(rank + head_points + points, mask=inside, other=0)
            at = head_points + tl.gather(starts, labels, 0) + ranks
            tl.store(order + at, points, mask=inside)
            if near is not None and is_key:
                closeness = tl.load(near + head_points + points, mask=inside, other=0)
                tl.store(near_sorted + at, closeness, mask=inside)


def kmeans(query: torch.Tensor, key: torch.Tensor, sets: PointSets, iters: int) -> torch.Tensor:
    """Centroids (H, rows, D) in the dtype of the tokens, those of keys for the first Hkv heads only.

    Args:
        query: (B, H, Q, D). key: (B, Hkv, K, D). Any strides but 1 in the last dimension.
    """
    heads, head_dim = query.shape[1], query.shape[3]
    tiles = _tiles(query, sets)
    one_tile, block_c = sets.max_clusters <= tiles["BLOCK_C"], min(16, tiles["BLOCK_C"])
    # A fourth or a third program on a multiprocessor is worth registers spilled outside of the loop.
    registers = {"maxnreg": 128 if tiles["BLOCK_D"] <= 64 else 168} if query.element_size() == 2 else {}
    dims = {name: tiles[name] for name in ("HEAD_DIM", "BLOCK_D")}
    strides = *query.stride()[:3], *key.stride()[:3]
    centroids = query.new_empty(heads, sets.num_rows, head_dim)
    sums = query.new_empty(heads, sets.num_sums, head_dim, dtype=torch.float32)
    counts = query.new_empty(heads, sets.num_sums, dtype=torch.int32)
    if not iters:  # there is nothing to add up, and every cluster keeps the token it starts from
        fill(sums, 0)
        fill(counts, 0)
    label = None if one_tile or not iters else counts.new_empty(heads, sets.num_source_points)
    for step in range(max(1, iters)):
        start = {"START_TOKENS": step == 0}
        if iters:
            if not one_tile:
                _assign(query, key, sets, sets.sources, centroids, label, **start)
            launch(
                _sums_kernel, (sets.sources.shape[0], ceil_div(sets.max_clusters, tiles["BLOCK_C"]), heads),
                query, key, sets.table, sets.sources, centroids, label, sums, counts, *strides, key.shape[1],
                sets.num_rows, sets.num_source_points, sets.num_sums,
                LABELLED=not one_tile, **start, **tiles, **registers, num_stages=3,
            )  # fmt: skip
        launch(
            _means_kernel, (sets.table.shape[0], ceil_div(sets.max_clusters, block_c), heads),
            query, key, sets.table, centroids, sums, counts, *strides, key.shape[1],
            sets.num_rows, sets.num_sums, **start, **dims, BLOCK_C=block_c,
        )  # fmt: skip
    return centroids


def sort_by_cluster(
    query: torch.Tensor, key: torch.Tensor, sets: PointSets, centroids: torch.Tensor, closeness: bool = True
) -> tuple[Groups, torch.Tensor, torch.Tensor | None]:
    """Assign all points to their nearest centroids (H, rows, D) and sort them by cluster.

    Returns:
        The groups; the label (H, points) int32 of each point, the cluster counted from the first of its set;
        and with `closeness` how near it is to its centroid (H, points) int32, the bits of a uint32 that is
        the larger the nearer. This is in the order of the groups and for keys only.
    """
    label, rank = (query.new_empty(query.shape[1], sets.num_points, dtype=torch.int32) for _ in range(2))
    near = torch.empty_like(label) if closeness else None
    counts = label.new_empty(query.shape[1], sets.num_counts)
    _assign(query, key, sets, sets.targets, centroids, label, near, rank, counts, START_TOKENS=False)
    order, near_sorted = torch.empty_like(label), None if near is None else torch.empty_like(near)
    first, count = (label.new_empty(query.shape[1], sets.num_rows) for _ in range(2))
    launch(
        _sort_kernel, (sets.targets.shape[0], query.shape[1]),
        sets.table, sets.targets, label, near, rank, counts, order, near_sorted, first, count,
        key.shape[1], sets.num_rows, sets.num_points, sets.num_counts,
        BLOCK_N=_SORT_TILE, BINS=power_of_two(sets.max_clusters),
    )  # fmt: skip
    return Groups(order, first, count), label, near_sorted


def _assign(query, key, sets, chunks, centroids, label, near=None, rank=None, counts=None, **flags):
    """Write label, closeness and rank (H, points) of the points of chunks, and counts (H, num_counts)."""
    tiles = _tiles(query, sets)
    launch(
        _assign_kernel, (chunks.shape[0], query.shape[1]),
        query, key, sets.table, chunks, centroids, label, near, rank, counts,
        *query.stride()[:3], *key.stride()[:3], key.shape[1], sets.num_rows, label.shape[1], sets.num_counts,
        ONE_TILE=sets.max_clusters <= tiles["BLOCK_C"], BINS=power_of_two(sets.max_clusters),
        **flags, **tiles,
    )  # fmt: skip


def _tiles(query: torch.Tensor, sets: PointSets) -> dict[str, int]:
    head_dim = query.shape[3]
    block_d = power_of_two(head_dim)
    row_bytes = block_d * query.element_size()
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_N": min(64, max(16, (1 << 14) // row_bytes)),
        "BLOCK_C": min(_LARGEST_TILE, max(16, (1 << 15) // row_bytes), power_of_two(sets.max_clusters)),
        "num_warps": 4 if row_bytes <= 256 else 8,
    }
