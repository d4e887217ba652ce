"""What the attention ops share: which inputs kernels serve, and how forward and backward become one op."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from muse_hf.kernels.common import INTERPRETED, capability_of, shared_memory_of
from muse_hf.kernels.replay import Repeated, Saved, copy
from torch.autograd.function import once_differentiable

LARGEST_HEAD_DIM = 256
# Bytes of shared memory for the gradients of local blocks, and of summaries, where head_dim is over 128.
_WIDE_BLOCKS = 204 << 10


def reason_against_inputs(query: torch.Tensor) -> str | None:
    """Why no kernel can serve a query (B, H, N, D), whatever the setting; None if there is no reason."""
    if query.dtype == torch.float64:
        return "they do not compute in float64"
    if not query.is_cuda and not INTERPRETED:
        return f"they need a CUDA device, the inputs are on {query.device.type!r}"
    if query.is_cuda and capability_of(query.device) < (8, 0):
        return "they need compute capability 8.0 or newer"
    if query.shape[3] > LARGEST_HEAD_DIM:
        return f"head_dim {query.shape[3]} is larger than {LARGEST_HEAD_DIM}"
    return None


def reason_against_local_blocks(query: torch.Tensor) -> str | None:
    """Why the gradients of local blocks, which causal attention needs, cannot be had; None if they can."""
    if query.shape[3] > 128 and query.is_cuda and shared_memory_of(query.device) < _WIDE_BLOCKS:
        return f"with head_dim {query.shape[3]} causal attention takes more shared memory than this GPU has"
    return None


def addressable(tensor: torch.Tensor, block: int) -> torch.Tensor:
    """A tensor (B, H, N, D), or a copy of it with strides that kernels can work with.

    Rows lie together, and offsets inside a block of tokens fit 32 bits.
    """
    fits = tensor.stride(3) == 1 and tensor.stride(2) * block < 1 << 31
    return tensor if fits else tensor.contiguous()


class AttentionOp:
    """Attention made of a forward and a backward function, differentiable in query, key and value.

    Under torch.compile both are custom operators, single nodes of the graph whatever they launch. Calling
    these costs the host a millisecond, so that without a compiler an autograd.Function does the same.

    Args:
        name: Of the operators, "namespace::name".
        forward: (query, key, value, *settings) -> [output, logsumexp (B, H, N), *saved]. No two results may
            share memory. This and `backward` keep to what `Repeated` says, or cost the host more.
        fake: The same for shapes, dtypes and strides only.
        backward: (grad, query, key, value, output, saved, *the first settings) -> the gradients of query, key
            and value, laid out like them.
        num_kept: How many of the settings the backward pass takes.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., list[torch.Tensor]],
        fake: Callable[..., list[torch.Tensor]],
        backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        num_kept: int,
    ):
        run_forward = _on_its_device(Repeated(forward, num_shown=2))
        run_whole_forward = _on_its_device(Repeated(forward))
        run_backward = _on_its_device(Repeated(backward))

        @wraps(forward)
        def forward_operator(*inputs: Any) -> list[torch.Tensor]:
            return run_whole_forward(*inputs)[0]

        @wraps(backward)
        def backward_operator(grad, query, key, value, output, saved, *settings: Any) -> tuple:
            return tuple(run_backward(grad, query, key, value, output, Saved(saved), *settings)[0])

        self.operator = torch.library.custom_op(name, forward_operator, mutates_args=())
        self.operator.register_fake(fake)
        backward_operator = torch.library.custom_op(f"{name}_backward", backward_operator, mutates_args=())
        backward_operator.register_fake(_fake_gradients)

        def save(ctx: Any, inputs: tuple, output: torch.Tensor, saved: Saved) -> None:
            ctx.save_for_backward(*inputs[:3], output, *saved.buffers)
            ctx.packing, ctx.kept, ctx.num_settings = saved.packing, inputs[3 : 3 + num_kept], len(inputs) - 3
            ctx.set_materialize_grads(False)

        def gradients(ctx: Any, grad: torch.Tensor | None, run: Callable) -> tuple:
            settings = (None,) * ctx.num_settings
            if grad is None:
                return None, None, None, *settings
            query, key, value, output, *buffers = ctx.saved_tensors
            shares = run(grad, query, key, value, output, Saved(buffers, ctx.packing), *ctx.kept)
            return *shares, *settings

        def run_operator(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return backward_operator(*(x.buffers if isinstance(x, Saved) else x for x in inputs))

        def setup_context(ctx: Any, inputs: tuple, output: list[torch.Tensor]) -> None:
            save(ctx, inputs, output[0], Saved(output[2:]))
            # PyTorch takes an empty list for one of tensors.
            ctx.no_gradients = [[] if setting == [] else None for setting in inputs[3:]]

        def operator_gradients(ctx: Any, grads: list[torch.Tensor | None]) -> tuple:
            return *gradients(ctx, grads[0], run_operator)[:3], *ctx.no_gradients

        self.operator.register_autograd(operator_gradients, setup_context=setup_context)

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *inputs):
                (output, lse), saved = run_forward(*inputs)
                save(ctx, inputs, output, saved)
                ctx.mark_non_differentiable(lse)
                return output, lse

            @staticmethod
            @once_differentiable
            def backward(ctx, grad, _):
                return gradients(ctx, grad, lambda *inputs: run_backward(*inputs)[0])

        self.function = Function

    def __call__(self, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Output, which records a gradient, and logsumexp (B, H, N), which does not."""
        if torch.compiler.is_compiling():
            output, lse, *_ = self.operator(*inputs)
            return output, lse.detach()
        return self.function.apply(*inputs)


def _on_its_device(function: Callable) -> Callable:
    """The function on the device of its first tensor, which need not be the current one.

    Triton compiles and launches for the current device, whatever device its tensors are on.
    """

    def on_its_device(tensor: torch.Tensor, *others: Any) -> Any:
        with torch.cuda.device_of(tensor):
            return function(tensor, *others)

    return on_its_device


def _fake_gradients(grad, query, key, value, *_):
    return tuple(torch.empty_like(tensor) for tensor in (query, key, value))


def laid_out_like(share: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A gradient with the strides that its fake promises, those that library kernels choose as a rule."""
    promised = torch.empty_like(tensor)
    if share.stride() == promised.stride():
        return share
    copy(share, promised)
    return promised
