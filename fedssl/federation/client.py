"""What a strategy's client half may touch, and what it is handed and returns."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from flwr.app import ArrayRecord
from jaxtyping import Float
from torch import Tensor

from fedssl.codecs import Codec
from fedssl.data.images import ImageSet
from fedssl.data.public import PublicSet
from fedssl.data.views import Views
from fedssl.distill import Distillation, distill
from fedssl.ensemble import Target
from fedssl.errors import ConfigError, DataError
from fedssl.evaluate import Evaluator
from fedssl.federation.embedding import embed
from fedssl.federation.records import Header, Upload, family_values, load_state, model_state
from fedssl.methods import Method
from fedssl.models import Model, calibrate_batch_norm
from fedssl.models.compiled import check_mode
from fedssl.seeding import derive_seed, generator
from fedssl.similarity import FactorSimilarity, collapse_measures, unit_rows
from fedssl.train import Optimisation, Penalty, train

DOWNLINKS = ("weights", "similarity", "none")  # what clients receive
MODELS = "models/"  # of a client's own models in its memory; `method/` is what methods keep


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """How a client trains. The numbers live in conf/client/."""

    methods: Sequence[Method] | None  # partition p trains with methods[p % len]; None: all with the run's method
    local_epochs: int
    batch_size: int
    threads: int  # torch threads of a client on the CPU; part of the result
    amp: bool  # bfloat16 autocast on a GPU
    cpu_amp: bool  # the same on the CPU
    compile: str | None  # backbones in training and distillation, see `fedssl.models.compiled`; None: not at all
    cuda_graphs: bool  # replay recorded steps of both on a GPU, see `fedssl.cuda_graph`
    optimisation: Optimisation

    def __post_init__(self) -> None:
        check_mode(self.compile)
        if self.local_epochs < 1 or self.batch_size < 2 or self.threads < 1:
            raise ConfigError(
                "client.local_epochs and client.threads must be at least 1 and client.batch_size at least 2 "
                f"(a contrastive loss compares images), got {self.local_epochs}, {self.threads}, {self.batch_size}"
            )

    def autocast(self, device: torch.device) -> bool:
        """Whether networks compute in bfloat16 there, in training and distillation; probes never do."""
        return self.amp if device.type == "cuda" else self.cpu_amp and device.type == "cpu"


@dataclass(frozen=True, kw_only=True)
class Broadcast:
    """What the server sent: the round, the weights of the client's family if there are any, and what else it tells."""

    round_num: int
    num_rounds: int
    family: str
    arrays: ArrayRecord
    config: Mapping[str, object] = field(default_factory=dict)


