"""Where images come from. Every source finds its files, and gives its splits as image sets of one size.

A source is a small class with the fields of its YAML (`conf/data/`) and one method `load`; the images go through the
cache (`fedssl.data.cache`), so that opening a split again is a memory map.
"""

import math
import os
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int64, UInt8

from fedssl.data.cache import Undecoded, cached
from fedssl.data.images import ImageSet
from fedssl.data.parquet import ParquetTable, parquet_files
from fedssl.data.partition import apportion
from fedssl.errors import ConfigError, DataError
from fedssl.seeding import numpy_generator

SPLITS = ("train", "test")
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@runtime_checkable
class Source(Protocol):
    """A data set of images of one size, with a train and perhaps a test split."""

    @property
    def name(self) -> str:
        """For messages, results and the cache."""
        ...

    @property
    def image_size(self) -> int:
        """Height and width in pixels; other images are resized (shorter side) and centre-cropped."""
        ...

    def load(self, split: str) -> ImageSet:
        """The split "train" (of which `num_images` are kept) or "test".

        Raises:
            DataError: files are missing or corrupt; the message names them.
            ConfigError: a setting does not fit the data.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Digits:
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn bundles (UCI ML repository), upsampled to RGB."""

    name: str
    num_images: int | None  # of the train split; None: all
    image_size: int
    test_fraction: float  # of each class, in a fixed random split

    def __post_init__(self) -> None:
        _check_fields(self.image_size, self.num_images)
        _check_test_fraction(self.test_fraction)

    def load(self, split: str) -> ImageSet:
        """See `Source.load`."""
        _check_split(split)

        def read() -> Undecoded:
            from sklearn.datasets import load_digits  # takes a second to import, and the cache needs it once

            digits = load_digits()
            images = torch.from_numpy(digits.images)[:, None] * (255 / 16)  # intensities are 0..16
            images = F.interpolate(images, size=(self.image_size, self.image_size), mode="bilinear", antialias=True)
            pixels = images.round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
            labels = digits.target.astype(np.int64)
            chosen = _stratified_split(labels, self.test_fraction)[split]
            return _undecoded_array("digits", pixels[chosen], labels[chosen], [str(d) for d in digits.target_names])

        images = cached(
            name=f"{self.name}/{split}",
            image_size=self.image_size,
            recipe=f"digits of scikit-learn {version('scikit-learn')}, {split}, test fraction {self.test_fraction}",
            files=[],
            root=None,
            read=read,
        )
        return _first_images(images, split, self.num_images)


