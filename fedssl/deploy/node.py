"""One node of a deployment: what it brings, and the run's settings around it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedssl.config import instantiate
from fedssl.data.federated import FederatedData
from fedssl.data.images import ImageSet
from fedssl.data.public import ClientShard, Dataset
from fedssl.errors import ConfigError
from fedssl.federation.client import Client
from fedssl.federation.setup import Setup
from fedssl.federation.store import ClientStore
from fedssl.methods import Method
from fedssl.seeding import unforeseeable

RUN_ID = re.compile(r"[0-9a-f]{32}")  # a server's word for the run becomes the name of a folder


@dataclass(frozen=True, kw_only=True)
class Node:
    """What a machine brings to a federation. Its owner's word: nothing in it comes from the server.

    Args:
        partition_id: its number in the federation.
        data: node of its private source; None: a partition of the run's own data (a rehearsal).
        rehearsal_root: in a rehearsal, where the run's data lies here; None: where the server says.
        public: `data` (node) and `root` of its copy of the public images; both None in a rehearsal where they are as
            the server says.
        evaluate: the same of its copy of the server's labelled images, for strategies that probe the clients' own
            models; None where it has none.
        method: node of the self-supervised method; None: the run's.
        family: its architecture; None: as the run's `federation.families` say.
        device: "auto", "cpu" or "cuda".
        store: folder of its memory between rounds.
        allow_targets: see `fedssl.targets.check_targets`.
    """

    partition_id: int
    data: Mapping[str, Any] | None
    rehearsal_root: str | None
    public: Mapping[str, Any]
    evaluate: Mapping[str, Any]
    method: Mapping[str, Any] | None
    family: str | None
    device: str
    store: str
    allow_targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.partition_id < 0:
            raise ConfigError(f"partition_id counts from 0, got {self.partition_id}.")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device must be auto (a GPU, else the CPU), cpu or cuda, got {self.device!r}.")
        if self.data is not None and self.rehearsal_root is not None:
            raise ConfigError("rehearsal_root= is for a node without data=; where its own images are says data.root=")
        if self.data is not None and self.public["data"] is None:
            raise ConfigError(
                "a node with images of its own (data=) says itself what the public images are: public.data= and "
                "public.root=. Else a server could name its private images."
            )

    def check_files(self) -> None:
        """Load what it brings; a source that cannot be read is a `ConfigError` that says why."""
        for source in (self.data, self.public["data"], self.evaluate["data"]):
            if source is not None:
                instantiate(source).load("train")

    def store_of(self, run_id: str) -> ClientStore:
        """Its memory of one run.

        Raises:
            ConfigError: the run's name is none of ours.
        """
        if not RUN_ID.fullmatch(run_id):
            raise ConfigError(f"the server calls its run {run_id[:40]!r}, which is no name that fedssl gives")
        return ClientStore(Path(self.store).expanduser() / run_id)


class NodeSetup(Setup):
    """The parts of a run as a node has them: its own images, public copy, architecture and device, and the run's rest.

    Args:
        config: the run's, from the server.
        node: its own.

    Raises:
        ConfigError: the run's configuration does not fit this node.
    """

    def __init__(self, config: Mapping[str, Any], node: Node) -> None:
        self.node = node
        own: dict[str, Any] = {**config, "device": node.device}
        image_size = int(config["data"]["image_size"])  # of the run's networks
        if node.data is not None:
            own["data"] = {**node.data, "image_size": image_size}
        elif node.rehearsal_root is not None:
            own["data"] = {**config["data"], "root": node.rehearsal_root}
        if source := config["public"].get("source"):
            chosen = {**(node.public.get("data") or source), "image_size": image_size}
            if (root := node.public.get("root")) is not None:
                chosen["root"] = root
            own["public"] = {**config["public"], "source": chosen}
        own |= {group: _without_download(own[group]) for group in ("data", "public", "evaluate")}
        super().__init__(own)

    @property
    def rehearses(self) -> bool:
        """Whether its images are a partition of the run's own data."""
        return self.node.data is None

    def family(self, partition_id: int) -> str:
        """The architecture that this client runs."""
        own = partition_id == self.node.partition_id
        return self.node.family if own and self.node.family else super().family(partition_id)

    def client_method(self, partition_id: int) -> Method:
        """What this client trains with."""
        if self.node.method is None:
            return super().client_method(partition_id)
        method: Method = instantiate(self.node.method)
        return method

    @cached_property
    def data(self) -> FederatedData:
        """The public images, and this node's own: all of its train split."""
        if self.rehearses:
            return super().data
        partition_id, public = self.node.partition_id, instantiate(self.config["public"])
        if not isinstance(public, Dataset):
            raise ConfigError(
                f"this node has images of its own, and the run's public set ({type(public).__name__}) would be taken "
                f"out of them: the server must use public=dataset."
            )
        everything = [np.empty(0, np.int64) for _ in range(max(partition_id + 1, self.federation.num_clients))]
        everything[partition_id] = np.arange(len(self.train))
        return FederatedData(
            train=self.train,
            public_images=public.images(self.seed),
            public_positions=np.empty(0, np.int64),
            partitions=tuple(everything),
            public_partition=None,
        )

    @cached_property
    def probe_data(self) -> tuple[ImageSet, ImageSet]:
        """Labelled train and test images: the run's own in a rehearsal, else the copy that this node names."""
        if self.rehearses:
            return super().probe_data
        if (node := self.node.evaluate["data"]) is None:
            raise ConfigError(
                f"strategy={self.config['strategy'].get('name')} probes the clients' own models with the server's "
                f"labelled images, and this node has no copy of them: evaluate.data= and evaluate.root= of the node"
            )
        size = int(self.config["data"]["image_size"])
        source = instantiate(_without_download({**node, "image_size": size}))
        return source.load("train"), source.load("test")

    def client(self, partition_id: int, round_num: int) -> Client:
        """See `Setup.client`; a node with images of its own hides them behind secrets that no seed tells."""
        client = super().client(partition_id, round_num)
        client.secret = None if self.rehearses else unforeseeable
        return client

    def check_here(self) -> None:
        """Build what a round of this node needs, before there is one; `check` is the server's.

        Raises:
            ConfigError: with what was given, what would work and where to change it.
        """
        federation, partition_id = self.federation, self.node.partition_id
        if partition_id >= federation.num_clients:
            raise ConfigError(
                f"partition_id={partition_id}, but the run has federation.num_clients={federation.num_clients}: they "
                f"count from 0."
            )
        if self.rehearses and self.on_nodes:
            raise ConfigError("the run has partition=nodes: name this node's own images, e.g. data=image_folder")
        if (family := self.family(partition_id)) not in self.config["models"]:
            known = ", ".join(sorted(self.config["models"]))
            raise ConfigError(
                f"family={family}: the run knows {known}. Others are the server's to add (models.<name>)."
            )
        _ = self.local, self.views, self.method, self.device, self.client_half
        model = self.build_model(family)
        if missing := sorted(self.client_method(partition_id).heads(1).keys() - model.heads.keys()):
            raise ConfigError(
                f"method= of this node trains with {', '.join(missing)}, which the run's models do not have, and "
                f"models of a family are alike: the server must name the method in client.methods."
            )
        trains = not (isinstance(instantiate(self.config["public"]), ClientShard) and partition_id == 0)
        if trains and (owned := len(self.data.partitions[partition_id])) < 2:
            raise ConfigError(f"this node has {owned} images, and a client that trains needs at least 2 (data=)")


def _without_download(node: Any) -> Any:
    """A source, or a node that holds one, that fetches nothing: what a server says does not make a node call others."""
    if not isinstance(node, Mapping):
        return node
    own = {key: _without_download(value) for key, value in node.items()}
    return {**own, "download": False} if "download" in own else own


def node_of(config: Mapping[str, Any]) -> Node:
    """From what `fedssl.config.compose_node` composed, or a file that holds it."""
    return Node(**{**config, "allow_targets": tuple(config["allow_targets"])})
