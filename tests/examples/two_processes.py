"""What each process of test_distributed.py does: a whole run, one that breaks off, and its resumption.

accelerate launch --config_file CONFIG tests/examples/two_processes.py FOLDER ARGUMENTS
"""

import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.examples.running import pretrain, run


@mock.patch.object(Accelerator, "end_training")  # which takes down the connection that the next run needs
def main(_) -> None:
    torch.set_num_threads(1)
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    assert run("--output_dir", folder / "whole", *arguments) == 0
    with mock.patch.object(pretrain, "held_out_loss", side_effect=KeyboardInterrupt):  # in the last step
        assert run("--output_dir", folder / "broken", *arguments) == 130
    assert run("--output_dir", folder / "broken", "--resume") == 0


if __name__ == "__main__":
    main()
