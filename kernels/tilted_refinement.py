"""Refinement of tilted summaries: queries in groups that share a centroid, δ = q - q̄_a.

    ℓ_qj = L_aj + δ·k̃_aj      p_qj = exp(ℓ_qj - λ_q)      o_q = Σ_j p_qj ṽ_aj (+ M_a δ with the dipole)

One program goes through the queries of one centroid and head. Backward is fed with the merged output and
logsumexp, so that Σ_j p_qj is the share of the summaries in the whole attention, and dℓ = p (do·value - Δ)
with Δ = do·o. It gives the gradients of the queries and, kept in registers, those of all summaries of a.
"""

import torch
import triton
import triton.language as tl
from muse_hf.kernels.common import load_tokens, plane_of, power_of_two, store_tokens
from muse_hf.kernels.kmeans import Groups
from muse_hf.kernels.point_sets import (
    CLUSTERS,
    FIRST_PAIR,
    FIRST_POINT,
    FIRST_ROW,
    ROW,
    TARGET,
    PointSets,
    set_field,
)
from muse_hf.kernels.tilted_summaries import Summaries, SummaryGradients

# Clusters in a tile.
_TILE = 64


@triton.jit
def _offset(x, centroid_at, dims, scale, HEAD_DIM: tl.constexpr):
    """δ of a tile of queries, scaled."""
    centroid = tl.load(centroid_at + dims, mask=dims < HEAD_DIM, other=0).to(tl.float32)
    return (x.to(tl.float32) - centroid[None, :]) * scale


