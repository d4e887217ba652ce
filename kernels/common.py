"""Primitives that several kernels share."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_wait
from triton.language.target_info import cuda_capability_geq

LOG2_E = tl.constexpr(1.4426950408889634)
# Kernels run on the CPU if Triton was told so before it was imported.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


# What a device can do does not change, and PyTorch takes microseconds to say it.
@lru_cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability."""
    return torch.cuda.get_device_capability(device)


@lru_cache
def shared_memory_of(device: torch.device) -> int:
    """Bytes of shared memory that a program may use."""
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor - 1024


@triton.jit
def wait_for_previous_kernel():
    """The first thing that every kernel does: it may be launched before the one in front of it is done.

    Programmatic dependent launch. Without this wait, what that kernel writes would be read too early.
    """
    if not INTERPRETED and cuda_capability_geq(9, 0):
        gdc_wait()


# What CUDA graphs were captured with.
_captured: list[Any] = []


def keep_if_captured(built: Any) -> None:
    """Keep what a CUDA graph that is being captured, if any, holds addresses of."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        _captured.append(built)


def kept_on_device(build: Callable) -> Callable:
    """Cache what lies on a device and follows from the shapes of a batch: layers share it.

    A CUDA graph holds the addresses of what it was captured with, so that this is never given up.
    """
    cached = lru_cache(maxsize=32)(build)

    @wraps(build)
    def get(*args: Any, **kwargs: Any) -> Any:
        built = cached(*args, **kwargs)
        keep_if_captured(built)
        return built

    return get


def has_much_shared_memory(tensor: torch.Tensor) -> bool:
    """Whether a program may use more than 99 KiB, up to 227, of it."""
    return tensor.is_cuda and capability_of(tensor.device)[0] in (9, 10)


@lru_cache(maxsize=1024)
def power_of_two(number: int, least: int = 16) -> int:
    """The next power of two, and at least what a matrix product needs."""
    return max(least, 1 << (number - 1).bit_length())


def choose_launch(
    query: torch.Tensor, usual: dict, wide: dict, precise: dict, widest: dict | None = None
) -> dict:
    """Tile sizes and warps for a head_dim of up to 64, of up to 128, for a larger one, or for float32.

    Products of float32 take no matrix units and many registers, so that their tiles are small.

    Args:
        widest: For a head_dim of more than 128, if not those of 128.
    """
    if query.dtype == torch.float32:
        return precise
    if query.shape[3] <= 64:
        return usual
    return widest if widest and query.shape[3] > 128 else wide


def token_strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    """What `row_offsets` needs to know of tensors (B, H, N, D): three strides each, and `length` for all.

    Where the tokens of all rows lie at equal distances (one row, or rows that follow each other), a batch is
    addressed as N rows of one token, for which Triton compiles no division.
    """
    batch, _, length, _ = tensors[0].shape
    if batch == 1 or all(t.stride(0) == length * t.stride(2) for t in tensors):
        return *(s for t in tensors for s in (t.stride(2), t.stride(1), 0)), 1
    return *(s for t in tensors for s in t.stride()[:3]), length


@triton.jit
def row_offsets(tokens, head, stride_b, stride_h, stride_n, length):
    """Offsets of token ids in a tensor (B, H, N, D): 64 bits, for long batches."""
    tokens = tokens.to(tl.int64)
    return tokens // length * stride_b + head.to(tl.int64) * stride_h + tokens % length * stride_n


@triton.jit
def load_rows(
    base, tokens, mask, head, stride_b, stride_h, stride_n, length,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows (len(tokens), BLOCK_D) of a tensor (B, H, N, D), zero where the mask is false and beyond D."""
    rows = base + row_offsets(tokens, head, stride_b, stride_h, stride_n, length)
    dims = tl.arange(0, BLOCK_D)
    if HEAD_DIM == BLOCK_D:
        return tl.load(rows[:, None] + dims[None, :], mask=mask[:, None], other=0)
    return tl.load(rows[:, None] + dims[None, :], mask=mask[:, None] & (dims < HEAD_DIM)[None, :], other=0)


@triton.jit
def store_rows(
    base, x, tokens, mask, head, stride_b, stride_h, stride_n, length,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The opposite of `load_rows`."""
    rows = base + row_offsets(tokens, head, stride_b, stride_h, stride_n, length)
    dims = tl.arange(0, BLOCK_D)
    tl.store(rows[:, None] + dims[None, :], x, mask=mask[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit
def ordered(x):
    """float32 to uint32 in the same order. No number becomes 0."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits | -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def plane_of(tensor, row, head, stride_b, stride_h):
    """Where the tokens of a batch row and head begin in a tensor (B, H, N, D)."""
    return tensor + row.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h


@triton.jit
def block_plane(tensor, row, head, begin, stride_b, stride_h, stride_n):
    """Where the tokens of a block begin in a tensor (B, H, N, D)."""
    return plane_of(tensor, row, head, stride_b, stride_h) + begin.to(tl.int64) * stride_n


@triton.jit
def load_tokens(plane, tokens, mask, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, first=0):
    """Dimensions first, first + 1, ... of tokens (len(tokens), BLOCK_D), zero where masked and beyond D."""
    dims = first + tl.arange(0, BLOCK_D)
    at = plane + tokens.to(tl.int64)[:, None] * stride + dims[None, :]
    if HEAD_DIM % BLOCK_D == 0:
        return tl.load(at, mask=mask[:, None], other=0)
    return tl.load(at, mask=mask[:, None] & (dims < HEAD_DIM)[None, :], other=0)


@triton.jit
def gather_tokens(plane, tokens, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, first=0):
    """`load_tokens` where all tokens exist: masks cost registers and instructions."""
    dims = first + tl.arange(0, BLOCK_D)
    at = plane + tokens.to(tl.int64)[:, None] * stride + dims[None, :]
    if HEAD_DIM % BLOCK_D == 0:
        return tl.load(at)
    return tl.load(at, mask=(dims < HEAD_DIM)[None, :], other=0)


@triton.jit
def load_at(at, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """What lies at addresses (rows, BLOCK_D), zero beyond D and where not inside, if that is not None."""
    if HEAD_DIM < BLOCK_D:
        real = (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
        x = tl.load(at, mask=real if inside is None else inside[:, None] & real, other=0)
    elif inside is None:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=inside[:, None], other=0)
    return x


@triton.jit
def load_places(plane, places, inside, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tokens (len(places), BLOCK_D) of a plane, zero beyond D and where not inside, if that is not None.

    Offsets have the bits of the places. In a block they fit 32, which spares registers, see `addressable`.
    """
    at = plane + (places[:, None] * stride + tl.arange(0, BLOCK_D)[None, :])
    return load_at(at, inside, HEAD_DIM, BLOCK_D)


@triton.jit
def store_tokens(plane, x, tokens, mask, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The opposite of `load_tokens` for all dimensions."""
    dims = tl.arange(0, BLOCK_D)
    at = plane + tokens.to(tl.int64)[:, None] * stride + dims[None, :]
    tl.store(at, x, mask=mask[:, None] & (dims < HEAD_DIM)[None, :])
