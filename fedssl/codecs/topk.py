"""The largest cosines of each row: what a sharpened target is made of."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedssl.codecs import base
from fedssl.errors import ConfigError, PayloadError
from fedssl.similarity import TopKSimilarity, row_blocks


@dataclass(frozen=True, kw_only=True)
class TopK:
    """`codec=topk`: of each row the k largest cosines with other images, as `values` and `indices`, both n x k.

    FLESD's ablation, Shi et al. 2021, https://arxiv.org/abs/2109.14611: "quantised" similarity keeps 1 % to 5 % of a
    row. An image's cosine with itself is 1, is not sent and does not count among the k (the authors' code asks for one
    more and keeps it). Columns ascend within a row (one payload per content), as uint16 up to 65,536 public images.

    A missing entry becomes `floor`: 0 is the authors' code. Since exp(0 / 0.1) is not small beside exp(cos / 0.1),
    thousands of missing entries may hold most of a target's mass; -1 leaves them none.
    """

    dtype: str  # fp32 | fp16 | int8, of the values
    k: int | None  # entries a row; where given, it wins over percent
    percent: float | None  # entries a row in percent of the public set, rounded down, at least 1
    floor: float  # the cosine of an entry that was not sent
    max_bytes: int  # of one upload
    name: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        base.check_fields(self.dtype, self.max_bytes)
        if self.k is None and self.percent is None:
            raise ConfigError("codec=topk needs codec.k (entries a row) or codec.percent, both are null.")
        if self.k is not None and self.k < 1:
            raise ConfigError(f"codec.k must be at least 1, got {self.k}. null leaves the choice to codec.percent.")
        if self.percent is not None and not 0 < self.percent <= 100:
            raise ConfigError(f"codec.percent must be above 0 and at most 100, got {self.percent}; 1 is usual.")
        if not -1 <= self.floor <= 1:
            raise ConfigError(
                f"codec.floor must be a cosine between -1 and 1, got {self.floor}. "
                f"0 is the authors' choice, -1 keeps missing entries out of the targets."
            )

    def num_kept(self, n: int) -> int:
        """Entries sent of each of n rows, at most all n - 1."""
        k = self.k
        if k is None:
            assert self.percent is not None
            k = max(1, math.floor(self.percent * n / 100 + 1e-9))  # 0.57 * 10000 / 100 is 56.99999999999999
        return min(k, n - 1)

    @property
    def sent_bound(self) -> float:
        """The largest error of an entry that is sent, see `base.cosine_bound`."""
        return base.cosine_bound(self.dtype)

    @property
    def bound(self) -> float:
        """The largest error of any entry: a missing one may have been a cosine at the other end of [-1, 1]."""
        return max(1 + abs(self.floor), self.sent_bound)

    def target_bound(self, temperature: float) -> float:
        """See `base.softmax_bound`; nearly 1, since the anchors may be all missing."""
        return base.softmax_bound(self.bound, temperature)

    def num_bytes(self, n: int, d: int) -> int:
        """See `Codec.num_bytes`."""
        return n * self.num_kept(n) * (base.DTYPES[self.dtype].itemsize + base.index_dtype(n).itemsize)

    def check_size(self, n: int, d: int) -> None:
        """See `Codec.check_size`; also refuses more entries a row than there are other images."""
        if self.k is not None and self.k > n - 1:
            raise ConfigError(
                f"codec.k={self.k} entries a row, but an image has only {n - 1} others among {n} public images: set "
                f"codec.k to {n - 1} or less, or raise public.size."
            )
        base.check_size(self, self.max_bytes, n, d)

    def encode(self, embeddings: Float[Tensor, "n d"], generator: torch.Generator) -> dict[str, np.ndarray]:
        """See `Codec.encode`; nothing is drawn from `generator`."""
        z = base.directions(embeddings)
        shape = len(z), self.num_kept(len(z))
        values, indices = np.empty(shape, base.DTYPES[self.dtype]), np.empty(shape, base.index_dtype(len(z)))
        block = z.new_empty(0)  # kept: to allocate it anew for every block costs as much as to compute it
        for rows in row_blocks(len(z)):
            cosines = torch.mm(z[rows], z.T, out=block.resize_(len(z[rows]), len(z))).clamp_(-1, 1)
            cosines[torch.arange(len(cosines)), torch.arange(rows.start, rows.stop)] = -torch.inf
            kept = cosines.topk(shape[1], dim=1, sorted=False).indices.sort(dim=1).values
            values[rows] = base.quantise(cosines.gather(1, kept), self.dtype).numpy()
            indices[rows] = kept.numpy()
        return {"values": values, "indices": indices}

    def decode(self, arrays: Mapping[str, np.ndarray], num_samples: int) -> TopKSimilarity:
        """See `Codec.decode`."""
        shape = (num_samples, self.num_kept(num_samples))
        expected = {
            "values": (base.DTYPES[self.dtype], shape),
            "indices": (base.index_dtype(num_samples), shape),
        }
        values, indices = base.read(self.name, arrays, expected, num_samples, self.max_bytes)
        base.clamp_cosines("values", values, self.sent_bound)
        similarity = TopKSimilarity(values=values, indices=indices, floor=self.floor)
        for rows in row_blocks(num_samples):
            columns = similarity.columns(rows)
            if ((columns < 0) | (columns >= num_samples)).any():
                raise PayloadError(f"'indices' must lie between 0 and {num_samples - 1}, the public images")
            if (columns[:, 1:] <= columns[:, :-1]).any():
                raise PayloadError("'indices' must ascend within each row, without repeats")
            if (columns == torch.arange(rows.start, rows.stop)[:, None]).any():
                raise PayloadError("'indices' must not hold a row's own image, whose cosine is 1")
        return similarity
