"""Selection: the clusters of largest refined logit for every query.

The r largest of up to thousands of logits lie in the r groups of largest maximum, for any grouping. So two
small searches do instead of one large one: over the maxima of groups of G clusters, then over the r * G
logits of the chosen groups, which a second matrix product brings back. No logit matrix is kept.
"""

import torch
import triton
import triton.language as tl

from muse_hf.kernels.common import largest, load_rows, power_of_two, rank_keys
from muse_hf.kernels.layout import Layout

# Bits of a logit that decide, for inputs of 16 bits.
_BITS = 14
_MOST_GROUPS = 256
_BLOCK_Q, _BLOCK_J = 64, 64
# Programs that run at once; each works through many tiles of queries with one piece of scratch memory.
_PROGRAMS = 512


@triton.jit
def summary_logits(
    q, key_mean, count, heads_row, clusters, exists, scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """ℓ = log |j| + q·k̃ (BLOCK_Q, BLOCK_J), -inf where a cluster is empty or does not exist."""
    dims = tl.arange(0, BLOCK_D)
    k = tl.load(
        key_mean + (heads_row + clusters)[:, None] * HEAD_DIM + dims[None, :],
        mask=exists[:, None] & (dims < HEAD_DIM)[None, :],
        other=0,
    )
    many = tl.load(count + heads_row + clusters, mask=exists, other=0)
    log_mass = tl.where(many > 0, tl.log(many.to(tl.float32)), -float("inf"))
    return tl.dot(q, tl.trans(k), input_precision="ieee") * scale + log_mass[None, :]


@triton.jit
def _select_tile(
    q, key_mean, count, heads_row, first, seen, inside, item, chosen, choice, scratch, scale, num_retrieved,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr,
    G: tl.constexpr, NUM_GROUPS: tl.constexpr, BLOCK_R: tl.constexpr, SCRATCH: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Choose for one tile of queries, of which `item` are the rows in `chosen` and `choice`."""
    value_at = scratch + tl.arange(0, BLOCK_Q)[:, None] * SCRATCH
    word_at = chosen + item[:, None] * NUM_GROUPS
    choice_at = choice + item[:, None] * num_retrieved
    groups = tl.arange(0, NUM_GROUPS)
    tile_groups = tl.arange(0, BLOCK_J // G)

    for j in range(0, seen, BLOCK_J):
        clusters = j + tl.arange(0, BLOCK_J)
        s = summary_logits(q, key_mean, count, heads_row, clusters, clusters < seen, scale, HEAD_DIM, BLOCK_D)
        top = tl.max(tl.reshape(s, [BLOCK_Q, BLOCK_J // G, G]), 2)
        tl.store(value_at + (j // G + tile_groups)[None, :], top)
    tl.debug_barrier()
    maxima = tl.load(value_at + groups[None, :], mask=(groups * G < seen)[None, :], other=-float("inf"))
    taken = largest(rank_keys(maxima, BITS), num_retrieved, BITS)
    rank = tl.cumsum(taken.to(tl.int32), 1)
    # For now a word is the group's rank from 1, or 0, and the choice lists the groups.
    mask = inside[:, None]
    tl.store(word_at + groups[None, :], tl.where(taken, rank, 0).to(chosen.dtype.element_ty), mask=mask)
    tl.store(choice_at + rank - 1, groups[None, :] + tl.zeros_like(rank), mask=mask & taken)
    num_taken = tl.sum(taken.to(tl.int32), 1)
    tl.debug_barrier()

    for j in range(0, seen, BLOCK_J):
        clusters = j + tl.arange(0, BLOCK_J)
        s = summary_logits(q, key_mean, count, heads_row, clusters, clusters < seen, scale, HEAD_DIM, BLOCK_D)
        words = tl.load(word_at + (j // G + tile_groups)[None, :], mask=mask, other=0).to(tl.int32)
        to = value_at[:, :, None] + ((words - 1) * G)[:, :, None] + tl.arange(0, G)[None, None, :]
        tl.store(to, tl.reshape(s, [BLOCK_Q, BLOCK_J // G, G]), mask=(words > 0)[:, :, None])
    tl.debug_barrier()
    candidates = tl.arange(0, BLOCK_R * G)
    logits = tl.load(
        value_at + candidates[None, :],
        mask=candidates[None, :] < num_taken[:, None] * G,
        other=-float("inf"),
    )
    taken = largest(rank_keys(logits, BITS), num_retrieved, BITS)
    ranks = tl.arange(0, BLOCK_R)
    has_group = mask & (ranks[None, :] < num_taken[:, None])
    group = tl.load(choice_at + ranks[None, :], mask=has_group, other=0)
    tl.debug_barrier()
    none = tl.zeros([BLOCK_Q, NUM_GROUPS], chosen.dtype.element_ty)
    tl.store(word_at + groups[None, :], none, mask=mask)
    nothing = tl.full([BLOCK_Q, BLOCK_R], -1, tl.int32)
    tl.store(choice_at + ranks[None, :], nothing, mask=mask & (ranks < num_retrieved)[None, :])
    tl.debug_barrier()
    bits = tl.reshape(taken.to(tl.int32), [BLOCK_Q, BLOCK_R, G]) << tl.arange(0, G)[None, None, :]
    tl.store(word_at + group, tl.sum(bits, 2).to(chosen.dtype.element_ty), mask=has_group)
    cluster = first + group[:, :, None] * G + tl.arange(0, G)[None, None, :]
    place = tl.cumsum(taken.to(tl.int32), 1) - 1
    tl.store(choice_at + place, tl.reshape(cluster, [BLOCK_Q, BLOCK_R * G]), mask=mask & taken)
    tl.debug_barrier()  # before the next tile uses the scratch memory


@triton.jit
def _select_kernel(
    query, key_mean, count, block_start, block_length, first_cluster, num_seen, chosen, choice, scratch,
    stride_b, stride_h, stride_n, length, num_tokens, num_clusters, num_blocks, num_heads, tiles_per_block,
    scale, num_retrieved,
    GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr, G: tl.constexpr, NUM_GROUPS: tl.constexpr,
    BLOCK_R: tl.constexpr, SCRATCH: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Programs share the tiles of all blocks and heads, the late blocks, which see most, first.

    scratch: SCRATCH floats for each of a tile's queries, for the maxima of groups and then for candidates.
    """
    mine = scratch + tl.program_id(0).to(tl.int64) * BLOCK_Q * SCRATCH
    for number in range(tl.program_id(0), num_blocks * tiles_per_block * num_heads, tl.num_programs(0)):
        head = number % num_heads
        tile = number // num_heads % tiles_per_block
        block = num_blocks - 1 - number // (num_heads * tiles_per_block)
        rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        block_rows = tl.load(block_length + block)
        inside = rows < block_rows
        seen = tl.load(num_seen + block)
        tokens = tl.load(block_start + block) + rows
        item = head.to(tl.int64) * num_tokens + tokens
        if tile * BLOCK_Q < block_rows:
            if seen == 0:
                ranks = tl.arange(0, BLOCK_R)
                tl.store(
                    choice + item[:, None] * num_retrieved + ranks[None, :],
                    tl.full([BLOCK_Q, BLOCK_R], -1, tl.int32),
                    mask=inside[:, None] & (ranks < num_retrieved)[None, :],
                )
            else:
                first = tl.load(first_cluster + block)
                heads_row = (head // GROUP_HEADS).to(tl.int64) * num_clusters + first
                q = load_rows(
                    query, tokens, inside, head, stride_b, stride_h, stride_n, length, HEAD_DIM, BLOCK_D
                )
                _select_tile(
                    q, key_mean, count, heads_row, first, seen, inside, item, chosen, choice, mine, scale,
                    num_retrieved, HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_J, G, NUM_GROUPS, BLOCK_R, SCRATCH, BITS,
                )  # fmt: skip


def _group_size(max_seen: int, num_retrieved: int) -> int:
    """Clusters in a group: as few as give at most 256 groups whose rank fits into a word of as many bits."""
    for size in (8, 16, 32):
        if max_seen <= size * _MOST_GROUPS and num_retrieved < 1 << size:
            return size
    raise ValueError(f"{max_seen} clusters are more than a query can select from")


def select(
    query: torch.Tensor, key_mean: torch.Tensor, count: torch.Tensor, layout: Layout,
    scale: float, num_retrieved: int, block: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Choose clusters for all queries (B, H, N, D) by their summaries (Hkv, J, D) and sizes (Hkv, J).

    Returns:
        A bitmap (H, B * N, W) int32 of the clusters chosen among those seen, undefined for queries that see
        none, and the choice (H, B * N, r) int32, clusters counted over the batch and -1 behind the last.
    """
    batch, heads, length, head_dim = query.shape
    group = _group_size(layout.max_seen, num_retrieved)
    num_groups = power_of_two(triton.cdiv(layout.max_seen, group))
    block_r = power_of_two(num_retrieved)
    room = max(num_groups, block_r * group)
    tiles_per_block = triton.cdiv(block, _BLOCK_Q)
    num_blocks = layout.block_start.shape[0]
    programs = min(_PROGRAMS, num_blocks * tiles_per_block * heads)
    word = {8: torch.uint8, 16: torch.int16, 32: torch.int32}[group]
    chosen = torch.empty(heads, batch * length, num_groups, dtype=word, device=query.device)
    choice = torch.empty(heads, batch * length, num_retrieved, dtype=torch.int32, device=query.device)
    scratch = torch.empty(programs, _BLOCK_Q, room, dtype=torch.float32, device=query.device)
    _select_kernel[(programs,)](
        query, key_mean, count, layout.block_start, layout.block_length, layout.first_cluster,
        layout.num_seen, chosen, choice, scratch, *query.stride()[:3], length, batch * length,
        key_mean.shape[1], num_blocks, heads, tiles_per_block, scale, num_retrieved,
        GROUP_HEADS=heads // key_mean.shape[0], HEAD_DIM=head_dim, BLOCK_D=power_of_two(head_dim),
        BLOCK_Q=_BLOCK_Q, BLOCK_J=_BLOCK_J, G=group, NUM_GROUPS=num_groups, BLOCK_R=block_r, SCRATCH=room,
        BITS=32 if query.dtype == torch.float32 else _BITS, num_warps=8,
    )  # fmt: skip
    return chosen.view(torch.int32), choice
