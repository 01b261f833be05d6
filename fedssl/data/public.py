"""The public set: unlabelled images that the server and every client hold, the same and in the same order.

Its kinds (`conf/public/`) differ in where the images come from; `choose` says what that leaves to the clients. Rows are
in random order, so that any prefix is a sample, and carry no labels.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from fedssl.data.images import ImageSet
from fedssl.data.sources import Source
from fedssl.errors import ConfigError
from fedssl.seeding import numpy_generator

Positions = Int64[np.ndarray, " _"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PublicSet:
    """The public images, and proof of what they are.

    Args:
        images: row i is the same image for everyone.
        fingerprint: `public_fingerprint` of them; uploads carry it, and the server refuses another one.
    """

    images: ImageSet
    fingerprint: str

    @classmethod
    def of(cls, images: ImageSet, transform_description: str) -> "PublicSet":
        """The set with its fingerprint; `transform_description` is `Views.describe()`."""
        return cls(images=images, fingerprint=public_fingerprint(images, transform_description))


def public_fingerprint(images: ImageSet, transform_description: str) -> str:
    """sha256 (hex) of the transform, the shape, and the pixels in row order; labels and names do not matter."""
    shape = (len(images), *images.pixels.shape[1:])
    sha256 = hashlib.sha256(repr((transform_description, shape)).encode())
    for start in range(0, len(images), 1024):
        rows = np.arange(start, min(start + 1024, len(images)))
        sha256.update(np.ascontiguousarray(images.take(rows)).data)
    return sha256.hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """A public set, and the partitions that go with it.

    Args:
        public_images: unlabelled.
        public_positions: where they lie in the private train split; empty if they come from another data set.
        partitions: positions in the private train split, ascending, one array per client.
        public_partition: the client whose images became public and who never trains, or None.
    """

    public_images: ImageSet
    public_positions: Positions
    partitions: tuple[Positions, ...]
    public_partition: int | None


@runtime_checkable
class Public(Protocol):
    """Where the public images come from."""

    def choose(
        self, train: ImageSet, *, free: Positions, keep: int, assign: Callable[[Positions], list[np.ndarray]], seed: int
    ) -> Choice:
        """Fix the public set and partition the rest.

        Args:
            train: the private source's train split.
            free: positions in `train` that may become public: all of them, unless a saved partition claims some.
            keep: how many of `free` must be left so that every client can have an image.
            assign: partitions the given positions among the clients.
            seed: the run's seed.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """`size` images drawn from the train split before it is partitioned; no client owns them."""

    size: int

    def __post_init__(self) -> None:
        _check_size(self.size)

    def choose(
        self, train: ImageSet, *, free: Positions, keep: int, assign: Callable[[Positions], list[np.ndarray]], seed: int
    ) -> Choice:
        """See `Public.choose`."""
        if self.size > len(free) - keep:
            raise ConfigError(
                f"public.size={self.size} is too large: {len(free)} images of {train.name} are free to be held out, "
                f"and {keep} of them must be left for the clients. Set public.size to "
                f"{max(len(free) - keep, 0)} or less, use more images (data.num_images=), fewer clients "
                f"(federation.num_clients=) or public=dataset."
            )
        drawn = numpy_generator(seed, "public set").permutation(free)[: self.size]
        return Choice(
            public_images=_unlabelled(train, drawn),
            public_positions=drawn,
            partitions=tuple(assign(np.setdiff1d(free, drawn))),
            public_partition=None,
        )


@dataclass(frozen=True, kw_only=True)
class ClientShard:
    """Partition 0 is the public set: it counts in `federation.num_clients` and does not train.

    FLESD's own experiments (Shi et al. 2021, https://arxiv.org/abs/2109.14611): 6 clients, of which 5 train. Under a
    skewed partition the public set is skewed too.
    """

    def choose(
        self, train: ImageSet, *, free: Positions, keep: int, assign: Callable[[Positions], list[np.ndarray]], seed: int
    ) -> Choice:
        """See `Public.choose`."""
        partitions = tuple(assign(np.arange(len(train))))
        if len(partitions) < 2:
            raise ConfigError(
                f"public=client_shard takes partition 0 as the public set, so federation.num_clients={len(partitions)} "
                f"leaves nobody to train. Set federation.num_clients to 2 or more, or choose public=held_out."
            )
        rows = numpy_generator(seed, "public set").permutation(partitions[0])
        return Choice(
            public_images=_unlabelled(train, rows), public_positions=rows, partitions=partitions, public_partition=0
        )


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """`size` images drawn from the train split of another data set, decoded at the private images' size.

    Args:
        source: of the public images; labels, if it has any, are not used.
        size: how many images.
    """

    source: Source
    size: int

    def __post_init__(self) -> None:
        _check_size(self.size)

    def images(self, seed: int) -> ImageSet:
        """The public images of the run with this seed."""
        return replace(self.labelled(seed), labels=None, classes=())

    def labelled(self, seed: int) -> ImageSet:
        """The same with the labels that their source has, if any: for evaluation, not for a strategy."""
        images = self.source.load("train")
        if self.size > len(images):
            raise ConfigError(
                f"public.size={self.size} is more than the {len(images)} images of {images.name}. "
                f"Set public.size to {len(images)} or less."
            )
        drawn = numpy_generator(seed, "public set").permutation(len(images))[: self.size]
        return _public(images, drawn)

    def choose(
        self, train: ImageSet, *, free: Positions, keep: int, assign: Callable[[Positions], list[np.ndarray]], seed: int
    ) -> Choice:
        """See `Public.choose`."""
        images = self.images(seed)
        if images.image_size != train.image_size:
            raise ConfigError(
                f"the public images ({images.name}) are decoded at {images.image_size} pixels, the private ones "
                f"({train.name}) at {train.image_size}. Set public.image_size to {train.image_size[0]}."
            )
        return Choice(
            public_images=images,
            public_positions=np.empty(0, np.int64),
            partitions=tuple(assign(np.arange(len(train)))),
            public_partition=None,
        )


def _public(images: ImageSet, rows: Positions) -> ImageSet:
    return images.subset(rows, name=f"public ({images.name})")


def _unlabelled(images: ImageSet, rows: Positions) -> ImageSet:
    return replace(_public(images, rows), labels=None, classes=())


def _check_size(size: object) -> None:
    if not isinstance(size, int) or size < 1:
        raise ConfigError(f"public.size must be a whole number of at least 1, got {size}.")
