"""Capacity: a full cluster of keys keeps its nearest points, and the rest go to their next best with room.

Points sorted by cluster come in; the members of each cluster come out. The algorithm is that of
`muse_hf.reference.clustering.assign_with_capacity`: a few rounds in which homeless points choose again, and
what is left then fills the free places in order.
"""

import torch
import triton
import triton.language as tl
from muse_hf.kernels.common import (
    gather_tokens,
    load_tokens,
    ordered,
    plane_of,
    power_of_two,
    wait_for_previous_kernel,
)
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
    wait_for_previous_kernel()
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    number = tl.load(set_of_row + row)
    capacity = set_field(table, number, CAPACITY)
    first_slot = (row - set_field(table, number, FIRST_ROW)) * capacity + set_field(table, number, FIRST_SLOT)
    slots = members + head * num_slots + first_slot
    begin = tl.load(first + head * num_rows + row)
    many = tl.load(count + head * num_rows + row)
    closeness = near + head * num_points + begin
    lane = tl.arange(0, BLOCK_N)
    least = tl.full([], 0, tl.uint32)
    left = 0  # how many are accepted of those that are as near as the farthest accepted
    if many > capacity:
        lowest, highest = tl.full([BLOCK_N], 0xFFFFFFFF, tl.uint32), tl.zeros([BLOCK_N], tl.uint32)
        for p in range(0, many, BLOCK_N):
            bits = tl.load(closeness + tl.minimum(p + lane, many - 1)).to(tl.uint32, bitcast=True)
            lowest, highest = tl.minimum(lowest, bits), tl.maximum(highest, bits)
        least = tl.min(lowest, 0)
        shift = _highest_digit(tl.max(highest, 0) ^ least, 1)
        least = least >> shift >> 1 << 1 << shift  # the bits that all have in common
        reach, above = many, 0  # how many are as near as the least, and beyond those that start like it
        while (reach > capacity) & (shift >= 0):
            trial = least + (tl.full([], 1, tl.uint32) << shift)
            enough = 0
            for p in range(0, many, BLOCK_N):
                bits = tl.load(closeness + p + lane, mask=p + lane < many, other=0)
                enough += tl.sum((bits.to(tl.uint32, bitcast=True) >= trial).to(tl.int32), 0)
            least = tl.where(enough >= capacity, trial, least)
            reach = tl.where(enough >= capacity, enough, reach)
            above = tl.where(enough >= capacity, above, enough)
            shift -= 1
        left = capacity - above
    taken = 0
    for p in range(0, many, BLOCK_N):
        inside = p + lane < many
        points = tl.load(order + head * num_points + begin + p + lane, mask=inside, other=0)
        accepted = inside
        if many > capacity:
            bits = tl.load(closeness + p + lane, mask=inside, other=0).to(tl.uint32, bitcast=True)
            equal = (inside & (bits == least)).to(tl.int32)
            accepted = inside & ((bits > least) | ((equal == 1) & (tl.cumsum(equal, 0) <= left)))
            left -= tl.sum(equal, 0)
        place = taken + tl.cumsum(accepted.to(tl.int32), 0) - 1
        tl.store(slots + place, points, mask=accepted)
        tl.store(
            label + head * num_points + points, tl.full([BLOCK_N], -1, tl.int32), mask=inside & ~accepted
        )
        taken += tl.sum(accepted.to(tl.int32), 0)
    tl.store(held + head * num_key_rows + row, taken)


