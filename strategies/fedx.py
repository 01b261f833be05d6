"""FedX: the received global model teaches a second time, as the frozen view of every image.

Han et al. 2022, https://arxiv.org/abs/2207.09158. An addition to the run's method (the paper adds it to SimCLR, MoCo,
BYOL, ProtoCL and FedU). z are the client's projections, h = predictor(z), g the projections of the model that was
broadcast, frozen; a batch of random private images a gives anchors to compare views by:

    loss = method + NT-Xent(h1, g2) + JS(h1, h2; g_a) + JS(z1, z2; z_a)

The predictor is a head of its own, `fedx_predictor`, apart from BYOL's: it answers the global model, not the average of
the local one. It travels with the weights. The server half is FedAvg's (conf/strategy/fedx.yaml).

Departs from the paper: every architecture family is a federation of its own. The method makes its own forward passes,
so a step is one more of the client's network, of both views and the anchors, and batch norm's averages move twice.
Before the first round batch norm has no averages, and the teacher in eval mode gets those of a batch of private images.

Paper: JS is the mean divergence KL(r || m) of both views' relations r from their mean m. Authors' code: KL(m || r). We
do as the paper says, and as Jensen and Shannon. As in the authors' code no gradient is stopped but at the global model:
the views teach each other, and anchors z_a learn too. (To stop it at m would change nothing, see the tests.) Their code
may give m a temperature of its own, by default the same. Their weights of clients do not sum to 1 where a round samples
clients; here they do.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.federation.client import Broadcast, Client
from fedssl.federation.records import Upload
from fedssl.losses import nt_xent, relation_divergence
from fedssl.models import Model, TargetEncoder, calibrate_batch_norm
from fedssl.models.heads import MLP
from fedssl.seeding import generator


@dataclass(frozen=True, kw_only=True)
class FedXClient:
    """The client half. The numbers live in conf/strategy/fedx.yaml."""

    local_epochs: int
    predictor_dim: int | None  # width of the predictor's hidden layer; None: of the projections
    contrastive_temperature: float  # of NT-Xent with the global model, > 0
    relation_temperature: float  # of what views make of the anchors, > 0

    def __post_init__(self) -> None:
        for name in ("contrastive_temperature", "relation_temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"strategy.client.{name} must be greater than 0, got {getattr(self, name)}; 0.1 in the paper."
                )
        if self.predictor_dim is not None and self.predictor_dim < 1:
            raise ConfigError(
                f"strategy.client.predictor_dim must be at least 1, or null for the projections' width, "
                f"got {self.predictor_dim}."
            )

    def heads(self, dim: int) -> dict[str, nn.Module]:
        """The predictor."""
        predictor = MLP(in_dim=dim, hidden_dim=self.predictor_dim, out_dim=dim, batch_norm=False)
        return {"fedx_predictor": predictor}

    def __call__(self, client: Client, broadcast: Broadcast) -> Upload:
        """One round of one client."""
        model = client.load(broadcast)
        teacher = TargetEncoder(model)
        private, views = client.private_set, client.views
        first = private.take(np.arange(min(len(private), client.local.batch_size)))
        calibrate_batch_norm(teacher, views.plain(first.to(client.device)))
        teacher.eval()
        rows_rng = client.generator("fedx anchors")
        views_rng = generator(client.seed, "fedx views", client.round_num, client.partition_id, client.device)

        def penalty(model: Model, x1: Tensor, x2: Tensor) -> Tensor:
            rows = torch.randperm(len(private), generator=rows_rng)[: len(x1)]
            anchors = views(private.take(rows).to(client.device), views_rng)
            return self.terms(model, teacher, x1, x2, anchors)

        metrics = client.train(model, epochs=self.local_epochs, penalty=penalty)
        return client.upload(client.weights(model), metrics, codec="weights")

    def terms(
        self,
        model: Model,
        teacher: nn.Module,
        x1: Float[Tensor, "b 3 s s"],
        x2: Float[Tensor, "b 3 s s"],
        anchors: Float[Tensor, "k 3 s s"],
    ) -> Float[Tensor, ""]:
        """What FedX adds to the method's loss, the three terms in the order of the module's formula."""
        sizes = [len(x1), len(x2), len(anchors)]
        z1, z2, z_a = model(torch.cat([x1, x2, anchors])).split(sizes)
        h1, h2 = (model.heads["fedx_predictor"](z) for z in (z1, z2))
        g2, g_a = teacher(torch.cat([x2, anchors])).split(sizes[1:])
        return (
            nt_xent(h1, g2, self.contrastive_temperature)
            + relation_divergence(h1, h2, g_a, self.relation_temperature)
            + relation_divergence(z1, z2, z_a, self.relation_temperature)
        )
