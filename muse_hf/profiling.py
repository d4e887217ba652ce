"""`profile_layers`: what MuSe would do to each layer and head of a model, before it is switched on."""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.utils import logging

from muse_hf.adapter import NAME, muse_attention_forward
from muse_hf.config import MuseConfig, check_config
from muse_hf.functional import exact_attention, muse_attention
from muse_hf.models import (
    InputError,
    check_length,
    hidden_states,
    predicts_next_token,
    temporary_policy,
    token_losses,
    transformers_model,
)
from muse_hf.reference.attention import merge
from muse_hf.reference.exact import exact_forward
from muse_hf.routing import check_windows, is_cross_attention, model_policy, shortest_length

# Tokens whose mean change of the loss counts as one observation: neighbours are not independent. Fewer where
# there would be few observations.
_OBSERVED_TOKENS, _FEWEST_PIECES = 256, 8
# Logits that exist at once while exact attention is computed a part of the queries at a time.
_LOGITS = 1 << 25
# How often attention is timed, and how many calls an accelerator gets each time.
_TIMES, _IN_A_ROW = 3, 5


@dataclass(frozen=True)
class LayerProfile:
    """MuSe in one layer, compared with exact attention.

    Attributes:
        layer: Its index.
        config: The setting that was tried.
        output_error: For each head Σ|MuSe - exact|² / Σ|exact|² over all outputs of its attention.
        lse_bias: For each head the mean of MuSe's logsumexp of the logits minus the exact one, in nats.
        exact_ms, muse_ms: Time of attention on one row, in milliseconds: the forward call, or with_backward
            the backward pass too.
        change: With MuSe in this layer alone, how much the model's loss rises, in nats per token; or, of a
            model without a next-token loss, Σ|MuSe - exact|² / Σ|exact|² of its last hidden states.
        harm: The same relative to the exact loss; or just the same.
        harm_error: Standard error of the harm, from how much it differs along the text; 0 without a loss.
    """

    layer: int
    config: MuseConfig
    output_error: list[float]
    lse_bias: list[float]
    exact_ms: float
    muse_ms: float
    change: float
    harm: float
    harm_error: float


