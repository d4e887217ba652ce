"""Segments: the constructors agree, nonsense is refused, attention stays inside."""

import pytest
import torch

from muse_hf.segments import Segments, map_segments


def spans(segments):
    return sorted(zip(segments.rows, segments.starts, segments.lengths))


def test_padding_on_either_side():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    assert spans(Segments.from_padding_mask(mask)) == [(0, 2, 3), (1, 0, 2)]


def test_packed_rows():
    expected = [(0, 0, 3), (0, 3, 1), (0, 4, 2)]
    positions = torch.tensor([[0, 1, 2, 0, 0, 1]])
    assert spans(Segments.from_position_ids(positions)) == expected
    assert spans(Segments.from_cu_seqlens(torch.tensor([0, 3, 4, 6]))) == expected
    assert spans(Segments.from_ids(torch.tensor([[1, 1, 1, 2, 3, 3]]))) == expected


def test_whole_rows_are_recognised():
    assert Segments.from_padding_mask(torch.ones(2, 4)).cover_everything
    assert not Segments.from_padding_mask(torch.tensor([[1, 1, 0]])).cover_everything
    assert not Segments.from_ids(torch.tensor([[1, 1, 2]])).cover_everything


def test_token_mask_is_the_padding_mask():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    assert torch.equal(Segments.from_padding_mask(mask).token_mask(torch.device("cpu")), mask)


@pytest.mark.parametrize(
    ("rows", "starts", "lengths"),
    [([0], [0], [0]), ([0], [3], [2]), ([2], [0], [1]), ([0, 0], [0, 1], [2, 2]), ([0], [-1], [2])],
)
def test_impossible_segments_are_refused(rows, starts, lengths):
    with pytest.raises(ValueError, match=r"is empty, overlaps another one or lies outside"):
        Segments((2, 4), rows, starts, lengths)


@pytest.mark.parametrize(
    "constructor",
    [Segments.from_ids, Segments.from_padding_mask, Segments.from_position_ids, Segments.from_cu_seqlens],
    ids=lambda constructor: constructor.__name__,
)
def test_what_is_no_tensor_is_refused(constructor):
    with pytest.raises(TypeError, match="must be a tensor, got list"):
        constructor([0, 3])


@pytest.mark.parametrize("shape", [3, (3,), (2.0, 4)], ids=str)
def test_shapes_are_two_numbers(shape):
    with pytest.raises(TypeError, match="shape must be two numbers, rows and tokens, got"):
        Segments(shape, [0], [0], [2])


def test_ids_must_be_integers_in_rows():
    with pytest.raises(ValueError, match=r"must be integers of shape"):
        Segments.from_ids(torch.ones(3))


def test_positions_must_be_in_rows():
    with pytest.raises(ValueError, match=r"positions must have shape \(rows, tokens\), got \(3,\)"):
        Segments.from_position_ids(torch.arange(3))


@pytest.mark.parametrize("bounds", [[], [0], [2, 5], [0, 5, 3], [[0, 5]]], ids=str)
def test_impossible_cumulative_lengths_are_refused(bounds):
    with pytest.raises(ValueError, match="cumulative lengths must be a row of numbers that starts at 0"):
        Segments.from_cu_seqlens(torch.tensor(bounds))


def test_map_segments_puts_results_back_where_they_belong():
    """The function sees each segment alone; here it marks tokens with their segment's length and place."""
    query = torch.arange(2 * 3 * 7 * 2, dtype=torch.float64).view(2, 3, 7, 2).requires_grad_()
    key = torch.zeros(2, 1, 7, 2, dtype=torch.float64)
    segments = Segments((2, 7), [0, 0, 1], [0, 4, 2], [4, 2, 4])

    def attend(query, key, value):
        assert key.shape[:2] == (query.shape[0], 1)
        return query * query.shape[2], query[..., 0].cumsum(2)

    scaled, running = map_segments(attend, query, key, key, segments)
    expected = torch.zeros_like(query)
    for row, start, length in spans(segments):
        own = slice(start, start + length)
        expected[row, :, own] = query[row, :, own] * length
        assert torch.equal(running[row, :, own], query[row, :, own, 0].cumsum(1))
    assert torch.equal(scaled, expected)
    scaled.sum().backward()
    assert query.grad[0, 0, :, 0].tolist() == [4, 4, 4, 4, 2, 2, 0]


def test_columns_of_unequal_length_or_type_are_refused():
    with pytest.raises(ValueError, match=r"must be of equal length, got \[2, 1, 1\]"):
        Segments((2, 70), [0, 1], [0], [5])
    with pytest.raises(TypeError, match="must be integers"):
        Segments((2, 70), [0], [0.0], [5])
