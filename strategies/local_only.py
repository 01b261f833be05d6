"""Local-only: no federation. Every client trains on its own images and keeps its model.

A control, not a paper: what federation has to beat. Beside its own architecture each client also trains the report
family on its shard, so that the comparison with a global model of that family is fair. No weights travel in either
direction; the models live in the clients' memory and are evaluated where they are.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedssl.errors import PayloadError
from fedssl.federation.client import Broadcast, Client
from fedssl.federation.per_client import PerClient
from fedssl.federation.records import Upload
from fedssl.federation.server import read_uploads

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LocalOnlyClient:
    """The client half: train on, send nothing but numbers."""

    local_epochs: int

    def __call__(self, client: Client, broadcast: Broadcast) -> Upload:
        """One round: go on training the models of earlier rounds."""
        metrics: dict[str, float] = {}
        for family in _families(client):
            model = client.remembered(family)
            trained = client.train(model, epochs=self.local_epochs, family=family)
            metrics |= trained if family == client.family else {f"report_{name}": v for name, v in trained.items()}
            client.remember(model, family)
        return client.upload({}, metrics, codec="none")

    def evaluate(self, client: Client, broadcast: Broadcast) -> dict[str, float]:
        """Probe this client's models: `<family>/<metric>`."""
        return {
            f"{family}/{name}": value
            for family in _families(client)
            for name, value in client.evaluate(client.remembered(family)).items()
        }


def _families(client: Client) -> list[str]:
    return list(dict.fromkeys([client.family, client.report_family]))


class LocalOnly(PerClient):
    """The server half: it asks for training and for evaluations, and has no global model."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Tell this round's cohort to train; no weights are sent."""
        self.round_num = server_round
        return self.server.messages(server_round, self.server.sample_cohort(server_round, grid), config, None)

    def check(self, reply: Message) -> Upload:
        """Parse a reply without arrays."""
        upload = Upload.from_message(reply)
        self.server.check_header(upload, self.round_num, "none")
        if upload.arrays:
            raise PayloadError(f"it sends {len(upload.arrays)} arrays, and none are exchanged")
        return upload

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Nothing to combine."""
        read_uploads(replies, self.check)
        return None, None

    def summary(self) -> None:
        """Log that nothing is exchanged."""
        log.info("Local-only: no weights, no similarities; report family %s on every shard", self.server.report_family)
