"""The text that an example reads: files, folders, or a `datasets` name."""

from corpus import Corpus, named_corpus, read_files, standard_library_files, text_files
from pretrain_arguments import TextArguments


def load_texts(arguments: TextArguments) -> Corpus:
    """The documents that the arguments name; without any, the source of Python's standard library."""
    if arguments.dataset_name is None:
        files = (
            text_files(arguments.text, arguments.file_pattern) if arguments.text else standard_library_files()
        )
        return Corpus(list(read_files([str(file) for file in files])))
    return named_corpus(
        arguments.dataset_name,
        arguments.dataset_config,
        arguments.dataset_split,
        streaming=True,
        text_column=arguments.text_column,
        held_out_every=Corpus.held_out_every,
    )
