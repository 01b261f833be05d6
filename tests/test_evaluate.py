"""Probes: solvable by hand, against literal transcriptions and scikit-learn, and blind to what they must not see."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sklearn.linear_model import LogisticRegression as SklearnLogisticRegression
from torch import nn

from fedssl.data.images import ImageSet
from fedssl.data.views import Normalisation
from fedssl.errors import ConfigError, FedSSLError
from fedssl.evaluate import (
    KNN,
    Evaluation,
    Evaluator,
    FewLabels,
    LinearProbe,
    LogisticRegression,
    PrincipalAxes,
    extract_features,
    standardise,
)

CONF = Path(__file__).parents[1] / "conf"
CPU = torch.device("cpu")
LOGISTIC = LogisticRegression(max_iterations=100, tolerance=1e-4)


class PlainViews(Normalisation):
    """The evaluator may use the deterministic transform only."""

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        raise AssertionError("a random view in an evaluation")


VIEWS = PlainViews(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def evaluation() -> Evaluation:
    """The numbers of conf/evaluate/default.yaml."""
    loaded = instantiate(OmegaConf.load(CONF / "evaluate" / "default.yaml"), _convert_="all")
    assert isinstance(loaded, Evaluation)
    return loaded


def image_set(labels: np.ndarray, seed: int, signal: float = 1.0, num_classes: int = 4) -> ImageSet:
    """8 x 8 noise; at signal 1 the class of an image is the brighter one of four rows of blocks."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 100, (len(labels), 3, 8, 8), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[:, 2 * label : 2 * label + 2] += np.uint8(150 * signal)
    return ImageSet(
        pixels=pixels,
        indices=np.arange(len(labels)),
        labels=labels,
        classes=tuple(f"class {i}" for i in range(num_classes)),
        name=f"blocks {seed}",
    )


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.MaxPool2d(2), nn.Flatten()
    )


def evaluator(train: ImageSet, test: ImageSet, **changes: object) -> Evaluator:
    return Evaluator(train=train, test=test, evaluation=replace(evaluation(), **changes), views=VIEWS, device=CPU)


def content_hash(module: nn.Module) -> str:
    """Of every parameter and buffer."""
    sha256 = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        sha256.update(name.encode() + tensor.numpy().tobytes())
    return sha256.hexdigest()


@pytest.fixture(scope="module")
def blocks() -> tuple[ImageSet, ImageSet]:
    labels = np.arange(200) % 4
    return image_set(labels, 0), image_set(labels[:100], 1)


def test_separable_classes_score_1(blocks: tuple[ImageSet, ImageSet]) -> None:
    metrics = evaluator(*blocks).raw_pixels()
    assert list(metrics) == [
        "knn_top1",
        "linear_top1",
        *(f"labels{n}_top1{suffix}" for n in (1, 5, 10) for suffix in ("", "_std")),
    ]
    for name, value in metrics.items():
        assert value == (0.0 if name.endswith("_std") else 1.0), name


def test_the_linear_probe_alone_is_the_same(blocks: tuple[ImageSet, ImageSet]) -> None:
    probes = evaluator(*blocks)
    assert probes.linear_top1(nn.Flatten()) == probes(nn.Flatten())["linear_top1"]


def test_random_labels_score_chance() -> None:
    rng = np.random.default_rng(0)
    train, test = (image_set(rng.integers(0, 4, n), seed, signal=0) for n, seed in ((400, 0), (1000, 1)))
    metrics = evaluator(train, test).raw_pixels()
    for name, value in metrics.items():
        if not name.endswith("_std"):
            assert 0.25 - 0.06 < value < 0.25 + 0.06, name  # four standard errors


