"""A group's accuracy over rounds, and over what it cost."""

import pandas as pd

from fedssl.plots import Curve
from fedssl.report.sections import Group


def over_rounds(group: Group, name: str) -> Curve | None:
    """Mean and range over the seeds; rounds that every completed run has evaluated."""
    return _curve(_accuracies(group, name), None)


def over_cost(group: Group, name: str, cost: str) -> Curve | None:
    """The same against the mean over the seeds of what was spent by then; None where a run does not know it.

    Args:
        group: completed runs of it count.
        name: the metric.
        cost: see `Run.spent`.
    """
    spent = [run.spent(cost) for run in group.completed]
    known = [values for values in spent if values is not None]
    if not known or len(known) < len(spent):
        return None
    return _curve(_accuracies(group, name), pd.concat(known, axis=1, join="inner").mean(axis=1))


def _accuracies(group: Group, name: str) -> pd.DataFrame:
    """A row a round, a column a seed: the mean where it ran more than once."""
    series: list[tuple[str, pd.Series[float]]] = []
    for run in group.completed:
        table = run.eval[run.eval["family"] == run.report_family]
        if name in table:
            values = table.dropna(subset=[name]).drop_duplicates("round", keep="last").set_index("round")[name]
            series.append((str(run.seed), values))
    if not series:
        return pd.DataFrame()
    rounds = pd.concat([values for _, values in series], axis=1, join="inner", keys=range(len(series))).sort_index()
    return rounds.T.groupby([seed for seed, _ in series]).mean().T


def _curve(rounds: pd.DataFrame, spent: "pd.Series[float] | None") -> Curve | None:
    if spent is not None:
        rounds = rounds[rounds.index.isin(spent.index)]
    if len(rounds) < 2:
        return None
    band = rounds.shape[1] > 1
    return Curve(
        x=rounds.index.tolist() if spent is None else spent[rounds.index].tolist(),
        y=rounds.mean(axis=1).tolist(),
        low=rounds.min(axis=1).tolist() if band else None,
        high=rounds.max(axis=1).tolist() if band else None,
    )
