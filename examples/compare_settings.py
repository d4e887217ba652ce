"""Which setting of MuSe? Every setting's attention time and loss on one model and text, at several lengths.

Without arguments it makes a small model from Python's standard library and takes a few minutes on two
cores. Of your own model, with text that it was not trained on:

    python examples/compare_settings.py --model path/to/model --text folder \\
        --lengths 16384 32768 65536 131072 --output examples/results/settings_h200

Settings of your own, as pretrain.py takes them; options that are left out are those of the default setting:

    python examples/compare_settings.py --model path/to/model --text folder --lengths 32768 \\
        --attention muse muse:local_block=1024:cluster_size=64 muse:setting=paper:local_block=4096

Each is used in all layers. Its time is that of attention in all of them, forward and backward, on the
queries, keys and values that the first row has with exact attention; the loss is the mean over all rows.
Exact attention is the fastest of PyTorch's kernels in the same run. Rows are printed and written to a CSV
file one by one, so that a run cut short keeps what it has, and in the end a picture is drawn. A setting that
is refused or fails becomes a row with the reason. One without Triton kernels is not timed on a GPU, where
the slow reference tells its loss.
"""

import hashlib
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import tqdm
from attentions import changed_options
from benchmark_measure import EXACT_BACKENDS, one_line
from command_line import (
    MuseOptions,
    UsageError,
    check_numbers,
    exit_code,
    make_parser,
    next_free,
    option,
    parse,
)
from plugin import muse_hf
from pretrain_arguments import TextArguments
from pretrained import SMALL_MUSE, LoadArguments, load_model, text_rows, unseen_texts
from records import append_rows
from settings_report import plot, table_head, table_line
from texts import load_texts
from torch.nn.attention import sdpa_kernel
from transformers import PreTrainedModel

from muse_hf.config import DEFAULT_CLUSTER_SIZE, MuseConfig
from muse_hf.environment import environment
from muse_hf.models import InputError, hidden_states, predicts_next_token, temporary_policy
from muse_hf.profiling import (
    Quality,
    attention_milliseconds,
    check_input,
    device_name,
    observed_attention,
)
from muse_hf.routing import UnsupportedError, check_windows

DEFAULT_OUTPUT = Path("runs/settings")
VERSIONS = ("torch", "triton", "transformers", "muse_hf")
IN_A_ROW = 2  # calls that are timed together: a few, as there are many settings and layers

# What is tried around the default setting, one option at a time, and around the paper's.
LENGTHS = (16384, 32768, 65536)
VARIED = {
    "local_block": (1024, 4096),
    "cluster_size": (20, 64, 96),
    "num_retrieved": (0, 8, 16, 48),
    "retrieval_threshold": (0, 0.001, 0.01),
    "kmeans_iters": (1, 3),
    "cluster_cap": (1.25, 2, 3),
}
PAPER = ("local_block=4096", "local_block=2048")
# The same for the small model, whose contexts are short.
SMALL_LENGTHS = (1024, 2048)
SMALL_VARIED = {
    "local_block": (64, 256),
    "cluster_size": (4, 16),
    "num_retrieved": (0, 8, 64),
    "retrieval_threshold": (0.001, 0.01),
    "kmeans_iters": (1,),
    "cluster_cap": (2,),
}
SMALL_PAPER = ("local_block=256:num_clusters=16",)
VARIANTS_OF_PAPER = ("multipole=monopole", "query_centroids=own", "num_retrieved=12:retrieval_threshold=0")

Attend = Callable[..., torch.Tensor]


@dataclass
class SettingsArguments:
    _argument_group_name = "Settings"

    attention: list[str] | None = field(
        default=None,
        metadata={
            "help": "Settings to try: muse, or muse with options after colons, such as "
            "muse:local_block=1024:cluster_size=64 (the options are those of MuSe in pretrain.py). Left out: "
            "the default, others with one option changed, and some of the paper's."
        },
    )
    lengths: list[int] | None = field(
        default=None,
        metadata={
            "help": f"Tokens (default: {' '.join(map(str, LENGTHS))}, for the small model "
            f"{' '.join(map(str, SMALL_LENGTHS))})."
        },
    )
    longest_loss: int | None = option(
        None, "At greater lengths only time is measured (default: the model's max_position_embeddings)."
    )
    rows: int = option(4, "Rows of text over which the loss is measured.")
    output: str | None = option(
        None,
        "Where to write, without the ending .csv or .png; existing files are refused. Left out: "
        f"{DEFAULT_OUTPUT}, or the next free name.",
    )


