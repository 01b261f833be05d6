"""SimSiam: predict the other view's projection, which stands still. No negatives, no second network.

Chen and He 2020, https://arxiv.org/abs/2011.10566. Departs from the paper: 1 is added to the loss, which is then 0
where views agree; the projector is the run's (there three layers, with batch norm on each), so the batch norm of its
output, which the paper's Table 3 finds necessary, is in the loss, without weights as in the authors' code; the
predictor's learning rate follows the schedule like all others (there it is constant).
"""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.losses import cosine_distance
from fedssl.methods import Method
from fedssl.models import Model
from fedssl.models.heads import MLP


@dataclass(frozen=True, kw_only=True)
class SimSiam(Method):
    """A predictor with a bottleneck, and a stopped gradient. The number lives in conf/method/simsiam.yaml."""

    predictor_dim: int  # width of the predictor's hidden layer

    def __post_init__(self) -> None:
        if self.predictor_dim < 1:
            raise ConfigError(
                f"method.predictor_dim must be at least 1, got {self.predictor_dim}; in the paper a quarter of the "
                f"projections' width."
            )

    def heads(self, dim: int) -> dict[str, nn.Module]:
        """The predictor: batch norm on the hidden layer, none on what comes out."""
        return {"predictor": MLP(in_dim=dim, hidden_dim=self.predictor_dim, out_dim=dim, batch_norm=True)}

    def loss(
        self, model: Model, state: nn.Module, x1: Float[Tensor, "b 3 s s"], x2: Float[Tensor, "b 3 s s"]
    ) -> Float[Tensor, ""]:
        """Eq. 4 and Algorithm 1, plus 1: the mean of both orders' 1 - cos(p, stop-gradient z), each view a pass.

        z are projections, standardised over the batch.
        """
        predictor = model.heads["predictor"]
        z1, z2 = (F.batch_norm(model(x), None, None, training=True) for x in (x1, x2))
        first = cosine_distance(predictor(z1), z2.detach())
        second = cosine_distance(predictor(z2), z1.detach())
        return (first + second) / 2
