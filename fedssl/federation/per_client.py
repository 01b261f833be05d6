"""What the strategies have in common whose models stay with the clients: they are evaluated where they are."""

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedssl.federation.server import Server


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

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """`<family>/<metric>` as one list over the clients that hold a model of that family, in partition order."""
        values: dict[str, list[float]] = {}
        answered = [reply for reply in replies if not reply.has_error()]
        for reply in sorted(answered, key=lambda r: r.content.config_records["header"]["partition_id"]):
            for name, value in reply.content.metric_records["metrics"].items():
                values.setdefault(name, []).append(float(value))  # type: ignore[arg-type]
        return MetricRecord(dict(values))
