"""The rules of routing.py: what attends exactly, what is refused, and what a refusal says."""

import copy
import logging
import types

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from muse_hf import SUPPORTED_FAMILIES, MuseConfig, Segments, UnsupportedError, patch_model
from muse_hf.adapter import muse_attention_forward
from muse_hf.routing import CROSSOVER, check_options, layer_config, model_policy, reason_for_exact
from tests.models import (
    FAMILIES,
    HEADS,
    LAYERS,
    LOCAL_BLOCK,
    LONG,
    MUSE,
    assert_different,
    assert_same,
    muse_model,
    output_of,
    tiny_model,
    tokens,
)

UNSUPPORTED = {  # those that would ignore the name, and those that break on it
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 128},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 128},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
    },
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
}
DROPOUT = {"bert": "attention_probs_dropout_prob", "gpt2": "attn_pdrop"}  # the others: attention_dropout


class Attention(torch.nn.Module):
    """As much of an attention module as the rules look at."""

    def __init__(self, layer_idx=0, **attributes):
        super().__init__()
        self.config = AutoConfig.for_model("llama", num_hidden_layers=LAYERS)
        self.layer_idx = layer_idx
        for name, value in attributes.items():
            setattr(self, name, value)


class OtherCrossAttention(Attention):
    """Recognised by its name."""


LEFT_OUT = "layer not among MuseConfig.layers"
OTHER_LENGTHS = "different numbers of queries and keys"
TOO_SHORT = "sequences no longer than local_block"


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({}, None),
        ({"config": None}, LEFT_OUT),
        ({"module": Attention(is_cross_attention=True)}, "cross-attention"),
        ({"module": OtherCrossAttention()}, "cross-attention"),
        ({"module": Attention(is_cross_attention=False)}, None),
        ({"queries": 1}, OTHER_LENGTHS),
        ({"queries": LONG - 5}, OTHER_LENGTHS),
        ({"queries": LONG + 5}, OTHER_LENGTHS),
        ({"mask": torch.ones(1, 1, LONG, LONG)}, "explicit mask"),
        ({"queries": LOCAL_BLOCK, "keys": LOCAL_BLOCK}, TOO_SHORT),
        ({"queries": LOCAL_BLOCK + 1, "keys": LOCAL_BLOCK + 1}, None),
        ({"mask": Segments((1, LONG), [0, 0], [0, 16], [16, 16])}, TOO_SHORT),
        ({"mask": Segments((1, LONG), [0, 0], [0, 16], [16, 17])}, None),
        ({"mask": Segments((1, LONG), [], [], [])}, TOO_SHORT),
    ],
    ids=str,
)
def test_what_attends_exactly(case, reason):
    case = {"module": Attention(), "queries": LONG, "keys": LONG, "mask": None, "config": MUSE} | case
    query, key = (torch.zeros(1, HEADS, case[length], 4) for length in ("queries", "keys"))
    assert reason_for_exact(case["module"], query, key, case["mask"], case["config"]) == reason


@pytest.mark.parametrize(
    ("device", "changes", "shortest"),
    [
        ("cuda", {}, CROSSOVER),
        ("cpu", {}, 0),
        ("cuda", {"backend": "reference"}, 0),
        ("cuda", {"min_length": 0}, 0),
        ("cpu", {"min_length": 300}, 300),
    ],
    ids=str,
)
def test_the_shortest_sequence_that_is_worth_it(device, changes, shortest):
    """On a GPU what was measured, unless told otherwise."""
    for length in {1, 299, 300, CROSSOVER - 1, CROSSOVER}:
        part = types.SimpleNamespace(shape=(1, HEADS, length, 4), device=torch.device(device))
        reason = reason_for_exact(Attention(), part, part, None, MuseConfig(local_block=1, **changes))
        expected = "exact attention is faster" if length < shortest else None
        assert reason == (TOO_SHORT if length == 1 else expected), f"{length} tokens"


def test_short_sequences_attend_exactly_and_say_so(caplog, monkeypatch):
    model = muse_model("llama")
    model.config.muse = MUSE.replace(min_length=LONG + 1)
    exact = output_of(tiny_model("llama"), tokens(LONG))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert_same(output_of(model, tokens(LONG)), exact, "a sequence shorter than min_length")
    assert f"below {LONG + 1} tokens. MuseConfig(min_length=0) has MuSe used all the same" in caplog.text
    model.config.muse = MUSE.replace(min_length=LONG)
    assert_different(output_of(model, tokens(LONG)), exact, "a sequence of min_length")


