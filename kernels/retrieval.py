"""Retrieval: exact attention of every query to the keys of the clusters it chose.

Items (`items.py`) are listed by cluster, so that one program holds the keys of a cluster and streams the
queries that chose it. Every item has its own partial output; partial outputs are merged per query in a fixed
order.
"""

import torch
import triton
import triton.language as tl
from muse_hf.kernels.clustering import Clusters
from muse_hf.kernels.common import (
    LOG2_E,
    choose_launch,
    has_much_shared_memory,
    load_at,
    load_rows,
    power_of_two,
    row_offsets,
    store_rows,
    token_strides,
    wait_for_previous_kernel,
)
from muse_hf.kernels.items import Items
from muse_hf.kernels.launch import ceil_div, launch
from muse_hf.kernels.weight_terms import (
    SUMMANDS,
    load_weight_terms,
    nonzero,
    ones_for,
    products_less_delta,
    weights_of_keys,
)

# Partial outputs that exist at once. Key/value heads are worked through in parts of this size.
_PARTIAL_BYTES = 1 << 30
_FORWARD = {"BLOCK_Q": 64, "num_warps": 4, "num_stages": 1}
_PRECISE = {"BLOCK_Q": 16, "num_warps": 8, "num_stages": 1}
_BACKWARD = {"BLOCK_Q": 64, "num_warps": 4, "num_stages": 3, "maxnreg": 168}
# For clusters of more than 64 keys, which fill the registers.
_LARGE_BACKWARD = {"BLOCK_Q": 64, "num_warps": 8, "num_stages": 2}
_WIDE_BACKWARD = {"BLOCK_Q": 64, "num_warps": 8, "num_stages": 3}
# For less shared memory than that takes.
_SMALL_WIDE_BACKWARD = {"BLOCK_Q": 32, "num_warps": 4, "num_stages": 3}
_WIDEST_BACKWARD = {"BLOCK_Q": 32, "num_warps": 8, "num_stages": 2}
# Programs that share the queries of a cluster in the forward pass.
_SPLITS = 4
# Numbers of outputs that one program merges: 16 bytes a thread of every partial output.
_MERGED = 1024


