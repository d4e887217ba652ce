"""The corpus of the pretraining example: which files it reads, and that text is tokenised once only."""

import shutil
from pathlib import Path

import datasets
import pytest
import torch

from tests.examples.running import TINY, losses, pretrain, run

# isort: split
import corpus
import texts
from command_line import UsageError
from corpus import file_corpus, held_out_windows, text_files, train_tokenizer, training_windows
from pretrain_arguments import TextArguments


def corpus_of(folder: Path) -> corpus.Corpus:
    return file_corpus(text_files([str(folder)], "*"), held_out_every=5)


@pytest.fixture
def tokenizer(folder):
    return train_tokenizer(corpus_of(folder).texts(held_out=False), 320, 20000)


def refuse(*_):
    raise AssertionError("the text was tokenised again")


def test_text_is_tokenised_once(folder, tokenizer, tmp_path, monkeypatch):
    """Also where the files have moved, and whatever the tokenizer has been used for in between."""
    first = training_windows(corpus_of(folder), tokenizer, length=64, count=30, streaming=False)
    held_out = held_out_windows(corpus_of(folder), tokenizer, length=64, count=4)
    assert first.cache_files, "the windows are in memory"
    tokenizer("a text of many tokens", truncation=True, max_length=8)
    shutil.copytree(folder, tmp_path / "moved")
    monkeypatch.setattr(corpus, "tokenize", refuse)
    moved = corpus_of(tmp_path / "moved")
    again = training_windows(moved, tokenizer, length=64, count=30, streaming=False)
    assert torch.equal(again[:]["input_ids"], first[:]["input_ids"])
    again = held_out_windows(moved, tokenizer, length=64, count=4)
    assert torch.equal(again[:]["input_ids"], held_out[:]["input_ids"])


@pytest.mark.parametrize("changed", ["text", "tokenizer", "length", "count", "share"])
def test_what_is_different_is_tokenised(changed, folder, tokenizer, tmp_path, monkeypatch):
    training_windows(corpus_of(folder), tokenizer, length=64, count=30, streaming=False)
    if changed == "text":
        folder = shutil.copytree(folder, tmp_path / "text")
        (folder / "00.txt").write_text("something else")
    if changed == "tokenizer":
        tokenizer = train_tokenizer(corpus_of(folder).texts(held_out=False), 319, 20000)
    length, count = 65 if changed == "length" else 64, 29 if changed == "count" else 30
    monkeypatch.setattr(corpus, "tokenize", refuse)
    share = (corpus_of(folder), tokenizer, length, count)
    with pytest.raises(AssertionError, match="tokenised again"):
        held_out_windows(*share) if changed == "share" else training_windows(*share, streaming=False)


def test_a_full_disk_is_not_hidden_by_datasets(folder, tokenizer, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus, "tokenize", full)
    with pytest.raises(OSError, match="No space left"):
        training_windows(corpus_of(folder), tokenizer, length=63, count=30, streaming=False)


def test_equal_files_are_one_document(tmp_path):
    for name, text in {"a": "first", "b": "second", "c": "first"}.items():
        (tmp_path / name).write_text(text)
    assert sorted(corpus_of(tmp_path).texts(held_out=False)) == ["first", "second"]


def test_the_texts_alone_decide_their_order(folder, tmp_path):
    for number, path in enumerate(sorted(folder.iterdir(), reverse=True)):
        shutil.copy(path, tmp_path / f"{number}.md")
    for held_out in (False, True):
        assert list(corpus_of(tmp_path).texts(held_out)) == list(corpus_of(folder).texts(held_out))
    files = list(corpus.distinct_files(sorted(map(str, folder.iterdir()))).values())
    assert files != sorted(files), "the documents are in the order of their names"


def test_packages_are_found_by_name_and_not_imported():
    files = texts.files_of(TextArguments(packages=["tokenizers", "json"], file_pattern="*.py"))
    names = {path.parent.name + "/" + path.name for path in files}
    assert {"tokenizers/__init__.py", "json/decoder.py"} <= names
    for name in ("no_such_package", "not.a.name", "this"):
        with pytest.raises(UsageError, match=f"no installed package '{name}'"):
            corpus.package_folders([name])


def test_a_dataset_is_tokenised_once_and_a_stream_every_time(folder, tokenizer, tmp_path, monkeypatch):
    documents = [path.read_text() for path in sorted(folder.iterdir())]
    datasets.Dataset.from_dict({"text": documents}).to_parquet(tmp_path / "train.parquet")

    def windows(streaming):
        named = corpus.named_corpus(str(tmp_path), None, "train", streaming, "text", 5)
        return held_out_windows(named, tokenizer, length=64, count=4)[:]["input_ids"]

    first = windows(streaming=False)
    assert torch.equal(windows(streaming=True), first)
    monkeypatch.setattr(corpus, "tokenize", refuse)
    assert torch.equal(windows(streaming=False), first)
    with pytest.raises(AssertionError, match="tokenised again"):
        windows(streaming=True)


def test_workers_load_the_same_batches(folder, tmp_path):
    where = ["--text", folder, "--attention", "exact", *TINY, "--steps", 6]
    assert run(*where, "--output_dir", tmp_path / "none") == 0
    assert run(*where, "--output_dir", tmp_path / "two", "--num_workers", 2) == 0
    assert losses(tmp_path / "two") == losses(tmp_path / "none")


def test_a_stream_read_by_a_worker_resumes_with_the_same_losses(folder, tmp_path, monkeypatch):
    how = ["--streaming", "--shuffle_buffer", 8, "--num_workers", 2, "--steps", 24, "--checkpoint_every", 5]
    where = ["--text", folder, "--attention", "exact", *TINY, *how]
    assert run(*where, "--output_dir", tmp_path / "whole") == 0
    with monkeypatch.context() as patched:
        patched.setattr(pretrain, "held_out_losses", interrupt)  # in the last step
        assert run(*where, "--output_dir", tmp_path / "broken") == 130
    assert run("--resume", "--output_dir", tmp_path / "broken") == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def interrupt(*_):
    raise KeyboardInterrupt
