"""The Triton backend: all stages of MuSe attention in order, forward and backward."""

import torch
from muse_hf.kernels.clustering import Clusters, cluster_keys
from muse_hf.kernels.layout import Layout, whole_rows
from muse_hf.kernels.local import local_backward, local_forward
from muse_hf.kernels.refinement import merge_parts, output_delta, query_backward, summary_backward
from muse_hf.kernels.retrieval import Items, retrieve, retrieve_backward, sort_items
from muse_hf.kernels.selection import select

from muse_hf.config import MuseConfig

# Partial outputs of retrieval that exist at once. Key/value heads are worked through in parts of this size.
_PARTIAL_BYTES = 1 << 30


def triton_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float, config: MuseConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal MuSe attention of whole rows, plain summaries and flat hierarchy.

    Args:
        query: (B, H, N, D). key, value: (B, Hkv, N, D).

    Returns:
        Output (B, H, N, D) and logsumexp (B, H, N) float32.
    """
    return _Attend.apply(query, key, value, scale, config)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scale, config):
        block = config.local_block
        per_block = config.clusters_for(block)
        layout = whole_rows(query.shape[0], query.shape[2], block, per_block, query.device)
        local, local_lse = local_forward(query, key, value, layout, scale, block)
        clusters = cluster_keys(
            key, value, layout.key_start, block, per_block, config.capacity_for(block), config.kmeans_iters
        )
        output = torch.empty(
            query.shape[0],
            query.shape[2],
            query.shape[1],
            query.shape[3],
            dtype=query.dtype,
            device=query.device,
        ).transpose(1, 2)
        lse = torch.empty_like(local_lse)
        group_heads = query.shape[1] // key.shape[1]
        saved = []
        for heads, kv_heads in _parts(query, key, config.num_retrieved):
            chosen, choice, items = _choose(
                query, clusters, layout, heads, kv_heads, group_heads, scale, config
            )
            partial, partial_lse = retrieve(
                query, key, value, clusters, items, kv_heads, group_heads, scale, config.num_retrieved
            )
            merge_parts(
                query, clusters, layout, chosen, choice, partial, partial_lse, local, local_lse, output, lse,
                heads, group_heads, scale, block,
            )  # fmt: skip
            saved += [chosen, choice, *items]
        ctx.save_for_backward(query, key, value, output, lse, *clusters, *saved)
        ctx.scale, ctx.config, ctx.layout = scale, config, layout
        batch_lse = lse.unflatten(1, (query.shape[0], -1)).transpose(0, 1)
        ctx.mark_non_differentiable(batch_lse)
        return output, batch_lse

    @staticmethod
    def backward(ctx, grad, _):
        query, key, value, output, lse, *rest = ctx.saved_tensors
        clusters, saved = Clusters(*rest[:4]), rest[4:]
        scale, config, layout = ctx.scale, ctx.config, ctx.layout
        block, group_heads = config.local_block, query.shape[1] // key.shape[1]
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        delta = output_delta(output, grad)
        grads = local_backward(grad, query, key, value, output, lse, layout, scale, block)
        grad_means = [
            torch.empty(tensor.shape, dtype=torch.float32, device=query.device)
            for tensor in (clusters.key_mean, clusters.value_mean)
        ]
        for number, (heads, kv_heads) in enumerate(_parts(query, key, config.num_retrieved)):
            chosen, choice, *items = saved[4 * number : 4 * number + 4]
            summary_backward(
                query, clusters, layout, chosen, grad, lse, delta, *grad_means, kv_heads, group_heads, scale,
                block, config.clusters_for(block),
            )  # fmt: skip
            partial = retrieve_backward(
                query, key, value, grad, lse, delta, clusters, Items(*items), *grad_means, *grads[1:],
                kv_heads, group_heads, scale, config.num_retrieved,
            )  # fmt: skip
            query_backward(
                query, clusters, layout, chosen, choice, partial, grad, lse, delta, grads[0], heads,
                group_heads, scale, block,
            )  # fmt: skip
        return *grads, None, None


def _choose(query, clusters, layout: Layout, heads, kv_heads, group_heads, scale, config):
    """Choices of the queries of some heads, and the items they make."""
    chosen, choice = select(
        query, clusters.key_mean, clusters.count, layout, heads, group_heads, scale, config.num_retrieved,
        config.local_block,
    )  # fmt: skip
    by_head = choice.unflatten(0, (len(kv_heads), group_heads)).flatten(1, 2)
    return chosen, choice, sort_items(by_head, clusters.count.shape[1])


def _parts(query: torch.Tensor, key: torch.Tensor, num_retrieved: int) -> list[tuple[range, range]]:
    """Query heads and key/value heads that are worked on together."""
    batch, heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    bytes_per_head = batch * groups * length * num_retrieved * head_dim * query.element_size()
    step = max(1, _PARTIAL_BYTES // max(1, bytes_per_head))
    kv_parts = [range(first, min(first + step, kv_heads)) for first in range(0, kv_heads, step)]
    return [(range(part.start * groups, part.stop * groups), part) for part in kv_parts]
