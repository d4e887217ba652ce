"""Compiles the kernels for a GPU that is not there: the interpreter takes what the compiler refuses.

`python -m tests.kernels.compiling`, without TRITON_INTERPRET, prints the kernels that were compiled.
"""

import sys
from typing import Any

import torch
from muse_hf.kernels import attention, operators, tilted_attention  # noqa: F401
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from muse_hf import MuseConfig, muse_attention

_DEFAULT = MuseConfig(local_block=64, num_retrieved=4, backend="triton")
_PAPER = MuseConfig.paper(local_block=64, num_clusters=16, backend="triton")
_CASES = (
    (torch.bfloat16, True, _DEFAULT),
    (torch.float32, True, _DEFAULT),
    (torch.float32, True, _PAPER),
    (torch.bfloat16, True, _PAPER.replace(cluster_cap=1.5)),
    (torch.bfloat16, False, _PAPER),
)


class _Driver:
    """What Triton asks of a driver before it launches anything."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`launch` without the launch."""
    kernel.warmup(*args, grid=grid, **constants)
    print(kernel.__name__, flush=True)


def _attend(dtype: torch.dtype, is_causal: bool, config: MuseConfig) -> None:
    """Forward and backward of attention, whatever memory holds."""
    query, key, value = (
        torch.zeros(1, heads, 300, 64, dtype=dtype, requires_grad=True) for heads in (2, 1, 1)
    )
    muse_attention(query, key, value, is_causal=is_causal, config=config).sum().backward()


if __name__ == "__main__":
    driver.set_active(_Driver())
    operators.INTERPRETED = True  # tensors may be on a CPU
    for name, module in list(sys.modules.items()):
        if name.startswith("muse_hf.kernels.") and hasattr(module, "launch"):
            module.launch = _compile
    for case in _CASES:
        _attend(*case)
