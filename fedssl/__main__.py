"""The `fedssl` command: one simulation, a sweep, a resume or a replay.

Exit codes: 0 completed; 2 bad input; 3 too few replies; 4 stopped by max_seconds; 1 a bug; 130 interrupted.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedssl.config import CONFIG_NAME, compose, conf_dir, message_of, resolve, unread
from fedssl.environment import set_defaults
from fedssl.errors import ConfigError
from fedssl.outcome import BAD_INPUT, INTERRUPTED, OK, finish, outcome_of, print_summary, run, write_report
from fedssl.resuming import apply, resumed, saved_config
from fedssl.sweep import Job, in_order, run_at_once

HELD = -1  # no exit code: the job is composed, its turn comes


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    sys.path.append(str(Path.cwd()))  # a user's own modules, as `python -m fedssl` finds them
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print; we print it
    set_defaults()
    special = {key: _value(arguments, key) for key in ("resume", "replay.run", "replay.round", "replay.partition")}
    for key, value in special.items():
        if value == "":
            print(f"error: {key}= names nothing; give it a value or leave it out", file=sys.stderr)
            return BAD_INPUT
    run_dir = special.pop("resume")
    if run_dir is not None:
        return outcome_of(lambda: _resume(Path(run_dir), arguments))[0]
    if any(value is not None for value in special.values()):
        return outcome_of(lambda: _replay(special, arguments))[0]
    options, overrides = _printing(arguments)
    if options.cfg == "job" and options.resolve and not any(override.startswith("-") for override in overrides):
        return outcome_of(lambda: _print_config(overrides, options.config_dir))[0]
    return _compose_and_run(arguments)


def _compose_and_run(arguments: list[str]) -> int:
    """Let Hydra compose one job or a sweep of them; the exit code is the largest of the jobs'."""
    jobs: list[dict[str, Any]] = []
    planned: dict[int, list[str]] = {}  # the overrides of all jobs of a sweep, where Hydra's sweeper knows them
    finished: dict[int, Path] = {}
    waiting: list[Job] = []  # for a process of their own
    at_once = 1
    given = _value(arguments, "run_dir")
    existed = given is not None and Path(given).is_dir()

    def job(config: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        this = Job(Path(hydra_config.runtime.output_dir))
        if hydra_config.mode == RunMode.MULTIRUN:
            this.number, this.overrides = hydra_config.job.num, list(hydra_config.overrides.task)
            this.sweep_dir = Path(hydra_config.sweep.dir)
            print(f"\njob {this.number}: {' '.join(this.overrides)}", flush=True)
            if this.number == 0:
                planned.update(enumerate(_planned(this.sweep_dir)))
            if planned.get(this.number) != this.overrides:
                planned.clear()  # shuffle() says something else each time
            if this.number == 0:
                _record_sweep(this.sweep_dir, jobs, planned)
        elif not Path(hydra_config.run.dir).is_absolute():
            this.run_dir = Path(hydra_config.run.dir)  # as the user wrote it

        def work() -> int:
            this.config = resolve(config, hydra_config)
            if idle := unread(config, hydra_config.overrides.task):
                strategy = hydra_config.runtime.choices["strategy"]
                this.note = f"  note: strategy={strategy} does not read {' '.join(idle)}"
            return HELD if at_once > 1 else run(this.config, this.note, this.run_dir, in_order(finished))

        code, message = outcome_of(work)
        if code == HELD:
            waiting.append(this)
            return
        ended(this, code, message)
        if code == INTERRUPTED:
            raise KeyboardInterrupt

    def ended(job: Job, code: int, message: str) -> None:
        if code == BAD_INPUT and not existed:
            job.remove_empty_dir()
        if code == OK:
            finished[job.number] = job.run_dir
        record = {"job": job.number, "overrides": job.overrides, "exit_code": code}
        jobs.append({**record, "message": message} if message else record)
        jobs.sort(key=lambda record: record["job"])
        if job.sweep_dir is not None:
            _record_sweep(job.sweep_dir, jobs, planned)

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
        run_at_once(waiting, at_once, ["fedssl", *arguments], finished, ended)
    except KeyboardInterrupt:
        return INTERRUPTED
    if len(finished) > 1:
        _rewrite_reports(in_order(finished))
    if _is_sweep(arguments) and jobs:
        _print_sweep(jobs)
    return max((job["exit_code"] for job in jobs), default=OK)


def _resume(run_dir: Path, arguments: Sequence[str]) -> int:
    from fedssl.federation import simulation

    overrides = [argument for argument in arguments if not argument.startswith("resume=")]
    config, complete = resumed(run_dir, overrides)
    if complete is not None:
        print_summary(complete, run_dir)
        return OK
    return finish(simulation.resume(config, run_dir), run_dir, [])


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
    config = apply(saved_config(run_dir, "replay.run"), others)
    metrics = simulation.replay(config, run_dir, round_num=round_num, partition_id=partition_id)
    print(json.dumps({"round": round_num, "partition": partition_id, "metrics": metrics}, indent=2))
    return OK


def _print_config(overrides: Sequence[str], config_dir: Path | None) -> int:
    """What `config.yaml` of the run would hold; Hydra's own print lacks what `resolve` puts in."""
    print(yaml.safe_dump(compose(overrides, config_dir=config_dir), sort_keys=False, allow_unicode=True), end="")
    return OK


# --- parts -------------------------------------------------------------------------------------------------------


def _rewrite_reports(runs: Sequence[Path]) -> None:
    """After a sweep's last job every report can show all of its siblings."""
    for run_dir in runs:
        write_report(run_dir, [sibling for sibling in runs if sibling != run_dir])


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


def _planned(sweep_dir: Path) -> list[list[str]]:
    """The overrides of each job, as Hydra's own sweeper makes them; [] of another sweeper."""
    config = OmegaConf.load(sweep_dir / "multirun.yaml").hydra
    if not str(config.sweeper._target_).endswith(f".{BasicSweeper.__name__}"):
        return []
    given = [*(f"{key}={value}" for key, value in (config.sweeper.params or {}).items()), *config.overrides.task]
    overrides = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(given)
    return [job for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]


def _record_sweep(sweep_dir: Path, jobs: Sequence[Mapping[str, Any]], planned: Mapping[int, list[str]]) -> None:
    """`sweep.json`: `jobs` that have ended, those too that left no run directory, and `planned` ones that have not.

    Each has `job` and `overrides`; one that has ended `exit_code` and, where it printed an error, `message`.
    """
    from fedssl.tracking import write_json

    ended = {job["job"] for job in jobs}
    left = [{"job": number, "overrides": own} for number, own in planned.items() if number not in ended]
    write_json(sweep_dir / "sweep.json", {"jobs": list(jobs), **({"planned": left} if left else {})})


def _print_sweep(jobs: Sequence[Mapping[str, Any]]) -> None:
    ended = [job for job in jobs if job["exit_code"] != OK]
    print(f"\nsweep: {len(jobs) - len(ended)} of {len(jobs)} jobs completed", flush=True)
    for job in ended:
        own = [o for o in job["overrides"] if any(o not in other["overrides"] for other in jobs)]
        named = f" ({' '.join(own)})" if own else ""
        print(f"  job {job['job']}{named}: exit code {job['exit_code']}", flush=True)


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


if __name__ == "__main__":
    sys.exit(main())
