"""`TrainingMonitor`: how far MuSe is from exact attention while a model trains with it."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from muse_hf.adapter import NAME
from muse_hf.config import MuseConfig
from muse_hf.functional import muse_attention
from muse_hf.models import InputError, check_length, predicts_next_token, temporary_policy, transformers_model
from muse_hf.profiling import observed_attention
from muse_hf.reference.clustering import (
    assign_with_capacity,
    cluster_sizes,
    kmeans_centroids,
    nearest_centroid,
)
from muse_hf.routing import layer_config, reason_for_exact
from muse_hf.segments import Segments

# Relative squared output error above which a layer is taken to fail.
ERROR_LIMIT = 0.25
# Logits that exist at once while exact attention of the sampled queries is computed a part at a time.
_LOGITS = 1 << 25

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class LayerMeasurement:
    """One MuSe layer, compared with exact attention on the same queries, keys and values.

    Attributes:
        layer: Its index.
        config: Its setting.
        error: Σ|MuSe - exact|² / Σ|exact|² over the sampled queries of all heads.
        lse_bias: Mean over them of MuSe's logsumexp of the logits minus the exact one, in nats.
        largest_cluster, smallest_cluster: Keys in a cluster, over all heads and far blocks of `local_block`
            tokens (of the whole sequence in an encoder).
        empty_query_clusters: Share of the query centroids of these blocks that are nearest to no query; None
            with plain summaries, which have no query clusters.
    """

    layer: int
    config: MuseConfig
    error: float
    lse_bias: float
    largest_cluster: float
    smallest_cluster: float
    empty_query_clusters: float | None

    def advice(self) -> str:
        """What the error is and what lowers it."""
        return (
            f"MuSe in layer {self.layer} is off by {self.error:.0%} of exact attention's output (relative "
            f"squared error, more than {ERROR_LIMIT:.0%}). Give k-means more iterations (kmeans_iters, now "
            f"{self.config.kmeans_iters}) or a tighter cap (cluster_cap, now {self.config.cluster_cap}; "
            f"the largest key cluster has {self.largest_cluster:.0f} keys), retrieve more clusters "
            f"(num_retrieved, now {self.config.num_retrieved}; retrieval_threshold, now "
            f"{self.config.retrieval_threshold:g}), or use another layer (MuseConfig.layers)"
        )


@dataclass(frozen=True)
class Measurement:
    """All MuSe layers of a model at one moment; as text, a short piece of a progress line."""

    layers: list[LayerMeasurement]

    def to_logs(self) -> dict[str, float]:
        """Plain numbers for a tracker, such as `{"muse/layer_03/error": 0.02, ...}`."""
        names = ("error", "lse_bias", "largest_cluster", "smallest_cluster", "empty_query_clusters")
        return {
            f"muse/layer_{entry.layer:02}/{name}": value
            for entry in self.layers
            for name in names
            if (value := getattr(entry, name)) is not None
        }

    def __str__(self) -> str:
        worst = max(self.layers, key=lambda entry: entry.error)
        bias = statistics.fmean(entry.lse_bias for entry in self.layers)
        return f"MuSe error {worst.error:.1%} (layer {worst.layer}), logsumexp {bias:+.3f}"


class TrainingMonitor:
    """Measures the MuSe layers of a model every so many steps, always on the same tokens.

    A measurement is one forward pass without gradient over the longest sequence of the batch, in evaluation
    mode, and in each MuSe layer exact attention of a few queries. Memory is linear in the number of tokens.
    No random number is drawn, so that a run goes on as if it had not been measured.

    Args:
        batch: Model inputs as a collator gives them: `input_ids` (B, N), and `position_ids` that restart at
            each packed document or an `attention_mask` (B, N) where there is padding.
        every: Steps from one measurement to the next; the first is before training, at step 0.
        num_queries: Evenly spaced queries a head whose exact attention is computed.

    Raises:
        ValueError: `every` or `num_queries` is not positive.
    """

    def __init__(self, batch: Mapping[str, torch.Tensor], every: int = 500, num_queries: int = 256):
        if every < 1 or num_queries < 1:
            raise ValueError(f"every={every} and num_queries={num_queries} must be at least 1")
        self._tokens = _longest_sequence(batch)
        self._every, self._num_queries = every, num_queries
        self._warned: set[int] = set()

    def due(self, step: int) -> bool:
        """Whether to measure after this many optimizer steps."""
        return step % self._every == 0

    def measure(self, model: torch.nn.Module) -> Measurement:
        """Measure now, and warn with advice once for each layer whose error passes 25%.

        Where parameters are spread over processes (FSDP), all of them have to call it.

        Args:
            model: A model with MuSe attention, also inside a PEFT, compiled or parallel wrapper.

        Raises:
            InputError: The model has no MuSe attention, or attends exactly to sequences this short.
        """
        model = transformers_model(model)
        if model.config._attn_implementation != NAME:
            raise InputError(
                'there is no MuSe layer to monitor: load the model with attn_implementation="muse"'
            )
        check_length(model.config, self._tokens.shape[1])
        found: dict[int, tuple[MuseConfig, torch.Tensor]] = {}
        policy = getattr(model.config, "muse", None)

        def observe(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, *attention: Any) -> None:
            config = layer_config(module)
            if reason_for_exact(module, query, key, None, config) is None:
                numbers = _measure_layer(query, key, *attention, config, self._num_queries)
                found[module.layer_idx] = (config, numbers)

        with torch.no_grad(), temporary_policy(model), observed_attention(observe):
            model.config.muse = policy
            _forward(model, self._tokens.to(model.device))
        if not found:
            raise InputError(
                f"no layer uses MuSe on a sequence of {self._tokens.shape[1]} tokens: give the monitor a "
                "longer one, or lower local_block or min_length"
            )
        rows = torch.stack([numbers for _, numbers in found.values()]).tolist()  # waits for the device once
        layers = [
            LayerMeasurement(layer, config, *row[:4], row[4] if config.summaries == "tilted" else None)
            for (layer, (config, _)), row in zip(found.items(), rows)
        ]
        self._warn(layers)
        return Measurement(layers)

    def _warn(self, layers: list[LayerMeasurement]) -> None:
        for entry in layers:
            fails = not entry.error <= ERROR_LIMIT  # a NaN fails too
            if fails and entry.layer not in self._warned:
                self._warned.add(entry.layer)
                logger.warning(entry.advice())


class MonitorCallback(TrainerCallback):
    """The monitor in a Trainer: `trainer.add_callback(MonitorCallback(monitor, trainer.log))`.

    Args:
        monitor: What to measure, and when.
        log: Takes the numbers to the Trainer's trackers, history and progress line.
    """

    def __init__(self, monitor: TrainingMonitor, log: Callable[[dict[str, float]], None]):
        self._monitor, self._log = monitor, log

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._measure(state, control, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._measure(state, control, model)

    def _measure(self, state: TrainerState, control: TrainerControl, model: torch.nn.Module) -> None:
        if self._monitor.due(state.global_step):
            logs = self._monitor.measure(model).to_logs()
            loss_is_due = control.should_log
            self._log(logs)  # after which the Trainer takes this step's loss for logged
            control.should_log = loss_is_due


def _longest_sequence(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Token ids (1, n) of the longest sequence of a batch; the first one if several are as long."""
    input_ids = batch["input_ids"]
    if batch.get("position_ids") is not None and batch.get("attention_mask") is None:
        segments = Segments.from_position_ids(batch["position_ids"])
    else:
        mask = batch.get("attention_mask")
        segments = Segments.from_padding_mask(torch.ones_like(input_ids) if mask is None else mask)
    table = zip(segments.rows, segments.starts, segments.lengths)
    row, start, length = max(table, key=lambda segment: segment[2])
    return input_ids[row : row + 1, start : start + length].clone()


