"""Exact causal attention inside the blocks of a layout, with its logsumexp.

The library's kernel where it serves: cuDNN for even blocks, flash attention for ragged ones. A kernel of our
own for what it does not: float32, odd head sizes, Triton's interpreter.
"""

from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from muse_hf.kernels.common import (
    LOG2_E,
    block_plane,
    load_places,
    plane_of,
    power_of_two,
    store_tokens,
    wait_for_previous_kernel,
)
from muse_hf.kernels.launch import ceil_div, launch
from muse_hf.kernels.layout import Layout, tile_of_block
from muse_hf.kernels.replay import copy, library_call

# Head sizes up to which cuDNN and flash attention serve. Both want rows of whole 16 bytes.
_LARGEST_CUDNN, _LARGEST_FLASH = 128, 256


@triton.jit
def _attend(
    o, total, top, q, k_plane, v_plane, places, inside, causal, stride_kn, stride_vn, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Unscaled output, sum of weights and bound of a tile of queries after one more tile of keys."""
    k = load_places(k_plane, places, inside, stride_kn, HEAD_DIM, BLOCK_D)
    v = load_places(v_plane, places, inside, stride_vn, HEAD_DIM, BLOCK_D)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if MASKED:
        s = tl.where(causal, s, -float("inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    shrink = tl.exp2(top - new_top)
    p = tl.exp2(s - new_top[:, None])
    o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision="ieee")
    return o, total * shrink + tl.sum(p, 1), new_top


@triton.jit
def _local_kernel(
    query, key, value, block_start, block_length, output, lse,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, num_tiles, num_heads, num_blocks, length, num_tokens, scale,
    GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of queries, those with most keys first."""
    wait_for_previous_kernel()
    tl.static_assert(BLOCK_Q % BLOCK_K == 0, "or keys behind the queries would be seen")
    tile, head, _, many, row, begin = tile_of_block(
        block_start, block_length, num_tiles, num_heads, num_blocks, length
    )
    first = (num_tiles - 1 - tile) * BLOCK_Q
    if first < many:
        places = first + tl.arange(0, BLOCK_Q)
        inside, tokens = places < many, begin + places
        q_plane = block_plane(query, row, head, begin, stride_qb, stride_qh, stride_qn)
        k_plane = block_plane(key, row, head // GROUP_HEADS, begin, stride_kb, stride_kh, stride_kn)
        v_plane = block_plane(value, row, head // GROUP_HEADS, begin, stride_vb, stride_vh, stride_vn)
        q = load_places(q_plane, places, inside, stride_qn, HEAD_DIM, BLOCK_D)
        o = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        top = tl.full([BLOCK_Q], -float("inf"), tl.float32)
        lane = tl.arange(0, BLOCK_K)
        for k in range(0, first, BLOCK_K):
            o, total, top = _attend(
                o, total, top, q, k_plane, v_plane, k + lane, None, None,
                stride_kn, stride_vn, scale * LOG2_E, HEAD_DIM, BLOCK_D, False,
            )  # fmt: skip
        for k in range(first, tl.minimum(first + BLOCK_Q, many), BLOCK_K):
            o, total, top = _attend(
                o, total, top, q, k_plane, v_plane, k + lane, k + lane < many,
                k + lane[None, :] <= places[:, None],
                stride_kn, stride_vn, scale * LOG2_E, HEAD_DIM, BLOCK_D, True,
            )  # fmt: skip
        o *= (1 / total)[:, None]
        store_tokens(
            plane_of(output, row, head, stride_ob, stride_oh), o, tokens, inside, stride_on, HEAD_DIM, BLOCK_D
        )
        at = lse + head * num_tokens + row.to(tl.int64) * length + tokens
        tl.store(at, (top + tl.log2(total)) / LOG2_E, mask=inside)


class Local(NamedTuple):
    """Attention of each block by itself. Outside the sequences nothing is said of it.

    Attributes:
        output: (B, H, N, D).
        lse: float32 logsumexp. That of token i of a block of head h is at h * stride_h + s * stride_s + i,
            where s is the id of the block's first token.
    """

    output: torch.Tensor
    lse: torch.Tensor
    stride_h: int
    stride_s: int


def local_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float, block: int
) -> Local:
    """Attention of each block of the layout."""
    batch, heads, length, head_dim = query.shape
    served = all(map(_suits_library, (query, key, value)))
    if served and layout.even and head_dim <= _LARGEST_CUDNN:
        blocks = (_as_blocks(tensor, block) for tensor in (query, key, value))
        output, lse = _cudnn_attention(*blocks, scale)
        return Local(_from_blocks(output, query.shape), lse, lse.stride(1), lse.stride(0) // block)
    if served and head_dim <= _LARGEST_FLASH:
        output, lse = _flash_attention(query, key, value, layout.bounds, block, scale)
        return Local(output.unflatten(0, (batch, length)).transpose(1, 2), lse, lse.stride(0), 1)
    output = query.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    lse = query.new_empty(heads, batch * length, dtype=torch.float32)
    strides = [stride for tensor in (query, key, value, output) for stride in tensor.stride()[:3]]
    tile = 32 if query.dtype == torch.float32 else 64
    sizes = ceil_div(block, tile), heads, layout.block_start.shape[0]
    launch(
        _local_kernel, (prod(sizes),),
        query, key, value, layout.block_start, layout.block_length, output, lse, *strides, *sizes, length,
        batch * length, scale,
        GROUP_HEADS=heads // key.shape[1], HEAD_DIM=head_dim, BLOCK_D=power_of_two(head_dim),
        BLOCK_Q=tile, BLOCK_K=32, num_warps=4, num_stages=2,
    )  # fmt: skip
    return Local(output, lse, batch * length, 1)


@library_call
def _cudnn_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> tuple:
    """Output and logsumexp (Z, H, block, 1) of blocks (Z, H, block, D)."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, True, False, scale=scale
    )[:2]


@library_call
def _flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, block: int, scale: float
) -> tuple:
    """Output (B * N, H, D) and logsumexp (H, B * N) of blocks of at most `block` tokens between `ends`."""
    rows = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    return torch.ops.aten._flash_attention_forward(
        *rows, ends, ends, block, block, 0.0, True, False, scale=scale
    )[:2]


def _suits_library(tensor: torch.Tensor) -> bool:
    """Whether its rows (B, H, N, D) are of 16 bits a number and begin at multiples of 16 bytes."""
    starts = (*tensor.stride()[:3], tensor.shape[3])
    return (
        tensor.is_cuda
        and tensor.dtype in (torch.float16, torch.bfloat16)
        and tensor.data_ptr() % 16 == 0
        and all(number % 8 == 0 for number in starts)
    )


def _as_blocks(tensor: torch.Tensor, block: int) -> torch.Tensor:
    """(B, H, N, D) to (B * N / block, H, block, D), a view where N rows of all heads lie together."""
    batch, heads, length, head_dim = tensor.shape
    if batch > 1 and tensor.stride(0) != length * tensor.stride(2):
        together = tensor.new_empty(batch, length, heads, head_dim).transpose(1, 2)
        copy(tensor, together)
        tensor = together
    _, stride_h, stride_n, _ = tensor.stride()
    shape = batch * length // block, heads, block, head_dim
    return tensor.as_strided(shape, (block * stride_n, stride_h, stride_n, 1))


def _from_blocks(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The opposite, a view if blocks follow each other."""
    batch, heads, length, head_dim = shape
    stride_z, stride_h, stride_n, _ = blocks.stride()
    if stride_z != blocks.shape[2] * stride_n:
        return blocks.transpose(1, 2).reshape(batch, length, heads, head_dim).transpose(1, 2)
    return blocks.as_strided(shape, (length * stride_n, stride_h, stride_n, 1))
