"""Shares of the labels: which images they are, linear probes and fine-tuning on them, and what must stay untouched."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from fedssl.config import conf_dir, instantiate
from fedssl.data.images import ImageSet
from fedssl.data.views import ColourViews, GeometricViews, ShiftViews
from fedssl.errors import ConfigError, FedSSLError
from fedssl.evaluate import FewLabels, FineTuning, LabelShares, LinearProbe, LogisticRegression, Thorough
from fedssl.evaluate.few_labels import share_draws, share_name
from tests.test_evaluate import content_hash, image_set, small_net

CPU = torch.device("cpu")
VIEWS = ShiftViews(mean=(0.5,) * 3, std=(0.5,) * 3, shift=0.1, flip_probability=0.5)
LOGISTIC = LogisticRegression(max_iterations=100, tolerance=1e-4)


def thorough() -> Thorough:
    """The numbers of conf/evaluation.yaml."""
    loaded = instantiate(yaml.safe_load((conf_dir() / "evaluation.yaml").read_text()))
    assert isinstance(loaded, Thorough)
    return loaded


def tuning(**changes: Any) -> FineTuning:
    """Of conf/evaluation.yaml, faster."""
    settings = thorough().finetune
    optimisation = {name: changes.pop(name) for name in list(changes) if name in vars(settings.optimisation)}
    changed = replace(settings, **{"epochs": 15, "min_steps": 0, "num_draws": 2, **changes})
    return replace(changed, optimisation=replace(settings.optimisation, **optimisation))


@pytest.fixture(scope="module")
def blocks() -> tuple[ImageSet, ImageSet]:
    labels = np.arange(200) % 4
    return image_set(labels, 0), image_set(labels[:100], 1)


# --- the shares


def test_a_share_is_stratified_nested_and_leaves_no_class_out() -> None:
    labels = np.repeat([0, 1, 2], [200, 100, 12])
    one, ten = share_draws(labels, 0.01, 4), share_draws(labels, 0.1, 4)
    for small, large in zip(one, ten, strict=True):
        assert np.bincount(labels[small]).tolist() == [2, 1, 1]  # 0.12 images of the last class are one
        assert np.bincount(labels[large]).tolist() == [20, 10, 1]
        assert set(small) < set(large)
    assert len({tuple(sorted(draw)) for draw in ten}) == 4
    assert (share_draws(labels, 0.1, 2) == ten[:2]).all()  # fewer draws are the first of more
    assert sorted(share_draws(labels, 1.0, 2)[1]) == list(range(312))


def test_a_share_extends_the_draws_of_a_few_labels() -> None:
    labels = np.arange(300) % 3
    few = FewLabels(per_class=[1], num_draws=3, l2=0.1).draw(labels, 1)
    assert (share_draws(labels, 0.01, 3) == few).all()  # 1 % of 100 images


def test_shares_are_named_in_percent() -> None:
    assert [share_name(share) for share in (0.01, 0.1, 1, 0.005)] == ["1pct", "10pct", "100pct", "0.5pct"]


def probe_data(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    labels, test_labels = torch.arange(n) % 3, torch.arange(90) % 3
    centres = torch.randn(3, 20, generator=rng)
    train, test = (centres[of] + 2 * torch.randn(len(of), 20, generator=rng) for of in (labels, test_labels))
    return train, labels, test, test_labels


def test_the_penalty_is_chosen_among_the_labelled_images_alone() -> None:
    """Each draw's classifier is the linear probe's, as if the other training images did not exist."""
    train, labels, test, test_labels = probe_data(300)
    draws, linear = share_draws(labels.numpy(), 0.2, 3), LinearProbe(l2=[10.0, 1e-4], validation_fraction=0.5)
    few = FewLabels(per_class=[1], num_draws=2, l2=1e6)
    accuracies = LabelShares(shares=[0.2], num_draws=3).accuracies(
        train, labels, test, test_labels, draws=draws, num_classes=3, linear=linear, few=few, logistic=LOGISTIC
    )
    expected = []
    for rows in draws:
        split = linear.split(labels[rows].numpy())
        classifier, _ = linear.fit(train[rows], labels[rows], num_classes=3, split=split, logistic=LOGISTIC)
        expected.append((classifier.predict(test) == test_labels).float().mean().item())
    assert accuracies.tolist() == expected
    assert len(set(expected)) > 1


def test_where_nothing_can_be_held_out_the_penalty_is_that_of_few_labels() -> None:
    train, labels, test, test_labels = probe_data(300)
    draws, linear = share_draws(labels.numpy(), 0.01, 5), LinearProbe(l2=[1e-9], validation_fraction=0.2)
    few, more = (FewLabels(per_class=[1], num_draws=2, l2=l2) for l2 in (0.1, 1e-9))
    found, weak = (
        LabelShares(shares=[0.01], num_draws=5).accuracies(
            train, labels, test, test_labels, draws=draws, num_classes=3, linear=linear, few=f, logistic=LOGISTIC
        )
        for f in (few, more)
    )
    expected = few.accuracies(train, labels, test, test_labels, draws=draws, num_classes=3, logistic=LOGISTIC)
    assert found.tolist() == expected.tolist()
    assert found.shape == weak.shape == (5,)


# --- fine-tuning


def test_one_step_is_gradient_descent_on_softmax_regression() -> None:
    """From W = 0 all classes have probability 1/c, so W = lr mean_i (onehot(y_i) - 1/c) x_i^T; b likewise."""
    train = image_set(np.arange(12) % 4, 0)
    finetune = tuning(shift=0, epochs=1, batch_size=16, optimiser="sgd", momentum=0.0, lr=0.5, schedule="constant")
    views = replace(VIEWS, flip_probability=0.0)
    network = finetune.fit(nn.Flatten(), train, num_classes=4, views=views, seed=0, device=CPU)
    x = views.plain(train.take(np.arange(12))).flatten(1)
    y = F.one_hot(torch.arange(12) % 4, 4) - 1 / 4
    torch.testing.assert_close(network[1].weight.detach(), 0.5 * y.T @ x / 12)
    torch.testing.assert_close(network[1].bias.detach(), 0.5 * y.mean(dim=0))


def test_the_backbone_learns_too_and_classes_are_told_apart(blocks: tuple[ImageSet, ImageSet]) -> None:
    train, test = blocks
    draws = share_draws(train.labels, 0.1, 2)
    backbone = small_net()
    network = tuning(lr=0.01).fit(backbone, train.subset(draws[0]), num_classes=4, views=VIEWS, seed=0, device=CPU)
    assert not network.training
    assert not torch.equal(network[0][0].weight, backbone[0].weight)
    assert not torch.equal(network[0][1].running_mean, backbone[1].running_mean)
    accuracies = tuning(lr=0.01).accuracies(backbone, train, test, draws=draws, views=VIEWS, batch_size=64, device=CPU)
    assert accuracies.shape == (2,)
    assert accuracies.min() > 0.9  # chance is 0.25


def test_the_given_backbone_is_left_as_it_was(blocks: tuple[ImageSet, ImageSet]) -> None:
    train, test = blocks
    backbone = small_net().train()
    backbone[1].eval()
    backbone[0].weight.requires_grad_(False)
    before, state = content_hash(backbone), torch.random.get_rng_state()
    tuning(epochs=2).accuracies(
        backbone, train, test, draws=share_draws(train.labels, 0.05, 2), views=VIEWS, batch_size=64, device=CPU
    )
    assert content_hash(backbone) == before
    assert [part.training for part in backbone] == [True, False, True, True, True, True]
    assert not backbone[0].weight.requires_grad
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)  # dropout had a generator of its own


def test_the_result_depends_on_the_seed_and_on_no_global_state(blocks: tuple[ImageSet, ImageSet]) -> None:
    train, _ = blocks
    few = train.subset(share_draws(train.labels, 0.1, 2)[0])

    def weights(seed: int, state: int) -> torch.Tensor:
        torch.manual_seed(state)
        network = tuning(epochs=2, batch_size=8).fit(backbone, few, num_classes=4, views=VIEWS, seed=seed, device=CPU)
        return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])

    backbone = small_net()
    assert torch.equal(weights(0, 1), weights(0, 2))
    assert not torch.equal(weights(0, 1), weights(1, 1))


def test_other_labels_are_never_read(blocks: tuple[ImageSet, ImageSet]) -> None:
    train, test = blocks
    draws = share_draws(train.labels, 0.05, 2)
    unread = train.labels.copy()
    unread[np.setdiff1d(np.arange(len(train)), draws)] = 0
    first, second = (
        tuning(epochs=3).accuracies(small_net(), given, test, draws=draws, views=VIEWS, batch_size=64, device=CPU)
        for given in (train, replace(train, labels=unread))
    )
    assert first.tolist() == second.tolist()


@dataclass
class Own:
    """Views of a user's own, which say nothing of a mean; they note how many images each step has."""

    sizes: list[int] = field(default_factory=list)

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        self.sizes.append(len(images))
        return images.float()

    def plain(self, images: torch.Tensor) -> torch.Tensor:
        return images.float()

    def describe(self) -> str:
        return "own"


