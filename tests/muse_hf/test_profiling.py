"""Profiles and choices on tiny random models: they agree with patching by hand and leave models alone."""

import json

import pytest
import torch

from muse_hf import MuseConfig, patch_model, profile_layers, recommend_config, unpatch_model
from muse_hf.choosing import RETRIEVED, Option, assignments
from muse_hf.models import token_losses
from muse_hf.profiling import _gradients, exact_parts
from muse_hf.routing import UnsupportedError
from tests.models import CAUSAL_FAMILIES, EVERYTHING, FAMILIES, LONG, MUSE, output_of, tiny_model, tokens

TEXT = tokens(LONG, rows=2)


def text_of(model) -> torch.Tensor:
    """Text that the model expects, whose loss MuSe raises; that of random tokens may fall as well."""
    torch.manual_seed(0)
    length = {"max_new_tokens": LONG - 8, "min_new_tokens": LONG - 8}
    return model.generate(tokens(8, rows=2), do_sample=True, pad_token_id=0, **length)


def loss_of(model, input_ids=TEXT) -> float:
    with torch.no_grad():
        return model(input_ids=input_ids, labels=input_ids).loss.item()


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_token_losses_are_the_models_loss(family, monkeypatch):
    monkeypatch.setattr("muse_hf.models._TOKENS_OF_LOGITS", 16)
    model = tiny_model(family)
    losses = token_losses(model, TEXT)
    assert losses.shape == (2, LONG - 1)
    assert losses.mean().item() == pytest.approx(loss_of(model), abs=1e-5)


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_loss_changes_agree_with_patching_by_hand(family):
    model = tiny_model(family)
    profile = profile_layers(model, TEXT, MUSE)
    assert profile.exact_loss == pytest.approx(loss_of(model), abs=1e-5)
    for entry in profile.layers:
        patch_model(model, layers=[entry.layer], config=MUSE)
        by_hand = loss_of(model) - profile.exact_loss
        assert entry.change == pytest.approx(by_hand, abs=1e-5), f"layer {entry.layer}"
        assert entry.harm == pytest.approx(by_hand / profile.exact_loss, abs=1e-5)
        assert abs(by_hand) > 1e-4, "MuSe changed nothing, so that this test shows nothing"
    assert profile.by_harm() == sorted((0, 1, 2), key=lambda layer: -profile.layers[layer].harm)