@dataclass(kw_only=True)
class Client:
    """One client in one round: its data, its model builder, its memory between rounds, its device.

    Everything a client half does goes through here, and every draw comes from (seed, purpose, round, partition): the
    task is a pure function and can run again anywhere.

    Args:
        memory: tensors this client kept after the last round it took part in; what is in it when the client half
            returns is kept for the next.
        phase: what it is doing, for the message of a failure.
        trained: the model that `train` last trained of each family, for a replay to look at.
        secret: a generator that nobody can foresee, for what hides something of this client; None in a simulation,
            which must be repeatable.
    """

    partition_id: int
    family: str
    report_family: str
    round_num: int
    num_rounds: int
    seed: int
    private_set: ImageSet
    public_set: PublicSet
    views: Views
    method: Method
    local: LocalTraining
    build_model: Callable[[str], Model]  # family -> the run's initial model of that family
    build_untrained: Callable[[str, int], Model]  # (family, partition) -> an initialisation of the client's own
    evaluator: Callable[[], Evaluator]  # the run's labelled test, for clients whose model never leaves them
    device: torch.device
    embed_batch_size: int
    secret: Callable[[], torch.Generator] | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    phase: str = "the strategy's client half"
    trained: dict[str, Model] = field(default_factory=dict, init=False)

    @contextmanager
    def doing(self, phase: str) -> Iterator[None]:
        """Name what happens inside; after a failure `phase` still holds it."""
        before, self.phase = self.phase, phase
        yield
        self.phase = before

    def load(self, broadcast: Broadcast) -> Model:
        """A model of this client's family with the broadcast weights; with none, the run's initial weights."""
        with self.doing("loading the broadcast"):
            model = self.build_model(self.family)
            if values := family_values(broadcast.arrays, self.family):
                load_state(model, values)
            return model.to(self.device)

    def remembered(self, family: str) -> Model:
        """The model of `family` that `remember` kept in an earlier round; the first time, the run's initial one."""
        model = self.build_model(family)
        if state := own_model(self.memory, family):
            load_state(model, state)
        return model.to(self.device)

    def remember(self, model: Model, family: str) -> None:
        """Keep a copy of `model` for this client's next round, as the one of `family`."""
        state = model_state(model)
        self.memory |= {f"{MODELS}{family}/{name}": value.to("cpu", copy=True) for name, value in state.items()}

    def weights(self, model: Model) -> dict[str, np.ndarray]:
        """All weights of a model of this client's family as they travel, by `<family>/<parameter>`."""
        return {f"{self.family}/{name}": value.cpu().numpy() for name, value in model_state(model).items()}

    def untrained(self) -> Model:
        """A model of this client's family that no loss has touched, initialised by a seed of this client's own.

        Its batch norm has the statistics of one public batch: see `calibrate_batch_norm` for what it is without.
        """
        model = self.build_untrained(self.family, self.partition_id).to(self.device)
        images = self.public_set.images
        batch = images.take(np.arange(min(len(images), self.embed_batch_size))).to(self.device)
        calibrate_batch_norm(model, self.views.plain(batch))
        return model

    def train(
        self,
        model: Model,
        *,
        epochs: int,
        family: str | None = None,
        method: Method | None = None,
        penalty: Penalty | None = None,
    ) -> dict[str, float]:
        """Train `model` in place on the private images; returns `fedssl.train.train`'s metrics.

        What the method keeps from step to step goes on where this client's last training of that family ended.

        Args:
            model: its weights are where training starts.
            epochs: passes over the private images.
            family: the architecture, if it is not this client's.
            method: instead of the run's, for papers that bring their own.
            penalty: what the paper adds to the loss.
        """
        prefix = f"method/{family or self.family}/"
        kept = {name.removeprefix(prefix): value for name, value in self.memory.items() if name.startswith(prefix)}
        with self.doing("local training"):
            metrics = train(
                model,
                self.private_set,
                method=self.method if method is None else method,
                memory=kept,
                penalty=penalty,
                views=self.views,
                optimisation=self.local.optimisation,
                batch_size=self.local.batch_size,
                epochs=epochs,
                seed=derive_seed(self.seed, "local training", self.round_num, self.partition_id),
                round_num=self.round_num,
                num_rounds=self.num_rounds,
                device=self.device,
                amp=self.local.autocast(self.device),
                compile_mode=self.local.compile,
                cuda_graphs=self.local.cuda_graphs,
            )
        self.memory |= {f"{prefix}{name}": value for name, value in kept.items()}
        self.trained[family or self.family] = model
        return metrics

    def embed_public(self, model: Model, embedding: str) -> Float[Tensor, "n d"]:
        """What `model` makes of the public set, see `fedssl.federation.embedding.embed`."""
        with self.doing("embedding the public set"):
            images = self.public_set.images
            return embed(model, embedding, images, self.views, batch_size=self.embed_batch_size, device=self.device)

    def similarities(
        self, model: Model, *, embedding: str, codec: Codec
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """How alike `model` finds the public images, in the codec's arrays, and the `collapse_measures` of that."""
        embeddings = self.embed_public(model, embedding)
        measures = collapse_measures(FactorSimilarity(factors=unit_rows(embeddings)))
        return codec.encode(embeddings, self.secret() if self.secret else self.generator("rotation")), measures

    def distill(self, model: Model, target: Target, distillation: Distillation) -> dict[str, float]:
        """The server's step with the roles swapped: `model` learns a target that came down; `distill`'s metrics."""
        with self.doing("distilling the downlink"):
            return distill(
                model,
                target,
                self.public_set.images,
                distillation=distillation,
                views=self.views,
                seed=derive_seed(self.seed, "local distillation", self.round_num, self.partition_id),
                round_num=self.round_num,
                num_rounds=self.num_rounds,
                device=self.device,
                amp=self.local.autocast(self.device),
                compile_mode=self.local.compile,
                cuda_graphs=self.local.cuda_graphs,
            )

    def evaluate(self, model: Model) -> dict[str, float]:
        """Probe a model that never leaves this client on the run's labelled test (simulation only)."""
        with self.doing("evaluation"):
            return self.evaluator()(model.backbone)

    def linear_top1(self, model: Model) -> float:
        """Of all probes the linear one, likewise."""
        with self.doing("evaluation"):
            return self.evaluator().linear_top1(model.backbone)

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator for this client's draws of this round."""
        return generator(self.seed, purpose, self.round_num, self.partition_id)

    def upload(self, arrays: Mapping[str, np.ndarray], metrics: Mapping[str, float], *, codec: str) -> Upload:
        """The reply: `arrays` as they will travel, under a header that says whose and what for."""
        header = Header(
            round_num=self.round_num,
            partition_id=self.partition_id,
            family=self.family,
            codec=codec,
            public_fingerprint=self.public_set.fingerprint,
        )
        return Upload(header=header, arrays=arrays, metrics={**metrics, "num-examples": len(self.private_set)})


def own_model(memory: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """The state of the model of `family` that a client remembers; empty if there is none.

    Raises:
        DataError: see `check_names`.
    """
    check_names(memory, [family], "a client's memory")
    prefix = f"{MODELS}{family}/"
    return {name.removeprefix(prefix): value for name, value in memory.items() if name.startswith(prefix)}


def check_names(names: Iterable[str], families: Iterable[str], where: str) -> None:
    """Refuse a memory with models that an earlier version kept, as <family>/<parameter>.

    Nobody would find them, and the client would start from the initial weights without a word.

    Args:
        names: of the memory's entries.
        families: whose models it may hold.
        where: the memory, for the message.

    Raises:
        DataError: it does.
    """
    old = tuple(f"{family}/backbone." for family in families)
    if (found := next((name for name in names if name.startswith(old)), None)) is not None:
        raise DataError(
            f"{where} holds a model as an earlier version of fedssl kept it ({found}); this one looks for "
            f"{MODELS}{found} and would start that client anew. Go on with the version that began the run (git.commit "
            f"in its manifest.json), or begin a new run."
        )


@runtime_checkable
class ClientUpdate(Protocol):
    """A strategy's client half. It may also have `evaluate(client, broadcast)`; see `strategies/local_only.py`."""

    def __call__(self, client: Client, broadcast: Broadcast) -> Upload:
        """One round of one client."""
        ...
