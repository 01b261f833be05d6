"""The embeddings themselves, turned by a random rotation: all of S in n x d numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor

from fedssl.codecs import base
from fedssl.errors import PayloadError
from fedssl.similarity import INT8_ONE, FactorSimilarity, row_blocks

WIDEST = 8192  # dimensions of an embedding that anybody uses; n images never span more than n
DRAWS = 10  # rotations tried until int8 keeps its bound; the first nearly always does


@dataclass(frozen=True, kw_only=True)
class Factor:
    """`codec=factor`: unit rows under a random rotation, n x d, as `factors`.

    F F^T is the very matrix that `Dense` sends, n/d times smaller. Of F, S determines everything but a rotation
    (Gram matrices agree exactly when the rows differ by an orthogonal map), so drawing that rotation at random makes
    the upload tell what S tells and no more: neither the axes of the embedding nor, beyond d, its architecture.

    Error on S: if encoding turns unit rows z_i by e_i = |z'_i - z_i|, a cosine z_i . z_j moves by at most e_i + e_j.
    fp16 rounds each entry by a relative 2^-11, so e <= 2^-11 and the error is at most 2^-10.

    int8 sends round(127 z / max|z|), each row with a scale of its own that nobody needs: a direction has none. An
    entry is off by at most half a step of max|z| / 127 and by 1/sqrt(12) of a step in the root of the mean square, so e
    is about sqrt(d / 12) max|z| / 127. The rotation makes the entries of z nearly normal with deviation 1/sqrt(d), so
    max|z| is c/sqrt(d) with c about 3 in a typical row and 6.6 in the worst row of a billion entries, where
    e = c / (127 sqrt(12)) is 0.015, whatever d. Hence 0.03 on S. The rotation decides, so it is no certainty but a
    promise: `encode` measures e, and draws another rotation where two rows could break it.

    These bounds are for two errors that point along each other's row, which no pair is known to have. An error does not
    know the other row, so z_i . (z'_j - z_j) is about e / sqrt(d): of a million pairs with d = 128 the worst is off by
    5e-4 in fp16 and by 1e-2 in int8 at most.
    """

    dtype: str  # fp32 | fp16 | int8
    max_bytes: int  # of one upload
    name: ClassVar[str] = "factor"

    def __post_init__(self) -> None:
        base.check_fields(self.dtype, self.max_bytes)

    @property
    def bound(self) -> float:
        """See the class: 1e-6 for fp32 (rotation, rounding and the products), 1e-3 for fp16, 0.03 for int8."""
        return {"fp32": base.FP32_ERROR, "fp16": 1e-3, "int8": 0.03}[self.dtype]

    def target_bound(self, temperature: float) -> float:
        """See `base.softmax_bound`."""
        return base.softmax_bound(self.bound, temperature)

    def num_bytes(self, n: int, d: int) -> int:
        """See `Codec.num_bytes`."""
        return n * d * base.DTYPES[self.dtype].itemsize

    def check_size(self, n: int, d: int) -> None:
        """See `Codec.check_size`."""
        base.check_size(self, self.max_bytes, n, d)

    def encode(self, embeddings: Float[Tensor, "n d"], generator: torch.Generator) -> dict[str, np.ndarray]:
        """See `Codec.encode`; the rotation is drawn from `generator`, fresh for every upload."""
        base.check_directions(embeddings)
        for _ in range(DRAWS):
            rotation = random_rotation(embeddings.shape[1], generator)
            factors, error = self._rotated(embeddings, rotation)
            if error <= self.bound:
                return {"factors": factors}
        raise PayloadError(
            f"codec {self.name} with dtype {self.dtype} keeps cosines within {self.bound:g}; after {DRAWS} rotations "
            f"the embeddings of the public set still would be off by {error:.3g}. Set codec.dtype=fp16."
        )

    def _rotated(self, embeddings: Float[Tensor, "n d"], rotation: Float[Tensor, "d d"]) -> tuple[np.ndarray, float]:
        """The factors, and the largest e_i + e_j of two rows (see the class; measured for int8 only)."""
        factors = np.empty(embeddings.shape, base.DTYPES[self.dtype])
        worst = torch.zeros(2, dtype=torch.float64)
        for rows in row_blocks(len(factors)):
            exact = base.exact_rows(embeddings[rows]) @ rotation
            if self.dtype == "int8":
                sent = base.quantise(exact / exact.abs().amax(dim=1, keepdim=True), self.dtype)
                turned = torch.linalg.vector_norm(F.normalize(sent.double(), dim=1) - F.normalize(exact, dim=1), dim=1)
                worst = torch.cat([worst, turned]).topk(2).values
            else:
                sent = base.quantise(exact, self.dtype)
            factors[rows] = sent.numpy()
        return factors, worst.sum().item()

    def decode(self, arrays: Mapping[str, np.ndarray], num_samples: int) -> FactorSimilarity:
        """See `Codec.decode`; the similarity normalises rows again."""
        expected = {"factors": (base.DTYPES[self.dtype], (num_samples, None))}
        [factors] = base.read(self.name, arrays, expected, num_samples, self.max_bytes)
        if factors.shape[1] > (widest := max(num_samples, WIDEST)):  # the server's work and memory grow with d
            raise PayloadError(f"'factors' has {factors.shape[1]} dimensions, more than {widest} say nothing new")
        for rows in row_blocks(num_samples):
            self._check_rows(factors[rows], rows.start)
        return FactorSimilarity(factors=factors)

    def _check_rows(self, factors: Num[Tensor, "b d"], first: int) -> None:
        if not factors.shape[1]:
            raise PayloadError("'factors' has rows without entries")
        if self.dtype == "int8":
            off = factors.int().abs().amax(dim=1) - INT8_ONE
            wanted = f"a largest entry of {INT8_ONE} or -{INT8_ONE}"
        else:
            off = torch.linalg.vector_norm(factors.float(), dim=1) - 1
            off = torch.where(off.abs() <= self.bound, 0, off)
            wanted = f"length 1 within {self.bound:g}"
        if off.any():
            row = int(off.abs().argmax())
            raise PayloadError(
                f"'factors' must have rows of {wanted} (codec {self.name}, dtype {self.dtype}); "
                f"that of row {first + row} is off by {off[row].item():.3g}"
            )


def random_rotation(dim: int, generator: torch.Generator) -> Float[Tensor, "{dim} {dim}"]:
    """An orthogonal (dim, dim) fp64 matrix on the CPU, uniform over all of them (reflections included).

    QR of a Gaussian matrix is uniform once the signs of R's diagonal are fixed: Mezzadri 2007,
    https://arxiv.org/abs/math-ph/0609050, section 5.
    """
    gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64, device=generator.device).cpu()
    q, r = torch.linalg.qr(gaussian)
    rotation: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return rotation
