import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from fedssl.plots import (
    INK,
    Curve,
    bytes_figure,
    cost_figure,
    curves_figure,
    dots_figure,
    draw_partition,
    human_bytes,
    map_figure,
    palette,
    partition_figure,
    png,
    svg,
)

COUNTS = np.array([[3, 0, 7], [1, 2, 0]])
CLASSES = ("zero", "one", "two")


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_bar_is_as_long_as_a_client_has_images_of_the_class() -> None:
    axes = partition_figure(COUNTS, CLASSES).axes[0]
    bars = [container for container in axes.containers if isinstance(container, BarContainer)]
    widths = [[bar.get_width() for bar in container] for container in bars]  # one container a class
    lefts = [[bar.get_x() for bar in container] for container in bars]
    assert widths == [[3, 1], [0, 2], [7, 0]]
    assert lefts == [[0, 0], [3, 1], [3, 3]]  # stacked
    low, high = axes.get_ylim()
    assert low > high  # partition 0 is at the top


@pytest.mark.parametrize("shape", [(200, 3), (5, 100)])
def test_many_clients_or_classes_become_a_heat_map(shape: tuple[int, int]) -> None:
    counts = np.arange(shape[0] * shape[1]).reshape(shape)
    image = partition_figure(counts, [str(i) for i in range(shape[1])]).axes[0].images[0]
    np.testing.assert_array_equal(np.asarray(image.get_array()), counts)


def test_sizes_without_labels_need_no_legend() -> None:
    assert not partition_figure(COUNTS.sum(1, keepdims=True), ("images",)).legends


def test_draw_partition_writes_and_returns_the_same_png(tmp_path: Path) -> None:
    picture = draw_partition(COUNTS, CLASSES, path=tmp_path / "partition.png")
    assert picture.startswith(b"\x89PNG")
    assert (tmp_path / "partition.png").read_bytes() == picture
    assert draw_partition(COUNTS, CLASSES) == picture


def test_an_empty_federation_can_be_drawn() -> None:
    assert png(partition_figure(np.zeros((3, 3), dtype=np.int64), CLASSES)).startswith(b"\x89PNG")


def test_curves_carry_their_numbers_band_and_controls() -> None:
    curve = Curve(x=[0, 1, 2], y=[0.1, 0.2, 0.3], low=[0.0, 0.1, 0.2], high=[0.2, 0.3, 0.4])
    figure = curves_figure({"flesd": curve}, ylabel="linear", controls={"raw pixels": 0.25})
    line, control = figure.axes[0].lines
    np.testing.assert_array_equal(line.get_xydata(), [[0, 0.1], [1, 0.2], [2, 0.3]])
    assert list(np.asarray(control.get_ydata())) == [0.25, 0.25]
    assert len(figure.axes[0].collections) == 1  # the band
    assert labels(figure) == ["flesd", "raw pixels"]


def test_a_far_control_is_named_instead_of_drawn() -> None:
    figure = dots_figure({"a": [0.90, 0.92], "b": [0.91]}, xlabel="linear", controls={"near": 0.88, "far": 0.1})
    assert labels(figure) == ["near", "far 0.100, far left"]
    assert figure.axes[0].get_xlim()[0] > 0.5


LOOKS = palette(["cheap", "dear", "free"])


def test_costs_of_one_order_are_drawn_as_they_are() -> None:
    curves = {"cheap": Curve(x=[0, 100], y=[0.5, 0.8]), "dear": Curve(x=[0, 1900], y=[0.5, 0.9])}
    figure = cost_figure(curves, ylabel="linear", xlabel="sent", unit="bytes", looks=LOOKS, free={"free": 0.7})
    cheap, dear, free = figure.axes[0].lines
    np.testing.assert_array_equal(cheap.get_xydata(), [[0, 0.5], [100, 0.8]])
    np.testing.assert_array_equal(dear.get_xydata(), [[0, 0.5], [1900, 0.9]])
    assert list(np.asarray(free.get_ydata())) == [0.7, 0.7]
    assert labels(figure) == ["cheap", "dear", "free (at no cost)"]
    assert figure.axes[0].get_xscale() == "linear"


def test_costs_of_several_orders_have_a_logarithmic_axis_without_zero() -> None:
    band = Curve(x=[0, 1000, 2000], y=[0.5, 0.6, 0.9], low=[0.4, 0.5, 0.8], high=[0.6, 0.7, 1.0])
    curves = {"cheap": Curve(x=[0, 100], y=[0.5, 0.8]), "dear": band}
    axes = cost_figure(curves, ylabel="linear", xlabel="sent", unit="bytes", looks=LOOKS).axes[0]
    cheap, dear = axes.lines
    np.testing.assert_array_equal(cheap.get_xydata(), [[100, 0.8]])
    np.testing.assert_array_equal(dear.get_xydata(), [[1000, 0.6], [2000, 0.9]])
    assert axes.get_xscale() == "log"
    assert np.asarray(axes.collections[0].get_paths()[0].vertices)[:, 0].min() == 1000


@pytest.mark.parametrize(
    ("seconds", "x", "label"), [(90, 90, "spent, s"), (600, 10, "spent, min"), (9000, 2.5, "spent, h")]
)
def test_time_is_in_units_that_suit_it(seconds: float, x: float, label: str) -> None:
    curve = Curve(x=[0, seconds], y=[0, 1])
    axes = cost_figure({"cheap": curve}, ylabel="y", xlabel="spent", unit="seconds", looks=LOOKS).axes[0]
    assert np.asarray(axes.lines[0].get_xdata())[-1] == x
    assert axes.get_xlabel() == label


