"""The paper's upload: the whole similarity matrix."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedssl.codecs import base
from fedssl.errors import PayloadError
from fedssl.similarity import DenseSimilarity, row_blocks, to_float


@dataclass(frozen=True, kw_only=True)
class Dense:
    """`codec=dense`: S, n x n, as `similarity`. FLESD, Shi et al. 2021, https://arxiv.org/abs/2109.14611, section 3.

    The numbers are S itself, in int8 round(127 S).
    """

    dtype: str  # fp32 | fp16 | int8
    max_bytes: int  # of one upload
    name: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        base.check_fields(self.dtype, self.max_bytes)

    @property
    def bound(self) -> float:
        """See `base.cosine_bound`: 1e-6 for fp32, 2.5e-4 for fp16, 1/254 for int8."""
        return base.cosine_bound(self.dtype)

    def target_bound(self, temperature: float) -> float:
        """See `base.softmax_bound`."""
        return base.softmax_bound(self.bound, temperature)

    def num_bytes(self, n: int, d: int) -> int:
        """See `Codec.num_bytes`."""
        return n * n * base.DTYPES[self.dtype].itemsize

    def check_size(self, n: int, d: int) -> None:
        """See `Codec.check_size`."""
        base.check_size(self, self.max_bytes, n, d)

    def encode(self, embeddings: Float[Tensor, "n d"], generator: torch.Generator) -> dict[str, np.ndarray]:
        """See `Codec.encode`; nothing is drawn from `generator`. Symmetric to the last bit: half of S is mirrored."""
        z = base.directions(embeddings)
        matrix = np.empty((len(z), len(z)), base.DTYPES[self.dtype])
        for rows in row_blocks(len(z)):
            right = slice(rows.start, None)
            cosines = (z[rows] @ z[right].T).clamp_(-1, 1)
            square = cosines[:, : len(cosines)]
            square.copy_((square + square.T) / 2).fill_diagonal_(1)
            values = base.quantise(cosines, self.dtype).numpy()
            matrix[rows, right] = values
            matrix[right, rows] = values.T
        return {"similarity": matrix}

    def decode(self, arrays: Mapping[str, np.ndarray], num_samples: int) -> DenseSimilarity:
        """See `Codec.decode`."""
        expected = {"similarity": (base.DTYPES[self.dtype], (num_samples, num_samples))}
        [matrix] = base.read(self.name, arrays, expected, num_samples, self.max_bytes)
        base.clamp_cosines("similarity", matrix, self.bound)
        off_one = (to_float(matrix.diagonal()) - 1).abs().amax().item()
        if off_one > self.bound:
            raise PayloadError(f"'similarity' has a diagonal entry {off_one:.3g} away from 1, the cosine with itself")
        for rows in row_blocks(num_samples):
            right = slice(rows.start, None)
            upper, lower = matrix[rows, right], matrix[right, rows].T
            asymmetry = (to_float(upper) - to_float(lower)).abs_().amax().item()
            if asymmetry > self.bound:
                raise PayloadError(
                    f"'similarity' is not symmetric: entries (i, j) and (j, i) differ by {asymmetry:.3g}, "
                    f"more than the {self.bound:g} of codec {self.name} with dtype {self.dtype}"
                )
            square = upper[:, : len(upper)]
            square.copy_(square.triu(1) + square.triu(1).T)
            matrix[rows.stop :, rows].copy_(matrix[rows, rows.stop :].T)
        matrix.fill_diagonal_(base.one(matrix.dtype))
        return DenseSimilarity(matrix=matrix)
