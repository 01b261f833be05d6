"""SimCLR: two views of an image attract each other, all other views in the batch repel.

Chen et al. 2020, https://arxiv.org/abs/2002.05709. Departs from the paper: batch norm, where a network has any, sees
one device's batch, because a client is one device.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.losses import nt_xent
from fedssl.methods import Method
from fedssl.models import Model


@dataclass(frozen=True, kw_only=True)
class SimCLR(Method):
    """NT-Xent over the 2b views of a batch, in one forward pass. The number lives in conf/method/simclr.yaml."""

    temperature: float  # > 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(
                f"method.temperature must be greater than 0, got {self.temperature}. SimCLR divides cosines by it; "
                f"0.1 to 0.5 is usual."
            )

    def loss(
        self, model: Model, state: nn.Module, x1: Float[Tensor, "b 3 s s"], x2: Float[Tensor, "b 3 s s"]
    ) -> Float[Tensor, ""]:
        """Algorithm 1. Both views go through the network as one batch: batch norm's statistics span all 2b of them."""
        z1, z2 = model(torch.cat([x1, x2])).chunk(2)
        return nt_xent(z1, z2, self.temperature)
