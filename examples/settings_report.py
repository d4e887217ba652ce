"""The table and the picture of compare_settings.py."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import Bbox
from report import COLORS

Row = Mapping[str, Any]

_WIDTHS = {"length": 8, "exact ms": 10, "MuSe ms": 10, "speed-up": 9, "loss increase": 20}

# What settings are drawn as: label, colour, marker. One changed option makes a line through the default.
OPTIONS = {
    "local_block": ("local block (b, tokens)", "#3b6ea5", "o"),
    "cluster_size": ("keys in a cluster (n)", "#3f8f5b", "o"),
    "num_retrieved": ("clusters retrieved, at most (r)", "#b8912f", "o"),
    "retrieval_threshold": ("retrieval threshold (t)", "#8a5ea8", "o"),
    "kmeans_iters": ("k-means iterations (i)", "#5f6b76", "o"),
    "cluster_cap": ("cap on clusters (c)", "#c2578f", "o"),
    "hierarchy": ("hierarchy", "#2a9d9d", "o"),
}
OTHERS = {
    "paper": ("the paper's setting and variants", COLORS["muse"], "s"),
    "several": ("several options changed", "#7a5c45", "D"),
    "default": ("default setting", "black", "*"),
}
GROUPS = OPTIONS | OTHERS
_LETTERS = {
    "local_block": "b", "cluster_size": "n", "num_clusters": "C", "num_retrieved": "r",
    "retrieval_threshold": "t", "kmeans_iters": "i", "cluster_cap": "c",
}  # fmt: skip
_LINEAR = 0.1  # percent: smaller increases are hardly more than noise, and the axis is linear there
# Where a label may stand, in points from its own, the best first.
_OFFSETS = [
    (right * far, up * far * 0.8)
    for far in (7, 14, 24, 36, 50)
    for right, up in ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1.3), (0, -1.3), (1.5, 0), (-1.5, 0))
]


def table_head(width: int) -> str:
    """The names of the printed columns; that of the setting is so many characters wide."""
    return _line("setting", list(_WIDTHS), width)


def table_line(row: Row, width: int) -> str:
    """One setting at one length."""
    increase = row["loss_increase"]
    cells = [
        str(row["length"]),
        f"{row['exact_ms']:.2f}",
        "" if row["muse_ms"] is None else f"{row['muse_ms']:.2f}",
        "" if row["speedup"] is None else f"{row['speedup']:.2f}x",
        "" if increase is None else f"{increase:+.3%} ± {row['loss_error']:.3%}",
    ]
    return f"{_line(row['setting'], cells, width)}  {row['reason']}".rstrip()


def _line(setting: str, cells: Sequence[str], width: int) -> str:
    return f"{setting:{width}}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, _WIDTHS.values()))


def plot(rows: Sequence[Row], path: Path) -> bool:
    """Draw loss increase against speed-up, one panel a length; whether there was anything to draw."""
    rows = [row for row in rows if row["speedup"] is not None and row["loss_increase"] is not None]
    lengths = sorted({row["length"] for row in rows})
    if not rows:
        return False
    figure, grid = plt.subplots(
        len(lengths),
        1,
        figsize=(9, 1.2 + 3.7 * len(lengths)),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axes, length in zip(grid[:, 0], lengths):
        _draw_length(axes, [row for row in rows if row["length"] == length])
        axes.set_title(f"{length:,} tokens", fontsize=10, loc="left")
    grid[-1, 0].set_xlabel(
        "speed-up of attention, forward + backward (time of exact attention / time of MuSe)"
    )
    where = "a CPU" if rows[0]["gpu"] == "cpu" else rows[0]["gpu"]
    figure.suptitle(f"MuSe in all layers, {rows[0]['dtype']} on {where}", fontsize=11)
    entries = {}
    for axes in grid[:, 0]:
        entries |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9
    )
    figure.draw_without_rendering()  # after which places on the page are known
    for axes, length in zip(grid[:, 0], lengths):
        _label_points(axes, [row for row in rows if row["length"] == length])
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def _draw_length(axes: Axes, rows: Sequence[Row]) -> None:
    """The settings at one length."""
    groups: dict[str, list[Row]] = {name: [] for name in GROUPS}
    for row in rows:
        groups[_group(row)].append(row)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
    for name, found in groups.items():
        if found and name in OPTIONS:
            found = sorted(found + groups["default"], key=lambda row: row[name])
        if found:
            label, color, marker = GROUPS[name]
            axes.errorbar(
                [row["speedup"] for row in found],
                [100 * row["loss_increase"] for row in found],
                [100 * row["loss_error"] for row in found],
                label=label, color=color, ecolor=(color, 0.4), marker=marker, linewidth=1,
                linestyle="-" if name in OPTIONS else "", markersize=14 if name == "default" else 5,
            )  # fmt: skip
    axes.set_yscale("symlog", linthresh=_LINEAR)
    axes.yaxis.set_major_locator(
        FixedLocator([-_LINEAR, 0, *(m * 10.0**e for e in range(-1, 4) for m in (1, 3))])
    )
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("increase of the loss (%)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08, y=0.08)


def _changes(row: Row) -> dict[str, str]:
    return dict(change.split("=", 1) for change in row["setting"].split(":")[1:])


def _group(row: Row) -> str:
    """What a setting is drawn as."""
    changes = _changes(row)
    if not changes or changes.get("setting") == "paper":
        return "paper" if changes else "default"
    name, *more = changes
    return name if name in OPTIONS and not more else "several"


def _label(row: Row) -> str:
    """The options that a setting changes, in short."""
    changes = _changes(row)
    named = [f"{_LETTERS[name]}={value}" if name in _LETTERS else value for name, value in changes.items()]
    return " ".join(named) or "default"


def _label_points(axes: Axes, rows: Sequence[Row]) -> None:
    """Write beside each point what it is, inside the panel and where least stands yet."""
    renderer, panel = axes.figure.canvas.get_renderer(), axes.get_window_extent()
    points = axes.transData.transform([(row["speedup"], 100 * row["loss_increase"]) for row in rows])
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in points]
    for row in rows:
        color = GROUPS[_group(row)][1]
        text = axes.annotate(
            _label(row),
            (row["speedup"], 100 * row["loss_increase"]),
            _OFFSETS[0],
            textcoords="offset points",
            fontsize=7.5,
            color=color,
            path_effects=[withStroke(linewidth=2, foreground="white")],
            zorder=6,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0},
        )

        def place(offset: tuple[float, float], text: Annotation = text) -> Bbox:
            text.xyann = offset
            text.set_horizontalalignment(("center", "left", "right")[int(np.sign(offset[0]))])
            text.update_positions(renderer)
            return Text.get_window_extent(text, renderer)  # without the line to its point

        def hindrance(offset: tuple[float, float], place: Callable = place) -> int:
            box = place(offset)
            inside = all(panel.contains(*corner) for corner in (box.min, box.max))
            return box.count_overlaps(taken) + (0 if inside else 100)

        taken.append(place(min(_OFFSETS, key=hindrance)))
