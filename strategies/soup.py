"""Model soup: average those clients of a family whose weights do the average good.

Wortsman et al. 2022, Recipe 1, https://arxiv.org/abs/2203.05482. The clients of a family start from one broadcast, as
the paper's models do from one pre-trained network, and send whole models (4P bytes). `recipe=uniform` averages all of
them. `recipe=greedy` sorts them by a score and goes down the list: a model joins the soup where the score of the
average with it is no lower than without.

Departs from the paper: its score is the accuracy on held-out labels; the server here has none, and takes the
instance discrimination accuracy on the public set: the share of images to which one random view of theirs is nearer
than every other image, by cosine of the backbone's features. The views are drawn once a round and are the same
for all candidates. The paper makes one soup, at the end; here each round cooks one and broadcasts it.

What the score cannot see: classes. It rewards telling images apart, also two of one class, and any detail that survives
the views; it knows nothing of images that are unlike the public ones, so a client that alone has seen a class may be
left out for what it does to the others; it is coarse (steps of 1/n) and near 1 lets everybody in; and it is measured
on the images by which it chooses.

Batch norm's running statistics are averaged like weights, as in FedAvg, so that `uniform` is FedAvg with `weighted:
false`, up to rounding. They are not measured again on the public set, which would mix what the soup selects with what a
calibration adds.

The server computes what FedAvg's does not: a greedy soup of m clients takes up to 2m - 1 scores, each two forward
passes of the public set (`score_passes`); `public_only` does not match that. Families without clients have no soup.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from torch import Tensor

from fedssl.errors import ConfigError
from fedssl.federation.per_family import PerFamily
from fedssl.federation.records import Upload
from fedssl.federation.server import Server
from fedssl.federation.weights import mean_weights
from fedssl.models import evaluating
from fedssl.seeding import generator
from fedssl.similarity import instance_discrimination

log = logging.getLogger(__name__)

RECIPES = ("greedy", "uniform")


class Soup(PerFamily):
    """The server half; the client half is FedAvg's.

    Args:
        server: what the framework knows.
        recipe: "greedy" or "uniform".
    """

    def __init__(self, *, server: Server, recipe: str) -> None:
        if recipe not in RECIPES:
            raise ConfigError(f"strategy.server.recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
        super().__init__(server=server)
        self.recipe = recipe

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """One soup a family."""
        self.metrics: dict[str, float] = {}
        self.pairs = self._views_and_images(server_round) if self.recipe == "greedy" else []
        arrays, lost = super().aggregate_train(server_round, replies)
        return arrays, MetricRecord({**self.metrics, **dict(lost or {})})

    def merge(self, family: str, uploads: Sequence[Upload], before: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The mean of the ingredients, all alike."""
        ingredients = list(uploads) if self.recipe == "uniform" else self._greedy(family, uploads)
        self.metrics[f"{family}/num_ingredients"] = float(len(ingredients))
        return average(ingredients)

    def _greedy(self, family: str, uploads: Sequence[Upload]) -> list[Upload]:
        """Recipe 1; equal scores in partition order."""
        alone = [self.score(family, [upload]) for upload in uploads]
        best_first = sorted(range(len(uploads)), key=lambda i: -alone[i])
        taken, best, scores = best_first[:1], max(alone), len(alone)
        for i in best_first[1:]:
            score = self.score(family, [uploads[j] for j in sorted([*taken, i])])
            scores += 1
            if score >= best:
                taken, best = [*taken, i], score
        ingredients = [uploads[j] for j in sorted(taken)]
        log.info("%s: soup of clients %s, score %.3f", family, [u.header.partition_id for u in ingredients], best)
        self.metrics |= {
            f"{family}/score": best,
            f"{family}/score_best_client": max(alone),
            f"{family}/score_worst_client": min(alone),
            f"{family}/score_passes": float(2 * scores * len(self.server.public_set.images)),
        }
        return ingredients

    def score(self, family: str, uploads: Sequence[Upload]) -> float:
        """The label-free score of the uploads' average on this round's views."""
        backbone = self.server.model(family, average(uploads)).backbone
        with torch.no_grad(), evaluating(backbone):
            features = [(backbone(views), backbone(images)) for views, images in self.pairs]
        views, images = (torch.cat(part) for part in zip(*features, strict=True))
        return instance_discrimination(images, views, [1])[0]

    def _views_and_images(self, round_num: int) -> list[tuple[Tensor, Tensor]]:
        """Batches of one random view and the plain transform of each public image."""
        server, images = self.server, self.server.public_set.images
        rng = generator(server.seed, "soup views", round_num, device=server.device)
        batches = torch.split(torch.arange(len(images)), server.embed_batch_size)
        pixels = [images.take(rows).to(server.device) for rows in batches]
        return [(server.views(batch, rng), server.views.plain(batch)) for batch in pixels]


def average(uploads: Sequence[Upload]) -> dict[str, Tensor]:
    """The plain mean of one family's models, by parameter name."""
    return mean_weights([upload.arrays for upload in uploads], [1.0] * len(uploads))
