"""The attentions that a run trains with, one after the other: exact, and MuSe in one setting or more."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from command_line import UsageError, make_parser, parse
from models import muse_settings
from pretrain_arguments import MuseArguments


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
    kind, *changes = title.split(":")
    if title == "exact":
        return Attention(title)
    if kind != "muse" or not all("=" in change for change in changes):
        raise UsageError(
            f"--attention {title!r} must be exact, muse, or muse with options after colons, such as "
            "muse:setting=paper:layers=central."
        )
    parser = make_parser((MuseArguments,), "pretrain.py", "")
    parser.set_defaults(**dataclasses.asdict(options))
    (changed,) = parse(parser, [f"--{change}" for change in changes])
    return Attention(title, changed.layers, muse_settings(changed))
