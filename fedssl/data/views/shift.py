"""Views that keep what an image shows: shifted by a few pixels, perhaps mirrored. For matching another network."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from fedssl.data.views.base import Normalisation, Uniform, check_number


@dataclass(frozen=True, kw_only=True, eq=False)
class ShiftDraw:
    """Every random number of a batch's views.

    Args:
        offset: pixels by which a view looks further down and further right.
        flip: mirror left and right.
    """

    offset: Int64[Tensor, "b 2"]
    flip: Bool[Tensor, " b"]


@dataclass(frozen=True, kw_only=True)
class ShiftViews(Normalisation):
    """Each image shifted by whole pixels, mirrored at the edge where it has none. Numbers in conf/views/shift.yaml.

    Args:
        shift: largest shift as a share of the image's side, in both directions, rounded to pixels; at most 0.5.
        flip_probability: of mirroring left and right.
    """

    shift: float
    flip_probability: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("shift", self.shift, 0, 0.5)
        check_number("flip_probability", self.flip_probability, 0, 1)

    def __call__(self, images: UInt8[Tensor, "b 3 h w"], generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
        """One random view of each image; see Views."""
        return self.apply(images, self.draw(len(images), images.shape[2:], generator))

    def draw(self, b: int, size: tuple[int, int] | torch.Size, generator: torch.Generator) -> ShiftDraw:
        """Everything random about one view of each of `b` images of `size` (height, width)."""
        uniform = Uniform(b, generator)
        furthest = [round(self.shift * side) for side in size]
        offset = torch.stack([uniform.between(0, 2 * far + 1).long() - far for far in furthest], dim=1)
        return ShiftDraw(offset=offset, flip=uniform.happens(self.flip_probability))

    def apply(self, images: UInt8[Tensor, "b 3 h w"], draw: ShiftDraw) -> Float[Tensor, "b 3 h w"]:
        """The views that `draw` describes, normalised; a pure function."""
        height, width = images.shape[2:]
        rows = _mirrored(torch.arange(height, device=images.device) + draw.offset[:, :1], height)
        columns = _mirrored(torch.arange(width, device=images.device) + draw.offset[:, 1:], width)
        columns = torch.where(draw.flip[:, None], columns.flip(1), columns)
        image, channel = torch.arange(len(images), device=images.device), torch.arange(3, device=images.device)
        pixels = images[
            image[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None]
        ]
        return self.plain(pixels)


def _mirrored(positions: Int64[Tensor, "b s"], size: int) -> Int64[Tensor, "b s"]:
    """Positions beyond an edge as the ones that lie as far inside of it."""
    positions = positions.abs()
    return torch.where(positions >= size, 2 * (size - 1) - positions, positions)
