"""The long-context evaluation: its tasks, the small model that it makes, what it writes and refuses."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import evaluate_long_context  # noqa: E402
import small_model  # noqa: E402
from long_context_tasks import COPIED_TOKENS, make_tasks, score  # noqa: E402
from pretrain_arguments import TextArguments  # noqa: E402
from texts import load_texts  # noqa: E402

from tests.models import byte_tokenizer, tiny_model  # noqa: E402

TINY = ["--lengths", "256", "320", "--depths", "2", "--samples", "1", "--new_tokens", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models with a tokenizer, and a text of 2400 bytes."""
    path = tmp_path_factory.mktemp("long")
    tiny_model("llama", vocab_size=257).float().save_pretrained(path / "llama")
    tiny_model("gpt2", vocab_size=257).float().save_pretrained(path / "gpt2")
    tiny_model("bert", vocab_size=257).float().save_pretrained(path / "bert")
    for family in ("llama", "gpt2", "bert"):
        byte_tokenizer().save_pretrained(path / family)
    BloomConfig(hidden_size=8, n_head=1, n_layer=1).save_pretrained(path / "bloom")
    path.joinpath("text.txt").write_text("".join(f"Line {n} of the text. " for n in range(120)))
    return path


def run(folder, *arguments, model="llama", text="text.txt") -> int:
    words = ["--model", folder / model, "--text", folder / text, *arguments]
    return evaluate_long_context.main([str(word) for word in words])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_tasks_hide_their_answer_where_they_say():
    tokenizer = byte_tokenizer()
    text = tokenizer("abcdefgh " * 100)["input_ids"]
    tasks = list(make_tasks(tokenizer, len(tokenizer), text, [256, 320], depths=3, samples=2))
    assert len(tasks) == 2 * 2 * (2 * 3 + 1)
    for task in tasks:
        assert task.input_ids.shape == (1, task.length)
        ids = task.input_ids[0].tolist()
        if task.name == "copying":
            assert ids[:COPIED_TOKENS] == ids[-COPIED_TOKENS:]
            assert task.answer == COPIED_TOKENS - 1
            continue
        prompt, answer = tokenizer.decode(ids[: -task.answer]), tokenizer.decode(ids[-task.answer :])
        needle = f"\nThe pass key is{answer}. Remember it.\n"
        assert prompt.count(needle) == 1, prompt
        question = prompt.index("\nWhat is the pass key?")
        assert prompt.index(needle) == round(task.depth * (question - len(needle)))
        assert prompt.endswith("The pass key is")


def test_a_score_is_the_share_of_right_tokens():
    model = tiny_model("llama", vocab_size=257).float()
    task = next(make_tasks(byte_tokenizer(), 257, list(range(200)) * 2, [256], depths=1, samples=1))
    logits = model(input_ids=task.input_ids).logits[0, -task.answer - 1 : -1]
    answer = task.input_ids[0, -task.answer :]
    accuracy, loss = score(model, task)
    assert accuracy == (logits.argmax(-1) == answer).float().mean().item()
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, answer).item(), abs=1e-5)


def test_the_small_model_copies_and_learns(monkeypatch):
    corpus = load_texts(TextArguments(text=[str(EXAMPLES)], file_pattern="*.py"))
    scores = {}
    for steps in (1, 20):
        monkeypatch.setattr(small_model, "STEPS", steps)
        model, tokenizer = small_model.make_small_model(corpus)
        text = tokenizer(" ".join(corpus.texts(held_out=False)))["input_ids"]
        tasks = [
            task
            for task in make_tasks(tokenizer, len(tokenizer), text, [512], 1, 3)
            if task.name == "copying"
        ]
        copied = sum(score(model, task)[0] for task in tasks) / len(tasks)
        assert copied > 0.3, f"after {steps} steps {copied:.0%} of random tokens are copied"
        with torch.no_grad():
            ids = torch.tensor([text[:512]])
            scores[steps] = model(input_ids=ids, labels=ids).loss.item()
    assert scores[20] < scores[1] - 0.5, f"the loss falls only so: {scores}"


@pytest.mark.parametrize("settings", ["everything", "auto"])
def test_a_run_leaves_tables_and_pictures(settings, folder, tmp_path, capsys):
    muse = ["--local_block", 64, "--cluster_size", 8]
    everything = ["--num_retrieved", 999, "--retrieval_threshold", 0]
    muse += {"everything": everything, "auto": ["--layers", "auto"]}[settings]
    assert run(folder, *TINY, *muse, "--output_dir", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    for part in ("MuSe attention in", "loss by position", "right answers", "prefill", "tokens are the same"):
        assert part in printed, printed
    assert ("chosen on 1 x 320 tokens" in printed) == (settings == "auto")
    for name in ("loss_by_position.png", "retrieval.png", "lengths.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "out/settings.json").read_text())["muse"]["local_block"] == 64
    losses = rows(tmp_path / "out/loss_by_position.csv")
    assert [(row["start"], row["end"]) for row in losses][::7] == [("0", "40"), ("280", "320")]
    tasks = rows(tmp_path / "out/tasks.csv")
    assert len(tasks) == 2 * 2 * (2 * 2 + 1)
    assert len(rows(tmp_path / "out/prefill.csv")) == 4
    if settings == "everything":
        for row in losses:
            assert float(row["muse"]) == pytest.approx(float(row["exact"]), abs=1e-4)
        assert "4 of 4 tokens are the same" in printed
        for exact, muse in zip(tasks[:10], tasks[10:]):
            assert float(exact["loss"]) == pytest.approx(float(muse["loss"]), abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "nowhere"}, "could not be opened"),
        ({"model": "bloom"}, "not supported for model type 'bloom'"),
        ({"model": "gpt2"}, "has 128 positions"),
        ({"model": "bert"}, "is an encoder, which does not predict the next token"),
        ({"arguments": ["--local_block", 320]}, "320 tokens are attended exactly"),
        ({"arguments": ["--new_tokens", 320]}, "--new_tokens must be fewer than"),
        ({"text": "nowhere"}, "there is no file or folder"),
        ({"arguments": ["--lengths", 100000]}, "the text fills 0 rows of 100000 tokens, but 2 are needed"),
        ({"arguments": ["--lengths", 100]}, "--lengths must be at least 256"),
        ({"arguments": ["--layers", "7"]}, "layer 7 is out of range"),
        ({"arguments": ["--layers", "none"]}, "--layers 'none' must be"),
        ({"arguments": ["--num_retrieved", -1]}, "MuseConfig.num_retrieved=-1"),
        ({"arguments": ["--output_dir", EXAMPLES]}, "exists already"),
    ],
    ids=str,
)
def test_refusals_are_one_sentence(change, message, folder, capsys):
    arguments = change.pop("arguments", [])
    assert run(folder, *TINY, *arguments, **change) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in line
    assert line.endswith(".")


def test_without_the_plugin_a_sentence_says_so():
    """In one process for both scripts, most of whose time are imports."""
    code = """if True:
        import runpy, sys
        sys.modules["muse_hf"] = None
        for script in ("evaluate_long_context.py", "finetune_lora.py"):
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit as stopped:
                print(script, stopped.code)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=EXAMPLES, capture_output=True, text=True)
    assert done.stdout == "evaluate_long_context.py 2\nfinetune_lora.py 2\n", done.stderr
    assert done.stderr.count("muse_hf cannot be imported") == 2
    assert "Traceback" not in done.stderr
