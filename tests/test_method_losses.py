"""Losses of MoCo, Barlow Twins, VICReg and SwAV against values derived by hand and transcriptions of the formulas."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedssl.clustering import balanced_assignment
from fedssl.losses import barlow_twins, cosine_scores, momentum_contrast, vicreg
from tests.test_losses import cosine, random_projections

# Columns of mean 0 that are orthogonal: three dimensions of four images.
HADAMARD = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])


def literal_momentum_contrast(z: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> float:
    """-1/b sum_i log(exp(cos(q_i, k_i) / t) / (exp(cos(q_i, k_i) / t) + sum_j exp(cos(q_i, queue_j) / t)))."""
    total = 0.0
    for i in range(len(z)):
        positive = math.exp(cosine(z[i], keys[i]) / temperature)
        negatives = sum(math.exp(cosine(z[i], key) / temperature) for key in queue)
        total -= math.log(positive / (positive + negatives))
    return total / len(z)


def literal_barlow_twins(z1: Tensor, z2: Tensor, weight: float) -> float:
    """Zbontar et al. 2021, Eq. 1 and 2, with batch norm's 1e-5 beside the variance."""
    b, d = z1.shape
    means = [[sum(float(z[n, i]) for n in range(b)) / b for i in range(d)] for z in (z1, z2)]

    def norm(z: Tensor, mean: float, i: int) -> float:
        return math.sqrt(sum((float(z[n, i]) - mean) ** 2 for n in range(b)) + b * 1e-5)

    total = 0.0
    for i in range(d):
        for j in range(d):
            product = sum((float(z1[n, i]) - means[0][i]) * (float(z2[n, j]) - means[1][j]) for n in range(b))
            c = product / (norm(z1, means[0][i], i) * norm(z2, means[1][j], j))
            total += (1 - c) ** 2 if i == j else weight * c**2
    return total


def literal_vicreg(z1: Tensor, z2: Tensor, invariance: float, variance: float, covariance: float) -> float:
    """Bardes et al. 2021, Eq. 1 to 6, with Algorithm 1's mean over dimensions in Eq. 5."""
    b, d = z1.shape
    distance = sum(float(z1[n, j] - z2[n, j]) ** 2 for n in range(b) for j in range(d)) / (b * d)
    total = invariance * distance
    for z in (z1, z2):
        mean = [sum(float(z[n, j]) for n in range(b)) / b for j in range(d)]

        def covariance_of(i: int, j: int, z: Tensor = z, mean: list[float] = mean) -> float:
            return sum((float(z[n, i]) - mean[i]) * (float(z[n, j]) - mean[j]) for n in range(b)) / (b - 1)

        total += variance / d * sum(max(0.0, 1 - math.sqrt(covariance_of(j, j) + 1e-4)) for j in range(d))
        total += covariance / d * sum(covariance_of(i, j) ** 2 for i in range(d) for j in range(d) if i != j)
    return total


def literal_sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> list[list[float]]:
    """Caron et al. 2020, section 3.1: Q, prototypes x images, rescaled by turns to row sums 1/k and column sums 1/b."""
    b, k = scores.shape
    q = [[math.exp(float(scores[n, j]) / epsilon) for n in range(b)] for j in range(k)]
    for _ in range(iterations):
        q = [[value / sum(row) / k for value in row] for row in q]
        columns = [sum(q[j][n] for j in range(k)) for n in range(b)]
        q = [[q[j][n] / columns[n] / b for n in range(b)] for j in range(k)]
    return [[b * q[j][n] for j in range(k)] for n in range(b)]


# --- MoCo ---
@pytest.mark.parametrize("k", [1, 6])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_momentum_contrast_by_hand(k: int, temperature: float) -> None:
    """Own key at cos = 1, all keys in the queue at right angles; and where all is one point, a guess among 1 + k."""
    z, queue = torch.eye(3)[:2], torch.eye(3)[2:].expand(k, 3)
    expected = math.log(math.exp(1 / temperature) + k) - 1 / temperature
    assert momentum_contrast(3 * z, z, 2 * queue, temperature).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    ones = torch.ones(2, 3)
    assert momentum_contrast(ones, ones, torch.ones(k, 3), temperature).item() == pytest.approx(math.log(1 + k))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("temperature", [0.1, 1])
def test_momentum_contrast_equals_its_transcription(seed: int, temperature: float) -> None:
    z, keys = random_projections(b=5, d=4, seed=seed, dtype=torch.float64)
    queue, _ = random_projections(b=7, d=4, seed=9 + seed, dtype=torch.float64)
    expected = literal_momentum_contrast(z, keys, queue, temperature)
    assert momentum_contrast(z, keys, queue, temperature).item() == pytest.approx(expected, rel=1e-9)


