"""Items: which query retrieves which cluster, listed by cluster.

An item is a set bit of a query, and has the number row * r + rank: row counts the queries of a key/value
head, head by head, and rank the clusters of the query. Items are placed by counting: how many a chunk of
queries has of each cluster, how many the chunks before it have, and then where its own go. That needs no
atomic operation, items of a cluster are in the order of their queries, and what a query might have retrieved
but does not costs nothing.

A word of 32 bits is looked at as 8 words of 4 bytes, whose k-th byte is bit p + 8k: four sums in one.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from muse_hf.kernels.common import wait_for_previous_kernel
from muse_hf.kernels.launch import ceil_div, launch
from muse_hf.kernels.layout import Layout
from muse_hf.kernels.replay import fill, library_call
from muse_hf.kernels.selection import number_of_bits
from muse_hf.kernels.summaries import chosen_row

# Queries in a chunk: fewer than a byte can count. One warp, whose sums take no barriers.
_CHUNK = 128
_LISTED = {"CHUNK": _CHUNK, "num_warps": 1}
_ADDED = {"BLOCK_C": 64, "BLOCK_J": 32, "num_warps": 4}


class Items(NamedTuple):
    """The items of every key/value head.

    Attributes:
        order: (Hkv, S) int32 items, S = query heads a key/value head * tokens * r.
        bounds: (Hkv, J + 1) int32: the items of cluster j are order[bounds[j] : bounds[j + 1]]. What lies
            behind the last bound is not written.
        number: (H, B * N) uint8, how many items a query has.
    """

    order: torch.Tensor
    bounds: torch.Tensor
    number: torch.Tensor

    @property
    def num_retrieved(self) -> int:
        """r, the most items that a query may have."""
        return self.order.numel() // self.number.numel()


@triton.jit
def _chunk_of(
    block_start, block_length, first_cluster, num_seen, num_tokens, num_clusters, num_chunks,
    clusters_per_block, CHUNK: tl.constexpr, GROUP_HEADS: tl.constexpr,
):  # fmt: skip
    """What a program works on, and where the counts of its chunk begin.

    Chunks are counted inside a sequence, head by head of a key/value head: no other one sees its clusters.

    Returns:
        Tokens (CHUNK,), which of them exist, how many clusters they see, the first of these, and the place of
        its count.
    """
    tile, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tile * CHUNK + tl.arange(0, CHUNK)
    inside = rows < tl.load(block_length + block)
    tokens = tl.load(block_start + block) + rows
    seen, first = tl.load(num_seen + block), tl.load(first_cluster + block)
    chunk = seen // clusters_per_block * tl.num_programs(0) + tile
    chunk += head % GROUP_HEADS * (num_chunks // GROUP_HEADS)
    place = ((head // GROUP_HEADS).to(tl.int64) * num_chunks + chunk) * num_clusters + first
    return tokens, inside, seen, first, place


@triton.jit
def _bytes_of(at, inside):
    """The words of queries, and their bits as the bytes of words (8, queries)."""
    word = tl.load(at, mask=inside, other=0)
    return word, (word[None, :] >> tl.arange(0, 8)[:, None]) & 0x01010101


@triton.jit
def _count_kernel(
    chosen, block_start, block_length, first_cluster, num_seen, counts, number,
    num_tokens, num_clusters, num_chunks, clusters_per_block,
    WORDS: tl.constexpr, GROUP_HEADS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Count the items of each cluster in a chunk, and those of each query."""
    wait_for_previous_kernel()
    tokens, inside, seen, _, place = _chunk_of(
        block_start, block_length, first_cluster, num_seen, num_tokens, num_clusters, num_chunks,
        clusters_per_block, CHUNK, GROUP_HEADS,
    )  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    words = chosen_row(chosen, head, tokens, num_tokens, WORDS)
    bit = tl.arange(0, 8)
    found = tl.zeros([CHUNK], tl.int32)
    for first in range(0, seen, 32):
        word, bits = _bytes_of(words, inside)
        many = tl.sum(bits, 1)
        for k in tl.static_range(4):
            cluster = first + 8 * k + bit
            tl.store(counts + place + cluster, (many >> 8 * k) & 0xFF, mask=cluster < seen)
        found += number_of_bits(word)
        words += num_tokens
    tl.store(number + head * num_tokens + tokens, found, mask=inside)


