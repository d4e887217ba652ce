"""Training: a tiny model learns real text with MuSe attention as it does with exact attention."""

import random
import tarfile
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from muse_hf import MuseConfig, patch_model

STEPS, BATCH, CONTEXT, LOCAL_BLOCK = 40, 4, 256, 32  # eight blocks in a window
SETTINGS = {
    "retrieval": MuseConfig(local_block=LOCAL_BLOCK, cluster_size=4, num_retrieved=8),
    "no retrieval": MuseConfig(local_block=LOCAL_BLOCK, cluster_size=4, num_retrieved=0),
    "the paper's": MuseConfig.paper(local_block=LOCAL_BLOCK, num_clusters=8),
}


@pytest.fixture(scope="module")
def batches() -> torch.Tensor:
    """Windows out of one long module of the standard library, as bytes: (step, row, token)."""
    text = Path(tarfile.__file__).read_bytes()
    generator = random.Random(0)
    starts = [generator.randrange(len(text) - CONTEXT) for _ in range(STEPS * BATCH)]
    windows = torch.tensor([list(text[start : start + CONTEXT]) for start in starts])
    return windows.view(STEPS, BATCH, CONTEXT)


def train(batches: torch.Tensor, config: MuseConfig | None) -> list[float]:
    """The loss of every step, from the same weights on the same batches."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    if config is not None:
        patch_model(model, config=config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def exact(batches) -> list[float]:
    return train(batches, None)


def mean_at_the_end(losses: list[float]) -> float:
    return sum(losses[-5:]) / 5


def test_exact_attention_learns(exact):
    end = mean_at_the_end(exact)
    assert end < 0.6 * exact[0], f"the loss goes from {exact[0]:.2f} to {end:.2f} only"


@pytest.mark.parametrize("setting", SETTINGS)
def test_muse_learns_as_exact_attention_does(setting, batches, exact):
    """While the weights are nearly the same, so are the losses: without far blocks they differ by 1.5%."""
    losses = train(batches, SETTINGS[setting])
    assert losses != exact, "MuSe is not active"
    start = max(abs(muse / other - 1) for muse, other in zip(losses[:20], exact))
    assert start < 2e-3, f"in the first 20 steps the losses differ by up to {start:.2%}"
    end = mean_at_the_end(losses) / mean_at_the_end(exact) - 1
    assert abs(end) < 0.03, f"after {STEPS} steps the losses differ by {end:.1%}"