@dataclass
class Arguments:
    """What is to be run, with everything that was left out filled in.

    Attributes:
        settings: By the title that --attention has for each.
        csv: The picture goes beside it as PNG.
        command: As it was typed, for the record.
    """

    load: LoadArguments
    text: TextArguments
    settings: dict[str, MuseConfig]
    lengths: list[int]
    longest_loss: int | None
    rows: int
    csv: Path
    command: str


@dataclass
class Context:
    """What does not depend on the setting at one length.

    Attributes:
        input_ids: (rows, length) on the model's device.
        exact_ms: Time of exact attention in all layers, forward and backward, on the first row.
        quality: The losses with exact attention; None where only time is measured.
    """

    input_ids: torch.Tensor
    exact_ms: float
    quality: Quality | None


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    return exit_code(
        "compare_settings.py",
        lambda: compare(parse_arguments(sys.argv[1:] if argv is None else argv)),
        interrupted="interrupted; the rows measured so far are kept",
    )


def parse_arguments(argv: list[str]) -> Arguments:
    """The arguments, if they make sense."""
    parser = make_parser((LoadArguments, TextArguments, SettingsArguments), "compare_settings.py", __doc__)
    load, text, given = parse(parser, argv)
    check_numbers(vars(given), may_be_zero=set())
    if text.text and text.dataset_name:
        raise UsageError("give --text or --dataset_name, not both.")
    small = load.model is None
    start = MuseConfig(**SMALL_MUSE) if small else MuseConfig()
    settings = settings_of(titles(small) if given.attention is None else given.attention, start)
    lengths = sorted(set(given.lengths or (SMALL_LENGTHS if small else LENGTHS)))
    shortest_block = min(config.local_block for config in settings.values())
    if lengths[0] <= shortest_block:
        raise UsageError(
            f"{lengths[0]} tokens are not more than local_block={shortest_block}, so that all settings would "
            "attend exactly: give greater --lengths or a smaller local_block."
        )
    output = Path(given.output or next_free(DEFAULT_OUTPUT.with_suffix(".csv")).with_suffix(""))
    csv = output.with_name(output.name + ".csv")
    for path in (csv, picture_beside(csv)):
        if path.exists():
            raise UsageError(f"{str(path)!r} exists already and is not overwritten; choose another --output.")
    return Arguments(
        load=load,
        text=text,
        settings=settings,
        lengths=lengths,
        longest_loss=given.longest_loss,
        rows=given.rows,
        csv=csv,
        command=f"python examples/compare_settings.py {shlex.join(argv)}".rstrip(),
    )


def titles(small: bool) -> list[str]:
    """The built-in settings as --attention says them, those first that a run cut short should have.

    Last come those without Triton kernels, of which the slow reference tells the loss.
    """
    varied, blocks = (SMALL_VARIED, SMALL_PAPER) if small else (VARIED, PAPER)
    paper = [f"muse:setting=paper:{block}" for block in blocks]
    *variants, without_kernels = [[f"{title}:{change}" for title in paper] for change in VARIANTS_OF_PAPER]
    return [
        "muse",
        *paper,
        *(f"muse:{name}={value}" for name, values in varied.items() for value in values),
        *(title for variant in variants for title in variant),
        "muse:hierarchy=dyadic",
        *without_kernels,
    ]


def settings_of(titles: Sequence[str], start: MuseConfig) -> dict[str, MuseConfig]:
    """The settings by their titles, which change some options of `start`."""
    if "exact" in titles or not titles:
        raise UsageError("--attention names settings of MuSe; exact attention is measured in any case.")
    return {title: changed_options(title, MuseOptions()).apply(start) for title in titles}


def picture_beside(csv: Path) -> Path:
    return csv.with_suffix(".png")


