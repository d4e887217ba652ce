"""What is to be clustered: sets of tokens, described once for all kernels by one small table.

A *point set* is a run of tokens of one batch row: its centroids are made of `length` tokens from `start` on,
and `num_points` tokens from `target` on are then assigned to them. A set stands for as many independent
problems as its side has heads: key/value heads for sets of keys, query heads for sets of queries. All sets
are worked through by the same launches.

Clusters (rows), assigned tokens (points) and the places for members (slots) are numbered over all sets, so
that what kernels make are plain arrays (heads, rows), (heads, points) and (heads, slots).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Columns of the table.
ROW, START, LENGTH, CLUSTERS, FIRST_ROW = (tl.constexpr(i) for i in range(5))
IS_QUERY, TARGET, FIRST_POINT, NUM_POINTS = (tl.constexpr(i) for i in range(5, 9))
FIRST_SUM, NUM_SUMS, FIRST_COUNT, NUM_COUNTS = (tl.constexpr(i) for i in range(9, 13))
CAPACITY, FIRST_SLOT, FIRST_PAIR = (tl.constexpr(i) for i in range(13, 16))
_WIDTH = tl.constexpr(16)
# Columns of the tables of chunks.
CHUNK_SET, CHUNK_BEGIN, CHUNK_END, CHUNK_POINT, CHUNK_ROW = (tl.constexpr(i) for i in range(5))
_CHUNK_WIDTH = tl.constexpr(5)
# Tokens that one program works through, or more where there are so many clusters that what a program leaves
# behind for each of them would cost more than the tokens.
_CHUNK, _CHUNK_PER_CLUSTER = 1024, 16


class PointSet(NamedTuple):
    """One set, on the host.

    Attributes:
        row: Batch row.
        start, length: Tokens that the centroids are made of.
        num_clusters: Number of clusters C.
        is_query: Whether the tokens are queries.
        target, num_points: Tokens that are assigned to the clusters.
        first_point: Number of the first of these among all assigned keys, or all assigned queries.
        capacity: Largest number of members of a cluster of keys, 0 if there is no limit.
    """

    row: int
    start: int
    length: int
    num_clusters: int
    is_query: bool
    target: int
    num_points: int
    first_point: int
    capacity: int = 0


@dataclass(frozen=True)
class Sizes:
    """How much there is of everything, on the host.

    Attributes:
        num_key_sets, num_key_rows, num_key_points: How many sets, clusters and points are of keys.
        num_rows, num_points: Clusters and points of keys and queries.
        capped: Whether there is a limit to the members of a cluster of keys.
        num_slots: Places for the members of all clusters of keys, none without a limit.
        num_pairs: Pairs of a cluster of queries and a cluster of keys that meet.
        max_clusters: Largest number of clusters in a set.
        multiple: Largest power of two, up to 16, of which all numbers of clusters are multiples.
        max_key_points, max_capacity: Largest number of points of a set of keys, and of members of a cluster.
    """

    num_key_sets: int
    num_key_rows: int
    num_key_points: int
    num_rows: int
    num_points: int
    capped: bool
    num_slots: int
    num_pairs: int
    max_clusters: int
    multiple: int
    max_key_points: int
    max_capacity: int

    @property
    def num_query_rows(self) -> int:
        return self.num_rows - self.num_key_rows

    @property
    def num_query_points(self) -> int:
        return self.num_points - self.num_key_points


@dataclass(frozen=True)
class PointSets(Sizes):
    """All sets: those of keys come first, then those of queries. Tensors are int32 on the device.

    Attributes:
        table: (S, 16) a row a set, see the columns above.
        set_of_row: (R,) the set of each cluster.
        first_slot: (1, key rows) where the places of a cluster begin among those of its head.
        sources, targets: (X, 5) chunks of the tokens that centroids are made of, and of those assigned.
        num_source_points: Tokens that centroids are made of.
        num_sums, num_counts: Rows of the partial results of `sources` and of `targets`.
    """

    table: torch.Tensor
    set_of_row: torch.Tensor
    first_slot: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor
    num_source_points: int
    num_sums: int
    num_counts: int


def sizes_of(keys: list[PointSet], queries: list[PointSet]) -> Sizes:
    """Set i of queries, if there are any, sees set i of keys."""
    num_key_points, num_query_points = (
        max((s.first_point + s.num_points for s in sets), default=0) for sets in (keys, queries)
    )
    return Sizes(
        num_key_sets=len(keys),
        num_key_rows=sum(s.num_clusters for s in keys),
        num_key_points=num_key_points,
        num_rows=sum(s.num_clusters for s in keys + queries),
        num_points=num_key_points + num_query_points,
        capped=any(s.capacity for s in keys),
        num_slots=sum(s.num_clusters * s.capacity for s in keys),
        num_pairs=sum(s.num_clusters * q.num_clusters for s, q in zip(keys, queries)),
        max_clusters=max(s.num_clusters for s in keys + queries),
        multiple=gcd(16, *(s.num_clusters for s in keys + queries)),
        max_key_points=max((s.num_points for s in keys), default=0),
        max_capacity=max((s.capacity for s in keys), default=0),
    )


def point_sets(keys: list[PointSet], queries: list[PointSet], device: torch.device) -> PointSets:
    """Number what belongs to the sets. Set i of queries, if there are any, sees set i of keys."""
    sizes = sizes_of(keys, queries)
    row = slot = pair = source_point = num_sums = num_counts = 0
    table, set_of_row, first_slot, sources, targets = [], [], [], [], []
    for number, s in enumerate(keys + queries):
        first_point = s.first_point + s.is_query * sizes.num_key_points
        source_chunks = _chunks(number, s.num_clusters, s.start, s.length, source_point, num_sums)
        target_chunks = _chunks(number, s.num_clusters, s.target, s.num_points, first_point, num_counts)
        table.append((
            s.row, s.start, s.length, s.num_clusters, row,
            int(s.is_query), s.target, first_point, s.num_points,
            num_sums, len(source_chunks), num_counts, len(target_chunks),
            s.capacity, slot, pair,
        ))  # fmt: skip
        set_of_row += [number] * s.num_clusters
        if not s.is_query:
            first_slot += [slot + i * s.capacity for i in range(s.num_clusters)]
        sources += source_chunks
        targets += target_chunks
        source_point += s.length
        row += s.num_clusters
        num_sums += len(source_chunks) * s.num_clusters
        num_counts += len(target_chunks) * s.num_clusters
        slot += s.capacity * s.num_clusters
        if s.is_query:
            pair += s.num_clusters * keys[number - len(keys)].num_clusters
    return PointSets(
        **vars(sizes),
        table=_int32(table, device),
        set_of_row=_int32(set_of_row, device),
        first_slot=_int32([first_slot], device),
        sources=_int32(sources, device),
        targets=_int32(targets, device),
        num_source_points=source_point,
        num_sums=num_sums,
        num_counts=num_counts,
    )


def _int32(rows: list, device: torch.device) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32).to(device)


def _chunks(
    number: int, num_clusters: int, start: int, length: int, point: int, row: int
) -> list[tuple[int, ...]]:
    size = max(_CHUNK, _CHUNK_PER_CLUSTER * triton.next_power_of_2(num_clusters))
    begins: Iterable[int] = range(0, length, size)
    return [
        (number, start + begin, start + min(begin + size, length), point + begin, row + i * num_clusters)
        for i, begin in enumerate(begins)
    ]


@triton.jit
def set_field(table, number, COLUMN: tl.constexpr):
    """Entry of a set."""
    return tl.load(table + number * _WIDTH + COLUMN)


@triton.jit
def token_less_point(table, number):
    """What to add to a point of a set to get its token in the batch row."""
    return set_field(table, number, TARGET) - set_field(table, number, FIRST_POINT)


@triton.jit
def chunk_field(chunks, number, COLUMN: tl.constexpr):
    """Entry of a chunk."""
    return tl.load(chunks + number * _CHUNK_WIDTH + COLUMN)
