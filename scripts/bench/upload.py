"""Eight clients answer with 50 MB each: a round on our Ray grid against one of Flower's own simulation engine."""

import os
import time
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
from bench.measure import Result, in_own_process, judge, median_interval, ray_settings
from bench.memory import Peak, private_bytes
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedssl.environment import keep_memory

CLIENTS = 8
SIDE = 5_000  # of a similarity matrix in fp16: 50 MB
UPLOAD_BYTES = 2 * SIDE**2
SITTINGS = 3  # of each engine, in turn
ROUNDS = 6  # of a sitting; the first, which starts the workers, does not count
LIMITS = {"flower": 1.5, "extra_uploads": 2.0}
ENGINES = ("ours", "flower")


@cache
def matrix() -> np.ndarray:
    """What every client uploads; a worker makes it once."""
    return np.random.default_rng(0).random((SIDE, SIDE), np.float32).astype(np.float16)


def client_app(record: Callable[[np.ndarray], ArrayRecord]) -> ClientApp:
    """Answers with `matrix`, packed by `record`."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        content = RecordDict({"arrays": record(matrix()), "metrics": MetricRecord({"loss": 0.0})})
        return Message(content, reply_to=message)

    return app


def our_app() -> ClientApp:
    """Packs as our clients do."""
    from fedssl.federation.arrays import to_record

    return client_app(lambda value: to_record({"s": value}))


def flower_app() -> ClientApp:
    """Packs as Flower's tutorials do."""
    return client_app(lambda value: ArrayRecord({"s": Array(value)}))


def sums(replies: Iterable[Message], read: Callable[[Array], np.ndarray]) -> np.ndarray:
    """The sum of the uploads in float32: what a server does at the least."""
    total = np.zeros((SIDE, SIDE), np.float32)
    for reply in replies:
        total += read(reply.content["arrays"]["s"])
    return total


def rounds(grid: Grid, read: Callable[[Array], np.ndarray]) -> list[dict[str, float]]:
    """Seconds of each round from sending to the sum, and the private memory it took at most beyond that sum."""
    done = []
    for _ in range(ROUNDS):
        before = private_bytes()
        peak = Peak()
        peak.start()
        started = time.perf_counter()
        content = RecordDict({"metrics": MetricRecord({"round": 1})})
        messages = [Message(content, node, "train") for node in grid.get_node_ids()]
        total = sums(grid.send_and_receive(messages), read)
        seconds = time.perf_counter() - started
        extra = peak.stop() - before - total.nbytes
        assert np.isclose(total[0, 0], CLIENTS * float(matrix()[0, 0]), rtol=1e-3)
        done.append({"seconds": seconds, "extra_uploads": max(0.0, extra / UPLOAD_BYTES)})
    return done


def ours() -> list[dict[str, float]]:
    """On our Ray grid."""
    from fedssl.federation.arrays import read_array

    keep_memory()  # as a run does
    matrix()
    with ray_settings().open(our_app, num_clients=CLIENTS, threads=1, device="cpu") as grid:
        return rounds(grid, lambda array: read_array("s", array))


def flower() -> list[dict[str, float]]:
    """On Flower's engine, with as many workers."""
    from flwr.simulation import run_simulation

    matrix()
    app = ServerApp()
    done: list[dict[str, float]] = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        while len(list(grid.get_node_ids())) < CLIENTS:
            time.sleep(0.1)
        done.extend(rounds(grid, Array.numpy))

    cores = len(os.sched_getaffinity(0))
    run_simulation(
        server_app=app,
        client_app=flower_app(),
        num_supernodes=CLIENTS,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"address": "local", "num_cpus": cores, "include_dashboard": False},
        },
    )
    return done


def upload() -> Result:
    """Sittings in turn, each engine first as often as it can be; round i of a sitting is paired with the other's."""
    done: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    for i in range(SITTINGS):
        for engine in ENGINES if i % 2 == 0 else reversed(ENGINES):
            done[engine] += in_own_process(f"bench.upload.{engine}()")[1:]
    pairs = list(zip(done["flower"], done["ours"], strict=True))
    ratios = [theirs["seconds"] / mine["seconds"] for theirs, mine in pairs]
    figures: dict[str, Any] = {
        "unit": "seconds per round",
        "clients": CLIENTS,
        "upload_mb": UPLOAD_BYTES / 1e6,
        "sittings": SITTINGS,
        "rounds": done,
        "medians": {engine: median_interval([one["seconds"] for one in rows])[0] for engine, rows in done.items()},
        "extra_uploads": {
            engine: median_interval([one["extra_uploads"] for one in rows])[0] for engine, rows in done.items()
        },
    }
    bars = [
        judge("upload.flower", ratios, LIMITS["flower"], "higher"),
        judge("upload.extra_uploads", [one["extra_uploads"] for one in done["ours"]], LIMITS["extra_uploads"], "lower"),
    ]
    return figures, bars
