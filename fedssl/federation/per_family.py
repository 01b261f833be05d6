"""What the strategies have in common that exchange weights: mostly, every family is a federation of its own."""

import logging
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from fedssl.errors import ConfigError, FedSSLError, PayloadError
from fedssl.federation.arrays import read_arrays
from fedssl.federation.averaging import Summation, mean_of
from fedssl.federation.flower_compat import Summed, noted_sum
from fedssl.federation.global_models import GlobalModels
from fedssl.federation.records import Upload, family_arrays, family_state, to_arrays, to_metrics
from fedssl.federation.roster import Member
from fedssl.federation.server import Server, check_finite, read_uploads
from fedssl.federation.weights import check_fit, check_values, check_weights, has_grown, largest_entries
from fedssl.models import Model

log = logging.getLogger(__name__)

LOST = "lost_rounds/"  # names in a strategy's state
SEE_UPLOADS = ("configure_train", "check", "check_arrays", "aggregate_train", "merge", "state")  # methods


class WeightUploads(GlobalModels):
    """Broadcasts each family's weights and checks the weights that come back; a subclass says what becomes of them."""

    def __init__(self, *, server: Server) -> None:
        self.server = server
        self.cohort: Sequence[Member] = ()  # the round's
        self._largest_of: tuple[ArrayRecord | None, dict[str, dict[str, float]]] = (None, {})
        self.checked: WeakKeyDictionary[Message, Upload] = WeakKeyDictionary()  # our loop checks before it aggregates

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Broadcast each family's weights to this round's cohort."""
        self.arrays, self.round_num = arrays, server_round
        self.cohort = self.server.sample_cohort(server_round, grid)
        return self.server.messages(server_round, self.cohort, config, arrays)

    def check(self, reply: Message) -> Upload:
        """Parse an upload, once: names, shapes and dtypes of the family's weights, finite as is what they compute."""
        if reply in self.checked:
            return self.checked[reply]
        upload = Upload.from_message(reply)
        self.server.check_header(upload, self.round_num, "weights")
        if (family := upload.header.family) not in self.server.client_families:
            raise PayloadError(f"no client is of family {family!r}")
        largest = self.check_arrays(upload.arrays, family)
        _ = upload.num_images  # refused unless it can be a share
        if has_grown(largest, self._largest(family)):
            self.server.try_out(family, self.state(upload))
        self.checked[reply] = upload
        return upload

    def _largest(self, family: str) -> Mapping[str, float]:
        """`largest_entries` of the family's broadcast weights, worked out once a round."""
        if self._largest_of[0] is not self.arrays:
            self._largest_of = self.arrays, {}
        known = self._largest_of[1]
        if family not in known:
            known[family] = largest_entries(read_arrays(family_arrays(self.arrays, family)))
        return known[family]

    def check_arrays(self, arrays: Mapping[str, np.ndarray], family: str) -> dict[str, float]:
        """Raise `PayloadError` unless these are weights of `family`; returns their `largest_entries`."""
        return check_weights(arrays, family_arrays(self.arrays, family), family)

    def check_merged(self, family: str, state: Mapping[str, Tensor]) -> None:
        """Raise `PayloadError` unless a network works with these weights of `family`, by parameter name.

        Raises:
            FedSSLError: they are not weights of `family` at all.
        """
        arrays = read_arrays(to_arrays({family: state}))
        try:
            check_fit(arrays, family_arrays(self.arrays, family), family)
        except PayloadError as error:
            raise FedSSLError(f"{type(self).__name__} made something else than weights of {family}: {error}") from error
        check_values(arrays)
        self.server.try_out(family, state)

    def state(self, upload: Upload) -> dict[str, Tensor]:
        """The model that a client sent, by parameter name."""
        prefix = f"{upload.header.family}/"
        return {name.removeprefix(prefix): torch.from_numpy(value.copy()) for name, value in upload.arrays.items()}

    def summary(self) -> None:
        """Nothing to log."""


class Teachers(WeightUploads):
    """Also looks at every client's model, once; an upload is refused unless all that it sees is finite."""

    def __init__(self, *, server: Server) -> None:
        super().__init__(server=server)
        self.seen: WeakKeyDictionary[Message, Tensor] = WeakKeyDictionary()

    @abstractmethod
    def look(self, model: Model) -> Tensor:
        """What the server makes of a client's model: `seen` keeps it as long as the reply."""

    def check(self, reply: Message) -> Upload:
        """As `WeightUploads`, and look at the model."""
        upload = super().check(reply)
        if reply not in self.seen:
            seen = self.look(self.model(upload))
            check_finite(seen)
            self.seen[reply] = seen
        return upload

    def model(self, upload: Upload) -> Model:
        """The model that a client sent, on the server's device."""
        return self.server.model(upload.header.family, self.state(upload))