POINTS, SHARES = np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]), np.array([0.6, 0.25])


def test_a_map_has_a_colour_for_each_class() -> None:
    figure = map_figure(POINTS, SHARES, np.array([1, 0, 1]), ("zero", "one"))
    zero, one = figure.axes[0].lines
    np.testing.assert_array_equal(zero.get_xydata(), [[2, 3]])
    np.testing.assert_array_equal(one.get_xydata(), [[0, 1], [4, 5]])
    assert zero.get_color() != one.get_color()
    assert labels(figure) == ["zero", "one"]
    assert figure.axes[0].get_xlabel() == "first component, 60% of the variance"
    assert figure.axes[0].get_ylabel() == "second component, 25% of the variance"


@pytest.mark.parametrize(
    ("of", "classes"), [(np.empty(0, np.int64), ()), (np.array([0, 1, 99]), tuple(map(str, range(100))))]
)
def test_a_map_without_labels_or_with_too_many_classes_has_one_colour(of: np.ndarray, classes: tuple[str, ...]) -> None:
    figure = map_figure(POINTS, SHARES, of, classes)
    (line,) = figure.axes[0].lines
    np.testing.assert_array_equal(line.get_xydata(), POINTS)
    assert not figure.legends


def test_bytes_go_up_and_down() -> None:
    up, down = bytes_figure([1, 2], [5.0, 6.0], [10.0, 0.0]).axes[0].containers
    assert isinstance(up, BarContainer)
    assert isinstance(down, BarContainer)
    assert [bar.get_height() for bar in up] == [5, 6]
    assert [bar.get_height() for bar in down] == [-10, 0]


def test_svg_is_valid_takes_the_pages_ink_and_refers_to_nothing_outside() -> None:
    markup = svg(curves_figure({"a": Curve(x=[0, 1], y=[0, 1])}, ylabel="a < b & c"))
    ElementTree.fromstring(re.sub(r"xlink:", "", markup))
    assert "currentColor" in markup
    assert INK not in markup
    assert "http" not in markup
    assert "a &lt; b &amp; c" in markup
    assert re.match(r'<svg viewBox="[\d. ]+"', markup)  # no width of its own


def test_the_same_picture_has_the_same_bytes() -> None:
    assert svg(partition_figure(COUNTS, CLASSES)) == svg(partition_figure(COUNTS, CLASSES))


@pytest.mark.parametrize("name", ["$x^$", "$\\broken{$", "a$b", "_hidden", "_$x$", "数字", "x" * 200])
def test_any_name_can_be_drawn_as_it_is(name: str) -> None:
    for figure in (
        partition_figure(COUNTS, ("zero", "one", name)),
        curves_figure({name: Curve(x=[0, 1], y=[0, 1])}, ylabel="y", controls={name + " ": 0.5}),
        dots_figure({name: [0.5]}, xlabel="x"),
        cost_figure({name: Curve(x=[0, 1], y=[0, 1])}, ylabel="y", xlabel="x", unit="bytes", looks=palette([name])),
        map_figure(POINTS, SHARES, np.array([0, 0, 0]), (name,)),
    ):
        assert name[:39] in re.sub(r"<[^>]*>", "", svg(figure))


def test_nothing_global_changes() -> None:
    before = dict(mpl.rcParams)
    svg(partition_figure(COUNTS, CLASSES))
    png(partition_figure(COUNTS, CLASSES))
    assert dict(mpl.rcParams) == before


def test_palette_is_stable_and_never_runs_out() -> None:
    names = [str(i) for i in range(25)]
    assert palette(names)["3"] == palette(names[:5])["3"]
    assert len({look.colour for look in palette(names[:10]).values()}) == 10
    assert len(set(palette(names).values())) == 25


def test_names_of_one_colour_have_other_markers_and_lines() -> None:
    names = [str(i) for i in range(12)]
    figures = [
        curves_figure({name: Curve(x=[0, 1], y=[0, 1]) for name in names}, ylabel="y"),
        cost_figure(
            {name: Curve(x=[0, 1], y=[0, 1]) for name in names},
            ylabel="y",
            xlabel="x",
            unit="bytes",
            looks=palette(names),
        ),
    ]
    for figure in figures:
        drawn = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in figure.axes[0].lines}
        assert len(drawn) == 12
    lines = dots_figure({name: [0.5] for name in names}, xlabel="x").axes[0].lines[::2]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 12


def test_a_control_has_the_same_line_in_every_picture() -> None:
    curve = {"a": Curve(x=[0, 1], y=[0.4, 0.5])}
    alone = curves_figure(curve, ylabel="y", controls={"raw pixels": 0.5}).axes[0].lines[-1]
    controls = {"random init": 0.4, "raw pixels": 0.5, "flesd, global": 0.6, "other": 0.7, "more": 0.6}
    drawn = dots_figure({"a": [0.5, 0.6]}, xlabel="x", controls=controls).axes[0].lines[2:]
    styles = [line.get_linestyle() for line in drawn]
    assert styles[:3] == ["--", ":", "-."]
    assert alone.get_linestyle() == ":"
    assert len(drawn) == len(controls)  # none is left out


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (12_345, "12.3 kB"), (999_600, "1 MB"), (4.56e9, "4.56 GB")],
)
def test_human_bytes(value: float, said: str) -> None:
    assert human_bytes(value) == said
