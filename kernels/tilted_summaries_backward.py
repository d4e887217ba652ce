"""Tilted summaries, the way back: from the gradients of summaries to those of keys and values.

The weights are made again, and query centroids are constants. Numbering as in `tilted_summaries`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from muse_hf.kernels.common import (
    LOG2_E,
    has_much_shared_memory,
    load_tokens,
    plane_of,
    store_tokens,
    wait_for_previous_kernel,
)
from muse_hf.kernels.kmeans import Groups
from muse_hf.kernels.launch import launch
from muse_hf.kernels.point_sets import (
    CLUSTERS,
    FIRST_PAIR,
    FIRST_ROW,
    ROW,
    PointSets,
    set_field,
    token_less_point,
)
from muse_hf.kernels.tilted_dipole import mix_gradients
from muse_hf.kernels.tilted_summaries import Summaries, find_members, summary_tiles


class SummaryGradients(NamedTuple):
    """Gradients of the summaries of all pairs.

    Attributes:
        key_mean, value_mean: (H, pairs, D) in the dtype of the keys.
        constant: (H, pairs by cluster of keys) float32 dL - dk̃·k̃ - dṽ·ṽ.
        dipole: (H, query rows, D, D) in the dtype of the keys, or None.
    """

    key_mean: torch.Tensor
    value_mean: torch.Tensor
    constant: torch.Tensor
    dipole: torch.Tensor | None


@triton.jit
def _load_pairs(
    centroids, grad_key_mean, grad_value_mean, log_mass, constant, centroid, pairs, j, first,
    num_clusters, num_centroids,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """A tile of query centroids and what belongs to their pairs with cluster j, see `_split_numbers`."""
    a = first + tl.arange(0, BLOCK_A)
    exists = a < num_centroids
    rows = pairs + a * num_clusters + j
    # By one load, see `WeightTerms`.
    is_mass = tl.arange(0, 2)[None, :] == 0
    at = tl.where(is_mass, log_mass + rows[:, None], constant + (pairs + j * num_centroids + a)[:, None])
    numbers = tl.load(at, mask=exists[:, None], other=tl.where(is_mass, float("inf"), 0))
    return (
        load_tokens(centroids, centroid + a, exists, HEAD_DIM, HEAD_DIM, BLOCK_D),
        load_tokens(grad_key_mean, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D),
        load_tokens(grad_value_mean, rows, exists, HEAD_DIM, HEAD_DIM, BLOCK_D),
        numbers,
    )


@triton.jit
def _split_numbers(numbers, scale):
    """Masses in base 2, and scaled constants. This waits for them: loads should be under way before."""
    mass, c = tl.split(numbers)
    return mass * LOG2_E, c * scale


@triton.jit
def _load_mean(mean, dims, HEAD_DIM: tl.constexpr):
    """Columns (len(dims), 16) that add up to a mean, as products read them."""
    column = tl.arange(0, 16)[None, :]
    return tl.load(
        mean + column * HEAD_DIM + dims[:, None], mask=(column < 2) & (dims < HEAD_DIM)[:, None], other=0
    )


@triton.jit
def _load_members(
    keys, values, slots, first, many, stride_kn, stride_vn,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A tile of members of a cluster: their points, which of them there are, keys and values."""
    places = first + tl.arange(0, BLOCK_M)
    points = tl.load(slots + places, mask=places < many, other=0)
    k = load_tokens(keys, points, places < many, stride_kn, HEAD_DIM, BLOCK_D)
    v = load_tokens(values, points, places < many, stride_vn, HEAD_DIM, BLOCK_D)
    return points, places < many, k, v


