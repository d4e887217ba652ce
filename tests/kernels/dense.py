"""Causal attention with given clusters and choices, as one dense formula: what kernels must compute."""

import torch


def chosen_clusters(order, bounds, number):
    """What `Items` say each query retrieves: (H, N, J) bool."""
    num_retrieved = order.numel() // number.numel()
    kv_heads, num_clusters = bounds.shape[0], bounds.shape[1] - 1
    chosen = number.new_zeros(kv_heads, number.numel() // kv_heads, num_clusters, dtype=torch.bool)
    clusters = torch.arange(num_clusters, device=number.device)
    for items, edges, of_head in zip(order, bounds, chosen):
        of_head[items[: edges[-1]] // num_retrieved, clusters.repeat_interleave(edges.diff())] = True
    return chosen.view(*number.shape, num_clusters)


def dense_attention(query, key, value, members, chosen, block, scale):
    """Plain summaries, flat hierarchy, one row. Differentiable; products in the dtype of the inputs.

    Args:
        query: (1, H, N, D). key, value: (1, Hkv, N, D).
        members: (Hkv, J, m) tokens of each cluster, -1 where there is none.
        chosen: (H, N, J) whether a query retrieves a cluster.

    Returns:
        Output (1, H, N, D) and logsumexp (1, H, N).
    """
    heads, length = query.shape[1:3]
    kv_heads = members.shape[0]
    token = torch.arange(length, device=query.device)
    belongs = (members[..., None] == token).any(2)  # (Hkv, J, N)
    count = belongs.sum(-1)
    mean = (belongs / count.clamp(min=1)[..., None]).to(query.dtype)
    key_mean, value_mean = mean @ key[0], mean @ value[0]
    spread = (heads // kv_heads, 0)
    k, v, key_mean, value_mean, belongs, count = (
        t.repeat_interleave(spread[0], dim=spread[1])
        for t in (key[0], value[0], key_mean, value_mean, belongs, count)
    )
    retrieved = (chosen.to(torch.float32) @ belongs.to(torch.float32)) > 0
    local = (token[:, None] // block == token // block) & (token[:, None] >= token)
    own_block = belongs.to(torch.float32).argmax(-1) // block  # of an empty cluster, 0
    seen = own_block[:, None] < (token // block)[:, None]
    exact = (query[0] @ k.transpose(1, 2) * scale).masked_fill(~(local | retrieved), -torch.inf)
    summed = query[0] @ key_mean.transpose(1, 2) * scale + count.log().to(query.dtype)[:, None]
    summed = summed.masked_fill(chosen | ~seen | (count == 0)[:, None], -torch.inf)
    logits = torch.cat([exact, summed], dim=-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weights = logits.softmax(-1).to(query.dtype)
    output = weights[..., :length] @ v + weights[..., length:] @ value_mean
    return output[None], logits.logsumexp(-1)[None]
