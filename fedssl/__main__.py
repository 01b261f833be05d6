"""The `fedssl` command: one simulation, a sweep, a resume or a replay.

Exit codes: 0 completed; 2 bad input; 3 too few replies; 4 stopped by max_seconds; 1 a bug; 130 interrupted.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fedssl.config import CONFIG_NAME, check_values, compose, conf_dir, message_of, overridden, resolve, unread
from fedssl.errors import ConfigError, FedSSLError

OK, BUG, BAD_INPUT, STOPPED, INTERRUPTED = 0, 1, 2, 4, 130
HELD = -1  # no exit code: the job is composed, its turn comes
READER_SECONDS = 5.0  # for the last lines of a process that has ended; one that it left behind may keep them open

# What is printed of summary.json.
SUMMARY = {
    "strategy", "data", "status", "rounds", "wall_seconds", "uplink_bytes", "downlink_bytes", "families",
    "report_family",
}  # fmt: skip

# What a resume may change without changing what the run means.
RESUMABLE = ("grid", "device", "data.root", "max_seconds", "federation.num_rounds")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    sys.path.append(str(Path.cwd()))  # a user's own modules, as `python -m fedssl` finds them
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print; we print it
    for name in ("RAY_USAGE_STATS_ENABLED", "FLWR_TELEMETRY_ENABLED"):
        os.environ.setdefault(name, "0")
    # Threads that wait for each other must not spin: on cores that others use too, a step takes ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    special = {key: _value(arguments, key) for key in ("resume", "replay.run", "replay.round", "replay.partition")}
    for key, value in special.items():
        if value == "":
            print(f"error: {key}= names nothing; give it a value or leave it out", file=sys.stderr)
            return BAD_INPUT
    resumed = special.pop("resume")
    if resumed is not None:
        return _report_errors(lambda: _resume(Path(resumed), arguments))
    if any(value is not None for value in special.values()):
        return _report_errors(lambda: _replay(special, arguments))
    options, overrides = _printing(arguments)
    if options.cfg == "job" and options.resolve and not any(override.startswith("-") for override in overrides):
        return _report_errors(lambda: _print_config(overrides, options.config_dir))
    return _compose_and_run(arguments)


def _compose_and_run(arguments: list[str]) -> int:
    """Let Hydra compose one job or a sweep of them; the exit code is the largest of the jobs'."""
    jobs: list[dict[str, Any]] = []
    finished: dict[int, Path] = {}
    waiting: list[_Job] = []  # for a process of their own
    at_once = 1
    given = _value(arguments, "run_dir")
    existed = given is not None and Path(given).is_dir()

    def job(config: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        this = _Job(Path(hydra_config.runtime.output_dir))
        if hydra_config.mode == RunMode.MULTIRUN:
            this.number, this.overrides = hydra_config.job.num, list(hydra_config.overrides.task)
            this.sweep_dir = Path(hydra_config.sweep.dir)
            print(f"\njob {this.number}: {' '.join(this.overrides)}", flush=True)
        elif not Path(hydra_config.run.dir).is_absolute():
            this.run_dir = Path(hydra_config.run.dir)  # as the user wrote it

        def work() -> int:
            this.config = resolve(config, hydra_config)
            if idle := unread(config, hydra_config.overrides.task):
                strategy = hydra_config.runtime.choices["strategy"]
                this.note = f"  note: strategy={strategy} does not read {' '.join(idle)}"
            return HELD if at_once > 1 else _run(this.config, this.note, this.run_dir, _in_order(finished))

        code, message = _outcome(work)
        if code == HELD:
            waiting.append(this)
            return
        ended(this, code, message)
        if code == INTERRUPTED:
            raise KeyboardInterrupt

    def ended(job: _Job, code: int, message: str) -> None:
        if code == BAD_INPUT and not existed:
            job.remove_empty_dir()
        if code == OK:
            finished[job.number] = job.run_dir
        record = {"job": job.number, "overrides": job.overrides, "exit_code": code}
        jobs.append({**record, "message": message} if message else record)
        jobs.sort(key=lambda record: record["job"])
        if job.sweep_dir is not None:
            _record_sweep(job.sweep_dir, jobs)

    command = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=CONFIG_NAME)(job)
    before = sys.argv
    sys.argv = ["fedssl", *arguments]
    try:
        at_once = _jobs_at_once(arguments)
        if _is_sweep(arguments) and _value(arguments, "run_dir") is not None:
            raise ConfigError(
                "run_dir= is for one run; a sweep numbers its runs under hydra.sweep.dir= (got both -m and run_dir=)"
            )
        if _is_sweep(arguments):
            _check_sweep_dir(arguments)
        command()
    except KeyboardInterrupt:
        return INTERRUPTED
    except (HydraException, OmegaConfBaseException, ConfigError) as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:  # the jobs report their own
        print(f"error: cannot make the run directory (run_dir=, hydra.sweep.dir=): {error}", file=sys.stderr)
        return BAD_INPUT
    finally:
        sys.argv = before
    try:
        _run_at_once(waiting, at_once, ["fedssl", *arguments], finished, ended)
    except KeyboardInterrupt:
        return INTERRUPTED
    if len(finished) > 1:
        _rewrite_reports(_in_order(finished))
    if _is_sweep(arguments) and jobs:
        _print_sweep(jobs)
    return max((job["exit_code"] for job in jobs), default=OK)


