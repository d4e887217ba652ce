"""How the tests run pretrain.py, and read what it writes."""

import csv
import shlex
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import pretrain  # noqa: E402

TINY = shlex.split(
    "--num_layers 2 --hidden_size 32 --num_heads 2 --vocab_size 320 --tokenizer_characters 20000 "
    "--context_length 64 --held_out_every 5 --held_out_windows 4 --batch_size 2 --learning_rate 1e-2 "
    "--warmup_steps 2 --log_every 4 --sample_tokens 8"
)
TINY_MUSE = shlex.split("--local_block 16 --cluster_size 4 --num_retrieved 2")


def run(*arguments) -> int:
    """Run the script in this process, as if it were the first time; its exit code."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return pretrain.main([str(argument) for argument in arguments])


def interruptible(folder: Path, output: Path) -> list[str]:
    """Arguments of a run with accumulation, several epochs, checkpoints and exact attention."""
    schedule = "--steps 100 --gradient_accumulation_steps 2 --checkpoint_every 6 --eval_every 25"
    where = ["--text", str(folder), "--output_dir", str(output), "--attention", "exact"]
    return [*where, *TINY, *shlex.split(schedule)]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def losses(output: Path, attention: str = "exact") -> list[tuple[str, str]]:
    """(step, loss) as they are written, so that equality means equality to the last bit."""
    return [(row["step"], row["loss"]) for row in rows(output / attention / "losses.csv")]
