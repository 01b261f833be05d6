"""The page of one run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import yaml

from fedssl.plots import Curve, Look, bytes_figure, curves_figure, human_bytes, map_figure, palette, partition_figure
from fedssl.report.pages import TIE, Cell, Picture, Row, Table, accuracy, bounds, fraction, plural, render, signed
from fedssl.report.runs import HEADLINE, METRICS, Run, tell_apart
from fedssl.settings import flatten
from fedssl.tracking import duration

MAX_FAILURES = 200  # rows of the failures table
RAN_AGAIN = "worker died, ran again"
MAX_MEASURES = 15  # pictures of metrics beside the loss
EFFORT = ("loss_first", "steps", "image_passes", "num-examples", "uplink_bytes", "seconds")  # not worth a picture


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One number of the headline, with small print."""

    name: str
    value: str
    notes: Sequence[str | Cell]


def run_page(run: Run, siblings: Sequence[Run]) -> str:
    """The HTML page of `run`; `siblings` are other runs of its sweep, shown as controls where they can be."""
    comparable = [other for other in siblings if other.completed and other.setting == run.setting]
    labels = dict(zip([run, *comparable], _labels([run, *comparable]), strict=True))
    failures, counts = _failures(run)
    return render(
        "run.html.j2",
        {
            "run": run,
            "title": f"{run.strategy} on {run.data}",
            "facts": _facts(run),
            "verdict": _verdict(run, comparable, labels),
            "tiles": _tiles(run),
            "controls": _controls(run, comparable, labels),
            "control_notes": [*_control_notes(siblings, comparable), *(f"{note}." for note in run.notes)],
            "families": _families(run),
            "curves": _curves(run),
            "federation": _federation(run),
            "maps": _maps(run),
            "failures": failures,
            "failure_counts": counts,
            "measures": _measures(run),
            "phases": _phases(run),
            "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
            "manifest": _manifest(run),
            "path": str(run.path),
        },
    )


def _labels(runs: Sequence[Run]) -> list[str]:
    """Strategy names, with what sets runs of the same strategy apart, their seeds included."""
    labels = [run.strategy for run in runs]
    for strategy in set(labels):
        same = [i for i, run in enumerate(runs) if run.strategy == strategy]
        notes = tell_apart([{"seed": str(runs[i].seed)} | runs[i].choices for i in same])
        for i, note in zip(same, notes, strict=True):
            labels[i] += f" ({note})" if note else ""
    return labels


def _facts(run: Run) -> list[str]:
    federation = run.config.get("federation") or {}
    facts = [f"seed {run.seed}", plural(run.rounds, "round")]
    if federation.get("num_clients") is not None:
        families = set(federation.get("families") or [])
        facts.append(f"{plural(federation['num_clients'], 'client')} of {plural(len(families), 'family', 'families')}")
    if run.report_family:
        facts.append(f"reported: {run.report_family}")
    if isinstance(run.summary.get("wall_seconds"), int | float):
        facts.append(duration(run.summary["wall_seconds"]))
    if (simulated := run.total("simulated_seconds")) is not None:
        facts.append(f"simulated: {duration(simulated)}")
    return facts


def _verdict(run: Run, siblings: Sequence[Run], labels: Mapping[Run, str]) -> str:
    """One or two sentences on the most important metric that was measured; one seed decides nothing, so it says so."""
    metrics = run.final()
    name = next((name for name in METRICS if name in metrics), None)
    if name is None:
        return "Nothing was evaluated yet." if run.eval.empty else "Only the initial weights were evaluated yet."
    who = f"The clients' own {run.report_family} models reach a mean of" if f"{name}_min" in metrics else (
        f"The global {run.report_family} reaches"
    )  # fmt: skip
    gains = [
        f"{signed(metrics[name] - control[name])} against {title}"
        for title, control in run.controls().items()
        if name in control
    ]
    so_far = "" if run.completed else f"Not finished, evaluated last after round {run.eval['round'].max()}. "
    text = f"{so_far}{who} {metrics[name]:.3f} top-1 ({METRICS[name]})" + (f": {', '.join(gains)}." if gains else ".")
    scores = {labels[other]: other.final()[name] - metrics[name] for other in siblings if name in other.final()}
    if scores:
        better = [label for label, score in scores.items() if score >= TIE]
        equal = [label for label, score in scores.items() if abs(score) < TIE]
        worse = [label for label, score in scores.items() if score <= -TIE]
        parts = [("above ", worse), ("level with ", equal), ("below ", better)]
        text += f" In its sweep it ends {'; '.join(word + ', '.join(names) for word, names in parts if names)}."
        text += " One run each: differences of the size of the spread over seeds mean nothing."
    return text


