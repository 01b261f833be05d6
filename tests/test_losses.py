"""NT-Xent and one-directional InfoNCE against values derived by hand and slow transcriptions of the formulas."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedssl.losses import info_nce, nt_xent


def cosine(u: Tensor, v: Tensor) -> float:
    return float(u @ v / (u.norm() * v.norm()))


def literal_nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> float:
    """Chen et al. 2020, Algorithm 1, with its 1-based interleaved numbering: views 2k - 1 and 2k come from image k."""
    b = len(z1)
    z = {2 * k - 1: z1[k - 1] for k in range(1, b + 1)} | {2 * k: z2[k - 1] for k in range(1, b + 1)}

    def loss(i: int, j: int) -> float:
        others = sum(math.exp(cosine(z[i], z[k]) / temperature) for k in z if k != i)
        return -math.log(math.exp(cosine(z[i], z[j]) / temperature) / others)

    return sum(loss(2 * k - 1, 2 * k) + loss(2 * k, 2 * k - 1) for k in range(1, b + 1)) / (2 * b)


def literal_info_nce(z1: Tensor, z2: Tensor, temperature: float) -> float:
    """-1/b sum_i log(exp(cos(z1_i, z2_i) / t) / sum_j exp(cos(z1_i, z2_j) / t))."""
    total = 0.0
    for i in range(len(z1)):
        terms = [math.exp(cosine(z1[i], z2[j]) / temperature) for j in range(len(z2))]
        total -= math.log(terms[i] / sum(terms))
    return total / len(z1)


def random_projections(b: int, d: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    z1 = torch.randn(b, d, generator=rng, dtype=torch.float64)
    z2 = z1 + 0.7 * torch.randn(b, d, generator=rng, dtype=torch.float64)
    return z1.to(dtype), (2 * z2).to(dtype)


@pytest.mark.parametrize("b", [2, 5])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_of_orthogonal_images(b: int, temperature: float) -> None:
    """Views agree (cos = 1), images are orthogonal (cos = 0): Eq. 1 is solvable by hand."""
    z = torch.eye(b)
    expected = math.log(math.exp(1 / temperature) + 2 * b - 2) - 1 / temperature
    torch.testing.assert_close(nt_xent(z, 3 * z, temperature).item(), expected)  # and it ignores scale


@pytest.mark.parametrize("b", [2, 5])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_info_nce_of_orthogonal_images(b: int, temperature: float) -> None:
    z = torch.eye(b)
    expected = math.log(math.exp(1 / temperature) + b - 1) - 1 / temperature
    torch.testing.assert_close(info_nce(3 * z, z, temperature).item(), expected)


@pytest.mark.parametrize("b", [2, 7])
def test_collapsed_projections_leave_a_guess_among_all_candidates(b: int) -> None:
    z = torch.ones(b, 4)
    assert nt_xent(z, z, 0.2).item() == pytest.approx(math.log(2 * b - 1), abs=1e-5)
    assert info_nce(z, z, 0.2).item() == pytest.approx(math.log(b), abs=1e-5)


@pytest.mark.parametrize(("loss", "literal"), [(nt_xent, literal_nt_xent), (info_nce, literal_info_nce)])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("temperature", [0.1, 1])
def test_losses_equal_their_transcription(
    loss: Callable[..., Tensor], literal: Callable[..., float], seed: int, temperature: float
) -> None:
    z1, z2 = random_projections(b=2 + seed, d=5, seed=seed, dtype=torch.float64)
    assert loss(z1, z2, temperature).item() == pytest.approx(literal(z1, z2, temperature), rel=1e-12)


def test_nt_xent_is_symmetric_in_the_views_and_info_nce_is_not() -> None:
    z1, z2 = random_projections(b=6, d=4, seed=1, dtype=torch.float64)
    torch.testing.assert_close(nt_xent(z1, z2, 0.2), nt_xent(z2, z1, 0.2))
    assert abs(info_nce(z1, z2, 0.2).item() - info_nce(z2, z1, 0.2).item()) > 1e-3


@pytest.mark.parametrize("loss", [nt_xent, info_nce])
def test_the_order_of_the_images_does_not_matter(loss: Callable[..., Tensor]) -> None:
    z1, z2 = random_projections(b=6, d=4, seed=2, dtype=torch.float64)
    order = torch.tensor([3, 1, 0, 5, 2, 4])
    torch.testing.assert_close(loss(z1[order], z2[order], 0.2), loss(z1, z2, 0.2))
    assert abs(loss(z1[order], z2, 0.2).item() - loss(z1, z2, 0.2).item()) > 0.1  # but pairs belong together


@pytest.mark.parametrize("loss", [nt_xent, info_nce])
def test_both_views_receive_gradient(loss: Callable[..., Tensor]) -> None:
    z1, z2 = (z.requires_grad_() for z in random_projections(b=4, d=3, seed=3, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, 0.5), (z1, z2))
    loss(z1, z2, 0.5).backward()
    assert z1.grad is not None
    assert z2.grad is not None
    assert min(z1.grad.abs().max(), z2.grad.abs().max()) > 1e-4


@pytest.mark.parametrize("loss", [nt_xent, info_nce])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_projections_cost_only_their_own_rounding(
    loss: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    """Norms beyond fp16's 65504 and a cold temperature: computed in half precision this is NaN or visibly off."""
    z1, z2 = (300 * z for z in random_projections(b=32, d=64, seed=4, dtype=dtype))
    expected = loss(z1.double(), z2.double(), 0.05)
    value = loss(z1, z2, 0.05)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", [nt_xent, info_nce])
def test_autocast_does_not_reach_the_cosines(loss: Callable[..., Tensor]) -> None:
    z1, z2 = random_projections(b=32, d=64, seed=5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(z1, z2, 0.05)
    torch.testing.assert_close(inside, loss(z1, z2, 0.05), rtol=0, atol=0)
