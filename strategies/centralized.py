"""Centralised: one model trained on the union of the private images. The bound that federation is measured against.

A control, not a paper: it breaks the rule that private images stay where they are, so it exists in simulation only.
Equal effort: in every round the report family's model sees as many private images as all clients of the cohort
together (local epochs times their images), in the clients' batch size, with the run's `method`.
"""

import logging
from collections.abc import Iterable, Mapping

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from fedssl.federation.global_models import GlobalModels
from fedssl.federation.records import model_state, to_arrays, to_metrics
from fedssl.federation.server import Server, image_passes

log = logging.getLogger(__name__)


class Centralized(GlobalModels):
    """The server half; there is no other. Only the report family is trained."""

    def __init__(self, *, server: Server) -> None:
        self.server = server
        self.memory: dict[str, Tensor] = {}  # the method's state

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No messages; count the views of images that the clients would have trained on."""
        self.arrays = arrays
        cohort = self.server.sample_cohort(server_round, grid)
        self.passes = 2 * self.server.local.local_epochs * sum(member.num_images for member in cohort)
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Train the report family's model on the union."""
        family, images = self.server.report_family, self.server.private_union()
        batch_size = min(self.server.local.batch_size, len(images))
        steps = 1
        while image_passes(len(images), batch_size, steps) < self.passes:
            steps += 1
        model = self.server.load(self.arrays, family)
        metrics = self.server.train(
            model,
            images,
            steps=steps,
            batch_size=batch_size,
            purpose="centralised",
            round_num=server_round,
            memory=self.memory,
        )
        return to_arrays({family: model_state(model)}), to_metrics({f"{family}/{k}": v for k, v in metrics.items()})

    def state_dict(self) -> dict[str, Tensor]:
        """The method's state, for a resume."""
        return self.memory

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """As `state_dict` gave it."""
        self.memory = dict(state)

    def summary(self) -> None:
        """Log the family."""
        log.info("Centralised: %s on the union of the private images", self.server.report_family)
