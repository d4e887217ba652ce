"""Trainings side by side: what makes them comparable, the table and the plot."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from command_line import UsageError
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter
from pretrain_arguments import FREE_ON_RESUME, MuseArguments, TextArguments
from report import COLORS

# Arguments in which compared trainings may differ: the attention, and what losses and times do not depend on.
# Equal text shows in its hash.
MAY_DIFFER = FREE_ON_RESUME | {"preset", "compare", "attention", "num_workers", "prompt", "sample_tokens"}
MAY_DIFFER |= {field.name for kind in (MuseArguments, TextArguments) for field in dataclasses.fields(kind)}

Result = Mapping[str, Any]


def compare(results: Mapping[str, Result], plot: str) -> dict[str, Any]:
    """What is published: the table, the plot's name, and the results themselves.

    Args:
        results: What result.json holds of each training, by the name it is to have.
        plot: Name of the plot, in the same folder.

    Raises:
        UsageError: They do not differ in the attention alone.
    """
    check_comparable(results)
    return {"table": table(results), "plot": plot, "results": dict(results)}


def check_comparable(results: Mapping[str, Result]) -> None:
    """Refuse trainings from which nothing follows about attention."""
    (first, reference), *others = ((name, _conditions(result)) for name, result in results.items())
    for name, conditions in others:
        different = [key for key, value in conditions.items() if value != reference.get(key)]
        if different:
            raise UsageError(
                f"{first!r} and {name!r} cannot be compared, because they differ in {', '.join(different)}."
            )


def _conditions(result: Result) -> dict[str, Any]:
    run = result["run"]
    given = {name: value for name, value in run["arguments"].items() if name not in MAY_DIFFER}
    return given | {name: run[name] for name in ("processes", "mixed_precision", "text", "held_out_sha256")}


def baseline_of(results: Mapping[str, Result]) -> Result | None:
    """The training with exact attention, if there is one."""
    return next((result for result in results.values() if result["muse"] is None), None)


def table(results: Mapping[str, Result]) -> list[dict[str, Any]]:
    """One row a training: losses and time, and both relative to exact attention.

    A relative loss has the standard error of the mean over the held-out windows, on all of which both models
    were measured. It says nothing of other seeds.
    """
    baseline, rows = baseline_of(results), []
    for name, result in results.items():
        row = {
            "name": name,
            "tokens": result["tokens"],
            "held_out_loss": result["held_out_loss"],
            "seconds_per_step": result["seconds_per_step"],
            "tokens_per_second": result["tokens_per_second"],
        }
        if "exact_attention_losses" in result:
            row["loss_under_exact_attention"] = statistics.fmean(result["exact_attention_losses"])
        if baseline is not None and result is not baseline:
            exact = baseline["held_out_losses"]
            row["loss_change"], row["standard_error"] = relative(result["held_out_losses"], exact)
            if "exact_attention_losses" in result:
                change, error = relative(result["exact_attention_losses"], exact)
                row["loss_change_under_exact_attention"] = change
                row["standard_error_under_exact_attention"] = error
            row["time_change"] = result["seconds_per_step"] / baseline["seconds_per_step"] - 1
        rows.append(row)
    return rows


def relative(losses: Sequence[float], exact: Sequence[float]) -> tuple[float, float | None]:
    """Mean loss relative to another one on the same windows, and the standard error of that."""
    differences = [loss - other for loss, other in zip(losses, exact, strict=True)]
    scale = statistics.fmean(exact)
    error = statistics.stdev(differences) / math.sqrt(len(losses)) / scale if len(losses) > 1 else None
    return statistics.fmean(differences) / scale, error


COLUMNS = {
    "attention": lambda row: row["name"],
    "tokens": lambda row: f"{row['tokens']:,}",
    "held-out loss": lambda row: f"{row['held_out_loss']:.4f}",
    "against exact": lambda row: _change(row, "loss_change", "standard_error"),
    "evaluated exactly": lambda row: _change(
        row, "loss_change_under_exact_attention", "standard_error_under_exact_attention"
    ),
    "s/step": lambda row: f"{row['seconds_per_step']:.4f}",
    "time": lambda row: f"{row['time_change']:+.1%}" if "time_change" in row else "",
    "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
}


def _change(row: Mapping[str, Any], name: str, error_name: str) -> str:
    if name not in row:
        return ""
    error = row[error_name]
    return f"{row[name]:+.2%}" + (f" ± {100 * error:.2f}" if error is not None else "")


def table_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown, aligned; columns that are empty are left out."""
    cells = [[title, *(text(row) for row in rows)] for title, text in COLUMNS.items()]
    cells = [column for column in cells if any(column[1:])]
    widths = [max(map(len, column)) for column in cells]
    rule = ["-" * width if index == 0 else "-" * (width - 1) + ":" for index, width in enumerate(widths)]
    lines = [list(line) for line in zip(*cells)]
    lines.insert(1, rule)
    return "\n".join(
        "| " + " | ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths))
        ) + " |"
        for line in lines
    )  # fmt: skip