def _run(config: dict[str, Any], note: str, run_dir: Path, siblings: Sequence[Path]) -> int:
    from fedssl.federation import simulation  # torch, Flower: not for --help

    code = _finish(simulation.run({**config, "run_dir": str(run_dir)}), run_dir, siblings)
    if note:
        print(note, flush=True)
    return code


def _resume(run_dir: Path, arguments: Sequence[str]) -> int:
    from fedssl.federation import simulation

    config = _saved_config(run_dir, "resume")
    overrides = [argument for argument in arguments if not argument.startswith("resume=")]
    for override in overrides:
        if override.startswith("-"):
            raise ConfigError(
                f"a resume takes no option {override}: it goes on with one run as {run_dir / 'config.yaml'} says; "
                f"beside resume= it allows {', '.join(RESUMABLE)} (and grid.*)."
            )
        key = override.split("=", 1)[0]
        if not any(key == allowed or (allowed == "grid" and key.startswith("grid.")) for allowed in RESUMABLE):
            raise ConfigError(
                f"{override} would change what the run in {run_dir} means; a resume allows {', '.join(RESUMABLE)} "
                f"(and grid.*). Everything else is read from {run_dir / 'config.yaml'}."
            )
    changed = _apply({**config, "max_seconds": None}, overrides)  # the limit was for the sitting before
    _check_num_rounds(config, changed)
    summary_path = run_dir / "summary.json"
    if summary_path.exists():
        summary = _saved_summary(summary_path)
        if summary["status"] == "completed" and summary["rounds"] >= changed["federation"]["num_rounds"]:
            _print_summary(summary, run_dir)
            return OK
    changed["run_dir"] = str(run_dir)
    return _finish(simulation.resume(changed, run_dir), run_dir, [])


def _replay(special: Mapping[str, str | None], arguments: Sequence[str]) -> int:
    from fedssl.federation import simulation

    missing = [key for key in ("replay.run", "replay.round", "replay.partition") if special[key] is None]
    if missing:
        raise ConfigError(f"a replay needs replay.run, .round and .partition; missing: {', '.join(missing)}")
    try:
        round_num, partition_id = int(special["replay.round"] or ""), int(special["replay.partition"] or "")
    except ValueError:
        raise ConfigError(
            f"replay.round and replay.partition are whole numbers, got {special['replay.round']} and "
            f"{special['replay.partition']}"
        ) from None
    others = [argument for argument in arguments if not argument.startswith("replay.")]
    if any(argument.split("=", 1)[0] not in ("device", "data.root") for argument in others):
        raise ConfigError(f"in a replay only device= and data.root= may change, got {' '.join(others)}")
    run_dir = Path(special["replay.run"] or "")
    config = _apply(_saved_config(run_dir, "replay.run"), others)
    metrics = simulation.replay(config, run_dir, round_num=round_num, partition_id=partition_id)
    print(json.dumps({"round": round_num, "partition": partition_id, "metrics": metrics}, indent=2))
    return OK


