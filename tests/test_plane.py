"""Two principal components: by hand, against scikit-learn, and where there is nothing to see."""

import math

import pytest
import torch
from sklearn.decomposition import PCA

from fedssl.evaluate import principal_plane


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_two_features_that_say_the_same(direction: float) -> None:
    """Standardised both are (-1, 0, 1) times sqrt(3/2), up to sign: a line, on which they lie sqrt(2) as far apart."""
    features = torch.tensor([[0.0, 0.0], [2.0, 20.0 * direction], [4.0, 40.0 * direction]])
    plane = principal_plane(features)
    assert plane is not None
    expected = torch.tensor([[-math.sqrt(3), 0.0], [0.0, 0.0], [math.sqrt(3), 0.0]])  # the first feature's entry is +
    torch.testing.assert_close(plane.coordinates, expected)
    torch.testing.assert_close(plane.shares, torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(("n", "d"), [(50, 6), (5, 40)])
def test_as_scikit_learn_has_it(n: int, d: int) -> None:
    features = (
        torch.randn(n, d, generator=torch.Generator().manual_seed(0)).double()
        @ torch.diag(torch.arange(1, d + 1)).double()
    )
    features[:, 1] += features[:, 0]
    z = ((features - features.mean(0)) / features.std(0, correction=0)).numpy()
    reference = PCA(n_components=2, svd_solver="full").fit(z)
    plane = principal_plane(features.float())
    assert plane is not None
    torch.testing.assert_close(
        plane.coordinates.abs(), torch.from_numpy(reference.transform(z)).abs().float(), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        plane.shares, torch.from_numpy(reference.explained_variance_ratio_).float(), atol=1e-5, rtol=1e-4
    )


def test_the_sign_does_not_follow_the_order_of_images() -> None:
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    plane, shuffled = principal_plane(features), principal_plane(features[order])
    assert plane is not None
    assert shuffled is not None
    torch.testing.assert_close(shuffled.coordinates, plane.coordinates[order], atol=1e-5, rtol=1e-5)


def test_a_collapsed_network_puts_all_images_in_one_place() -> None:
    plane = principal_plane(torch.full((4, 3), 7.0))
    assert plane is not None
    assert not plane.coordinates.any()
    assert not plane.shares.any()


def test_one_feature_has_no_second_direction() -> None:
    plane = principal_plane(torch.tensor([[1.0], [3.0]]))
    assert plane is not None
    torch.testing.assert_close(plane.coordinates, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_network_has_no_map(value: float) -> None:
    assert principal_plane(torch.tensor([[1.0, 2.0], [value, 3.0]])) is None
