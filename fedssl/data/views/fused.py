"""SimCLR's views compiled by numba: every step of an image while it lies in a core's cache. For the CPU.

The same formulas as crop.py, jitter.py and blur.py on the same draws; what is summed in another order differs in the
last bits. An image's result is its own, so the same draw gives the same bits whatever the batch and the number of
threads.
"""

import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fedssl.data.views.colour import ColourDraw
from fedssl.data.views.jitter import BRIGHTNESS, CONTRAST, HUE, LUMA, SATURATION
from fedssl.native import native

GRAIN = 2**15  # values of views that are worth a thread
LANES = 32  # partial sums of a mean, so that several values are added at a time

f32 = np.float32  # numba would compute in double precision with Python's numbers
ZERO, ONE, TWO, THREE, FOUR, SIX, WHITE = (f32(value) for value in (0, 1, 2, 3, 4, 6, 255))
RED, GREEN, BLUE = (f32(value) for value in LUMA)


def colour_views(
    images: UInt8[Tensor, "b 3 h w"],
    draw: ColourDraw,
    *,
    image_size: int,
    linear: bool,
    blur_kernel: int,
    scale: Sequence[float],
    shift: Sequence[float],
) -> Float[Tensor, "b 3 s s"]:
    """The views that `draw` describes: pixels * scale + shift per channel, channels last in memory.

    Args:
        images: on the CPU.
        draw: likewise.
        image_size: s.
        linear: one matrix and offset per image instead of jitter and grayscale; see `linear_jitter`.
        blur_kernel: of images whose `draw.blur_sigma` is above 0.
        scale: of each channel, pixels counted from 0 to 255.
        shift: likewise.
    """
    out = torch.empty(len(images), image_size**2 * 3)
    per_image = [images, draw.box, draw.flip, draw.order, draw.factors, draw.grayscale, draw.blur_sigma, out]
    arrays = [tensor.detach().contiguous().numpy() for tensor in per_image]
    constants = (image_size, linear, blur_kernel, np.array(scale, f32), np.array(shift, f32))
    threads = max(1, min(torch.get_num_threads(), out.numel() // GRAIN))
    bounds = [len(images) * i // threads for i in range(threads + 1)]
    blocks = [[array[start:end] for array in arrays] for start, end in pairwise(bounds)]
    if threads == 1:
        _views(*blocks[0], *constants)
    else:
        list(_pool(threads, os.getpid(), threading.get_ident()).map(lambda block: _views(*block, *constants), blocks))
    return out.view(-1, image_size, image_size, 3).permute(0, 3, 1, 2)


@lru_cache(maxsize=8)
def _pool(threads: int, pid: int, caller: int) -> ThreadPoolExecutor:
    """Threads of this process, for one that calls; those of its parent did not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"views-{pid}")


@native
@no_type_check
def _taps(start, length, reverse, first, weights):
    """first (size,) and weights (size, reach): the input pixels of each output pixel; see crop.py's `_resampling`."""
    size = len(first)
    step = f32(length) / f32(size)
    reach = max(step, ONE)
    taps = min(weights.shape[1], length)
    for i in range(size):
        output = size - 1 - i if reverse else i
        centre = f32(start) + (f32(output) + f32(0.5)) * step
        low = max(start, math.floor(centre - reach - f32(0.5)) + 1)
        first[i] = min(low, start + length - taps)
        total = ZERO
        for t in range(taps):
            weight = max(ONE - abs(f32(first[i] + t) + f32(0.5) - centre) / reach, ZERO)
            weights[i, t] = weight
            total += weight
        for t in range(taps):
            weights[i, t] /= total
    return taps


@native
@no_type_check
def _crop(image, box, flip, taps_x, weights_x, taps_y, weights_y, source, lines, out):
    """image (3, h, w) -> out (3, size, size): first along the lines of the box, then across them.

    Scratch: taps (size,), weights (size, reach), source (w,), lines (h, size).
    """
    top, left, height, width = box
    size = out.shape[1]
    num_x = _taps(left, width, flip, taps_x, weights_x)
    num_y = _taps(top, height, False, taps_y, weights_y)
    for c in range(3):
        for y in range(height):
            row, line = image[c, top + y], lines[y]
            for x in range(len(source)):
                source[x] = row[x]
            if num_x == 2:  # an image that is not reduced
                for x in range(size):
                    i = np.uint64(taps_x[x])  # never negative: no need to count from the end
                    line[x] = weights_x[x, 0] * source[i] + weights_x[x, 1] * source[i + np.uint64(1)]
            else:
                for x in range(size):
                    value = ZERO
                    for t in range(num_x):
                        value += weights_x[x, t] * source[taps_x[x] + t]
                    line[x] = value
        for y in range(size):
            i, target = taps_y[y] - top, out[c, y]
            weight, line = weights_y[y, 0], lines[i]
            for x in range(size):
                target[x] = weight * line[x]
            for t in range(1, num_y):
                weight, line = weights_y[y, t], lines[i + t]
                for x in range(size):
                    target[x] += weight * line[x]


@native
@no_type_check
def _mean(values, lanes):
    """Of values (n,); one partial sum per lane, and these in order."""
    num, num_lanes = len(values), len(lanes)
    for i in range(num_lanes):
        lanes[i] = ZERO
    rows = num // num_lanes
    for row in range(rows):
        for i in range(num_lanes):
            lanes[i] += values[row * num_lanes + i]
    total = ZERO
    for i in range(num_lanes):
        total += lanes[i]
    for i in range(rows * num_lanes, num):
        total += values[i]
    return total / f32(num)


@native
@no_type_check
def _clamp(value):
    return min(max(value, ZERO), WHITE)


@native
@no_type_check
def _grey(red, green, blue):
    return red * RED + green * GREEN + blue * BLUE


@native
@no_type_check
def _scale(pixels, factor, offset):
    """Brightness; contrast with the offset (1 - factor) * mean grey."""
    for c in range(3):
        channel = pixels[c]
        for i in range(len(channel)):
            channel[i] = _clamp(channel[i] * factor + offset)


@native
@no_type_check
def _saturate(pixels, factor):
    """Factor 0 is grayscale."""
    red, green, blue = pixels[0], pixels[1], pixels[2]
    for i in range(len(red)):
        offset = _grey(red[i], green[i], blue[i]) * (ONE - factor)
        red[i] = _clamp(red[i] * factor + offset)
        green[i] = _clamp(green[i] * factor + offset)
        blue[i] = _clamp(blue[i] * factor + offset)


@native
@no_type_check
def _trapezoid(hue, low, chroma):
    return min(max(hue, ZERO), ONE) * chroma + low


@native
@no_type_check
def _shift_hue(pixels, turns):
    """See jitter.py's `shift_hue`; |turns| <= 0.5."""
    reds, greens, blues = pixels[0], pixels[1], pixels[2]
    shift = SIX * turns
    for i in range(len(reds)):
        red, green, blue = reds[i], greens[i], blues[i]
        high, low = max(max(red, green), blue), min(min(red, green), blue)
        chroma = high - low
        difference, sector = red - green, FOUR
        if green == high:
            difference, sector = blue - red, TWO
        if red == high:
            difference, sector = green - blue, ZERO
        hue = difference / max(chroma, f32(1e-12)) + sector + shift
        hue = hue + SIX if hue < ZERO else hue
        hue = hue - SIX if hue >= SIX else hue
        reds[i] = _trapezoid(abs(hue - THREE) - ONE, low, chroma)
        greens[i] = _trapezoid(TWO - abs(hue - TWO), low, chroma)
        blues[i] = _trapezoid(TWO - abs(hue - FOUR), low, chroma)


@native
@no_type_check
def _jitter(pixels, order, factors, grayscale, lanes):
    """pixels (3, n) in place; see jitter.py's `jitter_`. An operation with its neutral factor is left out."""
    for slot in range(4):
        factor = factors[order[slot]]
        if order[slot] == BRIGHTNESS:
            if factor != ONE:
                _scale(pixels, factor, ZERO)
        elif order[slot] == CONTRAST:
            if factor != ONE:
                grey = _grey(_mean(pixels[0], lanes), _mean(pixels[1], lanes), _mean(pixels[2], lanes))
                _scale(pixels, factor, (ONE - factor) * grey)
        elif order[slot] == SATURATION:
            if factor != ONE:
                _saturate(pixels, factor)
        elif factor != ZERO:
            _shift_hue(pixels, factor)
    if grayscale:
        _saturate(pixels, ZERO)


@native
@no_type_check
def _linear_jitter(pixels, order, factors, grayscale, lanes):
    """pixels (3, n) in place; see jitter.py's `linear_jitter`."""
    mean = (_mean(pixels[0], lanes), _mean(pixels[1], lanes), _mean(pixels[2], lanes), ONE)
    affine, before, grey = np.zeros((3, 4)), np.empty((3, 4)), np.empty(4)  # the matrix and, in column 3, the offset
    for c in range(3):
        affine[c, c] = 1
    for slot in range(5):
        operation = order[slot] if slot < 4 else SATURATION
        factor = float(factors[operation]) if slot < 4 else (0.0 if grayscale else 1.0)
        same, to_grey, last, following, mean_grey = factor, 0.0, 0.0, 0.0, 0.0  # shares in the new row of a channel
        for k in range(4):
            for c in range(3):
                before[c, k] = affine[c, k]
            grey[k] = RED * before[0, k] + GREEN * before[1, k] + BLUE * before[2, k]
            mean_grey += grey[k] * mean[k]
        if operation == SATURATION:
            to_grey = 1 - factor
        elif operation == HUE:
            cos, sin = math.cos(2 * math.pi * factor), math.sin(2 * math.pi * factor) / math.sqrt(3)
            same, last, following = (1 + 2 * cos) / 3, (1 - cos) / 3 + sin, (1 - cos) / 3 - sin
        for c in range(3):
            for k in range(4):
                affine[c, k] = same * before[c, k] + to_grey * grey[k]
                affine[c, k] += last * before[c - 1, k] + following * before[c - 2, k]
            if operation == CONTRAST:
                affine[c, 3] += (1 - factor) * mean_grey
    a = affine.astype(f32)
    reds, greens, blues = pixels[0], pixels[1], pixels[2]
    for i in range(len(reds)):
        red, green, blue = reds[i], greens[i], blues[i]
        reds[i] = _clamp(a[0, 0] * red + a[0, 1] * green + a[0, 2] * blue + a[0, 3])
        greens[i] = _clamp(a[1, 0] * red + a[1, 1] * green + a[1, 2] * blue + a[1, 3])
        blues[i] = _clamp(a[2, 0] * red + a[2, 1] * green + a[2, 2] * blue + a[2, 3])


@native
@no_type_check
def _mirrored(position, size):
    """A position beyond an edge as the one that lies as far inside of it."""
    position = abs(position)
    return position if position < size else 2 * (size - 1) - position


@native
@no_type_check
def _blur(image, sigma, weights, lines, padded):
    """image (3, size, size) in place; see blur.py. Scratch: weights (kernel,), lines (size, size), padded (>= size)."""
    size, reach = image.shape[1], len(weights) // 2
    total = ZERO
    for t in range(len(weights)):
        weights[t] = math.exp(f32(-0.5) * (f32(t - reach) / sigma) ** 2)
        total += weights[t]
    for t in range(len(weights)):
        weights[t] /= total
    for c in range(3):
        lines[:] = ZERO
        for y in range(size):
            for t in range(len(weights)):
                source, line = image[c, _mirrored(y + t - reach, size)], lines[y]
                for x in range(size):
                    line[x] += weights[t] * source[x]
        for y in range(size):
            for x in range(size + 2 * reach):
                padded[x] = lines[y, _mirrored(x - reach, size)]
            target = image[c, y]
            target[:] = ZERO
            for t in range(len(weights)):
                for x in range(size):
                    target[x] += weights[t] * padded[x + t]


@native
@no_type_check
def _write(pixels, scale, shift, out):
    """pixels (3, n) * scale + shift -> out (3n,), channels last."""
    reds, greens, blues = pixels[0], pixels[1], pixels[2]
    red, green, blue = scale[0], scale[1], scale[2]
    from_red, from_green, from_blue = shift[0], shift[1], shift[2]
    for i in range(len(reds)):
        out[3 * i] = reds[i] * red + from_red
        out[3 * i + 1] = greens[i] * green + from_green
        out[3 * i + 2] = blues[i] * blue + from_blue


@native
@no_type_check
def _views(images, boxes, flips, orders, factors, grayscale, sigmas, out, size, linear, blur_kernel, scale, shift):
    """images (b, 3, h, w) uint8 -> out (b, size * size * 3), channels last; draws as in ColourDraw."""
    height, width = images.shape[2:]
    reach = max(2, -(-2 * max(height, width) // size))  # taps of a box as large as the image
    taps_x, taps_y = np.empty(size, np.int64), np.empty(size, np.int64)
    weights_x, weights_y = np.empty((size, reach), f32), np.empty((size, reach), f32)
    source, lines, blurred = np.empty(width, f32), np.empty((height, size), f32), np.empty((size, size), f32)
    view, lanes = np.empty((3, size, size), f32), np.empty(LANES, f32)
    weights, padded = np.empty(blur_kernel, f32), np.empty(size + blur_kernel, f32)
    pixels = view.reshape(3, size * size)
    for k in range(len(images)):
        _crop(images[k], boxes[k], flips[k], taps_x, weights_x, taps_y, weights_y, source, lines, view)
        if linear:
            _linear_jitter(pixels, orders[k], factors[k], grayscale[k], lanes)
        else:
            _jitter(pixels, orders[k], factors[k], grayscale[k], lanes)
        if sigmas[k] > ZERO:
            _blur(view, sigmas[k], weights, blurred, padded)
        _write(pixels, scale, shift, out[k])
