"""Best client: FLESD's distillation from the single client whose model is best.

A control, not a paper: an ensemble must be worth more than its best member. The best is chosen by a linear probe on the
run's labelled test, which no server could do; where this control loses, it loses with an unfair advantage.
"""

import logging
import math
from dataclasses import dataclass

from flwr.app import Message

from fedssl.errors import PayloadError
from fedssl.federation.client import Broadcast, Client
from fedssl.federation.records import Upload
from strategies.flesd import FLESD, FLESDClient, Received

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BestClientClient(FLESDClient):
    """The client half: FLESD's, and the accuracy of the client's model (simulation only)."""

    def __call__(self, client: Client, broadcast: Broadcast) -> Upload:
        """One round of one client."""
        model, metrics = self.trained(client, broadcast)
        metrics["linear_top1"] = client.evaluate(model)["linear_top1"]
        return self.answer(client, model, metrics)


class BestClient(FLESD):
    """The server half: FLESD's, with an ensemble of one; an upload without its accuracy is refused."""

    def check(self, reply: Message) -> Received:
        """As FLESD's; the accuracy is there and a number."""
        upload, content = super().check(reply)
        accuracy = upload.metrics.get("linear_top1", math.nan)
        if not 0 <= accuracy <= 1:
            raise PayloadError(f"it declares linear_top1={accuracy}, by which the best client is chosen")
        return upload, content

    def choose(self, received: list[Received]) -> list[Received]:
        """The upload of the model with the highest accuracy; of equals the lowest partition."""
        if not received:
            return []
        best = max(received, key=lambda pair: pair[0].metrics["linear_top1"])
        header = best[0].header
        log.info("round %d: best is client %d (%s)", header.round_num, header.partition_id, header.family)
        return [best]
