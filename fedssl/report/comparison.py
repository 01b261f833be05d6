"""Many runs side by side: one table a setting, means over seeds, the controls, and every single run."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from fedssl.errors import ConfigError
from fedssl.plots import (
    Look,
    cost_figure,
    curves_figure,
    dots_figure,
    human_bytes,
    map_figure,
    palette,
    partition_figure,
)
from fedssl.report.caveats import caveats
from fedssl.report.curves import over_cost, over_rounds
from fedssl.report.facts import facts
from fedssl.report.found import Job, NotStarted
from fedssl.report.gap import CENTRAL, LOCAL
from fedssl.report.pages import (
    Cell,
    Picture,
    Row,
    Table,
    accuracy,
    bounds,
    markdown,
    mean_and_std,
    plural,
    render,
)
from fedssl.report.runs import HEADLINE, METRICS, OUTCOMES, PublicMap, Run
from fedssl.report.sections import GAP_METRIC, BySeed, Group, Section, over_seeds
from fedssl.report.spread import clients_pictures, spread_table
from fedssl.settings import flatten
from fedssl.tracking import duration

MAX_PARTITIONS = 6  # pictures a section
MAX_MAPS = 9  # likewise, with the one before training
MAX_POINTS = 500  # of a map; a point is a hundred bytes of the page
COSTS = {  # column of a round -> unit, the end of the caption, and what the axis is called
    "uplink_bytes": ("bytes", "bytes uploaded", "uploaded by all clients"),
    "seconds": ("seconds", "measured time", "measured, without evaluations"),
    "simulated_seconds": ("seconds", "simulated time", "simulated"),
}
FIRST_COLUMNS = ("run_dir", "status", "strategy", "data", "seed", "rounds", "report_family", *METRICS)


PAIRED_NOTE = (
    "Mean difference over the seeds that both have, and its 95 % confidence interval: m ± t(0.975, n − 1) s / √n of "
    "the n differences, Student's t. It takes them to be about normal, and each row for the only one: of twenty rows "
    "without any effect one leaves out 0. A dash: fewer than two common seeds."
)
CHOSEN_NOTE = " The reference is the best on these very seeds, which flatters it; --against names another."
BEST_OF_NOTE = (
    " The reference is the best of the {count} groups of {strategy} on these very seeds, which flatters it; --against "
    "'{label}' names one."
)
CONSTANT_NOTE = (
    " An interval without width does not count (and is not coloured): all seeds differ by the same, as copies of one "
    "run would, so nothing is known of the spread."
)
SPREAD_NOTE = (
    "Mean ± standard deviation over the seeds; where clients keep their own models, of the mean client, and the small "
    "range is from the lowest to the highest client of any seed. Standard deviations over clients, and dots, are of "
    "each client's last evaluation in a round in which it trained; one that never did has none."
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `fedssl-report` found.

    Args:
        runs: all of them.
        broken: what could not be read or holds no run, with the reason.
        jobs: jobs of sweeps whose run is not there, or that never began.
        sections: the runs again, sorted into settings and groups.
        against: what paired differences are taken from, see `Section.reference`.

    Raises:
        ConfigError: no section has what `against` names.
    """

    runs: Sequence[Run]
    broken: Mapping[Path, str]
    jobs: Sequence[Job | NotStarted] = ()
    sections: Sequence[Section] = field(default_factory=list)
    against: str | None = None

    def __post_init__(self) -> None:
        if self.against is not None and not any(section.reference(self.against) for section in self.sections):
            known = dict.fromkeys(group.label for section in self.sections for group in section.groups)
            raise ConfigError(f"--against {self.against}: no run is of it. Choose one of: {'; '.join(known)}.")

    def frame(self) -> pd.DataFrame:
        """One row a run: its flattened summary, its directory, how its client tasks ended (`num_<outcome>`), and its
        controls as `<control>.<metric>` columns.
        """
        recovered = {run: share for section in self.sections for run, share in section.recovered().items()}
        rows = []
        for run in self.runs:
            row: dict[str, Any] = {name: run.final()[name] for name in METRICS if name in run.final()}
            row |= {"report_family": run.report_family, "seed": run.seed, "rounds": run.rounds}
            row |= {name: run.total(name) for name in ("uplink_bytes", "downlink_bytes")}
            row |= flatten(run.summary)
            row |= {f"num_{kind}": run.tasks.get(kind) for kind in OUTCOMES}
            row |= {"gap_recovered": recovered[run]} if run in recovered else {}
            row |= {"status": run.status, "strategy": run.strategy, "data": run.data, "run_dir": str(run.path)}
            for control, metrics in run.controls().items():
                row |= {f"{control.replace(' ', '_')}.{name}": metrics[name] for name in METRICS if name in metrics}
            rows.append(row)
        table = pd.DataFrame(rows)
        first = [name for name in FIRST_COLUMNS if name in table]
        for name in ("uplink_bytes", "downlink_bytes", *(f"num_{kind}" for kind in OUTCOMES)):
            table[name] = table[name].astype("Int64")
        return table[first + [name for name in table if name not in first]]

    @cached_property
    def warnings(self) -> list[list[str]]:
        """Of each section, what a reader should know before believing it."""
        return [caveats(section) for section in self.sections]

    def summary(self) -> str:
        """The sections' tables and warnings, as Markdown."""
        parts = []
        for section, warnings in zip(self.sections, self.warnings, strict=True):
            parts += [
                f"## {section.title}",
                *facts(section),
                markdown(_section_table(section)),
                *_section_notes(section, self.against),
            ]
            if warnings:
                parts.append("Warnings:\n\n" + "\n".join(f"- {warning}" for warning in warnings))
            if paired := _paired(section, self.against):
                title, table, note = paired
                parts += [f"### {title}", markdown(table), note]
        return "\n\n".join(parts)

    def markdown(self) -> str:
        """All tables of the page, as Markdown."""
        parts = ["# Results", "Top-1 accuracy on the test split, as fractions; mean ± standard deviation over seeds."]
        parts += [self.summary()]
        for section in self.sections:
            if table := spread_table(section):
                parts += [f"## Families and clients: {section.title}", markdown(table), SPREAD_NOTE]
        parts += ["## All runs", markdown(_all_runs(self.runs, None))]
        if self.jobs:
            parts += ["## Jobs without a run", "\n".join(f"- {job}" for job in self.jobs)]
        if self.broken:
            parts += ["## Skipped", "\n".join(f"- {reason}" for reason in self.broken.values())]
        return "\n\n".join(parts) + "\n"

    def page(self, out: Path) -> str:
        """The HTML page; links to the runs' own reports are relative to the folder `out`."""
        strategies = {run.strategy for run in self.runs}
        completed = sum(run.completed for run in self.runs)
        counts = [
            plural(len(strategies), "strategy", "strategies"),
            plural(len({run.seed for run in self.runs}), "seed"),
            f"{completed} of {len(self.runs)} completed",
        ]
        sections = []
        for section, warnings in zip(self.sections, self.warnings, strict=True):
            looks = palette([group.label for group in section.groups])
            partitions, partitions_left_out = _partitions(section)
            maps, maps_left_out = _maps(section)
            sections.append(
                {
                    "title": section.title,
                    "facts": facts(section),
                    "table": _section_table(section),
                    "notes": _section_notes(section, self.against),
                    "warnings": warnings,
                    "paired": _paired(section, self.against),
                    "pictures": _section_pictures(section, looks),
                    "spread": spread_table(section),
                    "spread_note": SPREAD_NOTE,
                    "clients": clients_pictures(section, looks),
                    "partitions": partitions,
                    "partitions_left_out": partitions_left_out,
                    "maps": maps,
                    "maps_left_out": maps_left_out,
                }
            )
        return render(
            "compare.html.j2",
            {
                "title": f"Comparison of {plural(len(self.runs), 'run')}",
                "facts": counts,
                "broken": self.broken,
                "jobs": self.jobs,
                "sections": sections,
                "all_runs": _all_runs(self.runs, out),
            },
        )


