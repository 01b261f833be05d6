"""How a run ends for the person who started it: its exit code, one message, its summary and its report."""

import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedssl.config import COMPOSITION_ERRORS, message_of
from fedssl.errors import FedSSLError

OK, BUG, BAD_INPUT, TOO_FEW, STOPPED, INTERRUPTED = 0, 1, 2, 3, 4, 130


def run(config: dict[str, Any], note: str, run_dir: Path, siblings: Sequence[Path]) -> int:
    """Run one simulation, report it, and print `note` after its summary; the exit code."""
    from fedssl.federation import simulation  # torch, Flower: not for --help

    code = finish(simulation.run({**config, "run_dir": str(run_dir)}), run_dir, siblings)
    if note:
        print(note, flush=True)
    return code


def outcome_of(work: Callable[[], int]) -> tuple[int, str]:
    """Do `work`; print what it raises as one message, and return its exit code and that message ("" without one).

    Only a bug has a traceback, of which the message is the last line.
    """
    try:
        return work(), ""
    except FedSSLError as error:
        code, message = error.exit_code, str(error)
    except COMPOSITION_ERRORS as error:
        code, message = BAD_INPUT, message_of(error)
    except KeyboardInterrupt:
        message = "interrupted; the last checkpoint is kept, resume=<run directory> goes on"
        print(message, file=sys.stderr, flush=True)
        return INTERRUPTED, message
    except Exception as error:
        traceback.print_exc()
        return BUG, "".join(traceback.format_exception_only(error)).strip()
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code, message


def finish(summary: dict[str, Any], run_dir: Path, siblings: Sequence[Path]) -> int:
    """Report a run and print its summary; the exit code."""
    write_report(run_dir, siblings)
    print_summary(summary, run_dir)
    return STOPPED if summary["status"] == "stopped" else OK


def write_report(run_dir: Path, siblings: Sequence[Path]) -> None:
    """A report that fails is no failure of the run: its figures are in the files that the report would have read."""
    try:
        from fedssl.report import write_run_report

        write_run_report(run_dir, siblings)
    except Exception as error:
        print(
            f"warning: the results of the run in {run_dir} are written, but its report could not be "
            f"({type(error).__name__}: {error}); fedssl-report {run_dir} -o DIR tries again",
            file=sys.stderr,
            flush=True,
        )


def print_summary(summary: Mapping[str, Any], run_dir: Path) -> None:
    """A run in a few lines: status, bytes, and the figures of every family."""
    print(
        f"\n{summary['strategy']} on {summary['data']}: {summary['status']} after {summary['rounds']} rounds, "
        f"{summary['wall_seconds']:.0f} s, {summary['uplink_bytes'] / 1e6:.2f} MB up, "
        f"{summary['downlink_bytes'] / 1e6:.2f} MB down"
    )
    names = ("knn_top1", "linear_top1", "labels1_top1")
    for family, metrics in summary["families"].items():
        figures = "  ".join(f"{name} {metrics[name]:.3f}" for name in names if metrics.get(name) is not None)
        head = " (report family)" if family == summary["report_family"] else ""
        print(f"  {family}{head}: {figures}")
    if (run_dir / "report.html").is_file():
        print(f"  report: {run_dir / 'report.html'}", flush=True)