@pytest.mark.parametrize("is_causal", [True, False])
def test_exact_attention_in_parts(is_causal, monkeypatch):
    monkeypatch.setattr("muse_hf.profiling._LOGITS", 8 * LONG * 11)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, LONG, 8, dtype=torch.float64, generator=generator)
    key, value = torch.randn(2, 2, 2, LONG, 8, dtype=torch.float64, generator=generator)
    logits = 0.7 * query @ key.repeat_interleave(2, 1).transpose(-1, -2)
    if is_causal:
        logits = logits.masked_fill(torch.ones(LONG, LONG, dtype=torch.bool).triu(1), -torch.inf)
    parts = list(exact_parts(query, key, value, is_causal=is_causal, scale=0.7))
    assert [part.stop - part.start for part, *_ in parts] == [11] * 6 + [4]
    output, lse = (torch.cat([part[i] for part in parts], dim=2) for i in (1, 2))
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(output, logits.softmax(-1) @ value.repeat_interleave(2, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_of_heads(family):
    """The profile of layer 0, whose inputs are the same with exact attention and with MuSe."""
    model, heads = tiny_model(family), {}

    def outputs(name):
        heads[name] = []
        attention = next(
            m for n, m in model.named_modules() if n.endswith(("self_attn", "attn", "attention.self"))
        )
        projection = next((m for n, m in attention.named_modules() if n in ("o_proj", "c_proj")), None)
        if projection is None:  # BERT projects in another module
            hook = attention.register_forward_hook(lambda _, __, output: heads[name].append(output[0]))
        else:
            hook = projection.register_forward_pre_hook(lambda _, inputs: heads[name].append(inputs[0]))
        output_of(model, TEXT)
        hook.remove()
        return heads[name][0].unflatten(-1, (4, -1))

    exact = outputs("exact")
    patch_model(model, config=MUSE)
    difference = (outputs("muse") - exact).square().sum((0, 1, 3)) / exact.square().sum((0, 1, 3))
    entry = profile_layers(model, TEXT, MUSE).layers[0]
    assert entry.output_error == pytest.approx(difference.tolist(), rel=1e-6)
    assert min(entry.output_error) > 0
    assert max(entry.lse_bias) < 1e-9, "summaries are a lower bound of the logsumexp"
    assert entry.exact_ms > 0
    assert entry.muse_ms > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_retrieved_is_harmless(family):
    for entry in profile_layers(tiny_model(family), TEXT, EVERYTHING).layers:
        assert max(entry.output_error) < 1e-12, f"layer {entry.layer}"
        assert max(map(abs, entry.lse_bias)) < 1e-9
        assert abs(entry.harm) < 1e-6


def test_encoders_are_judged_by_their_output():
    model = tiny_model("bert")
    exact = output_of(model, TEXT)
    profile = profile_layers(model, TEXT, MUSE)
    assert profile.exact_loss is None
    patch_model(model, layers=[1], config=MUSE)
    error = (output_of(model, TEXT) - exact).square().sum() / exact.square().sum()
    assert profile.layers[1].harm == profile.layers[1].change == pytest.approx(error.item(), rel=1e-3)
    assert "model output error" in str(profile)


@pytest.mark.parametrize("patched", [False, True])
def test_the_model_is_left_as_it_was(patched):
    model = tiny_model("llama").train()
    model.lm_head.eval()
    if patched:
        patch_model(model, layers=[1], config=MUSE)
    before = (model.config.to_dict(), model.config._attn_implementation, output_of(model, TEXT))
    profile = profile_layers(model, TEXT, None if patched else MUSE)
    with pytest.raises(IndexError):
        profile_layers(model, TEXT + 1000, MUSE)
    assert [entry.layer for entry in profile.layers] == ([1] if patched else [0, 1, 2])
    after = (model.config.to_dict(), model.config._attn_implementation, output_of(model, TEXT))
    assert after[:2] == before[:2]
    assert torch.equal(after[2], before[2])
    assert (model.training, model.lm_head.training) == (True, False)


def test_a_profile_prints_saves_and_draws(tmp_path):
    settings = MUSE.replace(layers={0: {}, 2: {"num_retrieved": 0}})
    profile = profile_layers(tiny_model("qwen3"), TEXT, settings)
    printed = str(profile)
    for part in (
        "Qwen3ForCausalLM, 2 x 70 tokens, float64 on cpu; loss",
        "2 retrieved",
        "0 retrieved",
    ):
        assert part in printed, printed
    assert (
        printed.splitlines()[-1] == f"layers by harm, worst first: {', '.join(map(str, profile.by_harm()))}"
    )
    profile.save(tmp_path / "profile.json")
    saved = json.loads((tmp_path / "profile.json").read_text())
    assert saved["layers"][1]["output_error"] == profile.layers[1].output_error
    assert MuseConfig.from_dict(saved["layers"][1]["config"]).num_retrieved == 0
    profile.plot(tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes()[:4] == b"\x89PNG"


# layers="auto"


@pytest.fixture
def costs(monkeypatch):
    """Times that follow from the setting alone, so that what is chosen does not depend on the clock.

    Lists what was timed.
    """
    timed = []

    def milliseconds(call, device, in_a_row):
        timed.append(call.func)
        attention = call.args[0] if call.func is _gradients else call
        config = attention.keywords.get("config")
        return 100.0 if config is None else 1.0 + config.num_retrieved

    monkeypatch.setattr("muse_hf.profiling.milliseconds", milliseconds)
    monkeypatch.setattr("muse_hf.choosing.RETRIEVED", ((0, 0.0), (2, 0.0), (4, 0.0), (8, 0.0)))
    return timed


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_keeps_the_budget_and_saves_its_choice(family, costs, tmp_path):
    model = tiny_model(family)
    text = TEXT if family == "bert" else text_of(model)
    report = patch_model(model, layers="auto", config=MUSE, calibration=text, max_loss_increase=1e9)
    assert [config.num_retrieved for config in report.layers.values()] == [0, 0, 0]
    assert set(costs) == {_gradients}, "what counts is the time of training"

    patch_model(model, layers="auto", config=MUSE, calibration=text, max_loss_increase=0.0)
    assert model_harm(model, tiny_model(family), text) <= 1e-6

    budget = report.choice.predicted / 3
    report = patch_model(model, layers="auto", config=MUSE, calibration=text, max_loss_increase=budget)
    assert report.choice.measured == pytest.approx(model_harm(model, tiny_model(family), text), abs=1e-5)
    assert report.choice.measured <= budget
    assert sum(option.ms for option in report.choice.chosen.values()) < 300, "all layers stay exact"
    assert str(report.choice) in str(report)
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).config.muse == report.choice.policy.to_dict()
    unpatch_model(model)
    assert model.config._attn_implementation == "sdpa"


def model_harm(model, exact, text) -> float:
    if model.config.model_type != "bert":
        return loss_of(model, text) / loss_of(exact, text) - 1
    expected = output_of(exact, text)
    return ((output_of(model, text) - expected).square().sum() / expected.square().sum()).item()


def test_assignments_go_from_the_fastest_to_exact_and_then_to_shared_steps():
    options = {
        0: [Option(0, 1.0, 0.5), Option(8, 2.0, 0.1), Option(32, 9.0, 0.05), Option(None, 5.0, 0.0)],
        1: [Option(0, 1.0, -0.1), Option(8, 2.0, 0.1), Option(32, 9.0, 0.0), Option(None, 5.0, 0.0)],
    }
    found = [tuple(option.num_retrieved for option in chosen.values()) for chosen in assignments(options)]
    assert found == [(0, 0), (8, 0), (None, 0), (8, 8), (None, None)]


def test_a_step_that_happens_to_cost_nothing_does_not_leave_exact_attention_only():
    choices = [Option(0, 1.0, -0.1), Option(8, 2.0, -0.1), Option(None, 5.0, 0.0)]
    options = {0: choices, 1: choices}
    found = [tuple(option.num_retrieved for option in chosen.values()) for chosen in assignments(options)]
    assert found == [(0, 0), (8, 8), (None, None)]


def test_the_default_setting_is_a_step_of_the_ladder():
    assert (MuseConfig().num_retrieved, MuseConfig().retrieval_threshold) in RETRIEVED


def test_auto_leaves_layers_with_a_window_exact(costs):
    windowed = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    model = tiny_model("qwen2", **windowed)
    report = patch_model(model, layers="auto", config=MUSE, calibration=TEXT, max_loss_increase=1e9)
    assert list(report.layers) == [0]


def test_auto_refuses_a_model_with_windows_everywhere():
    model = tiny_model("mistral", sliding_window=8)
    with pytest.raises(UnsupportedError, match="have a sliding window of 8 tokens"):
        patch_model(model, layers="auto", config=MUSE, calibration=TEXT)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": "auto"}, ValueError, "give calibration=input_ids"),
        ({"layers": "all", "calibration": TEXT}, ValueError, 'calibration is for layers="auto"'),
        (
            {"layers": "auto", "calibration": TEXT[:, :16]},
            ValueError,
            "16 tokens are not more than local_block",
        ),
        ({"layers": "auto", "calibration": TEXT[0]}, TypeError, "of shape \\(rows, tokens\\)"),
        ({"layers": "auto", "calibration": TEXT, "max_loss_increase": -1}, ValueError, "must be at least 0"),
        ({"layers": "auto", "calibration": TEXT, "max_loss_increase": "1%"}, TypeError, "must be a number"),
    ],
    ids=str,
)
def test_what_auto_refuses(arguments, error, message):
    model = tiny_model("llama")
    with pytest.raises(error, match=message):
        patch_model(model, config=MUSE, **arguments)
    assert model.config._attn_implementation == "sdpa"


