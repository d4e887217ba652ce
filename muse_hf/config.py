"""`MuseConfig`: every choice the method leaves open, validated once."""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT_CLUSTER_SIZE = 40

_CHOICES = {
    "summaries": ("plain", "tilted"),
    "hierarchy": ("flat", "dyadic"),
    "multipole": ("monopole", "dipole"),
    "query_centroids": ("past", "own"),
    "backend": ("auto", "reference", "triton"),
}
_SMALLEST = {
    "num_clusters": 1,
    "cluster_size": 1,
    "num_retrieved": 0,
    "local_block": 1,
    "kmeans_iters": 0,
    "min_length": 0,
}


@dataclass(frozen=True)
class MuseConfig:
    """How a MuSe layer approximates softmax attention.

    A far block of keys is cut into clusters, each cluster is summed up by a few numbers, and every query
    combines the summaries it sees with exact attention to the clusters it finds most important.

    Attributes:
        num_clusters: Clusters per key block, whatever its length. Exclusive with `cluster_size`.
        cluster_size: Mean number of keys in a cluster; a block of s keys gets ceil(s / cluster_size)
            clusters. 40 when neither field is given. Tilted summaries cost the square of their number.
        num_retrieved: Largest number of clusters that a query attends to exactly, those of largest logit to
            second order among all the summaries it sees. 0 turns retrieval off; more cost time and reduce
            the error. The kernels serve up to 64.
        retrieval_threshold: Of these, only those are retrieved whose summary misses at least this share of a
            query's attention: what second order adds to their weight, over the sum of all weights to first
            order. With 0 every query retrieves `num_retrieved`; without retrieval it does nothing.
        local_block: Tokens in a block of exact causal attention, and in the smallest far block. Sequences
            of at most this length are attended exactly.
        summaries: `"plain"` (cluster means and masses, the same for every query) or `"tilted"` (weighted
            by the attention of a query centroid, as in the paper).
        hierarchy: `"flat"` (key blocks of `local_block` tokens, seen by every later block) or `"dyadic"`
            (key blocks that double in length with distance, as in the paper). Causal attention only.
        multipole: `"monopole"`, or `"dipole"` to add the first-order correction of the values, which
            belongs to tilted summaries.
        query_centroids: Causal tilted summaries are expanded around centroids of the queries of the key
            block, `"past"`, which is strictly causal, or of the attending block, `"own"`, which is the
            paper's way and lets a token influence outputs before it. `"own"` needs the dyadic hierarchy.
        kmeans_iters: Centroid updates of k-means, each followed by an assignment.
        cluster_cap: A key cluster holds at most ceil(cluster_cap * keys / clusters) keys, or with `None` all
            that are nearest to its centroid, for which the kernels of plain summaries have no room.
        layers: Which layers use MuSe: `None` for every layer, a list of layer indices, or a mapping from
            layer index to the fields that differ in that layer, such as `{3: {"num_retrieved": 64}}`.
            Negative indices count from the last layer. All other layers attend exactly.
        min_length: Shorter sequences are attended exactly by a model's layers. `None`: on a GPU, those for
            which exact attention was measured to be faster (`muse_hf.routing.CROSSOVER`); 0: none beyond
            `local_block`. `muse_attention` does not look at it.
        backend: `"auto"`, `"reference"` (plain PyTorch, any device) or `"triton"`.

    Raises:
        TypeError: A field has a value of the wrong type.
        ValueError: A field has a value out of its range, or two fields exclude each other.
    """

    num_clusters: int | None = None
    cluster_size: int | None = None
    num_retrieved: int = 24
    retrieval_threshold: float = 0.003
    local_block: int = 2048
    summaries: str = "plain"
    hierarchy: str = "flat"
    multipole: str = "monopole"
    query_centroids: str = "past"
    kmeans_iters: int = 2
    cluster_cap: float | None = 1.5
    min_length: int | None = None
    layers: list[int] | dict[int, dict[str, Any]] | None = None
    backend: str = "auto"

    def __post_init__(self):
        for field, smallest in _SMALLEST.items():
            self._check_integer(field, smallest)
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                self._refuse(field, f"must be one of {', '.join(map(repr, choices))}")
        if self.cluster_cap is not None:
            self._check_number("cluster_cap")
            if not 1 <= self.cluster_cap < math.inf:
                self._refuse("cluster_cap", "must be finite and at least 1, or clusters cannot hold all keys")
        self._check_number("retrieval_threshold")
        if not 0 <= self.retrieval_threshold < 1:
            self._refuse("retrieval_threshold", "is a share: at least 0 and less than 1")
        self._check_combinations()
        object.__setattr__(self, "layers", self._checked_layers())

    @classmethod
    def paper(cls, **overrides: Any) -> "MuseConfig":
        """The setting of arXiv 2509.10406 (64 tilted clusters, dipole, dyadic blocks of 8192, no retrieval).

        `query_centroids` stays `"past"`, which is strictly causal; the paper's own is `"own"`.
        """
        setting = {
            "num_clusters": 64,
            "num_retrieved": 0,
            "local_block": 8192,
            "summaries": "tilted",
            "hierarchy": "dyadic",
            "multipole": "dipole",
            "kmeans_iters": 1,
            # Without retrieval a large cluster costs what its keys do, and moving keys to others costs more.
            "cluster_cap": None,
        }
        return cls(**setting).replace(**overrides)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MuseConfig":
        """Rebuild a config from `to_dict`, also after JSON has turned layer indices into strings."""
        if not isinstance(values, Mapping):
            raise TypeError(f"a MuseConfig is stored as a mapping of its fields, got {values!r}")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"MuseConfig has no field {', '.join(map(repr, unknown))}; its fields are {sorted(known)}"
            )
        values = dict(values)
        if isinstance(values.get("layers"), Mapping):
            values["layers"] = {_layer_index(key): value for key, value in values["layers"].items()}
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """A copy of all fields made of JSON types only, as stored in `model.config.muse`."""
        values = dataclasses.asdict(self)
        if isinstance(self.layers, dict):
            values["layers"] = {str(index): dict(overrides) for index, overrides in self.layers.items()}
        return values

    def replace(self, **overrides: Any) -> "MuseConfig":
        """A validated copy with some fields changed; giving one way to count clusters unsets the other."""
        if overrides.get("num_clusters") is not None:
            overrides.setdefault("cluster_size", None)
        if overrides.get("cluster_size") is not None:
            overrides.setdefault("num_clusters", None)
        return dataclasses.replace(self, **overrides)

    def describe(self) -> str:
        """The fields that matter most, in a line to print."""
        clusters = (
            f"{self.num_clusters} clusters a block"
            if self.num_clusters
            else f"clusters of {self.cluster_size or DEFAULT_CLUSTER_SIZE} keys"
        )
        leaks = self.summaries == "tilted" and self.query_centroids == "own"
        warning = ", own query centroids (in causal attention later tokens leak into earlier ones)"
        retrieved = f"{self.num_retrieved} retrieved"
        if self.num_retrieved and self.retrieval_threshold:
            retrieved = f"up to {retrieved} at threshold {self.retrieval_threshold:g}"
        return (
            f"{self.hierarchy} blocks from {self.local_block} tokens, {clusters}, {self.summaries} "
            f"summaries, {self.multipole}, {retrieved}"
            f"{warning if leaks else ''}"
        )

    def clusters_for(self, length: int) -> int:
        """Number of clusters for a block of `length` tokens."""
        if self.num_clusters is not None:
            return min(self.num_clusters, length)
        return math.ceil(length / (self.cluster_size or DEFAULT_CLUSTER_SIZE))

    def capacity_for(self, length: int) -> int:
        """Largest number of keys in one cluster of a block of `length` keys."""
        if self.cluster_cap is None:
            return length
        return min(length, math.ceil(self.cluster_cap * length / self.clusters_for(length)))

    def layer_indices(self, num_layers: int) -> list[int]:
        """The layers that use MuSe in a model of `num_layers`, counted from 0, in ascending order.

        Raises:
            ValueError: `layers` names a layer that the model does not have, or the same one twice.
        """
        if self.layers is None:
            return list(range(num_layers))
        indices = []
        for index in self.layers:
            if not -num_layers <= index < num_layers:
                self._refuse(
                    "layers",
                    f"layer {index} is out of range for a model of {num_layers} layers (0 to "
                    f"{num_layers - 1}, or -{num_layers} to -1)",
                )
            indices.append(index % num_layers)
        if len(set(indices)) < len(indices):
            self._refuse("layers", f"names a layer of a model of {num_layers} layers twice")
        return sorted(indices)

    def for_layer(self, layer_idx: int, num_layers: int) -> "MuseConfig | None":
        """The config of one layer with its overrides applied, or None where the layer attends exactly."""
        if layer_idx not in self.layer_indices(num_layers):
            return None
        overrides = {}
        if isinstance(self.layers, dict):
            overrides = next(o for index, o in self.layers.items() if index % num_layers == layer_idx)
        return self.replace(layers=None, **overrides)

    def _refuse(self, field: str, rule: str) -> None:
        raise ValueError(f"MuseConfig.{field}={getattr(self, field)!r}: {rule}")

    def _check_integer(self, field: str, smallest: int) -> None:
        value = getattr(self, field)
        if value is None and field in ("num_clusters", "cluster_size", "min_length"):
            return
        if not _is_integer(value):
            raise TypeError(f"MuseConfig.{field}={value!r}: must be an integer")
        object.__setattr__(self, field, int(value))  # NumPy's integers are not JSON
        if value < smallest:
            self._refuse(field, f"must be at least {smallest}")

    def _check_number(self, field: str) -> None:
        value = getattr(self, field)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"MuseConfig.{field}={value!r}: must be a number")

    def _check_combinations(self) -> None:
        if self.num_clusters is not None and self.cluster_size is not None:
            self._refuse("num_clusters", f"excludes cluster_size={self.cluster_size}; give one of the two")
        for field in ("num_clusters", "cluster_size"):
            if (getattr(self, field) or 0) > self.local_block:
                self._refuse(field, f"must be at most local_block={self.local_block}, the smallest far block")
        if self.multipole == "dipole" and self.summaries == "plain":
            self._refuse("multipole", 'needs summaries="tilted": the dipole corrects a tilted expansion')
        if self.summaries == "plain" and self.query_centroids == "own":
            self._refuse("query_centroids", 'needs summaries="tilted": plain ones have no query centroids')
        if self.summaries == "tilted" and self.query_centroids == "own" and self.hierarchy == "flat":
            self._refuse("query_centroids", 'needs hierarchy="dyadic", where a far block has one query block')

    def _checked_layers(self) -> list[int] | dict[int, dict[str, Any]] | None:
        if self.layers is None:
            return None
        if isinstance(self.layers, Mapping):
            return {_layer_index(index): self._checked_overrides(index) for index in self.layers}
        if isinstance(self.layers, (list, tuple, range, set)):
            return [_layer_index(index) for index in self.layers]
        raise TypeError(
            f"MuseConfig.layers={self.layers!r}: must be None, a list of layer indices, or a mapping from "
            "layer index to overrides"
        )

    def _checked_overrides(self, index: int) -> dict[str, Any]:
        overrides = self.layers[index]
        if not isinstance(overrides, Mapping) or "layers" in overrides:
            raise TypeError(
                f"MuseConfig.layers[{index}]={overrides!r}: must map fields other than 'layers' to values"
            )
        names = (field.name for field in dataclasses.fields(self))
        own = {name: getattr(self, name) for name in names if name != "layers"}
        for counted, other in (("num_clusters", "cluster_size"), ("cluster_size", "num_clusters")):
            if overrides.get(counted) is not None and other not in overrides:
                own[other] = None
        try:
            MuseConfig.from_dict(own | dict(overrides))
        except (TypeError, ValueError) as error:
            raise type(error)(f"MuseConfig.layers[{index}]: {error}") from None
        return dict(overrides)


def _layer_index(value: Any) -> int:
    if isinstance(value, str) and value.removeprefix("-").isdecimal():  # JSON object keys are strings
        return int(value)
    if not _is_integer(value):
        raise TypeError(f"MuseConfig.layers: {value!r} is not a layer index")
    return int(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_config(config: Any) -> MuseConfig:
    """The config, if it is one."""
    if not isinstance(config, MuseConfig):
        raise TypeError(f"config must be a MuseConfig, got {type(config).__name__}; see MuseConfig.from_dict")
    return config
