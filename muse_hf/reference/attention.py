"""MuSe attention in plain PyTorch: the specification that kernels are tested against.

Sums are in the dtype of the inputs, which the caller makes float32 at least. Memory is linear in the number
of tokens, apart from the summaries of tilted query centroids: queries are processed a block at a time and
the backward pass recomputes what it needs.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from muse_hf.config import MuseConfig
from muse_hf.reference.blocks import KeyBlocks, build_key_blocks
from muse_hf.reference.exact import exact_backward, exact_forward
from muse_hf.reference.precision import outside_autocast
from muse_hf.reference.refinement import Refinement, refine
from muse_hf.reference.retrieval import Retrieval

# Entries of the largest temporary, the queries of a block once for every cluster they retrieve. A batch for
# which it would be larger is worked through in parts: on the CPU small enough to stay in warm pages.
_CPU_ENTRIES, _ENTRIES = 1 << 22, 1 << 28


class Chunk(NamedTuple):
    """A block of queries and all it attends to.

    Attributes:
        queries: Its tokens.
        keys: Tokens attended exactly, if any.
        seen: Key blocks attended through summaries, as (level, first block, last block + 1).
    """

    queries: slice
    keys: slice | None
    seen: list[tuple[int, int, int]]


def reference_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool, config: MuseConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """MuSe attention of sequences of equal length; exact where there are at most `local_block` keys.

    Args:
        query: (X, G, Q, D) float32 or float64, multiplied by the softmax scale; the G query heads of entry
            x share its key/value head.
        key, value: (X, K, D), with K = Q if causal.

    Returns:
        Output (X, G, Q, D) and logsumexp (X, G, Q). No gradient flows through the logsumexp.
    """
    batch, groups, num_queries, head_dim = query.shape
    num_keys, block = key.shape[1], config.local_block
    entries = groups * min(block, num_queries) * head_dim * max(1, config.num_retrieved)
    limit = _CPU_ENTRIES if query.device.type == "cpu" else _ENTRIES
    if batch > (part := max(1, limit // entries)):
        outputs = [
            reference_attention(q, k, v, is_causal=is_causal, config=config)
            for q, k, v in zip(query.split(part), key.split(part), value.split(part))
        ]
        output, lse = zip(*outputs)
        return torch.cat(output), torch.cat(lse)

    if num_keys <= block:
        levels, chunks = [], [Chunk(slice(0, num_queries), slice(0, num_keys), [])]
    elif is_causal:
        levels = _causal_levels(query, key, value, config)
        chunks = causal_chunks(num_keys, block, config.hierarchy)
    else:
        levels = [build_key_blocks(key[:, None], value[:, None], query[:, :, None], None, config)]
        starts = range(0, num_queries, block)
        chunks = [Chunk(slice(start, start + block), None, [(0, 0, 1)]) for start in starts]
    tensors = [tensor for level in levels for tensor in level]
    limits = config.num_retrieved, config.retrieval_threshold
    return _Attend.apply(query, key, value, is_causal, chunks, *limits, *tensors)


def causal_chunks(length: int, block: int, hierarchy: str) -> list[Chunk]:
    """Who sees what: every (query, earlier key) pair is covered exactly once.

    Flat: query block p sees key blocks 0 to p - 1. Dyadic: it sees, for each bit set in p, the even block of
    that size before it; the blocks of a level are the even ones, numbered from 0.
    """
    chunks = []
    for p, start in enumerate(range(0, length, block)):
        tokens = slice(start, min(start + block, length))
        if hierarchy == "flat":
            seen = [(0, 0, p)] if p else []
        else:
            bits = [level for level in range(p.bit_length()) if p >> level & 1]
            seen = [(level, p >> level + 1, (p >> level + 1) + 1) for level in bits]
        chunks.append(Chunk(tokens, tokens, seen))
    return chunks


def _causal_levels(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, config: MuseConfig
) -> list[KeyBlocks]:
    """The key blocks of every size that some later query sees."""
    length, block = key.shape[1], config.local_block
    if config.hierarchy == "flat":
        num_blocks = math.ceil(length / block) - 1
        return [_causal_level(query, key, value, block, block, num_blocks, config)]
    num_levels = (math.ceil(length / block) - 1).bit_length()
    sizes = [block << level for level in range(num_levels)]
    return [_causal_level(query, key, value, s, 2 * s, math.ceil(length / s) // 2, config) for s in sizes]


def _causal_level(query, key, value, size, step, num_blocks, config) -> KeyBlocks:
    """Key blocks of `size` tokens, one every `step` tokens, with the queries they are expanded around."""

    def blocks_of(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unfold(-2, size, step)[..., :num_blocks, :, :].transpose(-1, -2)

    queries, query_length = query.detach(), None
    if config.query_centroids == "own":  # the block after the key block; the last one may be partial
        missing = size + num_blocks * step - queries.shape[2]
        queries = torch.nn.functional.pad(queries[:, :, size:], (0, 0, 0, max(0, missing)))
        starts = size + step * torch.arange(num_blocks, device=query.device)
        query_length = (query.shape[2] - starts).clamp(max=size)
    return build_key_blocks(blocks_of(key), blocks_of(value), blocks_of(queries), query_length, config)


class _Attend(torch.autograd.Function):
    """Attention of all chunks to their exact keys and to the key blocks they see, merged by logsumexp.

    Backward follows ring attention: given the merged output and logsumexp λ, every part computes its own
    gradients from p = exp(ℓ - λ) and dℓ = p (do·value - Δ), Δ = do·o, without the other parts.
    """

    @staticmethod
    def forward(ctx, query, key, value, is_causal, chunks, num_retrieved, threshold, *tensors):
        output, lse = torch.empty_like(query), query.new_empty(query.shape[:3])
        choices = []
        for chunk in chunks:
            queries = query[:, :, chunk.queries]
            parts, choice, local_lse = [], None, None
            if chunk.keys is not None:
                local, local_lse = exact_forward(
                    queries, key[:, chunk.keys], value[:, chunk.keys], is_causal=is_causal
                )
                parts.append((local, torch.ones_like(local_lse), local_lse))
            if chunk.seen:
                far, choice = _far_forward(
                    queries, local_lse, _levels(tensors), chunk.seen, num_retrieved, threshold
                )
                parts += far
            choices.append(choice)
            output[:, :, chunk.queries], lse[:, :, chunk.queries] = merge(parts)
        ctx.save_for_backward(query, key, value, output, lse, *choices, *tensors)
        ctx.is_causal, ctx.chunks = is_causal, chunks
        ctx.mark_non_differentiable(lse)
        return output, lse

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, grad, _):
        query, key, value, output, lse, *rest = ctx.saved_tensors
        choices, tensors = rest[: len(ctx.chunks)], rest[len(ctx.chunks) :]
        grads = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        grad_tensors = [
            None if t is None or not t.is_floating_point() else torch.zeros_like(t) for t in tensors
        ]
        for chunk, choice in zip(ctx.chunks, choices):
            own = [tensor[:, :, chunk.queries] for tensor in (grad, query, output, lse)]
            if chunk.keys is not None:
                shares = exact_backward(
                    own[0],
                    own[1],
                    key[:, chunk.keys],
                    value[:, chunk.keys],
                    own[2],
                    own[3],
                    is_causal=ctx.is_causal,
                )
                grads[0][:, :, chunk.queries] += shares[0]
                grads[1][:, chunk.keys] += shares[1]
                grads[2][:, chunk.keys] += shares[2]
            if chunk.seen:
                grads[0][:, :, chunk.queries] += _far_backward(
                    *own, _levels(tensors), chunk.seen, choice, _levels(grad_tensors)
                )
        return (*grads, None, None, None, None, *grad_tensors)


def merge(
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join parts of one softmax, each (numerator (..., D), denominator (...), shift (...)).

    A part stands for sums that are not yet divided, over some of the logits ℓ: Σ exp(ℓ - shift) value and
    Σ exp(ℓ - shift). Returns the output (..., D) and its logsumexp (...).
    """
    top = torch.stack([shift for *_, shift in parts]).amax(0)
    scales = [(shift - top).exp() for *_, shift in parts]
    numerator = sum(part[0] * scale[..., None] for part, scale in zip(parts, scales))
    denominator = sum(part[1] * scale for part, scale in zip(parts, scales))
    return numerator / denominator[..., None], top + denominator.log()


