"""Retrieval: exact attention of every query to the keys of the clusters it chose.

Items are (query, rank) pairs, item = row * r + rank where row counts queries head by head. They are sorted by
cluster, so that one program holds the keys of a cluster and streams the queries that chose it. Every item has
its own partial output; partial outputs are merged per query in a fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from muse_hf.kernels.clustering import Clusters
from muse_hf.kernels.common import load_rows, power_of_two, row_offsets


class Items(NamedTuple):
    """Items in the order of their clusters, for each key/value head.

    Attributes:
        order: (Hkv, S) int32 items, S = query heads a key/value head * tokens * r.
        bounds: (Hkv, J + 1) int32: the items of cluster j are order[bounds[j] : bounds[j + 1]].
    """

    order: torch.Tensor
    bounds: torch.Tensor


def sort_items(choice: torch.Tensor, num_clusters: int) -> Items:
    """Sort the choice (Hkv, queries, r); clusters of -1 come first and belong to none."""
    keys = choice.flatten(1)
    if num_clusters < 1 << 15:
        keys = keys.to(torch.int16)
    sorted_keys, order = keys.sort(dim=1, stable=True)
    edges = torch.arange(num_clusters + 1, device=choice.device, dtype=keys.dtype).expand(keys.shape[0], -1)
    bounds = torch.searchsorted(sorted_keys, edges.contiguous(), out_int32=True)
    return Items(order.to(torch.int32), bounds)


@triton.jit
def _load_queries(
    base, item, real, kv_head, num_retrieved, num_tokens, stride_b, stride_h, stride_n, length,
    GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of a tensor (B, H, N, D) for items of a key/value head."""
    row = item // num_retrieved
    heads = kv_head * GROUP_HEADS + row // num_tokens
    return load_rows(
        base, row % num_tokens, real, heads, stride_b, stride_h, stride_n, length, HEAD_DIM, BLOCK_D
    )


