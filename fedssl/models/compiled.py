"""Backbones as compiled code while they train, where a run asks for it, and what happens where that is impossible.

A worker compiles a family once: what is compiled depends on the code, the shapes and the mode, not on whose weights go
in. Projectors and heads are a few matrix products and stay as they are, so hooks and methods see what they know.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import MethodType
from typing import Any, Protocol, runtime_checkable

import torch
import torch.compiler
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.models import Model, TargetEncoder

log = logging.getLogger(__name__)

MODES = ("default",)  # of torch.compile's: others choose by trying, which differs by worker, or record what we do
VARIANTS = 64  # of one forward function that a worker keeps: several families share that of torch's Sequential


def check_mode(mode: str | None) -> None:
    """Raise ConfigError unless `client.compile` is null or one of `MODES`."""
    if mode is not None and mode not in MODES:
        raise ConfigError(
            f"client.compile must be null or {' or '.join(MODES)}, got {mode!r}. Set client.compile, or edit it in the "
            f"config.yaml of a run that is resumed."
        )


@runtime_checkable
class Step(Protocol):
    """What a step of a training runs in."""

    def __call__(self, *, usual: bool) -> AbstractContextManager[object]:
        """Batches of another size than `usual` are not compiled: each size would take as long as the first."""


@contextmanager
def compiled(mode: str | None, device: torch.device, *networks: nn.Module) -> Iterator[Step]:
    """Inside, the backbones of all `Model`s and `TargetEncoder`s in `networks` run compiled; copies of them do not.

    Draws are the same, results differ from those without in the last digits. What torch cannot compile runs as it is;
    where it can compile nothing at all (no C++ compiler, no Triton), a warning says so once a process.

    Args:
        mode: of `torch.compile`, one of `MODES`; None leaves all as it is.
        device: where the networks are.
        networks: they are changed inside, and afterwards as they were.
    """
    if mode is None or not _possible(device.type):
        yield plain
        return
    parts = [part for network in networks for part in network.modules() if isinstance(part, Model | TargetEncoder)]

    def step(*, usual: bool) -> AbstractContextManager[object]:
        return nullcontext() if usual else torch.compiler.set_stance("force_eager")

    try:
        for part in parts:
            call = torch.compile(MethodType(_call, part.backbone), mode=mode, dynamic=False)
            vars(part.backbone)["_compiled_call_impl"] = call
        with _settings():
            yield step
    finally:
        for part in parts:
            vars(part.backbone).pop("_compiled_call_impl", None)  # torch offers no way back


def _call(network: nn.Module, x: Tensor) -> Tensor:
    """What `nn.Module.compile` compiles, in a frame of ours: torch 2.11 skips those of its own Sequential."""
    features: Tensor = network._call_impl(x)  # type: ignore[no-untyped-call]
    return features


def plain(*, usual: bool) -> AbstractContextManager[object]:
    """A `Step` where nothing is compiled."""
    return nullcontext()


@contextmanager
def _settings() -> Iterator[None]:
    """Failures to compile, of the backward pass too, leave a network as it is; random draws are those without."""
    wanted: dict[Any, dict[str, object]] = {
        torch._dynamo.config: {"suppress_errors": True, "recompile_limit": VARIANTS},
        torch._functorch.config: {"force_non_lazy_backward_lowering": True},
        torch._inductor.config: {"fallback_random": True},
    }
    with ExitStack() as patches:
        for config, values in wanted.items():
            patches.enter_context(config.patch({k: v for k, v in values.items() if hasattr(config, k)}))  # as torch has
        yield


@functools.cache
def _possible(device: str) -> bool:
    """Whether torch can compile anything for this kind of device."""
    try:
        torch.compile(torch.nn.functional.relu, dynamic=False)(torch.zeros(2, device=device))
    except Exception as error:  # whatever is missing, from a header to a driver
        log.warning(
            "client.compile: torch cannot compile for %s here, so networks run as without it: %s. It needs a C++ "
            "compiler (g++ or clang) and, on a GPU, Triton.",
            device,
            " ".join(str(error).split())[:300] or type(error).__name__,
        )
        return False
    return True