def _far_forward(queries, local_lse, levels, seen, num_retrieved, threshold):
    """Summaries and retrieved clusters as parts for `merge`, and the choice (X, P, r) of the latter.

    The choice is J, the number of summaries, where fewer clusters than r are to be retrieved.
    """
    heads = queries.shape[1:3]
    folded = queries.flatten(1, 2)
    refined = [refine(folded, heads[0], blocks) for blocks in _narrow(levels, seen)]
    logits, combine = _join(refined)
    parts, choice = [], None
    if num_retrieved:
        score = torch.cat([part.score() for part in refined], dim=-1)
        best, choice = score.topk(min(num_retrieved, logits.shape[-1]), sorted=False)
        if threshold:
            missed = _missed_share(best, logits.gather(-1, choice), logits, local_lse)
            choice = choice.masked_fill(missed < threshold, logits.shape[-1])
        logits = _without(logits, choice)
        parts += [retrieval.forward() for retrieval in _retrievals(folded, choice, levels, seen)]
        choice = choice.to(torch.int32)
    shift = logits.amax(-1).clamp(min=torch.finfo(logits.dtype).min)
    weights = logits.sub_(shift[..., None]).exp_()
    parts.append((combine(weights), weights.sum(-1), shift))
    return [[tensor.unflatten(1, heads) for tensor in part] for part in parts], choice


