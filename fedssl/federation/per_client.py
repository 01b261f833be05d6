"""What the strategies have in common whose models stay with the clients: they are evaluated where they are."""

import logging
import math
from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedssl.errors import PayloadError
from fedssl.federation.server import Server

log = logging.getLogger(__name__)


class PerClient(Strategy):
    """Asks every client to probe its own models; a run reports their means and ranges per family.

    The client half has `evaluate(client, broadcast)`, which names its metrics `<family>/<metric>`.
    """

    def __init__(self, *, server: Server) -> None:
        self.server = server

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every client that trains, sampled this round or not."""
        members = self.server.everyone(grid)
        return self.server.messages(server_round, members, config, None, kind="evaluate")

    def check_evaluation(self, reply: Message) -> tuple[int, dict[str, float]]:
        """Partition and figures of a reply; `PayloadError` unless they are numbers named as the report needs them."""
        if reply.has_error():
            raise PayloadError(f"the client answered with an error: {reply.error.reason}")
        partition = reply.content.config_records.get("header", ConfigRecord()).get("partition_id")
        if type(partition) is not int:
            raise PayloadError(f"it says it is of partition {partition!r}")
        figures: dict[str, float] = {}
        for name, value in reply.content.metric_records.get("metrics", MetricRecord()).items():
            family, slash, metric = name.partition("/")
            if family not in self.server.families or not (slash and metric):
                raise PayloadError(f"it calls a figure {name!r}, not <family>/<metric>")
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise PayloadError(f"it declares {name}={value}")
            figures[name] = float(value)
        return partition, figures

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """`<family>/<metric>` as one list over the clients that hold a model of that family, in partition order."""
        answered: list[tuple[int, dict[str, float]]] = []
        for reply in replies:
            try:
                answered.append(self.check_evaluation(reply))
            except PayloadError as error:
                log.warning("refused the figures of node %d: %s", reply.metadata.src_node_id, error)
        values: dict[str, list[float]] = {}
        for _, figures in sorted(answered, key=lambda pair: pair[0]):
            for name, value in figures.items():
                values.setdefault(name, []).append(value)
        return MetricRecord(dict(values))
