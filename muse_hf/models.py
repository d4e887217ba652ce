"""What this package asks of a Transformers model: the one inside wrappers, its losses, its limits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from muse_hf.adapter import NAME
from muse_hf.config import MuseConfig
from muse_hf.routing import check_family, shortest_length

# Families with an embedding for every position, which therefore have a longest input.
_LEARNED_POSITIONS = ("bert", "gpt2")
# Logits are formed for so many tokens at once: N x vocabulary is often larger than all else together.
_TOKENS_OF_LOGITS = 1024


class InputError(ValueError):
    """The text, or a number given with it, does not suit the model or the measurement."""


def transformers_model(model: torch.nn.Module) -> PreTrainedModel:
    """The Transformers model inside compiled, PEFT and parallel wrappers.

    Raises:
        TypeError: There is none.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):  # PEFT
            inner = inner.get_base_model()
        elif hasattr(inner, "_orig_mod"):  # torch.compile
            inner = inner._orig_mod
        elif isinstance(getattr(inner, "module", None), torch.nn.Module):  # data parallel
            inner = inner.module
        else:
            raise TypeError(f"expected a Transformers model, got {type(model).__name__}")
    return inner


def is_encoder(model_config: Any) -> bool:
    """Whether models of this type read a whole text at once, instead of predicting the next token."""
    return model_config.model_type == "bert"


def predicts_next_token(model: PreTrainedModel) -> bool:
    """Whether the model has a next-token loss; encoders and models without a language-model head do not."""
    return not is_encoder(model.config) and model.get_output_embeddings() is not None


def check_length(model_config: Any, length: int) -> None:
    """Refuse more tokens than a model has learned positions for."""
    limit = model_config.max_position_embeddings
    if model_config.model_type in _LEARNED_POSITIONS and length > limit:
        raise InputError(
            f"the {model_config.model_type!r} model has {limit} positions and cannot read {length} tokens"
        )


def check_uses_muse(model: PreTrainedModel, policy: MuseConfig, length: int) -> None:
    """Refuse to compare exact attention with itself: layers of which none uses MuSe at this length."""
    num_layers = model.config.num_hidden_layers
    configs = [policy.for_layer(layer, num_layers) for layer in policy.layer_indices(num_layers)]
    limits = [max(config.local_block + 1, shortest_length(config, model.device)) for config in configs]
    if limits and length < min(limits):
        raise InputError(
            f"{length} tokens are attended exactly, and MuSe is used from {min(limits)} on, so that there is "
            "nothing to compare: give longer text, or a smaller local_block or min_length"
        )


@torch.no_grad()
def token_losses(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Loss of each token given those before it, in nats. Memory is linear in N, without N x vocabulary.

    Args:
        model: A causal language model, also inside a PEFT, compiled or parallel wrapper.
        input_ids: (B, N) on its device.

    Returns:
        (B, N - 1) float32: the loss of tokens 1 to N - 1, whose mean is the model's own loss.
    """
    model = transformers_model(model)
    head, hidden = model.get_output_embeddings(), hidden_states(model, input_ids)
    parts = (tensor.split(_TOKENS_OF_LOGITS, dim=1) for tensor in (hidden[:, :-1], input_ids[:, 1:]))
    losses = [
        cross_entropy(head(part).float().transpose(1, 2), labels, reduction="none")
        for part, labels in zip(*parts)
    ]
    return torch.cat(losses, dim=1)


@torch.no_grad()
def hidden_states(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """The last hidden states (B, N, width) of tokens (B, N)."""
    return model.base_model(input_ids=input_ids, use_cache=False)[0]


@contextmanager
def temporary_policy(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode with attention "muse", exact in every layer until `config.muse` is set to a policy.

    Afterwards the attention, its policy and the mode of every module are what they were before.
    """
    check_family(model.config)
    config, before = model.config, model.config._attn_implementation
    policy = vars(config).get("muse")
    training = {module: module.training for module in model.modules()}
    try:
        model.eval().set_attn_implementation(NAME)
        config.muse = MuseConfig(layers=[])
        yield
    finally:
        model.set_attn_implementation(before)
        if policy is None:
            vars(config).pop("muse", None)
        else:
            config.muse = policy
        for module, mode in training.items():
            module.training = mode
