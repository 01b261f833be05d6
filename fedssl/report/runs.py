"""Run directories, read back: what `INTERFACE.md` says lies in one, with everything that may be missing."""

import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from fedssl.config import fill_in
from fedssl.errors import DataError
from fedssl.settings import INCIDENTAL, INERT, covers, flatten

METRICS = {  # in the order of importance; the names are the reports' column heads
    "linear_top1": "linear",
    "knn_top1": "kNN",
    "labels1_top1": "1 label",
    "labels5_top1": "5 labels",
    "labels10_top1": "10 labels",
}
HEADLINE = ("linear_top1", "knn_top1", "labels1_top1")  # those with a picture; the others stand in the tables
RAW_PIXELS = "raw_pixels"  # the control's name where a family's would stand

INCIDENTAL_OF_DATA = ("data.root", "data.download", "evaluate.root", "evaluate.every", "evaluate.batch_size")
OUTCOMES = ("ok", "failed", "late", "refused")  # of a client task
COUNTED = {  # by the scope of a row; beside them a row may hold anything
    "server": ("uplink_bytes", "downlink_bytes"), "round": tuple(f"num_{kind}" for kind in OUTCOMES),
}  # fmt: skip
PROVENANCE = ("git.commit", "git.dirty", "versions", "hardware.cpu", "hardware.cores", "hardware.gpus")  # of a manifest


