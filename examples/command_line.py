"""What the command lines of the examples share: errors in a sentence, options with help, MuSe's options."""

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser


class UsageError(Exception):
    """The arguments or the data do not allow the run; the message is one sentence for the user."""


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class MuseOptions:
    """Fields of a `muse_hf.MuseConfig`. One that is left out keeps its value in the script's own setting."""

    setting: Literal["default", "paper"] | None = option(
        None,
        "Start from the default of muse_hf.MuseConfig, or from the paper's setting (64 tilted clusters, "
        "dipole, blocks of 8192, no retrieval), instead; the options below still change it.",
    )
    local_block: int | None = option(
        None, "Tokens attended exactly around each token, and in the smallest far block."
    )
    hierarchy: Literal["flat", "dyadic"] | None = option(
        None, "Far blocks of equal length, or doubling in length with distance."
    )
    cluster_size: int | None = option(None, "Mean number of keys in a cluster.")
    num_clusters: int | None = option(
        None, "Clusters of a far block, whatever its length, instead of a size."
    )
    num_retrieved: int | None = option(
        None, "Clusters that every query attends to exactly, at most; more is slower and closer to exact."
    )
    retrieval_threshold: float | None = option(
        None,
        "Retrieve only clusters whose summary misses at least this share of a query's attention; 0: all.",
    )
    summaries: Literal["plain", "tilted"] | None = option(
        None, "Clusters summed up by their means, or weighted for groups of similar queries."
    )
    multipole: Literal["monopole", "dipole"] | None = option(
        None, "Values of a cluster constant, or linear in the query, for tilted summaries."
    )
    query_centroids: Literal["past", "own"] | None = option(
        None,
        "Tilted summaries use query groups of the earlier block, or of the attending block as in the paper, "
        "which is not strictly causal.",
    )
    kmeans_iters: int | None = option(None, "Times that k-means updates its centroids.")
    cluster_cap: float | None = option(
        None, "Largest cluster, as a multiple of the mean size; the paper's setting has no limit."
    )

    def apply(self, setting: Any) -> Any:
        """The `muse_hf.MuseConfig` asked for, starting from `setting` unless --setting names another one."""
        names = {field.name for field in dataclasses.fields(MuseOptions)} - {"setting"}
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        try:
            named = {None: setting, "default": type(setting)(), "paper": type(setting).paper()}
            return named[self.setting].replace(**given)
        except ValueError as error:
            raise UsageError(f"{error}.") from error


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and shows defaults, except "(default: None)"."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def make_parser(groups: Sequence[type], script: str, description: str) -> HfArgumentParser:
    """A parser of the options in some dataclasses."""
    return HfArgumentParser(
        groups,
        description=description,
        usage=f"python examples/{script} [options]",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )


def exit_code(script: str, work: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Do the work of a script; what keeps it from being done becomes one sentence and an exit code.

    Args:
        work: Returns an exit code, or None for 0.
        interrupted: What to say after Ctrl-C.
    """
    try:
        return work() or 0
    except UsageError as error:
        print(f"\n{script}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{script}: {interrupted}.", file=sys.stderr)
        return 130


def parse(parser: HfArgumentParser, argv: list[str] | None) -> list[Any]:
    """One instance of each of the parser's dataclasses."""
    *groups, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise UsageError(f"there is no argument {unknown[0]!r} (see --help).")
    return groups


def check_numbers(values: Mapping[str, Any], may_be_zero: set[str]) -> None:
    """Refuse numbers that make no sense, alone or in a list."""
    for name, given in values.items():
        for value in given if isinstance(given, list) else [given]:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"--{name} {value} is not a finite number.")
            if value < 0 or (value == 0 and name not in may_be_zero):
                raise UsageError(f"--{name} {value} is too small.")


def next_free(path: Path) -> Path:
    """The path, or the first of path-2, path-3, ... where nothing exists."""
    number, free = 1, path
    while os.path.exists(free):
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free
