"""muse_attention: agreement with exact attention, dtypes, autocast, segments and bad input."""

import math
from fractions import Fraction

import pytest
import torch

from muse_hf import MuseConfig, Segments, exact_attention, muse_attention

SMALL = MuseConfig(local_block=16, cluster_size=4, num_retrieved=3, retrieval_threshold=0.0)


def qkv(queries=70, keys=None, heads=4, kv_heads=2, batch=2, dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, queries), (kv_heads, keys or queries), (kv_heads, keys or queries)]
    return [
        torch.randn(batch, h, n, dim, generator=generator, dtype=torch.float64).to(dtype) for h, n in shapes
    ]


@pytest.mark.parametrize("is_causal", [True, False])
def test_grouped_heads_equal_repeated_heads(is_causal):
    query, key, value = qkv()
    grouped = muse_attention(query, key, value, is_causal=is_causal, config=SMALL)
    key, value = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))
    torch.testing.assert_close(grouped, muse_attention(query, key, value, is_causal=is_causal, config=SMALL))


def test_default_scale_and_logsumexp_are_those_of_softmax_attention():
    query, key, value = qkv(queries=16)
    output, lse = muse_attention(query, key, value, is_causal=False, config=SMALL, return_lse=True)
    logits = query @ key.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(output, logits.softmax(-1) @ value.repeat_interleave(2, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_rounds_only_inputs_and_output(dtype):
    """Everything is summed in float32, so a low-precision call is the float32 call on the rounded inputs."""
    inputs = qkv(dtype=dtype)
    output, lse = muse_attention(*inputs, is_causal=True, config=SMALL, return_lse=True)
    expected, expected_lse = muse_attention(
        *(tensor.float() for tensor in inputs), is_causal=True, config=SMALL, return_lse=True
    )
    assert output.dtype == dtype
    assert lse.dtype == torch.float32
    assert torch.equal(output, expected.to(dtype))
    assert torch.equal(lse, expected_lse)


def test_autocast_unites_dtypes_as_pytorch_does():
    query, key, value = qkv(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = muse_attention(query, key, value.bfloat16(), is_causal=True, config=SMALL)
    inputs = (query.bfloat16(), key.bfloat16(), value.bfloat16())
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, muse_attention(*inputs, is_causal=True, config=SMALL))


@pytest.mark.parametrize("attend", [muse_attention, exact_attention])
@pytest.mark.parametrize("is_causal", [True, False])
def test_packed_and_padded_segments_equal_each_alone(attend, is_causal):
    """Two packed documents, padding on both sides, one document shorter than a local block; and gradients."""
    options = {"config": SMALL} if attend is muse_attention else {}
    inputs = [tensor.requires_grad_() for tensor in qkv(queries=90)]
    segments = Segments((2, 90), [0, 0, 1], [0, 40, 5], [40, 50, 10])
    output = attend(*inputs, is_causal=is_causal, segments=segments, **options)
    weight = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    packed_grads = torch.autograd.grad(output, inputs, weight)
    outside = ~segments.token_mask(output.device)
    assert not output.transpose(1, 2)[outside].any(), "tokens of no segment must get zeros"
    alone_grads = [torch.zeros_like(tensor) for tensor in inputs]
    for row, start, length in zip(segments.rows, segments.starts, segments.lengths):
        own = (slice(row, row + 1), slice(None), slice(start, start + length))
        parts = [tensor[own].detach().requires_grad_() for tensor in inputs]
        alone = attend(*parts, is_causal=is_causal, **options)
        torch.testing.assert_close(output[own], alone, msg=f"segment {row, start, length}")
        for total, part in zip(alone_grads, torch.autograd.grad(alone, parts, weight[own])):
            total[own] = part
    for packed, alone in zip(packed_grads, alone_grads):
        torch.testing.assert_close(packed, alone)


def test_a_scale_may_be_any_real_number():
    inputs = qkv()
    outputs = [muse_attention(*inputs, is_causal=True, config=SMALL, scale=s) for s in (Fraction(1, 2), 0.5)]
    assert torch.equal(*outputs)


def test_strided_inputs_give_the_same_bits():
    inputs = qkv(dtype=torch.float32)
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs]
    outputs = [muse_attention(*case, is_causal=True, config=SMALL) for case in (inputs, strided)]
    assert torch.equal(*outputs)


def test_nan_spreads_to_later_tokens_of_its_own_row_only():
    query, key, value = qkv()
    value[1, :, 40] = torch.nan  # in the local block of tokens 32 to 47
    output = muse_attention(query, key, value, is_causal=True, config=SMALL)
    assert output[0].isfinite().all(), "another row must not see the NaN"
    assert output[1, :, :32].isfinite().all(), "earlier blocks must not see the NaN"
    assert output[1, :, 40:].isnan().all(), "as in exact attention, every later token sees it"


@pytest.mark.parametrize("name", ["query", "key"])
def test_nan_in_queries_and_keys_never_crashes(name):
    tensors = dict(zip(("query", "key", "value"), qkv()))
    tensors[name][0, 0, 3] = torch.nan
    output = muse_attention(**tensors, is_causal=True, config=SMALL)
    assert output[1].isfinite().all()
    assert output[0, :, :3].isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query must be a tensor, got list"),
        ({"query": torch.zeros(4, 70, 8)}, ValueError, r"query must have shape \(batch, heads"),
        ({"query": torch.zeros(2, 4, 70, 8, dtype=torch.int64)}, TypeError, "query has dtype torch.int64"),
        ({"value": torch.zeros(2, 2, 70, 8)}, TypeError, "value has dtype torch.float32 but query has"),
        ({"query": torch.zeros(2, 4, 70, 16).double()}, ValueError, "differ in batch size or head_dim"),
        ({"query": torch.zeros(2, 3, 70, 8).double()}, ValueError, "3 query heads are not a multiple of 2"),
        ({"query": torch.zeros(2, 4, 60, 8).double()}, ValueError, "as many queries as keys, got 60 and 70"),
        ({"value": torch.zeros(2, 2, 69, 8).double()}, ValueError, "must have the same shape"),
        ({"query": torch.zeros(2, 4, 0, 8).double()}, ValueError, "query is empty"),
        ({"segments": Segments((2, 60), [0], [0], [60])}, ValueError, r"segments are for a batch of shape"),
        ({"config": {"num_retrieved": 4}}, TypeError, "config must be a MuseConfig, got dict"),
        ({"segments": [1]}, TypeError, "segments must be a muse_hf.Segments, got list"),
        ({"is_causal": None}, TypeError, "is_causal must be True or False, got None"),
        ({"scale": "x"}, TypeError, "scale must be a number, got 'x'"),
        ({"scale": math.nan}, ValueError, "scale must be finite, got nan"),
        ({"query": torch.zeros(2, 4, 70, 8, device="meta")}, ValueError, "query is on the meta device"),
        (
            {"config": SMALL.replace(backend="triton")},
            NotImplementedError,
            "cannot be obeyed: they do not .* float64",
        ),
    ],
)
def test_bad_input_gets_a_clear_error(change, error, message):
    arguments = dict(zip(("query", "key", "value"), qkv())) | {"config": SMALL, "is_causal": True} | change
    with pytest.raises(error, match=message):
        muse_attention(**arguments)


def test_different_lengths_in_acausal_attention():
    query, key, value = qkv(queries=33, keys=70)
    everything = SMALL.replace(num_retrieved=1000)
    output = muse_attention(query, key, value, is_causal=False, config=everything)
    torch.testing.assert_close(output, exact_attention(query, key, value, is_causal=False))


def test_second_derivatives_are_refused():
    """They would miss what the choice of clusters and the merged logsumexp hide."""
    query, key, value = (tensor.requires_grad_() for tensor in qkv())
    output = muse_attention(query, key, value, is_causal=True, config=SMALL)
    (grad,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_rows_without_any_token_give_zeros():
    query, key, value = (tensor.to(torch.float16) for tensor in qkv())
    nothing = Segments((2, 70), [], [], [])
    output, lse = muse_attention(query, key, value, is_causal=True, segments=nothing, return_lse=True)
    assert not output.any()
    assert not lse.any()
    assert (output.dtype, lse.dtype) == (torch.float16, torch.float32)
