"""What can be said of features without a classifier: how they move with the view, how they spread, what they share.

Everything is computed from L2-normalised features, except linear CKA, which has a scale of its own. As in Shi et al.
2021 (https://arxiv.org/abs/2107.14762), who read such figures to see what small networks fail at, one image has three
features: of the image itself and of two random views of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from fedssl.data.images import ImageSet
from fedssl.data.views import Views
from fedssl.errors import ConfigError
from fedssl.evaluate.features import extract_features
from fedssl.seeding import generator, numpy_generator
from fedssl.similarity import FactorSimilarity, collapse_measures, instance_discrimination, unit_rows


def alignment(first: Float[Tensor, "n d"], second: Float[Tensor, "n d"]) -> float:
    """Mean squared distance of an image's two features: 0 where they agree, 2 where they are unrelated.

    Wang and Isola 2020, Sec. 4.1 with alpha = 2, https://arxiv.org/abs/2005.10242.
    """
    return float((unit_rows(first) - unit_rows(second)).square().sum(dim=1).mean())


def uniformity(features: Float[Tensor, "n d"], t: float = 2.0) -> float:
    """log of the mean of exp(-t |x - y|^2) over all pairs of different images: 0 for a point, lower for more spread.

    Wang and Isola 2020, Sec. 4.1, https://arxiv.org/abs/2005.10242. Shi et al. 2021 average it over three random
    subsets of 128 images; all pairs have the same expectation inside the logarithm and less noise.

    Args:
        features: of n >= 2 images; memory grows with n^2.
        t: > 0.
    """
    return float(torch.pdist(unit_rows(features)).square().mul(-t).exp().mean().log())


def intra_class_alignment(features: Float[Tensor, "n d"], labels: Int64[Tensor, " n"]) -> float:
    """Mean squared distance of two images of one class, averaged over the classes: lower is tighter.

    Shi et al. 2021, https://arxiv.org/abs/2107.14762. A class of one image has no pair and does not count; NaN where
    no class has two.
    """
    z = unit_rows(features).double()
    means = []
    for label in torch.unique(labels):
        members = z[labels == label]
        n = len(members)
        if n > 1:  # sum over i != j of |x_i - x_j|^2 = 2 n sum_i |x_i|^2 - 2 |sum_i x_i|^2
            total = 2 * n * members.square().sum() - 2 * members.sum(dim=0).square().sum()
            means.append(total.item() / (n * (n - 1)))
    return float(np.mean(means)) if means else float("nan")


def entropy_rank(features: Float[Tensor, "n d"]) -> float:
    """exp of the entropy of the singular values, normalised to sum 1: 1 for a line, d for d directions used evenly.

    The effective rank of Roy and Vetterli 2007, Definition 1 (https://ieeexplore.ieee.org/document/7098875). Not the
    `effective_rank` of `fedssl.similarity.collapse_measures`, a participation ratio of the squares, which is never
    larger. 0 for features that are all zero.
    """
    values = torch.linalg.svdvals(unit_rows(features).double())
    if values.sum() == 0:
        return 0.0
    p = values / values.sum()
    return float(torch.special.entr(p).sum().exp())


def linear_cka(x: Float[Tensor, "n d1"], y: Float[Tensor, "n d2"]) -> float:
    """|Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F) of centred features: 1 for equal up to rotation and scale, 0 for unrelated.

    Kornblith et al. 2019, Sec. 3, https://arxiv.org/abs/1905.00414. It is biased upwards: of n images, independent
    features of d dimensions reach about d / (n + d), so compare it with that of an untrained network.
    NaN where features are the same for all images.

    Args:
        x: row i of both is of the same image; neither is normalised first.
        y: of another network, perhaps of another width.
    """
    x, y = ((features.double() - features.double().mean(dim=0)) for features in (x, y))
    norms = [torch.linalg.matrix_norm(f.T @ f) for f in (x, y)]
    return float(torch.linalg.matrix_norm(y.T @ x).square() / (norms[0] * norms[1]))


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """Which images are looked at, and how. The numbers live in conf/evaluation.yaml.

    Args:
        num_images: test images, a fixed draw of them; all where there are fewer.
        ranks: the k of instance discrimination.
    """

    num_images: int
    ranks: Sequence[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple(self.ranks))
        if self.num_images < 2:
            raise ConfigError(f"evaluate.diagnostics.num_images must be at least 2, got {self.num_images}.")
        if min(self.ranks, default=1) < 1:
            raise ConfigError(f"evaluate.diagnostics.ranks must be numbers of 1 or more, got {list(self.ranks)}.")

    def rows(self, num_images: int) -> Int64[np.ndarray, " m"]:
        """Which of `num_images` are looked at, ascending; the same in every run."""
        return np.sort(numpy_generator(0, "diagnosed images").permutation(num_images)[: self.num_images])

    def __call__(
        self,
        features: Float[Tensor, "n d"],
        backbone: nn.Module,
        images: ImageSet,
        views: Views,
        batch_size: int,
        device: torch.device,
    ) -> dict[str, float]:
        """All figures of one backbone, by name.

        `alignment` of two views and `alignment_plain` of the image and a view; `intra_class_alignment`; `uniformity`;
        `effective_rank` and `mean_cosine` (`collapse_measures`); `entropy_rank`; `instance_acc<k>`, of the image and a
        view.

        Args:
            features: of `images`, without augmentation, on `device`.
            backbone: lives on `device`.
            images: labelled; the chosen ones.
            views: two random views of each image come from fixed draws, so all runs with these views see the same.
            batch_size: images per forward pass.
            device: where the backbone computes.
        """
        assert images.labels is not None
        first, second = (
            extract_features(
                backbone, images, views, batch_size, device, generator(0, f"diagnosed views, {i}", device=device)
            ).to(device)
            for i in (1, 2)
        )
        found = instance_discrimination(features, first, self.ranks)
        return {
            "alignment": alignment(first, second),
            "alignment_plain": alignment(features, first),
            "intra_class_alignment": intra_class_alignment(features, torch.from_numpy(images.labels).to(device)),
            "uniformity": uniformity(features),
            "entropy_rank": entropy_rank(features),
            **collapse_measures(FactorSimilarity(factors=unit_rows(features))),
            **{f"instance_acc{k}": accuracy for k, accuracy in zip(self.ranks, found, strict=True)},
        }
