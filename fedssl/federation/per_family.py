"""What the strategies have in common that exchange weights: mostly, every family is a federation of its own."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedssl.errors import ConfigError, PayloadError
from fedssl.federation.arrays import to_record
from fedssl.federation.records import Upload, family_arrays, family_state, to_arrays
from fedssl.federation.server import Server, read_uploads
from fedssl.federation.weights import check_weights
from fedssl.models import Model


class WeightUploads(Strategy):
    """Broadcasts each family's weights and checks the weights that come back; a subclass says what becomes of them."""

    def __init__(self, *, server: Server) -> None:
        self.server = server

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
        if (family := upload.header.family) not in self.server.client_families:
            raise PayloadError(f"no client is of family {family!r}")
        self.check_arrays(upload.arrays, family)
        _ = upload.num_images  # refused unless it can be a share
        return upload

    def check_arrays(self, arrays: Mapping[str, np.ndarray], family: str) -> None:
        """Raise `PayloadError` unless these are weights of `family`."""
        check_weights(arrays, family_arrays(self.arrays, family), family)

    def model(self, upload: Upload) -> Model:
        """The model that a client sent, on the server's device."""
        return self.server.load(to_record(upload.arrays), upload.header.family)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing to ask the clients: the server evaluates its own weights."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing was asked."""
        return None

    def summary(self) -> None:
        """Nothing to log."""


class PerFamily(WeightUploads):
    """Lets `merge` make new weights of a family's uploads.

    A family with one client is local training that passes through the server, and one without any learns nothing:
    `notes` names them, for the report.
    """

    def __init__(self, *, server: Server) -> None:
        if server.report_family not in server.trained_families:
            raise ConfigError(
                f"this strategy merges the weights that clients send, and no client is of federation.report_family="
                f"{server.report_family}: choose one of {', '.join(server.trained_families)}."
            )
        super().__init__(server=server)

    @abstractmethod
    def merge(self, family: str, uploads: Sequence[Upload], before: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """New weights of one family.

        Args:
            family: which.
            uploads: of its clients, at least one, in partition order; `arrays` are by `<family>/<parameter>`.
            before: the weights that were broadcast, by parameter name.
        """

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge each family's uploads; a family nobody answered for keeps its weights."""
        uploads = read_uploads(replies, self.check)
        states: dict[str, Mapping[str, Tensor]] = {}
        for family in self.server.client_families:
            members = [upload for upload in uploads if upload.header.family == family]
            before = family_state(self.arrays, family)
            states[family] = self.merge(family, members, before) if members else before
        return to_arrays(states), MetricRecord()

    def notes(self) -> list[str]:
        """What a reader of the figures has to know."""
        of = self.server.num_trainers_of
        alone = [family for family in self.server.trained_families if of[family] == 1]
        untrained = [family for family in self.server.families if family not in self.server.trained_families]
        return [f"{family} has one client: its global model is local training" for family in alone] + [
            f"{family} has no client that trains: it learns nothing here" for family in untrained
        ]
