"""Text files -> rows of token ids, for the command line."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase


class UsageError(Exception):
    """What was asked for cannot be done; the message is one sentence for the user."""


def token_rows(
    paths: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, rows: int
) -> torch.Tensor:
    """The first `rows` x `length` tokens of files, and of all text files below folders, joined in order.

    A file ends with the tokenizer's end-of-text token, if it has one. Files that are not UTF-8 are left out.

    Raises:
        UsageError: A path does not exist, or the text is too short.
    """
    tokens: list[int] = []
    for text in _texts(paths):
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
        if len(tokens) >= rows * length:
            return torch.tensor(tokens[: rows * length]).view(rows, length)
    raise UsageError(
        f"the text has {len(tokens)} tokens, fewer than {rows} x {length}: give more text or a smaller "
        "--length"
    )


def _texts(paths: Sequence[str]) -> Iterator[str]:
    for path in map(Path, paths):
        if not path.exists():
            raise UsageError(f"there is no file or folder {str(path)!r}")
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            try:
                yield file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
