"""What the framework hands a strategy's server half, and the few steps every server half shares."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from jaxtyping import Float
from torch import Tensor

from fedssl.at_once import at_once
from fedssl.data.images import ImageSet
from fedssl.data.public import PublicSet
from fedssl.data.views import Views
from fedssl.distill import Distillation, distill
from fedssl.ensemble import Target
from fedssl.errors import PayloadError
from fedssl.federation.client import LocalTraining
from fedssl.federation.devices import Devices
from fedssl.federation.embedding import embed
from fedssl.federation.records import Header, Upload, family_arrays, family_state, load_state, model_state, to_arrays
from fedssl.federation.roster import Member, ask_roster
from fedssl.methods import Method
from fedssl.models import Model
from fedssl.seeding import derive_seed, generator, numpy_generator
from fedssl.train import train

log = logging.getLogger(__name__)

NUM_TRIED = 4  # public images that a model has to make finite numbers of


@dataclass(frozen=True, kw_only=True)
class Server:
    """The server's side of a run: its public set, its families, its device.

    Args:
        families: the architectures of the global models: the clients', then those of `federation.server_families`.
        client_families: the clients' alone, each once, in the order of `federation.families`.
        cohort_size: clients per round; None: all that train.
        devices: whether clients can be asked in a round.
        num_trainers: clients that train at all.
        num_trainers_of: the same by family.
        build_model: family -> the run's initial model of that family, the same at every call.
        private_union: the private images of all training clients (simulation only, for `centralized`).
        embedding_dims: d by embedding (`fedssl.federation.embedding`), the largest that is sent.
        secret: as `fedssl.federation.client.Client.secret`.
    """

    seed: int
    num_rounds: int
    cohort_size: int | None
    devices: Devices
    num_trainers: int
    num_trainers_of: Mapping[str, int]
    families: tuple[str, ...]
    client_families: tuple[str, ...]
    report_family: str
    public_set: PublicSet
    views: Views
    method: Method
    local: LocalTraining
    build_model: Callable[[str], Model]
    private_union: Callable[[], ImageSet]
    embedding_dims: Mapping[str, int]
    embed_batch_size: int
    device: torch.device
    secret: Callable[[], torch.Generator] | None = None

    @property
    def trained_families(self) -> tuple[str, ...]:
        """Those of `client_families` that a client trains; the public shard's may be the only one of its family."""
        return tuple(family for family in self.client_families if self.num_trainers_of.get(family))

    def initial_arrays(self) -> ArrayRecord:
        """The run's initial weights of all families."""
        return to_arrays({family: model_state(self.build_model(family)) for family in self.families})

    def load(self, arrays: ArrayRecord, family: str) -> Model:
        """The model of `family` with its weights in `arrays`, on the server's device."""
        return self.model(family, family_state(arrays, family))

    def model(self, family: str, state: Mapping[str, Tensor]) -> Model:
        """The same with its weights by parameter name."""
        model = self.build_model(family)
        load_state(model, state)
        return model.to(self.device)

    def sample_cohort(self, round_num: int, grid: Grid) -> list[Member]:
        """This round's clients, in partition order: `cohort_size` distinct ones among those that train and are there.

        Where fewer are there, all of them; maybe nobody.
        """
        members = [m for m in self.everyone(grid) if self.devices.available(self.seed, round_num, m.partition_id)]
        if self.cohort_size is None or self.cohort_size >= len(members):
            return members
        rng = numpy_generator(self.seed, "cohort", round_num)
        chosen = rng.choice(len(members), size=self.cohort_size, replace=False)
        return [members[position] for position in sorted(chosen)]

    def everyone(self, grid: Grid) -> list[Member]:
        """All clients that train, in partition order."""
        return [member for member in ask_roster(grid).values() if member.trains]

    def messages(
        self,
        round_num: int,
        members: Sequence[Member],
        config: ConfigRecord,
        arrays: ArrayRecord | None,
        *,
        common: ArrayRecord | None = None,
        kind: str = "train",
    ) -> list[Message]:
        """One message a member; members of a family share one content.

        Args:
            arrays: weights of all families, of which each member gets its own; None sends no weights.
            common: arrays that go to everyone instead.
            kind: "train" or "evaluate".
        """
        common = ArrayRecord() if common is None else common
        contents = {
            family: RecordDict(
                {
                    "arrays": common if arrays is None else family_arrays(arrays, family),
                    "config": ConfigRecord(
                        {**config, "server-round": round_num, "public-fingerprint": self.public_set.fingerprint}
                    ),
                }
            )
            for family in dict.fromkeys(member.family for member in members)
        }
        return [Message(contents[member.family], member.node_id, kind) for member in members]

    def check_header(self, upload: Upload, round_num: int, codec: str) -> None:
        """Refuse an upload for another round, of another public set, or in another wire format."""
        fingerprint = self.public_set.fingerprint
        upload.header.check(round_num=round_num, codec=codec, public_fingerprint=fingerprint)

    def try_out(self, family: str, state: Mapping[str, Tensor]) -> None:
        """Raise `PayloadError` unless a network with these weights makes finite numbers of some public images.

        Weights that are finite one by one can overflow together, and so would a mean with them. A small network takes a
        millisecond. In eval mode: what weights do to batch norm in training is not tried.

        Args:
            family: whose weights.
            state: by parameter name, backbone, projector and heads.
        """
        if family not in self._on_trial:
            self._on_trial[family] = self.build_model(family).to(self.device).eval()
        model = self._on_trial[family]
        load_state(model, state)
        with torch.no_grad():
            features = model.backbone(self._some_images)
            projections = model.projector(features)
            for outputs in (features, projections, *(head(projections) for head in model.heads.values())):
                check_finite(outputs)

    @cached_property
    def _on_trial(self) -> dict[str, Model]:
        return {}

    @cached_property
    def _some_images(self) -> Float[Tensor, "b 3 s s"]:
        images = self.public_set.images
        return self.views.plain(images.take(np.arange(min(len(images), NUM_TRIED))).to(self.device))

    def rotation(self, round_num: int) -> torch.Generator:
        """For the rotation of embeddings that go down in this round."""
        return self.secret() if self.secret else generator(self.seed, "downlink rotation", round_num)

    def embed_public(self, model: Model, embedding: str) -> Float[Tensor, "n d"]:
        """As `Client.embed_public`."""
        images = self.public_set.images
        return embed(model, embedding, images, self.views, batch_size=self.embed_batch_size, device=self.device)

    def train(
        self,
        model: Model,
        images: ImageSet,
        *,
        batch_size: int,
        purpose: str,
        round_num: int,
        steps: int | None = None,
        epochs: int | None = None,
        method: Method | None = None,
        memory: dict[str, Tensor] | None = None,
    ) -> dict[str, float]:
        """Self-supervised training on the server with the clients' optimiser settings; see `fedssl.train.train`.

        Args:
            method: instead of the clients'.
            memory: keeps the method's state from round to round.
        """
        return train(
            model,
            images,
            method=self.method if method is None else method,
            memory=memory,
            views=self.views,
            optimisation=self.local.optimisation,
            batch_size=batch_size,
            steps=steps,
            epochs=epochs,
            seed=derive_seed(self.seed, purpose, round_num),
            round_num=round_num,
            num_rounds=self.num_rounds,
            device=self.device,
            amp=self.local.autocast(self.device),
            compile_mode=self.local.compile,
            cuda_graphs=self.local.cuda_graphs,
        )

    def distill_families(
        self,
        start: Callable[[str], tuple[Model, Model | None]],
        target: Target,
        distillation: Distillation,
        *,
        round_num: int,
    ) -> tuple[ArrayRecord, dict[str, float]]:
        """The students of all families learn the clients' ensemble, on the CPU several at once (`fedssl.at_once`).

        Args:
            start: family -> the student where it starts, and its `reference` as in `distill`.

        Returns:
            Their weights, and what `distill` returns as `<family>/<name>`.
        """

        def learn(family: str) -> tuple[dict[str, Tensor], dict[str, float]]:
            student, reference = start(family)
            learned = self.distill(
                student, target, distillation, family=family, round_num=round_num, reference=reference
            )
            return model_state(student), learned

        work = [partial(learn, family) for family in self.families]
        together = self.device.type == "cpu" and self.local.compile is None  # torch compiles in one thread only
        done = dict(zip(self.families, at_once(work) if together else [one() for one in work], strict=True))
        measures = {
            f"{family}/{name}": value for family, (_, learned) in done.items() for name, value in learned.items()
        }
        return to_arrays({family: state for family, (state, _) in done.items()}), measures

    def distill(
        self,
        student: Model,
        target: Target,
        distillation: Distillation,
        *,
        family: str,
        round_num: int,
        reference: Model | None = None,
    ) -> dict[str, float]:
        """`student`, the global model of `family`, learns the clients' ensemble; see `fedssl.distill.distill`."""
        return distill(
            student,
            target,
            self.public_set.images,
            distillation=distillation,
            views=self.views,
            seed=derive_seed(self.seed, f"distillation/{family}", round_num),
            round_num=round_num,
            num_rounds=self.num_rounds,
            device=self.device,
            amp=self.local.autocast(self.device),
            compile_mode=self.local.compile,
            cuda_graphs=self.local.cuda_graphs,
            reference=reference,
        )


