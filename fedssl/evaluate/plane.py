"""Images in two dimensions, as a network sees them: for the eye, not for a figure."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedssl.evaluate.features import standardise


@dataclass(frozen=True, kw_only=True, eq=False)
class Plane:
    """Features along their two main directions.

    Args:
        coordinates: of each image; 0 along a direction that does not exist.
        shares: how much of the standardised features' variance each of the two holds.
    """

    coordinates: Float[Tensor, "n 2"]
    shares: Float[Tensor, " 2"]


def principal_plane(features: Float[Tensor, "n d"]) -> Plane | None:
    """The first two principal components of standardised features; None where a feature is not finite.

    Nothing is drawn, and the sign that principal components leave open is fixed: the largest entry of each direction
    (the first of such) is positive.

    Args:
        features: of n > 1 images.
    """
    if not torch.isfinite(features).all():
        return None
    x = standardise(features.double(), features.double())[0]
    left, singular, right = torch.linalg.svd(x, full_matrices=False)
    coordinates, shares = x.new_zeros(len(x), 2), x.new_zeros(2)
    for axis in range(min(2, len(singular))):
        size = right[axis].abs()
        sign = right[axis, (size > 0.999 * size.max()).nonzero()[0]].sign()  # of equals up to rounding, the first
        coordinates[:, axis] = left[:, axis] * singular[axis] * sign
        shares[axis] = singular[axis].square() / x.square().sum().clamp_min(torch.finfo(x.dtype).tiny)
    return Plane(coordinates=coordinates.float(), shares=shares.float())
