"""The rules: which models are supported, what is refused, and when a MuSe layer attends exactly.

Exact attention stands in wherever it is the right answer:

1. the layer is not among `MuseConfig.layers`;
2. cross-attention: queries and keys are different sequences;
3. the numbers of queries and keys differ: decoding with a cache, chunked prefill, a static or sliding cache,
   prefix tuning;
4. the mask is a 4D tensor: one the caller made, or one that padding with holes, bidirectional spans or a
   sliding window of another layer need;
5. no sequence is longer than `MuseConfig.local_block`, so that MuSe would be exact as well;
6. no sequence is as long as `MuseConfig.min_length`: exact attention is faster.

What would change the meaning of a MuSe layer is refused instead: attention dropout in training, logit
softcaps, attention sinks, position biases, sliding windows, and `output_attentions`.
"""

from typing import Any

import torch
from transformers.utils import output_capturing

from muse_hf.config import MuseConfig
from muse_hf.segments import Segments

# Model types whose attention is known, by a test, to call the attention interface with rotated queries and
# keys and to hand the mask through untouched.
SUPPORTED_FAMILIES = ("bert", "gpt2", "llama", "mistral", "qwen2", "qwen3")

# Tokens from which the Triton kernels were measured to beat the best exact kernel, forward and backward on an
# H200 with 16 heads of 64 (docs/performance.md).
CROSSOVER = 16384

# Layers are built with their windows, and where a config has layer_types, only these say which have one.
_NO_WINDOWS = (
    "load the model with sliding_window=None or, if its config has layer_types, with "
    'layer_types=["full_attention", ...]'
)
_CHANGES_MEANING = {
    "softcap": "a cap on the logits",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
    "sliding_window": f"a sliding window (to turn it off, {_NO_WINDOWS})",
}


class UnsupportedError(ValueError):
    """The model, or an option of one of its MuSe layers, is not supported. The message says what to do."""


def check_family(model_config: Any) -> None:
    """Refuse a model type that was not verified: some ignore the attention name, some break later."""
    if model_config.model_type not in SUPPORTED_FAMILIES:
        raise UnsupportedError(
            f'attention "muse" is not supported for model type {model_config.model_type!r}, which was not '
            f"verified to route its attention through Transformers' attention interface; supported are "
            f'{", ".join(SUPPORTED_FAMILIES)}. Load this model without attn_implementation="muse".'
        )


def check_windows(model_config: Any, layers: list[int]) -> None:
    """Refuse to use MuSe in layers with a sliding window, before the first forward does."""
    if windowed := sorted(windowed_layers(model_config) & set(layers)):
        raise UnsupportedError(
            f"layers {windowed} of {model_config.model_type!r} have a sliding window of "
            f"{model_config.sliding_window} tokens, which MuSe does not implement: leave them out of "
            f"`layers`, or, if they may attend to everything, {_NO_WINDOWS}"
        )


def windowed_layers(model_config: Any) -> set[int]:
    """The layers that have a sliding window."""
    if getattr(model_config, "sliding_window", None) is None:
        return set()
    kinds = getattr(model_config, "layer_types", None)
    layers = range(model_config.num_hidden_layers)
    return {layer for layer in layers if kinds is None or kinds[layer] == "sliding_attention"}


def layer_config(module: torch.nn.Module) -> MuseConfig | None:
    """The config of the attention module's layer, or None where `layers` leaves it out.

    Raises:
        UnsupportedError: The model type is not supported, or the module does not know its layer.
    """
    model_config = module.config
    check_family(model_config)
    layer_idx = getattr(module, "layer_idx", None)
    if layer_idx is None:
        raise UnsupportedError(
            f"{type(module).__name__} has no layer_idx, so its MuSe setting cannot be looked up"
        )
    return _layer_configs(model_config).get(layer_idx)


# The policy that was asked for last, as text with the number of layers, and what it says of each MuSe layer.
_latest: dict[tuple[str, int], dict[int, MuseConfig]] = {}