class PerFamily(WeightUploads):
    """Lets `merge` make new weights of a family's uploads.

    Where no network can work with them, the family keeps those it had: the round is lost for it, the run is not. What a
    subclass adds to `state_dict`, `load_state_dict` and `notes` it adds to these.

    A family with one client is local training that passes through the server, and one without any learns nothing:
    `notes` names them and lost rounds, for the report.
    """

    def __init__(self, *, server: Server) -> None:
        if server.report_family not in server.trained_families:
            raise ConfigError(
                f"this strategy merges the weights that clients send, and no client is of federation.report_family="
                f"{server.report_family}: choose one of {', '.join(server.trained_families)}."
            )
        super().__init__(server=server)
        self.lost_rounds: dict[str, list[int]] = {}  # by family

    @abstractmethod
    def merge(self, family: str, uploads: Sequence[Upload], before: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """New weights of one family.

        Args:
            family: which.
            uploads: of its clients, at least one, in partition order; `arrays` are by `<family>/<parameter>`.
            before: the weights that were broadcast, by parameter name.
        """

    def accept(self, family: str) -> None:
        """The weights that `merge` made last are the family's now; what else came of merging may be kept."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge each family's uploads; a family nobody answered for keeps its weights."""
        uploads = read_uploads(replies, self.check)
        states: dict[str, Mapping[str, Tensor]] = {}
        metrics: dict[str, float] = {}
        for family in self.server.client_families:
            members = [upload for upload in uploads if upload.header.family == family]
            before = states[family] = family_state(self.arrays, family)
            if not members:
                continue
            merged = self.merge(family, members, before)
            try:
                self.check_merged(family, merged)
            except PayloadError as error:
                log.warning(
                    "round %d: %s keeps its weights, because no network works with the merged ones (%s). If the "
                    "strategy has a learning rate of its own, lower it.",
                    server_round,
                    family,
                    error,
                )
                self.lost_rounds[family] = sorted({*self.lost_rounds.get(family, []), server_round})
                metrics[f"{family}/lost"] = 1.0
            else:
                states[family] = merged
                self.accept(family)
        return to_arrays(states), to_metrics(metrics)

    def state_dict(self) -> dict[str, Tensor]:
        """The lost rounds."""
        return {f"{LOST}{family}": torch.tensor(rounds) for family, rounds in self.lost_rounds.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """As `state_dict` gave it."""
        self.lost_rounds = {
            name.removeprefix(LOST): rounds.tolist() for name, rounds in state.items() if name.startswith(LOST)
        }

    def notes(self) -> list[str]:
        """What a reader of the figures has to know."""
        of = self.server.num_trainers_of
        alone = [family for family in self.server.trained_families if of[family] == 1]
        untrained = [family for family in self.server.families if family not in self.server.trained_families]
        return [
            *(f"{family} has one client: its global model is local training" for family in alone),
            *(f"{family} has no client that trains: it learns nothing here" for family in untrained),
            *(
                f"{family} kept its weights in {len(rounds)} of the rounds ({', '.join(map(str, rounds[:3]))}"
                f"{', ...' if len(rounds) > 3 else ''}): no network works with what was merged"
                for family, rounds in self.lost_rounds.items()
            ),
        ]


class Averaging(PerFamily):
    """A family's new weights are the mean of its clients': sum_k share_k w_k / sum_k share_k over those that answered.

    Uploads are added up as they come, some where their clients run, and the mean is the same bit for bit
    (`fedssl.federation.averaging`).

    Args:
        server: what the framework knows.
        weighted: a client's share is its number of images; otherwise all count the same.
    """

    def __init__(self, *, server: Server, weighted: bool) -> None:
        super().__init__(server=server)
        self.weighted = weighted
        self._of_sums: WeakKeyDictionary[Message, tuple[Summed, Upload]] = WeakKeyDictionary()  # read since

    @property
    def summation(self) -> Summation | None:
        """How others may add up this round's uploads; None where a subclass looks at single ones."""
        kind = type(self)
        looks = any(getattr(kind, n) is not getattr(Averaging, n) or n in vars(self) for n in SEE_UPLOADS)
        return None if looks else self._summation()

    def _summation(self) -> Summation:
        return Summation(
            round_num=self.round_num,
            public_fingerprint=self.server.public_set.fingerprint,
            weighted=self.weighted,
            clients={member.partition_id: (member.family, member.num_images) for member in self.cohort},
            devices=self.server.devices,
        )

    def check(self, reply: Message) -> Upload:
        """As `WeightUploads`; what was added to a sum was checked before."""
        noted = noted_sum(reply)
        if noted is None:
            return super().check(reply)
        if self._of_sums.get(reply, (None,))[0] is not noted:
            self.checked.pop(reply, None)  # it had its weights then
            self._of_sums[reply] = noted, Upload.from_message(reply)
        return self._of_sums[reply][1]

    def merge(self, family: str, uploads: Sequence[Upload], before: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The mean of the uploads."""
        return mean_of(uploads, self._summation(), family_arrays(self.arrays, family))
