"""The Triton backend against the reference: in Triton's interpreter on the CPU, for real on a GPU."""

import pytest
import torch

from muse_hf import MuseConfig, muse_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = MuseConfig(local_block=16, cluster_size=4, num_retrieved=2, backend="triton")


def inputs(batch=1, heads=2, kv_heads=1, length=70, head_dim=16):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, length, h, head_dim) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(s, generator=generator).to(DEVICE).transpose(1, 2) for s in shapes]


def results(tensors, config):
    """Output, logsumexp and the gradients of query, key and value."""
    *leaves, grad = tensors
    leaves = [tensor.detach().clone().requires_grad_() for tensor in leaves]
    output, lse = muse_attention(*leaves, is_causal=True, config=config, return_lse=True)
    output.backward(grad)
    return [output, lse, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ({}, {}),
        ({"batch": 2, "heads": 1, "length": 48}, {"num_retrieved": 5}),
        ({"length": 39, "head_dim": 24}, {"cluster_size": 2, "kmeans_iters": 2, "cluster_cap": 2.0}),
        ({"heads": 1, "length": 64}, {"num_retrieved": 100}),
        ({"heads": 1, "length": 40}, {"kmeans_iters": 0, "cluster_cap": 1.0}),
    ],
    ids=["grouped heads", "batch of full blocks", "odd sizes", "all retrieved", "balanced clusters"],
)
def test_kernels_compute_what_the_reference_does(shape, changes):
    config = CONFIG.replace(**changes)
    tensors = inputs(**shape)
    expected = results([tensor.double() for tensor in tensors], config.replace(backend="reference"))
    names = ("output", "logsumexp", "query gradient", "key gradient", "value gradient")
    for name, actual, exact in zip(names, results(tensors, config), expected):
        error = (actual.double() - exact).norm() / exact.norm()
        assert error < 2e-6, f"{name}: relative error {error:.1e}"


def test_the_same_inputs_give_the_same_bits():
    tensors = inputs(length=40)
    for first, second in zip(results(tensors, CONFIG), results(tensors, CONFIG)):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"summaries": "tilted", "hierarchy": "dyadic"}, "they serve causal attention with summaries"),
        ({"num_retrieved": 0}, "and retrieval so far"),
        ({"local_block": 128}, "no longer than local_block are exact attention"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_with_the_reason(changes, reason):
    query, key, value, _ = inputs()
    with pytest.raises(NotImplementedError, match=reason):
        muse_attention(query, key, value, is_causal=True, config=CONFIG.replace(**changes))
