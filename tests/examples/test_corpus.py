"""What is trained on: documents, the windows they are packed into, and which of them are held out."""

import itertools

import numpy as np
import torch
from corpus import pack, read_files, standard_library_files, tokenize, training_windows


def test_packing_keeps_every_token_once_and_ends_every_document():
    documents = [[1, 2, 3], [4], [], [5, 6, 7, 8, 9, 10, 11], [12, 13]]
    stream = [1, 2, 3, 0, 4, 0, 0, 5, 6, 7, 8, 9, 10, 11, 0, 12, 13, 0]
    for length in (1, 2, 4, 5, 18, 19):
        windows = list(pack(documents, end=0, length=length))
        full = len(stream) // length * length
        assert all(window.shape == (length,) for window in windows), f"a window is not {length} tokens long"
        packed = [token for window in windows for token in window.tolist()]
        assert packed == stream[:full], f"windows of {length} tokens are not the documents in order: {packed}"


def test_windows_spell_out_the_training_documents(corpus, tokenizer):
    texts = list(corpus.texts(held_out=False))
    windows = training_windows(corpus, tokenizer, length=64, count=10**6, streaming=False)
    tokens = np.concatenate([window["input_ids"] for window in windows])
    decoded = tokenizer.decode(tokens).split(tokenizer.eos_token)
    assert decoded[:-1] == texts[: len(decoded) - 1], "the windows do not spell out the documents in order"
    assert len(texts) - len(decoded) <= 1, "documents are missing at the end"


def test_streamed_windows_are_those_in_memory(corpus, tokenizer):
    kept = training_windows(corpus, tokenizer, length=64, count=10, streaming=False)
    streamed = training_windows(corpus, tokenizer, length=64, count=10, streaming=True)
    for index, (one, other) in enumerate(zip(kept, itertools.islice(streamed, 10))):
        assert torch.equal(one["input_ids"], other["input_ids"]), f"window {index} differs when streaming"


def test_held_out_documents_are_never_trained_on(corpus, folder):
    training, held_out = (set(corpus.texts(held_out=share)) for share in (False, True))
    everything = {path.read_text() for path in folder.iterdir()}
    assert not training & held_out, "documents are both trained on and held out"
    assert training | held_out == everything, "documents are in neither share"
    assert len(held_out) == len(everything) // 5, (
        f"{len(held_out)} of {len(everything)} documents are held out"
    )


def test_end_of_text_inside_a_document_is_text(tokenizer):
    text = f"one {tokenizer.eos_token} two"
    (tokens,) = tokenize([text], tokenizer)
    assert tokenizer.eos_token_id not in tokens, "a document can forge the end of a document"
    assert tokenizer.decode(tokens) == text


def test_unreadable_files_are_left_out(tmp_path):
    for name, content in {"a": b"text", "b": b"\xff\xfe\xfa", "c": b"nul\0nul", "d": b"  \n"}.items():
        (tmp_path / name).write_bytes(content)
    assert [document["text"] for document in read_files(sorted(map(str, tmp_path.iterdir())))] == ["text"]


def test_the_default_corpus_is_the_standard_library():
    files = standard_library_files()
    names = {path.name for path in files}
    assert {"argparse.py", "dataclasses.py"} <= names, "modules of the standard library are missing"
    assert files == sorted(files), "the order of the files depends on the file system"
    assert not [path for path in files if "site-packages" in path.parts], (
        "installed packages are in the corpus"
    )
