"""Fine-tuning: how well the whole network classifies after supervised training on a share of the labels.

A linear classifier that starts at zero (as in https://arxiv.org/abs/2010.11929, Sec. 3.2) stands on a copy of the
backbone, and both are trained. Nothing is chosen: no validation split, no early stop; the rate falls along a cosine
and the last step's network is scored, once. Images are shifted by a few pixels, and mirrored where the run's views
mirror: the mild views of supervised training (https://arxiv.org/abs/2002.05709, App. B.5), not the strong ones of
self-supervised, which change colours that classes may depend on.

FedEMA's code (Zhuang et al. 2022, https://arxiv.org/abs/2204.04385) fine-tunes with Adam at 1e-3, as we do, for 100
epochs in batches of 128. We take 40 in batches of 32, and 100 steps at least: on the digits, 10 % of the labels, no
less accurate in half the time, from pre-trained weights and from random ones.

The same network untrained, fine-tuned alike, is supervised training from scratch: what pre-training has to beat.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor, nn

from fedssl.data.images import ImageSet
from fedssl.data.views import Normalisation, ShiftViews, Views
from fedssl.errors import ConfigError, FedSSLError
from fedssl.evaluate.features import extract_features
from fedssl.evaluate.few_labels import check_shares
from fedssl.models import calibrate_batch_norm, feature_dim
from fedssl.seeding import generator, seeded_init
from fedssl.train import Optimisation


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Supervised training of a backbone and a classifier. The numbers live in conf/evaluation.yaml.

    Args:
        shares: of the training labels, as for `LabelShares`; 1 is all of them.
        num_draws: >= 2, of the labelled images: the first of those that the linear probe is fitted to.
        epochs: passes over the labelled images,
        min_steps: or more of them, until there are so many steps.
        batch_size: images per step.
        shift: see `ShiftViews`.
        optimisation: of one training.
    """

    shares: Sequence[float]
    num_draws: int
    epochs: int
    min_steps: int
    batch_size: int
    shift: float
    optimisation: Optimisation

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", tuple(self.shares))
        check_shares("finetune", self.shares, self.num_draws)
        if self.epochs < 1 or self.min_steps < 0 or self.batch_size < 2:
            raise ConfigError(
                f"evaluate.finetune.epochs must be at least 1, .min_steps at least 0 and .batch_size at least 2 (batch "
                f"norm compares images), got {self.epochs}, {self.min_steps} and {self.batch_size}."
            )
        if not 0 <= self.shift <= 0.5:
            raise ConfigError(f"evaluate.finetune.shift must be between 0 and 0.5 of the side, got {self.shift}.")
        if self.optimisation.depends_on_num_rounds:
            raise ConfigError(
                f"evaluate.finetune.optimisation.schedule must be constant or cosine, got "
                f"{self.optimisation.schedule!r}: fine-tuning has no rounds."
            )

    def augmentation(self, views: Views) -> Views:
        """The mild views, with the normalisation of the run's; views of a user's own without one: those themselves."""
        if not isinstance(views, Normalisation):
            return views
        flip = float(getattr(views, "flip_probability", 0.0))
        return ShiftViews(mean=views.mean, std=views.std, shift=self.shift, flip_probability=flip)

    def fit(
        self, backbone: nn.Module, images: ImageSet, *, num_classes: int, views: Views, seed: int, device: torch.device
    ) -> nn.Module:
        """A trained classifier, (b, 3, h, w) to (b, num_classes) logits, on `device` and in eval mode.

        Args:
            backbone: where training starts; a copy is trained.
            images: labelled, two or more; a last batch of a single image is left out.
            num_classes: how many classes there are.
            views: the run's, see `augmentation`.
            seed: of order, views and dropout; on one device the result depends on nothing else.
            device: where it computes.

        Raises:
            ConfigError: fewer than two images.
            FedSSLError: the loss became infinite or NaN.
        """
        assert images.labels is not None
        if len(images) < 2:
            raise ConfigError(
                f"one labelled image of {images.name} is too little to fine-tune on: raise evaluate.finetune.shares."
            )
        backbone = copy.deepcopy(backbone).to(device)
        dim = feature_dim(backbone, images.image_size[0])
        head = nn.utils.skip_init(nn.Linear, dim, num_classes, device=device)  # type: ignore[no-untyped-call]  # draws nothing
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        network = nn.Sequential(backbone, head).train()
        network.requires_grad_(True)
        pixels, labels = images.take(np.arange(len(images))).to(device), torch.from_numpy(images.labels).to(device)
        batches = [len(rows) for rows in torch.split(torch.arange(len(images)), self.batch_size) if len(rows) > 1]
        epochs = max(self.epochs, math.ceil(self.min_steps / len(batches)))
        optimiser, schedule = self.optimisation.build(
            network.parameters(), total_steps=epochs * len(batches), round_num=1, num_rounds=1
        )
        augment = self.augmentation(views)
        order_rng, views_rng = generator(seed, "fine-tuning order"), generator(seed, "fine-tuning views", device=device)
        with seeded_init(seed, "fine-tuning dropout"):
            calibrate_batch_norm(backbone, views.plain(pixels[: self.batch_size]))
            for _ in range(epochs):
                order = torch.randperm(len(pixels), generator=order_rng).to(device)
                for rows in torch.split(order[: sum(batches)], batches):
                    x = augment(pixels[rows], views_rng).contiguous(memory_format=torch.channels_last)
                    loss = F.cross_entropy(network(x), labels[rows])
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
                    optimiser.zero_grad()
                    schedule.step()
        if not loss.isfinite():
            raise FedSSLError(
                f"the loss of fine-tuning on {images.name} became {loss.item()}: lower "
                f"evaluate.finetune.optimisation.lr={self.optimisation.lr}, or raise its warmup_steps."
            )
        return network.eval()

    def accuracies(
        self,
        backbone: nn.Module,
        train: ImageSet,
        test: ImageSet,
        *,
        draws: Int64[np.ndarray, "draws m"],
        views: Views,
        batch_size: int,
        device: torch.device,
    ) -> Tensor:
        """(draws,) top-1 accuracies on the test images, one training for each draw; draw i trains with seed i.

        Args:
            backbone: comes back unchanged.
            train: labelled; only the images of `draws` are looked at.
            test: labelled, of the same classes.
            draws: from `share_draws`.
            views: the run's.
            batch_size: images per forward pass of the test.
            device: where it computes.
        """
        assert test.labels is not None
        truth = torch.from_numpy(test.labels)
        accuracies = []
        for seed, rows in enumerate(draws):
            network = self.fit(
                backbone, train.subset(rows), num_classes=train.num_classes, views=views, seed=seed, device=device
            )
            scores = extract_features(network, test, views, batch_size, device)
            accuracies.append((scores.argmax(dim=1) == truth).float().mean())
        return torch.stack(accuracies)
