"""The Transformers adapter: the attention function and the mask function behind the name "muse"."""

import functools
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
from transformers.utils import logging

from muse_hf.functional import exact_attention, muse_attention
from muse_hf.routing import (
    CROSSOVER,
    StoredPolicy,
    check_dropout,
    check_family,
    check_options,
    is_cross_attention,
    layer_config,
    reason_for_exact,
)
from muse_hf.segments import Segments

NAME = "muse"

logger = logging.get_logger(__name__)

# Segments by the tensor they were read from, as long as it lives, and its version then.
_documents: MutableMapping[torch.Tensor, tuple[int, Segments]] = WeakTensorKeyDictionary()


def register() -> None:
    """Make `attn_implementation="muse"` and `config.muse` known to Transformers."""
    AttentionInterface.register(NAME, muse_attention_forward)
    AttentionMaskInterface.register(NAME, muse_mask)
    PreTrainedConfig.muse = StoredPolicy()
    PreTrainedModel._check_and_adjust_attn_implementation = _check_name(
        PreTrainedModel._check_and_adjust_attn_implementation
    )


def _check_name(check: Callable[..., str]) -> Callable[..., str]:
    """Add our rules to the place where Transformers accepts the name of an attention implementation.

    A family that is not supported is refused there, before it ignores the name or breaks on it. And the name
    is kept in the config while it is in force: Transformers does not save it of itself.
    """

    @functools.wraps(check)
    def checked(model: PreTrainedModel, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        if attn_implementation == NAME:
            check_family(model.config)
        accepted = check(model, attn_implementation, *args, **kwargs)
        if accepted == NAME:
            model.config.attn_implementation = NAME
        elif vars(model.config).get("attn_implementation") == NAME:
            del model.config.attn_implementation
        return accepted

    return checked


@torch.compiler.disable  # looks the policy up at every call, which patching may have changed
def muse_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | Segments | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, as Transformers calls it: MuSe, or exact by the rules in `muse_hf.routing`.

    Args:
        module: The attention module, with `config` and `layer_idx`.
        query: (B, H, Q, D). key, value: (B, Hkv, K, D).
        attention_mask: What `muse_mask` returned, or a 4D mask of the caller's.
        scaling: Factor on the logits, 1 / sqrt(D) if absent.
        is_causal: Overrides the module's own.

    Returns:
        Output (B, Q, H, D), and None in place of attention weights.

    Raises:
        UnsupportedError: The model or one of its options is not supported.
    """
    config = layer_config(module)
    if config is not None and not is_cross_attention(module):
        check_options(module, kwargs)
    if attention_mask is None and kwargs.get("cu_seq_lens_q") is not None:
        attention_mask = _segments_of_documents(kwargs["cu_seq_lens_q"])
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal

    reason = reason_for_exact(module, query, key, attention_mask, config)
    if reason is None:
        check_dropout(module, dropout)
        output = muse_attention(
            query, key, value, is_causal=causal, scale=scaling, config=config, segments=attention_mask
        )
        return output.transpose(1, 2).contiguous(), None
    if reason == "explicit mask":
        logger.warning_once(
            "A MuSe layer was given an explicit attention mask and attends exactly. To use MuSe pass a 2D "
            "padding mask, or position_ids that restart at each packed document."
        )
    if reason == "exact attention is faster":
        logger.warning_once(
            f"Sequences of {key.shape[2]} tokens attend exactly, which is faster than MuSe below "
            f"{CROSSOVER if config.min_length is None else config.min_length} tokens. "
            "MuseConfig(min_length=0) has MuSe used all the same."
        )
    if isinstance(attention_mask, Segments) and not is_cross_attention(module):
        output = exact_attention(
            query, key, value, is_causal=causal, scale=scaling, dropout=dropout, segments=attention_mask
        )
        return output.transpose(1, 2).contiguous(), None
    if isinstance(attention_mask, Segments):
        attention_mask = attention_mask.token_mask(query.device)[:, None, None]
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
    )


def _segments_of_documents(cu_seqlens: torch.Tensor) -> Segments:
    """`Segments.from_cu_seqlens`, which waits for the device, once for all layers."""
    if cu_seqlens.is_inference():  # whether it has changed cannot be told
        return Segments.from_cu_seqlens(cu_seqlens)
    version, segments = _documents.get(cu_seqlens, (None, None))
    if version != cu_seqlens._version:
        segments = Segments.from_cu_seqlens(cu_seqlens)
        _documents[cu_seqlens] = cu_seqlens._version, segments
    return segments


@torch.compiler.disable
def muse_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    config: Any = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | Segments | None:
    """The mask of a forward pass, as Transformers asks for it once for all layers.

    Whole sequences need no mask tensor: None stands for full rows and `Segments` for padded or packed ones.
    Everything else (a cache, a window, an overlay, padding with holes) gets the mask of "sdpa", which sends
    the layers to exact attention.

    Args:
        attention_mask: (B, K) True at tokens.
        mask_function: Says for indices (batch, head, query, key) whether the key is visible.
        local_size: Width of a sliding window or chunk.

    Raises:
        UnsupportedError: The model type is not supported.
    """
    if config is not None:
        check_family(config)
    whole = q_length == kv_length and isinstance(q_offset, int) and q_offset == 0 and kv_offset == 0
    if whole and local_size is None and not use_vmap:
        segments = _segments_of(mask_function, attention_mask, batch_size, q_length, device)
        if segments is not None:
            return None if segments.cover_everything else segments
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, local_size=local_size, use_vmap=use_vmap,
        device=device, **kwargs,
    )  # fmt: skip


def _segments_of(
    mask_function: Callable,
    attention_mask: torch.Tensor | None,
    batch_size: int,
    length: int,
    device: torch.device | str,
) -> Segments | None:
    """The segments that say the same as a mask function and a padding mask, or None if there are none."""
    if mask_function in (causal_mask_function, bidirectional_mask_function):
        if attention_mask is None:
            return Segments((batch_size, length), range(batch_size), [0] * batch_size, [length] * batch_size)
        if (
            attention_mask.ndim != 2 or attention_mask.shape[1] < length
        ):  # Transformers takes what is missing for padding
            return None
        segments = Segments.from_padding_mask(attention_mask[:, :length])
        has_holes = len(set(segments.rows)) < len(segments.rows)
        return None if has_holes else segments
    if attention_mask is not None:
        return None
    return _packed_segments(mask_function, batch_size, length, device)


def _packed_segments(
    mask_function: Callable, batch_size: int, length: int, device: torch.device | str
) -> Segments | None:
    """Segments of a causal mask over packed documents, read off N entries of it, and checked on 2 N more."""
    row = torch.arange(batch_size, device=device)[:, None]
    head = torch.zeros_like(row)
    token = torch.arange(length, device=device)[None]

    def visible(key: torch.Tensor) -> torch.Tensor:
        return mask_function(row, head, token, key).expand(batch_size, length)

    starts_here = ~visible((token - 1).clamp(min=0))
    starts_here[:, 0] = True
    start = torch.where(starts_here, token, 0).cummax(1).values
    future = visible((token + 1).clamp(max=length - 1))
    future[:, -1] = False
    if future.any() or not visible(start).all():  # an overlay, a window or chunks: not whole documents
        return None
    return Segments.from_ids(starts_here.cumsum(1))
