"""The command `muse-hf`: what MuSe attention would do to a model, and running other programs with it."""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from muse_hf.choosing import recommend_config
from muse_hf.config import DEFAULT_CLUSTER_SIZE, MuseConfig
from muse_hf.environment import environment
from muse_hf.evaluation import evaluate_policy
from muse_hf.models import InputError, check_length, is_encoder
from muse_hf.patches import PatchReport, patch_model
from muse_hf.profiling import profile_layers
from muse_hf.routing import UnsupportedError, check_family, model_policy
from muse_hf.running import run_program
from muse_hf.text import UsageError, token_rows

_DESCRIPTION = """\
Multipole Semantic Attention for Transformers models.

  muse-hf profile MODEL --text book.txt --length 8192         what each layer and head would lose
  muse-hf recommend MODEL --text book.txt --length 8192       which setting to use at this length
  muse-hf evaluate MODEL --text book.txt --length 8192 --layers auto --calibration other.txt --save patched
  muse-hf run -- lm_eval --model hf --model_args pretrained=MODEL,attn_implementation=muse --tasks boolq
  muse-hf env                                                 for bug reports

MODEL is a folder or a name on the Hub. Use text that the model was not trained on, of the kind and length
that you are going to use. Exit codes: 0 done, 2 it could not be done and one sentence says why.
"""

