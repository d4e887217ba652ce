"""Exact softmax attention that also returns its logsumexp: diagonal blocks, short rows, retrieved clusters.

The backward takes the output and logsumexp of the *merged* attention and so returns the gradients of this
part's share in it. On the CPU the library kernel serves; elsewhere the plain formula does.
"""

import torch

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def exact_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    is_causal: bool,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention, queries already scaled.

    Args:
        query: (X, G, Q, D), the G query heads that share a key head.
        key, value: (X, K, D); K = Q if causal.
        bias: (X, K), finite, added to the logits.

    Returns:
        Output (X, G, Q, D) and logsumexp (X, G, Q).
    """
    if query.device.type == "cpu":
        mask = _as_mask(bias, query)
        return _flash(query, *_as_heads(query, key, value), is_causal=is_causal, attn_mask=mask, scale=1.0)
    logits = _logits(query, key, is_causal, bias)
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp() @ value[:, None], lse


def exact_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    *,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, given the merged output and logsumexp.

    Shapes as in `exact_forward`; grad is (X, G, Q, D).
    """
    if query.device.type == "cpu":
        heads = _as_heads(query, key, value)
        grad_query, grad_key, grad_value = _flash_backward(
            grad, query, *heads, output, lse, 0.0, is_causal, scale=1.0
        )
        return grad_query, grad_key.sum(1), grad_value.sum(1)
    logits = _logits(query, key, is_causal, None)
    delta = (grad * output).sum(-1)
    grad_query, grad_key, grad_value = softmax_backward(
        grad, query, key[:, None], value[:, None], logits, lse, delta
    )
    return grad_query, grad_key.sum(1), grad_value.sum(1)


def softmax_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    logits: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value from p = exp(ℓ - λ) and dℓ = p (do·v - Δ). Overwrites the logits.

    Args:
        grad, query: (..., Q, D). key, value: (..., K, D). logits: (..., Q, K).
        lse, delta: (..., Q) λ and Δ of the merged attention.
    """
    weights = logits.sub_(lse[..., None]).exp_()
    grad_value = weights.transpose(-1, -2) @ grad
    grad_logits = (grad @ value.transpose(-1, -2)).sub_(delta[..., None]).mul_(weights)
    return grad_logits @ key, grad_logits.transpose(-1, -2) @ query, grad_value


def _as_heads(query, key, value):
    """Keys and values as views with a head dimension of stride 0: nothing is repeated in memory."""
    groups = query.shape[1]
    return key[:, None].expand(-1, groups, -1, -1), value[:, None].expand(-1, groups, -1, -1)


def _as_mask(bias: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    return None if bias is None else bias[:, None, None].expand(-1, *query.shape[1:3], -1)


def _logits(
    query: torch.Tensor, key: torch.Tensor, is_causal: bool, bias: torch.Tensor | None
) -> torch.Tensor:
    logits = query @ key[:, None].transpose(-1, -2)
    if bias is not None:
        logits = logits + bias[:, None, None]
    if is_causal:
        future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
        logits = logits.masked_fill(future, -torch.inf)
    return logits