@triton.jit
def _forward_kernel(
    query, table, set_of_row, order, first, count, centroids, log_mass, key_mean, value_mean, dipole,
    output, lse,
    stride_qb, stride_qh, stride_qn, stride_oh, stride_on,
    num_key_sets, num_key_rows, num_rows, num_key_points, num_points, num_pairs, scale,
    DIPOLE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """ONE_TILE: a tile holds all summaries of a centroid."""
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    queries = tl.load(set_of_row + num_key_rows + row)
    centroid = head * num_rows + num_key_rows + row
    begin, many = tl.load(first + centroid), tl.load(count + centroid)
    num_clusters = set_field(table, queries - num_key_sets, CLUSTERS)
    a = num_key_rows + row - set_field(table, queries, FIRST_ROW)
    pairs = head * num_pairs + set_field(table, queries, FIRST_PAIR) + a * num_clusters
    token_of_point = set_field(table, queries, TARGET) - set_field(table, queries, FIRST_POINT)
    plane = plane_of(query, set_field(table, queries, ROW), head, stride_qb, stride_qh)
    if DIPOLE:
        matrix = dipole + (head * (num_rows - num_key_rows) + row) * HEAD_DIM * HEAD_DIM
    dims = tl.arange(0, BLOCK_D)
    j = tl.arange(0, BLOCK_C)
    if ONE_TILE:
        exists = j < num_clusters
        mass = tl.load(log_mass + pairs + j, mask=exists, other=-float("inf"))
        k = load_tokens(key_mean, pairs + j, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
        v = load_tokens(value_mean, pairs + j, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
    for q_first in range(0, many, BLOCK_Q):
        places = q_first + tl.arange(0, BLOCK_Q)
        inside = places < many
        points = tl.load(order + head * num_points + begin + places, mask=inside, other=0)
        tokens = points + token_of_point
        q = load_tokens(plane, tokens, inside, stride_qn, HEAD_DIM, BLOCK_D)
        d = _offset(q, centroids + centroid * HEAD_DIM, dims, scale, HEAD_DIM).to(q.dtype)
        top = tl.full([BLOCK_Q], -1e30, tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        o = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        for c_first in range(0, BLOCK_C if ONE_TILE else num_clusters, BLOCK_C):
            if not ONE_TILE:
                exists = c_first + j < num_clusters
                mass = tl.load(log_mass + pairs + c_first + j, mask=exists, other=-float("inf"))
                k = load_tokens(key_mean, pairs + c_first + j, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
                v = load_tokens(value_mean, pairs + c_first + j, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
            s = tl.dot(d, tl.trans(k), input_precision="ieee") + mass[None, :]
            new_top = tl.maximum(top, tl.max(s, 1))
            p = tl.exp(s - new_top[:, None])
            shrink = tl.exp(top - new_top)
            total = total * shrink + tl.sum(p, 1)
            o = o * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            top = new_top
        o = o / total[:, None]
        if DIPOLE:
            for e in range(0, HEAD_DIM, BLOCK_E):
                part = load_tokens(plane, tokens, inside, stride_qn, HEAD_DIM, BLOCK_E, e)
                part_dims = e + tl.arange(0, BLOCK_E)
                part = _offset(part, centroids + centroid * HEAD_DIM, part_dims, scale, HEAD_DIM).to(q.dtype)
                columns = load_tokens(matrix, dims, dims < HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_E, e)
                o += tl.dot(part, tl.trans(columns), input_precision="ieee")
        rows = points - num_key_points
        store_tokens(output + head * stride_oh, o, rows, inside, stride_on, HEAD_DIM, BLOCK_D)
        tl.store(lse + head * (num_points - num_key_points) + rows, top + tl.log(total), mask=inside)


@triton.jit
def _backward_kernel(
    query, grad, output, lse, table, set_of_row, order, first, count, centroids,
    log_mass, key_mean, value_mean, dipole, grad_query, grad_key_mean, grad_value_mean, constant, product,
    stride_qb, stride_qh, stride_qn, stride_gb, stride_gh, stride_gn, stride_ob, stride_oh, stride_on,
    stride_dh, stride_dn,
    num_key_sets, num_key_rows, num_rows, num_key_points, num_points, num_pairs, length, num_tokens, scale,
    DIPOLE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries of a centroid and of its summaries, but for the dipole's own."""
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    queries = tl.load(set_of_row + num_key_rows + row)
    centroid = head * num_rows + num_key_rows + row
    begin, many = tl.load(first + centroid), tl.load(count + centroid)
    num_clusters, num_centroids = (
        set_field(table, queries - num_key_sets, CLUSTERS),
        set_field(table, queries, CLUSTERS),
    )
    a = num_key_rows + row - set_field(table, queries, FIRST_ROW)
    first_pair = head * num_pairs + set_field(table, queries, FIRST_PAIR)
    pairs = first_pair + a * num_clusters
    token_of_point = set_field(table, queries, TARGET) - set_field(table, queries, FIRST_POINT)
    batch_row = set_field(table, queries, ROW)
    plane = plane_of(query, batch_row, head, stride_qb, stride_qh)
    grad_plane = plane_of(grad, batch_row, head, stride_gb, stride_gh)
    output_plane = plane_of(output, batch_row, head, stride_ob, stride_oh)
    lse += head * num_tokens + batch_row.to(tl.int64) * length
    query_row = head * (num_rows - num_key_rows) + row
    if DIPOLE:
        matrix = dipole + query_row * HEAD_DIM * HEAD_DIM
    dims = tl.arange(0, BLOCK_D)
    j = tl.arange(0, BLOCK_C)
    inner = tl.zeros([BLOCK_Q], tl.float32)
    for c_first in range(0, BLOCK_C if ONE_TILE else num_clusters, BLOCK_C):
        exists = c_first + j < num_clusters
        rows = pairs + c_first + j
        mass = tl.load(log_mass + rows, mask=exists, other=-float("inf"))
        k = load_tokens(key_mean, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
        v = load_tokens(value_mean, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
        dk = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        dmass = tl.zeros([BLOCK_C], tl.float32)
        for q_first in range(0, many, BLOCK_Q):
            places = q_first + tl.arange(0, BLOCK_Q)
            inside = places < many
            points = tl.load(order + head * num_points + begin + places, mask=inside, other=0)
            tokens = points + token_of_point
            q = load_tokens(plane, tokens, inside, stride_qn, HEAD_DIM, BLOCK_D)
            do = load_tokens(grad_plane, tokens, inside, stride_gn, HEAD_DIM, BLOCK_D)
            o = load_tokens(output_plane, tokens, inside, stride_on, HEAD_DIM, BLOCK_D)
            query_lse = tl.load(lse + tokens, mask=inside, other=float("inf"))
            wide_d = _offset(q, centroids + centroid * HEAD_DIM, dims, scale, HEAD_DIM)
            d = wide_d.to(q.dtype)
            minus_delta = -tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
            s = tl.dot(k, tl.trans(d), input_precision="ieee") + mass[:, None]
            p = tl.exp(s - query_lse[None, :])
            share = tl.sum(p, 0)
            if DIPOLE:
                pulled = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)  # M do
                for e in range(0, HEAD_DIM, BLOCK_E):
                    part = load_tokens(grad_plane, tokens, inside, stride_gn, HEAD_DIM, BLOCK_E, e)
                    part_dims = e + tl.arange(0, BLOCK_E)
                    m = load_tokens(matrix, part_dims, part_dims < HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_D)
                    pulled += tl.dot(part, m, input_precision="ieee")
                along = tl.sum(pulled * wide_d, 1)  # do·M δ
                inner += share * along
                minus_delta += along
            ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") + minus_delta[None, :])
            dmass += tl.sum(ds, 1)
            dv += tl.dot(p.to(do.dtype), do, input_precision="ieee")
            ds = ds.to(q.dtype)
            dk += tl.dot(ds, d, input_precision="ieee")
            dq = tl.dot(tl.trans(ds), k, input_precision="ieee")
            if DIPOLE:
                dq += share[:, None] * pulled
            own = grad_query + head * stride_dh
            own_rows = points - num_key_points
            dq = dq * scale
            if not ONE_TILE and c_first > 0:
                dq += load_tokens(own, own_rows, inside, stride_dn, HEAD_DIM, BLOCK_D)
            store_tokens(own, dq, own_rows, inside, stride_dn, HEAD_DIM, BLOCK_D)
        # In the precision in which they are stored, so that what the keys make of them adds up.
        dk = dk.to(k.dtype)
        dv = dv.to(k.dtype)
        store_tokens(grad_key_mean, dk, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
        store_tokens(grad_value_mean, dv, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
        dmass -= tl.sum(dk.to(tl.float32) * k.to(tl.float32) + dv.to(tl.float32) * v.to(tl.float32), 1)
        tl.store(constant + first_pair + (c_first + j) * num_centroids + a, dmass, mask=exists)
    if DIPOLE:
        tl.store(product + query_row, tl.sum(inner, 0))


@triton.jit
def _dipole_backward_kernel(
    query, grad, part_lse, lse, table, set_of_row, order, first, count, centroids, grad_dipole,
    stride_qb, stride_qh, stride_qn, stride_gb, stride_gh, stride_gn,
    num_key_sets, num_key_rows, num_rows, num_key_points, num_points, length, num_tokens, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dM_a = Σ_q share_q do δ, for BLOCK_E of its rows. The share of the summaries is exp(λ_part - λ)."""
    part, row, head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    queries = tl.load(set_of_row + num_key_rows + row)
    centroid = head * num_rows + num_key_rows + row
    begin, many = tl.load(first + centroid), tl.load(count + centroid)
    token_of_point = set_field(table, queries, TARGET) - set_field(table, queries, FIRST_POINT)
    batch_row = set_field(table, queries, ROW)
    plane = plane_of(query, batch_row, head, stride_qb, stride_qh)
    grad_plane = plane_of(grad, batch_row, head, stride_gb, stride_gh)
    lse += head * num_tokens + batch_row.to(tl.int64) * length
    part_lse += head * (num_points - num_key_points)
    dims = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    for q_first in range(0, many, BLOCK_Q):
        places = q_first + tl.arange(0, BLOCK_Q)
        inside = places < many
        points = tl.load(order + head * num_points + begin + places, mask=inside, other=0)
        tokens = points + token_of_point
        q = load_tokens(plane, tokens, inside, stride_qn, HEAD_DIM, BLOCK_D)
        do = load_tokens(grad_plane, tokens, inside, stride_gn, HEAD_DIM, BLOCK_E, part * BLOCK_E)
        share = tl.load(part_lse + points - num_key_points, mask=inside, other=0)
        share = tl.exp(share - tl.load(lse + tokens, mask=inside, other=float("inf")))
        d = _offset(q, centroids + centroid * HEAD_DIM, dims, scale, HEAD_DIM) * share[:, None]
        total += tl.dot(tl.trans(do), d.to(q.dtype), input_precision="ieee")
    own_dims = part * BLOCK_E + tl.arange(0, BLOCK_E)
    matrix = grad_dipole + (head * (num_rows - num_key_rows) + row) * HEAD_DIM * HEAD_DIM
    store_tokens(matrix, total, own_dims, own_dims < HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_D)


def refine(
    query: torch.Tensor, sets: PointSets, groups: Groups, centroids: torch.Tensor, summaries: Summaries,
    output: torch.Tensor, lse: torch.Tensor, scale: float,
) -> None:  # fmt: skip
    """Write the output of the summaries to the query points (H, points, D), any strides, and lse (H, points).

    Args:
        query: (B, H, Q, D).
    """
    sizes = (sets.num_key_sets, sets.num_key_rows, sets.num_rows, sets.num_key_points, sets.num_points)
    _forward_kernel[(sets.num_query_rows, query.shape[1])](
        query, sets.table, sets.set_of_row, *groups, centroids,
        summaries.log_mass, summaries.key_mean, summaries.value_mean, summaries.dipole, output, lse,
        *query.stride()[:3], *output.stride()[:2], *sizes, sets.num_pairs, scale,
        DIPOLE=summaries.dipole is not None, **_tiles(query, sets),
    )  # fmt: skip


def refine_backward(
    query: torch.Tensor, grad: torch.Tensor, output: torch.Tensor, lse: torch.Tensor, part_lse: torch.Tensor,
    sets: PointSets, groups: Groups, centroids: torch.Tensor, summaries: Summaries, grad_query: torch.Tensor,
    scale: float,
) -> SummaryGradients:  # fmt: skip
    """Write the gradients of the queries to their points (H, points, D), any strides; those of summaries.

    Args:
        query, grad, output: (B, H, Q, D), the latter of the merged attention.
        lse: (H, B * Q) of the merged attention. part_lse: (H, query points) of this part.
    """
    heads, length = query.shape[1:3]
    dipole = summaries.dipole is not None
    grads = SummaryGradients(
        torch.empty_like(summaries.key_mean),
        torch.empty_like(summaries.value_mean),
        torch.empty_like(summaries.log_mass),
        torch.empty_like(summaries.dipole) if dipole else None,
        torch.empty_like(summaries.log_total) if dipole else None,
    )
    tiles = _tiles(query, sets)
    num_query_rows = sets.num_query_rows
    sizes = (sets.num_key_sets, sets.num_key_rows, sets.num_rows, sets.num_key_points, sets.num_points)
    strides = *query.stride()[:3], *grad.stride()[:3]
    _backward_kernel[(num_query_rows, heads)](
        query, grad, output, lse, sets.table, sets.set_of_row, *groups, centroids,
        summaries.log_mass, summaries.key_mean, summaries.value_mean,
        summaries.dipole, grad_query, grads.key_mean, grads.value_mean, grads.constant, grads.product,
        *strides, *output.stride()[:3], *grad_query.stride()[:2], *sizes, sets.num_pairs,
        length, lse.shape[1], scale, DIPOLE=dipole, **{**tiles, "num_warps": 8},
    )  # fmt: skip
    if dipole:
        del tiles["BLOCK_C"], tiles["ONE_TILE"]
        _dipole_backward_kernel[(triton.cdiv(tiles["HEAD_DIM"], tiles["BLOCK_E"]), num_query_rows, heads)](
            query, grad, part_lse, lse, sets.table, sets.set_of_row, *groups, centroids,
            grads.dipole, *strides, *sizes, length, lse.shape[1], scale, **tiles,
        )  # fmt: skip
    return grads


def _tiles(query: torch.Tensor, sets: PointSets) -> dict[str, int]:
    head_dim = query.shape[3]
    block_d = power_of_two(head_dim)
    wide = block_d * query.element_size() > 256
    block_c = min(32 if wide else _TILE, power_of_two(sets.max_clusters))
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_Q": 32 if wide else 64,
        "BLOCK_C": block_c,
        "BLOCK_E": min(64, block_d),
        "ONE_TILE": sets.max_clusters <= block_c,
        "num_warps": 4 if block_d <= 64 else 8,
    }
