"""Exact causal attention inside the blocks of a layout: the library's kernel, which returns its logsumexp.

What it does not serve (float32, or no GPU) takes the reference's exact attention.
"""

import torch
from muse_hf.kernels.layout import Layout

from muse_hf.reference.exact import exact_forward


def local_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, N, D) and logsumexp (H, B * N) float32 of each block by itself."""
    batch = query.shape[0]
    if _has_library_kernel(query) and layout.even:
        blocks = (_as_blocks(tensor, block) for tensor in (query, key, value))
        output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *blocks, None, True, 0.0, True, False, scale=scale
        )
        lse = lse.squeeze(-1).transpose(0, 1).flatten(1)
        return _from_blocks(output, batch), lse
    if _has_library_kernel(query):
        ends = layout.bounds
        rows = (_as_rows(tensor) for tensor in (query, key, value))
        output, lse, *_ = torch.ops.aten._flash_attention_forward(
            *rows, ends, ends, block, block, 0.0, True, False, scale=scale
        )
        return _from_rows(output, batch), lse
    tokens, inside = _block_tokens(layout, block)
    q, k, v = (_fold(tensor, tokens, key.shape[1]) for tensor in (query * scale, key, value))
    folded, folded_lse = exact_forward(q, k[:, 0], v[:, 0], is_causal=True)
    output = torch.zeros_like(query)
    _unfold(folded, tokens, inside, output)
    lse = torch.zeros(*query.shape[:3], 1, device=query.device)
    _unfold(folded_lse[..., None].float(), tokens, inside, lse)
    return output, lse.transpose(0, 1).flatten(1)


def _has_library_kernel(query: torch.Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """(B, H, N, D) to (B * N, H, D), a view where N rows of all heads lie together."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _from_rows(rows: torch.Tensor, batch: int) -> torch.Tensor:
    return rows.unflatten(0, (batch, -1)).transpose(1, 2)


def _as_blocks(tensor: torch.Tensor, block: int) -> torch.Tensor:
    """(B, H, N, D) to (B * N / block, H, block, D), a view where N rows of all heads lie together."""
    _, heads, _, head_dim = tensor.shape
    return tensor.transpose(1, 2).reshape(-1, block, heads, head_dim).transpose(1, 2)


def _from_blocks(blocks: torch.Tensor, batch: int) -> torch.Tensor:
    _, heads, _, head_dim = blocks.shape
    return blocks.transpose(1, 2).reshape(batch, -1, heads, head_dim).transpose(1, 2)


def _block_tokens(layout: Layout, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (Z, block) of all blocks, and which of them exist. Those behind a block's end do no harm:
    causal attention does not look there."""
    offset = torch.arange(block, device=layout.block_start.device)
    inside = offset < layout.block_length[:, None]
    return torch.where(inside, layout.block_start[:, None] + offset, layout.block_start[:, None]), inside


def _fold(tensor: torch.Tensor, tokens: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(B, H, N, D) to the blocks (Z * Hkv, G, block, D), in float32 at least."""
    rows = (
        _as_rows(tensor)[tokens]
        .to(torch.promote_types(tensor.dtype, torch.float32))
        .unflatten(2, (kv_heads, -1))
    )
    return rows.permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()


def _unfold(folded: torch.Tensor, tokens: torch.Tensor, inside: torch.Tensor, target: torch.Tensor) -> None:
    """Write blocks (Z * Hkv, G, block, D) to their places in a contiguous tensor (B, H, N, D)."""
    rows = folded.unflatten(0, (tokens.shape[0], -1)).flatten(1, 2).transpose(1, 2)[inside]
    length = target.shape[2]
    at = tokens[inside]
    target[at // length, :, at % length] = rows.to(target.dtype)
