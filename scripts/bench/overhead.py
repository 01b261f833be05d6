"""The framework's cost of a client message in both grids, with clients that do nothing."""

import gc
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
from bench.measure import Result, judge, median_interval, ray_settings
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedssl.environment import keep_start
from fedssl.federation import flower_compat
from fedssl.federation.arrays import read_array, to_record
from fedssl.federation.grids.base import LocalGrid
from fedssl.federation.grids.in_process import InProcess
from fedssl.federation.grids.ray import Placement, RayGrid

SIZES = (10, 100, 1_000, 10_000)  # messages a round
REPETITIONS = 21
AT_LEAST = 3_000  # messages a repetition: small rounds are timed together, or a pause of the host would be half of one
ARRAY_VALUES = 1024  # float32: 4 KB
LIMITS = {"in_process": 0.4, "ray": 1.0}  # ms a message
LINEAR = 1.25  # cost of a message among 10,000 over that among 1,000
WORKERS = (2, 400)  # of the driver that is looked at alone


def no_op_app() -> ClientApp:
    """A Flower app that reads its header and array as our clients do, and answers with that array and a metric."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = to_record({"w": read_array("w", message.content["arrays"]["w"])})
        metrics = MetricRecord({"round": message.content["header"]["round"]})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


def no_op_round(grid: LocalGrid, node_ids: Sequence[int], round_num: int) -> None:
    """From creating the messages to having read all replies."""
    arrays = to_record({"w": np.full(ARRAY_VALUES, round_num, np.float32)})
    messages = [
        Message(RecordDict({"header": ConfigRecord({"round": round_num}), "arrays": arrays}), node_id, "train")
        for node_id in node_ids
    ]
    replies = grid.send_and_receive(messages)
    metrics = sum(int(reply.content["metrics"]["round"]) for reply in replies)
    total = sum(float(read_array("w", reply.content["arrays"]["w"])[-1]) for reply in replies)
    assert metrics == total == len(messages) * round_num


def cost(grid: LocalGrid, num_messages: int, round_num: int) -> float:
    """Milliseconds a message in rounds of `num_messages`."""
    node_ids = grid.get_node_ids()[:num_messages]
    num_rounds = max(1, AT_LEAST // num_messages)
    gc.collect()  # the garbage of the rounds before, of another size or grid, is not this one's cost
    started = time.perf_counter()
    for _ in range(num_rounds):
        no_op_round(grid, node_ids, round_num)
    return 1000 * (time.perf_counter() - started) / (num_rounds * num_messages)


class InstantRay:
    """Ray with workers that have answered at once: what a round takes is the driver's, apart from Ray's own calls.

    Its workers are plain objects, its references numbers.
    """

    exceptions = SimpleNamespace(RayTaskError=type("RayTaskError", (Exception,), {}), RayError=OSError)
    cloudpickle = SimpleNamespace(dumps=lambda value: b"")

    def __init__(self) -> None:
        self.values: dict[int, Any] = {}
        self._references = itertools.count()

    def put(self, value: Any) -> int:
        """Keep it."""
        reference = next(self._references)
        self.values[reference] = value
        return reference

    def get(self, reference: int) -> Any:
        """What was put there; once."""
        return self.values.pop(reference)

    def wait(self, references: list[int], *, num_returns: int, timeout: float) -> tuple[list[int], list[int]]:
        """As if one were ready at a time."""
        del timeout
        return (references[:1], references[1:]) if num_returns == 1 else ([], references)

    def is_initialized(self) -> bool:
        """Never: nothing has to be ended."""
        return False

    def remote(self, worker: type) -> Any:
        """An actor class."""
        del worker
        methods = {name: SimpleNamespace(remote=getattr(self, f"_{name}")) for name in ("load", "work")}
        return SimpleNamespace(
            options=lambda **_: SimpleNamespace(remote=lambda *_: SimpleNamespace(**methods)),
        )

    def _load(self, load_app: bytes) -> int:
        return self.put((0, ""))

    def _work(self, batch: bytes, buffers: list[np.ndarray], broadcast: Any, unused: list[int], adding: None) -> int:
        results = []
        for metadata, _, _ in flower_compat.loads(batch, buffers):
            message = flower_compat.rebuild(metadata, RecordDict())
            metrics = MetricRecord({"round": 1})
            reply = Message(RecordDict({"arrays": _ARRAYS, "metrics": metrics}), reply_to=message)
            results.append((reply, None, 60.0))  # seconds: each is a call of its own
        return self.put(flower_compat.dumps((results, []))[0])


_ARRAYS = to_record({"w": np.ones(ARRAY_VALUES, np.float32)})


def driver_alone(workers: int) -> LocalGrid:
    """Our Ray grid's driver with `workers` instant workers."""
    ray = InstantRay()
    with patch.dict(sys.modules, {"ray": ray}):
        return RayGrid(
            ray_settings(workers),
            no_op_app,
            num_clients=max(SIZES),
            threads=1,
            placement=Placement(workers=workers, num_cpus=0, num_gpus=0),
        )


def overhead() -> Result:
    """Rounds of 10 to 10,000 messages, the grids in turn."""
    ray = ray_settings()
    with (
        InProcess().open(no_op_app, num_clients=max(SIZES), threads=1, device="cpu") as in_process,
        ray.open(no_op_app, num_clients=max(SIZES), threads=1, device="cpu") as on_ray,
        keep_start(),  # as a run does
    ):
        drivers = {f"driver_{workers}_workers": driver_alone(workers) for workers in WORKERS}
        grids: Mapping[str, LocalGrid] = {"in_process": in_process, "ray": on_ray, **drivers}
        for grid in grids.values():
            cost(grid, max(SIZES), 1)  # starts the workers; every client has run once
        costs: dict[str, dict[int, list[float]]] = {name: {size: [] for size in SIZES} for name in grids}
        for repetition in range(REPETITIONS):
            for size in SIZES:
                for name, grid in grids.items():
                    costs[name][size].append(cost(grid, size, 1 if name in drivers else repetition + 2))
        workers = on_ray.placement.workers
    growth = {name: [a / b for a, b in zip(c[10_000], c[1_000], strict=True)] for name, c in costs.items()}
    figures = {
        "unit": "ms per message",
        "repetitions": REPETITIONS,
        "ray_workers": workers,
        "costs": costs,
        "medians": {
            name: {size: median_interval(values)[0] for size, values in c.items()} for name, c in costs.items()
        },
        "cost_at_10000_over_1000": {name: median_interval(ratios) for name, ratios in growth.items()},
    }
    bars = []
    for name, limit in LIMITS.items():
        worst = max(costs[name].values(), key=lambda values: float(np.median(values)))  # the bar holds at every size
        bars.append(judge(f"overhead.{name}_ms", worst, limit, "lower"))
    bars += [judge(f"overhead.{name}_linear", ratios, LINEAR, "lower") for name, ratios in growth.items()]
    return figures, bars
