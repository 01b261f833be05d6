"""Images are decoded once: a content-keyed uint8 array on disk that every process maps instead of copying.

An entry is a folder `<name>-<size>-<key>` under `cache_dir()` with `images.npy` (n, 3, size, size), `labels.npy` and
`meta.json`. Its key is a hash of what the pixels depend on: the source files' content, how they are read, the image
size, and `FORMAT`. An entry is written into a folder of its own and renamed when complete, so any number of processes
may build the same entry at once; one that was truncated later is recognised by its sizes and built again.
"""

import hashlib
import io
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from fedssl.data.images import ImageSet
from fedssl.errors import ConfigError, DataError

log = logging.getLogger(__name__)

FORMAT = 1  # raise it when the same files would decode to other pixels or labels
BLOCK = 512  # images decoded, then written, at a time: bounds the memory

Encoded = bytes | Path | UInt8[np.ndarray, "h w 3"]  # a file's bytes, a file, or pixels


@dataclass(frozen=True, kw_only=True, eq=False)
class Undecoded:
    """What a source found in its files, before decoding.

    Args:
        images: `num_images` pairs of a place, for messages ("train-0.parquet, row 17"), and the image there; read
            lazily and once.
        num_images: how many they are.
        labels: (num_images,) int64 in [0, len(classes)), or None for unlabelled data.
        classes: class names; empty for unlabelled data.
    """

    images: Iterable[tuple[str, Encoded]]
    num_images: int
    labels: Int64[np.ndarray, " n"] | None
    classes: tuple[str, ...]


