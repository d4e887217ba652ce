"""Settings chosen by measurement: `layers="auto"` for each layer, `recommend_config` for all together."""

import numbers
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, combinations, product
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from muse_hf.config import MuseConfig
from muse_hf.models import InputError, hidden_states, temporary_policy, transformers_model
from muse_hf.profiling import Quality, check_input, device_name, measure_layers, milliseconds
from muse_hf.routing import check_windows, shortest_length, windowed_layers

# The ladder of `layers="auto"`, in num_retrieved and retrieval_threshold: no retrieval, few, default and many
# retrieved clusters. The threshold makes most steps, for it spares clusters where that harms least; without
# one, every query pays for the largest number. Exact attention is the last step.
RETRIEVED = ((0, 0.0), (8, 0.01), (24, 0.01), (24, 0.003), (24, 0.001), (24, 0.0), (48, 0.0))
EXACT = None

# What `recommend_config` tries. Clusters that a query retrieves have up to about so many keys, as by default.
_LOCAL_BLOCKS, _CLUSTER_SIZES, _THRESHOLDS = (1024, 2048, 4096), (20, 40), (0.01, 0.003, 0.001)
_RETRIEVED_KEYS = 960


@dataclass(frozen=True)
class Option:
    """One setting of one layer, measured.

    Attributes:
        num_retrieved: Clusters each query retrieves at most; None is exact attention.
        ms: Time of attention on one row, forward and backward, in milliseconds.
        harm: As in `LayerProfile`; 0 for exact attention.
        retrieval_threshold: As in `MuseConfig`.
    """

    num_retrieved: int | None
    ms: float
    harm: float
    retrieval_threshold: float = 0.0

    @property
    def cost(self) -> float:
        """Harm that has to be reckoned with, of which a gain pays nothing back to other layers."""
        return max(0.0, self.harm)

    @property
    def name(self) -> str:
        if self.num_retrieved is EXACT:
            return "exact"
        threshold = self.retrieval_threshold
        return f"{self.num_retrieved} at {threshold:g}" if threshold else f"{self.num_retrieved} retrieved"


@dataclass(frozen=True)
class Choice:
    """What `patch_model(layers="auto")` chose and why; print it.

    Attributes:
        policy: The config that `config.muse` gets.
        options: What was measured of each layer, in the order of the ladder, exact attention last.
        chosen: The option of each layer.
        predicted: Sum of the harms of the chosen options.
        measured: Harm of all of them together, by a forward pass of the whole model.
        measured_error: Its standard error.
        budget: What both had to stay within, the latter with its standard error on top: other text differs.
        has_loss: Whether harm is the relative increase of the loss, or else the output error of the model.
        rows, length, device: What it was measured on.
    """

    policy: MuseConfig
    options: dict[int, list[Option]]
    chosen: dict[int, Option]
    predicted: float
    measured: float
    measured_error: float
    budget: float
    has_loss: bool
    rows: int
    length: int
    device: str

    def __str__(self) -> str:
        what = "loss increase" if self.has_loss else "model output error"
        first = next(iter(self.options.values()))
        lines = [
            f"chosen on {self.rows} x {self.length} tokens on {self.device}: {what} with MuSe in one layer",
            _row("layer", [option.name for option in first]),
            *(
                _row(layer, [f"{o.harm:+.3%}{'*' if o == self.chosen[layer] else ' '}" for o in options])
                for layer, options in self.options.items()
            ),
            _row("time", [f"{option.ms:.2f} ms " for option in first]),
        ]
        exact = len(self.options) * first[-1].ms
        chosen = sum(option.ms for option in self.chosen.values())
        lines.append(
            f"{what} of the chosen settings (*) together {self.measured:+.3%} ± {self.measured_error:.3%}, "
            f"sum of the layers {self.predicted:+.3%}, budget {self.budget:.3%}"
        )
        lines.append(f"attention of all layers, forward and backward, {chosen:.1f} ms, exact {exact:.1f} ms")
        if chosen >= exact:
            lines.append("nothing within the budget is faster here than exact attention, which stays")
        return "\n".join(lines)


def _row(title: Any, cells: Sequence[str]) -> str:
    return (f"{title:>5}" + "".join(f"{cell:>14}" for cell in cells)).rstrip()