def _tiles(run: Run) -> list[Tile]:
    metrics, controls = run.final(), run.controls()
    tiles = []
    for name in (name for name in HEADLINE if name in metrics):
        notes: list[str | Cell] = [
            Cell(text=f"{title} {fraction(control[name])}", delta=metrics[name] - control[name])
            for title, control in controls.items()
            if name in control
        ]
        if f"{name}_std" in metrics:
            notes.insert(0, f"± {metrics[f'{name}_std']:.3f} over draws of the labels")
        span = bounds(metrics, name)
        if span is not None:
            notes.insert(0, f"clients {span[0]:.3f} to {span[1]:.3f}")
        tiles.append(Tile(name=f"{METRICS[name]}, top-1", value=fraction(metrics[name]), notes=notes))
    for name, title in (("uplink_bytes", "uploaded by clients"), ("downlink_bytes", "sent to clients")):
        total = run.total(name)
        if total is not None:
            per_round = [f"{human_bytes(total / run.rounds)} a round"] if run.rounds else []
            tiles.append(Tile(name=title, value=human_bytes(total), notes=per_round))
    return tiles


def _controls(run: Run, siblings: Sequence[Run], labels: Mapping[Run, str]) -> Table:
    ours = run.final()
    candidates = [run.final() for run in (run, *siblings)] + list(run.controls().values())
    shown = [name for name in METRICS if any(name in metrics for metrics in candidates)]
    table = Table(heads=["", *(METRICS[name] for name in shown), "up", "down", "time"])

    def cells(metrics: Mapping[str, float]) -> list[Cell]:
        return [accuracy(metrics, name, None if metrics is ours else ours, rival=True) for name in shown]

    def cost(other: Run) -> list[str]:
        seconds = other.summary.get("wall_seconds")
        totals = (other.total(name) for name in ("uplink_bytes", "downlink_bytes"))
        texts = ["–" if total is None else human_bytes(total) for total in totals]
        return [*texts, duration(seconds) if isinstance(seconds, int | float) else "–"]

    table.rows.append(Row([f"{labels[run]} (this run)", *cells(ours), *cost(run)], "self"))
    first = shown[0] if shown else ""
    for other in sorted(siblings, key=lambda other: -other.final().get(first, -1.0)):
        label = labels[other]
        if other.report_family != run.report_family:
            label += f" [{other.report_family}]"
        table.rows.append(Row([label, *cells(other.final()), *cost(other)]))
    for title, metrics in run.controls().items():
        table.rows.append(Row([title, *cells(metrics), "", "", ""], "control"))
    return table


def _control_notes(siblings: Sequence[Run], comparable: Sequence[Run]) -> list[str]:
    unfinished = sum(not other.completed for other in siblings)
    foreign = len(siblings) - len(comparable) - unfinished
    notes = []
    if unfinished:
        notes.append(f"{plural(unfinished, 'sibling')} of the sweep did not complete and {_is(unfinished)} left out.")
    if foreign:
        notes.append(f"{plural(foreign, 'sibling')} with other data or probes {_is(foreign)} left out.")
    return notes


