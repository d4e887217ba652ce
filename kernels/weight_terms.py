"""What backward passes need of a query to form a weight and its gradient: p = exp(ℓ - λ), dℓ = p (dp - Δ)."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from muse_hf.kernels.common import (
    INTERPRETED,
    LOG2_E,
    load_rows,
    power_of_two,
    token_strides,
    wait_for_previous_kernel,
)
from muse_hf.kernels.launch import ceil_div, launch

# Columns of summands, as few as products take; where those for -λ begin, and those for -Δ.
SUMMANDS, _OF_LSE, _OF_DELTA = (tl.constexpr(i) for i in (16, 0, 8))


class WeightTerms(NamedTuple):
    """λ and Δ of all tokens.

    Attributes:
        delta: (H, B * N) float32 Δ = do·o.
        pairs: (H, B * N, 2) float32 λ log2(e) and Δ side by side.
        summands: (H, B * N, 16) columns that add up to -λ / scale, and others that add up to -Δ: products
            can begin with them, see `sum_to_lse`. float32, or bfloat16 for 16-bit inputs.
    """

    delta: torch.Tensor
    pairs: torch.Tensor
    summands: torch.Tensor


@triton.jit
def nonzero(scale):
    """The scale, or if that is 0 something so small that logits vanish beside λ / scale."""
    return tl.where(scale == 0, 2.0**-100, scale)


@triton.jit
def sum_to_lse(ROWS: tl.constexpr, dtype: tl.constexpr):
    """(ROWS, 16) whose product with summands is -λ / scale in every row."""
    return _ones_from(_OF_LSE, ROWS, dtype)


@triton.jit
def sum_to_delta(ROWS: tl.constexpr, dtype: tl.constexpr):
    """(ROWS, 16) whose product with summands is -Δ in every row."""
    return _ones_from(_OF_DELTA, ROWS, dtype)


@triton.jit
def _ones_from(first: tl.constexpr, ROWS: tl.constexpr, dtype: tl.constexpr):
    column = tl.arange(0, SUMMANDS)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    return ((column >= first) & (column < first + 3)).to(dtype)


@triton.jit
def _with_summands(columns, x, first: tl.constexpr):
    """Three columns that add up to the float32 x: 3 x 8 bits where columns are bfloat16."""
    column = tl.arange(0, SUMMANDS)[None, :]
    for i in tl.static_range(3):
        part = x.to(columns.dtype)
        columns = tl.where(column == first + i, part[:, None], columns)
        whole = part.to(tl.float32)
        x = tl.where(x == whole, 0, x - whole)  # ∞ - ∞ is none
    return columns


@triton.jit
def _terms_kernel(
    output, grad, lse, delta, pairs, summands,
    stride_ob, stride_oh, stride_on, stride_gb, stride_gh, stride_gn, length, num_tokens, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    wait_for_previous_kernel()
    head = tl.program_id(1)
    tokens = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = tokens < num_tokens
    o = load_rows(output, tokens, inside, head, stride_ob, stride_oh, stride_on, length, HEAD_DIM, BLOCK_D)
    do = load_rows(grad, tokens, inside, head, stride_gb, stride_gh, stride_gn, length, HEAD_DIM, BLOCK_D)
    total = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    row = head.to(tl.int64) * num_tokens + tokens
    merged = tl.load(lse + row, mask=inside, other=0)
    tl.store(delta + row, total, mask=inside)
    pair = tl.join(merged * LOG2_E, total)
    tl.store(pairs + row[:, None] * 2 + tl.arange(0, 2)[None, :], pair, mask=inside[:, None])
    columns = tl.zeros([BLOCK_Q, SUMMANDS], summands.dtype.element_ty)
    columns = _with_summands(columns, -merged / nonzero(scale), _OF_LSE)
    columns = _with_summands(columns, -total, _OF_DELTA)
    at = summands + row[:, None] * SUMMANDS + tl.arange(0, SUMMANDS)[None, :]
    tl.store(at, columns, mask=inside[:, None])


def weight_terms(output: torch.Tensor, grad: torch.Tensor, lse: torch.Tensor, scale: float) -> WeightTerms:
    """λ and Δ as kernels read them.

    Args:
        output, grad: (B, H, N, D), an output and its gradient.
        lse: (H, B * N) float32, its logsumexp λ.
        scale: Factor on the logits.
    """
    batch, heads, length, head_dim = output.shape
    num_tokens = batch * length
    delta, pairs = torch.empty_like(lse), lse.new_empty(heads, num_tokens, 2)
    # The interpreter multiplies bfloat16 as if it were integers.
    dtype = torch.bfloat16 if output.element_size() == 2 and not INTERPRETED else torch.float32
    summands = lse.new_empty(heads, num_tokens, SUMMANDS.value, dtype=dtype)
    launch(
        _terms_kernel, (ceil_div(num_tokens, 64), heads),
        output, grad, lse, delta, pairs, summands, *token_strides(output, grad), num_tokens, scale,
        HEAD_DIM=head_dim, BLOCK_D=power_of_two(head_dim), BLOCK_Q=64,
    )  # fmt: skip
    return WeightTerms(delta, pairs, summands)
