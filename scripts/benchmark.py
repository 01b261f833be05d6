#!/usr/bin/env python
"""Measure what fedssl promises about its speed: `scripts/benchmark.py NAME`.

Prints one JSON object (figures, bars with their 95 % intervals, hardware, commit) and ends with 1 where a bar is
false, with 2 where it cannot be measured here, with 3 where measuring failed, with 130 where it was interrupted and
says what it had. How each figure is taken: benchmarks/README.md. To add a benchmark, write scripts/bench/<name>.py with
a function <name> that returns figures and bars, and name it in BENCHMARKS.
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import traceback
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout is measured, even where another one is installed

BENCHMARKS = (
    "overhead", "views", "train", "compiled", "choices", "packed", "round", "upload", "distill", "memory", "probe",
    "flesd", "scale", "deploy",
)  # fmt: skip
FAILED = 3  # 1 says that a bar is false, 2 that it cannot be measured here


def hardware() -> dict[str, Any]:
    """What the figures were taken on."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return {
        "cpu": cpu.partition(":")[2].strip() or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("flwr", "numpy", "ray", "torch")},
    }


def _version(name: str) -> str | None:
    """None where it is not installed: not every benchmark needs each of them."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """The checkout's commit, marked where files differ from it; "unknown" where nobody can say."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # there is no git
        return "unknown"
    return done.stdout.strip() or "unknown"


def main() -> int:
    from fedssl.environment import keep_memory, set_defaults

    parser = argparse.ArgumentParser(description="Measure what fedssl promises about its speed.")
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--of", metavar="A,B", help="of train: these families only")
    given = parser.parse_args()
    name = given.name
    if given.of is not None and name != "train":
        parser.error("--of is for train")
    chosen = {} if given.of is None else {"families": given.of.split(",")}
    set_defaults()
    keep_memory()
    os.environ["OMP_NUM_THREADS"] = "1"
    before = hardware()  # the load, too, is the one before our own
    measured = commit()  # of the code that runs, which may change meanwhile
    from bench.measure import nvidia_smi

    from fedssl.errors import ConfigError
    from fedssl.outcome import INTERRUPTED

    try:
        figures, bars = getattr(importlib.import_module(f"bench.{name}"), name)(**chosen)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        traceback.print_exc()
        print(f"error: {name} failed: {type(error).__name__}: {' '.join(str(error).split())[:500]}", file=sys.stderr)
        return FAILED
    result = {
        "name": name,
        "figures": figures,
        "bars": [asdict(bar) for bar in bars],
        "hardware": {**before, "gpu": nvidia_smi("name")},
        "commit": measured,
    }
    print(json.dumps(result, indent=2))
    if figures.get("not_measured"):
        return INTERRUPTED
    return int(any(bar.holds is False for bar in bars))


if __name__ == "__main__":
    sys.exit(main())