def test_backbone_is_left_as_it_was(blocks: tuple[ImageSet, ImageSet]) -> None:
    """Weights, batch norm buffers, modes (mixed ones too), gradients: nothing moves, and eval mode was used."""
    backbone = small_net().train()
    backbone[1].eval()  # a frozen batch norm in a network that trains
    before, probes = content_hash(backbone), evaluator(*blocks)
    metrics = probes(backbone)
    assert content_hash(backbone) == before
    assert [part.training for part in backbone] == [True, False, True, True, True, True]
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert metrics == probes(backbone.eval())  # dropout was off, and nothing is drawn


def test_features_do_not_depend_on_the_batch(blocks: tuple[ImageSet, ImageSet]) -> None:
    """In training mode batch norm would make them."""
    train, _ = blocks
    one, many = (extract_features(small_net(), train, VIEWS, size, CPU) for size in (7, 256))
    torch.testing.assert_close(one, many)
    assert one.dtype == torch.float32
    pixels = train.take(torch.arange(3)).float()
    torch.testing.assert_close(
        extract_features(nn.Flatten(), train, VIEWS, 64, CPU)[:3], (pixels / 127.5 - 1).flatten(1)
    )


@pytest.mark.parametrize("k", [1, 5, 200])
def test_knn_equals_a_literal_transcription(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wu et al. 2018, section 3.4: w_c = sum over the neighbours of class c of exp(s / temperature)."""
    monkeypatch.setattr("fedssl.evaluate.knn.BLOCK_ENTRIES", 300)  # several blocks
    rng = torch.Generator().manual_seed(0)
    train, test = torch.randn(60, 4, generator=rng), torch.randn(33, 4, generator=rng)
    labels = torch.randint(3, (60,), generator=rng)
    expected = []
    for query in test:
        similarity = [torch.dot(query, row).item() / (query.norm() * row.norm()).item() for row in train]
        votes = [0.0, 0.0, 0.0]
        for i in sorted(range(60), key=lambda i: -similarity[i])[: min(k, 60)]:
            votes[int(labels[i])] += float(np.exp(similarity[i] / 0.1))
        expected.append(int(np.argmax(votes)))
    predictions = KNN(k=k, temperature=0.1).predict(train, labels, test, num_classes=3)
    assert predictions.tolist() == expected


def test_knn_temperature_decides_between_near_and_many() -> None:
    """One neighbour at cos 1 against two at cos 0.5: e^(1/t) > 2 e^(0.5/t) where t < 0.5 / ln 2 = 0.72."""
    half = [0.5, 0.75**0.5]
    train, labels, query = torch.tensor([[1.0, 0.0], half, half]), torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0.0]])
    for temperature, winner in ((0.7, 0), (0.75, 1)):
        assert KNN(k=3, temperature=temperature).predict(train, labels, query, 2).tolist() == [winner]


def problem(n: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping classes in correlated features."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    features = torch.randn(3, dim, generator=rng)[labels] + 2 * torch.randn(n, dim, generator=rng)
    return features @ torch.randn(dim, dim, generator=rng), labels


@pytest.mark.parametrize(("n", "dim"), [(120, 10), (12, 30)])  # both ways to the principal axes
@pytest.mark.parametrize("l2", [1.0, 0.01])
def test_logistic_regression_agrees_with_scikit_learn(n: int, dim: int, l2: float) -> None:
    """In double precision to many digits; in single precision as far as the classes' probabilities go."""
    features, labels = problem(n, dim, 0)
    theirs = SklearnLogisticRegression(C=1 / (n * l2), tol=1e-9, max_iter=5000).fit(features.double(), labels)
    probabilities = torch.from_numpy(theirs.predict_proba(features.double()))
    exact = LogisticRegression(max_iterations=500, tolerance=1e-8)
    ours = exact.fit(PrincipalAxes.of(features.double()), labels, num_classes=3, l2=l2)
    torch.testing.assert_close(ours.weight, torch.from_numpy(theirs.coef_), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(ours.scores(features.double()).softmax(dim=1), probabilities, atol=1e-5, rtol=0)
    single = LOGISTIC.fit(PrincipalAxes.of(features), labels, num_classes=3, l2=l2)
    torch.testing.assert_close(single.scores(features).softmax(dim=1), probabilities.float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("n", "dim"), [(12, 30), (40, 5)])
def test_many_problems_at_once_equal_one_by_one(n: int, dim: int) -> None:
    problems = [problem(n, dim, seed) for seed in range(4)]
    features, labels = (torch.stack(parts) for parts in zip(*problems, strict=True))
    exact = LogisticRegression(max_iterations=300, tolerance=1e-6)
    together = exact.fit(PrincipalAxes.of(features), labels, num_classes=3, l2=0.1)
    for i, (one_features, one_labels) in enumerate(problems):
        alone = exact.fit(PrincipalAxes.of(one_features), one_labels, num_classes=3, l2=0.1)
        torch.testing.assert_close(together.weight[i], alone.weight, atol=2e-3, rtol=1e-2)


def test_a_warm_start_changes_the_road_and_not_the_end() -> None:
    features, labels = problem(120, 10, 0)
    axes, exact = PrincipalAxes.of(features), LogisticRegression(max_iterations=300, tolerance=1e-6)
    start = exact.fit(axes, labels, num_classes=3, l2=1.0)
    cold, warm = (exact.fit(axes, labels, num_classes=3, l2=0.1, start=s) for s in (None, start))
    torch.testing.assert_close(warm.weight, cold.weight, atol=1e-3, rtol=1e-2)
    at_solution = LogisticRegression(max_iterations=300, tolerance=1e-3).fit(
        axes, labels, num_classes=3, l2=0.1, start=cold
    )
    torch.testing.assert_close(at_solution.weight, cold.weight, atol=1e-5, rtol=1e-4)  # it starts where it was told to


def test_principal_axes_keep_the_features() -> None:
    for n, dim in ((30, 5), (5, 30)):
        features, _ = problem(n, dim, 0)
        axes = PrincipalAxes.of(features)
        torch.testing.assert_close(axes.coordinates @ axes.axes.mT, features, atol=1e-3, rtol=1e-4)
        moments = axes.coordinates.T @ axes.coordinates / n
        torch.testing.assert_close(moments, torch.diag(axes.spectrum), atol=1e-4 * float(axes.spectrum.max()), rtol=0)


def test_standardise_uses_training_statistics_alone() -> None:
    train = torch.tensor([[1.0, 0.3, 5.0], [3.0, 0.3, 9.0]])
    test = torch.tensor([[2.0, 0.9, 5.0], [5.0, 0.1, 11.0]])
    scaled_train, scaled_test = standardise(train, test)
    torch.testing.assert_close(scaled_train, torch.tensor([[-1.0, 0, -1], [1, 0, 1]]))
    torch.testing.assert_close(scaled_test, torch.tensor([[0.0, 0, -1], [3, 0, 2]]))


def test_validation_split_is_stratified_and_fixed() -> None:
    probe = LinearProbe(l2=[0.1], validation_fraction=0.2)
    labels = np.repeat([0, 1, 2, 3], [50, 10, 3, 1])
    kept, validation = probe.split(labels)
    assert sorted([*kept, *validation]) == list(range(64))
    assert np.bincount(labels[validation], minlength=4).tolist() == [10, 2, 1, 0]  # the last image is kept to fit on
    again = probe.split(labels)
    assert (again[0] == kept).all()
    assert (again[1] == validation).all()


def test_test_labels_choose_nothing() -> None:
    """Turn all test labels by 0, 1, 2, 3 classes: each prediction is right once, so accuracies sum to 1.

    Anything that is picked because it does well on test would push the sum above 1.
    """
    labels = np.arange(80) % 4
    train, test = image_set(labels, 0, signal=0.1), image_set(labels, 1, signal=0.1)
    turns = [evaluator(train, replace(test, labels=(labels + turn) % 4)).raw_pixels() for turn in range(4)]
    assert 0.4 < turns[0]["linear_top1"] < 1
    for name in turns[0]:
        if not name.endswith("_std"):
            assert sum(metrics[name] for metrics in turns) == pytest.approx(1, abs=1e-6), name


def test_validation_chooses_the_l2_of_unseen_images() -> None:
    """Pure noise labels: a weak penalty fits them by heart and is confidently wrong; the strong one must win."""
    rng = torch.Generator().manual_seed(0)
    features, labels = torch.randn(300, 40, generator=rng), torch.randint(2, (300,), generator=rng)
    probe = LinearProbe(l2=[1e-6, 100.0], validation_fraction=0.5)
    fitted = {}
    kept, validation = (torch.from_numpy(rows) for rows in probe.split(labels.numpy()))
    for l2 in (1e-6, 100.0):
        classifier = LOGISTIC.fit(PrincipalAxes.of(features[kept]), labels[kept], num_classes=2, l2=l2)
        scores = classifier.scores(features[validation])
        accuracy = (scores.argmax(1) == labels[validation]).float().mean().item()
        fitted[l2] = (accuracy, -F.cross_entropy(scores, labels[validation]).item())
    classifier, chosen = probe.fit(
        features, labels, num_classes=2, split=probe.split(labels.numpy()), logistic=LOGISTIC
    )
    assert chosen == max(fitted, key=fitted.__getitem__)
    refit = LOGISTIC.fit(PrincipalAxes.of(features), labels, num_classes=2, l2=chosen)  # on validation images too
    torch.testing.assert_close(classifier.weight, refit.weight, atol=2e-3, rtol=1e-2)


def test_few_label_draws_are_fixed_nested_and_of_the_right_classes() -> None:
    probe = FewLabels(per_class=[1, 5], num_draws=20, l2=0.01)
    labels = np.repeat([0, 1, 2], [30, 20, 3])  # the last class has fewer than 5
    one, five = probe.draw(labels, 1), probe.draw(labels, 5)
    assert one.shape == (20, 3)
    assert five.shape == (20, 13)
    for small, large in zip(one, five, strict=True):
        assert labels[small].tolist() == [0, 1, 2]
        assert np.bincount(labels[large]).tolist() == [5, 5, 3]
        assert set(small) < set(large)
        assert len(set(large)) == len(large)
    assert len({tuple(row) for row in five}) == 20  # draws differ
    assert (probe.draw(labels, 5) == five).all()


def test_few_labels_read_no_other_label() -> None:
    rng = torch.Generator().manual_seed(0)
    train, test = torch.randn(60, 8, generator=rng), torch.randn(50, 8, generator=rng)
    labels, test_labels = torch.arange(60) % 3, torch.arange(50) % 3
    probe = FewLabels(per_class=[2], num_draws=3, l2=0.01)
    draws = probe.draw(labels.numpy(), 2)
    unread = labels.clone()
    unread[np.setdiff1d(np.arange(60), draws)] = 0
    first, second = (
        probe.accuracies(train, given, test, test_labels, draws=draws, num_classes=3, logistic=LOGISTIC)
        for given in (labels, unread)
    )
    assert first.tolist() == second.tolist()


def test_mean_and_spread_are_those_of_the_draws() -> None:
    labels = np.arange(80) % 4
    train, test = image_set(labels, 0, signal=0.1), image_set(labels, 1, signal=0.1)
    probes = evaluator(train, test, labels=FewLabels(per_class=[1], num_draws=5, l2=0.1))
    metrics = probes.raw_pixels()
    scaled = standardise(*(extract_features(nn.Flatten(), images, VIEWS, 64, CPU) for images in (train, test)))
    scores = []
    for rows in probes.draws[1]:  # one after the other, by scikit-learn
        classifier = SklearnLogisticRegression(C=1 / (len(rows) * 0.1), tol=1e-6, max_iter=1000)
        scores.append(classifier.fit(scaled[0][rows], labels[rows]).score(scaled[1], labels))
    assert metrics["labels1_top1"] == pytest.approx(np.mean(scores), abs=0.01)
    assert metrics["labels1_top1_std"] == pytest.approx(np.std(scores, ddof=1), abs=0.01)
    assert metrics["labels1_top1_std"] > 0


def test_collapsed_features_score_one_class(blocks: tuple[ImageSet, ImageSet]) -> None:
    """All images alike: no probe fails, and none does better than one class."""

    class Collapsed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.full((len(x), 8), 0.3)

    metrics = evaluator(*blocks)(Collapsed())
    assert {value for name, value in metrics.items() if not name.endswith("_std")} == {0.25}


def test_features_that_are_not_finite_are_named(blocks: tuple[ImageSet, ImageSet]) -> None:
    backbone = small_net()
    nn.init.constant_(backbone[0].weight, torch.nan)
    with pytest.raises(FedSSLError, match=r"features of blocks 0 contain NaN or infinity.*learning rate"):
        evaluator(*blocks)(backbone)


def test_unlabelled_data_names_the_setting(blocks: tuple[ImageSet, ImageSet]) -> None:
    train, test = blocks
    for pair in ((replace(train, labels=None, classes=()), test), (train, replace(test, labels=None, classes=()))):
        with pytest.raises(ConfigError, match=r"need labels and blocks . has none\. Set evaluate\.data to a labelled"):
            evaluator(*pair)


def test_different_classes_are_refused(blocks: tuple[ImageSet, ImageSet]) -> None:
    train, test = blocks
    with pytest.raises(ConfigError, match=r"class 0, class 1, class 2, \.\.\. \(4\).*those of blocks 1, a, b \(2\)"):
        evaluator(train, replace(test, classes=("a", "b")))


def test_too_few_images_to_validate_on(blocks: tuple[ImageSet, ImageSet]) -> None:
    train, test = blocks
    with pytest.raises(ConfigError, match=r"leaves no image to validate on: the 8 training images have 4 classes"):
        evaluator(train.subset(range(8)), test)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KNN(k=0, temperature=0.1), r"evaluate\.knn\.k must be at least 1, got 0"),
        (lambda: KNN(k=1, temperature=0.0), r"evaluate\.knn\.temperature must be above 0, got 0\.0"),
        (lambda: LinearProbe(l2=[], validation_fraction=0.1), r"evaluate\.linear\.l2 must be a list of numbers above"),
        (lambda: LinearProbe(l2=[0.0], validation_fraction=0.1), r"numbers above 0, got \[0\.0\]"),
        (lambda: LinearProbe(l2=[1.0], validation_fraction=1.0), r"validation_fraction must be between 0 and 1"),
        (lambda: FewLabels(per_class=[0], num_draws=20, l2=0.1), r"evaluate\.labels\.per_class must be numbers of 1"),
        (lambda: FewLabels(per_class=[1], num_draws=1, l2=0.1), r"evaluate\.labels\.num_draws must be at least 2"),
        (lambda: FewLabels(per_class=[1], num_draws=2, l2=0.0), r"evaluate\.labels\.l2 must be above 0"),
        (lambda: LogisticRegression(max_iterations=0, tolerance=1e-4), r"max_iterations must be at least 1, got 0"),
        (lambda: LogisticRegression(max_iterations=1, tolerance=0.0), r"tolerance must be above 0, got 0\.0"),
        (lambda: replace(evaluation(), every=0), r"evaluate\.every must be at least 1, got 0"),
        (lambda: replace(evaluation(), batch_size=0), r"evaluate\.batch_size must be at least 1"),
        (lambda: replace(evaluation(), root="x"), r"evaluate\.root=x has no effect without evaluate\.data"),
    ],
)
def test_messages(build, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
