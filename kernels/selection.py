"""Selection: the clusters of largest refined logit for every query.

The r largest of up to thousands of logits lie in the r groups of largest maximum, for any grouping. So two
small searches do instead of one large one: over the maxima of groups of G clusters, then over the r * G
logits of the chosen groups, which a second matrix product brings back. No matrix of all logits is kept.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from muse_hf.kernels.common import largest, load_rows, power_of_two, rank_keys
from muse_hf.kernels.layout import Layout

# Bits of a logit that decide, for inputs of 16 bits.
_BITS = 14
_MOST_GROUPS = 256
_WORDS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}
_PRODUCT = {"BLOCK_Q": 128, "BLOCK_J": 64, "num_warps": 4}
_SEARCH = {"BLOCK_Q": 4, "num_warps": 2}


@triton.jit
def load_summaries(means, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows (BLOCK_J, BLOCK_D) of key or value means."""
    dims = tl.arange(0, BLOCK_D)
    at = means + rows[:, None] * HEAD_DIM + dims[None, :]
    if HEAD_DIM == BLOCK_D:
        return tl.load(at)
    return tl.load(at, mask=(dims < HEAD_DIM)[None, :], other=0)


@triton.jit
def summary_logits(q, k, log_mass, rows, exists, scale):
    """ℓ = log |j| + q·k̃ (BLOCK_Q, BLOCK_J), -inf where a cluster is empty or does not exist."""
    bias = tl.where(exists, tl.load(log_mass + rows), -float("inf"))
    return tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias[None, :]