def choose_settings(
    model: PreTrainedModel, input_ids: torch.Tensor, config: MuseConfig, max_loss_increase: float
) -> Choice:
    """Give every layer the fastest setting such that all of them together stay within a budget of harm.

    Harms of layers are taken to add up, so that for a price on harm every layer can choose for itself the
    option of least `ms + price * harm`. The lowest price at which the sum, and then a forward pass of the
    whole model with its standard error on top, stays within the budget decides.

    Times are of the forward and the backward pass: what is chosen is stored with the model, is adapted by
    training, and meets longer texts, where exact attention falls further behind. A forward pass alone may at
    this length be faster with exact attention in a layer or two.

    Args:
        model: A bare Transformers model.
        input_ids: (B, N) calibration tokens without padding.
        config: Everything but `num_retrieved`, `retrieval_threshold` and `layers`.
        max_loss_increase: Budget relative to the exact loss; for models without a loss, of the relative
            squared error of the last hidden states.

    Errors as in `profile_layers`.
    """
    check_budget(max_loss_increase)
    windowed = windowed_layers(model.config)
    layers = [layer for layer in range(model.config.num_hidden_layers) if layer not in windowed]
    if not layers:
        check_windows(model.config, list(windowed))
    input_ids = check_input(model, input_ids, [config])
    config = _used_from(config, input_ids.shape[1], model.device)
    ladder = [
        config.replace(layers=None, num_retrieved=number, retrieval_threshold=threshold)
        for number, threshold in RETRIEVED
    ]
    candidates = dict.fromkeys(layers, ladder)
    profiles, quality = measure_layers(model, input_ids, candidates, with_backward=True)
    # All layers do the same work: the median over them is the better measure of a setting's time.
    times = [statistics.median(column) for column in zip(*([e.muse_ms for e in profiles[i]] for i in layers))]
    exact = Option(EXACT, statistics.median(profiles[layer][0].exact_ms for layer in layers), 0.0)
    options = {
        layer: [
            Option(number, ms, entry.harm, threshold)
            for (number, threshold), ms, entry in zip(RETRIEVED, times, profiles[layer])
        ]
        + [exact]
        for layer in layers
    }
    described = {
        "options": options,
        "budget": max_loss_increase,
        "has_loss": quality.exact_loss is not None,
        "rows": len(input_ids),
        "length": input_ids.shape[1],
        "device": device_name(model.device),
    }
    with temporary_policy(model):
        # One that keeps the whole within the budget is there: exact attention everywhere.
        for chosen in logging.tqdm(assignments(options), desc="Checking choices", unit="choice", leave=False):
            if sum(option.cost for option in chosen.values()) <= max_loss_increase:
                policy = policy_of(chosen, config)
                measured = quality.change(policy)
                if measured.harm + measured.harm_error <= max_loss_increase:
                    break
    return Choice(
        policy=policy,
        chosen=chosen,
        predicted=sum(option.harm for option in chosen.values()),
        measured=measured.harm,
        measured_error=measured.harm_error,
        **described,
    )


def _used_from(config: MuseConfig, length: int, device: torch.device) -> MuseConfig:
    """The config with a `min_length` that lets sequences of this length attend with MuSe."""
    return config.replace(min_length=length) if length < shortest_length(config, device) else config


def assignments(options: Mapping[int, Sequence[Option]]) -> Iterator[dict[int, Option]]:
    """Options for all layers, each assignment once, from the fastest on as the price on harm rises.

    What layers cost on their own may not add up, and a step that happens to cost nothing keeps its place at
    any price. So last come the steps of the ladder that all layers share, again the fastest first, as far as
    exact attention.
    """
    pairs = (pair for layer in options.values() for pair in combinations(layer, 2))
    prices = {(b.ms - a.ms) / (a.cost - b.cost) for a, b in pairs if (b.ms - a.ms) * (a.cost - b.cost) > 0}
    priced = (
        [
            min(choices, key=lambda option: (option.ms + above * option.cost, option.cost))
            for choices in options.values()
        ]
        for above in (price * (1 + 1e-9) for price in [0.0, *sorted(prices)])  # where one overtakes another
    )
    exact = [choices[-1] for choices in options.values()]
    faster = (list(step) for step in zip(*options.values()) if _total_ms(step) < _total_ms(exact))
    seen = []
    for assignment in chain(priced, sorted(faster, key=_total_ms), [exact]):
        if assignment not in seen:
            seen.append(assignment)
            yield dict(zip(options, assignment))


def _total_ms(options: Sequence[Option]) -> float:
    return sum(option.ms for option in options)


def policy_of(chosen: Mapping[int, Option], config: MuseConfig) -> MuseConfig:
    """The options chosen for layers as a config for the whole model."""
    return config.replace(
        layers={
            layer: {
                "num_retrieved": option.num_retrieved,
                "retrieval_threshold": option.retrieval_threshold,
            }
            for layer, option in chosen.items()
            if option.num_retrieved is not EXACT
        }
    )


@dataclass(frozen=True)
class Candidate:
    """One setting in all layers, measured.

    Attributes:
        config: The setting; None is exact attention.
        ms: Time of a forward pass of the model, without its language-model head, on one row.
        harm, harm_error: As in `LayerProfile`, for the whole model.
    """

    config: MuseConfig | None
    ms: float
    harm: float
    harm_error: float