def comparison_text(comparison: Mapping[str, Any], folder: Path) -> str:
    """What is printed of trainings side by side, whose plot is in a folder."""
    results, rows = comparison["results"], comparison["table"]
    run = next(iter(results.values()))["run"]
    held_out = run["held_out_windows"] * run["arguments"]["context_length"]
    lines = [table_text(rows), f"(loss in nats per token, on {held_out:,} tokens of held-out documents)"]
    slower = [row["name"] for row in rows if row.get("time_change", 0) > 0]
    if slower:
        lines.append(
            f"(at {run['arguments']['context_length']:,} tokens exact attention is faster than "
            f"{', '.join(slower)}; MuSe pays at long contexts)"
        )
    if len({str(machine) for result in results.values() for machine in _machines(result)}) > 1:
        lines.append("(not all on the same hardware and versions: the times cannot be compared)")
    return "\n".join([*lines, "", f"loss curves: {folder / comparison['plot']}"])


def _machines(result: Result) -> list[dict[str, Any]]:
    """Hardware and versions of all steps of a training."""
    last = {name: result["run"][name] for name in ("hardware", "versions")}
    return [*result.get("earlier_machines", []), last]


def plot_losses(results: Mapping[str, Result], path: Path) -> None:
    """Training and held-out loss over tokens; below, the latter relative to exact attention."""
    baseline = baseline_of(results)
    relative_to = baseline if len(results) > 1 else None
    figure, axes = plt.subplots(
        2 if relative_to else 1, figsize=(8, 6.5 if relative_to else 4.5), layout="constrained",
        sharex=True, squeeze=False, gridspec_kw={"height_ratios": (2, 1)} if relative_to else None,
    )  # fmt: skip
    above, below = axes[0, 0], axes[-1, 0]
    others = iter([COLORS["muse"], "#3f8f5b", "#8a5ea8", "#b8912f", "#5f6b76", "#c2578f"] * len(results))
    for name, result in results.items():
        is_exact = result is baseline
        color = COLORS["exact"] if is_exact else next(others)
        above.plot(*zip(*result["training_curve"]), color=color, linewidth=0.8, alpha=0.45)
        # Curves lie close together: the exact one over the others, which show through.
        above.plot(
            *zip(*result["held_out_curve"]), color=color, marker="o", markersize=4, label=name,
            linestyle="--" if is_exact else "-", zorder=3 if is_exact else 2,
        )  # fmt: skip
        if relative_to and result is not baseline:
            exact = dict(map(tuple, baseline["held_out_curve"]))
            points = [
                (at, 100 * (loss / exact[at] - 1)) for at, loss in result["held_out_curve"] if at in exact
            ]
            below.plot(*zip(*points), color=color, marker="o", markersize=4)
    above.set_ylabel("loss (nats per token)")
    later = [loss for result in results.values() for at, loss in _later(result["training_curve"])]
    above.set_ylim(top=max([*later, *(loss for r in results.values() for _, loss in r["held_out_curve"])]))
    above.set_title("thin: training; markers: held out", fontsize=9, loc="left")
    above.legend(frameon=False)
    if relative_to:
        below.axhline(0, color=COLORS["exact"], linewidth=1)
        below.set_ylabel("held-out loss\nagainst exact (%)")
    below.set_xlabel("training tokens seen")
    below.xaxis.set_major_formatter(EngFormatter(sep=""))
    for panel in axes[:, 0]:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _later(curve: Sequence[Sequence[float]]) -> Sequence[Sequence[float]]:
    """All but the first tenth of a curve, which falls so far that the rest would look flat."""
    return curve[len(curve) // 10 :]
