#!/usr/bin/env python
"""Measure what fedssl promises about its speed: `scripts/benchmark.py NAME`.

Prints one JSON object (figures, bars with their 95 % intervals, hardware, commit) and ends with 1 where a bar is
false. How each figure is taken: benchmarks/README.md. To add a benchmark, write a function that returns figures and
bars, and name it in BENCHMARKS.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", OMP_NUM_THREADS="1")

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedssl.federation.grids.base import LocalGrid
from fedssl.federation.grids.in_process import InProcess
from fedssl.federation.grids.ray import Ray

ROOT = Path(__file__).resolve().parent.parent
RESAMPLES = 10_000  # of the bootstrap


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A promise and what was measured; `ratio` is the figure itself where the bar is absolute."""

    name: str
    ratio: float
    ci: tuple[float, float]
    bar: float
    better: Literal["lower", "higher"]
    holds: bool | Literal["undecided"]


def median_interval(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The median and its bootstrap 95 % interval."""
    sample = np.asarray(values)
    draws = np.random.default_rng(0).integers(len(sample), size=(RESAMPLES, len(sample)))
    low, high = np.percentile(np.median(sample[draws], axis=1), [2.5, 97.5])
    return float(np.median(sample)), (float(low), float(high))


def judge(name: str, values: Sequence[float], bar: float, better: Literal["lower", "higher"]) -> Bar:
    """The bar holds where the whole interval is on its good side, and is undecided where the interval contains it."""
    ratio, (low, high) = median_interval(values)
    holds: bool | Literal["undecided"] = "undecided"
    if high <= bar or low >= bar:
        holds = (high <= bar) == (better == "lower")
    return Bar(name=name, ratio=ratio, ci=(low, high), bar=bar, better=better, holds=holds)


# --- overhead --------------------------------------------------------------------------------------------------------

SIZES = (10, 100, 1_000, 10_000)  # messages a round
REPETITIONS = 15
ARRAY_VALUES = 1024  # float32: 4 KB
LIMITS = {"in_process": 0.4, "ray": 1.0}  # ms a message


def no_op_app() -> ClientApp:
    """A Flower app that reads its header and array, and answers with an array of that size and a metric."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        weights = message.content["arrays"]["w"].numpy()
        metrics = MetricRecord({"round": message.content["header"]["round"]})
        return Message(RecordDict({"arrays": ArrayRecord({"w": Array(weights)}), "metrics": metrics}), reply_to=message)

    return app


def no_op_round(grid: LocalGrid, num_messages: int, round_num: int) -> float:
    """Milliseconds a message, from creating the messages to having read all replies."""
    started = time.perf_counter()
    arrays = ArrayRecord({"w": Array(np.full(ARRAY_VALUES, round_num, np.float32))})
    messages = [
        Message(RecordDict({"header": ConfigRecord({"round": round_num}), "arrays": arrays}), node_id, "train")
        for node_id in grid.get_node_ids()[:num_messages]
    ]
    replies = grid.send_and_receive(messages)
    metrics = sum(int(reply.content["metrics"]["round"]) for reply in replies)
    total = sum(float(reply.content["arrays"]["w"].numpy()[-1]) for reply in replies)
    seconds = time.perf_counter() - started
    assert metrics == total == num_messages * round_num
    return 1000 * seconds / num_messages


def overhead() -> tuple[dict[str, Any], list[Bar]]:
    """The framework's cost of a client message in both grids, with clients that do nothing."""
    ray = Ray(workers=None, clients_per_gpu=1, gpus=0, address=None, max_retries=2, batch_seconds=0.1)
    with (
        InProcess().open(no_op_app, num_clients=max(SIZES), threads=1, device="cpu") as in_process,
        ray.open(no_op_app, num_clients=max(SIZES), threads=1, device="cpu") as on_ray,
    ):
        grids: Mapping[str, LocalGrid] = {"in_process": in_process, "ray": on_ray}
        for grid in grids.values():
            no_op_round(grid, max(SIZES), 1)  # starts the workers; every client has run once
        costs: dict[str, dict[int, list[float]]] = {name: {size: [] for size in SIZES} for name in grids}
        for repetition in range(REPETITIONS):
            for size in SIZES:
                for name, grid in grids.items():
                    costs[name][size].append(no_op_round(grid, size, repetition + 2))
        workers = on_ray.placement.workers
    figures = {
        "unit": "ms per message",
        "repetitions": REPETITIONS,
        "ray_workers": workers,
        "costs": costs,
        "medians": {
            name: {size: median_interval(values)[0] for size, values in c.items()} for name, c in costs.items()
        },
        "cost_at_10000_over_1000": {
            name: median_interval([a / b for a, b in zip(c[10_000], c[1_000], strict=True)])
            for name, c in costs.items()
        },
    }
    bars = []
    for name, limit in LIMITS.items():
        worst = max(costs[name].values(), key=lambda values: float(np.median(values)))  # the bar holds at every size
        bars.append(judge(f"overhead.{name}_ms", worst, limit, "lower"))
    return figures, bars


# --- the command -----------------------------------------------------------------------------------------------------

BENCHMARKS: dict[str, Callable[[], tuple[dict[str, Any], list[Bar]]]] = {"overhead": overhead}


def hardware() -> dict[str, Any]:
    """What the figures were taken on."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return {
        "cpu": cpu.partition(":")[2].strip() or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("flwr", "numpy", "ray", "torch")},
    }


def commit() -> str:
    """The checkout's commit, marked where files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what fedssl promises about its speed.")
    parser.add_argument("name", choices=list(BENCHMARKS))
    name = parser.parse_args().name
    before = hardware()  # the load, too, is the one before our own
    figures, bars = BENCHMARKS[name]()
    result = {
        "name": name,
        "figures": figures,
        "bars": [asdict(bar) for bar in bars],
        "hardware": before,
        "commit": commit(),
    }
    print(json.dumps(result, indent=2))
    return int(any(bar.holds is False for bar in bars))


if __name__ == "__main__":
    sys.exit(main())
