"""Published rows, their results and the table of both: shared by `scripts/reproduce` and `scripts/gpu_acceptance`."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from fedssl.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
ROOT_IS_DATA = "(Here data.root is --data.)"  # what scripts/reproduce adds where images are missing or damaged
ROWS = ROOT / "benchmarks" / "rows.yaml"
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "benchmarks" / "published.md"
README = ROOT / "README.md"
NEEDED = {
    "name": str, "shrunken": bool, "overrides": list, "metric": str, "epochs": int, "copy": str,
    "measured": float | int | None, "runs": list, "data_sha256": dict,
}  # fmt: skip
NEEDED_OF_RUN = {
    "shard": int | None, "status": str, "rounds": int, "num_rounds": int, "measured": float | int | None,
    "untrained": float | int | None, "seconds": float | int,
}  # fmt: skip
NEEDED_OF_ATTEMPT = {"rounds": int, "replies": int, "seconds": float | int | None}
IF_THERE = {  # of a result, or of a run
    "settings": str | None, "machines": list, "attempts": list, "replies": int, "expected": float | int | None,
}  # fmt: skip
# Of a gap between rows of one seed. FLESD's cell repeats within .9 points, FedEMA's was repeated 1.2 points lower.
TELLING = 0.03
KINDS: dict[str, Any] = {  # of a row's fields in rows.yaml
    "name": str, "what": str, "source": str, "overrides": [str], "metric": str, "expected": float | int | None,
    "tolerance": float | int | None, "tolerance_jpeg": float | int | None, "gpu_minutes": float | int, "cpu": [str],
    "shards": list | None, "beside": str | None,
}  # fmt: skip
IN_README = 9  # rows at least: what is to be measured first
BEGIN, END = "<!-- rows: scripts/reproduce --table -->", "<!-- end of rows -->"


@cache
def settings_digest(overrides: Sequence[str]) -> str | None:
    """sha256 of the settings that can change the figures of a run with these overrides; None where Hydra is missing."""
    try:
        from fedssl.config import compose, without_as_before
        from fedssl.settings import of_a_result
    except ModuleNotFoundError:  # then no row runs here either
        return None
    settings = of_a_result(without_as_before(compose(overrides)))
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def is_digest(digest: str | None, overrides: Sequence[str]) -> bool:
    """Whether it is that of the overrides' settings, as far as can be known."""
    return digest is None or settings_digest(tuple(overrides)) in (None, digest)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published number and the run that should give it; benchmarks/rows.yaml explains the fields."""

    name: str
    what: str
    source: str
    overrides: Sequence[str]
    metric: str  # of summary.json
    expected: float | None  # a fraction; None: nothing is published
    tolerance: float | None
    tolerance_jpeg: float | None
    gpu_minutes: float
    cpu: Sequence[str]
    shards: Sequence[int] | None = None
    beside: str | None = None

    def __post_init__(self) -> None:
        if (self.expected is None) != (self.tolerance is None) or (self.expected is None) != (
            self.tolerance_jpeg is None
        ):
            raise ConfigError(f"row {self.name}: expected, tolerance and tolerance_jpeg are all numbers or all null")

    def file(self, shrunken: bool) -> str:
        """Name of its result."""
        return f"reproduce-{self.name}{'-cpu' if shrunken else ''}.json"

    def tolerance_of(self, result: Mapping[str, Any]) -> float | None:
        """The one that goes with the copy of the images."""
        return self.tolerance_jpeg if result["copy"] == "jpeg" else self.tolerance

    def holds(self, result: Mapping[str, Any]) -> bool | None:
        """Whether a full result is within the tolerance; None where nothing is published or measured."""
        tolerance = self.tolerance_of(result)
        if result["shrunken"] or result["measured"] is None or self.expected is None or tolerance is None:
            return None
        return bool(abs(result["measured"] - self.expected) <= tolerance)


@dataclass(frozen=True, kw_only=True)
class Table:
    """All rows, in the order in which they should be measured."""

    rows: Mapping[str, Row]
    cpu: Sequence[str]  # overrides of every shrunken row, before its own
    orderings: Sequence[Mapping[str, Any]]  # what, rows: worst first
    left_out: Sequence[Mapping[str, str]] = ()  # what, why

    def overrides(self, row: Row, *, shrunken: bool) -> list[str]:
        """All of the row's; of two for one key the later counts, in the earlier one's place."""
        given = [*row.overrides, *(self.cpu if shrunken else ()), *(row.cpu if shrunken else ()), "grid=in_process"]
        return list({override.split("=", 1)[0]: override for override in given}.values())

    def twin(self, row: Row) -> Row | None:
        """The first row before this one whose shrunken version is the same run, which then counts once."""
        own = set(self.overrides(row, shrunken=True))
        for other in self.rows.values():
            if other.name == row.name:
                return None
            if own == set(self.overrides(other, shrunken=True)) and other.shards == row.shards:
                return other
        return None

    @property
    def files(self) -> dict[str, Row]:
        """The rows by the names of their results."""
        return {row.file(shrunken): row for row in self.rows.values() for shrunken in (False, True)}

    def is_of(self, row: Row, result: Mapping[str, Any]) -> bool:
        """Whether the result was made with the settings that the row has now, those of its preset included.

        One that was written before digests were is believed.
        """
        return (
            result["overrides"] == self.overrides(row, shrunken=result["shrunken"])
            and result["metric"] == row.metric
            and [run["shard"] for run in result["runs"]] == list(row.shards or [None])
            and is_digest(result.get("settings"), result["overrides"])
        )

    def row(self, name: str) -> Row:
        """The row of this name."""
        if name not in self.rows:
            raise ConfigError(f"there is no row {name!r}; there are {', '.join(self.rows)} (benchmarks/rows.yaml)")
        return self.rows[name]


def load_table(path: Path = ROWS) -> Table:
    """Read the rows.

    Raises:
        ConfigError: the file is missing or holds no rows, or a row lacks a key, has an unknown one or names a row that
            there is not.
    """
    try:
        text = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the rows in {path}: {error}") from error
    lists = ("rows", "cpu", "orderings")
    if wrong := [key for key in lists if not (isinstance(text, Mapping) and isinstance(text.get(key), list))]:
        raise ConfigError(f"{path} must have the lists {', '.join(lists)}; {', '.join(wrong)} is none or missing")
    for key, needed in (("rows", {"name"}), ("orderings", {"what", "rows"}), ("left_out", {"what", "why"})):
        for entry in text.get(key) or ():
            if not (isinstance(entry, Mapping) and needed <= entry.keys()):
                raise ConfigError(f"{path}: {key} holds {entry!r}; each needs {', '.join(sorted(needed))}")
    known = {field.name for field in fields(Row)}
    rows: dict[str, Row] = {}
    for entry in text["rows"]:
        if unknown := entry.keys() - known:
            raise ConfigError(f"{path}: row {entry.get('name')} has the unknown keys {sorted(unknown)}")
        if wrong := [key for key, value in entry.items() if not _is_of_kind(value, KINDS[key])]:
            said = ", ".join(f"{key}={entry[key]!r}" for key in wrong)
            raise ConfigError(f"{path}: row {entry['name']} has {said}; see the head of that file for what goes there")
        try:
            row = Row(**entry)
        except TypeError as error:
            raise ConfigError(f"{path}: row {entry.get('name')}: {error}") from error
        if row.name in rows:
            raise ConfigError(f"{path} has two rows {row.name}")
        rows[row.name] = row
    table = Table(rows=rows, cpu=text["cpu"], orderings=text["orderings"], left_out=text.get("left_out") or ())
    for name in [row.beside for row in rows.values() if row.beside] + [n for o in table.orderings for n in o["rows"]]:
        table.row(name)
    return table


def _is_of_kind(value: Any, kind: Any) -> bool:
    """Whether it is of the type; a kind in a list is that of all items of one."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(_is_of_kind(item, kind[0]) for item in value)
    return isinstance(value, kind) and not isinstance(value, bool)


