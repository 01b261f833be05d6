"""A worker's models: built once an architecture, and handed out again as if they were new."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from fedssl.models import Model

TENSORS = ("_parameters", "_buffers")


class ModelPool:
    """Hands out the run's initial models. A task gets as many as it asks for; the next task gets the same ones, reset.

    To build one takes milliseconds, and for a client with a handful of images that is most of its work.

    Args:
        build: family -> a new model with the run's initial weights.
    """

    def __init__(self, build: Callable[[str], Model]) -> None:
        self._build = build
        self._initial: dict[str, Model] = {}  # never handed out
        self._free: defaultdict[str, list[Model]] = defaultdict(list)
        self._lent: list[tuple[str, Model]] = []

    def __call__(self, family: str) -> Model:
        """A model with the initial weights, in train mode, on the device that its last user left it on."""
        if family not in self._initial:
            self._initial[family] = self._build(family)
        free = self._free[family]
        while free:
            if _reset(model := free.pop(), self._initial[family]):
                break
        else:
            model = self._build(family)
        self._lent.append((family, model))
        return model

    def take_back(self) -> None:
        """The task is over: what it was lent may be changed from now on."""
        for family, model in self._lent:
            self._free[family].append(model)
        self._lent.clear()


@torch.no_grad()
def _reset(model: Model, initial: Model) -> bool:
    """Make `model` what `initial` is; False where more than weights may differ, e.g. because a hook was left in it."""
    ours, theirs = dict(model.named_modules()), dict(initial.named_modules())
    if ours.keys() != theirs.keys() or not all(_alike(ours[name], theirs[name]) for name in ours):
        return False
    for name, part in ours.items():
        other = theirs[name]
        part.training = other.training
        for kind in TENSORS:
            for mine, original in zip(vars(part)[kind].values(), vars(other)[kind].values(), strict=True):
                if mine is not None:
                    mine.copy_(original)
                    mine.grad = None
                    mine.requires_grad_(original.requires_grad)
    return True


def _alike(part: nn.Module, other: nn.Module) -> bool:
    """The same class, the same names, shapes and dtypes of tensors, and the same in all else but whether it trains."""
    mine, theirs = vars(part), vars(other)
    if type(part) is not type(other) or mine.keys() != theirs.keys():
        return False
    for name in mine.keys() - {"_modules", "training"}:
        if name in TENSORS:
            if [(key, _form(value)) for key, value in mine[name].items()] != [
                (key, _form(value)) for key, value in theirs[name].items()
            ]:
                return False
        elif not _same(mine[name], theirs[name]):
            return False
    return True


def _form(tensor: torch.Tensor | None) -> object:
    return None if tensor is None else (type(tensor), tensor.shape, tensor.dtype)


def _same(one: Any, other: Any) -> bool:
    """Whether two attributes are surely equal; of what has an inside that is not known, nobody can tell."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, partial):
        return bool(one.func is other.func and one.args == other.args and one.keywords == other.keywords)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, int | float | str | set) and bool(one == other)
