"""Everything that is measured of a model once, when its run is over: what the rounds' probes have no time for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.evaluate.diagnostics import Diagnostics
from fedssl.evaluate.evaluator import Evaluator
from fedssl.evaluate.features import standardise
from fedssl.evaluate.few_labels import LabelShares, share_draws, share_name
from fedssl.evaluate.finetune import FineTuning
from fedssl.evaluate.shards import accuracy_on


@dataclass(frozen=True, kw_only=True)
class Thorough:
    """What `fedssl-evaluate` measures beside the run's probes. The numbers live in conf/evaluation.yaml.

    Args:
        families: architectures; None: all that the run has a model of.
        replay_clients: measure the models that the last round's clients had, too, where they keep none.
        label_shares: linear probes on shares of the labels.
        finetune: fine-tuning on shares of the labels.
        diagnostics: of features, without labels or with them.
    """

    families: Sequence[str] | None
    replay_clients: bool
    label_shares: LabelShares
    finetune: FineTuning
    diagnostics: Diagnostics

    def __post_init__(self) -> None:
        if self.families is not None and not self.families:
            raise ConfigError("evaluate.families is empty: name architectures of the run, or null for all.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Findings:
    """What was found out about one backbone.

    Args:
        metrics: figures by name.
        correct: for `knn_top1` and `linear_top1`, which test images are classified right.
        features: of the diagnosed test images, without augmentation, on the CPU.
    """

    metrics: dict[str, float]
    correct: Mapping[str, Bool[Tensor, " t"]]
    features: Float[Tensor, "m d"]

    def on_shards(self, labels: Int64[Tensor, " t"], counts: Int64[Tensor, " c"]) -> dict[str, float]:
        """`shard_knn_top1` and `shard_linear_top1`: on test images distributed like a client's (`accuracy_on`)."""
        return {f"shard_{name}": accuracy_on(correct, labels, counts) for name, correct in self.correct.items()}


class Examiner:
    """Measures backbones on the images of an `Evaluator`; the same backbone always gets the same figures."""

    def __init__(self, evaluator: Evaluator, thorough: Thorough) -> None:
        self.evaluator, self.thorough = evaluator, thorough
        labels = evaluator.train_labels.cpu().numpy()
        self.draws = {
            kind: {share: share_draws(labels, share, settings.num_draws) for share in settings.shares}
            for kind, settings in (("linear", thorough.label_shares), ("finetune", thorough.finetune))
        }
        self.rows = thorough.diagnostics.rows(len(evaluator.test))
        self.diagnosed = evaluator.test.subset(self.rows)

    def labelled_images(self) -> dict[str, int]:
        """How many images each share of the labels is: {"1pct": 14}."""
        return {share_name(share): rows.shape[1] for draws in self.draws.values() for share, rows in draws.items()}

    def probe(self, backbone: nn.Module) -> Findings:
        """What all labels say: `knn_top1` and `linear_top1`, as in the run."""
        return self._probe(*self.evaluator.features(backbone))

    def _probe(self, train: Float[Tensor, "n d"], test: Float[Tensor, "t d"]) -> Findings:
        predictions = self.evaluator.predictions(train, test)
        return Findings(
            metrics={name: self.evaluator.top1(classes) for name, classes in predictions.items()},
            correct={name: classes == self.evaluator.test_labels for name, classes in predictions.items()},
            features=test[torch.from_numpy(self.rows).to(test.device)].cpu(),
        )

    def frozen(self, backbone: nn.Module) -> Findings:
        """All that needs features alone: the run's probes, and linear probes on shares of the labels."""
        evaluator, evaluation = self.evaluator, self.evaluator.evaluation
        train, test = evaluator.features(backbone)
        found = self._probe(train, test)
        metrics = {**found.metrics, **evaluator.few_labels(train, test)}
        train, test = standardise(train, test)
        for share, draws in self.draws["linear"].items():
            accuracies = self.thorough.label_shares.accuracies(
                train,
                evaluator.train_labels,
                test,
                evaluator.test_labels,
                draws=draws,
                num_classes=evaluator.train.num_classes,
                linear=evaluation.linear,
                few=evaluation.labels,
                logistic=evaluation.logistic,
            )
            metrics |= _mean_and_std(f"linear_{share_name(share)}_top1", accuracies)
        return Findings(metrics=metrics, correct=found.correct, features=found.features)

    def __call__(self, backbone: nn.Module) -> Findings:
        """Everything.

        `knn_top1`, `linear_top1`, `labels<count>_top1` (see `Evaluator`); `linear_<share>_top1`,
        `finetune_<share>_top1`, e.g. `finetune_1pct_top1`, the mean over the draws, and its `_std`; and the
        diagnostics (see `Diagnostics`).

        Args:
            backbone: lives on the evaluator's device. It comes back unchanged.

        Raises:
            FedSSLError: a feature is not finite, or fine-tuning diverged.
        """
        evaluator, thorough = self.evaluator, self.thorough
        found = self.frozen(backbone)
        metrics, batch_size, device = dict(found.metrics), evaluator.evaluation.batch_size, evaluator.device
        for share, draws in self.draws["finetune"].items():
            accuracies = thorough.finetune.accuracies(
                backbone,
                evaluator.train,
                evaluator.test,
                draws=draws,
                views=evaluator.views,
                batch_size=batch_size,
                device=device,
            )
            metrics |= _mean_and_std(f"finetune_{share_name(share)}_top1", accuracies)
        features = found.features.to(device)
        metrics |= thorough.diagnostics(features, backbone, self.diagnosed, evaluator.views, batch_size, device)
        return Findings(metrics=metrics, correct=found.correct, features=found.features)


def _mean_and_std(name: str, accuracies: Float[Tensor, " draws"]) -> dict[str, float]:
    return {name: accuracies.mean().item(), f"{name}_std": accuracies.std().item()}
