"""BYOL: predict what a slowly following copy of the network makes of the other view. No negatives.

Grill et al. 2020, https://arxiv.org/abs/2006.07733. Departs from the paper: `ema_decay` is constant (there it grows to
1 over one long training, and a federation has many short ones; FedEMA, https://arxiv.org/abs/2204.04385, keeps .99).
The predictor's width is a setting: the paper's 4096 would be most of a small client's weights.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.losses import cosine_distance
from fedssl.methods import Method
from fedssl.models import Model, TargetEncoder
from fedssl.models.heads import MLP


@dataclass(frozen=True, kw_only=True)
class BYOL(Method):
    """A predictor on the online network, and the target network as state. The numbers live in conf/method/byol.yaml."""

    ema_decay: float  # of the target network, per step: 0 copies the online one, 1 stays at its start
    predictor_dim: int  # width of the predictor's hidden layer

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay <= 1:
            raise ConfigError(
                f"method.ema_decay must be between 0 (a copy of the online network) and 1 (frozen), "
                f"got {self.ema_decay}; .99 to .999 is usual."
            )
        if self.predictor_dim < 1:
            raise ConfigError(f"method.predictor_dim must be at least 1, got {self.predictor_dim}; 4096 in the paper.")

    def heads(self, dim: int) -> dict[str, nn.Module]:
        """The predictor, of the projector's form with batch norm."""
        return {"predictor": MLP(in_dim=dim, hidden_dim=self.predictor_dim, out_dim=dim, batch_norm=True)}

    def new_state(self, model: Model) -> TargetEncoder:
        """The target network starts as a copy of the online one."""
        return TargetEncoder(model)

    def loss(
        self, model: Model, state: nn.Module, x1: Float[Tensor, "b 3 s s"], x2: Float[Tensor, "b 3 s s"]
    ) -> Float[Tensor, ""]:
        """Eq. 2 for both orders of the views: (2 - 2 cos(q(z1), z2')) + (2 - 2 cos(q(z2), z1')), each view a pass."""
        predictor = model.heads["predictor"]
        first = cosine_distance(predictor(model(x1)), state(x2))
        second = cosine_distance(predictor(model(x2)), state(x1))
        return 2 * (first + second)

    def after_step(self, model: Model, state: nn.Module) -> None:
        """Eq. 1: the target follows."""
        assert isinstance(state, TargetEncoder)
        state.follow(model, self.ema_decay)
