"""MuSe attention with tilted summaries and without retrieval, forward and backward: the paper's setting."""

from functools import lru_cache

import torch
from muse_hf.kernels.capacity import members_with_capacity
from muse_hf.kernels.kmeans import Sorted, kmeans, sort_by_cluster
from muse_hf.kernels.point_sets import PointSet, PointSets, point_sets
from muse_hf.kernels.tilted_refinement import refine, refine_backward
from muse_hf.kernels.tilted_summaries import Summaries, summaries_backward, summarise

from muse_hf.config import MuseConfig


def triton_tilted_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    is_causal: bool,
    scale: float,
    config: MuseConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """MuSe attention with tilted summaries.

    Args:
        query: (B, H, Q, D) float16, bfloat16 or float32. key, value: (B, Hkv, K, D).

    Returns:
        Output (B, H, Q, D) and logsumexp (B, H, Q) float32.
    """
    tensors = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    return _Attend.apply(*tensors, scale, config)


@lru_cache(maxsize=32)
def acausal_sets(
    batch: int, num_keys: int, num_queries: int, key_clusters: int, query_clusters: int, capacity: int,
    device: torch.device,
) -> PointSets:  # fmt: skip
    """All keys and all queries of a row are a set each. Points are tokens of the batch."""
    keys = [
        PointSet(row, 0, num_keys, key_clusters, False, 0, num_keys, row * num_keys, capacity)
        for row in range(batch)
    ]
    queries = [
        PointSet(row, 0, num_queries, query_clusters, True, 0, num_queries, row * num_queries)
        for row in range(batch)
    ]
    return point_sets(keys, queries, device)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scale, config):
        batch, heads, num_queries, head_dim = query.shape
        num_keys = key.shape[2]
        sets = acausal_sets(
            batch, num_keys, num_queries, config.clusters_for(num_keys), config.clusters_for(num_queries),
            config.capacity_for(num_keys), query.device,
        )  # fmt: skip
        centroids = kmeans(query, key, sets, config.kmeans_iters)
        points = sort_by_cluster(query, key, sets, centroids)
        members, held = members_with_capacity(key, sets, centroids, points)
        summaries = summarise(key, value, sets, members, held, centroids, scale, config.multipole == "dipole")
        rows = query.new_empty(batch * num_queries, heads, head_dim).transpose(0, 1)
        lse = query.new_empty(heads, batch * num_queries, dtype=torch.float32)
        refine(query, sets, points, centroids, summaries, rows, lse, scale)
        output = rows.unflatten(1, (batch, num_queries)).transpose(0, 1)
        ctx.save_for_backward(query, key, value, output, lse, centroids, members, held, *points, *summaries)
        ctx.sets, ctx.scale = sets, scale
        row_lse = lse.unflatten(1, (batch, -1)).transpose(0, 1)
        ctx.mark_non_differentiable(row_lse)
        return output, row_lse

    @staticmethod
    def backward(ctx, grad, _):
        query, key, value, output, lse, centroids, members, held, *rest = ctx.saved_tensors
        points, summaries = Sorted(*rest[: len(Sorted._fields)]), Summaries(*rest[len(Sorted._fields) :])
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        grads = [
            tensor.new_empty(tensor.transpose(1, 2).shape).transpose(1, 2) for tensor in (query, key, value)
        ]
        rows = [tensor.transpose(0, 1).flatten(1, 2) for tensor in grads]
        summary_grads = refine_backward(
            query, grad, output, lse, lse, ctx.sets, points, centroids, summaries, rows[0], ctx.scale
        )
        summaries_backward(
            key, value, ctx.sets, members, held, centroids, ctx.scale, summaries, summary_grads, *rows[1:]
        )
        return *grads, None, None
