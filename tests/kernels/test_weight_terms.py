import math

import pytest
import torch
from muse_hf.kernels.weight_terms import weight_terms

from tests.kernels.comparing import DEVICE, LOW


@pytest.mark.parametrize("scale", [0.125, -3.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_summands_add_up_to_the_terms(dtype, scale):
    torch.manual_seed(0)
    output, grad = (torch.randn(2, 50, 3, 20, device=DEVICE).transpose(1, 2).to(dtype) for _ in range(2))
    lse = torch.randn(3, 100, device=DEVICE) * torch.logspace(-3, 3, 100, device=DEVICE)
    delta, pairs, summands = weight_terms(output, grad, lse, scale)
    expected = (output.double() * grad.double()).sum(-1).transpose(0, 1).flatten(1)
    torch.testing.assert_close(delta.double(), expected, rtol=1e-5, atol=1e-5)
    log2_e = 1 / math.log(2)
    torch.testing.assert_close(pairs, torch.stack([lse * log2_e, delta], -1))
    columns = summands.double()
    assert (columns[..., 3:8] == 0).all()
    assert (columns[..., 11:] == 0).all()
    torch.testing.assert_close(
        columns[..., :3].sum(-1), -lse.double() / (scale or 2.0**-100), rtol=2e-7, atol=0
    )
    torch.testing.assert_close(columns[..., 8:11].sum(-1), -delta.double(), rtol=1e-7, atol=0)


def test_an_infinite_logsumexp_weighs_nothing():
    lse = torch.full((1, 4), torch.inf, device=DEVICE)
    output = torch.ones(1, 1, 4, 16, device=DEVICE)
    for dtype in (torch.float32, *LOW):
        summands = weight_terms(output.to(dtype), output.to(dtype), lse, 0.5).summands
        assert (summands[..., :3].sum(-1) == -torch.inf).all()
