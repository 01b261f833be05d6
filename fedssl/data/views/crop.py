"""Random resized crops and flips of a batch, as two small matrix products per image."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from fedssl.data.views.base import Uniform

NUM_ATTEMPTS = 10  # torchvision's RandomResizedCrop tries as often before it takes the largest box


def draw_boxes(
    uniform: Uniform, height: int, width: int, scale: Sequence[float], ratio: Sequence[float]
) -> Int64[Tensor, "b 4"]:
    """Boxes (top, left, height, width) in pixels, by the rule of torchvision's RandomResizedCrop.

    The area is uniform, the aspect ratio log-uniform; a box that does not fit is drawn again, ten times at most, after
    which the largest box of an allowed ratio is taken, at a random place.

    Args:
        uniform: the source of the draws, for as many boxes as it has images.
        height: of the images.
        width: of the images.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width / height.
    """
    area = uniform.columns(scale[0], scale[1], NUM_ATTEMPTS) * (height * width)
    aspect = uniform.columns(math.log(ratio[0]), math.log(ratio[1]), NUM_ATTEMPTS).exp()
    heights, widths = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    last_resort = largest_box(height, width, ratio)
    heights = torch.nn.functional.pad(heights, (0, 1), value=last_resort[0])
    widths = torch.nn.functional.pad(widths, (0, 1), value=last_resort[1])
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
    first = fits.int().argmax(dim=1, keepdim=True)
    h, w = heights.gather(1, first)[:, 0], widths.gather(1, first)[:, 0]
    top = (uniform.between(0, 1) * (height - h + 1)).floor()
    left = (uniform.between(0, 1) * (width - w + 1)).floor()
    return torch.stack([top, left, h, w], dim=1).long()


def resized_crop(
    images: UInt8[Tensor, "b 3 h w"], boxes: Int64[Tensor, "b 4"], flip: Bool[Tensor, " b"], size: int
) -> Float[Tensor, "b 3 size size"]:
    """Cut out one box per image, bring it to (size, size) and mirror it where `flip`; pixels stay in 0..255.

    Bilinear with antialiasing, torchvision's default for tensors (`antialias=True`). The filter is separable, so a view
    is R @ image @ C for a (size, h) matrix R and a (w, size) matrix C, which a batched matrix product handles without
    a gather; it equals torchvision's `resized_crop` and `horizontal_flip` up to float32 rounding.
    """
    b, _, h, w = images.shape
    top, left, box_height, box_width = boxes.unbind(1)
    rows = _resampling(top, box_height, h, size, torch.zeros_like(flip))
    columns = _resampling(left, box_width, w, size, flip)
    pixels = torch.bmm(images.to(torch.float32).reshape(b, 3 * h, w), columns.mT).view(b, 3, h, size)
    return rows[:, None] @ pixels


def _resampling(
    start: Int64[Tensor, " b"], length: Int64[Tensor, " b"], num_in: int, num_out: int, reverse: Bool[Tensor, " b"]
) -> Float[Tensor, "b num_out num_in"]:
    """Row i of a matrix holds the weights of output pixel i over a line of `num_in` pixels.

    A triangle around the output pixel's centre, one input pixel wide to either side, or one output pixel where the box
    is reduced (that is the antialiasing); zero outside the box; rows sum to one. With `reverse`, from last to first.
    """
    output = torch.arange(num_out, device=start.device)
    output = torch.where(reverse[:, None], output.flip(0), output)[:, :, None]
    start, end = start[:, None, None], (start + length)[:, None, None]
    step = (end - start) / num_out  # input pixels per output pixel
    centre = start + (output + 0.5) * step
    pixel = torch.arange(num_in, device=start.device) + 0.5
    weight = (pixel - centre).abs_().div_(step.clamp_min(1)).neg_().add_(1)
    within = torch.minimum(pixel - start, end - pixel).mul_(2)  # at least 1 in the box, negative outside
    weight = torch.minimum(weight, within).clamp_min_(0)
    return weight.div_(weight.sum(dim=2, keepdim=True))


def largest_box(height: int, width: int, ratio: Sequence[float]) -> tuple[int, int]:
    """(height, width) of the largest box whose ratio is allowed; at least one pixel."""
    return max(1, min(height, round(width / ratio[0]))), max(1, min(width, round(height * ratio[1])))
