"""What every kind of views has: a call for random views, and one deterministic transform."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from fedssl.errors import ConfigError


@runtime_checkable
class Views(Protocol):
    """Turns uint8 images into normalised float32 inputs of a network, on the images' device.

    What differs from call to call comes from images and generator alone: on a GPU calls are recorded and replayed.
    """

    def __call__(self, images: UInt8[Tensor, "b 3 h w"], generator: torch.Generator) -> Float[Tensor, "b 3 s s"]:
        """One random view of each image; call twice for a pair.

        Args:
            images: a batch; never changed.
            generator: lives on the images' device; source of every draw, so that its seed fixes the result.
        """
        ...

    def plain(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """The deterministic transform, for evaluation and the public set: no draw, no resizing."""
        ...

    def describe(self) -> str:
        """The deterministic transform in words; part of the public set's fingerprint."""
        ...


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Pixels / 255, then (x - mean) / std: the last step of every view and the whole of `plain`.

    Args:
        mean: of each channel, pixels counted from 0 to 1.
        std: of each channel, likewise; > 0.
    """

    mean: Sequence[float]
    std: Sequence[float]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) != 3 or (name == "std" and min(values) <= 0):
                raise ConfigError(
                    f"views.{name} must be three numbers{' above 0' if name == 'std' else ''}, one a channel, "
                    f"for pixels between 0 and 1; got {list(values)}. Set views.{name}, e.g. [0.5,0.5,0.5]."
                )
            object.__setattr__(self, name, values)  # a tuple whatever YAML gave: frozen all the way down

    def plain(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Normalise images of any size; the same input gives the same bits on one device."""
        return self.normalise_(images.to(torch.float32))

    def normalise_(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Normalise float pixels (0 to 255) in place and return them."""
        scale, shift = self.scale_and_shift()
        return pixels.mul_(channel_constant(scale, pixels.device)).add_(channel_constant(shift, pixels.device))

    def scale_and_shift(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The same as pixels (0 to 255) * scale + shift, a number for each channel."""
        scale = tuple(1 / (255 * std) for std in self.std)
        return scale, tuple(-mean / std for mean, std in zip(self.mean, self.std, strict=True))

    def describe(self) -> str:
        """Canonical text of `plain`; equal texts mean equal transforms."""
        return f"pixels / 255, then (x - mean) / std with mean={self.mean!r}, std={self.std!r}"


@dataclass(frozen=True)
class Uniform:
    """Draws for the `b` images of a batch, on the device of `numbers`.

    Args:
        b: how many images.
        numbers: where the draws come from: a generator, or blocks of numbers in [0, 1) that one gave, in order.
    """

    b: int
    numbers: torch.Generator | Iterator[Float[Tensor, " n"]]

    def columns(self, low: float, high: float, num: int) -> Float[Tensor, "b num"]:
        """`num` numbers per image, uniform on [low, high)."""
        if isinstance(self.numbers, torch.Generator):
            draws = torch.rand(self.b, num, generator=self.numbers, device=self.numbers.device)
        else:
            draws = next(self.numbers).view(self.b, num)
        return (draws * (high - low)).add_(low)

    def between(self, low: float, high: float) -> Float[Tensor, " b"]:
        """One number per image, uniform on [low, high)."""
        return self.columns(low, high, 1)[:, 0]

    def happens(self, probability: float) -> Tensor:
        """(b,) bool: True with `probability`, independently per image."""
        return self.between(0, 1) < probability

    def orders(self, num: int) -> Int64[Tensor, "b num"]:
        """A random order of 0..num-1 per image, all equally likely."""
        return self.columns(0, 1, num).argsort(dim=1)


def check_range(name: str, values: Sequence[float], low: float, high: float) -> tuple[float, float]:
    """`values` as a pair with low < values[0] <= values[1] <= high; otherwise a ConfigError about views.<name>."""
    pair = tuple(float(value) for value in values)
    if len(pair) != 2 or not low < pair[0] <= pair[1] <= high:
        raise ConfigError(
            f"views.{name} must be [from, to] with {low:g} < from <= to <= {high:g}, got {list(pair)}. "
            f"Change views.{name}."
        )
    return pair


def check_number(name: str, value: float, low: float, high: float) -> None:
    """low <= value <= high; otherwise a ConfigError about views.<name>."""
    if not low <= value <= high:
        raise ConfigError(f"views.{name} must be between {low:g} and {high:g}, got {value:g}. Change views.{name}.")


@lru_cache(maxsize=64)
def channel_constant(values: tuple[float, ...], device: torch.device) -> Float[Tensor, "3 1 1"]:
    """One number per channel on `device`. Cached: copying from the host for every batch would wait for the GPU."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]