def _far_backward(grad, queries, output, lse, levels, seen, choice, grad_levels):
    """Gradient of the queries; those of the key blocks are added to `grad_levels`."""
    grad, folded, output, lse = (tensor.flatten(1, 2) for tensor in (grad, queries, output, lse))
    leaf = folded.detach().requires_grad_()
    leaves = [_with_gradient(blocks) for blocks in _narrow(levels, seen)]
    with torch.enable_grad():
        logits, combine = _join([refine(leaf, queries.shape[1], blocks) for blocks in leaves])
        if choice is not None:
            logits = _without(logits, choice.to(torch.int64))
        weights = (logits - lse[..., None]).exp()
        sums = [combine(weights), weights.sum(-1)]
    wanted = [leaf] + [getattr(blocks, name) for blocks, name in _summaries_of(leaves)]
    delta = (grad * output).sum(-1)
    grad_query, *shares = torch.autograd.grad(sums, wanted, [grad, -delta])
    for (blocks, name), share in zip(_summaries_of(_narrow(grad_levels, seen)), shares):
        getattr(blocks, name).add_(share)
    if choice is not None:
        grad_of_seen = [grad_levels[level] for level, *_ in seen]
        for retrieval, target in zip(_retrievals(folded, choice, levels, seen), grad_of_seen):
            grad_query = grad_query + retrieval.backward(grad, lse, delta, target.keys, target.values)
    return grad_query.unflatten(1, queries.shape[1:3])


def _missed_share(score, chosen_logits, logits, local_lse):
    """Share of a query's attention (X, P, r) that summaries miss: second order minus first order."""
    lse = logits.logsumexp(-1)
    if local_lse is not None:
        lse = torch.logaddexp(lse, local_lse.flatten(1, 2))
    return (score - lse[..., None]).exp() - (chosen_logits - lse[..., None]).exp()


def _without(logits: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
    """The logits (X, P, J) with -∞ at a choice (X, P, r), which may be J, none of them."""
    return torch.nn.functional.pad(logits, (0, 1)).scatter(-1, choice, -torch.inf)[..., :-1]


def _retrievals(folded, choice, levels, seen):
    """The retrieval from each size of blocks, given a choice among the clusters of all of them."""
    before = 0
    for level, first, last in seen:
        yield Retrieval(folded, choice - before, levels[level], first, last)
        before += (last - first) * levels[level].filled.shape[2]


def _join(refined: list[Refinement]) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Logits (X, P, J) on all summaries seen, whatever the size of their blocks, and their combination."""
    widths = [part.logits.shape[-1] for part in refined]

    def combine(weights: torch.Tensor) -> torch.Tensor:
        return sum(part.combine(share) for share, part in zip(weights.split(widths, dim=-1), refined))

    return torch.cat([part.logits for part in refined], dim=-1), combine


def _levels(tensors: list[torch.Tensor]) -> list[KeyBlocks]:
    """Undo the flattening of the levels for autograd."""
    fields = len(KeyBlocks._fields)
    return [KeyBlocks(*tensors[start : start + fields]) for start in range(0, len(tensors), fields)]


def _narrow(levels: list[KeyBlocks], seen: list[tuple[int, int, int]]) -> list[KeyBlocks]:
    return [levels[level].narrow(first, last) for level, first, last in seen]


def _summaries_of(seen: list[KeyBlocks]) -> list[tuple[KeyBlocks, str]]:
    names = ("log_mass", "key_mean", "value_mean", "dipole")
    return [(blocks, name) for blocks in seen for name in names if getattr(blocks, name) is not None]


def _with_gradient(blocks: KeyBlocks) -> KeyBlocks:
    """The same blocks with summaries that record gradients, cut off from what they were made of."""
    return blocks._replace(
        **{name: getattr(blocks, name).detach().requires_grad_() for _, name in _summaries_of([blocks])}
    )
