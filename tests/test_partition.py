import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedssl.data.partition import (
    IID,
    Classes,
    Dirichlet,
    File,
    Partitioner,
    Quantity,
    Shards,
    apportion,
)
from fedssl.errors import ConfigError

KINDS: list[Partitioner] = [
    IID(),
    Dirichlet(alpha=0.3, min_size=1),
    Classes(classes_per_client=2),
    Shards(shards_per_client=2),
    Quantity(alpha=0.5, min_size=1),
]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def labels_of(num_images: int, num_classes: int, seed: int = 0) -> np.ndarray:
    return rng(seed).integers(num_classes, size=num_images)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
@settings(max_examples=20, deadline=None)
@given(num_images=st.integers(60, 400), num_clients=st.integers(2, 8), seed=st.integers(0, 2**32))
def test_a_partition_is_a_disjoint_cover_without_empty_clients(
    kind: Partitioner, num_images: int, num_clients: int, seed: int
) -> None:
    labels = labels_of(num_images, 4, seed)
    parts = kind.split(labels, num_images, num_clients, rng(seed))
    assert len(parts) == num_clients
    assert all(len(part) and part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(num_images))
    again = kind.split(labels, num_images, num_clients, rng(seed))
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_other_generators_give_other_partitions(kind: Partitioner) -> None:
    labels = labels_of(200, 4)
    one, two = (kind.split(labels, 200, 4, rng(seed)) for seed in (0, 1))
    assert not all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


@given(
    weights=st.lists(st.floats(0, 1), min_size=1, max_size=12).filter(lambda w: sum(w) > 1e-3),
    total=st.integers(0, 500),
)
def test_apportion_is_within_one_of_exact(weights: list[float], total: int) -> None:
    proportions = np.array(weights) / sum(weights)
    sizes = apportion(proportions, total)
    assert sizes.sum() == total
    assert (np.abs(sizes - proportions * total) < 1 + 1e-6).all()


def test_apportion_by_hand() -> None:
    """2.5, 1.3 and 1.2: floors 2, 1, 1, and the one that is left goes to the largest fraction."""
    np.testing.assert_array_equal(apportion(np.array([0.5, 0.26, 0.24]), 5), [3, 1, 1])


def test_iid_parts_are_equal() -> None:
    assert sorted(map(len, IID().split(None, 11, 3, rng()))) == [3, 4, 4]


def test_dirichlet_follows_the_drawn_proportions() -> None:
    """Literal transcription of the paper's rule, from the same draws: floor(p n_class), and at most one more."""
    labels = np.repeat(np.arange(3), [50, 80, 31])
    parts = Dirichlet(alpha=5.0, min_size=1).split(labels, len(labels), 4, rng(3))
    draws = rng(3)
    for label, count in [(0, 50), (1, 80), (2, 31)]:
        draws.permutation(count)  # the order in which the images of the class are given out
        proportions = draws.dirichlet([5.0] * 4)
        for part, proportion in zip(parts, proportions, strict=True):
            got = (labels[part] == label).sum()
            assert got in (math.floor(proportion * count), math.floor(proportion * count) + 1)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_dirichlet_shares_have_the_moments_of_the_distribution(alpha: float) -> None:
    """Share of one class ~ Dir(alpha 1_K): mean 1/K, variance (1/K)(1 - 1/K)/(K alpha + 1)."""
    clients, per_class = 5, 1000
    labels = np.repeat(np.arange(40), per_class)
    kind = Dirichlet(alpha=alpha, min_size=1)
    shares = np.concatenate([_shares(kind.split(labels, len(labels), clients, rng(s)), labels, 40) for s in range(10)])
    expected = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    assert shares.mean() == pytest.approx(1 / clients, rel=1e-6)  # nothing is lost
    assert shares.var() == pytest.approx(expected, rel=0.12)


