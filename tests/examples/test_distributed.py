"""Pretraining by two processes, with the configs in examples/accelerate: the losses of one, resumed too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.examples.running import EXAMPLES, TINY, losses, rows, run

CONFIGS = EXAMPLES / "accelerate"
STEPS = ["--attention", "exact", "--steps", "14", "--checkpoint_every", "5"]


def launch(config: str, folder: Path, output: Path, **environment: str) -> Path:
    """Run two_processes.py as a user would run pretrain.py; the folder of its runs."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / config]
    command += ["--mixed_precision", "no", "--main_process_port", "0"]
    command += [Path(__file__).with_name("two_processes.py"), output, "--text", folder, *TINY, *STEPS]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return output


@pytest.fixture(scope="module")
def one_process(folder, tmp_path_factory) -> Path:
    """What one process does with the batches of both."""
    output = tmp_path_factory.mktemp("one") / "run"
    assert run("--text", folder, "--output_dir", output, *TINY, *STEPS, "--batch_size", 4) == 0
    return output


@pytest.fixture(scope="module")
def two_processes(folder, tmp_path_factory) -> Path:
    return launch("ddp.yaml", folder, tmp_path_factory.mktemp("two"), ACCELERATE_USE_CPU="true")


def assert_same_training(output: Path, expected: Path) -> None:
    for table in ("exact/losses.csv", "exact/held_out.csv"):
        one, two = (rows(path / table) for path in (expected, output))
        assert [row["tokens"] for row in two] == [row["tokens"] for row in one], f"{table}: other tokens"
        one, two = ([float(row["loss"]) for row in table] for table in (one, two))
        assert two == pytest.approx(one, rel=1e-4), f"{table}: other losses"


def test_two_processes_have_the_losses_of_one_with_the_same_global_batch(two_processes, one_process):
    assert_same_training(two_processes / "whole", one_process)


def test_two_processes_resume_with_identical_losses(two_processes):
    whole, resumed = two_processes / "whole", two_processes / "broken"
    assert losses(resumed) == losses(whole), "the resumed run has other losses"
    assert rows(resumed / "exact/held_out.csv") == rows(whole / "exact/held_out.csv")
    weights = "exact/model/model.safetensors"
    assert (resumed / weights).read_bytes() == (whole / weights).read_bytes(), "the weights differ"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="Accelerate has FSDP on accelerators only")
def test_fsdp2_has_the_losses_of_one_process_and_resumes(folder, one_process, tmp_path):
    output = launch("fsdp2.yaml", folder, tmp_path)
    assert_same_training(output / "whole", one_process)
    assert_same_training(output / "broken", output / "whole")
