"""Refinement of tilted summaries: queries in groups that share a centroid, δ = q - q̄_a.

    ℓ_qj = L_aj + δ·k̃_aj      p_qj = exp(ℓ_qj - λ_q)      o_q = Σ_j p_qj ṽ_aj (+ M_a δ with the dipole)

One program goes through the queries of one centroid and head. Products are with q, and what the centroid has
to do with them is taken away once a program, in float32: δ is never formed. Backward is fed with the merged
logsumexp and Δ = do·o of the merged output, so that Σ_j p_qj = exp(λ_part - λ) is the share of the summaries
in the whole attention, and dℓ = p (do·value - Δ). It gives the gradients of the queries and, kept in
registers, those of all summaries of a.
"""

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

# Clusters or queries in a tile.
_TILE = 64
# A third program on a multiprocessor is worth a few spilled registers.
_FEW_REGISTERS = ({}, {"maxnreg": 168})


@triton.jit
def _load_summaries(
    log_mass, key_mean, value_mean, c, rows, exists, scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Means of keys and values, and the logits to base 2 of a query at zero: (L - q̄·k̃) log2 e."""
    mass = tl.load(log_mass + rows, mask=exists, other=-float("inf"))
    k = load_tokens(key_mean, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
    v = load_tokens(value_mean, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
    bias = mass - tl.sum(k.to(tl.float32) * c[None, :], 1) * scale
    return k, v, bias * LOG2_E


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
    own_order = order + head * num_points + begin
    dims = tl.arange(0, BLOCK_D)
    j = tl.arange(0, BLOCK_C)
    c = tl.load(centroids + centroid * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0).to(tl.float32)
    if DIPOLE:
        matrix = dipole + (head * (num_rows - num_key_rows) + row) * HEAD_DIM * HEAD_DIM
        at_zero = tl.zeros([BLOCK_D], tl.float32)  # -M q̄
        for e in range(0, HEAD_DIM, BLOCK_E):
            part_dims = e + tl.arange(0, BLOCK_E)
            columns = load_tokens(matrix, dims, dims < HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_E, e)
            part = tl.load(centroids + centroid * HEAD_DIM + part_dims, mask=part_dims < HEAD_DIM, other=0)
            at_zero -= tl.sum(columns.to(tl.float32) * part.to(tl.float32)[None, :], 1) * scale
    if ONE_TILE:
        k, v, bias = _load_summaries(
            log_mass, key_mean, value_mean, c, pairs + j, j < num_clusters, scale, HEAD_DIM, BLOCK_D
        )
    for q_first in range(0, many, BLOCK_Q):
        places = q_first + tl.arange(0, BLOCK_Q)
        inside = places < many
        points = tl.load(own_order + tl.minimum(places, many - 1))
        tokens = points + token_of_point
        q = gather_tokens(plane, tokens, stride_qn, HEAD_DIM, BLOCK_D)
        top = tl.full([BLOCK_Q], -1e30, tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        o = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        for c_first in range(0, BLOCK_C if ONE_TILE else num_clusters, BLOCK_C):
            if not ONE_TILE:
                rows, exists = pairs + c_first + j, c_first + j < num_clusters
                k, v, bias = _load_summaries(
                    log_mass, key_mean, value_mean, c, rows, exists, scale, HEAD_DIM, BLOCK_D
                )
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E) + bias[None, :]
            new_top = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(p, 1)
            o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision="ieee")
            top = new_top
        o *= (1 / total)[:, None]
        if DIPOLE:
            tilt = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
            for e in range(0, HEAD_DIM, BLOCK_E):
                part = gather_tokens(plane, tokens, stride_qn, HEAD_DIM, BLOCK_E, e)
                columns = load_tokens(matrix, dims, dims < HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_E, e)
                tilt = tl.dot(part, tl.trans(columns), tilt, input_precision="ieee")
            o += tilt * scale + at_zero[None, :]
        rows = points - num_key_points
        store_tokens(output + head * stride_oh, o, rows, inside, stride_on, HEAD_DIM, BLOCK_D)
        part_lse = (top + tl.log2(total)) / LOG2_E
        tl.store(lse + head * (num_points - num_key_points) + rows, part_lse, mask=inside)


@triton.jit
def _query_backward_kernel(
    query, grad, part_lse, lse, delta, table, set_of_row, order, first, count, centroids,
    log_mass, key_mean, value_mean, dipole, grad_query, sorted_lse, slope, product,
    stride_qb, stride_qh, stride_qn, stride_gb, stride_gh, stride_gn, stride_dh, stride_dn,
    num_key_sets, num_key_rows, num_rows, num_key_points, num_points, num_pairs, length, num_tokens, scale,
    DIPOLE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries of a centroid.

    For the gradients of its summaries, in the order of the queries: λ log2 e, and do·M δ - Δ.
    """
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    queries = tl.load(set_of_row + num_key_rows + row)
    centroid = head * num_rows + num_key_rows + row
    begin, many = tl.load(first + centroid), tl.load(count + centroid)
    num_clusters = set_field(table, queries - num_key_sets, CLUSTERS)
    a = num_key_rows + row - set_field(table, queries, FIRST_ROW)
    pairs = head * num_pairs + set_field(table, queries, FIRST_PAIR) + a * num_clusters
    token_of_point = set_field(table, queries, TARGET) - set_field(table, queries, FIRST_POINT)
    batch_row = set_field(table, queries, ROW)
    plane = plane_of(query, batch_row, head, stride_qb, stride_qh)
    grad_plane = plane_of(grad, batch_row, head, stride_gb, stride_gh)
    head_tokens = head * num_tokens + batch_row.to(tl.int64) * length
    own_points = head * (num_points - num_key_points) - num_key_points
    own_places = own_points + begin
    query_row = head * (num_rows - num_key_rows) + row
    own_order = order + head * num_points + begin
    dims = tl.arange(0, BLOCK_D)
    j = tl.arange(0, BLOCK_C)
    c = tl.load(centroids + centroid * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0).to(tl.float32)
    if DIPOLE:
        matrix = dipole + query_row * HEAD_DIM * HEAD_DIM
    if ONE_TILE:
        k, v, bias = _load_summaries(
            log_mass, key_mean, value_mean, c, pairs + j, j < num_clusters, scale, HEAD_DIM, BLOCK_D
        )
    inner = tl.zeros([BLOCK_Q], tl.float32)
    for q_first in range(0, many, BLOCK_Q):
        places = q_first + tl.arange(0, BLOCK_Q)
        inside = places < many
        points = tl.load(own_order + tl.minimum(places, many - 1))
        tokens = points + token_of_point
        q = gather_tokens(plane, tokens, stride_qn, HEAD_DIM, BLOCK_D)
        do = gather_tokens(grad_plane, tokens, stride_gn, HEAD_DIM, BLOCK_D)
        query_lse = tl.load(lse + head_tokens + tokens) * LOG2_E
        shift = -tl.load(delta + head_tokens + tokens)
        dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        if DIPOLE:
            for e in range(0, HEAD_DIM, BLOCK_E):  # M do
                part = gather_tokens(grad_plane, tokens, stride_gn, HEAD_DIM, BLOCK_E, e)
                part_dims = e + tl.arange(0, BLOCK_E)
                m = load_tokens(matrix, part_dims, part_dims < HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_D)
                dq = tl.dot(part, m, dq, input_precision="ieee")
            share = tl.exp2(tl.load(part_lse + own_points + points) * LOG2_E - query_lse)
            along = tl.sum(dq * (q.to(tl.float32) - c[None, :]), 1) * scale  # do·M δ
            dq *= share[:, None]
            inner += tl.where(inside, share * along, 0)
            shift += along
        for c_first in range(0, BLOCK_C if ONE_TILE else num_clusters, BLOCK_C):
            if not ONE_TILE:
                rows, exists = pairs + c_first + j, c_first + j < num_clusters
                k, v, bias = _load_summaries(
                    log_mass, key_mean, value_mean, c, rows, exists, scale, HEAD_DIM, BLOCK_D
                )
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E) + bias[None, :]
            p = tl.exp2(s - query_lse[:, None])
            ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") + shift[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        rows = points - num_key_points
        store_tokens(grad_query + head * stride_dh, dq * scale, rows, inside, stride_dn, HEAD_DIM, BLOCK_D)
        tl.store(sorted_lse + own_places + places, query_lse, mask=inside)
        tl.store(slope + own_places + places, shift, mask=inside)
    if DIPOLE:
        tl.store(product + query_row, tl.sum(inner, 0))