@dataclass(frozen=True, kw_only=True)
class Parquet:
    """A folder with `<split>-*.parquet` in the Hugging Face image layout.

    The image column is a struct with `bytes`. Labels may be integers, with class names from the Hugging Face metadata
    if there are any, or strings. Classes are those of the train split.
    """

    name: str
    root: str
    num_images: int | None  # of the train split; None: all
    image_size: int
    train_split: str  # file names before the first "-"
    test_split: str
    image: str | None  # column; None: img or image
    label: str | None  # column; None: label, fine_label or labels, else unlabelled

    def __post_init__(self) -> None:
        _check_fields(self.image_size, self.num_images)

    def load(self, split: str) -> ImageSet:
        """See `Source.load`."""
        _check_split(split)
        root = Path(self.root).expanduser()
        prefixes = {"train": self.train_split, "test": self.test_split}
        files = {key: parquet_files(root, prefix) for key, prefix in prefixes.items()}
        if not files[split]:
            raise DataError(
                f"no files {prefixes[split]}-*.parquet for the {split} split of data={self.name} in data.root="
                f"{self.root} ({root.absolute()}, which {_content(root)}). Set data.root= to the folder that holds "
                f"them, or name their prefix with data.{split}_split=.{_NO_TEST if split == 'test' else ''}"
            )
        table = ParquetTable(
            files=files[split],
            class_files=files["train"] or files["test"],
            image=self.image,
            label=self.label,
            class_names=(),
        )
        images = cached(
            name=f"{self.name}/{split}",
            image_size=self.image_size,
            recipe=table.recipe,
            files=table.all_files,
            root=root,
            read=table.read,
        )
        return _first_images(images, split, self.num_images)


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Image files in folders: `<root>/<split>/<class>/*.jpg`, or `<root>/<class>/*.jpg`, which is split at random.

    Images directly in `<root>/<split>`, or in `<root>` (then all are the train split), are unlabelled. Classes are the
    folder names of the train split in alphabetical order; deeper folders belong to their class.
    """

    name: str
    root: str
    num_images: int | None  # of the train split; None: all
    image_size: int
    train_split: str  # folder names
    test_split: str
    test_fraction: float  # of each class, in a fixed random split where there are no split folders

    def __post_init__(self) -> None:
        _check_fields(self.image_size, self.num_images)
        _check_test_fraction(self.test_fraction)

    def load(self, split: str) -> ImageSet:
        """See `Source.load`."""
        _check_split(split)
        root = Path(self.root).expanduser()
        if not root.is_dir():
            raise DataError(
                f"data.root={self.root} ({root.absolute()}) is not a folder. data={self.name} reads {self._layouts}."
            )
        split_folders = {"train": root / self.train_split, "test": root / self.test_split}
        if any(folder.is_dir() for folder in split_folders.values()):
            folder = split_folders[split]
            if not folder.is_dir():
                raise DataError(
                    f"data={self.name} has no {split} split: there is no folder {folder} ({root} {_content(root)}). "
                    f"Name the folder with data.{split}_split=.{_NO_TEST if split == 'test' else ''}"
                )
            classes = _class_folders(split_folders["train"]) or _class_folders(folder)
            files, labels = self._find(folder, classes)
        else:
            classes = _class_folders(root)
            files, labels = self._find(root, classes)
            if labels is not None:
                chosen = _stratified_split(np.unique(labels, return_inverse=True)[1], self.test_fraction)[split]
                files, labels = [files[i] for i in chosen], [labels[i] for i in chosen]
            elif split == "test":
                raise DataError(f"the images in {root} have no class folders, so all are the train split.{_NO_TEST}")

        counts = "unlabelled" if labels is None else [(name, labels.count(name)) for name in classes]
        images = cached(
            name=f"{self.name}/{split}",
            image_size=self.image_size,
            recipe=f"sorted image files: {counts}",
            files=files,
            root=root,
            read=lambda: _undecoded_files(files, labels, classes),
        )
        return _first_images(images, split, self.num_images)

    def _find(self, folder: Path, classes: list[str]) -> tuple[list[Path], list[str] | None]:
        """Files in a fixed order, sorted by class, and their classes (None where they lie in `folder` directly)."""
        direct = sorted(file for file in folder.iterdir() if _is_image(file))
        own_classes = _class_folders(folder)
        if direct and own_classes:
            raise DataError(
                f"{folder} holds images ({direct[0].name}) and folders with images ({own_classes[0]}): it must be "
                f"either labelled or not. data={self.name} reads {self._layouts}."
            )
        if unknown := sorted(set(own_classes) - set(classes)):
            raise DataError(
                f"{folder / unknown[0]} is not a class of the train split {folder.parent / self.train_split}, "
                f"whose folders are {', '.join(classes[:10]) or 'none'}. Both splits must name the same classes."
            )
        if direct:
            return direct, None
        found = [(file, name) for name in own_classes for file in _images_below(folder / name)]
        if not found:
            raise DataError(f"there are no images in {folder}. data={self.name} reads {self._layouts}.")
        return [file for file, _ in found], [name for _, name in found]

    @property
    def _layouts(self) -> str:
        return (
            f"<root>/{self.train_split}/<class>/*.jpg (and {self.test_split}), <root>/<class>/*.jpg, or unlabelled "
            f"images in <root>/{self.train_split} or <root>; set data.root to such a folder"
        )


@dataclass(frozen=True, kw_only=True)
class _Published:
    """A published set: in its authors' layout under `root`, or as `<root>/<name>/<split>-*.parquet`."""

    layout: ClassVar[str]  # the authors', for messages
    class_names: ClassVar[Sequence[str]] = ()  # of labels that come without names
    parquet_test: ClassVar[Sequence[str]] = ("test",)  # what the names of the test split's parquet files begin with

    name: str
    root: str
    download: bool  # fetch what is missing
    num_images: int | None  # of the train split; None: all
    image_size: int

    def __post_init__(self) -> None:
        _check_fields(self.image_size, self.num_images)

    def load(self, split: str) -> ImageSet:
        """See `Source.load`."""
        _check_split(split)
        root = Path(self.root).expanduser()
        if (table := self._parquet(root, split)) is not None:
            recipe, files, read = table.recipe, table.all_files, table.read
        else:
            base, files = self._locate(root, split)
            recipe = f"{type(self).__name__} as published, {self._subset(split)}"

            def read() -> Undecoded:
                return self._read(base, split)

        images = cached(
            name=f"{self.name}/{split}", image_size=self.image_size, recipe=recipe, files=files, root=root, read=read
        )
        return _first_images(images, split, self.num_images)

    def _parquet(self, root: Path, split: str) -> ParquetTable | None:
        prefixes = self.parquet_test if split == "test" else (self._subset(split),)
        for folder, prefix in product((root / self.name, root), prefixes):
            if files := parquet_files(folder, prefix):
                train = parquet_files(folder, "train") if split == "test" else []
                return ParquetTable(
                    files=files, class_files=train or files, image=None, label=None, class_names=self.class_names
                )
        return None

    def _locate(self, root: Path, split: str) -> tuple[Path, list[Path]]:
        """The folder of the authors' layout, downloaded if need be and wanted, and the files of the split."""
        lacking = ""
        for base in (root, root / self.name):
            files = self._files(base, split)
            missing = [file for file in files if not file.is_file()]
            if files and not missing:
                return base, files
            if len(missing) < len(files):
                lacking = f" {len(missing)} of its {len(files)} files are missing, the first is {missing[0]}."
        if not self.download:
            raise DataError(
                f"data={self.name}: the {split} split is neither in data.root={self.root} ({root.absolute()}, which "
                f"{_content(root)}) nor in its folder {self.name}/. Looked for the published layout ({self.layout}) "
                f"and for {self._subset(split)}-*.parquet.{lacking} "
                f"Set data.root= to the folder that holds them, or download them with data.download=true."
            )
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._fetch(root, split)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"cannot download {self.name} to data.root={self.root} ({root.absolute()}): {error}. "
                f"Put the files there by hand as {self.layout}, or set data.root= to where they are."
            ) from error
        return root, self._files(root, split)

    def _subset(self, split: str) -> str:
        """What the publishers call the split."""
        return split

    @abstractmethod
    def _files(self, base: Path, split: str) -> list[Path]:
        """The published files of a split if they lie below `base`; those that are listed need not exist."""

    @abstractmethod
    def _read(self, base: Path, split: str) -> Undecoded:
        """Read them; DataError where they are not what was published."""

    @abstractmethod
    def _fetch(self, root: Path, split: str) -> None:
        """Download them to `root`."""