def compare(arguments: Arguments) -> None:
    """Measure every setting at every length, one row each."""
    corpus = load_texts(arguments.text)
    model, tokenizer = load_model(arguments.load, corpus, arguments.lengths[-1])
    check_model(model)
    longest_loss = arguments.longest_loss or model.config.max_position_embeddings
    texts, hashes = {}, {}
    for length in arguments.lengths:
        count = arguments.rows if length <= longest_loss else 1
        rows = text_rows(unseen_texts(arguments.load, corpus), tokenizer, length, count, needed=count)
        texts[length] = rows.to(model.device)
        hashes[length] = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
    common = {
        "model": arguments.load.model or "small",
        "dtype": str(model.dtype).removeprefix("torch."),
        "gpu": device_name(model.device),
        **{name: version for name, version in environment().items() if name in VERSIONS},
        "command": arguments.command,
    }
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    backend = "triton" if model.device.type == "cuda" else "reference"
    width = max(map(len, arguments.settings))
    steps = len(arguments.settings) * len(texts)
    rows = []
    try:
        with temporary_policy(model), tqdm(total=steps, desc="Comparing settings", unit="row") as bar:
            contexts = {n: context(model, ids, with_loss=n <= longest_loss) for n, ids in texts.items()}
            bar.write(table_head(width))
            for title, config in arguments.settings.items():
                config = config.replace(backend=backend, min_length=0)
                for length, found in contexts.items():
                    row = {"setting": title, "length": length, **measure(model, found, config), **common}
                    row["tokens_sha256"] = hashes[length]
                    append_rows(arguments.csv, [row])
                    rows.append(row)
                    bar.write(table_line(row, width))
                    bar.update()
    finally:
        drawn = plot(rows, picture_beside(arguments.csv))
    print(f"\nrows     {arguments.csv}")
    if drawn:
        print(f"picture  {picture_beside(arguments.csv)}")


def check_model(model: PreTrainedModel) -> None:
    """Refuse a model that cannot be measured with MuSe in all layers."""
    try:
        check_windows(model.config, list(range(model.config.num_hidden_layers)))
    except UnsupportedError as error:
        raise UsageError(f"{str(error).rstrip('.')}.") from error
    if not predicts_next_token(model):
        raise UsageError(f"{type(model).__name__} has no next-token loss.")


def context(model: PreTrainedModel, input_ids: torch.Tensor, with_loss: bool) -> Context:
    """Measure exact attention at one length."""
    times = []
    for backend in EXACT_BACKENDS.get(model.device.type, {}).values():
        with warnings.catch_warnings(), suppress(RuntimeError), sdpa_kernel(backend):
            warnings.simplefilter("ignore")  # PyTorch warns of every reason why a kernel does not serve
            times.append(attention_ms(model, input_ids[:1], muse_hf.exact_attention))
    if not times:  # as in float32 on a GPU
        times.append(attention_ms(model, input_ids[:1], muse_hf.exact_attention))
    return Context(input_ids, min(times), Quality(model, input_ids) if with_loss else None)


def attention_ms(model: PreTrainedModel, row: torch.Tensor, attend: Attend) -> float:
    """Time of an attention in all layers, forward and backward, where the model itself attends exactly.

    Args:
        row: (1, N) tokens.
        attend: As `muse_hf.exact_attention`.
    """
    times = []

    def observe(module: torch.nn.Module, query, key, value, is_causal: bool, scale: float) -> None:
        call = partial(attend, is_causal=is_causal, scale=scale)
        times.append(attention_milliseconds(call, (query, key, value), with_backward=True, in_a_row=IN_A_ROW))

    model.config.muse = MuseConfig(layers=[])
    with observed_attention(observe):
        hidden_states(model, row)
    return sum(times)


def measure(model: PreTrainedModel, context: Context, config: MuseConfig) -> dict[str, Any]:
    """The columns of a setting at one length; what could not be measured is None, and a reason says why.

    `loss_increase` and its standard error `loss_error` are relative to `exact_loss`, in nats per token.
    """
    quality, found, reason = context.quality, {}, ""
    try:
        check_input(model, context.input_ids, [config])
        try:
            ms = attention_ms(model, context.input_ids[:1], partial(muse_hf.muse_attention, config=config))
            found = {"muse_ms": ms, "speedup": context.exact_ms / ms}
        except NotImplementedError as error:
            reason, config = f"not timed: {one_line(error)}", config.replace(backend="reference")
        if quality:
            _, increase, error = quality.change(config)
            found |= {"loss_increase": increase, "loss_error": error}
    except InputError as error:
        reason = f"refused: {one_line(error)}"
    except Exception as error:  # the other settings are worth measuring
        reason = f"failed: {type(error).__name__}: {one_line(error)}"
    return {
        **setting_columns(config),
        "exact_ms": context.exact_ms,
        **{name: found.get(name) for name in ("muse_ms", "speedup", "loss_increase", "loss_error")},
        "exact_loss": quality and quality.exact_loss,
        "rows": len(context.input_ids) if quality else 0,
        "reason": reason,
    }


def setting_columns(config: MuseConfig) -> dict[str, Any]:
    """The fields of a setting that is used in all layers."""
    fields = {name: value for name, value in config.to_dict().items() if name not in ("layers", "min_length")}
    if config.num_clusters is None:
        fields["cluster_size"] = config.cluster_size or DEFAULT_CLUSTER_SIZE
    return fields


if __name__ == "__main__":
    sys.exit(main())
