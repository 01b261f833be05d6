"""Diagnostics of features: closed forms, literal transcriptions of the papers, and what must not matter."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fedssl.data.images import ImageSet
from fedssl.data.views import ShiftViews
from fedssl.errors import ConfigError
from fedssl.evaluate import Diagnostics, linear_cka
from fedssl.evaluate.diagnostics import (
    alignment,
    entropy_rank,
    intra_class_alignment,
    uniformity,
)
from fedssl.evaluate.shards import accuracy_on
from fedssl.similarity import FactorSimilarity, collapse_measures, instance_discrimination


def noise(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


# --- by hand


def test_alignment_is_twice_one_minus_the_cosine() -> None:
    first, second = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[5.0, 0.0], [1.0, 1.0]])
    assert alignment(first, second) == pytest.approx((0 + 2 - 2 / math.sqrt(2)) / 2)
    assert alignment(first, -first) == pytest.approx(4)


@pytest.mark.parametrize("n", [2, 7])
def test_uniformity_of_orthogonal_and_of_equal_images(n: int) -> None:
    """Orthogonal unit vectors are 2 apart (squared), so every pair gives exp(-4)."""
    assert uniformity(3 * torch.eye(n)) == pytest.approx(-4, abs=1e-5)
    assert uniformity(3 * torch.eye(n), t=0.5) == pytest.approx(-1, abs=1e-5)
    assert uniformity(torch.ones(n, 5)) == pytest.approx(0, abs=1e-5)


def test_intra_class_alignment_counts_classes_alike_and_lone_images_not() -> None:
    """A class of orthogonal images is 2 apart, one of equal images 0; the third class has one image."""
    features = torch.cat([torch.eye(4)[:3], torch.ones(5, 4), -torch.ones(1, 4)])
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2])
    assert intra_class_alignment(features, labels) == pytest.approx(1)
    assert math.isnan(intra_class_alignment(features[:2], torch.tensor([0, 1])))


def test_ranks_of_directions_used_evenly_and_unevenly() -> None:
    """Rows e1, e1, e1, e1, e2: singular values 2 and 1, so shares 2/3 and 1/3 (squares: 4/5 and 1/5)."""
    assert entropy_rank(torch.eye(6).repeat(2, 1)) == pytest.approx(6)
    assert entropy_rank(torch.outer(torch.arange(1.0, 9), torch.tensor([1.0, 2, 3]))) == pytest.approx(1, abs=1e-3)
    features = torch.tensor([[1.0, 0]] * 4 + [[0, 1.0]])
    assert entropy_rank(features) == pytest.approx(math.exp(-2 / 3 * math.log(2 / 3) - 1 / 3 * math.log(1 / 3)))
    participation = collapse_measures(FactorSimilarity(factors=features))["effective_rank"]
    assert participation == pytest.approx(1 / (0.8**2 + 0.2**2))  # another number for the same features
    assert entropy_rank(torch.zeros(4, 3)) == 0


def test_instance_discrimination_by_hand() -> None:
    """On a circle at 0, 10 and 60 degrees; the views of the first two are swapped, that of the third is its own."""
    angles = torch.tensor([0.0, 10, 60]) * math.pi / 180
    queries = torch.stack([angles.cos(), angles.sin()], dim=1)
    views = queries[[1, 0, 2]] + torch.tensor([[0.0, 0.1], [0.0, -0.1], [0, 0]])  # further off than the neighbour
    assert instance_discrimination(queries, views, [1, 2]) == pytest.approx([1 / 3, 1])
    assert instance_discrimination(queries, 7 * queries, [1]) == [1]  # scale says nothing


def test_collapse_recognises_nobody() -> None:
    assert instance_discrimination(torch.ones(9, 3), torch.ones(9, 3), [1, 5, 8, 9]) == [0, 0, 0, 1]


@pytest.mark.parametrize("value", [0.0, 3.0, float("nan"), float("inf")])
def test_what_tells_nothing_apart_recognises_nobody(value: float) -> None:
    """More images than one block of rows holds."""
    assert instance_discrimination(torch.full((300, 4), value), torch.full((300, 4), value), [1]) == [0]


@pytest.mark.parametrize("n", [2, 7, 300])
def test_instance_discrimination_written_out(n: int) -> None:
    images = noise(n, 5, n)
    views = images + 0.5 * noise(n, 5, n + 1)
    hits = 0
    for i in range(n):
        own = float(torch.nn.functional.cosine_similarity(images[i], views[i], dim=0))
        hits += all(
            torch.nn.functional.cosine_similarity(images[i], images[j], dim=0) < own for j in range(n) if j != i
        )
    assert instance_discrimination(images, views, [1]) == [hits / n]
    assert n == 2 or 0 < hits < n


def test_cka_sees_no_rotation_no_scale_and_no_shift() -> None:
    x = noise(60, 5)
    rotation, _ = torch.linalg.qr(noise(5, 5, 1))
    assert linear_cka(x, 7 * x @ rotation + 3) == pytest.approx(1)
    assert linear_cka(x, torch.cat([x, x], dim=1)) == pytest.approx(1)  # other widths are fine
    even = torch.tensor([[1.0], [1], [-1], [-1]])
    assert linear_cka(even, torch.tensor([[1.0], [-1], [1], [-1]])) == pytest.approx(0)
    assert math.isnan(linear_cka(x, torch.ones(60, 2)))


def test_cka_of_unrelated_features_is_what_the_docstring_says() -> None:
    for n, d in ((400, 40), (100, 100)):
        measured = [linear_cka(noise(n, d, seed), noise(n, d, 50 + seed)) for seed in range(5)]
        assert np.mean(measured) == pytest.approx(d / (n + d), rel=0.05)


# --- transcriptions


def test_pairwise_figures_equal_slow_loops() -> None:
    features, view, labels = noise(12, 4), noise(12, 4) + 0.5 * noise(12, 4, 1), torch.arange(12) % 3
    z = [row / row.norm() for row in features]
    pairs = [(i, j) for i in range(12) for j in range(12) if i != j]
    expected = math.log(np.mean([math.exp(-2 * float((z[i] - z[j]).square().sum())) for i, j in pairs]))
    assert uniformity(features) == pytest.approx(expected, abs=1e-5)
    per_class = []
    for label in range(3):
        same = [(i, j) for i, j in pairs if labels[i] == label and labels[j] == label]
        per_class.append(np.mean([float((z[i] - z[j]).square().sum()) for i, j in same]))
    assert intra_class_alignment(features, labels) == pytest.approx(np.mean(per_class), abs=1e-5)
    hits = []
    for i in range(12):
        own = torch.cosine_similarity(features[i], view[i], dim=0)
        ranked = sorted([(float(own), 1), *((float(z[i] @ z[j]), 0) for j in range(12) if j != i)], reverse=True)
        hits.append(1 in [kind for _, kind in ranked[:2]])
    assert 0 < np.mean(hits) < 1
    assert instance_discrimination(features, view, [2]) == pytest.approx([np.mean(hits)])


def test_cka_equals_its_definition_by_hsic() -> None:
    """Kornblith et al., Sec. 3: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with K = X X^T, HSIC = tr(K H L H)."""
    x, y = noise(30, 6).double(), (noise(30, 6) @ noise(6, 9, 1) + noise(30, 9, 2)).double()
    centre = torch.eye(30).double() - 1 / 30

    def hsic(k: torch.Tensor, m: torch.Tensor) -> float:
        return float(torch.trace(k @ centre @ m @ centre))

    k, m = x @ x.T, y @ y.T
    assert linear_cka(x, y) == pytest.approx(hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m)))


# --- one client's mix of classes


def test_accuracy_on_a_mix_of_classes_is_the_mean_of_the_classes_accuracies() -> None:
    """Class 0: 1 of 4 right, class 1: 2 of 2; a client with three images of class 0 to one of class 1."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    correct = torch.tensor([True, False, False, False, True, True])
    for counts, expected in (([1, 0], 1 / 4), ([0, 5], 1), ([3, 1], 3 / 4 * 1 / 4 + 1 / 4), ([4, 2], 1 / 2)):
        assert accuracy_on(correct, labels, torch.tensor(counts)) == pytest.approx(expected)