@dataclass(frozen=True)
class Profile:
    """What `profile_layers` found; print it, save it, draw it.

    Attributes:
        model: Class of the model.
        device, dtype: Where and in which precision it ran.
        rows, length: The sequences it ran on.
        exact_loss: Loss with exact attention in nats per token; None for a model without one.
        exact_below: Length from which a patched model uses MuSe on this device, if the sequences are shorter.
        layers: One entry for every layer that was tried, in order.
    """

    model: str
    device: str
    dtype: str
    rows: int
    length: int
    exact_loss: float | None
    exact_below: int | None
    layers: list[LayerProfile]

    def by_harm(self) -> list[int]:
        """The layers, the one that MuSe harms most first."""
        return [entry.layer for entry in sorted(self.layers, key=lambda entry: -entry.harm)]

    def to_dict(self) -> dict[str, Any]:
        """All numbers as JSON types."""
        layers = [asdict(entry) | {"config": entry.config.to_dict()} for entry in self.layers]
        return asdict(self) | {"layers": layers, "by_harm": self.by_harm()}

    def save(self, path: str | Path) -> None:
        """Write the numbers to a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def plot(self, path: str | Path) -> None:
        """Draw output errors, layers x heads, beside the harm of each layer. Needs matplotlib.

        Args:
            path: An image file; its ending (.png, .svg, .pdf) says the format.
        """
        from muse_hf.plots import plot_profile

        plot_profile(self, path)

    def __str__(self) -> str:
        has_loss = self.exact_loss is not None
        exact = f"; loss with exact attention {self.exact_loss:.4f} nats per token" if has_loss else ""
        lines = [
            f"{self.model}, {self.rows} x {self.length} tokens, {self.dtype} on {self.device}{exact}",
            *(f"MuSe: {setting}" for setting in dict.fromkeys(e.config.describe() for e in self.layers)),
            f"{'layer':>5}{'output error':>14}{'worst head':>18}{'logsumexp':>11}{'exact':>11}{'MuSe':>11}"
            f"{'loss, this layer alone' if has_loss else 'model output error':>31}",
        ]
        for entry in self.layers:
            errors = entry.output_error
            worst = max(range(len(errors)), key=errors.__getitem__)
            alone = f"{entry.harm:.4%}"
            if has_loss:
                alone = f"{entry.change:+.5f} ({entry.harm:+.3%} ± {entry.harm_error:.3%})"
            lines.append(
                f"{entry.layer:5}{statistics.fmean(errors):14.3%}{f'{errors[worst]:.3%} (head {worst})':>18}"
                f"{statistics.fmean(entry.lse_bias):+11.4f}{entry.exact_ms:8.2f} ms{entry.muse_ms:8.2f} ms"
                f"{alone:>31}"
            )
        order = ", ".join(map(str, self.by_harm()))
        lines.append(f"layers by harm, worst first: {order}")
        if self.exact_below is not None:
            lines.append(
                f"a patched model attends exactly to fewer than {self.exact_below} tokens here, unless "
                f"MuseConfig(min_length={self.length}) or less says otherwise"
            )
        return "\n".join(lines)


def profile_layers(
    model: torch.nn.Module, input_ids: torch.Tensor, config: MuseConfig | None = None
) -> Profile:
    """Compare MuSe with exact attention in each layer and head, without changing the model.

    One forward pass with exact attention, in which MuSe is computed on the same queries, keys and values at
    every attention call; then one forward pass a layer, with MuSe in that layer alone. Memory is linear in
    the number of tokens. Rows are worked through one at a time.

    Args:
        model: A Transformers model, also inside a PEFT, compiled or parallel wrapper. It may be patched.
        input_ids: (B, N) tokens without padding, longer than `local_block`.
        config: The setting to try, in the layers that its `layers` names; by default the policy that the
            model has, else `MuseConfig()`. Its `min_length` is not looked at.

    Raises:
        TypeError: `model`, `input_ids` or `config` is not one.
        InputError: The text is too short for MuSe, or longer than the positions a model has learned.
        UnsupportedError: The model's family is not supported, or a layer has a sliding window.
    """
    base = transformers_model(model)
    policy = model_policy(base.config) if config is None else check_config(config)
    num_layers = base.config.num_hidden_layers
    candidates = {layer: [policy.for_layer(layer, num_layers)] for layer in policy.layer_indices(num_layers)}
    profiles, quality = measure_layers(base, input_ids, candidates)
    shortest = max((shortest_length(c, base.device) for (c,) in candidates.values()), default=0)
    return Profile(
        model=type(base).__name__,
        device=device_name(base.device),
        dtype=str(base.dtype).removeprefix("torch."),
        rows=input_ids.shape[0],
        length=input_ids.shape[1],
        exact_loss=quality.exact_loss,
        exact_below=shortest if input_ids.shape[1] < shortest else None,
        layers=[profiles[layer][0] for layer in candidates],
    )


def measure_layers(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    candidates: Mapping[int, Sequence[MuseConfig]],
    with_backward: bool = False,
) -> tuple[dict[int, list[LayerProfile]], "Quality"]:
    """Profiles of every setting that is a candidate for a layer, and what exact attention reaches.

    Other arguments and errors as in `profile_layers`.

    Args:
        with_backward: Whether the times are those of the forward and the backward pass of attention.
    """
    settings = [config for configs in candidates.values() for config in configs]
    input_ids = check_input(model, input_ids, settings)
    check_windows(model.config, list(candidates))
    steps = len(input_ids) * len(settings)
    with (
        temporary_policy(model),
        logging.tqdm(total=2 * steps, desc="Profiling layers", unit="setting", leave=False) as bar,
    ):
        comparisons = {layer: Comparison(configs, with_backward) for layer, configs in candidates.items()}

        def compare(module: torch.nn.Module, *attention: Any) -> None:
            if module.layer_idx in candidates:
                comparisons[module.layer_idx].add(*attention)
                bar.update(len(candidates[module.layer_idx]))

        def change(layer: int, config: MuseConfig) -> Change:
            bar.update(len(input_ids))
            return quality.change(config.replace(layers=[layer], min_length=0))

        with observed_attention(compare):
            quality = Quality(model, input_ids)
        profiles = {
            layer: comparisons[layer].profiles(layer, [change(layer, config) for config in configs])
            for layer, configs in candidates.items()
        }
    return profiles, quality


def check_input(
    model: PreTrainedModel, input_ids: torch.Tensor, settings: Sequence[MuseConfig]
) -> torch.Tensor:
    """The tokens on the model's device, if MuSe can be tried on them."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        raise TypeError("input_ids must be a tensor of token ids of shape (rows, tokens)")
    length, block = input_ids.shape[1], max((config.local_block for config in settings), default=0)
    if length <= block:
        raise InputError(
            f"{length} tokens are not more than local_block={block}, so that MuSe would attend exactly: give "
            "longer text or a smaller local_block"
        )
    if length < 3:
        raise InputError(f"{length} tokens are too few: give at least 3")
    check_length(model.config, length)
    return input_ids.to(model.device)


