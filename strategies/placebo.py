"""Placebo: FLESD's distillation from clients that have learned nothing.

A control, not a paper. Each client answers with the similarities of an untrained model of its own. So whatever the
students gain over their initial weights comes from the server's views of the public set and from the architectures,
not from the clients' data. The untrained models' batch norm has the statistics of one public batch: without them deep
networks map all images to one point, and the placebo would test no signal instead of an untrained network's.

The server half is FLESD's (conf/strategy/placebo.yaml).
"""

from dataclasses import dataclass

from fedssl.codecs import Codec
from fedssl.distill import Distillation
from fedssl.federation.client import Broadcast, Client
from fedssl.federation.records import Upload


@dataclass(frozen=True, kw_only=True)
class PlaceboClient:
    """The client half: embed the public set with untrained weights."""

    codec: Codec
    embedding: str
    distillation: Distillation

    def __call__(self, client: Client, broadcast: Broadcast) -> Upload:
        """One round of one client; the broadcast is received (its bytes count) and ignored."""
        model = client.untrained()
        arrays, measures = client.similarities(model, embedding=self.embedding, codec=self.codec)
        metrics = {**measures, "seconds": 0.0, "image_passes": 0.0}  # nothing is trained
        if self.distillation.student_init == "fedavg_of_family":
            arrays |= client.weights(model)
        return client.upload(arrays, metrics, codec=self.codec.name)