def _layer_configs(model_config: Any) -> dict[int, MuseConfig]:
    """The config of each layer that uses MuSe.

    Every layer asks at every forward pass, at each token that is generated too: the policy is validated once
    for all of them, and again when it is another one, which assignment or a change in place may make it.
    """
    num_layers = model_config.num_hidden_layers
    key = (repr(getattr(model_config, "muse", None)), num_layers)
    configs = _latest.get(key)
    if configs is None:
        policy = model_policy(model_config)
        configs = {layer: policy.for_layer(layer, num_layers) for layer in policy.layer_indices(num_layers)}
        _latest.clear()
        _latest[key] = configs
    return configs


def model_policy(model_config: Any) -> MuseConfig:
    """`model.config.muse` as a `MuseConfig`, the default one where a model has none."""
    stored = getattr(model_config, "muse", None)
    return MuseConfig() if stored is None else MuseConfig.from_dict(stored)


class StoredPolicy:
    """`config.muse` of Transformers' configs: a `MuseConfig` put there is kept as JSON types, to be saved."""

    def __get__(self, model_config: Any, owner: type) -> "StoredPolicy | dict[str, Any] | None":
        if model_config is None:
            return self
        if "muse" not in vars(model_config):
            raise AttributeError(f"{owner.__name__!r} object has no attribute 'muse'")
        return vars(model_config)["muse"]

    def __set__(self, model_config: Any, policy: MuseConfig | dict[str, Any] | None) -> None:
        vars(model_config)["muse"] = policy.to_dict() if isinstance(policy, MuseConfig) else policy

    def __delete__(self, model_config: Any) -> None:
        del vars(model_config)["muse"]


def check_options(module: torch.nn.Module, options: dict[str, Any]) -> None:
    """Refuse what a MuSe layer cannot honour, among the options passed to its attention function."""
    where = f"layer {module.layer_idx} of {module.config.model_type!r}"
    for option, meaning in _CHANGES_MEANING.items():
        if options.get(option) is not None:
            raise UnsupportedError(
                f"{where} asks for {option}={options[option]!r}, {meaning}, which MuSe does not implement: "
                "leave this layer out of MuseConfig.layers"
            )
    # GPT-2 does not hand this option to its attention, so look at what the model was asked to collect too.
    collector = getattr(output_capturing, "_active_collector", None)
    collected = (collector.get() if collector else None) or ()
    if options.get("output_attentions") or "attentions" in collected:
        raise UnsupportedError(
            f"{where}: output_attentions=True cannot be served, MuSe never forms the attention matrix; call "
            'model.set_attn_implementation("eager") to look at attention weights'
        )


def check_dropout(module: torch.nn.Module, dropout: float) -> None:
    """Refuse attention dropout, which would have to reach inside the summaries."""
    if dropout:
        raise UnsupportedError(
            f"layer {module.layer_idx} of {module.config.model_type!r} is training with attention dropout "
            f"{dropout}, which MuSe does not implement: build the model with attention dropout 0 "
            "(attn_pdrop, attention_dropout or attention_probs_dropout_prob in its config)"
        )


def reason_for_exact(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | Segments | None,
    config: MuseConfig | None,
) -> str | None:
    """Why this call attends exactly, by the rules above, or None if MuSe applies.

    Args:
        query: (B, H, Q, D). key: (B, Hkv, K, D).
        config: Of this layer, None if it is left out of `layers`.
    """
    if config is None:
        return "layer not among MuseConfig.layers"
    if is_cross_attention(module):
        return "cross-attention"
    if query.shape[2] != key.shape[2]:
        return "different numbers of queries and keys"
    if isinstance(mask, torch.Tensor):
        return "explicit mask"
    longest = key.shape[2] if mask is None else max(mask.lengths, default=0)
    if longest <= config.local_block:
        return "sequences no longer than local_block"
    if longest < shortest_length(config, query.device):
        return "exact attention is faster"
    return None


def shortest_length(config: MuseConfig, device: torch.device) -> int:
    """Tokens of the shortest sequence for which a model's layer does not attend exactly."""
    if config.min_length is not None:
        return config.min_length
    return CROSSOVER if device.type == "cuda" and config.backend == "auto" else 0


def is_cross_attention(module: torch.nn.Module) -> bool:
    """Whether queries and keys come from different sequences."""
    return getattr(module, "is_cross_attention", False) or "CrossAttention" in type(module).__name__
