"""The data of a federation: who owns which private images, and the public set that all share."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import numpy as np
from jaxtyping import Int64

from fedssl.data.images import ImageSet
from fedssl.data.partition import File, PackedParts, Partitioner, parts_of, read_npz
from fedssl.data.public import Public
from fedssl.errors import ConfigError, DataError
from fedssl.seeding import numpy_generator


@dataclass(frozen=True, kw_only=True, eq=False)
class FederatedData:
    """Private images by partition, and public images.

    Args:
        train: the private source's train split (after `data.num_images`).
        public_images: unlabelled; the same rows for everyone.
        public_positions: where they lie in `train`; empty if they come from another data set.
        partitions: positions in `train`, ascending and disjoint, one array per client.
        public_partition: 0 under `public=client_shard`: that client never trains. Else None.
    """

    train: ImageSet
    public_images: ImageSet
    public_positions: Int64[np.ndarray, " _"]
    partitions: Sequence[Int64[np.ndarray, " _"]]
    public_partition: int | None

    def private(self, partition_id: int) -> ImageSet:
        """The images that client `partition_id` trains on.

        Raises:
            ConfigError: there is no such client, or its images are the public set.
        """
        if not 0 <= partition_id < len(self.partitions):
            raise ConfigError(
                f"there is no partition {partition_id}: there are {len(self.partitions)}, counted from 0."
            )
        if partition_id == self.public_partition:
            raise ConfigError(f"partition {partition_id} is the public set (public=client_shard) and does not train.")
        return self.train.subset(self.partitions[partition_id], name=f"{self.train.name}, partition {partition_id}")

    @property
    def training_partitions(self) -> tuple[int, ...]:
        """Ids of the clients that train, ascending."""
        return tuple(p for p in range(len(self.partitions)) if p != self.public_partition)

    def counts(self) -> Int64[np.ndarray, "clients classes"]:
        """Images by client and class; zero columns for unlabelled data."""
        if self.train.labels is None:
            return np.zeros((len(self.partitions), 0), np.int64)
        labels, minlength = self.train.labels, self.train.num_classes
        return np.stack([np.bincount(labels[part], minlength=minlength) for part in self.partitions])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `partition.npz` atomically.

        Arrays, none of them pickled: `indices` (all clients' positions, one client after the other), `offsets`
        (clients + 1; where each client's begin), `public` (positions in train, empty if from another data set),
        `public_partition` (-1 for none), `counts` (clients, classes), `classes` (names), `train_sha256`.
        """
        path = Path(path)
        unfinished = path.with_name(f".{path.name}.{uuid4().hex}")
        with unfinished.open("wb") as file:
            np.savez_compressed(
                file,
                indices=np.concatenate(self.partitions),
                offsets=np.cumsum([0, *map(len, self.partitions)]),
                public=self.public_positions,
                public_partition=np.array(-1 if self.public_partition is None else self.public_partition),
                counts=self.counts(),
                classes=np.array(self.train.classes, dtype=np.str_),
                train_sha256=np.array(self.train.digest),
            )
        unfinished.replace(path)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], train: ImageSet, public_images: ImageSet | None = None
    ) -> "FederatedData":
        """Read a saved `partition.npz` again.

        Args:
            path: what `save` wrote.
            train: the train split that was partitioned.
            public_images: needed where they come from another data set: `public.Dataset.images(seed)`.

        Raises:
            DataError: the file is missing or damaged, or `train` is not what was partitioned.
        """
        try:
            arrays = read_npz(Path(path))
            partitions, public = parts_of(arrays), arrays["public"]
            public_partition, train_sha256 = int(arrays["public_partition"]), str(arrays["train_sha256"])
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"cannot read the partition {path}: {error}. Start a new run, or restore it.") from error
        if train_sha256 != train.digest:
            raise DataError(
                f"{path} partitions other images than {train.name} holds now (sha256 {train_sha256[:12]}..., now "
                f"{train.digest[:12]}...). Point data.root at the images of the run, or start a new run."
            )
        if public_images is None:
            if not len(public):
                raise ConfigError(f"the public images of {path} come from another data set: pass `public_images`.")
            public_images = replace(train.subset(public, name=f"public ({train.name})"), labels=None, classes=())
        return cls(
            train=train,
            public_images=public_images,
            public_positions=public,
            partitions=partitions,
            public_partition=None if public_partition < 0 else public_partition,
        )


def federate(train: ImageSet, *, partition: Partitioner, public: Public, num_clients: int, seed: int) -> FederatedData:
    """Fix the public set and split the private images: a pure function of its arguments.

    Args:
        train: the private source's train split.
        partition: who owns what (`conf/partition/`).
        public: where the public set comes from (`conf/public/`).
        num_clients: partitions, the one of `public=client_shard` included.
        seed: the run's seed.

    Raises:
        ConfigError: the settings do not fit the data.
    """
    rng = numpy_generator(seed, "partition")
    free, keep = np.arange(len(train)), num_clients
    claimed: list[np.ndarray] | None = None
    if isinstance(partition, File):  # the one kind whose positions are fixed before the public set is drawn
        claimed = partition.split(train.labels, len(train), num_clients, rng)
        free, keep = np.setdiff1d(free, np.concatenate(claimed)), 0

    def assign(positions: Int64[np.ndarray, " _"]) -> list[np.ndarray]:
        if claimed is not None:
            return claimed
        labels = None if train.labels is None else train.labels[positions]
        return [positions[part] for part in partition.split(labels, len(positions), num_clients, rng)]

    choice = public.choose(train, free=free, keep=keep, assign=assign, seed=seed)
    return FederatedData(
        train=train,
        public_images=choice.public_images,
        public_positions=choice.public_positions,
        partitions=PackedParts.of(choice.partitions),
        public_partition=choice.public_partition,
    )
