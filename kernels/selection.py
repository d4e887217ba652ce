"""Selection: the clusters of largest refined logit for every query.

The r largest of up to thousands of logits lie in the r groups of largest maximum, for any grouping. So two
small searches do instead of one large one: over the maxima of groups of G clusters, then over the r * G
logits of the chosen groups, which a second matrix product brings back. No logit matrix is kept.
"""

import torch
import triton
import triton.language as tl
from muse_hf.kernels.common import largest, load_rows, ordered, power_of_two
from muse_hf.kernels.layout import Layout

# Bits of a logit that decide: sign, exponent and mantissa down to the precision of bfloat16 products.
_BITS = 20
_MOST_GROUPS = 256


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
def _select_kernel(
    query, key_mean, count, block_start, block_length, first_cluster, num_seen, chosen, choice, scratch,
    stride_b, stride_h, stride_n, length, num_tokens, num_clusters, first_head, scale, num_retrieved,
    GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr, G: tl.constexpr, NUM_GROUPS: tl.constexpr,
    BLOCK_R: tl.constexpr, SCRATCH: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """One program a tile of queries of one head.

    scratch: a row of SCRATCH floats a query, for the maxima of groups and then for candidates.
    chosen: (H, tokens, NUM_GROUPS) one word a group, whose bits are its chosen clusters.
    choice: (H, tokens, r) the chosen clusters, counted over the batch, -1 behind the last.
    """
    tile, block, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = rows < tl.load(block_length + block)
    seen = tl.load(num_seen + block)
    tokens = tl.load(block_start + block) + rows
    if seen == 0:
        ranks = tl.arange(0, BLOCK_R)
        row = (head.to(tl.int64) * num_tokens + tokens) * num_retrieved
        tl.store(
            choice + row[:, None] + ranks[None, :],
            tl.full([BLOCK_Q, BLOCK_R], -1, tl.int32),
            mask=inside[:, None] & (ranks < num_retrieved)[None, :],
        )
    elif tile * BLOCK_Q < tl.load(block_length + block):
        first = tl.load(first_cluster + block)
        heads_row = ((first_head + head) // GROUP_HEADS).to(tl.int64) * num_clusters + first
        q = load_rows(
            query, tokens, inside, first_head + head, stride_b, stride_h, stride_n, length, HEAD_DIM, BLOCK_D
        )
        item = head.to(tl.int64) * num_tokens + tokens
        store_at = scratch + item[:, None] * SCRATCH
        groups = tl.arange(0, NUM_GROUPS)

        for j in range(0, seen, BLOCK_J):
            clusters = j + tl.arange(0, BLOCK_J)
            s = summary_logits(
                q, key_mean, count, heads_row, clusters, clusters < seen, scale, HEAD_DIM, BLOCK_D
            )
            top = tl.max(tl.reshape(s, [BLOCK_Q, BLOCK_J // G, G]), 2)
            at = j // G + tl.arange(0, BLOCK_J // G)
            tl.store(store_at + at[None, :], top, mask=inside[:, None])
        tl.debug_barrier()
        num_groups = (seen + G - 1) // G
        top = tl.load(
            store_at + groups[None, :],
            mask=inside[:, None] & (groups < num_groups)[None, :],
            other=-float("inf"),
        )
        keys = tl.where(top > -float("inf"), ordered(top) >> (32 - BITS), 0)
        taken = largest(keys, num_retrieved, BITS)
        place = tl.cumsum(taken.to(tl.int32), 1) * taken.to(tl.int32)  # from 1; 0: not taken
        word_at = chosen + item[:, None] * NUM_GROUPS
        tl.store(word_at + groups[None, :], place.to(chosen.dtype.element_ty), mask=inside[:, None])
        choice_at = choice + item[:, None] * num_retrieved
        tl.store(choice_at + place - 1, groups[None, :] + tl.zeros_like(place), mask=inside[:, None] & taken)
        num_taken = tl.sum(taken.to(tl.int32), 1)
        tl.debug_barrier()

        for j in range(0, seen, BLOCK_J):
            clusters = j + tl.arange(0, BLOCK_J)
            s = summary_logits(
                q, key_mean, count, heads_row, clusters, clusters < seen, scale, HEAD_DIM, BLOCK_D
            )
            at = j // G + tl.arange(0, BLOCK_J // G)
            place = tl.load(
                word_at + at[None, :], mask=inside[:, None] & (at < NUM_GROUPS)[None, :], other=0
            ).to(tl.int32)
            s = tl.reshape(s, [BLOCK_Q, BLOCK_J // G, G])
            to = store_at[:, :, None] + ((place - 1) * G)[:, :, None] + tl.arange(0, G)[None, None, :]
            tl.store(to, s, mask=(place > 0)[:, :, None] & inside[:, None, None])
        tl.debug_barrier()
        tl.store(
            word_at + groups[None, :],
            tl.zeros([BLOCK_Q, NUM_GROUPS], chosen.dtype.element_ty),
            mask=inside[:, None],
        )
        candidates = tl.arange(0, BLOCK_R * G)
        real = inside[:, None] & (candidates[None, :] < num_taken[:, None] * G)
        s = tl.load(store_at + candidates[None, :], mask=real, other=-float("inf"))
        keys = tl.where(s > -float("inf"), ordered(s) >> (32 - BITS), 0)
        taken = largest(keys, num_retrieved, BITS)
        ranks = tl.arange(0, BLOCK_R)
        group_real = inside[:, None] & (ranks[None, :] < num_taken[:, None])
        group = tl.load(choice_at + ranks[None, :], mask=group_real, other=0)
        bits = tl.reshape(taken.to(tl.int32), [BLOCK_Q, BLOCK_R, G]) << tl.arange(0, G)[None, None, :]
        tl.debug_barrier()
        tl.store(word_at + group, tl.sum(bits, 2).to(chosen.dtype.element_ty), mask=group_real)
        tl.store(
            choice_at + ranks[None, :],
            tl.full([BLOCK_Q, BLOCK_R], -1, tl.int32),
            mask=inside[:, None] & (ranks < num_retrieved)[None, :],
        )
        tl.debug_barrier()
        place = tl.cumsum(taken.to(tl.int32), 1) - 1
        cluster = first + group[:, :, None] * G + tl.arange(0, G)[None, None, :]
        tl.store(choice_at + place, tl.reshape(cluster, [BLOCK_Q, BLOCK_R * G]), mask=taken)


def group_size(max_seen: int) -> int:
    """Clusters in a group: as few as give at most 256 groups, and the bits of an integer type."""
    for size in (8, 16, 32):
        if max_seen <= size * _MOST_GROUPS:
            return size
    raise ValueError(f"{max_seen} clusters are more than a query can select from")


def word_dtype(group: int, num_retrieved: int) -> torch.dtype:
    """Holds G bits, and before them the rank of a group among r."""
    return torch.uint8 if group == 8 and num_retrieved < 256 else torch.int32


def select(
    query: torch.Tensor, key_mean: torch.Tensor, count: torch.Tensor, layout: Layout,
    heads: range, group_heads: int, scale: float, num_retrieved: int, block: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Choose clusters for the queries of some heads.

    Returns:
        The words (len(heads), B * N, number of groups), undefined for queries that see no clusters, and the
        choice (len(heads), B * N, r) int32.
    """
    batch, _, length, head_dim = query.shape
    num_tokens = batch * length
    group = group_size(layout.max_seen)
    num_groups = power_of_two(triton.cdiv(layout.max_seen, group))
    block_r = power_of_two(num_retrieved)
    room = max(num_groups, block_r * group)
    new = {"device": query.device}
    chosen = torch.empty(len(heads), num_tokens, num_groups, dtype=word_dtype(group, num_retrieved), **new)
    choice = torch.empty(len(heads), num_tokens, num_retrieved, dtype=torch.int32, **new)
    scratch = torch.empty(len(heads), num_tokens, room, dtype=torch.float32, **new)
    block_q = 32
    grid = (triton.cdiv(block, block_q), layout.block_start.shape[0], len(heads))
    _select_kernel[grid](
        query, key_mean, count, layout.block_start, layout.block_length, layout.first_cluster,
        layout.num_seen, chosen, choice, scratch, *query.stride()[:3], length, num_tokens,
        key_mean.shape[1], heads.start, scale, num_retrieved,
        GROUP_HEADS=group_heads, HEAD_DIM=head_dim, BLOCK_D=power_of_two(head_dim), BLOCK_Q=block_q,
        BLOCK_J=64, G=group, NUM_GROUPS=num_groups, BLOCK_R=block_r, SCRATCH=room,
        BITS=32 if query.dtype == torch.float32 else _BITS, num_warps=4,
    )  # fmt: skip
    return chosen, choice
