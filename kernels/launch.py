"""Launching kernels without finding out again what Triton compiled for arguments of their kind."""

from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from muse_hf.kernels.common import INTERPRETED, capability_of
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Compiled(NamedTuple):
    """A compiled kernel, what launches it, and the arguments that it was compiled for."""

    kernel: Any
    run: Any
    function: Any
    metadata: Any
    constants: list[Any]


# By all that Triton specializes a kernel on. Compiled kernels keep their source alive.
_compiled: dict[tuple, Compiled] = {}
# What wants to know of launches in this thread, see `replay`.
watcher: ContextVar[Any] = ContextVar("watcher", default=None)


def launch(kernel: JITFunction, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`kernel[grid](*args, **constants)`, at a fraction of its cost to the host from the second time on.

    Args:
        args: Tensors (the first argument is one) and None, then numbers.
        constants: All constexpr parameters, and options of the launch.
    """
    constants.setdefault("enable_fp_fusion", True)  # Triton's default from 3.10 on is another one
    device = args[0].get_device()
    kinds, values = [id(kernel), device, *constants.values()], []
    for arg in args:
        kind = type(arg)
        if kind is int:
            kinds.append(_kind_of(arg))
            values.append(arg)
        elif kind is float or arg is None:
            kinds.append(kind)
            values.append(arg)
        else:  # compiled kernels take addresses, and do not ask the driver about them
            address = arg.data_ptr()
            kinds += arg.dtype, not address & 15
            values.append(address)
    key = tuple(kinds)
    found = _compiled.get(key)
    grid = (*grid, 1, 1)[:3]
    if found is None:
        constants_in_order = [constants[name] for name in kernel.arg_names[len(args) :]]
        options = {"launch_pdl": True} if _can_launch_early(args[0]) else {}
        compiled = kernel[grid](*args, **constants, **options)
        if compiled is not None:  # the interpreter has nothing to keep
            found = Compiled(
                compiled, compiled.run, compiled.function, compiled.packed_metadata, constants_in_order
            )
            _compiled[key] = found
    elif is_hooked():
        found.kernel[grid](*values, *found.constants)
    else:  # what this does, without a record of the launch for hooks
        stream = current_stream(device)
        found.run(*grid, stream, found.function, found.metadata, None, None, None, *values, *found.constants)
    if (watch := watcher.get()) is not None:
        watch.launch(found, grid, args)


def _can_launch_early(tensor: torch.Tensor) -> bool:
    """Whether a kernel may be launched before the one in front of it is done, for which it waits itself."""
    return tensor.is_cuda and not INTERPRETED and capability_of(tensor.device) >= (9, 0)


def current_stream(device: int) -> int:
    """The stream that kernels are launched on."""
    return driver.active.get_current_stream(device)


@lru_cache(maxsize=1 << 12)
def _kind_of(number: int) -> tuple[bool, bool, bool]:
    """What Triton compiles for: 1, multiples of 16, and numbers of 32 or 64 bits."""
    return number == 1, number % 16 == 0, -(1 << 31) <= number < 1 << 31


def is_hooked() -> bool:
    """Whether someone, a profiler as a rule, wants to know about launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))  # a chain, or one hook


def ceil_div(number: int, by: int) -> int:
    """`triton.cdiv`, which costs the host microseconds."""
    return -(-number // by)
