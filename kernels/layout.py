"""Where blocks of tokens lie: the one thing kernels need to know about batches, padding and packing.

A batch is a list of sequences, each inside one row. Every sequence is cut into blocks of `local_block` tokens
from its own first token. All its blocks but the last are *key blocks*, clustered into C clusters each, which
later blocks of the same sequence see as summaries. Clusters are numbered over all key blocks of the batch, so
that those seen by one block of queries are consecutive.

Token ids count over the whole batch: token t of row b is b * N + t.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from muse_hf.kernels.common import kept_on_device
from muse_hf.kernels.summaries import TILE


class SummaryTiles(NamedTuple):
    """Tiles of clusters that stay within one sequence, and the queries that see some of them.

    Attributes:
        first, end: (T,) clusters [first, end) of each tile.
        query_start, query_end: (T,) token ids of the queries after the block of its first cluster.
        sequence_first: (T,) first cluster of its sequence.
    """

    first: torch.Tensor
    end: torch.Tensor
    query_start: torch.Tensor
    query_end: torch.Tensor
    sequence_first: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """Blocks of a batch. Tensors are int32 on the device of the inputs.

    Attributes:
        block_start, block_length: (Z,) first token id and number of tokens of each block of queries.
        first_cluster, num_seen: (Z,) first cluster that the block sees, and how many.
        key_start: First token id of each key block, on the host; all have `local_block` tokens.
        bounds: (Z' + 1,) where the blocks and the gaps between sequences begin, and the number of tokens.
        summary_tiles: For the gradients of summaries.
        outside: (B * N,) True at tokens of no sequence, or None if there are none.
        even: Whether the blocks are of `local_block` tokens each and leave none out.
        max_seen: Largest number of clusters seen.
    """

    block_start: torch.Tensor
    block_length: torch.Tensor
    first_cluster: torch.Tensor
    num_seen: torch.Tensor
    key_start: tuple[int, ...]
    bounds: torch.Tensor
    summary_tiles: SummaryTiles
    outside: torch.Tensor | None
    even: bool
    max_seen: int

    @property
    def query_blocks(self) -> tuple[torch.Tensor, ...]:
        """What kernels over blocks of queries read."""
        return self.block_start, self.block_length, self.first_cluster, self.num_seen


def count_clusters(sequences: Sequence[int], block: int, clusters_per_block: int) -> tuple[int, int]:
    """Clusters of the whole batch, and the most that one block sees. Sequences as in `layout_of`."""
    key_blocks = [(length - 1) // block for length in sequences[1::2]]
    return sum(key_blocks) * clusters_per_block, max(key_blocks) * clusters_per_block


@kept_on_device
def layout_of(
    sequences: tuple[int, ...],
    num_tokens: int,
    block: int,
    clusters_per_block: int,
    device: torch.device,
) -> Layout:
    """The layout of sequences given by first token id and length, each in turn, in a batch of `num_tokens`.

    Cached, for the layers of a model share the layout of a batch. Sequences are in ascending order.
    """
    sequences = [*zip(sequences[::2], sequences[1::2])]
    blocks, keys, tiles, bounds = [], [], [], [0]
    for start, length in sequences:
        first = len(keys) * clusters_per_block
        bounds += range(bounds[-1] + block, start, block)  # a gap is cut into blocks as well
        for number, offset in enumerate(range(0, length, block)):
            blocks.append((start + offset, min(block, length - offset), first, number * clusters_per_block))
            bounds += [start + offset] * (start + offset > bounds[-1])
        end = first + (len(range(0, length, block)) - 1) * clusters_per_block
        for cluster in range(first, end, TILE):
            after = (cluster - first) // clusters_per_block + 1
            tiles.append((cluster, min(cluster + TILE, end), start + after * block, start + length, first))
        keys += [start + offset for offset in range(0, length - block, block)]
        bounds.append(start + length)
    bounds += range(bounds[-1] + block, num_tokens, block)
    bounds += [num_tokens] * (num_tokens > bounds[-1])

    def columns(rows: list[tuple[int, ...]]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int32).T.contiguous().to(device)

    outside = None
    if sum(length for _, length in sequences) < num_tokens:
        outside = torch.ones(num_tokens, dtype=torch.bool)
        for start, length in sequences:
            outside[start : start + length] = False
        outside = outside.to(device)
    return Layout(
        *columns(blocks),
        key_start=tuple(keys),
        bounds=torch.tensor(bounds, dtype=torch.int32).to(device),
        summary_tiles=SummaryTiles(*columns(tiles)),
        outside=outside,
        even=all(end - start == block for start, end in pairwise(bounds)) and outside is None,
        max_seen=max(seen for *_, seen in blocks),
    )


@triton.jit
def tile_of_block(block_start, block_length, num_tiles, num_heads, num_blocks, length):
    """What a program of a one-dimensional grid works on: a tile of a block of a head.

    The first tiles of blocks come before the second ones, so that programs that take long, if theirs is the
    first tile, are not left to the end. Not for all blocks at once: the keys and values of 16 blocks of 2048
    tokens, 8 MB for 64 dimensions of 16 bits, stay in the L2 cache meanwhile.

    Returns:
        The number of the tile, the head (int64), the number of the block, how many tokens it has, and the
        row and the place in it of its first token.
    """
    program, num_pairs = tl.program_id(0), num_heads * num_blocks
    first = program // (16 * num_tiles) * 16
    together = tl.minimum(16, num_pairs - first)
    program -= first * num_tiles
    pair = first + program % together
    block = pair // num_heads
    start = tl.load(block_start + block)
    many = tl.load(block_length + block)
    return program // together, (pair % num_heads).to(tl.int64), block, many, start // length, start % length
