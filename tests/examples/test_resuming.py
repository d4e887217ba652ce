"""Pretraining that was broken off goes on as if nothing had happened, with the arguments it had."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests.examples.running import EXAMPLES, TINY, TINY_MUSE, interruptible, losses, pretrain, rows, run


def test_resuming_after_kill_9_gives_the_same_losses(folder, uninterrupted, tmp_path):
    output = tmp_path / "killed"
    command = [sys.executable, str(EXAMPLES / "pretrain.py"), *interruptible(folder, output)]
    process = subprocess.Popen(
        command,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while process.poll() is None and not list(output.glob("exact/checkpoint-?*")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    printed = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, f"the run ended before it was killed:\n{printed}"
    assert not (output / "exact/result.json").exists(), "the run was complete before it was killed"

    assert run("--resume", "--output_dir", output) == 0
    assert losses(output) == losses(uninterrupted), "the resumed run has other losses"
    held_out = "exact/held_out.csv"
    assert rows(output / held_out) == rows(uninterrupted / held_out), (
        "the resumed run has other held-out losses"
    )
    weights = "exact/model/model.safetensors"
    assert (output / weights).read_bytes() == (uninterrupted / weights).read_bytes(), "the weights differ"


def test_streaming_resumes_with_the_same_losses(folder, tmp_path, monkeypatch, capsys):
    def arguments(output):
        where = ["--text", folder, "--output_dir", output, "--attention", "exact", *TINY]
        return [*where, *shlex.split("--streaming --shuffle_buffer 8 --steps 24 --checkpoint_every 5")]

    assert run(*arguments(tmp_path / "whole")) == 0

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(
            pretrain, "held_out_losses", interrupt
        )  # the last step is where the loss is first held out
        assert run(*arguments(tmp_path / "broken")) == 130
    assert f"go on with --resume --output_dir {tmp_path / 'broken'}." in capsys.readouterr().err
    assert run("--resume", "--output_dir", tmp_path / "broken") == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole"), "the resumed stream has other losses"


def test_a_resumed_run_keeps_its_arguments(uninterrupted, capsys):
    assert run("--resume", "--output_dir", uninterrupted, "--learning_rate", "0.5", "--steps", "7") == 2
    message = capsys.readouterr().err
    assert "learning_rate, steps would differ" in message, message
    assert f"starts anew, for instance with --checkpoint '{uninterrupted / 'exact/model'}'" in message, (
        message
    )
    assert run("--resume", "--output_dir", uninterrupted, "--learning_rate", "0.5") == 2
    assert "anew" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ['{"arguments": {"st', "[]", '{"model_type": "llama"}', '{"arguments": 1}']
)
def test_a_broken_config_is_not_resumed(content, tmp_path, capsys):
    tmp_path.joinpath("config.json").write_text(content)
    assert run("--resume", "--output_dir", tmp_path) == 2
    assert "does not hold its arguments" in capsys.readouterr().err


def test_a_moved_run_resumes_from_another_folder(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder.parent)
    where = ["--text", folder.name, "--output_dir", tmp_path / "old", "--attention", "exact", *TINY]
    assert run(*where, "--steps", 2) == 0
    (tmp_path / "old").rename(tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert run("--resume", "--output_dir", "new") == 0
    printed = capsys.readouterr().out
    for part in ("new/exact/model", "new/losses.png"):
        assert f" {part}\n" in printed, f"{part!r} is not in the printed summary:\n{printed}"


def test_an_interrupt_before_the_run_says_that_nothing_was_begun(folder, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "load_corpus", interrupt)
    assert run("--text", folder, "--output_dir", tmp_path / "new", *TINY) == 130
    assert "nothing to resume yet" in capsys.readouterr().err


def test_a_finished_part_of_a_comparison_is_not_trained_again(folder, tmp_path, monkeypatch):
    output = tmp_path / "compare"
    where = ["--text", folder, "--output_dir", output, *TINY, *TINY_MUSE, "--steps", 6]

    def interrupt(model, layers, muse_config, compiled):
        if muse_config:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pretrain, "set_attention", interrupt)
        assert run(*where) == 130
    before = output.joinpath("exact/losses.csv").stat().st_mtime_ns
    assert run("--resume", "--output_dir", output) == 0
    assert output.joinpath("exact/losses.csv").stat().st_mtime_ns == before, (
        "exact attention was trained again"
    )
    assert len(losses(output, "muse")) == 6
