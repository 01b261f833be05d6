"""Few labels: how good a classifier is that has seen one, five or ten labelled images of each class, or a share.

Which images a draw picks depends on the training labels alone, so all strategies and seeds are compared on the same
draws; within a draw, a smaller number of images is among the larger one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fedssl.errors import ConfigError
from fedssl.evaluate.linear import LinearProbe
from fedssl.evaluate.logistic import LogisticRegression, PrincipalAxes
from fedssl.seeding import numpy_generator


def fixed_draws(
    labels: Int64[np.ndarray, " n"], per_class: Mapping[int, int], num_draws: int
) -> Int64[np.ndarray, "draws m"]:
    """Positions of `per_class[c]` images of each class c (all of a class that has fewer), one row a draw."""
    draws = []
    for draw in range(num_draws):
        order = numpy_generator(0, f"few labels, draw {draw}").permutation(len(labels))
        draws.append(np.concatenate([order[labels[order] == label][:count] for label, count in per_class.items()]))
    return np.stack(draws)


def share_draws(labels: Int64[np.ndarray, " n"], share: float, num_draws: int) -> Int64[np.ndarray, "draws m"]:
    """As `fixed_draws`, of `share` of each class, rounded, and of one image at least."""
    classes, sizes = np.unique(labels, return_counts=True)
    per_class = {int(label): max(1, round(share * int(size))) for label, size in zip(classes, sizes, strict=True)}
    return fixed_draws(labels, per_class, num_draws)


def share_name(share: float) -> str:
    """A share of the labels as metrics name it: 0.01 is "1pct"."""
    return f"{100 * share:g}pct"


def check_shares(key: str, shares: Sequence[float], num_draws: int) -> None:
    """Raise ConfigError about evaluate.<key> unless the shares are in (0, 1] and there are draws for a spread."""
    if not all(0 < share <= 1 for share in shares):
        raise ConfigError(f"evaluate.{key}.shares must be above 0 and at most 1 (0.01 is 1 %), got {list(shares)}.")
    if num_draws < 2:
        raise ConfigError(f"evaluate.{key}.num_draws must be at least 2 to have a spread, got {num_draws}.")


@dataclass(frozen=True, kw_only=True)
class FewLabels:
    """Logistic regression on a few labelled images, for many fixed draws of them.

    The penalty is fixed, as nothing is left to validate on. Tian et al. 2020, https://arxiv.org/abs/2003.11539, use
    this classifier too, with scikit-learn's default penalty.

    Args:
        per_class: labelled images per class; a class with fewer gives all it has.
        num_draws: >= 2.
        l2: > 0, per labelled image (see `LogisticRegression`).
    """

    per_class: Sequence[int]
    num_draws: int
    l2: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "per_class", tuple(self.per_class))
        if min(self.per_class, default=1) < 1:
            raise ConfigError(f"evaluate.labels.per_class must be numbers of 1 or more, got {list(self.per_class)}.")
        if self.num_draws < 2:
            raise ConfigError(f"evaluate.labels.num_draws must be at least 2 to have a spread, got {self.num_draws}.")
        if self.l2 <= 0:
            raise ConfigError(f"evaluate.labels.l2 must be above 0, got {self.l2}; usual is 0.1.")

    def draw(self, labels: Int64[np.ndarray, " n"], count: int) -> Int64[np.ndarray, "draws m"]:
        """Positions of `count` images of each class (all of a class that has fewer), one row a draw."""
        return fixed_draws(labels, dict.fromkeys(np.unique(labels).tolist(), count), self.num_draws)

    def accuracies(
        self,
        train: Float[Tensor, "n d"],
        labels: Int64[Tensor, " n"],
        test: Float[Tensor, "t d"],
        test_labels: Int64[Tensor, " t"],
        *,
        draws: Int64[np.ndarray, "draws m"],
        num_classes: int,
        logistic: LogisticRegression,
    ) -> Float[Tensor, " draws"]:
        """Top-1 accuracy on the test images of one classifier for each draw.

        Args:
            train: standardised features of all training images.
            labels: their classes; only those of `draws` are looked at.
            test: features of the test images on the same scale.
            test_labels: their classes.
            draws: from `draw`.
            num_classes: how many classes there are.
            logistic: the solver.
        """
        rows = torch.from_numpy(draws).to(labels.device)
        axes = PrincipalAxes.of(train[rows])
        classifiers = logistic.fit(axes, labels[rows], num_classes=num_classes, l2=self.l2)
        return (classifiers.predict(test) == test_labels).float().mean(dim=1)


@dataclass(frozen=True, kw_only=True)
class LabelShares:
    """The linear probe on a share of the labels, for a few fixed draws of them.

    The strength of the penalty is chosen as `LinearProbe` does, by a validation split of the labelled images alone.
    Where so few are labelled that no class has one to hold out, it is the fixed one of `FewLabels`.

    Args:
        shares: of the training labels, of each class alike and of each class one at least; above 0, at most 1.
        num_draws: >= 2.
    """

    shares: Sequence[float]
    num_draws: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", tuple(self.shares))
        check_shares("label_shares", self.shares, self.num_draws)

    def accuracies(
        self,
        train: Float[Tensor, "n d"],
        labels: Int64[Tensor, " n"],
        test: Float[Tensor, "t d"],
        test_labels: Int64[Tensor, " t"],
        *,
        draws: Int64[np.ndarray, "draws m"],
        num_classes: int,
        linear: LinearProbe,
        few: FewLabels,
        logistic: LogisticRegression,
    ) -> Float[Tensor, " draws"]:
        """Top-1 accuracy on the test images of one classifier for each draw.

        Args:
            train, labels, test, test_labels, num_classes, logistic: as for `FewLabels.accuracies`.
            draws: from `share_draws`.
            linear: how the penalty is chosen.
            few: its penalty where it cannot be.
        """
        sizes = labels[torch.from_numpy(draws[0]).to(labels.device)].bincount()  # the same in each draw
        if linear.num_held_out(int(sizes.max())) == 0:
            return few.accuracies(
                train, labels, test, test_labels, draws=draws, num_classes=num_classes, logistic=logistic
            )
        accuracies = []
        for draw in draws:
            rows = torch.from_numpy(draw).to(labels.device)
            split = linear.split(labels[rows].cpu().numpy())
            classifier, _ = linear.fit(
                train[rows], labels[rows], num_classes=num_classes, split=split, logistic=logistic
            )
            accuracies.append((classifier.predict(test) == test_labels).float().mean())
        return torch.stack(accuracies)
