"""pfl-research 0.6.0 on the task, by its documented interface; more processes by torchrun.

Its loop leaves a batch's layout to its user: in an engine whose name ends with `channels_last` it is that of `Task`.
"""

from argparse import Namespace

import torch
import torch.nn.functional as F
from bench.round_task import BATCH, CNN, COHORT, LEARNING_RATE, NUM_CLIENTS, Clock, Task, arguments
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops.selector import get_framework_module
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn


class Module(CNN):
    """The network with the two methods that pfl asks for; in the layout `memory_format`."""

    def __init__(self, memory_format: torch.memory_format) -> None:
        super().__init__()
        self._memory_format = memory_format

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, 32, 32) images to (b, 10) logits."""
        return super().forward(x.contiguous(memory_format=self._memory_format))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Of a batch."""
        return F.cross_entropy(self(x), y)

    @torch.no_grad()
    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:
        """Only in iterations that evaluate: pfl's first."""
        return {"loss": Weighted(F.cross_entropy(self(x), y, reduction="sum").item(), len(x))}


class Laps(TrainingProcessCallback):
    """Times the central iterations, in the first of its processes; the others wait for the turn with it."""

    def __init__(self, given: Namespace) -> None:
        self.given = given
        self.clock: Clock | None = None

    def on_train_begin(self, *, model):  # noqa: D102
        if get_framework_module().distributed.global_rank == 0:
            self.clock = Clock(self.given)
        return super().on_train_begin(model=model)

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):  # noqa: D102
        if self.clock is not None:
            self.clock.lap(lambda: nn.utils.parameters_to_vector(model.pytorch_model.parameters()))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if self.clock is not None:
            self.clock.begin()
        return super().after_central_iteration(aggregate_metrics, model, central_iteration=central_iteration)


def main() -> None:
    given = arguments()
    task = Task(given.folder)
    users = {
        user: PyTorchTensorDataset((task.images[user], task.labels[user]), user_id=user) for user in range(NUM_CLIENTS)
    }
    sequence = iter([user for cohort in task.cohorts for user in cohort])
    data = FederatedDataset(users.__getitem__, lambda: next(sequence))
    module = Module(torch.channels_last if given.engine.endswith("channels_last") else torch.contiguous_format)
    module.load_state_dict(task.model().state_dict())
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
    laps = Laps(given)
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=given.rounds, evaluation_frequency=10**6, train_cohort_size=COHORT, val_cohort_size=0
        ),
        SimulatedBackend(data, data),
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=LEARNING_RATE, local_batch_size=BATCH),
        NNEvalHyperParams(local_batch_size=None),
        [laps],
    )
    assert get_framework_module().distributed.world_size == given.processes
    if laps.clock is not None:
        laps.clock.report()


if __name__ == "__main__":
    main()
