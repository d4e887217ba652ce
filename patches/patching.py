"""`patch_model` and `unpatch_model`."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from muse_hf.adapter import NAME
from muse_hf.choosing import Choice, choose_settings
from muse_hf.config import MuseConfig, check_config
from muse_hf.models import transformers_model
from muse_hf.routing import check_family, check_windows, model_policy

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
        choice: What `layers="auto"` measured.
    """

    model: str
    num_layers: int
    layers: dict[int, MuseConfig]
    previous: str
    choice: Choice | None = None

    def __str__(self) -> str:
        lines = [
            f"{self.model}: MuSe attention in {len(self.layers)} of {self.num_layers} layers "
            f"(unpatch_model restores {self.previous!r})"
        ]
        for layer, config in self.layers.items():
            lines.append(f"  layer {layer}: {config.describe()}")
        if self.choice is not None:
            lines.append(str(self.choice))
        return "\n".join(lines)


def patch_model(
    model: torch.nn.Module,
    layers: str | Sequence[int] | Mapping[int, Mapping[str, Any]] | None = None,
    config: MuseConfig | None = None,
    *,
    max_loss_increase: float = 0.002,
    calibration: torch.Tensor | None = None,
) -> PatchReport:
    """Let layers of a loaded model attend with MuSe. The policy is stored in `model.config.muse`.

    Args:
        model: A Transformers model, also inside a PEFT model, a compiled model or a parallel wrapper.
        layers: `"all"`; `"central"`, the paper's choice of the one in the middle; layer indices, negative
            ones counted from the end; or a mapping from layer index to fields of `config` that differ there.
            By default what `config.layers` says. `"auto"` measures: every layer gets the fastest step of a
            ladder (no, few, default, many retrieved clusters, exact attention), whatever `config` says of
            retrieval, such that the model stays within a budget.
        config: By default the policy that the model already has, else `MuseConfig()`.
        max_loss_increase: The budget of `"auto"`: how much larger the loss on `calibration` may be than with
            exact attention, relatively. For a model without a next-token loss, Σ|MuSe - exact|² / Σ|exact|²
            of its last hidden states.
        calibration: (B, N) tokens for `"auto"`, without padding, of the kind and length that matter.

    Returns:
        A report to print.

    Raises:
        TypeError: `model` holds no Transformers model, or `layers` or `config` has the wrong type.
        ValueError: A layer index is out of range.
        UnsupportedError: The model's family is not supported, or a chosen layer has a sliding window.
    """
    base = transformers_model(model)
    model_config = base.config
    check_family(model_config)
    num_layers = model_config.num_hidden_layers
    policy = model_policy(model_config) if config is None else check_config(config)
    choice = None
    if isinstance(layers, str) and layers == "auto":
        if calibration is None:
            raise ValueError(
                'layers="auto" measures on text: give calibration=input_ids of shape (rows, tokens)'
            )
        choice = choose_settings(base, calibration, policy, max_loss_increase)
        policy = choice.policy
    elif calibration is not None:
        raise ValueError(f'calibration is for layers="auto", not for layers={layers!r}')
    elif layers is not None:
        policy = policy.replace(layers=_chosen_layers(layers, num_layers))
    chosen = policy.layer_indices(num_layers)
    check_windows(model_config, chosen)

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
        choice=choice,
    )


def unpatch_model(model: torch.nn.Module) -> None:
    """Restore the attention that was there before `patch_model` and forget the policy.

    A model that was loaded with `attn_implementation="muse"` gets Transformers' default, "sdpa". A model
    without MuSe is left as it is.

    Raises:
        TypeError: `model` holds no Transformers model.
    """
    base = transformers_model(model)
    if base.config._attn_implementation == NAME:
        base.set_attn_implementation(getattr(base, _PREVIOUS, "sdpa"))
    for owner, name in ((base, _PREVIOUS), (base.config, "muse")):
        if name in vars(owner):
            delattr(owner, name)


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
    raise ValueError(f'layers={layers!r}: must be "all", "central", "auto", layer indices or a mapping')
