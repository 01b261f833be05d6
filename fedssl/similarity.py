"""What clients know about the public set: cosines between its images, held as factors or as a matrix.

A client embeds the n public images as rows z_i; its similarity matrix is S_ij = cos(z_i, z_j) (FLESD, Shi et al. 2021,
https://arxiv.org/abs/2109.14611). S is invariant to any rotation of the embedding space and does not depend on its
dimension, which is why clients of different architectures can be compared and averaged.

Nobody needs all of S at once: a `Similarity` answers for a block of rows and columns. `FactorSimilarity` computes the
block from n x d unit rows, `DenseSimilarity` gathers it from an n x n matrix that a client sent.
"""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor


@runtime_checkable
class Similarity(Protocol):
    """The cosines of one client on the public set."""

    @property
    def num_samples(self) -> int:
        """n, the number of public images."""

    def block(self, rows: Int64[Tensor, " b"], columns: Int64[Tensor, " k"]) -> Float[Tensor, "b k"]:
        """Cosines between the images `rows` and `columns` (positions in the public set, repeats allowed), fp32."""

    @property
    def device(self) -> torch.device:
        """Where its tensors are; `block` wants its arguments there."""

    def sums(self) -> tuple[float, float]:
        """The sum of all n x n entries, and the sum of their squares (of the diagonal too)."""

    def to(self, device: torch.device) -> "Similarity":
        """The same similarity with its tensors on `device`."""


def unit_rows(embeddings: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows divided by their Euclidean norm, without overflow for huge rows; a row of zeros stays zero."""
    largest = embeddings.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(embeddings.dtype).tiny)
    return F.normalize(embeddings / largest, dim=1)


def cosine_similarity(embeddings: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """All pairwise cosines, clamped to [-1, 1]; a row of zeros has cosine 0 with every image, itself included."""
    z = unit_rows(embeddings)
    return (z @ z.T).clamp(-1, 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class FactorSimilarity:
    """S = F F^T, never built: a block costs b x k x d multiplications.

    Args:
        factors: (n, d) fp32 unit rows.
    """

    factors: Float[Tensor, "n d"] = field(repr=False)

    @property
    def num_samples(self) -> int:
        """n, the number of public images."""
        return len(self.factors)

    @property
    def device(self) -> torch.device:
        """See `Similarity.device`."""
        return self.factors.device

    def block(self, rows: Int64[Tensor, " b"], columns: Int64[Tensor, " k"]) -> Float[Tensor, "b k"]:
        """See `Similarity.block`."""
        return (self.factors[rows] @ self.factors[columns].T).clamp(-1, 1)

    def sums(self) -> tuple[float, float]:
        """See `Similarity.sums`. From the factors alone: |sum_i f_i|^2, and ||F F^T||_F = ||F^T F||_F."""
        factors = self.factors.double()
        return factors.sum(dim=0).square().sum().item(), (factors.T @ factors).square().sum().item()

    def to(self, device: torch.device) -> "FactorSimilarity":
        """See `Similarity.to`."""
        return FactorSimilarity(factors=self.factors.to(device))


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseSimilarity:
    """S as a matrix, as a client sent it: 4 n^2 bytes, so only for small public sets.

    Args:
        matrix: (n, n) fp32 cosines.
    """

    matrix: Float[Tensor, "n n"] = field(repr=False)

    @property
    def num_samples(self) -> int:
        """n, the number of public images."""
        return len(self.matrix)

    @property
    def device(self) -> torch.device:
        """See `Similarity.device`."""
        return self.matrix.device

    def block(self, rows: Int64[Tensor, " b"], columns: Int64[Tensor, " k"]) -> Float[Tensor, "b k"]:
        """See `Similarity.block`."""
        return self.matrix[rows[:, None], columns]

    def sums(self) -> tuple[float, float]:
        """See `Similarity.sums`."""
        matrix = self.matrix.double()
        return matrix.sum().item(), matrix.square().sum().item()

    def to(self, device: torch.device) -> "DenseSimilarity":
        """See `Similarity.to`."""
        return DenseSimilarity(matrix=self.matrix.to(device))


@dataclass(frozen=True, kw_only=True, eq=False)
class AnchorMass:
    """What a client that sharpens its similarities itself says: no cosines, only how much each anchor weighs.

    Args:
        values: (n, m) masses of all public images over the anchors, the first m public positions; at least 0.
    """

    values: Float[Tensor, "n m"] = field(repr=False)

    @property
    def num_samples(self) -> int:
        """n, the number of public images."""
        return len(self.values)

    @property
    def num_anchors(self) -> int:
        """m."""
        return self.values.shape[1]

    def to(self, device: torch.device) -> "AnchorMass":
        """The same masses on `device`."""
        return AnchorMass(values=self.values.to(device))


def collapse_measures(similarity: Similarity) -> dict[str, float]:
    """How much of the embedding space a client uses: two numbers that betray a collapsed encoder.

    `mean_cosine` is the mean off-diagonal entry of S: near 0 for spread embeddings, 1 when all images look the same.

    `effective_rank` is the participation ratio of the eigenvalues l of S, (sum l)^2 / sum l^2 = tr(S)^2 / ||S||_F^2
    with tr(S) = n: 1 when all embeddings are parallel, r when they fill r directions evenly. It needs no
    eigenvalues and is the same number from factors and from the matrix.
    """
    n = similarity.num_samples
    total, squares = similarity.sums()
    return {"mean_cosine": (total - n) / max(n * (n - 1), 1), "effective_rank": n * n / squares}
