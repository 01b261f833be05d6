"""Many runs side by side: one table a setting, means over seeds, the controls, and every single run."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from fedssl.plots import Curve, curves_figure, dots_figure, human_bytes, palette, partition_figure
from fedssl.report.gap import CENTRAL, LOCAL, gaps_recovered
from fedssl.report.pages import Cell, Picture, Row, Table, accuracy, bounds, fraction, markdown, plural, render
from fedssl.report.runs import HEADLINE, METRICS, Run, flatten, tell_apart
from fedssl.tracking import duration

MAX_PARTITIONS = 6  # pictures a section
GAP_METRIC = "linear_top1"
FIRST_COLUMNS = ("run_dir", "status", "strategy", "data", "seed", "rounds", "report_family", *METRICS)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ in nothing but the seed."""

    label: str
    runs: Sequence[Run]

    @property
    def completed(self) -> list[Run]:
        """The runs whose numbers enter the mean."""
        return [run for run in self.runs if run.completed]

    def values(self, name: str) -> list[float]:
        """One number a completed run that has it."""
        return [metrics[name] for metrics in (run.final() for run in self.completed) if name in metrics]


@dataclass(frozen=True, kw_only=True)
class Section:
    """Runs whose accuracies may be compared: the same data, the same probes, the same reported family."""

    title: str
    groups: Sequence[Group]
    controls: Mapping[str, Mapping[str, Sequence[float]]]  # name -> metric -> one value a seed

    def recovered(self) -> dict[int, float]:
        """By `id` of a run, the gap that it recovers where that is known; see `gaps_recovered`."""
        runs = [run for group in self.groups for run in group.runs]
        return {id(runs[i]): share for i, share in gaps_recovered(runs, GAP_METRIC).items()}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `fedssl-report` found.

    Args:
        runs: all of them.
        broken: directories that could not be read, with the reason.
        sections: the runs again, sorted into settings and groups.
    """

    runs: Sequence[Run]
    broken: Mapping[Path, str]
    sections: Sequence[Section] = field(default_factory=list)

    def frame(self) -> pd.DataFrame:
        """One row a run: its flattened summary, its directory, and its controls as `<control>.<metric>` columns."""
        recovered = {run: share for section in self.sections for run, share in section.recovered().items()}
        rows = []
        for run in self.runs:
            row: dict[str, Any] = {name: run.final()[name] for name in METRICS if name in run.final()}
            row |= {"report_family": run.report_family, "seed": run.seed, "rounds": run.rounds}
            row |= {name: run.total(name) for name in ("uplink_bytes", "downlink_bytes")}
            row |= flatten(run.summary)
            row |= {"gap_recovered": recovered[id(run)]} if id(run) in recovered else {}
            row |= {"status": run.status, "strategy": run.strategy, "data": run.data, "run_dir": str(run.path)}
            for control, metrics in run.controls().items():
                row |= {f"{control.replace(' ', '_')}.{name}": metrics[name] for name in METRICS if name in metrics}
            rows.append(row)
        table = pd.DataFrame(rows)
        first = [name for name in FIRST_COLUMNS if name in table]
        for name in ("uplink_bytes", "downlink_bytes"):
            table[name] = table[name].astype("Int64")
        return table[first + [name for name in table if name not in first]]

    def summary(self) -> str:
        """The sections' tables, as Markdown."""
        parts = []
        for section in self.sections:
            parts += [f"## {section.title}", markdown(_section_table(section)), *_section_notes(section)]
        return "\n\n".join(parts)

    def markdown(self) -> str:
        """All tables of the page, as Markdown."""
        parts = ["# Results", "Top-1 accuracy on the test split, as fractions; mean ± standard deviation over seeds."]
        parts += [self.summary()]
        parts += ["## All runs", markdown(_all_runs(self.runs, None))]
        if self.broken:
            parts += ["## Skipped", "\n".join(f"- {reason}" for reason in self.broken.values())]
        return "\n\n".join(parts) + "\n"

    def page(self, out: Path) -> str:
        """The HTML page; links to the runs' own reports are relative to the folder `out`."""
        strategies = {run.strategy for run in self.runs}
        completed = sum(run.completed for run in self.runs)
        facts = [
            plural(len(strategies), "strategy", "strategies"),
            plural(len({run.seed for run in self.runs}), "seed"),
            f"{completed} of {len(self.runs)} completed",
        ]
        sections = [
            {
                "title": section.title,
                "table": _section_table(section),
                "notes": _section_notes(section),
                "pictures": _section_pictures(section),
                "partitions": _partitions(section),
            }
            for section in self.sections
        ]
        return render(
            "compare.html.j2",
            {
                "title": f"Comparison of {plural(len(self.runs), 'run')}",
                "facts": facts,
                "broken": self.broken,
                "sections": sections,
                "all_runs": _all_runs(self.runs, out),
            },
        )


