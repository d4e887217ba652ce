"""The reference against exact attention, finite differences, and the properties every backend must have."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muse_hf.config import MuseConfig
from muse_hf.reference import attention, blocks
from muse_hf.reference.attention import causal_chunks, reference_attention

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("repeatable")

# Every combination of parts, as (fields, is_causal).
SETTINGS = [
    ({"summaries": s, "hierarchy": h, "multipole": m, "query_centroids": c}, causal)
    for s, h, m, c, causal in itertools.product(
        ("plain", "tilted"), ("flat", "dyadic"), ("monopole", "dipole"), ("past", "own"), (True, False)
    )
    if not (s == "plain" and (m == "dipole" or c == "own"))
    and not (s == "tilted" and c == "own" and h == "flat")
    and not (not causal and (h == "dyadic" or c == "own"))  # causal choices only
]
STRICTLY_CAUSAL = [fields for fields, causal in SETTINGS if causal and fields["query_centroids"] == "past"]

EVERYTHING = MuseConfig(local_block=16, cluster_size=4, num_retrieved=1000, retrieval_threshold=0.0)


def label(case):
    fields, causal = case if isinstance(case, tuple) else (case, True)
    return "-".join([*fields.values(), "causal" if causal else "acausal"])


def tensors(length, keys=None, groups=2, batch=2, dim=4, seed=0):
    """query (X, G, N, D), key and value (X, K, D) in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, groups, length, dim), (batch, keys or length, dim), (batch, keys or length, dim)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes
    ]


def exact(query, key, value, is_causal):
    logits = query @ key[:, None].transpose(-1, -2)
    if is_causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -torch.inf)
    return logits.softmax(-1) @ value[:, None], logits.logsumexp(-1)


def assert_equal_to_exact(inputs, is_causal, config):
    output, lse = reference_attention(*inputs, is_causal=is_causal, config=config)
    expected, expected_lse = exact(*inputs, is_causal)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(lse, expected_lse)
    weight = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(9))
    found, wanted = (torch.autograd.grad(o, inputs, weight) for o in (output, expected))
    for name, one, other in zip(("query", "key", "value"), found, wanted):
        torch.testing.assert_close(one, other, msg=f"gradient of {name} differs from exact attention")


@pytest.mark.parametrize("case", SETTINGS, ids=label)
@pytest.mark.parametrize("length", [64, 77])
def test_everything_retrieved_is_exact(case, length):
    fields, is_causal = case
    config = EVERYTHING.replace(**fields)
    assert_equal_to_exact(tensors(length), is_causal, config)


@pytest.mark.parametrize("case", SETTINGS, ids=label)
def test_short_sequences_are_exact(case):
    fields, is_causal = case
    config = MuseConfig(local_block=16, cluster_size=4, num_retrieved=0, **fields)
    assert_equal_to_exact(tensors(16), is_causal, config)


@pytest.mark.parametrize(("hierarchy", "is_causal"), [("flat", True), ("dyadic", True), ("flat", False)])
def test_one_key_per_cluster_is_exact_with_plain_summaries(hierarchy, is_causal):
    config = MuseConfig(local_block=16, cluster_size=1, cluster_cap=1.0, num_retrieved=0, hierarchy=hierarchy)
    assert_equal_to_exact(tensors(61), is_causal, config)


def test_one_key_per_cluster_is_exact_at_the_centroids():
    """Tilted summaries of single keys are those keys, so the linear expansion in δ is exact as well."""
    config = MuseConfig(
        local_block=16,
        cluster_size=1,
        cluster_cap=1.0,
        num_retrieved=0,
        summaries="tilted",
        multipole="dipole",
    )
    assert_equal_to_exact(tensors(61), True, config)


