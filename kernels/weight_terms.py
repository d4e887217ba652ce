"""What backward passes need of a query to form a weight and its gradient: p = exp(ℓ - λ), dℓ = p (dp - Δ)."""

import torch
import triton
import triton.language as tl
from muse_hf.kernels.common import LOG2_E, load_rows, power_of_two, token_strides
from muse_hf.kernels.launch import ceil_div, launch


@triton.jit
def _terms_kernel(
    output, grad, lse, delta, terms, stride_ob, stride_oh, stride_on, stride_gb, stride_gh, stride_gn,
    length, num_tokens, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    tokens = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = tokens < num_tokens
    o = load_rows(output, tokens, inside, head, stride_ob, stride_oh, stride_on, length, HEAD_DIM, BLOCK_D)
    do = load_rows(grad, tokens, inside, head, stride_gb, stride_gh, stride_gn, length, HEAD_DIM, BLOCK_D)
    total = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    row = head.to(tl.int64) * num_tokens + tokens
    tl.store(delta + row, total, mask=inside)
    merged = tl.load(lse + row, mask=inside, other=0) * LOG2_E
    tl.store(
        terms + row[:, None] * 2 + tl.arange(0, 2)[None, :], tl.join(merged, total), mask=inside[:, None]
    )


def weight_terms(
    output: torch.Tensor, grad: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Δ = do·o (H, B * N) float32, and λ log2(e) and Δ side by side (H, B * N, 2).

    Args:
        output, grad: (B, H, N, D), an output and its gradient.
        lse: (H, B * N) float32, its logsumexp λ.
    """
    batch, heads, length, head_dim = output.shape
    num_tokens = batch * length
    delta, terms = torch.empty_like(lse), lse.new_empty(heads, num_tokens, 2)
    launch(
        _terms_kernel, (ceil_div(num_tokens, 64), heads),
        output, grad, lse, delta, terms, *token_strides(output, grad), num_tokens,
        HEAD_DIM=head_dim, BLOCK_D=power_of_two(head_dim), BLOCK_Q=64,
    )  # fmt: skip
    return delta, terms
