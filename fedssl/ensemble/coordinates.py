"""Principal coordinates: where each public image lies, so that inner products are the clients' mean kernel.

A student that knows the coordinates learns every image by itself, by regression; it needs no anchors. The n x n kernel
never exists: only its products with a few vectors are computed, from factors or from blocks of the clients' cosines.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedssl.ensemble.base import NO_CONTRAST
from fedssl.similarity import FactorSimilarity, Similarity

OVERSAMPLING = 8  # vectors beyond those asked for
PASSES = 6  # products with the kernel, each n^2 (d + num_coordinates) multiplications a client
ENTRIES = 2**22  # cosines at a time: 16 MB


def principal_coordinates(
    similarities: Sequence[Similarity], num_coordinates: int, generator: torch.Generator, *, whitening: float = 0.0
) -> Float[Tensor, "n c"]:
    """Where each public image lies. Without whitening, c_i . c_j is the best approximation of Kbar[i, j] there is.

    Kbar = mean_k C S_k C / |C S_k C|_F over all n public images, C = I - 11'/n, S_k made symmetric where a codec does
    not keep it so (`topk`): `ensemble.MeanKernel` of the whole set, in which every client counts alike and a collapsed
    one not at all. Classical scaling (Torgerson 1952, https://doi.org/10.1007/BF02288916): eigenvectors times the
    square roots of their eigenvalues, in descending order, the positive ones alone; here times their power
    (1 - whitening) / 2. A cosine sees little else than the few largest directions unless they are shrunk.
    By subspace iteration (Halko et al. 2011, https://arxiv.org/abs/0909.4061, Algorithm 4.4), shifted where the kernel
    has large negative eigenvalues, which would take the place of positive ones.

    Args:
        similarities: at least one, all of the same n public images and on one device.
        num_coordinates: at most so many; directions without variance are left out, c is the number that remains. What
            a codec rounds (`dense` in fp16 or int8) counts as variance.
        generator: CPU; for the first guess of the eigenvectors.
        whitening: 0: as above; 1: all directions alike.

    Returns:
        On the similarities' device, fp32. c = 0 where no client tells any images apart.
    """
    device, n = similarities[0].device, similarities[0].num_samples
    norms = [_centred_norm(similarity) for similarity in similarities]
    speaking = [(s, norm) for s, norm in zip(similarities, norms, strict=True) if norm > NO_CONTRAST * n]

    def product(vectors: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
        vectors = vectors - vectors.mean(dim=0)
        total = torch.zeros_like(vectors)
        for similarity, norm in speaking:
            total += _product(similarity, vectors) / (norm * len(similarities))
        return total - total.mean(dim=0)

    wanted = min(num_coordinates, n - 1)
    start = torch.randn(n, min(n, wanted + OVERSAMPLING), generator=generator).to(device)
    values, vectors = _eigen(product, start, shift=0.0)
    if (lowest := values[-1].item()) < -1e-3 * values[0].item():
        values, vectors = _eigen(product, vectors, shift=-lowest)
    values, vectors = values[:wanted], vectors[:, :wanted]
    kept = values > 1e-5 * values[:1].clamp_min(torch.finfo(values.dtype).tiny)  # below, they are rounding
    coordinates: Tensor = vectors[:, kept] * values[kept] ** ((1 - whitening) / 2)
    return coordinates


def mean_kernel_factors(similarities: Sequence[FactorSimilarity]) -> Float[Tensor, "n r"]:
    """Rows whose inner products are Kbar = mean_k C S_k C / |C S_k C|_F of `principal_coordinates`, exactly.

    The clients' centred factors side by side, each divided by the square root of (clients * |C S_k C|_F); so r is the
    sum of their widths. A collapsed client adds no columns.
    """
    columns = []
    for similarity in similarities:
        factors = _factors(similarity).double()
        factors = factors - factors.mean(dim=0)
        norm = torch.linalg.matrix_norm(factors.T @ factors)
        if norm > NO_CONTRAST * len(factors):
            columns.append((factors / (len(similarities) * norm).sqrt()).float())
    n, device = similarities[0].num_samples, similarities[0].device
    return torch.cat([torch.empty(n, 0, device=device), *columns], dim=1)


def _eigen(
    product: Callable[[Tensor], Tensor], start: Float[Tensor, "n v"], *, shift: float
) -> tuple[Float[Tensor, " v"], Float[Tensor, "n v"]]:
    """Eigenvalues, descending, and eigenvectors of the v directions in which |eigenvalue + shift| is largest."""
    basis = start
    for _ in range(PASSES):
        basis = torch.linalg.qr(product(basis) + shift * basis).Q
    small = basis.T @ product(basis)
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    return values.flip(0), (basis @ vectors).flip(1)


def _product(similarity: Similarity, vectors: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
    if isinstance(similarity, FactorSimilarity):
        factors = _factors(similarity)
        return factors @ (factors.T @ vectors)
    return torch.cat([block @ vectors for block in _blocks(similarity)])


def _blocks(similarity: Similarity) -> Iterator[Float[Tensor, "b n"]]:
    """(S + S') / 2 by blocks of rows."""
    columns = torch.arange(similarity.num_samples, device=similarity.device)
    for rows in torch.split(columns, max(1, ENTRIES // len(columns))):
        yield (similarity.block(rows, columns) + similarity.block(columns, rows).T) / 2


def _factors(similarity: FactorSimilarity) -> Float[Tensor, "n d"]:
    return similarity.unit(torch.arange(similarity.num_samples, device=similarity.device))


def _centred_norm(similarity: Similarity) -> float:
    """|C S C|_F in fp64, from entries that are centred before they are squared: a collapsed client's are tiny."""
    if isinstance(similarity, FactorSimilarity):
        factors = _factors(similarity).double()
        factors = factors - factors.mean(dim=0)
        return float(torch.linalg.matrix_norm(factors.T @ factors))
    means = torch.cat([block.double().mean(dim=1) for block in _blocks(similarity)])
    squares, done = 0.0, 0
    for block in _blocks(similarity):
        centred = block.double() - means[done : done + len(block), None] - means + means.mean()
        squares, done = squares + centred.square().sum().item(), done + len(block)
    return math.sqrt(squares)
