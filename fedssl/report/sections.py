"""Runs sorted: what may be compared at all, what differs in more than the seed, and what is compared with what."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

from fedssl.errors import ConfigError
from fedssl.report.gap import gaps_recovered
from fedssl.report.paired import Difference, paired_difference
from fedssl.report.runs import METRICS, Run, tell_apart, varying
from fedssl.settings import covers

GAP_METRIC = "linear_top1"

BySeed = Mapping[int, float]  # a value for each seed
Seed = TypeVar("Seed", int, int | None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Runs that differ in nothing but the seed."""

    label: str
    runs: Sequence[Run]

    @property
    def completed(self) -> list[Run]:
        """The runs whose numbers enter the mean."""
        return [run for run in self.runs if run.completed]

    def values(self, name: str) -> list[float]:
        """One number a seed that has a completed run with the metric."""
        return over_seeds([(run.seed, run.final().get(name)) for run in self.completed])

    def by_seed(self, name: str) -> dict[int, float]:
        """The same by seed: the mean where a seed ran more than once."""
        return _means((run.seed, run.final().get(name)) for run in self.completed if run.seed is not None)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Runs whose accuracies may be compared: the same data, the same probes, the same reported family.

    Args:
        title: data, family, and what sets it apart from other sections.
        groups: the best first.
        controls: random init and raw pixels -> metric -> a value for each seed.
        compared: the settings that are compared, none where none stands out; others that differ are warned of.
    """

    title: str
    groups: Sequence[Group]
    controls: Mapping[str, Mapping[str, BySeed]]
    compared: Sequence[str]

    @property
    def runs(self) -> list[Run]:
        """Of all groups."""
        return [run for group in self.groups for run in group.runs]

    @cached_property
    def shown(self) -> list[str]:
        """The metrics that anything here has, the most important first."""

        def known(name: str) -> bool:
            return any(group.values(name) for group in self.groups) or any(name in m for m in self.controls.values())

        return [name for name in METRICS if known(name)]

    def recovered(self) -> dict[Run, float]:
        """The gap that a run recovers, where that is known; see `gaps_recovered`."""
        runs = self.runs
        return {runs[i]: share for i, share in gaps_recovered(runs, GAP_METRIC).items()}

    def reference(self, against: str | None) -> Group | None:
        """What the others are compared with.

        Args:
            against: label of a group, or a strategy, of whose groups the best is taken; None: the best group that has
                two seeds.
        """
        if against is None:
            return next((group for group in self.groups if any(len(group.by_seed(m)) > 1 for m in METRICS)), None)
        return next(iter(self.candidates(against)), None)

    def candidates(self, against: str) -> list[Group]:
        """The groups that `against` may mean, the best first: the one of that label, or all of that strategy."""
        exact = [group for group in self.groups if group.label == against]
        return exact or [group for group in self.groups if group.runs[0].strategy == against]

    def differences(self, reference: Group) -> dict[str, dict[str, Difference]]:
        """Label of a group or a control -> metric -> its paired difference from `reference`, where there is one."""
        others = {g.label: {name: g.by_seed(name) for name in self.shown} for g in self.groups if g is not reference}
        rows: dict[str, Mapping[str, BySeed]] = {**others, **self.controls}
        return {
            label: {
                name: difference
                for name in self.shown
                if (difference := paired_difference(values.get(name, {}), reference.by_seed(name))) is not None
            }
            for label, values in rows.items()
        }


def over_seeds(values: Iterable[tuple[int | None, float | None]]) -> list[float]:
    """One number a seed, the mean where it ran more than once: a copy of a run says nothing of the spread.

    Args:
        values: of each run, its seed and the value, None where it has none.
    """
    return list(_means(values).values())


def _means(values: Iterable[tuple[Seed, float | None]]) -> dict[Seed, float]:
    found: dict[Seed, list[float]] = {}
    for seed, value in values:
        if value is not None:
            found.setdefault(seed, []).append(value)
    return {seed: float(np.mean(of_seed)) for seed, of_seed in found.items()}


def sort_runs(runs: Sequence[Run], compare: Sequence[str] = ()) -> list[Section]:
    """Runs by setting and reported family, then by configuration without the seed; the best group first.

    Args:
        runs: all of them.
        compare: the settings that are meant to differ, each a dotted key or the beginning of some; none: the strategy,
            or where all runs of a section have the same, the one other setting (or group) that differs, if it is one.

    Raises:
        ConfigError: no run has such a key.
    """
    known = {key for run in runs for key in run.choices}
    for name in compare:
        if not any(covers([name], key) for key in known):
            raise ConfigError(
                f"--compare {name}: no run has such a setting. Name keys of their config.yaml, e.g. strategy or "
                f"client.local_epochs, several with commas between them."
            )
    by_setting: dict[tuple[object, ...], list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.declared_family is None):
        setting = tuple(sorted(run.setting.items()))
        peers_of_killed = (key for key in by_setting if run.declared_family is None and key[0] == setting)
        by_setting.setdefault(next(peers_of_killed, (setting, run.report_family)), []).append(run)
    same_data: dict[str, list[Run]] = {}
    for members in by_setting.values():
        same_data.setdefault(members[0].data, []).append(members[0])
    sections = []
    for members in by_setting.values():
        peers = same_data[members[0].data]
        note = tell_apart([run.setting for run in peers])[peers.index(members[0])]
        family = members[0].report_family
        sections.append(
            Section(
                title=members[0].data + (f", {family}" if family else "") + (f" ({note})" if note else ""),
                groups=_groups(members),
                controls=_control_values(members),
                compared=tuple(compare) or _compared(members),
            )
        )
    return sections


def _compared(runs: Sequence[Run]) -> tuple[str, ...]:
    keys = varying([run.choices for run in runs])
    others = [key for key in keys if not covers(["strategy"], key)]
    if len({run.strategy for run in runs}) > 1:
        return ("strategy",)
    if keys and not others:
        return tuple(keys) if len(keys) == 1 else ("strategy",)
    groups = {key.split(".")[0] for key in others}
    if len(groups) == 1 and f"{min(groups)}._target_" in others:
        return tuple(groups)  # another codec has other keys as well
    return tuple(others) if len(others) == 1 else ()


def _groups(runs: Sequence[Run]) -> list[Group]:
    by_choices: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        by_choices.setdefault((run.strategy, *sorted(run.choices.items())), []).append(run)
    members = list(by_choices.values())
    labels = [group[0].strategy for group in members]
    for strategy in set(labels):
        same = [i for i, group in enumerate(members) if group[0].strategy == strategy]
        for i, note in zip(same, tell_apart([members[i][0].choices for i in same]), strict=True):
            labels[i] += f" ({note})" if note else ""
    groups = [Group(label=label, runs=group) for label, group in zip(labels, members, strict=True)]

    def merit(group: Group) -> tuple[float, ...]:
        return tuple(-float(np.mean(group.values(name) or [-1.0])) for name in METRICS)

    return sorted(groups, key=merit)


def _control_values(runs: Sequence[Run]) -> dict[str, dict[str, dict[int, float]]]:
    """Runs of one seed share their controls (the same initial weights, the same images), so each seed counts once."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for run in runs:
        for control, metrics in run.controls().items():
            for name in METRICS:
                if name in metrics and run.seed is not None:
                    found.setdefault(control, {}).setdefault(name, {}).setdefault(run.seed, metrics[name])
    return found
