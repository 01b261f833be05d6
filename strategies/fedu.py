"""FedU: clients share encoders, and take over the global predictor only where they have changed little.

Zhuang et al. 2021, https://arxiv.org/abs/2108.06492. Made for BYOL: the online encoder (backbone, projector) and the
predictor go up and are averaged by number of images; every client starts from the global encoder; its target network
never leaves it. The paper's divergence-aware predictor update (DAPU): the global predictor replaces the client's own if
the client's divergence is below a threshold, else the client goes on with its own. At its first round it has none of
its own. A method without a predictor leaves nothing to decide: then FedU is FedAvg, and says so in the report. Where
clients have different methods (`client.methods`), those without a predictor send the one that they were sent.

Departs from the paper: it compares the global encoder with the client's. The authors' code compares the client's
encoder at the start and at the end of its own previous training, by the mean over the convolutions of the L2 norm of
the difference. We do as the code, because the threshold .4 is a number on that scale. The code picks layers by name, so
it leaves out the convolutions of shortcuts; we take every weight of the backbone with two dimensions or more, which in
a convolutional network are all its convolutions, so that other networks have a divergence, too. A predictor that is
kept is kept with its batch norm's running averages. A client that sat out rounds decides by its last training.

The scale depends on network, optimiser and epochs. On the digits with the default training (BYOL, Adam, 10 epochs) the
divergences are .5 to 1.4, so at .4 every client keeps its own predictor; clients report theirs as `divergence`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.federation.client import Broadcast, Client
from fedssl.federation.per_family import Averaging
from fedssl.federation.records import Upload, load_state, model_state
from fedssl.federation.server import Server
from fedssl.models import Model

DIVERGENCE, PREDICTOR = "fedu/divergence", "fedu/predictor/"  # in the client's memory


@dataclass(frozen=True, kw_only=True)
class FedUClient:
    """The client half: choose a predictor, train, send all weights back."""

    local_epochs: int
    threshold: float  # the paper's mu: from this divergence on a client keeps its own predictor

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ConfigError(
                f"strategy.client.threshold must be at least 0 (0: every client keeps its own predictor; inf: none "
                f"does), got {self.threshold}; the authors' code has .4."
            )

    def __call__(self, client: Client, broadcast: Broadcast) -> Upload:
        """One round of one client."""
        model = client.load(broadcast)
        if "predictor" not in model.heads:
            metrics = client.train(model, epochs=self.local_epochs)
            return client.upload(client.weights(model), metrics, codec="weights")
        keeps_own = self._choose_predictor(client, model.heads["predictor"])
        start = layers(model)
        metrics = client.train(model, epochs=self.local_epochs)
        divergence = mean_distance(start, layers(model))
        self._remember(client, model.heads["predictor"], divergence)
        metrics |= {"divergence": divergence, "own_predictor": float(keeps_own)}
        return client.upload(client.weights(model), metrics, codec="weights")

    def _choose_predictor(self, client: Client, predictor: nn.Module) -> bool:
        """DAPU; `predictor` is the global one, and becomes the client's own if this returns True."""
        diverged = DIVERGENCE in client.memory and float(client.memory[DIVERGENCE]) >= self.threshold
        if diverged:
            own = {k.removeprefix(PREDICTOR): v for k, v in client.memory.items() if k.startswith(PREDICTOR)}
            load_state(predictor, own)
        return diverged

    def _remember(self, client: Client, predictor: nn.Module, divergence: float) -> None:
        client.memory[DIVERGENCE] = torch.tensor(divergence, dtype=torch.float64)
        client.memory |= {f"{PREDICTOR}{k}": v.to("cpu", copy=True) for k, v in model_state(predictor).items()}


def layers(model: Model) -> list[Tensor]:
    """A copy of every weight of the backbone that has two dimensions or more, on the CPU."""
    return [weight.detach().to("cpu", copy=True) for weight in model.backbone.parameters() if weight.ndim > 1]


def mean_distance(start: Sequence[Float[Tensor, "..."]], end: Sequence[Float[Tensor, "..."]]) -> float:
    """The mean over the layers of |end - start|, the L2 norm of all entries; 0 without layers."""
    distances = [float((b - a).double().norm()) for a, b in zip(start, end, strict=True)]
    return math.fsum(distances) / max(1, len(distances))


class FedU(Averaging):
    """The server half: the mean of the uploads, predictors included, by number of images."""

    def __init__(self, *, server: Server) -> None:
        super().__init__(server=server, weighted=True)

    def notes(self) -> list[str]:
        """Also that there was nothing to decide."""
        predictors = "predictor" in self.server.build_model(self.server.report_family).heads
        return super().notes() + ([] if predictors else ["the method has no predictor: here FedU is FedAvg"])