@pytest.mark.parametrize("case", SETTINGS, ids=label)
def test_identical_keys_inside_clusters_are_exact(case):
    """Four distinct keys in runs of four: every evenly spaced start is one of them, clusters are pure."""
    fields, is_causal = case
    query, key, value = tensors(72)
    with torch.no_grad():
        key.copy_(key[:, torch.arange(72) // 4 % 4].clone())
    config = MuseConfig(local_block=16, cluster_size=4, num_retrieved=0, cluster_cap=8.0, **fields)
    output, lse = reference_attention(query, key, value, is_causal=is_causal, config=config)
    expected, expected_lse = exact(query, key, value, is_causal)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("case", SETTINGS, ids=label)
@pytest.mark.parametrize(("num_retrieved", "threshold"), [(0, 0.0), (2, 0.0), (3, 0.05)])
def test_gradients_against_finite_differences(case, num_retrieved, threshold, monkeypatch):
    """Clusters, query centroids and choices are constants of the backward pass.

    A small step does not change a cluster or a choice, but it moves centroids: those are held where they
    were, one set for each size of block.
    """
    fields, is_causal = case
    config = MuseConfig(
        local_block=8, cluster_size=3, num_retrieved=num_retrieved, retrieval_threshold=threshold, **fields
    )
    inputs = tensors(22, batch=1, dim=2, seed=3)
    compute, held = blocks._query_centroids, {}

    def query_centroids(query, query_length, config):
        if query.shape not in held:
            held[query.shape] = compute(query, query_length, config)
        return held[query.shape]

    monkeypatch.setattr(blocks, "_query_centroids", query_centroids)

    def output(*arguments):
        return reference_attention(*arguments, is_causal=is_causal, config=config)[0]

    assert torch.autograd.gradcheck(output, inputs, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("fields", STRICTLY_CAUSAL, ids=label)
@given(data=st.data())
def test_prefix_of_the_whole_is_the_whole_of_the_prefix(fields, data):
    length = data.draw(st.integers(1, 100), label="length")
    prefix = data.draw(st.integers(1, length), label="prefix")
    config = MuseConfig(local_block=8, cluster_size=3, num_retrieved=2, **fields)
    inputs = tensors(length)
    whole, whole_lse = reference_attention(*inputs, is_causal=True, config=config)
    cut = [inputs[0][:, :, :prefix], inputs[1][:, :prefix], inputs[2][:, :prefix]]
    alone, alone_lse = reference_attention(*cut, is_causal=True, config=config)
    torch.testing.assert_close(whole[:, :, :prefix], alone)
    torch.testing.assert_close(whole_lse[:, :, :prefix], alone_lse)


@pytest.mark.parametrize("fields", STRICTLY_CAUSAL, ids=label)
@given(length=st.integers(2, 100), share=st.floats(0, 0.99))
def test_a_change_reaches_nothing_before_it(fields, length, share):
    changed = int(share * length)
    config = MuseConfig(local_block=8, cluster_size=3, num_retrieved=2, **fields)
    inputs = [tensor.detach() for tensor in tensors(length)]
    before, _ = reference_attention(*inputs, is_causal=True, config=config)
    for tensor in inputs:
        tensor[..., changed:, :] += 1
    after, _ = reference_attention(*inputs, is_causal=True, config=config)
    torch.testing.assert_close(after[:, :, :changed], before[:, :, :changed])


def test_own_query_centroids_are_not_strictly_causal():
    """The paper's way is kept for comparison, and is documented to leak; this pins that it does."""
    fields = {"summaries": "tilted", "hierarchy": "dyadic", "query_centroids": "own"}
    config = MuseConfig(local_block=8, cluster_size=3, num_retrieved=0, **fields)
    inputs = [tensor.detach() for tensor in tensors(32)]
    before, _ = reference_attention(*inputs, is_causal=True, config=config)
    inputs[0][:, :, 24:] += 1
    after, _ = reference_attention(*inputs, is_causal=True, config=config)
    assert not torch.allclose(after[:, :, 16:24], before[:, :, 16:24])


@pytest.mark.parametrize("case", SETTINGS, ids=label)
def test_same_bits_twice_and_alone(case):
    """Run to run and row by row, forward and backward; gradient checkpointing relies on it."""
    fields, is_causal = case
    config = MuseConfig(local_block=16, cluster_size=4, num_retrieved=3, **fields)

    def run(part):
        inputs = [tensor[part].detach().float().requires_grad_() for tensor in tensors(77, batch=3)]
        output, _ = reference_attention(*inputs, is_causal=is_causal, config=config)
        return [output, *torch.autograd.grad(output.square().sum(), inputs)]

    first, again, alone = run(slice(0, 3)), run(slice(0, 3)), run(slice(1, 2))
    for one, other, row in zip(first, again, alone):
        assert torch.equal(one, other)
        torch.testing.assert_close(one[1:2], row)


def test_working_through_the_batch_in_parts_changes_nothing(monkeypatch):
    config = MuseConfig(local_block=16, cluster_size=4, num_retrieved=3)
    inputs = tensors(50, batch=5)
    whole, _ = reference_attention(*inputs, is_causal=True, config=config)
    monkeypatch.setattr(attention, "_ENTRIES", 1)
    parts, _ = reference_attention(*inputs, is_causal=True, config=config)
    torch.testing.assert_close(parts, whole)


def test_different_lengths_without_causality():
    assert_equal_to_exact(tensors(21, keys=53), False, EVERYTHING)
    tilted = EVERYTHING.replace(summaries="tilted", multipole="dipole")
    assert_equal_to_exact(tensors(53, keys=21), False, tilted)


@pytest.mark.parametrize("summaries", ["plain", "tilted"])
def test_error_falls_with_the_number_of_retrieved_clusters(summaries):
    """The approximation is honest: more budget, less error, none at the end."""
    inputs = [2 * tensor.detach() for tensor in tensors(256, dim=8)]
    expected, _ = exact(*inputs, True)
    errors = []
    for num_retrieved in (0, 4, 16, 64):
        config = EVERYTHING.replace(local_block=32, num_retrieved=num_retrieved, summaries=summaries)
        output, _ = reference_attention(*inputs, is_causal=True, config=config)
        errors.append(((output - expected).norm() / expected.norm()).item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12 < errors[-2]


@pytest.mark.parametrize("summaries", ["plain", "tilted"])
def test_a_threshold_retrieves_what_summaries_miss(summaries, monkeypatch):
    """The lower it is, the more clusters are retrieved, and the smaller is the error."""
    inputs = [tensor.detach() for tensor in tensors(256, dim=8)]
    expected, _ = exact(*inputs, True)
    found, retrieval = [], attention.Retrieval

    def counted(query, choice, blocks, first, last):
        found[-1][0] += (choice < (last - first) * blocks.filled.shape[2]).sum().item()
        return retrieval(query, choice, blocks, first, last)

    monkeypatch.setattr(attention, "Retrieval", counted)
    for threshold in (0.5, 0.1, 0.01, 0.001, 0.0):
        config = MuseConfig(
            local_block=32,
            cluster_size=4,
            num_retrieved=16,
            retrieval_threshold=threshold,
            summaries=summaries,
        )
        found.append([0, 0.0])
        output, _ = reference_attention(*inputs, is_causal=True, config=config)
        found[-1][1] = ((output - expected).norm() / expected.norm()).item()
    many, errors = zip(*found)
    assert many == tuple(sorted(set(many))), "retrieved clusters"
    assert errors == tuple(sorted(errors, reverse=True))
    assert errors[-2] < 1.05 * errors[-1], "clusters that miss less than 0.1% hardly matter"


@given(length=st.integers(1, 400), block=st.integers(1, 40), hierarchy=st.sampled_from(["flat", "dyadic"]))
def test_every_earlier_key_is_seen_exactly_once(length, block, hierarchy):
    for chunk in causal_chunks(length, block, hierarchy):
        times = torch.zeros(length, dtype=torch.int64)
        for level, first, last in chunk.seen:
            for index in range(first, last):
                start = index * block if hierarchy == "flat" else index * 2 * (block << level)
                size = block if hierarchy == "flat" else block << level
                times[start : start + size] += 1
        begin, end = chunk.queries.start, chunk.queries.stop
        assert chunk.keys == chunk.queries, "the diagonal block is exact"
        assert (times[:begin] == 1).all(), f"queries from {begin} must see every key before them once"
        assert (times[begin:] == 0).all(), f"queries from {begin} must see no summary of later keys"
        assert end - begin == min(block, length - begin)


@pytest.mark.parametrize("case", SETTINGS, ids=label)
def test_no_cap_is_one_that_no_cluster_reaches(case):
    fields, is_causal = case
    config = MuseConfig(local_block=16, num_clusters=4, num_retrieved=2, **fields)
    capped, uncapped = (
        reference_attention(*tensors(72), is_causal=is_causal, config=config.replace(cluster_cap=cap))
        for cap in (4.0, None)
    )
    torch.testing.assert_close(uncapped, capped)
