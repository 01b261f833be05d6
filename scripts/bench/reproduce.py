"""Measure a published row: `scripts/reproduce NAME`; called again it goes on where it was interrupted.

  scripts/reproduce --list                    what there is, and what has been measured
  scripts/reproduce NAME --data DIR           the row as published, on a GPU
  scripts/reproduce NAME --data DIR --cpu     its shrunken version, in minutes on two cores: for ordering only
  scripts/reproduce --table                   write the tables in benchmarks/published.md and README.md anew
  scripts/reproduce --add FILE                take over results that scripts/gpu_acceptance brought (its rows.json)

A row runs as `fedssl` would (grid=in_process), in WORK/<row>. An interruption of any kind, a kill too, costs the round
it falls into, or, where clients work long (federation.keep_replies_after), only that client's work. --seconds S starts
nothing of which earlier rounds, of this run or of another shard, say that it would end later, and what still runs then
is interrupted. An attempt that got nowhere is remembered in the result: with no more seconds it is not made again.
The completed runs of an unfinished result are not made again where WORK has gone, as between machines that are lent;
without WORK and the result a row starts anew.
A row that is whole is measured again only with --again, which goes on if it is interrupted and called again; the result
that is there stays until the new one has as many complete runs. So does one of other settings.
The result is written when a run begins and when the command ends: `measured` and `holds` are null until the row is
whole, and `holds` always for a shrunken one; `machines` are all that had a part in it. Rows can be measured at the same
time in one WORK; a second process on the same row ends with exit code 2.
Exit codes: 0 whole; 1 whole, and the published number is missed; 2 bad input; 4 stopped by --seconds; 130 interrupted.
"""

import argparse
import contextlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from bench import rows
from bench.rows import Row, Table, load_table, read_results

from fedssl.config import compose, fill_in
from fedssl.errors import ConfigError, DataError, FedSSLError
from fedssl.lock import held
from fedssl.settings import flatten, of_every_sitting

OK, MISSED, STOPPED, INTERRUPTED = 0, 1, 4, 130
ABSENT = "(absent)"
UNKNOWN = "unknown"  # the copy of images that were not read
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


def composed(overrides: Sequence[str], data: str | None) -> dict[str, Any]:
    """The configuration of a run, its images looked for in `data`."""
    config = compose(overrides)
    if data is not None and "root" in config["data"]:
        config["data"]["root"] = data
    return config


def jobs_of(row: Row, table: Table, *, shrunken: bool, data: str | None, work: Path) -> list[Job]:
    """The runs of a row. A shard is a federation of one client whose partition is that client's of the whole one."""
    from fedssl.federation.setup import Setup

    overrides = table.overrides(row, shrunken=shrunken)
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
            f"{run_dir} holds a run with {'; '.join(differs)}: the row or its preset has changed since. Delete the "
            f"folder to start anew, or name another with --work."
        )
    if (summary := summary_of(run_dir)).get("status") == "completed":
        return summary
    goes_on = {**began, "max_seconds": max_seconds, "device": config["device"], "run_dir": str(run_dir)}
    keep_after = config["federation"]["keep_replies_after"]
    goes_on["federation"] = {**began["federation"], "keep_replies_after": keep_after}
    if "root" in config["data"]:
        goes_on["data"] = {**began["data"], "root": config["data"]["root"]}
    return simulation.resume(goes_on, run_dir)


