"""What a resume or a replay makes of a run directory and of what the command line says beside it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedssl.config import check_values, compose, overridden
from fedssl.errors import ConfigError
from fedssl.settings import RESUMABLE, covers

DEPLOYMENT = "deployment.json"  # in the run directory of a run over real nodes: who they were

# What is printed of summary.json.
SUMMARY = {
    "strategy", "data", "status", "rounds", "wall_seconds", "uplink_bytes", "downlink_bytes", "families",
    "report_family",
}  # fmt: skip


def resumed(run_dir: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The run in `run_dir` with what a resume may change of it.

    Returns:
        Its configuration, and its summary where it is complete, so that there is nothing to go on with.

    Raises:
        ConfigError: no run, or an override that would change what it means.
    """
    config = saved_config(run_dir, "resume")
    for override in overrides:
        if override.startswith("-"):
            raise ConfigError(
                f"a resume takes no option {override}: it goes on with one run as {run_dir / 'config.yaml'} says; "
                f"beside resume= it allows {', '.join(RESUMABLE)} (and grid.*)."
            )
        key = override.split("=", 1)[0]
        if not covers(RESUMABLE, key):
            raise ConfigError(
                f"{override} would change what the run in {run_dir} means; a resume allows {', '.join(RESUMABLE)} "
                f"(and grid.*). Everything else is read from {run_dir / 'config.yaml'}."
            )
    changed = apply({**config, "max_seconds": None}, overrides)  # the limit was for the sitting before
    _check_num_rounds(config, changed)
    summary_path = run_dir / "summary.json"
    changed["run_dir"] = str(run_dir)
    if summary_path.exists():
        summary = _saved_summary(summary_path)
        if summary["status"] == "completed" and summary["rounds"] >= changed["federation"]["num_rounds"]:
            return changed, summary
    return changed, None


def saved_config(run_dir: Path, key: str) -> dict[str, Any]:
    """The configuration of the run in `run_dir`, which `key=` named; `ConfigError` where there is none."""
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


def apply(config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
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
