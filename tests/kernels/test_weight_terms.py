import math

import pytest
import torch
from muse_hf.kernels.weight_terms import weight_terms

from tests.kernels.comparing import DEVICE, LOW


@pytest.mark.parametrize("scale", [0.125, -3.0, 0.0])
@pytest.mark.parametrize("dtype", LOW)
def test_summands_add_up_to_the_terms(dtype, scale):
    torch.manual_seed(0)
    output, grad = (torch.randn(2, 50, 3, 20, device=DEVICE).transpose(1, 2).to(dtype) for _ in range(2))
    lse = torch.randn(3, 100, device=DEVICE) * torch.logspace(-3, 3, 100, device=DEVICE)
    delta, terms, summands = weight_terms(output, grad, lse, scale)
    expected = (output.double() * grad.double()).sum(-1).transpose(0, 1).flatten(1)
    torch.testing.assert_close(delta.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms, torch.stack([lse / math.log(2), delta], -1))
    minus_lse, minus_delta = summands.double().sum(-1).unbind(-1)
    torch.testing.assert_close(minus_lse, -lse.double() / (scale or 2.0**-100), rtol=2e-7, atol=0)
    torch.testing.assert_close(minus_delta, -delta.double(), rtol=1e-7, atol=0)


def test_summands_of_what_is_infinite_are_infinite():
    ones = torch.ones(1, 1, 4, 16, device=DEVICE, dtype=torch.float16)
    lse = torch.full((1, 4), torch.inf, device=DEVICE)
    minus_lse, minus_delta = weight_terms(ones, ones, lse, 0.5).summands.sum(-1).unbind(-1)
    assert (minus_lse == -torch.inf).all(), "nan would reach the gradients of other tokens"
    assert (minus_delta == -16).all()


def test_summands_are_there_if_they_are_needed():
    ones, lse = torch.ones(1, 1, 4, 16, device=DEVICE), torch.ones(1, 4, device=DEVICE)
    assert weight_terms(ones, ones, lse, 0.5).summands is None, "float32"
    assert weight_terms(ones.half(), ones.half(), lse).summands is None
