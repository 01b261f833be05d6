"""The engines of the benchmark `round` that are ours, Flower's, or nobody's: one in a process, on the task."""

import multiprocessing
import os
import time
from argparse import Namespace
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from bench.measure import flowers_backend, ray_settings
from bench.round_task import CNN, COHORT, NUM_CLIENTS, NUM_IMAGES, NUM_PARAMETERS, Clock, Task, arguments
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg as FlowersFedAvg
from torch import Tensor, nn

from fedssl.config import compose, instantiate
from fedssl.data.images import ImageSet
from fedssl.data.public import PublicSet
from fedssl.environment import keep_memory
from fedssl.federation.grids.base import App
from fedssl.federation.grids.flower_sim import FlowerSim
from fedssl.federation.grids.in_process import InProcess
from fedssl.federation.grids.ray import Ray, RayGrid
from fedssl.federation.records import Header, Upload, family_state, family_values, load_state, model_state
from fedssl.federation.roster import ask_roster
from fedssl.federation.rounds import gather
from fedssl.federation.server import Server
from fedssl.models import Model
from strategies.fedavg import FedAvg

FAMILY = "cnn"
WAIT_S = 600.0  # then a plain loop gives up the others
FINGERPRINT = "none of the clients has a public set"


# --- nobody's: the bound --------------------------------------------------------------------------------------------
def plain(given: Namespace) -> None:
    """As many loops as processes, each over its share of the cohort; sums meet in shared memory once a round."""
    context = multiprocessing.get_context("spawn")
    sums = torch.zeros(given.processes, NUM_PARAMETERS).share_memory_()
    barrier = context.Barrier(given.processes)
    others = [
        context.Process(target=_plain, args=(given, rank, sums, barrier), daemon=True)
        for rank in range(1, given.processes)
    ]
    for process in others:
        process.start()
    _plain(given, 0, sums, barrier)
    for process in others:
        process.join()


def _plain(given: Namespace, rank: int, sums: Tensor, barrier: Any) -> None:
    keep_memory()
    if rank > 0:
        os.setsid()  # on a busy machine Linux divides the cores among sessions: the bound must not share one
    task = Task(given.folder)
    model, weights = task.model(), task.initial
    flatten, unflatten = nn.utils.parameters_to_vector, nn.utils.vector_to_parameters
    barrier.wait(WAIT_S)
    clock = Clock(given) if rank == 0 else None
    for cohort in task.cohorts[: given.rounds]:
        own = torch.zeros(NUM_PARAMETERS)
        for client in cohort[rank :: given.processes]:
            unflatten(weights.clone(), model.parameters())
            task.train(model, client)
            own += flatten(model.parameters()).detach()
        sums[rank] = own
        barrier.wait(WAIT_S)
        weights = sums.sum(dim=0) / COHORT
        if clock is not None:
            clock.lap(partial(torch.clone, weights))
        barrier.wait(WAIT_S)  # the others wait for the turn with it
        if clock is not None:
            clock.begin()
    if clock is not None:
        clock.report()


# --- ours, and Flower's under the same apps -------------------------------------------------------------------------
def build_model(task: Task, family: str = FAMILY) -> Model:
    return Model(task.model(), nn.Identity())


def client_app(folder: Path) -> ClientApp:
    """A supervised client: our records, the task's training; data and model stay with the worker."""
    app = ClientApp()
    task = Task(folder)
    model = build_model(task)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        started = time.perf_counter()
        partition_id = int(cast(int, context.node_config["partition-id"]))
        load_state(model, family_values(message.content.array_records["arrays"], FAMILY))
        loss = task.train(model, partition_id)
        upload = Upload(
            header=Header(
                round_num=int(cast(int, message.content.config_records["config"]["server-round"])),
                partition_id=partition_id,
                family=FAMILY,
                codec="weights",
                public_fingerprint=FINGERPRINT,
            ),
            arrays={f"{FAMILY}/{name}": value.numpy() for name, value in model_state(model).items()},
            metrics={"loss": loss, "num-examples": NUM_IMAGES, "seconds": time.perf_counter() - started},
        )
        return Message(upload.to_content(), reply_to=message)

    @app.query("info")
    def info(message: Message, context: Context) -> Message:
        said = {"partition_id": context.node_config["partition-id"], "family": FAMILY}
        record = ConfigRecord({**said, "num_images": NUM_IMAGES, "trains": True})
        return Message(RecordDict({"info": record}), reply_to=message)

    return app


