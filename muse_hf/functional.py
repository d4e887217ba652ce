"""`muse_attention`: the functional op, its argument checks and the choice of backend."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from muse_hf.config import MuseConfig, check_config
from muse_hf.reference.attention import reference_attention
from muse_hf.segments import Segments, map_segments

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def muse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    is_causal: bool,
    scale: float | None = None,
    config: MuseConfig | None = None,
    segments: Segments | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Multipole Semantic Attention.

    Sequences of at most `config.local_block` keys are attended exactly. A NaN in an input may spread to the
    whole of its own local block and to all later ones; never to earlier blocks, other rows or segments.

    Args:
        query: (B, H, Q, D) float16, bfloat16, float32 or float64.
        key, value: (B, Hkv, K, D) of the same dtype and device; H must be a multiple of Hkv, and query head
            h uses key/value head h // (H / Hkv). K = Q if causal.
        is_causal: Whether token t attends only to tokens up to t.
        scale: Factor on the logits, 1 / sqrt(D) by default.
        config: The approximation, `MuseConfig()` by default. Its `layers` is not looked at.
        segments: Where the sequences of a padded or packed batch lie. Tokens outside get zeros.
        return_lse: Also return the logsumexp of the logits, through which no gradient flows.

    Returns:
        The output (B, H, Q, D) in the dtype of the inputs, and with `return_lse` the logsumexp (B, H, Q) in
        the dtype the reference computes in: float32, or float64 for float64 inputs. It is zero outside the
        segments.

    Raises:
        TypeError: An input is not a tensor of a supported dtype, or dtypes differ outside autocast.
        ValueError: Shapes, devices or segments do not fit together.
        NotImplementedError: `backend="triton"` was asked for and the kernels cannot serve the call.
    """
    config = MuseConfig() if config is None else check_config(config)
    query, key, value = _checked(query, key, value, is_causal, scale, segments)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)

    if kernels := _kernels(query, key, is_causal, config, segments):
        sequences = _sequences(query, segments) if is_causal else ()
        output, lse = kernels(query, key, value, scale=scale, config=config, sequences=sequences)
        return (output, lse) if return_lse else output

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
        return _reference(query, key, value, is_causal, scale, config)

    if segments is None:
        output, lse = attend(query, key, value)
    else:
        output, lse = map_segments(attend, query, key, value, segments)
    return (output, lse) if return_lse else output


def exact_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    is_causal: bool,
    scale: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
) -> torch.Tensor:
    """Exact softmax attention with PyTorch's kernels, without a mask tensor for padding or packing.

    Arguments, result and errors as in `muse_attention`; `dropout` is the probability of dropping a weight.
    """
    query, key, value = _checked(query, key, value, is_causal, scale, segments)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor]:
        grouped = query.shape[1] != key.shape[1]
        return (
            scaled_dot_product_attention(
                query, key, value, dropout_p=dropout, is_causal=is_causal, scale=scale, enable_gqa=grouped
            ),
        )

    if segments is None:
        return attend(query, key, value)[0]
    return map_segments(attend, query, key, value, segments)[0]


