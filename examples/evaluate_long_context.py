"""Does long context still work with MuSe attention? Exact and MuSe attention of one model, side by side.

Loss by position, retrieval of a pass key from filler and from real text over depth and length, copying,
time and memory of the prefill by length, and the text that generate() writes after a long prompt.

Without arguments it makes a small model from Python's standard library, which copies, and takes about two
minutes on two cores. Of your own model, with text that it was not trained on:

    python examples/evaluate_long_context.py --model path/to/model --text my_folder --lengths 8192 32768

PG-19 (books), streamed from the Hub, on a GPU, layers chosen by measurement:

    python examples/evaluate_long_context.py --model meta-llama/Llama-3.2-1B --dtype bfloat16 \\
        --dataset_name emozilla/pg19 --dataset_split test --lengths 8192 16384 32768 65536 --layers auto

Tables are printed; the folder of the run gets them as CSV files, three pictures, and the settings.
"""

import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import tqdm
from command_line import UsageError, exit_code, make_parser, next_free, option, parse
from long_context_report import (
    plot_lengths,
    plot_losses,
    plot_retrieval,
    table_of_losses,
    table_of_prefills,
    table_of_tasks,
)
from long_context_tasks import continuation, make_tasks, prefill, score
from plugin import muse_hf
from pretrain_arguments import TextArguments
from pretrained import PretrainedArguments, load_model, muse_policy, text_rows, unseen_texts, use_attention
from records import append_rows, write_json
from texts import load_texts
from transformers import PreTrainedModel, PreTrainedTokenizerBase

POSITIONS = 8  # parts of the context for the loss by position
SMALLEST_LENGTH = 256


@dataclass
class EvaluationArguments:
    _argument_group_name = "Evaluation"

    lengths: list[int] = field(
        default_factory=lambda: [512, 1024, 2048],
        metadata={"help": "Context lengths in tokens; loss by position and generate() take the longest."},
    )
    depths: int = option(5, "Depths at which a pass key is hidden.")
    samples: int = option(2, "Pass keys at each length and depth, and rows for the loss by position.")
    new_tokens: int = option(32, "Tokens that generate() writes.")
    output_dir: str | None = option(
        None, "New folder for the results. Left out: runs/long_context, or the next free name."
    )


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    return exit_code("evaluate_long_context.py", lambda: evaluate(*parse_arguments(argv)))


def parse_arguments(
    argv: list[str] | None,
) -> tuple[EvaluationArguments, PretrainedArguments, TextArguments]:
    """The arguments, if they make sense."""
    parser = make_parser(
        (PretrainedArguments, TextArguments, EvaluationArguments), "evaluate_long_context.py", __doc__
    )
    pretrained, texts, arguments = parse(parser, argv)
    arguments.lengths = sorted(set(arguments.lengths))
    if arguments.lengths[0] < SMALLEST_LENGTH:
        raise UsageError(f"--lengths must be at least {SMALLEST_LENGTH}.")
    if min(arguments.depths, arguments.samples, arguments.new_tokens) < 1:
        raise UsageError("--depths, --samples and --new_tokens must be at least 1.")
    if arguments.new_tokens >= arguments.lengths[-1]:
        raise UsageError("--new_tokens must be fewer than the longest of --lengths.")
    if texts.text and texts.dataset_name:
        raise UsageError("give --text or --dataset_name, not both.")
    if arguments.output_dir and Path(arguments.output_dir).exists():
        raise UsageError(f"{arguments.output_dir!r} exists already and is not overwritten.")
    return arguments, pretrained, texts


