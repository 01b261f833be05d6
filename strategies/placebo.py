"""Placebo: FLESD's distillation from clients that have learned nothing.

A control, not a paper. Each client answers with the similarities of an untrained model of its own, so whatever the
students gain over their initial weights comes from the server's views of the public set and from the architectures,
not from the clients' data. The server half is FLESD's (conf/strategy/placebo.yaml).
"""

from dataclasses import dataclass

import torch.nn.functional as F

from fedssl.codecs import Codec
from fedssl.federation.client import Broadcast, Client
from fedssl.federation.records import Upload
from fedssl.similarity import FactorSimilarity, collapse_measures


@dataclass(frozen=True, kw_only=True)
class PlaceboClient:
    """The client half: embed the public set with untrained weights."""

    codec: Codec

    def __call__(self, client: Client, broadcast: Broadcast) -> Upload:
        """One round of one client; the broadcast is received (its bytes count) and ignored."""
        embeddings = client.embed_public(client.untrained())  # (n, d)
        metrics = collapse_measures(FactorSimilarity(factors=F.normalize(embeddings, dim=1)))
        arrays = self.codec.encode(embeddings, client.generator("rotation"))
        return client.upload(arrays, metrics, codec=self.codec.name)
