"""Selection and refinement of plain summaries, forward.

One program holds a tile of queries and passes twice over the summaries that it sees: first to find the
largest logit and the score that a cluster needs to be retrieved, then for the softmax over the local part and
all clusters that are not. Where more clusters reach that score than are to be retrieved, it looks at some
again. With a threshold, a cluster has to miss a share of the query's attention too: what second order adds to
its weight. Nothing of the size of queries times clusters is kept but a bit each.

WORDS, the words of such bits a query has, is 0 where nothing is retrieved.
"""

import torch
import triton
import triton.language as tl
from muse_hf.kernels.clustering import Clusters
from muse_hf.kernels.common import (
    LOG2_E,
    choose_launch,
    has_much_shared_memory,
    load_at,
    load_rows,
    power_of_two,
    store_rows,
    token_strides,
    wait_for_previous_kernel,
)
from muse_hf.kernels.launch import ceil_div, launch
from muse_hf.kernels.layout import Layout
from muse_hf.kernels.local import Local
from muse_hf.kernels.selection import keep_largest, number_of_bits, take_first, threshold_of
from muse_hf.kernels.summaries import TILE, chosen_row, rows_at, summary_logits

# Three programs fit a multiprocessor with 168 registers a thread, which is worth a few spills.
_LAUNCH = {"BLOCK_Q": 64, "BLOCK_J": 32, "num_warps": 4, "num_stages": 3, "maxnreg": 168}
_WIDE_LAUNCH = {"BLOCK_Q": 64, "BLOCK_J": 32, "num_warps": 4, "num_stages": 3}
_WIDEST_LAUNCH = {"BLOCK_Q": 64, "BLOCK_J": 32, "num_warps": 4, "num_stages": 2}
_PRECISE_LAUNCH = {"BLOCK_Q": 32, "BLOCK_J": 32, "num_warps": 8, "num_stages": 1}


@triton.jit
def _score_of(half_square, spread, s):
    """The logit to second order (BLOCK_Q, BLOCK_J)."""
    return tl.dot(half_square, tl.trans(spread), s, input_precision="ieee")


