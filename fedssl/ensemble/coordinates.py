"""Principal coordinates: where each public image lies, so that inner products are the clients' mean kernel.

A student that knows the coordinates learns every image by itself, by regression; it needs no anchors. The n x n kernel
never exists: only its products with a few vectors are computed, from blocks of the clients' cosines.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedssl.ensemble.base import NO_CONTRAST
from fedssl.similarity import Similarity

OVERSAMPLING = 8  # vectors beyond those asked for
PASSES = 6  # products with the kernel, each n^2 (d + num_coordinates) multiplications a client
ENTRIES = 2**22  # cosines at a time: 16 MB


def principal_coordinates(
    similarities: Sequence[Similarity], num_coordinates: int, generator: torch.Generator, *, whitening: float = 0.0
) -> Float[Tensor, "n c"]:
    """Where each public image lies. Without whitening, c_i . c_j is the best approximation of Kbar[i, j] there is.

    Kbar = mean_k C S_k C / |C S_k C|_F over all n public images, C = I - 11'/n: `ensemble.MeanKernel` of the whole
    set, in which every client counts alike and a collapsed one not at all. Classical scaling (Torgerson 1952,
    https://doi.org/10.1007/BF02288916): eigenvectors times the square roots of their eigenvalues, in descending order;
    here times their power (1 - whitening) / 2. A cosine sees little else than the few largest directions unless they
    are shrunk.
    By subspace iteration (Halko et al. 2011, https://arxiv.org/abs/0909.4061, Algorithm 4.4).

    Args:
        similarities: at least one, all of the same n public images and on one device.
        num_coordinates: at most so many; directions without variance are left out, c is the number that remains.
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
    basis = torch.randn(n, min(n, wanted + OVERSAMPLING), generator=generator).to(device)
    for _ in range(PASSES):
        basis = torch.linalg.qr(product(basis)).Q
    values, vectors = torch.linalg.eigh(basis.T @ product(basis))
    values, vectors = values.flip(0)[:wanted], (basis @ vectors).flip(1)[:, :wanted]
    kept = values > 1e-5 * values[:1].clamp_min(torch.finfo(values.dtype).tiny)  # below, they are rounding
    coordinates: Tensor = vectors[:, kept] * values[kept] ** ((1 - whitening) / 2)
    return coordinates


def _product(similarity: Similarity, vectors: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
    columns = torch.arange(similarity.num_samples, device=similarity.device)
    batches = torch.split(columns, max(1, ENTRIES // len(columns)))
    return torch.cat([similarity.block(rows, columns) @ vectors for rows in batches])


def _centred_norm(similarity: Similarity) -> float:
    """|C S C|_F: |S|^2 less 2/n |S 1|^2 plus (1' S 1)^2 / n^2, under the root."""
    n = similarity.num_samples
    ones = torch.ones(n, 1, device=similarity.device)
    sums = _product(similarity, ones).double()  # (n, 1), row sums
    _, squares = similarity.sums()
    centred = squares - 2 / n * sums.square().sum().item() + (sums.sum().item() / n) ** 2
    return math.sqrt(max(centred, 0.0))
