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
def load_summaries(at, exists, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of clusters, zero where they are not to be seen: NaN of later blocks would spread."""
    if HEAD_DIM == BLOCK_D:
        return tl.load(at, mask=exists[:, None], other=0)
    return tl.load(at, mask=exists[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], other=0)


@triton.jit
def summary_logits(q, k, mass_at, exists, scale):
    """ℓ = log |j| + q·k̃ (BLOCK_Q, BLOCK_J), -inf where a cluster is empty or does not exist."""
    bias = tl.where(exists, tl.load(mass_at), -float("inf"))
    return tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias[None, :]


@triton.jit
def chosen_row(chosen, head, tokens, num_tokens, WORDS: tl.constexpr):
    """Where the first words of tokens lie in `chosen` (H, WORDS, B * N) int32, a bit for each cluster seen.

    The next ones are `num_tokens` further. Side by side, those of a tile of queries are loaded at once.
    """
    return chosen + head.to(tl.int64) * WORDS * num_tokens + tokens


@triton.jit
def is_chosen(at, inside, num_tokens, WORDS: tl.constexpr, BLOCK_J: tl.constexpr):
    """True (BLOCK_Q, BLOCK_J) at clusters of a tile that queries retrieve.

    Args:
        at: Where the words (BLOCK_Q,) lie that the tile begins with. WORDS = 0: nothing is retrieved.
    """
    if WORDS == 0:
        return tl.full([inside.shape[0], BLOCK_J], False, tl.int1)
    place = tl.arange(0, BLOCK_J)
    words = tl.load(at, mask=inside, other=0)[:, None]
    if BLOCK_J == 64:
        upper = tl.load(at + num_tokens, mask=inside, other=0)
        words = tl.where((place < 32)[None, :], words, upper[:, None])
    return ((words >> (place % 32)[None, :]) & 1) != 0
