"""Colour jitter of a batch: every image has its own order and factors.

`jitter` equals torchvision's functions one after the other. `linear_jitter` folds them into one 3x3 matrix and an
offset per image. Pixels are floats in 0..255 here.
"""

import math

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from fedssl.data.views.base import channel_constant

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's numbering in ColorJitter
LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision rounds it


def luma(pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
    """The grey value of each pixel."""
    red, green, blue = pixels.chunk(3, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def jitter_(
    pixels: Float[Tensor, "b 3 h w"], order: Int64[Tensor, "b 4"], factors: Float[Tensor, "b 4"]
) -> Float[Tensor, "b 3 h w"]:
    """Apply torchvision's adjust_brightness, _contrast, _saturation and _hue in each image's order; overwrites pixels.

    The first three are one formula, a step away from a grey target, so a batch needs no sorting by order: up to three
    steps before each image's hue shift, the hue shift, and the remaining steps after it. No step waits for a GPU.

    Args:
        pixels: 0..255.
        order: row i is a permutation of (BRIGHTNESS, CONTRAST, SATURATION, HUE).
        factors: factors[i, op] of operation op on image i; 1, 1, 1, 0 leaves the image as it is, bit for bit.
    """
    hue_slot = (order == HUE).int().argmax(dim=1)
    factor_in_slot = factors.gather(1, order)
    for slot in range(3):
        factor = torch.where(slot < hue_slot, factor_in_slot[:, slot], 1)
        _step_from_grey_(pixels, factor, order[:, slot])
    hue = factors[:, HUE]
    pixels = torch.lerp(pixels, shift_hue(pixels, hue), _columns((hue != 0).float()))
    for slot in range(1, 4):
        factor = torch.where(slot > hue_slot, factor_in_slot[:, slot], 1)
        _step_from_grey_(pixels, factor, order[:, slot])
    return pixels


def _step_from_grey_(
    pixels: Float[Tensor, "b 3 h w"], factor: Float[Tensor, " b"], operation: Int64[Tensor, " b"]
) -> None:
    """target + factor * (pixels - target), clamped; the target is black, the image's mean grey or the pixel's grey."""
    grey = luma(pixels)
    mean = grey.mean(dim=(2, 3), keepdim=True)
    target = grey * _columns(operation == SATURATION) + mean * _columns(operation == CONTRAST)
    torch.lerp(pixels, target, 1 - _columns(factor), out=pixels).clamp_(0, 255)


def shift_hue(pixels: Float[Tensor, "b 3 h w"], shift: Float[Tensor, " b"]) -> Float[Tensor, "b 3 h w"]:
    """Rotate the hue of HSV by `shift` turns; value and saturation stay.

    With the hue counted in sixths of a turn, each channel is low + chroma * (a trapezoid of the hue): the usual six
    cases without a case distinction.
    """
    red, green, blue = pixels.chunk(3, dim=1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    red_is_high, green_is_high = torch.empty_like(high), torch.empty_like(high)
    torch.eq(red, high, out=red_is_high)  # 0.0 or 1.0: lerp selects with it, much faster than where with a bool
    torch.eq(green, high, out=green_is_high)
    hue = (red - green).add_(chroma, alpha=4)  # times chroma, in sixths of a turn
    hue.lerp_((blue - red).add_(chroma, alpha=2), green_is_high).lerp_(green - blue, red_is_high)
    hue.div_(chroma.clamp_min(1e-12))  # a grey pixel has chroma 0; its hue does not matter
    hue += 6 * _columns(shift)
    hue.sub_((hue / 6).floor_(), alpha=6)  # into [0, 6)
    out = torch.empty_like(pixels)
    torch.sub(hue, 3, out=out[:, 0:1]).abs_().sub_(1)
    torch.sub(hue, 2, out=out[:, 1:2]).abs_().neg_().add_(2)
    torch.sub(hue, 4, out=out[:, 2:3]).abs_().neg_().add_(2)
    return out.clamp_(0, 1).mul_(chroma).add_(low)


def linear_jitter(
    pixels: Float[Tensor, "b 3 h w"],
    order: Int64[Tensor, "b 4"],
    factors: Float[Tensor, "b 4"],
    grayscale: Bool[Tensor, " b"],
) -> Float[Tensor, "b 3 h w"]:
    """`jitter_` and then grayscale in one step: clamp(matrix @ pixel + offset), one matrix and offset per image.

    Approximate in two ways: pixels are clamped once at the end instead of after each operation, and the hue turns
    around the grey axis of the RGB cube instead of along HSV's hexagon (the two agree at thirds of a turn). The error
    is stated in ColourViews.
    """
    b, _, h, w = pixels.shape
    operations = _operation_matrices(factors).gather(1, order[:, :, None, None].expand(-1, -1, 3, 3))  # (b, slot, 3, 3)
    factor = factors.gather(1, order)
    towards_mean = torch.where(order == CONTRAST, 1 - factor, torch.zeros_like(factor))  # (b, slot)
    grey = channel_constant(LUMA, pixels.device).view(1, 3)
    identity = torch.eye(3, 4, device=pixels.device)
    affine = identity.expand(b, 3, 4)  # matrix and offset side by side
    mean = torch.cat([pixels.mean(dim=(2, 3)), pixels.new_ones(b, 1)], dim=1)[:, :, None]  # (b, 4, 1), homogeneous
    for slot in range(4):
        mean_grey = grey @ (affine @ mean)  # of the image as it is before this operation
        affine = operations[:, slot] @ affine
        affine[:, :, 3:] += towards_mean[:, slot, None, None] * mean_grey
    affine = torch.where(grayscale[:, None, None], (grey @ affine).expand(b, 3, 4), affine)
    out = torch.baddbmm(affine[:, :, 3:], affine[:, :, :3], pixels.view(b, 3, h * w))
    return out.view(b, 3, h, w).clamp_(0, 255)


def _operation_matrices(factors: Float[Tensor, "b 4"]) -> Float[Tensor, "b 4 3 3"]:
    """What each operation does to a pixel, but for contrast's offset; in the order BRIGHTNESS ... HUE."""
    identity = torch.eye(3, device=factors.device)
    to_grey = channel_constant(LUMA, factors.device).view(1, 3).expand(3, 3)
    red_to_green = identity.roll(1, dims=0)
    brightness, contrast, saturation, turns = factors[:, :, None, None].unbind(1)
    angle = 2 * math.pi * turns
    rotation = (  # Rodrigues' formula around (1, 1, 1)
        angle.cos() * identity + (1 - angle.cos()) / 3 + angle.sin() / math.sqrt(3) * (red_to_green - red_to_green.mT)
    )
    saturate = saturation * identity + (1 - saturation) * to_grey
    return torch.stack([brightness * identity, contrast * identity, saturate, rotation], dim=1)


def _columns(values: Shaped[Tensor, " b"]) -> Shaped[Tensor, "b 1 1 1"]:
    """One number per image, shaped to meet a batch of images."""
    return values[:, None, None, None]
