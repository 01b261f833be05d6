"""FLESD: the server learns from the clients' similarity matrices, never from their weights.

Shi et al. 2021, https://arxiv.org/abs/2109.14611. One round:

1. broadcast: each client receives its architecture family's global weights (`downlink=weights`);
2. local training: the client trains on its own images with its self-supervised method;
3. upload: it embeds the public set and sends the cosine similarities of all pairs (`codec`);
4. ensemble: the server combines them into one target (`ensemble`);
5. distil: each family's global model, the student, learns to reproduce that target from views of the public images
   (`distill`).

The paper's target is a distribution over anchors for each image, learned over a momentum queue of the student's own
embeddings (`ensemble=none`). The default is ours: the mean of the clients' centred kernels, turned into one point per
public image that the student learns by regression (`ensemble=cka_kernel`, `embedding=backbone`,
`distill.loss=coordinates`); benchmarks/flesd_study.md compares them.

Departs from the paper: clients may have different architectures, one student per family (the authors' first abstract
and overview figure intend it, their code has one model); a client sends factors that give the same matrix
(`codec=factor`) unless asked for the matrix itself; `ensemble=row` normalises each client's row before the mean, so
that a collapsed client cannot dominate; the public set is any of conf/public, the same images in the same
deterministic transform for everyone (authors' code: client 0's shard, in a random view).

Ours, not the paper's: `downlink=similarity|none`, clients that keep their own model from round to round. With
`similarity` the report family's student comes down as its similarities of the public set, in the same wire format as
an upload, and the client distils them before it trains: the server's step with the roles swapped. The paper's ensemble
itself would be n x n; the student is what has learned it. And `distill.student_init`: where a student starts.
`experiment=flesd_faithful` turns every such switch to the authors' released code.
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedssl.codecs import Codec, Sharpened, num_anchors
from fedssl.distill import Distillation
from fedssl.ensemble import Rule, Target, check_cohort, make_target
from fedssl.errors import ConfigError, PayloadError
from fedssl.federation.arrays import read_array, to_record
from fedssl.federation.client import DOWNLINKS, Broadcast, Client
from fedssl.federation.embedding import check_embedding
from fedssl.federation.global_models import GlobalModels
from fedssl.federation.records import Upload, family_arrays, model_state, to_arrays, to_metrics
from fedssl.federation.server import Server, read_uploads
from fedssl.federation.weights import check_weights, mean_weights
from fedssl.models import Model
from fedssl.similarity import AnchorMass, Similarity, collapse_measures

log = logging.getLogger(__name__)

Received = tuple[Upload, Similarity | AnchorMass]  # an upload and what its codec makes of it


@dataclass(frozen=True, kw_only=True)
class FLESDClient:
    """The client half: train, embed the public set, send similarities."""

    local_epochs: int
    codec: Codec
    embedding: str  # what similarities are made of: projector | backbone
    downlink: str  # what came down: weights | similarity | none; without weights the client keeps its model
    ensemble: Rule  # of the one similarity that comes down
    distillation: Distillation
    probe: bool  # also send the linear accuracy of its model (simulation only)

    def __post_init__(self) -> None:
        if self.downlink not in DOWNLINKS:
            raise ConfigError(f"downlink must be one of {', '.join(DOWNLINKS)}, got {self.downlink!r}")

    def __call__(self, client: Client, broadcast: Broadcast) -> Upload:
        """One round of one client."""
        learned: dict[str, float] = {}
        if self.downlink == "weights":
            model = client.load(broadcast)
        else:
            model = client.remembered(client.family)
            if broadcast.arrays:
                learned = client.distill(model, self._target(client, broadcast), self.distillation)
        metrics = client.train(model, epochs=self.local_epochs)
        if self.downlink != "weights":
            client.remember(model, client.family)
        arrays, measures = client.similarities(model, embedding=self.embedding, codec=self.codec)
        metrics |= measures | {f"distill_{name}": value for name, value in learned.items()}
        if self.probe:
            metrics["linear_top1"] = client.linear_top1(model)
        if self.distillation.student_init == "fedavg_of_family":
            arrays |= client.weights(model)
        return client.upload(arrays, metrics, codec=self.codec.name)

    def _target(self, client: Client, broadcast: Broadcast) -> Target:
        arrays = {name: read_array(name, array) for name, array in broadcast.arrays.items()}
        content = self.codec.decode(arrays, len(client.public_set.images)).to(client.device)
        return make_target([content], self.ensemble, self.distillation.target_temperature, [1.0])


class FLESD(GlobalModels):
    """The server half.

    Args:
        server: what the framework knows: families, public set, views, device.
        codec: the wire format that the clients use.
        embedding: what similarities are made of: "projector" or "backbone".
        ensemble: how similarities become one target.
        distillation: how students learn from it.
        downlink: what clients receive.
        teachers: "all", or "best": of the uploads with `linear_top1` the highest alone (strategy=best_client).
        warn_mean_cosine: a client whose public embeddings have a larger mean cosine is named as collapsed.
        warn_effective_rank: so is one whose similarity matrix has a smaller effective rank.

    Raises:
        ConfigError: an upload would be larger than `codec.max_bytes`, or settings that do not go together.
    """

    def __init__(
        self,
        *,
        server: Server,
        codec: Codec,
        embedding: str,
        ensemble: Rule,
        distillation: Distillation,
        downlink: str,
        teachers: str,
        warn_mean_cosine: float,
        warn_effective_rank: float,
    ) -> None:
        n = len(server.public_set.images)
        check_embedding(embedding)
        codec.check_size(n, server.embedding_dims[embedding])
        check_cohort(ensemble, server.cohort_size or server.num_trainers)
        distillation.check_target(kernel=ensemble.kernel, num_anchors=num_anchors(codec, n), num_samples=n)
        if isinstance(codec, Sharpened) and (codec.temperature, codec.rule) != (
            distillation.target_temperature,
            ensemble,
        ):
            raise ConfigError(
                f"codec=sharpened: clients would apply {codec.rule} at codec.temperature={codec.temperature}, and "
                f"the server has {ensemble} at distill.target_temperature={distillation.target_temperature}: set "
                f"ensemble and distill.target_temperature alone, which conf/codec/sharpened.yaml hands on."
            )
        if isinstance(codec, Sharpened) and distillation.target_temperature_end is not None:
            raise ConfigError(
                "codec=sharpened: the clients sharpen at distill.target_temperature, which the server cannot change "
                "afterwards: set distill.target_temperature_end to null, or choose another codec."
            )
        if (downlink, distillation.loss, embedding, distillation.contrastive_weight) == (
            "similarity",
            "coordinates",
            "projector",
            0,
        ):
            raise ConfigError(
                "distill.loss=coordinates teaches the student's backbone, so under downlink=similarity its projector "
                "would have nothing to say: set embedding=backbone, or a distill.contrastive_weight above 0."
            )
        if teachers not in ("all", "best"):
            raise ConfigError(f"teachers must be all or best, got {teachers!r}")
        if teachers == "best" and distillation.student_init == "fedavg_of_family":
            raise ConfigError(
                "distill.student_init=fedavg_of_family is a mean over clients, and strategy=best_client has one: "
                "choose another student_init."
            )
        self.server = server
        self.codec = codec
        self.embedding = embedding
        self.ensemble = ensemble
        self.distillation = distillation
        self.downlink = downlink
        self.teachers = teachers
        self.warn_mean_cosine = warn_mean_cosine
        self.warn_effective_rank = warn_effective_rank
        self.decoded: WeakKeyDictionary[Message, Received] = WeakKeyDictionary()

    # --- broadcast ---
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Broadcast each family's weights, or the student's similarities, or nothing to this round's cohort."""
        if server_round == 1 and self.distillation.student_init == "public_only":
            arrays = self._pretrained(arrays)
        self.arrays, self.round_num = arrays, server_round
        cohort = self.server.sample_cohort(server_round, grid)
        self.num_images = {member.partition_id: member.num_images for member in cohort}  # not what an upload claims
        if self.downlink == "weights":
            return self.server.messages(server_round, cohort, config, arrays)
        common = self._student_similarity() if self.downlink == "similarity" and server_round > 1 else ArrayRecord()
        return self.server.messages(server_round, cohort, config, None, common=common)

    def _pretrained(self, arrays: ArrayRecord) -> ArrayRecord:
        """The students after `distill.init_epochs` of the run's method on the public set.

        Under `downlink=weights` that is what clients start from, too.
        """
        n = len(self.server.public_set.images)
        states = {}
        for family in self.server.families:
            model = self.server.load(arrays, family)
            self.server.train(
                model,
                self.server.public_set.images,
                steps=self.distillation.pretraining_steps(n),
                batch_size=min(self.distillation.batch_size, n),
                purpose=f"pre-training/{family}",
                round_num=1,
            )
            states[family] = model_state(model)
        return to_arrays(states)

    def _student_similarity(self) -> ArrayRecord:
        """What the report family's student has learned, encoded like an upload."""
        student = self.server.load(self.arrays, self.server.report_family)
        embeddings = self.server.embed_public(student, self.embedding)
        return to_record(self.codec.encode(embeddings, self.server.rotation(self.round_num)))

    # --- gather ---
    def check(self, reply: Message) -> Received:
        """Parse and decode an upload, once; `PayloadError` says why it is refused."""
        if reply not in self.decoded:
            upload = Upload.from_message(reply)
            self.server.check_header(upload, self.round_num, self.codec.name)
            if upload.header.partition_id not in self.num_images:
                raise PayloadError(f"partition {upload.header.partition_id} was not asked in this round")
            _ = upload.num_images  # refused unless it can be a weight
            if self.teachers == "best" and not 0 <= (accuracy := upload.metrics.get("linear_top1", math.nan)) <= 1:
                raise PayloadError(f"it declares linear_top1={accuracy}, by which the best client is chosen")
            payload, family = upload.arrays, upload.header.family
            if self.distillation.student_init == "fedavg_of_family":
                weights = family_weights(upload)
                check_weights(weights, family_arrays(self.arrays, family), family)
                self.server.try_out(family, {k.split("/", 1)[1]: torch.tensor(v) for k, v in weights.items()})
                payload = {name: value for name, value in payload.items() if name not in weights}
            content = self.codec.decode(payload, len(self.server.public_set.images))
            self.decoded[reply] = upload, content
        return self.decoded[reply]

    # --- ensemble and distil ---
    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Ensemble the similarities and distil them into every family's student."""
        received = read_uploads(replies, self.check)
        for upload, content in received:
            self._warn_if_collapsed(upload, content)
        if not received:
            return self.arrays, None
        if self.teachers == "best":
            received = [max(received, key=lambda pair: pair[0].metrics["linear_top1"])]
        device = self.server.device
        target = make_target(
            [content.to(device) for _, content in received],
            self.ensemble,
            self.distillation.target_temperature,
            [self.num_images[upload.header.partition_id] for upload, _ in received],
        )
        distillation = self.distillation
        if server_round == 1 and distillation.student_init != "public_only":
            distillation = replace(distillation, feature_weight=0.0)  # nothing is learned yet that could be forgotten
        start = partial(self._student, uploads=[upload for upload, _ in received])
        students, metrics = self.server.distill_families(start, target, distillation, round_num=server_round)
        return students, to_metrics(metrics)

    def _student(self, family: str, uploads: list[Upload]) -> tuple[Model, Model]:
        """The student where `distill.student_init` lets it start, and as the last round left it."""
        before = self.server.load(self.arrays, family)
        student = self.server.load(self.arrays, family)  # previous, and public_only after the first round's training
        members = [upload for upload in uploads if upload.header.family == family]
        if self.distillation.student_init == "scratch":
            student = self.server.build_model(family).to(self.server.device)
        elif self.distillation.student_init == "fedavg_of_family" and members:
            states = [family_weights(upload) for upload in members]
            shares = [self.num_images[upload.header.partition_id] for upload in members]
            student = self.server.load(to_arrays({family: mean_weights(states, shares)}), family)
        return student, before

    def _warn_if_collapsed(self, upload: Upload, content: Similarity | AnchorMass) -> None:
        # Masses over anchors do not tell cosines back: there the client's own word has to do.
        measures = upload.metrics if isinstance(content, AnchorMass) else collapse_measures(content)
        mean_cosine, effective_rank = measures.get("mean_cosine", 0.0), measures.get("effective_rank", math.inf)
        if mean_cosine > self.warn_mean_cosine or effective_rank < self.warn_effective_rank:
            log.warning(
                "round %d: client %d (%s) has collapsed: mean cosine %.3f, effective rank %.1f on the public set",
                upload.header.round_num,
                upload.header.partition_id,
                upload.header.family,
                mean_cosine,
                effective_rank,
            )

    def summary(self) -> None:
        """Log what is exchanged and learned."""
        log.info(
            "FLESD: codec %s, ensemble %s, students %s", self.codec, self.ensemble, ", ".join(self.server.families)
        )


def family_weights(upload: Upload) -> dict[str, np.ndarray]:
    """The client's weights, by `<family>/<parameter>`; empty where it sent none."""
    prefix = f"{upload.header.family}/"
    return {name: value for name, value in upload.arrays.items() if name.startswith(prefix)}
