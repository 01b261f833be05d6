"""What both kinds of page share: tables, captions, number formats, and the one place that renders a template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from fedssl.plots import svg

TIE = 0.0005  # accuracies that are closer look the same on the page

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,  # a strategy, a class or an error may be called <script>
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number with its small print.

    Args:
        text: the number.
        delta: signed difference from what the table compares with.
        rival: the number is a rival's, so that a positive `delta` is bad news.
        span: lowest and highest over the clients of a strategy without a global model.
        interval: of confidence around `delta`, which then counts where the interval leaves out 0 and has a width.
        link: address the text leads to.
    """

    text: str
    delta: float | None = None
    rival: bool = False
    span: tuple[float, float] | None = None
    interval: tuple[float, float] | None = None
    link: str | None = None

    @property
    def range(self) -> str:
        """`span` or `interval` in words, "" where there is neither."""
        if self.interval is not None:
            return f"{signed(self.interval[0])} to {signed(self.interval[1])}"
        return "" if self.span is None else f"{self.span[0]:.3f}–{self.span[1]:.3f}"

    @property
    def signed(self) -> str:
        """`delta` with sign and a real minus, "" where there is none."""
        return "" if self.delta is None else signed(self.delta)

    @property
    def trend(self) -> str:
        """CSS class of `delta`."""
        if self.interval is not None:
            low, high = self.interval
            return "" if low == high else "up" if low > 0 else "down" if high < 0 else ""
        gain = (self.delta or 0.0) * (-1 if self.rival else 1)
        return "up" if gain >= TIE else "down" if gain <= -TIE else ""

    def __str__(self) -> str:
        small = self.range and f"({self.range})"
        parts = (self.text, self.signed, small) if self.interval else (self.text, small, self.signed)
        return " ".join(filter(None, parts))


@dataclass(frozen=True)
class Row:
    """Cells of a table; `kind` is "self" for the run that a page is about, "control" for a bar to beat."""

    cells: Sequence[str | Cell]
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Column heads and rows; the first `num_words` columns are words and stand left, the others are numbers.

    `dense` is for many columns, which are then set closer; what still does not fit scrolls in the table's own box.
    """

    heads: Sequence[str]
    num_words: int = 1
    dense: bool = False
    rows: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class Picture:
    """A figure of the page with the line above it."""

    caption: str
    figure: Figure

    @property
    def svg(self) -> Markup:
        """Inline SVG; matplotlib has escaped its texts."""
        return Markup(svg(self.figure))


def render(template: str, values: Mapping[str, Any]) -> str:
    """The page."""
    return _TEMPLATES.get_template(template).render(values)


def fraction(value: float | None, std: float | None = None) -> str:
    """An accuracy: "0.912", "0.912 ± 0.004"; a dash where it was not measured."""
    if value is None:
        return "–"
    return f"{value:.3f}".replace("-", "−") + ("" if std is None else f" ± {std:.3f}")


def mean_and_std(values: Sequence[float]) -> str:
    """Mean ± standard deviation of a sample, which one value does not have."""
    if not values:
        return fraction(None)
    return fraction(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)


def signed(delta: float) -> str:
    """ "+0.012", "−0.003"."""
    return f"{delta:+.3f}".replace("-", "−")


def accuracy(
    metrics: Mapping[str, float], name: str, against: Mapping[str, float] | None = None, *, rival: bool = False
) -> Cell:
    """The metric `name` as a cell, and how far it is from the same metric of `against`."""
    delta = metrics[name] - against[name] if against and name in metrics and name in against else None
    return Cell(text=fraction(metrics.get(name)), delta=delta, rival=rival, span=bounds(metrics, name))


def bounds(metrics: Mapping[str, float], name: str) -> tuple[float, float] | None:
    """The range over clients of a strategy without a global model."""
    low, high = metrics.get(f"{name}_min"), metrics.get(f"{name}_max")
    return None if low is None or high is None else (low, high)


def plural(count: int, one: str, many: str | None = None) -> str:
    """ "1 run", "1,200 runs"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def markdown(table: Table) -> str:
    """`table` as Markdown."""

    def line(cells: Sequence[str | Cell]) -> str:
        texts = (" ".join(str(cell).split()).replace("|", r"\|") for cell in cells)
        return f"| {' | '.join(texts)} |"

    rule = ["---" if i < table.num_words else "---:" for i in range(len(table.heads))]
    return "\n".join(line(cells) for cells in (table.heads, rule, *(row.cells for row in table.rows)))
