"""Gradients through plain summaries, given the merged logsumexp λ and Δ: p = exp(ℓ - λ), dℓ = p (do·ṽ - Δ).

One kernel takes a tile of queries and gives their gradients, another takes a tile of clusters and gives those
of the summaries. Both form the weights again.
"""

import torch
import triton
import triton.language as tl
from muse_hf.kernels.clustering import Clusters
from muse_hf.kernels.common import (
    LOG2_E,
    choose_launch,
    load_at,
    load_rows,
    power_of_two,
    store_rows,
    token_strides,
    wait_for_previous_kernel,
)
from muse_hf.kernels.launch import ceil_div, launch
from muse_hf.kernels.layout import Layout
from muse_hf.kernels.replay import library_call
from muse_hf.kernels.summaries import (
    TILE,
    chosen_row,
    is_chosen,
    rows_at,
    summary_logits,
)
from muse_hf.kernels.weight_terms import (
    load_weight_terms,
    nonzero,
    ones_for,
    products_less_delta,
    weights_of_keys,
)

# Programs that the gradients of summaries are spread over, so that the whole device is busy.
_PROGRAMS = 2048
_QUERY_LAUNCH = {"BLOCK_Q": 64, "BLOCK_J": 32, "num_warps": 4, "num_stages": 3, "maxnreg": 128}
_WIDE_QUERY_LAUNCH = {"BLOCK_Q": 64, "BLOCK_J": 32, "num_warps": 4, "num_stages": 2, "maxnreg": 168}
_WIDEST_QUERY_LAUNCH = {"BLOCK_Q": 64, "BLOCK_J": 32, "num_warps": 4, "num_stages": 3}
_PRECISE_QUERY_LAUNCH = {"BLOCK_Q": 32, "BLOCK_J": 32, "num_warps": 8, "num_stages": 1}
_SUMMARY_LAUNCH = {"BLOCK_Q": 64, "BLOCK_J": TILE, "num_warps": 4, "num_stages": 3}
_WIDE_SUMMARY_LAUNCH = {"BLOCK_Q": 64, "BLOCK_J": TILE, "num_warps": 4, "num_stages": 2}
_WIDEST_SUMMARY_LAUNCH = {"BLOCK_Q": 64, "BLOCK_J": TILE, "num_warps": 8, "num_stages": 2}
_PRECISE_SUMMARY_LAUNCH = {"BLOCK_Q": 16, "BLOCK_J": TILE, "num_warps": 8, "num_stages": 1}


