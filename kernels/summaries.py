"""What every kernel that meets the summaries needs: their logits, and which of them a query retrieves."""

import triton
import triton.language as tl

# Clusters in a tile. Which of them are chosen is said by two words of 32 bits.
TILE = 64


@triton.jit
def rows_at(means, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where rows (BLOCK_J, BLOCK_D) of a tensor (Hkv, J, D) of the clusters lie."""
    return means + rows[:, None] * HEAD_DIM + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def summary_logits(q, k, mass_at, exists, scale):
    """ℓ = log |j| + q·k̃ (BLOCK_Q, BLOCK_J), -inf where a cluster is empty or does not exist.

    Args:
        exists: (BLOCK_J,) which clusters do; None if all do.
    """
    bias = tl.load(mass_at)
    if exists is not None:
        bias = tl.where(exists, bias, -float("inf"))
    return tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias[None, :]


@triton.jit
def chosen_row(chosen, head, tokens, num_tokens, WORDS: tl.constexpr):
    """Where the first words of tokens lie in `chosen` (H, WORDS, B * N) int32, a bit for each cluster seen.

    The next ones are `num_tokens` further. Side by side, those of a tile of queries are loaded at once.
    """
    return chosen + head.to(tl.int64) * WORDS * num_tokens + tokens


@triton.jit
def is_chosen(at, inside, WORDS: tl.constexpr, BLOCK_J: tl.constexpr):
    """True (BLOCK_Q, BLOCK_J) at clusters of a tile of 32 that queries retrieve.

    Args:
        at: Where the words (BLOCK_Q,) of the tile lie. WORDS = 0: nothing is retrieved.
    """
    if WORDS == 0:
        return tl.full([inside.shape[0], BLOCK_J], False, tl.int1)
    tl.static_assert(BLOCK_J == 32, "or a tile has more than a word")
    bit = tl.full([BLOCK_J], 1, tl.int32) << tl.arange(0, BLOCK_J)
    return (tl.load(at, mask=inside, other=0)[:, None] & bit[None, :]) != 0
