"""FedAvg: average the clients' weights, one average per architecture family.

McMahan et al. 2017, Algorithm 1, https://arxiv.org/abs/1602.05629, with a self-supervised local loss. Batch norm's
running statistics are averaged like weights. Departs from the paper: nothing is shared between families, so a family
with one client is local training that passes through the server.

The paper weights clients by their number of images (`weighted: true`); FLESD's baseline weights them equally.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedssl.errors import ConfigError
from fedssl.federation.client import Broadcast, Client
from fedssl.federation.records import Upload, family_arrays, family_state, to_arrays
from fedssl.federation.server import Server, read_uploads
from fedssl.federation.weights import check_weights, mean_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FedAvgClient:
    """The client half: train from the broadcast weights, send all weights back."""

    local_epochs: int

    def __call__(self, client: Client, broadcast: Broadcast) -> Upload:
        """One round of one client."""
        model = client.load(broadcast)
        metrics = client.train(model, epochs=self.local_epochs)
        return client.upload(client.weights(model), metrics, codec="weights")


class FedAvg(Strategy):
    """The server half.

    Args:
        server: what the framework knows.
        weighted: weight a client by its number of images; otherwise all count the same.
    """

    def __init__(self, *, server: Server, weighted: bool) -> None:
        if server.report_family not in server.client_families:
            raise ConfigError(
                f"strategy=fedavg averages what clients send, and no client is of "
                f"federation.report_family={server.report_family}: choose one of {', '.join(server.client_families)}."
            )
        self.server = server
        self.weighted = weighted

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Broadcast each family's weights to this round's cohort."""
        self.arrays, self.round_num = arrays, server_round
        cohort = self.server.sample_cohort(server_round, grid)
        return self.server.messages(server_round, cohort, config, arrays)

    def check(self, reply: Message) -> Upload:
        """Parse an upload: names, shapes and dtypes of the family's weights, all finite."""
        upload = Upload.from_message(reply)
        self.server.check_header(upload, self.round_num, "weights")
        family = upload.header.family
        check_weights(upload.arrays, family_arrays(self.arrays, family), family)
        _ = upload.num_images  # refused unless it can be a weight
        return upload

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The mean of each family's uploads; a family nobody answered for keeps its weights."""
        uploads = read_uploads(replies, self.check)
        states: dict[str, dict[str, Tensor]] = {}
        for family in self.server.client_families:
            members = [upload for upload in uploads if upload.header.family == family]
            states[family] = self._mean(members) if members else family_state(self.arrays, family)
        return to_arrays(states), MetricRecord()

    def _mean(self, uploads: list[Upload]) -> dict[str, Tensor]:
        shares = [upload.num_images if self.weighted else 1.0 for upload in uploads]
        return mean_weights([upload.arrays for upload in uploads], shares)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing to ask the clients: the server evaluates the averages."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing was asked."""
        return None

    def summary(self) -> None:
        """Log what is averaged."""
        log.info("FedAvg: %s mean per family", "size-weighted" if self.weighted else "plain")