def _forward(model: PreTrainedModel, input_ids: torch.Tensor) -> None:
    """One pass through the model itself, whose forward may have been wrapped for autocast or sharding.

    Nothing is compiled: every measurement would be a graph of its own.
    """
    options = {"logits_to_keep": 1} if predicts_next_token(model) else {}
    with torch.compiler.set_stance("force_eager"):
        model(input_ids=input_ids, use_cache=False, **options)


def _measure_layer(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    scale: float,
    config: MuseConfig,
    num_queries: int,
) -> torch.Tensor:
    """The numbers (5,) of `LayerMeasurement`, in its order and on the device of the inputs, in float64."""
    length = query.shape[2]
    count = min(num_queries, length)
    sample = torch.arange(1, count + 1, device=query.device) * length // count - 1
    output, lse = muse_attention(
        query, key, value, is_causal=is_causal, scale=scale, config=config, return_lse=True
    )
    exact, exact_lse = sampled_attention(query, key, value, sample, is_causal=is_causal, scale=scale)
    error = (output[:, :, sample] - exact).square().sum(dtype=torch.float64)
    bias = (lse[:, :, sample] - exact_lse).mean(dtype=torch.float64)
    numbers = [
        error / exact.square().sum(dtype=torch.float64),
        bias,
        *_cluster_statistics(query, key, is_causal, config),
    ]
    return torch.stack([number.to(torch.float64) for number in numbers])


