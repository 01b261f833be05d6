from dataclasses import dataclass, replace

import numpy as np
import pytest

from fedssl.data.federated import federate
from fedssl.data.images import ImageSet
from fedssl.data.partition import IID, Classes
from fedssl.data.public import ClientShard, Dataset, HeldOut, PublicSet, public_fingerprint
from fedssl.errors import ConfigError


def make_images(num: int, size: int = 4, name: str = "toy/train", seed: int = 0) -> ImageSet:
    rng = np.random.default_rng(seed)
    return ImageSet(
        pixels=rng.integers(256, size=(num, 3, size, size), dtype=np.uint8),
        indices=np.arange(num),
        labels=np.sort(rng.integers(4, size=num)),
        classes=("a", "b", "c", "d"),
        name=name,
    )


@dataclass(frozen=True)
class Toy:
    """A source of 30 images."""

    name: str = "toy"
    image_size: int = 4

    def load(self, split: str) -> ImageSet:
        assert split == "train"
        return make_images(30, self.image_size, name="other/train", seed=7)


def test_fingerprint_sees_pixels_order_and_transform_only() -> None:
    images = make_images(5)
    fingerprint = public_fingerprint(images, "normalise")
    assert len(fingerprint) == 64
    copied = replace(images, pixels=images.pixels.copy(), labels=None, classes=(), name="elsewhere")
    assert public_fingerprint(copied, "normalise") == fingerprint
    doubled = replace(images, pixels=np.concatenate([images.pixels] * 2), indices=np.arange(5, 10))
    assert public_fingerprint(doubled, "normalise") == fingerprint  # the same rows of another array
    others = [
        public_fingerprint(images, "normalise otherwise"),
        public_fingerprint(images.subset([1, 0, 2, 3, 4]), "normalise"),
        public_fingerprint(images.subset([0, 1, 2, 3]), "normalise"),
        public_fingerprint(replace(images, pixels=images.pixels ^ 1), "normalise"),
        public_fingerprint(replace(images, pixels=images.pixels.reshape(5, 3, 2, 8)), "normalise"),
    ]
    assert len({fingerprint, *others}) == 6
    assert PublicSet.of(images, "normalise").fingerprint == fingerprint


def test_fingerprint_over_several_blocks() -> None:
    images = make_images(2500, size=2)
    swapped = np.arange(2500)
    swapped[[10, 2000]] = [2000, 10]
    assert public_fingerprint(images, "t") != public_fingerprint(images.subset(swapped), "t")
    assert public_fingerprint(images.subset(swapped).subset(swapped), "t") == public_fingerprint(images, "t")


def test_held_out_images_belong_to_nobody() -> None:
    train = make_images(100)
    data = federate(train, partition=IID(), public=HeldOut(size=30), num_clients=4, seed=0)
    everything = np.concatenate([data.public_positions, *data.partitions])
    np.testing.assert_array_equal(np.sort(everything), np.arange(100))
    assert len(data.public_images) == 30
    np.testing.assert_array_equal(data.public_images.indices, train.indices[data.public_positions])
    assert data.public_images.labels is None
    assert data.public_images.classes == ()
    assert (np.diff(data.public_positions) < 0).any()  # random order: a prefix is a sample


def test_the_seed_decides_which_images_are_public() -> None:
    def public(seed: int) -> np.ndarray:
        return federate(
            make_images(50), partition=IID(), public=HeldOut(size=20), num_clients=3, seed=seed
        ).public_positions

    np.testing.assert_array_equal(public(1), public(1))
    assert set(public(1)) != set(public(2))


def test_the_whole_set_but_one_image_a_client_can_be_held_out() -> None:
    data = federate(make_images(20), partition=IID(), public=HeldOut(size=16), num_clients=4, seed=0)
    assert [len(part) for part in data.partitions] == [1, 1, 1, 1]
    with pytest.raises(ConfigError, match=r"public.size=17 is too large: 20 images of toy/train .* 4 .* to 16 or less"):
        federate(make_images(20), partition=IID(), public=HeldOut(size=17), num_clients=4, seed=0)


def test_client_shard_is_partition_0() -> None:
    data = federate(
        make_images(80), partition=Classes(classes_per_client=1), public=ClientShard(), num_clients=4, seed=0
    )
    assert data.public_partition == 0
    assert data.training_partitions == (1, 2, 3)
    np.testing.assert_array_equal(np.sort(data.public_positions), data.partitions[0])
    np.testing.assert_array_equal(np.sort(np.concatenate(data.partitions)), np.arange(80))
    with pytest.raises(ConfigError, match="partition 0 is the public set"):
        data.private(0)
    with pytest.raises(ConfigError, match="leaves nobody to train"):
        federate(make_images(80), partition=IID(), public=ClientShard(), num_clients=1, seed=0)


def test_another_data_set_leaves_all_private_images_to_the_clients() -> None:
    public = Dataset(source=Toy(), size=12)
    data = federate(make_images(40), partition=IID(), public=public, num_clients=4, seed=3)
    np.testing.assert_array_equal(np.sort(np.concatenate(data.partitions)), np.arange(40))
    assert len(data.public_positions) == 0
    assert len(np.unique(data.public_images.indices)) == 12
    assert data.public_images.name == "public (other/train)"
    assert data.public_images.labels is None
    np.testing.assert_array_equal(data.public_images.indices, public.images(3).indices)
    assert set(public.images(4).indices) != set(public.images(3).indices)


def test_labels_of_another_data_set_are_for_evaluation() -> None:
    public, source = Dataset(source=Toy(), size=12), Toy().load("train")
    images, labelled = public.images(3), public.labelled(3)
    assert images.labels is None
    assert images.classes == ()
    np.testing.assert_array_equal(labelled.indices, images.indices)
    assert source.labels is not None
    np.testing.assert_array_equal(labelled.labels, source.labels[images.indices])
    assert labelled.classes == source.classes


def test_another_data_set_must_fit() -> None:
    with pytest.raises(ConfigError, match=r"public.size=31 is more than the 30 images of other/train"):
        federate(make_images(40), partition=IID(), public=Dataset(source=Toy(), size=31), num_clients=4, seed=0)
    with pytest.raises(
        ConfigError, match=r"public images \(.*other/train.*\) are decoded at \(8, 8\) .* Set public.image_size to 4"
    ):
        federate(
            make_images(40), partition=IID(), public=Dataset(source=Toy(image_size=8), size=3), num_clients=4, seed=0
        )


@pytest.mark.parametrize("size", [0, -3])
def test_size_is_checked(size: int) -> None:
    with pytest.raises(ConfigError, match=f"public.size must be a whole number of at least 1, got {size}"):
        HeldOut(size=size)
    with pytest.raises(ConfigError, match=r"public.size must be"):
        Dataset(source=Toy(), size=size)
