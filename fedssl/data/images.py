"""A set of images: uint8 pixels, perhaps labels, always a name."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """Images of one size, selected and ordered by `indices` from an array that may be a read-only memory map.

    Args:
        pixels: (total, 3, h, w) uint8; shared by all subsets, never copied.
        indices: (n,) positions in `pixels`; image i of this set is `pixels[indices[i]]`.
        labels: (n,) int64 aligned with `indices`, or None for unlabelled data.
        classes: class names; empty for unlabelled data.
        name: for messages, e.g. "cifar10/train".
        pixels_digest: sha256 of `pixels` where it is known already (the cache knows it), else empty.
    """

    pixels: UInt8[np.ndarray, "total 3 h w"] = field(repr=False)
    indices: Int64[np.ndarray, " n"] = field(repr=False)
    labels: Int64[np.ndarray, " n"] | None = field(repr=False)
    classes: tuple[str, ...]
    name: str
    pixels_digest: str = field(default="", repr=False)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.pixels.shape[2], self.pixels.shape[3]

    @cached_property
    def num_classes(self) -> int:
        """Number of named classes; 0 for unlabelled data."""
        return len(self.classes)

    @cached_property
    def digest(self) -> str:
        """sha256 of this set's content: pixels, selection and order, labels and class names (not its name)."""
        pixels_digest = self.pixels_digest or hashlib.sha256(np.ascontiguousarray(self.pixels).data).hexdigest()
        sha256 = hashlib.sha256(pixels_digest.encode())
        sha256.update(repr((self.pixels.shape, self.classes, self.labels is None)).encode())
        sha256.update(np.ascontiguousarray(self.indices).data)
        if self.labels is not None:
            sha256.update(np.ascontiguousarray(self.labels).data)
        return sha256.hexdigest()

    def take(self, rows: Int64[Tensor, " b"] | Int64[np.ndarray, " b"]) -> UInt8[Tensor, "b 3 h w"]:
        """Copy images `rows` (positions in this set) into one contiguous CPU tensor."""
        return torch.from_numpy(self.pixels[self.indices[np.asarray(rows)]])

    def subset(self, rows: Sequence[int] | Int64[np.ndarray, " m"], name: str | None = None) -> "ImageSet":
        """The images `rows` (positions in this set), in that order; pixels stay shared."""
        rows = np.asarray(rows, dtype=np.int64)
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, indices=self.indices[rows], labels=labels, name=name or self.name)
