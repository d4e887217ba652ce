"""Repeated functions against themselves run as they are, with a stand-in for Triton's compiler."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from muse_hf.kernels import attention, tilted_attention
from muse_hf.kernels import launch as launching
from muse_hf.kernels.launch import launch
from muse_hf.kernels.replay import Recording, Repeated, library_call
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


@pytest.fixture
def bounds():
    """Arguments are addresses here, of which nobody knows what lies there."""


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
    for repeated in (forward, backward):
        (recording,) = repeated.recordings.values()
        assert type(recording) is Recording
        places = [place for step in recording.steps for place in getattr(step, "places", [])]
        assert min(place.offset for place in places) >= 0, "a tensor before its buffer: it has no address"


@triton.jit
def _add_kernel(x, y, nothing, total, number, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(total + at, tl.load(x + at) + tl.load(y + at) + number)


TABLE = torch.arange(16, dtype=torch.float32)


@library_call
def _halves(x, table):
    return (x / 2 + table, "no tensor")


def _sum(x, y, number):
    """x + y / 2 + table + 3 * number, and in between; the second is saved."""
    first = torch.empty_like(x)
    launch(_add_kernel, (1,), x, TABLE, None, first, number, BLOCK=16)
    half, _ = _halves(y, TABLE)
    second = x.new_empty(2, 16)
    for row in second.unbind():
        launch(_add_kernel, (1,), first, half, None, row, number, BLOCK=16)
    return [half, second]


def _steps(function, tensors, number=2.0):
    """Shown and saved results of some calls."""
    found = []
    for x, y in tensors:
        shown, saved = function(x, y, number)
        found.append((*shown, *saved.tensors()))
    return found


def test_the_same_is_saved_every_time():
    """Checkpointing refuses what saves other tensors when it runs again, after the second time too."""
    repeated = Repeated(_sum, num_shown=1)
    kinds = set()
    for x, y in [torch.randn(2, 16) for _ in range(4)]:
        _, saved = repeated(x, y, 2.0)
        kinds.add((saved.packing, *((buffer.shape, buffer.dtype) for buffer in saved.buffers)))
    assert len(kinds) == 1


def test_parts_of_buffers_and_results_of_libraries_find_their_place():
    tensors = [torch.randn(2, 16) for _ in range(4)]
    repeated = Repeated(_sum, num_shown=1)
    for (half, second), (x, y) in zip(_steps(repeated, tensors), tensors):
        assert torch.equal(half, y / 2 + TABLE)
        assert torch.equal(second, (x + TABLE + 2.0 + half + 2.0).expand(2, 16))
    assert [type(how) for how in repeated.recordings.values()] == [Recording]


def test_inputs_that_are_one_tensor_are_told_apart_later():
    repeated, x = Repeated(_sum, num_shown=1), torch.randn(16)
    pairs = [(x, x)] * 3 + [(x, x + 1)] * 3
    for (half, _), (_, y) in zip(_steps(repeated, pairs), pairs):
        assert torch.equal(half, y / 2 + TABLE)


def test_views_of_inputs_that_share_memory_are_told_apart():
    def function(x, y):
        half, _ = _halves(y.view(4, 4).flatten(), TABLE)
        total = torch.empty_like(half)
        launch(_add_kernel, (1,), x.view(2, 8)[1:], half, None, total, 0.0, BLOCK=8)
        return [total]

    repeated = Repeated(function)
    for i in range(4):
        memory, apart = torch.randn(48), torch.randn(16)
        x, y = memory[16:32], (apart if i == 3 else memory[:16])
        ((total,), _) = repeated(x, y)
        assert torch.equal(total[:8], x[8:] + (y / 2 + TABLE)[:8])
    assert [type(how) for how in repeated.recordings.values()] == [Recording]


def test_other_operations_are_made_every_time():
    def function(x, y, number):
        return [x * number + y]

    repeated = Repeated(function)
    for factor in (1.0, 2.0, 3.0):
        ((result,), _) = repeated(torch.full((16,), factor), torch.ones(16), 2.0)
        assert (result == 2 * factor + 1).all()
    assert [*repeated.recordings.values()] == [None]


def test_a_copy_in_the_storage_of_what_is_gone_is_no_view():
    def function(x, y):
        for _ in range(3):  # until an address is used again
            passing = torch.empty_like(x)
            launch(_add_kernel, (1,), x, y, None, passing, 0.0, BLOCK=16)
            del passing
            total = x.view(4, 4).t().reshape(16)
        result = torch.empty_like(x)
        launch(_add_kernel, (1,), total, y, None, result, 0.0, BLOCK=16)
        return [result]

    repeated = Repeated(function)
    for _ in range(4):
        x, y = torch.randn(2, 16)
        ((result,), _) = repeated(x, y)
        assert torch.equal(result, x.view(4, 4).t().flatten() + y)
    assert [*repeated.recordings.values()] == [None]


def test_a_part_of_a_buffer_is_no_result_to_repeat():
    def function(x, y):
        whole = x.new_empty(32)
        launch(_add_kernel, (1,), x, y, None, whole[16:], 0.0, BLOCK=16)
        launch(_add_kernel, (1,), x, y, None, whole, 0.0, BLOCK=16)
        return [whole[:16]]

    repeated = Repeated(function)
    for _ in range(4):
        x, y = torch.randn(2, 16)
        ((result,), _) = repeated(x, y)
        assert torch.equal(result, x + y)
    assert [*repeated.recordings.values()] == [None]


def test_inputs_of_another_kind_are_another_case():
    repeated, memory = Repeated(_sum, num_shown=1), torch.randn(3, 17)
    for x in (memory[0, :16], memory[0, 1:], memory[0, :16]):
        for number in (2.0, 3.0, 2.0, 2.0):
            _, saved = repeated(x, memory[2, :16], number)
    assert len(repeated.recordings) == 4
    expected = memory[0, :16] + TABLE + 2.0 + (memory[2, :16] / 2 + TABLE) + 2.0
    assert torch.equal(saved.tensors()[0][0], expected)
