"""The Triton backend of the default setting: all stages in order, forward and backward."""

from collections.abc import Sequence
from itertools import chain

import torch
from muse_hf.kernels.clustering import PADDING, Clusters, cluster_keys
from muse_hf.kernels.common import shared_memory_of
from muse_hf.kernels.items import Items, list_items
from muse_hf.kernels.layout import Layout, count_clusters, layout_of
from muse_hf.kernels.local import local_forward
from muse_hf.kernels.local_backward import local_backward
from muse_hf.kernels.operators import (
    AttentionOp,
    addressable,
    reason_against_inputs,
    reason_against_local_blocks,
)
from muse_hf.kernels.refinement import num_words, refine
from muse_hf.kernels.refinement_backward import query_backward, summary_backward
from muse_hf.kernels.replay import fill, library_call
from muse_hf.kernels.retrieval import retrieve, retrieve_backward, shared_memory_for
from muse_hf.kernels.selection import MOST_RETRIEVED
from muse_hf.kernels.weight_terms import weight_terms

from muse_hf.config import MuseConfig


def reason_against(query: torch.Tensor, key: torch.Tensor, is_causal: bool, config: MuseConfig) -> str | None:
    """Why these kernels cannot serve a call, or None if they can. Shapes as in `triton_attention`."""
    if reason := reason_against_inputs(query) or reason_against_local_blocks(query):
        return reason
    if not is_causal or config.summaries != "plain" or config.hierarchy != "flat":
        return 'they serve causal attention with summaries="plain" and hierarchy="flat" so far'
    if config.num_retrieved > MOST_RETRIEVED:
        return f"num_retrieved={config.num_retrieved} is more than {MOST_RETRIEVED}"
    capacity = config.capacity_for(config.local_block)
    if query.is_cuda and shared_memory_for(query, capacity) > shared_memory_of(query.device):
        return f"clusters of up to {capacity} keys with head_dim {query.shape[3]} do not fit shared memory"
    return None


def triton_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    config: MuseConfig,
    sequences: Sequence[tuple[int, int]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal MuSe attention, plain summaries and flat hierarchy.

    Args:
        query: (B, H, N, D) float16, bfloat16 or float32. key, value: (B, Hkv, N, D).
        sequences: First token id (row * N + token) and length of each sequence, in ascending order; at least
            one is longer than `local_block`.

    Returns:
        Output (B, H, N, D) and logsumexp (B, H, N) float32, zero outside the sequences.
    """
    block = config.local_block
    query, key, value = (addressable(tensor, block) for tensor in (query, key, value))
    return OP(
        query, key, value, scale, [*chain.from_iterable(sequences)], block, config.clusters_for(block),
        config.capacity_for(block), config.kmeans_iters, config.num_retrieved, config.retrieval_threshold,
    )  # fmt: skip


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    sequences: Sequence[int],
    block: int,
    clusters_per_block: int,
    capacity: int,
    kmeans_iters: int,
    num_retrieved: int,
    threshold: float,
) -> list[torch.Tensor]:
    """Output, logsumexp, and what the backward pass needs; first the logsumexp as kernels index it.

    Args:
        sequences: First token id and length of each in turn.
    """
    batch, heads, length, head_dim = query.shape
    layout = layout_of(tuple(sequences), batch * length, block, clusters_per_block, query.device)
    clusters = cluster_keys(key, value, layout.key_start, block, clusters_per_block, capacity, kmeans_iters)
    local = local_forward(query, key, value, layout, scale, block)
    output = query.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    lse = query.new_empty(heads, batch * length, dtype=torch.float32)
    if layout.outside is not None:  # λ = ∞ makes all weights and so all gradients zero
        fill(output, 0)
        fill(lse, torch.inf)
    chosen = refine(query, clusters, layout, local, output, lse, scale, num_retrieved, threshold, block)
    items = list_items(chosen, layout, *clusters.count.shape, num_retrieved, block, clusters_per_block)
    retrieve(query, key, value, clusters, items, output, lse, scale)
    row_lse = query.new_empty(batch, heads, length, dtype=torch.float32)
    _write_by_row(lse, row_lse, layout)
    return [output, row_lse, lse, chosen, *items, *clusters]


@library_call
def _write_by_row(lse: torch.Tensor, row_lse: torch.Tensor, layout: Layout) -> tuple[()]:
    """(H, B * N) to (B, H, N), 0 outside the sequences."""
    batch, heads, length = row_lse.shape
    row_lse.copy_(lse.view(heads, batch, length).transpose(0, 1))
    if layout.outside is not None:
        row_lse.masked_fill_(layout.outside.view(batch, 1, length), 0)
    return ()


def fake(
    query, key, value, scale, sequences, block, clusters_per_block, capacity, iters, num_retrieved, threshold
):
    batch, heads, length, head_dim = query.shape
    kv_heads, tokens = key.shape[1], batch * length
    num_clusters, max_seen = count_clusters(sequences, block, clusters_per_block)
    num_items = heads // kv_heads * tokens * num_retrieved
    rows = kv_heads * num_clusters + PADDING

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return query.new_empty(shape, dtype=dtype)

    return [
        new(batch, length, heads, head_dim, dtype=query.dtype).transpose(1, 2),
        new(batch, heads, length, dtype=torch.float32),
        new(heads, tokens, dtype=torch.float32),
        new(heads, num_words(max_seen, num_retrieved), tokens),
        new(kv_heads, num_items),
        new(kv_heads, num_clusters + 1),
        new(heads, tokens, dtype=torch.uint8),
        new(kv_heads, num_clusters, capacity),
        new(kv_heads, num_clusters),
        new(rows, dtype=torch.float32),
        new(rows, head_dim, dtype=query.dtype),
        new(rows, head_dim, dtype=query.dtype),
        new(rows, head_dim, dtype=torch.float32 if query.dtype == torch.float32 else torch.bfloat16),
    ]


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    saved: list[torch.Tensor],
    scale: float,
    sequences: Sequence[int],
    block: int,
    clusters_per_block: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value. `saved` is what `forward` returns behind output and logsumexp."""
    lse, chosen, *rest = saved
    items, clusters = Items(*rest[:3]), Clusters(*rest[3:])
    tokens = query.shape[0] * query.shape[2]
    layout = layout_of(tuple(sequences), tokens, block, clusters_per_block, query.device)
    grad = addressable(grad, block)
    delta, terms, summands = weight_terms(output, grad, lse, scale)
    grads = local_backward(grad, query, key, value, terms, summands, layout, scale, block)
    grad_means = summary_backward(
        query, clusters, layout, chosen, grad, terms, summands, scale, block, clusters_per_block
    )
    query_backward(query, clusters, layout, chosen, grad, lse, delta, grads[0], scale, block)
    retrieve_backward(query, key, value, grad, terms, summands, clusters, items, grad_means, grads, scale)
    return grads


OP = AttentionOp("muse_hf::flat_attention", forward, fake, backward, num_kept=4)
