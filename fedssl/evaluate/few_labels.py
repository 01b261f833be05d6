"""Few labels: how good a classifier is that has seen one, five or ten labelled images of each class."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fedssl.errors import ConfigError
from fedssl.evaluate.logistic import LogisticRegression, PrincipalAxes
from fedssl.seeding import numpy_generator


@dataclass(frozen=True, kw_only=True)
class FewLabels:
    """Logistic regression on a few labelled images, for many fixed draws of them.

    Which images a draw picks depends on the training labels alone, so all strategies and seeds are compared on the
    same draws; within a draw, the images of a smaller number per class are among those of a larger one. The penalty is
    fixed, as nothing is left to validate on. Tian et al. 2020, https://arxiv.org/abs/2003.11539, use this classifier
    too, with scikit-learn's default penalty.

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
        classes = np.unique(labels)
        draws = []
        for draw in range(self.num_draws):
            order = numpy_generator(0, f"few labels, draw {draw}").permutation(len(labels))
            draws.append(np.concatenate([order[labels[order] == label][:count] for label in classes]))
        return np.stack(draws)

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