class Change(NamedTuple):
    """What a policy does to a model, as in `LayerProfile`."""

    change: float
    harm: float
    harm_error: float


class Quality:
    """The loss of a model with exact attention, or its output if it has no loss, and what policies change.

    To be made and used inside `temporary_policy`; the model attends exactly when it is made.

    Args:
        input_ids: (B, N) on the model's device.

    Attributes:
        exact_loss: In nats per token, None for a model without a next-token loss.
    """

    def __init__(self, model: PreTrainedModel, input_ids: torch.Tensor):
        has_loss = predicts_next_token(model)
        self._model, self._rows = model, input_ids.split(1)
        self._answer = token_losses if has_loss else hidden_states
        self._exact = [self._answer(model, row) for row in self._rows]
        self.exact_loss = torch.cat(self._exact).double().mean().item() if has_loss else None

    def change(self, policy: MuseConfig) -> Change:
        """What the whole model loses under a policy, which stays in force."""
        self._model.config.muse = policy
        differences = [self._answer(self._model, row) - exact for row, exact in zip(self._rows, self._exact)]
        if self.exact_loss is None:
            error = sum(map(_squares, differences)) / sum(map(_squares, self._exact))
            return Change(error, error, 0.0)
        losses = torch.cat(differences).double()
        change = losses.mean().item()
        size = max(1, min(_OBSERVED_TOKENS, losses.numel() // _FEWEST_PIECES))
        pieces = torch.stack([piece.mean() for piece in losses.flatten().split(size)])
        error = pieces.std().item() / len(pieces) ** 0.5
        return Change(change, change / self.exact_loss, error / self.exact_loss)


def _squares(tensor: torch.Tensor) -> float:
    return tensor.double().square().sum().item()


class Comparison:
    """What MuSe in each of several settings does to one layer, summed over the rows seen so far."""

    def __init__(self, settings: Sequence[MuseConfig], with_backward: bool):
        self._settings = settings
        self._with_backward = with_backward
        self._sums: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._times: list[float] = []

    def add(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float
    ) -> None:
        """Compare on the queries (1, H, N, D), keys and values (1, Hkv, N, D) of a row."""
        tensors, options = (query, key, value), {"is_causal": is_causal, "scale": scale}
        calls = [partial(muse_attention, config=config, **options) for config in self._settings]
        found = [call(*tensors, return_lse=True) for call in calls]
        squared_output = torch.zeros(query.shape[1], dtype=torch.float64)
        squared_error, bias = (squared_output.repeat(len(calls), 1) for _ in range(2))
        for part, output, lse in exact_parts(query, key, value, **options):
            squared_output += _per_head(output.square())
            for setting, (muse_output, muse_lse) in enumerate(found):
                squared_error[setting] += _per_head((muse_output[:, :, part] - output).square())
                bias[setting] += _per_head(muse_lse[:, :, part] - lse)
        self._sums.append((squared_error, squared_output, bias / query.shape[2]))
        if not self._times:
            timed = [partial(exact_attention, **options), *calls]
            self._times = [attention_milliseconds(call, tensors, self._with_backward) for call in timed]

    def profiles(self, layer: int, changes: Sequence["Change"]) -> list[LayerProfile]:
        """One profile a setting, given what it changes in the model; times are those of the first row."""
        squared_error, squared_output, bias = (sum(rows) for rows in zip(*self._sums))
        exact_ms, *muse_ms = self._times
        return [
            LayerProfile(
                layer=layer,
                config=config,
                output_error=(squared_error[setting] / squared_output).tolist(),
                lse_bias=(bias[setting] / len(self._sums)).tolist(),
                exact_ms=exact_ms,
                muse_ms=muse_ms[setting],
                **changes[setting]._asdict(),
            )
            for setting, config in enumerate(self._settings)
        ]


def attention_milliseconds(
    attend: Callable[..., torch.Tensor],
    tensors: Sequence[torch.Tensor],
    with_backward: bool,
    in_a_row: int = _IN_A_ROW,
) -> float:
    """Median time of the attention of one layer.

    Args:
        attend: Called with `tensors`, the layer's query (B, H, N, D), key and value (B, Hkv, N, D).
        with_backward: Whether to compute the gradients of all three too.
        in_a_row: As in `milliseconds`.
    """
    if with_backward:
        attend = partial(_gradients, attend)
    if tensors[0].device.type != "cpu":
        attend(*tensors)  # which compiles kernels
    return milliseconds(partial(attend, *tensors), tensors[0].device, in_a_row)


@torch.enable_grad()
def _gradients(call: Callable, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Those of the sum of what is called, with respect to its tensors."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = call(*leaves)
    return torch.autograd.grad(output, leaves, torch.ones_like(output))


def _per_head(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all but dimension 1, on the host."""
    return tensor.transpose(0, 1).flatten(1).sum(1).to("cpu", torch.float64)


@contextmanager
def observed_attention(observe: Callable[..., None]) -> Iterator[None]:
    """Tell of every self-attention call of models whose attention is "muse".

    Args:
        observe: Called with the module, query (B, H, N, D), key and value (B, Hkv, N, D), whether attention
            is causal, and the scale.
    """

    def observed(module, query, key, value, attention_mask, scaling=None, is_causal=None, **options):
        if not is_cross_attention(module):
            causal = module.is_causal if is_causal is None else is_causal
            observe(
                module, query, key, value, causal, query.shape[-1] ** -0.5 if scaling is None else scaling
            )
        return muse_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **options
        )

    AttentionInterface.register(NAME, observed)
    try:
        yield
    finally:
        AttentionInterface.register(NAME, muse_attention_forward)


def exact_parts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool, scale: float
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Exact attention in float32 at least, a part of the queries at a time.

    Args:
        query: (B, H, Q, D). key, value: (B, Hkv, K, D), with K = Q if causal.

    Yields:
        Queries [start, stop), their output (B, H, stop - start, D) and logsumexp (B, H, stop - start).
    """
    shape, num_queries = key.shape[:2], query.shape[2]
    computed = torch.promote_types(query.dtype, torch.float32)
    query = (query.to(computed) * scale).unflatten(1, (key.shape[1], -1)).flatten(0, 1)
    key, value = (tensor.to(computed).flatten(0, 1) for tensor in (key, value))
    step = max(1, _LOGITS // (query.shape[0] * query.shape[1] * key.shape[1]))
    for start in range(0, num_queries, step):
        part = slice(start, min(start + step, num_queries))
        queries, before = query[:, :, part], slice(0, start if is_causal else key.shape[1])
        with torch.autocast(query.device.type, enabled=False):
            parts = []
            if is_causal:
                parts.append(exact_forward(queries, key[:, part], value[:, part], is_causal=True))
            if before.stop:
                parts.append(exact_forward(queries, key[:, before], value[:, before], is_causal=False))
        merged = merge([(output, torch.ones_like(lse), lse) for output, lse in parts])
        yield part, *(tensor.unflatten(0, shape).flatten(1, 2) for tensor in merged)


def milliseconds(call: Callable[[], Any], device: torch.device, in_a_row: int = 1) -> float:
    """Median time of a call; call it once before, so that nothing is compiled while the clock runs.

    Args:
        in_a_row: How many calls an accelerator gets at once. For parts of a model more than one, for they
            follow each other: the host's time counts only where it is longer than the device's.
    """
    on_cpu = device.type == "cpu"
    synchronize = (lambda: None) if on_cpu else partial(torch.accelerator.synchronize, device)
    in_a_row = 1 if on_cpu else in_a_row
    times = []
    for _ in range(_TIMES):
        synchronize()
        start = time.perf_counter()
        for _ in range(in_a_row):
            call()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start) / in_a_row)
    return statistics.median(times)


def device_name(device: torch.device) -> str:
    """What to call a device in a report."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
