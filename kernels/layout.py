"""Where blocks of tokens lie: the one thing kernels need to know about batches, padding and packing.

A batch is a list of sequences, each inside one row. Every sequence is cut into blocks of `local_block` tokens
from its own first token. All its blocks but the last are *key blocks*, clustered into C clusters each, which
later blocks of the same sequence see as summaries. Clusters are numbered over all key blocks of the batch, so
that those seen by one block of queries are consecutive.

Token ids count over the whole batch: token t of row b is b * N + t.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch

# Clusters in a tile of `SummaryTiles`.
SUMMARY_TILE = 64


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
    """Blocks of a batch. All tensors are int32 on the device of the inputs.

    Attributes:
        block_start, block_length: (Z,) first token id and number of tokens of each block of queries.
        first_cluster, num_seen: (Z,) first cluster that the block sees, and how many.
        token_first, token_seen: (B * N,) the same for each token; 0 outside the sequences.
        key_start: (F,) first token id of each key block; all have `local_block` tokens.
        block_ends: (Z + 1,) 0 and the cumulative lengths of the blocks, for kernels of ragged batches.
        summary_tiles: For the gradients of summaries.
        even: Whether the blocks are of `local_block` tokens each and leave none out.
        max_seen: Largest number of clusters seen.
    """

    block_start: torch.Tensor
    block_length: torch.Tensor
    first_cluster: torch.Tensor
    num_seen: torch.Tensor
    token_first: torch.Tensor
    token_seen: torch.Tensor
    key_start: torch.Tensor
    block_ends: torch.Tensor
    summary_tiles: SummaryTiles
    even: bool
    max_seen: int


@lru_cache(maxsize=32)
def whole_rows(batch: int, length: int, block: int, clusters_per_block: int, device: torch.device) -> Layout:
    """The layout of a batch whose rows are one sequence each."""
    sequences = [(row * length, length) for row in range(batch)]
    return layout_of(sequences, batch * length, block, clusters_per_block, device)


def layout_of(
    sequences: list[tuple[int, int]],
    num_tokens: int,
    block: int,
    clusters_per_block: int,
    device: torch.device,
) -> Layout:
    """The layout of sequences given as (first token id, number of tokens), in a batch of `num_tokens`."""
    blocks, keys, tiles = [], [], []
    for start, length in sequences:
        first = len(keys) * clusters_per_block
        for number, offset in enumerate(range(0, length, block)):
            blocks.append((start + offset, min(block, length - offset), first, number * clusters_per_block))
        end = first + (len(range(0, length, block)) - 1) * clusters_per_block
        for cluster in range(first, end, SUMMARY_TILE):
            after = (cluster - first) // clusters_per_block + 1
            tiles.append(
                (cluster, min(cluster + SUMMARY_TILE, end), start + after * block, start + length, first)
            )
        keys += [start + offset for offset in range(0, length - block, block)]

    def columns(rows: list[tuple[int, ...]]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int32).T.contiguous().to(device)

    table = columns(blocks)
    offset = torch.arange(block, device=device)
    inside = offset < table[1][:, None]
    tokens = (table[0][:, None] + offset)[inside]
    per_token = torch.zeros(2, num_tokens, dtype=torch.int32, device=device)
    per_token[:, tokens] = table[2:].repeat_interleave(table[1], dim=1)
    key_start = torch.tensor(keys, dtype=torch.int32).to(device)
    ends = torch.tensor([0, *accumulate(length for _, length, *_ in blocks)], dtype=torch.int32).to(device)
    even = len(blocks) * block == num_tokens
    max_seen = max(seen for *_, seen in blocks)
    return Layout(*table, *per_token, key_start, ends, SummaryTiles(*columns(tiles)), even, max_seen)
