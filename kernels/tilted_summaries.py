"""Tilted summaries: every cluster of keys as every query centroid sees it, and the way back.

Forward, with s_ak = q̄_a·k: L_aj = logsumexp_{k in j} s_ak, the means k̃_aj and ṽ_aj under exp(s_ak - L_aj),
and for the dipole M_a = Σ_j π_aj Cov_j(v, k) with π_aj = softmax_j L_aj. Backward turns the gradients of
these into those of keys and values; the weights are made again. Query centroids are constants.

Rows are clusters of keys (j), numbered over all sets, or clusters of queries (a). The pairs of a set are
numbered a * C + j, and those of gradients that a cluster of keys collects j * A + a.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from muse_hf.kernels.common import (
    LOG2_E,
    gather_tokens,
    has_much_shared_memory,
    load_tokens,
    plane_of,
    power_of_two,
    store_tokens,
)
from muse_hf.kernels.launch import ceil_div, launch
from muse_hf.kernels.point_sets import (
    CAPACITY,
    CLUSTERS,
    FIRST_PAIR,
    FIRST_POINT,
    FIRST_ROW,
    FIRST_SLOT,
    ROW,
    TARGET,
    PointSets,
    set_field,
)

# Clusters in a tile. Programs that share the mixing of matrices of the dipole, and numbers mixed at once.
_TILE, _PARTS, _MIXED = 64, 8, 64


class Summaries(NamedTuple):
    """Summaries of all pairs, and of all clusters where there is a dipole.

    Attributes:
        log_mass: (H, pairs) float32 L, -inf where a cluster is empty.
        key_mean, value_mean: (H, pairs, D) in the dtype of the keys.
        covariance: (Hkv, key rows, D, D) of values with keys, or None.
        means: (2, Hkv, key rows, D) float32 plain means of the keys and of the values, or None.
        dipole: (H, query rows, D, D) M, or None.
        log_total: (H, query rows) float32 logsumexp of a row of L, or None.
    """

    log_mass: torch.Tensor
    key_mean: torch.Tensor
    value_mean: torch.Tensor
    covariance: torch.Tensor | None = None
    means: torch.Tensor | None = None
    dipole: torch.Tensor | None = None
    log_total: torch.Tensor | None = None


class SummaryGradients(NamedTuple):
    """Gradients of the summaries of all pairs.

    Attributes:
        key_mean, value_mean: (H, pairs, D) in the dtype of the keys.
        constant: (H, pairs by cluster of keys) float32 dL - dk̃·k̃ - dṽ·ṽ.
        dipole: (H, query rows, D, D) in the dtype of the keys, or None.
        product: (H, query rows) float32 the inner product of M and its gradient, or None.
    """

    key_mean: torch.Tensor
    value_mean: torch.Tensor
    constant: torch.Tensor
    dipole: torch.Tensor | None
    product: torch.Tensor | None


@triton.jit
def member_places(table, number, row, members, head, num_slots):
    """Where the members of a cluster are listed, and what makes a token of a point."""
    slot = (row - set_field(table, number, FIRST_ROW)) * set_field(table, number, CAPACITY)
    slots = members + head.to(tl.int64) * num_slots + set_field(table, number, FIRST_SLOT) + slot
    return slots, set_field(table, number, TARGET) - set_field(table, number, FIRST_POINT)


@triton.jit
def _summarise(
    keys, values, slots, held, token_of_point, q, exists, pairs, log_mass, key_mean, value_mean,
    stride_kn, stride_vn, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """Summaries of one cluster for a tile of query centroids."""
    top = tl.full([BLOCK_A], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_A], tl.float32)
    k_mean = tl.zeros([BLOCK_A, BLOCK_D], tl.float32)
    v_mean = tl.zeros([BLOCK_A, BLOCK_D], tl.float32)
    for m in range(0, held, BLOCK_M):
        places = m + tl.arange(0, BLOCK_M)
        tokens = tl.load(slots + tl.minimum(places, held - 1)) + token_of_point
        k = gather_tokens(keys, tokens, stride_kn, HEAD_DIM, BLOCK_D)
        v = gather_tokens(values, tokens, stride_vn, HEAD_DIM, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
        s = tl.where((places < held)[None, :], s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        w = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(w, 1)
        w = w.to(k.dtype)
        k_mean = tl.dot(w, k, k_mean * shrink[:, None], input_precision="ieee")
        v_mean = tl.dot(w, v, v_mean * shrink[:, None], input_precision="ieee")
        top = new_top
    inverse = tl.where(held > 0, 1 / total, 0)
    mass = tl.where(held > 0, (top + tl.log2(total)) * (1 / LOG2_E), -float("inf"))
    tl.store(log_mass + pairs, mass, mask=exists)
    store_tokens(key_mean, k_mean * inverse[:, None], pairs, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
    store_tokens(value_mean, v_mean * inverse[:, None], pairs, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)


@triton.jit
def _covary(
    keys, values, slots, held, token_of_point, first_dim, own_row, covariance, key_means, value_means,
    stride_kn, stride_vn,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Covariance of BLOCK_E dimensions of the values of one cluster with its keys, and their means."""
    product = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    k_total = tl.zeros([BLOCK_D], tl.float32)
    v_total = tl.zeros([BLOCK_E], tl.float32)
    for m in range(0, held, BLOCK_M):
        places = m + tl.arange(0, BLOCK_M)
        filled = places < held
        tokens = tl.load(slots + places, mask=filled, other=0) + token_of_point
        k = load_tokens(keys, tokens, filled, stride_kn, HEAD_DIM, BLOCK_D)
        v = load_tokens(values, tokens, filled, stride_vn, HEAD_DIM, BLOCK_E, first_dim)
        product = tl.dot(tl.trans(v), k, product, input_precision="ieee")
        k_total += tl.sum(k.to(tl.float32), 0)
        v_total += tl.sum(v.to(tl.float32), 0)
    many = tl.maximum(held, 1).to(tl.float32)
    k_mean, v_mean = k_total / many, v_total / many
    product = product / many - v_mean[:, None] * k_mean[None, :]
    dims, own_dims = tl.arange(0, BLOCK_D), first_dim + tl.arange(0, BLOCK_E)
    at = (own_row * HEAD_DIM + own_dims)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(covariance + at, product, mask=(own_dims < HEAD_DIM)[:, None] & (dims < HEAD_DIM)[None, :])
    if first_dim == 0:
        tl.store(key_means + own_row * HEAD_DIM + dims, k_mean, mask=dims < HEAD_DIM)
    tl.store(value_means + own_row * HEAD_DIM + own_dims, v_mean, mask=own_dims < HEAD_DIM)