def check_finite(outputs: Tensor) -> None:
    """Raise `PayloadError` unless all that a model makes of public images is."""
    if not outputs.isfinite().all():
        raise PayloadError("the model makes NaN or infinity of public images")


def image_passes(num_images: int, batch_size: int, steps: int) -> int:
    """Views that `fedssl.train.train` puts through the network in so many steps: two of each image it takes.

    Not 2 * batch_size * steps: an epoch ends with a smaller batch, or leaves one image out.
    """
    full, rest = divmod(num_images, batch_size)
    rest = rest if rest >= 2 else 0
    epochs, more = divmod(steps, full + (rest > 0))
    return 2 * (epochs * (full * batch_size + rest) + more * batch_size)


Read = TypeVar("Read")


def read_uploads(replies: Iterable[Message], check: Callable[[Message], Read]) -> list[Read]:
    """What `check` makes of the usable replies, in partition order; what it refuses is named and left out.

    Our own loop has refused them before it calls `aggregate_train`; under Flower's `Strategy.start` this is where.
    """
    usable: list[tuple[int, Read]] = []
    for reply in replies:
        try:
            read = check(reply)
        except PayloadError as error:
            log.warning("refused the reply of node %d: %s", reply.metadata.src_node_id, error)
        else:
            header: Mapping[str, object] = reply.content["header"]  # Flower's `config_records` copies all records
            usable.append((Header.from_record(header).partition_id, read))
    return [read for _, read in sorted(usable, key=lambda pair: pair[0])]