def _print_config(overrides: Sequence[str], config_dir: Path | None) -> int:
    """What `config.yaml` of the run would hold; Hydra's own print lacks what `resolve` puts in."""
    print(yaml.safe_dump(compose(overrides, config_dir=config_dir), sort_keys=False, allow_unicode=True), end="")
    return OK


# --- jobs of a sweep at once -------------------------------------------------------------------------------------
@dataclasses.dataclass(eq=False)
class _Job:
    """The one run there is, or a job of a sweep; `config` and `note` (for after its summary) come from composing it."""

    run_dir: Path
    number: int = 0
    overrides: list[str] = dataclasses.field(default_factory=list)
    sweep_dir: Path | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""

    @property
    def places(self) -> set[Path]:
        """Where it writes: no two jobs may at once."""
        store = self.config["client"].get("store")
        return {self.run_dir.resolve()} | ({Path(store).expanduser().resolve()} if store else set())

    def remove_empty_dir(self) -> None:
        """Hydra has made it."""
        if self.run_dir.is_dir() and not any(self.run_dir.iterdir()):
            self.run_dir.rmdir()


class _Process:
    """A job in a process of its own; its lines come out with its number before them.

    It has a process group of its own too: Ctrl-C reaches the sweep alone, which passes it on once.
    """

    def __init__(self, job: _Job, argv: list[str], siblings: list[Path], environment: Mapping[str, str]) -> None:
        self.job = job
        self.channel, theirs = Pipe()
        self._outcome: tuple[int, str] | None = None
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # there too, until `_serve` can end well
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from fedssl.__main__ import _serve; _serve({theirs.fileno()})"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=environment,
                pass_fds=[theirs.fileno()],
                process_group=0,
            )
            screens = ((self._process.stdout, sys.stdout), (self._process.stderr, sys.stderr))
            self._readers = [
                threading.Thread(target=_pass_on, args=(pipe, f"job {job.number} | ", screen), daemon=True)
                for pipe, screen in screens
            ]
            for reader in self._readers:
                reader.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()
        with contextlib.suppress(OSError):  # it has ended already
            self.channel.send((argv, job.config, job.note, job.run_dir, siblings))

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def end(self) -> tuple[int, str]:
        """Wait for the process to end; the job's exit code, and the message that it printed."""
        with contextlib.suppress(EOFError, OSError):
            self._outcome = self._outcome or self.channel.recv()
        status = self._process.wait()
        for reader in self._readers:
            reader.join(READER_SECONDS)
        self.channel.close()
        if self._outcome is not None:
            return self._outcome
        if status == -signal.SIGINT:
            return INTERRUPTED, "interrupted"
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
        message = (
            f"the process of job {self.job.number} {how}. If the memory ran out, lower sweep.jobs; the last "
            f"checkpoint is kept, resume={self.job.run_dir} goes on"
        )
        print(f"error: {message}", file=sys.stderr, flush=True)
        return BUG, message


def _run_at_once(
    waiting: list[_Job],
    at_once: int,
    argv: list[str],
    finished: Mapping[int, Path],
    ended: Callable[[_Job, int, str], None],
) -> None:
    """Run jobs in processes of their own, `at_once` at a time, and tell `ended` of each. One interrupt ends all."""
    shares = _shares(min(at_once, len(waiting)))
    running: dict[int, _Process] = {}  # by the number of their share
    try:
        while waiting or running:
            for number in range(len(shares)):
                if number not in running and (job := _startable(waiting, running.values())) is not None:
                    waiting.remove(job)
                    print(f"job {job.number} | starts", flush=True)
                    running[number] = _Process(job, argv, _in_order(finished), shares[number])
            over = wait([process.channel for process in running.values()])
            for number, process in list(running.items()):
                if process.channel in over:
                    code, message = process.end()
                    del running[number]
                    ended(process.job, code, message)
                    if code == INTERRUPTED:
                        raise KeyboardInterrupt
    except BaseException:
        for process in running.values():
            process.interrupt()
        for process in running.values():
            ended(process.job, *process.end())
        for job in waiting:
            job.remove_empty_dir()
        raise


