"""What a reader of a comparison should know before believing it."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from fedssl.report.pages import TIE, plural
from fedssl.report.runs import METRICS, Run, varying
from fedssl.report.sections import Section
from fedssl.settings import covers

MAX_KEYS = 12  # that are described; beyond it they are named
MAX_NAMES = 4  # values of a key, groups of a value
MAX_RUNS = 10
DIRTY = "git.dirty"  # of a manifest; has a warning of its own
CONTROLS = (  # names in conf/strategy
    "public_only", "public_only_total", "placebo", "best_client", "local_only", "fedavg", "centralized",
)  # fmt: skip


def caveats(section: Section) -> list[str]:
    """One sentence for each reason to doubt the section.

    In this order: settings and origins that differ beside what is compared; code that nobody can get back; runs that
    went on elsewhere, did not finish, or have lost rows; clients whose uploads were not merged; strategies that differ
    in their name alone; seeds that are missing or double; controls that differ within a seed, or are missing.
    """
    return [
        *_differences(section), *_uncommitted(section), *_moved(section), *_unfinished(section),
        *_without_rows(section), *_unmerged(section), *_namesakes(section), *_seeds(section), *_controls(section),
        *_missing(section),
    ]  # fmt: skip


def _differences(section: Section) -> Iterator[str]:
    settings = {run: run.conditions for run in section.runs}
    origins = {run: run.provenance for run in section.runs if run.provenance}  # one that was killed may have none
    keys = varying(list(settings.values()))
    named = [key for key in keys if not covers(section.compared, key) or _overrides(section, key)]
    found = [(key, key, settings) for key in named] + [
        (f"{key} (manifest)", key, origins) for key in varying(list(origins.values())) if key != DIRTY
    ]
    for name, key, of_run in found[:MAX_KEYS]:
        values: dict[str, list[Run]] = {}
        for run in section.runs:
            if run in of_run:
                values.setdefault(of_run[run].get(key, "unset"), []).append(run)
        parts = [f"{_short(value)} in {_who(section, runs)}" for value, runs in list(values.items())[:MAX_NAMES]]
        if len(values) > MAX_NAMES:
            parts.append(f"{len(values) - MAX_NAMES} other values")
        yield f"Not only {', '.join(section.compared) or 'the seed'}: {name} is {'; '.join(parts)}."
    if rest := [name for name, _, _ in found[MAX_KEYS:]]:
        yield f"And {plural(len(rest), 'more setting')}: {', '.join(rest)}."


def _uncommitted(section: Section) -> Iterator[str]:
    """Runs with a sitting whose code is in no commit; the fact line has the commit that it was changed from."""
    found = [run for run in section.runs if any(sitting.get(DIRTY) == str(True) for sitting in run.sittings)]
    if found:
        yield (
            f"Code with uncommitted changes (git.dirty in manifest.json), so that no commit gives these runs again: "
            f"{_who(section, found)}."
        )


def _moved(section: Section) -> Iterator[str]:
    """Runs that went on with other code or on another machine than they began with."""
    named = []
    for group in section.groups:
        for run in group.runs:
            known = [sitting for sitting in run.sittings if sitting]
            if keys := varying(known):
                said = [f"{key} {_chain(sitting.get(key, 'unset') for sitting in known)}" for key in keys[:MAX_NAMES]]
                said += [f"{plural(len(keys) - MAX_NAMES, 'more key')}"] if len(keys) > MAX_NAMES else []
                named.append(f"{group.label}, seed {run.seed}: {'; '.join(said)} ({run.path})")
    if named:
        more = [f"{len(named) - MAX_RUNS} more runs"] if len(named) > MAX_RUNS else []
        yield f"Went on with other code or on another machine than before. {'. '.join(named[:MAX_RUNS] + more)}."


def _chain(values: Iterable[str]) -> str:
    """The values one after the other, those that follow an equal one left out."""
    return ", then ".join(_short(value) for value, _ in groupby(values))


def _overrides(section: Section, key: str) -> bool:
    """Whether one strategy sets `key` for itself, which others take from the settings above.

    A strategy's YAML repeats settings: `strategy.client.local_epochs: ${client.local_epochs}`. With
    `strategy.client.local_epochs=5` one strategy trains longer than the others, and `client.local_epochs`, which is
    the same for all, does not tell. A key that has one value wherever it stands is no such case, whatever it is called
    and whether or not a setting of that name happens to have the same value.
    """
    if not covers(["strategy"], key) or covers([name for name in section.compared if name != "strategy"], key):
        return False
    having = [run.conditions for run in section.runs if key in run.conditions]
    name = key.rpartition(".")[2]
    above = {other for run in having for other in run if other.rpartition(".")[2] == name}
    repeats = any(run[key] == run.get(other) for other in above if not covers(["strategy"], other) for run in having)
    return name != "_target_" and repeats and len({run[key] for run in having}) > 1


def _who(section: Section, runs: Sequence[Run]) -> str:
    names, named = [], set(runs)
    for group in section.groups:
        own = [run for run in group.runs if run in named]
        if own:
            names.append(group.label if len(own) == len(group.runs) else f"{group.label} (seed {_seeds_of(own)})")
    return _listed(names)


def _unfinished(section: Section) -> Iterator[str]:
    left_out = [(group, run) for group in section.groups for run in group.runs if not run.completed]
    if left_out:
        named = [f"{g.label}, seed {r.seed}: {r.status} after round {r.rounds} ({r.path})" for g, r in left_out]
        more = [f"{len(named) - MAX_RUNS} more"] if len(named) > MAX_RUNS else []
        yield (
            f"{plural(len(left_out), 'run')} did not complete: not in the means. {'; '.join(named[:MAX_RUNS] + more)}."
        )


def _without_rows(section: Section) -> Iterator[str]:
    """Completed runs of which the summary alone speaks, of all rounds or the last ones."""
    named = [
        f"{group.label}, seed {run.seed}: {'none' if run.last_row is None else f'to round {run.last_row}'} "
        f"of {plural(run.rounds, 'round')} ({run.path})"
        for group in section.groups
        for run in group.completed
        if run.last_row is None or run.last_row < run.rounds
    ]
    if named:
        more = [f"{len(named) - MAX_RUNS} more runs"] if len(named) > MAX_RUNS else []
        yield (
            f"Rows are missing in metrics.jsonl: controls, curves and failed clients of these runs are not known, the "
            f"rest is what summary.json says. {'; '.join(named[:MAX_RUNS] + more)}."
        )


def _unmerged(section: Section) -> Iterator[str]:
    """Runs that went on without some clients, those that lost the greatest share first."""
    found: list[tuple[float, str]] = []
    for group in section.groups:
        for run in group.runs:
            asked, merged = sum(run.tasks.values()), run.tasks.get("ok", 0)
            parts = []
            if asked > merged:
                lost = ", ".join(f"{n} {kind}" for kind, n in run.tasks.items() if n and kind != "ok")
                parts.append(f"{merged} of {plural(asked, 'client task')} merged ({lost})")
                if len(never := run.never_merged) == 1:
                    parts.append(f"partition {never[0]} was never merged")
                elif never:
                    parts.append(f"{len(never)} partitions were never merged: {_listed(list(map(str, never)))}")
            if idle := run.idle_rounds:
                parts.append(f"nobody asked in {idle} of {plural(run.rounds, 'round')}")
            if parts:
                text = f"{group.label}, seed {run.seed}: {', '.join(parts)}"
                found.append((merged / asked if asked else 0.0, text))
    if found:
        named = [text for _, text in sorted(found, key=lambda item: item[0])]
        more = [f"{len(named) - MAX_RUNS} more runs"] if len(named) > MAX_RUNS else []
        yield f"Not every client had its part in the result. {'; '.join(named[:MAX_RUNS] + more)}."


def _namesakes(section: Section) -> Iterator[str]:
    """Groups that would be one if their strategy's file were called the same."""
    alike: dict[frozenset[tuple[str, str]], list[str]] = {}
    for group in section.groups:
        own = {key: value for key, value in group.runs[0].choices.items() if key != "strategy.name"}
        alike.setdefault(frozenset(own.items()), []).append(group.label)
    for labels in alike.values():
        if len(labels) > 1:
            yield f"{_listed(labels)} have the same configuration: they differ in the strategy's name alone."


