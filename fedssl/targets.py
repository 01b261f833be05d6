"""What a node may build: a server sends the configuration, the node's owner says which Python names it may hold.

Hydra's `_target_` names anything that can be imported, so whoever writes a configuration can call anything. A node of
a deployment (`fedssl.deploy`) therefore allows only names that its owner lists, and of a whole package only things that
do nothing when they are built: frozen dataclasses, `torch.nn.Module`s, and functions of a package `models` that say
they return one. What is built can still read files when it is used: which folders, a node's owner says, too.
"""

import dataclasses
import importlib
import typing
from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any

from fedssl.errors import ConfigError

OURS = ("fedssl.", "strategies.")  # what a node allows unless its owner says otherwise

_allowed: tuple[str, ...] | None = None  # of this process; None: everything


def allow_only(entries: Sequence[str]) -> None:
    """From now on this process builds only `entries`, see `check_targets`; a second call cannot allow more."""
    global _allowed
    _allowed = tuple(entries) if _allowed is None else tuple(entry for entry in entries if entry in _allowed)


def check_allowed(node: Any) -> None:
    """Raise `ConfigError` where this process has been told `allow_only` and `node` names something else."""
    if _allowed is not None:
        check_targets(node, _allowed)


def check_targets(node: Any, entries: Sequence[str]) -> None:
    """Hold every `_target_` in a configuration, at any depth, against what is allowed.

    Args:
        node: a resolved configuration, or a part of one.
        entries: "package." allows what is defined in the package and does nothing when it is built; a full name
            ("mypackage.build_model") allows exactly that, whatever it does.

    Raises:
        ConfigError: a target that is not allowed, or an interpolation, which could read this machine's environment.
    """
    for where, value in _leaves(node, ""):
        if isinstance(value, str) and "${" in value:
            raise ConfigError(
                f"{where}={value}: a configuration that is sent must be resolved, it has an interpolation"
            )
        if where.rpartition(".")[2] == "_target_":
            _check(where, value, entries)


def _leaves(node: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            inside = f"{where}.{key}" if where else str(key)
            if key == "_target_":
                yield inside, value  # whole, whatever it is
            else:
                yield from _leaves(value, inside)
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            yield from _leaves(value, f"{where}[{number}]")
    else:
        yield where, node


def _check(where: str, name: Any, entries: Sequence[str]) -> None:
    if name in entries and not str(name).endswith("."):
        return
    hint = f"Allowed are {', '.join(entries) or 'none'} (allow_targets= of this node)."
    prefix = next((entry for entry in entries if entry.endswith(".") and str(name).startswith(entry)), None)
    if not isinstance(name, str) or prefix is None or any(part.startswith("_") for part in name.split(".")):
        raise ConfigError(f"{where}={name} is not allowed here. {hint}")
    target = _resolve(name)
    if target is None:
        raise ConfigError(f"{where}={name}: there is no such class or function in the installed {prefix[:-1]}. {hint}")
    defined = f"{getattr(target, '__module__', '')}."  # a module's imports can be reached through it
    if not defined.startswith(prefix) or not _does_nothing(target):
        raise ConfigError(
            f"{where}={name} is not allowed here: of {prefix}* only dataclasses, torch modules and functions of "
            f"`models` that return one are, by the names that they are defined under. {hint}"
        )


def _resolve(name: str) -> Any:
    """What `name` names; only modules on the way to it are imported."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            found = getattr(found, part, None)
        return found
    return None


def _does_nothing(target: Any) -> bool:
    """Whether building it has no effect but the object."""
    from torch import nn

    if isinstance(target, type):
        parameters = getattr(target, "__dataclass_params__", None)
        frozen = dataclasses.is_dataclass(target) and parameters is not None and parameters.frozen
        return frozen or issubclass(target, nn.Module)
    if not isinstance(target, FunctionType) or "models" not in target.__module__.split("."):
        return False
    try:
        returned = typing.get_type_hints(target).get("return")
    except (NameError, TypeError):
        return False
    return isinstance(returned, type) and issubclass(returned, nn.Module)