def _kernels(
    query: torch.Tensor, key: torch.Tensor, is_causal: bool, config: MuseConfig, segments: Segments | None
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """The Triton op that serves a call, by the backend that is asked for and what it can do, if any."""
    if config.backend == "reference" or (config.backend == "auto" and not query.is_cuda):
        return None
    longest = key.shape[2] if segments is None else max(segments.lengths, default=0)
    if longest <= config.local_block:
        op, reason = None, "sequences no longer than local_block are exact attention"
    elif not is_causal and segments is not None:
        op, reason = None, "they serve padded and packed batches in causal attention only"
    else:
        op, reason = op_and_reason_against(query, key, is_causal, config)
    if reason and config.backend == "triton":
        raise NotImplementedError(
            f'MuseConfig.backend="triton" cannot be obeyed: {reason}; use "auto" or "reference"'
        )
    return None if reason else op


def op_and_reason_against(
    query: torch.Tensor, key: torch.Tensor, is_causal: bool, config: MuseConfig
) -> tuple[Callable[..., tuple[torch.Tensor, torch.Tensor]] | None, str | None]:
    """The Triton op for a config, None without Triton, and what keeps it from serving a call, if anything."""
    try:  # Triton is there on Linux only, and only needed here
        from muse_hf.kernels import attention, tilted_attention
    except ImportError as error:
        return None, f"Triton could not be imported ({error})"
    if config.summaries == "tilted":
        op, reason_against = tilted_attention.triton_tilted_attention, tilted_attention.reason_against
    else:
        op, reason_against = attention.triton_attention, attention.reason_against
    return op, reason_against(query, key, is_causal, config)


def _sequences(query: torch.Tensor, segments: Segments | None) -> tuple[tuple[int, int], ...]:
    """First token, counted over the whole batch, and length of each sequence, in ascending order."""
    batch, _, length, _ = query.shape
    if segments is None:
        return tuple((row * length, length) for row in range(batch))
    starts = (row * length + start for row, start in zip(segments.rows, segments.starts))
    return tuple(sorted(zip(starts, segments.lengths)))


@torch.compiler.disable  # it is not meant to be traced: a compiled model calls it between two graphs
def _reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    scale: float,
    config: MuseConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One attention per key/value head, with the query heads that share it side by side."""
    batch, kv_heads = key.shape[:2]
    computed = torch.promote_types(query.dtype, torch.float32)
    folded_query = (query.to(computed) * scale).unflatten(1, (kv_heads, -1)).flatten(0, 1)
    folded_key, folded_value = (tensor.to(computed).flatten(0, 1) for tensor in (key, value))
    with torch.autocast(query.device.type, enabled=False):
        output, lse = reference_attention(
            folded_query, folded_key, folded_value, is_causal=is_causal, config=config
        )
    output, lse = (tensor.unflatten(0, (batch, kv_heads)).flatten(1, 2) for tensor in (output, lse))
    return output.to(query.dtype), lse


def _checked(
    query: Any, key: Any, value: Any, is_causal: Any, scale: Any, segments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inputs, if they fit together; under autocast in its dtype, as PyTorch's attention does it."""
    named = {"query": query, "key": key, "value": value}
    _check_types(named, is_causal, scale, segments)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        named = {
            name: tensor if tensor.dtype == torch.float64 else tensor.to(dtype)
            for name, tensor in named.items()
        }
    _check_shapes(named, is_causal, segments)
    return tuple(named.values())


def _check_types(named: dict[str, Any], is_causal: Any, scale: Any, segments: Any) -> None:
    for name, tensor in named.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} has dtype {tensor.dtype}; supported are {_DTYPES}")
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and holds no numbers to cluster")
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be True or False, got {is_causal!r}")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, numbers.Real)):
        raise TypeError(f"scale must be a number, got {scale!r}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale!r}")
    if segments is not None and not isinstance(segments, Segments):
        raise TypeError(f"segments must be a muse_hf.Segments, got {type(segments).__name__}")


def _check_shapes(named: dict[str, torch.Tensor], is_causal: bool, segments: Segments | None) -> None:
    query, key, value = named.values()
    for name, tensor in named.items():
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have shape (batch, heads, tokens, head_dim), got {_shape(tensor)}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype} but query has {query.dtype}; cast one of them")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device} but query is on {query.device}")
        if not tensor.numel():
            raise ValueError(f"{name} is empty: shape {_shape(tensor)}")
    if key.shape != value.shape:
        raise ValueError(f"key {_shape(key)} and value {_shape(value)} must have the same shape")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"query {_shape(query)} and key {_shape(key)} differ in batch size or head_dim")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads are not a multiple of {key.shape[1]} key/value heads")
    if query.shape[2] != key.shape[2] and (is_causal or segments is not None):
        what = "causal attention" if is_causal else "attention with segments"
        raise ValueError(f"{what} needs as many queries as keys, got {query.shape[2]} and {key.shape[2]}")
    if segments is not None and segments.shape != (query.shape[0], query.shape[2]):
        raise ValueError(
            f"segments are for a batch of shape {segments.shape}, but query has {query.shape[0]} rows of "
            f"{query.shape[2]} tokens"
        )


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