@triton.jit
def _summary_kernel(
    key, value, table, set_of_row, members, held, centroids, log_mass, key_mean, value_mean,
    covariance, key_means, value_means,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    num_key_sets, num_key_rows, num_rows, num_slots, num_pairs, tiles_of_centroids, scale,
    DIPOLE: tl.constexpr, GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One cluster of keys: its summaries for a tile of the centroids of a query head, or its covariance."""
    row, part, kv_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    number = tl.load(set_of_row + row)
    own_row = kv_head.to(tl.int64) * num_key_rows + row
    many = tl.load(held + own_row)
    slots, token_of_point = member_places(table, number, row, members, kv_head, num_slots)
    batch_row = set_field(table, number, ROW)
    keys = plane_of(key, batch_row, kv_head, stride_kb, stride_kh)
    values = plane_of(value, batch_row, kv_head, stride_vb, stride_vh)
    if part < GROUP_HEADS * tiles_of_centroids:
        head = (kv_head * GROUP_HEADS + part // tiles_of_centroids).to(tl.int64)
        queries = number + num_key_sets
        a = part % tiles_of_centroids * BLOCK_A + tl.arange(0, BLOCK_A)
        num_centroids = set_field(table, queries, CLUSTERS)
        if part % tiles_of_centroids * BLOCK_A < num_centroids:
            exists = a < num_centroids
            centroid_rows = head * num_rows + set_field(table, queries, FIRST_ROW) + a
            q = load_tokens(centroids, centroid_rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
            pairs = head * num_pairs + set_field(table, queries, FIRST_PAIR)
            pairs += a * set_field(table, number, CLUSTERS) + row - set_field(table, number, FIRST_ROW)
            _summarise(
                keys, values, slots, many, token_of_point, q, exists, pairs, log_mass, key_mean, value_mean,
                stride_kn, stride_vn, scale, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_A,
            )  # fmt: skip
    elif DIPOLE:
        _covary(
            keys, values, slots, many, token_of_point, (part - GROUP_HEADS * tiles_of_centroids) * BLOCK_E,
            own_row, covariance, key_means, value_means, stride_kn, stride_vn,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_E,
        )  # fmt: skip


@triton.jit
def _row_total(log_mass, pairs, a, num_centroids, num_clusters, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr):
    """logsumexp_j L_aj of a tile of query centroids, given where the pairs of their set begin."""
    top = tl.full([BLOCK_A], -1e30, tl.float32)
    total = tl.zeros([BLOCK_A], tl.float32)
    for first in range(0, num_clusters, BLOCK_C):
        j = first + tl.arange(0, BLOCK_C)
        exists = (a < num_centroids)[:, None] & (j < num_clusters)[None, :]
        at = log_mass + pairs + a[:, None] * num_clusters + j[None, :]
        mass = tl.load(at, mask=exists, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(mass, 1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(mass - new_top[:, None]), 1)
        top = new_top
    return top + tl.log(tl.where(a < num_centroids, total, 1))


@triton.jit
def _shares(
    log_mass, log_total, pairs, query_rows, x, y, num_centroids, num_clusters, TO_KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """π of a tile (x, y) of (centroids, clusters), or TO_KEYS of (clusters, centroids)."""
    if TO_KEYS:
        exists = (x < num_clusters)[:, None] & (y < num_centroids)[None, :]
        at = pairs + y[None, :] * num_clusters + x[:, None]
        total = tl.load(log_total + query_rows + y, mask=y < num_centroids, other=0)[None, :]
    else:
        exists = (x < num_centroids)[:, None] & (y < num_clusters)[None, :]
        at = pairs + x[:, None] * num_clusters + y[None, :]
        total = _row_total(log_mass, pairs, x, num_centroids, num_clusters, BLOCK, BLOCK)[:, None]
    return tl.exp(tl.load(log_mass + at, mask=exists, other=-float("inf")) - total)


@triton.jit
def _mix_kernel(
    table, log_mass, log_total, held, source, target,
    num_key_sets, num_key_rows, num_query_rows, num_pairs, tiles_of_targets,
    TO_KEYS: tl.constexpr, GROUP_HEADS: tl.constexpr, SIZE: tl.constexpr, PART: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_E: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """Matrices of D * D = SIZE numbers mixed by π: M_a = Σ_j π_aj Cov_j, or TO_KEYS dCov_j = Σ_a π_aj dM_a.

    One program a set, query head, tile x of targets and PART of their numbers. The gradients of a covariance
    are one for each query head, and divided by its number of keys. Not TO_KEYS, the logsumexp of each row of
    L is written too. ONE_TILE: a tile holds all clusters.
    """
    part, number, head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    queries = number + num_key_sets
    num_clusters, num_centroids = set_field(table, number, CLUSTERS), set_field(table, queries, CLUSTERS)
    pairs = head * num_pairs + set_field(table, queries, FIRST_PAIR)
    query_rows = head * num_query_rows + set_field(table, queries, FIRST_ROW) - num_key_rows
    key_row = set_field(table, number, FIRST_ROW)
    key_rows = head // GROUP_HEADS * num_key_rows + key_row
    begin = part // tiles_of_targets * PART
    lane = tl.arange(0, BLOCK_X)
    x = part % tiles_of_targets * BLOCK_X + lane
    if TO_KEYS:
        num_x, num_y = num_clusters, num_centroids
        target += (head * num_key_rows + key_row) * SIZE
        source += query_rows * SIZE
        many = tl.load(held + key_rows + x, mask=x < num_x, other=1)
    else:
        num_x, num_y = num_centroids, num_clusters
        target += query_rows * SIZE
        source += key_rows * SIZE
        if begin == 0:
            total = _row_total(log_mass, pairs, x, num_centroids, num_clusters, BLOCK_X, BLOCK_X)
            tl.store(log_total + query_rows + x, total, mask=x < num_x)
    if ONE_TILE:
        share = _shares(
            log_mass, log_total, pairs, query_rows, x, lane, num_centroids, num_clusters, TO_KEYS, BLOCK_X
        ).to(source.dtype.element_ty)
    for e in range(begin, tl.minimum(begin + PART, SIZE), BLOCK_E):
        mixed = tl.zeros([BLOCK_X, BLOCK_E], tl.float32)
        for first in range(0, BLOCK_X if ONE_TILE else num_y, BLOCK_X):
            y = first + lane
            if not ONE_TILE:
                share = _shares(
                    log_mass,
                    log_total,
                    pairs,
                    query_rows,
                    x,
                    y,
                    num_centroids,
                    num_clusters,
                    TO_KEYS,
                    BLOCK_X,
                ).to(source.dtype.element_ty)
            matrices = load_tokens(source, y, y < num_y, SIZE, SIZE, BLOCK_E, e)
            mixed = tl.dot(share, matrices, mixed, input_precision="ieee")
        if TO_KEYS:
            mixed *= (1 / tl.maximum(many, 1).to(tl.float32))[:, None]
        numbers = e + tl.arange(0, BLOCK_E)
        at = x.to(tl.int64)[:, None] * SIZE + numbers[None, :]
        tl.store(target + at, mixed, mask=(x < num_x)[:, None] & (numbers < SIZE)[None, :])


@triton.jit
def _constant_kernel(
    table, covariance, grad_dipole, log_mass, log_total, product, constant,
    num_key_sets, num_key_rows, num_query_rows, num_pairs, tiles_of_clusters,
    GROUP_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Add what comes through π to the constants: π_aj (dM_a·Cov_j - dM_a·M_a), with inner products."""
    tile, number, head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    queries = number + num_key_sets
    num_clusters, num_centroids = set_field(table, number, CLUSTERS), set_field(table, queries, CLUSTERS)
    a = tile // tiles_of_clusters * BLOCK_X + tl.arange(0, BLOCK_X)
    j = tile % tiles_of_clusters * BLOCK_X + tl.arange(0, BLOCK_X)
    is_centroid, is_cluster = a < num_centroids, j < num_clusters
    query_rows = head * num_query_rows + set_field(table, queries, FIRST_ROW) - num_key_rows
    key_rows = head // GROUP_HEADS * num_key_rows + set_field(table, number, FIRST_ROW)
    total = tl.zeros([BLOCK_X, BLOCK_X], tl.float32)
    for e in range(0, SIZE, BLOCK_E):
        moment = load_tokens(grad_dipole + query_rows * SIZE, a, is_centroid, SIZE, SIZE, BLOCK_E, e)
        cov = load_tokens(covariance + key_rows * SIZE, j, is_cluster, SIZE, SIZE, BLOCK_E, e)
        total = tl.dot(moment, tl.trans(cov), total, input_precision="ieee")
    exists = is_centroid[:, None] & is_cluster[None, :]
    pairs = head * num_pairs + set_field(table, queries, FIRST_PAIR)
    mass = log_mass + pairs + a[:, None] * num_clusters + j[None, :]
    mass = tl.load(mass, mask=exists, other=-float("inf"))
    own = tl.load(product + query_rows + a, mask=is_centroid, other=0)
    share = tl.exp(mass - tl.load(log_total + query_rows + a, mask=is_centroid, other=0)[:, None])
    at = constant + pairs + j[None, :] * num_centroids + a[:, None]
    tl.store(at, tl.load(at, mask=exists, other=0) + share * (total - own[:, None]), mask=exists)


@triton.jit
def _load_pairs(
    centroids, grad_key_mean, grad_value_mean, log_mass, constant, centroid, pairs, j, first,
    num_clusters, num_centroids, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """A tile of query centroids and all that belongs to their pairs with cluster j. Masses are in base 2."""
    a = first + tl.arange(0, BLOCK_A)
    exists = a < num_centroids
    rows = pairs + a * num_clusters + j
    return (
        load_tokens(centroids, centroid + a, exists, HEAD_DIM, HEAD_DIM, BLOCK_D),
        load_tokens(grad_key_mean, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D),
        load_tokens(grad_value_mean, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D),
        tl.load(log_mass + rows, mask=exists, other=float("inf")) * LOG2_E,
        tl.load(constant + pairs + j * num_centroids + a, mask=exists, other=0),
    )


@triton.jit
def _key_backward_kernel(
    key, value, table, set_of_row, members, held, centroids, log_mass, grad_key_mean, grad_value_mean,
    constant, grad_covariance, key_means, value_means, grad_key, grad_value,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gkh, stride_gkn, stride_gvh, stride_gvn,
    num_key_sets, num_key_rows, num_rows, num_slots, num_pairs, scale,
    DIPOLE: tl.constexpr, GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values of one cluster, at their points.

    With the constant c_aj, dS_ak = w_ak (c_aj + dk̃_aj·k + dṽ_aj·v), then dk = Σ_a dS_ak q̄_a + w_ak dk̃_aj
    and dv = Σ_a w_ak dṽ_aj; and the share of the covariance, dCov_j (k - mean) / |j| and likewise for values.

    SINGLE: one tile holds the centroids of all query heads, and is read once.
    """
    row, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    number = tl.load(set_of_row + row)
    queries = number + num_key_sets
    own_row = kv_head * num_key_rows + row
    many = tl.load(held + own_row)
    slots, token_of_point = member_places(table, number, row, members, kv_head, num_slots)
    batch_row = set_field(table, number, ROW)
    token_of_point = token_of_point.to(tl.int64)
    keys = plane_of(key, batch_row, kv_head, stride_kb, stride_kh) + token_of_point * stride_kn
    values = plane_of(value, batch_row, kv_head, stride_vb, stride_vh) + token_of_point * stride_vn
    grad_key += kv_head * stride_gkh
    grad_value += kv_head * stride_gvh
    num_clusters, num_centroids = set_field(table, number, CLUSTERS), set_field(table, queries, CLUSTERS)
    j = row - set_field(table, number, FIRST_ROW)
    centroid = kv_head * GROUP_HEADS * num_rows + set_field(table, queries, FIRST_ROW)
    pairs = kv_head * GROUP_HEADS * num_pairs + set_field(table, queries, FIRST_PAIR)
    dims, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    if SINGLE:
        q, dk_mean, dv_mean, mass, c = _load_pairs(
            centroids, grad_key_mean, grad_value_mean, log_mass, constant, centroid, pairs, j, 0,
            num_clusters, num_centroids, HEAD_DIM, BLOCK_D, BLOCK_A,
        )  # fmt: skip
    k_start, v_start = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    if DIPOLE:
        matrix = grad_covariance + (kv_head * GROUP_HEADS * num_key_rows + row) * HEAD_DIM * HEAD_DIM
        for i in range(GROUP_HEADS):
            own = matrix + i * num_key_rows * HEAD_DIM * HEAD_DIM
            for e in range(0, HEAD_DIM, BLOCK_E):
                part_dims = e + tl.arange(0, BLOCK_E)
                exists = part_dims < HEAD_DIM
                columns = load_tokens(own, dims, dims < HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_E, e)
                mean = tl.load(key_means + own_row * HEAD_DIM + part_dims, mask=exists, other=0)
                v_start -= tl.sum(columns.to(tl.float32) * mean[None, :], 1)
                rows = load_tokens(own, part_dims, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
                mean = tl.load(value_means + own_row * HEAD_DIM + part_dims, mask=exists, other=0)
                k_start -= tl.sum(rows.to(tl.float32) * mean[:, None], 0)
        if SINGLE and BLOCK_E == BLOCK_D:
            whole = load_tokens(matrix, dims, dims < HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_D)
    for first_member in range(0, many, BLOCK_M):
        filled = first_member + lane < many
        points = tl.load(slots + first_member + lane, mask=filled, other=0)
        k = load_tokens(keys, points, filled, stride_kn, HEAD_DIM, BLOCK_D)
        v = load_tokens(values, points, filled, stride_vn, HEAD_DIM, BLOCK_D)
        dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32) + k_start[None, :]
        dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32) + v_start[None, :]
        for i in range(GROUP_HEADS):
            for first in range(0, BLOCK_A if SINGLE else num_centroids, BLOCK_A):
                if not SINGLE:
                    q, dk_mean, dv_mean, mass, c = _load_pairs(
                        centroids, grad_key_mean, grad_value_mean, log_mass, constant,
                        centroid + i * num_rows, pairs + i * num_pairs, j, first,
                        num_clusters, num_centroids, HEAD_DIM, BLOCK_D, BLOCK_A,
                    )  # fmt: skip
                s = tl.dot(k, tl.trans(q), input_precision="ieee")
                w = tl.exp2(s * (scale * LOG2_E) - mass[None, :])
                ds = tl.dot(k, tl.trans(dk_mean), input_precision="ieee")
                ds = tl.dot(v, tl.trans(dv_mean), ds, input_precision="ieee")
                ds = (w * ((ds + c[None, :]) * scale)).to(k.dtype)
                w = w.to(k.dtype)
                dk = tl.dot(ds, q, dk, input_precision="ieee")
                dk = tl.dot(w, dk_mean, dk, input_precision="ieee")
                dv = tl.dot(w, dv_mean, dv, input_precision="ieee")
        if DIPOLE:
            if SINGLE and BLOCK_E == BLOCK_D:
                dk = tl.dot(v, whole, dk, input_precision="ieee")
                dv = tl.dot(k, tl.trans(whole), dv, input_precision="ieee")
            else:
                for i in range(GROUP_HEADS):
                    own = matrix + i * num_key_rows * HEAD_DIM * HEAD_DIM
                    for e in range(0, HEAD_DIM, BLOCK_E):
                        x = load_tokens(keys, points, filled, stride_kn, HEAD_DIM, BLOCK_E, e)
                        columns = load_tokens(own, dims, dims < HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_E, e)
                        dv = tl.dot(x, tl.trans(columns), dv, input_precision="ieee")
                        x = load_tokens(values, points, filled, stride_vn, HEAD_DIM, BLOCK_E, e)
                        part_dims = e + tl.arange(0, BLOCK_E)
                        rows = load_tokens(own, part_dims, part_dims < HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_D)
                        dk = tl.dot(x, rows, dk, input_precision="ieee")
        store_tokens(grad_key, dk, points, filled, stride_gkn, HEAD_DIM, BLOCK_D)
        store_tokens(grad_value, dv, points, filled, stride_gvn, HEAD_DIM, BLOCK_D)


def summarise(
    key: torch.Tensor, value: torch.Tensor, sets: PointSets, members: torch.Tensor, held: torch.Tensor,
    centroids: torch.Tensor, scale: float, dipole: bool,
) -> Summaries:  # fmt: skip
    """Summaries of all clusters of keys for the query centroids (H, rows, D) of their sets.

    Args:
        key, value: (B, Hkv, K, D).
        members, held: (Hkv, slots) and (Hkv, key rows), see `members_with_capacity`.
        scale: Factor on the logits.
    """
    kv_heads, head_dim = key.shape[1], key.shape[3]
    heads = centroids.shape[0]
    log_mass = key.new_empty(heads, sets.num_pairs, dtype=torch.float32)
    key_mean, value_mean = (key.new_empty(heads, sets.num_pairs, head_dim) for _ in range(2))
    covariance = means = moment = log_total = None
    if dipole:
        covariance = key.new_empty(kv_heads, sets.num_key_rows, head_dim, head_dim)
        means = key.new_empty(2, kv_heads, sets.num_key_rows, head_dim, dtype=torch.float32)
        moment = key.new_empty(heads, sets.num_query_rows, head_dim, head_dim)
        log_total = key.new_empty(heads, sets.num_query_rows, dtype=torch.float32)
    both_means = (None, None) if means is None else means.unbind()
    tiles = _tiles(key, sets)
    tiles_of_centroids = ceil_div(sets.max_clusters, tiles["BLOCK_A"])
    groups = heads // kv_heads
    if key.element_size() == 2 and tiles["BLOCK_D"] > 64:
        tiles["maxnreg"] = 128  # two programs of 8 warps share a multiprocessor
    parts = groups * tiles_of_centroids + (ceil_div(head_dim, tiles["BLOCK_E"]) if dipole else 0)
    launch(
        _summary_kernel, (sets.num_key_rows, parts, kv_heads),
        key, value, sets.table, sets.set_of_row, members, held, centroids, log_mass, key_mean, value_mean,
        covariance, *both_means, *key.stride()[:3], *value.stride()[:3],
        sets.num_key_sets, sets.num_key_rows, sets.num_rows, sets.num_slots, sets.num_pairs,
        tiles_of_centroids, scale, DIPOLE=dipole, GROUP_HEADS=groups, num_stages=2, **tiles,
    )  # fmt: skip
    if dipole:
        _mix(key, sets, log_mass, log_total, held, covariance, moment, groups, TO_KEYS=False)
    return Summaries(log_mass, key_mean, value_mean, covariance, means, moment, log_total)


def summaries_backward(
    key: torch.Tensor, value: torch.Tensor, sets: PointSets, members: torch.Tensor, held: torch.Tensor,
    centroids: torch.Tensor, scale: float, summaries: Summaries, grads: SummaryGradients,
    grad_key: torch.Tensor, grad_value: torch.Tensor,
) -> None:  # fmt: skip
    """Write the gradients of keys and values to the points (Hkv, points, D) of their sets, any strides."""
    kv_heads, head_dim = key.shape[1], key.shape[3]
    heads = centroids.shape[0]
    groups = heads // kv_heads
    grad_covariance = None
    if grads.dipole is not None:
        grad_covariance = key.new_empty(heads, sets.num_key_rows, head_dim, head_dim)
        masses = (summaries.log_mass, summaries.log_total)
        _mix(key, sets, *masses, held, grads.dipole, grad_covariance, groups, TO_KEYS=True)
        tile = min(32, power_of_two(sets.max_clusters))
        tiles_of_clusters = ceil_div(sets.max_clusters, tile)
        launch(
            _constant_kernel, (tiles_of_clusters**2, sets.num_key_sets, heads),
            sets.table, summaries.covariance, grads.dipole, *masses, grads.product, grads.constant,
            sets.num_key_sets, sets.num_key_rows, sets.num_query_rows, sets.num_pairs, tiles_of_clusters,
            GROUP_HEADS=groups, SIZE=head_dim**2, BLOCK_X=tile, BLOCK_E=64,
        )  # fmt: skip
    means = (None, None) if summaries.means is None else summaries.means.unbind()
    tiles = _key_backward_tiles(key, sets)
    launch(
        _key_backward_kernel, (sets.num_key_rows, kv_heads),
        key, value, sets.table, sets.set_of_row, members, held, centroids, summaries.log_mass,
        grads.key_mean, grads.value_mean, grads.constant, grad_covariance, *means, grad_key, grad_value,
        *key.stride()[:3], *value.stride()[:3], *grad_key.stride()[:2], *grad_value.stride()[:2],
        sets.num_key_sets, sets.num_key_rows, sets.num_rows, sets.num_slots, sets.num_pairs, scale,
        DIPOLE=grad_covariance is not None, GROUP_HEADS=groups,
        SINGLE=groups == 1 and sets.max_clusters <= tiles["BLOCK_A"], **tiles,
    )  # fmt: skip


def _mix(key, sets, log_mass, log_total, held, source, target, groups, **flags):
    size = key.shape[3] ** 2
    part = ceil_div(size, _PARTS * _MIXED) * _MIXED
    tile = min(_TILE, power_of_two(sets.max_clusters))
    tiles = ceil_div(sets.max_clusters, tile)
    launch(
        _mix_kernel, (ceil_div(size, part) * tiles, sets.num_key_sets, log_mass.shape[0]),
        sets.table, log_mass, log_total, held, source, target, sets.num_key_sets, sets.num_key_rows,
        sets.num_query_rows, sets.num_pairs, tiles, GROUP_HEADS=groups, SIZE=size, PART=part, BLOCK_X=tile,
        BLOCK_E=_MIXED, ONE_TILE=tiles == 1, **flags,
    )  # fmt: skip


def _key_backward_tiles(key: torch.Tensor, sets: PointSets) -> dict[str, int]:
    tiles = _tiles(key, sets) | {"num_stages": 1}
    if key.element_size() == 2 and tiles["BLOCK_D"] <= 64:
        return tiles | {"maxnreg": 168}  # three programs share a multiprocessor
    if key.element_size() == 2 and tiles["BLOCK_D"] == 128:
        smaller = {} if has_much_shared_memory(key) else {"BLOCK_A": min(32, tiles["BLOCK_A"]), "BLOCK_E": 64}
        return tiles | {"BLOCK_M": 32} | smaller
    return tiles


def _tiles(key: torch.Tensor, sets: PointSets) -> dict[str, int]:
    head_dim = key.shape[3]
    block_d = power_of_two(head_dim)
    row_bytes = block_d * key.element_size()
    tile = min(64, max(16, (1 << 14) // row_bytes))
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": tile,
        "BLOCK_A": min(tile, _TILE, power_of_two(sets.max_clusters)),
        "BLOCK_E": min(block_d, (1 << 15) // row_bytes),
        "num_warps": 4 if block_d <= 64 else 8,
    }
