import math

import pytest
import torch
from torch import Tensor

from fedssl.similarity import (
    DenseSimilarity,
    FactorSimilarity,
    Similarity,
    TopKSimilarity,
    TriangleSimilarity,
    collapse_measures,
    cosine_similarity,
    unit_rows,
)


def embeddings(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def every(z: Tensor) -> list[Similarity]:
    """The same similarity in every form; of the largest entries of each row, all."""
    n, S = len(z), cosine_similarity(z)
    others = torch.tensor([[j for j in range(n) if j != i] for i in range(n)])
    return [
        FactorSimilarity(factors=unit_rows(z)),
        FactorSimilarity(factors=3 * z),  # rows of any length
        DenseSimilarity(matrix=S),
        TriangleSimilarity(values=torch.cat([S[i, i + 1 :] for i in range(n)]), num_samples=n),
        TopKSimilarity(values=S.gather(1, others), indices=others.short(), floor=0.5),
        TopKSimilarity(values=S.gather(1, others), indices=others.int(), floor=0.5),
    ]


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


def test_blocks_are_the_rows_and_columns_asked_for() -> None:
    z = embeddings(9, 4)
    rows, columns = torch.tensor([3, 0]), torch.tensor([8, 8, 2, 0, 5])
    expected = cosine_similarity(z)[rows][:, columns]
    for similarity in every(z):
        assert similarity.num_samples == 9
        torch.testing.assert_close(similarity.block(rows, columns), expected, atol=1e-6, rtol=0)
        moved = similarity.to(torch.device("cpu"))
        torch.testing.assert_close(moved.block(rows, columns), expected, atol=1e-6, rtol=0)


def test_a_missing_entry_is_the_floor_in_blocks_and_sums() -> None:
    """Row 0 knows column 2, row 1 column 0, row 2 column 1: by hand."""
    similarity = TopKSimilarity(
        values=torch.tensor([[127], [0], [-127]], dtype=torch.int8),
        indices=torch.tensor([[2], [0], [1]]).int(),
        floor=-0.5,
    )
    expected = torch.tensor([[1, -0.5, 1], [0, 1, -0.5], [-0.5, -1, 1]])
    assert torch.equal(similarity.block(torch.arange(3), torch.arange(3)), expected)
    assert similarity.sums() == (expected.sum().item(), expected.square().sum().item())


def test_columns_beyond_32767_are_found() -> None:
    """uint16's bits are held as int16."""
    n = 40_000
    indices = torch.full((n, 1), 39_999 - 2**16, dtype=torch.int16)
    similarity = TopKSimilarity(values=torch.full((n, 1), 0.25).half(), indices=indices, floor=0.0)
    block = similarity.block(torch.tensor([5]), torch.tensor([39_999, 39_998, 5]))
    assert block.tolist() == [[0.25, 0.0, 1.0]]


def test_half_the_bytes_and_a_quarter_of_them_are_held_as_they_came() -> None:
    z = embeddings(6, 4)
    exact = cosine_similarity(z)
    for dtype, scale, error in ((torch.float16, 1, 1e-3), (torch.int8, 127, 4e-3)):
        held = DenseSimilarity(matrix=(exact * scale).round(decimals=0 if scale > 1 else 6).to(dtype))
        block = held.block(torch.arange(6), torch.arange(6))
        assert block.dtype == torch.float32
        assert (block - exact).abs().amax() <= error
        assert held.sums() == pytest.approx((block.double().sum().item(), block.double().square().sum().item()))


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
    for similarity in every(z):
        measures = collapse_measures(similarity)
        assert measures["mean_cosine"] == pytest.approx(mean_cosine, abs=1e-6)
        assert measures["effective_rank"] == pytest.approx(effective_rank, rel=1e-5)


def test_without_any_direction_there_is_no_rank() -> None:
    """A client whose features are the same for all images is refused by its codec, which says so; not by a division."""
    nothing = FactorSimilarity(factors=torch.zeros(5, 3))
    assert collapse_measures(nothing) == {"mean_cosine": 0.0, "effective_rank": 0.0}


@pytest.mark.parametrize(("n", "d"), [(12, 5), (12, 12), (300, 301)])
def test_effective_rank_is_the_participation_ratio_of_the_eigenvalues(n: int, d: int) -> None:
    z = embeddings(n, d)
    eigenvalues = torch.linalg.eigvalsh(cosine_similarity(z).double())
    expected = eigenvalues.sum().square() / eigenvalues.square().sum()
    for similarity in every(z):
        assert collapse_measures(similarity)["effective_rank"] == pytest.approx(expected.item(), rel=1e-5)


def test_measures_of_few_and_very_wide_rows_need_no_matrix_of_their_width() -> None:
    """A sender chooses d: d x d of these would be 0.7 TB."""
    z = torch.zeros(3, 300_000)
    z[:, 0] = 1
    assert collapse_measures(FactorSimilarity(factors=z)) == pytest.approx({"mean_cosine": 1, "effective_rank": 1})
