"""Contrastive and similarity losses against values derived by hand and slow transcriptions of the formulas."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedssl.losses import (
    cka_loss,
    cosine_distance,
    cross_entropy,
    entropy,
    feature_distance,
    info_nce,
    js_divergence,
    kl_divergence,
    nt_xent,
    reverse_kl_divergence,
)


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


# --- similarity losses: a target against a student -------------------------------------------------------------------


def literal_cross_entropy(p: Tensor, q: Tensor) -> float:
    return -sum(float(p[i, j]) * math.log(q[i, j]) for i in range(len(p)) for j in range(p.shape[1])) / len(p)


def literal_kl(p: Tensor, q: Tensor) -> float:
    """(1/b) sum_ij p_ij log(p_ij / q_ij)."""
    terms = [(float(a), float(b)) for a, b in zip(p.flatten(), q.flatten(), strict=True)]
    return sum(a * math.log(a / b) for a, b in terms if a > 0) / len(p)


def literal_js(p: Tensor, q: Tensor) -> float:
    return (literal_kl(p, (p + q) / 2) + literal_kl(q, (p + q) / 2)) / 2


SIMILARITY_LOSSES: list[tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], float]]] = [
    (cross_entropy, literal_cross_entropy),
    (kl_divergence, literal_kl),
    (reverse_kl_divergence, lambda p, q: literal_kl(q, p)),
    (js_divergence, literal_js),
]
NAMES = ["ce", "kl", "reverse_kl", "js"]


def rows_and_logits(b: int, k: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    p = torch.softmax(3 * torch.randn(b, k, generator=rng, dtype=torch.float64), dim=1)
    return p.to(dtype), 3 * torch.randn(b, k, generator=rng, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("loss", "literal"), SIMILARITY_LOSSES, ids=NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_similarity_losses_equal_their_transcription_and_have_its_gradient(
    loss: Callable[..., Tensor], literal: Callable[[Tensor, Tensor], float], seed: int
) -> None:
    p, logits = rows_and_logits(2 + seed, 5, seed)
    assert loss(logits, p).item() == pytest.approx(literal(p, torch.softmax(logits, dim=1)), rel=1e-12)
    assert torch.autograd.gradcheck(lambda a: loss(a, p), (logits.requires_grad_(),))


@pytest.mark.parametrize(("loss", "literal"), SIMILARITY_LOSSES[1:], ids=NAMES[1:])
def test_divergences_vanish_only_for_the_target_itself(
    loss: Callable[..., Tensor], literal: Callable[[Tensor, Tensor], float]
) -> None:
    p, logits = rows_and_logits(3, 6, 0)
    assert loss(p.log() + 2, p).item() == pytest.approx(0, abs=1e-12)  # logits are known up to a constant
    assert loss(logits, p).item() > 0.1


@pytest.mark.parametrize("k", [2, 9])
def test_flat_and_one_hot_rows_by_hand(k: int) -> None:
    """p is one anchor and q is flat, so m is (1 + 1/k) / 2 there and 1 / 2k elsewhere."""
    flat, one = torch.zeros(1, k), torch.eye(k)[:1]
    assert entropy(torch.full((1, k), 1 / k)).item() == pytest.approx(math.log(k), rel=1e-6)
    assert entropy(one).item() == 0
    assert cross_entropy(flat, one).item() == pytest.approx(math.log(k), rel=1e-6)
    assert kl_divergence(flat, one).item() == pytest.approx(math.log(k), rel=1e-6)
    m, rest = (1 + 1 / k) / 2, 1 / (2 * k)
    js = (-math.log(m) + math.log(1 / k / m) / k + (k - 1) / k * math.log(1 / k / rest)) / 2
    assert js_divergence(flat, one).item() == pytest.approx(js, rel=1e-5)


def test_rows_without_a_common_anchor_are_as_far_apart_as_can_be() -> None:
    """q is 1 on an anchor where p is 0: Jensen-Shannon is log 2; KL(q || p) stops at -log of the smallest number."""
    p, logits = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[-500.0, 500.0, -500.0]], requires_grad=True)
    assert js_divergence(logits, p).item() == pytest.approx(math.log(2), rel=1e-6)
    assert reverse_kl_divergence(logits, p).item() == pytest.approx(87.3365, abs=1e-3)
    for loss in (js_divergence, reverse_kl_divergence, kl_divergence):
        (gradient,) = torch.autograd.grad(loss(logits, p), logits)
        assert gradient.isfinite().all()


@pytest.mark.parametrize(("groups", "size"), [(2, 3), (4, 2)])
def test_cka_of_distinct_images_with_groups(groups: int, size: int) -> None:
    """K = I, L has a block of ones a group. HLH has c - 1 eigenvalues m, H has b - 1 ones: CKA = sqrt((c-1)/(b-1))."""
    b = groups * size
    kernel = torch.block_diag(*[torch.ones(size, size)] * groups)
    expected = 1 - math.sqrt((groups - 1) / (b - 1))
    assert cka_loss(torch.eye(b), kernel).item() == pytest.approx(expected, abs=1e-6)
    grouped = torch.eye(groups).repeat_interleave(size, dim=0)
    assert cka_loss(grouped, kernel).item() == pytest.approx(0, abs=1e-6)


def test_cka_equals_kornblith_and_ignores_rotation_scale_and_shift() -> None:
    """HSIC(K, L) = tr(K H L H) / (b - 1)^2, CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))."""
    z, y = random_projections(b=6, d=4, seed=6, dtype=torch.float64)
    K, L, H = z @ z.T, y @ y.T, torch.eye(6, dtype=torch.float64) - 1 / 6

    def hsic(A: Tensor, B: Tensor) -> float:
        return float(torch.trace(A @ H @ B @ H)) / 25

    expected = 1 - hsic(K, L) / math.sqrt(hsic(K, K) * hsic(L, L))
    assert cka_loss(z, L).item() == pytest.approx(expected, rel=1e-12)
    rotation = torch.linalg.qr(random_projections(b=4, d=4, seed=7, dtype=torch.float64)[0])[0]
    assert cka_loss(3 * z @ rotation + 5, 2 * L + 7).item() == pytest.approx(expected, rel=1e-12)
    assert abs(cka_loss(z.roll(1, 0), L).item() - expected) > 1e-3  # but images belong together
    assert torch.autograd.gradcheck(lambda a: cka_loss(a, L), (z.requires_grad_(),))


def test_collapsed_embeddings_have_no_kernel_and_no_gradient() -> None:
    z = torch.ones(4, 3, requires_grad=True)
    loss = cka_loss(z, torch.eye(4))
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.item() == 1
    assert gradient.isfinite().all()


def test_autocast_does_not_reach_the_kernel() -> None:
    z, y = random_projections(b=16, d=32, seed=8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = cka_loss(z, y.double().mm(y.double().T).float())
    torch.testing.assert_close(inside, cka_loss(z, y.double().mm(y.double().T).float()), rtol=0, atol=0)


def test_cosine_distance_by_hand() -> None:
    predicted = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [1.0, 2.0]], requires_grad=True)
    coordinates = torch.tensor([[5.0, 0.0], [0.0, -1.0], [1.0, 0.0], [0.0, 0.0]])
    loss = cosine_distance(predicted, coordinates)
    assert loss.item() == pytest.approx((0 + 2 + (1 - 0.5**0.5) + 1) / 4, abs=1e-6)
    loss.backward()
    assert predicted.grad is not None
    assert predicted.grad[3].tolist() == [0, 0]  # no coordinates, nothing to learn


def test_feature_distance_by_hand() -> None:
    h, reference = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    assert feature_distance(h, reference).item() == (1 + 4 + 9) / 2