def _startable(waiting: Iterable[_Job], running: Iterable[_Process]) -> _Job | None:
    """The first job that writes nowhere that a running job does, or a waiting one before it."""
    taken = {place for process in running for place in process.job.places}
    for job in waiting:
        if not job.places & taken:
            return job
        taken |= job.places
    return None


def _shares(at_once: int) -> list[dict[str, str]]:
    """The environments of as many processes: the cores that Ray finds, and the GPUs; with too few of them, they share.

    Threads are part of a result, and stay as configured.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    shares = []
    gpus = _gpus() if at_once else []
    for number in range(at_once):
        own = {"RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": len(range(number, cores, at_once)) or 1})}
        share = {**own, **os.environ, "PYTHONPATH": path}
        if gpus:
            share["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[number::at_once] or [gpus[number % len(gpus)]])
        shares.append(share)
    return shares


def _gpus() -> list[str]:
    """The names of the visible GPUs in CUDA_VISIBLE_DEVICES."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in named.split(",") if gpu]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _pass_on(pipe: io.TextIOBase, prefix: str, screen: io.TextIOBase) -> None:
    with pipe:
        for line in filter(str.strip, pipe):
            with contextlib.suppress(OSError):  # nobody reads any more: the job goes on
                screen.write(f"{prefix}{line.rstrip()}\n")
                screen.flush()


def _serve(fd: int) -> None:
    """The main function of a job's process: do what comes through `fd`, and send back how it ended."""
    os.set_inheritable(fd, False)
    sweep = Connection(fd)
    sys.argv, config, note, run_dir, siblings = sweep.recv()
    threading.Thread(target=_interrupt_after, args=(sweep,), daemon=True).start()

    def work() -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        asked, visible = config["grid"].get("gpus"), os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if asked and visible != [""] and asked > len(visible):
            raise ConfigError(
                f"grid.gpus={asked}, but a job of this sweep has {len(visible)} (sweep.jobs= shares them out): leave "
                f"grid.gpus out, or lower sweep.jobs"
            )
        return _run(config, note, run_dir, siblings)

    sweep.send(_outcome(work))


def _interrupt_after(sweep: Connection) -> None:
    """A job does not outlive the process of its sweep."""
    with contextlib.suppress(EOFError, OSError):
        sweep.recv()  # nothing comes
    os.kill(os.getpid(), signal.SIGINT)


# --- parts -------------------------------------------------------------------------------------------------------
def _report_errors(work: Callable[[], int]) -> int:
    return _outcome(work)[0]


def _outcome(work: Callable[[], int]) -> tuple[int, str]:
    """Do `work`; print what it raises as one message, and return its exit code and that message ("" without one).

    Only a bug has a traceback, of which the message is the last line.
    """
    try:
        return work(), ""
    except FedSSLError as error:
        code, message = error.exit_code, str(error)
    except (HydraException, OmegaConfBaseException) as error:
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


def _finish(summary: dict[str, Any], run_dir: Path, siblings: Sequence[Path]) -> int:
    _write_report(run_dir, siblings)
    _print_summary(summary, run_dir)
    return STOPPED if summary["status"] == "stopped" else OK


def _in_order(finished: Mapping[int, Path]) -> list[Path]:
    return [finished[number] for number in sorted(finished)]


def _rewrite_reports(runs: Sequence[Path]) -> None:
    """After a sweep's last job every report can show all of its siblings."""
    for run_dir in runs:
        _write_report(run_dir, [sibling for sibling in runs if sibling != run_dir])


def _write_report(run_dir: Path, siblings: Sequence[Path]) -> None:
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


def _jobs_at_once(arguments: Sequence[str]) -> int:
    given = _value(arguments, "sweep.jobs")
    if given is None:
        return 1
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(f"sweep.jobs must be a whole number of at least 1 (jobs of a sweep at once), got {given!r}")
    if int(given) > 1 and not _is_sweep(arguments):
        raise ConfigError(f"sweep.jobs={given} is for a sweep, as in fedssl -m seed=0,1 sweep.jobs=2; -m is missing")
    return int(given)


