"""One-directional InfoNCE, the loss that FLESD's clients train with.

Shi et al. 2021, https://arxiv.org/abs/2109.14611 (there called SimCLR). Departs from the paper: nothing known.
The differences from `simclr.py`: first views look for second views only, negatives come from the other view only, and
each view is a forward pass of its own, so batch norm's statistics (and its running averages) are per view.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.losses import info_nce
from fedssl.methods import Method
from fedssl.models import Model


@dataclass(frozen=True, kw_only=True)
class InfoNCE(Method):
    """InfoNCE with gradient through both views. The number lives in conf/method/info_nce.yaml."""

    temperature: float  # > 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(
                f"method.temperature must be greater than 0, got {self.temperature}. InfoNCE divides cosines by it; "
                f"0.1 to 0.5 is usual."
            )

    def loss(
        self, model: Model, state: nn.Module, x1: Float[Tensor, "b 3 s s"], x2: Float[Tensor, "b 3 s s"]
    ) -> Float[Tensor, ""]:
        """Two forward passes, first views first."""
        return info_nce(model(x1), model(x2), self.temperature)