@dataclass(frozen=True, kw_only=True)
class CIFAR(_Published):
    """CIFAR-10 and CIFAR-100: 50,000 and 10,000 images of 32x32 in 10 or 100 (fine) classes (Krizhevsky 2009)."""

    num_classes: int  # 10 or 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_classes not in (10, 100):
            raise ConfigError(f"data.num_classes of CIFAR must be 10 or 100, got {self.num_classes}.")

    @property
    def layout(self) -> str:  # type: ignore[override]
        """The authors', for messages."""
        return "cifar-10-batches-py/data_batch_1, ..." if self.num_classes == 10 else "cifar-100-python/train, test"

    @property
    def class_names(self) -> Sequence[str]:  # type: ignore[override]
        """Of labels that come without names."""
        ten = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
        return ten if self.num_classes == 10 else ()

    def _files(self, base: Path, split: str) -> list[Path]:
        return [base / self._dataset.base_folder / name for name in self._checksums()]  # torchvision wants them all

    def _read(self, base: Path, split: str) -> Undecoded:
        folder = base / self._dataset.base_folder
        for name, md5 in self._checksums().items():
            _check_md5(folder / name, md5)  # before anything is unpickled
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # today's numpy remarks on how that of 2009 pickled a dtype
            dataset = self._dataset(base, train=split == "train")
        return _undecoded_array(folder, dataset.data, np.array(dataset.targets), dataset.classes)

    def _fetch(self, root: Path, split: str) -> None:
        self._dataset(root, download=True)

    def _checksums(self) -> dict[str, str]:
        lists, meta = self._dataset.train_list + self._dataset.test_list, self._dataset.meta
        return {**dict(lists), meta["filename"]: meta["md5"]}

    @property
    def _dataset(self) -> Any:
        return _torchvision(f"CIFAR{self.num_classes}")


class SVHN(_Published):
    """Street View House Numbers, cropped: 73,257 and 26,032 digits of 32x32 (Netzer et al. 2011)."""

    layout = "train_32x32.mat, test_32x32.mat"
    class_names = tuple("0123456789")

    def _files(self, base: Path, split: str) -> list[Path]:
        return [base / _torchvision("SVHN").split_list[split][1]]

    def _read(self, base: Path, split: str) -> Undecoded:
        dataset = _torchvision("SVHN")
        [file] = self._files(base, split)
        _check_md5(file, dataset.split_list[split][2])
        data = dataset(base, split=split)
        return _undecoded_array(file, data.data.transpose(0, 2, 3, 1), data.labels, self.class_names)

    def _fetch(self, root: Path, split: str) -> None:
        _torchvision("SVHN")(root, split=split, download=True)


