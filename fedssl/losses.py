"""Losses: pure functions, one per formula.

The contrastive ones compare two views; `barlow_twins` and `vicreg` keep dimensions apart instead of images. The
similarity losses compare a student with a target: over k anchors (rows of
probabilities p against logits, whose softmax is q), or by kernels (`cka_loss`). `feature_distance` compares features.

All that take projections accept half precision and autocast: cosines and what follows from them are computed in
float32 (float64 stays float64), because 1 / temperature magnifies whatever the cosine lost.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def nt_xent(z1: Float[Tensor, "b d"], z2: Float[Tensor, "b d"], temperature: float) -> Float[Tensor, ""]:
    """SimCLR's contrastive loss, averaged over the 2b views of a batch of b images.

    Chen et al. 2020, Eq. 1 and Algorithm 1, https://arxiv.org/abs/2002.05709. Collapsed projections give log(2b - 1).

    Args:
        z1: projections of the first views; need not be normalised.
        z2: projections of the second views; row i of both comes from image i.
        temperature: > 0.
    """
    z = _unit(torch.cat([z1, z2]))  # (2b, d)
    logits = _products(z, z).div(temperature).fill_diagonal_(-torch.inf)  # a view is not its own negative
    positives = torch.arange(len(z), device=z.device).roll(len(z1))  # i <-> i + b
    return F.cross_entropy(logits, positives)


def info_nce(z1: Float[Tensor, "b d"], z2: Float[Tensor, "b d"], temperature: float) -> Float[Tensor, ""]:
    """One-directional InfoNCE: each first view finds its partner among the b second views.

    van den Oord et al. 2018, Eq. 4, https://arxiv.org/abs/1807.03748, with cosine similarity as in MoCo (Eq. 1,
    https://arxiv.org/abs/1911.05722). FLESD's clients (https://arxiv.org/abs/2109.14611) train with it: not
    symmetrised, b - 1 negatives which all come from the other view, gradient through both views.
    Collapsed projections give log(b).

    Args:
        z1: projections of the first views; need not be normalised.
        z2: projections of the second views; row i of both comes from image i.
        temperature: > 0.
    """
    logits = _products(_unit(z1), _unit(z2)) / temperature  # (b, b)
    return F.cross_entropy(logits, torch.arange(len(z1), device=z1.device))


def momentum_contrast(
    z: Float[Tensor, "b d"], keys: Float[Tensor, "b d"], queue: Float[Tensor, "k d"], temperature: float
) -> Float[Tensor, ""]:
    """MoCo's InfoNCE: each query finds its own key among it and the k keys in the queue.

    He et al. 2019, Eq. 1, https://arxiv.org/abs/1911.05722. Another image's key of this batch is no negative.
    Collapsed projections give log(1 + k).

    Args:
        z: queries, projections of the first views; need not be normalised.
        keys: of the second views, row i of the same image; need not be normalised.
        queue: keys of earlier batches, likewise.
        temperature: > 0.
    """
    queries = _unit(z)
    positives = (queries * _unit(keys)).sum(dim=1, keepdim=True)
    logits = torch.cat([positives, _products(queries, _unit(queue))], dim=1) / temperature  # (b, 1 + k)
    return F.cross_entropy(logits, torch.zeros(len(z), dtype=torch.long, device=z.device))


def barlow_twins(z1: Float[Tensor, "b d"], z2: Float[Tensor, "b d"], off_diagonal_weight: float) -> Float[Tensor, ""]:
    """sum_i (1 - C_ii)^2 + off_diagonal_weight * sum_i sum_{j != i} C_ij^2, C the cross-correlation of the dimensions.

    Zbontar et al. 2021, Eq. 1 and 2, https://arxiv.org/abs/2103.03230. Each dimension is standardised over its batch;
    as in the paper's Algorithm 1 by batch norm, whose 1e-5 is added to the variance. Collapsed projections give d.

    Args:
        z1: projections of the first views.
        z2: projections of the second views; row i of both comes from image i.
        off_diagonal_weight: the paper's lambda, >= 0.
    """
    correlation = _products(_standardised(z1).T, _standardised(z2).T) / len(z1)  # (d, d)
    diagonal = correlation.diagonal()
    return (1 - diagonal).square().sum() + off_diagonal_weight * (correlation.square().sum() - diagonal.square().sum())


def vicreg(
    z1: Float[Tensor, "b d"],
    z2: Float[Tensor, "b d"],
    invariance_weight: float,
    variance_weight: float,
    covariance_weight: float,
) -> Float[Tensor, ""]:
    """Variance, invariance and covariance: views agree, dimensions keep a spread of 1 and do not repeat each other.

    Bardes et al. 2021, Eq. 6 and Algorithm 1, https://arxiv.org/abs/2105.04906:

        invariance_weight  * mean over images and dimensions of (z1 - z2)^2
      + variance_weight    * sum over both views of (1/d) sum_j max(0, 1 - sqrt(Var(z_j) + 1e-4))
      + covariance_weight  * sum over both views of (1/d) sum_i sum_{j != i} Cov_ij^2

    Eq. 5 sums the first over dimensions; Algorithm 1 and the authors' code take the mean, and so does this, because
    the paper's weights are the code's. The code halves the second; the paper, and this, do not. Collapsed projections
    give 2 * .99 * variance_weight.

    Args:
        z1: projections of the first views, b >= 2.
        z2: projections of the second views; row i of both comes from image i.
        invariance_weight: the paper's lambda, >= 0.
        variance_weight: the paper's mu, >= 0.
        covariance_weight: the paper's nu, >= 0.
    """
    z1, z2 = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (z1, z2))
    spread = repeated = z1.new_zeros(())
    for z in (z1, z2):
        centred = z - z.mean(dim=0)
        covariance = _products(centred.T, centred.T) / (len(z) - 1)  # (d, d)
        variances = covariance.diagonal()
        spread = spread + F.relu(1 - (variances + 1e-4).sqrt()).mean()
        repeated = repeated + (covariance.square().sum() - variances.square().sum()) / z.shape[1]
    return invariance_weight * F.mse_loss(z1, z2) + variance_weight * spread + covariance_weight * repeated


def cosine_scores(z: Float[Tensor, "b d"], prototypes: Float[Tensor, "k d"]) -> Float[Tensor, "b k"]:
    """Cosines of projections with prototypes, neither of which need be normalised."""
    return _products(_unit(z), _unit(prototypes))


def cross_entropy(logits: Float[Tensor, "b k"], p: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    """-(1/b) sum_ij p_ij log q_ij in nats, q = softmax(logits): FLESD's loss and SEED's.

    Shi et al. 2021, https://arxiv.org/abs/2109.14611; Fang et al. 2021, https://arxiv.org/abs/2101.04731.

    Args:
        logits: the student's cosines to the anchors over its temperature.
        p: the target; rows sum to 1.
    """
    return F.cross_entropy(logits, p)


def entropy(p: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    """H(p) = -(1/b) sum_ij p_ij log p_ij in nats, with 0 log 0 = 0: the least that `cross_entropy` can be."""
    terms: Tensor = torch.special.entr(p)
    return terms.sum(dim=1).mean()


def kl_divergence(logits: Float[Tensor, "b k"], p: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    """KL(p || q) in nats, mean over rows; `cross_entropy` less `entropy`, so its gradient is the cross-entropy's.

    Kullback and Leibler 1951. Arguments as for `cross_entropy`.
    """
    return cross_entropy(logits, p) - entropy(p)


def reverse_kl_divergence(logits: Float[Tensor, "b k"], p: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    """KL(q || p) = (1/b) sum_ij q_ij (log q_ij - log p_ij) in nats: a student that would rather miss modes of p.

    It is infinite where p_ij = 0, which a sharp target in float32 often is. p is therefore raised to float32's smallest
    normal number: a student pays at most 87.3 nats for a share on an anchor that the target excludes.

    Arguments as for `cross_entropy`.
    """
    log_q = F.log_softmax(logits, dim=1)
    return (log_q.exp() * (log_q - _log(p))).sum(dim=1).mean()


def js_divergence(logits: Float[Tensor, "b k"], p: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    """Jensen-Shannon divergence in nats, (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2; between 0 and log 2.

    Lin 1991, https://doi.org/10.1109/18.61115. In log space, so that entries where p or q is 0 have finite gradients.

    Arguments as for `cross_entropy`.
    """
    log_q, log_p = F.log_softmax(logits, dim=1), _log(p)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (p * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(dim=1).mean() / 2


def relation_divergence(
    z1: Float[Tensor, "b d"], z2: Float[Tensor, "b d"], anchors: Float[Tensor, "k d"], temperature: float
) -> Float[Tensor, ""]:
    """How differently two views of an image see k anchors: JS(r1, r2), r = softmax_j(cos(z, anchor_j) / temperature).

    FedX's relational loss, Han et al. 2022, https://arxiv.org/abs/2207.09158. Between 0 and log 2 nats, the mean over a
    batch; symmetric in the views. Gradient reaches both views and the anchors.

    Args:
        z1: of the first views; need not be normalised.
        z2: of the second views; row i of both comes from image i.
        anchors: of any images.
        temperature: > 0.
    """
    relations1, relations2 = (_products(_unit(z), _unit(anchors)) / temperature for z in (z1, z2))
    return js_divergence(relations1, F.softmax(relations2, dim=1))


def cka_loss(z: Float[Tensor, "b d"], kernel: Float[Tensor, "b b"]) -> Float[Tensor, ""]:
    """1 - linear CKA of a batch's embeddings with a kernel: 0 where their Gram matrix is the kernel, times a constant.

    CKA(K, L) = <HKH, HLH> / (|HKH| |HLH|) with K = z z^T, H = I - 1/b (Frobenius products). Kornblith et al. 2019,
    Eq. 3 and 4, https://arxiv.org/abs/1905.00414; as the loss that aligns networks of a federation on public
    images in Hetero-SSFL (Makhija et al. 2022, https://arxiv.org/abs/2205.12493). Embeddings that are all alike have
    CKA 0 and no gradient.

    Args:
        z: the student's embeddings; neither rotation nor scale of the whole batch matters.
        kernel: symmetric, of the same images in the same order.
    """
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    student, target = _centred(_products(wide, wide)).flatten(), _centred(kernel).flatten()
    return 1 - F.cosine_similarity(student, target, dim=0, eps=torch.finfo(student.dtype).tiny)


def cosine_distance(predicted: Float[Tensor, "b c"], coordinates: Float[Tensor, "b c"]) -> Float[Tensor, ""]:
    """1 - cos(predicted_i, coordinates_i), the mean over a batch: BYOL's regression loss, halved.

    Grill et al. 2020, Eq. 2, https://arxiv.org/abs/2006.07733. An image whose coordinates are all 0 costs 1 and has no
    gradient.
    """
    return 1 - (_unit(predicted) * _unit(coordinates)).sum(dim=1).mean()


def feature_distance(h: Float[Tensor, "b f"], reference: Float[Tensor, "b f"]) -> Float[Tensor, ""]:
    """(1/b) sum_i |h_i - reference_i|^2: how far features have gone from a frozen network's.

    The self-distillation term of Lee et al. 2022, https://arxiv.org/abs/2210.02871, there for the hidden
    representations of transformers during further pre-training.
    """
    return (h - reference).square().sum(dim=1).mean()


def _log(p: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    """log p, with zeros raised to the smallest normal number."""
    return p.clamp_min(torch.finfo(p.dtype).tiny).log()


def _centred(kernel: Float[Tensor, "b b"]) -> Float[Tensor, "b b"]:
    """H K H with H = I - 1/b, for symmetric K."""
    means = kernel.mean(dim=0)
    return kernel - means - means[:, None] + means.mean()


def _unit(z: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    """Rows of norm 1, in float32 or better."""
    return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)


def _standardised(z: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    """Columns of mean 0 and variance 1 over the batch, in float32 or better: batch norm without history or weights."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    return F.batch_norm(wide, None, None, training=True)


def _products(z1: Float[Tensor, "b d"], z2: Float[Tensor, "k d"]) -> Float[Tensor, "b k"]:
    """All inner products; autocast would take them in half precision."""
    with torch.autocast(z1.device.type, enabled=False):
        return z1 @ z2.T
