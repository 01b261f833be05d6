"""A round of federated averaging in pfl-research's CIFAR-10 setting: ours, none at all, and the peers."""

import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench.measure import Bar, Result, judge, median_interval
from bench.round_task import COHORT, NUM_CLIENTS, Task
from bench.sitting import Sitting, ratios, rounds_in_turn

from fedssl.seeding import numpy_generator

HERE = Path(__file__).parent
SITTINGS = 12  # each engine that a bar compares starts once in each, in alternating order
EVERY = 6  # of so many, the others start in the first two, which have opposite orders
TIMED = 4  # rounds of a sitting after the first
OWN_COHORTS = ("flower_100", "flower_stock")  # so their weights are others
BARS = {"round.bound": 1.10, "round.flower": 2.0, "round.pfl": 1.0, "round.first_s": 5.0}
TOLERANCE = 1e-5  # of weights after the first round: engines differ in the order of their sums


def commands(processes: int) -> tuple[dict[str, list[str]], dict[str, str]]:
    """What starts each engine, in order; and the peers that are missing, with the reason."""
    ours = [sys.executable, "-m", "bench.round_engines"]
    found = {"plain": [*ours, "plain"], "ours_ray": [*ours, "ours_ray"]}
    missing = {}
    engines_of = {"pfl": (f"pfl_{processes}_channels_last", f"pfl_{processes}", "pfl_1"), "blazefl": ("blazefl",)}
    for peer, engines in engines_of.items():
        folder = os.environ.get("FEDSSL_PEERS")
        home = Path(folder or "", peer).absolute()
        if folder is None or not (home / "complete").exists():
            missing[peer] = "FEDSSL_PEERS is not set" if folder is None else "not in the folder of FEDSSL_PEERS"
            continue
        script = str(HERE / "peers" / f"{peer}_round.py")
        for engine in dict.fromkeys(engines):
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            launcher = torchrun if peer == "pfl" and processes > 1 and engine != "pfl_1" else []
            found[engine] = [str(home / "bin" / "python"), *launcher, script, engine]
    for engine in ("flower_1000", "ours_in_process", "flower_100", "flower_stock"):
        found[engine] = [*ours, engine]
    return found, missing


def start(engine: str, command: Sequence[str], folder: Path, processes: int) -> Sitting:
    """One start of an engine on the task in `folder`."""
    own = 1 if engine in ("pfl_1", "ours_in_process") else processes
    given = ["--rounds", str(1 + TIMED), "--processes", str(own), "--started", str(time.time())]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)]),
        "CUDA_VISIBLE_DEVICES": "",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    crashes = engine.startswith("pfl")  # its processes now and then
    return Sitting(engine, [*command, str(folder), *given], folder, environment, crashes_at_its_end=crashes)


def differences(folder: Path, engines: Sequence[str]) -> dict[str, float]:
    """The largest difference of any weight to the plain loops' after the first round.

    More than rounding is an error: not the same work. Later rounds amplify it: a rectifier is on or off.
    """
    expected = np.load(folder / "weights_plain.npy")
    found = {
        engine: float(np.abs(np.load(folder / f"weights_{engine}.npy") - expected).max())
        for engine in engines
        if engine not in OWN_COHORTS
    }
    if wrong := {engine: value for engine, value in found.items() if not value < TOLERANCE}:
        raise RuntimeError(f"these engines learned other weights than the plain loops: {wrong}")
    return found


def round() -> Result:
    """Sittings of the engines, forwards and backwards in turn; the ratios are of rounds that follow each other."""
    processes = len(os.sched_getaffinity(0))
    found, missing = commands(processes)
    sittings: dict[str, list[dict[str, Any]]] = {engine: [] for engine in found}
    with tempfile.TemporaryDirectory(prefix="fedssl-round-") as name:
        folder = Path(name)
        draws = [
            numpy_generator(0, "cohort", r).choice(NUM_CLIENTS, COHORT, replace=False) for r in range(1, TIMED + 2)
        ]
        Task.write(folder, np.sort(draws, axis=1))  # those that our server draws
        compared = {"plain", "ours_ray", "flower_1000", f"pfl_{processes}_channels_last"}
        for sitting in range(SITTINGS):
            engines = [engine for engine in found if engine in compared or sitting % EVERY < 2]
            order = engines if sitting % 2 == 0 else engines[::-1]
            starts = [partial(start, engine, found[engine], folder, processes) for engine in order]
            for engine, report in rounds_in_turn(starts, TIMED).items():
                sittings[engine].append({"sitting": sitting, **report})
        off = differences(folder, list(found))

    def pairs(numerator: str, denominator: str) -> list[float]:
        both = {one["sitting"] for one in sittings[numerator]} & {one["sitting"] for one in sittings[denominator]}

        def seconds(engine: str) -> list[list[float]]:
            return [one["seconds"][1:] for one in sittings[engine] if one["sitting"] in both]

        return ratios(seconds(numerator), seconds(denominator))

    bars = [
        judge("round.bound", pairs("ours_ray", "plain"), BARS["round.bound"], "lower"),
        judge("round.flower", pairs("flower_1000", "ours_ray"), BARS["round.flower"], "higher"),
        judge("round.pfl", pairs(f"pfl_{processes}_channels_last", "ours_ray"), BARS["round.pfl"], "higher")
        if "pfl" not in missing
        else Bar(name="round.pfl", ratio=0, ci=(0, 0), bar=BARS["round.pfl"], better="higher", holds=False),
        judge(
            "round.first_s",
            [one["seconds"][0] - one["seconds"][1] for one in sittings["ours_ray"]],
            BARS["round.first_s"],
            "lower",
        ),
    ]
    for peer, reason in missing.items():
        print(f"{peer} was not measured: {reason}; see scripts/peers", file=sys.stderr)
    over_ours = {engine: pairs(engine, "ours_ray") for engine in found}
    figures = {"rows": rows(sittings), "over_ours_ray": over_ours, "missing": missing, "differences": off}
    return {"processes": processes, **figures}, bars


def rows(sittings: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Of each engine: its median round after the first with interval, when its first round has ended at the median
    (seconds from its start; some load the clients' side in that round, some before), and every sitting as reported.
    """
    table = {}
    for engine, reports in sittings.items():
        median, interval = median_interval([float(np.median(one["seconds"][1:])) for one in reports])
        first_ends = float(np.median([one["start_s"] + one["seconds"][0] for one in reports]))
        table[engine] = {"seconds": median, "ci": interval, "first_ends_s": first_ends, "sittings": list(reports)}
    return table
