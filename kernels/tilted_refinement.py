"""Refinement of tilted summaries: queries in groups that share a centroid, δ = q - q̄_a.

    ℓ_qj = L_aj + δ·k̃_aj      p_qj = exp(ℓ_qj - λ_q)      o_q = Σ_j p_qj ṽ_aj (+ M_a δ with the dipole)

One program goes through the queries of one centroid and head. δ is formed in float32, and rounded to the
precision of the queries for the products. Backward is fed with the merged logsumexp and Δ = do·o of the
merged output, so that Σ_j p_qj = exp(λ_part - λ) is the share of the summaries in the whole attention, and
dℓ = p (do·value - Δ). It gives the gradients of the queries and, kept in registers, those of a tile of
summaries of a.
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
    wait_for_previous_kernel,
)
from muse_hf.kernels.kmeans import Groups
from muse_hf.kernels.launch import ceil_div, launch
from muse_hf.kernels.point_sets import (
    CLUSTERS,
    FIRST_PAIR,
    FIRST_ROW,
    ROW,
    PointSets,
    set_field,
    token_less_point,
)
from muse_hf.kernels.replay import copy
from muse_hf.kernels.tilted_summaries import Summaries
from muse_hf.kernels.tilted_summaries_backward import SummaryGradients

# Clusters or queries in a tile.
_TILE = 64
# One more program on a multiprocessor, a fourth or a third, is worth a few spilled registers.
_FORWARD_REGISTERS, _BACKWARD_REGISTERS = {"maxnreg": 128}, {"maxnreg": 168}


@triton.jit
def _load_centroid(centroid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, first=0):
    """q̄ in float32, from dimension `first` on."""
    dims = first + tl.arange(0, BLOCK_D)
    return tl.load(centroid + dims, mask=dims < HEAD_DIM, other=0).to(tl.float32)


@triton.jit
def _less(q, c):
    """δ of a tile of queries, in their precision."""
    return (q.to(tl.float32) - c[None, :]).to(q.dtype)


@triton.jit
def _load_points(own_order, places, many):
    """Points of a cluster at these places, and the last again behind it. Of an empty cluster, any."""
    return tl.load(own_order + tl.minimum(places, many - 1), mask=tl.zeros_like(places) < many, other=0)


@triton.jit
def _load_summaries(
    log_mass, key_mean, value_mean, rows, exists, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Means of keys and values, and L log2 e."""
    k = load_tokens(key_mean, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
    v = load_tokens(value_mean, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
    return k, v, tl.load(log_mass + rows, mask=exists, other=-float("inf")) * LOG2_E


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
    wait_for_previous_kernel()
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    queries = tl.load(set_of_row + num_key_rows + row)
    centroid = head * num_rows + num_key_rows + row
    begin, many = tl.load(first + centroid), tl.load(count + centroid)
    own_order = order + head * num_points + begin
    lane = tl.arange(0, BLOCK_Q)
    # Loaded ahead, as most programs have only one tile: what else they load is under way meanwhile.
    points = _load_points(own_order, lane, many)
    own_centroid = centroids + centroid * HEAD_DIM
    c = _load_centroid(own_centroid, HEAD_DIM, BLOCK_D)
    num_clusters = set_field(table, queries - num_key_sets, CLUSTERS)
    a = num_key_rows + row - set_field(table, queries, FIRST_ROW)
    pairs = head * num_pairs + set_field(table, queries, FIRST_PAIR) + a * num_clusters
    token_of_point = token_less_point(table, queries)
    plane = plane_of(query, set_field(table, queries, ROW), head, stride_qb, stride_qh)
    dims = tl.arange(0, BLOCK_D)
    j = tl.arange(0, BLOCK_C)
    if DIPOLE:
        matrix = dipole + (head * (num_rows - num_key_rows) + row) * HEAD_DIM * HEAD_DIM
        if BLOCK_E == BLOCK_D:
            m = load_tokens(matrix, dims, dims < HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_D)
    if ONE_TILE:
        k, v, mass = _load_summaries(
            log_mass, key_mean, value_mean, pairs + j, j < num_clusters, HEAD_DIM, BLOCK_D
        )
    q = load_tokens(plane, points + token_of_point, lane < many, stride_qn, HEAD_DIM, BLOCK_D)
    for q_first in range(0, many, BLOCK_Q):
        inside = q_first + lane < many
        d = _less(q, c)
        o = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        if DIPOLE:
            if BLOCK_E == BLOCK_D:
                o = tl.dot(d, tl.trans(m), o, input_precision="ieee")
            else:
                for e in tl.static_range(0, HEAD_DIM, BLOCK_E):
                    m = load_tokens(matrix, dims, dims < HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_E, e)
                    part = gather_tokens(plane, points + token_of_point, stride_qn, HEAD_DIM, BLOCK_E, e)
                    part = _less(part, _load_centroid(own_centroid, HEAD_DIM, BLOCK_E, e))
                    o = tl.dot(part, tl.trans(m), o, input_precision="ieee")
            o *= scale
        if ONE_TILE:
            s = tl.dot(d, tl.trans(k), input_precision="ieee") * (scale * LOG2_E) + mass[None, :]
            top = tl.max(s, 1)
            p = tl.exp2(s - top[:, None])
            total = tl.sum(p, 1)
            o = tl.dot((p * (1 / total)[:, None]).to(v.dtype), v, o, input_precision="ieee")
        else:
            top = tl.full([BLOCK_Q], -1e30, tl.float32)
            total = tl.zeros([BLOCK_Q], tl.float32)
            mean = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
            for c_first in range(0, num_clusters, BLOCK_C):
                rows, exists = pairs + c_first + j, c_first + j < num_clusters
                k, v, mass = _load_summaries(log_mass, key_mean, value_mean, rows, exists, HEAD_DIM, BLOCK_D)
                s = tl.dot(d, tl.trans(k), input_precision="ieee") * (scale * LOG2_E) + mass[None, :]
                new_top = tl.maximum(top, tl.max(s, 1))
                p = tl.exp2(s - new_top[:, None])
                shrink = tl.exp2(top - new_top)
                total = total * shrink + tl.sum(p, 1)
                mean = tl.dot(p.to(v.dtype), v, mean * shrink[:, None], input_precision="ieee")
                top = new_top
            o += mean * (1 / total)[:, None]
        rows = points - num_key_points
        store_tokens(output + head * stride_oh, o, rows, inside, stride_on, HEAD_DIM, BLOCK_D)
        part_lse = (top + tl.log2(total)) / LOG2_E
        tl.store(lse + head * (num_points - num_key_points) + rows, part_lse, mask=inside)
        follows = q_first + BLOCK_Q + lane < many
        points = _load_points(own_order, q_first + BLOCK_Q + lane, many)
        q = load_tokens(plane, points + token_of_point, follows, stride_qn, HEAD_DIM, BLOCK_D)


@triton.jit
def _load_terms(terms, part_lse, tokens, points, BLOCK_Q: tl.constexpr):
    """λ log2 e and Δ of queries, and λ of this part: of all queries by one load, see `WeightTerms`."""
    column = tl.arange(0, 4)[None, :]
    merged, part = terms + tokens.to(tl.int64)[:, None] * 2 + column, part_lse + points[:, None]
    numbers = tl.load(tl.where(column < 2, merged, part))
    even, odd = tl.split(tl.reshape(numbers, [BLOCK_Q, 2, 2]))
    query_lse, own_lse = tl.split(even)
    query_delta, _ = tl.split(odd)
    return query_lse, query_delta, own_lse


@triton.jit
def _backward_kernel(
    query, grad, terms, part_lse, table, set_of_row, order, first, count, centroids,
    log_mass, key_mean, value_mean, dipole, grad_query, grad_key_mean, grad_value_mean, constant,
    stride_qb, stride_qh, stride_qn, stride_gb, stride_gh, stride_gn, stride_dh, stride_dn,
    num_key_sets, num_key_rows, num_rows, num_key_points, num_points, num_pairs, length, num_tokens, scale,
    DIPOLE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, ONE_TILE: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries of a centroid, and of its summaries.

    All products have the summaries, or the dimensions of queries, as rows: a tile of few queries wastes
    nothing where there are few queries.

    SHARED: products read the summaries from shared memory, not from registers.
    """
    wait_for_previous_kernel()
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    queries = tl.load(set_of_row + num_key_rows + row)
    centroid = head * num_rows + num_key_rows + row
    begin, many = tl.load(first + centroid), tl.load(count + centroid)
    num_clusters = set_field(table, queries - num_key_sets, CLUSTERS)
    num_centroids = set_field(table, queries, CLUSTERS)
    a = num_key_rows + row - set_field(table, queries, FIRST_ROW)
    pairs = head * num_pairs + set_field(table, queries, FIRST_PAIR)
    token_of_point = token_less_point(table, queries)
    batch_row = set_field(table, queries, ROW)
    plane = plane_of(query, batch_row, head, stride_qb, stride_qh)
    grad_plane = plane_of(grad, batch_row, head, stride_gb, stride_gh)
    terms += (head * num_tokens + batch_row.to(tl.int64) * length) * 2
    part_lse += head * (num_points - num_key_points) - num_key_points
    own_order = order + head * num_points + begin
    lane = tl.arange(0, BLOCK_Q)
    points = _load_points(own_order, lane, many)
    grad_query += head * stride_dh - num_key_points.to(tl.int64) * stride_dn
    dims = tl.arange(0, BLOCK_D)
    own_centroid = centroids + centroid * HEAD_DIM
    c = _load_centroid(own_centroid, HEAD_DIM, BLOCK_D)
    if DIPOLE:
        matrix = dipole + (head * (num_rows - num_key_rows) + row) * HEAD_DIM * HEAD_DIM
        if BLOCK_E == BLOCK_D:
            m = load_tokens(matrix, dims, dims < HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_D)
    for tile in range(0, BLOCK_C if ONE_TILE else num_clusters, BLOCK_C):
        j = tile + tl.arange(0, BLOCK_C)
        exists = j < num_clusters
        rows = pairs + a * num_clusters + j
        k, v, mass = _load_summaries(log_mass, key_mean, value_mean, rows, exists, HEAD_DIM, BLOCK_D)
        if not ONE_TILE:
            points = _load_points(own_order, lane, many)
        q = load_tokens(plane, points + token_of_point, lane < many, stride_qn, HEAD_DIM, BLOCK_D)
        dk = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        dmass = tl.zeros([BLOCK_C], tl.float32)
        for q_first in range(0, many, BLOCK_Q):
            inside = q_first + lane < many
            tokens = points + token_of_point
            do = gather_tokens(grad_plane, tokens, stride_gn, HEAD_DIM, BLOCK_D)
            query_lse, query_delta, own_lse = _load_terms(terms, part_lse, tokens, points, BLOCK_Q)
            query_lse = tl.where(inside, query_lse, float("inf"))
            d = _less(q, c)
            shift = -query_delta
            dq = tl.zeros([BLOCK_D, BLOCK_Q], tl.float32)
            if DIPOLE:
                if BLOCK_E == BLOCK_D:
                    dq = tl.dot(tl.trans(m), tl.trans(do), dq, input_precision="ieee")  # M do
                else:
                    for e in tl.static_range(0, HEAD_DIM, BLOCK_E):
                        part = gather_tokens(grad_plane, tokens, stride_gn, HEAD_DIM, BLOCK_E, e)
                        part_dims = e + tl.arange(0, BLOCK_E)
                        m = load_tokens(matrix, part_dims, part_dims < HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_D)
                        dq = tl.dot(tl.trans(m), tl.trans(part), dq, input_precision="ieee")
                shift += tl.sum(dq * tl.trans(d).to(tl.float32), 0) * scale  # do·M δ
                dq *= tl.exp2(own_lse * LOG2_E - query_lse)[None, :]
                if tile > 0:  # the first has added it
                    dq = tl.zeros_like(dq)
            s = tl.dot(k, tl.trans(d), input_precision="ieee")
            p = tl.exp2(s * (scale * LOG2_E) + (mass[:, None] - query_lse[None, :]))
            ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") + shift[None, :])
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            ds = ds.to(d.dtype)
            dk = tl.dot(ds, d, dk, input_precision="ieee")
            dmass += tl.sum(ds.to(tl.float32), 1)
            dq = tl.dot(tl.trans(k), ds, dq, input_precision="ieee") * scale
            if tile > 0:
                dq += tl.trans(load_tokens(grad_query, points, inside, stride_dn, HEAD_DIM, BLOCK_D))
            dq = tl.trans(dq.to(grad_query.dtype.element_ty))  # in this order numbers are rounded in pairs
            store_tokens(grad_query, dq, points, inside, stride_dn, HEAD_DIM, BLOCK_D)
            follows = q_first + BLOCK_Q + lane < many
            points = _load_points(own_order, q_first + BLOCK_Q + lane, many)
            q = load_tokens(plane, points + token_of_point, follows, stride_qn, HEAD_DIM, BLOCK_D)
        if not SHARED:
            tl.debug_barrier()  # loaded again, for registers are scarce in the loop
            k = load_tokens(key_mean, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
            v = load_tokens(value_mean, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
        # In the precision in which they are stored, so that what the keys make of them adds up.
        dk = (dk * scale).to(k.dtype)
        dv = dv.to(k.dtype)
        store_tokens(grad_key_mean, dk, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
        store_tokens(grad_value_mean, dv, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
        if SHARED:
            # Inner products of rows as the diagonal of a product: means still are where products read them.
            products = tl.dot(dk, tl.trans(k), input_precision="ieee")
            products = tl.dot(dv, tl.trans(v), products, input_precision="ieee")
            dmass -= tl.sum(tl.where(j[:, None] == j[None, :], products, 0), 1)
        else:
            dmass -= tl.sum(dk.to(tl.float32) * k.to(tl.float32) + dv.to(tl.float32) * v.to(tl.float32), 1)
        tl.store(constant + pairs + j * num_centroids + a, dmass, mask=exists)


@triton.jit
def _dipole_backward_kernel(
    query, grad, terms, part_lse, table, set_of_row, order, first, count, centroids, grad_dipole,
    stride_qb, stride_qh, stride_qn, stride_gb, stride_gh, stride_gn,
    num_key_rows, num_rows, num_key_points, num_points, length, num_tokens, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dM_a = Σ_q share_q do δ, for BLOCK_E of its rows. The share of the summaries is exp(λ_part - λ)."""
    wait_for_previous_kernel()
    row, part, head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    queries = tl.load(set_of_row + num_key_rows + row)
    centroid = head * num_rows + num_key_rows + row
    begin, many = tl.load(first + centroid), tl.load(count + centroid)
    token_of_point = token_less_point(table, queries)
    batch_row = set_field(table, queries, ROW)
    plane = plane_of(query, batch_row, head, stride_qb, stride_qh)
    grad_plane = plane_of(grad, batch_row, head, stride_gb, stride_gh)
    terms += (head * num_tokens + batch_row.to(tl.int64) * length) * 2
    part_lse += head * (num_points - num_key_points) - num_key_points
    own_order = order + head * num_points + begin
    lane = tl.arange(0, BLOCK_Q)
    points = _load_points(own_order, lane, many)
    c = _load_centroid(centroids + centroid * HEAD_DIM, HEAD_DIM, BLOCK_D)
    product = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    q = load_tokens(plane, points + token_of_point, lane < many, stride_qn, HEAD_DIM, BLOCK_D)
    for q_first in range(0, many, BLOCK_Q):
        tokens = points + token_of_point
        do = gather_tokens(grad_plane, tokens, stride_gn, HEAD_DIM, BLOCK_E, part * BLOCK_E)
        query_lse, _, own_lse = _load_terms(terms, part_lse, tokens, points, BLOCK_Q)
        share = tl.where(q_first + lane < many, tl.exp2(own_lse * LOG2_E - query_lse), 0)
        pull = ((q.to(tl.float32) - c[None, :]) * share[:, None]).to(q.dtype)  # rounded once
        product = tl.dot(tl.trans(do), pull, product, input_precision="ieee")
        follows = q_first + BLOCK_Q + lane < many
        points = _load_points(own_order, q_first + BLOCK_Q + lane, many)
        q = load_tokens(plane, points + token_of_point, follows, stride_qn, HEAD_DIM, BLOCK_D)
    own_dims = part * BLOCK_E + tl.arange(0, BLOCK_E)
    matrix = grad_dipole + (head * (num_rows - num_key_rows) + row) * HEAD_DIM * HEAD_DIM
    store_tokens(matrix, product * scale, own_dims, own_dims < HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_D)


def refine(
    query: torch.Tensor, sets: PointSets, groups: Groups, centroids: torch.Tensor, summaries: Summaries,
    output: torch.Tensor, lse: torch.Tensor, scale: float,
) -> None:  # fmt: skip
    """Write the output of the summaries to the query points (H, points, D), any strides, and lse (H, points).

    Args:
        query: (B, H, Q, D).
    """
    tiles, narrow, dipole = _tiles(query), _is_narrow(query), summaries.dipole is not None
    block_c = min(tiles["BLOCK_Q"], power_of_two(sets.max_clusters))
    sizes = (sets.num_key_sets, sets.num_key_rows, sets.num_rows, sets.num_key_points, sets.num_points)
    launch(
        _forward_kernel, (sets.num_query_rows, query.shape[1]),
        query, sets.table, sets.set_of_row, *groups, centroids,
        summaries.log_mass, summaries.key_mean, summaries.value_mean, summaries.dipole, output, lse,
        *query.stride()[:3], *output.stride()[:2], *sizes, sets.num_pairs, scale,
        DIPOLE=dipole, BLOCK_C=block_c, ONE_TILE=sets.max_clusters <= block_c,
        **tiles | {"num_stages": _stages(tiles, dipole)}, **(_FORWARD_REGISTERS if narrow else {}),
    )  # fmt: skip


def refine_backward(
    query: torch.Tensor, grad: torch.Tensor, terms: torch.Tensor, part_lse: torch.Tensor, sets: PointSets,
    groups: Groups, centroids: torch.Tensor, summaries: Summaries, grad_query: torch.Tensor,
    scale: float,
) -> SummaryGradients:  # fmt: skip
    """Write the gradients of the queries to their points (H, points, D), any strides; those of summaries.

    Args:
        query, grad: (B, H, Q, D), the latter of the merged attention.
        terms: (H, B * Q, 2) λ log2 e and Δ of the merged attention, see `WeightTerms`.
        part_lse: (H, query points) λ of this part.
    """
    heads, length = query.shape[1:3]
    dipole = summaries.dipole is not None
    grads = SummaryGradients(
        torch.empty_like(summaries.key_mean),
        torch.empty_like(summaries.value_mean),
        torch.empty_like(summaries.log_mass),
        torch.empty_like(summaries.dipole) if dipole else None,
    )
    tiles, narrow = _tiles(query), _is_narrow(query)
    block_c = min(tiles["BLOCK_Q"], power_of_two(sets.max_clusters))
    one_tile = sets.max_clusters <= block_c
    clusters = (sets.table, sets.set_of_row, *groups, centroids)
    strides = *query.stride()[:3], *grad.stride()[:3]
    rows = (sets.num_key_rows, sets.num_rows, sets.num_key_points, sets.num_points)
    # What several tiles add up is rounded once.
    sums = grad_query if one_tile else torch.empty_like(grad_query, dtype=torch.float32)
    low = query.element_size() == 2
    backward_tiles = tiles | {
        "BLOCK_C": block_c,
        "BLOCK_Q": max(16, block_c // 2),
        # A warp for 16 rows of the summaries: more would do the same work again.
        "num_warps": max(block_c // 16, 1 if narrow else 4) if low else tiles["num_warps"],
        "SHARED": low and block_c == 64 and has_much_shared_memory(query),  # as warp groups do on Hopper
        "num_stages": _stages(tiles, dipole) if narrow or (low and has_much_shared_memory(query)) else 1,
    }
    launch(
        _backward_kernel, (sets.num_query_rows, heads),
        query, grad, terms, part_lse, *clusters, *summaries[:3], summaries.dipole,
        sums, grads.key_mean, grads.value_mean, grads.constant,
        *strides, *sums.stride()[:2], sets.num_key_sets, *rows, sets.num_pairs,
        length, terms.shape[1], scale, DIPOLE=dipole, ONE_TILE=one_tile,
        **backward_tiles, **(_BACKWARD_REGISTERS if narrow else {}),
    )  # fmt: skip
    if not one_tile:
        copy(sums, grad_query)
    if dipole:
        parts = ceil_div(tiles["HEAD_DIM"], tiles["BLOCK_E"])
        launch(
            _dipole_backward_kernel, (sets.num_query_rows, parts, heads),
            query, grad, terms, part_lse, *clusters, grads.dipole, *strides, *rows, length, terms.shape[1],
            scale,
            **{**tiles, "num_warps": 4 if tiles["BLOCK_D"] <= 64 else 8},
            **({"maxnreg": 96 if narrow else 128} if low else {}),
        )  # fmt: skip
    return grads


def _is_narrow(query: torch.Tensor) -> bool:
    return query.shape[3] <= 64 and query.element_size() == 2


def _stages(tiles: dict[str, int], dipole: bool) -> int:
    """Of a dipole in parts, two stages would hold all parts at once."""
    return 1 if dipole and tiles["BLOCK_E"] < tiles["BLOCK_D"] else 2


def _tiles(query: torch.Tensor) -> dict[str, int]:
    head_dim = query.shape[3]
    block_d = power_of_two(head_dim)
    row_bytes = block_d * query.element_size()
    rows = min(_TILE, max(16, (1 << 14) // row_bytes))
    dims = max(16, (1 << 15) // row_bytes)
    if row_bytes > 128 and not has_much_shared_memory(query):
        rows, dims = min(rows, 32), min(dims, 32)
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_Q": rows,
        "BLOCK_E": min(dims, block_d),
        "num_warps": 4 if row_bytes <= 256 else 8,
        "num_stages": 2,
    }
