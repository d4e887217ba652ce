"""k-means and its capacity limit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muse_hf.reference.clustering import assign_with_capacity, kmeans_centroids, nearest_centroid


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_nearest_is_the_smallest_euclidean_distance():
    points, centroids = random(2, 50, 3), random(2, 7, 3, seed=1)
    index, closeness = nearest_centroid(points, centroids)
    distance = torch.cdist(points, centroids)
    assert torch.equal(index, distance.argmin(-1))
    torch.testing.assert_close(closeness, -0.5 * distance.amin(-1).square())


def test_no_update_starts_from_evenly_spaced_points():
    points = random(1, 10, 2)
    assert torch.equal(kmeans_centroids(points, 4, iters=0), points[:, [0, 2, 5, 7]])


def test_an_update_is_the_mean_of_the_nearest_points():
    points = random(3, 60, 4)
    start = kmeans_centroids(points, 5, iters=0)
    nearest, _ = nearest_centroid(points, start)
    expected = torch.stack(
        [torch.stack([points[x][nearest[x] == c].mean(0) for c in range(5)]) for x in range(3)]
    )
    torch.testing.assert_close(kmeans_centroids(points, 5, iters=1), expected)


def test_a_centroid_without_points_stays():
    points = torch.zeros(1, 8, 2, dtype=torch.float64)
    points[:, 4:] = 1  # only two distinct points for four centroids
    centroids = kmeans_centroids(points, 4, iters=3)
    assert centroids.isfinite().all()
    assert torch.equal(centroids, points[:, ::2])


def test_points_past_the_valid_ones_do_not_count():
    points = random(2, 12, 3)
    cut = kmeans_centroids(points[:, :7], 3, iters=2)
    points[:, 7:] = 100
    torch.testing.assert_close(kmeans_centroids(points, 3, 2, num_valid=torch.tensor([7, 7])), cut)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    num_points=st.integers(1, 60),
    num_clusters=st.integers(1, 12),
    slack=st.floats(1, 3),
    seed=st.integers(0, 99),
)
def test_no_cluster_is_over_full_and_every_point_has_one(num_points, num_clusters, slack, seed):
    num_clusters = min(num_clusters, num_points)
    capacity = min(num_points, -int(-slack * num_points // num_clusters))
    points = random(2, num_points, 2, seed=seed)
    cluster = assign_with_capacity(points, points[:, :num_clusters], capacity)
    assert cluster.min() >= 0
    assert cluster.max() < num_clusters
    for row in cluster:
        assert row.bincount().max() <= capacity


def test_identical_points_fill_clusters_in_order():
    cluster = assign_with_capacity(torch.zeros(1, 6, 2), torch.zeros(1, 3, 2), capacity=2)
    assert sorted(cluster[0].tolist()) == [0, 0, 1, 1, 2, 2]


def test_a_full_cluster_keeps_its_nearest_points():
    centroids = torch.tensor([[[0.0], [10.0]]])
    points = torch.tensor([[[1.0], [0.1], [0.2], [0.3]]])
    assert assign_with_capacity(points, centroids, capacity=3).tolist() == [[1, 0, 0, 0]]


def test_without_a_binding_capacity_the_nearest_is_taken():
    points, centroids = random(2, 40, 3), random(2, 5, 3, seed=1)
    assert torch.equal(assign_with_capacity(points, centroids, 40), nearest_centroid(points, centroids)[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_points_still_get_a_cluster(value):
    points = random(1, 20, 2)
    points[0, 3] = value
    cluster = assign_with_capacity(points, points[:, :4], capacity=5)
    assert cluster.min() >= 0
    assert cluster.max() < 4
    assert cluster[0].bincount().max() <= 5