def test_accuracy_on_a_mix_equals_weights_on_images_and_skips_untested_classes() -> None:
    rng = np.random.default_rng(0)
    labels, counts = torch.from_numpy(rng.integers(0, 4, 50)), torch.tensor([5, 0, 7, 1, 9])  # class 4 is not tested
    correct = torch.from_numpy(rng.random(50) < 0.6)
    weights = [int(counts[c]) / int((labels == c).sum()) for c in labels]
    expected = sum(w for w, right in zip(weights, correct, strict=True) if right) / sum(weights)
    assert accuracy_on(correct, labels, counts) == pytest.approx(expected)
    assert math.isnan(accuracy_on(correct, labels, torch.tensor([0, 0, 0, 0, 9])))


# --- all of them


def test_the_figures_are_those_of_the_image_and_two_views_of_it() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 3, 8, 8), dtype=np.uint8)
    labels = np.arange(40) % 4
    images = ImageSet(pixels=pixels, indices=np.arange(40), labels=labels, classes=("a", "b", "c", "d"), name="noise")
    views = ShiftViews(mean=(0.5,) * 3, std=(0.5,) * 3, shift=0.25, flip_probability=0.5)
    settings = Diagnostics(num_images=10, ranks=[1, 3])
    rows = settings.rows(40)
    assert sorted(set(rows)) == rows.tolist()
    assert len(rows) == 10
    assert (rows == settings.rows(40)).all()
    chosen, backbone, cpu = images.subset(rows), nn.Flatten(), torch.device("cpu")
    features = views.plain(chosen.take(np.arange(10))).flatten(1)
    metrics, again, still = (
        settings(features, backbone, chosen, v, size, cpu)
        for v, size in ((views, 4), (views, 4), (ShiftViews(**{**vars(views), "shift": 0, "flip_probability": 0}), 4))
    )
    assert metrics == again
    assert metrics["uniformity"] == pytest.approx(uniformity(features))
    assert metrics["intra_class_alignment"] == intra_class_alignment(features, torch.from_numpy(labels[rows]))
    assert 0 < metrics["alignment_plain"] < 2.5
    assert still["alignment"] == still["alignment_plain"] == pytest.approx(0, abs=1e-6)  # views that change nothing
    assert still["instance_acc1"] == 1
    assert metrics["alignment"] != metrics["alignment_plain"]  # the two views differ
    assert metrics["instance_acc1"] <= metrics["instance_acc3"]


@pytest.mark.parametrize(("num_images", "ranks", "message"), [(1, [1], "num_images"), (5, [0], "ranks")])
def test_impossible_settings_are_refused(num_images: int, ranks: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"evaluate\.diagnostics\.{message} must be"):
        Diagnostics(num_images=num_images, ranks=ranks)