@triton.jit
def _forward_kernel(
    query, key, value, members, count, order, bounds, partial, partial_lse,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    length, num_tokens, num_clusters, capacity, num_retrieved, first_head, scale,
    GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Every SPLIT-th stretch of a cluster's items. Grid: clusters, splits, key/value heads."""
    cluster, split, part_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = first_head + part_head
    row = head.to(tl.int64) * num_clusters + cluster
    edges = bounds + part_head.to(tl.int64) * (num_clusters + 1) + cluster
    start, end = tl.load(edges), tl.load(edges + 1)
    num_items = num_tokens * GROUP_HEADS * num_retrieved
    if start + split * BLOCK_Q < end:
        held = tl.load(count + row)
        places = tl.arange(0, BLOCK_M)
        filled = places < held
        tokens = tl.load(members + row * capacity + places, mask=filled, other=0)
        k = load_rows(key, tokens, filled, head, stride_kb, stride_kh, stride_kn, length, HEAD_DIM, BLOCK_D)
        v = load_rows(value, tokens, filled, head, stride_vb, stride_vh, stride_vn, length, HEAD_DIM, BLOCK_D)
        dims = tl.arange(0, BLOCK_D)
        first_item = part_head.to(tl.int64) * num_items
        for at in range(start + split * BLOCK_Q, end, SPLIT * BLOCK_Q):
            at = at + tl.arange(0, BLOCK_Q)
            real = at < end
            item = tl.load(order + first_item + at, mask=real, other=0)
            q = _load_queries(
                query, item, real, head, num_retrieved, num_tokens, stride_qb, stride_qh, stride_qn, length,
                GROUP_HEADS, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            s = tl.where(filled[None, :], s, -float("inf"))
            top = tl.max(s, 1)
            p = tl.exp(s - top[:, None])
            total = tl.sum(p, 1)
            o = tl.dot(p.to(v.dtype), v, input_precision="ieee") / total[:, None]
            to = first_item + item
            tl.store(partial_lse + to, top + tl.log(total), mask=real)
            tl.store(
                partial + to[:, None] * HEAD_DIM + dims[None, :],
                o,
                mask=real[:, None] & (dims < HEAD_DIM)[None, :],
            )


@triton.jit
def _backward_kernel(
    query, key, value, grad, lse, delta, members, count, order, bounds,
    grad_key_mean, grad_value_mean, partial, grad_key, grad_value,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_gkb, stride_gkh, stride_gkn, stride_gvb, stride_gvh, stride_gvn,
    length, num_tokens, num_clusters, capacity, num_retrieved, first_head, scale,
    GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """All items of a cluster: partial gradients of queries, and the whole far gradient of its members.

    A key belongs to one cluster, so its program may add to the local gradient in place. The gradient of the
    summaries reaches a member in equal shares: k̃ and ṽ are means.
    """
    cluster, part_head = tl.program_id(0), tl.program_id(1)
    head = first_head + part_head
    row = head.to(tl.int64) * num_clusters + cluster
    edges = bounds + part_head.to(tl.int64) * (num_clusters + 1) + cluster
    start, end = tl.load(edges), tl.load(edges + 1)
    num_items = num_tokens * GROUP_HEADS * num_retrieved
    held = tl.load(count + row)
    places = tl.arange(0, BLOCK_M)
    filled = places < held
    tokens = tl.load(members + row * capacity + places, mask=filled, other=0)
    k = load_rows(key, tokens, filled, head, stride_kb, stride_kh, stride_kn, length, HEAD_DIM, BLOCK_D)
    v = load_rows(value, tokens, filled, head, stride_vb, stride_vh, stride_vn, length, HEAD_DIM, BLOCK_D)
    dims = tl.arange(0, BLOCK_D)
    first_item = part_head.to(tl.int64) * num_items
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(start, end, BLOCK_Q):
        at = first + tl.arange(0, BLOCK_Q)
        real = at < end
        item = tl.load(order + first_item + at, mask=real, other=0)
        q = _load_queries(
            query, item, real, head, num_retrieved, num_tokens, stride_qb, stride_qh, stride_qn, length,
            GROUP_HEADS, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        do = _load_queries(
            grad, item, real, head, num_retrieved, num_tokens, stride_ob, stride_oh, stride_on, length,
            GROUP_HEADS, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        query_row = head.to(tl.int64) * GROUP_HEADS * num_tokens + item // num_retrieved
        query_lse = tl.load(lse + query_row, mask=real, other=float("inf"))
        query_delta = tl.load(delta + query_row, mask=real, other=0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        p = tl.where(filled[None, :], tl.exp(s - query_lse[:, None]), 0)
        dv += tl.dot(tl.trans(p).to(do.dtype), do, input_precision="ieee")
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - query_delta[:, None])
        ds = ds.to(q.dtype)
        dk += tl.dot(tl.trans(ds), q, input_precision="ieee")
        dq = tl.dot(ds, k, input_precision="ieee") * scale
        tl.store(
            partial + (first_item + item)[:, None] * HEAD_DIM + dims[None, :],
            dq,
            mask=real[:, None] & (dims < HEAD_DIM)[None, :],
        )
    many = tl.maximum(held, 1).to(tl.float32)
    from_mean = row * HEAD_DIM + dims
    dk = dk * scale + tl.load(grad_key_mean + from_mean, mask=dims < HEAD_DIM, other=0)[None, :] / many
    dv += tl.load(grad_value_mean + from_mean, mask=dims < HEAD_DIM, other=0)[None, :] / many
    mask = filled[:, None] & (dims < HEAD_DIM)[None, :]
    to = (
        grad_key
        + row_offsets(tokens, head, stride_gkb, stride_gkh, stride_gkn, length)[:, None]
        + dims[None, :]
    )
    tl.store(to, tl.load(to, mask=mask, other=0).to(tl.float32) + dk, mask=mask)
    to = (
        grad_value
        + row_offsets(tokens, head, stride_gvb, stride_gvh, stride_gvn, length)[:, None]
        + dims[None, :]
    )
    tl.store(to, tl.load(to, mask=mask, other=0).to(tl.float32) + dv, mask=mask)


def retrieve(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, clusters: Clusters, items: Items,
    heads: range, group_heads: int, scale: float, num_retrieved: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Partial outputs (Hkv, S, D) and logsumexps (Hkv, S) of the items of the key/value heads `heads`."""
    batch, _, length, head_dim = query.shape
    num_clusters, capacity = clusters.members.shape[1:]
    num_items = items.order.shape[1]
    partial = query.new_empty(len(heads), num_items, head_dim)
    partial_lse = torch.empty(len(heads), num_items, dtype=torch.float32, device=query.device)
    splits = 4
    _forward_kernel[(num_clusters, splits, len(heads))](
        query, key, value, clusters.members, clusters.count, items.order, items.bounds, partial, partial_lse,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        length, batch * length, num_clusters, capacity, num_retrieved, heads.start, scale,
        GROUP_HEADS=group_heads, HEAD_DIM=head_dim, BLOCK_D=power_of_two(head_dim),
        BLOCK_M=power_of_two(capacity), BLOCK_Q=64, SPLIT=splits, num_warps=4,
    )  # fmt: skip
    return partial, partial_lse


def retrieve_backward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad: torch.Tensor, lse: torch.Tensor,
    delta: torch.Tensor, clusters: Clusters, items: Items, grad_key_mean: torch.Tensor,
    grad_value_mean: torch.Tensor, grad_key: torch.Tensor, grad_value: torch.Tensor,
    heads: range, group_heads: int, scale: float, num_retrieved: int,
) -> torch.Tensor:  # fmt: skip
    """Partial query gradients (Hkv, S, D). Adds the far gradients of keys and values in place."""
    batch, _, length, head_dim = query.shape
    num_clusters, capacity = clusters.members.shape[1:]
    partial = query.new_empty(len(heads), items.order.shape[1], head_dim)
    strides = [s for t in (query, key, value, grad, grad_key, grad_value) for s in t.stride()[:3]]
    _backward_kernel[(num_clusters, len(heads))](
        query, key, value, grad, lse, delta, clusters.members, clusters.count, items.order, items.bounds,
        grad_key_mean, grad_value_mean, partial, grad_key, grad_value, *strides,
        length, batch * length, num_clusters, capacity, num_retrieved, heads.start, scale,
        GROUP_HEADS=group_heads, HEAD_DIM=head_dim, BLOCK_D=power_of_two(head_dim),
        BLOCK_M=power_of_two(capacity), BLOCK_Q=64, num_warps=4,
    )  # fmt: skip
    return partial