_RUN = """\
Run another Python program in this process, with attn_implementation="muse" known to Transformers.

  muse-hf run -- train.py --model_name_or_path gpt2 --attn_implementation muse
  muse-hf run -- python train.py ...              the same; the interpreter is always this one
  muse-hf run -- -m package.module ...
  muse-hf run -- lm_eval ...                      a console command, if it is written in Python

Launchers start processes of their own, so start this command inside of them:
  accelerate launch -m muse_hf run -- train.py ...
  torchrun --nproc-per-node 8 -m muse_hf run -- train.py ...
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except (UsageError, InputError, UnsupportedError) as error:
        print(f"muse-hf: error: {str(error).rstrip('.')}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("muse-hf: interrupted.", file=sys.stderr)
        return 130
    return 0


def _profile(arguments: argparse.Namespace) -> None:
    if arguments.heat_map:
        with _refusals(ImportError):  # before the work, not after it
            importlib.import_module("muse_hf.plots")
    if arguments.layers == "auto":
        raise UsageError(
            "--layers auto chooses settings, which is for evaluate; profile tries one in each layer"
        )
    model, input_ids = _model_and_text(arguments)
    profile = profile_layers(model, input_ids, _policy(arguments, model))
    if arguments.heat_map:
        with _refusals(OSError, ValueError):
            profile.plot(arguments.heat_map)
    _show(arguments, profile)


def _recommend(arguments: argparse.Namespace) -> None:
    found = []
    for length in sorted(set(arguments.lengths)):
        arguments.length = length
        model, input_ids = _model_and_text(arguments)
        found.append(recommend_config(model, input_ids, arguments.max_loss_increase))
        if not arguments.json:
            print(found[-1], end="\n\n" if length < max(arguments.lengths) else "\n")
    if arguments.json:
        print(json.dumps([recommendation.to_dict() for recommendation in found], indent=2))


def _evaluate(arguments: argparse.Namespace) -> None:
    if arguments.save and os.path.exists(arguments.save):
        raise UsageError(f"{arguments.save!r} exists already and is not overwritten")
    model, input_ids = _model_and_text(arguments)
    if arguments.save:
        with _refusals(OSError):  # before the work, not after it
            os.makedirs(os.path.dirname(os.path.abspath(arguments.save)), exist_ok=True)
    report = _patched(arguments, model)
    evaluation = evaluate_policy(model, input_ids, model_policy(model.config))
    if arguments.save:
        model.save_pretrained(arguments.save)
        _tokenizer(arguments).save_pretrained(arguments.save)
    if arguments.json:
        chosen = (
            {"choice": asdict(report.choice) | {"policy": report.choice.policy.to_dict()}}
            if report.choice
            else {}
        )
        print(json.dumps(evaluation.to_dict() | chosen, indent=2))
    else:
        print(f"{report}\n\n{evaluation}")


def _patched(arguments: argparse.Namespace, model: PreTrainedModel) -> PatchReport:
    """The report of having patched the model as --layers and --calibration say."""
    policy = _policy(arguments, model)
    if arguments.layers != "auto":
        return patch_model(model, config=policy)
    if not arguments.calibration:
        raise UsageError("--layers auto needs --calibration, other text than --text")
    calibration = token_rows(arguments.calibration, _tokenizer(arguments), arguments.length, arguments.rows)
    return patch_model(
        model, "auto", policy, max_loss_increase=arguments.max_loss_increase, calibration=calibration
    )


def _environment(arguments: argparse.Namespace) -> None:
    found = environment()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        text = ", ".join(value) if isinstance(value, list) else value
        print(f"{name:14}{text or 'none'}")


def _run(arguments: argparse.Namespace) -> None:
    words = arguments.words
    run_program(words[1:] if words[:1] == ["--"] else words)


def _show(arguments: argparse.Namespace, result: Any) -> None:
    print(json.dumps(result.to_dict(), indent=2) if arguments.json else result)


@contextmanager
def _refusals(*errors: type[Exception]) -> Iterator[None]:
    """Turn errors of these types, about what the user gave, into one sentence."""
    try:
        yield
    except errors as error:
        raise UsageError(str(error).strip().split("\n")[0]) from error


def _model_and_text(arguments: argparse.Namespace) -> tuple[PreTrainedModel, torch.Tensor]:
    """The model on its device, and the text as (rows, length) tokens; what is cheap is checked first."""
    if arguments.length < 1 or arguments.rows < 1:
        raise UsageError("--length and --rows must be at least 1")
    try:
        config = AutoConfig.from_pretrained(arguments.model)
    except (OSError, ValueError) as error:
        if os.path.exists(os.path.join(arguments.model, "adapter_config.json")):
            raise UsageError(
                f"{arguments.model!r} is a PEFT adapter: merge_and_unload it into its model, and save that"
            ) from error
        raise UsageError(f"no model could be opened at {arguments.model!r}") from error
    check_family(config)
    check_length(config, arguments.length)
    input_ids = token_rows(arguments.text, _tokenizer(arguments), arguments.length, arguments.rows)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = arguments.dtype or ("float32" if device == "cpu" else "auto")
    model_class = AutoModel if is_encoder(config) else AutoModelForCausalLM
    with _refusals(OSError, ValueError, RuntimeError, AssertionError, SafetensorError):
        model = model_class.from_pretrained(arguments.model, dtype=dtype, attn_implementation="sdpa")
        return model.to(device).eval(), input_ids


def _tokenizer(arguments: argparse.Namespace) -> Any:
    name = arguments.tokenizer or arguments.model
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UsageError(f"no tokenizer could be opened at {name!r} (see --tokenizer)") from error


def _policy(arguments: argparse.Namespace, model: PreTrainedModel) -> MuseConfig:
    """The model's own policy or the default one, changed by the options that were given."""
    fields = ("num_retrieved", "retrieval_threshold", "cluster_size", "local_block", "min_length")
    given = {name: value for name in fields if (value := getattr(arguments, name, None)) is not None}
    if arguments.layers in ("all", "auto"):
        given["layers"] = None
    elif arguments.layers is not None:
        try:
            given["layers"] = [int(number) for number in arguments.layers.split(",")]
        except ValueError:
            raise UsageError(
                f"--layers {arguments.layers!r} must be all, auto, or numbers such as 2,3"
            ) from None
    with _refusals(ValueError, TypeError):
        policy = (MuseConfig.paper() if arguments.paper else model_policy(model.config)).replace(**given)
        policy.layer_indices(model.config.num_hidden_layers)
        return policy


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and shows defaults, except "(default: None)"."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("muse-hf", description=_DESCRIPTION, formatter_class=_HelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Callable, help: str, description: str = "") -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=help, description=description or help, formatter_class=_HelpFormatter
        )
        added.set_defaults(command=function)
        return added

    profile = command("profile", _profile, "Compare MuSe with exact attention in each layer and head.")
    _add_model(profile)
    _add_policy(profile, "Layers to try: all, or numbers such as 2,3 (default: those of the model, or all).")
    profile.add_argument(
        "--heat-map", metavar="FILE", help="Draw errors by layer and head (.png, .svg, .pdf)."
    )

    evaluate = command("evaluate", _evaluate, "Compare loss by position and prefill time of the whole model.")
    _add_model(evaluate)
    _add_policy(
        evaluate,
        "Layers that use MuSe: all, numbers such as 2,3, or auto, which measures on --calibration and gives "
        "every layer the fastest setting within the budget (default: those of the model, or all).",
    )
    evaluate.add_argument("--min-length", type=int, help="Shorter sequences are attended exactly (0: none).")
    evaluate.add_argument("--calibration", nargs="+", metavar="FILE", help="Text for --layers auto.")
    _add_budget(evaluate)
    evaluate.add_argument("--save", metavar="FOLDER", help="Save the patched model, with its policy, there.")

    recommend = command(
        "recommend", _recommend, "Measure settings for all layers, and name the best one at each length."
    )
    _add_model(recommend, several_lengths=True)
    _add_budget(recommend)

    env = command("env", _environment, "Print versions, devices, and the backend and why: for bug reports.")
    env.add_argument("--json", action="store_true", help="Print JSON.")

    run = command("run", _run, "Run another Python program with the plug-in registered.", _RUN)
    run.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="The program and its arguments."
    )
    return parser


