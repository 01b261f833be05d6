"""The pictures of the reports: partitions, curves, dots, costs, bytes and maps.

Figures are built without pyplot, so nothing global changes and no window opens. `svg` returns markup that takes its
text colour from the page, light or dark; `png` is for files. Figures are small (a narrow screen's width) on purpose:
pages lay them out in a grid instead of shrinking large ones.
"""

import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, Integer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

INK = "#0a0b0c"  # text and axes; `svg` turns it into the page's own colour, and nothing else may use it
CYCLE = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#d6a62b", "#9d755d", "#ff9da6", "#8c8c8c")
LineStyle: TypeAlias = str | tuple[float, tuple[float, ...]]  # matplotlib's: its name, or offset and dashes
LAPS: tuple[tuple[str, LineStyle], ...] = (  # marker and line of the first ten names, of the next ten, ...
    ("o", "-"), ("s", (0, (5, 1))), ("^", (0, (3, 1, 1, 1))), ("D", (0, (1, 1))),
)  # fmt: skip
CONTROL_LINES: dict[str, LineStyle] = {"random init": "--", "raw pixels": ":"}
SPARE_LINES: tuple[LineStyle, ...] = ("-.", (0, (8, 3)), (0, (6, 2, 1, 2, 1, 2)))  # of other controls
WIDTH = 4.4  # inches
MAX_BARS = 40  # clients that are drawn as bars, and
MAX_COLOURS = 20  # classes that can still be told apart by colour; beyond either, a heat map


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a plot, with a band around it where `low` and `high` are given. All have the length of `x`."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


class Look(NamedTuple):
    """How one name is drawn in every picture of a page."""

    colour: str
    marker: str
    line: LineStyle


