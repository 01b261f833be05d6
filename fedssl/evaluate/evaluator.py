"""All probes of one backbone, and their configuration."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from fedssl.data.images import ImageSet
from fedssl.data.views import Views
from fedssl.errors import ConfigError, FedSSLError
from fedssl.evaluate.features import extract_features, standardise
from fedssl.evaluate.few_labels import FewLabels
from fedssl.evaluate.knn import KNN
from fedssl.evaluate.linear import LinearProbe
from fedssl.evaluate.logistic import LogisticRegression


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How representations are probed. The numbers live in conf/evaluate/.

    Args:
        every: rounds between two evaluations.
        data: the labelled data's name in conf/data; None: the private data's own splits.
        root: where `data` lies; None: as its YAML says.
        raw_pixels: also probe the pixels themselves, once, before the first round.
        batch_size: images per forward pass.
        knn: kNN on the features as they are.
        linear: the linear probe.
        labels: a few labels per class.
        logistic: the solver of `linear` and `labels`.
        source: what `data` names; `fedssl.config` puts it in.
    """

    every: int
    data: str | None
    root: str | None
    raw_pixels: bool
    batch_size: int
    knn: KNN
    linear: LinearProbe
    labels: FewLabels
    logistic: LogisticRegression
    source: object = None

    def __post_init__(self) -> None:
        for name in ("every", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"evaluate.{name} must be at least 1, got {getattr(self, name)}.")
        if self.root is not None and self.data is None:
            raise ConfigError(
                f"evaluate.root={self.root} has no effect without evaluate.data: name the data set that lies there, "
                f"e.g. evaluate.data=cifar10, or set data.root for the private data."
            )


class Evaluator:
    """Probes backbones on one pair of labelled image sets; the same backbone always gets the same metrics.

    Construction draws the validation split and the few-label draws, and copies no image.

    Args:
        train: labelled images that the probes learn from.
        test: labelled images that are scored; the classes are those of `train`.
        evaluation: which probes, with which numbers.
        views: only the deterministic transform is used.
        device: where features and probes are computed.

    Raises:
        ConfigError: no labels, other classes in test than in train, or too few images to hold some out.
    """

    def __init__(
        self, *, train: ImageSet, test: ImageSet, evaluation: Evaluation, views: Views, device: torch.device
    ) -> None:
        for images in (train, test):
            if images.labels is None:
                raise ConfigError(
                    f"the probes need labels and {images.name} has none. Set evaluate.data to a labelled data set, "
                    f"e.g. evaluate.data=cifar10; the private images may stay unlabelled."
                )
        assert train.labels is not None
        assert test.labels is not None
        if train.classes != test.classes:
            raise ConfigError(
                f"the probes learn the classes of {train.name}, {_some(train.classes)}, and cannot be scored on those "
                f"of {test.name}, {_some(test.classes)}. Set evaluate.data to a data set whose splits share them."
            )
        self.train, self.test, self.evaluation, self.views, self.device = train, test, evaluation, views, device
        self.train_labels = torch.as_tensor(train.labels, device=device)
        self.test_labels = torch.as_tensor(test.labels, device=device)
        self.split = evaluation.linear.split(train.labels)
        self.draws = {count: evaluation.labels.draw(train.labels, count) for count in evaluation.labels.per_class}

    def __call__(self, backbone: nn.Module) -> dict[str, float]:
        """Top-1 accuracies on the test images, as fractions, by name.

        `knn_top1`, `linear_top1`, and for each number of labels per class, e.g. 5, the mean `labels5_top1` and the
        sample standard deviation `labels5_top1_std` over the draws.

        Args:
            backbone: (b, 3, h, w) to (b, d); lives on the evaluator's device. It comes back unchanged.

        Raises:
            FedSSLError: a feature is not finite.
        """
        train, test = self.features(backbone)
        accuracies = {name: self.top1(classes) for name, classes in self.predictions(train, test).items()}
        return {**accuracies, **self.few_labels(train, test)}

    def raw_pixels(self) -> dict[str, float]:
        """The same probes on the pixels themselves: what a representation has to beat."""
        return self(nn.Flatten())

    def features(self, backbone: nn.Module) -> tuple[Float[Tensor, "n d"], Float[Tensor, "t d"]]:
        """Of the training and the test images, on the evaluator's device, not yet standardised.

        Raises:
            FedSSLError: one is not finite.
        """
        train, test = (
            extract_features(backbone, images, self.views, self.evaluation.batch_size, self.device).to(self.device)
            for images in (self.train, self.test)
        )
        for images, features in ((self.train, train), (self.test, test)):
            if not features.isfinite().all():
                raise FedSSLError(
                    f"the backbone's features of {images.name} contain NaN or infinity: its weights are of no use. "
                    f"Lower the learning rate it was trained with."
                )
        return train, test

    def predictions(self, train: Float[Tensor, "n d"], test: Float[Tensor, "t d"]) -> dict[str, Int64[Tensor, " t"]]:
        """The class of each test image by the classifiers that see all labels: `knn_top1`, `linear_top1`."""
        nearest = self.evaluation.knn.predict(train, self.train_labels, test, self.train.num_classes)
        return {"knn_top1": nearest, "linear_top1": self._linear(train, test)}

    def linear_top1(self, backbone: nn.Module) -> float:
        """The linear probe alone: kNN and the draws of few labels take time, too."""
        return self.top1(self._linear(*self.features(backbone)))

    def _linear(self, train: Float[Tensor, "n d"], test: Float[Tensor, "t d"]) -> Int64[Tensor, " t"]:
        """The class of each test image by the linear probe."""
        train, test = standardise(train, test)
        classifier, _ = self.evaluation.linear.fit(
            train,
            self.train_labels,
            num_classes=self.train.num_classes,
            split=self.split,
            logistic=self.evaluation.logistic,
        )
        return classifier.predict(test)

    def few_labels(self, train: Float[Tensor, "n d"], test: Float[Tensor, "t d"]) -> dict[str, float]:
        """`labels<count>_top1` and its `_std` over the draws, for each number of labels per class."""
        train, test = standardise(train, test)
        metrics = {}
        for count, draws in self.draws.items():
            accuracies = self.evaluation.labels.accuracies(
                train,
                self.train_labels,
                test,
                self.test_labels,
                draws=draws,
                num_classes=self.train.num_classes,
                logistic=self.evaluation.logistic,
            )
            metrics[f"labels{count}_top1"] = accuracies.mean().item()
            metrics[f"labels{count}_top1_std"] = accuracies.std().item()
        return metrics

    def top1(self, predictions: Int64[Tensor, " t"]) -> float:
        """Fraction of test images whose class is right."""
        return (predictions == self.test_labels).float().mean().item()


def _some(classes: tuple[str, ...]) -> str:
    """A few class names, for messages."""
    return f"{', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''} ({len(classes)})"
