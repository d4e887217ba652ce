"""The loss at lengths where the logits of all tokens would be the largest tensor of a step."""

from typing import Any

import torch
from corpus import UsageError
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

# Families whose logits are the product of the last hidden states with the head's weight, and no more.
PLAIN_HEADS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int
) -> torch.Tensor:
    """Mean cross-entropy of the logits `hidden @ weight.T`, of which only `chunk` rows exist at a time.

    They are computed again in the backward pass.

    Args:
        hidden: (tokens, width).
        weight: (vocabulary, width).
        targets: int64 (tokens,).
        chunk: Tokens whose logits are computed at a time.

    Returns:
        A float32 scalar, in nats per token.
    """
    losses = [
        checkpoint(_summed, *part, weight, use_reentrant=False, preserve_rng_state=False)
        for part in zip(hidden.split(chunk), targets.split(chunk))
    ]
    return torch.stack(losses).sum() / len(targets)


def _summed(hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    kind = hidden.device.type
    # Autocast keeps one copy of the weight in low precision, in which the gradients of all chunks would be
    # added up. A copy for each chunk has them added up in the weight's own precision.
    autocast = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
    with torch.autocast(kind, cache_enabled=False, **autocast):
        logits = functional.linear(hidden, weight)
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


def check_chunked_loss(config: PretrainedConfig) -> None:
    """Refuse a model that may do more than multiply by a weight to get its logits."""
    if config.model_type not in PLAIN_HEADS:
        raise UsageError(
            f"--loss_chunk is for {', '.join(PLAIN_HEADS)}, not for a {config.model_type!r} model."
        )


def use_chunked_loss(model: PreTrainedModel, chunk: int) -> None:
    """Have the model, when it is given labels, return its loss alone, and hold few logits at a time."""
    whole = model.forward

    def forward(input_ids: torch.Tensor, labels: torch.Tensor | None = None, **options: Any) -> Any:
        if labels is None:
            return whole(input_ids=input_ids, **options)
        options = {"use_cache": False} | options
        hidden = model.base_model(input_ids=input_ids, **options).last_hidden_state
        weight = model.get_output_embeddings().weight
        hidden, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return CausalLMOutput(loss=linear_cross_entropy(hidden, weight, targets, chunk))

    model.forward = forward
