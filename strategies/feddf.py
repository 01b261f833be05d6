"""FedDF: average the clients of each family, then distil the ensemble of all clients into every average.

Lin et al. 2020, Algorithms 1 and 3, https://arxiv.org/abs/2006.07242. One round:

1. broadcast, local training and upload are FedAvg's: whole models, 4P bytes each way;
2. average: each family's student starts from the mean of its clients' weights;
3. ensemble: every client's model, of whatever family, embeds the public set on the server, and the cosines of these
   embeddings become one target (`ensemble`);
4. distil: each student learns that target from views of the public images (`distill`).

Departs from the paper: it distils the mean of the clients' logits, and self-supervision has no logits. Similarities
take their place, so steps 3 and 4 are FLESD's, with exact similarities instead of encoded ones. How they are ensembled
and learned is the run's choice, as for `strategy=flesd`; the paper's averaged logits with KL are nearest to
`ensemble=row distill.loss=kl`. The paper takes up to 10,000 steps of Adam with a cosine schedule and stops when a
labelled validation set says so; here there are no labels and `distill.*` fixes the steps.

A family without clients (`federation.server_families`) has no average: its student goes on from where it was.

The server computes more than FLESD's: besides the distillation, which `public_only` matches, one forward pass of the
whole public set through every client's model (`teacher_passes`). Sizes that weigh are those that clients declare.
"""

import logging
from collections.abc import Iterable, Sequence

from flwr.app import ArrayRecord, Message, MetricRecord
from jaxtyping import Float
from torch import Tensor

from fedssl.distill import Distillation
from fedssl.ensemble import Rule, check_cohort, make_target
from fedssl.errors import ConfigError, PayloadError
from fedssl.federation.embedding import check_embedding
from fedssl.federation.per_family import Teachers
from fedssl.federation.records import Upload, to_arrays, to_metrics
from fedssl.federation.server import Server, read_uploads
from fedssl.federation.weights import mean_weights
from fedssl.models import Model
from fedssl.similarity import FactorSimilarity, unit_rows

log = logging.getLogger(__name__)


class FedDF(Teachers):
    """The server half; the client half is FedAvg's.

    Args:
        server: what the framework knows.
        weighted: weight a client by its number of images in its family's average; otherwise all count the same.
        embedding: what similarities are made of: "projector" or "backbone".
        ensemble: how similarities become one target.
        distillation: how students learn from it; where they start is said above.

    Raises:
        ConfigError: settings that do not go together.
    """

    def __init__(
        self, *, server: Server, weighted: bool, embedding: str, ensemble: Rule, distillation: Distillation
    ) -> None:
        n = len(server.public_set.images)
        check_embedding(embedding)
        check_cohort(ensemble, server.cohort_size or server.num_trainers)
        distillation.check_target(kernel=ensemble.kernel, num_anchors=n, num_samples=n)
        if distillation.student_init not in ("previous", "fedavg_of_family"):
            raise ConfigError(
                f"strategy=feddf starts every student from its family's mean, got "
                f"distill.student_init={distillation.student_init}: leave it out, or set strategy=flesd."
            )
        super().__init__(server=server)
        self.weighted = weighted
        self.embedding = embedding
        self.ensemble = ensemble
        self.distillation = distillation

    def look(self, model: Model) -> Float[Tensor, "n d"]:
        """The model's embeddings of the whole public set, of length 1."""
        return unit_rows(self.server.embed_public(model, self.embedding))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average each family, and distil the ensemble of all clients into the averages."""
        received = read_uploads(replies, lambda reply: (self.check(reply), self.seen[reply]))
        if not received:
            return self.arrays, None
        uploads = [upload for upload, _ in received]
        target = make_target(
            [FactorSimilarity(factors=embeddings).to(self.server.device) for _, embeddings in received],
            self.ensemble,
            self.distillation.target_temperature,
            [upload.num_images for upload in uploads],
        )
        averages = {family: self._average(family, uploads) for family in self.server.families}

        def start(family: str) -> tuple[Model, None]:
            return self.server.load(averages[family], family), None

        students, metrics = self.server.distill_families(start, target, self.distillation, round_num=server_round)
        return students, to_metrics({"teacher_passes": float(len(uploads) * target.num_samples), **metrics})

    def _average(self, family: str, uploads: Sequence[Upload]) -> ArrayRecord:
        """The mean of the family's clients; where nobody answered, its weights as they were."""
        members = [upload for upload in uploads if upload.header.family == family]
        if not members:
            return self.arrays
        shares = [upload.num_images if self.weighted else 1.0 for upload in members]
        mean = mean_weights([upload.arrays for upload in members], shares)
        try:
            self.check_merged(family, mean)
        except PayloadError as error:
            log.warning("%s starts from its own weights, because no network works with the mean (%s)", family, error)
            return self.arrays
        return to_arrays({family: mean})
