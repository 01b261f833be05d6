"""Half of the paper's upload: a symmetric matrix with ones on the diagonal is its strict upper triangle."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedssl.codecs import base
from fedssl.similarity import TriangleSimilarity, row_blocks


@dataclass(frozen=True, kw_only=True)
class Triangle:
    """`codec=triangle`: S above its diagonal, row after row, as the vector `triangle` of n (n - 1) / 2 numbers.

    The same numbers and errors as `Dense`, half the bytes; nothing to check for symmetry.
    """

    dtype: str  # fp32 | fp16 | int8
    max_bytes: int  # of one upload
    name: ClassVar[str] = "triangle"

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
        return n * (n - 1) // 2 * base.DTYPES[self.dtype].itemsize

    def check_size(self, n: int, d: int) -> None:
        """See `Codec.check_size`."""
        base.check_size(self, self.max_bytes, n, d)

    def encode(self, embeddings: Float[Tensor, "n d"], generator: torch.Generator) -> dict[str, np.ndarray]:
        """See `Codec.encode`; nothing is drawn from `generator`."""
        z = base.directions(embeddings)
        n = len(z)
        triangle = np.empty(n * (n - 1) // 2, base.DTYPES[self.dtype])
        filled = 0
        for rows in row_blocks(n):
            cosines = (z[rows] @ z[rows.start :].T).clamp_(-1, 1)
            above = torch.ones(cosines.shape, dtype=torch.bool).triu_(1)
            values = base.quantise(cosines[above], self.dtype).numpy()
            triangle[filled : filled + len(values)] = values
            filled += len(values)
        return {"triangle": triangle}

    def decode(self, arrays: Mapping[str, np.ndarray], num_samples: int) -> TriangleSimilarity:
        """See `Codec.decode`."""
        expected = {"triangle": (base.DTYPES[self.dtype], (num_samples * (num_samples - 1) // 2,))}
        [values] = base.read(self.name, arrays, expected, num_samples, self.max_bytes)
        base.clamp_cosines("triangle", values, self.bound)
        return TriangleSimilarity(values=values, num_samples=num_samples)
