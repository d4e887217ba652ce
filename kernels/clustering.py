"""Clusters of the key blocks of the default setting: their members, means and masses."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from muse_hf.kernels.capacity import members_with_capacity
from muse_hf.kernels.common import (
    kept_on_device,
    load_tokens,
    plane_of,
    power_of_two,
    wait_for_previous_kernel,
)
from muse_hf.kernels.kmeans import kmeans, sort_by_cluster
from muse_hf.kernels.launch import launch
from muse_hf.kernels.point_sets import (
    CAPACITY,
    FIRST_ROW,
    FIRST_SLOT,
    ROW,
    PointSet,
    PointSets,
    point_sets,
    set_field,
    token_less_point,
)

# Rows behind the last summary that a tile of summaries may read.
PADDING = 128


class Clusters(NamedTuple):
    """Clusters of all key blocks: J = F * C of at most m keys for each of Hkv key/value heads.

    Attributes:
        members: (Hkv, J, m) int32 token ids, of which the first `count` are.
        count: (Hkv, J) int32 number of members.
        log_mass: (Hkv * J + PADDING,) float32 log of the count, -inf if empty.
        key_mean, value_mean: (Hkv * J + PADDING, D) in the dtype of the keys.
        key_variance: The same of the keys around their mean, bfloat16 for inputs of 16 bits.

    Thanks to the padding, which is zero, tiles need no masks to read beyond the last cluster.
    """

    members: torch.Tensor
    count: torch.Tensor
    log_mass: torch.Tensor
    key_mean: torch.Tensor
    value_mean: torch.Tensor
    key_variance: torch.Tensor


@triton.jit
def _means_kernel(
    key, value, table, set_of_row, members, count, log_mass, key_mean, value_mean, key_variance,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, num_slots,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """Means of the members of a cluster and variance of the keys. One program a cluster.

    The program of the last cluster writes the padding behind it.
    """
    wait_for_previous_kernel()
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    number = tl.load(set_of_row + row)
    own = head * tl.num_programs(0) + row
    held = tl.load(count + own)
    tl.store(log_mass + own, tl.where(held > 0, tl.log(held.to(tl.float32)), -float("inf")))
    slot = (row - set_field(table, number, FIRST_ROW)) * set_field(table, number, CAPACITY)
    slot += set_field(table, number, FIRST_SLOT)
    token_of_point = token_less_point(table, number)
    batch_row = set_field(table, number, ROW)
    keys = plane_of(key, batch_row, head, stride_kb, stride_kh)
    values = plane_of(value, batch_row, head, stride_vb, stride_vh)
    places = tl.arange(0, BLOCK_M)
    filled = places < held
    tokens = tl.load(members + head * num_slots + slot + places, mask=filled, other=0) + token_of_point
    many = tl.maximum(held, 1).to(tl.float32)
    k = load_tokens(keys, tokens, filled, stride_kn, HEAD_DIM, BLOCK_D).to(tl.float32)
    v = load_tokens(values, tokens, filled, stride_vn, HEAD_DIM, BLOCK_D).to(tl.float32)
    mean = tl.sum(k, 0) / many
    from_mean = tl.where(filled[:, None], k - mean[None, :], 0)
    variance = tl.sum(from_mean * from_mean, 0) / many
    dims = tl.arange(0, BLOCK_D)
    tl.store(key_mean + own * HEAD_DIM + dims, mean, mask=dims < HEAD_DIM)
    tl.store(key_variance + own * HEAD_DIM + dims, variance, mask=dims < HEAD_DIM)
    tl.store(value_mean + own * HEAD_DIM + dims, tl.sum(v, 0) / many, mask=dims < HEAD_DIM)
    if own == tl.num_programs(0) * tl.num_programs(1) - 1:
        nothing = tl.zeros([BLOCK_D], tl.float32)
        for behind in range(own + 1, own + 1 + PADDING):
            at = behind * HEAD_DIM + dims
            tl.store(log_mass + behind, 0)
            tl.store(key_mean + at, nothing, mask=dims < HEAD_DIM)
            tl.store(key_variance + at, nothing, mask=dims < HEAD_DIM)
            tl.store(value_mean + at, nothing, mask=dims < HEAD_DIM)


def cluster_keys(
    key: torch.Tensor, value: torch.Tensor, key_start: tuple[int, ...],
    size: int, num_clusters: int, capacity: int, iters: int,
) -> Clusters:  # fmt: skip
    """Cluster the key blocks of `size` tokens that begin at token ids `key_start`.

    Args:
        key, value: (B, Hkv, N, D), any strides but 1 in the last dimension.
    """
    _, heads, length, head_dim = key.shape
    sets = _key_sets(key_start, length, size, num_clusters, capacity, key.device)
    centroids = kmeans(key, key, sets, iters)
    members, _, count = members_with_capacity(
        key, sets, centroids, *sort_by_cluster(key, key, sets, centroids)
    )
    rows = heads * sets.num_key_rows + PADDING
    log_mass = key.new_empty(rows, dtype=torch.float32)
    spread = torch.float32 if key.dtype == torch.float32 else torch.bfloat16  # float16 would overflow
    key_mean, value_mean, key_variance = (
        key.new_empty(rows, head_dim, dtype=dtype) for dtype in (key.dtype, key.dtype, spread)
    )
    block_d, block_m = power_of_two(head_dim), power_of_two(capacity)
    # 8 KiB of keys a warp: most clusters need one, whose sums take no barriers.
    warps = max(1, min(8, block_d * block_m * key.element_size() >> 13))
    launch(
        _means_kernel, (sets.num_key_rows, heads),
        key, value, sets.table, sets.set_of_row, members, count, log_mass, key_mean, value_mean,
        key_variance, *key.stride()[:3], *value.stride()[:3], sets.num_slots,
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=block_m, PADDING=PADDING, num_warps=warps,
    )  # fmt: skip
    members = members.view(heads, -1, capacity)
    return Clusters(members, count, log_mass, key_mean, value_mean, key_variance)


@kept_on_device
def _key_sets(
    key_start: tuple[int, ...], length: int, size: int, num_clusters: int, capacity: int, device: torch.device
) -> PointSets:
    """The blocks as point sets. Points are token ids."""
    sets = [
        PointSet(
            row=start // length,
            start=start % length,
            length=size,
            num_clusters=num_clusters,
            is_query=False,
            target=start % length,
            num_points=size,
            first_point=start,
            capacity=capacity,
        )
        for start in key_start
    ]
    return point_sets(sets, [], device)
