"""What finetune_lora.py trains on: windows of text, or a task's prompts with answers."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from command_line import UsageError, option
from texts import with_answer
from transformers import PreTrainedTokenizerBase

TEST_EVERY = 5  # of a local file, one row in so many is for testing
NO_LABEL = -100  # Transformers' mark of tokens that have no loss


@dataclass
class TaskArguments:
    _argument_group_name = "Task (instead of text)"

    task_file: str | None = option(
        None, "A JSON-lines file; of each five rows four are trained on and one is tested on."
    )
    task_dataset: str | None = option(None, "Or a dataset for datasets.load_dataset, such as google/boolq.")
    task_config: str | None = option(None, "Configuration of that dataset, if it has several.")
    train_split: str = option("train", "Its split to train on.")
    test_split: str = option("validation", "Its split to test on.")
    prompt: str = option("{prompt}", "Prompt of a row, with names of its fields in braces.")
    answer: str = option("{answer}", "Answer of a row, likewise.")
    test_rows: int = option(50, "Rows to test on.")


@dataclass(frozen=True)
class Example:
    """Tokens (n,) and their labels (n,); of a task only the answer, at the end, has labels."""

    input_ids: torch.Tensor
    labels: torch.Tensor

    @property
    def answer(self) -> torch.Tensor:
        return self.labels[self.labels != NO_LABEL]


def text_examples(rows: torch.Tensor) -> list[Example]:
    """One example for each row (rows, length) of tokens."""
    return [Example(row, row) for row in rows]


def task_examples(
    arguments: TaskArguments, tokenizer: PreTrainedTokenizerBase, length: int, train_rows: int
) -> tuple[list[Example], list[Example]]:
    """Training examples, at most `train_rows`, and test examples of a task.

    Raises:
        UsageError: The task cannot be read.
    """
    if arguments.task_file is not None:
        rows = list(_lines(arguments.task_file))
        train = [row for index, row in enumerate(rows) if index % TEST_EVERY != TEST_EVERY - 1]
        test = rows[TEST_EVERY - 1 :: TEST_EVERY]
    else:
        train, test = (_split(arguments, name) for name in (arguments.train_split, arguments.test_split))
    made = [
        [_example(arguments, tokenizer, row, length) for row in islice(rows, count)]
        for rows, count in ((train, train_rows), (test, arguments.test_rows))
    ]
    if not all(made):
        raise UsageError("the task has too few rows to train and to test on.")
    return made[0], made[1]


def _lines(path: str) -> Iterator[dict[str, Any]]:
    if not Path(path).is_file():
        raise UsageError(f"there is no file {path!r}.")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path!r} is not UTF-8 text.") from error
    lines = text.removesuffix("\n").split("\n")  # what else Python takes for line breaks may be in strings
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UsageError(f"line {number} of {path!r} is not a JSON object.")
        yield row


def _split(arguments: TaskArguments, split: str) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    try:
        return load_dataset(arguments.task_dataset, arguments.task_config, split=split, streaming=True)
    except (FileNotFoundError, ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(
            f"split {split!r} of {arguments.task_dataset!r} could not be loaded ({reason})."
        ) from error


def _example(
    arguments: TaskArguments, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], length: int
) -> Example:
    """Prompt and answer of a row; of a prompt that is too long the start is left out."""
    try:
        prompt, answer = arguments.prompt.format(**row), arguments.answer.format(**row)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"a row has no {error}; its fields are {sorted(row)} (see --prompt).") from error
    prompt_ids, answer_ids = with_answer(tokenizer, prompt.rstrip(), answer.strip())
    answer_ids = answer_ids[: length // 2]
    prompt_ids = prompt_ids[-(length - len(answer_ids)) :]
    if not prompt_ids or not answer_ids:
        raise UsageError("the prompt or the answer of a row is empty (see --prompt and --answer).")
    input_ids = torch.tensor(prompt_ids + answer_ids)
    labels = input_ids.clone()
    labels[: len(prompt_ids)] = NO_LABEL
    return Example(input_ids, labels)
