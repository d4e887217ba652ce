"""The arguments of benchmark_attention.py: what they mean, and which are refused."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from benchmark_cases import PRESETS, Case, Shape, file_shape
from command_line import MuseOptions, UsageError, check_numbers, make_parser, next_free, option, parse
from safetensors import SafetensorError

from muse_hf import MuseConfig

DEFAULT_OUTPUT = Path("runs/attention.csv")


@dataclass
class ShapeArguments:
    _argument_group_name = "Shapes: a preset, or one attention by its numbers"

    preset: str | None = option(
        None,
        "table (what the project wants to reach), lengths (1k to 256k tokens), budgets (4 to 48 retrieved "
        "clusters at 64k tokens) or small (for a CPU). Without any option of this group: table on a GPU, "
        "small on a CPU.",
    )
    seq_len: list[int] | None = field(
        default=None, metadata={"help": "Tokens; several numbers make a sweep (16384 if left out)."}
    )
    batch: int | None = option(None, "Sequences (1 if left out).")
    heads: int | None = option(None, "Query heads (8 if left out).")
    kv_heads: int | None = option(None, "Key/value heads, fewer than heads for grouped-query attention.")
    head_dim: int | None = option(None, "Numbers in a query of one head (64 if left out).")
    acausal: bool = option(False, "All tokens attend to all, instead of to themselves and earlier ones.")


@dataclass
class MuseArguments(MuseOptions):
    _argument_group_name = "MuSe attention (left out: each case of a preset as it is, else MuseConfig())"

    backend: Literal["triton", "reference"] | None = option(
        None, "What is timed. Left out: triton on a GPU, reference on a CPU."
    )


@dataclass
class RunArguments:
    _argument_group_name = "Run"

    inputs: str = option(
        "normal",
        "normal: independent random numbers, which have no clusters and are the worst case for the error; "
        "clustered: queries and keys around shared random directions, so that attention is peaked; or a "
        "safetensors file with query, key and value of shape (batch, heads, tokens, head_dim), of which "
        "--seq_len takes the first tokens.",
    )
    dtype: Literal["bfloat16", "float16", "float32"] | None = option(
        None, "Left out: bfloat16 on a GPU, float32 on a CPU."
    )
    device: Literal["cuda", "cpu"] | None = option(None, "Left out: cuda where there is a GPU.")
    rep_ms: float = option(300.0, "Milliseconds for which every pass is repeated. A slow pass runs once.")
    skip_windows: bool = option(
        False, "Leave out sliding windows, which are compiled for each causal shape on a GPU."
    )
    output: str | None = option(
        None,
        "New CSV file; the plot goes beside it as PNG. Existing files are refused. Left out: "
        "runs/attention.csv, or the next free of runs/attention-2.csv, ...",
    )


@dataclass
class Arguments:
    """What is to be run, with everything that was left out filled in."""

    cases: list[Case]
    inputs: str
    dtype: torch.dtype
    device: torch.device
    rep_ms: float
    with_windows: bool
    csv: Path
    png: Path


def parse_arguments(argv: list[str] | None, description: str) -> Arguments:
    """The arguments of the command line."""
    parser = make_parser((ShapeArguments, MuseArguments, RunArguments), "benchmark_attention.py", description)
    shape, muse, run = parse(parser, argv)
    for group in (shape, muse, run):
        check_numbers(
            dataclasses.asdict(group), may_be_zero={"num_retrieved", "retrieval_threshold", "kmeans_iters"}
        )
    on_gpu = torch.cuda.is_available() if run.device is None else run.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no CUDA device.")
    backend = muse.backend or ("triton" if on_gpu else "reference")
    cases = [
        Case(case.shape, muse.apply(case.config).replace(backend=backend))
        for case in _cases(shape, run.inputs, on_gpu)
    ]
    csv = next_free(DEFAULT_OUTPUT) if run.output is None else Path(run.output)
    return Arguments(
        cases=cases,
        inputs=run.inputs,
        dtype=getattr(torch, run.dtype or ("bfloat16" if on_gpu else "float32")),
        device=torch.device("cuda" if on_gpu else "cpu"),
        rep_ms=run.rep_ms,
        with_windows=not run.skip_windows,
        csv=csv,
        png=_picture_beside(csv),
    )


def _cases(arguments: ShapeArguments, inputs: str, on_gpu: bool) -> list[Case]:
    """The shapes with their own settings, before the MuSe options."""
    given = [name for name, value in dataclasses.asdict(arguments).items() if value]
    if inputs not in ("normal", "clustered"):
        if refused := set(given) - {"seq_len", "acausal"}:
            raise UsageError(f"with --inputs {inputs!r} the file has the shape: leave out {_flags(refused)}.")
        shape = _shape_of_file(inputs, causal=not arguments.acausal)
        lengths = arguments.seq_len or [shape.seq_len]
        if max(lengths) > shape.seq_len:
            raise UsageError(f"--seq_len {max(lengths)}: {inputs!r} holds {shape.seq_len} tokens.")
    elif arguments.preset or not given:
        if refused := set(given) - {"preset"}:
            raise UsageError(f"--preset has its own shapes: leave out {_flags(refused)}.")
        preset = arguments.preset or ("table" if on_gpu else "small")
        if preset not in PRESETS:
            raise UsageError(f"there is no preset {preset!r}: the presets are {', '.join(PRESETS)}.")
        return PRESETS[preset]
    else:
        lengths, heads = arguments.seq_len or [16384], arguments.heads or 8
        kv_heads = arguments.kv_heads or heads
        if heads % kv_heads:
            raise UsageError(f"--heads ({heads}) must be a multiple of --kv_heads ({kv_heads}).")
        head_dim = arguments.head_dim or 64
        shape = Shape(arguments.batch or 1, heads, kv_heads, 0, head_dim, causal=not arguments.acausal)
    return [Case(dataclasses.replace(shape, seq_len=length), MuseConfig()) for length in lengths]


def _shape_of_file(inputs: str, causal: bool) -> Shape:
    if not os.path.isfile(inputs):
        raise UsageError(f"--inputs must be normal, clustered or a safetensors file; {inputs!r} is no file.")
    try:
        return file_shape(Path(inputs), causal)
    except (SafetensorError, ValueError) as error:
        raise UsageError(f"{inputs!r} cannot be benchmarked: {error}.") from error


def _flags(names: set[str]) -> str:
    return ", ".join(f"--{name}" for name in sorted(names))


def _picture_beside(csv: Path) -> Path:
    """The path of the plot, if neither file exists."""
    png = csv.with_suffix(".png")
    if csv == png:
        raise UsageError(f"--output {str(csv)!r} is the CSV file; the plot goes beside it as PNG.")
    for path in (csv, png):
        if os.path.lexists(path):
            raise UsageError(f"{str(path)!r} exists already and is not overwritten; choose another --output.")
    return png
