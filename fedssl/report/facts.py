"""Under what setting a section's runs were made, and from where they come, each in a line."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from fedssl.report.pages import plural
from fedssl.report.runs import Run
from fedssl.report.sections import Section

MAX_VALUES = 4  # of a fact, where runs differ in it
FRAMEWORKS = ("torch", "flwr")  # the versions that are worth a word; the manifests have the others


def facts(section: Section) -> list[str]:
    """What all runs have in common, or the values that there are; what nobody knows is left out."""
    lines = {"Setting": list(_setting(section.runs)), "Origin": list(_origin(section.runs))}
    return [f"{name}: {'; '.join(found)}." for name, found in lines.items() if found]


def _setting(runs: Sequence[Run]) -> Iterator[str]:
    yield from _values(runs, _data)
    yield from _values(runs, lambda run: _count(run, "federation", "num_clients", "client"))
    yield from _values(runs, _cohort)
    yield from _values(runs, _partition)
    yield from _values(runs, _families)
    yield from _values(runs, lambda run: _count(run, "federation", "num_rounds", "round"))
    yield from _values(runs, lambda run: _count(run, "client", "local_epochs", "local epoch"))
    if seeds := sorted({run.seed for run in runs if run.seed is not None}):
        yield f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _origin(runs: Sequence[Run]) -> Iterator[str]:
    sittings = [sitting for run in runs for sitting in run.sittings]
    yield from _values(sittings, _commit)
    yield from _values(sittings, _machine)
    for name in FRAMEWORKS:
        yield from _values(sittings, partial(_version, name))


def _values(of: Sequence[Any], say: Callable[[Any], str | None]) -> Iterator[str]:
    """Each distinct thing that is said of them, joined; nothing where nothing is."""
    found = list(dict.fromkeys(text for one in of if (text := say(one)) is not None))
    more = [f"{len(found) - MAX_VALUES} others"] if len(found) > MAX_VALUES else []
    if found:
        yield " or ".join([*found[:MAX_VALUES], *more])


def _node(run: Run, name: str) -> Mapping[str, Any]:
    node = run.config.get(name)
    return node if isinstance(node, Mapping) else {}


def _count(run: Run, group: str, key: str, what: str) -> str | None:
    value = _node(run, group).get(key)
    return plural(value, what) if isinstance(value, int) and not isinstance(value, bool) else None


def _data(run: Run) -> str:
    first = _node(run, "data").get("num_images")
    return run.data if first is None else f"{run.data} (data.num_images={first})"


def _cohort(run: Run) -> str | None:
    federation = _node(run, "federation")
    if "cohort_size" not in federation:
        return None
    return "all in a round" if federation["cohort_size"] is None else f"{federation['cohort_size']} in a round"


def _partition(run: Run) -> str | None:
    node = _node(run, "partition")
    if "_target_" not in node:
        return None
    settings = ", ".join(f"{key}={value}" for key, value in node.items() if key not in ("_target_", "seed"))
    name = str(node["_target_"]).rpartition(".")[2].lower()
    return f"partition {name} ({settings})" if settings else f"partition {name}"


def _families(run: Run) -> str | None:
    families = _node(run, "federation").get("families")
    return ", ".join(dict.fromkeys(map(str, families))) if families else None


def _commit(sitting: Mapping[str, str]) -> str | None:
    """ "no commit" of a run whose manifest says that there was none: of an installed wheel."""
    if not sitting:
        return None
    commit = sitting.get("git.commit")
    changed = " with uncommitted changes" if sitting.get("git.dirty") == str(True) else ""
    return "no commit" if commit is None else f"commit {commit[:10]}{changed}"


def _machine(sitting: Mapping[str, str]) -> str | None:
    if "hardware.cpu" not in sitting:
        return None
    cores = f", {sitting['hardware.cores']} cores" if "hardware.cores" in sitting else ""
    gpus = sitting.get("hardware.gpus", "[]").strip("[]").replace("'", "")
    return f"{sitting['hardware.cpu']}{cores}, {gpus or 'no GPU'}"


def _version(name: str, sitting: Mapping[str, str]) -> str | None:
    version = sitting.get(f"versions.{name}")
    return None if version in (None, str(None)) else f"{name} {version}"
