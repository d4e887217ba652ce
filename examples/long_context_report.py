"""The tables and pictures of evaluate_long_context.py."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from report import COLORS, NAMES

Rows = Sequence[dict[str, Any]]
RETRIEVAL = ("passkey", "needle")


def averages(rows: Rows, value: str, *names: str) -> dict[tuple, float]:
    """The mean of a column for each combination of others, in the order in which they come."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row[value])
    return {group: fmean(values) for group, values in groups.items()}


def table_of_losses(rows: Rows) -> str:
    """Loss by position, exact and MuSe side by side."""
    lines = [f"{'loss by position':>20}{'exact':>10}{'MuSe':>10}{'difference':>12}"]
    for row in rows:
        place = f"{row['start']} to {row['end']}"
        relative = row["muse"] / row["exact"] - 1
        lines.append(f"{place:>20}{row['exact']:10.4f}{row['muse']:10.4f}{relative:+12.2%}")
    return "\n".join(lines)


def table_of_tasks(rows: Rows) -> str:
    """Share of right answer tokens by task and length, over all depths."""
    accuracy = averages(rows, "accuracy", "task", "length", "attention")
    lines = [f"{'right answers':>14}{'length':>10}{'exact':>10}{'MuSe':>10}"]
    for task, length in dict.fromkeys(key[:2] for key in sorted(accuracy)):
        exact, muse = (accuracy[task, length, attention] for attention in NAMES)
        lines.append(f"{task:>14}{length:10}{exact:10.0%}{muse:10.0%}")
    return "\n".join(lines)


def table_of_prefills(rows: Rows) -> str:
    """Time and memory by length."""
    names = f"{'exact':>12}{'MuSe':>12}"
    lines = [f"{'prefill':>10}{names * (2 if rows[0]['gib'] else 1)}"]
    for length in dict.fromkeys(row["length"] for row in rows):
        pair = [row for row in rows if row["length"] == length]
        times = "".join(f"{row['seconds']:10.3f} s" for row in pair)
        memory = "".join(f"{row['gib']:8.2f} GiB" for row in pair if row["gib"])
        lines.append(f"{length:10}{times}{memory}")
    return "\n".join(lines)


def plot_losses(rows: Rows, path: Path) -> None:
    """Loss by position of both attentions, and below it their difference."""
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8, 5), layout="constrained", sharex=True, height_ratios=(2, 1)
    )
    places = [(row["start"] + row["end"]) / 2 for row in rows]
    for attention, name in NAMES.items():
        losses = [row[attention] for row in rows]
        above.plot(places, losses, color=COLORS[attention], marker="o", markersize=4, label=name)
    below.axhline(0, color="black", linewidth=0.8)
    difference = [100 * (row["muse"] / row["exact"] - 1) for row in rows]
    below.plot(places, difference, color=COLORS["muse"], marker="o", markersize=4)
    above.set(ylabel="loss (nats per token)", title="Does context still help?")
    below.set(xlabel="position in the context (tokens)", ylabel="MuSe − exact (%)")
    above.legend(frameon=False)
    _finish(figure, (above, below), path)


def plot_retrieval(rows: Rows, path: Path) -> None:
    """Share of right answer tokens, depth x length, of each task with each attention."""
    accuracy = averages(rows, "accuracy", "task", "attention", "depth", "length")
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    depths = sorted({row["depth"] for row in rows if row["task"] in RETRIEVAL})
    figure, grid = plt.subplots(2, 2, figsize=(8, 6), layout="constrained", sharex=True, sharey=True)
    for line, task in zip(grid, RETRIEVAL):
        for axes, (attention, name) in zip(line, NAMES.items()):
            values = np.array([[accuracy[task, attention, d, n] for n in lengths] for d in depths])
            image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for (row, column), value in np.ndenumerate(values):
                color = "black" if value > 0.6 else "white"
                axes.text(column, row, f"{value:.0%}", color=color, ha="center", va="center", fontsize=8)
            axes.set_title(f"{task}, {name}")
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        line[0].set_ylabel("depth of the answer")
    for axes in grid[-1]:
        axes.set_xlabel("length (tokens)")
    figure.colorbar(image, ax=grid, label="share of answer tokens that are right", pad=0.02)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_lengths(tasks: Rows, prefills: Rows, path: Path) -> None:
    """Copying, prefill time and, on a GPU, peak memory, by length."""
    accuracy = averages([row for row in tasks if row["task"] == "copying"], "accuracy", "attention", "length")
    copying = [
        {"attention": attention, "length": length, "percent": 100 * value}
        for (attention, length), value in accuracy.items()
    ]
    panels = [(copying, "percent", "copied tokens that are right (%)"), (prefills, "seconds", "prefill (s)")]
    if all(row["gib"] for row in prefills):
        panels.append((prefills, "gib", "peak GPU memory of the prefill (GiB)"))
    figure, line = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.4), layout="constrained")
    for axes, (rows, value, label) in zip(line, panels):
        for attention, name in NAMES.items():
            points = [(row["length"], row[value]) for row in rows if row["attention"] == attention]
            axes.plot(*zip(*points), color=COLORS[attention], marker="o", markersize=4, label=name)
        axes.set(xlabel="length (tokens)", ylabel=label, xscale="log")
        axes.set_xticks(lengths := [length for length, _ in points], [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
    line[0].legend(frameon=False)
    _finish(figure, line, path)


def _finish(figure: plt.Figure, panels: Sequence[Axes], path: Path) -> None:
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
