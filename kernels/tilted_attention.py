"""MuSe attention with tilted summaries and without retrieval, the paper's setting: forward and backward.

Acausal, all queries and keys of a batch row meet at once. Causal, they meet in the blocks of dyadic levels,
and exact local attention is joined with them.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from muse_hf.kernels.capacity import members_with_capacity
from muse_hf.kernels.common import kept_on_device
from muse_hf.kernels.kmeans import Groups, kmeans, sort_by_cluster
from muse_hf.kernels.levels import Levels, dyadic_levels, dyadic_sets, merge_levels, num_levels
from muse_hf.kernels.local import local_forward
from muse_hf.kernels.local_backward import local_backward
from muse_hf.kernels.operators import (
    AttentionOp,
    addressable,
    laid_out_like,
    reason_against_inputs,
    reason_against_local_blocks,
)
from muse_hf.kernels.point_sets import PointSet, PointSets, point_sets, sizes_of
from muse_hf.kernels.replay import copy
from muse_hf.kernels.tilted_refinement import refine, refine_backward
from muse_hf.kernels.tilted_summaries import Summaries, summarise
from muse_hf.kernels.tilted_summaries_backward import summaries_backward
from muse_hf.kernels.weight_terms import weight_terms

from muse_hf.config import MuseConfig


def reason_against(query: torch.Tensor, key: torch.Tensor, is_causal: bool, config: MuseConfig) -> str | None:
    """Why these kernels cannot serve a call, or None if they can. Shapes as in `triton_tilted_attention`."""
    if config.summaries != "tilted" or config.num_retrieved:
        return 'they serve summaries="tilted" with num_retrieved=0'
    if is_causal and config.hierarchy != "dyadic":
        return 'they serve causal attention with summaries="tilted" and hierarchy="dyadic" only'
    return reason_against_inputs(query) or (reason_against_local_blocks(query) if is_causal else None)


def triton_tilted_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    config: MuseConfig,
    sequences: Sequence[tuple[int, int]] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """MuSe attention with tilted summaries.

    Args:
        query: (B, H, Q, D) float16, bfloat16 or float32. key, value: (B, Hkv, K, D).
        sequences: For causal attention, first token id (row * N + token) and length of each sequence, in
            ascending order; at least one is longer than `local_block`. None of them: acausal attention.

    Returns:
        Output (B, H, Q, D) and logsumexp (B, H, Q) float32, zero outside the sequences.
    """
    query, key, value = (addressable(tensor, config.local_block) for tensor in (query, key, value))
    if sequences:
        longest = max(length for _, length in sequences)
        blocks = [config.local_block << level for level in range(num_levels(longest, config.local_block))]
    else:
        blocks = [key.shape[2], query.shape[2]]
    capped = config.cluster_cap is not None
    return OP(
        query, key, value, scale, [*chain.from_iterable(sequences)], config.local_block,
        [config.clusters_for(block) for block in blocks],
        [config.capacity_for(block) if capped else 0 for block in blocks],
        config.query_centroids == "own", config.kmeans_iters, config.multipole == "dipole",
    )  # fmt: skip


def acausal_sets(
    batch: int, num_keys: int, num_queries: int, clusters: tuple[int, ...], capacity: int
) -> tuple[list[PointSet], list[PointSet]]:
    """All keys and all queries of a row are a set each. Points are tokens of the batch."""
    keys = [
        PointSet(row, 0, num_keys, clusters[0], False, 0, num_keys, row * num_keys, capacity)
        for row in range(batch)
    ]
    queries = [
        PointSet(row, 0, num_queries, clusters[1], True, 0, num_queries, row * num_queries)
        for row in range(batch)
    ]
    return keys, queries


@kept_on_device
def _acausal_point_sets(*arguments, device: torch.device) -> PointSets:
    return point_sets(*acausal_sets(*arguments), device)


def _levels(
    query: torch.Tensor, key: torch.Tensor, sequences: Sequence[int], block: int, clusters: Sequence[int],
    capacities: Sequence[int], own: bool,
) -> tuple[PointSets, Levels | None]:  # fmt: skip
    """All point sets, and for causal attention the levels they belong to. Arguments as in `forward`."""
    batch, _, length, _ = query.shape
    if not sequences:
        sizes = (batch, key.shape[2], length, tuple(clusters), capacities[0])
        return _acausal_point_sets(*sizes, device=query.device), None
    levels = dyadic_levels(
        tuple(sequences), batch * length, length, block, tuple(clusters), tuple(capacities), own, query.device
    )
    return levels.sets, levels


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    sequences: Sequence[int],
    block: int,
    clusters: Sequence[int],
    capacities: Sequence[int],
    own: bool,
    kmeans_iters: int,
    dipole: bool,
) -> list[torch.Tensor]:
    """Output, logsumexp, and what the backward pass needs; first the logsumexp as kernels index it.

    Args:
        sequences: First token id and length of each in turn; none for acausal attention.
        block: Tokens in a block of exact attention.
        clusters, capacities: Of causal attention for each size of blocks, smallest first; of acausal
            attention for the keys and for the queries. A capacity of 0 is no limit.
        own: Whether causal query centroids are made of the attending block.
    """
    batch, heads, length, head_dim = query.shape
    sets, levels = _levels(query, key, sequences, block, clusters, capacities, own)
    centroids = kmeans(query, key, sets, kmeans_iters)
    groups, label, near = sort_by_cluster(query, key, sets, centroids, closeness=sets.capped)
    members = members_with_capacity(key, sets, centroids, groups, label, near) if sets.capped else groups
    summaries = summarise(key, value, sets, members, centroids, scale, dipole)
    part_lse = query.new_empty(heads, sets.num_query_points, dtype=torch.float32)
    if levels is None:
        output = query.new_empty(batch, length, heads, head_dim).transpose(1, 2)
        refine(query, sets, groups, centroids, summaries, _rows_of(output), part_lse, scale)
        row_lse = part_lse.new_empty(batch, heads, length)
        copy(part_lse.view(heads, batch, length).transpose(0, 1), row_lse)
        results = [output, row_lse, part_lse]
    else:
        parts = query.new_empty(heads, sets.num_query_points, head_dim)
        refine(query, sets, groups, centroids, summaries, parts, part_lse, scale)
        local = local_forward(query, key, value, levels.layout, scale, block)
        results = [*merge_levels(levels, block, local, parts, part_lse), part_lse]
    of_members = (members.order, members.count) if sets.capped else ()
    return [*results, centroids, *groups, *of_members, *(x for x in summaries if x is not None)]


def fake(query, key, value, scale, sequences, block, clusters, capacities, own, kmeans_iters, dipole):
    batch, heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    if sequences:
        sets = dyadic_sets(tuple(sequences), length, block, tuple(clusters), tuple(capacities), own)
    else:
        sets = acausal_sets(batch, key.shape[2], length, clusters, capacities[0])
    sizes = sizes_of(*sets)

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return query.new_empty(shape, dtype=dtype)

    def log(*shape: int) -> torch.Tensor:
        return new(*shape, dtype=torch.float32)

    def vectors(*shape: int) -> torch.Tensor:
        return new(*shape, head_dim, dtype=query.dtype)

    results = [vectors(batch, length, heads).transpose(1, 2), log(batch, heads, length)]
    results += [log(heads, batch * length)]
    results += [log(heads, sizes.num_query_points)] if sequences else []
    results += [vectors(heads, sizes.num_rows), new(heads, sizes.num_points)]
    results += [new(heads, sizes.num_rows), new(heads, sizes.num_rows)]
    if sizes.capped:
        results += [new(kv_heads, sizes.num_slots), new(kv_heads, sizes.num_key_rows)]
    results += [log(heads, sizes.num_pairs)]
    results += [vectors(heads, sizes.num_pairs), vectors(heads, sizes.num_pairs)]
    if dipole:
        results += [vectors(kv_heads, sizes.num_key_rows, head_dim)]
        results += [vectors(2, kv_heads, sizes.num_key_rows, 2)]
        results += [vectors(heads, sizes.num_query_rows, head_dim), log(heads, sizes.num_query_rows)]
    return results


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
    clusters: Sequence[int],
    capacities: Sequence[int],
    own: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value. `saved` is what `forward` returns behind output and logsumexp."""
    sets, levels = _levels(query, key, sequences, block, clusters, capacities, own)
    lse, part_lse, *saved = saved if sequences else (saved[0], *saved)
    centroids, *saved = saved
    groups, saved = Groups(*saved[:3]), saved[3:]
    members = groups
    if sets.capped:
        members, saved = Groups(saved[0], sets.first_slot, saved[1]), saved[2:]
    summaries = Summaries(*saved)
    grad = addressable(grad, block)
    tensors = (query, key, value)
    if levels is None:
        grads = [tensor.new_empty(tensor.transpose(1, 2).shape).transpose(1, 2) for tensor in tensors]
        rows = [_rows_of(tensor) for tensor in grads]
    else:
        num_points = (sets.num_query_points, sets.num_key_points, sets.num_key_points)
        rows = [t.new_empty(t.shape[1], points, t.shape[3]) for t, points in zip(tensors, num_points)]
    _, terms, summands = weight_terms(output, grad, lse, None if levels is None else scale)
    summary_grads = refine_backward(
        query, grad, terms, part_lse, sets, groups, centroids, summaries, rows[0], scale
    )
    summaries_backward(key, value, sets, members, centroids, scale, summaries, summary_grads, *rows[1:])
    if levels is None:
        return tuple(laid_out_like(share, tensor) for share, tensor in zip(grads, tensors))
    return local_backward(
        grad, query, key, value, terms, summands, levels.layout, scale, block,
        (levels.query_parts, rows[0]), (levels.key_parts, *rows[1:]),
    )  # fmt: skip


def _rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """(B, H, N, D) as a view (H, B * N, D)."""
    return tensor.transpose(0, 1).flatten(1, 2)


OP = AttentionOp("muse_hf::tilted_attention", forward, fake, backward, num_kept=6)
