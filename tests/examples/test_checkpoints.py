"""Checkpoints of the pretraining example where the disk is full or the process is killed."""

import resource
import shutil
from pathlib import Path

import pytest
from torch.distributed.checkpoint import CheckpointException

from tests.examples.running import TINY, losses, pretrain, run

import checkpoints  # isort: skip
import records  # isort: skip


def arguments(folder: Path, output: Path) -> list:
    where = ["--text", folder, "--output_dir", output, "--attention", "exact"]
    return [*where, *TINY, "--steps", 14, "--checkpoint_every", 3, "--eval_every", 7]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert run(*arguments(folder, output)) == 0
    return output


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.glob("exact/checkpoint*"))


def test_the_newest_checkpoints_are_kept(whole):
    assert names(whole) == ["checkpoint-12", "checkpoint-9"]


def test_a_full_disk_loses_the_steps_since_the_last_checkpoint_only(
    whole, folder, tmp_path, monkeypatch, capsys
):
    """The disk is full for files of more than 20 kB while the checkpoint of step 9 is written."""
    output = tmp_path / "run"
    save = pretrain.save_checkpoint

    def save_on_a_full_disk(accelerator, path, progress, keep):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if progress.step == 9 else soft, hard))
        try:
            save(accelerator, path, progress, keep)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patched:
        patched.setattr(pretrain, "save_checkpoint", save_on_a_full_disk)
        assert run(*arguments(folder, output)) == 1
    printed = capsys.readouterr().err
    assert "error: the checkpoint of step 9 could not be written (" in printed, printed
    assert f"; go on with --resume --output_dir {output}.\n" in printed, printed
    assert names(output) == ["checkpoint-3", "checkpoint-6"], "the good checkpoints are not as they were"

    assert run("--resume", "--output_dir", output) == 0
    assert "Continuing after step 6" in capsys.readouterr().out
    assert losses(output) == losses(whole), "the resumed run has other losses"


def test_what_stops_a_checkpoint_in_parts_is_said():
    stopped = CheckpointException("write", {1: (OSError(28, "No space left on device"), None)})
    with pytest.raises(OSError, match="No space left") as raised, checkpoints.writing("the checkpoint"):
        raise stopped
    assert str(raised.value).startswith("the checkpoint could not be written (")


def test_a_process_killed_while_it_writes_resumes_from_the_checkpoint_before(whole, folder, tmp_path):
    """What it leaves: half a checkpoint under its first name, half a row, no model."""
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    shutil.rmtree(output / "exact/model")
    (output / "exact/result.json").unlink()
    (output / "exact/checkpoint-12").rename(output / "exact/checkpoint.partial")
    (output / "exact/checkpoint.partial/model.safetensors").write_bytes(b"half")
    with (output / "exact/losses.csv").open("a") as file:
        file.write("15,19")

    assert run("--resume", "--output_dir", output) == 0
    assert losses(output) == losses(whole), "the resumed run has other losses"
    assert names(output) == ["checkpoint-12", "checkpoint-9"]


@pytest.mark.parametrize("written", ["", "step,tok", "step,tokens,loss\n", "step,tokens,loss\n1,128,2."])
def test_a_table_that_holds_no_row_yet_starts_anew(written, tmp_path):
    path = tmp_path / "losses.csv"
    path.write_text(written)
    records.drop_rows_after(path, step=5)
    records.append_rows(path, [{"step": 1, "tokens": 128, "loss": 2.5}])
    assert records.read_rows(path) == [{"step": 1, "tokens": 128, "loss": 2.5}]
