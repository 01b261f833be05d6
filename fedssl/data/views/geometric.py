"""Views of digits, white strokes on black: they are moved and bent a little, never mirrored and never recoloured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fedssl.data.views.base import Normalisation, Uniform, check_number, check_range


@dataclass(frozen=True, kw_only=True, eq=False)
class GeometricDraw:
    """Every random number of a batch's views.

    Args:
        affine: where a view looks: maps its coordinates to the image's. Both run from -1 to 1, x (to the right) before
            y (down); the last column is an offset.
        contrast: factor on the pixels.
        brightness: added to the pixels, which count 0..255.
        noise: added to the pixels too, before they are clamped.
    """

    affine: Float[Tensor, "b 2 3"]
    contrast: Float[Tensor, " b"]
    brightness: Float[Tensor, " b"]
    noise: Float[Tensor, "b 1 s s"] | None


@dataclass(frozen=True, kw_only=True)
class GeometricViews(Normalisation):
    """Random views of digits. The numbers live in conf/views/geometric.yaml.

    Each image is rotated, sheared, scaled and shifted in one bilinear resampling (outside is black), then changed in
    contrast and brightness, the same in all channels.

    Args:
        image_size: of a view, in pixels; the images may have another size.
        rotation: largest angle in degrees, to either side.
        shear: largest slant in degrees, horizontally and vertically.
        scale: magnification, from and to, horizontally and vertically on their own.
        shift: largest shift as a share of the image's side, in both directions.
        contrast: pixels are multiplied by a factor from [1 - contrast, 1 + contrast].
        brightness: then shifted by up to this share of white.
        noise: standard deviation of Gaussian noise as a share of white, one draw per pixel for all channels.
    """

    image_size: int
    rotation: float
    shear: float
    scale: Sequence[float]
    shift: float
    contrast: float
    brightness: float
    noise: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("image_size", self.image_size, 1, 4096)
        check_number("rotation", self.rotation, 0, 180)
        check_number("shear", self.shear, 0, 40)  # two slants of 45 degrees collapse, more would mirror
        object.__setattr__(self, "scale", check_range("scale", self.scale, 0, 10))
        for name in ("shift", "contrast", "brightness", "noise"):
            check_number(name, getattr(self, name), 0, 1)

    def __call__(self, images: UInt8[Tensor, "b 3 h w"], generator: torch.Generator) -> Float[Tensor, "b 3 s s"]:
        """One random view of each image; see Views."""
        return self.apply(images, self.draw(len(images), generator))

    def draw(self, b: int, generator: torch.Generator) -> GeometricDraw:
        """Everything random about one view of each of `b` images, on the generator's device."""
        uniform = Uniform(b, generator)
        angle = torch.deg2rad(uniform.between(-self.rotation, self.rotation))
        slant = torch.tan(torch.deg2rad(uniform.columns(-self.shear, self.shear, 2)))
        log_scale = uniform.columns(math.log(self.scale[0]), math.log(self.scale[1]), 2)
        shift = uniform.columns(-2 * self.shift, 2 * self.shift, 2)
        cos, sin, slant_x, slant_y = angle.cos(), angle.sin(), slant[:, 0], slant[:, 1]
        x_axis = torch.stack([cos - sin * slant_y, sin + cos * slant_y], dim=1)  # rotation times [[1, x], [y, 1]]
        y_axis = torch.stack([cos * slant_x - sin, sin * slant_x + cos], dim=1)
        look_at = torch.stack([x_axis, y_axis], dim=2) * (-log_scale).exp()[:, None, :]  # less of the image: larger
        noise = None
        if self.noise > 0:
            size = (b, 1, self.image_size, self.image_size)
            noise = 255 * self.noise * torch.randn(size, generator=generator, device=generator.device)
        return GeometricDraw(
            affine=torch.cat([look_at, shift[:, :, None]], dim=2),
            contrast=uniform.between(1 - self.contrast, 1 + self.contrast),
            brightness=255 * uniform.between(-self.brightness, self.brightness),
            noise=noise,
        )

    def apply(self, images: UInt8[Tensor, "b 3 h w"], draw: GeometricDraw) -> Float[Tensor, "b 3 s s"]:
        """The views that `draw` describes, normalised; a pure function."""
        b, size = len(images), self.image_size
        centres = (2 * torch.arange(size, device=images.device) + 1) / size - 1
        along_x, along_y, offset = draw.affine[:, :, :, None, None].unbind(2)  # each (b, 2, 1, 1)
        grid = along_x * centres + along_y * centres[:, None] + offset  # (b, 2, s, s)
        pixels = torch.nn.functional.grid_sample(
            images.to(torch.float32), grid.permute(0, 2, 3, 1), padding_mode="zeros", align_corners=False
        )
        pixels.mul_(draw.contrast.view(b, 1, 1, 1)).add_(draw.brightness.view(b, 1, 1, 1))
        if draw.noise is not None:
            pixels += draw.noise
        return self.normalise_(pixels.clamp_(0, 255))
