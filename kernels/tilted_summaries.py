"""Tilted summaries: every cluster of keys as every query centroid sees it.

With s_ak = q̄_a·k: L_aj = logsumexp_{k in j} s_ak, and the means k̃_aj and ṽ_aj under exp(s_ak - L_aj). For the
dipole there is the covariance of the values of each cluster with its keys, see `tilted_dipole`. Query
centroids are constants.

Rows are clusters of keys (j), numbered over all sets, or clusters of queries (a). The pairs of a set are
numbered a * C + j, and those of gradients that a cluster of keys collects j * A + a.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from muse_hf.kernels.common import (
    LOG2_E,
    gather_tokens,
    load_tokens,
    plane_of,
    power_of_two,
    store_tokens,
    wait_for_previous_kernel,
)
from muse_hf.kernels.kmeans import Groups
from muse_hf.kernels.launch import ceil_div, launch
from muse_hf.kernels.point_sets import (
    CLUSTERS,
    FIRST_PAIR,
    FIRST_ROW,
    ROW,
    PointSets,
    set_field,
    token_less_point,
)
from muse_hf.kernels.tilted_dipole import mix_covariances

# Query centroids in a tile.
_TILE = 64


class Summaries(NamedTuple):
    """Summaries of all pairs, and of all clusters where there is a dipole.

    Attributes:
        log_mass: (H, pairs) float32 L, -inf where a cluster is empty.
        key_mean, value_mean: (H, pairs, D) in the dtype of the keys.
        covariance: (Hkv, key rows, D, D) of values with keys, or None.
        means: (2, Hkv, key rows, 2, D) plain means of keys and of values, each the sum of two rows, or None.
        dipole: (H, query rows, D, D) M, or None.
        log_total: (H, query rows) float32 logsumexp of a row of L, or None.
    """

    log_mass: torch.Tensor
    key_mean: torch.Tensor
    value_mean: torch.Tensor
    covariance: torch.Tensor | None = None
    means: torch.Tensor | None = None
    dipole: torch.Tensor | None = None
    log_total: torch.Tensor | None = None


@triton.jit
def find_members(row, head, order, first, count, stride_oh, stride_fh, stride_ch):
    """Where the members of a cluster of keys are listed, and how many there are. Strides of `Groups`."""
    head = head.to(tl.int64)
    slots = order + head * stride_oh + tl.load(first + head * stride_fh + row)
    return slots, tl.load(count + head * stride_ch + row)


@triton.jit
def _summarise(
    keys, values, slots, many, token_of_point, q, exists, pairs, log_mass, key_mean, value_mean,
    stride_kn, stride_vn, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """Summaries of one cluster for a tile of query centroids."""
    top = tl.full([BLOCK_A], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_A], tl.float32)
    k_mean = tl.zeros([BLOCK_A, BLOCK_D], tl.float32)
    v_mean = tl.zeros([BLOCK_A, BLOCK_D], tl.float32)
    for m in range(0, many, BLOCK_M):
        places = m + tl.arange(0, BLOCK_M)
        tokens = tl.load(slots + tl.minimum(places, many - 1)) + token_of_point
        k = gather_tokens(keys, tokens, stride_kn, HEAD_DIM, BLOCK_D)
        v = gather_tokens(values, tokens, stride_vn, HEAD_DIM, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
        s += tl.where(places < many, 0, -float("inf"))[None, :]
        new_top = tl.maximum(top, tl.max(s, 1))
        w = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(w, 1)
        w = w.to(k.dtype)
        k_mean = tl.dot(w, k, k_mean * shrink[:, None], input_precision="ieee")
        v_mean = tl.dot(w, v, v_mean * shrink[:, None], input_precision="ieee")
        top = new_top
    inverse = tl.where(many > 0, 1 / total, 0)
    mass = tl.where(many > 0, (top + tl.log2(total)) * (1 / LOG2_E), -float("inf"))
    tl.store(log_mass + pairs, mass, mask=exists)
    store_tokens(key_mean, k_mean * inverse[:, None], pairs, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
    store_tokens(value_mean, v_mean * inverse[:, None], pairs, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)


@triton.jit
def _store_mean(to, mean, dims, HEAD_DIM: tl.constexpr):
    """A float32 vector as two rows that add up to it, in a dtype with which products are fast."""
    high = mean.to(to.dtype.element_ty)
    tl.store(to + dims, high, mask=dims < HEAD_DIM)
    tl.store(to + HEAD_DIM + dims, mean - high.to(tl.float32), mask=dims < HEAD_DIM)


@triton.jit
def _covary(
    keys, values, slots, many, token_of_point, first_dim, own_row, covariance, key_means, value_means,
    stride_kn, stride_vn,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Covariance of BLOCK_E dimensions of the values of one cluster with its keys, and their means."""
    product = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    # Sums as products with ones, in 16 equal columns: they need no reductions.
    ones = tl.full([BLOCK_M, 16], 1, keys.dtype.element_ty)
    k_total = tl.zeros([BLOCK_D, 16], tl.float32)
    v_total = tl.zeros([BLOCK_E, 16], tl.float32)
    for m in range(0, many, BLOCK_M):
        places = m + tl.arange(0, BLOCK_M)
        filled = places < many
        tokens = tl.load(slots + places, mask=filled, other=0) + token_of_point
        k = load_tokens(keys, tokens, filled, stride_kn, HEAD_DIM, BLOCK_D)
        v = load_tokens(values, tokens, filled, stride_vn, HEAD_DIM, BLOCK_E, first_dim)
        product = tl.dot(tl.trans(v), k, product, input_precision="ieee")
        k_total = tl.dot(tl.trans(k), ones, k_total, input_precision="ieee")
        v_total = tl.dot(tl.trans(v), ones, v_total, input_precision="ieee")
    inverse = 1 / tl.maximum(many, 1).to(tl.float32)
    k_mean, v_mean = tl.max(k_total, 1) * inverse, tl.max(v_total, 1) * inverse
    product = product * inverse - v_mean[:, None] * k_mean[None, :]
    dims, own_dims = tl.arange(0, BLOCK_D), first_dim + tl.arange(0, BLOCK_E)
    at = (own_row * HEAD_DIM + own_dims)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(covariance + at, product, mask=(own_dims < HEAD_DIM)[:, None] & (dims < HEAD_DIM)[None, :])
    if first_dim == 0:
        _store_mean(key_means + own_row * 2 * HEAD_DIM, k_mean, dims, HEAD_DIM)
    _store_mean(value_means + own_row * 2 * HEAD_DIM, v_mean, own_dims, HEAD_DIM)


