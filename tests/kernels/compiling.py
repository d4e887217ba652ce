"""Compiles the kernels for a GPU that is not there: the interpreter takes what the compiler refuses.

`python -m tests.kernels.compiling`, without TRITON_INTERPRET, prints what was compiled, and for which dtype.
"""

import sys
from functools import partial
from typing import Any

import torch
from muse_hf.kernels import attention, operators, tilted_attention  # noqa: F401
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from muse_hf import MuseConfig, muse_attention

_TARGET, _SHARED_MEMORY = GPUTarget("cuda", 90, 32), 227 << 10
_DEFAULT = MuseConfig(local_block=64, num_retrieved=4, backend="triton")
_PAPER = MuseConfig.paper(local_block=64, num_clusters=16, backend="triton")
_CASES = (
    (torch.bfloat16, 64, True, _DEFAULT),
    (torch.float32, 64, True, _DEFAULT),
    (torch.bfloat16, 128, True, _DEFAULT.replace(num_retrieved=0)),
    (torch.float16, 80, True, _DEFAULT.replace(retrieval_threshold=0.0, cluster_size=64, local_block=128)),
    (torch.float32, 64, True, _PAPER),
    (torch.bfloat16, 64, True, _PAPER.replace(cluster_cap=1.5)),
    (torch.bfloat16, 64, False, _PAPER),
)


class _Driver:
    """What Triton asks of a driver before it launches anything."""

    def get_current_target(self) -> GPUTarget:
        return _TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile(what: str, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`launch` without the launch."""
    compiled = kernel.warmup(*args, grid=grid, enable_fp_fusion=True, **constants)
    shared = compiled.metadata.shared
    assert shared <= _SHARED_MEMORY, f"{kernel.__name__} takes {shared} bytes of shared memory for {what}"
    print(what, kernel.__name__, flush=True)


def _attend(dtype: torch.dtype, head_dim: int, is_causal: bool, config: MuseConfig) -> None:
    """Forward and backward of attention, whatever memory holds."""
    stand_ins = {
        "launch": partial(_compile, str(dtype)),
        "has_much_shared_memory": lambda tensor: True,
    }
    for name, module in list(sys.modules.items()):
        if name.startswith("muse_hf.kernels."):
            for attribute in stand_ins.keys() & vars(module).keys():
                setattr(module, attribute, stand_ins[attribute])
    shapes = ((1, heads, 300, head_dim) for heads in (2, 1, 1))
    query, key, value = (torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    muse_attention(query, key, value, is_causal=is_causal, config=config).sum().backward()


if __name__ == "__main__":
    driver.set_active(_Driver())
    operators.INTERPRETED = True  # tensors may be on a CPU
    for case in _CASES:
        _attend(*case)
