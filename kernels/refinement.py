"""Refinement of plain summaries, and the merge of all parts of the softmax.

Forward, for a tile of queries: the summaries they did not retrieve, then their partial outputs from
retrieval, then the local part, in one running softmax. Backward in two kernels: one a tile of queries for
their gradients, one a tile of clusters for those of the summaries. Both recompute the weights from the merged
logsumexp.
"""

import torch
import triton
import triton.language as tl
from muse_hf.kernels.clustering import Clusters
from muse_hf.kernels.common import load_rows, power_of_two, store_rows
from muse_hf.kernels.layout import SUMMARY_TILE, Layout
from muse_hf.kernels.selection import group_size, summary_logits


@triton.jit
def _kept(chosen, rows, inside, clusters, exists, NUM_GROUPS: tl.constexpr, G: tl.constexpr):
    """True (BLOCK_Q, BLOCK_J) at summaries that are seen and not retrieved."""
    words = tl.load(
        chosen + rows[:, None] * NUM_GROUPS + (clusters // G)[None, :],
        mask=inside[:, None] & exists[None, :],
        other=0,
    )
    return (((words.to(tl.int32) >> (clusters % G)[None, :]) & 1) == 0) & exists[None, :]


@triton.jit
def _forward_kernel(
    query, key_mean, value_mean, count, block_start, block_length, first_cluster, num_seen, chosen, choice,
    partial, partial_lse, local, local_lse, output, lse,
    stride_qb, stride_qh, stride_qn, stride_lb, stride_lh, stride_ln, stride_ob, stride_oh, stride_on,
    length, num_tokens, num_clusters, first_head, scale, num_retrieved,
    GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr, G: tl.constexpr, NUM_GROUPS: tl.constexpr,
):  # fmt: skip
    tile, block, part_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = first_head + part_head
    block_rows = tl.load(block_length + block)
    if tile * BLOCK_Q < block_rows:
        rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        inside = rows < block_rows
        seen = tl.load(num_seen + block)
        tokens = tl.load(block_start + block) + rows
        first = tl.load(first_cluster + block)
        heads_row = (head // GROUP_HEADS).to(tl.int64) * num_clusters + first
        q = load_rows(query, tokens, inside, head, stride_qb, stride_qh, stride_qn, length, HEAD_DIM, BLOCK_D)
        dims = tl.arange(0, BLOCK_D)
        item_row = part_head.to(tl.int64) * num_tokens + tokens

        # The local part starts the sum: every query attends to itself, so its logsumexp is finite.
        row = head.to(tl.int64) * num_tokens + tokens
        top = tl.load(local_lse + row, mask=inside, other=0)
        total = tl.full([BLOCK_Q], 1, tl.float32)
        o = load_rows(
            local, tokens, inside, head, stride_lb, stride_lh, stride_ln, length, HEAD_DIM, BLOCK_D
        ).to(tl.float32)
        for j in range(0, seen, BLOCK_J):
            clusters = j + tl.arange(0, BLOCK_J)
            exists = clusters < seen
            s = summary_logits(q, key_mean, count, heads_row, clusters, exists, scale, HEAD_DIM, BLOCK_D)
            kept = _kept(chosen, item_row, inside, clusters, exists, NUM_GROUPS, G)
            s = tl.where(kept, s, -float("inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            p = tl.exp(s - new_top[:, None])
            shrink = tl.exp(top - new_top)
            v = tl.load(
                value_mean + (heads_row + clusters)[:, None] * HEAD_DIM + dims[None, :],
                mask=exists[:, None] & (dims < HEAD_DIM)[None, :],
                other=0,
            )
            o = o * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            total = total * shrink + tl.sum(p, 1)
            top = new_top
        if seen > 0:
            items = item_row * num_retrieved
            new_top = top
            for i in range(num_retrieved):
                real = inside & (tl.load(choice + items + i, mask=inside, other=-1) >= 0)
                new_top = tl.maximum(
                    new_top, tl.load(partial_lse + items + i, mask=real, other=-float("inf"))
                )
            shrink = tl.exp(top - new_top)
            o = o * shrink[:, None]
            total = total * shrink
            top = new_top
            for i in range(num_retrieved):
                real = inside & (tl.load(choice + items + i, mask=inside, other=-1) >= 0)
                weight = tl.exp(tl.load(partial_lse + items + i, mask=real, other=-float("inf")) - top)
                part = tl.load(
                    partial + (items + i)[:, None] * HEAD_DIM + dims[None, :],
                    mask=real[:, None] & (dims < HEAD_DIM)[None, :],
                    other=0,
                )
                o += weight[:, None] * part.to(tl.float32)
                total += weight
        tl.store(lse + row, top + tl.log(total), mask=inside)
        store_rows(
            output, o / total[:, None], tokens, inside, head, stride_ob, stride_oh, stride_on, length,
            HEAD_DIM, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _query_backward_kernel(
    query, key_mean, value_mean, count, block_start, block_length, first_cluster, num_seen, chosen, choice,
    partial, grad, lse, delta, grad_query,
    stride_qb, stride_qh, stride_qn, stride_ob, stride_oh, stride_on, stride_gb, stride_gh, stride_gn,
    length, num_tokens, num_clusters, first_head, scale, num_retrieved,
    GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr, G: tl.constexpr, NUM_GROUPS: tl.constexpr,
):  # fmt: skip
    """Adds the far gradient of a tile of queries to the local one."""
    tile, block, part_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = first_head + part_head
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
        dims = tl.arange(0, BLOCK_D)
        item_row = part_head.to(tl.int64) * num_tokens + tokens
        row = head.to(tl.int64) * num_tokens + tokens
        query_lse = tl.load(lse + row, mask=inside, other=float("inf"))
        query_delta = tl.load(delta + row, mask=inside, other=0)
        dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        for j in range(0, seen, BLOCK_J):
            clusters = j + tl.arange(0, BLOCK_J)
            exists = clusters < seen
            at = (heads_row + clusters)[:, None] * HEAD_DIM + dims[None, :]
            mask = exists[:, None] & (dims < HEAD_DIM)[None, :]
            s = summary_logits(q, key_mean, count, heads_row, clusters, exists, scale, HEAD_DIM, BLOCK_D)
            kept = _kept(chosen, item_row, inside, clusters, exists, NUM_GROUPS, G)
            p = tl.where(kept, tl.exp(s - query_lse[:, None]), 0)
            v = tl.load(value_mean + at, mask=mask, other=0)
            ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - query_delta[:, None])
            k = tl.load(key_mean + at, mask=mask, other=0)
            dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
        dq *= scale
        items = item_row * num_retrieved
        for i in range(num_retrieved):
            real = inside & (tl.load(choice + items + i, mask=inside, other=-1) >= 0)
            dq += tl.load(
                partial + (items + i)[:, None] * HEAD_DIM + dims[None, :],
                mask=real[:, None] & (dims < HEAD_DIM)[None, :],
                other=0,
            ).to(tl.float32)
        dq += load_rows(
            grad_query, tokens, inside, head, stride_gb, stride_gh, stride_gn, length, HEAD_DIM, BLOCK_D
        ).to(tl.float32)
        store_rows(
            grad_query, dq, tokens, inside, head, stride_gb, stride_gh, stride_gn, length, HEAD_DIM, BLOCK_D
        )


@triton.jit
def _summary_backward_kernel(
    query, key_mean, value_mean, count, tile_first, tile_end, query_start, query_end, sequence_first, chosen,
    grad, lse, delta, grad_key_mean, grad_value_mean,
    stride_qb, stride_qh, stride_qn, stride_ob, stride_oh, stride_on,
    length, num_tokens, num_clusters, first_head, scale, block_size, clusters_per_block,
    GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr, G: tl.constexpr, NUM_GROUPS: tl.constexpr,
):  # fmt: skip
    """Gradients of the summaries of a tile of clusters, over all queries and query heads that see them."""
    tile, part_head = tl.program_id(0), tl.program_id(1)
    kv_head = first_head + part_head
    first, end = tl.load(tile_first + tile), tl.load(tile_end + tile)
    base = tl.load(sequence_first + tile)
    start, stop = tl.load(query_start + tile), tl.load(query_end + tile)
    clusters = first + tl.arange(0, BLOCK_J)
    exists = clusters < end
    local = clusters - base
    heads_row = kv_head.to(tl.int64) * num_clusters
    dims = tl.arange(0, BLOCK_D)
    at = (heads_row + clusters)[:, None] * HEAD_DIM + dims[None, :]
    mask = exists[:, None] & (dims < HEAD_DIM)[None, :]
    k = tl.load(key_mean + at, mask=mask, other=0)
    v = tl.load(value_mean + at, mask=mask, other=0)
    many = tl.load(count + heads_row + clusters, mask=exists, other=0)
    log_mass = tl.where(many > 0, tl.log(many.to(tl.float32)), -float("inf"))
    # Queries of the block after a cluster's own are the first to see it.
    seen_from = start + (local // clusters_per_block - tl.min(local, 0) // clusters_per_block) * block_size
    dk = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
    for group_head in range(GROUP_HEADS):
        head = kv_head * GROUP_HEADS + group_head
        part_row = (part_head * GROUP_HEADS + group_head).to(tl.int64) * num_tokens
        for first_query in range(start, stop, BLOCK_Q):
            tokens = first_query + tl.arange(0, BLOCK_Q)
            inside = tokens < stop
            q = load_rows(
                query, tokens, inside, head, stride_qb, stride_qh, stride_qn, length, HEAD_DIM, BLOCK_D
            )
            do = load_rows(
                grad, tokens, inside, head, stride_ob, stride_oh, stride_on, length, HEAD_DIM, BLOCK_D
            )
            row = head.to(tl.int64) * num_tokens + tokens
            query_lse = tl.load(lse + row, mask=inside, other=float("inf"))
            query_delta = tl.load(delta + row, mask=inside, other=0)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + log_mass[None, :]
            seen = exists[None, :] & (tokens[:, None] >= seen_from[None, :]) & inside[:, None]
            words = tl.load(
                chosen + (part_row + tokens)[:, None] * NUM_GROUPS + (local // G)[None, :], mask=seen, other=0
            )
            kept = seen & (((words.to(tl.int32) >> (local % G)[None, :]) & 1) == 0)
            p = tl.where(kept, tl.exp(s - query_lse[:, None]), 0)
            dv += tl.dot(tl.trans(p).to(do.dtype), do, input_precision="ieee")
            ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - query_delta[:, None])
            dk += tl.dot(tl.trans(ds).to(q.dtype), q, input_precision="ieee")
    tl.store(grad_key_mean + at, dk * scale, mask=mask)
    tl.store(grad_value_mean + at, dv, mask=mask)


@triton.jit
def _delta_kernel(
    output, grad, delta, stride_ob, stride_oh, stride_on, stride_gb, stride_gh, stride_gn, length, num_tokens,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Δ = do·o of a tile of queries."""
    head = tl.program_id(1)
    tokens = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = tokens < num_tokens
    o = load_rows(output, tokens, inside, head, stride_ob, stride_oh, stride_on, length, HEAD_DIM, BLOCK_D)
    do = load_rows(grad, tokens, inside, head, stride_gb, stride_gh, stride_gn, length, HEAD_DIM, BLOCK_D)
    total = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + head.to(tl.int64) * num_tokens + tokens, total, mask=inside)


def output_delta(output: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Δ = do·o, (H, B * N) float32, of an output and its gradient (B, H, N, D)."""
    batch, heads, length, head_dim = output.shape
    num_tokens = batch * length
    delta = torch.empty(heads, num_tokens, dtype=torch.float32, device=output.device)
    _delta_kernel[(triton.cdiv(num_tokens, 64), heads)](
        output, grad, delta, *output.stride()[:3], *grad.stride()[:3], length, num_tokens,
        HEAD_DIM=head_dim, BLOCK_D=power_of_two(head_dim), BLOCK_Q=64,
    )  # fmt: skip
    return delta


def merge_parts(
    query, clusters: Clusters, layout: Layout, chosen, choice, partial, partial_lse, local, local_lse,
    output, lse, heads: range, group_heads: int, scale: float, block: int,
) -> None:  # fmt: skip
    """Fill output (B, H, N, D) and lse (H, B * N) of the query heads `heads`."""
    batch, _, length, head_dim = query.shape
    block_q = 64
    grid = (triton.cdiv(block, block_q), layout.block_start.shape[0], len(heads))
    _forward_kernel[grid](
        query, clusters.key_mean, clusters.value_mean, clusters.count, layout.block_start,
        layout.block_length, layout.first_cluster, layout.num_seen, chosen, choice, partial, partial_lse,
        local, local_lse, output, lse, *query.stride()[:3], *local.stride()[:3], *output.stride()[:3],
        length, batch * length, clusters.count.shape[1], heads.start, scale, choice.shape[-1],
        GROUP_HEADS=group_heads, HEAD_DIM=head_dim, BLOCK_D=power_of_two(head_dim), BLOCK_Q=block_q,
        BLOCK_J=64, G=group_size(layout.max_seen), NUM_GROUPS=chosen.shape[-1], num_warps=4,
    )  # fmt: skip


def query_backward(
    query, clusters: Clusters, layout: Layout, chosen, choice, partial, grad, lse, delta, grad_query,
    heads: range, group_heads: int, scale: float, block: int,
) -> None:  # fmt: skip
    """Add the far gradient of the queries of `heads` to the local one in grad_query (B, H, N, D)."""
    batch, _, length, head_dim = query.shape
    block_q = 64
    grid = (triton.cdiv(block, block_q), layout.block_start.shape[0], len(heads))
    _query_backward_kernel[grid](
        query, clusters.key_mean, clusters.value_mean, clusters.count, layout.block_start,
        layout.block_length, layout.first_cluster, layout.num_seen, chosen, choice, partial, grad, lse, delta,
        grad_query, *query.stride()[:3], *grad.stride()[:3], *grad_query.stride()[:3],
        length, batch * length, clusters.count.shape[1], heads.start, scale, choice.shape[-1],
        GROUP_HEADS=group_heads, HEAD_DIM=head_dim, BLOCK_D=power_of_two(head_dim), BLOCK_Q=block_q,
        BLOCK_J=64, G=group_size(layout.max_seen), NUM_GROUPS=chosen.shape[-1], num_warps=4,
    )  # fmt: skip


def summary_backward(
    query, clusters: Clusters, layout: Layout, chosen, grad, lse, delta, grad_key_mean, grad_value_mean,
    heads: range, group_heads: int, scale: float, block: int, clusters_per_block: int,
) -> None:  # fmt: skip
    """Fill the float32 gradients (Hkv, J, D) of the summaries of the key/value heads `heads`."""
    batch, _, length, head_dim = query.shape
    tiles = layout.summary_tiles
    _summary_backward_kernel[(tiles.first.shape[0], len(heads))](
        query, clusters.key_mean, clusters.value_mean, clusters.count, *tiles, chosen, grad, lse, delta,
        grad_key_mean, grad_value_mean, *query.stride()[:3], *grad.stride()[:3],
        length, batch * length, clusters.count.shape[1], heads.start, scale, block, clusters_per_block,
        GROUP_HEADS=group_heads, HEAD_DIM=head_dim, BLOCK_D=power_of_two(head_dim), BLOCK_Q=64,
        BLOCK_J=SUMMARY_TILE, G=group_size(layout.max_seen), NUM_GROUPS=chosen.shape[-1], num_warps=4,
    )  # fmt: skip
