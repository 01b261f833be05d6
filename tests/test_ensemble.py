import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fedssl.ensemble import EnsembleTarget, RowMean, Rule, SharpenedMean
from fedssl.errors import ConfigError
from fedssl.similarity import DenseSimilarity, FactorSimilarity, cosine_similarity, unit_rows

RULES: list[Rule] = [SharpenedMean(), RowMean()]
each_rule = pytest.mark.parametrize("rule", RULES, ids=["none", "row"])
N = 11
ROWS = torch.tensor([4, 0, 9])
ANCHORS = torch.tensor([9, 1, 4, 0, 7, 2, 1])  # the rows themselves, others, one of them twice


def embeddings(seed: int, n: int = N, d: int = 4) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def factor(z: Tensor) -> FactorSimilarity:
    return FactorSimilarity(factors=unit_rows(z))


def dense(z: Tensor) -> DenseSimilarity:
    return DenseSimilarity(matrix=cosine_similarity(z))


def target(clients: Sequence[Tensor], rule: Rule, temperature: float = 0.1) -> Tensor:
    return EnsembleTarget([factor(z) for z in clients], rule, temperature)(ROWS, ANCHORS)


def transcription(clients: Sequence[Tensor], rule: Rule, temperature: float) -> Tensor:
    """The formulas of both rules with scalars: P_k = exp((S_k - 1)/tau); M = mean_k P_k; normalise on the anchors."""
    S = [cosine_similarity(z).tolist() for z in clients]
    p = torch.empty(len(ROWS), len(ANCHORS))
    for i, row in enumerate(ROWS.tolist()):
        M = [0.0] * len(ANCHORS)
        for s in S:
            P = [math.exp((s[row][a] - 1) / temperature) for a in ANCHORS.tolist()]
            mass = sum(P) if isinstance(rule, RowMean) else 1.0
            for j in range(len(ANCHORS)):
                M[j] += P[j] / mass / len(S)
        for j in range(len(ANCHORS)):
            p[i, j] = M[j] / sum(M)
    return p


@each_rule
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_against_a_literal_transcription(rule: Rule, temperature: float) -> None:
    clients = [embeddings(seed) for seed in range(3)]
    torch.testing.assert_close(target(clients, rule, temperature), transcription(clients, rule, temperature))


@each_rule
def test_rows_sum_to_one_and_the_self_anchor_is_the_largest(rule: Rule) -> None:
    p = target([embeddings(seed) for seed in range(4)], rule)
    torch.testing.assert_close(p.sum(dim=1), torch.ones(len(ROWS)))
    assert ANCHORS[p.argmax(dim=1)].tolist() == ROWS.tolist()


@each_rule
def test_identical_clients_are_one_client(rule: Rule) -> None:
    z = embeddings(0)
    torch.testing.assert_close(target([z, z, z], rule), target([z], rule))


def test_for_one_client_both_rules_agree() -> None:
    torch.testing.assert_close(target([embeddings(0)], SharpenedMean()), target([embeddings(0)], RowMean()))


@each_rule
def test_each_client_may_rotate_its_space_and_have_its_own_dimension(rule: Rule) -> None:
    clients = [embeddings(seed) for seed in range(3)]
    rotated = [z @ torch.linalg.qr(embeddings(9 + i, n=4))[0] for i, z in enumerate(clients)]
    padded = [torch.cat([z, torch.zeros(N, i)], dim=1) for i, z in enumerate(rotated)]  # dims 4, 5 and 6
    torch.testing.assert_close(target(padded, rule), target(clients, rule), atol=1e-5, rtol=0)


@each_rule
@pytest.mark.parametrize("temperature", [1e-2, 1e-4, 1e-6])
def test_at_small_temperature_the_target_is_one_hot_on_the_image_itself(rule: Rule, temperature: float) -> None:
    """tau -> 0 is MoCo on the public set: the own key is the positive, everything else a negative."""
    p = target([embeddings(seed, d=64) for seed in range(3)], rule, temperature)
    expected = (ROWS[:, None] == ANCHORS).float()
    torch.testing.assert_close(p, expected, atol=1e-4, rtol=0)