def read_json(path: Path) -> Any:
    """What the file holds.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}. Delete it, or bring it back.") from error


def make_folder(folder: Path, option: str) -> None:
    """With all above it.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make the folder {folder} ({error.strerror}); name another one with {option}"
        ) from error


def checked(result: Any, where: str) -> dict[str, Any]:
    """The result, if it has what the table needs.

    Raises:
        ConfigError: it lacks a key, or has a value of another type; the message begins with `where`.
    """
    runs = _list_in(result, "runs")
    attempts = [attempt for run in runs for attempt in _list_in(run, "attempts")]
    for nodes, needed in (([result], NEEDED), (runs, NEEDED_OF_RUN), (attempts, NEEDED_OF_ATTEMPT)):
        for node in nodes:
            found = node if isinstance(node, dict) else {}
            kinds = {**needed, **{key: kind for key, kind in IF_THERE.items() if key in found}}
            if wrong := [key for key, kind in kinds.items() if not (key in found and isinstance(found[key], kind))]:
                raise ConfigError(
                    f"{where} is no result of scripts/reproduce: it lacks {', '.join(wrong)}, or has another type. "
                    f"Bring it back, or delete it: the row goes on from its folder, or begins anew."
                )
    return dict(result)


def _list_in(node: Any, key: str) -> list[Any]:
    found = node.get(key) if isinstance(node, dict) else None
    return found if isinstance(found, list) else []