def test_the_policy_of_a_layer():
    module = Attention(layer_idx=1)
    assert layer_config(module) == MuseConfig(), "without a policy every layer has the default one"
    module.config.muse = MUSE.replace(layers={-2: {"num_retrieved": 7}})
    assert layer_config(module) == MUSE.replace(num_retrieved=7)
    module.layer_idx = 2
    assert layer_config(module) is None
    module.config.muse = {"local_blocks": 16}
    with pytest.raises(ValueError, match="MuseConfig has no field 'local_blocks'; its fields are"):
        model_policy(module.config)
    module.config.muse = MUSE.replace(layers=[LAYERS])
    with pytest.raises(ValueError, match=f"layer {LAYERS} is out of range for a model of {LAYERS} layers"):
        layer_config(module)


def test_a_policy_is_validated_once_for_all_layers_and_again_when_it_changes(monkeypatch):
    """Each layer asks for its config at every token that is generated."""
    validated, validate = [], MuseConfig.__post_init__
    monkeypatch.setattr(MuseConfig, "__post_init__", lambda self: (validated.append(1), validate(self)))
    module = Attention()
    module.config.muse = MUSE.replace(layers={layer: {"num_retrieved": 5} for layer in range(LAYERS)})
    assert layer_config(module) == MUSE.replace(num_retrieved=5)
    count = len(validated)
    for module.layer_idx in range(LAYERS):
        assert layer_config(module).num_retrieved == 5
    assert len(validated) == count, "the policy was read again for another layer"
    module.config.muse["layers"][str(module.layer_idx)]["num_retrieved"] = 6
    assert layer_config(module).num_retrieved == 6, "a change in place went unnoticed"


@pytest.mark.parametrize("layer_idx", [None, "absent"])
def test_a_module_that_does_not_know_its_layer_is_refused(layer_idx):
    module = Attention(layer_idx=None)
    if layer_idx == "absent":
        del module.layer_idx
    with pytest.raises(UnsupportedError, match="Attention has no layer_idx"):
        layer_config(module)


CHANGES_MEANING = {
    "softcap": (30.0, "a cap on the logits"),
    "s_aux": (torch.zeros(HEADS), "attention sinks"),
    "position_bias": (torch.zeros(1, HEADS, LONG, LONG), "a position bias"),
    "sliding_window": (20, "a sliding window .to turn it off, load the model with .*"),
}


@pytest.mark.parametrize("option", CHANGES_MEANING)
def test_options_that_change_the_meaning_are_refused_on_muse_layers_only(option):
    value, meaning = CHANGES_MEANING[option]
    module = Attention(layer_idx=2)
    check_options(module, {option: None, "output_attentions": False})
    message = rf"(?s)layer 2 of 'llama' asks for {option}=.*, {meaning}, which .* out of MuseConfig.layers"
    with pytest.raises(UnsupportedError, match=message):
        check_options(module, {option: value})

    inputs = [torch.ones(1, HEADS, LONG, 4) for _ in range(3)]
    module.config.muse = MUSE
    with pytest.raises(UnsupportedError, match=message):
        muse_attention_forward(module, *inputs, None, **{option: value})
    if option != "softcap":  # which the exact attention of Transformers refuses as well
        module.config.muse = MUSE.replace(layers=[0, 1])
        muse_attention_forward(module, *inputs, None, **{option: value})