def test_too_many_tokens_for_learned_positions():
    with pytest.raises(ValueError, match="the 'gpt2' model has 128 positions and cannot read 140 tokens"):
        profile_layers(tiny_model("gpt2"), tokens(140), MUSE)


def test_short_text_leaves_a_margin(costs, monkeypatch):
    """What differs much along the text may differ on other text: its standard error counts against it."""
    monkeypatch.setattr("muse_hf.profiling._OBSERVED_TOKENS", 8)
    model = tiny_model("llama")
    text = text_of(model)
    entry = profile_layers(model, text, MUSE).layers[1]
    patch_model(model, layers=[1], config=MUSE)
    exact = tiny_model("llama")
    change = (token_losses(model, text) - token_losses(exact, text)).flatten() / loss_of(exact, text)
    pieces = torch.stack([piece.mean() for piece in change.split(8)])
    assert entry.harm_error == pytest.approx((pieces.var() / len(pieces)).sqrt().item(), rel=1e-3)

    report = patch_model(model, layers="auto", config=MUSE, calibration=text, max_loss_increase=0.02)
    assert sum(max(0, option.harm) for option in report.choice.chosen.values()) <= 0.02
    assert report.choice.measured + report.choice.measured_error <= 0.02
    assert report.layers, "nothing was chosen, so that this test shows nothing"


