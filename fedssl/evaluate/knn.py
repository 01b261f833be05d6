"""Weighted k-nearest-neighbour classification: how well the geometry of the features agrees with the classes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from fedssl.errors import ConfigError

BLOCK_ENTRIES = 2**26  # of the similarity matrix at a time: 256 MiB


@dataclass(frozen=True, kw_only=True)
class KNN:
    """The k training images of largest cosine similarity s vote for their class with weight exp(s / temperature).

    Wu et al. 2018, section 3.4, https://arxiv.org/abs/1805.01978.

    Args:
        k: neighbours; all training images where there are fewer.
        temperature: > 0.
    """

    k: int
    temperature: float

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"evaluate.knn.k must be at least 1, got {self.k}: so many neighbours vote.")
        if self.temperature <= 0:
            raise ConfigError(f"evaluate.knn.temperature must be above 0, got {self.temperature}; usual is 0.1.")

    def predict(
        self, train: Float[Tensor, "n d"], labels: Int64[Tensor, " n"], test: Float[Tensor, "t d"], num_classes: int
    ) -> Int64[Tensor, " t"]:
        """The class of each test image; of equal votes the lowest class wins.

        Args:
            train: features, need not be normalised.
            labels: classes of the training images, 0..num_classes-1.
            test: features of the images to classify; done in blocks, memory does not grow with t.
            num_classes: how many classes there are.
        """
        train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
        k = min(self.k, len(train))
        predictions = []
        for block in torch.split(test, max(1, BLOCK_ENTRIES // len(train))):
            similarity, neighbours = (block @ train.T).topk(k, dim=1)  # (block, k) each
            weights = ((similarity - 1) / self.temperature).exp()  # a factor exp(-1 / temperature) cannot change a vote
            votes = weights.new_zeros(len(block), num_classes).scatter_add_(1, labels[neighbours], weights)
            predictions.append(votes.argmax(dim=1))
        return torch.cat(predictions)
