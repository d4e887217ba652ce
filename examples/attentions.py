"""The attentions that a run trains with, one after the other: exact, and MuSe in one setting or more."""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from command_line import MuseOptions, UsageError, make_parser, parse
from models import muse_settings
from pretrain_arguments import MuseArguments

Options = TypeVar("Options", bound=MuseOptions)


@dataclass(frozen=True)
class Attention:
    """One of them.

    Attributes:
        title: What --attention says: `exact`, `muse`, or `muse` with other options than those of the run.
        layers: Those that use MuSe, as --layers says it; empty for exact attention.
        config: The `muse_hf.MuseConfig`; None for exact attention.
    """

    title: str
    layers: str = ""
    config: Any = None

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return re.sub(r"[^\w.-]+", "-", self.title)


def attentions(titles: Sequence[str], options: MuseArguments) -> list[Attention]:
    """The attentions of a run, from what --attention says and the run's own options of MuSe.

    Raises:
        UsageError: A title is none, one is there twice, or a setting makes no sense.
    """
    found = [_attention(title, options) for title in titles]
    if len({attention.folder for attention in found}) < len(found):
        raise UsageError(f"--attention names one attention twice: {' '.join(titles)}.")
    return found


def _attention(title: str, options: MuseArguments) -> Attention:
    if title == "exact":
        return Attention(title)
    changed = changed_options(title, options)
    return Attention(title, changed.layers, muse_settings(changed))


def changed_options(title: str, options: Options) -> Options:
    """The options of MuSe, some of them changed by what stands after the colons of a title.

    Raises:
        UsageError: The title is not `muse` with options, or one of them makes no sense.
    """
    kind, *changes = title.split(":")
    if kind != "muse" or not all("=" in change for change in changes):
        raise UsageError(
            f"--attention {title!r} must be exact, muse, or muse with options after colons, such as "
            "muse:setting=paper:layers=central."
        )
    parser = make_parser((type(options),), "pretrain.py", "")
    parser.exit_on_error = False
    parser.set_defaults(**dataclasses.asdict(options))
    try:
        (changed,) = parse(parser, [f"--{change}" for change in changes])
    except argparse.ArgumentError as error:
        raise UsageError(f"--attention {title!r}: {error}.") from error
    return changed
