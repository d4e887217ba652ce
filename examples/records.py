"""What a training writes down while it runs: losses per step as CSV and in TensorBoard, a progress bar."""

import csv
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm


class DivergedError(Exception):
    """The loss is no longer a number; the message says what to try."""


class PausedError(Exception):
    """The time of the run is up, which is as it should be; the message says where it stands."""


@dataclass
class Progress:
    """Where a training stands.

    Attributes:
        step: Optimizer steps done.
        epoch: Complete passes over the training windows.
        batch: Batches that each process has consumed of the current pass.
        seconds: Time spent in training steps, without evaluation and checkpoints.
        machines: Hardware and versions that the steps were done with, one entry for each change.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    machines: list[dict[str, Any]] = field(default_factory=list)


class Recorder:
    """Keeps the losses on the device until they are due, then writes them wherever they are shown.

    Attributes:
        monitored: What the progress line says of the latest measurement of MuSe's error.
    """

    def __init__(
        self, accelerator: Accelerator, folder: Path, progress: Progress, steps: int, tokens_per_step: int
    ):
        self.accelerator, self.progress, self.tokens_per_step = accelerator, progress, tokens_per_step
        self.losses_path, self.held_out_path = folder / "losses.csv", folder / "held_out.csv"
        self.monitor_path = folder / "monitor.csv"
        self.monitored = ""
        if accelerator.is_main_process:
            folder.mkdir(exist_ok=True)
            for path in (self.losses_path, self.held_out_path, self.monitor_path):
                drop_rows_after(path, progress.step)
        accelerator.init_trackers(folder.name, init_kwargs={"tensorboard": {"purge_step": progress.step + 1}})
        self.bar = tqdm(total=steps, initial=progress.step, desc=f"{folder.name} attention", unit="step")
        self.pending: list[tuple[torch.Tensor, torch.Tensor, float]] = []
        self.restart_clock()

    def add(self, loss: torch.Tensor, norm: torch.Tensor, learning_rate: float) -> None:
        """Note one step, without waiting for the device."""
        self.pending.append((loss, norm, learning_rate))

    def restart_clock(self) -> None:
        """Leave what has just happened out of the training time."""
        self.clock = time.perf_counter()

    def write(self) -> None:
        """Write the steps noted since the last call.

        Raises:
            DivergedError: A loss is not finite, or a gradient that has changed the weights.
        """
        losses, norms, rates = zip(*self.pending)
        losses = self.accelerator.reduce(torch.stack(losses), "mean").tolist()
        norms = torch.stack(norms).tolist()
        elapsed = time.perf_counter() - self.clock
        self.progress.seconds += elapsed
        speed = len(losses) * self.tokens_per_step / elapsed
        first = self.progress.step - len(losses) + 1
        rows = [
            {
                "step": step,
                "tokens": step * self.tokens_per_step,
                "loss": loss,
                "learning_rate": rate,
                "gradient_norm": norm,
                "tokens_per_second": round(speed, 1),
            }
            for step, loss, norm, rate in zip(range(first, first + len(losses)), losses, norms, rates)
        ]
        if self.accelerator.is_main_process:
            append_rows(self.losses_path, rows)
        for row in rows:
            self.accelerator.log({f"train/{name}": row[name] for name in list(row)[2:]}, step=row["step"])
            self._check(row)
        self.bar.update(len(losses))
        self.bar.set_postfix_str(f"loss {losses[-1]:.3f}, {speed:,.0f} tokens/s{self.monitored}")
        self.pending.clear()
        self.restart_clock()

    def _check(self, row: Mapping[str, float]) -> None:
        # With a gradient scaler (fp16) some gradients overflow, and their steps are skipped.
        names = ["loss"] if self.accelerator.scaler else ["loss", "gradient_norm"]
        for name in names:
            if not math.isfinite(row[name]):
                what = name.replace("_", " ")
                raise DivergedError(
                    f"the {what} of step {row['step']} is {row[name]}, and would be again if the run were "
                    "resumed. Start a new one and try a lower --learning_rate, more "
                    "--warmup_steps, a smaller --max_grad_norm, or another --mixed_precision than fp16."
                )

    def write_held_out(self, loss: float) -> None:
        """Write a held-out loss."""
        row = {"step": self.progress.step, "tokens": self.progress.step * self.tokens_per_step, "loss": loss}
        if self.accelerator.is_main_process:
            append_rows(self.held_out_path, [row])
        self.accelerator.log({"held_out/loss": loss}, step=self.progress.step)

    def write_measurement(self, measurement: Any) -> None:
        """Write what a `muse_hf.TrainingMonitor` has found."""
        self.monitored = f", {measurement}"
        logs = measurement.to_logs()
        if self.accelerator.is_main_process:
            append_rows(self.monitor_path, [{"step": self.progress.step, **logs}])
        self.accelerator.log(logs, step=self.progress.step)

    def close(self) -> None:
        """Close the progress bar and TensorBoard's file."""
        self.bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers.clear()  # else the next training would be logged under this one too


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a CSV file, with a header if the file is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a CSV file of numbers; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def drop_rows_after(path: Path, step: int) -> None:
    """Remove the rows of later steps, which a resumed training is going to write again."""
    if not path.exists():
        return
    # A killed process or a full disk can leave a last line without its end, even the header.
    header, *lines = path.read_text().splitlines(keepends=True) or [""]
    kept = [line for line in lines if line.endswith("\n") and int(line.split(",")[0]) <= step]
    if not kept:
        path.unlink()
        return
    partial = path.with_suffix(".partial")
    partial.write_text("".join([header, *kept]))
    partial.replace(path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file that is either complete or absent."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """The contents of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