def server(task: Task, num_clients: int) -> Server:
    """Ours, with a public set of four images for its trial of each mean, and no method: nothing here is SSL."""
    pixels = np.random.default_rng(0).integers(256, size=(4, 3, 32, 32), dtype=np.uint8)
    images = ImageSet(pixels=pixels, indices=np.arange(4), labels=None, classes=(), name="noise")
    devices = instantiate(compose([])["federation"]["devices"])  # nobody is slow or away
    return Server(
        seed=0,
        num_rounds=len(task.cohorts),
        cohort_size=COHORT,
        devices=devices,
        num_trainers=num_clients,
        num_trainers_of={FAMILY: num_clients},
        families=(FAMILY,),
        client_families=(FAMILY,),
        report_family=FAMILY,
        public_set=PublicSet(images=images, fingerprint=FINGERPRINT),
        views=cast(Any, SimpleNamespace(plain=lambda pixels: pixels.float() / 255)),
        method=cast(Any, None),
        local=cast(Any, None),
        build_model=partial(build_model, task),
        private_union=cast(Any, None),
        embedding_dims={},
        embed_batch_size=1,
        device=torch.device("cpu"),
    )


def on_a_grid(given: Namespace, settings: InProcess | Ray | FlowerSim, num_clients: int = NUM_CLIENTS) -> None:
    """Rounds of our FedAvg by our loop's own steps: sample and broadcast, gather, aggregate."""
    keep_memory()  # as a run does
    task = Task(given.folder)
    strategy = FedAvg(server=server(task, num_clients), weighted=True)
    load_app: Callable[[], App] = partial(client_app, given.folder)
    with settings.open(load_app, num_clients=num_clients, threads=1, device="cpu") as grid:
        while isinstance(grid, RayGrid) and not all(slot.loaded for slot in grid._slots):
            grid.pull_messages([])
        arrays = strategy.server.initial_arrays()
        clock = Clock(given)
        ask_roster(grid)
        for round_num in range(1, given.rounds + 1):
            messages = list(strategy.configure_train(round_num, arrays, ConfigRecord(), grid))
            gathered = gather(grid, messages, check=strategy.check, timeout=None, summation=strategy.summation)
            assert len(gathered.replies) == COHORT, gathered.failures
            merged, _ = strategy.aggregate_train(round_num, gathered.replies)
            assert merged is not None
            arrays = merged
            clock.lap(partial(as_vector, arrays))
    clock.report()


def as_vector(arrays: ArrayRecord) -> Tensor:
    """The global weights, (parameters,) in the network's own order."""
    state = family_state(arrays, FAMILY)
    return torch.cat([state[f"backbone.{name}"].flatten() for name, _ in CNN().named_parameters()])


def _flower(given: Namespace) -> FlowerSim:
    return FlowerSim(workers=given.processes, clients_per_gpu=1, gpus=0, max_retries=2)


# --- Flower as its tutorials have it ---------------------------------------------------------------------------------
def stock_client_app(folder: Path) -> ClientApp:
    """The model's weights as Flower's own record, no header; data and model stay with the worker, as in ours."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        task, model = _kept(folder)
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        loss = task.train(model, int(cast(int, context.node_config["partition-id"])))
        metrics = MetricRecord({"loss": loss, "num-examples": NUM_IMAGES})
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    return app


@cache
def _kept(folder: Path) -> tuple[Task, CNN]:
    task = Task(folder)
    return task, task.model()


def flower_stock(given: Namespace) -> None:
    """Flower's engine under its own FedAvg, which checks nothing; its cohorts are others, it draws them itself."""
    from flwr.simulation import run_simulation

    app = ServerApp()
    clocks: list[Clock] = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        def evaluate(round_num: int, arrays: ArrayRecord) -> None:
            if round_num == 0:
                clocks.append(Clock(given))
            else:
                weights = arrays.to_torch_state_dict()
                clocks[0].lap(lambda: torch.cat([value.flatten() for value in weights.values()]))

        strategy = FlowersFedAvg(
            fraction_train=COHORT / NUM_CLIENTS, fraction_evaluate=0.0, min_available_nodes=NUM_CLIENTS
        )
        initial = ArrayRecord(Task(given.folder).model().state_dict())
        strategy.start(grid, initial, num_rounds=given.rounds, evaluate_fn=evaluate)

    run_simulation(
        server_app=app,
        client_app=stock_client_app(given.folder),
        num_supernodes=NUM_CLIENTS,
        backend_config=flowers_backend(given.processes),
    )
    clocks[0].report()


ENGINES: dict[str, Callable[[Namespace], None]] = {
    "plain": plain,
    "ours_in_process": lambda given: on_a_grid(given, InProcess()),
    "ours_ray": lambda given: on_a_grid(given, ray_settings(given.processes)),
    "flower_100": lambda given: on_a_grid(given, _flower(given), num_clients=100),
    "flower_1000": lambda given: on_a_grid(given, _flower(given)),
    "flower_stock": flower_stock,
}


def main() -> None:
    given = arguments()
    ENGINES[given.engine](given)


if __name__ == "__main__":
    from bench.round_engines import main as importable  # workers import the app by this module's name, not `__main__`

    importable()
