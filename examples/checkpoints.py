"""Checkpoints, from which a killed training goes on: under their name complete, and only the newest kept."""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from records import Progress, read_json, write_json
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException


def save_checkpoint(accelerator: Accelerator, folder: Path, progress: Progress, keep: int) -> None:
    """Write checkpoint-<step>, which under that name is always complete, and keep only the newest `keep`.

    Raises:
        OSError: It could not be written. The earlier checkpoints are as they were.
    """
    partial = folder / "checkpoint.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)  # a killed process leaves one behind
    accelerator.wait_for_everyone()
    try:
        with writing(f"the checkpoint of step {progress.step}"):
            accelerator.save_state(str(partial))
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # where the disk is full, it is of no use
        raise
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(partial / "progress.json", dataclasses.asdict(progress))
        partial.rename(folder / f"checkpoint-{progress.step}")
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def resume_or_start(accelerator: Accelerator, folder: Path) -> Progress:
    """Load the newest checkpoint of a folder, if there is one."""
    found = checkpoints(folder)
    if not found:
        return Progress()
    accelerator.load_state(str(found[-1]))
    progress = Progress(**read_json(found[-1] / "progress.json"))
    accelerator.print(f"Continuing after step {progress.step} from {found[-1]}.")
    return progress


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Make an OSError that says what was written of all that a full disk has the libraries raise."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        # FSDP2 saves by parts: what happened to the processes is inside.
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        reason = str(cause).strip().split("\n")[0]
        raise OSError(f"{what} could not be written ({reason})") from error
