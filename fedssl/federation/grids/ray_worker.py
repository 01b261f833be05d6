"""What runs in an actor of `RayGrid`: it keeps the app over all rounds and answers batches of messages."""

import gc
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message, Metadata, RecordDict

from fedssl.environment import keep_memory
from fedssl.federation import flower_compat
from fedssl.federation.grids.base import App, answer, node_config

# What crosses between driver and worker. `records` holds a record, or the key of a broadcast one.
Job = tuple[Metadata, dict[str, Any], RecordDict | None]  # metadata, records, Context.state
Result = tuple[Message, RecordDict | None, float]  # reply, Context.state, seconds
Adding = tuple[int, int, bool]  # which sum, the key of its summation, whether it is to be sent


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a worker shares with the driver: where modules and files are found, and whether it sees GPUs."""

    path: list[str]
    directory: str
    see_gpus: bool

    @classmethod
    def of_this_process(cls, *, see_gpus: bool) -> "Surroundings":
        """Those of the driver."""
        path = [entry or os.getcwd() for entry in sys.path]  # noqa: PTH109
        return cls(path=path, directory=os.getcwd(), see_gpus=see_gpus)  # noqa: PTH109

    def enter(self) -> None:
        """Make them this process's own; before it loads an app."""
        sys.path[:] = [*self.path, *(entry for entry in sys.path if entry not in self.path)]
        if Path(self.directory).is_dir():  # another machine of a cluster may not have it
            os.chdir(self.directory)
        if not self.see_gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        flower_compat.identify_process()
        keep_memory()


class Worker:
    """Runs in an actor: holds the app, answers batches of messages."""

    def __init__(self, surroundings: Surroundings, num_partitions: int, threads: int) -> None:
        surroundings.enter()
        self._num_partitions = num_partitions
        self._threads = threads
        self._broadcast: dict[int, Any] = {}
        self._adders: dict[int, Any] = {}  # by the driver's number
        self._app: App | None = None

    def load(self, load_app: bytes) -> tuple[int, str]:
        """Load the app; returns the process id and the name of the device this worker owns."""
        import ray
        import torch
        from ray import cloudpickle

        torch.set_num_threads(self._threads)
        self._app = cloudpickle.loads(load_app)()
        gc.freeze()  # what is loaded now stays; the collector need not look at it again
        context = ray.get_runtime_context()
        return os.getpid(), f"{context.get_node_id()}/{context.get_accelerator_ids().get('GPU', [])}"

    def work(
        self,
        batch: bytes,
        buffers: list[np.ndarray],
        broadcast: dict[int, Any],
        unused: list[int],
        adding: Adding | None,
    ) -> Any:
        """Answer a batch, maybe an empty one.

        Args:
            batch: jobs.
            buffers: of its large arrays.
            broadcast: what of it this worker has not seen, by reference where it is large.
            unused: keys of broadcast records whose last message was answered.
            adding: the sum that the uploads go into.
        """
        import ray

        from fedssl.federation.averaging import Adder, inner_loop

        assert self._app is not None
        for key in unused:
            self._broadcast.pop(key, None)
        for key, value in broadcast.items():
            self._broadcast[key] = flower_compat.loads(*(value if isinstance(value, tuple) else ray.get(value)))
        adder = None
        if adding is not None:
            number, summation_key, _ = adding
            if number not in self._adders:
                inner_loop()  # here, where it is no client's time
                self._adders[number] = Adder(self._broadcast[summation_key])
            adder = self._adders[number]
        results: list[Result] = []
        for metadata, records, state in flower_compat.loads(batch, buffers):
            content = RecordDict({n: self._broadcast[r] if isinstance(r, int) else r for n, r in records.items()})
            message = flower_compat.rebuild(metadata, content)
            config = node_config(metadata.dst_node_id, self._num_partitions)
            started = time.perf_counter()
            reply, state = answer(self._app, message, config, state)
            if adder is not None:
                adder.take(config["partition-id"], message, reply)
            results.append((reply, state, time.perf_counter() - started))
        added_up = self._adders.pop(adding[0]).all() if adding is not None and adding[2] else []
        data, views = flower_compat.dumps((results, added_up))
        return (data, views) if views else data  # plain bytes cost Ray least

    def drop(self, number: int) -> None:
        """Free a sum that nobody wants."""
        self._adders.pop(number, None)
