"""Capacity: a full cluster of keys keeps its nearest points, and the rest go to their next best with room.

Points sorted by cluster come in; the members of each cluster come out. The algorithm is that of
`muse_hf.reference.clustering.assign_with_capacity`: a few rounds in which homeless points choose again, and
what is left then fills the free places in order.
"""

import torch
import triton
import triton.language as tl
from muse_hf.kernels.common import gather_tokens, load_tokens, ordered, plane_of, power_of_two
from muse_hf.kernels.kmeans import Groups, nearer
from muse_hf.kernels.launch import launch
from muse_hf.kernels.point_sets import (
    CAPACITY,
    CLUSTERS,
    FIRST_POINT,
    FIRST_ROW,
    FIRST_SLOT,
    NUM_POINTS,
    ROW,
    TARGET,
    PointSets,
    set_field,
)

ROUNDS = 4


@triton.jit
def _accept_kernel(
    table, set_of_row, label, order, near, first, count, members, held,
    num_rows, num_key_rows, num_points, num_slots, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The first round. A cluster that too many chose marks those it rejects with the label -1.

    One program a cluster. The least closeness accepted is found bit by bit; the first among equals win.
    """
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    number = tl.load(set_of_row + row)
    capacity = set_field(table, number, CAPACITY)
    first_slot = (row - set_field(table, number, FIRST_ROW)) * capacity + set_field(table, number, FIRST_SLOT)
    slots = members + head * num_slots + first_slot
    begin = tl.load(first + head * num_rows + row)
    many = tl.load(count + head * num_rows + row)
    closeness = near + head * num_points + begin
    lane = tl.arange(0, BLOCK_N)
    least = tl.full([1], 0, tl.uint32)
    left = tl.zeros([1], tl.int32)  # how many of those that are as near as the farthest accepted
    if many > capacity:
        one = least + 1
        for i in range(32):
            trial = least | (one << (31 - i))
            enough = tl.zeros([1], tl.int32)
            for p in range(0, many, BLOCK_N):
                bits = tl.load(closeness + p + lane, mask=p + lane < many, other=0)
                enough += tl.sum((bits.to(tl.uint32, bitcast=True) >= trial).to(tl.int32), 0, keep_dims=True)
            least = tl.where(enough >= capacity, trial, least)
        left += capacity
        for p in range(0, many, BLOCK_N):
            bits = tl.load(closeness + p + lane, mask=p + lane < many, other=0)
            left -= tl.sum((bits.to(tl.uint32, bitcast=True) > least).to(tl.int32), 0, keep_dims=True)
    taken = 0
    for p in range(0, many, BLOCK_N):
        inside = p + lane < many
        points = tl.load(order + head * num_points + begin + p + lane, mask=inside, other=0)
        accepted = inside
        if many > capacity:
            bits = tl.load(closeness + p + lane, mask=inside, other=0).to(tl.uint32, bitcast=True)
            equal = (inside & (bits == least)).to(tl.int32)
            accepted = inside & ((bits > least) | ((equal == 1) & (tl.cumsum(equal, 0) <= left)))
            left -= tl.sum(equal, 0, keep_dims=True)
        place = taken + tl.cumsum(accepted.to(tl.int32), 0) - 1
        tl.store(slots + place, points, mask=accepted)
        tl.store(
            label + head * num_points + points, tl.full([BLOCK_N], -1, tl.int32), mask=inside & ~accepted
        )
        taken += tl.sum(accepted.to(tl.int32), 0)
    tl.store(held + head * num_key_rows + row, taken)


@triton.jit
def _list_homeless(label, homeless, first_point, many, BLOCK_N: tl.constexpr):
    """List the points of a set with label -1 in their order."""
    found = 0
    for p in range(0, many, BLOCK_N):
        places = p + tl.arange(0, BLOCK_N)
        is_homeless = (tl.load(label + places, mask=places < many, other=0) < 0).to(tl.int32)
        at = found + tl.cumsum(is_homeless, 0) - 1
        tl.store(homeless + at, first_point + places, mask=is_homeless == 1)
        found += tl.sum(is_homeless, 0)


@triton.jit
def _rehouse_kernel(
    key, table, centroids, label, homeless, near, members, held,
    stride_b, stride_h, stride_n, num_rows, num_key_rows, num_points, num_slots,
    ROUNDS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BINS: tl.constexpr,
    LOG_BINS: tl.constexpr,
):  # fmt: skip
    """The other rounds, and the free places for what is still homeless. One program a set and head.

    What sorting left in `homeless` and `near`, and in `label` once the homeless points are listed, is not
    needed any more: they become lists of these points, how near they are and what they choose.
    """
    number, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first_point = set_field(table, number, FIRST_POINT)
    num_clusters = set_field(table, number, CLUSTERS)
    capacity = set_field(table, number, CAPACITY)
    first_row = set_field(table, number, FIRST_ROW)
    plane = plane_of(key, set_field(table, number, ROW), head, stride_b, stride_h)
    token_of_point = set_field(table, number, TARGET) - first_point
    slots = members + head * num_slots + set_field(table, number, FIRST_SLOT)
    own = head * num_points + first_point
    homeless, choice, near = homeless + own, label + own, near + own
    held += head * num_key_rows + first_row
    centroid_rows = head * num_rows + first_row
    bins = tl.arange(0, BINS)
    exists = bins < num_clusters
    taken = tl.load(held + bins, mask=exists, other=0)
    found = set_field(table, number, NUM_POINTS) - tl.sum(taken, 0)
    if found > 0:
        _list_homeless(choice, homeless, first_point, set_field(table, number, NUM_POINTS), BLOCK_P)
        tl.debug_barrier()
    token_lane, lane, wide_lane = tl.arange(0, BLOCK_X), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    for _ in range(ROUNDS):
        if found > 0:
            room = tl.where(exists, capacity - taken, 0)
            # Choose: the nearest cluster with room.
            for p in range(0, found, BLOCK_X):
                inside = p + token_lane < found
                tokens = tl.load(homeless + tl.minimum(p + token_lane, found - 1)) + token_of_point
                x = gather_tokens(plane, tokens, stride_n, HEAD_DIM, BLOCK_D)
                best = tl.full([BLOCK_X], -float("inf"), tl.float32)
                labels = tl.zeros([BLOCK_X], tl.int32)
                for first in range(0, num_clusters, BLOCK_C):
                    clusters = first + tl.arange(0, BLOCK_C)
                    c = load_tokens(
                        centroids,
                        centroid_rows + clusters,
                        clusters < num_clusters,
                        HEAD_DIM,
                        HEAD_DIM,
                        BLOCK_D,
                    )
                    wide = c.to(tl.float32)
                    full = tl.load(held + clusters, mask=clusters < num_clusters, other=capacity) >= capacity
                    bias = tl.where(full, -float("inf"), -0.5 * tl.sum(wide * wide, 1))
                    best, labels = nearer(x, c, bias, first, best, labels)
                wide = x.to(tl.float32)
                closeness = ordered(best - 0.5 * tl.sum(wide * wide, 1)).to(tl.int32, bitcast=True)
                tl.store(choice + p + token_lane, tl.minimum(labels, num_clusters - 1), mask=inside)
                tl.store(near + p + token_lane, closeness, mask=inside)
            tl.debug_barrier()
            # The least closeness that each cluster accepts, two bits at a time, and how many it accepts of
            # those that are just as near.
            least = tl.zeros([BINS], tl.uint32)
            left = room
            for i in range(16):
                shift = 30 - 2 * i
                counts = tl.zeros([4 * BINS], tl.int32)
                for p in range(0, found, BLOCK_P):
                    inside = p + wide_lane < found
                    labels = tl.load(choice + p + wide_lane, mask=inside, other=0)
                    bits = tl.load(near + p + wide_lane, mask=inside, other=0).to(tl.uint32, bitcast=True)
                    differ = (bits ^ tl.gather(least, labels, 0)) >> 1 >> (shift + 1)
                    digit = (bits >> shift & 3).to(tl.int32)
                    counts += tl.histogram(labels * 4 + digit, 4 * BINS, mask=inside & (differ == 0))
                counts = tl.reshape(counts, [BINS, 4])
                through = tl.sum(counts, 1)[:, None] - tl.cumsum(counts, 1) + counts  # this digit or a larger
                digit = tl.maximum(tl.sum((through >= left[:, None]).to(tl.int32), 1) - 1, 0)
                larger = tl.arange(0, 4)[None, :] > digit[:, None]
                left -= tl.sum(tl.where(larger, counts, 0), 1)
                least |= digit.to(tl.uint32) << shift
            # Accept, and keep the list of those who are still homeless.
            rejected_before = 0
            for p in range(0, found, BLOCK_N):
                inside = p + lane < found
                points = tl.load(homeless + p + lane, mask=inside, other=0)
                labels = tl.load(choice + p + lane, mask=inside, other=0)
                bits = tl.load(near + p + lane, mask=inside, other=0).to(tl.uint32, bitcast=True)
                earlier = (labels[:, None] == labels[None, :]) & (lane[None, :] < lane[:, None])
                bound = tl.gather(least, labels, 0)
                equal = inside & (bits == bound)
                equal_rank = tl.sum((earlier & equal[None, :]).to(tl.int32), 1)
                accepted = inside & ((bits > bound) | (equal & (equal_rank < tl.gather(left, labels, 0))))
                rank = tl.sum((earlier & accepted[None, :]).to(tl.int32), 1)
                place = labels * capacity + tl.gather(taken, labels, 0) + rank
                tl.store(slots + place, points, mask=accepted)
                taken += tl.histogram(labels, BINS, mask=accepted)
                left -= tl.histogram(labels, BINS, mask=equal)
                rejected = (inside & ~accepted).to(tl.int32)
                tl.debug_barrier()  # the list is rewritten in place
                tl.store(homeless + rejected_before + tl.cumsum(rejected, 0) - 1, points, mask=rejected == 1)
                rejected_before += tl.sum(rejected, 0)
            found = rejected_before
            tl.store(held + bins, taken, mask=exists)
            tl.debug_barrier()
    if found > 0:
        free = tl.where(exists, capacity - taken, 0)
        free_through = tl.cumsum(free, 0)
        for p in range(0, found, BLOCK_N):
            order = p + lane
            inside = order < found
            points = tl.load(homeless + order, mask=inside, other=0)
            # The first cluster with more free places up to it than points that come before.
            labels = tl.zeros([BLOCK_N], tl.int32)
            for i in range(LOG_BINS):
                step = BINS >> (i + 1)
                through = tl.gather(free_through, labels + step - 1, 0)
                labels = tl.where(through <= order, labels + step, labels)
            before = tl.gather(free_through - free, labels, 0)
            place = labels * capacity + tl.gather(taken, labels, 0) + order - before
            tl.store(slots + place, points, mask=inside)
        taken += tl.minimum(free, tl.maximum(found - (free_through - free), 0))
        tl.store(held + bins, taken, mask=exists)


def members_with_capacity(
    key: torch.Tensor, sets: PointSets, centroids: torch.Tensor,
    groups: Groups, label: torch.Tensor, near: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Members (Hkv, slots) of the clusters of keys, and how many (Hkv, rows) each holds; int32.

    The slots of a cluster are `capacity` consecutive ones, -1 where there is no member. Overwrites
    `label`, `near` and the order of the groups where they are of keys.

    Args:
        groups, label, near: See `sort_by_cluster`.
    """
    heads, head_dim = key.shape[1], key.shape[3]
    members = torch.full((heads, sets.num_slots), -1, dtype=torch.int32, device=key.device)
    held = members.new_empty(heads, sets.num_key_rows)
    sizes = (sets.num_rows, sets.num_key_rows, sets.num_points, sets.num_slots)
    launch(
        _accept_kernel, (sets.num_key_rows, heads),
        sets.table, sets.set_of_row, label, groups.order, near, groups.first, groups.count,
        members, held, *sizes, BLOCK_N=1024,
    )  # fmt: skip
    bins, block_d = power_of_two(sets.max_clusters), power_of_two(head_dim)
    block_x = max(16, min(256, (1 << 15) // (block_d * key.element_size())))  # 32 KiB
    launch(
        _rehouse_kernel, (sets.num_key_sets, heads),
        key, sets.table, centroids, label, groups.order, near, members, held,
        *key.stride()[:3], *sizes, ROUNDS=ROUNDS - 1, HEAD_DIM=head_dim, BLOCK_D=block_d,
        BLOCK_X=block_x, BLOCK_N=64, BLOCK_P=2048, BLOCK_C=min(64, bins), BINS=bins,
        LOG_BINS=bins.bit_length() - 1, num_warps=16, num_stages=2,
    )  # fmt: skip
    return members, held
