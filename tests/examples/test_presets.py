"""The presets of the pretraining example: each gives the model and the setting that its name says."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from corpus import UsageError, train_tokenizer  # noqa: E402
from models import check_model, model_config, muse_settings  # noqa: E402
from pretrain_arguments import PRESETS, parse_arguments  # noqa: E402
from records import read_json, write_json  # noqa: E402

import muse_hf  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["some text"], vocab_size=300, max_characters=100)


@pytest.mark.parametrize(
    ("name", "parameters", "layers", "setting"),
    [
        ("gpt-30m-16k", 35e6, [3], muse_hf.MuseConfig.paper()),
        ("gpt-30m-16k-all", 35e6, list(range(7)), muse_hf.MuseConfig()),
        ("llama-150m-64k", 150e6, list(range(12)), muse_hf.MuseConfig()),
        ("llama-1b-64k", 990e6, list(range(16)), muse_hf.MuseConfig()),
    ],
)
def test_a_preset_is_the_model_and_the_setting_of_its_name(name, parameters, layers, setting, tokenizer):
    arguments = parse_arguments(["--preset", name], description="")
    config = model_config(arguments.model, tokenizer, arguments.data.context_length)
    config.vocab_size = arguments.data.vocab_size
    muse = muse_settings(arguments.muse)
    check_model(config, arguments.muse.layers, muse, arguments.run.compile)
    assert muse == setting, f"{name} trains with {muse}"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(parameters, rel=0.02), f"{name} has {count / 1e6:.1f}M parameters"
    muse_hf.patch_model(model, layers=arguments.muse.layers, config=muse)
    patched = muse_hf.MuseConfig.from_dict(model.config.muse).layer_indices(config.num_hidden_layers)
    assert patched == layers, f"{name} has MuSe in layers {patched}"
    assert arguments.data.context_length == 1024 * int(name.split("k")[0].rsplit("-", 1)[1])


def test_every_preset_is_tested_and_holds_arguments_only():
    known = parse_arguments([], description="").values().keys()
    assert len(PRESETS) == 4
    for name, path in PRESETS.items():
        assert not read_json(path).keys() - known, f"{name} has arguments that pretrain.py has not"


def test_given_arguments_replace_those_of_the_preset():
    given = ["--preset", "llama-1b-64k", "--context_length", "1024", "--gradient_checkpointing", "false"]
    arguments = parse_arguments(given, description="")
    assert arguments.data.context_length == 1024
    assert not arguments.run.gradient_checkpointing
    assert arguments.model.shape == "llama-1b"


def test_a_resumed_run_keeps_what_replaced_its_preset(tmp_path):
    given = ["--preset", "gpt-30m-16k", "--steps", "7"]
    write_json(tmp_path / "config.json", {"arguments": parse_arguments(given, description="").values()})
    resumed = parse_arguments(["--resume", "--output_dir", str(tmp_path)], description="")
    assert (resumed.run.preset, resumed.run.steps, resumed.data.context_length) == ("gpt-30m-16k", 7, 16384)
    with pytest.raises(UsageError, match="but preset would differ"):
        parse_arguments(
            ["--resume", "--output_dir", str(tmp_path), "--preset", "gpt-30m-16k-all"], description=""
        )


def test_an_unknown_preset_is_refused():
    with pytest.raises(UsageError, match="no preset 'gpt-5': the presets are gpt-30m-16k, "):
        parse_arguments(["--preset", "gpt-5"], description="")
