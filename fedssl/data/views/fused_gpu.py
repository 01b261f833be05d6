"""SimCLR's views as two Triton kernels: one makes a batch's draws, one computes a view while it lies in registers.

As tensor operations a batch of views is some 280 kernels, each of which takes a few microseconds at least, and most of
which read and write all pixels. Here are the same formulas as in colour.py, crop.py and jitter.py on the same random
numbers; what is summed in another order differs in the last bits. For CUDA GPUs.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, UInt8
from torch import Tensor

from fedssl.data.views.colour import COLUMNS, ColourDraw, ColourViews
from fedssl.data.views.crop import NUM_ATTEMPTS, largest_box
from fedssl.data.views.jitter import BRIGHTNESS, CONTRAST, HUE, LUMA, SATURATION

IMAGES = 128  # for which one program draws
PIXELS, MOST_WARPS = 128, 16  # pixels that one warp holds, where that are not more warps than a view's registers allow

_ATTEMPTS = tl.constexpr(NUM_ATTEMPTS)
_BRIGHTNESS, _CONTRAST = tl.constexpr(BRIGHTNESS), tl.constexpr(CONTRAST)
_SATURATION, _HUE = tl.constexpr(SATURATION), tl.constexpr(HUE)
_RED, _GREEN, _BLUE = (tl.constexpr(share) for share in LUMA)
_TURN, _SQRT_3 = tl.constexpr(2 * math.pi), tl.constexpr(math.sqrt(3))
_WHOLE = tl.constexpr(1.5 * 2**23)  # float32 has no fractions from there on


def agree(views: ColourViews, device: torch.device, size: Sequence[int]) -> bool:
    """Whether on `device` the kernels give what tensor operations give, for a few images of `size` (height, width).

    Raises:
        Exception: whatever Triton says, e.g. where it finds no C compiler, with which it builds what starts kernels.
    """
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randint(0, 256, (16, 3, *size), dtype=torch.uint8, device=device, generator=generator)
    numbers = torch.rand(sum(COLUMNS) * 130, device=device, generator=generator)  # two programs, the second not full
    draw = draw_colour_views(views, numbers, size)
    expected = replace(views, kernel="torch").draw_from(numbers, size)
    scale, shift = views.scale_and_shift()
    linear = views.colour == "linear"
    out = colour_views(images, expected[:16], image_size=views.image_size, linear=linear, scale=scale, shift=shift)
    on_cpu = expected[:16].to(torch.device("cpu"))  # in float32, whatever matrix products are on the GPU
    reference = replace(views, kernel="torch", blur_probability=0.0).apply(images.cpu(), on_cpu)
    return (
        torch.allclose(out.cpu(), reference, rtol=0, atol=1e-4 / min(views.std))
        and all(torch.equal(getattr(draw, name), getattr(expected, name)) for name in ("flip", "order", "grayscale"))
        and all(
            torch.allclose(getattr(draw, name), getattr(expected, name), atol=1e-5)
            for name in ("factors", "blur_sigma")
        )
        and bool(((draw.box - expected.box).abs() <= 1).all())
    )


def draw_colour_views(views: ColourViews, numbers: Float[Tensor, " n"], size: Sequence[int]) -> ColourDraw:
    """What `ColourViews.draw_from` makes of the same random numbers.

    A box whose side lies within rounding of the middle between two pixels may be one pixel larger or smaller, or, where
    that decides whether it fits, another one.
    """
    b, device = len(numbers) // sum(COLUMNS), numbers.device
    draw = ColourDraw(
        box=torch.empty(b, 4, dtype=torch.int64, device=device),
        flip=torch.empty(b, dtype=torch.bool, device=device),
        order=torch.empty(b, 4, dtype=torch.int64, device=device),
        factors=torch.empty(b, 4, device=device),
        grayscale=torch.empty(b, dtype=torch.bool, device=device),
        blur_sigma=torch.empty(b, device=device),
    )
    logarithms = [math.log(ratio) for ratio in views.crop_ratio]
    ranges = [views.crop_scale, logarithms, *views.factor_ranges, views.blur_sigma]
    probabilities = (
        views.flip_probability, views.jitter_probability, views.grayscale_probability, views.blur_probability
    )  # fmt: skip
    with torch.cuda.device_of(numbers):  # type: ignore[no-untyped-call]  # else Triton takes the current one
        _draw[(triton.cdiv(b, IMAGES),)](
            numbers,
            *(draw.box, draw.flip, draw.order, draw.factors, draw.grayscale, draw.blur_sigma),
            *(b, *size, *largest_box(size[0], size[1], views.crop_ratio)),
            *(float(number) for low, high in ranges for number in (low, high - low)),
            *(float(probability) for probability in probabilities),
            IMAGES=IMAGES,
            enable_fp_fusion=False,  # rounds as torch's operations do
        )
    return draw


def colour_views(
    images: UInt8[Tensor, "b 3 h w"],
    draw: ColourDraw,
    *,
    image_size: int,
    linear: bool,
    scale: Sequence[float],
    shift: Sequence[float],
) -> Float[Tensor, "b 3 s s"]:
    """The views that `draw` describes but for their blur: pixels * scale + shift per channel, channels last in memory.

    Args:
        images: on a GPU.
        draw: likewise.
        image_size: s; a program holds a view, in registers.
        linear: one matrix and offset per image instead of jitter and grayscale; see `linear_jitter`.
        scale: of each channel, pixels counted from 0 to 255.
        shift: likewise.
    """
    b, _, height, width = images.shape
    out = torch.empty(b, image_size, image_size, 3, device=images.device)
    per_image = [images, draw.box, draw.flip, draw.order, draw.factors, draw.grayscale]
    pixels = triton.next_power_of_2(image_size**2)
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        _view[(b,)](
            *(tensor.contiguous() for tensor in per_image),
            out,
            *scale,
            *shift,
            HEIGHT=height,
            WIDTH=width,
            SIZE=image_size,
            PIXELS=pixels,
            LINEAR=linear,
            num_warps=min(MOST_WARPS, max(1, pixels // PIXELS)),
            enable_fp_fusion=False,
        )
    return out.permute(0, 3, 1, 2)


@triton.jit
@no_type_check
def _draw(
    numbers, box, flip, order, factors, grayscale, sigma,
    b, height, width, largest_height, largest_width,
    scale_low, scale_span, ratio_low, ratio_span, brightness_low, brightness_span, contrast_low, contrast_span,
    saturation_low, saturation_span, hue_low, hue_span, sigma_low, sigma_span,
    flip_probability, jitter_probability, grayscale_probability, blur_probability,
    IMAGES: tl.constexpr,
):  # fmt: skip
    """numbers (35 b,): a block of (b, columns) for each of COLUMNS; the rest as in ColourDraw."""
    i = tl.program_id(0) * IMAGES + tl.arange(0, IMAGES)
    there = i < b
    box_height = tl.zeros([IMAGES], tl.float32) + largest_height
    box_width = tl.zeros([IMAGES], tl.float32) + largest_width
    for attempt in tl.static_range(_ATTEMPTS):  # the first that fits is the last to be looked at
        column = i * _ATTEMPTS + (_ATTEMPTS - 1 - attempt)
        scale = tl.load(numbers + column, there, other=0.0) * scale_span + scale_low
        ratio = tl.exp(tl.load(numbers + b * _ATTEMPTS + column, there, other=0.0) * ratio_span + ratio_low)
        area = scale * (height * width)
        h, w = _rounded(tl.sqrt_rn(tl.div_rn(area, ratio))), _rounded(tl.sqrt_rn(area * ratio))
        fits = (h >= 1) & (h <= height) & (w >= 1) & (w <= width)
        box_height, box_width = tl.where(fits, h, box_height), tl.where(fits, w, box_width)
    rest = numbers + 2 * b * _ATTEMPTS + i
    top = tl.floor(tl.load(rest, there, other=0.0) * (height - box_height + 1))
    left = tl.floor(tl.load(rest + b, there, other=0.0) * (width - box_width + 1))
    tl.store(box + 4 * i, top.to(tl.int64), there)
    tl.store(box + 4 * i + 1, left.to(tl.int64), there)
    tl.store(box + 4 * i + 2, box_height.to(tl.int64), there)
    tl.store(box + 4 * i + 3, box_width.to(tl.int64), there)

    brightness = tl.load(rest + 2 * b, there, other=0.0) * brightness_span + brightness_low
    contrast = tl.load(rest + 3 * b, there, other=0.0) * contrast_span + contrast_low
    saturation = tl.load(rest + 4 * b, there, other=0.0) * saturation_span + saturation_low
    hue = tl.load(rest + 5 * b, there, other=0.0) * hue_span + hue_low
    jittered = tl.load(rest + 6 * b, there, other=0.0) < jitter_probability
    tl.store(factors + 4 * i + _BRIGHTNESS, tl.where(jittered, brightness, 1.0), there)
    tl.store(factors + 4 * i + _CONTRAST, tl.where(jittered, contrast, 1.0), there)
    tl.store(factors + 4 * i + _SATURATION, tl.where(jittered, saturation, 1.0), there)
    tl.store(factors + 4 * i + _HUE, tl.where(jittered, hue, 0.0), there)

    of_blur = tl.load(rest + 7 * b, there, other=0.0) * sigma_span + sigma_low
    tl.store(flip + i, tl.load(rest + 8 * b, there, other=0.0) < flip_probability, there)
    keys = numbers + (2 * _ATTEMPTS + 9) * b + 4 * i
    for operation in range(4):
        key = tl.load(keys + operation, there, other=0.0)
        slot = tl.zeros([IMAGES], tl.int32)  # how many come before it
        for k in range(4):
            other = tl.load(keys + k, there, other=0.0)
            slot += ((other < key) | ((other == key) & (k < operation))).to(tl.int32)
        tl.store(order + 4 * i + slot, (tl.zeros([IMAGES], tl.int32) + operation).to(tl.int64), there)
    tl.store(grayscale + i, tl.load(rest + 13 * b, there, other=0.0) < grayscale_probability, there)
    blurred = tl.load(rest + 14 * b, there, other=0.0) < blur_probability
    tl.store(sigma + i, tl.where(blurred, of_blur, 0.0), there)


@triton.jit
@no_type_check
def _rounded(value):
    """Halves to even, as torch; 0 <= value < 2 ** 22."""
    return (value + _WHOLE) - _WHOLE


@triton.jit
@no_type_check
def _view(
    images, box, flip, order, factors, grayscale, out,
    red_scale, green_scale, blue_scale, red_shift, green_shift, blue_shift,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, PIXELS: tl.constexpr, LINEAR: tl.constexpr,
):  # fmt: skip
    """images (b, 3, HEIGHT, WIDTH) uint8 -> out (b, SIZE, SIZE, 3); draws as in ColourDraw. A program an image."""
    k = tl.program_id(0).to(tl.int64)
    pixel = tl.arange(0, PIXELS)
    inside = pixel < SIZE * SIZE
    y, x = tl.where(inside, pixel // SIZE, 0), pixel % SIZE
    x = tl.where(tl.load(flip + k), SIZE - 1 - x, x)
    num_y, first_y, centre_y, slope_y, share_y = _taps(y, tl.load(box + 4 * k), tl.load(box + 4 * k + 2), SIZE)
    num_x, first_x, centre_x, slope_x, share_x = _taps(x, tl.load(box + 4 * k + 1), tl.load(box + 4 * k + 3), SIZE)
    red, green, blue = tl.zeros([PIXELS], tl.float32), tl.zeros([PIXELS], tl.float32), tl.zeros([PIXELS], tl.float32)
    for i in range(num_y):
        weight_y = _weight(first_y + i, centre_y, slope_y) * share_y
        for j in range(num_x):
            weight = weight_y * _weight(first_x + j, centre_x, slope_x) * share_x
            source = images + k * (3 * HEIGHT * WIDTH) + (first_y + i) * WIDTH + first_x + j
            red += weight * tl.load(source, inside, other=0).to(tl.float32)
            green += weight * tl.load(source + HEIGHT * WIDTH, inside, other=0).to(tl.float32)
            blue += weight * tl.load(source + 2 * HEIGHT * WIDTH, inside, other=0).to(tl.float32)
    if LINEAR:
        red, green, blue = _linear_jitter(
            red, green, blue, order + 4 * k, factors + 4 * k, tl.load(grayscale + k), SIZE
        )
    else:
        for slot in range(4):
            operation = tl.load(order + 4 * k + slot)
            factor = tl.load(factors + 4 * k + operation)
            if operation == _HUE:
                if factor != 0:
                    red, green, blue = _shift_hue(red, green, blue, factor)
            elif operation == _SATURATION:
                red, green, blue = _saturate(red, green, blue, factor)
            else:
                offset = 0.0
                if operation == _CONTRAST:
                    offset = (1 - factor) * (tl.sum(_grey(red, green, blue), 0) / (SIZE * SIZE))
                red = tl.where(inside, _clamp(red * factor + offset), 0.0)  # outside, where a sum must see nothing, 0
                green = tl.where(inside, _clamp(green * factor + offset), 0.0)
                blue = tl.where(inside, _clamp(blue * factor + offset), 0.0)
        if tl.load(grayscale + k):
            red, green, blue = _saturate(red, green, blue, 0.0)
    target = out + k * (3 * SIZE * SIZE) + 3 * pixel
    tl.store(target, red * red_scale + red_shift, inside)
    tl.store(target + 1, green * green_scale + green_shift, inside)
    tl.store(target + 2, blue * blue_scale + blue_shift, inside)


@triton.jit
@no_type_check
def _taps(output, start, length, SIZE: tl.constexpr):
    """The input pixels of each output pixel, see crop.py's `_resampling`.

    How many, the first, what `_weight` needs, and by what weights are multiplied so that their sum is one.
    """
    start, length = start.to(tl.int32), length.to(tl.int32)
    step = tl.div_rn(length.to(tl.float32), SIZE * 1.0)
    reach = tl.maximum(step, 1.0)
    slope = tl.div_rn(1.0, reach)
    num = tl.minimum(length, tl.ceil(2 * reach).to(tl.int32))
    centre = start.to(tl.float32) + (output.to(tl.float32) + 0.5) * step
    low = tl.maximum(start, tl.floor(centre - reach - 0.5).to(tl.int32) + 1)
    first = tl.minimum(low, start + length - num)
    total = tl.zeros_like(centre)
    for i in range(num):
        total += _weight(first + i, centre, slope)
    return num, first, centre, slope, tl.div_rn(tl.zeros_like(total) + 1.0, total)


@triton.jit
@no_type_check
def _weight(pixel, centre, slope):
    """A triangle around the centre."""
    return tl.maximum(1.0 - tl.abs(pixel.to(tl.float32) + 0.5 - centre) * slope, 0.0)


@triton.jit
@no_type_check
def _grey(red, green, blue):
    return red * _RED + green * _GREEN + blue * _BLUE


@triton.jit
@no_type_check
def _clamp(value):
    return tl.minimum(tl.maximum(value, 0.0), 255.0)


@triton.jit
@no_type_check
def _saturate(red, green, blue, factor):
    """Factor 0 is grayscale."""
    offset = _grey(red, green, blue) * (1 - factor)
    red = _clamp(red * factor + offset)
    green = _clamp(green * factor + offset)
    blue = _clamp(blue * factor + offset)
    return red, green, blue


@triton.jit
@no_type_check
def _shift_hue(red, green, blue, turns):
    """See jitter.py's `shift_hue`; |turns| <= 0.5."""
    high, low = tl.maximum(tl.maximum(red, green), blue), tl.minimum(tl.minimum(red, green), blue)
    chroma = high - low
    difference = tl.where(red == high, green - blue, tl.where(green == high, blue - red, red - green))
    sector = tl.where(red == high, 0.0, tl.where(green == high, 2.0, 4.0))
    hue = tl.div_rn(difference, tl.maximum(chroma, 1e-12)) + sector + 6 * turns
    hue = tl.where(hue < 0, hue + 6, hue)
    hue = tl.where(hue >= 6, hue - 6, hue)
    red = _trapezoid(tl.abs(hue - 3) - 1, low, chroma)
    green = _trapezoid(2 - tl.abs(hue - 2), low, chroma)
    blue = _trapezoid(2 - tl.abs(hue - 4), low, chroma)
    return red, green, blue