@dataclass(frozen=True, kw_only=True)
class STL10(_Published):
    """STL-10: 5,000 and 8,000 labelled images of 96x96 in 10 classes, and 100,000 unlabelled (Coates et al. 2011)."""

    train_split: str  # "train" (labelled) or "unlabeled"

    layout = "stl10_binary/train_X.bin, train_y.bin, ..."
    class_names = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_split not in ("train", "unlabeled"):
            raise ConfigError(f"data.train_split of stl10 must be train or unlabeled, got {self.train_split}.")

    def _subset(self, split: str) -> str:
        return self.train_split if split == "train" else split

    def _files(self, base: Path, split: str) -> list[Path]:
        subset = self._subset(split)
        names = ["unlabeled_X.bin"] if subset == "unlabeled" else [f"{subset}_X.bin", f"{subset}_y.bin"]
        return [base / _torchvision("STL10").base_folder / name for name in names]

    def _read(self, base: Path, split: str) -> Undecoded:
        dataset = _torchvision("STL10")  # its own reader would check the 2.5 GB of all splits
        checksums = dict(dataset.train_list + dataset.test_list)
        files = self._files(base, split)
        for file in files:
            _check_md5(file, checksums[file.name])
        contents = [np.fromfile(file, dtype=np.uint8) for file in files]
        pixels = contents[0].reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)  # stored by columns
        if len(contents) == 1:
            return _undecoded_array(files[0], pixels, None, ())
        return _undecoded_array(files[0], pixels, contents[1].astype(np.int64) - 1, self.class_names)

    def _fetch(self, root: Path, split: str) -> None:
        _torchvision("STL10")(root, download=True)


class FashionMNIST(_Published):
    """Fashion-MNIST: 60,000 and 10,000 grey images of 28x28 in 10 classes, as RGB (Xiao et al. 2017)."""

    layout = "FashionMNIST/raw/train-images-idx3-ubyte, ..."
    class_names = (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    )

    def _files(self, base: Path, split: str) -> list[Path]:
        start = "train" if split == "train" else "t10k"
        raw = base / "FashionMNIST" / "raw"
        return [raw / f"{start}-images-idx3-ubyte", raw / f"{start}-labels-idx1-ubyte"]

    def _read(self, base: Path, split: str) -> Undecoded:
        files = self._files(base, split)
        try:
            data = _torchvision("FashionMNIST")(base, train=split == "train")
            if len(data.data) != len(data.targets):
                raise ValueError(f"{len(data.data)} images, but {len(data.targets)} labels")
        except Exception as error:  # torchvision's reader answers corrupt bytes with several types of exception
            raise DataError(
                f"{files[0]} or {files[1].name} is corrupt: {error}. Remove them and set data.download=true."
            ) from error
        pixels = data.data[..., None].expand(-1, -1, -1, 3).numpy()
        return _undecoded_array(files[0], pixels, data.targets.numpy(), self.class_names)

    def _fetch(self, root: Path, split: str) -> None:
        _torchvision("FashionMNIST")(root, download=True)


class TinyImageNet(_Published):
    """Tiny ImageNet: 100,000 images of 64x64 in 200 classes; its 10,000 validation images are the test split.

    Stanford CS231n 2015, http://cs231n.stanford.edu/tiny-imagenet-200.zip; classes are WordNet ids.
    """

    layout = "tiny-imagenet-200/train/<wnid>/images/*.JPEG, tiny-imagenet-200/val/val_annotations.txt"
    parquet_test = ("test", "validation", "valid", "val")

    def _files(self, base: Path, split: str) -> list[Path]:
        folder = self._folder(base)
        files = [file for file, _ in self._find(base, split)]
        return [*files, folder / "val" / "val_annotations.txt"] if files and split == "test" else files

    def _read(self, base: Path, split: str) -> Undecoded:
        found = self._find(base, split)
        classes = _class_folders(self._folder(base) / "train")
        return _undecoded_files([file for file, _ in found], [name for _, name in found], classes)

    def _fetch(self, root: Path, split: str) -> None:
        from torchvision.datasets.utils import download_and_extract_archive

        url, md5 = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"
        download_and_extract_archive(url, str(root), md5=md5)

    def _folder(self, base: Path) -> Path:
        return base if (base / "train").is_dir() else base / "tiny-imagenet-200"

    def _find(self, base: Path, split: str) -> list[tuple[Path, str]]:
        """Pairs of file and class; none where the layout is another."""
        folder = self._folder(base)
        classes = _class_folders(folder / "train")
        if split == "train":
            return [(file, name) for name in classes for file in _images_below(folder / "train" / name)]
        annotations = folder / "val" / "val_annotations.txt"
        if not annotations.is_file():
            return []
        lines = [line.split("\t") for line in annotations.read_text().splitlines()]
        for number, line in enumerate(lines, start=1):
            if len(line) < 2 or line[1] not in classes:
                raise DataError(f"{annotations}, line {number} names no class that has a folder in {folder / 'train'}.")
        return [(folder / "val" / "images" / line[0], line[1]) for line in lines]