def test_the_recommendation_is_the_fastest_within_the_budget(monkeypatch):
    monkeypatch.setattr("muse_hf.choosing._LOCAL_BLOCKS", (16, 32, 128))
    monkeypatch.setattr("muse_hf.choosing._CLUSTER_SIZES", (4,))
    monkeypatch.setattr("muse_hf.choosing._RETRIEVED_KEYS", 400)
    monkeypatch.setattr("muse_hf.choosing._THRESHOLDS", (0.5, 0.0))
    clock = iter([5.0, 1.0, 4.0, 3.0, 2.0])
    monkeypatch.setattr("muse_hf.choosing.milliseconds", lambda call, device: next(clock))
    model = tiny_model("llama")
    found = recommend_config(model, text_of(model), max_loss_increase=1e-6)
    assert [candidate.ms for candidate in found.candidates] == [5.0, 1.0, 2.0, 3.0, 4.0]
    best = found.best.config
    assert (best.local_block, best.num_retrieved, best.retrieval_threshold) == (32, 100, 0.0)
    assert found.best.ms == 2.0
    assert "Recommended: flat blocks from 32 tokens, clusters of 4 keys" in str(found)
    assert "2.50x as fast as exact attention" in str(found)
    json.dumps(found.to_dict())


def test_what_was_measured_is_in_force_at_that_length(costs):
    """Also where sequences of that length would attend exactly otherwise; shorter ones go on doing so."""
    model = tiny_model("llama")
    config = MUSE.replace(min_length=LONG + 1)
    alone, alike = (profile_layers(model, TEXT, c).layers[0].change for c in (config, MUSE))
    assert alone == pytest.approx(alike) != 0, "profiling looked at min_length"
    patch_model(model, layers="auto", config=config, calibration=TEXT, max_loss_increase=1e9)
    assert model.config.muse["min_length"] == LONG
    patch_model(model, layers="auto", config=MUSE, calibration=TEXT, max_loss_increase=1e9)
    assert model.config.muse["min_length"] is None
