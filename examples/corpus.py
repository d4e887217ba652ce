"""From text to training windows: files or a `datasets` name -> documents -> tokens -> packed windows."""

import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        fingerprint: The same for the same documents only; None if that is not known.
    """

    documents: Iterable[dict]
    text_column: str = "text"
    held_out_every: int = 20
    fingerprint: str | None = None

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


def package_folders(names: Sequence[str]) -> list[str]:
    """The folders of installed packages, which are not imported."""
    folders = []
    for name in names:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UsageError(f"there is no installed package {name!r}.")
        folders += spec.submodule_search_locations
    return folders


def package_versions(names: Sequence[str]) -> dict[str, list[str]]:
    """What of which version the packages are installed with: other versions are other texts."""
    distributions = importlib.metadata.packages_distributions()
    return {
        name: [f"{found} {importlib.metadata.version(found)}" for found in sorted(set(distributions[name]))]
        for name in names
        if name in distributions
    }


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
    """One document a file; files that are empty, not UTF-8 text, or not to be opened are left out."""
    for file in files:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (UnicodeDecodeError, PermissionError):
            continue
        if text.strip() and "\0" not in text:
            yield {"text": text}


def distinct_files(files: Sequence[str]) -> dict[str, str]:
    """The readable files by the hash of their text, of equal ones the first, in the order of the hashes."""
    found: dict[str, str] = {}
    for file in tqdm(files, desc="Reading files", unit="file", delay=2):
        for document in read_files([file]):
            found.setdefault(hashlib.sha256(document["text"].encode()).hexdigest(), file)
    return dict(sorted(found.items()))


def file_corpus(files: Sequence[Path], held_out_every: int) -> Corpus:
    """The corpus of local files: each text once, in an order without meaning that only the texts decide."""
    from datasets import IterableDataset

    found = distinct_files([str(file) for file in files])
    if not found:
        raise UsageError(f"no readable text was found in {len(files)} files.")
    # A tuple, because `datasets` takes a list for shards that it may distribute.
    documents = IterableDataset.from_generator(read_files, gen_kwargs={"files": tuple(found.values())})
    fingerprint = hashlib.sha256("".join(found).encode()).hexdigest()
    return Corpus(documents, held_out_every=held_out_every, fingerprint=fingerprint)


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
    fingerprint = None if streaming else f"{documents._fingerprint} {text_column}"
    return Corpus(documents.select_columns(text_column), text_column, held_out_every, fingerprint)


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
    corpus: Corpus, held_out: bool, tokenizer: PreTrainedTokenizerBase, length: int, count: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """The windows of one share of the corpus, at most `count`, as rows {"input_ids": int32 (length,)}.

    Raises:
        UsageError: The share has no full window.
    """
    windows = pack(tokenize(corpus.texts(held_out), tokenizer), tokenizer.eos_token_id, length)
    if count is not None:
        title = "Tokenising held-out text" if held_out else "Tokenising"
        windows = tqdm(itertools.islice(windows, count), desc=title, total=count, unit="window", delay=2)
    window = None
    for window in windows:
        yield {"input_ids": window}
    if window is None and held_out:
        raise UsageError(
            f"the held-out documents (one in {corpus.held_out_every}) are shorter than a window of {length} "
            "tokens; give more documents or a smaller --held_out_every."
        )
    if window is None:
        raise UsageError(f"the training documents are shorter than one window of {length} tokens.")


def training_windows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, length: int, count: int, streaming: bool
) -> "Dataset | IterableDataset":
    """The windows of the training documents, as rows {"input_ids": (length,)}.

    At most the first `count`, more than a run never uses, from disk. If `streaming`, all of them, tokenised
    while they are read.
    """
    from datasets import IterableDataset

    share = {"corpus": corpus, "held_out": False, "tokenizer": tokenizer, "length": length}
    if not streaming:
        return _tokenised_once(share | {"count": count})
    windows = IterableDataset.from_generator(packed_windows, gen_kwargs=share)
    next(iter(windows))  # has it fail now if there is none
    return windows.with_format("torch")


def held_out_windows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, length: int, count: int
) -> "Dataset":
    """The first `count` windows of the held-out documents, or all there are if they are fewer."""
    share = {"corpus": corpus, "held_out": True, "tokenizer": tokenizer, "length": length, "count": count}
    return _tokenised_once(share)


def _tokenised_once(share: dict[str, Any]) -> "Dataset":
    """The `packed_windows` of a share, memory-mapped, from where `datasets` keeps them for later runs."""
    from datasets import Dataset, Features, List, Value
    from datasets.exceptions import DatasetGenerationError

    corpus, tokenizer = share["corpus"], share["tokenizer"]
    if corpus.fingerprint is None or not tokenizer.is_fast:  # what cannot be told apart is not cached
        windows = [window["input_ids"] for window in packed_windows(**share)]
        return Dataset.from_dict({"input_ids": windows}).with_format("torch")
    # All that the windows depend on. `datasets` would hash the tokenizer with its state, which use changes.
    numbers = (corpus.held_out_every, share["held_out"], share["length"], share["count"])
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    parts = [corpus.fingerprint, json.dumps(rules), str(numbers), Path(__file__).read_text(encoding="utf-8")]
    try:
        windows = Dataset.from_generator(
            packed_windows,
            features=Features({"input_ids": List(Value("int32"), length=share["length"])}),
            gen_kwargs=share,
            fingerprint=hashlib.sha256("\0".join(parts).encode()).hexdigest(),
        )
    except DatasetGenerationError as error:  # says nothing; its cause is a UsageError, or a full disk
        raise error.__cause__ or error from None
    return windows.with_format("torch")
