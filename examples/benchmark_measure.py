"""How attention is measured: times of the passes, the exact and the windowed peers, memory, error."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from muse_hf import exact_attention

PASSES = ("forward", "backward", "both")
WINDOWS = (1024, 4096)
EXACT_BACKENDS = {
    "cuda": {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION},
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION},
}
_QUANTILES = (0.5, 0.2, 0.8)
_WARM_UP_MS = 50
_FEWEST_CPU_RUNS = 3
# A spread between the percentiles that says that something else than the kernels was measured, and how often
# it is tried again.
_WIDE, _MOST_TRIES = 0.05, 3
_WINDOW_TILE = 128

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Times(NamedTuple):
    """Milliseconds of one pass: the median, and the 20th and the 80th percentile, of its runs.

    `graph` is the median of the same pass as a CUDA graph, which leaves out what the host takes to launch it;
    None on a CPU.
    """

    median: float
    p20: float
    p80: float
    graph: float | None = None


PassTimes = dict[str, Times]


@dataclass
class Peers:
    """What MuSe is compared with at one shape.

    Attributes:
        exact: Times of exact attention by the name of the library's kernel, of those that serve the shape.
        windows: Times of sliding-window attention by the number of tokens in the window.
        notes: Why a peer is missing.
    """

    exact: dict[str, PassTimes] = field(default_factory=dict)
    windows: dict[int, PassTimes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def fastest_exact(self, name: str) -> tuple[str, Times]:
        """The exact kernel that is fastest in a pass, and its times."""
        backend = min(self.exact, key=lambda backend: self.exact[backend][name].median)
        return backend, self.exact[backend][name]

    def fastest_graph(self, name: str) -> float | None:
        """Milliseconds of the exact kernel that is fastest in a pass as a CUDA graph."""
        graphs = [times[name].graph for times in self.exact.values() if times[name].graph is not None]
        return min(graphs, default=None)


def time_passes(attend: Attend, tensors: Sequence[torch.Tensor], rep_ms: float) -> PassTimes:
    """Times of the forward (which keeps what training needs), of the backward alone, and of both.

    Args:
        attend: The attention of query, key and value.
        tensors: Query, key, value and the gradient of the output.
        rep_ms: Milliseconds for which a pass is repeated, after a warm-up. A pass that takes longer is
            measured once on a GPU, so that its percentiles say nothing, and three times on a CPU. On a GPU
            this is done again where times spread widely, see `steadiest`.
    """
    if not tensors[0].is_cuda:
        return _time_passes(attend, tensors, rep_ms, _time_on_cpu)
    # CUDA graphs are not captured on the default stream, and a backward runs where its forward did.
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        return _time_passes(attend, tensors, rep_ms, _time_on_gpu)


def _time_passes(
    attend: Attend, tensors: Sequence[torch.Tensor], rep_ms: float, timed: Callable[..., Times]
) -> PassTimes:
    *leaves, grad = (tensor.detach() for tensor in tensors)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    output = attend(*leaves)
    passes = {
        "forward": lambda: attend(*leaves),
        "backward": lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True),
        "both": lambda: torch.autograd.grad(attend(*leaves), leaves, grad),
    }
    # Else PyTorch wakes a thread for every backward pass: hundreds of microseconds on some machines, which a
    # model spends once a step, not once a layer.
    with torch.autograd.set_multithreading_enabled(False):
        return {name: timed(function, rep_ms) for name, function in passes.items()}


def _time_on_gpu(function: Callable[[], object], rep_ms: float) -> Times:
    from triton.testing import do_bench  # Triton is there on Linux only

    def quantiles(run: Callable[[], object]) -> list[float]:
        return steadiest(lambda: do_bench(run, warmup=_WARM_UP_MS, rep=rep_ms, quantiles=list(_QUANTILES)))

    eager = quantiles(function)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        function()
    return Times(*eager, graph=quantiles(graph.replay)[0])


def steadiest(measure: Callable[[], list[float]]) -> list[float]:
    """Median, 20th and 80th percentile of the measurement that spreads least: the first that is not wide, or
    of three. A host with other work to do is late with launches, for some tenths of a second as a rule."""

    def spread(quantiles: list[float]) -> float:
        median, low, high = quantiles
        return (high - low) / median

    tries = [measure()]
    while spread(tries[-1]) > _WIDE and len(tries) < _MOST_TRIES:
        tries.append(measure())
    return min(tries, key=spread)


def _time_on_cpu(function: Callable[[], object], rep_ms: float) -> Times:
    function()
    runs = []
    while len(runs) < _FEWEST_CPU_RUNS or sum(runs) < rep_ms:
        start = time.perf_counter()
        function()
        runs.append(1e3 * (time.perf_counter() - start))
    return Times(*torch.tensor(runs).quantile(torch.tensor(_QUANTILES)).tolist())


def measure_peers(
    tensors: Sequence[torch.Tensor], is_causal: bool, rep_ms: float, with_windows: bool
) -> Peers:
    """Times of exact attention by each kernel of the library, and of sliding windows on a GPU.

    Raises:
        RuntimeError: No kernel for exact attention serves these tensors.
    """
    peers = Peers()

    def exact(*leaves: torch.Tensor) -> torch.Tensor:
        return exact_attention(*leaves, is_causal=is_causal)

    for name, backend in EXACT_BACKENDS[tensors[0].device.type].items():
        with warnings.catch_warnings(), sdpa_kernel(backend):
            warnings.simplefilter("ignore")  # PyTorch warns of every reason why a kernel does not serve
            try:
                peers.exact[name] = time_passes(exact, tensors, rep_ms)
            except RuntimeError as error:
                peers.notes.append(f"exact attention by {name}: {one_line(error)}")
    if not peers.exact:
        raise RuntimeError("; ".join(peers.notes))
    length = tensors[0].shape[2]
    for window in WINDOWS if with_windows and is_causal and tensors[0].is_cuda else ():
        if window >= length:
            continue
        try:
            peers.windows[window] = time_passes(window_attention(length, window), tensors, rep_ms)
        except Exception as error:
            peers.notes.append(f"window of {window}: {one_line(error)}")
    return peers


def window_attention(length: int, window: int) -> Attend:
    """Compiled causal attention of every token to the last `window` tokens, itself included."""
    torch.compiler.reset()  # else, after a few shapes, PyTorch gives up compiling for a new one
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = window_mask(length, window, torch.device("cuda"))

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        grouped = query.shape[1] != key.shape[1]
        return compiled(query, key, value, block_mask=mask, enable_gqa=grouped)

    return attend


def window_mask(length: int, window: int, device: torch.device) -> BlockMask:
    """The tiles of the mask of a sliding window, worked out without looking at length x length entries."""
    tiles = torch.arange(-(-length // _WINDOW_TILE), device=device)
    back = tiles[:, None] - tiles  # by how many tiles the keys lie behind the queries
    farthest, nearest = (back + 1) * _WINDOW_TILE - 1, (back - 1) * _WINDOW_TILE + 1
    full = (back > 0) & (farthest < window)
    partial = (back >= 0) & (nearest < window) & ~full

    def listed(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = chosen.int().argsort(dim=-1, descending=True, stable=True)
        return chosen.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]

    def sees(batch, head, query, key):
        return (query >= key) & (query - key < window)

    return BlockMask.from_kv_blocks(
        *listed(partial),
        *listed(full),
        BLOCK_SIZE=_WINDOW_TILE,
        mask_mod=sees,
        seq_lengths=(length, length),
    )


def gradients(attend: Attend, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The output and the gradients of query, key and value, given these and the gradient of the output."""
    *leaves, grad = (tensor.detach() for tensor in tensors)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    output = attend(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def peak_memory(attend: Attend, tensors: Sequence[torch.Tensor]) -> int | None:
    """Most bytes allocated at a time in forward and backward, its inputs included; None on a CPU."""
    if not tensors[0].is_cuda:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(attend, tensors)
    return torch.cuda.max_memory_allocated() - before + sum(map(_bytes, tensors))


def needed_memory(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of query, key, value and output and of their gradients."""
    query, key, value, output_grad = map(_bytes, tensors)
    return 2 * (query + key + value + output_grad)


def relative_square(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected||² / ||expected||²."""
    precise = torch.promote_types(expected.dtype, torch.float32)
    actual, expected = actual.to(precise), expected.to(precise)
    return ((actual - expected).norm() / expected.norm()).square().item()


def one_line(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