@dataclass(frozen=True)
class Recommendation:
    """What `recommend_config` found; print it.

    Attributes:
        best: The fastest candidate within the budget.
        candidates: All that were tried, exact attention first, then from fast to slow.
        budget: Largest harm allowed, with its standard error on top.
        rows, length, device: What they were measured on.
    """

    best: Candidate
    candidates: list[Candidate]
    budget: float
    rows: int
    length: int
    device: str

    def to_dict(self) -> dict[str, Any]:
        """All numbers as JSON types."""

        def plain(candidate: Candidate) -> dict[str, Any]:
            return asdict(candidate) | {"config": candidate.config and candidate.config.to_dict()}

        return asdict(self) | {"best": plain(self.best), "candidates": [*map(plain, self.candidates)]}

    def __str__(self) -> str:
        exact = self.candidates[0]
        lines = [
            f"measured on {self.rows} x {self.length} tokens on {self.device}, one setting in all layers",
            f"{'local_block':>11}{'cluster_size':>14}{'num_retrieved':>15}{'threshold':>11}"
            f"{'harm':>20}{'forward':>14}",
        ]
        for candidate in self.candidates:
            numbers = f"{'exact':>11}{'':40}"
            if config := candidate.config:
                numbers = (
                    f"{config.local_block:11}{config.cluster_size:14}{config.num_retrieved:15}"
                    f"{config.retrieval_threshold:11g}"
                )
            mark = " *" if candidate == self.best else ""
            harm = f"{candidate.harm:+.3%} ± {candidate.harm_error:.3%}"
            lines.append(f"{numbers}{harm:>20}{candidate.ms:11.1f} ms{mark}")
        within = sum(c.harm + c.harm_error <= self.budget for c in self.candidates[1:])
        lines.append(f"{within} of {len(self.candidates) - 1} settings stay within {self.budget:.3%}.")
        if self.best.config is None:
            lines.append(f"None of them is faster than exact attention at {self.length} tokens: keep it.")
        else:
            lines.append(
                f"Recommended: {self.best.config.describe()}, the fastest of them, "
                f"{exact.ms / self.best.ms:.2f}x as fast as exact attention:"
            )
            fields = ("local_block", "cluster_size", "num_retrieved", "retrieval_threshold", "min_length")
            values = {name: getattr(self.best.config, name) for name in fields}
            lines.append(f"MuseConfig({', '.join(f'{k}={v}' for k, v in values.items() if v is not None)})")
        return "\n".join(lines)


def recommend_config(
    model: torch.nn.Module, input_ids: torch.Tensor, max_loss_increase: float = 0.002
) -> Recommendation:
    """Measure settings of local block, cluster size and retrieval, each in all layers, and name the best.

    The best is the fastest forward pass of which the harm stays within the budget, exact attention included.
    The model is left as it was.

    Args:
        model: A Transformers model, also inside a wrapper.
        input_ids: (B, N) tokens without padding, as many as the model is going to be used with.
        max_loss_increase: Largest harm, as in `patch_model`.

    Errors as in `profile_layers`.
    """
    base = transformers_model(model)
    check_budget(max_loss_increase)
    check_windows(base.config, list(range(base.config.num_hidden_layers)))
    check_input(base, input_ids, [])
    length, fewest = input_ids.shape[1], 4 * max(_CLUSTER_SIZES)
    if length < fewest:
        raise InputError(f"{length} tokens are too few to try settings on: give at least {fewest}")
    # Of a text that is shorter than any block that pays, a quarter.
    blocks = [block for block in _LOCAL_BLOCKS if block < length] or [length // 4]
    input_ids = check_input(base, input_ids, [MuseConfig(local_block=blocks[0])])
    settings = [
        MuseConfig(
            local_block=block,
            cluster_size=size,
            num_retrieved=_RETRIEVED_KEYS // size,
            retrieval_threshold=threshold,
        )
        for block, size, threshold in product(blocks, _CLUSTER_SIZES, _THRESHOLDS)
    ]
    settings = [_used_from(config, length, base.device) for config in settings]
    forward = partial(hidden_states, base, input_ids[:1])
    with temporary_policy(base):
        quality = Quality(base, input_ids)
        exact = Candidate(None, milliseconds(forward, base.device), 0.0, 0.0)
        tried = []
        for config in logging.tqdm(settings, desc="Trying settings", unit="setting", leave=False):
            _, harm, harm_error = quality.change(config)
            tried.append(Candidate(config, milliseconds(forward, base.device), harm, harm_error))
    within = [candidate for candidate in tried if candidate.harm + candidate.harm_error <= max_loss_increase]
    return Recommendation(
        best=min([exact, *within], key=lambda candidate: candidate.ms),
        candidates=[exact, *sorted(tried, key=lambda candidate: candidate.ms)],
        budget=max_loss_increase,
        rows=input_ids.shape[0],
        length=input_ids.shape[1],
        device=device_name(base.device),
    )


def check_budget(max_loss_increase: Any) -> None:
    """Refuse a budget that nothing can stay within."""
    if isinstance(max_loss_increase, bool) or not isinstance(max_loss_increase, numbers.Real):
        raise TypeError(f"max_loss_increase must be a number, got {max_loss_increase!r}")
    if not max_loss_increase >= 0:
        raise InputError(f"max_loss_increase={max_loss_increase!r} must be at least 0 (0.002 is 0.2%)")