def read_results(table: Table, *folders: Path, names: Collection[str] | None = None) -> dict[str, dict[str, Any]]:
    """The results of the table's rows by file name (`names`: only of these).

    Of two folders that hold one, the one with more complete runs counts, and of as many the last.

    One that was made with other settings than the row's has `changed`, and nothing measured.

    Raises:
        ConfigError: one cannot be read, or is none.
    """
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for path in sorted(folder.glob("reproduce-*.json")):
            if (row := table.files.get(path.name)) and (names is None or path.name in names):
                result = checked(read_json(path), str(path))
                if not table.is_of(row, result):
                    result = {**result, "measured": None, "changed": True}
                if num_completed(result) >= num_completed(found.get(path.name)):
                    found[path.name] = result
    return found


def is_measured(result: Mapping[str, Any] | None) -> bool:
    """Whether a result is there and whole."""
    return result is not None and result["measured"] is not None


def num_completed(result: Mapping[str, Any] | None) -> int:
    """Runs that are; 0 where there is no result with the row's settings of today."""
    if result is None or result.get("changed"):
        return 0
    return sum(run["measured"] is not None for run in result["runs"])


def verdict(row: Row, result: Mapping[str, Any] | None) -> str:
    """In words, of the full row, by its numbers of today."""
    if result is None:
        return "not measured"
    if result.get("changed"):
        return "not measured (the result is of other settings)"
    if not is_measured(result):
        return f"not measured ({progress(result)})"
    return {True: "holds", False: "does not hold", None: "measured"}[row.holds(result)]


def progress(result: Mapping[str, Any]) -> str:
    """How far an unfinished row is, and what did not fit into a sitting."""
    runs = result["runs"]
    text = f"{sum(run['rounds'] for run in runs)} of {sum(run['num_rounds'] for run in runs)} rounds"
    values = [run["measured"] for run in runs if run["measured"] is not None]
    if len(runs) > 1 and values:
        text += f", mean of {len(values)} so far {percent(mean(values))}"
    if replies := sum(run.get("replies", 0) for run in runs):
        text += f", {replies} clients of the next"
    for run in runs:
        if longest := tried(run):
            which = "" if run["shard"] is None else f"shard {run['shard']}, "
            text += f"; {which}round {run['rounds'] + 1} got nowhere in {longest:.0f} s"
    return text


