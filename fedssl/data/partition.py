"""Who owns which images: pure functions of labels and a generator. Parts are disjoint and complete.

Every kind is a small class with the numbers of its YAML (`conf/partition/`) and one method `split`.
"""

import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int64

from fedssl.errors import ConfigError

MAX_DRAWS = 100  # of a random partition, until every client has `min_size` images

Parts = list[np.ndarray]  # one array of ascending positions per client


class PackedParts(Sequence[Any]):
    """The same in two arrays, for many clients in many processes: an array of its own would cost each 150 bytes.

    Args:
        indices: positions of all clients, one client after the other.
        offsets: (clients + 1,) where each client's begin, and the end.
    """

    def __init__(self, indices: Int64[np.ndarray, " _"], offsets: Int64[np.ndarray, " _"]) -> None:
        self.indices, self.offsets = indices, offsets

    @classmethod
    def of(cls, parts: Iterable[Int64[np.ndarray, " _"]]) -> "PackedParts":
        """The same parts."""
        parts = list(parts)
        return cls(np.concatenate([np.empty(0, np.int64), *parts]), np.cumsum([0, *map(len, parts)]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, client: Any) -> Any:
        """The positions of one client, a view; of a slice, one each."""
        if isinstance(client, slice):
            return [self[c] for c in range(*client.indices(len(self)))]
        client = range(len(self))[client]
        return self.indices[self.offsets[client] : self.offsets[client + 1]]


@runtime_checkable
class Partitioner(Protocol):
    """Splits a data set among clients."""

    def split(
        self, labels: Int64[np.ndarray, " n"] | None, num_images: int, num_clients: int, rng: np.random.Generator
    ) -> Parts:
        """Positions in 0..num_images-1 for each of `num_clients` clients, ascending, no client empty.

        Args:
            labels: (num_images,) of the images to split, or None for unlabelled data.
            num_images: how many images there are.
            num_clients: how many parts to make.
            rng: the only source of randomness.

        Raises:
            ConfigError: this split is impossible, e.g. by labels that do not exist.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class IID:
    """Equal parts (sizes differ by at most one) of a random permutation."""

    def split(
        self, labels: Int64[np.ndarray, " n"] | None, num_images: int, num_clients: int, rng: np.random.Generator
    ) -> Parts:
        """See `Partitioner.split`; labels are not used."""
        _check_enough(num_images, num_clients)
        return [np.sort(part) for part in np.array_split(rng.permutation(num_images), num_clients)]


@dataclass(frozen=True, kw_only=True)
class Dirichlet:
    """Label skew: every class is divided in proportions p ~ Dir(alpha 1_K) of its own.

    Hsu et al. 2019, https://arxiv.org/abs/1909.06335, in the per-class form of Yurochkin et al. 2019,
    https://arxiv.org/abs/1905.12022, that FLESD uses (Shi et al. 2021, https://arxiv.org/abs/2109.14611). A client gets
    floor(p n_class) images of a class. FLESD's authors discard what rounding leaves over; we give it to the largest
    fractions, so that the split is complete. Drawn again until every client has `min_size` images.
    """

    alpha: float  # > 0; small: few classes per client, large: nearly equal parts
    min_size: int  # images that every client has at least

    def __post_init__(self) -> None:
        _check_positive("partition.alpha", self.alpha, "0.1 is strongly skewed, 100 nearly iid")
        _check_count("partition.min_size", self.min_size)

    def split(
        self, labels: Int64[np.ndarray, " n"] | None, num_images: int, num_clients: int, rng: np.random.Generator
    ) -> Parts:
        """See `Partitioner.split`."""
        labels = _need_labels(labels, "dirichlet")
        classes = np.unique(labels)

        def draw() -> Parts:
            parts: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
            for label in classes:
                of_class = rng.permutation(np.flatnonzero(labels == label))
                sizes = apportion(rng.dirichlet(np.full(num_clients, float(self.alpha))), len(of_class))
                for part, piece in zip(parts, np.split(of_class, np.cumsum(sizes)[:-1]), strict=True):
                    part.append(piece)
            return [np.sort(np.concatenate(part)) for part in parts]

        return _redraw(draw, num_images, num_clients, self.min_size, f"partition.alpha={self.alpha}")


@dataclass(frozen=True, kw_only=True)
class Classes:
    """Label skew: every client owns `classes_per_client` classes, and each class is shared evenly by its owners.

    The split of FedEMA (Zhuang et al. 2022, https://arxiv.org/abs/2204.04385): 5 clients of 2 classes on CIFAR-10.
    Clients choose in random order among the least-owned classes, so owners per class differ by at most one.
    """

    classes_per_client: int

    def __post_init__(self) -> None:
        _check_count("partition.classes_per_client", self.classes_per_client)

    def split(
        self, labels: Int64[np.ndarray, " n"] | None, num_images: int, num_clients: int, rng: np.random.Generator
    ) -> Parts:
        """See `Partitioner.split`."""
        labels = _need_labels(labels, "classes")
        classes = np.unique(labels)
        if not len(classes) <= num_clients * self.classes_per_client or self.classes_per_client > len(classes):
            raise ConfigError(
                f"partition.classes_per_client={self.classes_per_client} with federation.num_clients={num_clients} "
                f"cannot divide {len(classes)} classes: every class needs an owner, and no client can own more classes "
                f"than there are. Choose classes_per_client between {-(-len(classes) // num_clients)} and "
                f"{len(classes)}, or raise federation.num_clients."
            )
        owners: list[list[int]] = [[] for _ in classes]
        for client in rng.permutation(num_clients):
            least_owned = sorted(rng.permutation(len(classes)), key=lambda position: len(owners[position]))
            for position in least_owned[: self.classes_per_client]:
                owners[position].append(int(client))
        parts: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
        for label, clients in zip(classes, owners, strict=True):
            of_class = rng.permutation(np.flatnonzero(labels == label))
            if len(of_class) < len(clients):
                raise ConfigError(
                    f"class {label} has {len(of_class)} images for the {len(clients)} clients that share it under "
                    f"partition=classes. Lower partition.classes_per_client={self.classes_per_client} or "
                    f"federation.num_clients={num_clients}, or use more images."
                )
            for client, piece in zip(clients, np.array_split(of_class, len(clients)), strict=True):
                parts[client].append(piece)
        return [np.sort(np.concatenate(part)) for part in parts]


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Label skew: sorted by label and cut into equal shards, of which every client draws `shards_per_client`.

    McMahan et al. 2017, section 3, https://arxiv.org/abs/1602.05629: 200 shards of 300 images, two per client.
    """

    shards_per_client: int

    def __post_init__(self) -> None:
        _check_count("partition.shards_per_client", self.shards_per_client)

    def split(
        self, labels: Int64[np.ndarray, " n"] | None, num_images: int, num_clients: int, rng: np.random.Generator
    ) -> Parts:
        """See `Partitioner.split`."""
        labels = _need_labels(labels, "shards")
        num_shards = num_clients * self.shards_per_client
        if num_images < num_shards:
            raise ConfigError(
                f"{num_images} images cannot be cut into partition.shards_per_client={self.shards_per_client} x "
                f"federation.num_clients={num_clients} = {num_shards} shards. Lower one of them or use more images."
            )
        shuffled = rng.permutation(num_images)
        by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
        shards = np.array_split(by_label, num_shards)
        drawn = rng.permutation(num_shards).reshape(num_clients, self.shards_per_client)
        return [np.sort(np.concatenate([shards[shard] for shard in own])) for own in drawn]


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """Size skew: part sizes ~ Dir(alpha 1_K), images drawn at random, labels ignored.

    Li et al. 2022, "quantity skew", https://arxiv.org/abs/2102.02079. Drawn again until every client has `min_size`.
    """

    alpha: float  # > 0; small: one client has nearly everything
    min_size: int  # images that every client has at least

    def __post_init__(self) -> None:
        _check_positive("partition.alpha", self.alpha, "0.5 is strongly skewed, 100 nearly equal")
        _check_count("partition.min_size", self.min_size)

    def split(
        self, labels: Int64[np.ndarray, " n"] | None, num_images: int, num_clients: int, rng: np.random.Generator
    ) -> Parts:
        """See `Partitioner.split`; labels are not used."""

        def draw() -> Parts:
            sizes = apportion(rng.dirichlet(np.full(num_clients, float(self.alpha))), num_images)
            return [np.sort(part) for part in np.split(rng.permutation(num_images), np.cumsum(sizes)[:-1])]

        return _redraw(draw, num_images, num_clients, self.min_size, f"partition.alpha={self.alpha}")


@dataclass(frozen=True, kw_only=True)
class File:
    """A partition that was saved: the `partition.npz` of a run, or one with the same `indices` and `offsets`.

    Positions refer to the whole train split. The file need not use every image: with `public=held_out` the public set
    is drawn from what the file leaves over, so that a run's own file gives its partition and its public images again.
    """

    path: str

    def split(
        self, labels: Int64[np.ndarray, " n"] | None, num_images: int, num_clients: int, rng: np.random.Generator
    ) -> Parts:
        """See `Partitioner.split`; neither labels nor rng are used, and the result need not be complete."""
        where = f"partition.path={self.path} ({Path(self.path).absolute()})"
        try:
            parts = parts_of(read_npz(Path(self.path)))
        except FileNotFoundError:
            raise ConfigError(f"{where} does not exist. Name the partition.npz of a run directory.") from None
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{where} is not a partition: {error}. It must be an .npz with integer arrays `indices` (the positions "
                f"of all clients, one client after the other) and `offsets` (where each client's begin, and the end)."
            ) from error
        if len(parts) != num_clients:
            raise ConfigError(
                f"{where} has {len(parts)} clients, but federation.num_clients={num_clients}. "
                f"Set federation.num_clients={len(parts)} or name another file."
            )
        indices = np.concatenate(parts)
        if len(indices) and not (indices.min() >= 0 and indices.max() < num_images):
            raise ConfigError(
                f"{where} holds positions from {indices.min()} to {indices.max()}, but the train split has "
                f"{num_images} images. Use the data (data=, data.num_images=) that the file was made for."
            )
        values, counts = np.unique(indices, return_counts=True)
        if (counts > 1).any():
            raise ConfigError(
                f"{where} gives image {values[counts > 1][0]} to more than one client. Parts are disjoint."
            )
        if empty := [client for client, part in enumerate(parts) if not len(part)]:
            raise ConfigError(f"{where} leaves client {empty[0]} without images. Every client needs at least one.")
        return [np.sort(part) for part in parts]


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """Every client's images are on a machine of its own, and nowhere else: for a deployment (`fedssl.deploy`).

    The server's `data=` is then what its probes train and test on, and no client's.
    """

    def split(
        self, labels: Int64[np.ndarray, " n"] | None, num_images: int, num_clients: int, rng: np.random.Generator
    ) -> Parts:
        """See `Partitioner.split`, except that every part is empty."""
        return [np.empty(0, np.int64) for _ in range(num_clients)]


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz; OSError if it cannot be opened, ValueError if it is damaged or something else."""
    try:
        with path.open("rb") as file:  # numpy leaves a damaged one open
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise ValueError("it is not an .npz archive")
            return dict(arrays)
    except (EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"it is not an .npz archive, or damaged: {error}") from error


def parts_of(arrays: Mapping[str, np.ndarray]) -> PackedParts:
    """The clients' positions in a partition.npz; ValueError if it has none or they are not well-formed."""
    if missing := {"indices", "offsets"} - arrays.keys():
        raise ValueError(f"it has no array `{min(missing)}`")
    indices, offsets = arrays["indices"], arrays["offsets"]
    for name, array in {"indices": indices, "offsets": offsets}.items():
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"`{name}` must be a row of integers, got {array.dtype} of shape {array.shape}")
    offsets = offsets.astype(np.int64)
    rising = len(offsets) > 1 and (np.diff(offsets) >= 0).all()
    if not rising or offsets[0] != 0 or offsets[-1] != len(indices):
        raise ValueError(f"`offsets` must rise from 0 to the {len(indices)} entries of `indices`")
    return PackedParts(indices.astype(np.int64, copy=False), offsets)


def apportion(proportions: Float[np.ndarray, " k"], total: int) -> Int64[np.ndarray, " k"]:
    """Whole numbers that sum to `total`: floor(proportion * total), and the rest by largest remainder.

    Args:
        proportions: (k,) >= 0, sum 1.
        total: >= 0.
    """
    exact = proportions * total
    sizes: Int64[np.ndarray, " k"] = np.floor(exact).astype(np.int64)
    rest = total - int(sizes.sum())
    sizes[np.argsort(sizes - exact, kind="stable")[:rest]] += 1
    return sizes


def _redraw(draw: Callable[[], Parts], num_images: int, num_clients: int, min_size: int, skew: str) -> Parts:
    """Draw until every client has `min_size` images, at most MAX_DRAWS times."""
    _check_enough(num_images, num_clients, min_size)
    for _ in range(MAX_DRAWS):
        parts = draw()
        if min(map(len, parts)) >= min_size:
            return parts
    raise ConfigError(
        f"no partition of {num_images} images with {skew} gave each of federation.num_clients={num_clients} clients "
        f"partition.min_size={min_size} images or more in {MAX_DRAWS} draws. "
        f"Raise partition.alpha, lower partition.min_size or lower federation.num_clients."
    )


def _check_enough(num_images: int, num_clients: int, min_size: int = 1) -> None:
    if num_images < num_clients * min_size:
        raise ConfigError(
            f"{num_images} images cannot give each of federation.num_clients={num_clients} clients at least {min_size}"
            f"{' (partition.min_size)' if min_size > 1 else ''}. Lower federation.num_clients"
            f"{' or partition.min_size' if min_size > 1 else ''}, hold out a smaller public set, or use more images."
        )


def _need_labels(labels: Int64[np.ndarray, " n"] | None, kind: str) -> Int64[np.ndarray, " n"]:
    if labels is None:
        raise ConfigError(
            f"partition={kind} skews clients by label, but the private data has no labels. "
            f"Choose partition=iid or partition=quantity, or labelled data (data=, data.label=)."
        )
    return labels


def _check_positive(name: str, value: object, hint: str) -> None:
    if not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"{name} must be a finite number above 0, got {value}. {hint}.")


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, got {value}.")
