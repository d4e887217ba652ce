"""The command `muse-hf`: what it prints, saves and refuses, and the programs that it runs."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig

from muse_hf import profile_layers
from muse_hf.cli import main
from tests.models import MUSE, byte_tokenizer, tiny_model

# As MUSE.
TINY = ["--local-block", "16", "--cluster-size", "4", "--num-retrieved", "2", "--retrieval-threshold", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models with a tokenizer, and two texts."""
    path = tmp_path_factory.mktemp("cli")
    for family in ("llama", "gpt2", "bert"):
        tiny_model(family, vocab_size=257).float().save_pretrained(path / family)
        byte_tokenizer().save_pretrained(path / family)
    for name in ("one", "two"):
        path.joinpath(f"{name}.txt").write_text(
            f"The {name} text says what it says, and then it goes on. " * 9
        )
    path.joinpath("adapter").mkdir()
    path.joinpath("adapter/adapter_config.json").write_text("{}")
    path.joinpath("picture.txt").write_bytes(b"\x89PNG\xff")
    BloomConfig(hidden_size=8, n_head=1, n_layer=1).save_pretrained(path / "bloom")
    return path


def call(*arguments) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def about(folder):
    """The arguments that say on which model and text."""

    def arguments(model="llama", text="one.txt", length=70, rows=2):
        return [folder / model, "--text", folder / text, "--length", length, "--rows", rows]

    return arguments


