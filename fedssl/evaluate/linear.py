"""The linear probe: how much of the classes a linear classifier finds in the features, all labels given."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from fedssl.errors import ConfigError
from fedssl.evaluate.logistic import LinearClassifier, LogisticRegression, PrincipalAxes
from fedssl.seeding import numpy_generator


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """Logistic regression whose L2 strength a validation split of the training images chooses.

    Every candidate is fitted without the validation images and scored on them; the winner is fitted again on all
    training images. Test images are seen once, at the end, by that classifier alone. The common protocol of frozen
    features (Kornblith et al. 2019, section 3.2, https://arxiv.org/abs/1805.08974) instead of SGD with a schedule:
    the optimum is unique, so no learning rate has to be tuned to the scale of the features.

    Args:
        l2: candidates, > 0, per training image (see `LogisticRegression`).
        validation_fraction: of each class, between 0 and 1.
    """

    l2: Sequence[float]
    validation_fraction: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "l2", tuple(sorted(map(float, self.l2), reverse=True)))  # strong to weak: warm starts
        if not self.l2 or min(self.l2) <= 0:
            raise ConfigError(f"evaluate.linear.l2 must be a list of numbers above 0, got {list(self.l2)}.")
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(
                f"evaluate.linear.validation_fraction must be between 0 and 1, got {self.validation_fraction}: "
                f"that share of the training images chooses evaluate.linear.l2; usual is 0.2."
            )

    def num_held_out(self, size: int) -> int:
        """How many of a class with `size` images are validated on."""
        return min(round(self.validation_fraction * size), size - 1)

    def split(self, labels: Int64[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " v"]]:
        """Positions to fit on and positions to validate on, ascending: a function of the labels alone.

        Each class gives its share, rounded, and keeps at least one image to fit on.

        Raises:
            ConfigError: too few images for a single one to validate on.
        """
        order = numpy_generator(0, "linear probe's validation split").permutation(len(labels))
        held_out = []
        for label in np.unique(labels):
            members = order[labels[order] == label]
            held_out.append(members[: self.num_held_out(len(members))])
        validation = np.sort(np.concatenate(held_out))
        if len(validation) == 0:
            raise ConfigError(
                f"evaluate.linear.validation_fraction={self.validation_fraction} leaves no image to validate on: the "
                f"{len(labels)} training images have {len(held_out)} classes. Raise it, or raise data.num_images."
            )
        return np.setdiff1d(np.arange(len(labels)), validation), validation

    def fit(
        self,
        train: Float[Tensor, "n d"],
        labels: Int64[Tensor, " n"],
        *,
        num_classes: int,
        split: tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " v"]],
        logistic: LogisticRegression,
    ) -> tuple[LinearClassifier, float]:
        """The classifier fitted to all training images, and the L2 strength that was chosen for it.

        The choice is by validation accuracy, then by validation cross-entropy.

        Args:
            train: standardised features of all training images.
            labels: their classes.
            num_classes: how many classes there are.
            split: from `split`.
            logistic: the solver.
        """
        kept, validation = (torch.from_numpy(rows).to(labels.device) for rows in split)
        axes = PrincipalAxes.of(train[kept])
        fitted: dict[float, LinearClassifier] = {}
        quality: dict[float, tuple[float, float]] = {}
        start = None
        for l2 in self.l2:
            fitted[l2] = start = logistic.fit(axes, labels[kept], num_classes=num_classes, l2=l2, start=start)
            scores = start.scores(train[validation])
            accuracy = (scores.argmax(dim=1) == labels[validation]).float().mean()
            quality[l2] = (accuracy.item(), -F.cross_entropy(scores, labels[validation]).item())
        best = max(self.l2, key=quality.__getitem__)
        axes = PrincipalAxes.of(train)
        return logistic.fit(axes, labels, num_classes=num_classes, l2=best, start=fitted[best]), best
