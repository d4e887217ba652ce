"""Where the kernels are tested, and how their results are compared."""

import torch

from muse_hf import muse_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies bfloat16 as if it were integers.
LOW = (torch.float16, torch.bfloat16) if torch.cuda.is_available() else (torch.float16,)
NAMES = ("output", "logsumexp", "query gradient", "key gradient", "value gradient")


def results(tensors, config, is_causal=True, segments=None, scale=None):
    """Output, logsumexp and the gradients of query, key and value, given these and the output's gradient."""
    *leaves, grad = tensors
    leaves = [tensor.detach().requires_grad_() for tensor in leaves]
    output, lse = muse_attention(
        *leaves, is_causal=is_causal, scale=scale, config=config, segments=segments, return_lse=True
    )
    return [output, lse, *torch.autograd.grad(output, leaves, grad)]


def reference(tensors, config, is_causal=True, scale=None):
    return results(tensors, config.replace(backend="reference"), is_causal, scale=scale)


def error(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item()


def check(tensors, config, is_causal=True, scale=None):
    """The results are those of the reference in double precision."""
    expected = reference([tensor.double() for tensor in tensors], config, is_causal, scale)
    for name, actual, exact in zip(NAMES, results(tensors, config, is_causal, scale=scale), expected):
        assert error(actual, exact) < 2e-6, f"{name}: relative error {error(actual, exact):.1e}"


def check_sequences(tensors, config, segments, alone):
    """The results of a padded and packed batch are those of each sequence alone, and 0 outside of them.

    Args:
        alone: Gives the results of one sequence's tensors.
    """
    together = results(tensors, config, segments=segments)
    outside = ~segments.token_mask(tensors[0].device)
    for name, result in zip(NAMES, together):
        assert (result[outside[:, None].expand(result.shape[:3])] == 0).all(), f"{name} outside the sequences"
    for row, start, length in zip(segments.rows, segments.starts, segments.lengths):
        place = (slice(row, row + 1), slice(None), slice(start, start + length))
        for name, result, expected in zip(NAMES, together, alone([tensor[place] for tensor in tensors])):
            torch.testing.assert_close(
                result[place], expected, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
