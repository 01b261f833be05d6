"""Heads on top of a backbone, used in training and dropped in evaluation."""

from jaxtyping import Float
from torch import Tensor, nn

from fedssl.errors import ConfigError


class MLP(nn.Module):
    """A projector: Linear, ReLU, Linear; SimCLR's (https://arxiv.org/abs/2002.05709, section 4.2) and FLESD's.

    Args:
        in_dim: width of the features, `fedssl.models.feature_dim(backbone, image_size)`.
        hidden_dim: width of the hidden layer; None for `in_dim`, as in FLESD.
        out_dim: width of the projections.
        batch_norm: normalise the hidden layer before the ReLU (SimCLR's code does, FLESD does not).
    """

    def __init__(self, *, in_dim: int, hidden_dim: int | None, out_dim: int, batch_norm: bool) -> None:
        super().__init__()
        hidden_dim = in_dim if hidden_dim is None else hidden_dim
        if hidden_dim < 1 or out_dim < 1:
            raise ConfigError(
                f"projector.hidden_dim (null: as wide as the features) and projector.out_dim must be at least 1, "
                f"got {hidden_dim} and {out_dim}."
            )
        self.hidden = nn.Linear(in_dim, hidden_dim, bias=not batch_norm)  # batch norm brings its own bias
        self.norm = nn.BatchNorm1d(hidden_dim) if batch_norm else nn.Identity()
        self.activation = nn.ReLU()
        self.out = nn.Linear(hidden_dim, out_dim)

    def forward(self, features: Float[Tensor, "b f"]) -> Float[Tensor, "b d"]:
        """Projections of a batch of features."""
        projections: Tensor = self.out(self.activation(self.norm(self.hidden(features))))
        return projections


def wide_mlp(*, in_dim: int, widening: float, out_dim: int, batch_norm: bool) -> MLP:
    """An MLP whose hidden layer is wider than the features, which small networks profit from.

    Shi et al. 2021, https://arxiv.org/abs/2107.14762, "wide" head: twice as wide, and 128 projections.

    Args:
        in_dim: width of the features.
        widening: width of the hidden layer over it, > 0; rounded to a whole number.
        out_dim: width of the projections.
        batch_norm: normalise the hidden layer before the ReLU.
    """
    return MLP(in_dim=in_dim, hidden_dim=round(widening * in_dim), out_dim=out_dim, batch_norm=batch_norm)
