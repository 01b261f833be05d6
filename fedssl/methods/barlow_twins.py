"""Barlow Twins: the cross-correlation of the views' dimensions is to be the identity. No negatives, no second network.

Zbontar et al. 2021, https://arxiv.org/abs/2103.03230. Departs from the paper: the projector is the run's (there three
layers of 8192, with batch norm).
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.losses import barlow_twins
from fedssl.methods import Method
from fedssl.models import Model


@dataclass(frozen=True, kw_only=True)
class BarlowTwins(Method):
    """Redundancy reduction. The number lives in conf/method/barlow_twins.yaml."""

    off_diagonal_weight: float  # the paper's lambda, >= 0

    def __post_init__(self) -> None:
        if not self.off_diagonal_weight >= 0:
            raise ConfigError(
                f"method.off_diagonal_weight must be at least 0, got {self.off_diagonal_weight}; .0051 in the paper, "
                f"more for narrow projections."
            )

    def loss(
        self, model: Model, state: nn.Module, x1: Float[Tensor, "b 3 s s"], x2: Float[Tensor, "b 3 s s"]
    ) -> Float[Tensor, ""]:
        """Algorithm 1, each view a pass."""
        return barlow_twins(model(x1), model(x2), self.off_diagonal_weight)
