"""Gradients of exact causal attention inside blocks, given the merged logsumexp λ and Δ: p = exp(ℓ - λ).

Library kernels would do, but they add up the gradients of queries in any order. Here one kernel takes a tile
of queries and gives their gradients, another takes a tile of keys and gives those of keys and values, each
in a fixed order. What other queries and keys than those of the same block have to add comes in as parts.
"""

from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from muse_hf.kernels.common import (
    LOG2_E,
    block_plane,
    choose_launch,
    has_much_shared_memory,
    load_places,
    load_tokens,
    plane_of,
    power_of_two,
    store_tokens,
    wait_for_previous_kernel,
)
from muse_hf.kernels.launch import ceil_div, launch
from muse_hf.kernels.layout import Layout, tile_of_block
from muse_hf.kernels.replay import fill
from muse_hf.kernels.weight_terms import (
    SUMMANDS,
    load_weight_terms,
    nonzero,
    ones_for,
    products_less_delta,
    weights_of_keys,
)

_QUERY_LAUNCH = {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2, "maxnreg": 128}
_WIDE_QUERY_LAUNCH = {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
_WIDEST_QUERY_LAUNCH = {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}
_KEY_LAUNCH = {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2, "maxnreg": 168}
_WIDE_KEY_LAUNCH = {"BLOCK_Q": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
_WIDEST_KEY_LAUNCH = {"BLOCK_Q": 32, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}
_PRECISE_QUERY_LAUNCH = {"BLOCK_Q": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 1}
_PRECISE_KEY_LAUNCH = {"BLOCK_Q": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 1}


class Parts(NamedTuple):
    """Where the parts of the tokens of each block lie.

    Attributes:
        bounds: (Z + 1,) int32 where the parts of a block begin in `point`.
        point: (X,) int32 the point of the block's first token in one part; others follow it.
    """

    bounds: torch.Tensor
    point: torch.Tensor


@triton.jit
def _sums_of_parts(
    parts, others, bounds, point, block, head, num_points, places, inside,
    NUM_PLACES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What lies in the parts (H, points, D) of tokens of a block, and in other parts; either may be None.

    Gradients begin with it: these loads are under way while the first tile is loaded.
    """
    total = tl.zeros([NUM_PLACES, BLOCK_D], tl.float32)
    other_total = tl.zeros([NUM_PLACES, BLOCK_D], tl.float32)
    if parts is not None:
        plane = head * num_points * HEAD_DIM
        for i in tl.range(tl.load(bounds + block), tl.load(bounds + block + 1), num_stages=1):
            points = tl.load(point + i) + places
            x = load_tokens(parts + plane, points, inside, HEAD_DIM, HEAD_DIM, BLOCK_D)
            if others is not None:
                y = load_tokens(others + plane, points, inside, HEAD_DIM, HEAD_DIM, BLOCK_D)
                other_total += y.to(tl.float32)
            total += x.to(tl.float32)
    return total, other_total


@triton.jit
def _before_scaling(total, scale):
    """What the scale is still to be multiplied with. Parts of gradients are 0 if the scale is."""
    return total * (1 / nonzero(scale))


@triton.jit
def _query_step(
    dq, q, do, query_lse, query_delta, k_plane, v_plane, places, inside, causal,
    stride_kn, stride_vn, scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of queries after one more tile of keys. MASKED: not all keys are seen."""
    k = load_places(k_plane, places, inside, stride_kn, HEAD_DIM, BLOCK_D)
    v = load_places(v_plane, places, inside, stride_vn, HEAD_DIM, BLOCK_D)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    p = tl.exp2(s * scale - query_lse[:, None])
    if MASKED:
        p = tl.where(causal, p, 0)
    ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - query_delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def _query_kernel(
    query, key, value, grad, terms, block_start, block_length, bounds, point, parts, grad_query,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_gb, stride_gh, stride_gn,
    num_tiles, num_heads, num_blocks, length, num_tokens, num_points, scale,
    GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries, those with most keys first."""
    wait_for_previous_kernel()
    tl.static_assert(BLOCK_Q % BLOCK_K == 0, "or keys behind the queries would be seen")
    tile, head, block, many, row, begin = tile_of_block(
        block_start, block_length, num_tiles, num_heads, num_blocks, length
    )
    first = (num_tiles - 1 - tile) * BLOCK_Q
    if first < many:
        places = first + tl.arange(0, BLOCK_Q)
        inside, tokens = places < many, begin + places
        q_plane = block_plane(query, row, head, begin, stride_qb, stride_qh, stride_qn)
        do_plane = block_plane(grad, row, head, begin, stride_ob, stride_oh, stride_on)
        k_plane = block_plane(key, row, head // GROUP_HEADS, begin, stride_kb, stride_kh, stride_kn)
        v_plane = block_plane(value, row, head // GROUP_HEADS, begin, stride_vb, stride_vh, stride_vn)
        q = load_places(q_plane, places, inside, stride_qn, HEAD_DIM, BLOCK_D)
        do = load_places(do_plane, places, inside, stride_on, HEAD_DIM, BLOCK_D)
        own_terms = terms + (head * num_tokens + row.to(tl.int64) * length + tokens) * 2
        query_lse = tl.load(own_terms, mask=inside, other=float("inf"))
        query_delta = tl.load(own_terms + 1, mask=inside, other=0)
        dq, _ = _sums_of_parts(
            parts, None, bounds, point, block, head, num_points, places, inside, BLOCK_Q, HEAD_DIM, BLOCK_D
        )
        dq = _before_scaling(dq, scale)
        lane = tl.arange(0, BLOCK_K)
        for k in range(0, first, BLOCK_K):
            dq = _query_step(
                dq, q, do, query_lse, query_delta, k_plane, v_plane, k + lane, None, None,
                stride_kn, stride_vn, scale * LOG2_E, HEAD_DIM, BLOCK_D, False,
            )  # fmt: skip
        for k in range(first, tl.minimum(first + BLOCK_Q, many), BLOCK_K):
            dq = _query_step(
                dq, q, do, query_lse, query_delta, k_plane, v_plane, k + lane, k + lane < many,
                k + lane[None, :] <= places[:, None],
                stride_kn, stride_vn, scale * LOG2_E, HEAD_DIM, BLOCK_D, True,
            )  # fmt: skip
        plane = plane_of(grad_query, row, head, stride_gb, stride_gh)
        store_tokens(plane, dq * scale, tokens, inside, stride_gn, HEAD_DIM, BLOCK_D)


@triton.jit
def _key_step(
    dk, dv, k, v, ones, q_plane, do_plane, terms, summands, queries, many, keys, stride_qn, stride_on, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values after one more tile of queries.

    MASKED: some of the queries do not exist, or do not see all the keys.
    """
    exists = queries < many if MASKED else None
    q = load_places(q_plane, queries, exists, stride_qn, HEAD_DIM, BLOCK_D)
    do = load_places(do_plane, queries, exists, stride_on, HEAD_DIM, BLOCK_D)
    query_lse, query_delta = load_weight_terms(terms, summands, queries, exists)
    p = weights_of_keys(k, q, ones, query_lse, scale)
    if MASKED:
        p = tl.where((keys[:, None] <= queries[None, :]) & exists[None, :], p, 0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    # Not before dv: where registers do not hold p and dp at once, ptxas has every product wait for the last.
    dp = products_less_delta(v, do, ones, query_delta)
    dk = tl.dot((p * dp).to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _key_kernel(
    query, key, value, grad, terms, summands, block_start, block_length,
    bounds, point, key_parts, value_parts, grad_key, grad_value,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_gkb, stride_gkh, stride_gkn, stride_gvb, stride_gvh, stride_gvn,
    num_tiles, num_heads, num_blocks, length, num_tokens, num_points, scale,
    GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values, those with most queries first."""
    wait_for_previous_kernel()
    tl.static_assert(BLOCK_K % BLOCK_Q == 0, "or keys behind the queries would be seen")
    tile, kv_head, block, many, row, begin = tile_of_block(
        block_start, block_length, num_tiles, num_heads, num_blocks, length
    )
    first = tile * BLOCK_K
    if first < many:
        places = first + tl.arange(0, BLOCK_K)
        inside, tokens = places < many, begin + places
        k_plane = block_plane(key, row, kv_head, begin, stride_kb, stride_kh, stride_kn)
        v_plane = block_plane(value, row, kv_head, begin, stride_vb, stride_vh, stride_vn)
        k = load_places(k_plane, places, inside, stride_kn, HEAD_DIM, BLOCK_D)
        v = load_places(v_plane, places, inside, stride_vn, HEAD_DIM, BLOCK_D)
        dk, dv = _sums_of_parts(
            key_parts, value_parts, bounds, point, block, kv_head, num_points, places, inside,
            BLOCK_K, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        dk = _before_scaling(dk, scale)
        factor = nonzero(scale) * LOG2_E
        ones = None if summands is None else ones_for(summands, BLOCK_K)
        lane = tl.arange(0, BLOCK_Q)
        for group in range(GROUP_HEADS):
            head = kv_head * GROUP_HEADS + group
            q_plane = block_plane(query, row, head, begin, stride_qb, stride_qh, stride_qn)
            do_plane = block_plane(grad, row, head, begin, stride_ob, stride_oh, stride_on)
            token = head * num_tokens + row.to(tl.int64) * length + begin
            own_summands = None if summands is None else summands + token * 2 * SUMMANDS
            whole = tl.maximum(many // BLOCK_Q * BLOCK_Q, first + BLOCK_K)  # the last tile may be short
            for i in range(first, first + BLOCK_K, BLOCK_Q):
                dk, dv = _key_step(
                    dk, dv, k, v, ones, q_plane, do_plane, terms + token * 2, own_summands,
                    i + lane, many, places, stride_qn, stride_on, factor, HEAD_DIM, BLOCK_D, True,
                )  # fmt: skip
            for i in range(first + BLOCK_K, whole, BLOCK_Q):
                dk, dv = _key_step(
                    dk, dv, k, v, ones, q_plane, do_plane, terms + token * 2, own_summands,
                    i + lane, many, places, stride_qn, stride_on, factor, HEAD_DIM, BLOCK_D, False,
                )  # fmt: skip
            for i in range(whole, many, BLOCK_Q):
                dk, dv = _key_step(
                    dk, dv, k, v, ones, q_plane, do_plane, terms + token * 2, own_summands,
                    i + lane, many, places, stride_qn, stride_on, factor, HEAD_DIM, BLOCK_D, True,
                )  # fmt: skip
        plane = plane_of(grad_key, row, kv_head, stride_gkb, stride_gkh)
        store_tokens(plane, dk * scale, tokens, inside, stride_gkn, HEAD_DIM, BLOCK_D)
        plane = plane_of(grad_value, row, kv_head, stride_gvb, stride_gvh)
        store_tokens(plane, dv, tokens, inside, stride_gvn, HEAD_DIM, BLOCK_D)


def local_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    terms: torch.Tensor, summands: torch.Tensor | None, layout: Layout, scale: float, block: int,
    query_parts: tuple[Parts, torch.Tensor] | None = None,
    key_parts: tuple[Parts, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of query, key and value, laid out like them; zero outside the sequences.

    Args:
        grad: (B, H, N, D), of the merged output.
        terms, summands: Of the merged output, see `WeightTerms`.
        query_parts, key_parts: Where parts of gradients lie, and those (heads, points, D) of queries, and of
            keys and values. Without them, the gradients are those through the blocks alone.
    """
    grads = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
    if layout.outside is not None:
        for tensor in grads:
            fill(tensor, 0)
    heads, kv_heads, head_dim = query.shape[1], key.shape[1], query.shape[3]
    read = query, key, value, grad
    strides = [stride for tensor in read for stride in tensor.stride()[:3]]
    blocks = layout.block_start, layout.block_length
    sizes = query.shape[2], query.shape[0] * query.shape[2]
    num_blocks = layout.block_start.shape[0]
    dims = {"GROUP_HEADS": heads // kv_heads, "HEAD_DIM": head_dim, "BLOCK_D": power_of_two(head_dim)}
    bounds, parts = query_parts or ((None, None), None)
    wide = _WIDE_QUERY_LAUNCH if has_much_shared_memory(query) else _WIDE_QUERY_LAUNCH | {"num_stages": 2}
    settings = choose_launch(query, _QUERY_LAUNCH, wide, _PRECISE_QUERY_LAUNCH, _WIDEST_QUERY_LAUNCH)
    tiles = ceil_div(block, settings["BLOCK_Q"]), heads, num_blocks
    launch(
        _query_kernel, (prod(tiles),),
        *read, terms, *blocks, *bounds, parts, grads[0], *strides, *grads[0].stride()[:3], *tiles,
        *sizes, 0 if parts is None else parts.shape[1], scale, **dims, **settings,
    )  # fmt: skip
    bounds, *parts = key_parts or ((None, None), None, None)
    settings = choose_launch(query, _KEY_LAUNCH, _WIDE_KEY_LAUNCH, _PRECISE_KEY_LAUNCH, _WIDEST_KEY_LAUNCH)
    tiles = ceil_div(block, settings["BLOCK_K"]), kv_heads, num_blocks
    launch(
        _key_kernel, (prod(tiles),),
        *read, terms, summands, *blocks, *bounds, *parts, *grads[1:], *strides,
        *grads[1].stride()[:3], *grads[2].stride()[:3], *tiles, *sizes,
        0 if parts[0] is None else parts[0].shape[1], scale,
        **dims, **settings,
    )  # fmt: skip
    return grads