@triton.jit
def _load_queries(
    base, item, kv_head, num_tokens, stride_b, stride_h, stride_n, length,
    NUM_RETRIEVED: tl.constexpr, GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of a tensor (B, H, N, D) for items of a key/value head."""
    row, heads = item // NUM_RETRIEVED, kv_head
    if GROUP_HEADS > 1:
        row, heads = row % num_tokens, kv_head * GROUP_HEADS + row // num_tokens
    dims = tl.arange(0, BLOCK_D)
    at = base + row_offsets(row, heads, stride_b, stride_h, stride_n, length)[:, None] + dims[None, :]
    return load_at(at, None, HEAD_DIM, BLOCK_D)


@triton.jit
def _retrieve_kernel(
    query, key, value, members, count, order, bounds, partial, partial_lse,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    length, num_tokens, num_clusters, capacity, first_head, scale,
    NUM_RETRIEVED: tl.constexpr,
    GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Every SPLIT-th stretch of a cluster's items. Grid: clusters, splits, key/value heads."""
    wait_for_previous_kernel()
    cluster, split, part_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = first_head + part_head
    row = head.to(tl.int64) * num_clusters + cluster
    edges = bounds + head.to(tl.int64) * (num_clusters + 1) + cluster
    start, end = tl.load(edges), tl.load(edges + 1)
    num_items = num_tokens * GROUP_HEADS * NUM_RETRIEVED
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
            item = tl.load(order + head.to(tl.int64) * num_items + tl.minimum(at, end - 1))
            q = _load_queries(
                query, item, head, num_tokens, stride_qb, stride_qh, stride_qn, length,
                NUM_RETRIEVED, GROUP_HEADS, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
            s = tl.where(filled[None, :], s, -float("inf"))
            top = tl.max(s, 1)
            p = tl.exp2(s - top[:, None])
            total = tl.sum(p, 1)
            o = tl.dot(p.to(v.dtype), v, input_precision="ieee") * (1 / total)[:, None]
            to = first_item + item
            tl.store(partial_lse + to, (top + tl.log2(total)) / LOG2_E, mask=real)
            tl.store(
                partial + to[:, None] * HEAD_DIM + dims[None, :],
                o,
                mask=real[:, None] & (dims < HEAD_DIM)[None, :],
            )


@triton.jit
def _retrieve_backward_kernel(
    query, key, value, grad, terms, summands, members, count, order, bounds,
    grad_key_mean, grad_value_mean, partial, grad_key, grad_value,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_gkb, stride_gkh, stride_gkn, stride_gvb, stride_gvh, stride_gvn,
    length, num_tokens, num_clusters, capacity, first_head, scale,
    NUM_RETRIEVED: tl.constexpr,
    GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """All items of a cluster: partial gradients of queries, and the whole far gradient of its members.

    A key belongs to one cluster, so its program may add to the local gradient in place. The gradient of the
    summaries reaches a member in equal shares: k̃ and ṽ are means.
    """
    wait_for_previous_kernel()
    cluster, part_head = tl.program_id(0), tl.program_id(1)
    head = first_head + part_head
    row = head.to(tl.int64) * num_clusters + cluster
    edges = bounds + head.to(tl.int64) * (num_clusters + 1) + cluster
    start, end = tl.load(edges), tl.load(edges + 1)
    num_items = num_tokens * GROUP_HEADS * NUM_RETRIEVED
    held = tl.load(count + row)
    places = tl.arange(0, BLOCK_M)
    filled = places < held
    # Behind the last member the last again, with weights like any other, so that none is masked. The
    # gradients of queries take zeros for it: COPY, a second copy of the keys, if there is room for it.
    slots = tl.minimum(places, held - 1)
    exists = slots >= 0  # unless the cluster is empty
    tokens = tl.load(members + row * capacity + slots, mask=exists, other=0)
    k = load_rows(key, tokens, exists, head, stride_kb, stride_kh, stride_kn, length, HEAD_DIM, BLOCK_D)
    v = load_rows(value, tokens, exists, head, stride_vb, stride_vh, stride_vn, length, HEAD_DIM, BLOCK_D)
    real_k = tl.where(filled[:, None], k, 0) if COPY else k
    factor = nonzero(scale) * LOG2_E
    ones = None if summands is None else ones_for(summands, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    first_item = part_head.to(tl.int64) * num_items
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(start, end, BLOCK_Q):
        at = first + tl.arange(0, BLOCK_Q)
        real = at < end
        # Behind the last item the last again, with no weight: loads are dear if masked.
        item = tl.load(order + head.to(tl.int64) * num_items + tl.minimum(at, end - 1))
        q = _load_queries(
            query, item, head, num_tokens, stride_qb, stride_qh, stride_qn, length,
            NUM_RETRIEVED, GROUP_HEADS, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        do = _load_queries(
            grad, item, head, num_tokens, stride_ob, stride_oh, stride_on, length,
            NUM_RETRIEVED, GROUP_HEADS, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        query_row = head.to(tl.int64) * GROUP_HEADS * num_tokens + item // NUM_RETRIEVED
        query_lse, query_delta = load_weight_terms(terms, summands, query_row, None)
        # Keys are the rows, so that weights are where the next products want them.
        p = weights_of_keys(k, q, ones, query_lse, factor)
        p = tl.where(real[None, :] if COPY else filled[:, None] & real[None, :], p, 0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * products_less_delta(v, do, ones, query_delta)
        ds = ds.to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
        dq = tl.dot(tl.trans(real_k), ds, input_precision="ieee") * scale
        tl.store(
            partial + (first_item + item)[:, None] * HEAD_DIM + dims[None, :],
            tl.trans(dq),
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


@triton.jit
def _part(partial, item, real, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """What items left behind, in float32, and zero where there is none."""
    dims = tl.arange(0, BLOCK_D)
    mask = real[:, None] & (dims < HEAD_DIM)[None, :]
    return tl.load(partial + item[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0).to(tl.float32)


@triton.jit
def _merge_kernel(
    partial, partial_lse, number, output, lse, stride_b, stride_h, stride_n, length, num_tokens, first_head,
    NUM_RETRIEVED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Merge the partial outputs of a few queries into their output and logsumexp, in place."""
    wait_for_previous_kernel()
    head = first_head + tl.program_id(1)
    tokens = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = tokens < num_tokens
    row = head.to(tl.int64) * num_tokens + tokens
    item = (tl.program_id(1).to(tl.int64) * num_tokens + tokens) * NUM_RETRIEVED
    count = tl.load(number + row, mask=inside, other=0).to(tl.int32)
    inside &= count > 0
    ranks = tl.arange(0, BLOCK_R)
    lse_at = partial_lse + item[:, None] + ranks[None, :]
    part_lse = tl.load(lse_at, mask=ranks[None, :] < count[:, None], other=-float("inf"))
    old_lse = tl.load(lse + row, mask=inside, other=0)
    top = tl.maximum(old_lse, tl.max(part_lse, 1))
    old_weight = tl.exp(old_lse - top)
    o = load_rows(output, tokens, inside, head, stride_b, stride_h, stride_n, length, HEAD_DIM, BLOCK_D)
    o = o.to(tl.float32) * old_weight[:, None]
    for rank in range(0, tl.max(count, 0)):
        real = rank < count
        weight = tl.exp(tl.load(partial_lse + item + rank, mask=real, other=-float("inf")) - top)
        o += _part(partial, item + rank, real, HEAD_DIM, BLOCK_D) * weight[:, None]
    total = old_weight + tl.sum(tl.exp(part_lse - top[:, None]), 1)
    tl.store(lse + row, top + tl.log(total), mask=inside)
    store_rows(
        output, o * (1 / total)[:, None], tokens, inside, head, stride_b, stride_h, stride_n, length,
        HEAD_DIM, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _add_kernel(
    partial, number, grad_query, stride_b, stride_h, stride_n, length, num_tokens, first_head,
    NUM_RETRIEVED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Add the partial gradients of a few queries to what is there."""
    wait_for_previous_kernel()
    head = first_head + tl.program_id(1)
    tokens = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = tokens < num_tokens
    item = (tl.program_id(1).to(tl.int64) * num_tokens + tokens) * NUM_RETRIEVED
    count = tl.load(number + head.to(tl.int64) * num_tokens + tokens, mask=inside, other=0).to(tl.int32)
    inside &= count > 0
    dq = load_rows(grad_query, tokens, inside, head, stride_b, stride_h, stride_n, length, HEAD_DIM, BLOCK_D)
    dq = dq.to(tl.float32)
    for rank in range(0, tl.max(count, 0)):
        dq += _part(partial, item + rank, rank < count, HEAD_DIM, BLOCK_D)
    store_rows(grad_query, dq, tokens, inside, head, stride_b, stride_h, stride_n, length, HEAD_DIM, BLOCK_D)


def retrieve(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, clusters: Clusters, items: Items,
    output: torch.Tensor, lse: torch.Tensor, scale: float,
) -> None:  # fmt: skip
    """Merge the retrieved clusters into output (B, H, N, D) and lse (H, B * N), in place."""
    num_retrieved = items.num_retrieved
    if not num_retrieved:
        return
    settings = choose_launch(query, _FORWARD, _FORWARD, _PRECISE)
    for kv_heads in _parts(query, key, num_retrieved):
        partial = query.new_empty(len(kv_heads), items.order.shape[1], query.shape[3])
        partial_lse = query.new_empty(partial.shape[:2], dtype=torch.float32)
        launch(
            _retrieve_kernel, (clusters.count.shape[1], _SPLITS, len(kv_heads)),
            query, key, value, clusters.members, clusters.count, items.order, items.bounds, partial,
            partial_lse, *token_strides(query, key, value), *_sizes(query, clusters), kv_heads.start, scale,
            **_tiles(query, clusters, num_retrieved), SPLIT=_SPLITS, **settings,
        )  # fmt: skip
        _over_queries(
            _merge_kernel, query, key, kv_heads, num_retrieved,
            partial, partial_lse, items.number, output, lse, *token_strides(output),
            BLOCK_R=power_of_two(num_retrieved),
        )  # fmt: skip


def retrieve_backward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad: torch.Tensor,
    terms: torch.Tensor, summands: torch.Tensor | None, clusters: Clusters, items: Items,
    grad_means: tuple[torch.Tensor, torch.Tensor], grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
) -> None:  # fmt: skip
    """Add the gradients through retrieved clusters to those of query, key and value, in place.

    Those of the summaries are passed on to their members here too, also if nothing is retrieved.

    Args:
        terms, summands: See `WeightTerms`.
        grad_means: (Hkv, J, D) float32 gradients of the key and value means.
    """
    num_retrieved = items.num_retrieved
    strides = token_strides(query, key, value, grad, *grads[1:])
    settings = _backward_launch(query, clusters.members.shape[2])
    for kv_heads in _parts(query, key, num_retrieved):
        partial = query.new_empty(len(kv_heads), items.order.shape[1], query.shape[3])
        launch(
            _retrieve_backward_kernel, (clusters.count.shape[1], len(kv_heads)),
            query, key, value, grad, terms, summands, clusters.members, clusters.count, items.order,
            items.bounds, *grad_means, partial, *grads[1:], *strides, *_sizes(query, clusters),
            kv_heads.start, scale,
            COPY=_copies(query, clusters.members.shape[2]), **_tiles(query, clusters, num_retrieved),
            **settings,
        )  # fmt: skip
        if num_retrieved:
            _over_queries(
                _add_kernel, query, key, kv_heads, num_retrieved,
                partial, items.number, grads[0], *token_strides(grads[0]),
            )  # fmt: skip


def shared_memory_for(query: torch.Tensor, capacity: int) -> int:
    """Bytes that `retrieve_backward`, whose tiles grow with clusters, needs for all that it holds."""
    settings = _backward_launch(query, capacity)
    copies = 3 if _copies(query, capacity) else 2
    tiles = 2 * min(2, settings["num_stages"]) + 1  # of queries and gradients on their way in, and out
    members, queries = power_of_two(capacity), settings["BLOCK_Q"]
    rows = copies * members + tiles * queries
    weights = members * queries if members > 64 else 0  # whose gradients do not stay in registers
    # Of λ and Δ on their way in.
    terms = 2 * 2 * queries * SUMMANDS.value if query.element_size() == 2 else 0
    return (rows * power_of_two(query.shape[3]) + weights + terms) * query.element_size() + 1024


def _copies(query: torch.Tensor, capacity: int) -> bool:
    """Whether a second copy of a cluster's keys is held in shared memory, see `_retrieve_backward_kernel`."""
    return query.element_size() == 2 and capacity <= 64


def _backward_launch(query: torch.Tensor, capacity: int) -> dict[str, int]:
    if capacity > 64:
        return choose_launch(query, _LARGE_BACKWARD, _WIDEST_BACKWARD, _PRECISE)
    wide = _WIDE_BACKWARD if has_much_shared_memory(query) else _SMALL_WIDE_BACKWARD
    return choose_launch(query, _BACKWARD, wide, _PRECISE, _WIDEST_BACKWARD)


def _over_queries(
    kernel: triton.JITFunction, query: torch.Tensor, key: torch.Tensor, kv_heads: range, num_retrieved: int,
    *arguments: torch.Tensor | int, **constants: int,
) -> None:  # fmt: skip
    """Launch a kernel over the queries of some key/value heads, a few a program."""
    batch, heads, length, head_dim = query.shape
    groups = heads // key.shape[1]
    num_tokens = batch * length
    block_d = power_of_two(head_dim)
    block_q = max(1, _MERGED // block_d)
    launch(
        kernel, (ceil_div(num_tokens, block_q), groups * len(kv_heads)),
        *arguments, num_tokens, groups * kv_heads.start,
        NUM_RETRIEVED=num_retrieved, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_Q=block_q, **constants,
        num_warps=4,
    )  # fmt: skip


def _parts(query: torch.Tensor, key: torch.Tensor, num_retrieved: int) -> list[range]:
    """Key/value heads whose partial outputs exist together."""
    per_head = query.numel() // key.shape[1] * max(1, num_retrieved) * query.element_size()
    step = max(1, _PARTIAL_BYTES // per_head)
    return [range(first, min(first + step, key.shape[1])) for first in range(0, key.shape[1], step)]


def _sizes(query: torch.Tensor, clusters: Clusters) -> tuple[int, int, int]:
    return query.shape[0] * query.shape[2], *clusters.members.shape[1:]


def _tiles(query: torch.Tensor, clusters: Clusters, num_retrieved: int) -> dict[str, int]:
    head_dim = query.shape[3]
    return {
        "NUM_RETRIEVED": max(1, num_retrieved),
        "GROUP_HEADS": query.shape[1] // clusters.count.shape[0],
        "HEAD_DIM": head_dim,
        "BLOCK_D": power_of_two(head_dim),
        "BLOCK_M": power_of_two(clusters.members.shape[2]),
    }
