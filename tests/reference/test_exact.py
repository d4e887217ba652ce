"""The exact part: library kernel and plain formula, with the merged output and logsumexp in backward."""

import pytest
import torch

from muse_hf.reference.exact import exact_backward, exact_forward, softmax_backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_causal", [True, False])
def test_share_of_the_gradients_in_a_larger_softmax(dtype, is_causal):
    """Keys 0 to 8 are this part, keys 9 to 12 stand for the others that it is merged with."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in [(2, 3, 9, 4), (2, 13, 4), (2, 13, 4), (2, 3, 9, 4)]
    )
    logits = query @ key[:, None].transpose(-1, -2)
    if is_causal:
        hidden = torch.ones(9, 13).triu(1).bool()
        hidden[:, 9:] = False
        logits = logits.masked_fill(hidden, -torch.inf)
    output, lse = logits.softmax(-1) @ value[:, None], logits.logsumexp(-1)
    wanted = torch.autograd.grad(output, (query, key, value), grad, retain_graph=True)

    own_key, own_value = key[:, :9].detach(), value[:, :9].detach()
    part, part_lse = exact_forward(query.detach(), own_key, own_value, is_causal=is_causal)
    torch.testing.assert_close(part_lse, logits[..., :9].logsumexp(-1))
    torch.testing.assert_close(part, logits[..., :9].softmax(-1) @ own_value[:, None])

    found = exact_backward(
        grad.detach(), query.detach(), own_key, own_value, output.detach(), lse.detach(), is_causal=is_causal
    )
    torch.testing.assert_close(found[1], wanted[1][:, :9])
    torch.testing.assert_close(found[2], wanted[2][:, :9])

    plain = softmax_backward(
        grad,
        query,
        own_key[:, None],
        own_value[:, None],
        logits[..., :9].clone(),
        lse,
        (grad * output).sum(-1),
    )
    for one, other in zip(found, (plain[0], plain[1].sum(1), plain[2].sum(1))):
        torch.testing.assert_close(one, other)


def test_bias_hides_keys():
    query, key, value = torch.randn(2, 1, 5, 4), torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    bias = torch.zeros(2, 6)
    bias[:, 4:] = -1e30
    hidden = exact_forward(query, key, value, is_causal=False, bias=bias)
    alone = exact_forward(query, key[:, :4], value[:, :4], is_causal=False)
    for one, other in zip(hidden, alone):
        torch.testing.assert_close(one, other)