def _section_table(section: Section) -> Table:
    shown, recovered = section.shown, section.recovered()
    gap = ["gap recovered"] if recovered else []
    modelled = ["simulated"] if any(_totals(group, "simulated_seconds") for group in section.groups) else []
    table = Table(heads=["", "seeds", *(METRICS[name] for name in shown), *gap, "up", "down", "time", *modelled])
    for group in section.groups:
        seeds = [len({run.seed for run in runs}) for runs in (group.completed, group.runs)]
        times = [_totals(group, name) for name in ("wall_seconds", *("simulated_seconds" for _ in modelled))]
        known = [_totals(group, name) for name in ("uplink_bytes", "downlink_bytes")]
        table.rows.append(
            Row(
                [
                    group.label,
                    str(seeds[0]) if seeds[0] == seeds[1] else f"{seeds[0]} of {seeds[1]}",
                    *(_mean_cell(group, name) for name in shown),
                    *(mean_and_std(over_seeds((run.seed, recovered.get(run)) for run in group.runs)) for _ in gap),
                    *(human_bytes(float(np.mean(totals))) if totals else "–" for totals in known),
                    *(duration(float(np.mean(totals))) if totals else "–" for totals in times),
                ]
            )
        )
    for control, metrics in section.controls.items():
        cells = [mean_and_std(list(metrics.get(name, {}).values())) for name in shown]
        count = str(max(len(values) for values in metrics.values()))
        rest = [""] * (len(table.heads) - 2 - len(cells))
        table.rows.append(Row([control, count, *cells, *rest], "control"))
    return table