@triton.jit
def _query_step(
    dq, q, do, query_lse, query_delta, k_at, v_at, mass_at, chosen_at, inside, exists, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of queries after one more tile of clusters. exists: None if all of them do."""
    k = load_at(k_at, exists, HEAD_DIM, BLOCK_D)
    s = summary_logits(q, k, mass_at, exists, scale)
    taken = is_chosen(chosen_at, inside, WORDS, BLOCK_J)
    p = tl.where(taken, 0, tl.exp2(s * LOG2_E - query_lse[:, None]))
    v = load_at(v_at, exists, HEAD_DIM, BLOCK_D)
    ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - query_delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def _query_backward_kernel(
    query, key_mean, value_mean, log_mass, block_start, block_length, first_cluster, num_seen, chosen,
    grad, lse, delta, grad_query,
    stride_qb, stride_qh, stride_qn, stride_ob, stride_oh, stride_on, stride_gb, stride_gh, stride_gn,
    length, num_tokens, num_clusters, scale,
    GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Adds the gradient of a tile of queries through the summaries to the local one."""
    wait_for_previous_kernel()
    tile, head = tl.program_id(0), tl.program_id(1)
    block = tl.num_programs(2) - 1 - tl.program_id(2)
    block_rows = tl.load(block_length + block)
    seen = tl.load(num_seen + block)
    if (tile * BLOCK_Q < block_rows) & (seen > 0):
        rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        inside = rows < block_rows
        tokens = tl.load(block_start + block) + rows
        first = tl.load(first_cluster + block)
        heads_row = (head // GROUP_HEADS).to(tl.int64) * num_clusters + first
        q = load_rows(query, tokens, inside, head, stride_qb, stride_qh, stride_qn, length, HEAD_DIM, BLOCK_D)
        do = load_rows(grad, tokens, inside, head, stride_ob, stride_oh, stride_on, length, HEAD_DIM, BLOCK_D)
        row = head.to(tl.int64) * num_tokens + tokens
        query_lse = tl.load(lse + row, mask=inside, other=float("inf")) * LOG2_E
        query_delta = tl.load(delta + row, mask=inside, other=0)
        chosen_at = chosen_row(chosen, head, tokens, num_tokens, WORDS)
        place = tl.arange(0, BLOCK_J)
        k_at = rows_at(key_mean, heads_row + place, HEAD_DIM, BLOCK_D)
        v_at = rows_at(value_mean, heads_row + place, HEAD_DIM, BLOCK_D)
        mass_at = log_mass + heads_row + place
        dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        whole = seen // BLOCK_J * BLOCK_J  # the last tile may be short
        for j in range(0, whole, BLOCK_J):
            dq = _query_step(
                dq, q, do, query_lse, query_delta, k_at + j * HEAD_DIM, v_at + j * HEAD_DIM, mass_at + j,
                chosen_at, inside, None, scale, HEAD_DIM, BLOCK_D, BLOCK_J, WORDS,
            )  # fmt: skip
            chosen_at += num_tokens
        for j in range(whole, seen, BLOCK_J):
            dq = _query_step(
                dq, q, do, query_lse, query_delta, k_at + j * HEAD_DIM, v_at + j * HEAD_DIM, mass_at + j,
                chosen_at, inside, place < seen - j, scale, HEAD_DIM, BLOCK_D, BLOCK_J, WORDS,
            )  # fmt: skip
        dq = dq * scale + load_rows(
            grad_query, tokens, inside, head, stride_gb, stride_gh, stride_gn, length, HEAD_DIM, BLOCK_D
        ).to(tl.float32)
        store_rows(
            grad_query, dq, tokens, inside, head, stride_gb, stride_gh, stride_gn, length, HEAD_DIM, BLOCK_D
        )


@triton.jit
def _summary_step(
    dk, dv, k, v, ones, bias, bit, seen_from, query, grad, terms, summands, chosen, tokens, stop, head,
    stride_qb, stride_qh, stride_qn, stride_ob, stride_oh, stride_on, length, num_tokens, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WORDS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of summaries after one more tile of queries.

    Args:
        bit: (BLOCK_J,) the bit of a cluster in its word: the first of the tile's two in rows 0 to 7, the
            second in rows 8 to 15, and so on.
        seen_from: (BLOCK_J,) the first query that sees a cluster.
        MASKED: Whether some of the queries do not see all of the clusters.
    """
    # Zeros for the others, so that no weight is masked: it is the number of keys, its gradients are times 0.
    inside = tokens < stop
    q = load_rows(query, tokens, inside, head, stride_qb, stride_qh, stride_qn, length, HEAD_DIM, BLOCK_D)
    do = load_rows(grad, tokens, inside, head, stride_ob, stride_oh, stride_on, length, HEAD_DIM, BLOCK_D)
    row = head.to(tl.int64) * num_tokens + tokens
    query_lse, query_delta = load_weight_terms(terms, summands, row, inside)
    p = weights_of_keys(k, q, ones, query_lse, scale, bias)
    if WORDS > 0:
        pair = tl.load(
            chosen + tokens[:, None] + tl.arange(0, 2)[None, :] * num_tokens, mask=inside[:, None], other=0
        )
        lower, upper = tl.split(pair)
        in_lower = tl.arange(0, bit.shape[0]) // 8 % 2 == 0
        word = tl.where(in_lower[:, None], lower[None, :], upper[None, :])
        p = tl.where((word & bit[:, None]) == 0, p, 0)
    if MASKED:
        p = tl.where(tokens[None, :] >= seen_from[:, None], p, 0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    ds = p * products_less_delta(v, do, ones, query_delta)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _summary_backward_kernel(
    query, key_mean, value_mean, log_mass, tile_first, tile_end, query_start, query_end, sequence_first,
    chosen, grad, terms, summands, part_key_mean, part_value_mean,
    stride_qb, stride_qh, stride_qn, stride_ob, stride_oh, stride_on,
    length, num_tokens, num_clusters, num_heads, num_splits, scale, block_size, clusters_per_block,
    GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Gradients of the summaries of a tile of clusters, from a share of the queries of one query head."""
    wait_for_previous_kernel()
    tile, part, kv_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = kv_head * GROUP_HEADS + part // num_splits
    first, end = tl.load(tile_first + tile), tl.load(tile_end + tile)
    local = first - tl.load(sequence_first + tile)
    start, stop = tl.load(query_start + tile), tl.load(query_end + tile)
    tl.static_assert(BLOCK_J == 64, "or a tile has not two words")
    # Where a thread has row i of a product it has row i + 8 too: then these have the same bit in two words.
    row = tl.arange(0, BLOCK_J)
    place = row // 16 * 8 + row % 8
    bit = tl.full([BLOCK_J], 1, tl.int32) << place
    place += row // 8 % 2 * 32
    exists = first + place < end
    heads_row = kv_head.to(tl.int64) * num_clusters + first
    clusters = heads_row + place
    k_at = rows_at(key_mean, clusters, HEAD_DIM, BLOCK_D)
    v_at = rows_at(value_mean, clusters, HEAD_DIM, BLOCK_D)
    k = load_at(k_at, exists, HEAD_DIM, BLOCK_D)
    v = load_at(v_at, exists, HEAD_DIM, BLOCK_D)
    bias = tl.where(exists, tl.load(log_mass + clusters), -float("inf")) * LOG2_E
    ones = None if summands is None else ones_for(summands, BLOCK_J)
    factor = nonzero(scale) * LOG2_E
    chosen = chosen_row(chosen, head, (local // 32).to(tl.int64) * num_tokens, num_tokens, WORDS)
    # Queries of the block after a cluster's own are the first to see it.
    own_block = local // clusters_per_block
    seen_from = start + ((local + place) // clusters_per_block - own_block) * block_size
    last = local + tl.minimum(BLOCK_J, end - first) - 1
    all_seen = start + (last // clusters_per_block - own_block) * block_size
    dk = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
    step = BLOCK_Q * num_splits
    lane = tl.arange(0, BLOCK_Q)
    begin = start + part % num_splits * BLOCK_Q
    unmasked = begin + tl.cdiv(tl.maximum(all_seen - begin, 0), step) * step
    for i in range(begin, tl.minimum(unmasked, stop), step):
        dk, dv = _summary_step(
            dk, dv, k, v, ones, bias, bit, seen_from, query, grad, terms, summands, chosen, i + lane, stop,
            head, stride_qb, stride_qh, stride_qn, stride_ob, stride_oh, stride_on, length, num_tokens,
            factor, HEAD_DIM, BLOCK_D, WORDS, True,
        )  # fmt: skip
    for i in range(unmasked, stop, step):
        dk, dv = _summary_step(
            dk, dv, k, v, ones, bias, bit, seen_from, query, grad, terms, summands, chosen, i + lane, stop,
            head, stride_qb, stride_qh, stride_qn, stride_ob, stride_oh, stride_on, length, num_tokens,
            factor, HEAD_DIM, BLOCK_D, WORDS, False,
        )  # fmt: skip
    at = part.to(tl.int64) * num_heads * num_clusters * HEAD_DIM
    mask = exists[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    tl.store(rows_at(part_key_mean + at, clusters, HEAD_DIM, BLOCK_D), dk * scale, mask=mask)
    tl.store(rows_at(part_value_mean + at, clusters, HEAD_DIM, BLOCK_D), dv, mask=mask)


def query_backward(
    query: torch.Tensor, clusters: Clusters, layout: Layout, chosen: torch.Tensor, grad: torch.Tensor,
    lse: torch.Tensor, delta: torch.Tensor, grad_query: torch.Tensor, scale: float, block: int,
) -> None:  # fmt: skip
    """Add the gradient through the summaries to the local one in grad_query (B, H, N, D)."""
    settings = choose_launch(
        query, _QUERY_LAUNCH, _WIDE_QUERY_LAUNCH, _PRECISE_QUERY_LAUNCH, _WIDEST_QUERY_LAUNCH
    )
    launch(
        _query_backward_kernel,
        (ceil_div(block, settings["BLOCK_Q"]), query.shape[1], layout.block_start.shape[0]),
        query, clusters.key_mean, clusters.value_mean, clusters.log_mass, *layout.query_blocks, chosen,
        grad, lse, delta, grad_query, *token_strides(query, grad, grad_query), *_sizes(query, clusters),
        scale, **_tiles(query, clusters, chosen), **settings,
    )  # fmt: skip


def summary_backward(
    query: torch.Tensor, clusters: Clusters, layout: Layout, chosen: torch.Tensor, grad: torch.Tensor,
    terms: torch.Tensor, summands: torch.Tensor | None, scale: float, block: int, clusters_per_block: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients (Hkv, J, D) float32 of the key and value means.

    Args:
        terms, summands: See `WeightTerms`.
    """
    kv_heads, num_clusters = clusters.count.shape
    head_dim = query.shape[3]
    groups = query.shape[1] // kv_heads
    tiles = layout.summary_tiles
    num_tiles = tiles.first.shape[0]
    settings = choose_launch(
        query, _SUMMARY_LAUNCH, _WIDE_SUMMARY_LAUNCH, _PRECISE_SUMMARY_LAUNCH, _WIDEST_SUMMARY_LAUNCH
    )
    shares = ceil_div(query.shape[2], settings["BLOCK_Q"])  # of a row's queries, at most
    splits = min(shares, ceil_div(_PROGRAMS, num_tiles * query.shape[1]))
    parts = query.new_empty(2, groups * splits, kv_heads, num_clusters, head_dim, dtype=torch.float32)
    launch(
        _summary_backward_kernel, (num_tiles, groups * splits, kv_heads),
        query, clusters.key_mean, clusters.value_mean, clusters.log_mass, *tiles, chosen, grad,
        terms, summands, *parts.unbind(), *token_strides(query, grad), *_sizes(query, clusters), kv_heads,
        splits, scale, block, clusters_per_block, **_tiles(query, clusters, chosen), **settings,
    )  # fmt: skip
    (total,) = _sum_of_parts(parts)
    return total.unbind()


@library_call
def _sum_of_parts(parts: torch.Tensor) -> tuple[torch.Tensor]:
    return (parts.sum(1),)


def _sizes(query: torch.Tensor, clusters: Clusters) -> tuple[int, int]:
    return query.shape[0] * query.shape[2], clusters.count.shape[1]


def _tiles(query: torch.Tensor, clusters: Clusters, chosen: torch.Tensor) -> dict[str, int]:
    head_dim = query.shape[3]
    return {
        "GROUP_HEADS": query.shape[1] // clusters.count.shape[0],
        "HEAD_DIM": head_dim,
        "BLOCK_D": power_of_two(head_dim),
        "WORDS": chosen.shape[1],
    }
