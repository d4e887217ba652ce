"""From text to training windows: files or a `datasets` name -> documents -> tokens -> packed windows."""

import itertools
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from accelerate.utils import tqdm
from command_line import UsageError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

if TYPE_CHECKING:  # `datasets` is imported where it is used: evaluating on local files needs none
    from datasets import Dataset, IterableDataset

END_OF_TEXT = "<|endoftext|>"
DOCUMENTS_PER_CALL = 64  # the tokenizer's threads share the documents of one call


@dataclass
class Corpus:
    """Documents, of which every `held_out_every`-th is kept out of training.

    Attributes:
        documents: Mappings with the text under `text_column`; can be iterated more than once.
        text_column: Name of the column that holds the text.
        held_out_every: Documents k - 1, 2k - 1, ... (counted from 0) are held out.
    """

    documents: Iterable[dict]
    text_column: str = "text"
    held_out_every: int = 20

    def texts(self, held_out: bool) -> Iterator[str]:
        """The texts of either share, in the order of the documents."""
        for index, document in enumerate(self.documents):
            if (index % self.held_out_every == self.held_out_every - 1) == held_out:
                yield document[self.text_column]


def standard_library_files() -> list[Path]:
    """The Python sources of the running interpreter's standard library, without installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    installed = {"site-packages", "dist-packages"}
    return [path for path in sorted(root.rglob("*.py")) if not installed & set(path.relative_to(root).parts)]


def text_files(paths: Sequence[str], pattern: str) -> list[Path]:
    """Files among `paths` and, for each folder, the files below it that match `pattern`, sorted."""
    found = set()
    for path in map(Path, paths):
        if path.is_dir():
            found.update(
                file
                for file in path.rglob(pattern)
                if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
            )
        elif path.is_file():
            found.add(path)
        else:
            raise UsageError(f"there is no file or folder {str(path)!r}.")
    if not found:
        folders = ", ".join(map(repr, paths))
        raise UsageError(f"there is no file in {folders} that matches --file_pattern {pattern!r}.")
    return sorted(found)


def read_files(files: Sequence[str]) -> Iterator[dict[str, str]]:
    """One document a file; files that are empty or not UTF-8 text are left out."""
    for file in files:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip() and "\0" not in text:
            yield {"text": text}


def file_corpus(files: Sequence[Path], held_out_every: int) -> Corpus:
    """The corpus of local files, in a shuffled order that is the same every time."""
    from datasets import IterableDataset

    names = [str(file) for file in files]
    random.Random(0).shuffle(names)
    # A tuple, because `datasets` takes a list for shards that it may distribute.
    documents = IterableDataset.from_generator(read_files, gen_kwargs={"files": tuple(names)})
    if next(iter(documents), None) is None:
        raise UsageError(f"no readable text was found in {len(files)} files.")
    return Corpus(documents, held_out_every=held_out_every)


def named_corpus(
    name: str, config: str | None, split: str, streaming: bool, text_column: str, held_out_every: int
) -> Corpus:
    """The corpus of a dataset on the Hub or in a local folder, as `datasets.load_dataset` names it."""
    from datasets import load_dataset

    try:
        documents = load_dataset(name, config, split=split, streaming=streaming)
        first = next(iter(documents), None)
    except (FileNotFoundError, ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"the dataset {name!r} could not be loaded ({reason}).") from error
    if first is None:
        raise UsageError(f"split {split!r} of the dataset {name!r} is empty.")
    if not isinstance(first.get(text_column), str):
        raise UsageError(
            f"the dataset {name!r} has no text in a column {text_column!r}; its columns are {sorted(first)} "
            "(see --text_column)."
        )
    return Corpus(documents.select_columns(text_column), text_column, held_out_every)


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_characters: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens from about the first `max_characters` of `texts`."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise UsageError(
            f"--vocab_size {vocab_size} is too small: the bytes and the end-of-text token are "
            f"{len(alphabet) + 1} tokens already."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_characters(texts, max_characters), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def _first_characters(texts: Iterable[str], max_characters: int) -> Iterator[str]:
    left = max_characters
    with tqdm(total=left, desc="Training the tokenizer", unit="char", unit_scale=True, delay=2) as bar:
        for text in texts:
            text = text[:left]
            left -= len(text)
            bar.update(len(text))
            yield text
            if not left:
                return


def tokenize(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The token ids of each text, without special tokens."""
    options = {
        "add_special_tokens": False,
        "split_special_tokens": True,  # "<|endoftext|>" inside a text is text, not the end of a document
        "return_attention_mask": False,
        "return_token_type_ids": False,
        "verbose": False,  # no warning about documents longer than the model: they will be cut in windows
    }
    texts = iter(texts)
    while chunk := list(itertools.islice(texts, DOCUMENTS_PER_CALL)):
        yield from tokenizer(chunk, **options)["input_ids"]


def pack(documents: Iterable[Sequence[int]], end: int, length: int) -> Iterator[np.ndarray]:
    """Concatenate tokenised documents, each followed by the token `end`, and cut full windows.

    Yields:
        int32 arrays (length,). The last tokens, if they fill no window, are dropped.
    """
    buffer = np.empty(0, dtype=np.int32)
    for tokens in documents:
        buffer = np.concatenate([buffer, np.asarray(tokens, dtype=np.int32), np.array([end], dtype=np.int32)])
        full = len(buffer) // length * length
        yield from buffer[:full].reshape(-1, length)
        buffer = buffer[full:]


def packed_windows(
    corpus: Corpus, held_out: bool, tokenizer: PreTrainedTokenizerBase, length: int
) -> Iterator[dict[str, np.ndarray]]:
    """The windows of one share of the corpus, as rows {"input_ids": int32 (length,)}."""
    for window in pack(tokenize(corpus.texts(held_out), tokenizer), tokenizer.eos_token_id, length):
        yield {"input_ids": window}


def training_windows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, length: int, count: int, streaming: bool
) -> "Dataset | IterableDataset":
    """The windows of the training documents, as rows {"input_ids": (length,)}.

    In memory, at most the first `count`, more than a run never uses. If `streaming`, all of them, tokenised
    while they are read.
    """
    from datasets import IterableDataset

    share = {"corpus": corpus, "held_out": False, "tokenizer": tokenizer, "length": length}
    if streaming:
        windows = IterableDataset.from_generator(packed_windows, gen_kwargs=share)
    else:
        windows = _in_memory(packed_windows(**share), count, "Tokenising")
    if next(iter(windows), None) is None:
        raise UsageError(f"the training documents are shorter than one window of {length} tokens.")
    return windows.with_format("torch")


def held_out_windows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, length: int, count: int
) -> "Dataset":
    """The first `count` windows of the held-out documents, or all there are if they are fewer."""
    windows = _in_memory(packed_windows(corpus, True, tokenizer, length), count, "Tokenising held-out text")
    if not len(windows):
        raise UsageError(
            f"the held-out documents (one in {corpus.held_out_every}) are shorter than a window of {length} "
            "tokens; give more documents or a smaller --held_out_every."
        )
    return windows.with_format("torch")


def _in_memory(windows: Iterator[dict[str, np.ndarray]], count: int, description: str) -> "Dataset":
    from datasets import Dataset

    bar = tqdm(itertools.islice(windows, count), desc=description, total=count, unit="window", delay=2)
    return Dataset.from_dict({"input_ids": [window["input_ids"] for window in bar]})
