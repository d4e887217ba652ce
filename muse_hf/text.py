"""Text files -> rows of token ids, for the command line."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

# Characters of text looked at for each token, and tokens at the end of a piece that the cut may change.
_CHARACTERS, _CUT = 8, 16


class UsageError(Exception):
    """What was asked for cannot be done; the message is one sentence for the user."""


def token_rows(
    paths: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, rows: int
) -> torch.Tensor:
    """The first `rows` x `length` tokens of files, and of all text files below folders, joined in order.

    A file ends with the tokenizer's end-of-text token, if it has one. Below folders, hidden files and those
    that are not UTF-8 are left out.

    Raises:
        UsageError: A path does not exist or is a file that is not UTF-8, or the text is too short.
    """
    tokens: list[int] = []
    for text in _texts(paths):
        missing = rows * length - len(tokens)
        # Of a large file the beginning is enough, and a little more: at its end tokens may be cut.
        head = text[: _CHARACTERS * (missing + 1)]
        found = _tokens(tokenizer, head)
        if len(head) < len(text) and len(found) <= missing + _CUT:
            found = _tokens(tokenizer, text)
        tokens += found
        if tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
        if len(tokens) >= rows * length:
            return torch.tensor(tokens[: rows * length]).view(rows, length)
    raise UsageError(
        f"the text has {len(tokens)} tokens, fewer than {rows} x {length}: give more text or a smaller "
        "--length"
    )


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _texts(paths: Sequence[str]) -> Iterator[str]:
    for path in map(Path, paths):
        if not path.exists():
            raise UsageError(f"there is no file or folder {str(path)!r}")
        files = sorted(_visible_files(path)) if path.is_dir() else [path]
        for file in files:
            try:
                yield file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                if file == path:
                    raise UsageError(f"{str(path)!r} is not UTF-8 text") from error


def _visible_files(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts):
            yield file
