"""FedEMA: a client mixes the global weights into its own, the less the further apart they are.

Zhuang et al. 2022, https://arxiv.org/abs/2204.04385. Made for BYOL. Where FedAvg's client starts from the global
weights W_g, this one starts from

    mu * W_k + (1 - mu) * W_g,    mu = min(lambda * |W_g - W_k|, 1),

W_k being where its own last training ended. In its first round a client has no W_k, and mu = 0. One mu goes for the
encoder (backbone, projector) and for the predictor. The norm is the L2 norm over all trained weights of the encoder, as
one vector. lambda is a setting, or (the paper's autoscaler) each client's own, measured once in its second round so
that mu = tau there: lambda_k = tau / |W_g - W_k|. Where lambda * |W_g - W_k| reaches 1, the client no longer listens.
The target network never leaves it. The server half is FedAvg's (conf/strategy/fedema.yaml).

Departs from the paper: nothing known. The authors' code measures something else, for which the paper's fixed
lambda = .8 stands: the mean over the convolutions of the L2 norm of what the client's own last training changed. Divide
accordingly, or use the autoscaler, which needs no scale. Batch norm's running averages are statistics, not weights:
they come from the broadcast and are no part of the norm (code: the same for the encoder). A client that sat out rounds
mixes in what it last had; the code can be told to take the global weights, target network included, in that case.
Other heads than a predictor are mixed in the same way, and a method without any mixes the encoder alone.
"""

import math
from dataclasses import dataclass

import torch

from fedssl.errors import ConfigError
from fedssl.federation.client import Broadcast, Client, own_model
from fedssl.federation.records import Upload
from fedssl.models import Model, move_average

SCALE = "fedema/lambda"  # in the client's memory, beside its model


@dataclass(frozen=True, kw_only=True)
class FedEMAClient:
    """The client half: mix, train, keep the model, send all weights back."""

    local_epochs: int
    scale: float | None  # lambda, >= 0; None: the autoscaler measures one per client
    tau: float  # 0..1, the autoscaler's mu at a client's second round

    def __post_init__(self) -> None:
        if self.scale is not None and not 0 <= self.scale < math.inf:
            raise ConfigError(
                f"strategy.client.scale (lambda) must be at least 0, or null for the autoscaler, got {self.scale}."
            )
        if not 0 <= self.tau <= 1:
            raise ConfigError(
                f"strategy.client.tau must be between 0 (FedAvg) and 1 (clients keep their own weights), "
                f"got {self.tau}; .7 in the paper."
            )

    def __call__(self, client: Client, broadcast: Broadcast) -> Upload:
        """One round of one client."""
        model = client.load(broadcast)
        mixed = self._mix_in_own(client, model)
        metrics = client.train(model, epochs=self.local_epochs) | mixed
        client.remember(model, client.family)
        return client.upload(client.weights(model), metrics, codec="weights")

    def _mix_in_own(self, client: Client, model: Model) -> dict[str, float]:
        """`model` comes with the global weights and leaves with the mixture; returns `mu` and `divergence`."""
        if not own_model(client.memory, client.family):
            return {"mu": 0.0}
        own = client.remembered(client.family)
        divergence = encoder_distance(model, own)
        mu = min(self._scale(client, divergence) * divergence, 1.0)
        move_average(model, own, 1 - mu, buffers=False)
        return {"mu": mu, "divergence": divergence}

    def _scale(self, client: Client, divergence: float) -> float:
        """lambda, or the client's own, which is measured at the first divergence that is one."""
        if self.scale is not None:
            return self.scale
        if SCALE not in client.memory:
            if divergence == 0:  # the only client of its family gets its own weights back: nothing to mix or measure
                return 0.0
            client.memory[SCALE] = torch.tensor(self.tau / divergence, dtype=torch.float64)
        return float(client.memory[SCALE])


@torch.no_grad()
def encoder_distance(a: Model, b: Model) -> float:
    """|W_a - W_b|: the L2 norm over the trained weights of backbone and projector, as one vector."""
    encoders = [[*model.backbone.parameters(), *model.projector.parameters()] for model in (a, b)]
    squares = [float((x - y).double().square().sum()) for x, y in zip(*encoders, strict=True)]
    return math.sqrt(math.fsum(squares))
