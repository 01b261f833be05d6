"""VICReg: views agree, each dimension keeps its spread, and no two say the same. No negatives, no second network.

Bardes et al. 2021, https://arxiv.org/abs/2105.04906. Departs from the paper: the projector is the run's (there three
layers of 8192, with batch norm); `fedssl.losses.vicreg` says which of paper and authors' code it follows.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.losses import vicreg
from fedssl.methods import Method
from fedssl.models import Model


@dataclass(frozen=True, kw_only=True)
class VICReg(Method):
    """Three terms, three weights. The numbers live in conf/method/vicreg.yaml."""

    invariance_weight: float  # the paper's lambda, >= 0
    variance_weight: float  # the paper's mu, > 0
    covariance_weight: float  # the paper's nu, >= 0

    def __post_init__(self) -> None:
        for name in ("invariance_weight", "covariance_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(
                    f"method.{name} must be at least 0, got {getattr(self, name)}; 25 and 1 in the paper."
                )
        if not self.variance_weight > 0:
            raise ConfigError(
                f"method.variance_weight must be greater than 0, got {self.variance_weight}: nothing else keeps all "
                f"images from one point. 25 in the paper."
            )

    def loss(
        self, model: Model, state: nn.Module, x1: Float[Tensor, "b 3 s s"], x2: Float[Tensor, "b 3 s s"]
    ) -> Float[Tensor, ""]:
        """Algorithm 1, each view a pass."""
        return vicreg(model(x1), model(x2), self.invariance_weight, self.variance_weight, self.covariance_weight)
