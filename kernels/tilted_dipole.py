"""The dipole of tilted summaries: covariances of clusters of keys, mixed for every query centroid, and back.

    M_a = Σ_j π_aj Cov_j(v, k)      π_aj = softmax_j L_aj

Backward, dCov_j = Σ_a π_aj dM_a, and what comes through π adds π_aj (dM_a·Cov_j - dM_a·M_a), with inner
products, to the gradient of L_aj. Numbering as in `tilted_summaries`.
"""

import torch
import triton
import triton.language as tl
from muse_hf.kernels.common import load_tokens, power_of_two, wait_for_previous_kernel
from muse_hf.kernels.kmeans import Groups
from muse_hf.kernels.launch import ceil_div, launch
from muse_hf.kernels.point_sets import CLUSTERS, FIRST_PAIR, FIRST_ROW, PointSets, set_field
from muse_hf.kernels.replay import fill

# Clusters in a tile. Programs that share the mixing of matrices, and numbers mixed at once.
_TILE, _PARTS, _MIXED = 64, 8, 64


@triton.jit
def _masses(log_mass, pairs, a, j, num_centroids, num_clusters):
    """L of a tile (centroids, clusters), given where the pairs of their set begin; -inf outside."""
    exists = (a < num_centroids)[:, None] & (j < num_clusters)[None, :]
    at = log_mass + pairs + a[:, None] * num_clusters + j[None, :]
    return tl.load(at, mask=exists, other=-float("inf"))