def tried(run: Mapping[str, Any]) -> float:
    """Seconds of the longest attempt that left the run where it is; 0 for none."""
    return max((a["seconds"] for a in run.get("attempts", ()) if a["seconds"] is not None), default=0.0)


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def lines(table: Table, results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """One line a row: name, what, expected, tolerance, measured, verdict, centralised beside, shrunken, minutes."""
    out = []
    for row in table.rows.values():
        full, small, twin = results.get(row.file(False)), results.get(row.file(True)), table.twin(row)
        tolerance = row.tolerance_of(full) if full else row.tolerance
        beside = beside_of(table, row, full, results) if full and is_measured(full) else None
        out.append([
            row.name,
            row.what,
            percent(row.expected),
            "" if tolerance is None else f"±{percent(tolerance)}",
            _with_marks(row, full) if full and is_measured(full) else "",
            verdict(row, full),
            (percent(beside["measured"]) or beside["status"]) if beside else "",
            f"as {twin.name}" if twin else _with_start(small) if small and is_measured(small) else "",
            f"{row.gpu_minutes:g}",
        ])  # fmt: skip
    return out


def _with_marks(row: Row, result: Mapping[str, Any]) -> str:
    """The percentage, and what has to be known of it: "72.31 (JPEG, ±5.0, uncommitted changes)"."""
    tolerance = row.tolerance_of(result)
    marks = {"jpeg": ["JPEG"], "as published": []}.get(result["copy"], [f"copy {result['copy']}"])
    if marks and tolerance is not None:
        marks.append(f"±{100 * tolerance:.1f}")
    if any((machine.get("commit") or {}).get("dirty") for machine in result.get("machines", ())):
        marks.append("uncommitted changes")
    return percent(result["measured"]) + (f" ({', '.join(marks)})" if marks else "")


def beside_of(
    table: Table, row: Row, result: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The centralised row that says what a copy of the images costs, of the same size: its name, value and status."""
    if row.beside is None:
        return None
    beside = table.row(row.beside)
    other = results.get(beside.file(result["shrunken"]))
    if other is None or not is_measured(other):
        return {"row": beside.name, "measured": None, "status": "not measured"}
    if result["data_sha256"] and not comparable(result, other):
        return {"row": beside.name, "measured": None, "status": "of other images or epochs"}
    return {"row": beside.name, "measured": other["measured"], "status": "measured"}


def comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two results can stand beside each other: one metric, as many epochs, the same images."""
    same_images = images(a["data_sha256"]) == images(b["data_sha256"])
    return same_images and (a["metric"], a["epochs"]) == (b["metric"], b["epochs"])


def images(digests: Mapping[str, str]) -> dict[str, str]:
    """sha256 by image set, without the public set, which may be drawn anew."""
    return {name: digest for name, digest in digests.items() if name != "public set"}


HEAD = [
    "row", "what", "published", "tolerance", "measured", "verdict", "centralised beside", "CPU (untrained)", "GPU min",
]  # fmt: skip


def untrained(result: Mapping[str, Any]) -> float | None:
    """The mean over its runs of what the network had before training."""
    starts = [run["untrained"] for run in result["runs"] if run["untrained"] is not None]
    return mean(starts) if starts else None


def _with_start(result: Mapping[str, Any]) -> str:
    start = untrained(result)
    return percent(result["measured"]) + ("" if start is None else f" ({percent(start)})")


ORDERING_HEAD = ["ordering", "size", "rows, worst first", "measured", "smallest gap", "verdict"]


def ordering_lines(table: Table, results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """One line an ordering and size."""
    out = []
    for ordering in table.orderings:
        chosen = [table.row(name) for name in ordering["rows"]]
        for shrunken in (False, True):
            found = [results.get(row.file(shrunken)) for row in chosen]
            known = [result for result in found if result and is_measured(result)]
            gaps = [b["measured"] - a["measured"] for a, b in pairwise(known)] if len(known) == len(found) else []
            out.append([
                ordering["what"],
                f"shrunken, CPU{_other_data(table, chosen)}" if shrunken else "full",
                ", ".join(ordering["rows"]),
                ", ".join(percent(r["measured"]) if r and is_measured(r) else "-" for r in found) if known else "",
                percent(min(gaps)) if gaps else "",
                _said_of(known, gaps, chosen[0]) if gaps else "not measured",
            ])  # fmt: skip
    return out


def _said_of(known: Sequence[Mapping[str, Any]], gaps: Sequence[float], worst: Row) -> str:
    """The verdict on an ordering whose rows are all measured, with what one seed cannot tell."""
    idle = [result["name"] for result in known if result["measured"] <= (untrained(result) or 0)]
    if set(idle) - {worst.name}:  # the worst may have learned nothing, if the others have
        return f"says nothing, no better than untrained: {', '.join(idle)}"
    said = "holds" if min(gaps) > 0 else "does not hold"
    seeds = "one seed" + ("" if abs(min(gaps)) >= TELLING else ", which cannot tell so small a gap")
    return f"{said} ({seeds})" + (f"; {idle[0]} is no better than untrained" if idle else "")


def _other_data(table: Table, chosen: Sequence[Row]) -> str:
    """ ", on X" where the shrunken rows run on other images than the full ones."""
    given = [
        [next((o for o in table.overrides(row, shrunken=size) if o.startswith("data=")), "") for row in chosen]
        for size in (False, True)
    ]
    small = sorted({b.removeprefix("data=") for a, b in zip(*given, strict=True) if a != b})
    return f", on {', '.join(small)}" if small else ""


def markdown(table: Table, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table, the orderings and what is left out, as they stand in benchmarks/published.md."""
    parts = [_grid(HEAD, lines(table, results)), _grid(ORDERING_HEAD, ordering_lines(table, results))]
    if table.left_out:
        listed = (f"- {entry['what']}: {entry['why']}." for entry in table.left_out)
        parts.append("\n".join(["Published and left out, and why:", "", *listed]))
    return "\n\n".join(parts)


def short_markdown(table: Table, results: Mapping[str, Mapping[str, Any]]) -> str:
    """What the README shows of the table: its first rows, which are the next to be measured, and all that are."""
    measured = [is_measured(results.get(row.file(False))) for row in table.rows.values()]
    chosen = [HEAD.index(name) for name in ("row", "what", "published", "measured", "verdict")]
    cells = [
        [line[i] for i in chosen]
        for number, line in enumerate(lines(table, results))
        if number < IN_README or measured[number]
    ]
    count = f"{sum(measured)} of {len(measured)} rows are measured."
    if left := len(measured) - len(cells):
        count += f" The other {left}: `benchmarks/published.md`."
    return f"{_grid([HEAD[i] for i in chosen], cells)}\n\n{count}"


def pages(table: Table, results: Mapping[str, Mapping[str, Any]]) -> dict[Path, str]:
    """The pages that show the table, and what stands between their markers."""
    return {PAGE: markdown(table, results), README: short_markdown(table, results)}


def _grid(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *cells))


def rendered(page: str, text: str) -> str:
    """`page` with `text` between the markers.

    Raises:
        ConfigError: it has no markers.
    """
    before, found, rest = page.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise ConfigError(f"the page has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"