def _families(run: Run) -> Table | None:
    finals = {family: run.final(family) for family in run.families}
    initial = {family: run.evaluated(family, last=False) for family in run.families}
    shown = [name for name in METRICS if any(name in metrics for metrics in finals.values())]
    if not shown:
        return None
    table = Table(heads=["family", "clients", *(METRICS[name] for name in shown)])
    for family, metrics in finals.items():
        cells = [accuracy(metrics, name, initial[family]) for name in shown]
        clients = run.num_clients(family)
        table.rows.append(
            Row(
                [family, "–" if clients is None else str(clients), *cells],
                "self" if family == run.report_family and len(finals) > 1 else "",
            )
        )
    return table


def _curves(run: Run) -> list[Picture]:
    looks = _looks(run)
    controls = run.controls().get("raw pixels", {})
    pictures = []
    rounds = run.eval[run.eval["family"].isin(run.families)]
    for name in (name for name in HEADLINE if name in rounds):
        curves = {
            str(family): _curve(rows, name)
            for family, rows in rounds.dropna(subset=[name]).groupby("family", sort=False)
        }
        if any(len(curve.x) > 1 for curve in curves.values()):
            raw = {"raw pixels": controls[name]} if name in controls else {}
            figure = curves_figure(curves, ylabel=f"{METRICS[name]}, top-1", looks=looks, controls=raw)
            pictures.append(Picture(f"Accuracy: {METRICS[name]}", figure))
    losses = _server_curves(run).get("loss")
    if losses:
        pictures.append(Picture("Loss on the server", curves_figure(losses, ylabel="loss", looks=looks)))
    by_family = _client_curves(run, "loss")
    if by_family:
        figure = curves_figure(by_family, ylabel="loss", looks=looks)
        pictures.append(Picture("Loss of the clients: mean and range of each family", figure))
    return pictures


def _looks(run: Run) -> dict[str, Look]:
    """Of all families, those too that clients train and nobody has evaluated yet."""
    return palette(list(dict.fromkeys([*run.families, *run.clients["family"].dropna()])))


def _curve(rows: pd.DataFrame, name: str) -> Curve:
    rows = rows.sort_values("round")
    low, high = (rows.get(f"{name}_{end}") for end in ("min", "max"))
    band = low is not None and high is not None and bool(low.notna().all() and high.notna().all())
    return Curve(
        x=rows["round"].tolist(),
        y=rows[name].tolist(),
        low=low.tolist() if low is not None and band else None,
        high=high.tolist() if high is not None and band else None,
    )


def _server_curves(run: Run) -> dict[str, dict[str, Curve]]:
    """Metric -> family -> curve, from the server's "<family>/<metric>"."""
    found: dict[str, dict[str, Curve]] = {}
    for column in _numeric(run.server):
        family, slash, name = column.partition("/")
        if slash and family in run.families:
            found.setdefault(name, {})[family] = _curve(run.server.dropna(subset=[column]), column)
    return found


def _client_curves(run: Run, name: str) -> dict[str, Curve]:
    if name not in run.clients:
        return {}
    curves = {}
    for family, rows in run.clients.dropna(subset=[name]).groupby("family", sort=False):
        rounds = rows.groupby("round")[name].agg(["mean", "min", "max"])
        curves[str(family)] = Curve(
            x=rounds.index.tolist(),
            y=rounds["mean"].tolist(),
            low=rounds["min"].tolist(),
            high=rounds["max"].tolist(),
        )
    return curves


def _federation(run: Run) -> list[Picture]:
    pictures = []
    if run.partition is not None:
        of = "labels of the clients' images" if len(run.partition.classes) > 1 else "images of the clients"
        pictures.append(Picture(of.capitalize(), partition_figure(run.partition.counts, run.partition.classes)))
    if run.total("uplink_bytes") or run.total("downlink_bytes"):
        rows = run.server.fillna({"uplink_bytes": 0, "downlink_bytes": 0})
        figure = bytes_figure(rows["round"].tolist(), rows["uplink_bytes"].tolist(), rows["downlink_bytes"].tolist())
        pictures.append(Picture("Bytes a round, all clients together", figure))
    return pictures


