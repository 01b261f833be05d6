"""What lies at or below the folders that are named: runs, and the jobs of sweeps that left none."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from fedssl.errors import ConfigError, DataError
from fedssl.report.runs import Run, read_mapping, read_run

MAX_NUMBERS = 10  # of jobs that are named
BESIDE_ROWS = ("config.yaml", "manifest.json", "partition.npz", "summary.json")  # of a run directory


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job of a sweep, as `sweep.json` tells, without a run: it ended in an error, or its directory has gone."""

    sweep: Path
    number: int
    overrides: tuple[str, ...]  # those that not all jobs of the sweep have
    exit_code: int  # 0: it completed
    message: str  # what it printed; "" in a sweep.json that does not say

    def __str__(self) -> str:
        own = f" ({' '.join(self.overrides)})" if self.overrides else ""
        said = f": {' '.join(self.message.split())}" if self.message else ""
        ended = "completed, and its directory has gone" if self.exit_code == 0 else f"exit code {self.exit_code}{said}"
        return f"job {self.number} of {self.sweep}{own}: {ended}"


@dataclass(frozen=True, kw_only=True)
class NotStarted:
    """Jobs of a sweep that `sweep.json` plans, of one strategy, and that have left nothing at all."""

    sweep: Path
    strategy: str  # "" where the sweep has the default one
    numbers: tuple[int, ...]

    def __str__(self) -> str:
        own = f"{self.strategy}: " if self.strategy else ""
        several = len(self.numbers) > 1
        numbers = ", ".join(map(str, self.numbers[:MAX_NUMBERS]))
        more = f" and {len(self.numbers) - MAX_NUMBERS} more" if len(self.numbers) > MAX_NUMBERS else ""
        return (
            f"{own}{len(self.numbers)} planned {'runs were' if several else 'run was'} not started: "
            f"job{'s' if several else ''} {numbers}{more} of {self.sweep}, which was ended or is still running"
        )


def find_runs(paths: Sequence[Path]) -> tuple[list[Run], dict[Path, str]]:
    """All runs at or below `paths`, each once, and the broken directories with the reason.

    A run is a directory with `metrics.jsonl`, or with two of `BESIDE_ROWS`; below it there are no others.

    Raises:
        ConfigError: a path does not exist, or no run is found.
    """
    missing = [str(path) for path in paths if not _exists(path)]
    if missing:
        raise ConfigError(f"No such directory: {', '.join(missing)}. Give run directories, or folders that hold some.")
    runs: list[Run] = []
    broken: dict[Path, str] = {}
    for directory in (folder for folder, files in _walk(paths) if _holds_run(files)):
        try:
            run = read_run(directory)
        except DataError as error:
            broken[directory] = f"{error}{_of(directory)}"
        else:
            if run.summary or (directory / "metrics.jsonl").exists():
                runs.append(run)
            else:
                broken[directory] = (
                    f"{directory} ({run.strategy}, seed {run.seed}) has neither metrics.jsonl nor summary.json: "
                    f"nothing of it was measured yet."
                )
    if not runs:
        jobs, unread = find_jobs(paths, (), broken)
        reasons = [f"skipped: {reason}" for reason in (broken | unread).values()] + [str(job) for job in jobs]
        hint = "".join(f"\n{reason}" for reason in reasons)
        raise ConfigError(
            f"No run in {', '.join(map(str, paths))}: a run directory holds config.yaml and metrics.jsonl. "
            f"`fedssl` writes them to runs/, a sweep below its hydra.sweep.dir.{hint}"
        )
    return runs, broken


def without_runs(paths: Sequence[Path]) -> dict[Path, str]:
    """Those of `paths` that hold neither runs, whole or not, nor a sweep, with what is to say."""
    reasons = {}
    for path in paths:
        if path.is_file():
            reasons[path] = f"no run in {path}: it is a file, and runs are directories."
        elif not any(_holds_run(files) or "sweep.json" in files for _, files in _walk([path])):
            reasons[path] = f"no run in {path}: a run directory holds config.yaml and metrics.jsonl."
    return reasons