def _totals(group: Group, name: str) -> list[float]:
    return [total for run in group.completed if (total := run.total(name)) is not None]


def _mean_cell(group: Group, name: str) -> Cell:
    spans = [span for span in (bounds(run.final(), name) for run in group.completed) if span is not None]
    span = (min(low for low, _ in spans), max(high for _, high in spans)) if spans else None
    return Cell(text=mean_and_std(group.values(name)), span=span)


def _section_notes(section: Section, against: str | None) -> list[str]:
    notes = []
    if len(section.groups) > 1:
        several = "several settings at once; --compare names those that are meant"
        notes.append(f"Compared: {', '.join(section.compared) or several}.")
    if against is not None and section.reference(against) is None:
        notes.append(f"No run of {against} is here to take differences from.")
    elif len(section.groups) > 1 and _paired(section, against) is None:
        notes.append("No differences with an interval: that takes two seeds that both have, and one seed gives none.")
    if section.recovered():
        notes.append(
            f"Gap recovered: ({METRICS[GAP_METRIC]} − {LOCAL}) / ({CENTRAL} − {LOCAL}) of the same seed and setting; "
            f"where the two are close it is noise."
        )
    notes += _simulated_note(section)
    said = dict.fromkeys((group.label, note) for group in section.groups for run in group.runs for note in run.notes)
    return notes + [f"{label}: {note}." for label, note in said]


def _simulated_note(section: Section) -> list[str]:
    """What simulated seconds are of, once for each setting of the devices; clients without a speed are measured too."""
    if not any(_totals(group, "simulated_seconds") for group in section.groups):
        return []
    found = [(run.config.get("federation") or {}).get("devices") or {} for run in section.runs]
    unset = {"images_per_second": "measured"}
    texts = [
        ", ".join(f"{k}={unset.get(k, 'none') if v is None else v}" for k, v in devices.items() if k != "_target_")
        for devices in found
        if devices
    ]
    return [
        f"Simulated: bytes over each client's link and its training, as federation.devices says, and the server's work "
        f"as measured: {text}."
        for text in dict.fromkeys(texts)
    ]


def _paired(section: Section, against: str | None) -> tuple[str, Table, str] | None:
    """Title, table and note of the differences from the reference; None where no two share two seeds."""
    reference = section.reference(against)
    rows = section.differences(reference) if reference else {}
    if reference is None or not any(rows.values()):
        return None
    table = Table(heads=["", "seeds", *(METRICS[name] for name in section.shown)])
    for label, differences in rows.items():
        counts = sorted({difference.num_seeds for difference in differences.values()})
        cells = [
            Cell(text="", delta=difference.mean, interval=(difference.low, difference.high))
            if (difference := differences.get(name))
            else "–"
            for name in section.shown
        ]
        kind = "control" if label in section.controls else ""
        table.rows.append(Row([label, "–".join(map(str, counts)) or "–", *cells], kind))
    note = PAIRED_NOTE
    if any(difference.constant for differences in rows.values() for difference in differences.values()):
        note += CONSTANT_NOTE
    if against is None:
        note += CHOSEN_NOTE
    elif (count := len(section.candidates(against))) > 1:
        note += BEST_OF_NOTE.format(count=count, strategy=against, label=reference.label)
    return f"Differences from {reference.label}, same seeds", table, note