@pytest.fixture
def ids(folder):
    """The tokens that these arguments stand for."""
    text = folder.joinpath("one.txt").read_text()
    return byte_tokenizer()(text, return_tensors="pt")["input_ids"][:, :140].view(2, 70)


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert"])
def test_profile(model, about, tmp_path, capsys):
    picture = tmp_path / "errors.png"
    assert call("profile", *about(model), *TINY, "--layers", "0,-1", "--heat-map", picture) == 0
    printed = capsys.readouterr().out
    assert "2 x 70 tokens, float32 on cpu" in printed
    assert sorted(printed.splitlines()[-1].split(": ")[1].split(", ")) == ["0", "2"]
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_json_is_all_that_is_printed(about, ids, folder, capsys):
    assert call("profile", *about(), *TINY, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    expected = profile_layers(model, ids, MUSE)
    assert found["exact_loss"] == pytest.approx(expected.exact_loss)
    assert found["layers"][1]["output_error"] == pytest.approx(expected.layers[1].output_error, rel=1e-4)


def test_evaluate_saves_what_auto_chose(about, ids, folder, tmp_path, capsys):
    auto = ["--layers", "auto", "--calibration", folder / "two.txt", "--max-loss-increase", 10]
    assert call("evaluate", *about(), *TINY, *auto, "--save", tmp_path / "patched") == 0
    printed = capsys.readouterr().out
    for part in ("chosen on 2 x 70 tokens", "difference", "61 to      70", "prefill (ms)"):
        assert part in printed, printed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    assert model.config.muse["local_block"] == 16

    assert call("evaluate", *about(tmp_path / "patched"), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["policy"] == model.config.muse, "the policy that was saved is the one that is evaluated"
    for attention, name in (("exact", "sdpa"), ("muse", "muse")):
        model.set_attn_implementation(name)
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        assert found[attention]["loss"] == pytest.approx(loss, abs=1e-4)
        assert len(found[attention]["by_position"]) == 8


def test_recommend(about, monkeypatch, capsys):
    monkeypatch.setattr("muse_hf.choosing._LOCAL_BLOCKS", (32,))
    monkeypatch.setattr("muse_hf.choosing._CLUSTER_SIZES", (8,))
    assert call("recommend", *about()) == 0
    assert "settings stay within 0.200%" in capsys.readouterr().out


def test_recommend_at_several_lengths(about, monkeypatch, capsys):
    monkeypatch.setattr("muse_hf.choosing._LOCAL_BLOCKS", (32,))
    monkeypatch.setattr("muse_hf.choosing._CLUSTER_SIZES", (8,))
    model, *text = about(rows=1)
    text[text.index("--length") + 1 : text.index("--length") + 2] = [70, 40]
    assert call("recommend", model, *text, "--json") == 0
    assert [found["length"] for found in json.loads(capsys.readouterr().out)] == [40, 70]


def test_env(capsys):
    assert call("env", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__
    assert found["backend"].split(";")[0] in ("reference", "triton, in the default setting")
    assert call("env") == 0
    assert "backend" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("profile nowhere --length 70", "no model could be opened at"),
        ("profile llama --text nowhere --length 70", "there is no file or folder"),
        ("profile llama --length 7000", "fewer than 1 x 7000"),
        ("profile llama --length 70", "70 tokens are not more than local_block=2048"),
        ("profile llama --length 0", "must be at least 1"),
        ("profile gpt2 --length 200", "has 128 positions"),
        ("profile bloom --length 70", "not supported for model type 'bloom'"),
        ("profile llama --length 70 --local-block 16 --layers 7", "layer 7 is out of range"),
        ("profile llama --length 70 --layers x", "--layers 'x' must be all, auto, or numbers"),
        ("profile llama --length 70 --local-block 16 --cluster-size 17", "MuseConfig.cluster_size=17"),
        ("profile llama --length 70 --local-block 32 --heat-map a.what", "what"),
        ("profile llama --length 70 --device nothing", "nothing"),
        ("profile llama --length 70 --tokenizer nowhere", "no tokenizer could be"),
        ("evaluate bert --length 70", "has no next-token loss"),
        ("evaluate llama --length 70 --save llama", "'llama' exists already and is not overwritten"),
        ("evaluate llama --length 70 --layers auto", "--layers auto needs --calibration"),
        ("evaluate llama --length 70", "70 tokens are attended exactly, and MuSe is used from 2049 on"),
        ("evaluate llama --length 70 --save one.txt/x --local-block 32", "one.txt"),
        ("evaluate adapter --length 70", "is a PEFT adapter: merge_and_unload it"),
        ("profile llama --length 70 --layers auto", "--layers auto chooses settings, which is for evaluate"),
        ("profile llama --length 70 --text picture.txt", "'picture.txt' is not UTF-8 text"),
        ("run -- python -u script.py", "-u is an option of Python"),
        ("recommend llama --length 70", "70 tokens are too few to try settings on"),
        ("run", "no command was given"),
        ("run -- there-is-no-such-program", "there is no program"),
        ("run -- sh", "is not a Python program"),
        ("run -- -m no.such.module", "there is no module 'no.such.module'"),
    ],
)
def test_refusals_are_one_sentence(command, message, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    words = command.split()
    if words[0] != "run" and "--text" not in words:
        words += ["--text", "one.txt"]
    assert main(words) == 2
    printed = capsys.readouterr()
    assert not printed.out
    line = printed.err.strip().splitlines()[-1]
    assert line.startswith("muse-hf: error: ")
    assert line.endswith(".")
    assert message in line


SCRIPT = """\
import sys
import helper_beside_it
from transformers import AutoModelForCausalLM
if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="muse")
    print(model.config._attn_implementation, sys.argv[2:])
    sys.exit(3)
"""


@pytest.fixture
def programs(tmp_path):
    """A folder of a program in two forms, and a module that it imports."""
    tmp_path.joinpath("helper_beside_it.py").touch()
    tmp_path.joinpath("script.py").write_text(SCRIPT)
    tmp_path.joinpath("console").write_text(f"#!{sys.executable}\n{SCRIPT}")
    return tmp_path


@pytest.mark.parametrize("how", ["script.py", "python script.py", "./console", "-m script"])
def test_run(how, folder, programs, monkeypatch, capsys):
    monkeypatch.chdir(programs)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "helper_beside_it", raising=False)
    with pytest.raises(SystemExit) as stopped:
        call("run", "--", *how.split(), folder / "llama", "--", "-x")
    assert stopped.value.code == 3
    assert capsys.readouterr().out == "muse ['--', '-x']\n"


def test_run_in_a_process_of_its_own(folder, programs):
    done = subprocess.run(
        [sys.executable, "-m", "muse_hf", "run", "--", "script.py", str(folder / "llama"), "--", "-x"],
        cwd=programs, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "muse ['--', '-x']\n", done.stderr
    assert done.returncode == 3
