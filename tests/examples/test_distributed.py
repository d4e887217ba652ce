"""Pretraining by two processes, with the configs in examples/accelerate: the losses of one, resumed too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.examples.running import EXAMPLES, TINY, TINY_MUSE, losses, rows, run

CONFIGS = EXAMPLES / "accelerate"
STEPS = ["--attention", "exact", "muse", *TINY_MUSE, "--steps", "14", "--checkpoint_every", "5"]
STEPS += ["--loss_chunk", "50"]
ATTENTIONS = ("exact", "muse")


@pytest.fixture(scope="module")
def one_process(folder, tmp_path_factory) -> Path:
    """What one process does with the batches of both."""
    output = tmp_path_factory.mktemp("one") / "run"
    assert run("--text", folder, "--output_dir", output, *TINY, *STEPS, "--batch_size", 4) == 0
    return output


@pytest.fixture(scope="module", params=["ddp.yaml", "fsdp2.yaml"])
def two_processes(request, folder, tmp_path_factory) -> Path:
    """The folder of the two runs of two_processes.py, started as a user would start pretrain.py."""
    output = tmp_path_factory.mktemp("two")
    launch(request.param, "no", "both", output, "--text", folder, *TINY, *STEPS)
    return output


def launch(config: str, mixed_precision: str, *arguments) -> None:
    """Have two CPU processes run two_processes.py, as Accelerate is told in a config."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / config]
    command += ["--mixed_precision", mixed_precision, "--main_process_port", "0"]
    command += [Path(__file__).with_name("two_processes.py"), *arguments]
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [str(part) for part in command], env=os.environ | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_two_processes_have_the_losses_of_one_with_the_same_global_batch(two_processes, one_process):
    for table in (f"{attention}/{name}.csv" for attention in ATTENTIONS for name in ("losses", "held_out")):
        one, two = (rows(path / table) for path in (one_process, two_processes / "whole"))
        assert [row["tokens"] for row in two] == [row["tokens"] for row in one], f"{table}: other tokens"
        one, two = ([float(row["loss"]) for row in table] for table in (one, two))
        assert two == pytest.approx(one, rel=1e-4), f"{table}: other losses"


def test_two_processes_resume_with_identical_losses(two_processes):
    whole, resumed = two_processes / "whole", two_processes / "broken"
    for attention in ATTENTIONS:
        assert losses(resumed, attention) == losses(whole, attention), "the resumed run has other losses"
        assert rows(resumed / attention / "held_out.csv") == rows(whole / attention / "held_out.csv")
        weights = f"{attention}/model/model.safetensors"
        assert (resumed / weights).read_bytes() == (whole / weights).read_bytes(), "the weights differ"


def test_losses_in_low_precision_are_not_rounded_to_it(folder, tmp_path):
    launch(
        "fsdp2.yaml", "bf16", "whole", tmp_path, "--text", folder, *TINY, "--attention", "exact", "--steps", 4
    )
    losses = [float(row["loss"]) for row in rows(tmp_path / "whole/exact/losses.csv")]
    total = 2 * torch.tensor(losses)  # of both processes
    assert (total * 64 != (total * 64).round()).all(), f"losses of 16 bits: {losses}"