def evaluate(arguments: EvaluationArguments, pretrained: PretrainedArguments, texts: TextArguments) -> None:
    """Measure with exact and with MuSe attention, then write and print everything."""
    folder = Path(arguments.output_dir) if arguments.output_dir else next_free(Path("runs/long_context"))
    corpus = load_texts(texts)
    longest, samples = arguments.lengths[-1], arguments.samples
    model, tokenizer = load_model(pretrained, corpus, longest)
    rows = text_rows(unseen_texts(pretrained, corpus), tokenizer, longest, 2 * samples, needed=2 * samples)
    calibration, rows = rows.split(samples)
    policy = muse_policy(pretrained, model, calibration, longest)
    results = [
        measure(arguments, model, tokenizer, rows, None),
        measure(arguments, model, tokenizer, rows, policy),
    ]
    by_position = losses_by_position(*(result.losses for result in results))
    tasks = [row for result in results for row in result.tasks]
    prefills = [row for result in results for row in result.prefills]

    folder.mkdir(parents=True)
    values = {name: value for group in (pretrained, texts, arguments) for name, value in vars(group).items()}
    write_json(folder / "settings.json", {"arguments": values, "muse": policy.to_dict()})
    for name, table in (("loss_by_position", by_position), ("tasks", tasks), ("prefill", prefills)):
        append_rows(folder / f"{name}.csv", table)
    plot_losses(by_position, folder / "loss_by_position.png")
    plot_retrieval(tasks, folder / "retrieval.png")
    plot_lengths(tasks, prefills, folder / "lengths.png")
    print("\n\n".join([table_of_losses(by_position), table_of_tasks(tasks), table_of_prefills(prefills)]))
    exact, muse = (result.continuation for result in results)
    same = sum(one == other for one, other in zip(exact, muse))
    print(f"\ngenerate() after a long prompt: {same} of {len(exact)} tokens are the same")
    print(f"  exact {tokenizer.decode(exact)!r}\n  MuSe  {tokenizer.decode(muse)!r}")
    print(f"\ntables and pictures: {folder}")


@dataclass
class Result:
    """What was measured with one attention; losses are of shape (samples, longest length - 1)."""

    losses: torch.Tensor
    tasks: list[dict]
    prefills: list[dict]
    continuation: list[int]


def measure(
    arguments: EvaluationArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: torch.Tensor,
    policy: muse_hf.MuseConfig | None,
) -> Result:
    """Measure a model with exact attention, or under a policy, on text (samples, longest length)."""
    use_attention(model, policy)
    attention = "exact" if policy is None else "muse"
    text, vocabulary = rows.flatten().tolist(), min(len(tokenizer), model.config.vocab_size)
    sizes = (arguments.lengths, arguments.depths, arguments.samples)
    tasks = list(make_tasks(tokenizer, vocabulary, text, *sizes))
    table = []
    for task in tqdm(tasks, desc=f"{attention} attention", unit="task", leave=False):
        accuracy, loss = score(model, task)
        about = {"attention": attention, "task": task.name, "length": task.length, "depth": task.depth}
        table.append(about | {"accuracy": accuracy, "loss": loss})
    prefills = []
    for length in arguments.lengths:
        seconds, gib = prefill(model, rows[:1, :length])
        prefills.append({"attention": attention, "length": length, "seconds": seconds, "gib": gib})
    return Result(
        losses=torch.cat([muse_hf.token_losses(model, row[None].to(model.device)) for row in rows]).cpu(),
        tasks=table,
        prefills=prefills,
        continuation=continuation(model, rows[:1, : -arguments.new_tokens], arguments.new_tokens),
    )


def losses_by_position(exact: torch.Tensor, muse: torch.Tensor) -> list[dict]:
    """Mean losses in equal parts of the context, from those of each token but the first."""
    length = exact.shape[1] + 1
    edges = [length * part // POSITIONS for part in range(POSITIONS + 1)]
    return [
        {
            "start": start,
            "end": end,
            "exact": exact[:, max(0, start - 1) : end - 1].double().mean().item(),
            "muse": muse[:, max(0, start - 1) : end - 1].double().mean().item(),
        }
        for start, end in itertools.pairwise(edges)
    ]


if __name__ == "__main__":
    sys.exit(main())