@dataclass(frozen=True, kw_only=True)
class Partition:
    """The label histogram of a `partition.npz`: (clients, classes) counts; one column of sizes without labels."""

    counts: "np.ndarray[Any, np.dtype[np.integer[Any]]]"
    classes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PublicMap:
    """Public images in two dimensions, of a `public_map.npz`: (n, 2) `initial` and `trained`; (2,) shares of variance.

    `labels` and `classes` are empty where the images have no labels.
    """

    family: str
    initial: "np.ndarray[Any, np.dtype[np.floating[Any]]]"
    trained: "np.ndarray[Any, np.dtype[np.floating[Any]]]"
    initial_shares: "np.ndarray[Any, np.dtype[np.floating[Any]]]"
    trained_shares: "np.ndarray[Any, np.dtype[np.floating[Any]]]"
    labels: "np.ndarray[Any, np.dtype[np.integer[Any]]]"
    classes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One run directory; all but `path` and `config` may be empty when it was cut short."""

    path: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    manifest: dict[str, Any]
    rows: list[dict[str, Any]]
    partition: Partition | None
    public_map: PublicMap | None

    @property
    def status(self) -> str:
        """Of `summary.json`; "unfinished" where there is none: still running, or killed."""
        return str(self.summary.get("status", "unfinished"))

    @property
    def completed(self) -> bool:
        """Whether its numbers may enter a mean or serve as a control."""
        return self.status == "completed"

    @property
    def strategy(self) -> str:
        """Name of the strategy's YAML; of a run without a summary, what `_target_` suggests."""
        if "strategy" in self.summary:
            return str(self.summary["strategy"])
        node = self.config.get("strategy")
        if not isinstance(node, Mapping):
            return str(node)
        target = str(node.get("_target_", "?")).split(".")
        return str(node.get("name") or (target[1] if target[0] == "strategies" and len(target) > 1 else target[-1]))

    @property
    def notes(self) -> list[str]:
        """What the strategy has to say of its own figures."""
        return [str(note) for note in self.summary.get("notes") or []]

    @property
    def data(self) -> str:
        """Name of the private images."""
        node = self.config.get("data")
        return str(self.summary.get("data") or (node.get("name", "?") if isinstance(node, Mapping) else node))

    @property
    def seed(self) -> int | None:
        """The run's one seed."""
        return self.summary.get("seed", self.config.get("seed"))

    @property
    def rounds(self) -> int:
        """Rounds done; of a run without a summary, the last one with a row."""
        return int(self.summary.get("rounds") or max((row["round"] for row in self.rows), default=0))

    @property
    def declared_family(self) -> str | None:
        """The family that the run reports, where it says so; a killed run may not."""
        return self.summary.get("report_family") or (self.config.get("federation") or {}).get("report_family")

    @property
    def report_family(self) -> str | None:
        """The family that the headline speaks of: the declared one, else the first that was evaluated."""
        return self.declared_family or next(iter(self.families), None)

    @property
    def last_row(self) -> int | None:
        """The last round of `metrics.jsonl`; None where it is gone or empty."""
        return max((row["round"] for row in self.rows), default=None)

    @cached_property
    def families(self) -> tuple[str, ...]:
        """All families with a result, in the order of the summary; not those that stayed at their initial weights."""
        found = dict.fromkeys([*(self.summary.get("families") or {}), *self._evaluations])
        return tuple(str(family) for family in found if family != RAW_PIXELS and not self._untrained(family))

    @cached_property
    def _evaluations(self) -> dict[str, dict[int, dict[str, float]]]:
        """Family -> round -> numbers of its evaluation, in the order of rounds."""
        found: dict[str, dict[int, dict[str, float]]] = {}
        for row in sorted(self.rows, key=lambda row: row["round"]):
            if row["scope"] == "eval" and row.get("family") is not None:
                found.setdefault(row["family"], {})[row["round"]] = numbers(flatten(row.get("metrics") or {}))
        return found

    def _untrained(self, family: str | None) -> bool:
        """Whether all that is known of the family is its evaluation of round 0, and the run went on."""
        if self.completed and family in (self.declared_family, *(self.summary.get("families") or {})):
            return False  # evaluated after the last round, whatever became of the row
        return family is not None and list(self._evaluations.get(family, {})) == [0] and self.rounds > 0

    @cached_property
    def eval(self) -> pd.DataFrame:
        """Rows of scope "eval": columns round, partition, family and one per metric that is a number."""
        return self._frame("eval")

    @cached_property
    def server(self) -> pd.DataFrame:
        """Rows of scope "server", likewise."""
        return self._frame("server")

    @cached_property
    def clients(self) -> pd.DataFrame:
        """Rows of scope "client", likewise."""
        return self._frame("client")

    def _frame(self, scope: str) -> pd.DataFrame:
        rows = [
            {"round": row["round"], "partition": row.get("partition"), "family": row.get("family")}
            | numbers(flatten(row.get("metrics") or {}))
            for row in self.rows
            if row["scope"] == scope
        ]
        return pd.DataFrame(rows, columns=None if rows else ["round", "partition", "family"])

    def evaluated(self, family: str | None, *, last: bool) -> dict[str, float]:
        """Numbers of the family's last evaluation, or of its first one if that is round 0; empty if there is none."""
        rounds = {} if family is None else self._evaluations.get(family, {})
        return next(reversed(rounds.values()), {}) if last else rounds.get(0, {})

    def final(self, family: str | None = None) -> dict[str, float]:
        """Metrics at the end, of the report family if none is named; of an unfinished run, at its last evaluation.

        Empty for a family that was evaluated before round 1 only, though the run went on.
        """
        family = family or self.report_family
        if self._untrained(family):
            return {}
        ours = family == self.report_family
        summary = (self.summary.get("families") or {}).get(family) or {}
        return self.evaluated(family, last=True) | numbers(summary) | (numbers(self.summary) if ours else {})

    def controls(self, family: str | None = None) -> dict[str, dict[str, float]]:
        """What the family must beat: itself before training, and its input; those of the two that were evaluated."""
        family = family or self.report_family
        found = {
            "random init": self.evaluated(family, last=False),
            "raw pixels": self.evaluated(RAW_PIXELS, last=True),
        }
        return {name: metrics for name, metrics in found.items() if metrics}

    def total(self, name: str) -> float | None:
        """`uplink_bytes` or another sum over rounds; of an unfinished run, so far. None where a round lacks it."""
        if isinstance(self.summary.get(name), int | float):
            return float(self.summary[name])
        if name not in self.server or self.server[name].isna().any():
            return None
        return float(self.server[name].sum())

    @cached_property
    def tasks(self) -> dict[str, int]:
        """How many client tasks ended how, each of `OUTCOMES`, over all rounds; empty where no round has a row."""
        ended = self._tasks_by_round
        return {kind: sum(counts[kind] for counts in ended) for kind in OUTCOMES if ended}

    @property
    def idle_rounds(self) -> int:
        """Rounds in which clients may be away and nobody was asked, of a strategy that has clients."""
        node, devices = self.config.get("strategy"), (self.config.get("federation") or {}).get("devices") or {}
        if not (isinstance(node, Mapping) and node.get("client") and devices.get("availability", 1) < 1):
            return 0
        return sum(not any(counts.values()) for counts in self._tasks_by_round)

    @cached_property
    def _tasks_by_round(self) -> list[dict[str, int]]:
        rounds = [row.get("metrics") or {} for row in self.rows if row["scope"] == "round"]
        return [{kind: int(row.get(f"num_{kind}") or 0) for kind in OUTCOMES} for row in rounds]

    @cached_property
    def never_merged(self) -> list[int]:
        """Partitions that were asked, and of which no round has merged an upload."""
        rounds = [row.get("metrics") or {} for row in self.rows if row["scope"] == "round"]
        asked = {f["partition"] for row in rounds for f in row.get("failures") or [] if f.get("kind") in OUTCOMES}
        return sorted(asked.difference(self.clients["partition"]))

    def num_clients(self, family: str) -> int | None:
        """Of which the family's number is the mean, or which trained it; None where nobody was asked, or knows."""
        if self.tasks and not any(self.tasks.values()):
            return None
        count = ((self.summary.get("families") or {}).get(family) or {}).get("num_clients")
        if count is None:
            count = self.clients.loc[self.clients["family"] == family, "partition"].nunique() or None
        return None if count is None else int(count)

    def client_values(self, family: str, name: str) -> dict[int, float]:
        """The metric of each client's own model of `family`: its last one, of the clients that have ever trained."""
        column = f"{family}/{name}"
        if column not in self.clients:
            return {}
        rows = self.clients.dropna(subset=[column, "partition"]).sort_values("round", kind="stable")
        rows = rows.drop_duplicates("partition", keep="last").sort_values("partition")
        return {int(partition): float(v) for partition, v in zip(rows["partition"], rows[column], strict=True)}

    def spent(self, cost: str) -> "pd.Series[float] | None":
        """What was spent by the end of each round, 0 at round 0; None where that is not known of every round.

        Args:
            cost: `uplink_bytes`, `seconds` (of rounds without their evaluation) or `simulated_seconds`.
        """
        if cost not in self.server:
            return None
        rows = self.server.drop_duplicates("round", keep="last").set_index("round").sort_index()
        values = rows[cost].astype(float)
        if cost == "seconds" and "seconds_evaluation" in rows:
            values = values - rows["seconds_evaluation"].fillna(0.0)
        if values.isna().any():
            return None
        return pd.concat([pd.Series({0: 0.0}), values.cumsum()])

    @cached_property
    def choices(self) -> dict[str, str]:
        """The flattened configuration without what is incidental: what makes two runs the same but for the seed."""
        return _settings(fill_in(self.config), drop=INCIDENTAL + INCIDENTAL_OF_DATA)

    @cached_property
    def conditions(self) -> dict[str, str]:
        """The flattened configuration without what has no consequence: what two runs of a comparison should share."""
        return _settings(fill_in(self.config), drop=INERT)

    @property
    def provenance(self) -> dict[str, str]:
        """Code and machine that it began on, as far as its manifest says; likewise."""
        return self.sittings[0]

    @cached_property
    def sittings(self) -> list[dict[str, str]]:
        """Of each sitting, the first one and those that went on with it, code and machine."""
        return [
            {key: str(value) for key, value in flatten(node).items() if covers(PROVENANCE, key)}
            for node in (self.manifest, *(self.manifest.get("resumed") or ()))
        ]

    @cached_property
    def setting(self) -> dict[str, str]:
        """What decides whether two runs' accuracies may be compared at all: images and probes."""
        part = {key: self.config.get(key) for key in ("data", "evaluate")}
        digests = {  # data.root says where images lie, these say what they are
            f"sha256 of {name}": str(digest)[:8]
            for name, digest in (self.manifest.get("data") or {}).items()
            if name != "public set"  # drawn anew with each seed
        }
        return {"data": self.data} | _settings(part, drop=INCIDENTAL_OF_DATA) | digests


