"""What a run writes down while it happens: metrics.jsonl, TensorBoard, manifest.json, and the lines on the screen.

Three parts that know nothing of each other: `Tracker` (numbers), `manifest` (where they come from), `Progress` (the
person who waits). Torch is imported only where it is used, so that `fedssl-report` starts fast.
"""

import json
import logging
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import wraps
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from fedssl.errors import ConfigError

PACKAGES = ("fedssl", "flwr", "torch", "torchvision", "ray", "numpy", "numba")


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numpy and torch scalars and arrays become Python's, NaN and infinities None."""
    if hasattr(value, "tolist"):  # numpy and torch, without importing either
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


def write_json(path: Path, obj: Any) -> None:
    """Write `obj` to `path`, in one step like `write_text`."""
    write_text(path, json.dumps(plain(obj), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `path` in one step: a reader, or a crash, meets the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Tracker:
    """Writes `metrics.jsonl` and `tensorboard/` of one run directory. A context manager.

    Client rows go to `metrics.jsonl` one by one; TensorBoard, which would drown in one curve per client, gets their
    mean over the round's clients.

    Args:
        run_dir: an existing directory.
        offset: bytes of an earlier `metrics.jsonl` to keep, as `offset` said at the checkpoint. What was written after
            it is dropped, and TensorBoard forgets the later rounds. 0 starts anew.

    Raises:
        ConfigError: `metrics.jsonl` does not have `offset` bytes of whole lines.
    """

    def __init__(self, run_dir: Path, *, offset: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # two seconds of imports

        path = run_dir / "metrics.jsonl"
        last_round = _cut(path, offset)
        self._file = path.open("ab")
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=last_round + 1)
        self._client_values: defaultdict[tuple[int, str], list[float]] = defaultdict(list)  # (round, metric)

    def row(
        self,
        round_num: int,
        scope: str,
        metrics: Mapping[str, Any],
        *,
        partition: int | None = None,
        family: str | None = None,
    ) -> None:
        """Append one line to `metrics.jsonl`, and its numbers to TensorBoard.

        Args:
            round_num: 0 for the initial weights.
            scope: "eval", "server", "client" or "round".
            metrics: numbers (numpy's and torch's too), strings, lists, mappings; NaN and infinities become null.
            partition: of a client row.
            family: of an eval or client row.
        """
        metrics = plain(metrics)
        row = {"round": round_num, "scope": scope, "partition": partition, "family": family, "metrics": metrics}
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        if scope == "client":
            for name, value in numbers.items():
                self._client_values[round_num, name].append(value)
            return
        self._write_client_means()
        self._file.flush()  # whoever watches the file sees the round; a client row alone is not worth a system call
        for name, value in numbers.items():
            tag = f"{name}/{family}" if family else f"{scope}/{name}"
            self._tensorboard.add_scalar(tag, value, round_num)

    @property
    def offset(self) -> int:
        """Size of `metrics.jsonl` in bytes; everything up to there is on the disk when this returns."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._tensorboard.flush()
        return self._file.tell()

    def close(self) -> None:
        """Write out what is pending; a second call does nothing."""
        if not self._file.closed:
            self._write_client_means()
            self._file.close()
            self._tensorboard.close()

    def _write_client_means(self) -> None:
        for (round_num, name), values in self._client_values.items():
            self._tensorboard.add_scalar(f"clients/{name}", sum(values) / len(values), round_num)
        self._client_values.clear()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _cut(path: Path, offset: int) -> int:
    """Keep the first `offset` bytes of `path`; returns the last round in them, -1 where there is none."""
    if offset == 0:
        path.write_bytes(b"")
        return -1
    kept = path.read_bytes()[:offset] if path.exists() else b""
    if len(kept) < offset or not kept.endswith(b"\n"):
        raise ConfigError(
            f"{path} has no whole line that ends at byte {offset}, where the checkpoint says its rows end "
            f"({len(kept)} bytes were found). The file was changed since: restore it, or start a new run."
        )
    os.truncate(path, offset)
    return max(int(json.loads(line)["round"]) for line in kept.splitlines())


# --- manifest.json ----------------------------------------------------------------------------------------------------


def manifest(config: Mapping[str, Any], *, data: Mapping[str, str]) -> dict[str, Any]:
    """Where a run's numbers come from: code, machine, data and command. What `manifest.json` holds.

    All of it is of the run's first sitting; `resumed` will list the later ones.

    Args:
        config: the resolved configuration; only its `seed` is read.
        data: name of each image set -> sha256 of it, in hex.
    """
    return {**sitting(), "seed": config.get("seed"), "data": dict(data)}


def sitting() -> dict[str, Any]:
    """When, how, with what code and on what machine this process works on a run."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "git": _git(),
        "hardware": _hardware(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit of the checkout that this file is tracked in; None for an installed wheel, or without git."""

    def git(*arguments: str) -> str:
        here = Path(__file__).resolve()
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an environment inside someone's repository is not it
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _hardware() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": [f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB" for gpu in gpus],
        "platform": platform.platform(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# --- progress ---------------------------------------------------------------------------------------------------------

P = ParamSpec("P")
T = TypeVar("T", bound="Progress")


def _never_raises(method: Callable[Concatenate[T, P], None]) -> Callable[Concatenate[T, P], None]:
    """A closed pipe or a strange terminal must not end a run that is otherwise fine: go quiet instead."""

    @wraps(method)
    def guarded(self: T, /, *args: P.args, **kwargs: P.kwargs) -> None:
        if self.broken:
            return
        try:
            method(self, *args, **kwargs)
        except Exception:
            self.broken = True

    return guarded


class Screen(Console):
    """A console that falls silent when its reader goes away; rich's own ends the process."""

    def on_broken_pipe(self) -> None:
        """Say nothing more."""
        self.quiet = True


class Progress:
    """Rounds, clients, loss and time left: a live display on a terminal, one line a round elsewhere.

    Never raises: when the screen goes away, the run goes on.

    Args:
        num_rounds: of the whole run, resumed part included.
        title: what runs, e.g. "flesd on digits".
        first_round: > 1 when a run is resumed.
        quiet: show warnings only.
        console: where to draw; standard output if None.
    """

    def __init__(
        self,
        num_rounds: int,
        *,
        title: str,
        first_round: int = 1,
        quiet: bool = False,
        console: Screen | None = None,
    ) -> None:
        self.broken = False
        self._num_rounds = num_rounds
        self._title = title
        self._first_round = first_round
        self._quiet = quiet
        self._console = console or Screen()
        self._errors = console or Screen(stderr=True)
        self._bars: Bars | None = None
        self._rounds_bar = self._clients_bar = TaskID(0)
        self._losses: list[float] = []
        self._started = self._round_started = time.monotonic()

    def __enter__(self) -> "Progress":
        self._start()
        return self

    @_never_raises
    def _start(self) -> None:
        if self._quiet or not self._console.is_terminal or self._console.is_dumb_terminal:
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )
        bars = Bars(*columns, console=self._console, refresh_per_second=4, transient=True)
        done = self._first_round - 1
        self._rounds_bar = bars.add_task(self._title, total=self._num_rounds, completed=done, text="")
        self._clients_bar = bars.add_task("clients", total=None, text="")
        bars.start()
        self._bars = bars

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        bars, self._bars = self._bars, None
        if bars is not None:
            try:
                bars.stop()
            except Exception:
                self.broken = True

    @_never_raises
    def round_started(self, round_num: int, num_clients: int) -> None:
        """`num_clients` clients have been asked to train."""
        self._round_started = time.monotonic()
        if round_num == self._first_round:
            self._started = self._round_started  # the evaluation of round 0 is no measure of a round
        self._losses.clear()
        if self._bars:
            self._bars.reset(self._clients_bar, total=num_clients, text="", description=f"round {round_num}")

    @_never_raises
    def client_finished(self, partition: int, family: str, loss: float | None) -> None:
        """One client of the round has replied; `loss` is None where it reports none."""
        if loss is not None and math.isfinite(loss):
            self._losses.append(loss)
        if self._bars:
            mean = f"loss {sum(self._losses) / len(self._losses):.4g}, " if self._losses else ""
            self._bars.update(self._clients_bar, advance=1, text=f"{mean}last: {partition} ({family})")

    @_never_raises
    def phase(self, name: str) -> None:
        """What the server does now, e.g. "distilling"."""
        if self._bars:
            self._bars.update(self._clients_bar, text=name)

    @_never_raises
    def round_finished(self, round_num: int, line: Mapping[str, float | int | str]) -> None:
        """Print the round's line, e.g. `{"loss": 4.1, "knn_top1": 0.93, "ok": "5/5"}`, and the time left."""
        now = time.monotonic()
        left = (now - self._started) / max(1, round_num - self._first_round + 1) * (self._num_rounds - round_num)
        seconds = now - self._round_started
        if not self._quiet:
            width = len(str(self._num_rounds))
            words = [f"round {round_num:{width}}/{self._num_rounds}", *(f"{k} {_short(v)}" for k, v in line.items())]
            words += [duration(seconds)] + ([f"{duration(left)} left"] if round_num < self._num_rounds else [])
            self._print(self._console, "  ".join(words))
        if self._bars:
            self._bars.update(self._rounds_bar, completed=round_num, text=f"{duration(left)} left")

    @_never_raises
    def note(self, text: str) -> None:
        """A warning or a failure: shown above the live display, on standard error elsewhere, also when quiet."""
        self._print(self._console if self._bars else self._errors, text)

    def _print(self, console: Screen, text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        console.file.flush()


class _Notes(logging.Handler):
    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self.progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self.progress.note(self.format(record))


@contextmanager
def warnings_shown_by(progress: Progress) -> Iterator[None]:
    """Inside, what `fedssl` and `strategies` warn of appears above the live display."""
    handler = _Notes(progress)
    loggers = [logging.getLogger(name) for name in ("fedssl", "strategies")]
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.propagate = propagate


def _short(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """`seconds` as people say it: "4.2 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
