"""What is benchmarked: shapes and MuSe settings, presets of them, and the tensors that are attended to."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from muse_hf import MuseConfig

# Structured inputs: a query prefers the keys of its own topic by this many nats over those of other topics.
TOPICS, PREFERENCE = 64, 6.0


@dataclass(frozen=True)
class Shape:
    """Queries (batch, heads, seq_len, head_dim); keys and values the same with kv_heads."""

    batch: int
    heads: int
    kv_heads: int
    seq_len: int
    head_dim: int
    causal: bool = True

    def text(self, tokens: str) -> str:
        """The shape in one word and its kind, with `tokens` in place of the number of tokens."""
        heads = str(self.heads) if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        return f"{self.batch}x{heads}x{tokens}x{self.head_dim} {'causal' if self.causal else 'acausal'}"

    def __str__(self) -> str:
        return self.text(str(self.seq_len))


@dataclass(frozen=True)
class Case:
    """A shape and the setting in which MuSe attends to it."""

    shape: Shape
    config: MuseConfig


def _cases(shape: Shape, lengths: list[int], *configs: MuseConfig) -> list[Case]:
    return [
        Case(dataclasses.replace(shape, seq_len=length), config) for length in lengths for config in configs
    ]


_DEFAULT = MuseConfig()
# How many clusters pass the threshold is a matter of the inputs, but never more than without one.
_ALL_RETRIEVED = _DEFAULT.replace(retrieval_threshold=0.0)
_PAPER = MuseConfig.paper(local_block=1024)
_PAPER_LONG = MuseConfig.paper(local_block=4096)
_ONE_LAYER = Shape(1, 16, 16, 65536, 64)
_LONGEST = Shape(1, 8, 8, 262144, 64)
_SMALL, _SMALL_DEFAULT = Shape(1, 2, 2, 8192, 64), _ALL_RETRIEVED.replace(local_block=256)

PRESETS = {
    # The shapes for which the project states what it wants to reach.
    "table": [
        Case(Shape(16, 8, 8, 8192, 64, causal=False), _PAPER),
        Case(Shape(16, 8, 8, 8192, 128, causal=False), _PAPER),
        Case(Shape(128, 8, 8, 1024, 64, causal=False), _PAPER.replace(local_block=512, num_clusters=8)),
        Case(_ONE_LAYER, _PAPER_LONG),
        Case(Shape(1, 8, 8, 16384, 64), _PAPER.replace(local_block=2048)),
        *_cases(_ONE_LAYER, [65536, 16384], _DEFAULT, _ALL_RETRIEVED),
        *_cases(Shape(1, 32, 8, 65536, 64), [65536], _DEFAULT, _ALL_RETRIEVED),
        *_cases(Shape(1, 16, 16, 65536, 128), [65536], _DEFAULT, _ALL_RETRIEVED),
        *_cases(_LONGEST, [262144], _PAPER_LONG, _DEFAULT, _ALL_RETRIEVED),
    ],
    "lengths": _cases(_LONGEST, [1024 << doubling for doubling in range(9)], _DEFAULT, _PAPER),
    "budgets": _cases(
        _ONE_LAYER, [65536], *(_ALL_RETRIEVED.replace(num_retrieved=count) for count in (4, 8, 12, 24, 48))
    ),
    # For the reference on a CPU.
    "small": [
        *_cases(_SMALL, [2048, 4096, 8192], _SMALL_DEFAULT),
        *_cases(_SMALL, [2048, 4096], _PAPER.replace(local_block=512)),
        *_cases(_SMALL, [4096], *(_SMALL_DEFAULT.replace(num_retrieved=count) for count in (4, 24))),
    ],
}


class Inputs:
    """Query, key, value and the gradient of the output, stored (B, N, H, D) as models do, as (B, H, N, D).

    Args:
        source: `"normal"`: independent standard normal numbers, the worst case for any clustering because
            there are no clusters. `"clustered"`: see `_clustered`. Else a safetensors file.
        dtype, device: Of the tensors.
    """

    def __init__(self, source: str, dtype: torch.dtype, device: torch.device):
        self.source, self.dtype, self.device = source, dtype, device

    def tensors(self, shape: Shape) -> list[torch.Tensor]:
        """Query, key, value and gradient of a shape; the same shape gets the same numbers on one device."""
        generator = torch.Generator(self.device).manual_seed(0)
        if self.source == "normal":
            tensors = [_normal(shape, heads, generator) for heads in (shape.heads, *2 * [shape.kv_heads])]
        elif self.source == "clustered":
            tensors = _clustered(shape, generator)
        else:
            with safe_open(self.source, framework="pt", device=str(self.device)) as file:
                tensors = [file.get_slice(name)[:, :, : shape.seq_len] for name in ("query", "key", "value")]
        tensors.append(_normal(shape, shape.heads, generator))
        return [_as_in_models(tensor.to(self.dtype)) for tensor in tensors]


def file_shape(path: Path, causal: bool) -> Shape:
    """The shape of the query, key and value in a safetensors file.

    Raises:
        ValueError: The file holds something else; the message says what.
    """
    with safe_open(path, framework="pt") as file:
        if missing := {"query", "key", "value"} - set(file.keys()):
            raise ValueError(f"it holds no {' and no '.join(sorted(missing))}")
        query, key, value = (tuple(file.get_slice(name).get_shape()) for name in ("query", "key", "value"))
    if len(query) != 4 or len(key) != 4:
        raise ValueError(f"its tensors must be (batch, heads, tokens, head_dim), query is {query}, key {key}")
    shape = Shape(*query[:2], key[1], *query[2:], causal=causal)
    if not key == value == (shape.batch, shape.kv_heads, shape.seq_len, shape.head_dim):
        raise ValueError(f"its query {query}, key {key} and value {value} do not fit together")
    if 0 in query + key or shape.heads % shape.kv_heads:
        raise ValueError(f"its {shape.heads} query heads are no multiple of {shape.kv_heads} key/value heads")
    return shape


def _normal(shape: Shape, heads: int, generator: torch.Generator) -> torch.Tensor:
    size = (shape.batch, shape.seq_len, heads, shape.head_dim)
    return torch.randn(size, generator=generator, device=generator.device).transpose(1, 2)


def _clustered(shape: Shape, generator: torch.Generator) -> list[torch.Tensor]:
    """Queries and keys around directions that they share, so that attention is peaked.

    Every key/value head has TOPICS random directions. Each token draws, for every head, the topic of its
    query, and that of its key and value; all are the topic's vector plus standard normal noise. The vectors
    are as long as it takes for the logit of a query and a key to be PREFERENCE nats higher if they share the
    topic.
    """
    device = generator.device
    length = (PREFERENCE * shape.head_dim**0.5) ** 0.5
    size = (2, shape.kv_heads, TOPICS, shape.head_dim)
    directions = torch.randn(size, generator=generator, device=device)
    of_keys, of_values = length * torch.nn.functional.normalize(directions, dim=-1)

    def around(vectors: torch.Tensor, topics: torch.Tensor) -> torch.Tensor:
        heads = torch.arange(topics.shape[2], device=device)
        tokens = vectors[heads // (topics.shape[2] // shape.kv_heads), topics].transpose(1, 2)
        return tokens + _normal(shape, topics.shape[2], generator)

    def draw(heads: int) -> torch.Tensor:
        size = (shape.batch, shape.seq_len, heads)
        return torch.randint(TOPICS, size, generator=generator, device=device)

    of_query, of_key = draw(shape.heads), draw(shape.kv_heads)
    return [around(of_keys, of_query), around(of_keys, of_key), around(of_values, of_key)]


def _as_in_models(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor (B, H, N, D) with its heads side by side in memory."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)
