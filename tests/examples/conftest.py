"""Text for the examples to read."""

import random
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder of 40 small documents of words, the same every time."""
    path = tmp_path_factory.mktemp("text")
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh", k=generator.randint(2, 6))) for _ in range(60)]
    for index in range(40):
        path.joinpath(f"{index:02}.txt").write_text(" ".join(generator.choices(words, k=300)))
    return path
