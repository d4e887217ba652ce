"""Text for the examples to read, and a run that several tests look at."""

import os
import random
from pathlib import Path

import datasets
import pytest

from tests.examples.running import interruptible, run

# isort: split
from corpus import file_corpus, text_files, train_tokenizer


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Tokenised text goes into a folder of the tests', also that of processes they start."""
    path = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", path)
        patch.setitem(os.environ, "HF_DATASETS_CACHE", path)
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder of 40 small documents of words, the same every time."""
    path = tmp_path_factory.mktemp("text")
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh", k=generator.randint(2, 6))) for _ in range(60)]
    for index in range(40):
        path.joinpath(f"{index:02}.txt").write_text(" ".join(generator.choices(words, k=300)))
    return path


@pytest.fixture(scope="session")
def tokenizer(folder):
    return train_tokenizer((path.read_text() for path in sorted(folder.iterdir())), 320, 20000)


@pytest.fixture
def corpus(folder):
    return file_corpus(text_files([str(folder)], "*"), held_out_every=5)


@pytest.fixture(scope="session")
def uninterrupted(folder, tmp_path_factory) -> Path:
    """A finished run with exact attention: accumulation, several epochs, checkpoints."""
    output = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert run(*interruptible(folder, output)) == 0
    return output
