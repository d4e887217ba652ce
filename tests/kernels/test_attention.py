"""The Triton backend against the reference: in Triton's interpreter on the CPU, for real on a GPU."""

from types import SimpleNamespace

import pytest
import torch
from muse_hf.kernels import attention, common, operators, refinement_backward
from torch.utils.checkpoint import checkpoint

from muse_hf import MuseConfig, Segments, muse_attention
from tests.kernels.comparing import DEVICE, LOW, NAMES, check, check_sequences, error, reference, results
from tests.kernels.dense import chosen_clusters, dense_attention

CONFIG = MuseConfig(
    local_block=16,
    cluster_size=4,
    num_retrieved=2,
    retrieval_threshold=0.0,
    kmeans_iters=1,
    cluster_cap=1.5,
    backend="triton",
)


def inputs(batch=1, heads=2, kv_heads=1, length=70, head_dim=16, dtype=torch.float32):
    """Query, key, value and a gradient of the output, as models lay them out."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, length, h, head_dim) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(s, generator=generator).to(DEVICE, dtype).transpose(1, 2) for s in shapes]


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ({}, {}),
        ({"batch": 2, "heads": 1, "length": 48}, {"num_retrieved": 5}),
        ({"length": 39, "head_dim": 24}, {"cluster_size": 2, "kmeans_iters": 2, "cluster_cap": 2.0}),
        ({"heads": 1, "length": 64}, {"num_retrieved": 64}),
        ({"heads": 1, "length": 40}, {"kmeans_iters": 0, "cluster_cap": 1.0}),
        ({"heads": 1, "length": 33, "head_dim": 80}, {"num_clusters": 1}),
        ({"length": 50}, {"num_retrieved": 0}),
        ({"heads": 1, "length": 180}, {"cluster_size": 2, "num_retrieved": 9}),
        ({"length": 90}, {"num_retrieved": 8, "retrieval_threshold": 0.02}),
    ],
    ids=[
        "grouped heads",
        "full blocks",
        "odd sizes",
        "all retrieved",
        "balanced",
        "one cluster",
        "none retrieved",
        "several tiles",
        "threshold",
    ],
)
def test_kernels_compute_what_the_reference_does(shape, changes):
    check(inputs(**shape), CONFIG.replace(**changes))


def test_one_program_takes_all_queries_that_see_a_summary(monkeypatch):
    """Those that see some clusters of its tile, and then those that see all."""
    monkeypatch.setattr(refinement_backward, "_PROGRAMS", 1)
    check(inputs(heads=1, length=170), CONFIG.replace(cluster_size=2))


def test_a_negative_scale():
    check(inputs(heads=1), CONFIG, scale=-0.3)


@pytest.mark.parametrize("num_retrieved", [2, 64])
def test_scores_may_lie_far_apart(num_retrieved):
    """To second order the best cluster can seem to be beyond comparison, but it is not to be the only one."""
    tensors, config = inputs(heads=1), CONFIG.replace(num_retrieved=num_retrieved)
    expected = reference([tensor.double() for tensor in tensors], config, scale=3.0)
    for name, actual, exact in zip(NAMES, results(tensors, config, scale=3.0), expected):
        assert error(actual, exact) < 1e-5, f"{name}: relative error {error(actual, exact):.1e}"


@pytest.mark.parametrize("local_block", [16, 48])
def test_a_scale_of_zero_weighs_all_keys_alike(local_block):
    tensors = inputs(heads=1)
    value = tensors[2].clone().requires_grad_()
    expected = value.cumsum(2) / torch.arange(1, value.shape[2] + 1, device=DEVICE)[:, None]
    (value_grad,) = torch.autograd.grad(expected, value, tensors[3])
    output, _, *grads = results(tensors, CONFIG.replace(local_block=local_block), scale=0.0)
    torch.testing.assert_close(output, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[2], value_grad, rtol=1e-5, atol=1e-6)
    assert not grads[0].any()
    assert not grads[1].any()


def test_strided_inputs():
    """Views of one tensor that holds query, key and value side by side, as in GPT-2; and head by head."""
    fused = torch.randn(2, 40, 3, 2, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    views = [fused[:, :, i].transpose(1, 2) for i in range(3)]
    tensors = [*views, views[0].flip(0)]
    copies = [tensor.contiguous() for tensor in tensors]
    for name, actual, expected in zip(NAMES, results(tensors, CONFIG), results(copies, CONFIG)):
        assert torch.equal(actual, expected), name


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    ("length", "changes", "scale"),
    [(52, {}, 0.25), (224, {"local_block": 96, "cluster_size": 48}, 0.25), (52, {}, -0.25)],
    ids=["small clusters", "clusters of more than 64 keys", "negative scale"],
)
def test_low_precision_costs_no_more_than_in_pytorch(length, changes, scale, dtype):
    """With clusters and choices held equal, the error is at most twice that of the formula in PyTorch."""
    *leaves, grad = inputs(heads=4, kv_heads=2, length=length, dtype=dtype)
    config = CONFIG.replace(num_retrieved=3, **changes)
    leaves = [tensor.requires_grad_() for tensor in leaves]
    block = config.local_block
    settings = (scale, [0, length], block, config.clusters_for(block), config.capacity_for(block), 1, 3, 0.0)
    with torch.no_grad():
        stages = attention.forward(*leaves, *settings)
    members, count = stages[7:9]
    members = torch.where(torch.arange(members.shape[2], device=DEVICE) < count[:, :, None], members, -1)
    output, lse = attention.OP(*leaves, *settings)
    actual = [output, lse, *torch.autograd.grad(output, leaves, grad)]

    def dense(precision):
        inputs = [leaf.detach().to(precision).requires_grad_() for leaf in leaves]
        output, lse = dense_attention(*inputs, members, chosen_clusters(*stages[4:7]), block, scale)
        return [output, lse, *torch.autograd.grad(output, inputs, grad.to(precision))]

    for name, got, exact, low in zip(NAMES, actual, dense(torch.float64), dense(dtype)):
        assert error(got, exact) < 2 * error(low, exact) + 1e-6, (
            f"{name}: relative error {error(got, exact):.1e}, PyTorch's {error(low, exact):.1e}"
        )


@pytest.mark.skipif(
    DEVICE == "cpu", reason="the interpreter cannot multiply bfloat16, which scores are made of"
)
@pytest.mark.parametrize("low", LOW)
def test_few_choices_differ_in_low_precision(low):
    query, key, value, _ = inputs(heads=1, length=64)
    choices = []
    for dtype in (torch.float32, low):
        stages = attention.forward(
            *(tensor.to(low).to(dtype) for tensor in (query, key, value)),
            0.25, [0, 64], 16, 4, 6, 1, 3, 0.0,
        )  # fmt: skip
        choices.append(chosen_clusters(*stages[4:7]))
    same = (choices[0] & choices[1]).sum().item() / choices[0].sum().item()
    assert same > 0.9, f"{1 - same:.0%} of the choices differ"


def test_packed_and_padded_sequences_equal_each_alone():
    """Documents of several lengths, short ones too, with padding before, between and behind them."""
    segments = Segments((2, 60), rows=[0, 0, 1], starts=[3, 13, 0], lengths=[8, 44, 41])

    def alone(tensors):
        served = tensors[0].shape[2] > CONFIG.local_block
        return (results if served else reference)(tensors, CONFIG)

    check_sequences(inputs(batch=2, heads=1, length=60), CONFIG, segments, alone)


def test_nan_spreads_to_later_tokens_of_its_own_sequence_only():
    """Also where a tile of summaries reaches beyond those that a query sees."""
    segments = Segments((1, 80), rows=[0, 0], starts=[0, 40], lengths=[40, 40])
    query, key, value, grad = inputs(heads=1, length=80)
    value[:, :, 60] = torch.nan  # in the second block of the second sequence
    output, lse, query_grad, *_ = results((query, key, value, grad), CONFIG, segments=segments)
    assert lse.isfinite().all()
    for name, result in (("output", output), ("query gradient", query_grad)):
        assert result[:, :, :56].isfinite().all(), f"{name} of earlier blocks"
        assert result[:, :, 72:].isnan().any(-1).all(), f"{name} of later blocks"


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_nan_in_a_value_reaches_what_it_reaches_in_the_reference(dtype):
    """No gradient of a value, though Δ is NaN."""
    tensors = [tensor.to(dtype) for tensor in inputs(heads=1, length=80)]
    tensors[2][:, :, 40] = torch.nan
    for name, actual, expected in zip(NAMES, results(tensors, CONFIG), reference(tensors, CONFIG)):
        rows, expected_rows = (x.isnan().view(*x.shape[:3], -1).any(-1) for x in (actual, expected))
        assert torch.equal(rows, expected_rows), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_inputs_need_not_be_on_the_current_device():
    """As in a model whose layers are spread over GPUs."""
    tensors = inputs()
    elsewhere = [tensor.to("cuda:1") for tensor in tensors]
    for name, actual, expected in zip(NAMES, results(elsewhere, CONFIG), results(tensors, CONFIG)):
        assert torch.equal(actual.cpu(), expected.cpu()), name


def test_a_prefix_gives_the_prefix():
    tensors = inputs(heads=1, length=61)
    whole = muse_attention(*tensors[:3], is_causal=True, config=CONFIG)
    prefix = muse_attention(*(t[:, :, :40] for t in tensors[:3]), is_causal=True, config=CONFIG)
    torch.testing.assert_close(whole[:, :, :40], prefix, rtol=1e-5, atol=1e-6)


def test_the_same_inputs_give_the_same_bits():
    tensors = inputs(length=40)
    for first, second in zip(results(tensors, CONFIG), results(tensors, CONFIG)):
        assert torch.equal(first, second)


def test_identical_keys_are_all_alike():
    """All scores are equal, so far more clusters than r reach the threshold: r are taken, and it is exact."""
    query, key, value, _ = inputs(heads=1, length=64)
    key = key[:, :, :1].expand_as(key)
    stages = attention.forward(query, key, value, 0.25, [0, 64], 16, 4, 6, 1, 2, 0.0)
    assert (stages[6][0, 16:] == 2).all(), "a query retrieves fewer clusters than there are"
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, :16], key[:, :, :16], value[:, :, :16], is_causal=True, scale=0.25
    )
    torch.testing.assert_close(stages[0][:, :, :16], expected, rtol=1e-5, atol=1e-6)
    mean = value.cumsum(2) / torch.arange(1, 65, device=value.device)[:, None]
    torch.testing.assert_close(stages[0], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_retrieved", [2, 7])
def test_a_surplus_of_clusters_is_given_back(num_retrieved):
    """Of more clusters of equal score than are to be retrieved, in several tiles, the last ones are taken."""
    length, block, clusters = 112, 16, 8
    query, key, value, _ = inputs(heads=1, length=length)
    query, key = (tensor.mul(8).round() / 8 for tensor in (query, key))  # equal in whatever order one adds
    key = key[:, :, :1].expand_as(key)
    stages = attention.forward(
        query, key, value, 0.25, [0, length], block, clusters, 3, 0, num_retrieved, 0.0
    )
    chosen, count = chosen_clusters(*stages[4:7])[0].cpu(), stages[8][0].cpu()
    for token in range(block, length):
        seen = torch.arange(token // block * clusters)
        expected = seen[count[seen] == 3][-num_retrieved:]
        assert set(expected.tolist()) <= set(chosen[token].nonzero()[:, 0].tolist()), f"token {token}"
    mean = value.cumsum(2) / torch.arange(1, length + 1, device=value.device)[:, None]
    torch.testing.assert_close(stages[0], mean, rtol=1e-5, atol=1e-6)


def test_a_threshold_where_far_keys_have_all_the_attention():
    """Logits of far keys may be a hundred nats above those of the local block."""
    tensors = inputs(heads=1, length=64)
    tensors[0][..., 0] = 1.0
    tensors[1][:, :, :16, 0] += 400.0  # of the first block, by 100 nats
    config = CONFIG.replace(num_retrieved=4, retrieval_threshold=0.2)
    expected = reference([tensor.double() for tensor in tensors], config)
    for name, actual, exact in zip(NAMES, results(tensors, config), expected):
        assert error(actual, exact) < 1e-3, f"{name}: relative error {error(actual, exact):.1e}"


def test_strides_beyond_32_bits_are_copied():
    """Offsets inside a local block are of 32 bits."""
    memory = torch.empty((1 << 27) + 8, dtype=torch.int8)
    near, far = (memory.as_strided((1, 1, 2, 8), (0, 0, stride, 1)) for stride in (1 << 26, 1 << 27))
    assert operators.addressable(near, 16) is near
    assert operators.addressable(far, 16).stride(2) == 8


def test_operators_are_declared_rightly():
    query, key, value, _ = inputs(length=40)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        attention.OP.operator, (*leaves, 0.25, [0, 40], 16, 4, 6, 1, 2, 0.01), test_utils=tests
    )


def test_compiled_in_one_graph():
    tensors = inputs(length=40)
    compiled = torch.compile(results_of_one_graph, fullgraph=True, backend="aot_eager")
    leaves = [tensor.requires_grad_() for tensor in tensors[:3]]
    for function in (results_of_one_graph, compiled):
        function(*leaves).backward()
    for name, leaf, expected in zip(NAMES[2:], leaves, results_without_graph(tensors)):
        torch.testing.assert_close(leaf.grad, 2 * expected, msg=lambda m, n=name: f"{n}: {m}")


def results_of_one_graph(query, key, value):
    return muse_attention(query, key, value, is_causal=True, config=CONFIG).square().sum()


def results_without_graph(tensors):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    return torch.autograd.grad(results_of_one_graph(*leaves), leaves)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize(
    "config",
    [CONFIG, MuseConfig.paper(local_block=16, num_clusters=6, backend="triton")],
    ids=["default", "paper"],
)
def test_a_cuda_graph_computes_the_same_of_other_inputs(config):
    tensors = inputs(heads=1)
    others = [tensor.flip(2) for tensor in tensors]
    expected = results(others, config)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # as they are, watched, and repeated
            results(tensors, config)
        with torch.cuda.graph(graph, stream=stream):
            captured = results(tensors, config)
        for tensor, other in zip(tensors, others):
            tensor.copy_(other)
        graph.replay()
    torch.cuda.synchronize()
    for name, actual, exact in zip(NAMES, captured, expected):
        assert torch.equal(actual, exact), name


def test_gradient_checkpointing_changes_no_bit():
    tensors = inputs(length=40)
    leaves = [tensor.requires_grad_() for tensor in tensors[:3]]
    checkpoint(results_of_one_graph, *leaves, use_reentrant=False).backward()
    for name, leaf, expected in zip(NAMES[2:], leaves, results_without_graph(tensors)):
        assert torch.equal(leaf.grad, expected), name


def test_autocast_computes_in_its_dtype():
    query, key, value, _ = inputs(heads=1, length=40)
    with torch.autocast(DEVICE, dtype=torch.float16):
        output = muse_attention(query, key, value.half(), is_causal=True, config=CONFIG)
    low = muse_attention(*(t.half() for t in (query, key, value)), is_causal=True, config=CONFIG)
    assert output.dtype == torch.float16
    assert torch.equal(output, low)


@pytest.mark.parametrize(
    ("head_dim", "cluster_size", "kib", "reason"),
    [
        (64, 40, 99, None), (128, 40, 99, None), (256, 40, 227, None), (128, 128, 227, None),
        (256, 40, 163, "head_dim 256"), (128, 128, 163, "192 keys"), (64, 1024, 227, "1536 keys"),
    ],
)  # fmt: skip
def test_what_does_not_fit_shared_memory_is_refused(monkeypatch, head_dim, cluster_size, kib, reason):
    capability = {99: (8, 9), 163: (8, 0), 227: (9, 0)}[kib]
    for module in (attention, operators):
        monkeypatch.setattr(module, "shared_memory_of", lambda device: kib << 10)
    for module in (common, operators):
        monkeypatch.setattr(module, "capability_of", lambda device: capability)
    query = SimpleNamespace(
        is_cuda=True,
        device="cuda",
        dtype=torch.bfloat16,
        shape=(1, 1, 8192, head_dim),
        element_size=lambda: 2,
    )
    actual = attention.reason_against(query, query, True, MuseConfig(cluster_size=cluster_size))
    assert actual is None if reason is None else reason in actual


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hierarchy": "dyadic"}, "they serve causal attention with summaries"),
        ({"num_retrieved": 1000}, "num_retrieved=1000 is more than"),
        ({"local_block": 128}, "no longer than local_block are exact attention"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_with_the_reason(changes, reason):
    query, key, value, _ = inputs()
    with pytest.raises(NotImplementedError, match=reason):
        muse_attention(query, key, value, is_causal=True, config=CONFIG.replace(**changes))
