"""What every benchmark returns: figures, and bars with the 95 % interval of their median."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fedssl.config import compose, instantiate

ROOT = Path(__file__).resolve().parent.parent.parent
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


def by_sitting(numerator: Sequence[Sequence[float]], denominator: Sequence[Sequence[float]]) -> list[float]:
    """One ratio, of medians, a pair of sittings: rounds of one process are alike, they do not count as many."""
    return [float(np.median(a) / np.median(b)) for a, b in zip(numerator, denominator, strict=True)]


Result = tuple[dict[str, Any], list[Bar]]  # figures, bars


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given: it works on while Python goes on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def nvidia_smi(field: str) -> str | None:
    """What the driver says of the GPU that torch sees first; None where there is none to ask."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def ray_settings(workers: int | None = None) -> Any:
    """Our Ray grid as conf/grid/ray.yaml has it, without GPUs; None: as many workers as cores."""
    return instantiate(
        compose(["grid=ray", "grid.gpus=0", f"grid.workers={'null' if workers is None else workers}"])["grid"]
    )


def flowers_backend(workers: int) -> dict[str, Any]:
    """The `backend_config` of Flower's `run_simulation`: a fresh Ray on this machine with as many actors, no GPU."""
    return {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"address": "local", "num_cpus": workers, "include_dashboard": False},
    }


def with_this_checkout() -> dict[str, str]:
    """The environment of processes that measure: they import this checkout, even where another one is installed."""
    paths = [str(ROOT / "scripts"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def in_own_process(call: str) -> Any:
    """What `call`, e.g. "bench.memory.one_round('topk')", returns in a fresh process, as JSON."""
    module = call.partition("(")[0].rpartition(".")[0]
    command = f"import json, {module}; found = {call}; print('\\n' + json.dumps(found))"
    done = subprocess.run(
        [sys.executable, "-c", command],
        cwd=ROOT / "scripts",
        env=with_this_checkout(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{call} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
