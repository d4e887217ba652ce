"""The levels of causal dyadic attention: which blocks meet at each size, and how what they give is joined.

For s = `local_block` times 1, 2, 4, ... the queries of odd block 2i + 1 of size s see the keys of even block
2i. Every level leaves parts behind: an output and logsumexp for each of its queries, and gradients of its
queries and keys. The parts of a token are added to its exact local attention in a fixed order.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from muse_hf.kernels.common import (
    kept_on_device,
    load_tokens,
    plane_of,
    power_of_two,
    store_tokens,
    wait_for_previous_kernel,
)
from muse_hf.kernels.launch import ceil_div, launch
from muse_hf.kernels.layout import Layout, layout_of
from muse_hf.kernels.local import Local
from muse_hf.kernels.local_backward import Parts
from muse_hf.kernels.point_sets import PointSet, PointSets, point_sets
from muse_hf.kernels.replay import fill


@dataclass(frozen=True)
class Levels:
    """All levels of a batch.

    Attributes:
        sets: Keys and queries that meet, largest blocks first.
        layout: The blocks of the exact local part.
        query_parts, key_parts: Parts of queries and of keys.
    """

    sets: PointSets
    layout: Layout
    query_parts: Parts
    key_parts: Parts


def num_levels(length: int, block: int) -> int:
    """Sizes of blocks in a sequence."""
    return (-(-length // block) - 1).bit_length()


def dyadic_sets(
    sequences: tuple[int, ...], length: int, block: int, clusters: tuple[int, ...],
    capacities: tuple[int, ...], own: bool,
) -> tuple[list[PointSet], list[PointSet]]:  # fmt: skip
    """Sets of keys, and those of the queries that see them.

    Args:
        sequences: First token id (row * `length` + token) and length of each in turn.
        clusters, capacities: For each size of blocks, smallest first.
        own: Whether query centroids are made of the queries themselves, not of those of the key block.
    """
    keys, queries = [], []
    first_key = first_query = 0
    for level in reversed(range(len(clusters))):
        size, num_clusters = block << level, clusters[level]
        for start, many in zip(sequences[::2], sequences[1::2]):
            row, begin, end = start // length, start % length, start % length + many
            for key in range(begin, end - size, 2 * size):
                query, num_queries = key + size, min(size, end - key - size)
                keys.append(
                    PointSet(row, key, size, num_clusters, False, key, size, first_key, capacities[level])
                )
                source = (query, num_queries) if own else (key, size)
                queries.append(PointSet(row, *source, num_clusters, True, query, num_queries, first_query))
                first_key += size
                first_query += num_queries
    return keys, queries


@kept_on_device
def dyadic_levels(
    sequences: tuple[int, ...], num_tokens: int, length: int, block: int, clusters: tuple[int, ...],
    capacities: tuple[int, ...], own: bool, device: torch.device,
) -> Levels:  # fmt: skip
    """The levels of sequences in a batch of `num_tokens`, rows of `length`. Arguments as in `dyadic_sets`."""
    keys, queries = dyadic_sets(sequences, length, block, clusters, capacities, own)
    blocks = [
        start + offset
        for start, many in zip(sequences[::2], sequences[1::2])
        for offset in range(0, many, block)
    ]
    layout = layout_of(sequences, num_tokens, block, 1, device)
    parts = (_parts(sets, blocks, length, block, device) for sets in (queries, keys))
    return Levels(point_sets(keys, queries, device), layout, *parts)


def _parts(sets: list[PointSet], blocks: list[int], length: int, block: int, device: torch.device) -> Parts:
    points = defaultdict(list)
    for s in sets:
        for offset in range(0, s.num_points, block):
            points[s.row * length + s.target + offset].append(s.first_point + offset)
    bounds = [0]
    for start in blocks:
        bounds.append(bounds[-1] + len(points[start]))
    flat = [point for start in blocks for point in points[start]]
    return Parts(*(torch.tensor(column, dtype=torch.int32).to(device) for column in (bounds, flat)))


@triton.jit
def _block_of(block_start, block_length, length, BLOCK_N: tl.constexpr):
    """First token id, row, tokens and their offsets in their block, for one tile of a block."""
    z = tl.program_id(2)
    start = tl.load(block_start + z)
    offsets = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    return z, start, start // length, start % length + offsets, offsets, offsets < tl.load(block_length + z)


@triton.jit
def _merge_kernel(
    block_start, block_length, bounds, point, local, local_lse, parts, part_lse, output, lse, row_lse,
    stride_lb, stride_lh, stride_ln, stride_ob, stride_oh, stride_on, lse_stride_h, lse_stride_s,
    length, num_tokens, num_points,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Join the local part of a tile of queries with those of the levels."""
    wait_for_previous_kernel()
    head = tl.program_id(1).to(tl.int64)
    z, start, row, tokens, offsets, inside = _block_of(block_start, block_length, length, BLOCK_N)
    first, end = tl.load(bounds + z), tl.load(bounds + z + 1)
    ids = head * num_tokens + row.to(tl.int64) * length + tokens
    local_lse += head * lse_stride_h + start.to(tl.int64) * lse_stride_s
    local_share = tl.load(local_lse + offsets, mask=inside, other=0)
    parts += head * num_points * HEAD_DIM
    part_lse += head * num_points
    top = local_share
    for i in range(first, end):
        share = tl.load(part_lse + tl.load(point + i) + offsets, mask=inside, other=-float("inf"))
        top = tl.maximum(top, share)
    total = tl.exp(local_share - top)
    x = load_tokens(
        plane_of(local, row, head, stride_lb, stride_lh), tokens, inside, stride_ln, HEAD_DIM, BLOCK_D
    )
    o = x.to(tl.float32) * total[:, None]
    for i in range(first, end):
        points = tl.load(point + i) + offsets
        share = tl.exp(tl.load(part_lse + points, mask=inside, other=-float("inf")) - top)
        x = load_tokens(parts, points, inside, HEAD_DIM, HEAD_DIM, BLOCK_D)
        o += x.to(tl.float32) * share[:, None]
        total += share
    o *= (1 / total)[:, None]
    merged = top + tl.log(total)
    store_tokens(
        plane_of(output, row, head, stride_ob, stride_oh), o, tokens, inside, stride_on, HEAD_DIM, BLOCK_D
    )
    tl.store(lse + ids, merged, mask=inside)
    at = (row.to(tl.int64) * tl.num_programs(1) + head) * length + tokens
    tl.store(row_lse + at, merged, mask=inside)


