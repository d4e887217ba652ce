"""What each process of test_distributed.py does: a whole run, or also one that breaks off and its resumption.

accelerate launch --config_file CONFIG tests/examples/two_processes.py whole|both FOLDER ARGUMENTS
"""

import itertools
import os
import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.examples.running import pretrain, run


def main() -> None:
    torch.set_num_threads(1)
    runs, folder, arguments = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    assert run("--output_dir", folder / "whole", *arguments) == 0
    if runs == "whole":
        return
    broken = ["--output_dir", folder / "broken"]
    with breaking_off_at_evaluation(1):  # in the last step of the first training
        assert run(*broken, *arguments) == 130
    with breaking_off_at_evaluation(2):  # of the second one
        assert run(*broken, "--resume") == 130
    assert run(*broken, "--resume") == 0


def breaking_off_at_evaluation(number: int):
    """A run is interrupted where it is about to measure held-out losses for the number-th time."""
    measure, calls = pretrain.held_out_losses, itertools.count(1)

    def measure_or_break_off(*args):
        if next(calls) == number:
            raise KeyboardInterrupt
        return measure(*args)

    return mock.patch.object(pretrain, "held_out_losses", measure_or_break_off)


def use_fsdp_on_cpus() -> None:
    """Accelerate leaves FSDP out on CPUs, where PyTorch has it: let it take them for accelerators."""
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda state: setattr(state, "device", torch.device("cpu"))


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        use_fsdp_on_cpus()
    # The end of a run takes down the connection that the next run needs.
    with mock.patch.object(Accelerator, "end_training"):
        main()