def read_run(path: Path) -> Run:
    """The run in directory `path`.

    Raises:
        DataError: a file is missing or broken; the message names it.
    """
    config = _read(path / "config.yaml", yaml.safe_load)
    if not isinstance(config, dict):
        raise DataError(f"{path / 'config.yaml'} is missing or holds no mapping.")
    run = Run(
        path=path,
        config=config,
        summary=read_mapping(path / "summary.json"),
        manifest=read_mapping(path / "manifest.json"),
        rows=_read(path / "metrics.jsonl", _rows) or [],
        partition=_read_partition(path / "partition.npz"),
        public_map=_read_public_map(path / "public_map.npz"),
    )
    try:  # files may be whole and hold something else
        _check(run)
        _ = {run.seed}, run.final(), run.controls(), run.server, run.clients, run.choices, run.setting
        _ = run.tasks, run.idle_rounds, run.never_merged, run.conditions, run.sittings, flatten(run.summary)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise DataError(f"{path} holds something else than a run ({type(error).__name__}: {error}).") from error
    return run


def _check(run: Run) -> None:
    """That what is read by name is of its kind; of the rest only numbers are looked at.

    Raises:
        ValueError: an entry is not; the message names it.
    """
    summary, federation = run.summary, run.config.get("federation") or {}
    for name in ("status", "strategy", "data"):
        _expect(isinstance(summary.get(name, ""), str), f"{name} of summary.json", summary.get(name))
    for name in ("rounds", "uplink_bytes", "downlink_bytes"):
        _expect(_is_count(summary.get(name)), f"{name} of summary.json", summary.get(name))
    for name in ("wall_seconds", "simulated_seconds"):
        value = summary.get(name)
        _expect(value is None or numbers({name: value}).get(name, -1) >= 0, f"{name} of summary.json", value)
    seed = summary.get("seed", run.config.get("seed"))
    _expect(_is_count(seed), "seed", seed)
    family = summary.get("report_family")
    _expect(isinstance(family, str | None), "report_family of summary.json", family)
    notes, families = summary.get("notes"), summary.get("families")
    _expect(isinstance(notes, list | None), "notes of summary.json", notes)
    _expect(isinstance(families, dict | None), "families of summary.json", families)
    for family, metrics in {"": summary, **(families or {})}.items():
        where = f"{f'families.{family}' if family else 'metrics'} of summary.json"
        _expect(isinstance(metrics, dict), where, metrics)
        _expect(_is_count(metrics.get("num_clients")), f"num_clients, {where}", metrics.get("num_clients"))
        for name in metrics.keys() & METRICS.keys():
            _expect(metrics[name] is None or name in numbers(metrics), f"{name}, {where}", metrics[name])
    _expect(isinstance(federation, dict), "federation of config.yaml", federation)
    named = federation.get("families") or []
    _expect(isinstance(named, list) and all(isinstance(f, str) for f in named), "federation.families", named)
    _expect(_is_count(federation.get("num_clients")), "federation.num_clients", federation.get("num_clients"))
    family = federation.get("report_family")
    _expect(isinstance(family, str | None), "federation.report_family", family)
    for row in run.rows:
        _expect(_is_count(row["round"]) and row["round"] is not None, "a row's round", row["round"])
        _expect(_is_count(row.get("partition")), "a row's partition", row.get("partition"))
        _expect(isinstance(row.get("family"), str | None), "a row's family", row.get("family"))
        for name in COUNTED.get(row["scope"], ()):
            value = (row.get("metrics") or {}).get(name)
            _expect(_is_count(value), f"{name} of a row of scope {row['scope']}", value)