def _class_folders(folder: Path) -> list[str]:
    """Names of the folders that hold images, in alphabetical order; empty if `folder` does not exist."""
    if not folder.is_dir():
        return []
    return sorted(sub.name for sub in folder.iterdir() if sub.is_dir() and next(_walk_images(sub), None) is not None)


def _images_below(folder: Path) -> list[Path]:
    return sorted(_walk_images(folder))


def _walk_images(folder: Path) -> Iterator[Path]:
    for path, _, names in os.walk(folder, followlinks=True):
        yield from (Path(path, name) for name in names if _is_image_name(name))


def _is_image(file: Path) -> bool:
    return _is_image_name(file.name) and file.is_file()


def _is_image_name(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES


def _undecoded_files(files: list[Path], labels: list[str] | None, classes: list[str]) -> Undecoded:
    """Image files and the names of their classes."""
    label = {name: i for i, name in enumerate(classes)}
    return Undecoded(
        images=((str(file), file) for file in files),
        num_images=len(files),
        labels=None if labels is None else np.array([label[name] for name in labels], dtype=np.int64),
        classes=() if labels is None else tuple(classes),
    )


def _undecoded_array(
    place: Path | str,
    pixels: UInt8[np.ndarray, "n h w 3"],
    labels: np.ndarray | None,
    classes: Sequence[str],
) -> Undecoded:
    """Images that a reader gave as one array."""
    return Undecoded(
        images=((f"{place}, image {i}", image) for i, image in enumerate(pixels)),
        num_images=len(pixels),
        labels=None if labels is None else labels.astype(np.int64),
        classes=tuple(classes),
    )


def _stratified_split(labels: Int64[np.ndarray, " n"], test_fraction: float) -> dict[str, Int64[np.ndarray, " _"]]:
    """Ascending positions of both splits; the same for every run, classes in proportion."""
    rng = numpy_generator(0, "stratified split")
    classes, counts = np.unique(labels, return_counts=True)
    num_test = apportion(counts / len(labels), math.ceil(test_fraction * len(labels)))
    test = np.concatenate(
        [rng.permutation(np.flatnonzero(labels == label))[:n] for label, n in zip(classes, num_test, strict=True)]
    )
    return {"train": np.setdiff1d(np.arange(len(labels)), test), "test": np.sort(test)}


def _first_images(images: ImageSet, split: str, num_images: int | None) -> ImageSet:
    """The first `num_images` of a permutation that depends on the number of images only, in ascending order."""
    if split != "train" or num_images is None:
        return images
    if num_images > len(images):
        raise ConfigError(
            f"data.num_images={num_images} is more than the {len(images)} images of {images.name}. "
            f"Set it to {len(images)} or less, or to null for all."
        )
    return images.subset(np.sort(numpy_generator(0, "data.num_images").permutation(len(images))[:num_images]))


def _torchvision(name: str) -> Any:
    from torchvision import datasets  # takes a second to import, and most sources do not need it

    return getattr(datasets, name)


def _check_md5(file: Path, md5: str) -> None:
    from torchvision.datasets.utils import check_integrity

    if not check_integrity(str(file), md5):
        raise DataError(
            f"{file} is not the published file (md5 differs): it is damaged or incomplete. "
            f"Remove it and set data.download=true, or set data.root to another copy."
        )


def _content(folder: Path) -> str:
    if not folder.is_dir():
        return "does not exist"
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    return f"holds {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "is empty"


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ConfigError(f"a split is one of {', '.join(SPLITS)}, got {split!r}.")


def _check_fields(image_size: object, num_images: object) -> None:
    if not isinstance(image_size, int) or image_size < 1:
        raise ConfigError(f"data.image_size must be a number of pixels, got {image_size}. 32, 64 and 224 are usual.")
    if num_images is not None and (not isinstance(num_images, int) or num_images < 1):
        raise ConfigError(f"data.num_images must be at least 1, or null for all images, got {num_images}.")


def _check_test_fraction(test_fraction: float) -> None:
    if not 0 < test_fraction < 1:
        raise ConfigError(f"data.test_fraction must lie between 0 and 1, got {test_fraction}.")


_NO_TEST = " Data without a test split can train; name labelled data for the probes with evaluate.data=."