@triton.jit
@no_type_check
def _trapezoid(hue, low, chroma):
    return tl.minimum(tl.maximum(hue, 0.0), 1.0) * chroma + low


@triton.jit
@no_type_check
def _linear_jitter(red, green, blue, order, factors, grayscale, SIZE: tl.constexpr):
    """See jitter.py's `linear_jitter`. The matrix and, in column 3, the offset are four numbers for each channel."""
    column = tl.arange(0, 4)
    pixels = SIZE * SIZE
    mean = tl.where(column == 0, tl.sum(red, 0) / pixels, tl.where(column == 1, tl.sum(green, 0) / pixels, 1.0))
    mean = tl.where(column == 2, tl.sum(blue, 0) / pixels, mean)
    to_red = tl.where(column == 0, 1.0, 0.0)
    to_green = tl.where(column == 1, 1.0, 0.0)
    to_blue = tl.where(column == 2, 1.0, 0.0)
    for slot in range(4):
        operation = tl.load(order + slot)
        factor = tl.load(factors + operation)
        grey = _grey(to_red, to_green, to_blue)
        mean_grey = tl.sum(grey * mean, 0)  # of the image as it is before this operation
        cos, sin = tl.cos(factor * _TURN), tl.sin(factor * _TURN) / _SQRT_3
        turned = operation == _HUE
        same = tl.where(turned, (1 + 2 * cos) / 3, factor)
        last = tl.where(turned, (1 - cos) / 3 + sin, 0.0)  # of the channel before it, red after blue
        following = tl.where(turned, (1 - cos) / 3 - sin, 0.0)
        shared = tl.where(operation == _SATURATION, (1 - factor) * grey, 0.0)
        shared += tl.where((operation == _CONTRAST) & (column == 3), (1 - factor) * mean_grey, 0.0)
        to_red, to_green, to_blue = (
            same * to_red + last * to_blue + following * to_green + shared,
            same * to_green + last * to_red + following * to_blue + shared,
            same * to_blue + last * to_green + following * to_red + shared,
        )
    grey = _grey(to_red, to_green, to_blue)
    return (
        _combined(red, green, blue, tl.where(grayscale, grey, to_red)),
        _combined(red, green, blue, tl.where(grayscale, grey, to_green)),
        _combined(red, green, blue, tl.where(grayscale, grey, to_blue)),
    )


@triton.jit
@no_type_check
def _combined(red, green, blue, shares):
    """One channel: a share of each and an offset, clamped."""
    column = tl.arange(0, 4)
    value = red * tl.sum(tl.where(column == 0, shares, 0.0), 0) + green * tl.sum(tl.where(column == 1, shares, 0.0), 0)
    value += blue * tl.sum(tl.where(column == 2, shares, 0.0), 0) + tl.sum(tl.where(column == 3, shares, 0.0), 0)
    return _clamp(value)
