"""What a reader of a comparison should know before believing it."""

from collections.abc import Iterator, Sequence

from fedssl.report.pages import plural
from fedssl.report.runs import Run, covers, varying
from fedssl.report.sections import Section

MAX_KEYS = 12  # that are described; beyond it they are named
MAX_NAMES = 4  # values of a key, groups of a value
MAX_RUNS = 10


def caveats(section: Section) -> list[str]:
    """What differs beside compared settings and the seed, what did not finish, which seeds are missing or double."""
    return [*_differences(section), *_unfinished(section), *_seeds(section)]


def _differences(section: Section) -> Iterator[str]:
    settings = {id(run): run.conditions for run in section.runs}
    origins = {id(run): run.provenance for run in section.runs if run.provenance}  # one that was killed may have none
    found = [(key, key, settings) for key in varying(list(settings.values())) if not covers(section.compared, key)] + [
        (f"{key} (manifest)", key, origins) for key in varying(list(origins.values()))
    ]
    for name, key, of_run in found[:MAX_KEYS]:
        values: dict[str, list[Run]] = {}
        for run in section.runs:
            if id(run) in of_run:
                values.setdefault(of_run[id(run)].get(key, "unset"), []).append(run)
        parts = [f"{_short(value)} in {_who(section, runs)}" for value, runs in list(values.items())[:MAX_NAMES]]
        if len(values) > MAX_NAMES:
            parts.append(f"{len(values) - MAX_NAMES} other values")
        yield f"Not only {', '.join(section.compared) or 'the seed'}: {name} is {'; '.join(parts)}."
    if rest := [name for name, _, _ in found[MAX_KEYS:]]:
        yield f"And {plural(len(rest), 'more setting')}: {', '.join(rest)}."


def _who(section: Section, runs: Sequence[Run]) -> str:
    names = []
    for group in section.groups:
        own = [run for run in group.runs if any(run is other for other in runs)]
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


def _seeds(section: Section) -> Iterator[str]:
    started = {id(group): [run.seed for run in group.runs] for group in section.groups}
    everywhere = {seed for seeds in started.values() for seed in seeds if seed is not None}
    for group in section.groups:
        seeds = started[id(group)]
        if missing := sorted(everywhere.difference(seeds)):
            yield f"{group.label} has no run of seed {', '.join(map(str, missing))}."
        done = [run.seed for run in group.completed]
        if double := sorted({seed for seed in done if seed is not None and done.count(seed) > 1}):
            yield (
                f"{group.label} has more than one run of seed {', '.join(map(str, double))}: each counts in the means, "
                f"their mean in paired differences."
            )
    if all(len({run.seed for run in group.completed}) < 2 for group in section.groups):
        yield "One seed each: differences of the size of the spread over seeds mean nothing."


def _seeds_of(runs: Sequence[Run]) -> str:
    return ", ".join(dict.fromkeys(str(run.seed) for run in runs))


def _listed(names: Sequence[str]) -> str:
    more = [f"{len(names) - MAX_NAMES} more"] if len(names) > MAX_NAMES else []
    return ", ".join([*names[:MAX_NAMES], *more])


def _short(value: str) -> str:
    return value if len(value) <= 40 else value[:39] + "…"
