"""What a finished training leaves: the model, and result.json with all that is published about it."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from attentions import Attention
from checkpoints import writing
from records import Progress, read_json, read_rows, write_json
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

# Steps that are left out of the time per step: kernels are chosen and compiled in them. None is written with
# later ones.
WARM_UP = 10
POINTS = 200  # of the curve of the training loss, each the mean of as many steps as the others


def save_result(
    accelerator: Accelerator,
    model: torch.nn.Module,
    attention: Attention,
    folder: Path,
    progress: Progress,
    tokenizer: PreTrainedTokenizerBase,
    held_out_losses: Mapping[str, Sequence[float]],
) -> None:
    """Save the model with its tokenizer and, last, what was measured: the mark of a finished training.

    Args:
        folder: Of this training, inside the folder of the run.
        held_out_losses: Loss of each held-out window, under "held_out_losses" with the attention of the
            training, and for MuSe under "exact_attention_losses" with exact attention.
    """
    weights = accelerator.get_state_dict(model)  # all processes together, each of which may hold a part
    if not accelerator.is_main_process:
        return
    with writing("the model"):
        accelerator.unwrap_model(model).save_pretrained(folder / "model", state_dict=weights)
        tokenizer.save_pretrained(folder / "model")
    *earlier_machines, machine = progress.machines
    run = read_json(folder.parent / "config.json") | machine
    losses = read_rows(folder / "losses.csv")
    tokens_per_step = losses[0]["tokens"]
    fast, seconds, slow = np.percentile(step_seconds(losses), [20, 50, 80]).tolist()
    result = {
        "attention": attention.title,
        "muse": attention.config and {"layers": attention.layers} | _fields(attention),
        "held_out_loss": statistics.fmean(held_out_losses["held_out_losses"]),
        "steps": progress.step,
        "tokens": int(progress.step * tokens_per_step),
        "seconds": progress.seconds,
        "seconds_per_step": seconds,
        "seconds_per_step_20_80": [fast, slow],
        "tokens_per_second": tokens_per_step / seconds,
        **held_out_losses,
        "training_curve": curve(losses),
        "held_out_curve": [[row["tokens"], row["loss"]] for row in read_rows(folder / "held_out.csv")],
        "monitor": read_rows(folder / "monitor.csv"),
        "model": f"{folder.name}/model",  # in the folder of the run, which may move
        "sample": sample_text(run["arguments"], tokenizer, folder / "model", accelerator.device),
        "parameters": sum(weight.numel() for weight in accelerator.unwrap_model(model).parameters()),
        "run": run,
        "earlier_machines": earlier_machines,
    }
    write_json(folder / "result.json", result)


def _fields(attention: Attention) -> dict[str, Any]:
    return {name: value for name, value in attention.config.to_dict().items() if name != "layers"}


def step_seconds(losses: Sequence[Mapping[str, float]]) -> list[float]:
    """Times of the steps after the warm-up, each taken as the mean of those written with it."""
    tokens = losses[0]["tokens"]
    timed = [row for row in losses if row["step"] > WARM_UP] or losses
    return [tokens / row["tokens_per_second"] for row in timed]


def curve(losses: Sequence[Mapping[str, float]]) -> list[list[float]]:
    """The training loss as at most `POINTS` points: tokens seen, and mean loss of the steps up to there."""
    size = math.ceil(len(losses) / POINTS)
    parts = [losses[start : start + size] for start in range(0, len(losses), size)]
    return [[part[-1]["tokens"], round(statistics.fmean(row["loss"] for row in part), 5)] for part in parts]


@torch.no_grad()
def sample_text(
    arguments: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, saved: Path, device: torch.device
) -> str:
    """Text that the saved model continues from the prompt within one window, drawn with the run's seed."""
    set_seed(arguments["seed"])
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).to(device)
    prompt = torch.tensor([prompt_tokens(tokenizer, arguments["prompt"])], device=model.device)
    tokens = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=min(arguments["sample_tokens"], arguments["context_length"] - prompt.shape[1]),
        do_sample=True,
        temperature=0.8,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The tokens of the prompt, without special ones."""
    return tokenizer(prompt, add_special_tokens=False)["input_ids"]
