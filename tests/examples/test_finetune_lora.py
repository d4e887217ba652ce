"""Adapting a model: what is trained on, what comes back from the saved adapter, and what is refused."""

import json
import sys
import weakref
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from muse_hf import MuseConfig, cli, patch_model, token_losses, unpatch_model
from muse_hf.models import transformers_model

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import finetune_lora  # noqa: E402
from corpus import Corpus  # noqa: E402
from finetune_data import NO_LABEL, TaskArguments, task_examples  # noqa: E402
from pretrained import PretrainedArguments, load_model  # noqa: E402

from tests.models import byte_tokenizer, output_of, tiny_model, tokens  # noqa: E402

TINY = ["--length", 64, "--steps", 40, "--learning_rate", "1e-2", "--test_windows", 2, "--device", "cpu"]
MUSE = ["--local_block", 16, "--cluster_size", 4, "--num_retrieved", 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a folder of texts that all say the same, and a task of which the answer is in the prompt."""
    path = tmp_path_factory.mktemp("finetune")
    for family in ("llama", "gpt2"):
        model = tiny_model(family, vocab_size=257).float()
        if family == "gpt2":
            model.config.attn_pdrop = 0.1  # as Transformers' default
        model.save_pretrained(path / family)
        byte_tokenizer().save_pretrained(path / family)
    tiny_model("llama", vocab_size=257).float().save_pretrained(path / "llama_without_tokenizer")
    path.joinpath("text").mkdir()
    for name in range(40):
        path.joinpath(f"text/{name:02}.txt").write_text("What is said is said again. " * 8)
    rows = [{"passage": f"row {n}", "labels": {"text": ["no", "yes"][n % 2]}} for n in range(40)]
    path.joinpath("task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(folder, *arguments, model="llama") -> int:
    return finetune_lora.main([str(word) for word in ("--model", folder / model, *arguments)])


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_an_adapter_reloads_with_its_policy(model, folder, tmp_path, capsys):
    out = tmp_path / "out"
    test_text = folder / "text/00.txt"
    where = ["--text", folder / "text", "--test_text", test_text, "--output_dir", out, "--layers", "0,-1"]
    assert run(folder, *where, *TINY, *MUSE, model=model) == 0
    saved = json.loads((out / "results.json").read_text())
    results = saved["results"]
    assert finetune_lora.report(results) in capsys.readouterr().out
    for attention in ("exact", "muse"):
        by = f"evaluated_with_{attention}"
        before, after = results["before"][by]["loss"], results[f"trained_with_{attention}"][by]["loss"]
        assert after < before - 0.5, f"{attention} attention does not learn: {before:.3f}, then {after:.3f}"

    adapted, exact = (reloaded(folder / model, out / attention) for attention in ("muse", "exact"))
    assert (adapted.config._attn_implementation, adapted.config.muse) == ("muse", saved["muse"])
    assert adapted.config.muse["layers"] == [0, -1]
    assert exact.config._attn_implementation == "sdpa"
    ids = torch.tensor(byte_tokenizer()(test_text.read_text())["input_ids"][:128]).view(2, 64)
    for trained, reopened in (("muse", adapted), ("exact", exact)):
        patch_model(reopened, config=MuseConfig.from_dict(saved["muse"]))
        muse_loss = token_losses(reopened, ids).mean().item()
        unpatch_model(reopened)
        exact_loss = token_losses(reopened, ids).mean().item()
        losses = {name: result["loss"] for name, result in results[f"trained_with_{trained}"].items()}
        expected = {"evaluated_with_exact": exact_loss, "evaluated_with_muse": muse_loss}
        assert losses == pytest.approx(expected, rel=1e-4), f"trained with {trained}, as saved: {expected}"

    merged = tmp_path / "merged"
    reloaded(folder / model, out / "muse").merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(out / "muse").save_pretrained(merged)
    assert policy_in_command_line(merged, folder, capsys)["layers"] == [0, -1]


def reloaded(model, adapter):
    config = AutoConfig.from_pretrained(adapter / "model")
    base = AutoModelForCausalLM.from_pretrained(model, config=config)
    return PeftModel.from_pretrained(base, adapter).eval()


def policy_in_command_line(model, folder, capsys) -> dict:
    """What `muse-hf evaluate` takes for the policy of a saved model, whose tokenizer it is not told."""
    capsys.readouterr()
    command = ["evaluate", model, "--text", folder / "text", "--length", 64, "--device", "cpu", "--json"]
    assert cli.main([str(word) for word in command]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)["policy"]


def test_all_weights_and_a_task(folder, tmp_path, capsys):
    out = tmp_path / "out"
    task = [
        "--task_file",
        folder / "task.jsonl",
        "--prompt",
        "{passage}. It is",
        "--answer",
        "{labels[text]}",
    ]
    how = ["--full", "--gradient_accumulation_steps", 2, "--gradient_checkpointing", "--layers", "all"]
    where = ["--output_dir", out, "--tokenizer", folder / "llama"]
    assert run(folder, *task, *TINY, *MUSE, *how, *where, model="llama_without_tokenizer") == 0
    results = json.loads((out / "results.json").read_text())["results"]
    for attention in ("exact", "muse"):
        by = f"evaluated_with_{attention}"
        before, after = results["before"][by], results[f"trained_with_{attention}"][by]
        assert after["loss"] < 1.0 < before["loss"]
        assert after["score"] > before["score"]
        opened = PretrainedArguments(model=str(out / attention), device="cpu")
        _, tokenizer = load_model(opened, Corpus([]), 64)
        assert tokenizer.get_vocab() == byte_tokenizer().get_vocab(), attention
    assert policy_in_command_line(out / "muse", folder, capsys)["num_retrieved"] == 2
    model = AutoModelForCausalLM.from_pretrained(out / "muse")
    assert model.config._attn_implementation == "muse"
    base = AutoModelForCausalLM.from_pretrained(folder / "llama")
    assert not torch.allclose(output_of(model, tokens(8)), output_of(base, tokens(8)), atol=0.1)


def test_both_models_are_evaluated_with_both_attentions_once(folder, tmp_path, monkeypatch):
    """And of several models no two are held at a time."""
    loaded, evaluated = [], []

    def load_alone(*arguments):
        assert all(earlier() is None for earlier in loaded), "a model is loaded while an earlier one is held"
        model, tokenizer = load_model(*arguments)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    def measure(_, model, test):
        evaluated.append(
            (isinstance(model, PeftModel), transformers_model(model).config._attn_implementation)
        )
        return {"loss": len(evaluated)}

    monkeypatch.setattr(finetune_lora, "load_model", load_alone)
    monkeypatch.setattr(finetune_lora, "measure", measure)
    out = tmp_path / "out"
    assert run(folder, "--text", folder / "text", "--output_dir", out, *TINY, *MUSE, "--steps", 1) == 0
    once_for_exact = [(False, "sdpa"), (True, "sdpa"), (True, "muse")]
    once_for_muse = [(False, "muse"), (True, "sdpa"), (True, "muse")]
    assert evaluated == once_for_exact + once_for_muse, "(has an adapter, attention) of each evaluation"
    assert json.loads((out / "results.json").read_text())["results"] == {
        "before": {"evaluated_with_exact": {"loss": 1}, "evaluated_with_muse": {"loss": 4}},
        "trained_with_exact": {"evaluated_with_exact": {"loss": 2}, "evaluated_with_muse": {"loss": 3}},
        "trained_with_muse": {"evaluated_with_exact": {"loss": 5}, "evaluated_with_muse": {"loss": 6}},
    }


def test_the_report_has_a_row_for_what_trained_and_a_column_for_what_evaluates():
    def by(exact, muse):
        return {
            "evaluated_with_exact": {"loss": exact, "score": exact / 10},
            "evaluated_with_muse": {"loss": muse, "score": muse / 10},
        }

    results = {"before": by(4, 5), "trained_with_exact": by(2, 3), "trained_with_muse": by(2.5, 2.4)}
    losses, scores = finetune_lora.report(results).split("\n\n")
    assert [line.split()[-3:] for line in losses.splitlines()[1:]] == [
        ["4.0000", "5.0000", "+25.00%"],
        ["2.0000", "3.0000", "+50.00%"],
        ["2.5000", "2.4000", "-4.00%"],
        ["2.0000", "2.4000", "+20.00%"],
    ], losses
    assert [line.split()[-3:] for line in scores.splitlines()[1:]] == [
        ["40.0%", "50.0%", "+10.00%"],
        ["20.0%", "30.0%", "+10.00%"],
        ["25.0%", "24.0%", "-1.00%"],
        ["20.0%", "24.0%", "+4.00%"],
    ], scores


def test_the_loss_is_of_the_test_text_if_one_is_named(folder, tmp_path):
    """Text unlike the training text: learning the one says nothing of the other."""
    for name, text in (("like", "What is said is said again. " * 40), ("unlike", "0123456789" * 120)):
        (tmp_path / f"{name}.txt").write_text(text)
        where = ["--text", folder / "text", "--test_text", tmp_path / f"{name}.txt"]
        assert run(folder, *where, "--output_dir", tmp_path / name, *TINY, *MUSE) == 0
    like, unlike = (
        json.loads((tmp_path / name / "results.json").read_text())["results"]["trained_with_exact"][
            "evaluated_with_exact"
        ]["loss"]
        for name in ("like", "unlike")
    )
    assert like < unlike - 1, f"loss of text like the training text {like:.2f}, of other text {unlike:.2f}"


def test_only_answers_have_labels(folder):
    arguments = TaskArguments(
        task_file=str(folder / "task.jsonl"), prompt="{passage}. ", answer="{labels[text]}", test_rows=3
    )
    tokenizer = byte_tokenizer()
    train, test = task_examples(arguments, tokenizer, length=10, train_rows=5)
    assert (len(train), len(test)) == (5, 3)
    assert tokenizer.decode(train[4].input_ids) == "row 5. yes", "row 4 is a test row"
    assert tokenizer.decode(test[0].input_ids) == "row 4. no"
    assert tokenizer.decode(train[0].answer) == " no"
    assert (train[0].labels == NO_LABEL).sum() == len("row 0.")
    longer, _ = task_examples(arguments, tokenizer, length=7, train_rows=5)
    assert tokenizer.decode(longer[0].input_ids) == "w 0. no", "the start of a long prompt is left out"


def test_line_breaks_inside_of_strings_are_no_new_rows(folder, tmp_path):
    rows = [json.dumps({"prompt": f"a\u2028b {n}", "answer": "c"}, ensure_ascii=False) for n in range(10)]
    task = tmp_path / "task.jsonl"
    task.write_text("\n".join(rows) + "\n", encoding="utf-8")
    train, test = task_examples(TaskArguments(task_file=str(task)), byte_tokenizer(), 64, 20)
    assert (len(train), len(test)) == (8, 2)


def test_auto_is_calibrated_on_what_is_trained_on(folder, tmp_path, capsys):
    how = ["--steps", 1, "--layers", "auto", "--max_loss_increase", 0.5, "--output_dir", tmp_path / "out"]
    assert run(folder, "--text", folder / "text", *TINY, *MUSE, *how) == 0
    assert "chosen on 1 x 64 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task_file", "nowhere"], "there is no file 'nowhere'"),
        (["--task_file", "{}/text/00.txt"], "line 1 of"),
        (["--task_file", "{}/task.jsonl"], "a row has no 'prompt'; its fields are ['labels', 'passage']"),
        (["--task_file", "{}/task.jsonl", "--text", "{}/text"], "give one of"),
        (["--task_file", "{}/task.jsonl", "--packages", "torch"], "give one of"),
        (["--task_file", "{}/task.jsonl", "--test_text", "{}/text"], "--test_text is for text"),
        (
            ["--text", "{}/text", "--length", 100000],
            "the text fills 0 rows of 100000 tokens",
        ),
        (["--text", "{}/text", "--length", 2], "--length must be at least 16"),
        (["--text", "{}/text", "--output_dir", "{}"], "exists already"),
        (["--text", "{}/text", "--layers", "9"], "layer 9 is out of range"),
        (["--text", "{}/text", "--local_block", 64], "64 tokens are attended exactly"),
        (["--text", "{}/text/00.txt"], "fewer than 20 documents leave none to test on"),
    ],
    ids=str,
)
def test_refusals_are_one_sentence(arguments, message, folder, capsys):
    assert run(folder, *TINY, *MUSE, *(str(word).replace("{}", str(folder)) for word in arguments)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in line
    assert line.endswith(".")