@triton.jit
def _summary_kernel(
    key, value, table, set_of_row, order, first, count, centroids, log_mass, key_mean, value_mean,
    covariance, key_means, value_means,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_oh, stride_fh, stride_ch,
    num_key_sets, num_key_rows, num_rows, num_pairs, tiles_of_centroids, scale,
    DIPOLE: tl.constexpr, GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One cluster of keys: its summaries for a tile of the centroids of a query head.

    The first program of a cluster gives its covariance too.
    """
    wait_for_previous_kernel()
    row, part, kv_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    number = tl.load(set_of_row + row)
    own_row = kv_head.to(tl.int64) * num_key_rows + row
    slots, many = find_members(row, kv_head, order, first, count, stride_oh, stride_fh, stride_ch)
    token_of_point = token_less_point(table, number)
    batch_row = set_field(table, number, ROW)
    keys = plane_of(key, batch_row, kv_head, stride_kb, stride_kh)
    values = plane_of(value, batch_row, kv_head, stride_vb, stride_vh)
    head = (kv_head * GROUP_HEADS + part // tiles_of_centroids).to(tl.int64)
    queries = number + num_key_sets
    a = part % tiles_of_centroids * BLOCK_A + tl.arange(0, BLOCK_A)
    num_centroids = set_field(table, queries, CLUSTERS)
    if part % tiles_of_centroids * BLOCK_A < num_centroids:
        exists = a < num_centroids
        centroid_rows = head * num_rows + set_field(table, queries, FIRST_ROW) + a
        q = load_tokens(centroids, centroid_rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
        pairs = head * num_pairs + set_field(table, queries, FIRST_PAIR)
        pairs += a * set_field(table, number, CLUSTERS) + row - set_field(table, number, FIRST_ROW)
        _summarise(
            keys, values, slots, many, token_of_point, q, exists, pairs, log_mass, key_mean, value_mean,
            stride_kn, stride_vn, scale, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_A,
        )  # fmt: skip
    if DIPOLE and part == 0:
        for first_dim in range(0, HEAD_DIM, BLOCK_E):
            _covary(
                keys, values, slots, many, token_of_point, first_dim, own_row, covariance, key_means,
                value_means, stride_kn, stride_vn, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_E,
            )  # fmt: skip


def summarise(
    key: torch.Tensor, value: torch.Tensor, sets: PointSets, members: Groups, centroids: torch.Tensor,
    scale: float, dipole: bool,
) -> Summaries:  # fmt: skip
    """Summaries of all clusters of keys for the query centroids (H, rows, D) of their sets.

    Args:
        key, value: (B, Hkv, K, D).
        members: Keys by cluster.
        scale: Factor on the logits.
    """
    kv_heads, head_dim = key.shape[1], key.shape[3]
    heads = centroids.shape[0]
    log_mass = key.new_empty(heads, sets.num_pairs, dtype=torch.float32)
    key_mean, value_mean = (key.new_empty(heads, sets.num_pairs, head_dim) for _ in range(2))
    covariance = means = moment = log_total = None
    if dipole:
        covariance = key.new_empty(kv_heads, sets.num_key_rows, head_dim, head_dim)
        means = key.new_empty(2, kv_heads, sets.num_key_rows, 2, head_dim)
    both_means = (None, None) if means is None else means.unbind()
    tiles = summary_tiles(key, sets)
    tiles_of_centroids = ceil_div(sets.max_clusters, tiles["BLOCK_A"])
    groups = heads // kv_heads
    if key.element_size() == 2:
        tiles["maxnreg"] = 128  # 16 warps share a multiprocessor
    launch(
        _summary_kernel, (sets.num_key_rows, groups * tiles_of_centroids, kv_heads),
        key, value, sets.table, sets.set_of_row, *members, centroids, log_mass, key_mean, value_mean,
        covariance, *both_means, *key.stride()[:3], *value.stride()[:3], *members.strides(),
        sets.num_key_sets, sets.num_key_rows, sets.num_rows, sets.num_pairs, tiles_of_centroids, scale,
        DIPOLE=dipole, GROUP_HEADS=groups, num_stages=2, **tiles,
    )  # fmt: skip
    if dipole:
        moment, log_total = mix_covariances(sets, log_mass, members, covariance)
    return Summaries(log_mass, key_mean, value_mean, covariance, means, moment, log_total)


def summary_tiles(key: torch.Tensor, sets: PointSets) -> dict[str, int]:
    """What the kernels of both directions are compiled for."""
    head_dim = key.shape[3]
    block_d = power_of_two(head_dim)
    row_bytes = block_d * key.element_size()
    tile = min(64, max(16, (1 << 14) // row_bytes))
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": tile,
        "BLOCK_A": min(tile, _TILE, power_of_two(sets.max_clusters)),
        "BLOCK_E": min(block_d, (1 << 15) // row_bytes),
        "num_warps": 4 if block_d <= 64 else 8,
    }
