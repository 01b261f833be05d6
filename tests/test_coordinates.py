"""Principal coordinates, held against the eigenvectors of the kernel that they never build."""

import pytest
import torch
from torch import Tensor

from fedssl.codecs import TopK
from fedssl.ensemble import coordinates, principal_coordinates
from fedssl.ensemble.base import Block
from fedssl.ensemble.means import MeanKernel
from fedssl.similarity import DenseSimilarity, FactorSimilarity, Similarity, cosine_similarity, unit_rows

N = 40


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def clients(num: int = 3, n: int = N) -> list[Similarity]:
    """Of different widths, with a few strong directions."""
    g = torch.Generator().manual_seed(0)
    return [
        FactorSimilarity(factors=unit_rows(torch.randn(n, d, generator=g) * torch.logspace(0, -2, d)))
        for d in range(4, 4 + num)
    ]


def mean_kernel(similarities: list[Similarity], n: int = N) -> Tensor:
    """The whole of it, by the rule of `ensemble=cka_kernel`."""
    rows = torch.arange(n)
    blocks = (Block(cosines=s.block(rows, rows), num_images=1.0, log_mass=None) for s in similarities)
    return MeanKernel()(blocks, 0.1)


def test_their_inner_products_are_the_mean_kernel() -> None:
    points = principal_coordinates(clients(), N, rng())
    assert points.shape[1] == 4 + 5 + 6  # the kernel's rank: no direction is made up
    torch.testing.assert_close(points @ points.T, mean_kernel(clients()), atol=1e-5, rtol=0)


def test_fewer_of_them_are_the_largest_directions() -> None:
    points = principal_coordinates(clients(), 5, rng())
    values, vectors = torch.linalg.eigh(mean_kernel(clients()).double())
    best = (vectors[:, -5:] * values[-5:]) @ vectors[:, -5:].T
    torch.testing.assert_close((points @ points.T).double(), best, atol=1e-4, rtol=0)
    variances = points.square().sum(dim=0)
    assert (variances.diff() <= 0).all()
    torch.testing.assert_close(points.mean(dim=0), torch.zeros(5), atol=1e-5, rtol=0)


def test_blocks_of_rows_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = principal_coordinates(clients(), 5, rng())
    monkeypatch.setattr(coordinates, "ENTRIES", 3 * N)
    torch.testing.assert_close(principal_coordinates(clients(), 5, rng()), whole, atol=1e-5, rtol=0)


def test_matrices_give_what_factors_give() -> None:
    columns = torch.arange(N)
    matrices = [DenseSimilarity(matrix=s.block(columns, columns)) for s in clients()]
    torch.testing.assert_close(
        principal_coordinates(matrices, 5, rng()), principal_coordinates(clients(), 5, rng()), atol=1e-4, rtol=0
    )


def test_a_rotation_of_a_client_changes_nothing_but_signs() -> None:
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=rng())).Q
    *others, last = clients()
    assert isinstance(last, FactorSimilarity)
    rotated = [*others, FactorSimilarity(factors=last.factors @ rotation)]
    ours, theirs = principal_coordinates(clients(), 5, rng()), principal_coordinates(rotated, 5, rng())
    torch.testing.assert_close(ours.abs(), theirs.abs(), atol=1e-4, rtol=0)


def test_a_collapsed_client_takes_nothing_away() -> None:
    row = torch.randn(1, 128, generator=rng())  # its inner products with itself are rounded
    collapsed = FactorSimilarity(factors=unit_rows(row.expand(N, -1)))
    with_it = principal_coordinates([*clients(), collapsed], 5, rng())
    without = principal_coordinates(clients(), 5, rng())
    torch.testing.assert_close(with_it.abs() * (4 / 3) ** 0.5, without.abs(), atol=1e-4, rtol=0)
    assert principal_coordinates([collapsed], 5, rng()).shape == (N, 0)


def test_whitening_shrinks_the_largest_directions() -> None:
    plain = principal_coordinates(clients(), 5, rng())
    variances = plain.square().sum(dim=0)
    for whitening in (0.5, 1.0):
        points = principal_coordinates(clients(), 5, rng(), whitening=whitening)
        torch.testing.assert_close(points.square().sum(dim=0), variances ** (1 - whitening), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(torch.cosine_similarity(points, plain, dim=0), torch.ones(5), atol=1e-4, rtol=0)


def test_a_kernel_with_negative_eigenvalues_keeps_the_positive_ones() -> None:
    """A client may send any symmetric matrix of cosines, such as one with its signs flipped."""
    flipped = DenseSimilarity(matrix=(-cosine_similarity(torch.eye(N)[:, :5] + 0.1)).fill_diagonal_(1))
    points = principal_coordinates([flipped], N, rng())
    assert points.isfinite().all()
    assert 0 < points.shape[1] < N


@pytest.mark.parametrize("contrast", [1e-3, 3e-2])
def test_a_nearly_collapsed_client_weighs_what_the_rule_says(contrast: float) -> None:
    g = rng()
    near = unit_rows(torch.randn(1, 64, generator=g) + contrast * torch.randn(N, 64, generator=g))
    for similarity in (FactorSimilarity(factors=near), DenseSimilarity(matrix=cosine_similarity(near))):
        S = (
            (near.double() @ near.double().T)
            if isinstance(similarity, FactorSimilarity)
            else similarity.matrix.double()
        )
        C = torch.eye(N, dtype=torch.float64) - 1 / N
        exact = torch.linalg.matrix_norm(C @ S @ C).item()
        assert coordinates._centred_norm(similarity) == pytest.approx(exact, rel=1e-3)


def test_directions_below_zero_take_no_place() -> None:
    """As many coordinates as asked for, although the largest eigenvalues in absolute value are negative."""
    n = 120
    z = unit_rows(torch.randn(n, 20, generator=rng()))
    flipped = DenseSimilarity(matrix=(-cosine_similarity(z)).fill_diagonal_(1))
    points = principal_coordinates([flipped], 10, rng())
    assert points.shape == (n, 10)
    C = torch.eye(n, dtype=torch.float64) - 1 / n
    kernel = C @ flipped.matrix.double() @ C
    largest = torch.linalg.eigvalsh(kernel / torch.linalg.matrix_norm(kernel))[-10:].flip(0)
    torch.testing.assert_close(points.square().sum(dim=0).double(), largest, atol=0, rtol=0.05)


def test_sparse_rows_are_made_symmetric() -> None:
    codec = TopK(k=6, percent=None, floor=0.0, dtype="fp32", max_bytes=10**6)
    z = clients()[2]
    assert isinstance(z, FactorSimilarity)
    sparse = codec.decode(codec.encode(z.factors, rng()), N)
    S = sparse.block(torch.arange(N), torch.arange(N)).double()
    assert (S - S.T).abs().max() > 0.1
    C = torch.eye(N, dtype=torch.float64) - 1 / N
    kernel = C @ ((S + S.T) / 2) @ C
    largest = torch.linalg.eigvalsh(kernel / torch.linalg.matrix_norm(kernel))[-3:].flip(0)
    points = principal_coordinates([sparse], 3, rng())
    torch.testing.assert_close(points.square().sum(dim=0).double(), largest, atol=1e-3, rtol=0.01)


def test_two_images() -> None:
    points = principal_coordinates([FactorSimilarity(factors=torch.eye(2))], 128, rng())
    assert points.shape == (2, 1)
    torch.testing.assert_close(points[0], -points[1])