def _seeds(section: Section) -> Iterator[str]:
    started = {group: [run.seed for run in group.runs] for group in section.groups}
    everywhere = {seed for seeds in started.values() for seed in seeds if seed is not None}
    for group in section.groups:
        seeds = started[group]
        if missing := sorted(everywhere.difference(seeds)):
            yield f"{group.label} has no run of seed {', '.join(map(str, missing))}."
        done = [run.seed for run in group.completed]
        if double := sorted({seed for seed in done if seed is not None and done.count(seed) > 1}):
            yield (
                f"{group.label} has more than one run of seed {', '.join(map(str, double))}: their mean counts, once."
            )
    if all(len({run.seed for run in group.completed}) < 2 for group in section.groups):
        yield "One seed each: differences of the size of the spread over seeds mean nothing."


def _controls(section: Section) -> Iterator[str]:
    """A seed's runs should share its untrained network and its images; the table has those of the first."""
    for control, metrics in section.controls.items():
        for name, by_seed in metrics.items():
            differing = [seed for seed, value in by_seed.items() if _others(section, control, name, seed, value)]
            if differing:
                seed = differing[0]
                runs = [
                    f"{v:.3f} in {_who(section, [r])}" for v, r in _others(section, control, name, seed, by_seed[seed])
                ]
                more = f" (likewise seed {', '.join(map(str, differing[1:]))})" if differing[1:] else ""
                yield (
                    f"{control} is not one control: of seed {seed} its {METRICS[name]} is {by_seed[seed]:.3f} in the "
                    f"table and {_listed(runs)}{more}. These runs' settings or machines differ in what it is made of."
                )
                break


