"""FLESD: the server learns from the clients' similarity matrices, never from their weights.

Shi et al. 2021, https://arxiv.org/abs/2109.14611. One round:

1. broadcast: each client receives its architecture family's global weights;
2. local training: the client trains on its own images with the run's self-supervised method;
3. upload: it embeds the public set and sends the cosine similarities of all pairs (`codec`);
4. ensemble: the server combines them into one target distribution per public image (`ensemble`);
5. distil: each family's global model, the student, learns to reproduce that target over a momentum queue of its own
   embeddings of public views (`fedssl.distill`).

Departs from the paper: clients may have different architectures, one student per family (the authors' first abstract
and overview figure intend it, their code has one model); a client sends factors that give the same matrix
(`codec=factor`) unless asked for the matrix itself; `ensemble=row` normalises each client's row before the mean, so
that a collapsed client cannot dominate (`ensemble=none` is the paper); the public set is any of conf/public, the same
images in the same deterministic transform for everyone (authors' code: client 0's shard, in a random view).
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedssl.codecs import Codec
from fedssl.distill import Distillation, distill
from fedssl.ensemble import EnsembleTarget, Rule
from fedssl.federation.client import Broadcast, Client
from fedssl.federation.records import Upload, model_state, to_arrays, to_metrics
from fedssl.federation.server import Server, read_uploads
from fedssl.seeding import derive_seed
from fedssl.similarity import FactorSimilarity, Similarity, collapse_measures

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FLESDClient:
    """The client half: train, embed the public set, send similarities."""

    local_epochs: int
    codec: Codec

    def __call__(self, client: Client, broadcast: Broadcast) -> Upload:
        """One round of one client."""
        model = client.load(broadcast)
        metrics = client.train(model, epochs=self.local_epochs)
        embeddings = client.embed_public(model)  # (n, d)
        metrics |= collapse_measures(FactorSimilarity(factors=F.normalize(embeddings, dim=1)))
        arrays = self.codec.encode(embeddings, client.generator("rotation"))
        return client.upload(arrays, metrics, codec=self.codec.name)


class FLESD(Strategy):
    """The server half.

    Args:
        server: what the framework knows: families, public set, views, device.
        codec: the wire format that the clients use.
        ensemble: how similarities become one target.
        distillation: how students learn from it.
        warn_mean_cosine: a client whose public embeddings have a larger mean cosine is named as collapsed.
        warn_effective_rank: so is one whose similarity matrix has a smaller effective rank.
    """

    def __init__(
        self,
        *,
        server: Server,
        codec: Codec,
        ensemble: Rule,
        distillation: Distillation,
        warn_mean_cosine: float,
        warn_effective_rank: float,
    ) -> None:
        self.server = server
        self.codec = codec
        self.ensemble = ensemble
        self.distillation = distillation
        self.warn_mean_cosine = warn_mean_cosine
        self.warn_effective_rank = warn_effective_rank

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Broadcast each family's weights to this round's cohort."""
        self.arrays, self.round_num = arrays, server_round
        cohort = self.server.sample_cohort(server_round, grid)
        return self.server.messages(server_round, cohort, config, arrays)

    def check(self, reply: Message) -> tuple[Upload, Similarity]:
        """Parse and decode an upload; `PayloadError` says why it is refused."""
        upload = Upload.from_message(reply)
        self.server.check_header(upload, self.round_num, self.codec.name)
        return upload, self.codec.decode(upload.arrays, len(self.server.public_set.images))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Ensemble the similarities and distil them into every family's student."""
        received = read_uploads(replies, self.check)
        if not received:
            return None, None
        for upload, similarity in received:
            self._warn_if_collapsed(upload, similarity)
        device = self.server.device
        target = EnsembleTarget(
            [similarity.to(device) for _, similarity in received],
            self.ensemble,
            self.distillation.target_temperature,
        )
        students = {}
        metrics: dict[str, float] = {}
        for family in self.server.families:
            student = self.server.load(self.arrays, family)
            learned = distill(
                student,
                target,
                self.server.public_set.images,
                distillation=self.distillation,
                views=self.server.views,
                seed=derive_seed(self.server.seed, f"distillation/{family}", server_round),
                round_num=server_round,
                num_rounds=self.server.num_rounds,
                device=device,
                amp=self.server.local.amp and device.type == "cuda",
            )
            students[family] = model_state(student)
            metrics |= {f"{family}/{name}": value for name, value in learned.items()}
        return to_arrays(students), to_metrics(metrics)

    def _warn_if_collapsed(self, upload: Upload, similarity: Similarity) -> None:
        measures = collapse_measures(similarity)
        if measures["mean_cosine"] > self.warn_mean_cosine or measures["effective_rank"] < self.warn_effective_rank:
            log.warning(
                "round %d: client %d (%s) has collapsed: mean cosine %.3f, effective rank %.1f on the public set",
                upload.header.round_num,
                upload.header.partition_id,
                upload.header.family,
                measures["mean_cosine"],
                measures["effective_rank"],
            )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing to ask the clients: the server evaluates its students."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing was asked."""
        return None

    def summary(self) -> None:
        """Log what is exchanged and learned."""
        log.info(
            "FLESD: codec %s, ensemble %s, students %s", self.codec, self.ensemble, ", ".join(self.server.families)
        )