def _add_model(parser: argparse.ArgumentParser, several_lengths: bool = False) -> None:
    parser.add_argument("model", metavar="MODEL", help="A folder or a name on the Hub.")
    parser.add_argument(
        "--text", nargs="+", required=True, metavar="FILE", help="UTF-8 files, or folders of them."
    )
    several = {"nargs": "+", "dest": "lengths"} if several_lengths else {}
    parser.add_argument("--length", type=int, required=True, metavar="N", help="Tokens in a row.", **several)
    parser.add_argument("--rows", type=int, default=1, help="Rows of that length to take from the text.")
    parser.add_argument("--tokenizer", metavar="NAME", help="If the model comes without one.")
    parser.add_argument("--device", help="Such as cuda or cpu (default: cuda where there is one).")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="Precision (default: that of the model's files, on the CPU float32).",
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of tables.")


def _add_policy(parser: argparse.ArgumentParser, layers: str) -> None:
    parser.add_argument("--layers", metavar="LAYERS", help=layers)
    usual = MuseConfig()
    parser.add_argument(
        "--num-retrieved",
        type=int,
        help="Clusters each query attends to exactly, at most (default here and below: the model's own, else "
        f"{usual.num_retrieved}).",
    )
    parser.add_argument(
        "--retrieval-threshold",
        type=float,
        help="Of these, only those whose summary misses at least this share of a query's attention; 0: all "
        f"({usual.retrieval_threshold}).",
    )
    parser.add_argument(
        "--cluster-size", type=int, help=f"Mean number of keys in a cluster ({DEFAULT_CLUSTER_SIZE})."
    )
    parser.add_argument(
        "--local-block", type=int, help=f"Tokens attended exactly around each token ({usual.local_block})."
    )
    parser.add_argument("--paper", action="store_true", help="Start from the paper's setting instead.")


def _add_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-loss-increase", type=float, default=0.002, help="Budget, relative to exact attention's loss."
    )
