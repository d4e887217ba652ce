"""The columns, the printed table and the plot of a benchmark."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from benchmark_cases import Case, Shape
from benchmark_measure import WINDOWS
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from muse_hf.config import DEFAULT_CLUSTER_SIZE

Row = Mapping[str, Any]

_SHAPE = ["batch", "heads", "kv_heads", "seq_len", "head_dim", "causal"]
_SETTING = [
    "summaries", "hierarchy", "multipole", "query_centroids", "num_clusters", "cluster_size", "num_retrieved",
    "retrieval_threshold",
    "local_block", "kmeans_iters", "cluster_cap", "backend",
]  # fmt: skip
COLUMNS = [
    *_SHAPE, *_SETTING, "inputs", "dtype", "pass", "exact_ms", "muse_ms", "speedup", "rel_sq_error",
    "exact_graph_ms", "muse_graph_ms", "graph_speedup",
    "exact_backend", "exact_p20_ms", "exact_p80_ms", "muse_p20_ms", "muse_p80_ms", "cudnn_ms", "flash_ms",
    *(f"window_{window}_ms" for window in WINDOWS), "peak_bytes", "peak_ratio", "gate_distance",
    "gpu", "torch", "triton", "muse_hf",
]  # fmt: skip

_WIDTHS = {
    "shape": -28, "setting": -40, "pass": -9, "exact ms": 15, "MuSe ms": 9, "p20 - p80": 17, "speed-up": 9,
    "as graphs": 10,
    **{f"window {window}": 12 for window in WINDOWS}, "rel.sq.error": 13, "peak memory": 12,
}  # fmt: skip


def setting_columns(case: Case) -> dict[str, Any]:
    """The columns that say what a case is."""
    config = {name: getattr(case.config, name) for name in _SETTING}
    if case.config.num_clusters is None:
        config["cluster_size"] = case.config.cluster_size or DEFAULT_CLUSTER_SIZE
    return {name: getattr(case.shape, name) for name in _SHAPE} | config


def setting_text(row: Row) -> str:
    """A setting in short: C clusters a block or n keys a cluster, r retrieved, local blocks of b tokens."""
    clusters = f"C={row['num_clusters']}" if row["num_clusters"] else f"n={row['cluster_size']}"
    dipole = " dipole" if row["multipole"] == "dipole" else ""
    hierarchy = f" {row['hierarchy']}" if row["causal"] else ""
    retrieved = f"r={row['num_retrieved']}"
    if row["num_retrieved"] and row["retrieval_threshold"]:
        retrieved += f" t={row['retrieval_threshold']}"
    return f"{row['summaries']}{dipole}{hierarchy} {clusters} {retrieved} b={row['local_block']}"


def table_head() -> str:
    """The names of the printed columns."""
    return _line(_WIDTHS)


def table_line(row: Row) -> str:
    """One pass of one case."""
    windows = [row.get(f"window_{window}_ms") for window in WINDOWS]
    return _line(
        [
            str(_shape_of(row)),
            setting_text(row),
            row["pass"],
            f"{row['exact_ms']:.3f} {row['exact_backend']}",
            f"{row['muse_ms']:.3f}",
            f"{row['muse_p20_ms']:.3f} - {row['muse_p80_ms']:.3f}",
            f"{row['speedup']:.2f}x",
            "-" if row["graph_speedup"] is None else f"{row['graph_speedup']:.2f}x",
            *("-" if time is None else f"{time:.3f} ms" for time in windows),
            f"{row['rel_sq_error']:.2%}",
            "-" if row["peak_ratio"] is None else f"{row['peak_ratio']:.1f}x",
        ]
    )


def table_note(case: Case, text: str) -> str:
    """What stands in the table instead of the passes of a case."""
    return _line([str(case.shape), setting_text(setting_columns(case)), text])


def _line(cells: Sequence[str]) -> str:
    widths = list(_WIDTHS.values())
    return " ".join(
        f"{cell:{'<' if width < 0 else '>'}{abs(width)}}" for cell, width in zip(cells, widths)
    ).rstrip()


def _shape_of(row: Row) -> Shape:
    return Shape(**{name: row[name] for name in _SHAPE})


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw forward and backward together: time and speed-up against length, error against time."""
    rows = [row for row in rows if row["pass"] == "both"]
    figure, axes = plt.subplots(1, 3, figsize=(15, 6), layout="constrained")
    times, speedups, errors = axes
    for of_shape in _groups(rows, lambda row: _shape_of(row).text("N")).values():
        _draw_peers(times, of_shape)
    for index, (label, series) in enumerate(_groups(rows, _series_text).items()):
        style = {"color": f"C{index % 10}", "marker": "osD^v"[index // 10 % 5], "markersize": 5}
        _draw_series(axes, series, label, style)
    times.set(title="Time of forward + backward", ylabel="median, 20th to 80th percentile (ms)", yscale="log")
    speedups.axhline(1, color="black", linestyle="--", linewidth=1)
    speedups.set(title="Speed-up of forward + backward", ylabel="time of exact attention / time of MuSe")
    errors.set(
        title=f"Error of the output (inputs: {Path(rows[0]['inputs']).name})", xscale="log", yscale="log"
    )
    errors.set(xlabel="time of forward + backward (ms)", ylabel="relative squared error (%)")
    for axis in (times.yaxis, errors.xaxis, errors.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    lengths = sorted({row["seq_len"] for row in rows})
    for panel in (times, speedups):
        panel.set(xscale="log", xlabel="sequence length N (tokens)")
        panel.set_xticks(lengths, map(_tokens, lengths))
        panel.minorticks_off()
    for panel in axes:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    where = "on a " + rows[0]["gpu"] if "CPU" not in rows[0]["gpu"] else "on a CPU"
    figure.suptitle(f"Attention in {rows[0]['dtype']} {where}; torch {rows[0]['torch']}")
    handles, labels = times.get_legend_handles_labels()
    entries = dict(zip(labels, handles))  # one for all lines of a kind
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_peers(panel: Axes, rows: Sequence[Row]) -> None:
    """Exact and windowed attention of one shape, whatever MuSe's setting."""
    rows = list({row["seq_len"]: row for row in rows}.values())
    lines = [("exact_ms", "exact attention (the faster of cuDNN and flash)", "black", "--")]
    lines += [
        (f"window_{window}_ms", f"sliding window of {window} tokens (FlexAttention)", "grey", style)
        for window, style in zip(WINDOWS, (":", "-."))
    ]
    for column, label, color, style in lines:
        points = [(row["seq_len"], row[column]) for row in rows if row.get(column) is not None]
        if points:
            panel.plot(*zip(*sorted(points)), color=color, linestyle=style, marker="x", label=label)


def _draw_series(axes: Sequence[Axes], rows: Sequence[Row], label: str, style: Mapping[str, Any]) -> None:
    """One setting of MuSe at the lengths of one shape."""
    times, speedups, errors = axes
    rows = sorted(rows, key=lambda row: row["seq_len"])
    lengths, medians = [row["seq_len"] for row in rows], [row["muse_ms"] for row in rows]
    below = [row["muse_ms"] - row["muse_p20_ms"] for row in rows]
    above = [row["muse_p80_ms"] - row["muse_ms"] for row in rows]
    times.errorbar(lengths, medians, (below, above), label=label, capsize=2, **style)
    speedups.plot(lengths, [row["speedup"] for row in rows], **style)
    for row in rows:
        if row["seq_len"] > row["local_block"]:  # else MuSe is exact attention
            at = row["muse_ms"], 100 * row["rel_sq_error"]
            errors.plot(*at, **style)
            errors.annotate(_tokens(row["seq_len"]), at, (4, 4), textcoords="offset points", fontsize="small")


def _series_text(row: Row) -> str:
    return f"MuSe, {_shape_of(row).text('N')}, {setting_text(row)}"


def _groups(rows: Sequence[Row], label: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(label(row), []).append(row)
    return groups


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 else str(count)