def palette(names: Sequence[str]) -> dict[str, Look]:
    """A look for each name: ten colours, then these again with other markers and lines."""
    return {name: Look(CYCLE[i % len(CYCLE)], *LAPS[i // len(CYCLE) % len(LAPS)]) for i, name in enumerate(names)}


def _control_lines(names: Iterable[str]) -> dict[str, LineStyle]:
    """A line for each: a control that is known by name has the same one in every picture."""
    spare = cycle(SPARE_LINES)
    return {name: CONTROL_LINES.get(name) or next(spare) for name in names}


def draw_partition(
    counts: Integer[np.ndarray, "clients classes"], classes: Sequence[str], *, path: Path | None = None
) -> bytes:
    """Who holds what, as a PNG.

    Args:
        counts: images of each class on each client; one column of sizes where the images have no labels.
        classes: the names of the columns.
        path: where to write the picture as well.
    """
    picture = png(partition_figure(counts, classes))
    if path is not None:
        path.write_bytes(picture)
    return picture


def partition_figure(counts: Integer[np.ndarray, "clients classes"], classes: Sequence[str]) -> Figure:
    """Stacked bars, one a client, as long as it has images; a heat map where there are too many clients or classes."""
    num_clients, num_classes = counts.shape
    if num_clients <= MAX_BARS and num_classes <= MAX_COLOURS:
        return _partition_bars(counts, classes)
    figure, axes = _figure(height=min(6.0, 2.0 + 0.05 * num_clients))
    image = axes.imshow(counts, aspect="auto", interpolation="nearest", cmap="viridis")
    axes.set_xlabel("class")
    axes.set_ylabel("client")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(image, label="images")
    bar.ax.tick_params(color=INK, labelcolor=INK)
    bar.ax.yaxis.label.set_color(INK)
    bar.outline.set_visible(False)
    return figure


def _partition_bars(counts: Integer[np.ndarray, "clients classes"], classes: Sequence[str]) -> Figure:
    num_clients, num_classes = counts.shape
    legend_rows = 0 if num_classes == 1 else -(-num_classes // 5)
    figure, axes = _figure(height=0.75 + 0.22 * max(num_clients, 3) + 0.2 * legend_rows)
    colours = mpl.colormaps["tab10" if num_classes <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    left = np.zeros(num_clients)
    for column, name in enumerate(classes):
        axes.barh(
            range(num_clients), counts[:, column], left=left, color=colours[column], height=0.8, label=_text(name)
        )
        left += counts[:, column]
    axes.set_yticks(range(num_clients))
    axes.set_ylim(num_clients - 0.4, -0.6)  # partition 0 at the top
    axes.set_xlim(0, max(1.0, 1.02 * float(left.max(initial=0))))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("images")
    axes.set_ylabel("client")
    if legend_rows:
        _legend(figure, axes, columns=5)
    return figure


def curves_figure(
    curves: Mapping[str, Curve],
    *,
    ylabel: str,
    xlabel: str = "round",
    looks: Mapping[str, Look] | None = None,
    controls: Mapping[str, float] | None = None,
    legend: bool = True,
) -> Figure:
    """Lines with bands; `controls` are constants to beat, drawn as lines across."""
    looks = looks or palette(list(curves))
    controls = controls or {}
    rows = -(-(len(curves) + len(controls)) // 2) if legend else 0
    figure, axes = _figure(height=2.5 + 0.2 * rows)
    for name, curve in curves.items():
        look = looks[name]
        marker = look.marker if len(curve.x) <= 25 else ""
        axes.plot(
            curve.x, curve.y, color=look.colour, marker=marker, linestyle=look.line, markersize=3, linewidth=1.6,
            label=_text(name),
        )  # fmt: skip
        if curve.low is not None and curve.high is not None:
            axes.fill_between(curve.x, curve.low, curve.high, color=look.colour, alpha=0.2, linewidth=0)
    lines = _control_lines(controls)
    for name, value in controls.items():
        axes.axhline(value, color=INK, alpha=0.6, linestyle=lines[name], linewidth=1, label=_text(name))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    if legend and curves:
        _legend(figure, axes, columns=2)
    return figure


def dots_figure(
    values: Mapping[str, Sequence[float]],
    *,
    xlabel: str,
    looks: Mapping[str, Look] | None = None,
    controls: Mapping[str, float] | None = None,
) -> Figure:
    """One line of dots a name (a dot a seed, a bar at their mean); `controls` are vertical lines.

    A control so far off that it would press the dots into a corner is named in the legend instead.
    """
    looks = looks or palette(list(values))
    controls = controls or {}
    figure, axes = _figure(height=0.8 + 0.26 * max(len(values), 2) + (0.2 if controls else 0))
    for line, (name, points) in enumerate(values.items()):
        look = looks[name]
        dots = look.marker  # and no line
        axes.plot(points, [line] * len(points), dots, color=look.colour, markersize=5, alpha=0.7, markeredgewidth=0)
        axes.plot([np.mean(points)], [line], "|", color=look.colour, markersize=13, markeredgewidth=2)
    low, high = (end(map(end, values.values())) for end in (min, max))
    reach = 3 * max(high - low, 0.01)
    lines = _control_lines(controls)
    for name, value in controls.items():
        if low - reach <= value <= high + reach:
            axes.axvline(value, color=INK, alpha=0.6, linestyle=lines[name], linewidth=1, label=_text(name))
        else:
            arrow, side = ("<", "left") if value < low else (">", "right")
            axes.plot([], [], arrow, color=INK, alpha=0.6, markersize=4, label=f"{_text(name)} {value:.3f}, far {side}")
    axes.set_yticks(range(len(values)), [_text(name) for name in values])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlabel(xlabel)
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    if controls:
        _legend(figure, axes, columns=2)
    return figure


def cost_figure(
    curves: Mapping[str, Curve],
    *,
    ylabel: str,
    xlabel: str,
    unit: str,
    looks: Mapping[str, Look],
    free: Mapping[str, float] | None = None,
) -> Figure:
    """Accuracy against what was spent for it; logarithmic where one curve ends at 20 times the cost of another.

    Args:
        curves: `x` is the cost so far; a point at cost 0 is not drawn on a logarithmic axis.
        ylabel: of the accuracy.
        xlabel: of the cost.
        unit: of the cost, "bytes" or "seconds"; seconds are shown as minutes or hours where there are many.
        looks: of `curves` and `free`.
        free: accuracies that cost nothing, drawn as dashed lines across.
    """
    free = free or {}
    ends = [curve.x[-1] for curve in curves.values()]
    scale, said = 1.0, ""
    if unit == "seconds":
        scale, said = (1.0, "s") if max(ends) < 120 else (60.0, "min") if max(ends) < 7200 else (3600.0, "h")
    logarithmic = max(ends) >= 20 * min(ends)
    figure, axes = _figure(height=2.5 + 0.2 * -(-(len(curves) + len(free)) // 2))
    for name, curve in curves.items():
        kept = [i for i, x in enumerate(curve.x) if x > 0 or not logarithmic]
        x, y = [curve.x[i] / scale for i in kept], [curve.y[i] for i in kept]
        look = looks[name]
        axes.plot(
            x, y, color=look.colour, marker=look.marker, linestyle=look.line, markersize=3, linewidth=1.6,
            label=_text(name),
        )  # fmt: skip
        if curve.low is not None and curve.high is not None:
            low, high = [curve.low[i] for i in kept], [curve.high[i] for i in kept]
            axes.fill_between(x, low, high, color=look.colour, alpha=0.2, linewidth=0)
    for name, value in free.items():
        look = looks[name]
        style = "--" if look.line == "-" else look.line
        axes.axhline(value, color=look.colour, linestyle=style, linewidth=1.2, label=f"{_text(name)} (at no cost)")
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(which="minor", color=INK)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value) if not said else f"{value:g}"))
    axes.set_xlabel(f"{xlabel}, {said}" if said else xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    _legend(figure, axes, columns=2)
    return figure


def map_figure(
    coordinates: Float[np.ndarray, "n 2"],
    shares: Float[np.ndarray, " 2"],
    labels: Integer[np.ndarray, " _"],
    classes: Sequence[str],
) -> Figure:
    """Points in two dimensions, one scale on both axes; a colour a class where that many can be told apart.

    Args:
        coordinates: of each point.
        shares: of the variance along each axis.
        labels: of each point, or empty.
        classes: their names.
    """
    coloured = len(labels) > 0 and len(classes) <= MAX_COLOURS
    figure, axes = _figure(height=3.5 + (0.2 * -(-len(classes) // 5) if coloured else 0))
    style: dict[str, Any] = {"markersize": 3.5, "markeredgewidth": 0, "alpha": 0.75}
    if coloured:
        colours = mpl.colormaps["tab10" if len(classes) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
        for label, name in enumerate(classes):
            axes.plot(*coordinates[labels == label].T, "o", color=colours[label], label=_text(name), **style)
        _legend(figure, axes, columns=5, markerscale=1.6)
    else:
        axes.plot(*coordinates.T, "o", color=CYCLE[0], **style)
    axes.set_aspect("equal", adjustable="datalim")
    for axis, name, share in zip((axes.xaxis, axes.yaxis), ("first", "second"), shares, strict=True):
        axis.set_ticks([])
        axis.set_label_text(f"{name} component, {share:.0%} of the variance")
    return figure


def bytes_figure(rounds: Sequence[int], uplink: Sequence[float], downlink: Sequence[float]) -> Figure:
    """Bytes a round, all clients together: uploads upwards, broadcasts downwards from zero."""
    figure, axes = _figure(height=2.7)
    width = 0.8 if len(rounds) <= 60 else 1.0
    axes.bar(rounds, uplink, width=width, color=CYCLE[0], label="uploaded by clients")
    axes.bar(rounds, [-value for value in downlink], width=width, color=CYCLE[1], label="sent to clients")
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(abs(value))))
    axes.set_xlabel("round")
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
    _legend(figure, axes, columns=2)
    return figure


def human_bytes(num_bytes: float) -> str:
    """ "999 B", "12.3 kB", "4.56 MB": decimal units, three significant digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.4g} TB"


def png(figure: Figure) -> bytes:
    """The picture on white, 160 dots an inch."""
    return _render(figure, "png", dpi=160, facecolor="white")


def svg(figure: Figure) -> str:
    """The picture as inline SVG: as wide as its place on the page, no background, ink in the page's text colour."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fedssl"}):
        markup = _render(figure, "svg", transparent=True).decode()
    markup = markup[markup.index("<svg") :]
    markup = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", markup, flags=re.DOTALL)
    markup = re.sub(r' xmlns(:\w+)?="[^"]*"', "", markup, count=2)  # HTML knows both name spaces
    markup = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", markup))
    markup = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", markup)
    return markup.replace(INK, "currentColor")


def _render(figure: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a class name in another script
        figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def _figure(*, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(color=INK, labelcolor=INK, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(INK)
    axes.set_axisbelow(True)
    return figure, axes


def _legend(figure: Figure, axes: Axes, *, columns: int, markerscale: float = 1.0) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, labelcolor=INK,
        fontsize=8, handlelength=1.5, columnspacing=1.0, borderaxespad=0.2,
        markerscale=markerscale,
    )  # fmt: skip


def _text(name: str) -> str:
    """`name` as matplotlib will print it: no mathematics between dollars, no label hidden by its underscore."""
    name = name if len(name) <= 40 else name[:39] + "…"
    return name.replace("$", r"\$").replace("_", " _", 1) if name.startswith("_") else name.replace("$", r"\$")
