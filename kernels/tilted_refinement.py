"""Refinement of tilted summaries: queries in groups that share a centroid, δ = q - q̄_a.

    ℓ_qj = L_aj + δ·k̃_aj      p_qj = exp(ℓ_qj - λ_q)      o_q = Σ_j p_qj ṽ_aj (+ M_a δ with the dipole)

One program goes through the queries of one centroid and head. Backward is fed with the merged output and
logsumexp, so that Σ_j p_qj is the share of the summaries in the whole attention, and dℓ = p (do·value - Δ)
with Δ = do·o. It gives the gradients of the queries and, kept in registers, those of all summaries of a.
"""

import torch
import triton
import triton.language as tl
from muse_hf.kernels.common import LOG2_E, load_tokens, plane_of, power_of_two, store_tokens
from muse_hf.kernels.kmeans import Groups
from muse_hf.kernels.launch import ceil_div, launch
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
    token_of_point = (set_field(table, queries, TARGET) - set_field(table, queries, FIRST_POINT)).to(tl.int64)
    plane = plane_of(query, set_field(table, queries, ROW), head, stride_qb, stride_qh)
    plane += token_of_point * stride_qn
    dims, lane, j = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_C)
    center = tl.load(centroids + centroid * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0).to(tl.float32)
    own_points = order + head * num_points + begin
    own_plane = output + head * stride_oh
    lse += head * (num_points - num_key_points) - num_key_points
    if DIPOLE:
        matrix = dipole + (head * (num_rows - num_key_rows) + row) * HEAD_DIM * HEAD_DIM
        if BLOCK_E == BLOCK_D:
            m = load_tokens(matrix, dims, dims < HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_D)
    if ONE_TILE:
        exists = j < num_clusters
        mass = tl.load(log_mass + pairs + j, mask=exists, other=-float("inf")) * LOG2_E
        k = load_tokens(key_mean, pairs + j, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
        v = load_tokens(value_mean, pairs + j, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
    for q_first in range(0, many, BLOCK_Q):
        inside = q_first + lane < many
        points = tl.load(own_points + q_first + lane, mask=inside, other=num_key_points)
        q = load_tokens(plane, points, inside, stride_qn, HEAD_DIM, BLOCK_D)
        d = ((q.to(tl.float32) - center[None, :]) * (scale * LOG2_E)).to(q.dtype)
        if ONE_TILE:
            s = tl.dot(d, tl.trans(k), input_precision="ieee") + mass[None, :]
            top = tl.max(s, 1)
            p = tl.exp2(s - top[:, None])
            total = tl.sum(p, 1)
            o = tl.dot(p.to(v.dtype), v, input_precision="ieee")
        else:
            top = tl.full([BLOCK_Q], -1e30, tl.float32)
            total = tl.zeros([BLOCK_Q], tl.float32)
            o = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
            for c_first in range(0, num_clusters, BLOCK_C):
                exists = c_first + j < num_clusters
                mass = tl.load(log_mass + pairs + c_first + j, mask=exists, other=-float("inf")) * LOG2_E
                k = load_tokens(key_mean, pairs + c_first + j, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
                v = load_tokens(value_mean, pairs + c_first + j, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
                s = tl.dot(d, tl.trans(k), input_precision="ieee") + mass[None, :]
                new_top = tl.maximum(top, tl.max(s, 1))
                p = tl.exp2(s - new_top[:, None])
                shrink = tl.exp2(top - new_top)
                total = total * shrink + tl.sum(p, 1)
                o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision="ieee")
                top = new_top
        o *= (1 / total)[:, None]
        if DIPOLE:  # δ still has the factor log2(e)
            if BLOCK_E == BLOCK_D:
                shift = tl.dot(d, tl.trans(m), input_precision="ieee")
            else:
                shift = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
                for e in range(0, HEAD_DIM, BLOCK_E):
                    part = load_tokens(plane, points, inside, stride_qn, HEAD_DIM, BLOCK_E, e)
                    part_dims = e + tl.arange(0, BLOCK_E)
                    part = _offset(part, centroids + centroid * HEAD_DIM, part_dims, scale * LOG2_E, HEAD_DIM)
                    columns = load_tokens(matrix, dims, dims < HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_E, e)
                    shift = tl.dot(part.to(q.dtype), tl.trans(columns), shift, input_precision="ieee")
            o += shift * (1 / LOG2_E)
        store_tokens(own_plane, o, points - num_key_points, inside, stride_on, HEAD_DIM, BLOCK_D)
        tl.store(lse + points, (top + tl.log2(total)) * (1 / LOG2_E), mask=inside)


@triton.jit
def _backward_kernel(
    query, grad, delta, lse, part_lse, table, set_of_row, order, first, count, centroids,
    log_mass, key_mean, value_mean, dipole, grad_query, grad_key_mean, grad_value_mean, constant, product,
    stride_qb, stride_qh, stride_qn, stride_gb, stride_gh, stride_gn, stride_dh, stride_dn,
    num_key_sets, num_key_rows, num_rows, num_key_points, num_points, num_pairs, length, num_tokens, scale,
    DIPOLE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries of a centroid and of its summaries, but for the dipole's own.

    Logits are in base 2: δ carries the factor log2(e), which its gradients lose again at the end.
    """
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
    token_of_point = (set_field(table, queries, TARGET) - set_field(table, queries, FIRST_POINT)).to(tl.int64)
    batch_row = set_field(table, queries, ROW)
    plane = plane_of(query, batch_row, head, stride_qb, stride_qh) + token_of_point * stride_qn
    grad_plane = plane_of(grad, batch_row, head, stride_gb, stride_gh) + token_of_point * stride_gn
    own_plane = grad_query + head * stride_dh
    own_points = order + head * num_points + begin
    token = head * num_tokens + batch_row.to(tl.int64) * length + token_of_point
    lse, delta = lse + token, delta + token
    part_lse += head * (num_points - num_key_points) - num_key_points
    query_row = head * (num_rows - num_key_rows) + row
    dims, lane, j = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_C)
    center = tl.load(centroids + centroid * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0).to(tl.float32)
    if DIPOLE:
        matrix = dipole + query_row * HEAD_DIM * HEAD_DIM
        if BLOCK_E == BLOCK_D:
            m = load_tokens(matrix, dims, dims < HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_D)
    inner = tl.zeros([BLOCK_Q], tl.float32)
    for c_first in range(0, BLOCK_C if ONE_TILE else num_clusters, BLOCK_C):
        exists = c_first + j < num_clusters
        rows = pairs + c_first + j
        mass = tl.load(log_mass + rows, mask=exists, other=-float("inf")) * LOG2_E
        k = load_tokens(key_mean, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
        v = load_tokens(value_mean, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
        dk = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        dmass = tl.zeros([BLOCK_C], tl.float32)
        for q_first in range(0, many, BLOCK_Q):
            inside = q_first + lane < many
            points = tl.load(own_points + q_first + lane, mask=inside, other=num_key_points)
            q = load_tokens(plane, points, inside, stride_qn, HEAD_DIM, BLOCK_D)
            do = load_tokens(grad_plane, points, inside, stride_gn, HEAD_DIM, BLOCK_D)
            total = tl.load(lse + points, mask=inside, other=float("inf")) * LOG2_E
            shift = -tl.load(delta + points, mask=inside, other=0)
            d = ((q.to(tl.float32) - center[None, :]) * (scale * LOG2_E)).to(q.dtype)
            if DIPOLE:
                if BLOCK_E == BLOCK_D:
                    pulled = tl.dot(do, m, input_precision="ieee")  # M do
                else:
                    pulled = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
                    for e in range(0, HEAD_DIM, BLOCK_E):
                        part = load_tokens(grad_plane, points, inside, stride_gn, HEAD_DIM, BLOCK_E, e)
                        part_dims = e + tl.arange(0, BLOCK_E)
                        m = load_tokens(matrix, part_dims, part_dims < HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_D)
                        pulled = tl.dot(part, m, pulled, input_precision="ieee")
                along = tl.sum(pulled * d.to(tl.float32), 1) * (1 / LOG2_E)  # do·M δ
                part = tl.load(part_lse + points, mask=inside, other=-float("inf"))
                share = tl.exp2(part * LOG2_E - total)
                if ONE_TILE or c_first == 0:
                    inner += share * along
                shift += along
            p = tl.exp2(tl.dot(k, tl.trans(d), input_precision="ieee") + (mass[:, None] - total[None, :]))
            ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") + shift[None, :])
            dmass += tl.sum(ds, 1)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            ds = ds.to(q.dtype)
            dk = tl.dot(ds, d, dk, input_precision="ieee")
            dq = tl.dot(tl.trans(ds), k, input_precision="ieee")
            if DIPOLE and (ONE_TILE or c_first == 0):
                dq += share[:, None] * pulled
            dq *= scale
            if not ONE_TILE and c_first > 0:
                dq += load_tokens(own_plane, points - num_key_points, inside, stride_dn, HEAD_DIM, BLOCK_D)
            store_tokens(own_plane, dq, points - num_key_points, inside, stride_dn, HEAD_DIM, BLOCK_D)
        # In the precision in which they are stored, so that what the keys make of them adds up.
        dk = (dk * (1 / LOG2_E)).to(k.dtype)
        dv = dv.to(k.dtype)
        store_tokens(grad_key_mean, dk, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
        store_tokens(grad_value_mean, dv, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
        k = load_tokens(key_mean, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)  # again: no registers are kept
        v = load_tokens(value_mean, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
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
    row, part, head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
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
    launch(
        _forward_kernel, (sets.num_query_rows, query.shape[1]),
        query, sets.table, sets.set_of_row, *groups, centroids,
        summaries.log_mass, summaries.key_mean, summaries.value_mean, summaries.dipole, output, lse,
        *query.stride()[:3], *output.stride()[:2], *sizes, sets.num_pairs, scale,
        DIPOLE=summaries.dipole is not None, **_tiles(query, sets),
    )  # fmt: skip


def refine_backward(
    query: torch.Tensor, grad: torch.Tensor, delta: torch.Tensor, lse: torch.Tensor, part_lse: torch.Tensor,
    sets: PointSets, groups: Groups, centroids: torch.Tensor, summaries: Summaries, grad_query: torch.Tensor,
    scale: float,
) -> SummaryGradients:  # fmt: skip
    """Write the gradients of the queries to their points (H, points, D), any strides; those of summaries.

    Args:
        query, grad: (B, H, Q, D). grad_query: of the dtype that `query_grad_dtype` gives.
        delta, lse: (H, B * Q) do·o and logsumexp of the merged attention. part_lse: (H, query points) of
            this part.
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
    sizes = (sets.num_key_sets, sets.num_key_rows, sets.num_rows, sets.num_key_points, sets.num_points)
    strides = *query.stride()[:3], *grad.stride()[:3]
    launch(
        _backward_kernel, (sets.num_query_rows, heads),
        query, grad, delta, lse, part_lse, sets.table, sets.set_of_row, *groups, centroids,
        summaries.log_mass, summaries.key_mean, summaries.value_mean, summaries.dipole, grad_query,
        grads.key_mean, grads.value_mean, grads.constant, grads.product, *strides, *grad_query.stride()[:2],
        *sizes, sets.num_pairs, length, lse.shape[1], scale, DIPOLE=dipole, **_backward_tiles(query, sets),
    )  # fmt: skip
    if dipole:
        del tiles["BLOCK_C"], tiles["ONE_TILE"]
        parts = ceil_div(tiles["HEAD_DIM"], tiles["BLOCK_E"])
        launch(
            _dipole_backward_kernel, (sets.num_query_rows, parts, heads),
            query, grad, part_lse, lse, sets.table, sets.set_of_row, *groups, centroids,
            grads.dipole, *strides, *sizes, length, lse.shape[1], scale, **tiles,
        )  # fmt: skip
    return grads


def query_grad_dtype(query: torch.Tensor, sets: PointSets) -> torch.dtype:
    """float32 where a gradient is added up in memory, a tile of clusters after the other."""
    return query.dtype if _tiles(query, sets)["ONE_TILE"] else torch.float32


def _tiles(query: torch.Tensor, sets: PointSets) -> dict[str, int]:
    head_dim = query.shape[3]
    block_d = power_of_two(head_dim)
    row_bytes = block_d * query.element_size()
    block_c = min(_TILE, max(16, (1 << 14) // row_bytes), power_of_two(sets.max_clusters))
    tiles = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_Q": min(64, max(16, (1 << 14) // row_bytes)),
        "BLOCK_C": block_c,
        "BLOCK_E": min(block_d, (1 << 15) // row_bytes),
        "ONE_TILE": sets.max_clusters <= block_c,
        "num_warps": 4 if block_d <= 64 else 8,
    }
    if query.element_size() == 2 and block_d > 64:
        tiles["maxnreg"] = 128  # two programs of 8 warps share a multiprocessor
    return tiles


def _backward_tiles(query: torch.Tensor, sets: PointSets) -> dict[str, int]:
    """Few queries at once and few registers a thread, so that more programs share a multiprocessor."""
    tiles = _tiles(query, sets) | {"num_stages": 1}
    if query.element_size() == 2:
        tiles |= {"BLOCK_Q": 32, "maxnreg": 168 if tiles["BLOCK_D"] <= 64 else 128}
    return tiles
