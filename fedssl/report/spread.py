"""How families and clients spread around the means of a comparison."""

from collections.abc import Mapping

import numpy as np

from fedssl.plots import Look, dots_figure
from fedssl.report.caveats import CONTROLS
from fedssl.report.pages import Cell, Picture, Row, Table, bounds, fraction, mean_and_std
from fedssl.report.runs import HEADLINE, METRICS
from fedssl.report.sections import Group, Section, over_seeds

UNFEDERATED = tuple(name for name in CONTROLS if name != "fedavg")


def spread_table(section: Section) -> Table | None:
    """Every family of every group; None where that is no more than the section's own table.

    A number is the mean over seeds ± their standard deviation, of the global model or of the mean client; below it the
    lowest and highest client of any seed. The last column is the standard deviation over the clients of one run, its
    mean over the seeds.
    """
    families = {group: _families(group) for group in section.groups}
    clients = any(_client_values(g, f, name) for g in section.groups for f in families[g] for name in HEADLINE)
    several = any(len(found) > 1 for found in families.values())
    if not clients and not several:
        return None
    shown = section.shown
    between = next((name for name in HEADLINE if name in shown), None) if clients else None
    heads = ["", "family", "clients", *(METRICS[name] for name in shown)]
    table = Table(heads=heads + ([f"{METRICS[between]}: std over clients"] if between else []), num_words=2)
    for group in section.groups:
        for family in families[group]:
            own = "self" if several and family == group.runs[0].report_family else ""
            cells: list[str | Cell] = [_cell(group, family, name) for name in shown]
            if between:
                stds = [np.std(v, ddof=1) for v in _client_values(group, family, between) if len(v) > 1]
                cells.append(fraction(float(np.mean(stds)) if stds else None))
            table.rows.append(Row([group.label, family, _num_clients(group, family), *cells], own))
    return table


def clients_pictures(section: Section, looks: Mapping[str, Look]) -> list[Picture]:
    """A dot for each client's own model, all seeds together, against the best model that a federation has made."""
    pictures = []
    for name in (name for name in HEADLINE if name in section.shown):
        lines, own = {}, {}
        for group in section.groups:
            for family in _families(group):
                if values := _client_values(group, family, name):
                    line = f"{group.label}, {family}"
                    lines[line], own[line] = [value for run in values for value in run], looks[group.label]
        if lines:
            bar = _best_federated(section, name)
            figure = dots_figure(lines, xlabel=f"{METRICS[name]}, top-1", looks=own, controls=bar)
            pictures.append(Picture(f"{METRICS[name]}: clients' own models at the end", figure))
    return pictures


def _best_federated(section: Section, name: str) -> dict[str, float]:
    """Label and mean of the best global model that is no control; bounds and stand-ins are no reason to federate."""
    means = {
        f"{group.label}, global": float(np.mean(values))
        for group in section.groups
        if group.runs[0].strategy not in UNFEDERATED
        and (values := group.values(name))
        and not group.values(f"{name}_min")
    }
    return dict([max(means.items(), key=lambda item: item[1])]) if means else {}


def _families(group: Group) -> list[str]:
    """Those of the completed runs, the reported one first."""
    found = dict.fromkeys(family for run in group.completed for family in run.families)
    return sorted(found, key=lambda family: family != group.runs[0].report_family)


def _client_values(group: Group, family: str, name: str) -> list[list[float]]:
    """The clients' values, run by run."""
    found = [list(run.client_values(family, name).values()) for run in group.completed]
    return [values for values in found if values]


def _cell(group: Group, family: str, name: str) -> Cell:
    finals = [run.final(family) for run in group.completed]
    spans = [span for span in (bounds(metrics, name) for metrics in finals) if span is not None]
    span = (min(low for low, _ in spans), max(high for _, high in spans)) if spans else None
    return Cell(
        text=mean_and_std(over_seeds((run.seed, run.final(family).get(name)) for run in group.completed)), span=span
    )


def _num_clients(group: Group, family: str) -> str:
    """Of which a family's number is the mean, or which trained it; "5–6" where the seeds differ."""
    counts = sorted({count for run in group.completed if (count := run.num_clients(family)) is not None})
    return "–" if not counts else str(counts[0]) if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