def _differing(began: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Settings that differ, with both values.

    None are those of a sitting, those that the run chose itself, and those that came after it began and that it has as
    conf/as_before.yaml says.
    """
    chosen = config["federation"]["report_family"] is None

    def compared(side: Mapping[str, Any]) -> dict[str, Any]:
        federation = {"num_rounds": side["federation"]["num_rounds"]}
        federation |= {} if chosen else {"report_family": side["federation"]["report_family"]}
        flat = flatten(of_every_sitting(side)) | flatten({"federation": federation})
        return {key: value for key, value in flat.items() if key != "partition.path"}

    was, now, before = (compared(side) for side in (fill_in(began), config, fill_in(config, over=True)))
    return [
        f"{key} {was.get(key, ABSENT)} and not {now.get(key, ABSENT)}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key, ABSENT) not in (now.get(key, ABSENT), before.get(key, ABSENT))
    ]


def summary_of(run_dir: Path) -> dict[str, Any]:
    """What summary.json holds; {} where there is none.

    Raises:
        ConfigError: it is damaged.
    """
    path = run_dir / "summary.json"
    summary = rows.read_json(path) if path.is_file() else {}
    if path.is_file() and not (isinstance(summary, dict) and {"status", "wall_seconds"} <= summary.keys()):
        raise ConfigError(f"{path} is no summary of a run. Delete it: the run goes on from its newest checkpoint.")
    return dict(summary)


def rows_written(run_dir: Path, scope: str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl with this scope; half a line at its end, which a kill leaves, is none."""
    path = run_dir / "metrics.jsonl"
    written = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.is_file() else []
    return [row for row in written if row["scope"] == scope]


def longest_piece(run_dir: Path, keep_after: float | None) -> float:
    """Seconds of the newest finished round that an interruption can cost, 0 where there is none.

    That is the round, or, where replies were kept, the longest client, the short ones or the server's part.
    """
    servers = rows_written(run_dir, "server")
    if not servers:
        return 0.0
    server = servers[-1]["metrics"]
    clients = [
        sum(value for key, value in row["metrics"].items() if _is_work(key, value))
        for row in rows_written(run_dir, "client")
        if row["round"] == servers[-1]["round"]
    ]
    whole = float(server["seconds"])
    if keep_after is None or not sum(clients) or max(clients) < keep_after:
        return whole
    beside = server["seconds_clients"] / sum(clients)  # what they do beside training, and do not state
    short = sum(seconds for seconds in clients if seconds < keep_after)
    pieces = (beside * (max(clients) + short), server["seconds_aggregation"] + server["seconds_evaluation"])
    return min(whole, float(max(pieces)))


def _is_work(name: str, value: object) -> bool:
    """As `fedssl.federation.replies.stated_seconds` counts."""
    return isinstance(value, int | float) and (
        name == "seconds" or (name.endswith("_seconds") and name != "simulated_seconds")
    )


def seconds_needed(job: Job, jobs: Sequence[Job], work: Path) -> float:
    """What has to be left so that the run gets on, by its own last round or that of another shard; 0: unknown."""
    keep_after = job.config["federation"]["keep_replies_after"]
    if own := longest_piece(work / job.name, keep_after):
        return own
    for other in reversed(jobs):
        summary = summary_of(work / other.name)
        if summary and (piece := longest_piece(work / other.name, keep_after)):
            rounds = sum(row["metrics"]["seconds"] for row in rows_written(work / other.name, "server"))
            return piece + max(0.0, summary["wall_seconds"] - rounds)  # its start
    return 0.0


class OutOfTime(KeyboardInterrupt):
    """What still ran at --seconds."""


@contextlib.contextmanager
def interrupted_after(seconds: float | None) -> Iterator[None]:
    """Raise `OutOfTime` inside, after so many seconds (None: never)."""
    if seconds is None:
        yield
        return

    def end(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def untrained(run_dir: Path, family: str, metric: str) -> float | None:
    """The metric of the family's initial weights; None where round 0 has no such row."""
    starts = [row for row in rows_written(run_dir, "eval") if row["round"] == 0 and row["family"] == family]
    return starts[0]["metrics"].get(metric) if starts else None


def state_of(job: Job, run_dir: Path, row: Row) -> dict[str, Any]:
    """A run's line in the result, whether it has ended or not."""
    summary = summary_of(run_dir)
    whole = summary.get("status") == "completed"
    if whole and row.metric not in summary:
        raise ConfigError(f"row {row.name}: the run has no metric {row.metric!r}; it has {', '.join(summary)}")
    return {
        "shard": job.shard,
        "status": summary.get("status", "not started" if not run_dir.is_dir() else "interrupted"),
        "rounds": max(summary.get("rounds", 0), rounds_kept(run_dir)),
        "replies": 0 if whole else len(list((run_dir / "checkpoints" / "replies").glob("[0-9]*.reply"))),
        "num_rounds": job.config["federation"]["num_rounds"],
        "measured": summary[row.metric] if whole else None,
        "untrained": untrained(run_dir, summary["report_family"], row.metric) if whole else None,
        "metrics": {name: summary[name] for name in KNN_AND_PROBE if name in summary} if whole else {},
        "seconds": max(summary.get("wall_seconds", 0.0), seconds_kept(run_dir)),
    }


def rounds_kept(run_dir: Path) -> int:
    """The round of the newest checkpoint; 0 where there is none."""
    return max((int(path.name) for path in (run_dir / "checkpoints").glob("[0-9]*") if path.name.isdigit()), default=0)


def seconds_kept(run_dir: Path) -> float:
    """What the newest checkpoint says that the run took until then; 0 where there is none."""
    path = run_dir / "checkpoints" / f"{rounds_kept(run_dir):05d}" / "progress.json"
    return float(rows.read_json(path)["wall_seconds"]) if path.is_file() else 0.0


def copy_of(config: Mapping[str, Any]) -> str:
    """ "jpeg" where the images are JPEG in parquet files, `UNKNOWN` where no folder is, else "as published"."""
    from fedssl.data.parquet import IMAGE_COLUMNS, parquet_files

    node = config["data"]
    if "root" not in node:
        return "as published"
    root = Path(node["root"]).expanduser()
    if not root.is_dir():
        return UNKNOWN
    files = parquet_files(root / node["name"], "train") or parquet_files(root, "train")
    if not files:
        return "as published"
    import pyarrow.parquet

    first = next(pyarrow.parquet.ParquetFile(files[0]).iter_batches(batch_size=1)).to_pylist()[0]
    image = next((first[column] for column in IMAGE_COLUMNS if column in first), {"bytes": b""})
    return "jpeg" if image["bytes"][:2] == b"\xff\xd8" else "as published"


def settled_copy(jobs: Sequence[Job], work: Path, digests: Mapping[str, str], before: Mapping[str, Any]) -> str:
    """`copy_of` the images with these sha256, as `before` or WORK has it; `UNKNOWN` as long as none were read.

    A run names the folder that it read; a later call may name another, when all is trained.
    """
    from fedssl.tracking import write_json

    path = work / "copy.json"
    for known in (before, rows.read_json(path) if path.is_file() else {}):
        if known and known["copy"] != UNKNOWN and rows.images(known["data_sha256"]) == rows.images(digests):
            return str(known["copy"])
    for run_dir in (work / job.name for job in jobs):
        if (run_dir / "manifest.json").is_file() and (
            copy := copy_of(yaml.safe_load((run_dir / "config.yaml").read_text()))
        ) != UNKNOWN:
            write_json(path, {"copy": copy, "data_sha256": digests})
            return copy
    return UNKNOWN


def earlier(output: Path) -> dict[str, Any]:
    """The result that is there; {} where there is none.

    Raises:
        ConfigError: it is damaged.
    """
    return rows.checked(rows.read_json(output), str(output)) if output.is_file() else {}


def this_machine() -> dict[str, Any]:
    """Hardware, commit and versions of this process."""
    from fedssl.tracking import manifest

    return _machine(manifest({}, data={}))


def _machine(sitting: Mapping[str, Any]) -> dict[str, Any]:
    """Of a manifest, or of one of the sittings that it lists as `resumed`."""
    return {"hardware": sitting["hardware"], "commit": sitting["git"], "versions": sitting["versions"]}


def result_of(
    row: Row,
    table: Table,
    jobs: Sequence[Job],
    work: Path,
    *,
    shrunken: bool,
    attempts: Mapping[str, Sequence[Mapping[str, Any]]],
    machines: Sequence[Mapping[str, Any]],
    done: Mapping[str, Mapping[str, Any]],
    before: Mapping[str, Any],
) -> dict[str, Any]:
    """What the JSON holds: of `attempts`, by job, those that left the run where it is; of `machines` each once.

    `done` are the runs, by job, that are taken as the result `before` has them.
    """
    runs = [dict(done[job.name]) if job.name in done else state_of(job, work / job.name, row) for job in jobs]
    for job, run in zip(jobs, runs, strict=True):
        where = None if run["status"] == "completed" else (run["rounds"], run["replies"])
        run["attempts"] = [a for a in attempts.get(job.name, ()) if (a["rounds"], a["replies"]) == where]
    values = [run["measured"] for run in runs]
    measured = mean(values) if None not in values else None
    manifests = [work / job.name / "manifest.json" for job in jobs]
    found = [rows.read_json(path) for path in manifests if path.is_file()]
    data = [*([before["data_sha256"]] if done else []), *(manifest["data"] for manifest in found)]
    if any(rows.images(other) != rows.images(data[0]) for other in data):
        raise ConfigError(
            f"the runs in {work} and its result were trained on different images (sha256 in their manifest.json): "
            f"delete those of the wrong copy, or name another folder with --work."
        )
    known: list[Mapping[str, Any]] = []
    sittings = [sitting for manifest in found for sitting in (manifest, *manifest.get("resumed", ()))]
    for machine in (*machines, *map(_machine, sittings)):
        if machine not in known:
            known.append(machine)
    config = jobs[0].config
    result = {
        "name": row.name,
        "what": row.what,
        "source": row.source,
        "shrunken": shrunken,
        "overrides": table.overrides(row, shrunken=shrunken),
        "settings": rows.settings_digest(tuple(table.overrides(row, shrunken=shrunken))),
        "metric": row.metric,
        "epochs": config["federation"]["num_rounds"] * config["client"]["local_epochs"],
        "expected": row.expected,
        "copy": settled_copy(jobs, work, data[0], before) if data else UNKNOWN,
        "measured": measured,
        "runs": runs,
        "beside": None,
        "seed": config["seed"],
        "seconds": sum(run["seconds"] for run in runs),
        "data_sha256": data[0] if data else {},
        "machines": known,
    }
    return of_today(row, table, result)


def of_today(row: Row, table: Table, result: Mapping[str, Any]) -> dict[str, Any]:
    """The result with what it is compared with now: what the row says, and what has been measured beside it."""
    names = [table.row(row.beside).file(result["shrunken"])] if row.beside else []
    beside = rows.beside_of(table, row, result, read_results(table, rows.RESULTS, names=names))
    result = {**result, "what": row.what, "source": row.source, "expected": row.expected, "beside": beside}
    return {**result, "tolerance": row.tolerance_of(result), "holds": row.holds(result)}


def reproduce(
    row: Row,
    table: Table,
    *,
    shrunken: bool,
    data: str | None,
    work: Path,
    seconds: float | None,
    output: Path,
    again: bool = False,
) -> int:
    """Go on with the row and write its result to `output`; returns the exit code."""
    from fedssl.tracking import write_json

    started = time.monotonic()
    there = earlier(output)
    num_there = sum(run["measured"] is not None for run in there.get("runs", ()))
    before = there if there and there["shrunken"] == shrunken and table.is_of(row, there) and not again else {}
    if rows.is_measured(before or None):
        if (result := of_today(row, table, before)) != before:
            write_json(output, result)
        print(f"{row.name}: measured already, {_said(row, result)} ({output}); --again measures it anew")
        return MISSED if result["holds"] is False else OK
    jobs = jobs_of(row, table, shrunken=shrunken, data=data, work=work)
    complete = {job.name for job in jobs if summary_of(work / job.name).get("status") == "completed"}
    if again and len(complete) == len(jobs):
        raise ConfigError(
            f"{work} holds {row.name} whole: delete it, or name another folder with --work, to begin anew"
        )
    runs = dict(zip((job.name for job in jobs), before.get("runs", ()), strict=bool(before)))
    attempts = {name: list(run.get("attempts", ())) for name, run in runs.items()}
    done = {name: run for name, run in runs.items() if run["status"] == "completed" and name not in complete}
    goes_on = done or any((work / job.name).is_dir() for job in jobs)
    machines = list(before.get("machines", ())) if goes_on else []

    def written() -> dict[str, Any]:
        result = result_of(
            row, table, jobs, work, shrunken=shrunken, attempts=attempts, machines=machines, done=done, before=before
        )
        if rows.num_completed(result) >= num_there and (there or result["machines"] or any(attempts.values())):
            write_json(output, result)
        return result

    code = OK
    begun = started  # what was spent before its first run counts as that run's
    try:
        for job, run in zip(jobs, written()["runs"], strict=True):
            if job.name in done:
                continue
            if run["status"] == "completed":
                advance(job.config, work / job.name, None)  # nothing to do, but it refuses a run with other settings
                continue
            left = None if seconds is None else seconds - (time.monotonic() - started)
            offered = None if seconds is None else seconds - (begun - started)
            needed = seconds_needed(job, jobs, work)
            attempt = {"rounds": run["rounds"], "replies": run["replies"], "seconds": offered}
            if left is not None and offered is not None and (left <= needed or offered <= rows.tried(run)):
                if left <= 0 and begun == started and offered > rows.tried(run):
                    attempts.setdefault(job.name, []).append(attempt)  # all was spent before it began
                code = STOPPED
                break
            attempts.setdefault(job.name, []).append(attempt)
            machines.append(this_machine())
            written()  # a kill leaves this one
            try:
                with interrupted_after(left):
                    status = advance(job.config, work / job.name, None if left is None else left - needed)["status"]
            except Exception:
                if not (work / job.name / "manifest.json").is_file():  # no image was read, so this was no attempt
                    attempts[job.name].remove(attempt)
                    machines.pop()
                    if not there and not machines:
                        output.unlink(missing_ok=True)
                raise
            finally:
                attempt["seconds"] = time.monotonic() - begun
                begun = time.monotonic()
            if status != "completed":
                code = STOPPED
                break
    except OutOfTime:
        code = STOPPED
    except KeyboardInterrupt:
        code = INTERRUPTED
    finally:
        result = written()
    kept = rows.num_completed(result) < num_there
    where = f"{output} keeps its result until this one has as many complete runs" if kept else str(output)
    print(f"{row.name}: {_said(row, result)} ({where})")
    return MISSED if code == OK and result["holds"] is False else code


def _said(row: Row, result: Mapping[str, Any]) -> str:
    if result["measured"] is None:
        again = "call again with more time" if any(map(rows.tried, result["runs"])) else "call again to go on"
        return f"{rows.progress(result)}; {again}"
    against = "nothing published" if result["expected"] is None else f"published {rows.percent(result['expected'])}"
    verdict = "shrunken, so not comparable" if result["shrunken"] else rows.verdict(row, result)
    return f"{result['metric']} {rows.percent(result['measured'])}, {against}: {verdict}"


def show(table: Table) -> None:
    """The table, as plain text."""
    results = read_results(table, rows.RESULTS)
    for cells in (
        [rows.HEAD, *rows.lines(table, results)],
        [rows.ORDERING_HEAD, *rows.ordering_lines(table, results)],
    ):
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        print()


def add(path: Path, table: Table) -> None:
    """Write the results in `path` (by file name) to benchmarks/results: those with the rows' settings of today.

    One that is not whole is taken over where a run of it is complete, and goes on from there.

    Raises:
        ConfigError: the file, or one of its results, is none; then nothing is written.
    """
    from fedssl.tracking import write_json

    known = table.files
    brought = rows.read_json(path)
    if not isinstance(brought, dict):
        raise ConfigError(f"{path} must hold a mapping of file names to results, as the rows.json of gpu_acceptance")
    for name, result in brought.items():
        if name not in known:
            raise ConfigError(f"{path} has a result {name}, which is of no row in benchmarks/rows.yaml")
        rows.checked(result, f"{name} in {path}")
    there = read_results(table, rows.RESULTS)
    for name, result in brought.items():
        row = known[name]
        if not (rows.num_completed(result) or result.get("changed")):
            print(f"{name}: no run of it is complete, left out")
        elif result.get("changed") or name != row.file(result["shrunken"]) or not table.is_of(row, result):
            print(f"{name}: made with other settings than the row has now, left out")
        elif rows.num_completed(result) < rows.num_completed(there.get(name)):
            print(f"{name}: {rows.RESULTS / name} has more, left out")
        else:
            write_json(rows.RESULTS / name, result)
            print(f"{name}: added" + ("" if rows.is_measured(result) else f", {rows.progress(result)}"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="a row of benchmarks/rows.yaml")
    parser.add_argument("--list", action="store_true", help="show all rows and end")
    parser.add_argument("--table", action="store_true", help="write the tables of the pages anew and end")
    parser.add_argument("--add", type=Path, metavar="FILE", help="take over results and end")
    parser.add_argument("--data", metavar="DIR", help="data.root (default: as in conf/data)")
    parser.add_argument("--cpu", action="store_true", help="the shrunken version")
    parser.add_argument("--again", action="store_true", help="measure anew what is whole")
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
            results = read_results(table, rows.RESULTS)
            for page, text in rows.pages(table, results).items():
                page.write_text(rows.rendered(page.read_text(), text))
        elif args.add:
            add(args.add, table)
        elif args.name is None:
            raise ConfigError(f"name a row: {', '.join(table.rows)}; or --list, --table, --add FILE")
        else:
            return _measure(args, table)
    except FedSSLError as error:
        hint = f" {rows.ROOT_IS_DATA}" if isinstance(error, DataError) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
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
    work = args.work / (row.name + ("-cpu" if args.cpu else ""))
    output = args.output or rows.RESULTS / row.file(args.cpu)
    for option, folder in (("--work", work), ("-o", output.parent)):
        rows.make_folder(folder, option)
    if output.is_dir():
        raise ConfigError(f"-o {output} is a folder; name the file that the result is written to")
    with (
        held(work, str(work), "wait until it has ended, or name another folder with --work"),
        held(
            output.parent,
            str(output),
            "wait until it has ended, or name another file with -o",
            name=f".{output.name}.lock",
        ),
    ):
        return reproduce(
            row,
            table,
            shrunken=args.cpu,
            data=args.data,
            work=work,
            seconds=args.seconds,
            output=output,
            again=args.again,
        )
