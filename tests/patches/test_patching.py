"""Patched models: meaning of masks, caches and reloading, for every supported family."""

import copy

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from muse_hf import SUPPORTED_FAMILIES, MuseConfig, UnsupportedError, patch_model, unpatch_model

SMALL = MuseConfig(local_block=16, cluster_size=4, num_retrieved=2)
CAUSAL = [family for family in SUPPORTED_FAMILIES if family != "bert"]


def tiny(family, **overrides):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 99}
    extra = {
        "bert": {"intermediate_size": 64, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
        "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    }.get(family, {"intermediate_size": 64, "num_key_value_heads": 2})
    if family == "mistral":
        extra["sliding_window"] = None
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes, **extra, **overrides)
    builder = AutoModel if family == "bert" else AutoModelForCausalLM
    return builder.from_config(config).eval()


def tokens(length, seed=0):
    return torch.randint(3, 99, (1, length), generator=torch.Generator().manual_seed(seed))


def outputs(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=ids, **options)[0]


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_patching_and_unpatching(family):
    model, ids = tiny(family), tokens(70)
    exact = outputs(model, ids)
    report = patch_model(model, config=SMALL)
    assert "MuSe attention in 3 of 3 layers" in str(report)
    assert not torch.equal(outputs(model, ids), exact), "MuSe is not active"
    patch_model(model, config=SMALL.replace(num_retrieved=1000))
    torch.testing.assert_close(outputs(model, ids), exact)
    unpatch_model(model)
    assert torch.equal(outputs(model, ids), exact)
    assert not hasattr(model.config, "muse")


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layers", ["all", [1]])
def test_padded_rows_equal_rows_alone(family, side, layers):
    model = tiny(family)
    patch_model(model, layers=layers, config=SMALL)
    long, short, padding = tokens(70), tokens(45, seed=1), torch.full((1, 25), 1)
    row = torch.cat([padding, short] if side == "left" else [short, padding], dim=1)
    mask = torch.ones(2, 70, dtype=torch.int64)
    own = slice(25, 70) if side == "left" else slice(0, 45)
    mask[1] = 0
    mask[1, own] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    both = outputs(model, torch.cat([long, row]), attention_mask=mask, position_ids=positions)
    assert both.isfinite().all()
    torch.testing.assert_close(both[:1], outputs(model, long))
    torch.testing.assert_close(both[1:, own], outputs(model, short))


@pytest.mark.parametrize("family", CAUSAL)
def test_packed_documents_equal_documents_alone(family):
    model, first, second = tiny(family), tokens(70), tokens(45, seed=1)
    patch_model(model, config=SMALL)
    positions = torch.cat([torch.arange(70), torch.arange(45)])[None]
    packed = outputs(model, torch.cat([first, second], 1), position_ids=positions, use_cache=False)
    torch.testing.assert_close(packed[:, :70], outputs(model, first))
    torch.testing.assert_close(packed[:, 70:], outputs(model, second))


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("prefix", [1, 16, 17, 50])
def test_prefix_of_the_forward_is_the_forward_of_the_prefix(family, prefix):
    model, ids = tiny(family), tokens(70)
    patch_model(model, config=SMALL)
    torch.testing.assert_close(outputs(model, ids)[:, :prefix], outputs(model, ids[:, :prefix]))


@pytest.mark.parametrize("family", CAUSAL)
def test_generation(family):
    model, ids = tiny(family), tokens(70)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids[:, :10], **options)
    patch_model(model, config=SMALL)
    assert torch.equal(model.generate(ids[:, :10], **options), expected), "up to local_block all is exact"
    first = model.generate(ids, **options)[0, 70]
    assert first == outputs(model, ids)[0, -1].argmax()


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_saved_models_reload_patched(family, tmp_path):
    model, ids = tiny(family), tokens(70)
    patch_model(model, layers=[0, -1], config=SMALL)
    expected, policy = outputs(model, ids), model.config.muse
    for step in ("once", "twice"):
        model.save_pretrained(tmp_path / step)
        model = type(model).from_pretrained(tmp_path / step).eval()
        assert model.config.muse == policy
        assert torch.equal(outputs(model, ids), expected), f"reloaded {step}"
    assert torch.equal(outputs(copy.deepcopy(model), ids), expected)
    exact = type(model).from_pretrained(tmp_path / "twice", attn_implementation="sdpa")
    assert exact.config._attn_implementation == "sdpa"


def test_layer_choices():
    model = tiny("llama")
    assert list(patch_model(model, layers="central").layers) == [1]
    assert list(patch_model(model, layers="all").layers) == [0, 1, 2]
    assert list(patch_model(model, layers=[-1, 0]).layers) == [0, 2]
    assert patch_model(model, layers={1: {"num_retrieved": 5}}).layers[1].num_retrieved == 5
    with pytest.raises(ValueError, match="layer 3 is out of range"):
        patch_model(model, layers=[3])
    with pytest.raises(ValueError, match='must be "all", "central"'):
        patch_model(model, layers="some")
    with pytest.raises(TypeError, match="expected a Transformers model"):
        patch_model(torch.nn.Linear(1, 1))


def test_what_changes_the_meaning_is_refused():
    windowed = tiny("llama")
    windowed.config.model_type = "mistral"
    windowed.config.sliding_window = 8
    with pytest.raises(UnsupportedError, match="sliding window of 8 tokens"):
        patch_model(windowed)
    dropping = tiny("llama", attention_dropout=0.1).train()
    patch_model(dropping, config=SMALL)
    with pytest.raises(UnsupportedError, match=r"attention dropout 0\.1"):
        dropping(input_ids=tokens(70))


@pytest.mark.parametrize("family", ["bloom", "codegen", "gpt_neo"])
def test_families_that_ignore_the_name_are_refused(family):
    config = AutoConfig.for_model(family)
    with pytest.raises(UnsupportedError, match="supported are bert, gpt2"):
        transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["muse"](1, 8, 8, config=config)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, ids = tiny("llama").train(), tokens(70)
    patch_model(model, config=SMALL)
    model(input_ids=ids, labels=ids).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(input_ids=ids, labels=ids).loss.backward()
    for parameter, grad in zip(model.parameters(), expected):
        assert torch.equal(parameter.grad, grad)
