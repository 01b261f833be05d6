"""The `fedssl` command: one simulation, a sweep, a resume or a replay.

Exit codes: 0 completed; 2 bad input; 3 too few replies; 4 stopped by max_seconds; 1 a bug; 130 interrupted.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
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
    finished: list[Path] = []
    given = _value(arguments, "run_dir")
    existed = given is not None and Path(given).is_dir()

    def job(config: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        run_dir = Path(hydra_config.runtime.output_dir)
        if hydra_config.mode == RunMode.MULTIRUN:
            print(f"\njob {hydra_config.job.num}: {' '.join(hydra_config.overrides.task)}", flush=True)
        elif not Path(hydra_config.run.dir).is_absolute():
            run_dir = Path(hydra_config.run.dir)  # as the user wrote it
        siblings = list(finished)

        def work() -> int:
            code = _run(resolve(config, hydra_config), run_dir, siblings)
            if idle := unread(config, hydra_config.overrides.task):
                strategy = hydra_config.runtime.choices["strategy"]
                print(f"  note: strategy={strategy} does not read {' '.join(idle)}", flush=True)
            return code

        code, message = _outcome(work)
        if code == BAD_INPUT and not existed and run_dir.is_dir() and not any(run_dir.iterdir()):
            run_dir.rmdir()  # Hydra made it
        if code == OK:
            finished.append(run_dir)
        if hydra_config.mode == RunMode.MULTIRUN:
            overrides = list(hydra_config.overrides.task)
            job = {"job": hydra_config.job.num, "overrides": overrides, "exit_code": code}
            jobs.append({**job, "message": message} if message else job)
            _record_sweep(Path(hydra_config.sweep.dir), jobs)
        else:
            jobs.append({"exit_code": code})
        if code == INTERRUPTED:
            raise KeyboardInterrupt

    command = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=CONFIG_NAME)(job)
    before = sys.argv
    sys.argv = ["fedssl", *arguments]
    try:
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
    if len(finished) > 1:
        _rewrite_reports(finished)
    if _is_sweep(arguments) and jobs:
        _print_sweep(jobs)
    return max((job["exit_code"] for job in jobs), default=OK)


def _run(config: dict[str, Any], run_dir: Path, siblings: Sequence[Path]) -> int:
    from fedssl.federation import simulation  # torch, Flower: not for --help

    return _finish(simulation.run({**config, "run_dir": str(run_dir)}), run_dir, siblings)


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
