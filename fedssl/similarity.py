"""What clients know about the public set: cosines between its images, held as factors or as a matrix.

A client embeds the n public images as rows z_i; its similarity matrix is S_ij = cos(z_i, z_j) (FLESD, Shi et al. 2021,
https://arxiv.org/abs/2109.14611). S is invariant to any rotation of the embedding space and does not depend on its
dimension, which is why clients of different architectures can be compared and averaged.

Nobody needs all of S at once: a `Similarity` answers for a block of rows and columns. `FactorSimilarity` computes the
block from n x d rows; `DenseSimilarity`, `TriangleSimilarity` and `TopKSimilarity` gather it from what a client sent of
the n x n matrix. All hold their numbers in the type in which they were sent and convert block by block: int8 holds
127 times a cosine.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64, Num
from torch import Tensor

BLOCK_ROWS = 256  # rows of an n x n matrix at a time: 50 MB of fp32 for n = 50,000
INT8_ONE = 127  # the int8 that stands for 1
TIE = 1e-6  # cosines that are closer than this are equal


def row_blocks(num_rows: int) -> Iterator[slice]:
    """The rows 0..num_rows-1 in blocks of at most `BLOCK_ROWS`."""
    for start in range(0, num_rows, BLOCK_ROWS):
        yield slice(start, min(start + BLOCK_ROWS, num_rows))


def to_float(values: Num[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Cosines as they are held (fp32, fp16, or int8 as 127 times the cosine) in fp32."""
    return values.float() / INT8_ONE if values.dtype == torch.int8 else values.float()


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
    """S_ij = cos(f_i, f_j), never built: a block costs b x k x d multiplications.

    Args:
        factors: (n, d) rows of any type and of any length; a row of zeros has cosine 0 with every image.
    """

    factors: Num[Tensor, "n d"] = field(repr=False)
    inverse_norms: Float[Tensor, " n"] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        inverse = torch.empty(len(self.factors), device=self.factors.device)
        for rows in row_blocks(len(inverse)):
            norms = torch.linalg.vector_norm(self.factors[rows].double(), dim=1)
            inverse[rows] = torch.where(norms > 0, 1 / norms, 0).float()
        object.__setattr__(self, "inverse_norms", inverse)

    @property
    def num_samples(self) -> int:
        """n, the number of public images."""
        return len(self.factors)

    @property
    def device(self) -> torch.device:
        """See `Similarity.device`."""
        return self.factors.device

    def unit(self, rows: Int64[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """The rows asked for, with length 1, fp32."""
        scale = self.inverse_norms.index_select(0, rows)[:, None]
        return self.factors.index_select(0, rows).float().mul_(scale)  # a copy; faster than advanced indexing

    def block(self, rows: Int64[Tensor, " b"], columns: Int64[Tensor, " k"]) -> Float[Tensor, "b k"]:
        """See `Similarity.block`."""
        return (self.unit(rows) @ self.unit(columns).T).clamp_(-1, 1)

    def sums(self) -> tuple[float, float]:
        """See `Similarity.sums`. From the factors alone: |sum_i f_i|^2, and ||F F^T||_F = ||F^T F||_F.

        F^T F is d x d, and d is what a sender chose: where it exceeds n, blocks of F F^T take its place.
        """
        n, dim = self.factors.shape
        total = torch.zeros(dim, dtype=torch.float64, device=self.device)
        gram = torch.zeros(dim if dim <= n else 0, dim, dtype=torch.float64, device=self.device)
        squares = 0.0
        for rows in row_blocks(n):
            factors = self._unit_block(rows)
            total += factors.sum(dim=0)
            if dim <= n:
                gram += factors.T @ factors
            else:
                squares += sum((factors @ self._unit_block(other).T).square().sum().item() for other in row_blocks(n))
        return total.square().sum().item(), squares + gram.square().sum().item()

    def _unit_block(self, rows: slice) -> Float[Tensor, "b d"]:
        return self.unit(torch.arange(rows.start, rows.stop, device=self.device)).double()

    def to(self, device: torch.device) -> "FactorSimilarity":
        """See `Similarity.to`."""
        return FactorSimilarity(factors=self.factors.to(device))


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseSimilarity:
    """S as a matrix, as a client sent it: n^2 numbers, so only for small public sets.

    Args:
        matrix: (n, n) cosines in fp32 or fp16, or 127 times the cosines in int8.
    """

    matrix: Num[Tensor, "n n"] = field(repr=False)

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
        return to_float(self.matrix[rows[:, None], columns])

    def sums(self) -> tuple[float, float]:
        """See `Similarity.sums`."""
        return _sums(self.matrix)

    def to(self, device: torch.device) -> "DenseSimilarity":
        """See `Similarity.to`."""
        return DenseSimilarity(matrix=self.matrix.to(device))


@dataclass(frozen=True, kw_only=True, eq=False)
class TriangleSimilarity:
    """S as its strict upper triangle: half of `DenseSimilarity`.

    Args:
        values: n (n - 1) / 2 cosines in fp32 or fp16, or 127 times the cosines in int8: S[0, 1], S[0, 2], ...,
            S[0, n-1], S[1, 2], ... (row-major).
        num_samples: n.
    """

    values: Num[Tensor, " pairs"] = field(repr=False)
    num_samples: int

    @property
    def device(self) -> torch.device:
        """See `Similarity.device`."""
        return self.values.device

    def block(self, rows: Int64[Tensor, " b"], columns: Int64[Tensor, " k"]) -> Float[Tensor, "b k"]:
        """See `Similarity.block`."""
        if not len(self.values):  # one image
            return torch.ones(len(rows), len(columns), device=rows.device)
        i, j = torch.minimum(rows[:, None], columns), torch.maximum(rows[:, None], columns)
        before = i * (2 * self.num_samples - i - 1) // 2  # pairs in the rows above i
        positions = torch.where(i == j, 0, before + j - i - 1)
        return to_float(self.values[positions]).masked_fill_(i == j, 1)

    def sums(self) -> tuple[float, float]:
        """See `Similarity.sums`."""
        total, squares = _sums(self.values)
        return 2 * total + self.num_samples, 2 * squares + self.num_samples

    def to(self, device: torch.device) -> "TriangleSimilarity":
        """See `Similarity.to`."""
        return TriangleSimilarity(values=self.values.to(device), num_samples=self.num_samples)


@dataclass(frozen=True, kw_only=True, eq=False)
class TopKSimilarity:
    """The k largest cosines of each row, those with other images; whatever is missing is `floor`.

    Row i answers for itself: S[i, j] may be known and S[j, i] missing.

    Args:
        values: (n, k) cosines in fp32 or fp16, or 127 times the cosines in int8.
        indices: (n, k) their columns, ascending within a row, i not in row i. int16 holds uint16's bits (public sets of
            up to 65,536 images), int32 plain numbers.
        floor: the cosine of a missing entry.
    """

    values: Num[Tensor, "n k"] = field(repr=False)
    indices: Int[Tensor, "n k"] = field(repr=False)
    floor: float

    @property
    def num_samples(self) -> int:
        """n, the number of public images."""
        return len(self.values)

    @property
    def device(self) -> torch.device:
        """See `Similarity.device`."""
        return self.values.device

    def columns(self, rows: Int64[Tensor, " b"] | slice) -> Int[Tensor, "b k"]:
        """The columns that the rows asked for hold, int32."""
        indices = self.indices[rows].int()
        return indices & 0xFFFF if self.indices.dtype == torch.int16 else indices

    def block(self, rows: Int64[Tensor, " b"], columns: Int64[Tensor, " k"]) -> Float[Tensor, "b k"]:
        """See `Similarity.block`. Looks the sent entries up among the columns, of which there are many more."""
        sent = torch.cat([self.columns(rows).long(), rows[:, None]], dim=1)  # the image itself, and its cosine 1
        values = F.pad(to_float(self.values.index_select(0, rows)), (0, 1), value=1.0)
        asked, position = torch.unique(columns, return_inverse=True)
        found = torch.searchsorted(asked, sent)
        nobody = len(asked)  # a column for entries that were not asked for
        found = torch.where(F.pad(asked, (0, 1), value=-1)[found] == sent, found, nobody)
        cosines = torch.full((len(rows), nobody + 1), self.floor, device=self.device).scatter_(1, found, values)
        return cosines.index_select(1, position)

    def sums(self) -> tuple[float, float]:
        """See `Similarity.sums`; missing entries count as `floor`."""
        n, k = self.values.shape
        missing = n * (n - 1 - k)
        total, squares = _sums(self.values)
        return total + n + missing * self.floor, squares + n + missing * self.floor**2

    def to(self, device: torch.device) -> "TopKSimilarity":
        """See `Similarity.to`."""
        return TopKSimilarity(values=self.values.to(device), indices=self.indices.to(device), floor=self.floor)


@dataclass(frozen=True, kw_only=True, eq=False)
class AnchorMass:
    """What the codec `sharpened` sends: not S but a rule's non-negative masses of the public images over m anchors.

    The anchors are the public images 0..m-1. The public set is in random order, so a prefix of it is a sample.

    Args:
        values: (n, m) fp32 masses; targets are their sum over clients, normalised.
    """

    values: Float[Tensor, "n m"] = field(repr=False)

    @property
    def num_samples(self) -> int:
        """n, the number of public images."""
        return len(self.values)

    @property
    def num_anchors(self) -> int:
        """m, the number of anchors."""
        return self.values.shape[1]

    def to(self, device: torch.device) -> "AnchorMass":
        """The same masses on `device`."""
        return AnchorMass(values=self.values.to(device))


def _sums(values: Num[Tensor, "..."]) -> tuple[float, float]:
    """The sum of cosines and of their squares, in fp64 and a part at a time."""
    total = squares = 0.0
    for part in torch.split(values.reshape(-1), 2**20):
        exact = to_float(part).double()
        total += exact.sum().item()
        squares += exact.square().sum().item()
    return total, squares


def collapse_measures(similarity: Similarity) -> dict[str, float]:
    """How much of the embedding space a client uses: two numbers that betray a collapsed encoder.

    `mean_cosine` is the mean off-diagonal entry of S: near 0 for spread embeddings, 1 when all images look the same.

    `effective_rank` is the participation ratio of the eigenvalues l of S, (sum l)^2 / sum l^2 = tr(S)^2 / ||S||_F^2
    with tr(S) = n: 1 when all embeddings are parallel, r when they fill r directions evenly. It needs no
    eigenvalues and is the same number from factors and from the matrix. Both are 0 where no image has a direction: so
    standardised features of a fully collapsed backbone come out.
    """
    n = similarity.num_samples
    total, squares = similarity.sums()
    if squares == 0:
        return {"mean_cosine": 0.0, "effective_rank": 0.0}
    return {"mean_cosine": (total - n) / max(n * (n - 1), 1), "effective_rank": n * n / squares}


def instance_discrimination(
    queries: Float[Tensor, "n d"], positives: Float[Tensor, "n d"], ranks: Sequence[int]
) -> list[float]:
    """Acc@k for each k of `ranks`: how often fewer than k other images are as close to an image as its own view is.

    Shi et al. 2021, https://arxiv.org/abs/2107.14762: the query is row i of `queries`, its positive row i of
    `positives`, its negatives the other queries; closeness is the cosine. No label is needed. A tie counts against the
    view, so a collapsed encoder scores 0 where n > k, and so does one that makes NaN or infinity.

    Args:
        queries: of the images themselves; need not be normalised.
        positives: of one view of each, likewise.
        ranks: each k >= 1.
    """
    z, views = unit_rows(queries), unit_rows(positives)
    hits = [0] * len(ranks)
    for rows in row_blocks(len(z)):
        own = (z[rows] * views[rows]).sum(dim=1, keepdim=True)
        others = z[rows] @ z.T
        others.diagonal(rows.start).fill_(-torch.inf)
        closer = len(z) - (others < own - TIE).sum(dim=1)
        hits = [hit + int((closer < k).sum()) for hit, k in zip(hits, ranks, strict=True)]
    return [hit / len(z) for hit in hits]
