"""Contrastive losses: pure functions of projections, one per formula.

All of them accept half precision and autocast: cosines and the softmax over them are computed in float32 (float64 stays
float64), because 1 / temperature magnifies whatever the cosine lost.
"""

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


def _unit(z: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    """Rows of norm 1, in float32 or better."""
    return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)


def _products(z1: Float[Tensor, "b d"], z2: Float[Tensor, "k d"]) -> Float[Tensor, "b k"]:
    """All inner products; autocast would take them in half precision."""
    with torch.autocast(z1.device.type, enabled=False):
        return z1 @ z2.T