def sort_runs(runs: Sequence[Run]) -> list[Section]:
    """Runs by setting and reported family, then by configuration without the seed; the best group first."""
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
        title = members[0].data + (f", {family}" if family else "") + (f" ({note})" if note else "")
        sections.append(Section(title=title, groups=_groups(members), controls=_control_values(members)))
    return sections


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


def _control_values(runs: Sequence[Run]) -> dict[str, dict[str, list[float]]]:
    """Runs of one seed share their controls (the same initial weights, the same images), so each seed counts once."""
    found: dict[str, dict[str, dict[int | None, float]]] = {}
    for run in runs:
        for control, metrics in run.controls().items():
            for name in METRICS:
                if name in metrics:
                    found.setdefault(control, {}).setdefault(name, {}).setdefault(run.seed, metrics[name])
    return {
        control: {name: list(by_seed.values()) for name, by_seed in metrics.items()}
        for control, metrics in found.items()
    }


def _shown(section: Section) -> list[str]:
    def known(name: str) -> bool:
        return any(group.values(name) for group in section.groups) or any(name in m for m in section.controls.values())

    return [name for name in METRICS if known(name)]


def _section_table(section: Section) -> Table:
    shown, recovered = _shown(section), section.recovered()
    gap = ["gap recovered"] if recovered else []
    table = Table(heads=["", "runs", *(METRICS[name] for name in shown), *gap, "up", "down", "time"])
    for group in section.groups:
        done = group.completed
        seconds = [float(run.summary["wall_seconds"]) for run in done if "wall_seconds" in run.summary]
        costs = [[run.total(name) for run in done] for name in ("uplink_bytes", "downlink_bytes")]
        known = [[total for total in totals if total is not None] for totals in costs]
        table.rows.append(
            Row(
                [
                    group.label,
                    str(len(done)) if len(done) == len(group.runs) else f"{len(done)} of {len(group.runs)}",
                    *(_mean_cell(group, name) for name in shown),
                    *(_mean([recovered[id(run)] for run in group.runs if id(run) in recovered]) for _ in gap),
                    *(human_bytes(float(np.mean(totals))) if totals else "–" for totals in known),
                    duration(float(np.mean(seconds))) if seconds else "–",
                ]
            )
        )
    for control, metrics in section.controls.items():
        cells = [_mean(metrics.get(name, [])) for name in shown]
        count = str(max(len(values) for values in metrics.values()))
        table.rows.append(Row([control, count, *cells, *("" for _ in gap), "", "", ""], "control"))
    return table


def _mean(values: Sequence[float]) -> str:
    if not values:
        return fraction(None)
    return fraction(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)


def _mean_cell(group: Group, name: str) -> Cell:
    spans = [span for span in (bounds(run.final(), name) for run in group.completed) if span is not None]
    span = (min(low for low, _ in spans), max(high for _, high in spans)) if spans else None
    return Cell(text=_mean(group.values(name)), span=span)


def _section_notes(section: Section) -> list[str]:
    notes = []
    left_out = sum(len(group.runs) - len(group.completed) for group in section.groups)
    if left_out:
        notes.append(f"{plural(left_out, 'run')} did not complete: not in the means.")
    if all(len(group.completed) < 2 for group in section.groups):
        notes.append("One seed each: differences of the size of the spread over seeds mean nothing.")
    if section.recovered():
        notes.append(
            f"Gap recovered: ({METRICS[GAP_METRIC]} − {LOCAL}) / ({CENTRAL} − {LOCAL}) of the same seed and setting; "
            f"where the two are close it is noise."
        )
    said = dict.fromkeys((group.label, note) for group in section.groups for run in group.runs for note in run.notes)
    return notes + [f"{label}: {note}." for label, note in said]