def test_none_survives_underflow_where_the_own_key_is_absent() -> None:
    """exp((S - 1)/tau) is 0 in fp32 for every anchor here; the ratio is still defined: all mass on the nearest."""
    matrix = torch.tensor([[1.0, -0.5, -0.6], [-0.5, 1.0, 0.0], [-0.6, 0.0, 1.0]])
    p = EnsembleTarget([DenseSimilarity(matrix=matrix)], SharpenedMean(), 1e-3)(torch.tensor([0]), torch.tensor([1, 2]))
    torch.testing.assert_close(p, torch.tensor([[1.0, 0.0]]))


def test_a_collapsed_client_dominates_none_but_not_row() -> None:
    """Two orthonormal clients and a flat one (all cosines 1), 10 anchors, tau = .1, by hand."""
    n, temperature = 10, 0.1
    healthy = DenseSimilarity(matrix=torch.eye(n))
    flat = DenseSimilarity(matrix=torch.ones(n, n))
    everyone = torch.arange(n)

    def self_share(rule: Rule) -> float:
        return EnsembleTarget([healthy, healthy, flat], rule, temperature)(everyone, everyone)[0, 0].item()

    e = math.exp(-1 / temperature)
    assert self_share(SharpenedMean()) == pytest.approx(3 / (3 + 9 * (2 * e + 1)), rel=1e-4)  # about 1/4: mass 10 of 12
    assert self_share(RowMean()) == pytest.approx((2 / (1 + 9 * e) + 1 / n) / 3, rel=1e-4)  # about 0.7: one vote of 3


@each_rule
def test_factors_and_matrix_give_the_same_target(rule: Rule) -> None:
    clients = [embeddings(seed) for seed in range(3)]
    from_matrices = EnsembleTarget([dense(z) for z in clients], rule, 0.1)(ROWS, ANCHORS)
    torch.testing.assert_close(target(clients, rule), from_matrices, atol=1e-5, rtol=0)


@each_rule
def test_a_row_does_not_depend_on_the_batch_it_is_asked_in(rule: Rule) -> None:
    ensemble = EnsembleTarget([factor(embeddings(seed)) for seed in range(3)], rule, 0.1)
    batch = ensemble(torch.arange(N), ANCHORS)
    for i in range(N):
        torch.testing.assert_close(ensemble(torch.tensor([i]), ANCHORS)[0], batch[i], atol=1e-6, rtol=0)


@each_rule
def test_the_order_of_clients_changes_only_rounding(rule: Rule) -> None:
    clients = [embeddings(seed) for seed in range(4)]
    torch.testing.assert_close(target(clients[::-1], rule), target(clients, rule), atol=1e-6, rtol=1e-5)


def test_to_keeps_the_target() -> None:
    ensemble = EnsembleTarget([factor(embeddings(0)), dense(embeddings(1))], RowMean(), 0.1)
    torch.testing.assert_close(ensemble.to(torch.device("cpu"))(ROWS, ANCHORS), ensemble(ROWS, ANCHORS))


def test_refuses_no_clients_mixed_public_sets_and_temperature_zero() -> None:
    with pytest.raises(ConfigError, match=r"one or more similarities of one public set, got sizes \[\]"):
        EnsembleTarget([], RowMean(), 0.1)
    with pytest.raises(ConfigError, match=r"got sizes \[5, 11\]"):
        EnsembleTarget([factor(embeddings(0)), factor(embeddings(0, n=5))], RowMean(), 0.1)
    with pytest.raises(ConfigError, match=r"distill.target_temperature must be > 0, got 0"):
        EnsembleTarget([factor(embeddings(0))], RowMean(), 0)
