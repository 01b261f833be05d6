"""FedAvg: average the clients' weights, one average per architecture family.

McMahan et al. 2017, Algorithm 1, https://arxiv.org/abs/1602.05629, with a self-supervised local loss. Batch norm's
running statistics are averaged like weights. Departs from the paper: nothing is shared between families, so a family
with one client is local training that passes through the server.

The paper weights clients by their number of images (`weighted: true`); FLESD's baseline weights them equally. The
weights are those of the clients that answered: a family's mean is over them alone, and one that nobody answered for
keeps its weights.

What travels is the model: backbone, projector and the method's heads, so BYOL's predictor is averaged, too. What a
method keeps beside it, a target network or a queue, stays with its client from round to round: there a broadcast
replaces the online network, and the target network goes on from where it was and follows the new one. That is FedBYOL
in FedEMA's tables (https://arxiv.org/abs/2204.04385).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedssl.federation.client import Broadcast, Client
from fedssl.federation.per_family import PerFamily
from fedssl.federation.records import Upload
from fedssl.federation.server import Server
from fedssl.federation.weights import mean_weights


@dataclass(frozen=True, kw_only=True)
class FedAvgClient:
    """The client half: train from the broadcast weights, send all weights back."""

    local_epochs: int

    def __call__(self, client: Client, broadcast: Broadcast) -> Upload:
        """One round of one client."""
        model = client.load(broadcast)
        metrics = client.train(model, epochs=self.local_epochs)
        return client.upload(client.weights(model), metrics, codec="weights")


class FedAvg(PerFamily):
    """The server half.

    Args:
        server: what the framework knows.
        weighted: weight a client by its number of images; otherwise all count the same.
    """

    def __init__(self, *, server: Server, weighted: bool) -> None:
        super().__init__(server=server)
        self.weighted = weighted

    def merge(self, family: str, uploads: Sequence[Upload], before: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The mean of the uploads."""
        shares = [upload.num_images if self.weighted else 1.0 for upload in uploads]
        return mean_weights([upload.arrays for upload in uploads], shares)
