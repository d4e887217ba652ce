"""`patch_model` and `unpatch_model`."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from muse_hf.adapter import NAME
from muse_hf.config import DEFAULT_CLUSTER_SIZE, MuseConfig, check_config
from muse_hf.routing import UnsupportedError, check_family, model_policy

# Where the model remembers what it attended with before; a plain attribute, so that a deepcopy keeps it.
_PREVIOUS = "_attention_before_muse"


@dataclass(frozen=True)
class PatchReport:
    """What `patch_model` did; print it.

    Attributes:
        model: Class of the patched model.
        num_layers: How many layers it has.
        layers: The config of each layer that uses MuSe; the others attend exactly.
        previous: The attention implementation that `unpatch_model` restores.
    """

    model: str
    num_layers: int
    layers: dict[int, MuseConfig]
    previous: str

    def __str__(self) -> str:
        lines = [
            f"{self.model}: MuSe attention in {len(self.layers)} of {self.num_layers} layers "
            f"(unpatch_model restores {self.previous!r})"
        ]
        for layer, config in self.layers.items():
            clusters = (
                f"{config.num_clusters} clusters a block"
                if config.num_clusters
                else f"clusters of {config.cluster_size or DEFAULT_CLUSTER_SIZE} keys"
            )
            lines.append(
                f"  layer {layer}: {config.hierarchy} blocks from {config.local_block} tokens, {clusters}, "
                f"{config.summaries} summaries, {config.multipole}, {config.num_retrieved} retrieved"
            )
        return "\n".join(lines)


def patch_model(
    model: torch.nn.Module,
    layers: str | Sequence[int] | Mapping[int, Mapping[str, Any]] | None = None,
    config: MuseConfig | None = None,
) -> PatchReport:
    """Let layers of a loaded model attend with MuSe. The policy is stored in `model.config.muse`.

    Args:
        model: A Transformers model, also inside a PEFT model, a compiled model or a parallel wrapper.
        layers: `"all"`; `"central"`, the paper's choice of the one in the middle; layer indices, negative
            ones counted from the end; or a mapping from layer index to fields of `config` that differ there.
            By default what `config.layers` says.
        config: By default the policy that the model already has, else `MuseConfig()`.

    Returns:
        A report to print.

    Raises:
        TypeError: `model` holds no Transformers model, or `layers` or `config` has the wrong type.
        ValueError: A layer index is out of range.
        UnsupportedError: The model's family is not supported, or a chosen layer has a sliding window.
    """
    base = _transformers_model(model)
    model_config = base.config
    check_family(model_config)
    num_layers = model_config.num_hidden_layers
    policy = model_policy(model_config) if config is None else check_config(config)
    if layers is not None:
        policy = policy.replace(layers=_chosen_layers(layers, num_layers))
    chosen = policy.layer_indices(num_layers)
    _check_windows(model_config, chosen)

    if model_config._attn_implementation != NAME:
        setattr(base, _PREVIOUS, model_config._attn_implementation)
        _own_config(base)
    base.set_attn_implementation(NAME)
    base.config.muse = policy
    return PatchReport(
        model=type(base).__name__,
        num_layers=num_layers,
        layers={layer: policy.for_layer(layer, num_layers) for layer in chosen},
        previous=getattr(base, _PREVIOUS, "sdpa"),
    )


def unpatch_model(model: torch.nn.Module) -> None:
    """Restore the attention that was there before `patch_model` and forget the policy.

    A model that was loaded with `attn_implementation="muse"` gets Transformers' default, "sdpa". A model
    without MuSe is left as it is.

    Raises:
        TypeError: `model` holds no Transformers model.
    """
    base = _transformers_model(model)
    if base.config._attn_implementation == NAME:
        base.set_attn_implementation(getattr(base, _PREVIOUS, "sdpa"))
    for owner, name in ((base, _PREVIOUS), (base.config, "muse")):
        if name in vars(owner):
            delattr(owner, name)


def _transformers_model(model: torch.nn.Module) -> PreTrainedModel:
    """The Transformers model inside compiled, PEFT and parallel wrappers."""
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


def _own_config(model: PreTrainedModel) -> None:
    """Part the model from others that were built from the same config object: they are not patched."""
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own


def _chosen_layers(layers: Any, num_layers: int) -> list[int] | dict[int, Any] | None:
    if not isinstance(layers, str):
        return layers
    if layers == "all":
        return None
    if layers == "central":
        return [num_layers // 2]
    raise ValueError(f'layers={layers!r}: must be "all", "central", layer indices or a mapping')


def _check_windows(model_config: Any, layers: list[int]) -> None:
    """Refuse layers with a sliding window now instead of at the first forward."""
    window = getattr(model_config, "sliding_window", None)
    if window is None:
        return
    kinds = getattr(model_config, "layer_types", None)
    windowed = [i for i in layers if kinds is None or kinds[i] == "sliding_attention"]
    if windowed:
        raise UnsupportedError(
            f"layers {windowed} of {model_config.model_type!r} have a sliding window of {window} tokens, "
            "which MuSe does not implement: leave them out of `layers`, or set config.sliding_window = None "
            "if they may attend to everything"
        )