@triton.jit
def _key_backward_kernel(
    key, value, table, set_of_row, order, first, count, centroids, log_mass, grad_key_mean, grad_value_mean,
    constant, grad_covariance, key_means, value_means, grad_key, grad_value,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_oh, stride_fh, stride_ch,
    stride_gkh, stride_gkn, stride_gvh, stride_gvn,
    num_key_sets, num_key_rows, num_rows, num_pairs, scale,
    DIPOLE: tl.constexpr, GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values of one cluster, at their points.

    With the constant c_aj, dS_ak = w_ak (c_aj + dk̃_aj·k + dṽ_aj·v), then dk = Σ_a dS_ak q̄_a + w_ak dk̃_aj
    and dv = Σ_a w_ak dṽ_aj; and the share of the covariance, dCov_j (k - mean) / |j| and likewise for values.

    SINGLE: one tile holds the centroids of all query heads, and is read once.
    """
    wait_for_previous_kernel()
    row, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    number = tl.load(set_of_row + row)
    queries = number + num_key_sets
    own_row = kv_head * num_key_rows + row
    slots, many = find_members(row, kv_head, order, first, count, stride_oh, stride_fh, stride_ch)
    batch_row = set_field(table, number, ROW)
    token_of_point = token_less_point(table, number).to(tl.int64)
    keys = plane_of(key, batch_row, kv_head, stride_kb, stride_kh) + token_of_point * stride_kn
    values = plane_of(value, batch_row, kv_head, stride_vb, stride_vh) + token_of_point * stride_vn
    grad_key += kv_head * stride_gkh
    grad_value += kv_head * stride_gvh
    num_clusters, num_centroids = set_field(table, number, CLUSTERS), set_field(table, queries, CLUSTERS)
    j = row - set_field(table, number, FIRST_ROW)
    centroid = kv_head * GROUP_HEADS * num_rows + set_field(table, queries, FIRST_ROW)
    pairs = kv_head * GROUP_HEADS * num_pairs + set_field(table, queries, FIRST_PAIR)
    dims = tl.arange(0, BLOCK_D)
    # A tile is loaded ahead: most programs have only one, and what else they load is under way meanwhile.
    points, filled, k, v = _load_members(
        keys, values, slots, 0, many, stride_kn, stride_vn, HEAD_DIM, BLOCK_D, BLOCK_M
    )
    if SINGLE:
        q, dk_mean, dv_mean, numbers = _load_pairs(
            centroids, grad_key_mean, grad_value_mean, log_mass, constant, centroid, pairs, j, 0,
            num_clusters, num_centroids, HEAD_DIM, BLOCK_D, BLOCK_A,
        )  # fmt: skip
    k_start, v_start = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    if DIPOLE:
        matrix = kv_head * GROUP_HEADS * num_key_rows + row
        for i in range(GROUP_HEADS):
            own = grad_covariance + (matrix + i * num_key_rows) * HEAD_DIM * HEAD_DIM
            for e in tl.static_range(0, HEAD_DIM, BLOCK_E):
                part_dims = e + tl.arange(0, BLOCK_E)
                exists = part_dims < HEAD_DIM
                k_mean = _load_mean(key_means + own_row * 2 * HEAD_DIM, part_dims, HEAD_DIM)
                v_mean = _load_mean(value_means + own_row * 2 * HEAD_DIM, part_dims, HEAD_DIM)
                columns = load_tokens(own, dims, dims < HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_E, e)
                v_start -= tl.sum(tl.dot(columns, k_mean, input_precision="ieee"), 1)
                rows = load_tokens(own, part_dims, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
                k_start -= tl.sum(tl.dot(tl.trans(rows), v_mean, input_precision="ieee"), 1)
        if SINGLE and BLOCK_E == BLOCK_D:
            own = grad_covariance + matrix * HEAD_DIM * HEAD_DIM
            whole = load_tokens(own, dims, dims < HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_D)
    if SINGLE:
        mass, c = _split_numbers(numbers, scale)
    for first_member in range(0, many, BLOCK_M):
        dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32) + k_start[None, :]
        dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32) + v_start[None, :]
        for i in range(GROUP_HEADS):
            for a in range(0, BLOCK_A if SINGLE else num_centroids, BLOCK_A):
                if not SINGLE:
                    q, dk_mean, dv_mean, numbers = _load_pairs(
                        centroids, grad_key_mean, grad_value_mean, log_mass, constant,
                        centroid + i * num_rows, pairs + i * num_pairs, j, a,
                        num_clusters, num_centroids, HEAD_DIM, BLOCK_D, BLOCK_A,
                    )  # fmt: skip
                    mass, c = _split_numbers(numbers, scale)
                s = tl.dot(k, tl.trans(q), input_precision="ieee")
                w = tl.exp2(s * (scale * LOG2_E) - mass[None, :])
                ds = tl.dot(k, tl.trans(dk_mean), input_precision="ieee")
                ds = tl.dot(v, tl.trans(dv_mean), ds, input_precision="ieee")
                ds = (w * (ds * scale + c[None, :])).to(k.dtype)
                w = w.to(k.dtype)
                dk = tl.dot(ds, q, dk, input_precision="ieee")
                dk = tl.dot(w, dk_mean, dk, input_precision="ieee")
                dv = tl.dot(w, dv_mean, dv, input_precision="ieee")
        if DIPOLE:
            if SINGLE and BLOCK_E == BLOCK_D:
                dk = tl.dot(v, whole, dk, input_precision="ieee")
                dv = tl.dot(k, tl.trans(whole), dv, input_precision="ieee")
            else:
                for i in range(GROUP_HEADS):
                    own = grad_covariance + (matrix + i * num_key_rows) * HEAD_DIM * HEAD_DIM
                    for e in range(0, HEAD_DIM, BLOCK_E):
                        x = load_tokens(keys, points, filled, stride_kn, HEAD_DIM, BLOCK_E, e)
                        columns = load_tokens(own, dims, dims < HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_E, e)
                        dv = tl.dot(x, tl.trans(columns), dv, input_precision="ieee")
                        x = load_tokens(values, points, filled, stride_vn, HEAD_DIM, BLOCK_E, e)
                        part_dims = e + tl.arange(0, BLOCK_E)
                        rows = load_tokens(own, part_dims, part_dims < HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_D)
                        dk = tl.dot(x, rows, dk, input_precision="ieee")
        store_tokens(grad_key, dk, points, filled, stride_gkn, HEAD_DIM, BLOCK_D)
        store_tokens(grad_value, dv, points, filled, stride_gvn, HEAD_DIM, BLOCK_D)
        points, filled, k, v = _load_members(
            keys, values, slots, first_member + BLOCK_M, many, stride_kn, stride_vn,
            HEAD_DIM, BLOCK_D, BLOCK_M,
        )  # fmt: skip


def summaries_backward(
    key: torch.Tensor, value: torch.Tensor, sets: PointSets, members: Groups, centroids: torch.Tensor,
    scale: float, summaries: Summaries, grads: SummaryGradients,
    grad_key: torch.Tensor, grad_value: torch.Tensor,
) -> None:  # fmt: skip
    """Write the gradients of keys and values to the points (Hkv, points, D) of their sets, any strides."""
    kv_heads = key.shape[1]
    groups = centroids.shape[0] // kv_heads
    grad_covariance = None
    if grads.dipole is not None:
        masses = (summaries.log_mass, summaries.log_total)
        grad_covariance = mix_gradients(
            sets, *masses, members, summaries.covariance, grads.dipole, grads.constant
        )
    means = (None, None) if summaries.means is None else summaries.means.unbind()
    tiles = _key_backward_tiles(key, sets)
    launch(
        _key_backward_kernel, (sets.num_key_rows, kv_heads),
        key, value, sets.table, sets.set_of_row, *members, centroids, summaries.log_mass,
        grads.key_mean, grads.value_mean, grads.constant, grad_covariance, *means, grad_key, grad_value,
        *key.stride()[:3], *value.stride()[:3], *members.strides(),
        *grad_key.stride()[:2], *grad_value.stride()[:2],
        sets.num_key_sets, sets.num_key_rows, sets.num_rows, sets.num_pairs, scale,
        DIPOLE=grad_covariance is not None, GROUP_HEADS=groups,
        SINGLE=groups == 1 and sets.max_clusters <= tiles["BLOCK_A"], **tiles,
    )  # fmt: skip


def _key_backward_tiles(key: torch.Tensor, sets: PointSets) -> dict[str, int]:
    tiles = summary_tiles(key, sets) | {"num_stages": 1}
    if key.element_size() == 2 and tiles["BLOCK_D"] <= 64:
        return tiles | {"maxnreg": 168}  # three programs share a multiprocessor
    if key.element_size() == 2 and tiles["BLOCK_D"] == 128:
        smaller = {} if has_much_shared_memory(key) else {"BLOCK_A": min(32, tiles["BLOCK_A"]), "BLOCK_E": 64}
        return tiles | {"BLOCK_M": 32} | smaller
    return tiles