# --- Barlow Twins ---
def test_barlow_twins_by_hand() -> None:
    """C is the identity, its negative, all ones, or nothing."""
    z, column = HADAMARD, HADAMARD[:, :1].expand(4, 3)
    constant = torch.ones(4, 3)
    assert barlow_twins(z, 5 * z + 2, 0.1).item() == pytest.approx(0, abs=1e-8)  # scale and shift do not matter
    assert barlow_twins(z, -z, 0.1).item() == pytest.approx(3 * 4, rel=1e-4)
    assert barlow_twins(column, column, 0.1).item() == pytest.approx(0.1 * 6, rel=1e-4)
    assert barlow_twins(constant, constant, 0.1).item() == pytest.approx(3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weight", [0.0051, 1])
def test_barlow_twins_equals_its_transcription(seed: int, weight: float) -> None:
    z1, z2 = random_projections(b=6, d=4, seed=seed, dtype=torch.float64)
    assert barlow_twins(z1, z2, weight).item() == pytest.approx(literal_barlow_twins(z1, z2, weight), rel=1e-9)


# --- VICReg ---
def test_vicreg_by_hand() -> None:
    """One term at a time: dimensions too narrow, views apart, dimensions that repeat each other, collapse."""
    narrow = 0.3 * HADAMARD  # variances 4/3 * .09 = .12, no covariance
    spread = 2 * (1 - math.sqrt(0.12 + 1e-4))
    assert vicreg(narrow, narrow, 25, 10, 1).item() == pytest.approx(10 * spread, rel=1e-5)
    assert vicreg(narrow, narrow + 0.5, 25, 10, 1).item() == pytest.approx(10 * spread + 25 * 0.25, rel=1e-5)
    wide, repeated = 2 * HADAMARD, 2 * HADAMARD[:, :1].expand(4, 3)  # variances 16/3, beyond the hinge
    assert vicreg(wide, wide, 25, 10, 1).item() == pytest.approx(0, abs=1e-6)
    assert vicreg(repeated, repeated, 25, 10, 1).item() == pytest.approx(2 * 6 / 3 * (16 / 3) ** 2, rel=1e-5)
    constant = torch.ones(4, 3)
    assert vicreg(constant, constant, 25, 10, 1).item() == pytest.approx(2 * 0.99 * 10, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [0.3, 3])
def test_vicreg_equals_its_transcription(seed: int, scale: float) -> None:
    z1, z2 = (scale * z for z in random_projections(b=6, d=4, seed=seed, dtype=torch.float64))
    assert vicreg(z1, z2, 25, 20, 1).item() == pytest.approx(literal_vicreg(z1, z2, 25, 20, 1), rel=1e-9)


# --- SwAV ---
def test_codes_by_hand() -> None:
    """Images alike use all prototypes alike, whatever they prefer; balanced preferences stay as they are."""
    torch.testing.assert_close(
        balanced_assignment(torch.tensor([[0.9, 0.1]]).expand(6, 2), 0.05, 3), torch.full((6, 2), 0.5)
    )
    torch.testing.assert_close(balanced_assignment(torch.eye(3), 0.5, 3), torch.softmax(torch.eye(3) / 0.5, dim=1))
    torch.testing.assert_close(balanced_assignment(torch.eye(3), 0.001, 3), torch.eye(3))  # exp(1000) is no obstacle


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("epsilon", [0.05, 1])
@pytest.mark.parametrize("iterations", [1, 3])
def test_codes_equal_their_transcription(seed: int, epsilon: float, iterations: int) -> None:
    scores = cosine_scores(*random_projections(b=5, d=3, seed=seed, dtype=torch.float64))[:, :4]
    expected = torch.tensor(literal_sinkhorn(scores, epsilon, iterations), dtype=torch.float64)
    torch.testing.assert_close(balanced_assignment(scores, epsilon, iterations), expected)


def test_codes_are_balanced_in_the_end_and_have_no_gradient() -> None:
    scores = cosine_scores(*random_projections(b=12, d=3, seed=0))[:, :4].requires_grad_()
    codes = balanced_assignment(scores, 0.1, 200)
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(12))
    torch.testing.assert_close(codes.sum(dim=0), torch.full((4,), 3.0))
    assert not codes.requires_grad


# --- precision ---
def swapped(z1: Tensor, z2: Tensor) -> Tensor:
    return balanced_assignment(cosine_scores(z1, z2), 0.05, 3).square().mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "momentum_contrast": lambda z1, z2: momentum_contrast(z1, z2, z2.flip(0), 0.05),
    "barlow_twins": lambda z1, z2: barlow_twins(z1, z2, 0.01),
    "vicreg": lambda z1, z2: vicreg(z1, z2, 25, 25, 1),
    "balanced_assignment": swapped,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_projections_cost_only_their_own_rounding(name: str, dtype: torch.dtype) -> None:
    z1, z2 = (300 * z for z in random_projections(b=32, d=16, seed=4, dtype=dtype))
    value = LOSSES[name](z1, z2)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), LOSSES[name](z1.double(), z2.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_does_not_reach_the_loss(name: str) -> None:
    z1, z2 = random_projections(b=32, d=16, seed=5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = LOSSES[name](z1, z2)
    torch.testing.assert_close(inside, LOSSES[name](z1, z2), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["momentum_contrast", "barlow_twins", "vicreg"])
def test_gradients(name: str) -> None:
    z1, z2 = (0.3 * z for z in random_projections(b=5, d=3, seed=3, dtype=torch.float64))
    assert torch.autograd.gradcheck(LOSSES[name], (z1.requires_grad_(), z2.requires_grad_()))
