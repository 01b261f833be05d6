"""`fedssl-report` and the report of one run: tables and pictures on self-contained HTML pages.

The numbers are what run directories hold; nothing is computed again. A page needs no other file and no network.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedssl.errors import ConfigError, DataError, FedSSLError
from fedssl.report.comparison import Comparison, sort_runs
from fedssl.report.pages import plural
from fedssl.report.run_page import run_page
from fedssl.report.runs import Run, find_runs, read_run
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


def compare(runs: Sequence[Path], out: Path) -> Comparison:
    """Write `results.csv`, `results.md` and `report.html` about all runs at or below `runs` into the folder `out`.

    Raises:
        ConfigError: a path is missing, holds no run, or `out` cannot be a folder.
    """
    found, broken = find_runs(runs)
    comparison = Comparison(runs=found, broken=broken, sections=sort_runs(found))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"-o {out} cannot be made a folder: {error.strerror}. Name another one.") from error
    write_text(out / "results.csv", comparison.frame().to_csv(index=False))
    write_text(out / "results.md", comparison.markdown())
    write_text(out / "report.html", comparison.page(out))
    return comparison


def main(argv: Sequence[str] | None = None) -> int:
    """The command `fedssl-report`; returns its exit code."""
    parser = argparse.ArgumentParser(prog="fedssl-report", description="Compare runs: a table, a page, a CSV.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, or folders that hold some")
    parser.add_argument("-o", "--out", required=True, type=Path, metavar="DIR", help="where the comparison goes")
    arguments = parser.parse_args(argv)
    try:
        comparison = compare(arguments.runs, arguments.out)
    except FedSSLError as error:
        print(f"fedssl-report: {error}", file=sys.stderr)
        return error.exit_code
    for reason in comparison.broken.values():
        print(f"skipped: {reason}", file=sys.stderr)
    print(comparison.summary())
    print(f"\n{plural(len(comparison.runs), 'run')}: {arguments.out / 'report.html'}, results.md, results.csv")
    return 0
