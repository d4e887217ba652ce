"""`Segments`: where the sequences of a padded or packed batch lie."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch


class Segments:
    """The sequences in a batch of `shape` (rows, tokens): attention never leaves a segment.

    Padding and packing are the same thing here. A padded row has one segment, a packed row has several, and
    tokens of no segment get zeros. Lengths are needed on the host to lay out blocks, so the constructors
    that read a tensor synchronise with its device: build the segments once per batch, not once per layer.

    Attributes:
        shape: (rows, tokens) of the batch.
        rows, starts, lengths: One entry a segment: its row, its first token, its number of tokens.
    """

    def __init__(
        self, shape: tuple[int, int], rows: Sequence[int], starts: Sequence[int], lengths: Sequence[int]
    ):
        if not (isinstance(shape, Sequence) and len(shape) == 2 and all(isinstance(n, int) for n in shape)):
            raise TypeError(f"shape must be two numbers, rows and tokens, got {shape!r}")
        self.shape = tuple(shape)
        self.rows, self.starts, self.lengths = list(rows), list(starts), list(lengths)
        table = (self.rows, self.starts, self.lengths)
        if len({len(column) for column in table}) > 1:
            raise ValueError(f"rows, starts and lengths must be of equal length, got {[*map(len, table)]}")
        if not all(isinstance(number, int) for column in table for number in column):
            raise TypeError("rows, starts and lengths must be integers")
        end = [-1] * shape[0]
        for row, start, length in sorted(zip(*table)):
            if not 0 <= row < shape[0] or length < 1 or start < max(end[row], 0) or start + length > shape[1]:
                raise ValueError(
                    f"segment (row={row}, start={start}, length={length}) is empty, overlaps another one or "
                    f"lies outside the batch of {shape[0]} rows of {shape[1]} tokens"
                )
            end[row] = start + length

    def __repr__(self) -> str:
        return f"Segments(shape={self.shape}, rows={self.rows}, starts={self.starts}, lengths={self.lengths})"

    @classmethod
    def from_ids(cls, ids: torch.Tensor) -> "Segments":
        """From integers (rows, tokens): neighbours of equal id are one segment, id 0 is padding."""
        _check_is_tensor("segment ids", ids)
        if ids.ndim != 2 or ids.is_floating_point():
            raise ValueError(
                f"segment ids must be integers of shape (rows, tokens), got {ids.dtype} {tuple(ids.shape)}"
            )
        ids = ids.to(torch.int64)
        edge = torch.ones_like(ids[:, :1], dtype=torch.bool)
        first = torch.cat([edge, ids[:, 1:] != ids[:, :-1]], dim=1)
        rows, starts = first.nonzero(as_tuple=True)
        last = torch.cat([first[:, 1:], edge], dim=1)
        ends = last.nonzero(as_tuple=True)[1] + 1
        table = torch.stack([rows, starts, ends - starts])[:, ids[rows, starts] != 0]
        return cls(tuple(ids.shape), *table.tolist())

    @classmethod
    def from_padding_mask(cls, mask: torch.Tensor) -> "Segments":
        """From a mask (rows, tokens), non-zero at tokens and zero at padding, as tokenizers make it."""
        _check_is_tensor("a padding mask", mask)
        return cls.from_ids((mask != 0).to(torch.int64))

    @classmethod
    def from_position_ids(cls, position_ids: torch.Tensor) -> "Segments":
        """From positions (rows, tokens) that restart at each document of a packed row."""
        _check_is_tensor("positions", position_ids)
        if position_ids.ndim != 2:
            raise ValueError(f"positions must have shape (rows, tokens), got {tuple(position_ids.shape)}")
        restart = torch.diff(position_ids, dim=1, prepend=position_ids[:, :1]) != 1
        return cls.from_ids(restart.cumsum(1))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: torch.Tensor) -> "Segments":
        """From the cumulative lengths [0, n1, n1 + n2, ...] of the documents packed in one row."""
        _check_is_tensor("cumulative lengths", cu_seqlens)
        bounds = cu_seqlens.tolist() if cu_seqlens.ndim == 1 else []
        if len(bounds) < 2 or bounds[0] != 0 or bounds != sorted(bounds):
            raise ValueError(
                "cumulative lengths must be a row of numbers that starts at 0 and never falls, such as "
                f"[0, n1, n1 + n2], got {cu_seqlens.tolist()}"
            )
        spans = [(start, end - start) for start, end in pairwise(bounds) if end > start]
        return cls((1, bounds[-1]), [0] * len(spans), [s for s, _ in spans], [n for _, n in spans])

    @property
    def cover_everything(self) -> bool:
        """Whether every row is one segment, so that nothing is padded or packed."""
        return len(self.rows) == self.shape[0] and all(n == self.shape[1] for n in self.lengths)

    def token_mask(self, device: torch.device) -> torch.Tensor:
        """(rows, tokens) True inside the segments."""
        edges = torch.zeros(self.shape[0], self.shape[1] + 1, dtype=torch.int32)
        for row, start, length in zip(self.rows, self.starts, self.lengths):
            edges[row, start] += 1
            edges[row, start + length] -= 1
        return (edges.cumsum(1)[:, :-1] > 0).to(device)

    def by_length(self) -> Iterator[tuple[int, list[int], list[int]]]:
        """Segments of equal length together, as (length, rows, starts), in ascending order of length."""
        groups: dict[int, tuple[list[int], list[int]]] = {}
        for row, start, length in zip(self.rows, self.starts, self.lengths):
            rows, starts = groups.setdefault(length, ([], []))
            rows.append(row)
            starts.append(start)
        for length in sorted(groups):
            yield length, *groups[length]


def _check_is_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def map_segments(
    attend: Callable[..., tuple[torch.Tensor, ...]],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
) -> tuple[torch.Tensor, ...]:
    """Apply attention to each segment alone, segments of equal length in one batch.

    Args:
        attend: Maps query (S, H, n, D), key and value (S, Hkv, n, D) to results (S, H, n, ...).
        query: (B, H, N, D). key, value: (B, Hkv, N, D).

    Returns:
        The results put back in place (B, H, N, ...), zero outside the segments.
    """
    rows, tokens = segments.shape
    groups = list(segments.by_length())
    if not groups:
        computed = torch.promote_types(query.dtype, torch.float32)
        return query * 0, query.new_zeros(query.shape[:3], dtype=computed)
    device = query.device
    # All tokens are brought together once, group after group, so that no group touches the whole batch.
    first = [torch.tensor(r, device=device) * tokens + torch.tensor(s, device=device) for _, r, s in groups]
    within = [torch.arange(length, device=device) for length, *_ in groups]
    order = torch.cat([(f[:, None] + w).flatten() for f, w in zip(first, within)])
    sizes = [length * len(starts) for length, _, starts in groups]
    inputs = [
        t.transpose(1, 2).flatten(0, 1).index_select(0, order).split(sizes) for t in (query, key, value)
    ]

    collected = []
    for (length, *_), *parts in zip(groups, *inputs):
        batched = (part.unflatten(0, (-1, length)).transpose(1, 2) for part in parts)
        collected.append([result.transpose(1, 2).flatten(0, 1) for result in attend(*batched)])

    def put_back(results: tuple[torch.Tensor, ...]) -> torch.Tensor:
        joined = torch.cat(results)
        everywhere = joined.new_zeros(rows * tokens, *joined.shape[1:]).index_copy(0, order, joined)
        return everywhere.unflatten(0, (rows, tokens)).transpose(1, 2)

    return tuple(put_back(results) for results in zip(*collected))