def _check_sweep_dir(arguments: Sequence[str]) -> None:
    """A sweep does not number its jobs over those of another."""
    given = [argument for argument in arguments if argument.lstrip("+").startswith("hydra.sweep.dir=")]
    if not given:
        return  # the default names the time
    folder = Path(str(OverridesParser.create().parse_overrides(given)[-1].value()))
    jobs = sorted((path.name for path in folder.iterdir() if path.name.isdigit()), key=int) if folder.is_dir() else []
    if jobs or (folder / "sweep.json").exists():
        held = f"the jobs {', '.join(jobs)}" if jobs else "sweep.json"
        raise ConfigError(f"hydra.sweep.dir={folder} holds {held} of an earlier sweep: choose another directory")


def _record_sweep(sweep_dir: Path, jobs: Sequence[Mapping[str, Any]]) -> None:
    """`sweep.json`: every job so far, those too that left no run directory.

    Each has `job`, `overrides`, `exit_code` and, where it printed an error, `message`.
    """
    from fedssl.tracking import write_json

    write_json(sweep_dir / "sweep.json", {"jobs": list(jobs)})


def _print_sweep(jobs: Sequence[Mapping[str, Any]]) -> None:
    ended = [job for job in jobs if job["exit_code"] != OK]
    print(f"\nsweep: {len(jobs) - len(ended)} of {len(jobs)} jobs completed", flush=True)
    for job in ended:
        own = [o for o in job["overrides"] if any(o not in other["overrides"] for other in jobs)]
        named = f" ({' '.join(own)})" if own else ""
        print(f"  job {job['job']}{named}: exit code {job['exit_code']}", flush=True)


def _print_summary(summary: Mapping[str, Any], run_dir: Path) -> None:
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


def _value(arguments: Sequence[str], key: str) -> str | None:
    """The value of the override `key=...`, or None; `null` counts as not given."""
    values = [argument.split("=", 1)[1] for argument in arguments if argument.lstrip("+").startswith(f"{key}=")]
    return None if not values or values[-1] == "null" else values[-1]


def _printing(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Hydra's options for printing a configuration, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--cfg", "-c")
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--config-dir", "-cd", type=Path)
    return parser.parse_known_args(arguments)


def _is_sweep(arguments: Sequence[str]) -> bool:
    return any(argument in ("-m", "--multirun") for argument in arguments)


def _saved_config(run_dir: Path, key: str) -> dict[str, Any]:
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{key}={run_dir} is no run directory: there is no {path}")
    try:
        config = yaml.safe_load(path.read_text())
    except (UnicodeDecodeError, yaml.YAMLError):
        config = None
    if not isinstance(config, dict) or "federation" not in config:
        raise ConfigError(f"{path} is not the configuration of a run; {key}= names a directory that fedssl has made")
    return config


def _saved_summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError):
        summary = None
    if not isinstance(summary, dict) or not summary.keys() >= SUMMARY:
        raise ConfigError(
            f"{path} is damaged. Delete it: a resume goes on from the newest checkpoint and writes it anew."
        )
    return summary


def _apply(config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`config` with the values that `overrides` name; a group choice (grid=in_process) replaces the group."""
    changed = dict(config)
    for override in overrides:
        if override.startswith("grid="):
            changed["grid"] = compose([override])["grid"]
    changed = overridden(changed, [override for override in overrides if not override.startswith("grid=")])
    check_values(changed)
    return changed


def _check_num_rounds(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    old, new = before["federation"]["num_rounds"], after["federation"]["num_rounds"]
    if new < old:
        raise ConfigError(f"federation.num_rounds can only grow on a resume: it is {old}, got {new}")
    depends = [
        key
        for key in ("client", "distill")
        if before.get(key, {}).get("optimisation", {}).get("schedule") == "cosine_rounds"
    ]
    if new > old and depends:
        raise ConfigError(
            f"federation.num_rounds cannot grow from {old} to {new}: {depends[0]}.optimisation.schedule="
            f"cosine_rounds was computed for {old} rounds. Start a new run."
        )


if __name__ == "__main__":
    sys.exit(main())