@triton.jit
def _add_counts_kernel(
    counts, bounds, num_clusters, num_chunks, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr
):
    """Turn the counts of chunks into those of all chunks before; the sum of all goes to bounds[j + 1]."""
    wait_for_previous_kernel()
    head = tl.program_id(1).to(tl.int64)
    cluster = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    exists = cluster < num_clusters
    before = tl.zeros([BLOCK_J], tl.int32)
    for first in range(0, num_chunks, BLOCK_C):
        chunk = first + tl.arange(0, BLOCK_C)
        at = counts + (head * num_chunks + chunk)[:, None] * num_clusters + cluster[None, :]
        mask = (chunk < num_chunks)[:, None] & exists[None, :]
        many = tl.load(at, mask=mask, other=0)
        tl.store(at, before[None, :] + tl.cumsum(many, 0) - many, mask=mask)
        before += tl.sum(many, 0)
    tl.store(bounds + head * (num_clusters + 1) + 1 + cluster, before, mask=exists)


@triton.jit
def _place_kernel(
    chosen, block_start, block_length, first_cluster, num_seen, counts, bounds, order,
    num_tokens, num_clusters, num_chunks, clusters_per_block, num_retrieved,
    WORDS: tl.constexpr, GROUP_HEADS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the items of a chunk where their clusters have room for them."""
    wait_for_previous_kernel()
    tokens, inside, seen, first_seen, place = _chunk_of(
        block_start, block_length, first_cluster, num_seen, num_tokens, num_clusters, num_chunks,
        clusters_per_block, CHUNK, GROUP_HEADS,
    )  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    words = chosen_row(chosen, head, tokens, num_tokens, WORDS)
    item = (head % GROUP_HEADS * num_tokens + tokens).to(tl.int32) * num_retrieved
    bounds += head // GROUP_HEADS * (num_clusters + 1) + first_seen
    order += head // GROUP_HEADS * num_tokens * GROUP_HEADS * num_retrieved
    byte_of = tl.arange(0, 8)[:, None]
    for first in range(0, seen, 32):
        word, bits = _bytes_of(words, inside)
        if tl.max((word != 0).to(tl.int32), 0) > 0:
            up_to_row = tl.cumsum(bits, 1)
            # Few bits are set: a step for the lowest of each query is less work than one for each bit.
            while tl.max((word != 0).to(tl.int32), 0) > 0:
                exists = word != 0
                cluster = number_of_bits((word & -word) - 1)
                up_to = tl.sum(tl.where(byte_of == (cluster & 7)[None, :], up_to_row, 0), 0)
                start = tl.load(bounds + first + cluster, mask=exists, other=0)
                start += tl.load(counts + place + first + cluster, mask=exists, other=0)
                to = start + (up_to >> (cluster & 24) & 0xFF) - 1
                tl.store(order + to, item, mask=exists)
                item += exists.to(tl.int32)
                word = word & (word - 1)
        words += num_tokens


@library_call
def _add_up(bounds: torch.Tensor) -> tuple[()]:
    """Numbers of clusters to those of all clusters before."""
    bounds.cumsum_(1)
    return ()


def list_items(
    chosen: torch.Tensor, layout: Layout, kv_heads: int, num_clusters: int, num_retrieved: int,
    block: int, clusters_per_block: int,
) -> Items:  # fmt: skip
    """The items of chosen (H, WORDS, B * N), the bits of clusters that each query retrieves."""
    heads, num_words, num_tokens = chosen.shape
    groups = heads // kv_heads
    order = chosen.new_empty(kv_heads, groups * num_tokens * num_retrieved)
    bounds = chosen.new_empty(kv_heads, num_clusters + 1)
    number = chosen.new_empty(heads, num_tokens, dtype=torch.uint8)
    fill(bounds, 0)
    if layout.outside is not None or not num_retrieved:
        fill(number, 0)
    if not num_retrieved:
        return Items(order, bounds, number)
    tiles = ceil_div(block, _CHUNK)
    num_chunks = groups * tiles * (layout.max_seen // clusters_per_block + 1)
    counts = chosen.new_empty(kv_heads, num_chunks, num_clusters)
    fill(counts, 0)  # of what a chunk does not see
    grid = (tiles, heads, layout.block_start.shape[0])
    sizes = (num_tokens, num_clusters, num_chunks, clusters_per_block)
    constants = {"WORDS": num_words, "GROUP_HEADS": groups, **_LISTED}
    launch(_count_kernel, grid, chosen, *layout.query_blocks, counts, number, *sizes, **constants)
    launch(
        _add_counts_kernel, (ceil_div(num_clusters, _ADDED["BLOCK_J"]), kv_heads),
        counts, bounds, num_clusters, num_chunks, **_ADDED,
    )  # fmt: skip
    _add_up(bounds)
    launch(
        _place_kernel, grid,
        chosen, *layout.query_blocks, counts, bounds, order, *sizes, num_retrieved, **constants,
    )  # fmt: skip
    return Items(order, bounds, number)
