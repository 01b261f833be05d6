import math
from collections.abc import Callable, Sequence
from statistics import correlation, fmean, median

import pytest
import torch
import yaml
from scipy.optimize import brentq
from torch import Tensor

import fedssl.ensemble.target
from fedssl.config import conf_dir, instantiate
from fedssl.ensemble import (
    AgreementMean,
    AttentionMean,
    Block,
    CertaintyMean,
    EnsembleTarget,
    EntropyMatchedMean,
    Krum,
    MassTarget,
    MeanKernel,
    Median,
    RowMean,
    Rule,
    SharpenedMean,
    SizeMean,
    Summable,
    Target,
    TrimmedMean,
    WholeRowMean,
    check_cohort,
    check_summable,
    make_target,
)
from fedssl.errors import ConfigError
from fedssl.similarity import AnchorMass, DenseSimilarity, FactorSimilarity, Similarity, cosine_similarity, unit_rows

NAMES = sorted(path.stem for path in (conf_dir() / "ensemble").glob("*.yaml"))
RULES: dict[str, Rule] = {
    name: instantiate(yaml.safe_load((conf_dir() / "ensemble" / f"{name}.yaml").read_text())) for name in NAMES
}
DISTRIBUTIONS = {name: rule for name, rule in RULES.items() if not rule.kernel}
SUMMABLE = {name: rule for name, rule in RULES.items() if isinstance(rule, Summable)}
each_distribution = pytest.mark.parametrize("rule", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
each_summable = pytest.mark.parametrize("rule", SUMMABLE.values(), ids=SUMMABLE)

N = 11
ROWS = torch.tensor([4, 0, 9])
ANCHORS = torch.tensor([9, 1, 4, 0, 7, 2, 1])  # the rows themselves, others, one of them twice
NUM_IMAGES = (10.0, 300.0, 70.0, 20.0, 1.0, 150.0, 40.0)


def embeddings(seed: int, n: int = N, d: int = 4) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def factor(z: Tensor) -> FactorSimilarity:
    return FactorSimilarity(factors=unit_rows(z))


def dense(z: Tensor) -> DenseSimilarity:
    return DenseSimilarity(matrix=cosine_similarity(z))


def constant(n: int = N) -> Similarity:
    return DenseSimilarity(matrix=torch.ones(n, n))


def sign_flipped(z: Tensor) -> Similarity:
    return DenseSimilarity(matrix=(-cosine_similarity(z)).fill_diagonal_(1))


def related(num_clients: int, noise: float, n: int = N, d: int = 4) -> list[Tensor]:
    """Clients that see the same things, each a little differently."""
    return [embeddings(0, n, d) + noise * embeddings(100 + k, n, d) for k in range(num_clients)]


def block_of(rule: Rule, rows: Tensor = ROWS, anchors: Tensor = ANCHORS) -> tuple[Tensor, Tensor]:
    """Rows and anchors that the rule can be asked for: a kernel is of a batch with itself."""
    return (rows, rows) if rule.kernel else (rows, anchors)


def target(
    clients: Sequence[Tensor | Similarity],
    rule: Rule,
    temperature: float = 0.1,
    num_images: Sequence[float] | None = None,
) -> Tensor:
    similarities = [factor(c) if isinstance(c, Tensor) else c for c in clients]
    return EnsembleTarget(similarities, rule, temperature, num_images)(*block_of(rule))


# --- the formulas of the docstrings, with scalars -----------------------------------------------------------------
Matrix = list[list[float]]


def softmax(row: Sequence[float], temperature: float) -> list[float]:
    weights = [math.exp((cosine - max(row)) / temperature) for cosine in row]
    return [weight / sum(weights) for weight in weights]


def entropy(p: Sequence[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def normalise(row: Sequence[float]) -> list[float]:
    return [x / sum(row) for x in row]


def weighted(rows: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    return [sum(w * row[j] for w, row in zip(weights, rows, strict=True)) for j in range(len(rows[0]))]


def mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return weighted(rows, [1 / len(rows)] * len(rows))


def unit(row: Sequence[float]) -> list[float]:
    norm = math.sqrt(sum(x * x for x in row))
    return [x / norm for x in row] if norm > 1e-6 else [0.0] * len(row)


def centred(row: Sequence[float]) -> list[float]:
    return [x - fmean(row) for x in row]


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def matched(row: Sequence[float], wanted: float, temperature: float) -> list[float]:
    """The row's softmax at the temperature that gives it the entropy `wanted`, by Brent's method."""

    def excess(log_t: float) -> float:
        return entropy(softmax(row, math.exp(log_t))) - wanted

    low, high = math.log(temperature) - 8, math.log(temperature) + 8
    if max(row) - min(row) < 1e-9:
        return [1 / len(row)] * len(row)
    return softmax(row, math.exp(brentq(excess, low, high, xtol=1e-12)))


def literal(rule: Rule, full: list[Matrix], temperature: float) -> Tensor:
    """Every rule on the n x n matrices `full` of the clients, in double precision and one number at a time."""
    rows, anchors = (index.tolist() for index in block_of(rule))
    K = len(full)
    S = [[[s[i][j] for j in anchors] for i in rows] for s in full]  # S[k][row][anchor]
    P = [[softmax(row, temperature) for row in s] for s in S]
    result: Matrix = []
    for i in range(len(rows)):
        p = [P[k][i] for k in range(K)]
        columns = [[p[k][j] for k in range(K)] for j in range(len(anchors))]
        if isinstance(rule, SharpenedMean):
            M = [sum(math.exp((S[k][i][j] - 1) / temperature) for k in range(K)) / K for j in range(len(anchors))]
            result.append(normalise(M))
        elif isinstance(rule, RowMean):
            result.append(mean(p))
        elif isinstance(rule, WholeRowMean):
            M = [0.0] * len(anchors)
            for k in range(K):
                Z = sum(math.exp(x / temperature) for x in full[k][rows[i]])
                for j in range(len(anchors)):
                    M[j] += math.exp(S[k][i][j] / temperature) / Z / K
            result.append(normalise(M))
        elif isinstance(rule, SizeMean):
            result.append(weighted(p, [NUM_IMAGES[k] / sum(NUM_IMAGES[:K]) for k in range(K)]))
        elif isinstance(rule, EntropyMatchedMean):
            wanted = fmean([entropy(row) for row in p])
            result.append(mean([matched(S[k][i], wanted, temperature) for k in range(K)]))
        elif isinstance(rule, CertaintyMean):
            certainty = [max(0.0, 1 - entropy(row) / math.log(len(anchors))) for row in p]
            result.append(weighted(p, [c / sum(certainty) for c in certainty]))
        elif isinstance(rule, AttentionMean):
            z = [[unit(centred(row)) for row in s] for s in S]
            g = [unit(mean([z[k][r] for k in range(K)])) for r in range(len(rows))]
            odds = [math.exp(dot(z[k][i], g[i])) / sum(math.exp(dot(z[k][i], g_j)) for g_j in g) for k in range(K)]
            result.append(weighted(p, softmax([math.log(x) for x in odds], 1)))
        elif isinstance(rule, Median):
            result.append(normalise([median(column) for column in columns]))
        elif isinstance(rule, TrimmedMean):
            cut = int(rule.trim * K)
            result.append(normalise([fmean(sorted(column)[cut : K - cut]) for column in columns]))
        elif isinstance(rule, Krum):
            scores, borne = [], min(rule.num_byzantine, (K - 3) // 2)
            for k in range(K):
                distances = sorted(
                    sum((a - b) ** 2 for a, b in zip(p[k], p[x], strict=True)) for x in range(K) if x != k
                )
                scores.append(sum(distances[: K - borne - 2]))
            result.append(mean([p[k] for k in sorted(range(K), key=scores.__getitem__)[: rule.num_selected]]))
        elif isinstance(rule, AgreementMean):
            c = [
                [fmean([_correlation(a, b) for a, b in zip(S[k], S[x], strict=True)]) for x in range(K)]
                for k in range(K)
            ]
            scores = [median([c[k][x] for x in range(K) if x != k]) for k in range(K)]
            kept = [k for k in range(K) if scores[k] > 0 and scores[k] >= rule.share * median(scores)]
            result.append(mean([p[k] for k in kept or range(K)]))
        else:
            assert isinstance(rule, MeanKernel)
            result.append([fmean([_centred_kernel(s)[i][j] for s in S]) for j in range(len(anchors))])
    return torch.tensor(result)


def _correlation(a: Sequence[float], b: Sequence[float]) -> float:
    return 0.0 if max(a) == min(a) or max(b) == min(b) else correlation(a, b)


def _centred_kernel(s: Matrix) -> Matrix:
    """C S C / |C S C|_F with C = I - 11'/b, each product as a triple loop."""
    b = range(len(s))
    C = [[(i == j) - 1 / len(s) for j in b] for i in b]
    CS = [[sum(C[i][x] * s[x][j] for x in b) for j in b] for i in b]
    CSC = [[sum(CS[i][x] * C[x][j] for x in b) for j in b] for i in b]
    norm = math.sqrt(sum(x * x for row in CSC for x in row))
    return [[x / norm if norm > 1e-6 else 0.0 for x in row] for row in CSC]


VARIANTS: dict[str, Rule] = RULES | {
    "trim_0.2": TrimmedMean(trim=0.2),
    "krum_2": Krum(num_byzantine=2, num_selected=1),
    "multi_krum": Krum(num_byzantine=2, num_selected=3),
    "agreement_0.9": AgreementMean(share=0.9),
}


@pytest.mark.parametrize("rule", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("company", ["unrelated", "related", "constant", "sign-flipped"])
def test_against_a_literal_transcription(rule: Rule, company: str) -> None:
    """Seven clients, as many as multi-Krum needs for two that lie, or six: an even number, and one fewer than that."""
    z = related(6 if company == "related" else 7, 0.5)
    clients: list[Similarity] = [dense(x) for x in (map(embeddings, range(7)) if company == "unrelated" else z)]
    if company == "constant":
        clients[2] = constant()
    if company == "sign-flipped":
        clients[2], clients[5] = sign_flipped(z[2]), sign_flipped(z[5])
    matrices = [c.block(torch.arange(N), torch.arange(N)).tolist() for c in clients]
    for temperature in (0.05, 0.1, 1.0, 10.0):
        result = target(clients, rule, temperature, NUM_IMAGES[: len(clients)])
        torch.testing.assert_close(result, literal(rule, matrices, temperature), atol=2e-6, rtol=1e-4)


# --- what all rules have in common --------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_every_yaml_is_a_rule_that_says_its_name(name: str) -> None:
    rule = RULES[name]
    assert isinstance(rule, Rule)
    assert type(rule).__doc__ is not None
    assert type(rule).__doc__.startswith(f"`ensemble={name}`")  # type: ignore[union-attr]


DUPLICATES = embeddings(3)[torch.tensor([0, 0, 0, 3, 3, 5, 6, 7, 8, 0, 0])]
CASES: dict[str, list[Tensor | Similarity]] = {
    "healthy": [*map(embeddings, range(6))],
    "one client": [embeddings(0)],
    "two clients": [embeddings(0), embeddings(1)],
    "three clients": [embeddings(0), embeddings(1), constant()],
    "one of them constant": [embeddings(0), embeddings(1), embeddings(2), constant()],
    "all constant": [constant(), constant(), constant()],
    "collapsed factors": [embeddings(0), embeddings(1, n=1).expand(N, 4), embeddings(2, n=1, d=9).expand(N, 9)],
    "sign-flipped": [embeddings(0), embeddings(0), embeddings(0), sign_flipped(embeddings(0))],
    "all sign-flipped": [sign_flipped(embeddings(seed)) for seed in range(5)],
    "duplicate images": [DUPLICATES, DUPLICATES + 0.01 * embeddings(4), embeddings(5)],
    "no embedding": [embeddings(0), torch.zeros(N, 4), embeddings(1)],
}


@each_distribution
@pytest.mark.parametrize("case", CASES)
def test_rows_are_distributions(rule: Rule, case: str) -> None:
    for temperature in (1e-4, 0.01, 0.1, 10.0):
        p = target(CASES[case], rule, temperature)
        assert p.dtype == torch.float32
        assert bool((p >= 0).all())
        torch.testing.assert_close(p.sum(dim=1), torch.ones(len(ROWS)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("clients", CASES.values(), ids=CASES)
def test_a_kernel_is_finite_symmetric_and_centred(clients: list[Tensor | Similarity]) -> None:
    kernel = target(clients, MeanKernel())
    torch.testing.assert_close(kernel, kernel.T, atol=1e-6, rtol=0)
    torch.testing.assert_close(kernel.sum(dim=0), torch.zeros(len(ROWS)), atol=1e-6, rtol=0)
    assert kernel.norm() < 1 + 1e-6


@each_distribution
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_one_client_gives_its_own_distribution(rule: Rule, temperature: float) -> None:
    z = embeddings(0)
    own = (factor(z).block(ROWS, ANCHORS) / temperature).softmax(dim=1)
    torch.testing.assert_close(target([z], rule, temperature), own, atol=1e-5, rtol=0)


@each_rule
def test_identical_clients_are_one_client(rule: Rule) -> None:
    z = embeddings(0)
    torch.testing.assert_close(target([z] * 6, rule), target([z], rule), atol=1e-5, rtol=0)


@each_rule
@pytest.mark.parametrize("num_clients", [2, 3, 4, 5, 6])
def test_the_order_of_clients_changes_only_rounding(rule: Rule, num_clients: int) -> None:
    """Also where scores tie by necessity: of two clients, and of two neighbours that have nobody closer."""
    z, sizes = [embeddings(seed) for seed in range(num_clients)], NUM_IMAGES[:num_clients]
    backwards = target(z[::-1], rule, num_images=sizes[::-1])
    torch.testing.assert_close(backwards, target(z, rule, num_images=sizes), atol=1e-6, rtol=1e-5)


@each_distribution
def test_the_self_anchor_is_the_largest(rule: Rule) -> None:
    p = target([embeddings(seed) for seed in range(4)], rule)
    assert ANCHORS[p.argmax(dim=1)].tolist() == ROWS.tolist()


@each_rule
def test_each_client_may_rotate_its_space_and_have_its_own_dimension(rule: Rule) -> None:
    clients = [embeddings(seed) for seed in range(3)]
    rotated = [z @ torch.linalg.qr(embeddings(9 + i, n=4))[0] for i, z in enumerate(clients)]
    padded = [torch.cat([z, torch.zeros(N, i)], dim=1) for i, z in enumerate(rotated)]  # dims 4, 5 and 6
    torch.testing.assert_close(target(padded, rule), target(clients, rule), atol=1e-5, rtol=0)


@each_rule
def test_factors_and_matrix_give_the_same_target(rule: Rule) -> None:
    clients = [embeddings(seed) for seed in range(3)]
    from_matrices = target([dense(z) for z in clients], rule)
    torch.testing.assert_close(target(clients, rule), from_matrices, atol=1e-5, rtol=0)


@each_distribution
@pytest.mark.parametrize("temperature", [1e-2, 1e-4, 1e-6])
def test_at_small_temperature_the_target_is_one_hot_on_the_image_itself(rule: Rule, temperature: float) -> None:
    """tau -> 0 is MoCo on the public set: the own key is the positive, everything else a negative."""
    p = target([embeddings(seed, d=64) for seed in range(3)], rule, temperature)
    expected = (ROWS[:, None] == ANCHORS).float()
    torch.testing.assert_close(p, expected, atol=1e-4, rtol=0)


BY_BATCH = ("agreement", "attention", "cka_kernel")  # rules that compare the rows of a batch


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BY_BATCH])
def test_a_row_does_not_depend_on_the_batch_it_is_asked_in(name: str) -> None:
    ensemble = EnsembleTarget([factor(embeddings(seed)) for seed in range(5)], RULES[name], 0.1)
    atol = 1e-4 if name == "entropy" else 1e-6  # bisection ends where two entropies differ by rounding
    batch = ensemble(torch.arange(N), ANCHORS)
    for i in range(N):
        torch.testing.assert_close(ensemble(torch.tensor([i]), ANCHORS)[0], batch[i], atol=atol, rtol=0)


# --- means --------------------------------------------------------------------------------------------------------
def test_none_survives_underflow_where_the_own_key_is_absent() -> None:
    """exp((S - 1)/tau) is 0 in fp32 for every anchor here; the ratio is still defined: all mass on the nearest."""
    matrix = torch.tensor([[1.0, -0.5, -0.6], [-0.5, 1.0, 0.0], [-0.6, 0.0, 1.0]])
    p = EnsembleTarget([DenseSimilarity(matrix=matrix)], SharpenedMean(), 1e-3)(torch.tensor([0]), torch.tensor([1, 2]))
    torch.testing.assert_close(p, torch.tensor([[1.0, 0.0]]))


def test_a_collapsed_client_dominates_none_but_not_row() -> None:
    """Two orthonormal clients and a flat one (all cosines 1), 10 anchors, tau = .1, by hand."""
    n, temperature = 10, 0.1
    healthy, everyone = DenseSimilarity(matrix=torch.eye(n)), torch.arange(n)

    def self_share(rule: Rule) -> float:
        return EnsembleTarget([healthy, healthy, constant(n)], rule, temperature)(everyone, everyone)[0, 0].item()

    e = math.exp(-1 / temperature)
    assert self_share(SharpenedMean()) == pytest.approx(3 / (3 + 9 * (2 * e + 1)), rel=1e-4)  # about 1/4: mass 10 of 12
    assert self_share(RowMean()) == pytest.approx((2 / (1 + 9 * e) + 1 / n) / 3, rel=1e-4)  # about 0.7: one vote of 3


@pytest.mark.parametrize("rule", [CertaintyMean(), Median(), TrimmedMean(trim=0.34), AgreementMean(share=0.5)])
def test_a_constant_client_has_no_weight(rule: Rule) -> None:
    """Beside two equal clients; of three, certainty weighs it 0, the others outvote it."""
    z = embeddings(0)
    torch.testing.assert_close(target([z, z, constant()], rule), target([z], rule), atol=1e-5, rtol=0)


def test_a_constant_client_adds_nothing_to_the_kernels() -> None:
    z = embeddings(0)
    torch.testing.assert_close(target([z, constant()], MeanKernel()), target([z], MeanKernel()) / 2)


@pytest.mark.parametrize("similarity", [constant(), factor(embeddings(1, n=1, d=50).expand(N, 50))])
def test_attention_takes_rounding_for_no_opinion(similarity: Similarity) -> None:
    """Beside one healthy client, g is that client's z, and a constant row's odds are 1 / b whatever its rounding."""
    z = factor(embeddings(0))
    rows = z.block(ROWS, ANCHORS)
    unit_rows_ = torch.tensor([unit(centred(row)) for row in rows.tolist()])
    odds = (unit_rows_ @ unit_rows_.T).softmax(dim=1).diagonal()
    weight = (odds / (odds + 1 / len(ROWS)))[:, None]
    expected = weight * (rows / 0.1).softmax(dim=1) + (1 - weight) / len(ANCHORS)
    torch.testing.assert_close(target([z, similarity], AttentionMean()), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [0.5, 0.1, 0.02])
def test_entropy_matches_clients_of_any_contrast(scale: float) -> None:
    """Two clients that differ in scale alone become one, so the target itself has the mean of their entropies."""
    z = dense(embeddings(0))
    flat = DenseSimilarity(matrix=scale * z.matrix)
    p = target([z, flat], EntropyMatchedMean())
    each = [target([s], RowMean()) for s in (z, flat)]
    entropies = [torch.special.entr(x).sum(dim=1) for x in (p, *each)]
    torch.testing.assert_close(entropies[0], (entropies[1] + entropies[2]) / 2, atol=1e-5, rtol=0)


def test_size_weighs_by_the_number_of_images() -> None:
    a, b = embeddings(0), embeddings(1)
    p, q = target([a], RowMean()), target([b], RowMean())
    torch.testing.assert_close(target([a, b], SizeMean(), num_images=[1, 3]), (p + 3 * q) / 4)
    torch.testing.assert_close(target([a, b], SizeMean(), num_images=[1e12, 1]), p)
    torch.testing.assert_close(target([a, b], SizeMean()), (p + q) / 2)


def test_row_all_is_row_where_every_image_is_an_anchor_once() -> None:
    clients = [factor(embeddings(seed)) for seed in range(3)]
    everyone = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    row, row_all = (EnsembleTarget(clients, rule, 0.1)(ROWS, everyone) for rule in (RowMean(), WholeRowMean()))
    torch.testing.assert_close(row_all, row)


def test_row_all_does_not_depend_on_the_other_anchors() -> None:
    """Two anchors' ratio is that of their masses; `row` weighs clients by what else is in the queue."""
    clients = [factor(embeddings(seed)) for seed in range(3)]

    def ratio(rule: Rule, others: list[int]) -> Tensor:
        p = EnsembleTarget(clients, rule, 0.1)(ROWS, torch.tensor([1, 2, *others]))
        return p[:, 0] / p[:, 1]

    torch.testing.assert_close(ratio(WholeRowMean(), [4, 0, 9]), ratio(WholeRowMean(), [7]))
    assert not torch.allclose(ratio(RowMean(), [4, 0, 9]), ratio(RowMean(), [7]), rtol=0.1)


def test_row_all_may_pass_over_the_pairs_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = [embeddings(seed) for seed in range(3)]
    at_once = target(clients, WholeRowMean())
    for entries in (1, 3 * N):
        monkeypatch.setattr(fedssl.ensemble.target, "ENTRIES", entries)
        torch.testing.assert_close(target(clients, WholeRowMean()), at_once, atol=1e-6, rtol=0)


# --- clients that lie ---------------------------------------------------------------------------------------------
M = 24  # images; all of them are rows and anchors
HONEST = related(4, 0.05, n=M, d=8)
ATTACKS: dict[str, Callable[[int], Similarity]] = {
    "constant": lambda k: constant(M),
    "sign-flipped": lambda k: sign_flipped(HONEST[k]),
    "random": lambda k: factor(embeddings(70 + k, M, 8)),
    "permuted": lambda k: factor(HONEST[k].roll(5 + k, dims=0)),
    "minus one": lambda k: DenseSimilarity(matrix=-torch.ones(M, M)),
    "one-hot elsewhere": lambda k: DenseSimilarity(matrix=2 * torch.eye(M).roll(3, dims=0) - 1),
}
ROBUST = ("agreement", "krum", "median", "trimmed_mean")
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


def under_attack(rule: Rule, attack: Callable[[int], Similarity], num_liars: int = 2) -> Tensor:
    liars = [attack(k) for k in range(num_liars)]
    everyone = torch.arange(M)
    clients = [liars[0], *map(factor, HONEST[:2]), *liars[1:], *map(factor, HONEST[2:])]
    return EnsembleTarget(clients, rule, 0.1)(everyone, everyone)


def honest() -> Tensor:
    return torch.stack([EnsembleTarget([factor(z)], RowMean(), 0.1)(torch.arange(M), torch.arange(M)) for z in HONEST])


def distance(p: Tensor) -> float:
    """Total variation to the honest clients' mean, the mean over the rows."""
    return (p - honest().mean(dim=0)).abs().sum(dim=1).mean().item() / 2


@each_attack
@pytest.mark.parametrize("name", ROBUST)
def test_two_liars_of_six_move_a_robust_rule_no_further_than_one_honest_client_is(
    name: str, attack: Callable[[int], Similarity]
) -> None:
    """The same tolerance catches a mean (the test after this one)."""
    assert distance(under_attack(RULES[name], attack)) < max(map(distance, honest()))


@each_attack
def test_two_liars_of_six_move_a_mean_further_than_any_honest_client_is(
    attack: Callable[[int], Similarity],
) -> None:
    assert distance(under_attack(RowMean(), attack)) > 2 * max(map(distance, honest()))


@each_attack
def test_medians_and_trimmed_means_stay_between_honest_clients(attack: Callable[[int], Similarity]) -> None:
    """Before rows are normalised again, so up to a factor per row."""
    low, high = honest().amin(dim=0), honest().amax(dim=0)
    for rule in (Median(), TrimmedMean(trim=0.34)):
        p = under_attack(rule, attack)
        factors = torch.stack([(low / p).amax(dim=1), (high / p).amin(dim=1)])  # must leave room for one factor
        assert bool((factors[0] <= factors[1] * (1 + 1e-5)).all())


@each_attack
@pytest.mark.parametrize("num_liars", [1, 2])
def test_krum_takes_rows_of_honest_clients(attack: Callable[[int], Similarity], num_liars: int) -> None:
    p = under_attack(Krum(num_byzantine=1, num_selected=1), attack, num_liars)
    off = (p - honest()).abs().amax(dim=2)  # (honest clients, rows)
    assert off.amin(dim=0).max() < 1e-6


@each_attack
def test_agreement_is_the_mean_of_the_honest_clients(attack: Callable[[int], Similarity]) -> None:
    p = under_attack(AgreementMean(share=0.5), attack)
    torch.testing.assert_close(p, honest().mean(dim=0), atol=1e-6, rtol=0)


def test_agreement_keeps_everybody_where_nobody_agrees() -> None:
    clients = [constant(), constant(), constant(), constant()]
    torch.testing.assert_close(target(clients, AgreementMean(share=0.5)), torch.full((3, 7), 1 / 7))
    two = [embeddings(0), sign_flipped(embeddings(0))]  # who of two lies, nobody can say
    torch.testing.assert_close(target(two, AgreementMean(share=0.5)), target(two, RowMean()))


def test_krum_takes_all_that_tie() -> None:
    """Of three clients the closest two have each other as their only neighbour."""
    a, b, far = embeddings(0), embeddings(0) + 0.01 * embeddings(1), embeddings(2)
    krum = Krum(num_byzantine=0, num_selected=1)
    torch.testing.assert_close(target([a, far, b], krum), target([a, b], RowMean()))


# --- masses -------------------------------------------------------------------------------------------------------
ALL = torch.arange(N)


def masses(clients: Sequence[Tensor], rule: Rule, num_anchors: int = N, temperature: float = 0.1) -> list[AnchorMass]:
    """What clients of `codec=sharpened` send: their own mass over the first images."""
    assert isinstance(rule, Summable)
    result = []
    for z in clients:
        log_mass = (factor(z).block(ALL, ALL) / temperature).logsumexp(dim=1)
        block = Block(cosines=factor(z).block(ALL, ALL[:num_anchors]), num_images=1.0, log_mass=log_mass)
        result.append(AnchorMass(values=rule.mass(block, temperature)))
    return result


@each_summable
def test_masses_give_the_target_of_the_similarities(rule: Rule) -> None:
    """`none` and `row_all` over any anchors; `row` where the clients had normalised over these."""
    clients = [embeddings(seed) for seed in range(3)]
    anchors = ALL[:8].flip(0) if isinstance(rule, RowMean) else torch.tensor([7, 0, 4, 2, 2])
    p = make_target(masses(clients, rule, 8), rule, 0.1)
    expected = EnsembleTarget([factor(z) for z in clients], rule, 0.1)
    torch.testing.assert_close(p(ROWS, anchors), expected(ROWS, anchors))
    assert (p.num_samples, p.num_anchors, p.kernel) == (N, 8, False)


def test_masses_of_row_over_some_anchors_are_row_all() -> None:
    clients = [embeddings(seed) for seed in range(3)]
    expected = EnsembleTarget([factor(z) for z in clients], WholeRowMean(), 0.1)(ROWS, ANCHORS)
    torch.testing.assert_close(make_target(masses(clients, RowMean()), RowMean(), 0.1)(ROWS, ANCHORS), expected)


def test_a_row_without_mass_is_uniform() -> None:
    values = torch.zeros(N, N)
    values[0, 1] = 1e-44  # what fp32 has left of it is enough
    p = MassTarget([AnchorMass(values=values)], 0.01)(torch.tensor([0, 1]), torch.tensor([1, 2, 3, 4]))
    torch.testing.assert_close(p, torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]))


def test_masses_are_not_changed_by_adding_them() -> None:
    contents = masses([embeddings(0), embeddings(1)], RowMean())
    before = contents[0].values.clone()
    MassTarget(contents, 0.1)
    torch.testing.assert_close(contents[0].values, before, rtol=0, atol=0)


# --- targets ------------------------------------------------------------------------------------------------------
@each_rule
def test_at_is_the_target_of_another_temperature(rule: Rule) -> None:
    """So for row_all whole rows are weighed again."""
    similarities = [factor(embeddings(seed)) for seed in range(3)]
    ensemble = EnsembleTarget(similarities, rule, 0.1, NUM_IMAGES[:3])
    expected = EnsembleTarget(similarities, rule, 0.5, NUM_IMAGES[:3])(*block_of(rule))
    torch.testing.assert_close(ensemble.at(0.5)(*block_of(rule)), expected)
    assert rule.kernel or not torch.allclose(ensemble(*block_of(rule)), expected, atol=1e-2)


@each_rule
def test_to_keeps_the_target(rule: Rule) -> None:
    ensemble = EnsembleTarget([factor(embeddings(0)), dense(embeddings(1))], rule, 0.1, [1.0, 5.0])
    there = ensemble.to(torch.device("cpu"))
    torch.testing.assert_close(there(*block_of(rule)), ensemble(*block_of(rule)))
    torch.testing.assert_close(there.at(0.2)(*block_of(rule)), ensemble.at(0.2)(*block_of(rule)))


def test_masses_move_too_and_know_one_temperature() -> None:
    p = MassTarget(masses([embeddings(0)], RowMean()), 0.1)
    torch.testing.assert_close(p.to(torch.device("cpu"))(ROWS, ANCHORS), p(ROWS, ANCHORS))
    assert p.at(0.1) is p
    with pytest.raises(ConfigError, match=r"sharpened at temperature 0.1, the server cannot go to 0.2"):
        p.at(0.2)


def test_make_target_makes_a_target_of_either_kind() -> None:
    for contents in ([factor(embeddings(0))], masses([embeddings(0)], RowMean())):
        p = make_target(contents, RowMean(), 0.1)
        assert isinstance(p, Target)
        assert p.num_samples == p.num_anchors == N
    assert make_target([factor(embeddings(0))], MeanKernel(), 0.1).kernel


# --- what is refused ----------------------------------------------------------------------------------------------
def test_refuses_no_clients_mixed_public_sets_and_temperature_zero() -> None:
    with pytest.raises(ConfigError, match=r"one or more similarities of one public set, got sizes \[\]"):
        EnsembleTarget([], RowMean(), 0.1)
    with pytest.raises(ConfigError, match=r"got sizes \[5, 11\]"):
        EnsembleTarget([factor(embeddings(0)), factor(embeddings(0, n=5))], RowMean(), 0.1)
    with pytest.raises(ConfigError, match=r"distill.target_temperature must be > 0, got 0"):
        EnsembleTarget([factor(embeddings(0))], RowMean(), 0)


@pytest.mark.parametrize(
    "num_images", [[1.0], [1.0, 2.0, 3.0], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [math.inf, 1.0]]
)
def test_refuses_numbers_of_images_that_are_none(num_images: list[float]) -> None:
    with pytest.raises(ConfigError, match="an ensemble of 2 clients needs as many numbers of private images"):
        EnsembleTarget([factor(embeddings(0)), factor(embeddings(1))], SizeMean(), 0.1, num_images)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SUMMABLE])
def test_refuses_masses_for_a_rule_that_is_no_sum(name: str) -> None:
    contents = masses([embeddings(0)], RowMean())
    with pytest.raises(ConfigError, match="use ensemble=none, row or row_all"):
        make_target(contents, RULES[name], 0.1)
    with pytest.raises(ConfigError, match="codec=sharpened sends masses"):
        check_summable(RULES[name])


def test_the_summable_rules_are_the_ones_that_the_message_names() -> None:
    assert tuple(sorted(SUMMABLE)) == tuple(sorted(fedssl.ensemble.target.SUMMABLE))
    for rule in SUMMABLE.values():
        check_summable(rule)


def test_refuses_masses_that_cannot_be_added() -> None:
    with pytest.raises(ConfigError, match="1 of 2 uploads hold masses"):
        make_target([factor(embeddings(0)), *masses([embeddings(1)], RowMean())], RowMean(), 0.1)
    with pytest.raises(ConfigError, match=r"same anchors only, got numbers of them \[4, 8\]"):
        MassTarget([*masses([embeddings(0)], RowMean(), 8), *masses([embeddings(0)], RowMean(), 4)], 0.1)
    with pytest.raises(ConfigError, match=r"got sizes \[5, 11\]"):
        MassTarget([*masses([embeddings(0)], RowMean(), 5), AnchorMass(values=torch.ones(5, 5))], 0.1)
    with pytest.raises(ConfigError, match=r"distill.target_temperature must be > 0"):
        MassTarget(masses([embeddings(0)], RowMean()), 0.0)


def test_a_kernel_is_of_a_batch_with_itself() -> None:
    with pytest.raises(ConfigError, match=r"3 images were held against 7 anchors: set distill.loss=cka"):
        EnsembleTarget([factor(embeddings(0))], MeanKernel(), 0.1)(ROWS, ANCHORS)


@pytest.mark.parametrize("trim", [-0.1, 0.5, 1.0, math.nan])
def test_refuses_to_trim_all(trim: float) -> None:
    with pytest.raises(ConfigError, match=r"ensemble.trim must be at least 0 and below 0.5"):
        TrimmedMean(trim=trim)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_refuses_a_share_that_is_none(share: float) -> None:
    with pytest.raises(ConfigError, match=r"ensemble.share must be between 0 "):
        AgreementMean(share=share)


@pytest.mark.parametrize(("num_byzantine", "num_selected"), [(-1, 1), (1, 0)])
def test_refuses_negative_counts(num_byzantine: int, num_selected: int) -> None:
    with pytest.raises(ConfigError, match=r"num_byzantine must be at least 0 and ensemble.num_selected at least 1"):
        Krum(num_byzantine=num_byzantine, num_selected=num_selected)


def test_a_cohort_must_be_large_enough_for_what_the_rule_promises() -> None:
    for rule in RULES.values():
        check_cohort(rule, 6)  # the default federation
    with pytest.raises(ConfigError, match="num_byzantine=2 needs 7 clients in a round"):
        check_cohort(Krum(num_byzantine=2, num_selected=1), 6)
    with pytest.raises(ConfigError, match=r"num_selected=6 rows .* at most 5 are honest"):
        check_cohort(Krum(num_byzantine=1, num_selected=6), 6)
    with pytest.raises(ConfigError, match=r"trim=0.2 of 4 clients is less than one"):
        check_cohort(TrimmedMean(trim=0.2), 4)
    check_cohort(TrimmedMean(trim=0.0), 1)


def test_trimming_is_not_fooled_by_binary_fractions() -> None:
    """0.29 x 100 is 28.999999999999996."""
    clients = [factor(embeddings(0))] * 43 + [constant()] * 28 + [factor(sign) for sign in [-embeddings(5)] * 29]
    cut_29 = target(clients, TrimmedMean(trim=0.29))
    torch.testing.assert_close(cut_29, target(clients, TrimmedMean(trim=0.2901)), atol=0, rtol=0)
