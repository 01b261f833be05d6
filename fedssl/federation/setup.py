"""Everything a run is made of, built from its resolved configuration: on the server, in a worker, in a replay."""

import copy
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Message, MetricRecord

from fedssl.config import check_values, instantiate
from fedssl.data.federated import FederatedData, federate
from fedssl.data.images import ImageSet
from fedssl.data.partition import Nodes
from fedssl.data.public import ClientShard, Dataset, PublicSet
from fedssl.data.sources import Source
from fedssl.data.views import Views
from fedssl.errors import ConfigError, PayloadError
from fedssl.evaluate import Evaluation, Evaluator
from fedssl.federation.client import DOWNLINKS, Client, LocalTraining
from fedssl.federation.devices import Devices
from fedssl.federation.embedding import check_embedding
from fedssl.federation.records import num_bytes
from fedssl.federation.roster import Introduction, Member
from fedssl.federation.server import Server
from fedssl.methods import Method
from fedssl.models import Model, feature_dim, num_parameters
from fedssl.resuming import DEPLOYMENT
from fedssl.seeding import seeded_init, unforeseeable
from fedssl.tracking import write_json


@dataclass(frozen=True, kw_only=True)
class Federation:
    """Who takes part. The numbers live in conf/federation/."""

    num_clients: int  # partitions of the private data
    cohort_size: int | None  # distinct clients per round; None: all that train
    num_rounds: int
    min_replies: int | None  # fewer usable replies in a round end the run; None: half of the cohort, rounded up
    families: Sequence[str]  # architectures; partition p runs families[p % len]
    server_families: Sequence[str]  # architectures of students that no client runs
    report_family: str | None  # whose figures head the report; None: the one with most backbone parameters
    round_timeout: float | None  # seconds a round waits for its clients; None: as long as it takes
    keep_checkpoints: int
    keep_replies_after: float | None  # seconds of a client's work from which its reply outlives a kill; None: none does
    server_threads: int  # torch threads of the server on the CPU; part of the result
    devices: Devices

    def __post_init__(self) -> None:
        for name in ("num_clients", "num_rounds", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"federation.{name} must be at least 1, got {getattr(self, name)}.")
        if self.cohort_size is not None and not 1 <= self.cohort_size <= self.num_clients:
            raise ConfigError(
                f"federation.cohort_size must be between 1 and federation.num_clients={self.num_clients}, "
                f"got {self.cohort_size}. A round samples that many distinct clients: "
                f"lower cohort_size or raise num_clients."
            )
        cohort = self.cohort_size or self.num_clients
        if self.min_replies is not None and not 0 <= self.min_replies <= cohort:
            raise ConfigError(
                f"federation.min_replies must be between 0 and the cohort's size {cohort}, got {self.min_replies}. "
                f"Lower it, or raise federation.{'num_clients' if self.cohort_size is None else 'cohort_size'}."
            )
        if self.server_threads < 1:
            raise ConfigError(f"federation.server_threads must be at least 1, got {self.server_threads}")
        if not self.families:
            raise ConfigError("federation.families is empty: name at least one architecture, e.g. [conv4_16]")
        if self.keep_replies_after is not None and not self.keep_replies_after >= 0:
            raise ConfigError(
                f"federation.keep_replies_after is in seconds and must be >= 0 (0 keeps every reply), or null to keep "
                f"none, got {self.keep_replies_after}."
            )
        if self.round_timeout is not None and not self.round_timeout > 0:
            raise ConfigError(
                f"federation.round_timeout is in seconds and must be > 0 or null, got {self.round_timeout}"
            )

    def family(self, partition_id: int) -> str:
        """The architecture that this client runs."""
        return self.families[partition_id % len(self.families)]


