import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedssl.data.federated import FederatedData, federate
from fedssl.data.images import ImageSet
from fedssl.data.partition import Dirichlet, File, PackedParts, Quantity
from fedssl.data.public import ClientShard, Dataset, HeldOut, Public
from fedssl.errors import ConfigError, DataError
from tests.test_public import Toy, make_images


def make(public: Public, num_clients: int = 4, seed: int = 0) -> FederatedData:
    return federate(
        make_images(120), partition=Dirichlet(alpha=0.5, min_size=3), public=public, num_clients=num_clients, seed=seed
    )


@pytest.mark.parametrize("public", [HeldOut(size=30), ClientShard(), Dataset(source=Toy(), size=9)])
def test_saved_and_loaded_is_the_same(public: Public, tmp_path: Path) -> None:
    data = make(public)
    data.save(tmp_path / "partition.npz")
    other = public.images(0) if isinstance(public, Dataset) else None
    loaded = FederatedData.load(tmp_path / "partition.npz", data.train, other)
    assert loaded.public_partition == data.public_partition
    np.testing.assert_array_equal(loaded.public_images.indices, data.public_images.indices)
    assert loaded.public_images.labels is None
    assert loaded.public_images.digest == data.public_images.digest
    for a, b in zip(loaded.partitions, data.partitions, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [path.name for path in tmp_path.iterdir()] == ["partition.npz"]


def test_the_file_can_be_drawn_without_the_images(tmp_path: Path) -> None:
    data = make(HeldOut(size=30))
    data.save(tmp_path / "partition.npz")
    with np.load(tmp_path / "partition.npz", allow_pickle=False) as arrays:
        assert arrays["classes"].tolist() == ["a", "b", "c", "d"]
        np.testing.assert_array_equal(np.diff(arrays["offsets"]), [len(part) for part in data.partitions])
        np.testing.assert_array_equal(arrays["indices"], np.concatenate(data.partitions))
        np.testing.assert_array_equal(arrays["public"], data.public_positions)
        assert data.train.labels is not None
        for client, part in enumerate(data.partitions):
            for label in range(4):
                assert arrays["counts"][client, label] == sum(data.train.labels[i] == label for i in part)


def test_unlabelled_data_has_no_counts(tmp_path: Path) -> None:
    train = replace(make_images(40), labels=None, classes=())
    data = federate(train, partition=Quantity(alpha=1.0, min_size=1), public=HeldOut(size=5), num_clients=3, seed=0)
    data.save(tmp_path / "partition.npz")
    with np.load(tmp_path / "partition.npz", allow_pickle=False) as arrays:
        assert arrays["counts"].shape == (3, 0)
        assert arrays["classes"].shape == (0,)
    assert FederatedData.load(tmp_path / "partition.npz", train).private(2).labels is None


def test_private_images_are_the_clients_own() -> None:
    data = make(HeldOut(size=30))
    private = data.private(2)
    np.testing.assert_array_equal(private.indices, data.partitions[2])
    assert private.pixels is data.train.pixels  # shared, not copied
    assert private.name == "toy/train, partition 2"
    for partition_id in (-1, 4):
        with pytest.raises(ConfigError, match=f"there is no partition {partition_id}: there are 4"):
            data.private(partition_id)


def test_public_kinds_share_the_partition_of_the_seed() -> None:
    """Runs that differ in the public set alone stay comparable: client_shard and dataset split the same images."""
    shard, other = make(ClientShard()), make(Dataset(source=Toy(), size=9))
    assert all(np.array_equal(a, b) for a, b in zip(shard.partitions, other.partitions, strict=True))
    assert not all(
        np.array_equal(a, b) for a, b in zip(shard.partitions, make(ClientShard(), seed=1).partitions, strict=True)
    )


def test_a_saved_partition_gives_partition_and_public_images_again(tmp_path: Path) -> None:
    """Under another seed too: positions of the file are positions in the whole train split."""
    data = make(HeldOut(size=30))
    data.save(tmp_path / "partition.npz")
    file = File(path=str(tmp_path / "partition.npz"))
    again = federate(data.train, partition=file, public=HeldOut(size=30), num_clients=4, seed=5)
    assert all(np.array_equal(a, b) for a, b in zip(again.partitions, data.partitions, strict=True))
    assert set(again.public_positions) == set(data.public_positions)
    with pytest.raises(ConfigError, match=r"public.size=31 is too large: 30 images .* free .* Set public.size to 30"):
        federate(data.train, partition=file, public=HeldOut(size=31), num_clients=4, seed=5)


def test_other_images_are_refused(tmp_path: Path) -> None:
    data = make(HeldOut(size=30))
    data.save(tmp_path / "partition.npz")
    with pytest.raises(DataError, match=r"partitions other images than toy/train holds now"):
        FederatedData.load(tmp_path / "partition.npz", make_images(120, seed=1))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "partition.npz"
    data = make(Dataset(source=Toy(), size=9))
    with pytest.raises(DataError, match=r"cannot read the partition .*partition.npz"):
        FederatedData.load(path, data.train)
    data.save(path)
    with pytest.raises(ConfigError, match=r"come from another data set: pass `public_images`"):
        FederatedData.load(path, data.train)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"cannot read the partition .*partition.npz"):
        FederatedData.load(path, data.train)


def test_many_clients_cost_a_process_what_their_positions_are(tmp_path: Path) -> None:
    """A worker loads them all, and has them for nobody but the few it is asked for."""
    clients = 20_000
    parts = PackedParts.of(np.arange(4 * clients).reshape(clients, 4))
    train = ImageSet(
        pixels=np.zeros((1, 3, 1, 1), np.uint8),
        indices=np.zeros(4 * clients + 1, np.int64),
        labels=None,
        classes=(),
        name="zeros",
    )
    data = FederatedData(
        train=train,
        public_images=train.subset([4 * clients]),
        public_positions=np.array([4 * clients]),
        partitions=parts,
        public_partition=None,
    )
    data.save(tmp_path / "partition.npz")
    tracemalloc.start()
    try:
        loaded = FederatedData.load(tmp_path / "partition.npz", train)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 1.2 * 8 * (4 * clients + clients)  # positions and offsets
    assert len(loaded.partitions) == clients
    np.testing.assert_array_equal(loaded.partitions[-1], parts[clients - 1])
    assert [list(part) for part in loaded.partitions[1:3]] == [[4, 5, 6, 7], [8, 9, 10, 11]]
    with pytest.raises(IndexError):
        loaded.partitions[clients]
