"""The pretraining example: everything that a run must leave behind, and what is refused."""

import json
import shlex
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.examples.running import TINY, TINY_MUSE, losses, pretrain, rows, run

# isort: split
from corpus import held_out_windows
from models import build_model, model_config, parameter_groups
from pretrain_arguments import (
    Arguments,
    DataArguments,
    ModelArguments,
    MuseArguments,
    RunArguments,
    with_resolved_paths,
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
    assert summary["results"]["exact"]["held_out_loss"] == held_out[-1] < held_out[0]
    assert summary["results"]["exact"]["sample"].startswith("def ")


def test_the_saved_model_has_the_held_out_loss_of_the_summary(uninterrupted, corpus):
    result = json.loads(uninterrupted.joinpath("summary.json").read_text())["results"]["exact"]
    model = AutoModelForCausalLM.from_pretrained(uninterrupted / result["model"])
    tokenizer = AutoTokenizer.from_pretrained(uninterrupted / result["model"])
    windows = held_out_windows(corpus, tokenizer, length=64, count=4)[:]["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss.item()
    assert loss == pytest.approx(result["held_out_loss"], abs=1e-4)


def test_names_of_the_hub_stay_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("mine").mkdir()
    model, data = ModelArguments(checkpoint="gpt2"), DataArguments(tokenizer="mine", dataset_name="some/name")
    arguments = with_resolved_paths(Arguments(model, data, MuseArguments(), RunArguments()))
    assert (arguments.model.checkpoint, arguments.data.dataset_name) == ("gpt2", "some/name")
    assert arguments.data.tokenizer == str(tmp_path / "mine")


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
    results = summary["results"]
    relative = results["muse"]["held_out_loss"] / results["exact"]["held_out_loss"] - 1
    assert summary["table"][1]["loss_change"] == pytest.approx(relative)
    for attention in ("exact", "muse"):
        AutoModelForCausalLM.from_pretrained(output / attention / "model")
        events = list(output.glob(f"tensorboard/{attention}/events*"))
        assert len(events) == 1, f"one training, one TensorBoard file, not {events}"
    printed = capsys.readouterr().out
    for part in (f"{relative:+.2%}", str(output / "losses.png"), str(output / "muse" / "model"), "def "):
        assert part in printed, f"{part!r} is not in the printed summary:\n{printed}"


def test_a_checkpoint_trains_on_with_muse_in_low_precision(uninterrupted, folder, tmp_path):
    start = json.loads(uninterrupted.joinpath("summary.json").read_text())["results"]["exact"]
    where = ["--text", folder, "--output_dir", tmp_path / "new", "--attention", "muse", *TINY, *TINY_MUSE]
    how = shlex.split(
        "--steps 5 --learning_rate 1e-5 --num_retrieved 16 --mixed_precision bf16 --gradient_checkpointing"
    )
    assert run(*where, "--checkpoint", uninterrupted / start["model"], *how) == 0
    result = json.loads((tmp_path / "new/summary.json").read_text())["results"]["muse"]
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
        (["--attention", "fast"], "--attention 'fast' must be exact, muse, or muse with options"),
        (["--attention", "muse:paper"], "--attention 'muse:paper' must be"),
        (["--attention", "muse:size=3"], "no argument '--size=3'"),
        (["--attention", "exact", "muse", "exact"], "names one attention twice: exact muse exact"),
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
