import io
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image

from fedssl.data.cache import Undecoded, cache_dir, cached, decode
from fedssl.data.images import ImageSet
from fedssl.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDSSL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three PNG files in a folder of their own."""
    (tmp_path / "data").mkdir()
    paths = [tmp_path / "data" / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        Image.fromarray(noise(20, 30, seed=i)).save(path)
    return paths


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def load(files: list[Path], size: int = 8, recipe: str = "test", reads: list[int] | None = None) -> ImageSet:
    """The files from the cache; `reads` grows by one whenever they must be decoded."""

    def read() -> Undecoded:
        if reads is not None:
            reads.append(1)
        images = ((str(file), file) for file in files)
        return Undecoded(images=images, num_images=len(files), labels=np.arange(len(files)), classes=tuple("abc"))

    return cached(
        name="test/train",
        image_size=size,
        recipe=recipe,
        files=files,
        root=files[0].parent if files else None,
        read=read,
    )


@pytest.mark.parametrize(("height", "width"), [(40, 40), (33, 57), (57, 33), (20, 21), (32, 32), (9, 32)])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_decode_is_torchvisions_resize_and_centre_crop(height: int, width: int, size: int) -> None:
    image = noise(height, width)
    picture = Image.fromarray(image)
    expected = TF.center_crop(TF.resize(picture, [size], TF.InterpolationMode.BILINEAR), [size, size])
    np.testing.assert_array_equal(decode(image, size), np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("size", [32, 64, 224])
def test_decode_gives_the_size_that_was_asked_for(size: int) -> None:
    file = io.BytesIO()
    Image.fromarray(noise(50, 41)).save(file, "JPEG")
    assert decode(file.getvalue(), size).shape == (3, size, size)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(path)
    assert (decode(path, 4) == 255).all()


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 128 * 256, np.uint16)).save(tmp_path / "image.png")
    assert (decode(tmp_path / "image.png", 4) == 128).all()


def test_decoded_once_then_mapped(files: list[Path]) -> None:
    reads: list[int] = []
    first, second = load(files, reads=reads), load(files, reads=reads)
    assert len(reads) == 1
    for images in (first, second):
        assert isinstance(images.pixels, np.memmap)
        assert not images.pixels.flags.writeable
        assert images.classes == ("a", "b", "c")
        assert images.labels is not None
        assert images.labels.tolist() == [0, 1, 2]
        for i, file in enumerate(files):
            np.testing.assert_array_equal(images.take(np.array([i]))[0].numpy(), decode(file, 8))
    assert first.digest == second.digest


def test_the_key_is_content_size_and_recipe(files: list[Path], tmp_path: Path) -> None:
    reads: list[int] = []
    load(files, reads=reads)
    os.utime(files[0], (1, 1))  # another time, the same content
    load(files, reads=reads)
    (tmp_path / "moved").mkdir()
    moved = [file.rename(tmp_path / "moved" / file.name) for file in files]
    load(moved, reads=reads)
    assert len(reads) == 1
    load(moved, size=9, reads=reads)
    load(moved, recipe="other", reads=reads)
    Image.fromarray(noise(20, 30, seed=9)).save(moved[0])
    changed = load(moved, reads=reads)
    assert len(reads) == 4
    np.testing.assert_array_equal(changed.take(np.array([0]))[0].numpy(), decode(moved[0], 8))


@pytest.mark.parametrize("damage", ["images.npy", "labels.npy", "meta.json"])
@pytest.mark.parametrize(
    "how", [lambda path: os.truncate(path, path.stat().st_size // 2), Path.unlink], ids=["cut", "gone"]
)
def test_a_damaged_entry_is_built_again(
    files: list[Path], cache: Path, damage: str, how: Callable[[Path], None]
) -> None:
    digest = load(files).digest
    [entry] = cache.glob("test-train-*")
    how(entry / damage)
    reads: list[int] = []
    assert load(files, reads=reads).digest == digest
    assert len(reads) == 1
    assert {path.name for path in cache.iterdir()} == {entry.name, "digests"}  # and nothing is left lying about


def test_a_damaged_memory_of_digests_does_not_matter(files: list[Path], cache: Path) -> None:
    load(files)
    [remembered] = (cache / "digests").iterdir()
    remembered.write_text("")
    reads: list[int] = []
    load(files, reads=reads)
    assert not reads
    assert len(remembered.read_text()) == 64


def test_a_corrupt_image_is_named_and_leaves_nothing(files: list[Path], cache: Path) -> None:
    os.truncate(files[1], 60)
    with pytest.raises(DataError, match=r"data/1.png is not an image that can be decoded: .* Restore or remove it"):
        load(files)
    assert {path.name for path in cache.iterdir()} == {"digests"}


def test_a_missing_file_is_named(files: list[Path]) -> None:
    files[2].unlink()
    with pytest.raises(DataError, match=r"cannot read .*data/2.png: No such file"):
        load(files)


def test_an_unwritable_cache_names_the_variable(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDSSL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match=r"cannot use the image cache .*file/cache: .* FEDSSL_CACHE to a folder that"):
        load(files)


def test_never_inside_the_data(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(files[0].parent.rglob("*"))
    monkeypatch.setenv("FEDSSL_CACHE", str(files[0].parent / "cache"))
    with pytest.raises(ConfigError, match=r"lies inside data.root=.* Set the environment variable FEDSSL_CACHE"):
        load(files)
    assert set(files[0].parent.rglob("*")) == before


def test_default_folder_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSSL_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_dir() == Path("/somewhere/fedssl")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_dir() == Path("/home/me/.cache/fedssl")


def test_many_may_build_at_once(files: list[Path], cache: Path) -> None:
    reads: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        digests = {images.digest for images in pool.map(lambda _: load(files, reads=reads), range(8))}
    assert len(digests) == 1
    assert len(reads) > 1  # they did race
    assert len(list(cache.iterdir())) == 2  # one entry, and the digests


def test_digest_depends_on_content_selection_and_labels_only(files: list[Path]) -> None:
    images = load(files)
    in_memory = ImageSet(
        pixels=np.array(images.pixels), indices=np.arange(3), labels=np.arange(3), classes=tuple("abc"), name="other"
    )
    assert in_memory.digest == images.digest  # whether the cache knew it or not
    assert images.subset([1, 0, 2]).digest != images.digest
    assert images.subset([0, 1]).digest != images.digest
    assert load(files, size=9).digest != images.digest
    unlabelled = ImageSet(pixels=images.pixels, indices=np.arange(3), labels=None, classes=(), name="test")
    assert unlabelled.digest != images.digest


def test_more_images_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedssl.data.cache.BLOCK", 4)
    pixels = np.stack([noise(8, 8, seed=i) for i in range(11)])

    def read() -> Undecoded:
        return Undecoded(images=((str(i), x) for i, x in enumerate(pixels)), num_images=11, labels=None, classes=())

    images = cached(name="blocks/train", image_size=8, recipe="blocks", files=[], root=None, read=read)
    np.testing.assert_array_equal(images.pixels, pixels.transpose(0, 3, 1, 2))
    assert images.labels is None
    assert torch.equal(images.take(np.array([10])), torch.from_numpy(pixels[10:].transpose(0, 3, 1, 2).copy()))


def test_an_image_set_survives_pickling(files: list[Path]) -> None:
    images = load(files)
    assert pickle.loads(pickle.dumps(images)).digest == images.digest
