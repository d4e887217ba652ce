"""The text that an example reads: files, folders, installed packages, or a `datasets` name."""

from pathlib import Path

from corpus import Corpus, named_corpus, package_folders, read_files, standard_library_files, text_files
from pretrain_arguments import TextArguments
from transformers import PreTrainedTokenizerBase


def files_of(arguments: TextArguments) -> list[Path]:
    """The files that the arguments name; without any, the source of Python's standard library."""
    paths = [*(arguments.text or []), *package_folders(arguments.packages or [])]
    return text_files(paths, arguments.file_pattern) if paths else standard_library_files()


def load_texts(arguments: TextArguments) -> Corpus:
    """The documents that the arguments name; without any, the source of Python's standard library."""
    if arguments.dataset_name is None:
        return Corpus(list(read_files([str(file) for file in files_of(arguments)])))
    return named_corpus(
        arguments.dataset_name,
        arguments.dataset_config,
        arguments.dataset_split,
        streaming=True,
        text_column=arguments.text_column,
        held_out_every=Corpus.held_out_every,
    )


def with_answer(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokens of a prompt, and of the answer that follows it after a space.

    They are made together where the prompt stays as it is: some tokenizers put a space of their own before
    an answer that stands alone.
    """
    first, both, alone = (
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for text in (prompt, f"{prompt} {answer}", f" {answer}")
    )
    together = both[: len(first)] == first and len(both) > len(first)
    return first, both[len(first) :] if together else alone
