"""What every kernel that meets the summaries needs: their logits, and which of them a query retrieves."""

import triton
import triton.language as tl

# Clusters in a tile: the bits of a word that say which of them are chosen.
TILE = 64


@triton.jit
def load_summaries(means, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows (BLOCK_J, BLOCK_D) of a tensor (Hkv, J, D) of the clusters, which needs no mask: it is padded."""
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
def is_chosen(chosen, rows, inside, first, WORDS: tl.constexpr, BLOCK_J: tl.constexpr):
    """True (BLOCK_Q, BLOCK_J) at the clusters first, first + 1, ... of one tile that the rows retrieve.

    Args:
        chosen: (H * B * N, WORDS) int64, a bit for each cluster that a row sees.
    """
    word = tl.load(chosen + rows * WORDS + first // 64, mask=inside, other=0)
    bits = (first % 64 + tl.arange(0, BLOCK_J)).to(tl.int64)
    return ((word[:, None] >> bits[None, :]) & 1) != 0