def _shares(parts: list[np.ndarray], labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(clients, classes): what share of a class a client got."""
    counts = np.stack([np.bincount(labels[part], minlength=num_classes) for part in parts])
    return counts / np.bincount(labels, minlength=num_classes)


def test_min_size_is_kept() -> None:
    labels = labels_of(300, 10)
    for seed in range(20):
        for kind in (Dirichlet(alpha=0.1, min_size=12), Quantity(alpha=0.5, min_size=12)):
            assert min(map(len, kind.split(labels, 300, 6, rng(seed)))) >= 12


@given(num_clients=st.integers(1, 12), classes_per_client=st.integers(1, 6), seed=st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_classes_are_covered_evenly(num_clients: int, classes_per_client: int, seed: int) -> None:
    labels = np.repeat(np.arange(6), 40)
    kind = Classes(classes_per_client=classes_per_client)
    if num_clients * classes_per_client < 6:
        with pytest.raises(ConfigError, match="every class needs an owner"):
            kind.split(labels, len(labels), num_clients, rng(seed))
        return
    shares = _shares(kind.split(labels, len(labels), num_clients, rng(seed)), labels, 6)
    assert ((shares > 0).sum(axis=1) == classes_per_client).all()
    owners = (shares > 0).sum(axis=0)
    assert owners.max() - owners.min() <= 1
    for label in range(6):
        sizes = shares[shares[:, label] > 0, label] * 40
        assert sizes.max() - sizes.min() <= 1 + 1e-9


def test_shards_hold_at_most_one_border_each() -> None:
    """12 shards of 10 images over 4 classes of 30: no shard has two borders, so 2 shards have at most 4 classes."""
    labels = rng(1).permutation(np.repeat(np.arange(4), 30))
    parts = Shards(shards_per_client=2).split(labels, 120, 6, rng())
    assert {len(part) for part in parts} == {20}
    assert all(len(np.unique(labels[part])) <= 2 for part in parts)  # 30 is a multiple of 10: no border inside a shard


def test_quantity_ignores_labels() -> None:
    kind = Quantity(alpha=0.5, min_size=1)
    with_labels, without = (kind.split(labels, 100, 4, rng()) for labels in (labels_of(100, 3), None))
    assert all(np.array_equal(a, b) for a, b in zip(with_labels, without, strict=True))
    assert len(set(map(len, without))) > 1


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_label_skew_needs_labels(kind: Partitioner) -> None:
    if isinstance(kind, IID | Quantity):
        assert len(kind.split(None, 100, 3, rng())) == 3
    else:
        with pytest.raises(ConfigError, match=r"no labels. Choose partition=iid or partition=quantity"):
            kind.split(None, 100, 3, rng())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dirichlet(alpha=0.0, min_size=1), "partition.alpha must be a finite number above 0, got 0.0"),
        (lambda: Dirichlet(alpha=math.nan, min_size=1), "partition.alpha must be a finite number above 0, got nan"),
        (lambda: Quantity(alpha=-1.0, min_size=1), "partition.alpha must be"),
        (lambda: Dirichlet(alpha=1.0, min_size=0), "partition.min_size must be a whole number of at least 1, got 0"),
        (lambda: Classes(classes_per_client=0), "partition.classes_per_client must be"),
        (lambda: Shards(shards_per_client=0), "partition.shards_per_client must be"),
    ],
)
def test_bad_numbers_are_named(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_impossible_splits_say_what_to_change() -> None:
    labels = np.repeat(np.arange(10), 10)
    with pytest.raises(
        ConfigError, match=r"alpha=0.001 gave .*num_clients=20.* in 100 draws. Raise partition.alpha, l"
    ):
        Dirichlet(alpha=0.001, min_size=2).split(labels, 100, 20, rng())
    with pytest.raises(
        ConfigError, match=r"100 images cannot give each of federation.num_clients=11 clients at least 10"
    ):
        Quantity(alpha=1.0, min_size=10).split(None, 100, 11, rng())
    with pytest.raises(ConfigError, match=r"3 images cannot give each of federation.num_clients=4"):
        IID().split(None, 3, 4, rng())
    with pytest.raises(ConfigError, match=r"Choose classes_per_client between 5 and 10"):
        Classes(classes_per_client=4).split(labels, 100, 2, rng())
    with pytest.raises(ConfigError, match=r"class 0 has 10 images for the 11 clients"):
        Classes(classes_per_client=10).split(labels, 100, 11, rng())
    with pytest.raises(ConfigError, match=r"cannot be cut into partition.shards_per_client=30 x .* = 120 shards"):
        Shards(shards_per_client=30).split(labels, 100, 4, rng())


def save(path: Path, indices: list[int], offsets: list[int]) -> File:
    np.savez(path, indices=np.array(indices), offsets=np.array(offsets))
    return File(path=str(path))


def test_file_gives_what_was_saved(tmp_path: Path) -> None:
    kind = save(tmp_path / "p.npz", [3, 1, 0, 7], [0, 2, 4])
    assert [part.tolist() for part in kind.split(None, 8, 2, rng())] == [[1, 3], [0, 7]]


@pytest.mark.parametrize(
    ("indices", "offsets", "message"),
    [
        ([0, 1], [0, 1, 1, 2], "has 3 clients, but federation.num_clients=2. Set federation.num_clients=3"),
        ([0, 8], [0, 1, 2], "positions from 0 to 8, but the train split has 8 images"),
        ([-1, 3], [0, 1, 2], "positions from -1 to 3"),
        ([0, 5, 5], [0, 2, 3], "image 5 to more than one client"),
        ([0, 5], [0, 2, 2], "leaves client 1 without images"),
        ([0, 5], [0, 2, 1], "`offsets` must rise from 0 to the 2 entries"),
    ],
)
def test_file_is_checked(tmp_path: Path, indices: list[int], offsets: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        save(tmp_path / "p.npz", indices, offsets).split(None, 8, 2, rng())


def test_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing.npz.* does not exist"):
        File(path=str(tmp_path / "missing.npz")).split(None, 8, 2, rng())
    for name, content in {"text.npz": b"no zip", "empty.npz": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"{name}.* is not a partition"):
            File(path=str(tmp_path / name)).split(None, 8, 2, rng())
    np.savez(tmp_path / "other.npz", indices=np.arange(3))
    with pytest.raises(ConfigError, match=r"is not a partition: .*offsets"):
        File(path=str(tmp_path / "other.npz")).split(None, 8, 2, rng())
    np.save(tmp_path / "array.npy", np.arange(3))
    with pytest.raises(ConfigError, match=r"array.npy.* is not a partition: it is not an .npz archive"):
        File(path=str(tmp_path / "array.npy")).split(None, 8, 2, rng())
    np.savez(tmp_path / "float.npz", indices=np.zeros(3), offsets=np.array([0, 3]))
    with pytest.raises(ConfigError, match="must be a row of integers, got float64"):
        File(path=str(tmp_path / "float.npz")).split(None, 8, 1, rng())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_numbers_have_no_defaults(kind: Partitioner) -> None:
    assert all(field.default is dataclasses.MISSING for field in dataclasses.fields(kind))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_dirichlet_agrees_with_flwr_datasets() -> None:
    """Spread of a class over clients, and number of clients that own nearly nothing of it, over 20 partitions."""
    flwr_datasets, datasets = pytest.importorskip("flwr_datasets.partitioner"), pytest.importorskip("datasets")
    clients, classes = 5, 10
    labels = np.repeat(np.arange(classes), 200)
    table = datasets.Dataset.from_dict({"label": labels})
    for alpha in (0.1, 1.0):
        ours, theirs = [], []
        for seed in range(20):
            kind = Dirichlet(alpha=alpha, min_size=1)
            ours.append(_shares(kind.split(labels, len(labels), clients, rng(seed)), labels, classes))
            oracle = flwr_datasets.DirichletPartitioner(
                clients, "label", alpha, min_partition_size=1, self_balancing=False, seed=seed
            )
            oracle.dataset = table
            parts = [np.array(oracle.load_partition(client)["label"]) for client in range(clients)]
            counts = np.stack([np.bincount(part, minlength=classes) for part in parts])
            assert counts.sum() == len(labels)  # every sample once
            theirs.append(counts / 200)
        assert np.std(ours) == pytest.approx(np.std(theirs), rel=0.05)
        assert np.mean(np.array(ours) < 0.02) == pytest.approx(np.mean(np.array(theirs) < 0.02), abs=0.04)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("clients", [10, 20])
def test_classes_agree_with_flwr_datasets(clients: int) -> None:
    """2 of 10 classes: the same sizes of all (client, class) cells, up to their order.

    At multiples of 10 clients: at others the oracle's deterministic assignment leaves classes without an owner.
    """
    flwr_datasets, datasets = pytest.importorskip("flwr_datasets.partitioner"), pytest.importorskip("datasets")
    labels = np.repeat(np.arange(10), np.arange(60, 70))
    oracle = flwr_datasets.PathologicalPartitioner(clients, "label", 2, class_assignment_mode="deterministic")
    oracle.dataset = datasets.Dataset.from_dict({"label": labels})
    theirs = [np.bincount(oracle.load_partition(client)["label"], minlength=10) for client in range(clients)]
    parts = Classes(classes_per_client=2).split(labels, len(labels), clients, rng())
    ours = [np.bincount(labels[part], minlength=10) for part in parts]
    np.testing.assert_array_equal(np.sort(np.ravel(ours)), np.sort(np.ravel(theirs)))
