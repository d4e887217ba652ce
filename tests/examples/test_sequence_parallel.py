"""Why a window is not shared by several processes: what Accelerate and pretrain.py say to it."""

import pytest
import torch
from accelerate.utils import ParallelismConfig, dataclasses

from muse_hf import MuseConfig, muse_attention
from tests.examples.running import pretrain


def test_accelerate_takes_no_registered_attention_for_ulysses():
    """Should this fail, Ulysses can be tried, and docs/pretraining.md is out of date."""
    with pytest.raises(ValueError, match="Invalid sp_attn_implementation"):
        dataclasses.DeepSpeedSequenceParallelConfig(sp_attn_implementation="muse")


@pytest.mark.parametrize("summaries", ["plain", "tilted"])
def test_heads_are_independent(summaries):
    """So that processes that hold some heads of all tokens compute what one with all heads does."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 200, 16, generator=generator) for heads in (8, 4, 4))
    hierarchy = "dyadic" if summaries == "tilted" else "flat"
    config = MuseConfig(
        local_block=32, cluster_size=8, num_retrieved=2, summaries=summaries, hierarchy=hierarchy
    )
    whole = muse_attention(query, key, value, is_causal=True, config=config)
    halves = zip(query.chunk(2, dim=1), key.chunk(2, dim=1), value.chunk(2, dim=1))
    parts = [muse_attention(*half, is_causal=True, config=config) for half in halves]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("size", ["cp_size", "sp_size"])
def test_a_shared_window_is_refused(size):
    with pytest.raises(pretrain.UsageError, match="a window cannot be shared by several processes"):
        pretrain.check_parallelism(ParallelismConfig(**{size: 2}))
    pretrain.check_parallelism(ParallelismConfig(dp_shard_size=2))
    pretrain.check_parallelism(None)
