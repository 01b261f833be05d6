"""Clients of small networks that share one GPU: what 1, 2, 4, 8 and 16 of them at once train together."""

import multiprocessing as mp
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Event, Semaphore
from typing import Any

import numpy as np
import torch
from bench.measure import Result, nvidia_smi
from bench.train import epoch

from fedssl.config import compose
from fedssl.environment import keep_memory
from fedssl.errors import ConfigError

FAMILIES = ("conv4_16", "conv4_32", "resnet8")
CLIENTS = (1, 2, 4, 8, 16)  # at once
LEAD_S, WINDOW_S = 1.0, 4.0  # from the start to the clock, whose utilisation is of the second before; and on it
POLL_S = 0.2
BUSY = 90  # percent


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a client trains, over and over."""

    steps: int = 10  # an epoch
    batch_size: int = 128
    epochs: int = 10


@dataclass(frozen=True, kw_only=True)
class Signals:
    """Between the clock's process and the clients' processes."""

    ready: Semaphore
    go: Event
    stop: Event


_signals: Signals  # of this process, which is a client's


def _start(signals: Signals) -> None:
    """As a worker does; processes inherit signals, tasks cannot carry them."""
    global _signals
    _signals = signals
    keep_memory()
    torch.set_num_threads(1)


def _client(family: str, device: torch.device, training: Training) -> list[float]:
    """When it started, and when each training ended; one before that is warm-up."""
    one, _ = epoch(family, device, (training.steps, training.batch_size))
    one = replace(one, epochs=training.epochs, cuda_graphs=compose([])["client"]["cuda_graphs"])
    one.ours()
    _signals.ready.release()
    _signals.go.wait()
    moments = [time.monotonic()]  # one clock for all processes
    while not _signals.stop.is_set():
        one.ours()
        moments.append(time.monotonic())
    return moments


def _until_ready(futures: Sequence[Future[list[float]]], ready: Semaphore) -> None:
    for _ in futures:
        while not ready.acquire(timeout=1):
            for future in futures:
                if future.done():
                    future.result()  # raises what ended it


def utilisation() -> float | None:
    """Percent of the last moments in which the GPU computed anything; None where nobody says."""
    text = nvidia_smi("utilization.gpu") or ""
    return float(text) if text.isdecimal() else None


def measure(
    pool: ProcessPoolExecutor, signals: Signals, *, family: str, clients: int, device: torch.device, training: Training
) -> dict[str, Any]:
    """Images per second of all clients together, from a second after the last is ready."""
    signals.go.clear()
    signals.stop.clear()
    futures = [pool.submit(_client, family, device, training) for _ in range(clients)]
    readings = []
    try:
        _until_ready(futures, signals.ready)
        signals.go.set()
        time.sleep(LEAD_S)
        begin = time.monotonic()
        while (end := time.monotonic()) < begin + WINDOW_S:
            readings.append(utilisation())
            time.sleep(POLL_S)
    finally:
        signals.go.set()
        signals.stop.set()
    images = training.steps * training.batch_size * training.epochs
    trained = 0.0
    for future in futures:
        moments = future.result()
        first, last = np.interp([begin, end], moments, np.arange(len(moments)) * images)  # also parts of a training
        trained += float(last - first)
    known = [reading for reading in readings if reading is not None]
    return {
        "clients": clients,
        "images_per_s": trained / (end - begin),
        "utilisation": float(np.median(known)) if known else None,
    }


def together(
    families: Sequence[str], counts: Sequence[int], device: torch.device, training: Training
) -> dict[str, dict[str, Any]]:
    """Of every family; one process a client, which all families share one after the other."""
    context = mp.get_context("spawn")  # a GPU cannot be used in a forked process
    signals = Signals(ready=context.Semaphore(0), go=context.Event(), stop=context.Event())
    with ProcessPoolExecutor(max(counts), context, _start, (signals,)) as pool:
        return {
            family: _summary(
                [
                    measure(pool, signals, family=family, clients=clients, device=device, training=training)
                    for clients in counts
                ]
            )
            for family in families
        }


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first row is of one client."""
    busy = [row["clients"] for row in rows if row["utilisation"] is not None and row["utilisation"] >= BUSY]
    return {
        "rows": [{**row, "gain": row["images_per_s"] / rows[0]["images_per_s"]} for row in rows],
        "busy_from": min(busy, default=None),
    }


def packed() -> Result:
    """Every small family; no bar."""
    if not torch.cuda.is_available():
        raise ConfigError("the benchmark packed measures how clients share a GPU, and torch sees none here.")
    training = Training()
    families = together(FAMILIES, CLIENTS, torch.device("cuda"), training)
    return {
        "unit": "images per second, percent of the time",
        "seconds": WINDOW_S,
        "images_a_client": training.steps * training.batch_size,
        "batch_size": training.batch_size,
        "local_epochs": training.epochs,
        "families": families,
    }, []
