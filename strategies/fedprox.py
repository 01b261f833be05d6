"""FedProx: local training that is pulled back to the weights it started from.

Li et al. 2018, https://arxiv.org/abs/1812.06127, with a self-supervised local loss. The client minimises its loss plus
mu / 2 * |w - w_global|^2 (Eq. 2). That is the paper's mu; codes that add mu * |w - w_global|^2 need half of it. mu = 0
is FedAvg, bit for bit.

w is every trained weight: backbone, projector and the method's heads. Batch norm's running averages follow no gradient
and are left alone. Under an adaptive optimiser (adam, the default) the term's gradient is rescaled with the loss's, so
a good mu for SGD is none for Adam.

Departs from the paper: it samples clients by their number of images and averages them equally, the server half here is
FedAvg's (conf/strategy/fedprox.yaml), which samples equally and averages by number of images. Everybody does all local
epochs: the paper's stragglers, who stop early, are not simulated.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedssl.errors import ConfigError
from fedssl.federation.client import Broadcast, Client
from fedssl.federation.records import Upload
from fedssl.models import Model
from fedssl.train import Penalty


@dataclass(frozen=True, kw_only=True)
class FedProxClient:
    """The client half: train near the broadcast weights, send all weights back."""

    local_epochs: int
    mu: float  # of mu / 2 * |w - w_global|^2, >= 0

    def __post_init__(self) -> None:
        if not 0 <= self.mu < math.inf:
            raise ConfigError(
                f"strategy.client.mu must be at least 0 (0: FedAvg), got {self.mu}; the paper tries .001 to 1."
            )

    def __call__(self, client: Client, broadcast: Broadcast) -> Upload:
        """One round of one client."""
        model = client.load(broadcast)
        # Not even a term of 0: it would give weights that the method does not train a gradient, and so weight decay.
        penalty = proximal_term(model, self.mu) if self.mu > 0 else None
        metrics = client.train(model, epochs=self.local_epochs, penalty=penalty)
        return client.upload(client.weights(model), metrics, codec="weights")


def proximal_term(model: Model, mu: float) -> Penalty:
    """Eq. 2's second term for a model that starts where `model` is now.

    Args:
        model: the weights to stay near; they are copied.
        mu: >= 0.
    """
    start = [weight.detach().clone() for weight in model.parameters()]

    def term(model: Model, x1: Tensor, x2: Tensor) -> Float[Tensor, ""]:
        squares = [(weight - old).square().sum() for weight, old in zip(model.parameters(), start, strict=True)]
        return mu / 2 * torch.stack(squares).sum()

    return term
