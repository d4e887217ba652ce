"""Patched models: meaning of masks, caches, wrappers and reloading, for every supported family."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, TaskType, get_peft_model
from transformers import AutoConfig

from muse_hf import MuseConfig, UnsupportedError, patch_model, unpatch_model
from tests.models import (
    CAUSAL_FAMILIES,
    EVERYTHING,
    FAMILIES,
    LONG,
    MEDIUM,
    MUSE,
    assert_different,
    assert_same,
    muse_model,
    output_of,
    pack,
    pad_batch,
    tiny_model,
    tokens,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_and_unpatching(family):
    model, ids = tiny_model(family), tokens(LONG)
    exact = output_of(model, ids)
    report = patch_model(model, config=MUSE)
    assert "MuSe attention in 3 of 3 layers" in str(report)
    assert_different(output_of(model, ids), exact, "MuSe from exact attention")
    patch_model(model, config=EVERYTHING)
    assert_same(output_of(model, ids), exact, "all retrieved")
    unpatch_model(model)
    assert_same(output_of(model, ids), exact, "unpatched", atol=0)
    assert not hasattr(model.config, "muse")


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_unpatching_restores_what_was_there_before_the_first_patch(before):
    model = tiny_model("llama", attention=before)
    unpatch_model(model)
    assert model.config._attn_implementation == before, "a model without MuSe is left as it is"
    assert patch_model(model, config=MUSE).previous == before
    assert patch_model(model, layers="central").previous == before, "patched twice"
    unpatch_model(copy.deepcopy(model))
    unpatch_model(model)
    assert model.config._attn_implementation == before
    assert not {"muse", "attn_implementation"} & model.config.to_dict().keys(), "the config remembers MuSe"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layers", ["all", [1]], ids=str)
def test_padded_rows_equal_rows_alone(family, side, layers):
    model, rows = muse_model(family, layers=layers), [tokens(LONG), tokens(MEDIUM, seed=2)]
    batch, places = pad_batch(rows, side)
    both = output_of(model, **batch)
    assert both.isfinite().all()
    for row, place in zip(rows, places):
        assert_same(both[place], output_of(model, row)[0], f"row {place[0]}")


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_packed_documents_equal_documents_alone(family):
    model, documents = muse_model(family), [tokens(LONG), tokens(MEDIUM, seed=2)]
    batch, places = pack(documents)
    packed = output_of(model, **batch, use_cache=False)
    for document, place in zip(documents, places):
        assert_same(packed[place], output_of(model, document)[0], f"document at {place[1]}")


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
@pytest.mark.parametrize("prefix", [1, 16, 17, 50])
def test_prefix_of_the_forward_is_the_forward_of_the_prefix(family, prefix):
    model, ids = muse_model(family), tokens(LONG)
    assert_same(output_of(model, ids)[:, :prefix], output_of(model, ids[:, :prefix]), f"{prefix} tokens")


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_models_reload_patched(family, tmp_path):
    model, ids = muse_model(family, layers=[0, -1]), tokens(LONG)
    expected, policy = output_of(model, ids), model.config.muse
    for step in ("once", "twice"):
        model.save_pretrained(tmp_path / step)
        model = type(model).from_pretrained(tmp_path / step).eval()
        assert model.config.muse == policy
        assert_same(output_of(model, ids), expected, f"reloaded {step}")
    exact = type(model).from_pretrained(tmp_path / "twice", attn_implementation="sdpa")
    assert exact.config._attn_implementation == "sdpa"


def test_layer_choices():
    model = tiny_model("llama")
    assert list(patch_model(model, layers="central").layers) == [1]
    assert list(patch_model(model, layers="all").layers) == [0, 1, 2]
    assert list(patch_model(model, layers=[-1, 0]).layers) == [0, 2]
    assert patch_model(model, layers={1: {"num_retrieved": 5}}).layers[1].num_retrieved == 5


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([3], ValueError, r"layer 3 is out of range for a model of 3 layers \(0 to 2, or -3 to -1\)"),
        ([0, -4], ValueError, "layer -4 is out of range"),
        ({5: {}}, ValueError, "layer 5 is out of range"),
        ([0, -3], ValueError, "names a layer of a model of 3 layers twice"),
        ("some", ValueError, 'layers=\'some\': must be "all", "central"'),
        ([1.0], TypeError, "1.0 is not a layer index"),
        (torch.tensor([0, 1]), TypeError, r"layers=tensor\(\[0, 1\]\): must be None, a list"),
        (1, TypeError, "layers=1: must be None, a list of layer indices, or a mapping"),
        ({1: {"depth": 2}}, ValueError, "no field 'depth'"),
    ],
    ids=str,
)
def test_a_wrong_choice_of_layers_leaves_the_model_as_it_was(layers, error, message):
    for model, implementation in ((tiny_model("llama"), "sdpa"), (muse_model("llama"), "muse")):
        policy = getattr(model.config, "muse", None)
        with pytest.raises(error, match=message):
            patch_model(model, layers=layers)
        assert model.config._attn_implementation == implementation
        assert getattr(model.config, "muse", None) == policy


@pytest.mark.parametrize("function", [patch_model, unpatch_model])
def test_only_transformers_models_are_taken(function):
    with pytest.raises(TypeError, match="expected a Transformers model, got Linear"):
        function(torch.nn.Linear(1, 1))


def test_what_changes_the_meaning_is_refused():
    windowed = tiny_model("mistral", sliding_window=8)
    with pytest.raises(UnsupportedError, match=r"layers \[0, 1, 2\] of 'mistral' have a sliding window of 8"):
        patch_model(windowed)
    assert windowed.config._attn_implementation == "sdpa", "a refused model is patched all the same"
    dropping = muse_model("llama", attention_dropout=0.1).train()
    with pytest.raises(UnsupportedError, match=r"attention dropout 0\.1"):
        dropping(input_ids=tokens(LONG))


@pytest.mark.parametrize("family", ["bloom", "codegen", "gpt_neo"])
def test_families_that_ignore_the_name_are_refused(family):
    config = AutoConfig.for_model(family)
    with pytest.raises(UnsupportedError, match="supported are bert, gpt2"):
        transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["muse"](1, 8, 8, config=config)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, ids = muse_model("llama").train(), tokens(LONG)
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert_same(parameter.grad, expected[name], f"gradient of {name}", atol=0)


def test_the_report_prints_what_was_done():
    model = tiny_model("llama", attention="eager")
    config = MuseConfig(local_block=256, hierarchy="dyadic", num_retrieved=4)
    special = {"num_clusters": 8, "summaries": "tilted", "multipole": "dipole", "num_retrieved": 0}
    report = patch_model(model, layers={0: {}, -1: special}, config=config)
    assert str(report).splitlines() == [
        "LlamaForCausalLM: MuSe attention in 2 of 3 layers (unpatch_model restores 'eager')",
        "  layer 0: dyadic blocks from 256 tokens, clusters of 40 keys, plain summaries, monopole, "
        "up to 4 retrieved at threshold 0.003",
        "  layer 2: dyadic blocks from 256 tokens, 8 clusters a block, tilted summaries, dipole, 0 retrieved",
    ]
    assert str(patch_model(model, layers=[])) == (
        "LlamaForCausalLM: MuSe attention in 0 of 3 layers (unpatch_model restores 'eager')"
    )


# Inside wrappers, before and after them


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("patched", ["before", "inside", "through the model within"])
def test_peft(family, patched):
    exact, expected = output_of(tiny_model(family), tokens(LONG)), output_of(muse_model(family), tokens(LONG))
    model = tiny_model(family)
    if patched == "before":
        patch_model(model, config=MUSE)
    wrapped = get_peft_model(model, LoraConfig(r=4)).double().eval()
    if patched != "before":
        report = patch_model(wrapped if patched == "inside" else wrapped.get_base_model(), config=MUSE)
        assert report.model == type(model).__name__
    assert_same(output_of(wrapped, tokens(LONG)), expected, f"patched {patched}")
    assert_same(output_of(copy.deepcopy(wrapped), tokens(LONG)), expected, "its deepcopy")

    wrapped.train()(input_ids=tokens(LONG))[0].sum().backward()
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained), "an adapter gets no gradient"
    unpatch_model(wrapped)
    assert_same(output_of(wrapped.eval(), tokens(LONG)), exact, "unpatched inside", atol=0)


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_prefix_tuning_attends_exactly(family):
    """A learned prefix makes more keys than queries at the first forward already."""
    prefix = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5)
    model = get_peft_model(tiny_model(family), prefix).double().eval()
    batch, places = pad_batch([tokens(LONG), tokens(MEDIUM, seed=2)], "right")
    del batch["position_ids"]  # PEFT makes its own
    expected = output_of(model, **batch)
    patch_model(model, config=MUSE)
    found = output_of(model, **batch)
    for place in places:
        assert_same(found[place], expected[place], f"row {place[0]}")


@pytest.mark.parametrize(("patched", "family"), [("before", "gpt2"), ("after the first forward of", "llama")])
def test_compiled_models(patched, family):
    torch._dynamo.reset()
    size = {"n_layer" if family == "gpt2" else "num_hidden_layers": 1}  # every layer is compiled anew
    model, with_muse = tiny_model(family, **size), muse_model(family, **size)
    exact, expected = (output_of(each, tokens(LONG), use_cache=False) for each in (model, with_muse))
    if patched == "before":
        patch_model(model, config=MUSE)
    compiled = torch.compile(model, backend="eager")
    if patched != "before":
        assert_same(output_of(compiled, tokens(LONG), use_cache=False), exact, "compiled before MuSe")
        patch_model(compiled, config=MUSE)
    found = output_of(compiled, tokens(LONG), use_cache=False)
    assert_same(found, expected, f"patched {patched} compiling")
    batch, places = pad_batch([tokens(LONG), tokens(MEDIUM, seed=2)], "left")
    padded = output_of(compiled, **batch, use_cache=False)
    assert_same(padded[places[0]], expected[0], "in a padded batch")
    unpatch_model(compiled)
    assert_same(output_of(compiled, tokens(LONG), use_cache=False), exact, "unpatched")


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile])
def test_wrappers_in_wrappers(wrap):
    model = tiny_model("llama")
    wrapped = wrap(torch.nn.DataParallel(get_peft_model(model, LoraConfig(r=4))))
    assert patch_model(wrapped, config=MUSE).model == "LlamaForCausalLM"
    assert model.config._attn_implementation == "muse"
    unpatch_model(wrapped)
    assert model.config._attn_implementation == "sdpa"


def test_data_parallel_forwards():
    wrapped = torch.nn.DataParallel(tiny_model("llama"))
    patch_model(wrapped, config=MUSE)
    assert_same(output_of(wrapped, tokens(LONG)), output_of(muse_model("llama"), tokens(LONG)), "wrapped")


@pytest.mark.parametrize("target", ["cpu", torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_moving_and_casting_before_and_after_are_the_same(family, target):
    before = muse_model(family, layers=[0, -1]).to(target)
    after = tiny_model(family).to(target)
    exact = output_of(after, tokens(LONG))
    patch_model(after, layers=[0, -1], config=MUSE)
    assert before.config.muse == after.config.muse
    found = output_of(before, tokens(LONG))
    assert found.dtype == before.dtype
    assert_same(found, output_of(after, tokens(LONG)), f".to({target}) before and after patching", atol=0)
    assert_different(found, exact, "MuSe from exact attention", least=0.1)


def test_models_built_from_one_config_are_patched_one_by_one():
    config = tiny_model("llama").config
    first, second = (type(tiny_model("llama"))(config).double().eval() for _ in range(2))
    second.load_state_dict(first.state_dict())
    expected = output_of(second, tokens(LONG))
    patch_model(first, config=MUSE)
    assert_same(output_of(second, tokens(LONG)), expected, "the model that was not patched", atol=0)
    assert_different(output_of(first, tokens(LONG)), expected, "the patched model")


def test_the_attention_in_force_is_the_one_that_is_saved(tmp_path):
    model = tiny_model("llama")
    patch_model(model, config=MUSE)
    for name in ("sdpa", "muse"):
        model.set_attn_implementation(name)
        model.save_pretrained(tmp_path / name)
        reloaded = type(model).from_pretrained(tmp_path / name)
        assert reloaded.config._attn_implementation == name
        assert MuseConfig.from_dict(reloaded.config.muse) == MUSE