@triton.jit
def _highest_digit(number, WIDTH: tl.constexpr):
    """Where the highest digit of WIDTH bits that is not 0 begins in a uint32."""
    shift = 32 - WIDTH
    while (shift > 0) & (number >> shift == 0):
        shift -= WIDTH
    return shift


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
def _choose(
    plane, token_of_point, stride, centroids, held, homeless, choice, near, found, num_clusters, capacity,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """Each homeless point chooses the nearest cluster with room.

    Returns how many chose each cluster, and the least and the largest closeness.
    """
    lane = tl.arange(0, BLOCK_X)
    counts = tl.zeros([BINS], tl.int32)
    lowest, highest = tl.full([BLOCK_X], 0xFFFFFFFF, tl.uint32), tl.zeros([BLOCK_X], tl.uint32)
    for p in range(0, found, BLOCK_X):
        places = tl.minimum(p + lane, found - 1)
        tokens = tl.load(homeless + places) + token_of_point
        x = gather_tokens(plane, tokens, stride, HEAD_DIM, BLOCK_D)
        best = tl.full([BLOCK_X], -float("inf"), tl.float32)
        labels = tl.zeros([BLOCK_X], tl.int32)
        for first in range(0, num_clusters, BLOCK_C):
            clusters = first + tl.arange(0, BLOCK_C)
            exists = clusters < num_clusters
            c = load_tokens(centroids, clusters, exists, HEAD_DIM, HEAD_DIM, BLOCK_D)
            wide = c.to(tl.float32)
            full = tl.load(held + clusters, mask=exists, other=capacity) >= capacity
            bias = tl.where(full, -float("inf"), -0.5 * tl.sum(wide * wide, 1))
            best, labels = nearer(x, c, bias, first, best, labels)
        labels = tl.minimum(labels, num_clusters - 1)
        wide = x.to(tl.float32)
        closeness = ordered(best - 0.5 * tl.sum(wide * wide, 1))
        lowest, highest = tl.minimum(lowest, closeness), tl.maximum(highest, closeness)
        counts += tl.histogram(labels, BINS, mask=p + lane < found)
        tl.store(choice + places, labels)
        tl.store(near + places, closeness.to(tl.int32, bitcast=True))
    return counts, tl.min(lowest, 0), tl.max(highest, 0)


@triton.jit
def _least_accepted(
    choice, near, found, counts, room, lowest, highest, BLOCK_N: tl.constexpr, BINS: tl.constexpr
):
    """The least closeness that each cluster accepts, and how many it accepts of those that are just as near.

    Found two bits at a time, until no cluster is chosen by more than it has room for. Often none ever is.
    """
    digits, lane = tl.arange(0, 4)[None, :], tl.arange(0, BLOCK_N)
    shift = _highest_digit(lowest ^ highest, 2)
    least = tl.zeros([BINS], tl.uint32) + (lowest >> shift >> 2 << 2 << shift)  # what all have in common
    left, tied = room, counts  # places for, and number of, those whose bits so far are those of the least
    while (shift >= 0) & (tl.max(tied - left, 0) > 0):
        with_digit = tl.zeros([4 * BINS], tl.int32)
        for p in range(0, found, BLOCK_N):
            inside = p + lane < found
            labels = tl.load(choice + p + lane, mask=inside, other=0)
            bits = tl.load(near + p + lane, mask=inside, other=0).to(tl.uint32, bitcast=True)
            differ = (bits ^ tl.gather(least, labels, 0)) >> shift >> 2
            digit = (bits >> shift & 3).to(tl.int32)
            with_digit += tl.histogram(labels * 4 + digit, 4 * BINS, mask=inside & (differ == 0))
        of_digit = tl.reshape(with_digit, [BINS, 4])
        through = tl.sum(of_digit, 1)[:, None] - tl.cumsum(of_digit, 1) + of_digit  # this digit or a larger
        digit = tl.maximum(tl.sum((through >= left[:, None]).to(tl.int32), 1) - 1, 0)
        left -= tl.sum(tl.where(digits > digit[:, None], of_digit, 0), 1)
        tied = tl.sum(tl.where(digits == digit[:, None], of_digit, 0), 1)
        least |= digit.to(tl.uint32) << shift
        shift -= 2
    return least, left


@triton.jit
def _move_in(
    slots, homeless, choice, near, found, taken, least, left, capacity,
    BLOCK_N: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Accept all that are near enough, and keep the list of those who are still homeless.

    Returns how many members each cluster has now, and how many points are homeless.
    """
    lane = tl.arange(0, BLOCK_N)
    rejected_before = 0
    for p in range(0, found, BLOCK_N):
        inside = p + lane < found
        labels = tl.load(choice + p + lane, mask=inside, other=0)
        bits = tl.load(near + p + lane, mask=inside, other=0).to(tl.uint32, bitcast=True)
        bound = tl.gather(least, labels, 0)
        equal, larger = inside & (bits == bound), inside & (bits > bound)
        # Candidates by cluster, larger before equal, and in their order; behind them all others.
        turn = (labels * 2 + equal.to(tl.int32)) * BLOCK_N + lane
        turn = tl.sort(tl.where(equal | larger, turn, 2 * BINS * BLOCK_N))
        many = tl.histogram(labels, BINS, mask=equal | larger)
        many_larger = tl.histogram(labels, BINS, mask=larger)
        many_accepted = tl.minimum(many, many_larger + left)
        first = tl.cumsum(many, 0) - many
        labels, from_lane = turn // (2 * BLOCK_N), turn % BLOCK_N
        exists = labels < BINS
        labels = tl.minimum(labels, BINS - 1)
        accepted = exists & (lane < tl.gather(first + many_accepted, labels, 0))
        place = labels * capacity + lane + tl.gather(taken - first, labels, 0)
        points = tl.load(homeless + p + from_lane, mask=accepted, other=0)
        tl.store(slots + place, points, mask=accepted)
        taken += many_accepted
        left -= many_accepted - tl.minimum(many_accepted, many_larger)
        # Those who are not accepted go on in the list, which is rewritten in place.
        points = tl.load(homeless + p + lane, mask=inside, other=0)
        tl.store(choice + p + from_lane, tl.full([BLOCK_N], -1, tl.int32), mask=accepted)
        tl.debug_barrier()
        rejected = (tl.load(choice + p + lane, mask=inside, other=-1) >= 0).to(tl.int32)
        tl.store(homeless + rejected_before + tl.cumsum(rejected, 0) - 1, points, mask=rejected == 1)
        rejected_before += tl.sum(rejected, 0)
    return taken, rejected_before


@triton.jit
def _fill(
    slots, homeless, found, taken, capacity, exists,
    BLOCK_N: tl.constexpr, BINS: tl.constexpr, LOG_BINS: tl.constexpr,
):  # fmt: skip
    """Those who are still homeless take the free places in order. Returns how many members clusters have."""
    free = tl.where(exists, capacity - taken, 0)
    free_through = tl.cumsum(free, 0)
    for p in range(0, found, BLOCK_N):
        order = p + tl.arange(0, BLOCK_N)
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
    return taken + tl.minimum(free, tl.maximum(found - (free_through - free), 0))


@triton.jit
def _rehouse_kernel(
    key, table, centroids, label, homeless, near, members, held,
    stride_b, stride_h, stride_n, num_rows, num_key_rows, num_points, num_slots,
    ROUNDS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
    BINS: tl.constexpr, LOG_BINS: tl.constexpr,
):  # fmt: skip
    """The other rounds, and the free places for what is still homeless. One program a set and head.

    What sorting left in `homeless` and `near`, and in `label` once the homeless points are listed, is not
    needed any more: they become lists of these points, how near they are and what they choose.
    """
    wait_for_previous_kernel()
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
    centroids += (head * num_rows + first_row) * HEAD_DIM
    bins = tl.arange(0, BINS)
    exists = bins < num_clusters
    taken = tl.load(held + bins, mask=exists, other=0)
    found = set_field(table, number, NUM_POINTS) - tl.sum(taken, 0)
    if found > 0:
        _list_homeless(choice, homeless, first_point, set_field(table, number, NUM_POINTS), BLOCK_L)
        tl.debug_barrier()
    for _ in range(ROUNDS):
        if found > 0:
            counts, lowest, highest = _choose(
                plane, token_of_point, stride_n, centroids, held, homeless, choice, near, found,
                num_clusters, capacity, HEAD_DIM, BLOCK_D, BLOCK_X, BLOCK_C, BINS,
            )  # fmt: skip
            tl.debug_barrier()
            room = tl.where(exists, capacity - taken, 0)
            least, left = _least_accepted(choice, near, found, counts, room, lowest, highest, BLOCK_P, BINS)
            taken, found = _move_in(
                slots, homeless, choice, near, found, taken, least, left, capacity, BLOCK_N, BINS
            )
            tl.store(held + bins, taken, mask=exists)
            tl.debug_barrier()
    if found > 0:
        taken = _fill(slots, homeless, found, taken, capacity, exists, BLOCK_N, BINS, LOG_BINS)
        tl.store(held + bins, taken, mask=exists)


def members_with_capacity(
    key: torch.Tensor, sets: PointSets, centroids: torch.Tensor,
    groups: Groups, label: torch.Tensor, near: torch.Tensor,
) -> Groups:  # fmt: skip
    """The keys by cluster, where no cluster holds more than its capacity.

    The slots of a cluster are `capacity` consecutive ones, of which its members take the first. Overwrites
    `label`, `near` and the order of the groups where they are of keys.

    Args:
        groups, label, near: See `sort_by_cluster`.
    """
    heads, head_dim = key.shape[1], key.shape[3]
    members = key.new_empty(heads, sets.num_slots, dtype=torch.int32)
    held = members.new_empty(heads, sets.num_key_rows)
    sizes = (sets.num_rows, sets.num_key_rows, sets.num_points, sets.num_slots)
    # About two thirds of it are members of a cluster, in one warp wherever 256 places are enough.
    block_n = min(1024, power_of_two(sets.max_capacity, 64))
    launch(
        _accept_kernel, (sets.num_key_rows, heads),
        sets.table, sets.set_of_row, label, groups.order, near, groups.first, groups.count,
        members, held, *sizes, BLOCK_N=block_n, num_warps=max(1, block_n // 256),
    )  # fmt: skip
    bins, block_d = power_of_two(sets.max_clusters), power_of_two(head_dim)
    # Of programs for small sets several share a multiprocessor. Products of float32 take many registers.
    warps, block_x, block_c = (4, 64, 32) if sets.max_key_points <= 2048 else (8, 256, 64)
    if key.dtype == torch.float32:
        block_x = block_c = 32
    block_x = min(block_x, (1 << 14) // block_d)  # 32 KiB
    launch(
        _rehouse_kernel, (sets.num_key_sets, heads),
        key, sets.table, centroids, label, groups.order, near, members, held,
        *key.stride()[:3], *sizes, ROUNDS=ROUNDS - 1, HEAD_DIM=head_dim, BLOCK_D=block_d,
        BLOCK_X=block_x, BLOCK_N=256, BLOCK_P=128 * warps, BLOCK_L=256 * warps, BLOCK_C=min(block_c, bins),
        BINS=bins, LOG_BINS=bins.bit_length() - 1, num_warps=warps, num_stages=2,
    )  # fmt: skip
    return Groups(members, sets.first_slot, held)