def _others(section: Section, control: str, name: str, seed: int, value: float) -> list[tuple[float, Run]]:
    """What runs of this seed have instead of `value`, as far as a reader would see it, and one run for each."""
    found: dict[str, tuple[float, Run]] = {}
    for run in (run for run in section.runs if run.seed == seed and run.declared_family):
        own = run.controls().get(control, {}).get(name)
        if own is not None and abs(own - value) >= TIE:
            found.setdefault(f"{own:.3f}", (own, run))
    return list(found.values())


def _missing(section: Section) -> Iterator[str]:
    """The rows without which a table proves little."""
    done = {group.runs[0].strategy for group in section.groups if group.completed}
    missing = [name for name in ("random init", "raw pixels") if name not in section.controls]
    missing += [name for name in CONTROLS if name not in done]
    local = [group for group in section.groups if group.runs[0].strategy == "local_only" and group.completed]
    if any(not group.values(f"{name}_min") for group in local for name in METRICS if group.values(name)):
        missing.append("lowest and highest client of local_only")
    if missing:
        pixels = "raw pixels" in missing
        yield (
            f"Controls that are missing here: {', '.join(missing)}. Without them nobody knows what the rest is "
            f"worth; strategy=<name> runs one{'; evaluate.raw_pixels=true measures the pixels' if pixels else ''}."
        )


def _seeds_of(runs: Sequence[Run]) -> str:
    return ", ".join(dict.fromkeys(str(run.seed) for run in runs))


def _listed(names: Sequence[str]) -> str:
    more = [f"{len(names) - MAX_NAMES} more"] if len(names) > MAX_NAMES else []
    return ", ".join([*names[:MAX_NAMES], *more])


def _short(value: str) -> str:
    return value if len(value) <= 40 else value[:39] + "…"