@triton.jit
def _tile(
    q, half_square, least_score, least_missed, top, k_at, spread_at, mass_at, exists, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WORDS: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Weights of a tile of clusters relative to 2^top, and which of them are wanted for retrieval.

    Computed again from the same numbers in the same way, both have the same bits.

    Args:
        least_score: Score (BLOCK_Q,) that a cluster needs.
        least_missed: With a THRESHOLD, weight that its summary has to miss.
        exists: (BLOCK_J,) which clusters of the tile are seen; None if all are. Others are loaded as zeros,
            for NaN of later blocks would spread.
    """
    k = load_at(k_at, exists, HEAD_DIM, BLOCK_D)
    s = summary_logits(q, k, mass_at, exists, scale)
    p = tl.exp2(s * LOG2_E - top[:, None])
    taken = s >= float("inf")
    if WORDS > 0:
        spread = load_at(spread_at, exists, HEAD_DIM, BLOCK_D)
        score = _score_of(half_square, spread, s)
        taken = score >= least_score[:, None]
        if THRESHOLD:
            taken = taken & (tl.exp2(score * LOG2_E - top[:, None]) - p >= least_missed[:, None])
    return p, taken


@triton.jit
def _look(
    q, half_square, top, everything, largest, kept, k_at, spread_at, mass_at, exists, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WORDS: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """What is known of the clusters after one more tile of them.

    Args:
        top, everything: With a THRESHOLD, the largest logit (BLOCK_Q,), base 2, and the sum of all weights
            relative to it.
        largest: Else the largest logit of each place (BLOCK_Q, BLOCK_J).
        kept: The largest scores of each place, see `keep_largest`.
        exists: As in `_tile`.
    """
    k = load_at(k_at, exists, HEAD_DIM, BLOCK_D)
    s = summary_logits(q, k, mass_at, exists, scale)
    if THRESHOLD:
        higher = tl.maximum(top, tl.max(s, 1) * LOG2_E)
        everything *= tl.exp2(top - higher)
        everything += tl.sum(tl.exp2(s * LOG2_E - higher[:, None]), 1)
        top = higher
    else:
        largest = tl.maximum(largest, s)
    if WORDS > 0:
        spread = load_at(spread_at, exists, HEAD_DIM, BLOCK_D)
        kept = keep_largest(kept, _score_of(half_square, spread, s))
    return top, everything, largest, kept


@triton.jit
def _sum_kept(
    q, half_square, least_score, least_missed, o, total, found, top, k_at, v_at, spread_at, mass_at,
    chosen_at, inside, exists, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr, WORDS: tl.constexpr,
    THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Add a tile of clusters but those wanted for retrieval, and write down which these are.

    Args:
        o, total: Numerator (BLOCK_Q, BLOCK_D) and denominator, relative to 2^top.
        found: How many clusters were wanted so far.
        exists: As in `_tile`.
    """
    p, taken = _tile(
        q, half_square, least_score, least_missed, top, k_at, spread_at, mass_at, exists, scale,
        HEAD_DIM, BLOCK_D, WORDS, THRESHOLD,
    )  # fmt: skip
    if WORDS > 0:
        bit = tl.full([BLOCK_J], 1, tl.int32) << tl.arange(0, BLOCK_J)
        word = tl.sum(tl.where(taken, bit[None, :], 0), 1)
        tl.store(chosen_at, word, mask=inside)
        found += number_of_bits(word)
        p = tl.where(taken, 0, p)
    v = load_at(v_at, exists, HEAD_DIM, BLOCK_D)
    return tl.dot(p.to(v.dtype), v, o, input_precision="ieee"), total + tl.sum(p, 1), found


@triton.jit
def _sum_surplus(
    q, half_square, least_score, least_missed, o, total, top, k_at, v_at, spread_at, mass_at, chosen_at,
    inside, seen, num_tokens, scale, surplus,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr, WORDS: tl.constexpr,
    THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Add the first clusters that are wanted for retrieval after all, where there is a surplus of them.

    These are the farthest from the query. No tile is looked at beyond the one in which the last surplus is.
    """
    place = tl.arange(0, BLOCK_J)
    bit = tl.full([BLOCK_J], 1, tl.int32) << place
    j = 0
    while (j < seen) & (tl.max(surplus, 0) > 0):
        exists = place < seen - j
        p, taken = _tile(
            q, half_square, least_score, least_missed, top, k_at + j * HEAD_DIM, spread_at + j * HEAD_DIM,
            mass_at + j, exists, scale, HEAD_DIM, BLOCK_D, WORDS, THRESHOLD,
        )  # fmt: skip
        given_back = take_first(taken, surplus)
        kept = tl.sum(tl.where(taken & ~given_back, bit[None, :], 0), 1)
        tl.store(chosen_at, kept, mask=inside)
        chosen_at += num_tokens
        p = tl.where(given_back, p, 0)
        v = load_at(v_at + j * HEAD_DIM, exists, HEAD_DIM, BLOCK_D)
        o = tl.dot(p.to(v.dtype), v, o, input_precision="ieee")
        total += tl.sum(p, 1)
        surplus -= tl.sum(given_back.to(tl.int32), 1)
        j += BLOCK_J
    return o, total


@triton.jit
def _forward_kernel(
    query, key_mean, value_mean, key_variance, log_mass, block_start, block_length, first_cluster, num_seen,
    local, local_lse, output, lse, chosen,
    stride_qb, stride_qh, stride_qn, stride_lb, stride_lh, stride_ln, stride_ob, stride_oh, stride_on,
    length, lse_stride_h, lse_stride_s, num_tokens, num_clusters, num_retrieved, threshold, scale,
    GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr, WORDS: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """One program a tile of queries of a head, the late blocks first: they see most."""
    wait_for_previous_kernel()
    tile, head = tl.program_id(0), tl.program_id(1)
    block = tl.num_programs(2) - 1 - tl.program_id(2)
    block_rows = tl.load(block_length + block)
    if tile * BLOCK_Q < block_rows:
        rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        inside = rows < block_rows
        seen = tl.load(num_seen + block)
        start = tl.load(block_start + block)
        tokens = start + rows
        row = head.to(tl.int64) * num_tokens + tokens
        q = load_rows(query, tokens, inside, head, stride_qb, stride_qh, stride_qn, length, HEAD_DIM, BLOCK_D)
        scaled = q.to(tl.float32) * scale
        half_square = (0.5 * scaled * scaled).to(key_variance.dtype.element_ty)
        place = tl.arange(0, BLOCK_J)
        clusters = (head // GROUP_HEADS).to(tl.int64) * num_clusters + tl.load(first_cluster + block) + place
        k_at = rows_at(key_mean, clusters, HEAD_DIM, BLOCK_D)
        v_at = rows_at(value_mean, clusters, HEAD_DIM, BLOCK_D)
        spread_at = rows_at(key_variance, clusters, HEAD_DIM, BLOCK_D)
        mass_at = log_mass + clusters

        # The local part starts the sum: every query attends to itself, so its logsumexp is finite.
        local_lse += head.to(tl.int64) * lse_stride_h + start.to(tl.int64) * lse_stride_s
        local_top = tl.load(local_lse + rows, mask=inside, other=0) * LOG2_E
        least = tl.full([BLOCK_Q, BLOCK_J], -float("inf"), tl.float32)
        largest, kept = least, (least, least, least, least)
        # The largest of all logits, and with a THRESHOLD the sum of all weights relative to it; base 2.
        top, everything = local_top, tl.full([BLOCK_Q], 1, tl.float32)
        whole = seen // BLOCK_J * BLOCK_J  # the last tile may be short
        for j in range(0, whole, BLOCK_J):
            top, everything, largest, kept = _look(
                q, half_square, top, everything, largest, kept, k_at + j * HEAD_DIM, spread_at + j * HEAD_DIM,
                mass_at + j, None, scale, HEAD_DIM, BLOCK_D, WORDS, THRESHOLD,
            )  # fmt: skip
        for j in range(whole, seen, BLOCK_J):
            top, everything, largest, kept = _look(
                q, half_square, top, everything, largest, kept, k_at + j * HEAD_DIM, spread_at + j * HEAD_DIM,
                mass_at + j, place < seen - j, scale, HEAD_DIM, BLOCK_D, WORDS, THRESHOLD,
            )  # fmt: skip

        top = tl.maximum(top, tl.max(largest, 1) * LOG2_E)
        least_missed = threshold * everything
        least_score = threshold_of(kept, num_retrieved, STEPS)
        local_total = tl.exp2(local_top - top)
        local_o = load_rows(
            local, tokens, inside, head, stride_lb, stride_lh, stride_ln, length, HEAD_DIM, BLOCK_D
        ).to(tl.float32)
        chosen_at = chosen_row(chosen, head, tokens, num_tokens, WORDS)
        o, total, found = local_o * local_total[:, None], local_total, tl.full([BLOCK_Q], 0, tl.int32)
        for j in range(0, whole, BLOCK_J):
            o, total, found = _sum_kept(
                q, half_square, least_score, least_missed, o, total, found, top, k_at + j * HEAD_DIM,
                v_at + j * HEAD_DIM, spread_at + j * HEAD_DIM, mass_at + j, chosen_at, inside, None, scale,
                HEAD_DIM, BLOCK_D, BLOCK_J, WORDS, THRESHOLD,
            )  # fmt: skip
            chosen_at += num_tokens
        for j in range(whole, seen, BLOCK_J):
            o, total, found = _sum_kept(
                q, half_square, least_score, least_missed, o, total, found, top, k_at + j * HEAD_DIM,
                v_at + j * HEAD_DIM, spread_at + j * HEAD_DIM, mass_at + j, chosen_at, inside,
                place < seen - j, scale, HEAD_DIM, BLOCK_D, BLOCK_J, WORDS, THRESHOLD,
            )  # fmt: skip
        if WORDS > 0:
            surplus = tl.where(inside, tl.maximum(found - num_retrieved, 0), 0)
            o, total = _sum_surplus(
                q, half_square, least_score, least_missed, o, total, top, k_at, v_at, spread_at, mass_at,
                chosen_row(chosen, head, tokens, num_tokens, WORDS), inside, seen, num_tokens, scale, surplus,
                HEAD_DIM, BLOCK_D, BLOCK_J, WORDS, THRESHOLD,
            )  # fmt: skip
        # Nothing is left of the sum where clusters that are to be retrieved have nearly all the mass.
        total = tl.maximum(total, 1e-37)
        o *= (1 / total)[:, None]
        tl.store(lse + row, (top + tl.log2(total)) / LOG2_E, mask=inside)
        store_rows(
            output, o, tokens, inside, head, stride_ob, stride_oh, stride_on, length, HEAD_DIM, BLOCK_D
        )


def num_words(max_seen: int, num_retrieved: int) -> int:
    """Words of 32 bits for as many clusters, whole tiles of them; none where nothing is retrieved."""
    return -(-max_seen // TILE) * (TILE // 32) if num_retrieved else 0


def refine(
    query: torch.Tensor, clusters: Clusters, layout: Layout, local: Local, output: torch.Tensor,
    lse: torch.Tensor, scale: float, num_retrieved: int, threshold: float, block: int,
) -> torch.Tensor:  # fmt: skip
    """Merge the local part and the summaries that are not retrieved into output and lse.

    Args:
        query, output: (B, H, N, D). lse: (H, B * N) float32.

    Returns:
        (H, WORDS, B * N) int32, a bit for every cluster that a query sees: set if it is to be retrieved.
        Words of clusters that a query does not see are not written.
    """
    batch, heads, length, head_dim = query.shape
    words = num_words(layout.max_seen, num_retrieved)
    chosen = query.new_empty(heads, words, batch * length, dtype=torch.int32)
    wide = _WIDE_LAUNCH if has_much_shared_memory(query) else _WIDE_LAUNCH | {"num_stages": 2}
    settings = choose_launch(query, _LAUNCH, wide, _PRECISE_LAUNCH, _WIDEST_LAUNCH)
    launch(
        _forward_kernel, (ceil_div(block, settings["BLOCK_Q"]), heads, layout.block_start.shape[0]),
        query, clusters.key_mean, clusters.value_mean, clusters.key_variance, clusters.log_mass,
        *layout.query_blocks, local.output, local.lse, output, lse, chosen,
        *token_strides(query, local.output, output), local.stride_h, local.stride_s, batch * length,
        clusters.count.shape[1], num_retrieved, threshold, scale,
        GROUP_HEADS=heads // clusters.count.shape[0], HEAD_DIM=head_dim, BLOCK_D=power_of_two(head_dim),
        STEPS=28 if query.dtype == torch.float32 else 16, WORDS=words, THRESHOLD=words > 0 and threshold > 0,
        **settings,
    )  # fmt: skip
    return chosen
