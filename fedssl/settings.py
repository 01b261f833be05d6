"""Which settings say what a run is, and which only where, how long and on what machine it is run.

The lists answer different questions, so they differ; what they share stands once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

# Where files lie, when a sitting ends, what is kept of it: no figure depends on them.
_OF_NO_CONSEQUENCE = (
    "run_dir", "resume", "replay", "max_seconds", "hydra", "data.root", "client.store", "federation.keep_replies_after",
)  # fmt: skip
_MACHINE = ("grid", "device", "client.cuda_graphs")  # figures may depend on it in their last digits

# What a person may change when a run goes on. The rest of OF_A_SITTING is fedssl's to choose, or has files behind it.
RESUMABLE = (*_MACHINE, "data.root", "max_seconds", "federation.num_rounds")
# What two sittings of one run may have differently: replies that were kept stay valid, a published row goes on.
OF_A_SITTING = (*_OF_NO_CONSEQUENCE, *_MACHINE, "federation.num_rounds", "federation.report_family")
# What two runs that are compared may have differently without a warning; means are over the seed. Not the machine, and
# not the number of rounds: they may be the reason for a difference.
INERT = (*_OF_NO_CONSEQUENCE, "seed", "federation.keep_checkpoints", "data.download", "evaluate.root")
# What never makes two groups of runs in a comparison: a warning is enough.
INCIDENTAL = (*INERT, *_MACHINE, "federation.min_replies", "federation.round_timeout", "federation.devices.idle_s")
# What a figure of one run cannot depend on, beside what INCIDENTAL has of a comparison of many.
_OF_NO_FIGURE = (*INCIDENTAL, "codec", "distill", "downlink", "embedding", "ensemble")


def covers(names: Sequence[str], key: str) -> bool:
    """Whether the dotted `key` is one of `names` or below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def of_a_result(config: Mapping[str, Any]) -> dict[str, Any]:
    """The flattened settings that a run's figures may depend on, its rounds among them, the machine not.

    Strategies have their own copy of what is exchanged and distilled; of `models` those count that are trained.
    """
    federation = config["federation"]
    names = {f"models.{name}" for name in (*federation["families"], *federation.get("server_families", ()))}
    return {
        key: value
        for key, value in flatten(config).items()
        if key == "seed" or not (covers(_OF_NO_FIGURE, key) or (covers(["models"], key) and not covers([*names], key)))
    }


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys; lists stay as they are."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def of_every_sitting(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without OF_A_SITTING."""
    return _without(config, OF_A_SITTING, "")


def _without(tree: Mapping[str, Any], names: Sequence[str], prefix: str) -> dict[str, Any]:
    return {
        key: _without(value, names, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in tree.items()
        if not covers(names, f"{prefix}{key}")
    }
