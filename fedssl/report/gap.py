"""How much of the gap between clients alone and all data in one place a run closes."""

from collections.abc import Sequence

import numpy as np

from fedssl.report.runs import Run

LOCAL, CENTRAL = "local_only", "centralized"  # names in conf/strategy
# What a run shares with its controls: whose images they are, and how a model is trained on them.
SHARED = ("seed", "data", "partition", "public", "federation", "client", "method", "views", "models", "projector")


def gap_recovered(value: float, local: float, central: float) -> float | None:
    """(value - local) / (central - local): 0 is no better than the clients alone, 1 as good as all data in one place.

    The performance gap recovered of Burns et al. 2023, https://arxiv.org/abs/2312.09390, with the mean client for their
    weak model and centralized training for their ceiling. None where there is no gap to recover.
    """
    return (value - local) / (central - local) if central > local else None


def gaps_recovered(runs: Sequence[Run], metric: str) -> dict[int, float]:
    """By the position of a run in `runs`: how much it recovers, where both controls of its seed and setting are there.

    Args:
        runs: whose accuracies may be compared at all; the controls among them.
        metric: e.g. "linear_top1"; of `local_only` it is the mean over the clients.
    """
    controls: dict[tuple[str, frozenset[tuple[str, str]]], list[float]] = {}
    for run in runs:
        if run.completed and run.strategy in (LOCAL, CENTRAL) and metric in run.final():
            controls.setdefault((run.strategy, _setting(run)), []).append(run.final()[metric])
    recovered = {}
    for i, run in enumerate(runs):
        local, central = (controls.get((strategy, _setting(run)), []) for strategy in (LOCAL, CENTRAL))
        eligible = run.completed and run.strategy not in (LOCAL, CENTRAL) and metric in run.final()
        if eligible and local and central:
            share = gap_recovered(run.final()[metric], float(np.mean(local)), float(np.mean(central)))
            if share is not None:
                recovered[i] = share
    return recovered


def _setting(run: Run) -> frozenset[tuple[str, str]]:
    own = {key: value for key, value in run.choices.items() if key.split(".")[0] in SHARED}
    return frozenset({**own, "seed": str(run.seed)}.items())