@pytest.mark.parametrize(("min_steps", "steps"), [(0, 6), (6, 6), (7, 9)])
def test_few_images_are_passed_over_more_often(min_steps: int, steps: int) -> None:
    """Two epochs of three batches, or as many whole epochs as give `min_steps`."""
    views, images = Own(), image_set(np.arange(12) % 3, 0, num_classes=3)
    finetune = tuning(epochs=2, batch_size=4, min_steps=min_steps)
    finetune.fit(nn.Flatten(), images, num_classes=3, views=views, seed=0, device=CPU)
    assert len(views.sizes) == steps


@pytest.mark.parametrize(("n", "sizes"), [(9, [4, 4]), (10, [4, 4, 2]), (3, [3])])
def test_a_last_batch_of_one_image_is_left_out(n: int, sizes: list[int]) -> None:
    """Batch norm could not train on it."""
    views, images = Own(), image_set(np.arange(n) % 3, 0, num_classes=3)
    tuning(epochs=2, batch_size=4).fit(nn.Flatten(), images, num_classes=3, views=views, seed=0, device=CPU)
    assert views.sizes == sizes * 2


def test_images_are_mirrored_only_where_the_run_mirrors_them() -> None:
    def numbers(group: str, **more: Any) -> Any:
        node = yaml.safe_load((conf_dir() / "views" / f"{group}.yaml").read_text())
        return instantiate({**node, "image_size": 16, "mean": [0.1] * 3, "std": [0.2] * 3, **more})

    colour, geometric = numbers("colour", flip_probability=0.3), numbers("geometric")
    assert isinstance(colour, ColourViews)
    assert isinstance(geometric, GeometricViews)
    mild = tuning(shift=0.25)
    expected = ShiftViews(mean=(0.1,) * 3, std=(0.2,) * 3, shift=0.25, flip_probability=0.3)
    assert mild.augmentation(colour) == expected
    assert mild.augmentation(geometric) == replace(expected, flip_probability=0.0)
    own = Own()
    assert mild.augmentation(own) is own


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"shares": [0.0]}, "evaluate.finetune.shares must be above 0 and at most 1"),
    ({"shares": [10]}, r"evaluate.finetune.shares must be above 0 and at most 1 \(0.01 is 1 %\), got \[10\]"),
    ({"num_draws": 1}, "evaluate.finetune.num_draws must be at least 2"),
    ({"epochs": 0}, "evaluate.finetune.epochs must be at least 1"),
    ({"batch_size": 1}, "batch_size at least 2"),
    ({"min_steps": -1}, r"\.min_steps at least 0"),
    ({"shift": 0.6}, "evaluate.finetune.shift must be between 0 and 0.5"),
    ({"schedule": "cosine_rounds"}, "schedule must be constant or cosine, got 'cosine_rounds'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tuning(**changes)


def test_shares_of_the_linear_probe_are_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.label_shares\.shares must be above 0"):
        LabelShares(shares=[1.5], num_draws=3)


def test_one_image_or_a_diverged_loss_is_said() -> None:
    one = image_set(np.zeros(1, np.int64), 0, num_classes=1)
    with pytest.raises(ConfigError, match=r"raise evaluate\.finetune\.shares"):
        tuning().fit(nn.Flatten(), one, num_classes=1, views=VIEWS, seed=0, device=CPU)
    backbone = small_net()
    nn.init.constant_(backbone[0].weight, float("inf"))
    with pytest.raises(FedSSLError, match=r"became nan: lower evaluate\.finetune\.optimisation\.lr=0\.001"):
        tuning(epochs=1).fit(backbone, image_set(np.arange(8) % 4, 0), num_classes=4, views=VIEWS, seed=0, device=CPU)
