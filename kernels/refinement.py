"""Selection and refinement of plain summaries, forward.

One program holds a tile of queries and passes twice over the summaries that it sees: first to find the score
that a cluster needs to be retrieved, then for a running softmax over the local part and all clusters that are
not. Nothing of the size of queries times clusters is kept but a bit each.
"""

import torch
import triton
import triton.language as tl
from muse_hf.kernels.clustering import Clusters
from muse_hf.kernels.common import load_rows, power_of_two, store_rows
from muse_hf.kernels.layout import Layout
from muse_hf.kernels.selection import keep_largest, take_first, threshold_of
from muse_hf.kernels.summaries import TILE, load_summaries, summary_logits

_LAUNCH = {"BLOCK_Q": 64, "num_warps": 4, "num_stages": 2}


@triton.jit
def _forward_kernel(
    query, key_mean, value_mean, key_variance, log_mass, block_start, block_length, first_cluster, num_seen,
    local, local_lse, output, lse, chosen,
    stride_qb, stride_qh, stride_qn, stride_lb, stride_lh, stride_ln, stride_ob, stride_oh, stride_on,
    length, num_tokens, num_clusters, num_retrieved, scale,
    GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One program a tile of queries of a head, the late blocks first: they see most."""
    tile, head = tl.program_id(0), tl.program_id(1)
    block = tl.num_programs(2) - 1 - tl.program_id(2)
    block_rows = tl.load(block_length + block)
    if tile * BLOCK_Q < block_rows:
        rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        inside = rows < block_rows
        seen = tl.load(num_seen + block)
        tokens = tl.load(block_start + block) + rows
        heads_row = (head // GROUP_HEADS).to(tl.int64) * num_clusters + tl.load(first_cluster + block)
        row = head.to(tl.int64) * num_tokens + tokens
        q = load_rows(query, tokens, inside, head, stride_qb, stride_qh, stride_qn, length, HEAD_DIM, BLOCK_D)
        scaled = q.to(tl.float32) * scale
        half_square = (0.5 * scaled * scaled).to(key_variance.dtype.element_ty)
        place = tl.arange(0, BLOCK_J)

        largest = tl.full([BLOCK_Q, BLOCK_J], -float("inf"), tl.float32)
        second, third = largest, largest
        for j in range(0, seen, BLOCK_J):
            k = load_summaries(key_mean, heads_row + j + place, HEAD_DIM, BLOCK_D)
            spread = load_summaries(key_variance, heads_row + j + place, HEAD_DIM, BLOCK_D)
            score = summary_logits(q, k, log_mass, heads_row + j + place, j + place < seen, scale)
            score = tl.dot(half_square, tl.trans(spread), score, input_precision="ieee")
            largest, second, third = keep_largest(largest, second, third, score)
        threshold = threshold_of(largest, second, third, num_retrieved, STEPS)

        # The local part starts the sum: every query attends to itself, so its logsumexp is finite.
        top = tl.load(local_lse + row, mask=inside, other=0)
        total = tl.full([BLOCK_Q], 1, tl.float32)
        o = load_rows(
            local, tokens, inside, head, stride_lb, stride_lh, stride_ln, length, HEAD_DIM, BLOCK_D
        ).to(tl.float32)
        bit = tl.full([BLOCK_J], 1, tl.int64) << place.to(tl.int64)
        room = tl.zeros([BLOCK_Q], tl.int32) + num_retrieved
        for j in range(0, seen, BLOCK_J):
            k = load_summaries(key_mean, heads_row + j + place, HEAD_DIM, BLOCK_D)
            spread = load_summaries(key_variance, heads_row + j + place, HEAD_DIM, BLOCK_D)
            s = summary_logits(q, k, log_mass, heads_row + j + place, j + place < seen, scale)
            score = tl.dot(half_square, tl.trans(spread), s, input_precision="ieee")
            taken = (score >= threshold[:, None]) & (score > -float("inf"))
            many = tl.sum(taken.to(tl.int32), 1)
            if tl.min(room - many, 0) < 0:
                taken = take_first(taken, room)
                many = tl.minimum(many, room)
            room -= many
            word = tl.sum(tl.where(taken, bit[None, :], 0), 1)
            tl.store(chosen + row * WORDS + j // BLOCK_J, word, mask=inside)
            s = tl.where(taken, -float("inf"), s)
            new_top = tl.maximum(top, tl.max(s, 1))
            p = tl.exp(s - new_top[:, None])
            shrink = tl.exp(top - new_top)
            v = load_summaries(value_mean, heads_row + j + place, HEAD_DIM, BLOCK_D)
            o = o * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            total = total * shrink + tl.sum(p, 1)
            top = new_top
        tl.store(lse + row, top + tl.log(total), mask=inside)
        store_rows(
            output, o / total[:, None], tokens, inside, head, stride_ob, stride_oh, stride_on, length,
            HEAD_DIM, BLOCK_D,
        )  # fmt: skip


def refine(
    query: torch.Tensor, clusters: Clusters, layout: Layout, local: torch.Tensor, local_lse: torch.Tensor,
    output: torch.Tensor, lse: torch.Tensor, scale: float, num_retrieved: int, block: int,
) -> torch.Tensor:  # fmt: skip
    """Merge the local part and the summaries that are not retrieved into output and lse.

    Args:
        query, local, output: (B, H, N, D). local_lse, lse: (H, B * N) float32.

    Returns:
        (H, B * N, WORDS) int64, a bit for every cluster that a query sees: set if it is to be retrieved. Words
        of clusters that a query does not see are not written.
    """
    batch, heads, length, head_dim = query.shape
    num_words = triton.cdiv(layout.max_seen, TILE)
    chosen = torch.empty(heads, batch * length, num_words, dtype=torch.int64, device=query.device)
    strides = [s for tensor in (query, local, output) for s in tensor.stride()[:3]]
    grid = (triton.cdiv(block, _LAUNCH["BLOCK_Q"]), heads, layout.block_start.shape[0])
    _forward_kernel[grid](
        query, clusters.key_mean, clusters.value_mean, clusters.key_variance, clusters.log_mass,
        *layout.query_blocks, local, local_lse, output, lse, chosen, *strides, length, batch * length,
        clusters.count.shape[1], num_retrieved, scale,
        GROUP_HEADS=heads // clusters.count.shape[0], HEAD_DIM=head_dim, BLOCK_D=power_of_two(head_dim),
        STEPS=28 if query.dtype == torch.float32 else 16, BLOCK_J=TILE, WORDS=num_words, **_LAUNCH,
    )  # fmt: skip
    return chosen