def cache_dir() -> Path:
    """`$FEDSSL_CACHE`, or `fedssl` in the user's cache folder of this platform."""
    if chosen := os.environ.get("FEDSSL_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "~/AppData/Local")
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "fedssl"


def cached(
    *,
    name: str,
    image_size: int,
    recipe: str,
    files: Sequence[Path],
    root: Path | None,
    read: Callable[[], Undecoded],
) -> ImageSet:
    """The images of a source, memory-mapped from the cache; decoded into it first where they are not there yet.

    Args:
        name: of the resulting set, e.g. "cifar10/train".
        image_size: height and width of the decoded images, in pixels.
        recipe: how `files` are read, as far as it decides about pixels, labels, classes or order.
        files: what is read; their content and names are part of the key, the folder that they lie in is not.
        root: the user's folder, which is never written to; None for bundled data.
        read: finds and labels the images; called only when they must be decoded.

    Raises:
        ConfigError: the cache cannot be written, or lies inside `root`.
        DataError: a file or an image in it is corrupt; the message names it.
    """
    cache = cache_dir()
    if root is not None and cache.resolve().is_relative_to(root.resolve()):
        raise ConfigError(
            f"the image cache {cache} lies inside data.root={root}, which fedssl never writes to. "
            f"Set the environment variable FEDSSL_CACHE to a folder outside of it."
        )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        content = _content_digest(files, cache)
        key = _sha256(json.dumps([FORMAT, image_size, recipe, content]).encode())
        entry = cache / f"{name.replace('/', '-')}-{image_size}-{key[:20]}"
        images = _open(entry, name)
        if images is None:
            log.info("decoding %s at %d x %d pixels into %s", name, image_size, image_size, entry)
            images = _build(entry, name, image_size, read)
    except OSError as error:  # unreadable source files are DataErrors by now: this is about the cache
        raise ConfigError(
            f"cannot use the image cache {cache}: {error}. "
            f"Set the environment variable FEDSSL_CACHE to a folder that can be written and has room."
        ) from error
    return images


def decode(image: Encoded, size: int) -> UInt8[np.ndarray, "3 size size"]:
    """One image as RGB: the shorter side resized to `size` (bilinear, antialiased), then centre-cropped."""
    if isinstance(image, np.ndarray):
        if image.shape == (size, size, 3):
            return image.transpose(2, 0, 1)
        picture = Image.fromarray(image)
    else:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as file:
            if file.mode.startswith("I;16"):  # 16-bit grey, which convert() would clip: keep the high byte
                picture = Image.fromarray((np.asarray(file) >> 8).astype(np.uint8)).convert("RGB")
            else:
                picture = file.convert("RGB")
    if picture.size != (size, size):
        width, height = picture.size
        shorter = min(width, height)
        width, height = size * width // shorter, size * height // shorter
        left, top = round((width - size) / 2), round((height - size) / 2)
        picture = picture.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return np.asarray(picture).transpose(2, 0, 1)


def _open(entry: Path, name: str) -> ImageSet | None:
    """The entry, mapped; None where it is missing, truncated or otherwise not what was written."""
    try:
        meta = json.loads((entry / "meta.json").read_text())
        if any((entry / file).stat().st_size != size for file, size in meta["bytes"].items()):
            log.warning("%s is damaged and will be built again", entry)
            return None
        pixels = np.load(entry / "images.npy", mmap_mode="r")
        labels = np.load(entry / "labels.npy") if meta["labelled"] else None
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
    return ImageSet(
        pixels=pixels,
        indices=np.arange(len(pixels)),
        labels=labels,
        classes=tuple(meta["classes"]),
        name=name,
        pixels_digest=meta["pixels_sha256"],
    )


def _build(entry: Path, name: str, image_size: int, read: Callable[[], Undecoded]) -> ImageSet:
    """Decode into a private folder and rename it to `entry`; another process may have been faster."""
    undecoded = read()
    building = entry.parent / f"building-{uuid4().hex}"
    building.mkdir()
    try:
        pixels_sha256 = _write_images(building / "images.npy", undecoded, image_size)
        if undecoded.labels is not None:
            np.save(building / "labels.npy", undecoded.labels)
        meta: dict[str, Any] = {
            "bytes": {file.name: file.stat().st_size for file in building.iterdir()},
            "classes": undecoded.classes,
            "labelled": undecoded.labels is not None,
            "pixels_sha256": pixels_sha256,
        }
        (building / "meta.json").write_text(json.dumps(meta))
        for _ in range(3):  # other processes do the same
            with suppress(OSError):  # fails where there is an entry already
                building.rename(entry)
            if (images := _open(entry, name)) is not None:
                return images
            damaged = entry.rename(entry.parent / f"damaged-{uuid4().hex}")
            shutil.rmtree(damaged, ignore_errors=True)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    raise OSError(f"{entry} cannot be read back")


def _write_images(path: Path, undecoded: Undecoded, size: int) -> str:
    """Write an .npy file block by block (a full disk is then an error, not a SIGBUS); sha256 of the pixels."""
    sha256 = hashlib.sha256()
    written = 0
    with path.open("wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        shape = (undecoded.num_images, 3, size, size)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for block in _blocks(undecoded.images):
            pixels = np.empty((len(block), 3, size, size), np.uint8)
            for row, image in enumerate(pool.map(lambda item: _decode_or_name(item[0], item[1], size), block)):
                pixels[row] = image
            file.write(pixels.data)
            sha256.update(pixels.data)
            written += len(pixels)
    assert written == undecoded.num_images, f"{path}: {written} images, {undecoded.num_images} announced"
    return sha256.hexdigest()


def _blocks(items: Iterable[tuple[str, Encoded]]) -> Iterator[list[tuple[str, Encoded]]]:
    iterator = iter(items)
    while block := list(islice(iterator, BLOCK)):
        yield block


def _decode_or_name(place: str, image: Encoded, size: int) -> UInt8[np.ndarray, "3 size size"]:
    try:
        return decode(image, size)
    except Exception as error:  # PIL answers corrupt bytes with a dozen types of exception
        raise DataError(f"{place} is not an image that can be decoded: {error}. Restore or remove it.") from error


def _content_digest(files: Sequence[Path], cache: Path) -> str:
    """sha256 over names and contents; remembered by path, size and time of change, so that re-opening is fast."""
    try:
        stats = [
            (str(file.absolute()), status.st_size, status.st_mtime_ns) for file in files for status in [file.stat()]
        ]
        remembered = cache / "digests" / _sha256(json.dumps(stats).encode())
        if remembered.is_file() and len(known := remembered.read_text()) == 64:
            return known
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            contents = list(pool.map(_file_sha256, files))
    except OSError as error:
        raise DataError(
            f"cannot read {error.filename}: {error.strerror}. Restore it or check its permissions."
        ) from error
    folder = Path(os.path.commonpath([file.parent for file in files])) if files else Path()
    names = [file.relative_to(folder).as_posix() for file in files]
    digest = _sha256(json.dumps([names, contents]).encode())
    remembered.parent.mkdir(exist_ok=True)
    unfinished = remembered.with_name(uuid4().hex)
    unfinished.write_text(digest)
    unfinished.replace(remembered)
    return digest


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
