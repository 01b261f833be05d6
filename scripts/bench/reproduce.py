"""Measure a published row: `scripts/reproduce NAME`; called again it goes on where it was interrupted.

  scripts/reproduce --list                    what there is, and what has been measured
  scripts/reproduce NAME --data DIR           the row as published, on a GPU
  scripts/reproduce NAME --data DIR --cpu     its shrunken version, in minutes on two cores: for ordering only
  scripts/reproduce --table                   write the table in benchmarks/published.md anew
  scripts/reproduce --add FILE                take over results that scripts/gpu_acceptance brought (its rows.json)

A row runs as `fedssl` would (grid=in_process), in WORK/<row>. An interruption of any kind, a kill too, costs the round
it falls into; --seconds S starts no round after S seconds, nor one that would end later, as far as the last one tells.
The result is written when a run begins and when the command ends: `measured` and `holds` are null until the row is
whole, and `holds` always for a shrunken one.
Exit codes: 0 whole; 1 whole, and the published number is missed; 2 bad input; 4 stopped by --seconds; 130 interrupted.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from bench import rows
from bench.rows import Row, Table, load_table, read_results

from fedssl.config import compose
from fedssl.errors import ConfigError, FedSSLError

OK, MISSED, STOPPED, INTERRUPTED = 0, 1, 4, 130
OF_THE_SITTING = ("run_dir", "max_seconds", "grid", "device")  # may differ when a row goes on
KNN_AND_PROBE = ("knn_top1", "linear_top1")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One of a row's runs.

    Args:
        name: of its folder.
        config: composed; where it lies and until when are put in later.
        shard: the partition that it is about; None: all.
    """

    name: str
    config: Mapping[str, Any]
    shard: int | None


def effective(row: Row, table: Table, *, shrunken: bool) -> list[str]:
    """The row's overrides; of two for one key the later counts, in the earlier one's place."""
    given = [*row.overrides, *(table.cpu if shrunken else ()), *(row.cpu if shrunken else ()), "grid=in_process"]
    return list({override.split("=", 1)[0]: override for override in given}.values())


def composed(overrides: Sequence[str], data: str | None) -> dict[str, Any]:
    """The configuration of a run, its images looked for in `data`."""
    config = compose(overrides)
    if data is not None and "root" in config["data"]:
        config["data"]["root"] = data
    return config


def jobs_of(row: Row, table: Table, *, shrunken: bool, data: str | None, work: Path) -> list[Job]:
    """The runs of a row. A shard is a federation of one client whose partition is that client's of the whole one."""
    from fedssl.federation.setup import Setup

    overrides = effective(row, table, shrunken=shrunken)
    whole = composed(overrides, data)
    if row.shards is None:
        return [Job(name="run", config=whole, shard=None)]
    setup = Setup(whole)
    jobs = []
    for shard in row.shards:
        if not 0 <= shard < setup.federation.num_clients:
            raise ConfigError(
                f"row {row.name} has the shard {shard}; there are {setup.federation.num_clients}, counted from 0"
            )
        path = (work / f"shard-{shard}.npz").resolve()
        replace(setup.data, partitions=(setup.data.partitions[shard],), public_partition=None).save(path)
        alone = ("partition=file", f"partition.path='{path}'", "federation.num_clients=1")
        others = [o for o in overrides if not o.split("=")[0].startswith(("partition", "federation.families"))]
        family = f"federation.families=[{setup.federation.family(shard)}]"
        jobs.append(Job(name=f"shard-{shard}", config=composed([*others, *alone, family], data), shard=shard))
    return jobs


def advance(config: Mapping[str, Any], run_dir: Path, max_seconds: float | None) -> dict[str, Any]:
    """Start the run, go on with it, or read its summary if it is complete; returns what `summary.json` holds.

    Raises:
        ConfigError: the folder holds a run with other settings.
    """
    import fedssl
    from fedssl.federation import simulation

    saved = run_dir / "config.yaml"
    if not saved.is_file():
        shutil.rmtree(run_dir, ignore_errors=True)  # killed before it had begun
        return fedssl.run({**config, "run_dir": str(run_dir), "max_seconds": max_seconds})
    began = yaml.safe_load(saved.read_text())
    if differs := _differing(began, config):
        raise ConfigError(
            f"{run_dir} holds a run with another {', '.join(differs)}: the row or its preset has changed since. Delete "
            f"the folder to start anew, or name another with --work."
        )
    summary = run_dir / "summary.json"
    if summary.is_file() and json.loads(summary.read_text())["status"] == "completed":
        return dict(json.loads(summary.read_text()))
    goes_on = {**began, "max_seconds": max_seconds, "device": config["device"], "run_dir": str(run_dir)}
    if "root" in config["data"]:
        goes_on["data"] = {**began["data"], "root": config["data"]["root"]}
    return simulation.resume(goes_on, run_dir)


