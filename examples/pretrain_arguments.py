"""The arguments of pretrain.py: what they mean, their defaults (the default job), and which are refused."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from command_line import MuseOptions, UsageError, check_numbers, make_parser, option, parse
from records import read_json

# Arguments that a resumed run may change, because the losses do not depend on them.
FREE_ON_RESUME = {
    "output_dir",
    "resume",
    "log_every",
    "monitor_every",
    "checkpoint_every",
    "keep_checkpoints",
    "max_minutes",
}
MAY_BE_ZERO = {
    "warmup_steps",
    "weight_decay",
    "seed",
    "num_retrieved",
    "retrieval_threshold",
    "kmeans_iters",
    "monitor_every",
    "num_workers",
}


@dataclass(frozen=True)
class Shape:
    """A model by its numbers; `mlp` is the inner width of Llama's MLP (GPT-2's is four times its width)."""

    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int | None = None


PRESETS = {path.stem: path for path in Path(__file__).with_name("presets").glob("*.json")}
PRESETS = dict(sorted(PRESETS.items()))
SHAPES = {
    "llama-tiny": Shape("llama", layers=3, width=128, heads=2, kv_heads=2, mlp=384),
    "llama-27m": Shape("llama", layers=7, width=512, heads=8, kv_heads=8, mlp=1408),
    "llama-150m": Shape("llama", layers=12, width=1024, heads=16, kv_heads=8, mlp=2816),
    "llama-1b": Shape("llama", layers=16, width=2048, heads=32, kv_heads=8, mlp=8192),
    "gpt2-tiny": Shape("gpt2", layers=3, width=128, heads=2, kv_heads=2),
    "gpt2-30m": Shape("gpt2", layers=7, width=512, heads=8, kv_heads=8),
    "gpt2": Shape("gpt2", layers=12, width=768, heads=12, kv_heads=12),
}


@dataclass
class ModelArguments:
    _argument_group_name = "Model"

    shape: str = option(
        "llama-tiny", f"Train from random weights in this shape, one of: {', '.join(SHAPES)}."
    )
    num_layers: int | None = option(None, "Number of layers, instead of the shape's.")
    hidden_size: int | None = option(None, "Width of the model, instead of the shape's.")
    num_heads: int | None = option(None, "Attention heads of a layer, instead of the shape's.")
    num_kv_heads: int | None = option(
        None, "Key/value heads of a Llama layer, fewer than heads for grouped-query attention."
    )
    checkpoint: str | None = option(
        None,
        "Continue from this model, a folder or a name on the Hub, instead of random weights. Its dropout is "
        "turned off.",
    )


@dataclass
class TextArguments:
    _argument_group_name = "Text"

    text: list[str] | None = field(
        default=None,
        metadata={
            "help": "Text files, and folders that are searched for them. A file is a document; files that are"
            " not UTF-8 text are left out. Without any text named: the source text of Python's"
            " standard library."
        },
    )
    packages: list[str] | None = field(
        default=None,
        metadata={"help": "Installed Python packages, such as torch, whose folders are searched as well."},
    )
    file_pattern: str = option("*", "Which files of the folders to read, such as '*.txt'.")
    dataset_name: str | None = option(
        None, "A dataset for datasets.load_dataset, such as emozilla/pg19 (PG-19 as Parquet files)."
    )
    dataset_config: str | None = option(None, "Configuration of that dataset, if it has several.")
    dataset_split: str = option("train", "Split of that dataset to read.")
    text_column: str = option("text", "Column of that dataset that holds the text.")


@dataclass
class DataArguments(TextArguments):
    _argument_group_name = "Data"

    streaming: bool = option(
        False,
        "Tokenise while training and keep nothing of it. Left out: tokenise first, into the cache of the "
        "library datasets (HF_HOME), where later runs find the tokens. Resuming a stream reads the consumed "
        "text again.",
    )
    shuffle_buffer: int = option(256, "Windows from which a batch is drawn at random when streaming.")
    context_length: int = option(
        2048,
        "Tokens in a training window. Documents are concatenated, each followed by the end-of-text token, "
        "and cut in full windows. As usual in pretraining, attention may look across document ends inside a "
        "window.",
    )
    held_out_every: int = option(
        20, "One document in this many is kept out of training, for the held-out loss."
    )
    held_out_windows: int = option(
        16, "Windows of held-out documents on which the held-out loss is measured."
    )
    tokenizer: str | None = option(
        None,
        "A tokenizer, as a folder or a name on the Hub. Left out: the checkpoint's, or else a byte-level BPE "
        "that is trained on the corpus.",
    )
    vocab_size: int = option(2048, "Tokens of the trained BPE. 8192 to 32768 suit larger models.")
    tokenizer_characters: int = option(4_000_000, "Characters of training text that the BPE is trained on.")
    num_workers: int = option(0, "Processes that load batches ahead of the training process.")


@dataclass
class MuseArguments(MuseOptions):
    _argument_group_name = (
        "MuSe attention (left out: what suits the small default job, which is plain summaries, the dyadic "
        "hierarchy, local blocks of 256 tokens, clusters of 16 keys and up to 16 retrieved clusters)"
    )

    layers: str = option(
        "all", "Layers that use MuSe: all, central, or numbers such as 2,3 or -1 (write --layers=-2,-1)."
    )


@dataclass
class RunArguments:
    _argument_group_name = "Run"

    preset: str | None = option(
        None,
        f"Start from the arguments in examples/presets/, one of: {', '.join(PRESETS)}. Arguments that are "
        "given replace those of the preset.",
    )
    compare: bool = option(
        False,
        "Train with exact attention first, from the same start on the same batches, and compare. Implied if "
        "--attention is left out.",
    )
    attention: list[str] | None = field(
        default=None,
        metadata={
            "help": "Attentions to train with, one after the other: exact; muse, in the setting of the "
            "options of MuSe; or muse with some of these options changed, such as "
            "muse:setting=paper:layers=central. Left out: exact and muse."
        },
    )
    output_dir: str | None = option(
        None,
        "New folder for everything the run writes; an existing one is refused. Left out: runs/pretrain, or "
        "the next free of runs/pretrain-2, runs/pretrain-3, ...",
    )
    resume: bool = option(
        False,
        "Continue the interrupted run in --output_dir from its newest checkpoint, with the losses it would "
        "have had. Arguments left out are those of the run.",
    )
    steps: int = option(140, "Optimizer steps.")
    batch_size: int = option(1, "Windows in one forward pass of each process.")
    gradient_accumulation_steps: int = option(1, "Forward and backward passes in one optimizer step.")
    learning_rate: float = option(4e-3, "Highest learning rate, after warm-up; falls to zero as a cosine.")
    warmup_steps: int = option(10, "Steps during which the learning rate rises from zero.")
    weight_decay: float = option(
        0.1, "AdamW's weight decay, for matrices; not for embeddings, biases, norms."
    )
    max_grad_norm: float = option(1.0, "Gradients of a larger norm are clipped to it.")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = option(
        None,
        "Precision of the forward pass; bf16 for recent GPUs (default: Accelerate's setting, or else no).",
    )
    gradient_checkpointing: bool = option(
        False,
        "Compute activations again in the backward pass instead of keeping them: less memory, more time.",
    )
    compile: bool = option(
        False,
        "Compile the model with torch.compile, apart from MuSe attention. The first steps take longer; "
        "losses differ by rounding.",
    )
    loss_chunk: int | None = option(
        None,
        "Tokens whose logits are computed at a time, and again in the backward pass, so that the logits of a "
        "long window need not fit in memory. Left out: all at once.",
    )
    seed: int = option(0, "Seed of the weights, of the order of the windows, and of the generated text.")
    eval_every: int = option(20, "Steps between two measurements of the held-out loss.")
    log_every: int = option(5, "Steps between two updates of the progress bar and of losses.csv.")
    monitor_every: int = option(
        70,
        "Steps between two measurements of how far each MuSe layer is from exact attention, on one held-out "
        "window; 0 for none.",
    )
    checkpoint_every: int = option(70, "Steps between two checkpoints.")
    max_minutes: float | None = option(
        None,
        "Write a checkpoint and end with exit code 3 after about so many minutes; --resume goes on. "
        "Left out: no limit.",
    )
    keep_checkpoints: int = option(2, "Newest checkpoints of each attention that are kept.")
    prompt: str = option("def ", "Start of the text that is generated at the end.")
    sample_tokens: int = option(
        120, "Tokens that are generated at the end, at most as many as fill a window."
    )

    @property
    def attentions(self) -> list[str]:
        titles = self.attention or ["exact", "muse"]
        return ["exact", *titles] if self.compare and "exact" not in titles else titles


@dataclass
class Arguments:
    model: ModelArguments
    data: DataArguments
    muse: MuseArguments
    run: RunArguments

    def values(self) -> dict[str, Any]:
        """All arguments by name, in one mapping."""
        groups = (self.model, self.data, self.muse, self.run)
        return {name: value for group in groups for name, value in dataclasses.asdict(group).items()}


def parse_arguments(argv: list[str] | None, description: str) -> Arguments:
    """The arguments, completed from the saved ones when a run is resumed."""
    parser = make_parser(
        (ModelArguments, DataArguments, MuseArguments, RunArguments), "pretrain.py", description
    )

    def parsed() -> Arguments:
        return with_resolved_paths(Arguments(*parse(parser, argv)))

    arguments = parsed()
    if arguments.run.preset is not None:
        parser.set_defaults(**preset_arguments(arguments.run.preset))
        arguments = parsed()
    if arguments.run.resume:
        saved = saved_arguments(arguments.run.output_dir)
        parser.set_defaults(**{name: saved[name] for name in saved.keys() - {"output_dir", "resume"}})
        arguments = parsed()
        values = arguments.values()
        if changed := sorted({name for name in values if values[name] != saved.get(name)} - FREE_ON_RESUME):
            path = Path(arguments.run.output_dir, "config.json")
            instead = other_length(path.parent) if "steps" in changed else ""
            raise UsageError(
                f"a resumed run keeps its arguments, but {', '.join(changed)} would differ from those in "
                f"{str(path)!r}{instead}."
            )
    check(arguments)
    return arguments


def preset_arguments(name: str) -> dict[str, Any]:
    """The arguments of a preset by name."""
    if name not in PRESETS:
        raise UsageError(f"there is no preset {name!r}: the presets are {', '.join(PRESETS)}.")
    return read_json(PRESETS[name])


def with_resolved_paths(arguments: Arguments) -> Arguments:
    """The arguments with paths that hold in every folder, so that a run can be resumed from another one."""

    def resolved(name: str | None) -> str | None:
        return str(Path(name).resolve()) if name and os.path.exists(name) else name

    model, data = arguments.model, arguments.data
    model = dataclasses.replace(model, checkpoint=resolved(model.checkpoint))
    data = dataclasses.replace(
        data,
        text=data.text and [resolved(path) for path in data.text],
        dataset_name=resolved(data.dataset_name),
        tokenizer=resolved(data.tokenizer),
    )
    return dataclasses.replace(arguments, model=model, data=data)


def other_length(folder: Path) -> str:
    """What to do instead of resuming the run in a folder with another number of steps."""
    finished = sorted(path.parent / "model" for path in folder.glob("*/result.json"))
    start = f", for instance with --checkpoint {str(finished[-1])!r}" if finished else ""
    return f"; the learning-rate schedule depends on the steps, so a longer run starts anew{start}"


def saved_arguments(output_dir: str | None) -> dict[str, Any]:
    """The arguments of the run in a folder."""
    if output_dir is None:
        raise UsageError("--resume needs --output_dir, the folder of the run to continue.")
    path = Path(output_dir, "config.json")
    if not os.path.exists(path):
        raise UsageError(f"there is nothing to resume in {output_dir!r}: it holds no config.json of a run.")
    try:
        return dict(read_json(path)["arguments"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"the run cannot be resumed: {str(path)!r} does not hold its arguments.") from error


def check(arguments: Arguments) -> None:
    """Refuse numbers that make no sense and arguments that exclude each other."""
    values = arguments.values()
    check_numbers(values, MAY_BE_ZERO)
    for one, other in (("text", "dataset_name"), ("packages", "dataset_name")):
        if values[one] and values[other]:
            raise UsageError(f"give --{one} or --{other}, not both.")
    if values["held_out_every"] < 2 or values["context_length"] < 2:
        raise UsageError("--held_out_every and --context_length must be at least 2.")
    if values["checkpoint"] is None and values["shape"] not in SHAPES:
        raise UsageError(f"there is no shape {values['shape']!r}: the shapes are {', '.join(SHAPES)}.")
