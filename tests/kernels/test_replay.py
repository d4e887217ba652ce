"""Repeated functions against themselves run as they are, with a stand-in for Triton's compiler."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
from muse_hf.kernels import attention, tilted_attention
from muse_hf.kernels import launch as launching
from muse_hf.kernels.replay import Recording, Repeated
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

from tests.kernels.comparing import DEVICE

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter stands in for what is compiled")


class Compiled:
    """What was compiled for arguments of some kinds: takes addresses, and interprets the kernel."""

    function, packed_metadata = None, None

    def __init__(self, kernel, args, constants):
        self.kernel, self.constants = kernel, constants
        self.dtypes = [arg.dtype if isinstance(arg, torch.Tensor) else type(arg) for arg in args]

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *values):
        with _disable_current_modes():
            args = map(_with_kind, values, self.dtypes)
            self.kernel.run(*args, grid=(x, y, z), warmup=False, **self.constants)


def _with_kind(value, kind):
    if isinstance(kind, torch.dtype):
        if value == 0:
            return torch.empty(0, dtype=kind)
        memory = (ctypes.c_char * kind.itemsize).from_address(value)
        return torch.frombuffer(memory, dtype=kind)
    return None if kind is type(None) else value


@pytest.fixture(autouse=True)
def compiling(monkeypatch):
    """Kernels compile, and are launched by what that gives."""

    def getitem(kernel, grid):
        def run(*args, **constants):
            compiled = Compiled(kernel, args, constants)
            with _disable_current_modes():
                kernel.run(*args, grid=grid, warmup=False, **constants)
            return compiled

        return run

    monkeypatch.setattr(InterpretedFunction, "__getitem__", getitem)
    active = SimpleNamespace(get_current_stream=lambda device: None)
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(launching, "_compiled", {})


def inputs(seed, batch=1, heads=2, length=36, head_dim=16):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, n, head_dim) for n in (heads, 1, 1, heads)]
    return [torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes]


TILTED = (0.25, [0, 36], 16, [2, 2], [12, 24], False, 1, True)
PADDED = (0.25, [2, 20, 38, 34], 16, [2, 2], [12, 24], False, 0, True)
ACAUSAL = (0.25, [], 16, [2, 2], [27, 27], False, 1, True)
FLAT = (0.25, [0, 36], 16, 4, 6, 1, 2, 0.01)
NOTHING_RETRIEVED = (0.25, [2, 20, 38, 34], 16, 4, 6, 1, 0, 0.0)


@pytest.mark.parametrize(
    ("module", "settings", "batch", "num_kept"),
    [
        (tilted_attention, TILTED, 1, 6),
        (tilted_attention, PADDED, 2, 6),
        (tilted_attention, ACAUSAL, 2, 6),
        (attention, FLAT, 1, 4),
        (attention, NOTHING_RETRIEVED, 2, 4),
    ],
    ids=["tilted", "padded", "acausal", "flat", "nothing retrieved"],
)
def test_attention_repeated_is_attention(module, settings, batch, num_kept):
    forward, backward = Repeated(module.forward, num_shown=2), Repeated(module.backward, num_shown=3)
    for seed in range(5):
        *tensors, grad = inputs(seed, batch)
        expected, lse, *saved = module.forward(*tensors, *settings)
        gradients = module.backward(grad, *tensors, expected, saved, *settings[:num_kept])
        shown, saved = forward(*tensors, *settings)
        shares, _ = backward(grad, *tensors, shown[0], saved, *settings[:num_kept])
        for actual, exact in zip((*shown, *shares), (expected, lse, *gradients)):
            assert torch.equal(actual, exact)
            assert actual.stride() == exact.stride()
    assert [type(how) for how in forward.recordings.values()] == [Recording]
    assert [type(how) for how in backward.recordings.values()] == [Recording] * 2, "saved apart, and packed"