@pytest.mark.parametrize("option", ["softcap", "s_aux", "position_bias"])
@pytest.mark.parametrize("family", FAMILIES)
def test_options_reach_the_check_through_the_model(family, option):
    with pytest.raises(UnsupportedError, match=f"layer 0 of '{family}' asks for {option}="):
        output_of(muse_model(family, layers=[0]), tokens(LONG), **{option: CHANGES_MEANING[option][0]})


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_weights_are_refused_and_the_advice_works(family):
    model = muse_model(family, layers=[1])
    with pytest.raises(
        UnsupportedError, match=f"layer 1 of '{family}': output_attentions=True cannot"
    ) as error:
        output_of(model, tokens(LONG), output_attentions=True)
    assert 'call model.set_attn_implementation("eager")' in str(error.value)
    output_of(model, tokens(LONG), output_attentions=False, output_hidden_states=True)

    model.set_attn_implementation("eager")
    weights = model(input_ids=tokens(LONG), output_attentions=True).attentions
    assert [tuple(layer.shape) for layer in weights] == [(1, HEADS, LONG, LONG)] * LAYERS

    configured = tiny_model(family, output_attentions=True)
    patch_model(configured, config=MUSE)
    with pytest.raises(UnsupportedError, match="output_attentions=True cannot be served"):
        output_of(configured, tokens(LONG))


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_refused_where_muse_would_have_to_drop(family):
    option = DROPOUT.get(family, "attention_dropout")
    model = muse_model(family, layers=[1], **{option: 0.25})
    expected = output_of(muse_model(family, layers=[1]), tokens(LONG))
    assert_same(output_of(model, tokens(LONG)), expected, "evaluation has no dropout", atol=0)
    model.train()
    message = rf"layer 1 of '{family}' is training with attention dropout 0\.25, .* in its config"
    with pytest.raises(UnsupportedError, match=message) as error:
        output_of(model, tokens(LONG))
    assert option in str(error.value), "the message does not name the option to change"

    exact, dropped = tiny_model(family, **{option: 0.25}).train(), []
    for each in (exact, model):
        torch.manual_seed(0)
        dropped.append(output_of(each, tokens(LOCAL_BLOCK)))
    assert_same(*dropped, "exact attention up to local_block drops as without MuSe", atol=0)
    assert_different(output_of(model, tokens(LOCAL_BLOCK)), dropped[1], "one draw of dropout from the next")
    patch_model(model, layers=[])
    assert output_of(model, tokens(LONG)).isfinite().all(), "no layer uses MuSe"


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_the_advice_on_sliding_windows_helps(family, tmp_path):
    with_windows = {"sliding_window": 20}
    if family != "mistral":
        with_windows |= {"use_sliding_window": True, "max_window_layers": 1}
    model = tiny_model(family, **with_windows)
    with pytest.raises(UnsupportedError) as refused:
        patch_model(model, config=MUSE)
    model.save_pretrained(tmp_path)
    option, value = "sliding_window", None
    if getattr(model.config, "layer_types", None):
        option, value = "layer_types", ["full_attention"] * LAYERS
    assert f"{option}=" in str(refused.value)
    full = type(model).from_pretrained(tmp_path, **{option: value}).eval()
    exact = output_of(full, tokens(LONG))
    assert len(patch_model(full, config=MUSE).layers) == LAYERS
    assert_different(output_of(full, tokens(LONG)), exact, "MuSe attention from exact attention")


def test_the_supported_families_are_those_that_are_tested():
    assert sorted(SUPPORTED_FAMILIES) == sorted(FAMILIES)


def refusal(family):
    supported = "bert, gpt2, llama, mistral, qwen2, qwen3"
    advice = 'Load this model without attn_implementation="muse"'
    return f'"muse" is not supported for model type {family!r}.* supported are {supported}. {advice}'


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_unsupported_families_are_refused_when_patched(family):
    config = AutoConfig.for_model(family, vocab_size=99, **UNSUPPORTED[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    before = output_of(model, tokens(20))
    with pytest.raises(UnsupportedError, match=refusal(family)):
        patch_model(model, config=MUSE)
    assert model.config._attn_implementation != "muse"
    assert not hasattr(model.config, "muse")
    assert_same(output_of(model, tokens(20)), before, "the model that was refused", atol=0)


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_unsupported_families_are_refused_when_the_name_is_given(family):
    """Some would ignore it and lose causality, some break on it: they are told before either."""
    config = AutoConfig.for_model(family, vocab_size=99, **UNSUPPORTED[family])
    with pytest.raises(UnsupportedError, match=refusal(family)):
        AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="muse")
    model = AutoModelForCausalLM.from_config(config)
    model.set_attn_implementation("muse")  # Transformers warns that these models cannot be switched
    assert model.config._attn_implementation != "muse"