def resolve_device(name: str) -> torch.device:
    """`device=auto|cpu|cuda` as a torch device of this process."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device must be auto (every GPU, else the CPU), cpu or cuda, got {name!r}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no GPU here: use device=auto or device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


class Setup:
    """The parts of a run, each built when it is first used.

    Args:
        config: the resolved configuration, as `config.yaml` holds it.
        run_dir: where `partition.npz` lies once the run has started; None computes the partition again.
        members: the nodes of a deployment, by partition; None in a simulation, and where `run_dir` tells.

    Raises:
        ConfigError: a part cannot be built; the message says what would work.
    """

    def __init__(
        self, config: Mapping[str, Any], run_dir: Path | None = None, members: Mapping[int, Member] | None = None
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.members = read_members(run_dir) if members is None and run_dir is not None else members

    # --- settings ---
    @property
    def seed(self) -> int:
        """The one seed of which every draw derives."""
        seed: int = self.config["seed"]
        return seed

    @cached_property
    def federation(self) -> Federation:
        """Who takes part."""
        federation: Federation = instantiate(self.config["federation"])
        known = sorted(self.config["models"])
        for key in ("families", "server_families"):
            for family in getattr(federation, key):
                if family not in known:
                    raise ConfigError(
                        f"federation.{key} names the architecture {family!r}; known are {', '.join(known)}. "
                        f"Add your own as +models.{family}._target_=mypackage.MyBackbone"
                    )
        federation.devices.check_families(federation.families[: federation.num_clients], known)
        takes_part = (*federation.families, *federation.server_families)
        if federation.report_family and federation.report_family not in takes_part:
            raise ConfigError(
                f"federation.report_family={federation.report_family} is no client's architecture: choose one of "
                f"federation.families=[{', '.join(federation.families)}], or add it to them "
                f"(or to federation.server_families, for a student without clients)."
            )
        return federation

    @cached_property
    def client_families(self) -> tuple[str, ...]:
        """The clients' architecture families, each once; families beyond the last client do not take part."""
        federation = self.federation
        return tuple(dict.fromkeys(self.family(p) for p in range(federation.num_clients)))

    @cached_property
    def families(self) -> tuple[str, ...]:
        """All architecture families: the clients', then those of students without clients."""
        return tuple(dict.fromkeys((*self.client_families, *self.federation.server_families)))

    @cached_property
    def report_family(self) -> str:
        """The family whose figures head the report."""
        first = 1 if isinstance(instantiate(self.config["public"]), ClientShard) else 0  # known without the images
        trainers = range(first, self.federation.num_clients)
        training = list(dict.fromkeys(self.family(p) for p in trainers))
        chosen = self.federation.report_family
        if chosen is None:
            return max(training, key=lambda family: num_parameters(self.build_model(family).backbone))
        if chosen not in (*training, *self.federation.server_families):
            raise ConfigError(
                f"federation.report_family={chosen} has no client that trains: of num_clients="
                f"{self.federation.num_clients} clients, {len(trainers)} train, and their "
                f"families are {', '.join(training)}. Choose one of these as federation.report_family, or leave it "
                f"null for the largest."
            )
        return chosen

    @cached_property
    def local(self) -> LocalTraining:
        """How clients train."""
        local: LocalTraining = instantiate({k: v for k, v in self.config["client"].items() if k != "store"})
        return local

    @cached_property
    def evaluation(self) -> Evaluation:
        """How representations are probed."""
        evaluation: Evaluation = instantiate(self.config["evaluate"])
        return evaluation

    @cached_property
    def views(self) -> Views:
        """Augmentation, and the deterministic transform."""
        views: Views = instantiate(self.config["views"])
        return views

    @cached_property
    def method(self) -> Method:
        """The self-supervised method."""
        method: Method = instantiate(self.config["method"])
        for chosen, key in ((method, "method"), *((m, "client.methods") for m in self.local.methods or ())):
            if not isinstance(chosen, Method):
                raise ConfigError(f"{key} must name a fedssl.methods.Method, got a {type(chosen).__name__}.")
        return method

    @cached_property
    def client_half(self) -> Any:
        """The strategy's client half; None where it has none."""
        return instantiate(self.config["strategy"]["client"])

    def client_method(self, partition_id: int) -> Method:
        """What this client trains with."""
        methods = self.local.methods
        return methods[partition_id % len(methods)] if methods else self.method

    @cached_property
    def device(self) -> torch.device:
        """Where this process computes."""
        return resolve_device(self.config["device"])

    # --- data ---
    @cached_property
    def train(self) -> ImageSet:
        """The private source's train split."""
        source: Source = instantiate(self.config["data"])
        return source.load("train")

    @cached_property
    def on_nodes(self) -> bool:
        """Whether every client's images are on a machine of its own."""
        return isinstance(instantiate(self.config["partition"]), Nodes)

    @cached_property
    def data(self) -> FederatedData:
        """Partitions and public images."""
        public = instantiate(self.config["public"])
        saved = self.run_dir / "partition.npz" if self.run_dir else None
        if saved is not None and saved.exists():
            images = public.images(self.seed) if isinstance(public, Dataset) else None
            return FederatedData.load(saved, self.train, images)
        return federate(
            self.train,
            partition=instantiate(self.config["partition"]),
            public=public,
            num_clients=self.federation.num_clients,
            seed=self.seed,
        )

    @cached_property
    def public_set(self) -> PublicSet:
        """The public images and their fingerprint."""
        return PublicSet.of(self.data.public_images, self.views.describe())

    def labelled_public_images(self) -> ImageSet:
        """The public images with the labels that their source has, if any: for evaluation, no strategy sees them."""
        if len(positions := self.data.public_positions):
            return self.train.subset(positions)
        public = instantiate(self.config["public"])
        return public.labelled(self.seed) if isinstance(public, Dataset) else self.data.public_images

    @cached_property
    def probe_data(self) -> tuple[ImageSet, ImageSet]:
        """Labelled train and test images for the probes."""
        node = self.config["evaluate"].get("source")
        if node is None:
            return self.train, instantiate(self.config["data"]).load("test")
        source = instantiate(node)
        return source.load("train"), source.load("test")

    @cached_property
    def evaluator(self) -> Evaluator:
        """Probes on frozen features."""
        train, test = self.probe_data
        return Evaluator(train=train, test=test, evaluation=self.evaluation, views=self.views, device=self.device)

    def private_union(self) -> ImageSet:
        """All images of the clients that train."""
        if self.on_nodes:
            raise ConfigError(
                f"strategy={self.config['strategy']['name']} trains on all private images in one place, and with "
                f"partition=nodes they are on the clients' machines. Choose another strategy."
            )
        data = self.data
        positions = np.concatenate([data.partitions[p] for p in data.training_partitions])
        return self.train.subset(positions, name="union of the private data")

    # --- devices ---
    @cached_property
    def stragglers(self) -> frozenset[int]:
        """The clients that are slow in every round."""
        return self.federation.devices.stragglers_among(self.seed, self.data.training_partitions)

    def simulated_seconds(self, member: Member, sent: Message, reply: Message) -> float:
        """How long this client would have taken to answer, see `Devices.seconds`."""
        return self.federation.devices.seconds(
            downlink_bytes=num_bytes(sent),
            uplink_bytes=num_bytes(reply),
            metrics=reply.content.metric_records.get("metrics", MetricRecord()),
            family=member.family,
            straggler=member.partition_id in self.stragglers,
        )

    def simulated_wait(self, round_num: int, asked: int, answered: Mapping[int, float]) -> float:
        """How long the server would have waited for its clients in this round, see `Devices.wait`.

        Args:
            round_num: the round.
            asked: how many clients.
            answered: seconds by partition of those whose upload came.

        Returns:
            0 where the strategy needs no clients, or asks none of those that are there.
        """
        devices = self.federation.devices
        there = (devices.available(self.seed, round_num, p) for p in self.data.training_partitions)
        if self.client_half is None or (asked == 0 and any(there)):
            return 0.0
        return devices.wait(asked, answered.values())

    # --- models ---
    def family(self, partition_id: int) -> str:
        """The architecture that this client runs."""
        return self.federation.family(partition_id)

    def num_images(self, partition_id: int) -> int:
        """How many private images this client has; a node says it of itself."""
        return self.members[partition_id].num_images if self.members else len(self.data.partitions[partition_id])

    def build_model(self, family: str) -> Model:
        """The run's initial model of `family`: the same weights at every call, on the CPU."""
        return copy.deepcopy(self._initial_model(family))

    def build_untrained(self, family: str, partition_id: int) -> Model:
        """An initialisation of `family` that only this partition has, on the CPU."""
        with seeded_init(self.seed, f"untrained/{family}", 0, partition_id):
            return self._new_model(family)

    def _initial_model(self, family: str) -> Model:
        models: dict[str, Model] = self.__dict__.setdefault("_initial_models", {})
        if family not in models:
            with seeded_init(self.seed, f"initial weights/{family}"):
                models[family] = self._new_model(family)
        return models[family]

    def _new_model(self, family: str) -> Model:
        backbone = instantiate(self.config["models"][family])
        if not isinstance(backbone, torch.nn.Module):
            raise ConfigError(
                f"models.{family}._target_ must name a torch.nn.Module or a function that returns one, got a "
                f"{type(backbone).__name__}."
            )
        size = int(self.config["data"]["image_size"])
        projector = instantiate(self.config["projector"], in_dim=feature_dim(backbone, size))
        return Model(backbone, projector, self._heads(feature_dim(Model(backbone, projector), size)))

    def _heads(self, dim: int) -> dict[str, torch.nn.Module]:
        """What the methods of this run and the strategy's client half train on top of projections of width `dim`.

        All models of a family are alike, so each holds the heads of every method that anybody trains with.
        """
        heads: dict[str, torch.nn.Module] = {}
        for part in (self.method, *(self.local.methods or ()), self.client_half):
            for name, head in (part.heads(dim) if hasattr(part, "heads") else {}).items():
                if name in heads and _shapes(head) != _shapes(heads[name]):
                    raise ConfigError(
                        f"two methods of this run have different heads {name!r}, and models of a family are alike: "
                        f"give them the same widths, or choose others (method=, client.methods=, strategy=)."
                    )
                heads.setdefault(name, head)
        return heads

    @cached_property
    def embedding_dims(self) -> dict[str, int]:
        """The largest width of what is sent, by embedding: the clients' and, coming down, the report family's."""
        models = [self.build_model(family) for family in dict.fromkeys((*self.client_families, self.report_family))]
        size = int(self.config["data"]["image_size"])
        return {
            "projector": max(feature_dim(model, size) for model in models),
            "backbone": max(feature_dim(model.backbone, size) for model in models),
        }

    # --- the two sides ---
    def client(self, partition_id: int, round_num: int) -> Client:
        """What the client half is handed in one round."""
        return Client(
            partition_id=partition_id,
            family=self.family(partition_id),
            report_family=self.report_family,
            round_num=round_num,
            num_rounds=self.federation.num_rounds,
            seed=self.seed,
            private_set=self.data.private(partition_id),
            public_set=self.public_set,
            views=self.views,
            method=self.client_method(partition_id),
            local=self.local,
            build_model=self.build_model,
            build_untrained=self.build_untrained,
            evaluator=lambda: self.evaluator,
            device=self.device,
            embed_batch_size=self.evaluation.batch_size,
        )

    def server(self) -> Server:
        """What a strategy's server half is handed."""
        return Server(
            seed=self.seed,
            num_rounds=self.federation.num_rounds,
            cohort_size=self.federation.cohort_size,
            devices=self.federation.devices,
            num_trainers=len(self.data.training_partitions),
            num_trainers_of=Counter(self.family(p) for p in self.data.training_partitions),
            families=self.families,
            client_families=self.client_families,
            report_family=self.report_family,
            public_set=self.public_set,
            views=self.views,
            method=self.method,
            local=self.local,
            build_model=self.build_model,
            private_union=self.private_union,
            embedding_dims=self.embedding_dims,
            embed_batch_size=self.evaluation.batch_size,
            device=self.device,
            secret=unforeseeable if self.on_nodes else None,
        )

    def check_node(self, node: Introduction) -> None:
        """Refuse a node of a deployment that does not fit this run.

        Raises:
            PayloadError: with what it said and what would fit.
        """
        ours, theirs = _release(version("fedssl")), _release(node.version)
        if ours != theirs:
            raise PayloadError(f"it runs fedssl {node.version}, the server {version('fedssl')}: install the same")
        if node.family not in self.config["models"]:
            raise PayloadError(
                f"its architecture is {node.family!r} (family=); this run knows "
                f"{', '.join(sorted(self.config['models']))}"
            )
        if self.on_nodes == node.rehearsal:
            raise PayloadError(
                "it names no images of its own (data=), and this run has partition=nodes"
                if self.on_nodes
                else "it brings images of its own (data=), and this run splits one data set: set partition=nodes"
            )
        if node.public_fingerprint != self.public_set.fingerprint:
            raise PayloadError(
                f"its public set ({node.public_fingerprint[:12]}) is not the server's "
                f"({self.public_set.fingerprint[:12]}): same images, order and transform are needed (public.data=, "
                f"public.root= of the node)"
            )

    def check(self, *, nodes_to_come: bool = False) -> None:
        """Build every part once, before any work: whatever cannot work is said here.

        Args:
            nodes_to_come: in a deployment, before anybody is there; what only nodes can tell is not looked at.

        Raises:
            ConfigError: with what was given, what would work and where to change it.
        """
        check_values(self.config)
        max_seconds = self.config["max_seconds"]
        if max_seconds is not None and max_seconds < 0:
            raise ConfigError(
                f"max_seconds must be at least 0, or null for no limit, got {max_seconds}. "
                f"No round starts after that many seconds."
            )
        if self.config["downlink"] not in DOWNLINKS:
            raise ConfigError(f"downlink must be one of {', '.join(DOWNLINKS)}, got {self.config['downlink']!r}")
        check_embedding(self.config["embedding"])
        for group in ("codec", "ensemble", "distill"):  # also where the strategy reads none of them
            instantiate(self.config[group])
        federation = self.federation
        _ = self.local, self.evaluation, self.views, self.method, self.device, instantiate(self.config["grid"])
        self._check_public_source()
        self._check_nodes(nodes_to_come)
        image_size = int(self.config["data"]["image_size"])
        for family in self.families:
            self.build_model(family)
        trainers = len(self.data.training_partitions)
        cohort = federation.cohort_size or trainers
        if cohort > trainers:
            raise ConfigError(
                f"federation.cohort_size={cohort}, but only {trainers} clients train: under public=client_shard "
                f"partition 0 is the public set. Lower cohort_size or raise num_clients={federation.num_clients}."
            )
        if federation.min_replies is not None and federation.min_replies > cohort:
            raise ConfigError(
                f"federation.min_replies={federation.min_replies}, but only {trainers} clients train: under "
                f"public=client_shard partition 0 is the public set. Lower min_replies or raise "
                f"num_clients={federation.num_clients}."
            )
        if (share := federation.devices.stragglers) > 0 and not self.stragglers:
            raise ConfigError(
                f"federation.devices.stragglers={share:g} of {trainers} clients is less than half a client, so there "
                f"would be none: raise it, raise federation.num_clients, or set it to 0."
            )
        for partition_id in () if self.on_nodes and nodes_to_come else self.data.training_partitions:
            if (owned := self.num_images(partition_id)) < 2:
                raise ConfigError(
                    f"partition {partition_id} has {owned} images, and a client that trains needs at least 2. Use "
                    f"more images (data.num_images={self.config['data'].get('num_images')}), fewer clients "
                    f"(federation.num_clients={federation.num_clients}) or, where the partition has it, a larger "
                    f"partition.min_size."
                )
        if (shared := len(self.data.public_images)) < 2:
            raise ConfigError(
                f"the public set has {shared} images, and at least 2 are needed to be similar. Raise public.size; "
                f"under public=client_shard use more images (data.num_images=) or fewer clients "
                f"(federation.num_clients=)."
            )
        if self.train.image_size != (image_size, image_size):
            raise ConfigError(f"data.image_size={image_size}, but the images are {self.train.image_size}")
        _ = self.report_family, self.public_set, self.evaluator

    def _check_nodes(self, nodes_to_come: bool) -> None:
        """`partition=nodes` needs nodes, and a public set that they can hold a copy of."""
        if not self.on_nodes:
            return
        if self.members is None and not nodes_to_come:
            raise ConfigError(
                "partition=nodes says that every client's images are on a machine of its own: run it with "
                "fedssl-deploy. A simulation splits one data set, as partition=dirichlet, iid, ... do."
            )
        if not isinstance(instantiate(self.config["public"]), Dataset):
            raise ConfigError(
                "partition=nodes needs public=dataset, a data set of which the server and every node hold a copy: the "
                "other kinds take the public images from the private ones, which the server does not have."
            )

    def _check_public_source(self) -> None:
        """Refuse public images "of another data set" that are the private ones themselves."""
        private = self.config["data"]
        public = self.config["public"].get("source")
        if (
            public is None
            or self.on_nodes
            or any(public.get(key) != private.get(key) for key in ("name", "train_split"))
        ):
            return
        roots = [Path(node["root"]).expanduser().resolve() if "root" in node else None for node in (public, private)]
        if roots[0] == roots[1]:
            raise ConfigError(
                f"public.data={public['name']} is the private data set itself"
                f"{f' (root {roots[0]})' if roots[0] else ''}: the public images would be the clients' own. Use "
                f"public=held_out, which takes them out of the clients' hands, or another public.data or public.root."
            )


def write_members(run_dir: Path, run_id: str, members: Mapping[int, Member]) -> None:
    """Write `deployment.json`: under which name the nodes keep their memory, and what they said of themselves."""
    write_json(run_dir / DEPLOYMENT, {"run_id": run_id, "nodes": [vars(members[p]) for p in sorted(members)]})


def read_members(run_dir: Path) -> dict[int, Member] | None:
    """Who took part in the deployment in `run_dir`; None where it is a simulation, or did not start."""
    path = run_dir / DEPLOYMENT
    if not path.is_file():
        return None
    return {node["partition_id"]: Member(**node) for node in json.loads(path.read_text())["nodes"]}


def _release(text: str) -> list[str]:
    return text.split(".")[:2]


def _shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}