@triton.jit
def _maxima_kernel(
    query, key_mean, log_mass, block_start, block_length, first_cluster, num_seen, maxima,
    stride_b, stride_h, stride_n, length, num_tokens, num_clusters, scale,
    GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr, G: tl.constexpr, NUM_GROUPS: tl.constexpr,
):  # fmt: skip
    """Largest logit of every group of G clusters. One program a tile of queries of a head."""
    tile, head = tl.program_id(0), tl.program_id(1)
    block = tl.num_programs(2) - 1 - tl.program_id(2)  # the late blocks first: they see most
    block_rows = tl.load(block_length + block)
    if tile * BLOCK_Q < block_rows:
        rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        inside = rows < block_rows
        seen = tl.load(num_seen + block)
        tokens = tl.load(block_start + block) + rows
        heads_row = (head // GROUP_HEADS).to(tl.int64) * num_clusters + tl.load(first_cluster + block)
        q = load_rows(query, tokens, inside, head, stride_b, stride_h, stride_n, length, HEAD_DIM, BLOCK_D)
        at = maxima + (head.to(tl.int64) * num_tokens + tokens)[:, None] * NUM_GROUPS
        for j in range(0, seen, BLOCK_J):
            clusters = j + tl.arange(0, BLOCK_J)
            k = load_summaries(key_mean, heads_row + clusters, HEAD_DIM, BLOCK_D)
            s = summary_logits(q, k, log_mass, heads_row + clusters, clusters < seen, scale)
            top = tl.max(tl.reshape(s, [BLOCK_Q, BLOCK_J // G, G]), 2)
            to = at + (j // G + tl.arange(0, BLOCK_J // G))[None, :]
            tl.store(to, top.to(maxima.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _groups_kernel(
    maxima, token_seen, ranks, choice, num_tokens, num_retrieved,
    BLOCK_Q: tl.constexpr, G: tl.constexpr, NUM_GROUPS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The r groups of largest maximum, of a few queries: their ranks from 1 (else 0), and their list."""
    tokens = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = tokens < num_tokens
    seen = tl.load(token_seen + tokens, mask=inside, other=0)
    row = tl.program_id(1).to(tl.int64) * num_tokens + tokens
    groups = tl.arange(0, NUM_GROUPS)
    real = (groups * G)[None, :] < seen[:, None]
    top = tl.load(maxima + row[:, None] * NUM_GROUPS + groups[None, :], mask=real, other=-float("inf"))
    taken = largest(rank_keys(top.to(tl.float32), BITS), num_retrieved, BITS)
    rank = tl.cumsum(taken.to(tl.int32), 1)
    tl.store(
        ranks + row[:, None] * NUM_GROUPS + groups[None, :],
        tl.where(taken, rank, 0).to(ranks.dtype.element_ty),
        mask=inside[:, None],
    )
    to = choice + row[:, None] * num_retrieved + rank - 1
    tl.store(to, groups[None, :] + tl.zeros_like(rank), mask=taken & inside[:, None])


@triton.jit
def _candidates_kernel(
    query, key_mean, log_mass, block_start, block_length, first_cluster, num_seen, ranks, candidates,
    stride_b, stride_h, stride_n, length, num_tokens, num_clusters, scale,
    GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_J: tl.constexpr, G: tl.constexpr, NUM_GROUPS: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """All logits of the chosen groups, in the order of their ranks. One program a tile of queries."""
    tile, head = tl.program_id(0), tl.program_id(1)
    block = tl.num_programs(2) - 1 - tl.program_id(2)
    block_rows = tl.load(block_length + block)
    if tile * BLOCK_Q < block_rows:
        rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        inside = rows < block_rows
        seen = tl.load(num_seen + block)
        tokens = tl.load(block_start + block) + rows
        heads_row = (head // GROUP_HEADS).to(tl.int64) * num_clusters + tl.load(first_cluster + block)
        q = load_rows(query, tokens, inside, head, stride_b, stride_h, stride_n, length, HEAD_DIM, BLOCK_D)
        row = head.to(tl.int64) * num_tokens + tokens
        for j in range(0, seen, BLOCK_J):
            clusters = j + tl.arange(0, BLOCK_J)
            k = load_summaries(key_mean, heads_row + clusters, HEAD_DIM, BLOCK_D)
            s = summary_logits(q, k, log_mass, heads_row + clusters, clusters < seen, scale)
            groups = j // G + tl.arange(0, BLOCK_J // G)
            at = row[:, None] * NUM_GROUPS + groups[None, :]
            rank = tl.load(ranks + at, mask=inside[:, None], other=0).to(tl.int32)
            to = candidates + row[:, None] * ROOM + (rank - 1) * G
            tl.store(
                to[:, :, None] + tl.arange(0, G)[None, None, :],
                tl.reshape(s, [BLOCK_Q, BLOCK_J // G, G]).to(candidates.dtype.element_ty),
                mask=(rank > 0)[:, :, None],
            )


@triton.jit
def _clusters_kernel(
    candidates, token_seen, token_first, words, choice, num_tokens, num_retrieved,
    BLOCK_Q: tl.constexpr, G: tl.constexpr, NUM_GROUPS: tl.constexpr, BLOCK_R: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """The r largest of the candidates of a few queries, as a bitmap and as a list.

    On entry `choice` lists the groups and `words` holds their ranks; both are overwritten.
    """
    tokens = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = tokens < num_tokens
    seen = tl.load(token_seen + tokens, mask=inside, other=0)
    first = tl.load(token_first + tokens, mask=inside, other=0)
    row = tl.program_id(1).to(tl.int64) * num_tokens + tokens
    num_groups = tl.minimum((seen + G - 1) // G, num_retrieved)
    places = tl.arange(0, BLOCK_R * G)
    logits = tl.load(
        candidates + row[:, None] * (BLOCK_R * G) + places[None, :],
        mask=places[None, :] < num_groups[:, None] * G,
        other=-float("inf"),
    )
    taken = largest(rank_keys(logits.to(tl.float32), BITS), num_retrieved, BITS)
    ranks = tl.arange(0, BLOCK_R)
    has_group = ranks[None, :] < num_groups[:, None]
    list_at = choice + row[:, None] * num_retrieved
    group = tl.load(list_at + ranks[None, :], mask=has_group, other=0)
    tl.debug_barrier()
    word_at = words + row[:, None] * NUM_GROUPS
    none = tl.zeros([BLOCK_Q, NUM_GROUPS], words.dtype.element_ty)
    tl.store(word_at + tl.arange(0, NUM_GROUPS)[None, :], none, mask=inside[:, None])
    nothing = tl.full([BLOCK_Q, BLOCK_R], -1, tl.int32)
    tl.store(list_at + ranks[None, :], nothing, mask=inside[:, None] & (ranks < num_retrieved)[None, :])
    tl.debug_barrier()
    bits = tl.reshape(taken.to(tl.int32), [BLOCK_Q, BLOCK_R, G]) << tl.arange(0, G)[None, None, :]
    tl.store(word_at + group, tl.sum(bits, 2).to(words.dtype.element_ty), mask=has_group)
    cluster = first[:, None, None] + group[:, :, None] * G + tl.arange(0, G)[None, None, :]
    place = tl.cumsum(taken.to(tl.int32), 1) - 1
    tl.store(list_at + place, tl.reshape(cluster, [BLOCK_Q, BLOCK_R * G]), mask=taken)


def selection_limit(max_seen: int, num_retrieved: int) -> str | None:
    """Why queries cannot select from so many clusters, or None if they can."""
    if _group_size(max_seen, num_retrieved) is None:
        return f"{max_seen} clusters are more than a query can select {num_retrieved} from"
    return None


def _group_size(max_seen: int, num_retrieved: int) -> int | None:
    """Clusters in a group: as few as give at most 256 groups whose rank fits into a word of as many bits."""
    sizes = (size for size in _WORDS if max_seen <= size * _MOST_GROUPS and num_retrieved < 1 << size)
    return next(sizes, None)


def select(
    query: torch.Tensor, key_mean: torch.Tensor, log_mass: torch.Tensor, layout: Layout,
    scale: float, num_retrieved: int, block: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Choose clusters for all queries (B, H, N, D) by key means (Hkv, J, D) and log masses (Hkv, J).

    Returns:
        A bitmap (H, B * N, W) int32 of the clusters chosen among those seen, and the choice (H, B * N, r)
        int32, clusters counted over the batch and -1 behind the last.
    """
    batch, heads, length, head_dim = query.shape
    num_tokens, precise = batch * length, query.dtype == torch.float32
    group = _group_size(layout.max_seen, num_retrieved)
    num_groups = power_of_two(triton.cdiv(layout.max_seen, group))
    block_r = power_of_two(num_retrieved)
    new = partial(torch.empty, device=query.device)
    logit = torch.float32 if precise else torch.float16
    words = new(heads, num_tokens, num_groups, dtype=_WORDS[group])
    choice = new(heads, num_tokens, num_retrieved, dtype=torch.int32)
    groups = {"G": group, "NUM_GROUPS": num_groups}
    products = groups | {
        "GROUP_HEADS": heads // key_mean.shape[0], "HEAD_DIM": head_dim, "BLOCK_D": power_of_two(head_dim),
        **_PRODUCT,
    }  # fmt: skip
    search = groups | {"BITS": 32 if precise else _BITS, **_SEARCH}
    tiles = (triton.cdiv(block, _PRODUCT["BLOCK_Q"]), heads, layout.block_start.shape[0])
    few = (triton.cdiv(num_tokens, _SEARCH["BLOCK_Q"]), heads)
    blocks = (layout.block_start, layout.block_length, layout.first_cluster, layout.num_seen)
    sizes = (*query.stride()[:3], length, num_tokens, key_mean.shape[1], scale)

    maxima = new(heads, num_tokens, num_groups, dtype=logit)
    _maxima_kernel[tiles](query, key_mean, log_mass, *blocks, maxima, *sizes, **products)
    _groups_kernel[few](maxima, layout.token_seen, words, choice, num_tokens, num_retrieved, **search)
    del maxima
    candidates = new(heads, num_tokens, block_r * group, dtype=logit)
    _candidates_kernel[tiles](
        query, key_mean, log_mass, *blocks, words, candidates, *sizes, **products, ROOM=block_r * group
    )
    _clusters_kernel[few](
        candidates, layout.token_seen, layout.token_first, words, choice, num_tokens, num_retrieved,
        **search, BLOCK_R=block_r,
    )  # fmt: skip
    return words.view(torch.int32), choice
