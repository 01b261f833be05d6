"""Public-only: the server trains on the public set alone. No client takes part.

A control, not a paper: the clients' knowledge must be worth more than the public images by themselves. Equal effort:
in every round each family's model takes as many optimiser steps as FLESD's student would and sees at least as many
images (student's and momentum encoder's views, and the filling of the queue, counted alike), with the run's `method`;
in the first round also what `distill.student_init=public_only` trains the student with beforehand. With `total`, also
as many images as all clients of the cohort would have seen, in their local training and under `downlink=similarity` in
their own distillation.
"""

import logging
from collections.abc import Iterable, Mapping

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from fedssl.codecs import Codec, num_anchors
from fedssl.distill import Distillation
from fedssl.federation.global_models import GlobalModels
from fedssl.federation.records import model_state, to_arrays, to_metrics
from fedssl.federation.server import Server, image_passes

log = logging.getLogger(__name__)


class PublicOnly(GlobalModels):
    """The server half; there is no other.

    Args:
        server: what the framework knows.
        distillation: the student's schedule that this control matches.
        total: match the clients' image passes as well.
        downlink: what clients would have received.
        codec: in which clients would have answered; with few anchors the student's queue is another.

    Raises:
        ConfigError: the student's schedule has no step on this public set.
    """

    def __init__(self, *, server: Server, distillation: Distillation, total: bool, downlink: str, codec: Codec) -> None:
        distillation.steps_per_epoch(len(server.public_set.images))  # a schedule without any step is no control
        self.server = server
        self.distillation = distillation
        self.total = total
        self.downlink = downlink
        self.codec = codec
        self.memory: dict[str, dict[str, Tensor]] = {family: {} for family in server.families}  # the method's state

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No messages; remember what the clients would have done."""
        self.arrays, self.round_num = arrays, server_round
        cohort = self.server.sample_cohort(server_round, grid) if self.total else []
        self.client_passes = 2 * self.server.local.local_epochs * sum(member.num_images for member in cohort)
        if self.downlink == "similarity" and server_round > 1:
            self.client_passes += len(cohort) * self.student_passes
        return []

    @property
    def student_passes(self) -> int:
        """Images that one student's distillation sees in a round."""
        n = len(self.server.public_set.images)
        return self.distillation.image_passes(n, num_anchors(self.codec, n))

    def effort(self, round_num: int, client_passes: int) -> tuple[int, int]:
        """Optimiser steps and batch size of a round in which clients would have seen so many images.

        As many steps as the student takes, in the smallest batches that see as many images; where not even the whole
        public set in every step does, and for the clients' passes, more steps.
        """
        n = len(self.server.public_set.images)
        steps, passes = self.distillation.num_steps(n), self.student_passes
        if round_num == 1:
            steps += self.distillation.pretraining_steps(n)
            passes += self.distillation.pretraining_image_passes(n)
        enough = (size for size in range(2, n) if image_passes(n, size, steps) >= passes)
        batch_size = next(enough, n)
        while image_passes(n, batch_size, steps) < passes + client_passes:
            steps += 1
        return steps, batch_size

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Train every family's model on the public set."""
        steps, batch_size = self.effort(server_round, self.client_passes)
        states = {}
        metrics: dict[str, float] = {}
        for family in self.server.families:
            model = self.server.load(self.arrays, family)
            trained = self.server.train(
                model,
                self.server.public_set.images,
                steps=steps,
                batch_size=batch_size,
                purpose=f"public-only/{family}",
                round_num=server_round,
                memory=self.memory[family],
            )
            states[family] = model_state(model)
            metrics |= {f"{family}/{name}": value for name, value in trained.items()}
        return to_arrays(states), to_metrics(metrics)

    def state_dict(self) -> dict[str, Tensor]:
        """The method's state of every family, for a resume."""
        return {f"{family}/{name}": value for family, kept in self.memory.items() for name, value in kept.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """As `state_dict` gave it."""
        for name, value in state.items():
            family, entry = name.split("/", 1)
            self.memory[family][entry] = value

    def summary(self) -> None:
        """Log the effort that is matched."""
        log.info("Public-only: %s", "the server's and the clients' passes" if self.total else "the server's steps")