def _section_pictures(section: Section) -> list[Picture]:
    colours = palette([group.label for group in section.groups])
    pictures = []
    for name in HEADLINE:
        values = {group.label: group.values(name) for group in section.groups if group.values(name)}
        controls = {control: float(np.mean(m[name])) for control, m in section.controls.items() if name in m}
        if values:
            figure = dots_figure(values, xlabel=f"{METRICS[name]}, top-1", colours=colours, controls=controls)
            pictures.append(Picture(f"{METRICS[name]}: at the end", figure))
    for name in HEADLINE:
        curves = {group.label: curve for group in section.groups if (curve := _curve(group, name)) is not None}
        if curves:
            raw = section.controls.get("raw pixels", {}).get(name)
            figure = curves_figure(
                curves,
                ylabel=f"{METRICS[name]}, top-1",
                colours=colours,
                controls={"raw pixels": float(np.mean(raw))} if raw else {},
            )
            pictures.append(Picture(f"{METRICS[name]}: over the rounds", figure))
    return pictures


def _curve(group: Group, name: str) -> Curve | None:
    """Mean and range over the seeds; rounds that every completed run has evaluated."""
    tables = [run.eval[run.eval["family"] == run.report_family] for run in group.completed]
    series = [table.dropna(subset=[name]).set_index("round")[name] for table in tables if name in table]
    series = [values[~values.index.duplicated(keep="last")] for values in series]
    rounds = pd.concat(series, axis=1, join="inner").sort_index() if series else pd.DataFrame()
    if len(rounds) < 2:
        return None
    band = len(series) > 1
    return Curve(
        x=rounds.index.tolist(),
        y=rounds.mean(axis=1).tolist(),
        low=rounds.min(axis=1).tolist() if band else None,
        high=rounds.max(axis=1).tolist() if band else None,
    )


def _partitions(section: Section) -> list[Picture]:
    """Each distinct partition once, with the seeds that drew it."""
    seeds: dict[bytes, list[str]] = {}
    drawn: dict[bytes, Run] = {}
    for run in (run for group in section.groups for run in group.runs):
        if run.partition is not None:
            key = run.partition.counts.tobytes() + str(run.partition.counts.shape).encode()
            drawn.setdefault(key, run)
            seeds.setdefault(key, []).append(str(run.seed))
    pictures = []
    for key, run in list(drawn.items())[:MAX_PARTITIONS]:
        assert run.partition is not None
        names = sorted(set(seeds[key]))
        caption = f"seed{'s' if len(names) > 1 else ''} {', '.join(names)}, {plural(len(seeds[key]), 'run')}"
        pictures.append(Picture(caption, partition_figure(run.partition.counts, run.partition.classes)))
    return pictures


def _all_runs(runs: Sequence[Run], out: Path | None) -> Table:
    """Every run, finished or not; the directory links to its report where a page in `out` can."""
    shown = [name for name in METRICS if any(name in run.final() for run in runs)]
    heads = ["run", "status", "strategy", "data", "family", "seed", "rounds"]
    table = Table(heads=[*heads, *(METRICS[name] for name in shown), "up", "down"], num_words=5)
    for run in runs:
        metrics = run.final()
        totals = [run.total(name) for name in ("uplink_bytes", "downlink_bytes")]
        link = None
        if out is not None and (run.path / "report.html").exists():
            link = quote(Path(os.path.relpath(run.path / "report.html", out)).as_posix())
        table.rows.append(
            Row(
                [
                    Cell(text=str(run.path), link=link),
                    run.status,
                    run.strategy,
                    run.data,
                    str(run.report_family or "–"),
                    str(run.seed),
                    str(run.rounds),
                    *(accuracy(metrics, name) for name in shown),
                    *("–" if total is None else human_bytes(total) for total in totals),
                ]
            )
        )
    return table
