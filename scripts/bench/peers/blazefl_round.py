"""BlazeFL on the task, by its documented protocols, in the thread-pool mode that it recommends."""

import sys
import threading

import torch
from bench.round_task import Clock, Task, arguments
from blazefl.core import ThreadPoolClientTrainer, deserialize_model, serialize_model
from torch import Tensor


class Trainer(ThreadPoolClientTrainer[Tensor, Tensor]):
    """Clients in threads: the package is all parameters as one vector, either way; a thread keeps its model."""

    def __init__(self, task: Task, num_parallels: int) -> None:
        self.num_parallels = num_parallels
        self.device = "cpu"
        self.device_count = 0
        self.cache: list[Tensor] = []
        self.stop_event = threading.Event()
        self._task = task
        self._own = threading.local()

    def uplink_package(self) -> list[Tensor]:
        """What the clients sent."""
        package, self.cache = self.cache, []
        return package

    def worker(self, cid: int, device: str, payload: Tensor, stop_event: threading.Event) -> Tensor:
        """One client."""
        if not hasattr(self._own, "model"):
            self._own.model = self._task.model()
        model = self._own.model
        deserialize_model(model, payload)
        self._task.train(model, cid)
        return serialize_model(model)


def main() -> None:
    given = arguments()
    task = Task(given.folder)
    trainer = Trainer(task, given.processes)
    weights = serialize_model(task.model())
    clock = Clock(given)
    for cohort in task.cohorts[: given.rounds]:
        trainer.local_process(weights, cohort)
        weights = torch.stack(trainer.uplink_package()).mean(dim=0)
        clock.lap(weights.clone)
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    python = f"{sys.version.split()[0]}{'' if gil else ' without GIL'}"
    clock.report(python=python)


if __name__ == "__main__":
    main()
