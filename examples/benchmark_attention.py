"""Time MuSe attention against exact attention, forward and backward, and show what the speed costs in error.

Without arguments: on a GPU, in bfloat16, the shapes that the project wants to be fast at; on a CPU, in
float32, the reference at small shapes, which takes about a minute on two cores. Prints a table, writes a CSV
file and a plot.

    python examples/benchmark_attention.py
    python examples/benchmark_attention.py --preset lengths --inputs clustered
    python examples/benchmark_attention.py --heads 32 --kv_heads 8 --seq_len 16384 65536 --num_retrieved 64
    python examples/benchmark_attention.py --inputs activations.safetensors --output runs/layer3.csv

Exact attention is the faster of cuDNN and flash, in every pass, in the same run. A sliding window
(FlexAttention; on a GPU, causal) is a peer that sees nothing further back. On a GPU every pass is timed as a
CUDA graph as well: this leaves out the time that the host takes to launch kernels, for which a short pass by
itself waits and a host that runs ahead of the GPU does not. A shape and setting is measured only after its
gate: on a part of the same inputs the Triton kernels must agree with the reference in float32, and the
reference, with all clusters retrieved, with exact attention. The exit code is 1 if a gate failed, and 0 also
if a case was refused or failed otherwise, which the table says.

The error is that of the output on the inputs of the benchmark, ||MuSe - exact||² / ||exact||². The default
inputs are independent random numbers. These have no clusters, so that no clustering can do well on them: for
an error that means something take --inputs clustered, or better a model's own activations in a file.
"""

import csv
import importlib.metadata
import sys
from typing import Any

import torch
from accelerate.utils import tqdm
from benchmark_arguments import Arguments, parse_arguments
from benchmark_cases import Case, Inputs, Shape
from benchmark_gate import GateError, pass_gate
from benchmark_measure import (
    PASSES,
    PassTimes,
    Peers,
    gradients,
    measure_peers,
    needed_memory,
    one_line,
    peak_memory,
    relative_square,
    time_passes,
)
from benchmark_report import COLUMNS, plot, setting_columns, table_head, table_line, table_note
from command_line import UsageError, exit_code

import muse_hf


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    return exit_code(
        "benchmark_attention.py",
        lambda: 1 if benchmark(parse_arguments(argv, description=__doc__)) else 0,
        interrupted="interrupted; the rows measured so far are kept",
    )


def benchmark(arguments: Arguments) -> int:
    """Measure all cases; returns how many failed their gate."""
    rows, peers, gates_failed = [], {}, 0
    try:
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        file = arguments.csv.open("x", newline="")
    except OSError as error:
        raise UsageError(f"{str(arguments.csv)!r} cannot be written ({error.strerror}).") from error
    with file, tqdm(total=len(arguments.cases), unit="case") as bar:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        writer.writeheader()
        bar.write(table_head())
        for case in arguments.cases:
            bar.set_description(str(case.shape))
            try:
                measured = measure(case, arguments, peers)
            except GateError as error:
                gates_failed += 1
                bar.write(table_note(case, f"gate failed: {error}"))
            except NotImplementedError as error:
                bar.write(table_note(case, f"refused: {one_line(error)}"))
            except Exception as error:  # the other cases are worth measuring
                bar.write(table_note(case, f"failed: {type(error).__name__}: {one_line(error)}"))
            else:
                rows += measured
                writer.writerows(measured)
                file.flush()
                bar.write("\n".join(map(table_line, measured)))
            bar.update()
    for shape, found in peers.items():
        for note in found.notes:
            print(f"{shape}: no {note}")
    print(f"\nrows   {arguments.csv}")
    if rows:
        plot(rows, arguments.png)
        print(f"plot   {arguments.png}")
    return gates_failed


def measure(case: Case, arguments: Arguments, peers: dict[Shape, Peers]) -> list[dict[str, Any]]:
    """The rows of one case, a pass each. `peers` keeps what was measured at a shape for its other settings.

    Raises:
        GateError: The case is computed wrongly.
        NotImplementedError: The backend does not serve it.
    """
    shape, config = case.shape, case.config
    tensors = Inputs(arguments.inputs, arguments.dtype, arguments.device).tensors(shape)
    gate_distance = pass_gate(case, tensors)

    def muse(*leaves: torch.Tensor) -> torch.Tensor:
        return muse_hf.muse_attention(*leaves, is_causal=shape.causal, config=config)

    output, *grads = gradients(muse, tensors)
    if not all(tensor.isfinite().all() for tensor in (output, *grads)):
        raise GateError("the output or a gradient is not finite at the full shape")
    exact = muse_hf.exact_attention(*tensors[:3], is_causal=shape.causal)
    error = relative_square(output, exact)
    del output, grads, exact
    memory = peak_memory(muse, tensors)
    muse_times = time_passes(muse, tensors, arguments.rep_ms)
    if shape not in peers:
        peers[shape] = measure_peers(tensors, shape.causal, arguments.rep_ms, arguments.with_windows)
    common = {
        **setting_columns(case),
        "inputs": arguments.inputs,
        "dtype": str(arguments.dtype).removeprefix("torch."),
        "rel_sq_error": error,
        "gate_distance": gate_distance,
        "peak_bytes": memory,
        "peak_ratio": memory and memory / needed_memory(tensors),
        **environment(arguments.device),
    }
    return [common | times_columns(name, muse_times, peers[shape]) for name in PASSES]


def times_columns(name: str, muse: PassTimes, peers: Peers) -> dict[str, Any]:
    """The times of one pass, in milliseconds."""
    backend, exact = peers.fastest_exact(name)
    return {
        "pass": name,
        "exact_backend": backend,
        "exact_ms": exact.median,
        "exact_p20_ms": exact.p20,
        "exact_p80_ms": exact.p80,
        "muse_ms": muse[name].median,
        "muse_p20_ms": muse[name].p20,
        "muse_p80_ms": muse[name].p80,
        "speedup": exact.median / muse[name].median,
        "exact_graph_ms": peers.fastest_graph(name),
        "muse_graph_ms": muse[name].graph,
        "graph_speedup": muse[name].graph and min(exact.median, peers.fastest_graph(name)) / muse[name].graph,
        **{f"{backend}_ms": times[name].median for backend, times in peers.exact.items()},
        **{f"window_{window}_ms": times[name].median for window, times in peers.windows.items()},
    }


def environment(device: torch.device) -> dict[str, str]:
    """What the times depend on besides the code."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    on_cpu = f"none (CPU, {torch.get_num_threads()} threads)"
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu,
        "torch": torch.__version__,
        "triton": triton,
        "muse_hf": muse_hf.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