def sampled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sample: torch.Tensor,
    *,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention of some of the queries, in float32 at least.

    Args:
        query: (B, H, Q, D). key, value: (B, Hkv, K, D), with K = Q if causal.
        sample: (S,) indices of queries.

    Returns:
        Output (B, H, S, D) and logsumexp (B, H, S) of these queries.
    """
    computed = torch.promote_types(query.dtype, torch.float32)
    queries = (query[:, :, sample].to(computed) * scale).unflatten(1, (key.shape[1], -1))
    key, value = (tensor.to(computed)[:, :, None] for tensor in (key, value))
    tokens = torch.arange(key.shape[3], device=key.device)
    step = max(1, _LOGITS // (query.shape[0] * query.shape[1] * key.shape[3]))
    parts = []
    with torch.autocast(query.device.type, enabled=False):
        for part, positions in zip(queries.split(step, dim=3), sample.split(step)):
            logits = part @ key.transpose(-1, -2)
            if is_causal:
                logits.masked_fill_(tokens > positions[:, None], -torch.inf)
            lse = logits.logsumexp(-1)
            parts.append((logits.sub_(lse[..., None]).exp_() @ value, lse))
    output, lse = (torch.cat(tensors, dim=3).flatten(1, 2) for tensors in zip(*parts))
    return output, lse


def _cluster_statistics(
    query: torch.Tensor, key: torch.Tensor, is_causal: bool, config: MuseConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys in the largest and in the smallest cluster, and the share of query clusters without a query."""
    size = config.local_block if is_causal else key.shape[2]
    last = (key.shape[2] - 1) // size * size if is_causal else size  # no query comes after the last block

    def blocks_of(tokens: torch.Tensor) -> torch.Tensor:
        computed = torch.promote_types(tokens.dtype, torch.float32)
        return tokens[:, :, :last].to(computed).unflatten(2, (-1, size)).flatten(0, 2)

    num_clusters = config.clusters_for(size)
    with torch.autocast(query.device.type, enabled=False):
        keys, queries = blocks_of(key), blocks_of(query)
        centroids = kmeans_centroids(keys, num_clusters, config.kmeans_iters)
        sizes = cluster_sizes(assign_with_capacity(keys, centroids, config.capacity_for(size)), num_clusters)
        if config.summaries == "plain":
            return sizes.max(), sizes.min(), sizes.new_zeros(())
        centroids = kmeans_centroids(queries, num_clusters, config.kmeans_iters)
        occupied = cluster_sizes(nearest_centroid(queries, centroids)[0], num_clusters)
    return sizes.max(), sizes.min(), (occupied == 0).double().mean()