def _of(directory: Path) -> str:
    """Strategy and seed of a run that is broken elsewhere than in its configuration."""
    try:
        config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
        run = Run(
            path=directory, config=config, summary={}, manifest={}, rows=[], partition=None, public_map=None
        )  # fmt: skip
        return f" ({run.strategy}, seed {run.seed})"
    except (
        OSError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
        yaml.YAMLError,
    ):
        return ""


def find_jobs(
    paths: Sequence[Path], known: Iterable[Path], skipped: Iterable[Path] = ()
) -> tuple[list[Job | NotStarted], dict[Path, str]]:
    """Jobs of the sweeps at or below `paths` that have none of the `known` runs.

    Args:
        paths: as for `find_runs`.
        known: directories of runs.
        skipped: of broken ones; why their job failed is worth a word, and that it completed is not.

    Returns:
        The jobs, also those that completed and whose directory has gone since, and those that were planned and never
        began; and each `sweep.json` that cannot be read, with the
        reason.
    """
    runs, rest = ({path.resolve() for path in some} for some in (known, skipped))
    jobs: list[Job | NotStarted] = []
    broken: dict[Path, str] = {}
    for path in (folder / "sweep.json" for folder, files in _walk(paths) if "sweep.json" in files):
        try:
            file = read_mapping(path)
            ended = _jobs(path.parent, file.get("jobs") or [])
            jobs += _not_started(path.parent, file.get("planned") or [])
        except DataError as error:
            broken[path] = str(error)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            broken[path] = f"{path} holds something else than a sweep's jobs ({type(error).__name__}: {error})."
        else:
            for job in ended:
                place = (job.sweep / str(job.number)).resolve()
                if place not in runs and not (job.exit_code == 0 and place in rest):
                    jobs.append(job)
    return jobs, broken


def _jobs(sweep: Path, listed: Sequence[Mapping[str, Any]]) -> list[Job]:
    return [
        Job(
            sweep=sweep,
            number=int(job["job"]),
            overrides=tuple(o for o in job["overrides"] if any(o not in other["overrides"] for other in listed)),
            exit_code=int(job["exit_code"]),
            message=str(job.get("message") or ""),
        )
        for job in listed
    ]


def _not_started(sweep: Path, planned: Sequence[Mapping[str, Any]]) -> list[NotStarted]:
    """By strategy; a job that has begun has a directory with its `config.yaml`, which speaks for itself."""
    found: dict[str, list[int]] = {}
    for job in planned:
        if not (sweep / str(int(job["job"])) / "config.yaml").exists():
            chosen = [o.removeprefix("strategy=") for o in job["overrides"] if o.startswith("strategy=")]
            found.setdefault("".join(chosen), []).append(job["job"])
    return [NotStarted(sweep=sweep, strategy=name, numbers=tuple(numbers)) for name, numbers in found.items()]


def _walk(paths: Sequence[Path]) -> Iterator[tuple[Path, list[str]]]:
    """Each folder at or below `paths` once, with the names of its files; none below a run. Links are followed."""
    seen: set[Path] = set()
    for root in paths:
        for name, folders, files in os.walk(root, followlinks=True):
            folder, known = Path(name), Path(name).resolve() in seen
            if known or _holds_run(files):
                folders.clear()  # a link may lead upwards, and a client store may hold a million files
            if not known:
                seen.add(folder.resolve())
                folders.sort(key=partial(_order, folder))
                yield folder, files


def _order(parent: Path, name: str) -> tuple[bool, int, str]:
    """A run has its own name before that of a link to it, and job 2 of a sweep comes before job 10."""
    return (parent / name).is_symlink(), len(name), name


def is_run(path: Path) -> bool:
    """Whether `path` is a run directory, whole or not."""
    return _exists(path) and path.is_dir() and _holds_run([file.name for file in path.iterdir()])


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, or nothing that may be looked at
        return False


def _holds_run(files: Sequence[str]) -> bool:
    """Whether they are a run's, whole or not; other folders may well have one file of such a name."""
    return "metrics.jsonl" in files or sum(name in files for name in BESIDE_ROWS) > 1
