"""Wire formats of a client's similarity: what an upload holds, what error that adds, what the server refuses.

A codec turns embeddings of the public set into named numpy arrays and those back into a `Similarity`. It states
`bound`, the largest error it may add to an entry of S; the server's tolerances are derived from it.

The server decodes what anybody may have sent, so `decode` trusts nothing: whatever the arrays hold, it returns a
similarity whose entries lie in [-1, 1] with ones on the diagonal, or raises `PayloadError` with the reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedssl.errors import ConfigError, PayloadError
from fedssl.similarity import DenseSimilarity, FactorSimilarity, Similarity, cosine_similarity, unit_rows

DTYPES: dict[str, np.dtype[Any]] = {"fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}


@runtime_checkable
class Codec(Protocol):
    """One wire format. The choices live in conf/codec/."""

    @property
    def name(self) -> str:
        """As in `codec=<name>`; travels in the header of every upload."""

    @property
    def bound(self) -> float:
        """The largest error that encoding and decoding may add to an entry of S."""

    def encode(self, embeddings: Float[Tensor, "n d"], generator: torch.Generator) -> dict[str, np.ndarray]:
        """The arrays to upload. Raises PayloadError for embeddings without a direction (NaN, infinite or zero)."""

    def decode(self, arrays: Mapping[str, np.ndarray], num_samples: int) -> Similarity:
        """The similarity on the `num_samples` public images. Raises PayloadError for anything else."""


@dataclass(frozen=True, kw_only=True)
class Dense:
    """The paper's upload: the whole matrix S, n x n, as `similarity`.

    Error on S: rounding to fp16 adds at most 2^-12 to a number in [-1, 1], fp32 arithmetic less than 1e-6.
    """

    dtype: str  # fp16 | fp32
    name: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)

    @property
    def bound(self) -> float:
        """See the class: 2.5e-4 for fp16, 1e-6 for fp32."""
        return {"fp16": 2.5e-4, "fp32": 1e-6}[self.dtype]

    def encode(self, embeddings: Float[Tensor, "n d"], generator: torch.Generator) -> dict[str, np.ndarray]:
        """See `Codec.encode`; nothing is drawn from `generator`."""
        matrix = cosine_similarity(_directions(embeddings).float())
        matrix = ((matrix + matrix.T) / 2).fill_diagonal_(1)  # symmetric to the last bit
        return {"similarity": matrix.numpy().astype(DTYPES[self.dtype])}

    def decode(self, arrays: Mapping[str, np.ndarray], num_samples: int) -> DenseSimilarity:
        """See `Codec.decode`."""
        matrix = _checked(self.name, self.dtype, arrays, "similarity", num_samples, num_samples)
        largest = matrix.abs().amax().item()
        if largest > 1 + self.bound:
            raise PayloadError(
                f"'similarity' holds {largest:.6g}; a cosine is at most 1 (+{self.bound:g} for rounding)"
            )
        off_one = (matrix.diagonal() - 1).abs().amax().item()
        if off_one > self.bound:
            raise PayloadError(f"'similarity' has a diagonal entry {off_one:.3g} away from 1, the cosine with itself")
        asymmetry = (matrix - matrix.T).abs().amax().item()
        if asymmetry > self.bound:
            raise PayloadError(
                f"'similarity' is not symmetric: entries (i, j) and (j, i) differ by {asymmetry:.3g}, "
                f"more than the {self.bound:g} of codec {self.name} with dtype {self.dtype}"
            )
        return DenseSimilarity(matrix=((matrix + matrix.T) / 2).clamp_(-1, 1).fill_diagonal_(1))


@dataclass(frozen=True, kw_only=True)
class Factor:
    """The embeddings themselves as unit rows under a random rotation, n x d, as `factors`.

    F F^T is the very matrix that `Dense` sends, n/d times smaller. Of F, S determines everything but a rotation
    (Gram matrices agree exactly when the rows differ by an orthogonal map), so drawing that rotation at random makes
    the upload tell what S tells and no more: neither the axes of the embedding nor, beyond d, its architecture.

    Error on S: rounding each entry by a relative 2^-11 (fp16) turns a unit row by at most 2^-11, and a cosine has two
    rows: 2^-10. The fp32 bound covers rotation, rounding and the products.
    """

    dtype: str  # fp16 | fp32
    name: ClassVar[str] = "factor"

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)

    @property
    def bound(self) -> float:
        """See the class: 1e-3 for fp16, 1e-6 for fp32."""
        return {"fp16": 1e-3, "fp32": 1e-6}[self.dtype]

    def encode(self, embeddings: Float[Tensor, "n d"], generator: torch.Generator) -> dict[str, np.ndarray]:
        """See `Codec.encode`; the rotation is drawn from `generator`, fresh for every upload."""
        rotated = _directions(embeddings) @ random_rotation(embeddings.shape[1], generator)
        return {"factors": rotated.numpy().astype(DTYPES[self.dtype])}

    def decode(self, arrays: Mapping[str, np.ndarray], num_samples: int) -> FactorSimilarity:
        """See `Codec.decode`; rows are normalised again."""
        factors = _checked(self.name, self.dtype, arrays, "factors", num_samples, None)
        off_one = (torch.linalg.vector_norm(factors, dim=1) - 1).abs()
        if off_one.amax().item() > self.bound:
            row = int(off_one.argmax())
            raise PayloadError(
                f"'factors' must have rows of length 1 within {self.bound:g} (codec {self.name}, dtype {self.dtype}); "
                f"the length of row {row} is off by {off_one[row].item():.3g}"
            )
        return FactorSimilarity(factors=unit_rows(factors))


def random_rotation(dim: int, generator: torch.Generator) -> Float[Tensor, "{dim} {dim}"]:
    """An orthogonal (dim, dim) fp64 matrix on the CPU, uniform over all of them (reflections included).

    QR of a Gaussian matrix is uniform once the signs of R's diagonal are fixed: Mezzadri 2007,
    https://arxiv.org/abs/math-ph/0609050, section 5.
    """
    gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64, device=generator.device).cpu()
    q, r = torch.linalg.qr(gaussian)
    rotation: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return rotation


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ConfigError(f"codec.dtype must be one of {', '.join(DTYPES)}, got {dtype!r}. Set it in conf/codec/.")


def _directions(embeddings: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Unit rows in fp64 on the CPU: what every codec starts from."""
    z = unit_rows(embeddings.detach().cpu().double())
    bad = (torch.linalg.vector_norm(z, dim=1) - 1).abs().nan_to_num(nan=1.0) > 0.5
    if bad.any():
        raise PayloadError(
            f"{int(bad.sum())} of {len(z)} embeddings of the public set have no direction (NaN, infinite or all zero), "
            f"the first is that of image {int(bad.nonzero()[0])}: the local training diverged or its projector died. "
            f"Lower client.optimisation.lr."
        )
    return z


def _checked(
    codec: str, dtype: str, arrays: Mapping[str, np.ndarray], name: str, num_rows: int, num_columns: int | None
) -> Float[Tensor, "n d"]:
    """The one array of a payload as an fp32 tensor of its own, after the checks that all codecs share."""
    if set(arrays) != {name}:
        raise PayloadError(f"codec {codec} sends one array named {name!r}, got {sorted(map(str, arrays))}")
    array = arrays[name]
    if array.dtype != DTYPES[dtype]:
        raise PayloadError(f"{name!r} must have dtype {DTYPES[dtype]} (codec.dtype={dtype}), got {array.dtype}")
    if array.ndim != 2 or array.shape[0] != num_rows or num_columns not in (None, array.shape[1]):
        expected = f"({num_rows}, {num_columns or 'd'})"
        raise PayloadError(f"{name!r} must have shape {expected} for {num_rows} public images, got {array.shape}")
    tensor = torch.from_numpy(array.astype(np.float32))  # a copy: records may be read-only
    if not tensor.isfinite().all():
        raise PayloadError(f"{name!r} holds NaN or infinite values")
    return tensor