def _expect(fits: bool, what: str, value: Any) -> None:
    if not fits:
        raise ValueError(f"{what} is {str(value)[:40]!r}")


def _is_count(value: Any) -> bool:
    """Or nothing; what does not fit into 64 bits is none."""
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63)


def tell_apart(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """For each of several flat configurations, what sets it apart from the others: "dim=64, codec=Factor" or ""."""
    keys = varying(settings)
    short = {key: key.rpartition(".")[2] for key in keys}
    names: dict[str, str] = {}
    for key in keys:
        parents = key.split(".")[:-1]
        if short[key] == "_target_" and parents:
            names[key] = parents[-1]
        else:
            names[key] = short[key] if list(short.values()).count(short[key]) == 1 else key

    def text(setting: Mapping[str, str]) -> str:
        values = {key: setting.get(key, "unset") for key in keys}
        return ", ".join(
            f"{names[key]}={value.rpartition('.')[2] if key.endswith('_target_') else value}"
            for key, value in values.items()
        )

    return [text(setting) for setting in settings]


def varying(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys of several flat configurations that not all of them have alike.

    A strategy's YAML repeats settings from above (`strategy.client.local_epochs: ${client.local_epochs}`): these count
    once, under the name by which they are set.
    """
    keys = [key for key in dict.fromkeys(k for s in settings for k in s) if len({s.get(key) for s in settings}) > 1]

    def repeats(key: str, other: str) -> bool:
        alike = key.rpartition(".")[2] == other.rpartition(".")[2] and not covers(["strategy"], other)
        return alike and all(s[key] == s.get(other) for s in settings if key in s)

    return [key for key in keys if not (covers(["strategy"], key) and any(repeats(key, other) for other in keys))]


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The entries that are finite numbers."""
    return {
        key: float(value)
        for key, value in metrics.items()
        if isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)
    }


def _settings(config: Mapping[str, Any], *, drop: Sequence[str]) -> dict[str, str]:
    def incidental(key: str) -> bool:
        return key.rpartition(".")[2] == "seed" or covers(drop, key)

    return {
        key: "null" if value is None else str(value) for key, value in flatten(config).items() if not incidental(key)
    }


def _read(path: Path, parse: Any) -> Any:
    """What `parse` makes of the file's text; None where there is no file."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """The JSON file's object; empty where there is no file.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    found = _read(path, json.loads)
    if found is not None and not isinstance(found, dict):
        raise DataError(f"{path} holds no mapping.")
    return found or {}


def _rows(text: str) -> list[dict[str, Any]]:
    *lines, tail = text.split("\n")
    rows = [json.loads(line) for line in lines if line]
    with suppress(ValueError):  # a run that was killed, or is running, may leave half a line at the end; nowhere else
        rows += [json.loads(tail)] if tail else []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not {"round", "scope"} <= row.keys():
            raise ValueError(f"line {number} is no row with round and scope")
    return rows


def _read_partition(path: Path) -> Partition | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            counts, classes = arrays["counts"], tuple(map(str, arrays["classes"]))
            if counts.size == 0:
                counts, classes = np.diff(arrays["offsets"])[:, None], ("images",)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if counts.ndim != 2 or counts.shape[1] != len(classes):
        raise DataError(f"{path} holds counts of shape {counts.shape} for {len(classes)} classes.")
    return Partition(counts=counts, classes=classes)


def _read_public_map(path: Path) -> PublicMap | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            planes = {
                name: arrays[name].astype(float) for name in ("initial", "trained", "initial_shares", "trained_shares")
            }
            labels, classes, family = arrays["labels"], tuple(map(str, arrays["classes"])), str(arrays["family"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    n = len(planes["initial"])
    shapes = [planes[name].shape for name in ("initial", "trained", "initial_shares", "trained_shares")]
    labelled = labels.shape == (n,) and bool(np.all((labels >= 0) & (labels < len(classes))))
    if shapes != [(n, 2), (n, 2), (2,), (2,)] or not (labelled or labels.size == 0):
        raise DataError(f"{path} holds no two dimensions of {n} images: {shapes}, labels {labels.shape}.")
    return PublicMap(family=family, labels=labels, classes=classes, **planes)