def merge_levels(
    levels: Levels, block: int, local: Local, parts: torch.Tensor, part_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Output and logsumexp of the whole attention.

    Args:
        parts, part_lse: (H, query points, D) and (H, query points).

    Returns:
        Output (B, H, N, D), logsumexp (B, H, N) with 0 and (H, B * N) with ∞ outside the sequences.
    """
    batch, heads, length, head_dim = local.output.shape
    layout = levels.layout
    output = local.output.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    lse = part_lse.new_empty(heads, batch * length)
    row_lse = lse.new_empty(batch, heads, length)
    if layout.outside is not None:  # λ = ∞ makes all weights and so all gradients zero
        for tensor, number in ((output, 0), (lse, torch.inf), (row_lse, 0)):
            fill(tensor, number)
    launch(
        _merge_kernel, _grid(layout, block, heads),
        layout.block_start, layout.block_length, *levels.query_parts, local.output, local.lse, parts,
        part_lse, output, lse, row_lse, *local.output.stride()[:3], *output.stride()[:3], local.stride_h,
        local.stride_s, length, lse.shape[1], part_lse.shape[1], **_tiles(head_dim, block),
    )  # fmt: skip
    return output, row_lse, lse


def _grid(layout: Layout, block: int, heads: int) -> tuple[int, int, int]:
    return ceil_div(block, _tile(block)), heads, layout.block_start.shape[0]


def _tiles(head_dim: int, block: int) -> dict[str, int]:
    return {"HEAD_DIM": head_dim, "BLOCK_D": power_of_two(head_dim), "BLOCK_N": _tile(block)}


def _tile(block: int) -> int:
    return min(64, power_of_two(block))
