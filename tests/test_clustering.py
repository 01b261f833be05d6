"""Balanced assignment: its closed form for two by two, its definition, and clusters of equal size."""

import math

import pytest
import torch
import torch.nn.functional as F

from fedssl.clustering import balanced_assignment, equal_clusters, equal_kmeans


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_two_points_and_two_clusters(temperature: float) -> None:
    """The sums leave ((p, 1 - p), (1 - p, p)); scaling rows and columns keeps p11 p22 / (p12 p21)."""
    scores = torch.tensor([[0.3, 0.1], [0.5, 0.2]], dtype=torch.float64)
    p = 1 / (1 + math.exp(-(0.3 + 0.2 - 0.1 - 0.5) / (2 * temperature)))
    expected = torch.tensor([[p, 1 - p], [1 - p, p]], dtype=torch.float64)
    torch.testing.assert_close(balanced_assignment(scores, temperature, 50), expected)


def test_it_is_sinkhorns_iteration_written_out() -> None:
    torch.manual_seed(0)
    scores = torch.rand(6, 3, dtype=torch.float64)
    p = [[math.exp(s / 0.2) for s in row] for row in scores.tolist()]
    for _ in range(4):
        for j in range(3):
            column = sum(p[i][j] for i in range(6))
            for i in range(6):
                p[i][j] *= (6 / 3) / column
        for i in range(6):
            row = sum(p[i])
            p[i] = [value / row for value in p[i]]
    torch.testing.assert_close(balanced_assignment(scores, 0.2, 4), torch.tensor(p, dtype=torch.float64))


@pytest.mark.parametrize(("n", "k"), [(6, 3), (32, 16), (5, 5), (3, 7)])
def test_rows_sum_to_one_and_columns_to_equal_shares(n: int, k: int) -> None:
    torch.manual_seed(0)
    p = balanced_assignment(torch.rand(n, k), 0.1, 300)
    torch.testing.assert_close(p.sum(dim=1), torch.ones(n))
    torch.testing.assert_close(p.sum(dim=0), torch.full((k,), n / k), atol=1e-3, rtol=0)


def test_a_sharp_assignment_of_huge_scores_stays_finite() -> None:
    assert balanced_assignment(torch.tensor([[1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]), 1e-3, 20).isfinite().all()


def test_equal_clusters_by_hand() -> None:
    """Both first points want cluster 0, which then has no room for the third; the fourth takes what is left."""
    wanted = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]])
    assert equal_clusters(wanted).tolist() == [0, 0, 1, 1]
    assert equal_clusters(torch.full((4, 2), 0.5)).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(("n", "k"), [(8, 4), (128, 16), (12, 12), (12, 1)])
def test_clusters_are_equal_however_skewed_the_assignment(n: int, k: int) -> None:
    torch.manual_seed(0)
    skewed = F.softmax(5 * torch.randn(n, k) + 9 * torch.eye(k)[0], dim=1)
    assert torch.bincount(equal_clusters(skewed), minlength=k).tolist() == [n // k] * k


def test_kmeans_finds_groups_of_equal_size() -> None:
    rng = torch.Generator().manual_seed(0)
    directions = torch.eye(5)[:4]
    z = F.normalize(directions.repeat_interleave(6, dim=0) + 0.05 * torch.randn(24, 5, generator=rng), dim=1)
    found = []
    for seed in range(5):
        draws = torch.Generator().manual_seed(seed)
        settings = {"temperature": 0.04, "num_iterations": 10, "num_sinkhorn": 20}
        centroids = equal_kmeans(z[torch.randperm(24, generator=rng)], 4, generator=draws, **settings)
        torch.testing.assert_close(centroids.norm(dim=1), torch.ones(4))
        found.append(bool(((centroids @ directions.T).amax(dim=0) > 0.99).all()))
    assert sum(found) >= 3  # as k-means does: not from every start


def test_a_centroid_is_the_direction_of_its_clusters_mean() -> None:
    z = F.normalize(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    draws = torch.Generator().manual_seed(1)
    [centroid] = equal_kmeans(z, 1, temperature=0.1, num_iterations=1, num_sinkhorn=1, generator=draws)
    torch.testing.assert_close(centroid, F.normalize(z.mean(dim=0), dim=0))
