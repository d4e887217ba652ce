"""The Triton backend: all stages of MuSe attention in order, forward and backward."""

import torch
from muse_hf.kernels.clustering import Clusters, cluster_keys
from muse_hf.kernels.layout import layout_of
from muse_hf.kernels.local import Saved, local_backward, local_forward
from muse_hf.kernels.refinement import refine
from muse_hf.kernels.refinement_backward import output_delta, query_backward, summary_backward
from muse_hf.kernels.retrieval import Items, retrieve, retrieve_backward, sort_items
from muse_hf.kernels.selection import MOST_RETRIEVED, list_choice
from triton import knobs

from muse_hf.config import MuseConfig

_LARGEST_HEAD_DIM = 256


def reason_against(query: torch.Tensor, key: torch.Tensor, is_causal: bool, config: MuseConfig) -> str | None:
    """Why these kernels cannot serve a call, or None if they can. Shapes as in `triton_attention`."""
    if not query.is_cuda and not knobs.runtime.interpret:
        return f"they need a CUDA device, the inputs are on {query.device.type!r}"
    if query.is_cuda and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "they need compute capability 8.0 or newer"
    if query.dtype == torch.float64:
        return "they do not compute in float64"
    if query.shape[3] > _LARGEST_HEAD_DIM:
        return f"head_dim {query.shape[3]} is larger than {_LARGEST_HEAD_DIM}"
    if not is_causal or config.summaries != "plain" or config.hierarchy != "flat" or not config.num_retrieved:
        return 'they serve causal attention with summaries="plain", hierarchy="flat" and retrieval so far'
    if config.num_retrieved > MOST_RETRIEVED:
        return f"num_retrieved={config.num_retrieved} is more than {MOST_RETRIEVED}"
    return None


def triton_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    config: MuseConfig,
    sequences: tuple[tuple[int, int], ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal MuSe attention, plain summaries and flat hierarchy.

    Args:
        query: (B, H, N, D) float16, bfloat16 or float32. key, value: (B, Hkv, N, D).
        sequences: First token id (row * N + token) and length of each sequence, in ascending order; at least
            one is longer than `local_block`.

    Returns:
        Output (B, H, N, D) and logsumexp (B, H, N) float32, zero outside the sequences.
    """
    tensors = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    return _Attend.apply(*tensors, scale, config, sequences)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scale, config, sequences):
        batch, heads, length, head_dim = query.shape
        block, groups = config.local_block, heads // key.shape[1]
        per_block = config.clusters_for(block)
        layout = layout_of(sequences, batch * length, block, per_block, query.device)
        local, local_lse, saved = local_forward(query, key, value, layout, scale, block)
        clusters = cluster_keys(
            key, value, layout.key_start, block, per_block, config.capacity_for(block), config.kmeans_iters
        )
        output = query.new_empty(batch, length, heads, head_dim).transpose(1, 2)
        lse = torch.empty_like(local_lse)
        if layout.outside is not None:  # λ = ∞ makes all weights and so all gradients zero
            output.zero_()
            lse.fill_(torch.inf)
        chosen = refine(
            query, clusters, layout, local, local_lse, output, lse, scale, config.num_retrieved, block
        )
        choice = list_choice(chosen, layout, config.num_retrieved, block)
        items = sort_items(choice.unflatten(0, (-1, groups)).flatten(1, 2), clusters.count.shape[1])
        retrieve(query, key, value, clusters, choice, items, output, lse, scale)
        ctx.save_for_backward(query, key, value, output, lse, *saved, chosen, choice, *items, *clusters)
        ctx.scale, ctx.config, ctx.layout = scale, config, layout
        if layout.outside is not None:
            lse = lse.masked_fill(layout.outside, 0)
        row_lse = lse.unflatten(1, (batch, -1)).transpose(0, 1)
        ctx.mark_non_differentiable(row_lse)
        return output, row_lse

    @staticmethod
    def backward(ctx, grad, _):
        query, key, value, output, lse, *rest = ctx.saved_tensors
        saved, (chosen, choice) = Saved(*rest[:2]), rest[2:4]
        items, clusters = Items(*rest[4:6]), Clusters(*rest[6:])
        scale, layout, block = ctx.scale, ctx.layout, ctx.config.local_block
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        delta = output_delta(output, grad)
        grads = local_backward(grad, query, key, value, output, lse, saved, layout, scale, block)
        grad_means = summary_backward(
            query, clusters, layout, chosen, grad, lse, delta, scale, block, ctx.config.clusters_for(block)
        )
        query_backward(query, clusters, layout, chosen, grad, lse, delta, grads[0], scale, block)
        retrieve_backward(
            query, key, value, grad, lse, delta, clusters, choice, items, grad_means, grads, scale
        )
        return *grads, None, None, None
