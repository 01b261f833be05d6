"""`fedssl-report` and the report of one run: tables and pictures on self-contained HTML pages.

The numbers are what run directories hold; nothing is computed again. A page needs no other file and no network.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedssl.errors import ConfigError, DataError, FedSSLError
from fedssl.report.comparison import Comparison
from fedssl.report.found import find_jobs, find_runs, is_run, without_runs
from fedssl.report.pages import plural
from fedssl.report.run_page import run_page
from fedssl.report.runs import Run, read_run
from fedssl.report.sections import sort_runs
from fedssl.tracking import write_text


def write_run_report(run_dir: Path, siblings: Sequence[Path] = ()) -> Path:
    """Write `run_dir/report.html`, finished or not, and return its path.

    Args:
        run_dir: a run directory.
        siblings: other run directories of the same sweep, in any state; the completed ones on the same data and
            probes become control rows.

    Raises:
        DataError: a file of `run_dir` is missing or broken. Broken siblings are left out.
    """
    others: list[Run] = []
    for path in siblings:
        if path.resolve() != run_dir.resolve():
            try:
                others.append(read_run(path))
            except DataError:
                continue
    page = run_page(read_run(run_dir), others)
    write_text(run_dir / "report.html", page)
    return run_dir / "report.html"


def compare(runs: Sequence[Path], out: Path, *, keys: Sequence[str] = (), against: str | None = None) -> Comparison:
    """Write `results.csv`, `results.md` and `report.html` about all runs at or below `runs` into the folder `out`.

    Args:
        runs: run directories, or folders that hold some.
        out: made where it is not there.
        keys: the settings that are meant to differ; none: see `sort_runs`.
        against: the group or strategy that paired differences are taken from; None: the best group.

    Raises:
        ConfigError: a path is missing, holds no run, or `out` cannot be a folder or is in one of a run; or no run has
            such a key or group.
    """
    found, broken = find_runs(runs)
    _check_out(out, [*(run.path for run in found), *broken])
    jobs, unread = find_jobs(runs, [run.path for run in found], broken)
    comparison = Comparison(
        runs=found,
        broken=broken | unread | without_runs(runs),
        jobs=jobs,
        sections=sort_runs(found, keys),
        against=against,
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"-o {out} cannot be made a folder: {error.strerror}. Name another one.") from error
    write_text(out / "results.csv", comparison.frame().to_csv(index=False))
    write_text(out / "results.md", comparison.markdown())
    write_text(out / "report.html", comparison.page(out))
    return comparison


def _check_out(out: Path, runs: Sequence[Path]) -> None:
    """A run's directory keeps its own report.html; `runs` are read, and `out` may be another."""
    within = {out.resolve(), *out.resolve().parents}
    run = next((path for path in runs if path.resolve() in within), out if is_run(out) else None)
    if run is not None:
        raise ConfigError(
            f"-o {out} lies in the run directory {run}, whose files stay as they are. Name another folder."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command `fedssl-report`; returns its exit code."""
    parser = argparse.ArgumentParser(prog="fedssl-report", description="Compare runs: a table, a page, a CSV.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, or folders that hold some")
    parser.add_argument("-o", "--out", required=True, type=Path, metavar="DIR", help="where the comparison goes")
    parser.add_argument("--against", metavar="STRATEGY", help="paired differences from it; default: the best group")
    parser.add_argument(
        "--compare",
        metavar="KEY,...",
        default="",
        help="settings that are meant to differ, e.g. client.local_epochs; default: strategy, or where all have the "
        "same the one that differs",
    )
    arguments = parser.parse_args(argv)
    keys = [key.strip() for key in arguments.compare.split(",") if key.strip()]
    try:
        comparison = compare(arguments.runs, arguments.out, keys=keys, against=arguments.against)
    except FedSSLError as error:
        print(f"fedssl-report: {error}", file=sys.stderr)
        return error.exit_code
    for reason in comparison.broken.values():
        print(f"skipped: {reason}", file=sys.stderr)
    for job in comparison.jobs:
        print(f"no run: {job}", file=sys.stderr)
    print(comparison.summary())
    print(f"\n{plural(len(comparison.runs), 'run')}: {arguments.out / 'report.html'}, results.md, results.csv")
    return 0