@triton.jit
def _summary_backward_kernel(
    query, grad, sorted_lse, slope, table, set_of_row, order, first, count, centroids,
    log_mass, key_mean, value_mean, grad_key_mean, grad_value_mean, constant,
    stride_qb, stride_qh, stride_qn, stride_gb, stride_gh, stride_gn,
    num_key_sets, num_key_rows, num_rows, num_key_points, num_points, num_pairs, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of the summaries of a centroid."""
    row, tile, head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    queries = tl.load(set_of_row + num_key_rows + row)
    centroid = head * num_rows + num_key_rows + row
    begin, many = tl.load(first + centroid), tl.load(count + centroid)
    num_clusters = set_field(table, queries - num_key_sets, CLUSTERS)
    if tile * BLOCK_C < num_clusters:
        num_centroids = set_field(table, queries, CLUSTERS)
        a = num_key_rows + row - set_field(table, queries, FIRST_ROW)
        pairs = head * num_pairs + set_field(table, queries, FIRST_PAIR)
        token_of_point = set_field(table, queries, TARGET) - set_field(table, queries, FIRST_POINT)
        batch_row = set_field(table, queries, ROW)
        plane = plane_of(query, batch_row, head, stride_qb, stride_qh)
        grad_plane = plane_of(grad, batch_row, head, stride_gb, stride_gh)
        own_order = order + head * num_points + begin
        own_places = head * (num_points - num_key_points) - num_key_points + begin
        dims = tl.arange(0, BLOCK_D)
        c = tl.load(centroids + centroid * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0).to(tl.float32)
        j = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        exists = j < num_clusters
        rows = pairs + a * num_clusters + j
        k, v, bias = _load_summaries(
            log_mass, key_mean, value_mean, c, rows, exists, scale, HEAD_DIM, BLOCK_D
        )
        dk = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        dmass = tl.zeros([BLOCK_C, 16], tl.float32)
        ones = tl.full([BLOCK_Q, 16], 1, k.dtype)
        for q_first in range(0, many, BLOCK_Q):
            places = q_first + tl.arange(0, BLOCK_Q)
            inside = places < many
            points = tl.load(own_order + tl.minimum(places, many - 1))
            tokens = points + token_of_point
            q = gather_tokens(plane, tokens, stride_qn, HEAD_DIM, BLOCK_D)
            do = gather_tokens(grad_plane, tokens, stride_gn, HEAD_DIM, BLOCK_D)
            query_lse = tl.load(sorted_lse + own_places + places, mask=inside, other=float("inf"))
            shift = tl.load(slope + own_places + places, mask=inside, other=0)
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2_E) + bias[:, None]
            p = tl.exp2(s - query_lse[None, :])
            ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") + shift[None, :])
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            ds = ds.to(q.dtype)
            dk = tl.dot(ds, q, dk, input_precision="ieee")
            # As a product too, so that what ds in low precision makes of q and of q̄ adds up to δ.
            dmass = tl.dot(ds, ones, dmass, input_precision="ieee")
        dmass = tl.max(dmass, 1)  # of 16 equal columns
        tl.debug_barrier()  # what follows is loaded again, for registers are scarce in the loop
        c = tl.load(centroids + centroid * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0).to(tl.float32)
        k = load_tokens(key_mean, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
        v = load_tokens(value_mean, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
        # In the precision in which they are stored, so that what the keys make of them adds up.
        dk = ((dk - dmass[:, None] * c[None, :]) * scale).to(k.dtype)
        dv = dv.to(k.dtype)
        store_tokens(grad_key_mean, dk, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
        store_tokens(grad_value_mean, dv, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
        dmass -= tl.sum(dk.to(tl.float32) * k.to(tl.float32) + dv.to(tl.float32) * v.to(tl.float32), 1)
        tl.store(constant + pairs + j * num_centroids + a, dmass, mask=exists)


@triton.jit
def _dipole_backward_kernel(
    query, grad, part_lse, lse, table, set_of_row, order, first, count, centroids, grad_dipole,
    stride_qb, stride_qh, stride_qn, stride_gb, stride_gh, stride_gn,
    num_key_rows, num_rows, num_key_points, num_points, length, num_tokens, scale,
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
    own_order = order + head * num_points + begin
    dims = tl.arange(0, BLOCK_D)
    product = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_E, 16], tl.float32)
    ones = tl.full([BLOCK_Q, 16], 1, query.dtype.element_ty)
    for q_first in range(0, many, BLOCK_Q):
        places = q_first + tl.arange(0, BLOCK_Q)
        inside = places < many
        points = tl.load(own_order + tl.minimum(places, many - 1))
        tokens = points + token_of_point
        q = gather_tokens(plane, tokens, stride_qn, HEAD_DIM, BLOCK_D)
        do = gather_tokens(grad_plane, tokens, stride_gn, HEAD_DIM, BLOCK_E, part * BLOCK_E)
        share = tl.load(part_lse + points - num_key_points, mask=inside, other=-float("inf"))
        share = tl.exp2((share - tl.load(lse + tokens)) * LOG2_E)
        pull = tl.trans((do.to(tl.float32) * share[:, None]).to(q.dtype))
        product = tl.dot(pull, q, product, input_precision="ieee")
        total = tl.dot(pull, ones, total, input_precision="ieee")
    c = tl.load(centroids + centroid * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0).to(tl.float32)
    product = (product - tl.max(total, 1)[:, None] * c[None, :]) * scale  # total has 16 equal columns
    own_dims = part * BLOCK_E + tl.arange(0, BLOCK_E)
    matrix = grad_dipole + (head * (num_rows - num_key_rows) + row) * HEAD_DIM * HEAD_DIM
    store_tokens(matrix, product, own_dims, own_dims < HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_D)


def refine(
    query: torch.Tensor, sets: PointSets, groups: Groups, centroids: torch.Tensor, summaries: Summaries,
    output: torch.Tensor, lse: torch.Tensor, scale: float,
) -> None:  # fmt: skip
    """Write the output of the summaries to the query points (H, points, D), any strides, and lse (H, points).

    Args:
        query: (B, H, Q, D).
    """
    tiles = _tiles(query)
    block_c = min(tiles["BLOCK_Q"], power_of_two(sets.max_clusters))
    sizes = (sets.num_key_sets, sets.num_key_rows, sets.num_rows, sets.num_key_points, sets.num_points)
    launch(
        _forward_kernel, (sets.num_query_rows, query.shape[1]),
        query, sets.table, sets.set_of_row, *groups, centroids,
        summaries.log_mass, summaries.key_mean, summaries.value_mean, summaries.dipole, output, lse,
        *query.stride()[:3], *output.stride()[:2], *sizes, sets.num_pairs, scale,
        DIPOLE=summaries.dipole is not None, BLOCK_C=block_c, ONE_TILE=sets.max_clusters <= block_c, **tiles,
    )  # fmt: skip


def refine_backward(
    query: torch.Tensor, grad: torch.Tensor, delta: torch.Tensor, lse: torch.Tensor, part_lse: torch.Tensor,
    sets: PointSets, groups: Groups, centroids: torch.Tensor, summaries: Summaries, grad_query: torch.Tensor,
    scale: float,
) -> SummaryGradients:  # fmt: skip
    """Write the gradients of the queries to their points (H, points, D), any strides; those of summaries.

    Args:
        query, grad: (B, H, Q, D), the latter of the merged attention.
        lse, delta: (H, B * Q) λ and Δ of the merged attention.
        part_lse: (H, query points) λ of this part.
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
    tiles = _tiles(query)
    block_c = min(tiles["BLOCK_Q"], power_of_two(sets.max_clusters))
    clusters = (sets.table, sets.set_of_row, *groups, centroids)
    strides = *query.stride()[:3], *grad.stride()[:3]
    rows = (sets.num_key_rows, sets.num_rows, sets.num_key_points, sets.num_points)
    # A warp for 16 rows of the products: more would do the same work again.
    warps = block_c // 16 if query.element_size() == 2 else tiles["num_warps"]
    sorted_lse, slope = torch.empty_like(part_lse), torch.empty_like(part_lse)
    launch(
        _query_backward_kernel, (sets.num_query_rows, heads),
        query, grad, part_lse, lse, delta, *clusters, summaries.log_mass, summaries.key_mean,
        summaries.value_mean, summaries.dipole, grad_query, sorted_lse, slope, grads.product,
        *strides, *grad_query.stride()[:2], sets.num_key_sets, *rows, sets.num_pairs,
        length, lse.shape[1], scale, DIPOLE=dipole, BLOCK_C=block_c, ONE_TILE=sets.max_clusters <= block_c,
        **tiles, **_FEW_REGISTERS[tiles["BLOCK_D"] <= 64],
    )  # fmt: skip
    launch(
        _summary_backward_kernel, (sets.num_query_rows, ceil_div(sets.max_clusters, block_c), heads),
        query, grad, sorted_lse, slope, *clusters, *summaries[:3],
        grads.key_mean, grads.value_mean, grads.constant, *strides, sets.num_key_sets, *rows, sets.num_pairs,
        scale, HEAD_DIM=tiles["HEAD_DIM"], BLOCK_D=tiles["BLOCK_D"], BLOCK_C=block_c,
        BLOCK_Q=min(32, block_c), num_warps=warps, num_stages=2, **_FEW_REGISTERS[tiles["BLOCK_D"] <= 64],
    )  # fmt: skip
    if dipole:
        block_e = min(2 * tiles["BLOCK_E"], tiles["BLOCK_D"])
        launch(
            _dipole_backward_kernel, (sets.num_query_rows, ceil_div(tiles["HEAD_DIM"], block_e), heads),
            query, grad, part_lse, lse, *clusters, grads.dipole, *strides, *rows, length, lse.shape[1], scale,
            **{**tiles, "BLOCK_E": block_e, "num_warps": 4 if tiles["BLOCK_D"] <= 64 else 8},
        )  # fmt: skip
    return grads


def _tiles(query: torch.Tensor) -> dict[str, int]:
    head_dim = query.shape[3]
    block_d = power_of_two(head_dim)
    row_bytes = block_d * query.element_size()
    rows = min(_TILE, max(16, (1 << 14) // row_bytes))
    if row_bytes > 128 and not has_much_shared_memory(query):
        rows = min(rows, 32)
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_Q": rows,
        "BLOCK_E": min(64, rows, block_d),
        "num_warps": 4 if row_bytes <= 256 else 8,
        "num_stages": 2,
    }
