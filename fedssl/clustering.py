"""Clusters of equal size: Sinkhorn's soft assignment, its rounding, and k-means by both."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor


@torch.no_grad()
def balanced_assignment(scores: Float[Tensor, "n k"], temperature: float, num_iterations: int) -> Float[Tensor, "n k"]:
    """Soft assignment of n points to k clusters: rows sum to 1, and columns, after enough iterations, to n / k.

    The matrix a_i b_j exp(scores_ij / temperature) with these sums, by dividing columns and rows by their sums in turn:
    Sinkhorn and Knopp 1967; Cuturi 2013, https://arxiv.org/abs/1306.0895, as optimal transport with entropy. SwAV's
    codes, Caron et al. 2020, Eq. 3 to 5, https://arxiv.org/abs/2006.09882. In log space; no gradient.

    Args:
        scores: of each point with each cluster, larger where they belong together.
        temperature: > 0; smaller is harder, and takes more iterations.
        num_iterations: at least 1, of columns and rows each; rows come last.
    """
    log_p = scores.to(torch.promote_types(scores.dtype, torch.float32)) / temperature
    for _ in range(num_iterations):
        log_p = log_p - log_p.logsumexp(dim=0)
        log_p = log_p - log_p.logsumexp(dim=1, keepdim=True)
    return log_p.exp()


def equal_clusters(assignment: Float[Tensor, "n k"]) -> Int64[Tensor, " n"]:
    """Each point's cluster, exactly n / k points in each; n a multiple of k.

    The largest entries first, each as long as its point is free and its cluster has room; of equal ones the earlier.
    """
    n, k = assignment.shape
    room, clusters = [n // k] * k, [-1] * n
    for position in assignment.flatten().argsort(descending=True, stable=True).tolist():
        point, cluster = divmod(position, k)
        if clusters[point] < 0 and room[cluster] > 0:
            clusters[point] = cluster
            room[cluster] -= 1
    return torch.tensor(clusters, device=assignment.device)


def equal_kmeans(
    z: Float[Tensor, "n d"],
    k: int,
    *,
    temperature: float,
    num_iterations: int,
    num_sinkhorn: int,
    generator: torch.Generator,
) -> Float[Tensor, "k d"]:
    """Unit centroids of clusters with n / k points each, by cosine.

    Args:
        z: unit rows; n is a multiple of k.
        k: clusters.
        temperature: of `balanced_assignment`.
        num_iterations: of k-means, at least 1.
        num_sinkhorn: iterations of `balanced_assignment` in each.
        generator: CPU; k points to start from.
    """
    centroids = z[torch.randperm(len(z), generator=generator)[:k].to(z.device)]
    for _ in range(num_iterations):
        clusters = equal_clusters(balanced_assignment(z @ centroids.T, temperature, num_sinkhorn))
        centroids = F.normalize(torch.zeros_like(centroids).index_add_(0, clusters, z), dim=1)
    return centroids
