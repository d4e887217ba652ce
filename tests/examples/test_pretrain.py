"""The pretraining example: packing, resuming, refusing, and everything that a run must leave behind."""

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.examples.running import EXAMPLES, TINY, TINY_MUSE, losses, pretrain, rows, run

# isort: split
from corpus import (
    file_corpus,
    held_out_windows,
    pack,
    read_files,
    standard_library_files,
    text_files,
    tokenize,
    train_tokenizer,
    training_windows,
)
from models import build_model, model_config, parameter_groups
from pretrain_arguments import (
    Arguments,
    DataArguments,
    ModelArguments,
    MuseArguments,
    RunArguments,
    with_resolved_paths,
)
from report import summarize, summary_text


@pytest.fixture(scope="module")
def tokenizer(folder):
    return train_tokenizer((path.read_text() for path in sorted(folder.iterdir())), 320, 20000)


@pytest.fixture
def corpus(folder):
    return file_corpus(text_files([str(folder)], "*"), held_out_every=5)


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


@pytest.mark.parametrize("shape", ["gpt2-tiny", "llama-tiny"])
def test_shapes_build_without_dropout(shape, tokenizer):
    config = model_config(ModelArguments(shape=shape, num_layers=1, hidden_size=64), tokenizer, 128)
    torch.manual_seed(0)
    model = build_model(None, config).train()
    ids = torch.randint(len(tokenizer), (2, 128), generator=torch.Generator().manual_seed(0))
    first, second = (model(input_ids=ids, labels=ids).loss.item() for _ in range(2))
    assert first == second, f"{shape} has dropout: two passes give {first} and {second}"
    assert first == pytest.approx(np.log(len(tokenizer)), rel=0.15), (
        f"{shape} does not start from a uniform guess"
    )
    decayed, free = (group["params"] for group in parameter_groups(model, 0.1))
    assert len(decayed) + len(free) == len(list(model.parameters())), "a parameter is in no group or in two"
    embeddings = model.get_input_embeddings().weight
    assert not any(parameter is embeddings for parameter in decayed), f"{shape}'s embeddings are decayed"
    assert all(parameter.ndim >= 2 for parameter in decayed), f"{shape}'s norms or biases are decayed"


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory) -> Path:
    """A finished run with exact attention: accumulation, several epochs, checkpoints."""
    output = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert run(*interruptible(folder, output)) == 0
    return output


def interruptible(folder: Path, output: Path) -> list[str]:
    schedule = "--steps 100 --gradient_accumulation_steps 2 --checkpoint_every 6 --eval_every 25"
    where = ["--text", str(folder), "--output_dir", str(output), "--attention", "exact"]
    return [*where, *TINY, *shlex.split(schedule)]


def test_a_run_leaves_all_its_files_and_learns(uninterrupted):
    for path in shlex.split(
        "config.json summary.json losses.png tokenizer/tokenizer.json exact/losses.csv exact/held_out.csv "
        "exact/result.json exact/model/model.safetensors exact/model/tokenizer.json exact/checkpoint-96"
    ):
        assert (uninterrupted / path).exists(), f"{path} is missing"
    assert list(uninterrupted.glob("tensorboard/exact/events*")), "TensorBoard has no events"
    assert len(list(uninterrupted.glob("exact/checkpoint*"))) == 2, "old checkpoints are not removed"
    assert uninterrupted.joinpath("losses.png").read_bytes()[:4] == b"\x89PNG"

    table = rows(uninterrupted / "exact/losses.csv")
    assert [int(row["step"]) for row in table] == list(range(1, 101)), "not every step has one row"
    assert int(table[-1]["tokens"]) == 100 * 2 * 2 * 64
    start, end = (np.mean([float(row["loss"]) for row in part]) for part in (table[:5], table[-5:]))
    assert end < start - 1, f"the training loss went from {start:.2f} to {end:.2f} only"
    held_out = [float(row["loss"]) for row in rows(uninterrupted / "exact/held_out.csv")]
    assert len(held_out) == 4, f"eval_every=25 in 100 steps gave {len(held_out)} held-out losses"
    summary = json.loads(uninterrupted.joinpath("summary.json").read_text())
    assert summary["exact"]["held_out_loss"] == held_out[-1] < held_out[0]
    assert summary["exact"]["sample"].startswith("def ")


