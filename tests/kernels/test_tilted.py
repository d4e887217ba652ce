"""Kernels of the paper's setting against the reference: interpreted on the CPU, for real on a GPU."""

from functools import partial

import pytest
import torch
from muse_hf.kernels import (
    kmeans,
    point_sets,
    tilted_attention,
    tilted_dipole,
    tilted_refinement,
    tilted_summaries,
)
from torch.utils.checkpoint import checkpoint

from muse_hf import MuseConfig, Segments, muse_attention
from tests.kernels.comparing import DEVICE, LOW, NAMES, check, check_sequences, error, reference, results

CONFIG = MuseConfig.paper(local_block=16, num_clusters=6, backend="triton")
# Few clusters, for tests that run several times.
SMALL = CONFIG.replace(num_clusters=2)


def inputs(batch=1, heads=1, kv_heads=1, queries=40, keys=50, head_dim=16):
    """Query, key, value and the gradient of the output, as views that are not contiguous."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, n, h, head_dim) for n, h in ((queries, heads), (keys, kv_heads))]
    return [
        torch.randn(s, generator=generator).to(DEVICE).transpose(1, 2)
        for s in (shapes[0], shapes[1], shapes[1], shapes[0])
    ]


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ({"heads": 4, "kv_heads": 2, "queries": 30}, {}),
        ({"batch": 2, "head_dim": 24, "keys": 33}, {"multipole": "monopole", "kmeans_iters": 2}),
        ({}, {"cluster_size": 3, "kmeans_iters": 0, "cluster_cap": 1.0}),
    ],
    ids=["grouped heads", "odd head size, batch, monopole", "balanced clusters"],
)
def test_acausal_kernels_compute_what_the_reference_does(shape, changes):
    check(inputs(**shape), CONFIG.replace(**changes), is_causal=False)


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ({"heads": 4, "kv_heads": 2, "keys": 70}, {}),
        ({"batch": 2, "head_dim": 24, "keys": 48}, {"multipole": "monopole", "query_centroids": "own"}),
        (
            {"heads": 2, "kv_heads": 2, "keys": 37},
            {"cluster_size": 3, "query_centroids": "own", "cluster_cap": 1.5},
        ),
    ],
    ids=["grouped heads, three levels", "full blocks, own centroids", "capped, fewer queries than clusters"],
)
def test_causal_kernels_compute_what_the_reference_does(shape, changes):
    check(inputs(queries=shape["keys"], **shape), CONFIG.replace(**changes))


def test_a_negative_scale():
    check(inputs(queries=40, keys=40), CONFIG, scale=-0.3)


@pytest.mark.parametrize("is_causal", [True, False])
def test_keys_of_one_cluster_and_clusters_without_keys(is_causal):
    query, key, value, grad = inputs(heads=2, queries=40, keys=40)
    key[:, :, 3:] = key[:, :, 2:3]
    check([query, key, value, grad], CONFIG, is_causal)


def test_without_a_cap_nothing_counts_places_for_members():
    keys, queries = tilted_attention.acausal_sets(1, 1 << 18, 1 << 18, (1 << 14, 1 << 14), 0)
    sets = point_sets.point_sets(keys, queries, torch.device("cpu"))
    assert not sets.capped
    assert sets.num_slots == 0, "they would be more than int32 can count"


def test_many_clusters_and_tokens_are_worked_through_in_parts(monkeypatch):
    for module, name in (
        (kmeans, "_LARGEST_TILE"),
        (tilted_summaries, "_TILE"),
        (tilted_dipole, "_TILE"),
        (tilted_refinement, "_TILE"),
    ):
        monkeypatch.setattr(module, name, 16)
    monkeypatch.setattr(point_sets, "_CHUNK", 16)
    monkeypatch.setattr(point_sets, "_CHUNK_PER_CLUSTER", 1)
    check(inputs(keys=70, queries=60), CONFIG.replace(local_block=20, num_clusters=20), is_causal=False)


def test_packed_and_padded_sequences_equal_each_alone():
    """Documents of several lengths, a short one too, with padding before, between and behind them."""
    segments = Segments((2, 60), rows=[0, 0, 1], starts=[3, 13, 0], lengths=[8, 44, 20])
    tensors = inputs(batch=2, queries=60, keys=60)
    check_sequences(tensors, CONFIG, segments, partial(reference, config=CONFIG))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    ("is_causal", "tokens", "head_dim", "num_clusters"),
    [(True, 48, 16, 3), (False, 40, 144, 16), (False, 150, 80, 64), (False, 90, 64, 70)],
    ids=["causal", "dipole in parts", "head_dim 80", "tiles of clusters"],
)
def test_low_precision_costs_no_more_than_rounding(dtype, is_causal, tokens, head_dim, num_clusters):
    """Inputs of a few bits, and some of them as centroids: clusters are the same in every precision."""
    config = CONFIG.replace(kmeans_iters=0, num_clusters=num_clusters, local_block=max(16, num_clusters))
    tensors = [
        (tensor * 4).round().div(4).to(dtype)
        for tensor in inputs(keys=tokens, queries=tokens, head_dim=head_dim)
    ]
    exact = reference([tensor.double() for tensor in tensors], config, is_causal)
    low = reference(tensors, config, is_causal)
    for name, actual, rounded, expected in zip(NAMES, results(tensors, config, is_causal), low, exact):
        here, usual = error(actual, expected), error(rounded, expected)
        assert here < 2 * usual + 1e-3, f"{name}: relative error {here:.1e}, the reference's {usual:.1e}"


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("capacities", [[21, 21], [0, 0]], ids=["capped", "uncapped"])
def test_operators_are_declared_rightly(is_causal, capacities):
    query, key, value, _ = inputs(queries=40, keys=40)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    levels = ([0, 40] if is_causal else [], 16, [3, 3], capacities)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (*leaves, 0.25, *levels, False, 1, True)
    torch.library.opcheck(tilted_attention.OP.operator, arguments, test_utils=tests)


@pytest.mark.parametrize("is_causal", [True, False])
def test_compiled_in_one_graph_and_checkpointed(is_causal):
    tensors = inputs(queries=34, keys=34)[:3]
    plain = partial(square_sum, is_causal=is_causal)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    checkpointed = partial(checkpoint, plain, use_reentrant=False)
    gradients = []
    for function in (plain, compiled, checkpointed):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        gradients.append(torch.autograd.grad(function(*leaves), leaves))
    for name, expected, *others in zip(NAMES[2:], *gradients):
        assert all(torch.equal(expected, other) for other in others), name


def square_sum(query, key, value, is_causal):
    return muse_attention(query, key, value, is_causal=is_causal, config=SMALL).square().sum()


@pytest.mark.parametrize(
    ("is_causal", "changes", "reason"),
    [
        (True, {"num_retrieved": 1}, "num_retrieved=0"),
        (True, {"hierarchy": "flat"}, "hierarchy=.dyadic"),
        (False, {"summaries": "plain", "multipole": "monopole"}, "causal attention"),
    ],
)
def test_what_is_not_served_is_refused(is_causal, changes, reason):
    with pytest.raises(NotImplementedError, match=reason):
        muse_attention(*inputs(queries=50)[:3], is_causal=is_causal, config=CONFIG.replace(**changes))


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_same_inputs_give_the_same_bits(is_causal):
    tensors = inputs(queries=34, keys=34)
    for first, second in zip(*(results(tensors, SMALL, is_causal) for _ in range(2))):
        assert torch.equal(first, second)
