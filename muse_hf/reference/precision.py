"""Keeping backward passes in the dtype of their forward, also if the caller runs them under autocast."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def outside_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the backward of an autograd.Function, whose first gradient tells the device."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, grad: torch.Tensor, *grads: torch.Tensor) -> Any:
        with torch.autocast(grad.device.type, enabled=False):
            return backward(ctx, grad, *grads)

    return wrapped


class _MatMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, left, right):
        ctx.save_for_backward(left, right)
        return left @ right

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, grad):
        left, right = ctx.saved_tensors
        return grad @ right.transpose(-1, -2), left.transpose(-1, -2) @ grad


def matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left (..., A, B) @ right (..., B, C), of equal batch dimensions."""
    return _MatMul.apply(left, right)
