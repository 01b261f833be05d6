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

from dataclasses import dataclass

from fedssl.federation.client import Broadcast, Client
from fedssl.federation.per_family import Averaging
from fedssl.federation.records import Upload


@dataclass(frozen=True, kw_only=True)
class FedAvgClient:
    """The client half: train from the broadcast weights, send all weights back."""

    local_epochs: int

    def __call__(self, client: Client, broadcast: Broadcast) -> Upload:
        """One round of one client."""
        model = client.load(broadcast)
        metrics = client.train(model, epochs=self.local_epochs)
        return client.upload(client.weights(model), metrics, codec="weights")


class FedAvg(Averaging):
    """The server half: w = sum_k n_k w_k / sum_k n_k over the clients of a family that answered.

    Args:
        server: what the framework knows.
        weighted: n_k is the client's number of images; otherwise all count the same.
    """
