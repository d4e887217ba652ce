"""Kernels of the paper's setting against the reference: interpreted on the CPU, for real on a GPU."""

import pytest
import torch
from muse_hf.kernels import kmeans, point_sets, tilted_refinement, tilted_summaries

from muse_hf import MuseConfig, muse_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = MuseConfig.paper(local_block=16, num_clusters=6, backend="triton")
NAMES = ("output", "logsumexp", "query gradient", "key gradient", "value gradient")


def inputs(batch=1, heads=1, kv_heads=1, queries=40, keys=50, head_dim=16):
    """Query, key, value and the gradient of the output, as views that are not contiguous."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, n, h, head_dim) for n, h in ((queries, heads), (keys, kv_heads))]
    return [
        torch.randn(s, generator=generator).to(DEVICE).transpose(1, 2)
        for s in (shapes[0], shapes[1], shapes[1], shapes[0])
    ]


def results(tensors, is_causal, config, segments=None):
    """Output, logsumexp and the gradients of query, key and value."""
    *leaves, grad = tensors
    leaves = [tensor.detach().requires_grad_() for tensor in leaves]
    output, lse = muse_attention(
        *leaves, is_causal=is_causal, config=config, segments=segments, return_lse=True
    )
    return [output, lse, *torch.autograd.grad(output, leaves, grad)]


def check(tensors, is_causal, config):
    expected = results([tensor.double() for tensor in tensors], is_causal, config.replace(backend="reference"))
    for name, actual, exact in zip(NAMES, results(tensors, is_causal, config), expected):
        error = (actual.double() - exact).norm() / exact.norm()
        assert error < 2e-6, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ({"heads": 2, "queries": 30}, {}),
        ({"batch": 2, "head_dim": 24, "keys": 33}, {"multipole": "monopole", "kmeans_iters": 2}),
        ({}, {"cluster_size": 3, "kmeans_iters": 0, "cluster_cap": 1.0}),
    ],
    ids=["grouped heads", "odd head size, batch, monopole", "balanced clusters"],
)
def test_acausal_kernels_compute_what_the_reference_does(shape, changes):
    check(inputs(**shape), False, CONFIG.replace(**changes))


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ({"heads": 2, "keys": 70}, {}),
        ({"batch": 2, "head_dim": 24, "keys": 48}, {"multipole": "monopole", "query_centroids": "own"}),
        ({"keys": 37}, {"cluster_size": 3, "query_centroids": "own"}),
    ],
    ids=["grouped heads, three levels", "full blocks, own centroids", "fewer queries than clusters"],
)
def test_causal_kernels_compute_what_the_reference_does(shape, changes):
    check(inputs(queries=shape["keys"], **shape), True, CONFIG.replace(**changes))


def test_many_clusters_and_tokens_are_worked_through_in_parts(monkeypatch):
    for module, name in (
        (kmeans, "_LARGEST_TILE"),
        (tilted_summaries, "_TILE"),
        (tilted_refinement, "_TILE"),
    ):
        monkeypatch.setattr(module, name, 16)
    monkeypatch.setattr(point_sets, "_CHUNK", 16)
    monkeypatch.setattr(point_sets, "_CHUNK_PER_CLUSTER", 1)
    check(inputs(keys=70, queries=60), False, CONFIG.replace(local_block=20, num_clusters=20))


def test_the_same_inputs_give_the_same_bits():
    tensors = inputs(queries=30, keys=30)
    for first, second in zip(results(tensors, False, CONFIG), results(tensors, False, CONFIG)):
        assert torch.equal(first, second)
