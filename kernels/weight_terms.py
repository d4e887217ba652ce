"""What backward passes need of a query to form a weight and its gradient: p = exp(ℓ - λ), dℓ = p (dp - Δ)."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from muse_hf.kernels.common import (
    INTERPRETED,
    LOG2_E,
    load_places,
    load_rows,
    power_of_two,
    token_strides,
    wait_for_previous_kernel,
)
from muse_hf.kernels.launch import ceil_div, launch

# Columns whose sum is a number, as few as products take.
SUMMANDS = tl.constexpr(16)


class WeightTerms(NamedTuple):
    """λ and Δ of all tokens.

    Attributes:
        delta: (H, B * N) float32 Δ = do·o.
        terms: (H, B * N, 2) float32 λ log2(e) and Δ side by side. Kernels that need them along columns get
            both by one load: of fewer numbers than threads, every thread would load all that it needs.
        summands: (H, B * N, 2, 16) columns that add up to -λ / scale, and others that add up to -Δ: sums of
            products can begin with their product with ones. bfloat16; None for float32, of which products
            are slow.
    """

    delta: torch.Tensor
    terms: torch.Tensor
    summands: torch.Tensor | None


@triton.jit
def nonzero(scale):
    """The scale, or if that is 0 something so small that logits vanish beside λ / scale."""
    return tl.where(scale == 0, 2.0**-100, scale)


@triton.jit
def ones_for(summands, NUM_KEYS: tl.constexpr):
    """What products with summands add them up by."""
    return tl.full([NUM_KEYS, SUMMANDS], 1, summands.dtype.element_ty)


@triton.jit
def load_weight_terms(terms, summands, queries, exists):
    """λ and Δ of queries: vectors, or if there are summands, those (queries, SUMMANDS).

    As vectors along the queries, which float32 has, every warp loads all of them for its own rows of keys.

    Args:
        queries: Where theirs lie behind `terms` and `summands`: in 32 bits inside a block, else in 64.
        exists: Which queries do, None if all.
    """
    if summands is None:
        query_lse, query_delta = tl.split(load_places(terms, queries, exists, 2, 2, 2))
    else:
        query_lse = load_places(summands, queries, exists, 2 * SUMMANDS, SUMMANDS, SUMMANDS)
        query_delta = load_places(summands + SUMMANDS, queries, exists, 2 * SUMMANDS, SUMMANDS, SUMMANDS)
    return query_lse, query_delta


@triton.jit
def weights_of_keys(k, q, ones, query_lse, scale, bias=None):
    """p (keys, queries).

    Args:
        scale: That of the logits, `nonzero`, times log2(e).
        bias: What logits of keys have more, times log2(e), if not None.
    """
    if ones is None:
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale - query_lse[None, :]
    else:
        s = tl.dot(ones, tl.trans(query_lse), input_precision="ieee")
        s = tl.dot(k, tl.trans(q), s, input_precision="ieee") * scale
    return tl.exp2(s if bias is None else s + bias[:, None])


@triton.jit
def products_less_delta(v, do, ones, query_delta):
    """dp - Δ (keys, queries)."""
    if ones is None:
        dp = tl.dot(v, tl.trans(do), input_precision="ieee") - query_delta[None, :]
    else:
        dp = tl.dot(ones, tl.trans(query_delta), input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), dp, input_precision="ieee")
    return dp


@triton.jit
def _store_summands(to, x, inside):
    """Store x (float32) as three columns, each what those before leave of it: exact as 3 x 8 bits."""
    column = tl.arange(0, SUMMANDS)[None, :]
    columns = tl.zeros([x.shape[0], SUMMANDS], to.dtype.element_ty)
    for i in tl.static_range(3):
        part = x.to(to.dtype.element_ty)
        columns = tl.where(column == i, part[:, None], columns)
        whole = part.to(tl.float32)
        x = tl.where(x == whole, 0, x - whole)  # nothing is left of what is infinite either
    tl.store(to[:, None] + column, columns, mask=inside[:, None])


@triton.jit
def _terms_kernel(
    output, grad, lse, delta, terms, summands,
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
    tl.store(terms + row[:, None] * 2 + tl.arange(0, 2)[None, :], pair, mask=inside[:, None])
    if summands is not None:
        to = summands + row * 2 * SUMMANDS
        _store_summands(to, -merged / nonzero(scale), inside)
        _store_summands(to + SUMMANDS, -total, inside)


def weight_terms(
    output: torch.Tensor, grad: torch.Tensor, lse: torch.Tensor, scale: float | None = None
) -> WeightTerms:
    """λ and Δ as kernels read them.

    Args:
        output, grad: (B, H, N, D), an output and its gradient.
        lse: (H, B * N) float32, its logsumexp λ.
        scale: Factor on the logits, if summands are needed.
    """
    batch, heads, length, head_dim = output.shape
    num_tokens = batch * length
    delta, terms = torch.empty_like(lse), lse.new_empty(heads, num_tokens, 2)
    summands = None
    if scale is not None and output.element_size() == 2:
        # The interpreter multiplies bfloat16 as if it were integers.
        dtype = torch.float32 if INTERPRETED else torch.bfloat16
        summands = lse.new_empty(heads, num_tokens, 2, SUMMANDS.value, dtype=dtype)
    launch(
        _terms_kernel, (ceil_div(num_tokens, 64), heads),
        output, grad, lse, delta, terms, summands, *token_strides(output, grad), num_tokens, scale or 0.0,
        HEAD_DIM=head_dim, BLOCK_D=power_of_two(head_dim), BLOCK_Q=64,
    )  # fmt: skip
    return WeightTerms(delta, terms, summands)
