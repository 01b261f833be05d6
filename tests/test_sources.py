import gzip
import hashlib
import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torchvision
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from fedssl.data import sources
from fedssl.data.images import ImageSet
from fedssl.data.sources import Source
from fedssl.errors import ConfigError, DataError

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "conf/data").glob("*.yaml"))
PUBLISHED = ["cifar10", "cifar100", "svhn", "stl10", "fashion_mnist", "tiny_imagenet"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSSL_CACHE", str(tmp_path_factory.mktemp("cache")))


def source(choice: str, **overrides: Any) -> Source:
    """What `data=<choice>` builds."""
    fields = yaml.safe_load((ROOT / f"conf/data/{choice}.yaml").read_text())
    fields.pop("defaults", None)  # of other groups, which Hydra composes
    kind = getattr(sources, fields.pop("_target_").removeprefix("fedssl.data.sources."))
    made = kind(**{**fields, **overrides})
    assert isinstance(made, Source)
    return made


def noise(num: int, size: int, seed: int = 0) -> np.ndarray:
    """(num, size, size, 3)"""
    return np.random.default_rng(seed).integers(256, size=(num, size, size, 3), dtype=np.uint8)


def pixels(images: ImageSet) -> np.ndarray:
    """(n, h, w, 3)"""
    return images.take(np.arange(len(images))).numpy().transpose(0, 2, 3, 1)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def write_parquet(
    path: Path, images: np.ndarray | list[bytes | None], names: list[str] | None = None, **columns: Any
) -> None:
    """Rows with a column `img` (if the first of `columns` does not say otherwise) in the Hugging Face layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image_column = columns.pop("image_column", "img")
    contents = [png(image) if isinstance(image, np.ndarray) else image for image in images]
    table = pyarrow.table({image_column: [{"bytes": content, "path": "x.png"} for content in contents], **columns})
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, path)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


# --- every choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", NAMES)
def test_every_yaml_builds_a_source_named_like_it(choice: str) -> None:
    made = source(choice)
    assert made.name == choice
    with pytest.raises(ConfigError, match="a split is one of train, test, got 'val'"):
        made.load("val")
    with pytest.raises(ConfigError, match=r"data.image_size must be a number of pixels, got 0"):
        source(choice, image_size=0)
    with pytest.raises(ConfigError, match=r"data.num_images must be at least 1, or null"):
        source(choice, num_images=0)


@pytest.mark.parametrize("choice", [name for name in NAMES if name != "digits"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_missing_files_say_what_would_work(choice: str, split: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        source(choice, root=str(tmp_path / "nowhere")).load(split)
    message = str(caught.value)
    assert str(tmp_path / "nowhere") in message
    assert "data.root" in message
    if choice in PUBLISHED:
        assert "data.download=true" in message
        assert f"{split}-*.parquet" in message
        assert "does not exist" in message


@pytest.mark.parametrize("choice", PUBLISHED)
@pytest.mark.parametrize("folder", ["", "{name}"])
def test_published_sets_are_read_from_parquet_too(choice: str, folder: str, tmp_path: Path) -> None:
    made = source(choice, root=str(tmp_path), image_size=32)
    for split, seed in {"train": 1, "test": 2}.items():
        path = tmp_path / folder.format(name=choice) / f"{split}-00000-of-00001.parquet"
        write_parquet(path, noise(6, 32, seed), label=[0, 1, 2, 0, 1, 1])
    for split, seed in {"train": 1, "test": 2}.items():
        images = made.load(split)
        np.testing.assert_array_equal(pixels(images), noise(6, 32, seed))
        assert images.labels is not None
        assert images.labels.tolist() == [0, 1, 2, 0, 1, 1]
        assert images.name == f"{choice}/{split}"
    if choice == "cifar10":
        assert images.classes[:3] == ("airplane", "automobile", "bird")
        assert images.num_classes == 10


@pytest.mark.skipif(not (ROOT / "../shared/data/cifar10").is_dir(), reason="no CIFAR-10 beside the repository")
def test_cifar10_beside_the_repository() -> None:
    images = source("cifar10", root=str(ROOT / "../shared/data")).load("test")
    assert (len(images), images.image_size) == (10_000, (32, 32))
    assert images.labels is not None
    assert np.bincount(images.labels).tolist() == [1000] * 10


# --- digits -----------------------------------------------------------------------------------------------------------


def test_digits_are_split_by_class_once_and_for_all() -> None:
    train, test = source("digits").load("train"), source("digits").load("test")
    assert (len(train), len(test), train.image_size) == (1437, 360, (16, 16))
    assert train.labels is not None
    assert test.labels is not None
    by_class = np.bincount(load_digits().target)
    np.testing.assert_allclose(np.bincount(test.labels), 0.2 * by_class, atol=1)
    np.testing.assert_array_equal(np.bincount(train.labels) + np.bincount(test.labels), by_class)
    everything = np.concatenate([pixels(train), pixels(test)]).reshape(1797, -1)
    assert len(np.unique(everything, axis=0)) == len(np.unique(load_digits().data, axis=0))  # nothing twice or lost


def test_digits_are_scaled_to_the_full_range() -> None:
    """At their own size nothing is interpolated: intensity 0..16 becomes 0..255 in three equal channels."""
    train = source("digits", image_size=8).load("train")
    grey = pixels(train)
    assert (grey[..., :1] == grey).all()
    expected = {tuple(np.rint(image * 255 / 16).astype(int).ravel()) for image in load_digits().images}
    assert {tuple(image.ravel()) for image in grey[..., 0].astype(int)} <= expected


@pytest.mark.parametrize("size", [32, 64, 224])
def test_usual_sizes_work(size: int) -> None:
    assert source("digits", image_size=size, num_images=5).load("train").take(np.arange(5)).shape == (5, 3, size, size)


def test_num_images_is_a_fixed_nested_choice_of_the_train_split() -> None:
    full, hundred, ten = (source("digits", num_images=n).load("train") for n in (None, 100, 10))
    assert (len(full), len(hundred), len(ten)) == (1437, 100, 10)
    assert set(ten.indices) < set(hundred.indices)
    assert ten.labels is not None
    assert full.labels is not None
    np.testing.assert_array_equal(ten.labels, full.labels[ten.indices])
    assert len(source("digits", num_images=10).load("test")) == 360
    with pytest.raises(ConfigError, match=r"data.num_images=2000 is more than the 1437 images of digits/train"):
        source("digits", num_images=2000).load("train")


# --- parquet ----------------------------------------------------------------------------------------------------------


def test_parquet_reads_all_files_in_order(tmp_path: Path) -> None:
    for part in range(3):
        write_parquet(tmp_path / f"train-{part}.parquet", noise(600, 4, part), image_column="image")
    images = source("parquet", root=str(tmp_path), image_size=4).load("train")
    np.testing.assert_array_equal(pixels(images), np.concatenate([noise(600, 4, part) for part in range(3)]))
    assert images.labels is None
    assert images.classes == ()


@pytest.mark.parametrize(
    ("labels", "names", "expected", "classes"),
    [
        ([2, 0, 1, 0], None, [2, 0, 1, 0], ("0", "1", "2")),
        ([2, 0, 1, 0], ["cat", "dog", "eel", "fox"], [2, 0, 1, 0], ("cat", "dog", "eel", "fox")),
        (["b", "a", "c", "a"], None, [1, 0, 2, 0], ("a", "b", "c")),
        ([-1, -1, -1, -1], ["cat", "dog"], None, ()),
        (pyarrow.array([None] * 4, pyarrow.int64()), None, None, ()),
    ],
)
def test_parquet_labels(
    labels: Any, names: list[str] | None, expected: list[int] | None, classes: tuple[str, ...], tmp_path: Path
) -> None:
    write_parquet(tmp_path / "train-0.parquet", noise(4, 4), names, label=labels)
    images = source("parquet", root=str(tmp_path), image_size=4).load("train")
    assert (None if images.labels is None else images.labels.tolist()) == expected
    assert images.classes == classes


def test_parquet_classes_are_those_of_the_train_split(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", noise(3, 4), label=["a", "b", "c"])
    write_parquet(tmp_path / "test-0.parquet", noise(2, 4), label=["c", "b"])
    test = source("parquet", root=str(tmp_path), image_size=4).load("test")
    assert test.labels is not None
    assert test.labels.tolist() == [2, 1]
    write_parquet(tmp_path / "test-0.parquet", noise(2, 4), label=["c", "z"])
    with pytest.raises(DataError, match=r"test-0.parquet, row 1: label='z' is none of the 3 classes"):
        source("parquet", root=str(tmp_path), image_size=4).load("test")


def test_parquet_columns_can_be_named(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "train-0.parquet",
        noise(2, 4),
        image_column="picture",
        coarse=[1, 0],
        fine_label=[3, 4],
        label=[0, 0],
    )
    images = source("parquet", root=str(tmp_path), image_size=4, image="picture", label="coarse").load("train")
    assert images.labels is not None
    assert images.labels.tolist() == [1, 0]
    with pytest.raises(DataError, match=r"no image column img or image, only picture, .* data.image="):
        source("parquet", root=str(tmp_path), image_size=4).load("train")
    with pytest.raises(DataError, match=r"no label column breed, only picture, coarse, .* data.label="):
        source("parquet", root=str(tmp_path), image_size=4, image="picture", label="breed").load("train")


def test_corrupt_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train-0.parquet"
    made = source("parquet", root=str(tmp_path), image_size=4)
    write_parquet(path, [png(noise(1, 4)[0]), b"not an image"])
    with pytest.raises(DataError, match=r"train-0.parquet, row 1 is not an image that can be decoded"):
        made.load("train")
    write_parquet(path, [png(noise(1, 4)[0]), None])
    with pytest.raises(DataError, match=r"train-0.parquet, row 1: `img` is not a struct with `bytes`"):
        made.load("train")
    write_parquet(path, noise(2, 4), label=[0, None])
    with pytest.raises(DataError, match=r"train-0.parquet, row 1: label=None is none of the 1 classes"):
        made.load("train")
    write_parquet(path, [])
    with pytest.raises(DataError, match=r"train-0.parquet .* have no rows"):
        made.load("train")
    write_parquet(path, noise(50, 16))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train-0.parquet is not a readable parquet file"):
        made.load("train")


def test_no_test_split_points_at_the_probes_data(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", noise(2, 4))
    with pytest.raises(
        DataError, match=r"test-\*.parquet .* holds train-0.parquet\).*data.test_split=.*evaluate.data="
    ):
        source("parquet", root=str(tmp_path), image_size=4).load("test")


# --- folders ----------------------------------------------------------------------------------------------------------


def write_images(folder: Path, num: int, size: int = 4, seed: int = 0, suffix: str = ".png") -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    images = noise(num, size, seed)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}{suffix}")
    return images


def folder_source(root: Path, **overrides: Any) -> Source:
    return source("image_folder", root=str(root), **{"image_size": 4, **overrides})


def test_image_folder_with_splits(tmp_path: Path) -> None:
    cats, dogs = (
        write_images(tmp_path / "train/cat", 3, seed=1),
        write_images(tmp_path / "train/dog/puppies", 2, seed=2),
    )
    test_dogs = write_images(tmp_path / "test/dog", 2, seed=3)
    (tmp_path / "train/cat/notes.txt").write_text("not an image")
    (tmp_path / "train/cat/.hidden.png").write_text("not an image")
    train, test = folder_source(tmp_path).load("train"), folder_source(tmp_path).load("test")
    np.testing.assert_array_equal(pixels(train), np.concatenate([cats, dogs]))
    np.testing.assert_array_equal(pixels(test), test_dogs)
    assert train.classes == test.classes == ("cat", "dog")
    assert train.labels is not None
    assert test.labels is not None
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 0, 0, 1, 1], [1, 1])


def test_image_folder_without_splits_is_split_by_class(tmp_path: Path) -> None:
    everything = np.concatenate([write_images(tmp_path / "cat", 10, seed=1), write_images(tmp_path / "dog", 5, seed=2)])
    train, test = folder_source(tmp_path).load("train"), folder_source(tmp_path).load("test")
    assert train.labels is not None
    assert test.labels is not None
    assert (np.bincount(train.labels).tolist(), np.bincount(test.labels).tolist()) == ([8, 4], [2, 1])
    got = np.concatenate([pixels(train), pixels(test)]).reshape(15, -1)
    np.testing.assert_array_equal(np.unique(got, axis=0), np.unique(everything.reshape(15, -1), axis=0))


@pytest.mark.parametrize("folder", ["train", "."])
def test_image_folder_unlabelled(folder: str, tmp_path: Path) -> None:
    expected = write_images(tmp_path / folder, 4)
    images = folder_source(tmp_path).load("train")
    np.testing.assert_array_equal(pixels(images), expected)
    assert (images.labels, images.classes) == (None, ())
    with pytest.raises(DataError, match=r"evaluate.data="):
        folder_source(tmp_path).load("test")


def test_image_folder_other_split_names(tmp_path: Path) -> None:
    write_images(tmp_path / "train/cat", 2)
    expected = write_images(tmp_path / "val/cat", 3, seed=1, suffix=".PNG")
    np.testing.assert_array_equal(pixels(folder_source(tmp_path, test_split="val").load("test")), expected)
    with pytest.raises(DataError, match=r"no folder .*/test \(.* holds train/, val/\). Name .* data.test_split="):
        folder_source(tmp_path).load("test")


def test_image_folder_mistakes_are_named(tmp_path: Path) -> None:
    write_images(tmp_path / "train/cat", 2)
    write_images(tmp_path / "test/dog", 2)
    with pytest.raises(DataError, match=r"test/dog is not a class of the train split .* folders are cat"):
        folder_source(tmp_path).load("test")
    (tmp_path / "train/cat/001.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(DataError, match=r"train/cat/001.png is not an image that can be decoded"):
        folder_source(tmp_path).load("train")
    write_images(tmp_path / "train", 1)
    with pytest.raises(DataError, match=r"train holds images \(000.png\) and folders with images \(cat\)"):
        folder_source(tmp_path).load("train")
    (tmp_path / "empty/train").mkdir(parents=True)
    with pytest.raises(DataError, match=r"there are no images in .*empty/train"):
        folder_source(tmp_path / "empty").load("train")


# --- the published layouts --------------------------------------------------------------------------------------------


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, classes: int) -> dict[str, tuple[np.ndarray, list[int]]]:
    dataset = getattr(torchvision.datasets, f"CIFAR{classes}")
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    key = "labels" if classes == 10 else "fine_labels"
    lists: dict[str, list[list[str]]] = {}
    expected = {}
    for split in ("train", "test"):
        images, labels, lists[split] = [], [], []
        for i, (name, _) in enumerate(getattr(dataset, f"{split}_list")):
            part = noise(4, 32, seed=i + 10 * (split == "test"))
            content = {"data": part.transpose(0, 3, 1, 2).reshape(4, -1), key: [i, 1, 2, 3]}
            (folder / name).write_bytes(pickle.dumps(content))
            lists[split].append([name, md5(folder / name)])
            images.append(part)
            labels += content[key]
        monkeypatch.setattr(dataset, f"{split}_list", lists[split])
        expected[split] = (np.concatenate(images), labels)
    meta = folder / dataset.meta["filename"]
    meta.write_bytes(pickle.dumps({dataset.meta["key"]: [f"class {i}" for i in range(classes)]}))
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": md5(meta)})
    return expected


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("folder", ["", "cifar{classes}"])
def test_cifar_as_published(classes: int, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write_cifar(tmp_path / folder.format(classes=classes), monkeypatch, classes)
    for split, (images, labels) in expected.items():
        got = source(f"cifar{classes}", root=str(tmp_path)).load(split)
        np.testing.assert_array_equal(pixels(got), images)
        assert got.labels is not None
        assert got.labels.tolist() == labels
        assert got.classes[1] == "class 1"
        assert got.num_classes == classes


def test_damaged_cifar_is_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch, 10)
    batch = tmp_path / "cifar-10-batches-py/data_batch_3"
    batch.write_bytes(pickle.dumps({"data": "other"}))
    with pytest.raises(DataError, match=r"data_batch_3 is not the published file .* data.download=true"):
        source("cifar10", root=str(tmp_path)).load("train")
    batch.unlink()
    with pytest.raises(DataError, match=r"1 of its 7 files are missing, the first is .*data_batch_3"):
        source("cifar10", root=str(tmp_path)).load("train")


def test_svhn_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored as (h, w, 3, n), the digit 0 with label 10."""
    scipy_io = pytest.importorskip("scipy.io")
    dataset = torchvision.datasets.SVHN
    images, splits = noise(3, 32), dict(dataset.split_list)
    for split in ("train", "test"):
        path = tmp_path / splits[split][1]
        scipy_io.savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": np.array([[1], [10], [9]], np.uint8)})
        splits[split] = [splits[split][0], path.name, md5(path)]
    monkeypatch.setattr(dataset, "split_list", splits)
    got = source("svhn", root=str(tmp_path)).load("test")
    np.testing.assert_array_equal(pixels(got), images)
    assert got.labels is not None
    assert got.labels.tolist() == [1, 0, 9]


def test_stl10_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored by columns, labels from 1; the unlabelled images are a choice for the train split."""
    dataset, folder = torchvision.datasets.STL10, tmp_path / "stl10_binary"
    folder.mkdir()
    images = {name: noise(3, 96, seed) for seed, name in enumerate(["train", "test", "unlabeled"])}
    lists: dict[str, list[list[str]]] = {"train": [], "test": []}
    for name, part in images.items():
        part.transpose(0, 3, 2, 1).tofile(folder / f"{name}_X.bin")
        lists["test" if name == "test" else "train"].append([f"{name}_X.bin", md5(folder / f"{name}_X.bin")])
        if name != "unlabeled":
            np.array([1, 10, 4], np.uint8).tofile(folder / f"{name}_y.bin")
            lists[name].append([f"{name}_y.bin", md5(folder / f"{name}_y.bin")])
    monkeypatch.setattr(dataset, "train_list", lists["train"])
    monkeypatch.setattr(dataset, "test_list", lists["test"])
    for split in ("train", "test"):
        got = source("stl10", root=str(tmp_path)).load(split)
        np.testing.assert_array_equal(pixels(got), images[split])
        assert got.labels is not None
        assert got.labels.tolist() == [0, 9, 3]
        assert got.classes[9] == "truck"
    unlabelled = source("stl10", root=str(tmp_path), train_split="unlabeled").load("train")
    np.testing.assert_array_equal(pixels(unlabelled), images["unlabeled"])
    assert unlabelled.labels is None
    with pytest.raises(ConfigError, match="train_split of stl10 must be train or unlabeled, got both"):
        source("stl10", train_split="both")


def test_fashion_mnist_as_published(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    grey = noise(3, 28)[..., 0]
    images = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (3, 28, 28)) + grey.tobytes()
    labels = bytes([0, 0, 8, 1]) + (3).to_bytes(4, "big") + bytes([9, 0, 4])
    for split in ("train", "t10k"):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(labels)
    got = source("fashion_mnist", root=str(tmp_path), image_size=28).load("test")
    np.testing.assert_array_equal(pixels(got), np.repeat(grey[..., None], 3, axis=-1))
    assert got.labels is not None
    assert got.labels.tolist() == [9, 0, 4]
    assert got.classes == tuple(torchvision.datasets.FashionMNIST.classes)
    assert source("fashion_mnist", root=str(tmp_path)).load("train").image_size == (32, 32)
    (raw / "train-images-idx3-ubyte").write_bytes(images[:-100])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte or train-labels-idx1-ubyte is corrupt"):
        source("fashion_mnist", root=str(tmp_path)).load("train")


@pytest.mark.parametrize("folder", ["", "tiny-imagenet-200", "tiny_imagenet/tiny-imagenet-200"])
def test_tiny_imagenet_as_published(folder: str, tmp_path: Path) -> None:
    base = tmp_path / folder
    for seed, name in enumerate(["n01443537", "n01629819"]):
        write_images(base / "train" / name / "images", 2, size=64, seed=seed, suffix=".JPEG")
    write_images(base / "val/images", 3, size=64, suffix=".JPEG")
    rows = [f"{i:03d}.JPEG\t{name}\t0\t0\t9\t9" for i, name in enumerate(["n01629819", "n01443537", "n01629819"])]
    (base / "val/val_annotations.txt").write_text("\n".join(rows) + "\n")
    train, test = (source("tiny_imagenet", root=str(tmp_path)).load(split) for split in ("train", "test"))
    assert train.labels is not None
    assert test.labels is not None
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 0, 1, 1], [1, 0, 1])
    assert train.classes == test.classes == ("n01443537", "n01629819")
    (base / "val/images/001.JPEG").unlink()
    with pytest.raises(DataError, match=r"1 of its 4 files are missing, the first is .*val/images/001.JPEG"):
        source("tiny_imagenet", root=str(tmp_path)).load("test")
    (base / "val/val_annotations.txt").write_text("000.JPEG\tn0\t0\t0\t9\t9\n")
    with pytest.raises(DataError, match=r"val_annotations.txt, line 1 names no class"):
        source("tiny_imagenet", root=str(tmp_path)).load("test")


# --- download ---------------------------------------------------------------------------------------------------------


def test_download_fetches_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fashion-MNIST through torchvision's own download, from files on this disk."""
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    dataset, resources = torchvision.datasets.FashionMNIST, []
    for name, _ in dataset.resources:
        is_images = "images" in name
        header = bytes([0, 0, 8, 3 if is_images else 1]) + (2).to_bytes(4, "big")
        content = (28).to_bytes(4, "big") * 2 + noise(2, 28)[..., 0].tobytes() if is_images else bytes([3, 1])
        (mirror / name).write_bytes(gzip.compress(header + content))
        resources.append((name, md5(mirror / name)))
    monkeypatch.setattr(dataset, "resources", resources)
    monkeypatch.setattr(dataset, "mirrors", [f"{mirror.as_uri()}/"])
    monkeypatch.setattr(
        "torchvision.datasets.utils._urlretrieve", lambda url, file, *_: shutil.copy(mirror / Path(url).name, file)
    )
    made = source("fashion_mnist", root=str(tmp_path / "root"), download=True, image_size=28)
    np.testing.assert_array_equal(pixels(made.load("train"))[..., 0], noise(2, 28)[..., 0])


@pytest.mark.parametrize("choice", PUBLISHED)
def test_a_failed_download_says_what_to_do(choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        raise OSError("network is unreachable")

    for module in ("cifar", "stl10", "mnist"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", no_network)
    monkeypatch.setattr("torchvision.datasets.svhn.download_url", no_network)
    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", no_network)
    with pytest.raises(
        DataError, match=f"cannot download {choice} to data.root=.*: network is unreachable.* by hand as"
    ):
        source(choice, root=str(tmp_path / "root"), download=True).load("train")
