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

import dataclasses
import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate.utils import tqdm
from corpus import Corpus, UsageError, pack, tokenize
from long_context_report import (
    plot_lengths,
    plot_losses,
    plot_retrieval,
    table_of_losses,
    table_of_prefills,
    table_of_tasks,
)
from long_context_tasks import continuation, make_tasks, prefill, score
from models import muse_layers
from plugin import muse_hf
from pretrain_arguments import HelpFormatter, TextArguments, option
from records import append_rows, free_folder, write_json
from small_model import make_small_model
from texts import load_texts
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from muse_hf.models import InputError, check_length
from muse_hf.routing import UnsupportedError, check_family, model_policy

# For the small model, whose contexts are short.
SMALL_MUSE = {"local_block": 128, "cluster_size": 8, "num_retrieved": 32}
POSITIONS = 8  # parts of the context for the loss by position
SMALLEST_LENGTH = 256


@dataclass
class EvaluationArguments:
    _argument_group_name = "Evaluation"

    model: str | None = option(
        None, "A causal model, a folder or a name on the Hub. Left out: a small one is made first."
    )
    tokenizer: str | None = option(None, "Its tokenizer, if it comes without one.")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Precision of the model.")
    device: str | None = option(None, "Such as cuda or cpu (default: cuda where there is one).")
    layers: str | None = option(
        None,
        "Layers that use MuSe: all, numbers such as 2,3, or auto, which measures on other text than the rest "
        "and gives every layer the fastest setting that keeps the model within --max_loss_increase (default: "
        "the model's own policy, or all).",
    )
    max_loss_increase: float = option(0.002, "Budget of --layers auto, relative to the loss.")
    num_retrieved: int | None = option(None, "Clusters each query attends to exactly.")
    cluster_size: int | None = option(None, "Mean number of keys in a cluster.")
    local_block: int | None = option(None, "Tokens attended exactly around each token.")
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
    try:
        evaluate(*parse_arguments(argv))
    except UsageError as error:
        print(f"\nevaluate_long_context.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nevaluate_long_context.py: interrupted.", file=sys.stderr)
        return 130
    return 0


def parse_arguments(argv: list[str] | None) -> tuple[EvaluationArguments, TextArguments]:
    """The arguments, if they make sense."""
    parser = HfArgumentParser(
        (EvaluationArguments, TextArguments),
        description=__doc__,
        usage="python examples/evaluate_long_context.py [options]",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    arguments, texts = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    arguments.lengths = sorted(set(arguments.lengths))
    if arguments.lengths[0] < SMALLEST_LENGTH:
        raise UsageError(f"--lengths must be at least {SMALLEST_LENGTH}.")
    if min(arguments.depths, arguments.samples, arguments.new_tokens) < 1:
        raise UsageError("--depths, --samples and --new_tokens must be at least 1.")
    if texts.text and texts.dataset_name:
        raise UsageError("give --text or --dataset_name, not both.")
    if arguments.output_dir and Path(arguments.output_dir).exists():
        raise UsageError(f"{arguments.output_dir!r} exists already and is not overwritten.")
    return arguments, texts


def evaluate(arguments: EvaluationArguments, texts: TextArguments) -> None:
    """Measure with exact and with MuSe attention, then write and print everything."""
    folder = Path(arguments.output_dir) if arguments.output_dir else free_folder(Path("runs/long_context"))
    corpus = load_texts(texts)
    model, tokenizer = load_model(arguments, corpus)
    calibration, rows = text_rows(arguments, corpus, tokenizer)
    policy = muse_policy(arguments, model, calibration)
    results = [
        measure(arguments, model, tokenizer, rows, None),
        measure(arguments, model, tokenizer, rows, policy),
    ]
    by_position = losses_by_position(*(result.losses for result in results))
    tasks = [row for result in results for row in result.tasks]
    prefills = [row for result in results for row in result.prefills]

    folder.mkdir(parents=True)
    values = dataclasses.asdict(arguments) | dataclasses.asdict(texts)
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


def load_model(
    arguments: EvaluationArguments, corpus: Corpus
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that is named, or the small one, on its device and in evaluation mode."""
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.model is None:
        model, tokenizer = make_small_model(corpus)
        return model.to(device), tokenizer
    try:
        check_family(config := AutoConfig.from_pretrained(arguments.model))
        check_length(config, arguments.lengths[-1])
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer or arguments.model)
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=arguments.dtype, attn_implementation="sdpa"
        )
        return model.to(device).eval(), tokenizer
    except (UnsupportedError, InputError) as error:
        raise UsageError(f"{str(error).rstrip('.')}.") from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"the model {arguments.model!r} could not be opened ({reason}).") from error


def text_rows(
    arguments: EvaluationArguments, corpus: Corpus, tokenizer: PreTrainedTokenizerBase
) -> torch.Tensor:
    """Tokens (2, samples, longest length) of documents: the first half to calibrate, the second to evaluate.

    The small model was trained on the corpus itself, so that only its held-out documents count.
    """
    length = arguments.lengths[-1]
    texts = itertools.chain(
        corpus.texts(held_out=True), () if arguments.model is None else corpus.texts(False)
    )
    end = tokenizer.eos_token_id
    windows = pack(tokenize(texts, tokenizer), end if end is not None else 0, length)
    needed = 2 * arguments.samples
    found = list(itertools.islice(windows, needed))
    if len(found) < needed:
        raise UsageError(
            f"the text fills {len(found)} rows of {length} tokens, but {needed} are needed (--samples to "
            "evaluate and as many to calibrate): give more text."
        )
    return torch.from_numpy(np.stack(found)).long().view(2, arguments.samples, length)


def muse_policy(
    arguments: EvaluationArguments, model: PreTrainedModel, calibration: torch.Tensor
) -> muse_hf.MuseConfig:
    """What MuSe means: the model's own policy or a default one, changed by the arguments."""
    fields = ("num_retrieved", "cluster_size", "local_block")
    given = {name: value for name in fields if (value := getattr(arguments, name)) is not None}
    layers, options = arguments.layers, {}
    if layers == "auto":
        options = {"calibration": calibration, "max_loss_increase": arguments.max_loss_increase}
    elif layers is not None:
        layers = muse_layers(layers)
    try:
        default = muse_hf.MuseConfig(**SMALL_MUSE) if arguments.model is None else model_policy(model.config)
        report = muse_hf.patch_model(model, layers, default.replace(**given), **options)
    except ValueError as error:
        raise UsageError(f"{str(error).rstrip('.')}.") from error
    print(f"{report}\n")
    return model_policy(model.config)


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
    if policy is None:
        muse_hf.unpatch_model(model)
    else:
        muse_hf.patch_model(model, config=policy)
    attention = "exact" if policy is None else "muse"
    tasks = list(
        make_tasks(tokenizer, rows.flatten().tolist(), arguments.lengths, arguments.depths, arguments.samples)
    )
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
