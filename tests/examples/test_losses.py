"""The chunked loss of the pretraining example against the loss of all logits."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from tests.examples import running  # noqa: F401  finds the examples

# isort: split
from corpus import UsageError
from losses import PLAIN_HEADS, check_chunked_loss, linear_cross_entropy, use_chunked_loss


@pytest.mark.parametrize("chunk", [1, 7, 20, 100])
def test_chunks_have_the_loss_and_the_gradients_of_all_logits(chunk):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 8, generator=generator).requires_grad_()
    weight = torch.randn(30, 8, generator=generator).requires_grad_()
    targets = torch.randint(30, (20,), generator=generator)
    expected = functional.cross_entropy(hidden @ weight.T, targets)
    loss = linear_cross_entropy(hidden, weight, targets, chunk)
    torch.testing.assert_close(loss, expected)
    tensors = (hidden, weight)
    for name, got, wanted in zip(
        ("hidden", "weight"), torch.autograd.grad(loss, tensors), torch.autograd.grad(expected, tensors)
    ):
        torch.testing.assert_close(got, wanted, msg=lambda text, name=name: f"gradient of {name}: {text}")


def test_chunks_lose_no_precision_under_autocast():
    """The weight's gradient is a sum over chunks, which is not to be rounded to bfloat16 after each."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(512, 32, generator=generator), torch.randn(64, 32, generator=generator) / 6
    targets = torch.randint(64, (512,), generator=generator)

    def gradient(chunk, enabled):
        leaf = weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = linear_cross_entropy(hidden, leaf, targets, chunk)
        return torch.autograd.grad(loss, leaf)[0]

    exact = gradient(512, enabled=False)
    whole, chunked = ((gradient(chunk, enabled=True) - exact).norm() for chunk in (512, 4))
    assert chunked < 1.1 * whole, f"128 chunks have {chunked / whole:.1f} times the error of one"


@pytest.mark.parametrize("family", PLAIN_HEADS)
def test_a_model_has_the_loss_and_the_gradients_that_it_had(family):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    small |= {"vocab_size": 50, "num_key_value_heads": 2, "head_dim": 16, "attention_dropout": 0.0}
    if family == "gpt2":
        small = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 50}
        small |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **small))
    model.loss_type = "ForCausalLM"
    input_ids = torch.randint(50, (2, 24))
    results = []
    for chunked in (False, True):
        if chunked:
            use_chunked_loss(model, chunk=10)
        model.zero_grad()
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        results.append((loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
    assert model(input_ids=input_ids).logits.shape == (2, 24, 50), "without labels there are no logits"


def test_another_family_is_refused():
    """Gemma 2, for instance, caps its logits."""
    with pytest.raises(UsageError, match="not for a 'gemma2' model"):
        check_chunked_loss(AutoConfig.for_model("gemma2"))