def _differing(began: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Top-level keys that differ, but for where the images lie and what the run chose itself."""

    def compared(side: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in side.items() if key not in OF_THE_SITTING}
        kept["data"] = {key: value for key, value in side["data"].items() if key != "root"}
        if config["federation"]["report_family"] is None:
            kept["federation"] = {**side["federation"], "report_family": None}
        kept["partition"] = {key: value for key, value in side["partition"].items() if key != "path"}
        return kept

    a, b = compared(began), compared(config)
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def rows_written(run_dir: Path, scope: str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl with this scope; half a line at its end, which a kill leaves, is none."""
    path = run_dir / "metrics.jsonl"
    written = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.is_file() else []
    return [row for row in written if row["scope"] == scope]


def last_round_seconds(run_dir: Path) -> float:
    """How long the newest finished round took; 0 where there is none."""
    return float(next((row["metrics"]["seconds"] for row in reversed(rows_written(run_dir, "server"))), 0.0))


def untrained(run_dir: Path, family: str, metric: str) -> float | None:
    """The metric of the family's initial weights; None where round 0 has no such row."""
    starts = [row for row in rows_written(run_dir, "eval") if row["round"] == 0 and row["family"] == family]
    return starts[0]["metrics"].get(metric) if starts else None


def state_of(job: Job, run_dir: Path, row: Row) -> dict[str, Any]:
    """A run's line in the result, whether it has ended or not."""
    summary: dict[str, Any] = {}
    if (run_dir / "summary.json").is_file():
        summary = json.loads((run_dir / "summary.json").read_text())
    whole = summary.get("status") == "completed"
    if whole and row.metric not in summary:
        raise ConfigError(f"row {row.name}: the run has no metric {row.metric!r}; it has {', '.join(summary)}")
    return {
        "shard": job.shard,
        "status": summary.get("status", "not started" if not run_dir.is_dir() else "interrupted"),
        "rounds": summary.get("rounds", rounds_kept(run_dir)),
        "num_rounds": job.config["federation"]["num_rounds"],
        "measured": summary[row.metric] if whole else None,
        "untrained": untrained(run_dir, summary["report_family"], row.metric) if whole else None,
        "metrics": {name: summary[name] for name in KNN_AND_PROBE if name in summary} if whole else {},
        "seconds": summary.get("wall_seconds", 0.0),
    }


def rounds_kept(run_dir: Path) -> int:
    """The round of the newest checkpoint; 0 where there is none."""
    return max((int(path.name) for path in (run_dir / "checkpoints").glob("[0-9]*") if path.name.isdigit()), default=0)


def copy_of(config: Mapping[str, Any]) -> str:
    """ "jpeg" where the images come as JPEG in parquet files, else "as published"."""
    from fedssl.data.parquet import IMAGE_COLUMNS, parquet_files

    node = config["data"]
    if "root" not in node:
        return "as published"
    root = Path(node["root"]).expanduser()
    files = parquet_files(root / node["name"], "train") or parquet_files(root, "train")
    if not files:
        return "as published"
    import pyarrow.parquet

    first = next(pyarrow.parquet.ParquetFile(files[0]).iter_batches(batch_size=1)).to_pylist()[0]
    image = next((first[column] for column in IMAGE_COLUMNS if column in first), {"bytes": b""})
    return "jpeg" if image["bytes"][:2] == b"\xff\xd8" else "as published"


def settled_copy(jobs: Sequence[Job], work: Path) -> str:
    """`copy_of` the images that the row began with: a later call may name others, when all is trained."""
    path = work / "copy"
    if not path.is_file():
        path.write_text(copy_of(jobs[0].config))
    return path.read_text()


def _images(manifest: Mapping[str, Any]) -> dict[str, str]:
    """sha256 by image set, without the public set, which may be drawn anew."""
    return {name: digest for name, digest in (manifest.get("data") or {}).items() if name != "public set"}


def result_of(row: Row, table: Table, jobs: Sequence[Job], work: Path, *, shrunken: bool) -> dict[str, Any]:
    """What the JSON holds."""
    runs = [state_of(job, work / job.name, row) for job in jobs]
    values = [run["measured"] for run in runs]
    measured = mean(values) if None not in values else None
    copy = settled_copy(jobs, work)
    tolerance = row.tolerance_jpeg if copy == "jpeg" else row.tolerance
    holds = None
    if not shrunken and measured is not None and row.expected is not None and tolerance is not None:
        holds = abs(measured - row.expected) <= tolerance
    manifests = [work / job.name / "manifest.json" for job in jobs]
    found = [json.loads(path.read_text()) for path in manifests if path.is_file()]
    began = found[0] if found else {}
    if any(_images(manifest) != _images(began) for manifest in found):
        raise ConfigError(
            f"the runs in {work} were trained on different images (sha256 in their manifest.json): delete those of the "
            f"wrong copy, or name another folder with --work."
        )
    return {
        "name": row.name,
        "what": row.what,
        "source": row.source,
        "shrunken": shrunken,
        "overrides": effective(row, table, shrunken=shrunken),
        "metric": row.metric,
        "expected": row.expected,
        "tolerance": tolerance,
        "copy": copy,
        "measured": measured,
        "holds": holds,
        "runs": runs,
        "beside": row.beside,
        "seed": jobs[0].config["seed"],
        "seconds": sum(run["seconds"] for run in runs),
        "data_sha256": began.get("data", {}),
        "hardware": began.get("hardware", {}),
        "commit": began.get("git"),
        "versions": began.get("versions", {}),
    }


def reproduce(
    row: Row, table: Table, *, shrunken: bool, data: str | None, work: Path, seconds: float | None, output: Path
) -> int:
    """Go on with the row and write its result to `output`; returns the exit code."""
    from fedssl.tracking import write_json

    started = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    jobs = jobs_of(row, table, shrunken=shrunken, data=data, work=work)
    output.parent.mkdir(parents=True, exist_ok=True)

    def written() -> dict[str, Any]:
        result = result_of(row, table, jobs, work, shrunken=shrunken)
        write_json(output, result)
        return result

    code = OK
    try:
        for job in jobs:
            written()  # a kill leaves this one
            left = None
            if seconds is not None:
                left = seconds - (time.monotonic() - started) - last_round_seconds(work / job.name)
            if left is not None and left <= 0 and state_of(job, work / job.name, row)["measured"] is None:
                code = STOPPED
                break
            if advance(job.config, work / job.name, left)["status"] != "completed":
                code = STOPPED
                break
    except KeyboardInterrupt:
        code = INTERRUPTED
    finally:
        result = written()
    print(f"{row.name}: {_said(result)} ({output})")
    return MISSED if code == OK and result["holds"] is False else code


def _said(result: Mapping[str, Any]) -> str:
    if result["measured"] is None:
        return f"{rows.progress(result)}; call again to go on"
    against = "nothing published" if result["expected"] is None else f"published {rows.percent(result['expected'])}"
    verdict = "shrunken, so not comparable" if result["shrunken"] else rows.verdict(result)
    return f"{result['metric']} {rows.percent(result['measured'])}, {against}: {verdict}"


def show(table: Table) -> None:
    """The table, as plain text."""
    results = read_results(table, rows.RESULTS)
    cells = [rows.HEAD, *rows.lines(table, results)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(rows.HEAD))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(*rows.ordering_lines(table, results), sep="\n")


def add(path: Path, table: Table) -> None:
    """Write the results in `path` (by file name) to benchmarks/results, whole ones only."""
    from fedssl.tracking import write_json

    known = {row.file(shrunken) for row in table.rows.values() for shrunken in (False, True)}
    try:
        brought = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the results in {path}: {error}") from error
    for name, result in brought.items():
        if name not in known:
            raise ConfigError(f"{path} has a result {name}, which is of no row in benchmarks/rows.yaml")
        if rows.is_measured(result):
            write_json(rows.RESULTS / name, result)
        print(f"{name}: {'added' if rows.is_measured(result) else 'unfinished, left out'}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="a row of benchmarks/rows.yaml")
    parser.add_argument("--list", action="store_true", help="show all rows and end")
    parser.add_argument("--table", action="store_true", help="write benchmarks/published.md anew and end")
    parser.add_argument("--add", type=Path, metavar="FILE", help="take over results and end")
    parser.add_argument("--data", metavar="DIR", help="data.root (default: as in conf/data)")
    parser.add_argument("--cpu", action="store_true", help="the shrunken version")
    parser.add_argument("--work", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--seconds", type=float, metavar="S", help="of this sitting (default: no limit)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="(benchmarks/results/reproduce-NAME.json)")
    parser.add_argument("--rows", type=Path, default=rows.ROWS, metavar="FILE", help="(benchmarks/rows.yaml)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    args = parse(argv)
    try:
        table = load_table(args.rows)
        if args.list:
            show(table)
        elif args.table:
            rows.PAGE.write_text(rows.rendered(rows.PAGE.read_text(), table, read_results(table, rows.RESULTS)))
        elif args.add:
            add(args.add, table)
        elif args.name is None:
            raise ConfigError(f"name a row: {', '.join(table.rows)}; or --list, --table, --add FILE")
        else:
            return _measure(args, table)
    except FedSSLError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    return OK


def _measure(args: argparse.Namespace, table: Table) -> int:
    row = table.row(args.name)
    if args.seconds is not None and not args.seconds > 0:
        raise ConfigError(f"--seconds must be above 0, got {args.seconds}")
    if not args.cpu:
        import torch

        on_cpu = "device=cpu" in row.overrides
        if not (on_cpu or torch.cuda.is_available()):
            raise ConfigError(
                f"torch sees no GPU here, and {row.name} would take days without: add --cpu for its shrunken version"
            )
    label = row.name + ("-cpu" if args.cpu else "")
    return reproduce(
        row,
        table,
        shrunken=args.cpu,
        data=args.data,
        work=args.work / label,
        seconds=args.seconds,
        output=args.output or rows.RESULTS / row.file(args.cpu),
    )