def _section_pictures(section: Section, looks: Mapping[str, Look]) -> list[Picture]:
    pictures = []
    for name in HEADLINE:
        values = {group.label: group.values(name) for group in section.groups if group.values(name)}
        controls = {control: _mean(m[name]) for control, m in section.controls.items() if name in m}
        if values:
            figure = dots_figure(values, xlabel=f"{METRICS[name]}, top-1", looks=looks, controls=controls)
            pictures.append(Picture(f"{METRICS[name]}: at the end", figure))
    for name in HEADLINE:
        curves = {group.label: curve for group in section.groups if (curve := over_rounds(group, name)) is not None}
        if curves:
            raw = section.controls.get("raw pixels", {}).get(name)
            figure = curves_figure(
                curves,
                ylabel=f"{METRICS[name]}, top-1",
                looks=looks,
                controls={"raw pixels": _mean(raw)} if raw else {},
            )
            pictures.append(Picture(f"{METRICS[name]}: over the rounds", figure))
    return pictures + _cost_pictures(section, looks)


def _cost_pictures(section: Section, looks: Mapping[str, Look]) -> list[Picture]:
    """The headline metric against each cost that is known."""
    name = next((name for name in HEADLINE if any(group.values(name) for group in section.groups)), HEADLINE[0])
    pictures = []
    for cost, (unit, caption, xlabel) in COSTS.items():
        curves = {group.label: curve for group in section.groups if (curve := over_cost(group, name, cost)) is not None}
        free = {label: curve.y[-1] for label, curve in curves.items() if curve.x[-1] == 0}
        paid = {label: curve for label, curve in curves.items() if label not in free}
        if paid:
            ylabel = f"{METRICS[name]}, top-1"
            figure = cost_figure(paid, ylabel=ylabel, xlabel=xlabel, unit=unit, looks=looks, free=free)
            pictures.append(Picture(f"{METRICS[name]}: against {caption}", figure))
    return pictures


def _mean(by_seed: BySeed) -> float:
    return float(np.mean(list(by_seed.values())))


def _partitions(section: Section) -> tuple[list[Picture], str]:
    """Each distinct partition once, with the seeds that drew it; and what is said of those that are not shown."""
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
    return pictures, _left_out(len(drawn) - MAX_PARTITIONS, "partition")


def _maps(section: Section) -> tuple[list[Picture], str]:
    """The networks of one run of each group, the lowest seed that has a map, and one before training; and likewise."""
    mapped = [
        min(runs, key=lambda run: run.seed or 0)
        for group in section.groups
        if (runs := [run for run in group.runs if run.public_map])
    ]
    labels = {run: group.label for group in section.groups for run in group.runs}
    pictures: list[Picture] = []
    for run in mapped[: MAX_MAPS - 1]:
        plane = run.public_map
        assert plane is not None
        if not pictures:
            pictures.append(_map(f"random init, seed {run.seed}", plane.initial, plane.initial_shares, plane))
        pictures.append(_map(f"{labels[run]}, seed {run.seed}", plane.trained, plane.trained_shares, plane))
    return pictures, _left_out(len(mapped) - (MAX_MAPS - 1), "map")


def _left_out(count: int, what: str) -> str:
    """Where to find the pictures beyond the most that a section has; "" where all are shown."""
    return f"{plural(count, f'more {what}')} not shown here: each run's own report.html has its." if count > 0 else ""


def _map(caption: str, coordinates: np.ndarray, shares: np.ndarray, plane: PublicMap) -> Picture:
    figure = map_figure(coordinates[:MAX_POINTS], shares, plane.labels[:MAX_POINTS], plane.classes)
    return Picture(caption, figure)


def _all_runs(runs: Sequence[Run], out: Path | None) -> Table:
    """Every run, finished or not; the directory links to its report where a page in `out` can."""
    shown = [name for name in METRICS if any(name in run.final() for run in runs)]
    heads = ["run", "status", "strategy", "data", "family", "seed", "rounds", *OUTCOMES]
    table = Table(heads=[*heads, *(METRICS[name] for name in shown), "up", "down"], num_words=5, dense=True)
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
                    *(str(run.tasks.get(kind, "–")) for kind in OUTCOMES),
                    *(accuracy(metrics, name) for name in shown),
                    *("–" if total is None else human_bytes(total) for total in totals),
                ]
            )
        )
    return table