def test_the_saved_model_has_the_held_out_loss_of_the_summary(uninterrupted, corpus):
    result = json.loads(uninterrupted.joinpath("summary.json").read_text())["exact"]
    model = AutoModelForCausalLM.from_pretrained(uninterrupted / result["model"])
    tokenizer = AutoTokenizer.from_pretrained(uninterrupted / result["model"])
    windows = held_out_windows(corpus, tokenizer, length=64, count=4)[:]["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss.item()
    assert loss == pytest.approx(result["held_out_loss"], abs=1e-4)


def test_resuming_after_kill_9_gives_the_same_losses(folder, uninterrupted, tmp_path):
    output = tmp_path / "killed"
    command = [sys.executable, str(EXAMPLES / "pretrain.py"), *interruptible(folder, output)]
    process = subprocess.Popen(
        command,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while process.poll() is None and not list(output.glob("exact/checkpoint-?*")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    printed = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, f"the run ended before it was killed:\n{printed}"
    assert not (output / "exact/result.json").exists(), "the run was complete before it was killed"

    assert run("--resume", "--output_dir", output) == 0
    assert losses(output) == losses(uninterrupted), "the resumed run has other losses"
    held_out = "exact/held_out.csv"
    assert rows(output / held_out) == rows(uninterrupted / held_out), (
        "the resumed run has other held-out losses"
    )
    weights = "exact/model/model.safetensors"
    assert (output / weights).read_bytes() == (uninterrupted / weights).read_bytes(), "the weights differ"


def test_streaming_resumes_with_the_same_losses(folder, tmp_path, monkeypatch, capsys):
    def arguments(output):
        where = ["--text", folder, "--output_dir", output, "--attention", "exact", *TINY]
        return [*where, *shlex.split("--streaming --shuffle_buffer 8 --steps 24 --checkpoint_every 5")]

    assert run(*arguments(tmp_path / "whole")) == 0

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(
            pretrain, "held_out_loss", interrupt
        )  # the last step is where the loss is first held out
        assert run(*arguments(tmp_path / "broken")) == 130
    assert f"go on with --resume --output_dir {tmp_path / 'broken'}." in capsys.readouterr().err
    assert run("--resume", "--output_dir", tmp_path / "broken") == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole"), "the resumed stream has other losses"


def test_a_resumed_run_keeps_its_arguments(uninterrupted, capsys):
    assert run("--resume", "--output_dir", uninterrupted, "--learning_rate", "0.5", "--steps", "7") == 2
    message = capsys.readouterr().err
    assert "learning_rate, steps would differ" in message, message
    assert f"starts anew, for instance with --checkpoint '{uninterrupted / 'exact/model'}'" in message, (
        message
    )
    assert run("--resume", "--output_dir", uninterrupted, "--learning_rate", "0.5") == 2
    assert "anew" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ['{"arguments": {"st', "[]", '{"model_type": "llama"}', '{"arguments": 1}']
)
def test_a_broken_config_is_not_resumed(content, tmp_path, capsys):
    tmp_path.joinpath("config.json").write_text(content)
    assert run("--resume", "--output_dir", tmp_path) == 2
    assert "does not hold its arguments" in capsys.readouterr().err


def test_a_moved_run_resumes_from_another_folder(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder.parent)
    where = ["--text", folder.name, "--output_dir", tmp_path / "old", "--attention", "exact", *TINY]
    assert run(*where, "--steps", 2) == 0
    (tmp_path / "old").rename(tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert run("--resume", "--output_dir", "new") == 0
    printed = capsys.readouterr().out
    for part in ("new/exact/model", "new/losses.png"):
        assert f" {part}\n" in printed, f"{part!r} is not in the printed summary:\n{printed}"


def test_names_of_the_hub_stay_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("mine").mkdir()
    model, data = ModelArguments(checkpoint="gpt2"), DataArguments(tokenizer="mine", dataset_name="some/name")
    arguments = with_resolved_paths(Arguments(model, data, MuseArguments(), RunArguments()))
    assert (arguments.model.checkpoint, arguments.data.dataset_name) == ("gpt2", "some/name")
    assert arguments.data.tokenizer == str(tmp_path / "mine")


def test_an_interrupt_before_the_run_says_that_nothing_was_begun(folder, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "load_corpus", interrupt)
    assert run("--text", folder, "--output_dir", tmp_path / "new", *TINY) == 130
    assert "nothing to resume yet" in capsys.readouterr().err


def test_an_impossible_folder_is_refused_before_anything_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "load_corpus", lambda data: pytest.fail("the text was read first"))
    tmp_path.joinpath("file").write_text("")
    assert run("--output_dir", tmp_path / "file" / "new") == 2
    assert "nothing can be written to" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "the check left something behind"


def test_compare_trains_both_on_the_same_batches(folder, tmp_path, capsys):
    output = tmp_path / "compare"
    where = ["--text", folder, "--output_dir", output, "--compare", *TINY, *TINY_MUSE]
    assert run(*where, "--steps", 40, "--eval_every", 20, "--layers", "-1") == 0
    exact, muse = losses(output, "exact"), losses(output, "muse")
    assert float(muse[0][1]) == pytest.approx(float(exact[0][1]), abs=0.02), (
        "the first batches or weights differ"
    )
    assert [loss for _, loss in exact] != [loss for _, loss in muse], "MuSe attention changed nothing"
    assert float(muse[-1][1]) < float(muse[0][1]) - 0.5, (
        f"MuSe attention does not learn: {muse[0]} to {muse[-1]}"
    )
    assert output.joinpath("losses.png").stat().st_size > 10_000, "the plot is empty"
    summary = json.loads(output.joinpath("summary.json").read_text())
    relative = summary["muse"]["held_out_loss"] / summary["exact"]["held_out_loss"] - 1
    assert summary["muse_relative_to_exact"] == pytest.approx(relative)
    for attention in ("exact", "muse"):
        AutoModelForCausalLM.from_pretrained(output / attention / "model")
        events = list(output.glob(f"tensorboard/{attention}/events*"))
        assert len(events) == 1, f"one training, one TensorBoard file, not {events}"
    printed = capsys.readouterr().out
    for part in (f"{relative:+.2%}", str(output / "losses.png"), str(output / "muse" / "model"), "def "):
        assert part in printed, f"{part!r} is not in the printed summary:\n{printed}"


@pytest.mark.parametrize(("seconds", "slower"), [(0.5, False), (2.0, True)])
def test_the_summary_says_when_muse_was_slower(seconds, slower):
    same = {"held_out_loss": 2.0, "held_out_tokens": 64, "tokens": 128, "tokens_per_second": 128.0}
    same |= {"model": "", "sample": ""}
    results = {"exact": same | {"seconds_per_step": 1.0}, "muse": same | {"seconds_per_step": seconds}}
    printed = summary_text(summarize(results, "losses.png"), Path("run"), context_length=2048)
    assert ("at 2,048 tokens exact attention is faster" in printed) == slower, printed


def test_a_finished_part_of_a_comparison_is_not_trained_again(folder, tmp_path, monkeypatch):
    output = tmp_path / "compare"
    where = ["--text", folder, "--output_dir", output, *TINY, *TINY_MUSE, "--steps", 6]

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pretrain, "use_muse", interrupt)
        assert run(*where) == 130
    before = output.joinpath("exact/losses.csv").stat().st_mtime_ns
    assert run("--resume", "--output_dir", output) == 0
    assert output.joinpath("exact/losses.csv").stat().st_mtime_ns == before, (
        "exact attention was trained again"
    )
    assert len(losses(output, "muse")) == 6


def test_a_checkpoint_trains_on_with_muse_in_low_precision(uninterrupted, folder, tmp_path):
    start = json.loads(uninterrupted.joinpath("summary.json").read_text())["exact"]
    where = ["--text", folder, "--output_dir", tmp_path / "new", "--attention", "muse", *TINY, *TINY_MUSE]
    how = shlex.split(
        "--steps 5 --learning_rate 1e-5 --num_retrieved 16 --mixed_precision bf16 --gradient_checkpointing"
    )
    assert run(*where, "--checkpoint", uninterrupted / start["model"], *how) == 0
    result = json.loads((tmp_path / "new/summary.json").read_text())["muse"]
    assert result["held_out_loss"] == pytest.approx(start["held_out_loss"], abs=0.05), (
        "the weights were not loaded"
    )
    patched = tmp_path / "new/muse/model"
    assert "muse" in json.loads((patched / "config.json").read_text())
    where = ["--text", folder, "--output_dir", tmp_path / "back", "--attention", "exact", *TINY]
    assert run(*where, "--checkpoint", patched, "--steps", 1) == 0
    config = (tmp_path / "back/exact/model/config.json").read_text()
    assert "muse" not in config, f"the exact model has a setting of MuSe:\n{config}"


@pytest.fixture(scope="module")
def other_checkpoints(tokenizer, tmp_path_factory) -> Path:
    """A folder of configs of other families, all that a refusal needs, each with a tokenizer but for one."""
    path = tmp_path_factory.mktemp("checkpoints")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    small |= {"vocab_size": len(tokenizer), "num_key_value_heads": 2}
    neo = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
    for name, family, options in (
        ("windows", "mistral", small | {"sliding_window": 16}),
        ("bert", "bert", small),
        ("t5", "t5", {}),
        ("gpt_neo", "gpt_neo", neo | {"vocab_size": len(tokenizer)}),
        ("no-tokenizer", "gpt2", {}),
    ):
        AutoConfig.for_model(family, **options).save_pretrained(path / name)
        if name != "no-tokenizer":
            tokenizer.save_pretrained(path / name)
    return path


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("windows", "layers [0, 1] of 'mistral' have a sliding window of 16 tokens"),
        ("bert", "a 'bert' model attends to later tokens"),
        ("t5", "cannot be trained: Unrecognized configuration class"),
        ("gpt_neo", "cannot be trained: GPTNeoForCausalLM does not support"),
        ("no-tokenizer", "no-tokenizer'; name another one with --tokenizer"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_first(
    checkpoint, message, folder, other_checkpoints, tmp_path, capsys
):
    """With both attentions, of which only the second is refused: not after the first has been trained."""
    where = ["--text", folder, "--output_dir", tmp_path / "new", *TINY]
    assert run(*where, "--checkpoint", other_checkpoints / checkpoint) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in printed, printed
    assert not (tmp_path / "new").exists(), "a refused run left a folder behind"


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_dropout_of_a_checkpoint_is_turned_off(family, tokenizer, tmp_path):
    drop = {"gpt2": "resid_pdrop", "qwen2": "attention_dropout"}[family]
    AutoConfig.for_model(family, vocab_size=len(tokenizer), **{drop: 0.3}).save_pretrained(tmp_path)
    config = model_config(ModelArguments(checkpoint=str(tmp_path)), tokenizer, 64)
    assert getattr(config, drop) == 0, f"{drop} of a {family} checkpoint stays {getattr(config, drop)}"


def test_a_sample_longer_than_the_window_ends_with_it(folder, tmp_path):
    """GPT-2 has no position for more."""
    where = ["--text", folder, "--output_dir", tmp_path / "new", "--attention", "exact", *TINY]
    assert run(*where, "--shape", "gpt2-tiny", "--steps", 1, "--sample_tokens", 100) == 0


def test_a_named_dataset_is_the_same_streamed_and_not(folder, tmp_path, capsys):
    texts = [path.read_text() for path in sorted(folder.iterdir())]
    dataset = datasets.Dataset.from_dict({"number": range(len(texts)), "body": texts})
    dataset.to_parquet(tmp_path / "dataset" / "train.parquet")
    where = ["--dataset_name", tmp_path / "dataset", "--attention", "exact", *TINY, "--steps", 4]
    assert run(*where, "--output_dir", tmp_path / "none") == 2
    message = capsys.readouterr().err
    assert "no text in a column 'text'; its columns are ['body', 'number']" in message, message

    where += ["--text_column", "body"]
    for name, how in {"whole": [], "streamed": ["--streaming", "--shuffle_buffer", 8]}.items():
        assert run(*where, "--output_dir", tmp_path / name, *how) == 0
    whole, streamed = (read_config(tmp_path / name) for name in ("whole", "streamed"))
    assert whole["held_out_sha256"] == streamed["held_out_sha256"], "other documents are held out"
    first, last = (float(losses(tmp_path / "streamed")[index][1]) for index in (0, -1))
    assert last < first, f"the loss goes from {first} to {last}"


def read_config(output: Path) -> dict:
    return json.loads((output / "config.json").read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU for fp16")
def test_fp16_without_a_gpu_is_refused(folder, tmp_path, capsys):
    """Accelerate would train in float32 without a word."""
    assert run("--text", folder, "--output_dir", tmp_path / "new", *TINY, "--mixed_precision", "fp16") == 2
    assert "fp16 needs a GPU" in capsys.readouterr().err


def test_existing_folder_is_refused_and_untouched(folder, tmp_path, capsys):
    tmp_path.joinpath("mine").write_text("precious")
    assert run("--text", folder, "--output_dir", tmp_path, *TINY) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"], (
        "something was written to the existing folder"
    )


def test_the_current_folder_exists(capsys):
    assert run("--output_dir", "") == 2
    assert "'' exists already" in capsys.readouterr().err


def test_default_folder_is_the_next_free_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("runs/pretrain", "runs/pretrain-2", "runs/pretrain-3"):
        path = pretrain.new_folder(None)
        assert str(path) == expected
        path.mkdir(parents=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "nowhere/at/all"], "there is no file or folder 'nowhere/at/all'"),
        (["--text", "{binary}"], "no readable text"),
        (["--text", "{binary}", "--file_pattern", "*.md"], "binary' that matches --file_pattern '*.md'"),
        (["--vocab_size", "256"], "--vocab_size 256 is too small: "),
        (["--learning_rate", "nan"], "--learning_rate nan is not a finite number"),
        (["--cluster_cap", "inf"], "--cluster_cap inf is not a finite number"),
        (["--context_length", "1000000"], "shorter than one window of 1000000 tokens"),
        (["--held_out_every", "41"], "held-out documents"),
        (["--shape", "bert"], "no shape 'bert': the shapes are llama-tiny"),
        (["--num_heads", "3"], "must be a multiple"),
        (["--layers", "middle"], "--layers 'middle' must be"),
        (["--layers", "7"], "layer 7 is out of range"),
        (["--cluster_size", "512"], "MuseConfig.cluster_size=512"),
        (["--steps", "0"], "--steps 0 is too small"),
        (["--sample_tokens", "0"], "--sample_tokens 0 is too small"),
        (["--prompt", ""], "--prompt has 0 tokens"),
        (["--prompt", "abc " * 100], "fewer than --context_length (64)"),
        (["--epochs", "3"], "no argument '--epochs'"),
        (["--compare", "--attention", "muse"], "not both"),
        (["--resume"], "nothing to resume"),
    ],
)
def test_errors_are_one_sentence(arguments, message, folder, tmp_path, capsys):
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary/zero").write_bytes(b"\0")
    text = [] if "--text" in arguments else ["--text", folder]
    arguments = [argument.format(binary=tmp_path / "binary") for argument in arguments]
    assert run(*text, *TINY, "--output_dir", tmp_path / "new", *arguments) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in printed, printed
    assert printed.endswith("."), printed
    assert not (tmp_path / "new").exists(), "a refused run left a folder behind"


def test_a_diverged_run_says_what_to_try(folder, tmp_path, capsys):
    where = ["--text", folder, "--output_dir", tmp_path / "new", "--attention", "exact", *TINY]
    assert run(*where, "--learning_rate", "1e30", "--steps", 12) == 1
    message = capsys.readouterr().err
    assert "try a lower --learning_rate" in message, message
    assert not list(tmp_path.glob("new/exact/checkpoint*")), "a diverged model was saved"


def test_help_explains_every_argument(capsys):
    with pytest.raises(SystemExit) as exit_info:
        run("--help")
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    assert "PG-19" in printed
    assert "None)" not in printed, "a default is shown as None"
