"""Items against a sort of the same bits."""

import pytest
import torch
from muse_hf.kernels.items import list_items
from muse_hf.kernels.layout import layout_of
from muse_hf.kernels.refinement import num_words

from tests.kernels.comparing import DEVICE

BLOCK, CLUSTERS_PER_BLOCK = 160, 20


def random_bits(heads, sequences, num_tokens, num_retrieved):
    """Chosen clusters (H, tokens, J) bool and as words, with rubbish where a query sees none."""
    generator = torch.Generator().manual_seed(0)
    layout = layout_of(tuple(sequences), num_tokens, BLOCK, CLUSTERS_PER_BLOCK, torch.device(DEVICE))
    words = num_words(layout.max_seen, max(1, num_retrieved))
    num_clusters = sum((length - 1) // BLOCK for length in sequences[1::2]) * CLUSTERS_PER_BLOCK
    chosen = torch.zeros(heads, num_tokens, num_clusters, dtype=torch.bool)
    packed = torch.full((heads, words, num_tokens), -1, dtype=torch.int32)
    for start, length, first, seen in zip(*(column.tolist() for column in layout.query_blocks)):
        rows = slice(start, start + length)
        scores = torch.rand(heads, length, seen, generator=generator)
        many = torch.randint(num_retrieved + 1, (heads, length, 1), generator=generator)
        taken = scores.argsort(-1).argsort(-1) < many
        chosen[:, rows, first : first + seen] = taken
        bits = torch.nn.functional.pad(taken, (0, -seen % 32)).unflatten(-1, (-1, 32)).long()
        word = (bits << torch.arange(32)).sum(-1)
        word = word.where(word < 1 << 31, word - (1 << 32)).int()
        packed[:, : word.shape[-1], rows] = word.transpose(1, 2)
    return chosen, packed.to(DEVICE), layout


@pytest.mark.parametrize(
    ("heads", "kv_heads", "sequences", "num_tokens"),
    [
        (2, 2, [0, 700], 700),
        (4, 2, [0, 330, 400, 330], 800),
        (2, 1, [5, 90, 100, 500, 610, 161], 800),
    ],
    ids=["one sequence", "grouped heads, two rows", "packed and padded"],
)
@pytest.mark.parametrize("num_retrieved", [0, 3, 9])
def test_items_are_those_of_the_bits(heads, kv_heads, sequences, num_tokens, num_retrieved):
    chosen, packed, layout = random_bits(heads, sequences, num_tokens, num_retrieved)
    num_clusters = chosen.shape[2]
    packed = packed if num_retrieved else packed[:, :0]
    items = list_items(packed, layout, kv_heads, num_clusters, num_retrieved, BLOCK, CLUSTERS_PER_BLOCK)
    assert items.num_retrieved == num_retrieved
    assert torch.equal(items.number.cpu().long(), chosen.sum(-1)), "items of a query"
    by_head = chosen.view(kv_heads, -1, num_clusters)
    for head, (order, bounds) in enumerate(zip(items.order.cpu(), items.bounds.cpu().tolist())):
        assert bounds == [0, *by_head[head].sum(0).cumsum(0).tolist()], "bounds of the clusters"
        for cluster in range(num_clusters):
            queries = order[bounds[cluster] : bounds[cluster + 1]] // max(1, num_retrieved)
            expected = by_head[head, :, cluster].nonzero()[:, 0]
            assert queries.tolist() == expected.tolist(), f"queries of cluster {cluster}"
        numbers = order[: bounds[-1]].sort().values
        many = by_head[head].sum(-1)
        rank = torch.arange(num_retrieved)
        expected = (torch.arange(len(many))[:, None] * num_retrieved + rank)[rank < many[:, None]]
        assert torch.equal(numbers.long(), expected), "every query counts its items from 0 on"
