import math

import pytest
import torch
from torch import Tensor

from fedssl.similarity import (
    DenseSimilarity,
    FactorSimilarity,
    Similarity,
    collapse_measures,
    cosine_similarity,
    unit_rows,
)


def embeddings(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def both(z: Tensor) -> list[Similarity]:
    return [FactorSimilarity(factors=unit_rows(z)), DenseSimilarity(matrix=cosine_similarity(z))]


def test_cosine_similarity_against_a_double_loop() -> None:
    z = embeddings(5, 3)
    expected = torch.empty(5, 5)
    for i in range(5):
        for j in range(5):
            dot = sum(float(a) * float(b) for a, b in zip(z[i], z[j], strict=True))
            expected[i, j] = dot / (math.hypot(*z[i].tolist()) * math.hypot(*z[j].tolist()))
    torch.testing.assert_close(cosine_similarity(z), expected)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_cosines_ignore_scale_without_overflow(scale: float) -> None:
    z = embeddings(6, 4)
    torch.testing.assert_close(cosine_similarity(scale * z), cosine_similarity(z))


def test_cosines_ignore_rotation() -> None:
    z = embeddings(6, 4)
    rotation = torch.linalg.qr(embeddings(4, 4, seed=1))[0]
    torch.testing.assert_close(cosine_similarity(z @ rotation), cosine_similarity(z), atol=1e-6, rtol=0)


def test_the_self_cosine_is_the_largest_of_its_row() -> None:
    s = cosine_similarity(embeddings(20, 4))
    assert (s.amax(dim=1) <= s.diagonal() + 1e-6).all()
    assert s.abs().amax() <= 1


def test_a_zero_row_is_no_nan() -> None:
    s = cosine_similarity(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    torch.testing.assert_close(s, torch.tensor([[0.0, 0.0], [0.0, 1.0]]))


def test_blocks_of_factors_and_matrix_are_the_rows_and_columns_asked_for() -> None:
    z = embeddings(9, 4)
    rows, columns = torch.tensor([3, 0]), torch.tensor([8, 8, 2, 0, 5])
    expected = cosine_similarity(z)[rows][:, columns]
    for similarity in both(z):
        assert similarity.num_samples == 9
        torch.testing.assert_close(similarity.block(rows, columns), expected, atol=1e-6, rtol=0)
        moved = similarity.to(torch.device("cpu"))
        torch.testing.assert_close(moved.block(rows, columns), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("z", "mean_cosine", "effective_rank"),
    [
        (torch.eye(4), 0.0, 4.0),  # spread evenly over all directions
        (torch.ones(4, 3), 1.0, 1.0),  # collapsed to a point
        (torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), -1 / 3, 1.0),  # collapsed to a line: only the rank tells
        (torch.eye(2).repeat(3, 1), 6 * 2 / 30, 2.0),  # two clusters of three
    ],
)
def test_collapse_measures_by_hand(z: Tensor, mean_cosine: float, effective_rank: float) -> None:
    for similarity in both(z):
        measures = collapse_measures(similarity)
        assert measures["mean_cosine"] == pytest.approx(mean_cosine, abs=1e-6)
        assert measures["effective_rank"] == pytest.approx(effective_rank, rel=1e-5)


def test_effective_rank_is_the_participation_ratio_of_the_eigenvalues() -> None:
    z = embeddings(12, 5)
    eigenvalues = torch.linalg.eigvalsh(cosine_similarity(z).double())
    expected = eigenvalues.sum().square() / eigenvalues.square().sum()
    for similarity in both(z):
        assert collapse_measures(similarity)["effective_rank"] == pytest.approx(expected.item(), rel=1e-5)
