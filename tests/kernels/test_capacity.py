"""Members of clusters of limited capacity against the reference, on numbers that both compute exactly."""

import pytest
import torch
from muse_hf.kernels.capacity import members_with_capacity
from muse_hf.kernels.kmeans import kmeans, sort_by_cluster
from muse_hf.kernels.point_sets import PointSet, point_sets

from muse_hf.reference.clustering import assign_with_capacity, kmeans_centroids
from tests.kernels.comparing import DEVICE


@pytest.mark.parametrize(
    ("length", "num_clusters", "capacity", "most"),
    [
        (300, 20, 23, 3),
        (300, 20, 15, 3),
        (700, 3, 240, 1),
        (120, 70, 3, 4),
        (300, 6, 50, 0),
    ],
    ids=["room", "no room to spare", "large clusters", "tiles of clusters", "all alike"],
)
def test_members_are_those_of_the_reference(length, num_clusters, capacity, most):
    """Small integers, so that many keys are equally near and the first of them must win.

    Half of the keys lie in one corner, which makes clusters full in more than one round.
    """
    generator = torch.Generator().manual_seed(0)
    key = torch.randint(-most, most + 1, (1, 2, length, 16), generator=generator)
    key[:, :, ::2] = key[:, :, ::2].clamp(min=most - 1)
    key = key.to(DEVICE, torch.float32)
    sets = [PointSet(0, 0, length, num_clusters, False, 0, length, 0, capacity)]
    sets = point_sets(sets, [], key.device)
    centroids = kmeans(key, key, sets, 0)
    members, _, held = members_with_capacity(
        key, sets, centroids, *sort_by_cluster(key, key, sets, centroids)
    )
    points = key[0].cpu()
    expected = assign_with_capacity(points, kmeans_centroids(points, num_clusters, 0), capacity)
    for head in range(2):
        actual = torch.full((length,), -1)
        for cluster, slots in enumerate(members[head].cpu().unflatten(0, (num_clusters, capacity))):
            number = int(held[head, cluster])
            actual[slots[:number].long()] = cluster
        different = (actual != expected[head]).sum()
        assert different == 0, f"{different} of {length} keys are in other clusters than in the reference"
