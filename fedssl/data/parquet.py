"""Images and labels in parquet files of the Hugging Face image layout."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from jaxtyping import Int64

from fedssl.data.cache import Encoded, Undecoded
from fedssl.errors import DataError

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label", "labels")
ROWS = 512  # decoded from a file at a time: bounds the memory


def parquet_files(folder: Path, prefix: str) -> list[Path]:
    """`<folder>/<prefix>-*.parquet`, sorted; empty if the folder does not exist."""
    return sorted(folder.glob(f"{prefix}-*.parquet"))


@dataclass(frozen=True, kw_only=True)
class ParquetTable:
    """The rows of one split.

    The image column is a struct with `bytes`. Labels are integers or strings; a column of nothing but nulls and -1 is
    no label. Classes are named by the Hugging Face metadata, else by the strings, else by `class_names`.

    Args:
        files: of the split, in order.
        class_files: whose labels define the classes: the train split's.
        image: column; None: the first of IMAGE_COLUMNS.
        label: column; None: the first of LABEL_COLUMNS, or unlabelled.
        class_names: of integer labels without metadata; empty: their numbers.
    """

    files: Sequence[Path]
    class_files: Sequence[Path]
    image: str | None
    label: str | None
    class_names: Sequence[str]

    @property
    def recipe(self) -> str:
        """What decides how the files are read, for the cache."""
        return f"{len(self.files)} parquet files, {self.image=}, {self.label=}, {list(self.class_names)}"

    @property
    def all_files(self) -> list[Path]:
        """All that the result depends on."""
        return [*self.files, *(file for file in self.class_files if file not in self.files)]

    def read(self) -> Undecoded:
        """Labels at once, images as they are asked for; DataError names the file and row that is wrong."""
        num_images = sum(_open(file).metadata.num_rows for file in self.files)
        if not num_images:
            raise DataError(f"{self.files[0]} and the other files of its split have no rows.")
        labels, classes = self._labels()
        return Undecoded(images=self._images(), num_images=num_images, labels=labels, classes=classes)

    def _images(self) -> Iterator[tuple[str, Encoded]]:
        for file in self.files:
            row = 0
            try:
                for batch in _open(file).iter_batches(batch_size=ROWS, columns=[self._image_column]):
                    for image in batch.column(0).to_pylist():
                        content = image.get("bytes") if isinstance(image, dict) else None
                        if not content:
                            raise DataError(f"{file}, row {row}: `{self._image_column}` is not a struct with `bytes`.")
                        yield f"{file}, row {row}", content
                        row += 1
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(f"{file} is corrupt after row {row}: {error}. Restore it.") from error

    def _labels(self) -> tuple[Int64[np.ndarray, " n"] | None, tuple[str, ...]]:
        """Labels of all rows, and the classes."""
        column = self._label_column
        if column is None:
            return None, ()
        rows = [(file, row, value) for file in self.files for row, value in enumerate(_read_column(file, column))]
        if all(value in (None, -1) for _, _, value in rows):
            return None, ()
        classes = self._classes(column)
        by_name = {name: label for label, name in enumerate(classes)}
        labels = [by_name.get(value) if isinstance(value, str) else value for _, _, value in rows]
        for (file, row, value), label in zip(rows, labels, strict=True):
            if not isinstance(label, int) or not 0 <= label < len(classes):
                raise DataError(
                    f"{file}, row {row}: {column}={value!r} is none of the {len(classes)} classes of the train split "
                    f"({', '.join(classes[:5])}, ...). Every row needs such a name, or a number below {len(classes)}."
                )
        return np.array(labels, dtype=np.int64), classes

    def _classes(self, column: str) -> tuple[str, ...]:
        files = [file for file in self.class_files if column in _open(file).schema_arrow.names] or self.files
        metadata = (_open(files[0]).schema_arrow.metadata or {}).get(b"huggingface", b"{}")
        try:
            return tuple(map(str, json.loads(metadata)["info"]["features"][column]["names"]))
        except (KeyError, TypeError, ValueError):
            pass  # no metadata, or none that names the classes
        values = {value for file in files for value in _read_column(file, column)}
        if names := [value for value in values if isinstance(value, str)]:
            return tuple(sorted(names))
        largest = max((value for value in values if isinstance(value, int)), default=-1)
        return tuple(self.class_names) if largest < len(self.class_names) else tuple(map(str, range(largest + 1)))

    @cached_property
    def _image_column(self) -> str:
        columns = _open(self.files[0]).schema_arrow.names
        wanted = IMAGE_COLUMNS if self.image is None else (self.image,)
        if not (found := [column for column in wanted if column in columns]):
            raise DataError(
                f"{self.files[0]} has no image column {' or '.join(wanted)}, only {', '.join(columns)}. "
                f"Name it with data=parquet data.image=."
            )
        return found[0]

    @cached_property
    def _label_column(self) -> str | None:
        columns = _open(self.files[0]).schema_arrow.names
        wanted = LABEL_COLUMNS if self.label is None else (self.label,)
        found = [column for column in wanted if column in columns]
        if not found and self.label is not None:
            raise DataError(
                f"{self.files[0]} has no label column {self.label}, only {', '.join(columns)}. "
                f"Name it with data.label=, or set data.label=null."
            )
        return found[0] if found else None


def _open(file: Path) -> Any:
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a readable parquet file: {error}. Restore it.") from error


def _read_column(file: Path, column: str) -> list[Any]:
    try:
        return list(_open(file).read(columns=[column]).column(0).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} is corrupt in column {column}: {error}. Restore it.") from error