@triton.jit
def _row_total(log_mass, pairs, a, num_centroids, num_clusters, BLOCK: tl.constexpr, ONE_TILE: tl.constexpr):
    """logsumexp_j L_aj of a tile of query centroids."""
    top = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, BLOCK if ONE_TILE else num_clusters, BLOCK):
        mass = _masses(log_mass, pairs, a, first + tl.arange(0, BLOCK), num_centroids, num_clusters)
        new_top = tl.maximum(top, tl.max(mass, 1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(mass - new_top[:, None]), 1)
        top = new_top
    return top + tl.log(tl.where(a < num_centroids, total, 1))


@triton.jit
def _shares_of_keys(log_mass, log_total, pairs, query_rows, j, a, num_centroids, num_clusters):
    """π of a tile (clusters, centroids)."""
    total = tl.load(log_total + query_rows + a, mask=a < num_centroids, other=0)
    return tl.trans(tl.exp(_masses(log_mass, pairs, a, j, num_centroids, num_clusters) - total[:, None]))


@triton.jit
def _weights(
    log_mass, log_total, total, factor, pairs, query_rows, x, y, num_centroids, num_clusters,
    TO_KEYS: tl.constexpr,
):  # fmt: skip
    """What targets x are mixed by of sources y, see `_mix_kernel`."""
    if TO_KEYS:
        share = _shares_of_keys(log_mass, log_total, pairs, query_rows, x, y, num_centroids, num_clusters)
        share *= factor[:, None]
    else:
        share = tl.exp(_masses(log_mass, pairs, x, y, num_centroids, num_clusters) - total[:, None])
    return share


@triton.jit
def _sizes_of_set(table, number, queries, head, num_pairs, MULTIPLE: tl.constexpr):
    """Numbers of clusters and of centroids, and where pairs begin: as they are multiples, loads are wide."""
    num_clusters = tl.multiple_of(set_field(table, number, CLUSTERS), MULTIPLE)
    num_centroids = tl.multiple_of(set_field(table, queries, CLUSTERS), MULTIPLE)
    pairs = head * num_pairs + set_field(table, queries, FIRST_PAIR)
    return num_clusters, num_centroids, tl.multiple_of(pairs, MULTIPLE)


@triton.jit
def _mix_kernel(
    table, log_mass, log_total, count, source, target, covariance, products,
    stride_ch, num_key_sets, num_key_rows, num_query_rows, num_pairs, tiles_of_targets,
    TO_KEYS: tl.constexpr, GROUP_HEADS: tl.constexpr, SIZE: tl.constexpr, PART: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_E: tl.constexpr, ONE_TILE: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    """Matrices of D * D = SIZE numbers mixed by π: M_a = Σ_j π_aj Cov_j, or TO_KEYS dCov_j = Σ_a π_aj dM_a.

    One program a set, query head, tile x of targets and PART of their numbers. The gradients of a covariance
    are one for each query head, and divided by its number of keys; with them come the inner products
    Cov_j·dM_a of each part. Not TO_KEYS, the logsumexp of each row of L is written too. ONE_TILE: a tile
    holds all clusters.
    """
    wait_for_previous_kernel()
    part, number, head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    queries = number + num_key_sets
    num_clusters, num_centroids, pairs = _sizes_of_set(table, number, queries, head, num_pairs, MULTIPLE)
    query_rows = head * num_query_rows + set_field(table, queries, FIRST_ROW) - num_key_rows
    key_row = set_field(table, number, FIRST_ROW)
    key_rows = head // GROUP_HEADS * num_key_rows + key_row
    begin = part // tiles_of_targets * PART
    lane = tl.arange(0, BLOCK_X)
    x = part % tiles_of_targets * BLOCK_X + lane
    total, factor = None, None
    if TO_KEYS:
        num_x, num_y = num_clusters, num_centroids
        target += (head * num_key_rows + key_row) * SIZE
        source += query_rows * SIZE
        covariance += key_rows * SIZE
        products += (part // tiles_of_targets).to(tl.int64) * tl.num_programs(2) * num_pairs + pairs
        many = tl.load(count + head // GROUP_HEADS * stride_ch + key_row + x, mask=x < num_x, other=1)
        factor = 1 / tl.maximum(many, 1).to(tl.float32)
    else:
        num_x, num_y = num_centroids, num_clusters
        target += query_rows * SIZE
        source += key_rows * SIZE
        total = _row_total(log_mass, pairs, x, num_centroids, num_clusters, BLOCK_X, ONE_TILE)
    if ONE_TILE:
        share = _weights(
            log_mass, log_total, total, factor, pairs, query_rows, x, lane, num_centroids, num_clusters,
            TO_KEYS,
        )  # fmt: skip
        share = share.to(source.dtype.element_ty)
        product = tl.zeros([BLOCK_X, BLOCK_X], tl.float32)
    for e in range(begin, tl.minimum(begin + PART, SIZE), BLOCK_E):
        if TO_KEYS:
            own = load_tokens(covariance, x, x < num_x, SIZE, SIZE, BLOCK_E, e)
        mixed = tl.zeros([BLOCK_X, BLOCK_E], tl.float32)
        for first in range(0, BLOCK_X if ONE_TILE else num_y, BLOCK_X):
            y = first + lane
            matrices = load_tokens(source, y, y < num_y, SIZE, SIZE, BLOCK_E, e)
            if not ONE_TILE:
                share = _weights(
                    log_mass, log_total, total, factor, pairs, query_rows, x, y, num_centroids, num_clusters,
                    TO_KEYS,
                )  # fmt: skip
                share = share.to(source.dtype.element_ty)
            mixed = tl.dot(share, matrices, mixed, input_precision="ieee")
            if TO_KEYS:
                at = products + x[:, None] * num_centroids + y[None, :]
                exists = (x < num_x)[:, None] & (y < num_y)[None, :]
                if not ONE_TILE:
                    product = tl.load(at, mask=exists, other=0)
                product = tl.dot(own, tl.trans(matrices), product, input_precision="ieee")
                if not ONE_TILE:
                    tl.store(at, product, mask=exists)
        numbers = e + tl.arange(0, BLOCK_E)
        at = x.to(tl.int64)[:, None] * SIZE + numbers[None, :]
        tl.store(target + at, mixed, mask=(x < num_x)[:, None] & (numbers < SIZE)[None, :])
    if TO_KEYS:
        if ONE_TILE:
            at = products + x[:, None] * num_centroids + lane[None, :]
            tl.store(at, product, mask=(x < num_x)[:, None] & (lane < num_y)[None, :])
    elif begin == 0:
        tl.store(log_total + query_rows + x, total, mask=x < num_x)


@triton.jit
def _constant_kernel(
    table, log_mass, log_total, products, constant,
    num_key_sets, num_key_rows, num_query_rows, num_pairs,
    NUM_PARTS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr, ONE_TILE: tl.constexpr,
    MULTIPLE: tl.constexpr,
):  # fmt: skip
    """Add what comes through π to the constants of a tile of query centroids."""
    wait_for_previous_kernel()
    tile, number, head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    queries = number + num_key_sets
    num_clusters, num_centroids, pairs = _sizes_of_set(table, number, queries, head, num_pairs, MULTIPLE)
    a = tile * BLOCK_A + tl.arange(0, BLOCK_A)
    query_rows = head * num_query_rows + set_field(table, queries, FIRST_ROW) - num_key_rows
    mean = tl.zeros([BLOCK_A], tl.float32)  # dM_a·M_a
    for again in tl.static_range(2):
        # Of one tile, all is loaded once.
        for first in range(0, BLOCK_C if ONE_TILE else num_clusters, BLOCK_C):
            j = first + tl.arange(0, BLOCK_C)
            share = _shares_of_keys(log_mass, log_total, pairs, query_rows, j, a, num_centroids, num_clusters)
            exists = (j < num_clusters)[:, None] & (a < num_centroids)[None, :]
            at = pairs + j[:, None] * num_centroids + a[None, :]
            product = tl.zeros([BLOCK_C, BLOCK_A], tl.float32)
            for i in tl.static_range(NUM_PARTS):
                part = i * tl.num_programs(2).to(tl.int64) * num_pairs
                product += tl.load(products + part + at, mask=exists, other=0)
            if again:
                change = tl.load(constant + at, mask=exists, other=0) + share * (product - mean[None, :])
                tl.store(constant + at, change, mask=exists)
            else:
                mean += tl.sum(share * product, 0)


def mix_covariances(
    sets: PointSets, log_mass: torch.Tensor, members: Groups, covariance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """M (H, query rows, D, D) in the dtype of the covariances, and float32 logsumexp_j L (H, query rows).

    Args:
        log_mass: (H, pairs) float32 L.
        members: Keys by cluster.
        covariance: (Hkv, key rows, D, D).
    """
    heads, head_dim = log_mass.shape[0], covariance.shape[3]
    moment = covariance.new_empty(heads, sets.num_query_rows, head_dim, head_dim)
    log_total = log_mass.new_empty(heads, sets.num_query_rows)
    # Further ahead, several tiles in float32 would not fit the 99 KiB of smaller cards.
    stages = 4 if covariance.element_size() == 2 else 2
    _mix(
        sets, log_mass, log_total, members, covariance, moment, covariance, None, TO_KEYS=False,
        num_stages=stages,
    )  # fmt: skip
    return moment, log_total


def mix_gradients(
    sets: PointSets, log_mass: torch.Tensor, log_total: torch.Tensor, members: Groups,
    covariance: torch.Tensor, grad_dipole: torch.Tensor, constant: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """dCov (H, key rows, D, D), over the number of keys of each cluster; adds to the constants (H, pairs).

    Args:
        log_total: (H, query rows), see `mix_covariances`, as for the others.
        grad_dipole: (H, query rows, D, D) dM.
    """
    heads, head_dim = log_mass.shape[0], covariance.shape[3]
    grad_covariance = covariance.new_empty(heads, sets.num_key_rows, head_dim, head_dim)
    products = log_mass.new_empty(_PARTS, *log_mass.shape)
    if sets.max_clusters > _TILE:  # several tiles add up in memory
        fill(products, 0)
    num_parts = _mix(
        sets, log_mass, log_total, members, grad_dipole, grad_covariance, covariance, products, TO_KEYS=True,
        num_stages=2,
    )  # fmt: skip
    tile, block_c = min(16, _TILE), min(_TILE, power_of_two(sets.max_clusters))
    launch(
        _constant_kernel, (ceil_div(sets.max_clusters, tile), sets.num_key_sets, heads),
        sets.table, log_mass, log_total, products, constant, sets.num_key_sets, sets.num_key_rows,
        sets.num_query_rows, sets.num_pairs, NUM_PARTS=num_parts, BLOCK_A=tile, BLOCK_C=block_c,
        ONE_TILE=sets.max_clusters <= block_c, MULTIPLE=sets.multiple,
    )  # fmt: skip
    return grad_covariance


def _mix(sets, log_mass, log_total, members, source, target, covariance, products, **flags) -> int:
    """Returns the number of parts."""
    size = covariance.shape[3] ** 2
    part = ceil_div(size, _PARTS * _MIXED) * _MIXED
    parts = ceil_div(size, part)
    tile = min(_TILE, power_of_two(sets.max_clusters))
    tiles = ceil_div(sets.max_clusters, tile)
    heads = log_mass.shape[0]
    # Four programs share a multiprocessor.
    registers = {"maxnreg": 128} if covariance.element_size() == 2 else {}
    launch(
        _mix_kernel, (parts * tiles, sets.num_key_sets, heads),
        sets.table, log_mass, log_total, members.count, source, target, covariance, products,
        members.strides()[2], sets.num_key_sets, sets.num_key_rows, sets.num_query_rows, sets.num_pairs,
        tiles, GROUP_HEADS=heads // covariance.shape[0], SIZE=size, PART=part, BLOCK_X=tile,
        BLOCK_E=_MIXED, ONE_TILE=tiles == 1, MULTIPLE=sets.multiple, **registers, **flags,
    )  # fmt: skip
    return parts
