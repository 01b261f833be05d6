"""Many registered clients and a small cohort: what a round costs, and whether memory grows from round to round.

Whole runs of FedAvg on Ray with a tiny network, so that what is measured is the framework. Called by itself, this
module draws benchmarks/scale.png from a result.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench.flesd import write_parquet
from bench.measure import Result, by_sitting, in_own_process, judge
from bench.memory import Peak, private_bytes

from fedssl import run
from fedssl.config import compose

SIDE = 8  # pixels
IMAGES = 5  # of a client
LONG, MANY = (10_000, 100), (100_000, 100)  # registered clients, cohort: one run each, the first for its memory
CASES = ((10_000, 50), (10_000, 100), (10_000, 200), (1_000, 100))  # compared, in turn
SITTINGS = 4
ROUNDS, LONG_ROUNDS = 16, 50
COLD = 5  # rounds that do not count
WARM = 10  # rounds of the long run, before memory is flat: imports, caches, allocator
LAST = 10  # rounds of it, that are compared with the one before
GROWTH_MB = 20.0  # of the server's process from round 10 to the median of rounds 41 to 50
LINEAR = 1.25  # cost per client with a cohort of 200 over that with 50
REGISTERED = 1.25  # cost of a round with 10,000 registered over one with 1,000


def one_run(registered: int, cohort: int, rounds: int) -> dict[str, Any]:
    """Seconds and private memory of each round. For a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rng = np.random.default_rng(0)
        for split, count in (("train", registered * IMAGES + 100), ("test", 100)):
            pixels = rng.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
            write_parquet(root / f"{split}-0.parquet", pixels)
        config = compose([
            "data=parquet", f"data.root={root}", f"data.image_size={SIDE}", "partition=iid", "public.size=100",
            "strategy=fedavg", "+models.tiny._target_=fedssl.models.backbones.Conv4", "+models.tiny.width=4",
            "federation.families=[tiny]", f"federation.num_clients={registered}", f"federation.cohort_size={cohort}",
            f"federation.num_rounds={rounds}", "client.local_epochs=1", "evaluate.every=1000",
            "evaluate.raw_pixels=false", f"run_dir={root}/run",
        ])  # fmt: skip
        sampled = Sampled(root / "run" / "metrics.jsonl")
        sampled.start()
        run(config)
        sampled.stop()
        rows = map(json.loads, (root / "run" / "metrics.jsonl").read_text().splitlines())
        servers = [row["metrics"] for row in rows if row["scope"] == "server"]
    seconds = [row["seconds"] - row["seconds_evaluation"] for row in servers]
    return {"seconds": seconds, "private_mb": sampled.private_mb, "server_cpu_s": sampled.cpu_s}


class Sampled(Peak):
    """The process's private memory in MB, and the seconds of CPU it has taken, as each round's row is written."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.private_mb: list[float] = []
        self.cpu_s: list[float] = []

    def run(self) -> None:
        """Sample until `stop`."""
        while not self._stopped.wait(0.05):
            self._look()
        self._look()

    def _look(self) -> None:
        written = self.path.read_text().count('"scope": "server"') if self.path.exists() else 0
        new = written - len(self.private_mb)
        self.private_mb += [private_bytes() / 1e6] * new
        self.cpu_s += [time.process_time()] * new


def scale() -> Result:
    """Runs in processes of their own: cases in turn, forwards and backwards, then that of many, then the long one."""
    runs: dict[str, list[dict[str, Any]]] = {_name(case): [] for case in (*CASES, MANY)}
    for sitting in range(SITTINGS):
        for case in CASES if sitting % 2 == 0 else reversed(CASES):
            runs[_name(case)].append(in_own_process(f"bench.scale.one_run{(*case, ROUNDS)}"))
    runs[_name(MANY)].append(in_own_process(f"bench.scale.one_run{(*MANY, ROUNDS)}"))
    long = in_own_process(f"bench.scale.one_run{(*LONG, LONG_ROUNDS)}")
    warm = {name: [one["seconds"][COLD:] for one in sittings] for name, sittings in runs.items()}
    medians = {name: float(np.median(seconds)) for name, seconds in warm.items()}
    bars = [judge("scale.growth_mb", growth_mb(long["private_mb"]), GROWTH_MB, "lower")]
    for name, dear, cheap, limit in (
        ("linear", "10000/200", "10000/50", LINEAR * 200 / 50),
        ("registered", "10000/100", "1000/100", REGISTERED),
    ):
        bars.append(judge(f"scale.{name}", by_sitting(warm[dear], warm[cheap]), limit, "lower"))
    figures = {
        "unit": "seconds per round",
        "runs": runs,
        "long": long,
        "medians": medians,
        "ms_per_client": {name: 1000 * seconds / _cohort(name) for name, seconds in medians.items()},
        "server_cpu_ms_per_client": {  # without the last round, which evaluates
            name: 1000 * float(np.median([_cpu_s(one["server_cpu_s"]) for one in sittings])) / _cohort(name)
            for name, sittings in runs.items()
        },
    }
    return figures, bars


def growth_mb(memory: Sequence[float]) -> list[float]:
    """By what the memory of each of the last ten rounds is above that after round `WARM`; `memory[0]` is round 1's."""
    return [later - memory[WARM - 1] for later in memory[-LAST:]]


def _name(case: tuple[int, int]) -> str:
    return f"{case[0]}/{case[1]}"


def _cpu_s(at_rounds: list[float]) -> float:
    """Of a round."""
    return (at_rounds[-2] - at_rounds[COLD]) / (len(at_rounds) - 2 - COLD)


def _cohort(case: str) -> int:
    return int(case.split("/")[1])


def plot(figures: dict[str, Any], path: Path) -> None:
    """Seconds of a round over the cohort, and the server's memory over the rounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for registered, marker in (("10000", "o"), ("1000", "s"), ("100000", "^")):
        points = sorted(
            (int(n.split("/")[1]), s) for n, s in figures["medians"].items() if n.split("/")[0] == registered
        )
        left.plot(*zip(*points, strict=True), marker=marker, label=f"{int(registered):,} registered")
    left.set(xlabel="cohort", ylabel="seconds per round", xlim=(0, None), ylim=(0, None))
    left.legend()
    last = {name: sittings[-1] for name, sittings in figures["runs"].items()}
    for name, one in {**last, _name(LONG): figures["long"]}.items():
        registered, cohort = name.split("/")
        right.plot(
            range(1, len(one["private_mb"]) + 1), one["private_mb"], label=f"{int(registered):,}, cohort {cohort}"
        )
    right.set(xlabel="round", ylabel="server's private memory, MB", ylim=(0, None))
    right.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":  # PYTHONPATH=scripts:. python scripts/bench/scale.py RESULT.json OUT.png
    plot(json.loads(Path(sys.argv[1]).read_text())["figures"], Path(sys.argv[2]))
