"""The text that an example reads: files, folders, installed packages, or a `datasets` name."""

from pathlib import Path

from corpus import Corpus, named_corpus, package_folders, read_files, standard_library_files, text_files
from pretrain_arguments import TextArguments


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
