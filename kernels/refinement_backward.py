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
    load_summaries,
    rows_at,
    summary_logits,
)

# Programs that the gradients of summaries are spread over, so that the whole device is busy.
_PROGRAMS = 2048
_QUERY_LAUNCH = {"BLOCK_Q": 64, "BLOCK_J": 32, "num_warps": 4, "num_stages": 3}
_PRECISE_QUERY_LAUNCH = {"BLOCK_Q": 32, "BLOCK_J": 32, "num_warps": 8, "num_stages": 1}
_SUMMARY_LAUNCH = {"BLOCK_Q": 64, "BLOCK_J": TILE, "num_warps": 4, "num_stages": 3}
_WIDE_SUMMARY_LAUNCH = {"BLOCK_Q": 64, "BLOCK_J": TILE, "num_warps": 8, "num_stages": 2}
_PRECISE_SUMMARY_LAUNCH = {"BLOCK_Q": 16, "BLOCK_J": TILE, "num_warps": 8, "num_stages": 1}


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
        dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        for j in range(0, seen, BLOCK_J):
            k = load_summaries(k_at + j * HEAD_DIM, j + place < seen, HEAD_DIM, BLOCK_D)
            s = summary_logits(q, k, log_mass + heads_row + j + place, j + place < seen, scale)
            taken = is_chosen(chosen_at, inside, num_tokens, WORDS, BLOCK_J)
            chosen_at += BLOCK_J // 32 * num_tokens
            p = tl.where(taken, 0, tl.exp2(s * LOG2_E - query_lse[:, None]))
            v = load_summaries(v_at + j * HEAD_DIM, j + place < seen, HEAD_DIM, BLOCK_D)
            ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - query_delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        dq = dq * scale + load_rows(
            grad_query, tokens, inside, head, stride_gb, stride_gh, stride_gn, length, HEAD_DIM, BLOCK_D
        ).to(tl.float32)
        store_rows(
            grad_query, dq, tokens, inside, head, stride_gb, stride_gh, stride_gn, length, HEAD_DIM, BLOCK_D
        )


@triton.jit
def _summary_backward_kernel(
    query, key_mean, value_mean, log_mass, tile_first, tile_end, query_start, query_end, sequence_first,
    chosen, grad, lse, delta, part_key_mean, part_value_mean,
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
    clusters = first + tl.arange(0, BLOCK_J)
    exists = clusters < end
    heads_row = kv_head.to(tl.int64) * num_clusters
    dims = tl.arange(0, BLOCK_D)
    at = (heads_row + clusters)[:, None] * HEAD_DIM + dims[None, :]
    mask = exists[:, None] & (dims < HEAD_DIM)[None, :]
    k_at = rows_at(key_mean, heads_row + clusters, HEAD_DIM, BLOCK_D)
    v_at = rows_at(value_mean, heads_row + clusters, HEAD_DIM, BLOCK_D)
    k = load_summaries(k_at, exists, HEAD_DIM, BLOCK_D)
    v = load_summaries(v_at, exists, HEAD_DIM, BLOCK_D)
    first_word = (local // 32).to(tl.int64) * num_tokens
    # Queries of the block after a cluster's own are the first to see it.
    own_block = (local + tl.arange(0, BLOCK_J)) // clusters_per_block
    seen_from = start + (own_block - local // clusters_per_block) * block_size
    dk = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
    step = BLOCK_Q * num_splits
    for first_query in range(start + part % num_splits * BLOCK_Q, stop, step):
        tokens = first_query + tl.arange(0, BLOCK_Q)
        inside = tokens < stop
        q = load_rows(query, tokens, inside, head, stride_qb, stride_qh, stride_qn, length, HEAD_DIM, BLOCK_D)
        do = load_rows(grad, tokens, inside, head, stride_ob, stride_oh, stride_on, length, HEAD_DIM, BLOCK_D)
        row = head.to(tl.int64) * num_tokens + tokens
        query_lse = tl.load(lse + row, mask=inside, other=float("inf")) * LOG2_E
        query_delta = tl.load(delta + row, mask=inside, other=0)
        s = summary_logits(q, k, log_mass + heads_row + clusters, exists, scale)
        chosen_at = chosen_row(chosen, head, tokens, num_tokens, WORDS) + first_word
        kept = tokens[:, None] >= seen_from[None, :]
        kept = kept & ~is_chosen(chosen_at, inside, num_tokens, WORDS, BLOCK_J)
        p = tl.where(kept, tl.exp2(s * LOG2_E - query_lse[:, None]), 0)
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision="ieee")
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - query_delta[:, None])
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision="ieee")
    at += part.to(tl.int64) * num_heads * num_clusters * HEAD_DIM
    tl.store(part_key_mean + at, dk * scale, mask=mask)
    tl.store(part_value_mean + at, dv, mask=mask)


def query_backward(
    query: torch.Tensor, clusters: Clusters, layout: Layout, chosen: torch.Tensor, grad: torch.Tensor,
    lse: torch.Tensor, delta: torch.Tensor, grad_query: torch.Tensor, scale: float, block: int,
) -> None:  # fmt: skip
    """Add the gradient through the summaries to the local one in grad_query (B, H, N, D)."""
    settings = choose_launch(query, _QUERY_LAUNCH, _QUERY_LAUNCH, _PRECISE_QUERY_LAUNCH)
    launch(
        _query_backward_kernel,
        (ceil_div(block, settings["BLOCK_Q"]), query.shape[1], layout.block_start.shape[0]),
        query, clusters.key_mean, clusters.value_mean, clusters.log_mass, *layout.query_blocks, chosen,
        grad, lse, delta, grad_query, *token_strides(query, grad, grad_query), *_sizes(query, clusters),
        scale, **_tiles(query, clusters, chosen), **settings,
    )  # fmt: skip


def summary_backward(
    query: torch.Tensor, clusters: Clusters, layout: Layout, chosen: torch.Tensor, grad: torch.Tensor,
    lse: torch.Tensor, delta: torch.Tensor, scale: float, block: int, clusters_per_block: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients (Hkv, J, D) float32 of the key and value means."""
    kv_heads, num_clusters = clusters.count.shape
    head_dim = query.shape[3]
    groups = query.shape[1] // kv_heads
    tiles = layout.summary_tiles
    num_tiles = tiles.first.shape[0]
    settings = choose_launch(query, _SUMMARY_LAUNCH, _WIDE_SUMMARY_LAUNCH, _PRECISE_SUMMARY_LAUNCH)
    shares = ceil_div(query.shape[2], settings["BLOCK_Q"])  # of a row's queries, at most
    splits = min(shares, ceil_div(_PROGRAMS, num_tiles * query.shape[1]))
    parts = query.new_empty(2, groups * splits, kv_heads, num_clusters, head_dim, dtype=torch.float32)
    launch(
        _summary_backward_kernel, (num_tiles, groups * splits, kv_heads),
        query, clusters.key_mean, clusters.value_mean, clusters.log_mass, *tiles, chosen, grad, lse, delta,
        *parts.unbind(), *token_strides(query, grad), *_sizes(query, clusters), kv_heads, splits, scale,
        block, clusters_per_block, **_tiles(query, clusters, chosen), **settings,
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