def _maps(run: Run) -> list[Picture]:
    plane = run.public_map
    if plane is None:
        return []
    before = map_figure(plane.initial, plane.initial_shares, plane.labels, plane.classes)
    after = map_figure(plane.trained, plane.trained_shares, plane.labels, plane.classes)
    return [Picture(f"{plane.family}, random init", before), Picture(f"{plane.family}, trained", after)]


def _failures(run: Run) -> tuple[list[dict[str, Any]], str]:
    """Rows of the failures table, and a sentence with the counts."""
    rounds = [row for row in run.rows if row["scope"] == "round"]
    configured = (run.config.get("federation") or {}).get("families") or []
    failures = [
        {
            "round": row["round"],
            "partition": failure.get("partition", "–"),
            "family": _family_of(failure, configured),
            "kind": RAN_AGAIN if failure.get("kind") == "worker_died" else failure.get("kind", "–"),
            "reason": failure.get("reason", "–"),
        }
        for row in rounds
        for failure in (row.get("metrics") or {}).get("failures") or []
    ]
    counts = run.tasks
    total = sum(counts.values())
    if not rounds:
        return failures, "No round has ended yet."
    if total == 0:
        return failures, "None: no client was asked to do anything."
    if total == counts["ok"]:
        text = f"None: all {plural(total, 'client task')} of {plural(len(rounds), 'round')} replied."
    else:
        text = f"Of {plural(total, 'client task')}: {', '.join(f'{count} {kind}' for kind, count in counts.items())}."
    if any(failure["kind"] == RAN_AGAIN for failure in failures):
        text += " A task whose worker died ran again, with the identical result."
    if len(failures) > MAX_FAILURES:
        text += f" The first {MAX_FAILURES} of {len(failures)}:"
    return failures[:MAX_FAILURES], text


def _family_of(failure: Mapping[str, Any], families: Sequence[str]) -> str:
    if failure.get("family"):
        return str(failure["family"])
    partition = failure.get("partition")
    return str(families[partition % len(families)]) if families and isinstance(partition, int) else "–"


def _measures(run: Run) -> list[Picture]:
    """Whatever else clients and server reported, if it ever changed."""
    looks = _looks(run)
    pictures = []
    for name in _numeric(run.clients):
        if name not in ("loss", *EFFORT) and run.clients[name].nunique() > 1:
            curves = _client_curves(run, name)
            pictures.append(Picture(f"clients: {name}", curves_figure(curves, ylabel=name, looks=looks)))
    for name, curves in _server_curves(run).items():
        if name not in ("loss", *EFFORT) and any(len(set(curve.y)) > 1 for curve in curves.values()):
            pictures.append(Picture(f"server: {name}", curves_figure(curves, ylabel=name, looks=looks)))
    return pictures[:MAX_MEASURES]


def _phases(run: Run) -> Table | None:
    """Sums of the server's `seconds` (the whole round), `seconds_<phase>` and `<family>/seconds`."""
    measured = (name for name in _numeric(run.server) if "seconds" in name and name != "simulated_seconds")
    seconds = {name: run.server[name] for name in measured}
    if not seconds:
        return None
    table = Table(heads=["", "total", "mean a round", "slowest round"])
    for name, values in sorted(seconds.items(), key=lambda item: -item[1].sum()):
        phase = name.removeprefix("seconds_").removesuffix("/seconds").replace("seconds", "whole round")
        table.rows.append(Row([phase, *(duration(float(v)) for v in (values.sum(), values.mean(), values.max()))]))
    return table


def _manifest(run: Run) -> dict[str, str]:
    resumed = {f"resumed {i}": node for i, node in enumerate(run.manifest.get("resumed") or (), start=1)}
    flat = flatten({key: value for key, value in run.manifest.items() if key != "resumed"} | resumed)
    return {key: ", ".join(map(str, v)) if isinstance(v, list) else str(v) for key, v in flat.items() if v is not None}


def _numeric(table: pd.DataFrame) -> list[str]:
    """Metric columns that hold numbers."""
    return [str(name) for name in table.select_dtypes("number").columns if name not in ("round", "partition")]


def _is(count: int) -> str:
    return "is" if count == 1 else "are"
