"""Eight clients answer with 50 MB each: a round on our Ray grid against one of Flower's own simulation engine."""

import os
import time
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
from bench.measure import Result, by_sitting, flowers_backend, in_own_process, judge, ray_settings
from bench.memory import Peak, private_bytes
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedssl.environment import keep_memory

CLIENTS = 8
SIDE = 5_000  # of a similarity matrix in fp16: 50 MB
UPLOAD_BYTES = 2 * SIDE**2
SITTINGS = 15  # of each engine, in turn
ROUNDS = 3  # of a sitting; the first, which starts the workers, does not count
FLESD_SITTINGS = 3
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


def similarity_app() -> ClientApp:
    """Uploads the similarities of random embeddings, as codec=dense has them."""
    import torch

    from fedssl.config import compose, instantiate
    from fedssl.federation.arrays import to_record

    codec = instantiate(compose(["codec=dense", "codec.dtype=fp16"])["codec"])
    embeddings = torch.randn(SIDE, 128)
    [value] = codec.encode(embeddings, torch.Generator()).values()
    return client_app(lambda _: to_record({"s": value}))


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
    """Seconds of each round from sending to the sum, and the private memory beyond that sum and the start's, at most.

    The start's is that before the first round: what a round frees, its sum or copies of uploads, a process may keep.
    """
    before = private_bytes()
    done = []
    for _ in range(ROUNDS):
        peak = Peak()
        peak.start()
        started = time.perf_counter()
        content = RecordDict({"metrics": MetricRecord({"round": 1})})
        messages = [Message(content, node, "train") for node in grid.get_node_ids()]
        total = sums(grid.send_and_receive(messages), read)
        seconds = time.perf_counter() - started
        extra = peak.stop() - before - total.nbytes
        assert np.isclose(total[0, 0], CLIENTS * float(matrix()[0, 0]), rtol=1e-3)
        done.append({"seconds": seconds, "extra_uploads": extra / UPLOAD_BYTES})
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

    run_simulation(
        server_app=app,
        client_app=flower_app(),
        num_supernodes=CLIENTS,
        backend_config=flowers_backend(len(os.sched_getaffinity(0))),
    )
    return done


def flesd() -> float:
    """The server's private memory at its peak while it decodes eight dense similarities as FLESD does, in uploads.

    Eight of these are the ensemble: its rules normalise each client's similarities over the anchors of a step, which
    change, so no sum could stand for them.
    """
    from fedssl.codecs import Dense
    from fedssl.config import compose, instantiate
    from fedssl.ensemble import make_target
    from fedssl.federation.arrays import read_array

    keep_memory()
    config = compose(["codec=dense", "codec.dtype=fp16"])
    codec: Dense = instantiate(config["codec"])
    with ray_settings().open(similarity_app, num_clients=CLIENTS, threads=1, device="cpu") as grid:
        before = private_bytes()
        peak = Peak()
        peak.start()
        content = RecordDict({"metrics": MetricRecord({"round": 1})})
        waiting = set(grid.push_messages([Message(content, node, "train") for node in grid.get_node_ids()]))
        decoded = []
        while waiting:
            for reply in grid.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                arrays = {"similarity": read_array("s", reply.content["arrays"]["s"])}
                decoded.append(codec.decode(arrays, SIDE))
        make_target(decoded, instantiate(config["ensemble"]), 0.1)
        return (peak.stop() - before) / UPLOAD_BYTES


def upload() -> Result:
    """Sittings in turn, each engine first as often as it can be, each paired with the other's."""
    done: dict[str, list[list[dict[str, float]]]] = {engine: [] for engine in ENGINES}
    for i in range(SITTINGS):
        for engine in ENGINES if i % 2 == 0 else reversed(ENGINES):
            done[engine].append(in_own_process(f"bench.upload.{engine}()")[1:])

    def each(engine: str, figure: str) -> list[list[float]]:
        return [[one[figure] for one in sitting] for sitting in done[engine]]

    ratios = by_sitting(each("flower", "seconds"), each("ours", "seconds"))
    extra = [max(sitting) for sitting in each("ours", "extra_uploads")]
    figures: dict[str, Any] = {
        "unit": "seconds per round",
        "clients": CLIENTS,
        "upload_mb": UPLOAD_BYTES / 1e6,
        "sittings": SITTINGS,
        "rounds": done,
        "medians": {engine: float(np.median(each(engine, "seconds"))) for engine in ENGINES},
        "extra_uploads": {engine: float(np.median(each(engine, "extra_uploads"))) for engine in ENGINES},
        "flesd_uploads": [in_own_process("bench.upload.flesd()") for _ in range(FLESD_SITTINGS)],
    }
    bars = [
        judge("upload.flower", ratios, LIMITS["flower"], "higher"),
        judge("upload.extra_uploads", extra, LIMITS["extra_uploads"], "lower"),
    ]
    return figures, bars
