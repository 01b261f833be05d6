"""Views against torchvision given the same draws, closed forms, and properties of the draws."""

import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

import fedssl.data.views as views_package
from fedssl.data.views import ColourDraw, ColourViews, GeometricDraw, GeometricViews, ShiftDraw, ShiftViews, Views
from fedssl.data.views.blur import gaussian_blur
from fedssl.data.views.colour import COLUMNS, can_fuse_on
from fedssl.data.views.fused import GRAIN
from fedssl.data.views.jitter import CONTRAST, HUE, linear_jitter, shift_hue
from fedssl.errors import ConfigError
from fedssl.native import native

CONF = Path(__file__).parents[1] / "conf" / "views"


def from_yaml(choice: str, **overrides: Any) -> Any:
    fields = yaml.safe_load((CONF / f"{choice}.yaml").read_text())
    kind = getattr(views_package, fields.pop("_target_").removeprefix("fedssl.data.views."))
    return kind(**{**fields, "image_size": 16, **overrides})


def colour(**overrides: Any) -> ColourViews:
    views: ColourViews = from_yaml("colour", **overrides)
    return views


def geometric(**overrides: Any) -> GeometricViews:
    views: GeometricViews = from_yaml("geometric", **overrides)
    return views


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise_images(b: int, h: int, w: int | None = None, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (b, 3, h, w or h), dtype=torch.uint8, generator=seeded(seed))


def varied_images(b: int, h: int, w: int) -> Tensor:
    """Noise, flat colours, greys and saturated corners of the RGB cube: the hard cases of a hue."""
    images = noise_images(b, h, w)
    images[1::4] = images[1::4, :, :1, :1]
    images[2::4] = images[2::4, :1]
    images[3::4] = (images[3::4] > 127).byte() * 255
    return images


def photos(num: int, size: int) -> Tensor:
    """Squares of scikit-learn's two photographs, reduced to `size`."""
    generator, squares = seeded(), []
    for image in load_sample_images().images:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        for _ in range(num // 2):
            top, left = (int(torch.randint(side - 128, (), generator=generator)) for side in pixels.shape[1:])
            squares.append(tv.resize(pixels[:, top : top + 128, left : left + 128], [size, size]))
    return torch.stack(squares)


def neutral_draw(b: int, h: int, w: int) -> ColourDraw:
    """The whole image, unchanged; the order of the jitter still differs between images."""
    return ColourDraw(
        box=torch.tensor([0, 0, h, w]).expand(b, 4),
        flip=torch.zeros(b, dtype=torch.bool),
        order=torch.rand(b, 4, generator=seeded()).argsort(dim=1),
        factors=torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(b, 4),
        grayscale=torch.zeros(b, dtype=torch.bool),
        blur_sigma=torch.zeros(b),
    )


def torchvision_view(image: Tensor, draw: ColourDraw, i: int, views: ColourViews) -> Tensor:
    """View i of `draw`, one torchvision function after the other."""
    x = tv.to_dtype(image, torch.float32, scale=True)
    x = tv.resized_crop(x, *draw.box[i].tolist(), [views.image_size, views.image_size], antialias=True)
    if draw.flip[i]:
        x = tv.horizontal_flip(x)
    adjust: list[Callable[[Tensor, float], Tensor]] = [
        tv.adjust_brightness,
        tv.adjust_contrast,
        tv.adjust_saturation,
        tv.adjust_hue,
    ]
    for operation in draw.order[i].tolist():
        x = adjust[operation](x, draw.factors[i, operation].item())
    if draw.grayscale[i]:
        x = tv.rgb_to_grayscale(x, num_output_channels=3)
    if draw.blur_sigma[i] > 0:
        x = tv.gaussian_blur(x, [views.blur_kernel] * 2, [draw.blur_sigma[i].item()] * 2)
    return tv.normalize(x, list(views.mean), list(views.std))


# -- colour views: the pixels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["fused", "torch"])
@pytest.mark.parametrize(
    ("height", "width", "size", "hue"),
    [(32, 32, 32, 0.2), (32, 32, 32, 0.5), (20, 31, 33, 0.2), (64, 50, 24, 0.2)],
    ids=["same", "any_hue", "enlarged", "reduced"],
)
def test_exact_equals_torchvision_given_the_same_draw(
    height: int, width: int, size: int, hue: float, kernel: str
) -> None:
    """Random boxes, flips, orders, factors and blurs; the bar is 1/255 of the pixel range, we are far below it."""
    views = colour(
        image_size=size,
        hue=hue,
        blur_probability=0.5,
        blur_kernel=5,
        mean=[0.4, 0.5, 0.6],
        std=[1, 1, 1],
        kernel=kernel,
    )
    images = varied_images(200, height, width)
    draw = views.draw(len(images), (height, width), seeded(1))
    expected = torch.stack([torchvision_view(image, draw, i, views) for i, image in enumerate(images)])
    assert (views.apply(images, draw) - expected).abs().max() < 0.05 / 255


@pytest.mark.parametrize("kind", ["exact", "linear"])
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(32, 32, 32), (20, 31, 33), (64, 50, 24), (150, 200, 96), (8, 8, 8), (1, 1, 5), (5, 1, 3), (7, 3, 1)],
)
def test_fused_and_torch_kernels_agree_on_the_same_seed(kind: str, height: int, width: int, size: int) -> None:
    """Within 1e-5 of white, and they leave the generator in the same state."""
    fused = colour(
        image_size=size, hue=0.5, colour=kind, blur_probability=0.5, blur_kernel=1 if size == 1 else 5,
        mean=[0, 0.1, 0.2], std=[1, 1, 1], kernel="fused"
    )  # fmt: skip
    images = varied_images(60, height, width)
    rngs = seeded(1), seeded(1)
    out, expected = fused(images, rngs[0]), replace(fused, kernel="torch")(images, rngs[1])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert torch.equal(rngs[0].get_state(), rngs[1].get_state())


@pytest.mark.parametrize("kind", ["exact", "linear"])
def test_fused_kernel_gives_the_same_bits_on_any_number_of_threads(kind: str) -> None:
    views, images = colour(image_size=32, colour=kind, blur_probability=0.5), noise_images(101, 32)
    assert images.numel() > 3 * GRAIN
    before = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            outs.append(views(images, seeded()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outs[0], out) for out in outs[1:])


def test_a_kernel_that_cannot_be_cached_is_compiled_all_the_same() -> None:
    namespace: dict[str, Any] = {}
    exec("def twice(x):\n    return 2 * x", namespace)  # without a file there is no folder for the cache
    compiled = native(namespace["twice"])
    assert compiled(3) == 6
    assert compiled.signatures  # type: ignore[attr-defined]


def test_linear_error_on_photographs_is_what_its_docstring_states() -> None:
    images = photos(200, 32)
    exact = colour(image_size=32, mean=[0, 0, 0], std=[1, 1, 1])
    draw = exact.draw(len(images), (32, 32), seeded(1))
    error = (replace(exact, colour="linear").apply(images, draw) - exact.apply(images, draw)).abs()
    assert 0.01 < error.mean() < 0.02
    assert 0.05 < error.flatten().kthvalue(int(0.95 * error.numel())).values < 0.1


@pytest.mark.parametrize("operation", range(4))
def test_linear_equals_exact_where_nothing_is_clamped(operation: int) -> None:
    """One operation at a time on mid-range pixels is linear; a hue shift is too at a third of a turn."""
    b = 8
    images = noise_images(b, 16) // 4 + 96
    draw = neutral_draw(b, 16, 16)
    factors = draw.factors.clone()
    factors[:, operation] = 1 / 3 if operation == HUE else torch.linspace(0.5, 1.2, b)
    draw = replace(draw, factors=factors)
    exact = colour().apply(images, draw)
    assert (exact - colour().plain(images)).abs().max() > 0.1
    torch.testing.assert_close(colour(colour="linear").apply(images, draw), exact, rtol=0, atol=1e-5)


def test_linear_contrast_uses_the_mean_at_its_place_in_the_order() -> None:
    """Contrast 0 leaves the mean grey of the image as the operations before it made it."""
    pixels = torch.full((1, 3, 4, 4), 100.0)
    order = torch.tensor([[0, CONTRAST, 2, 3]])
    out = linear_jitter(pixels, order, torch.tensor([[0.5, 0.0, 1.0, 0.0]]), torch.tensor([False]))
    torch.testing.assert_close(out, torch.full_like(out, 50.0), rtol=1e-3, atol=0)  # the luma weights sum to 0.9999


@pytest.mark.parametrize("exact", [True, False])
def test_a_third_of_a_turn_permutes_the_channels(exact: bool) -> None:
    """Red becomes green, green becomes blue, blue becomes red: true for HSV and for a rotation around grey."""
    pixels = noise_images(2, 8).float()
    third = torch.full((2,), 1 / 3)
    if exact:
        shifted = shift_hue(pixels, third)
    else:
        draw = neutral_draw(2, 8, 8)
        factors = torch.tensor([1.0, 1.0, 1.0, 1 / 3]).expand(2, 4)
        shifted = linear_jitter(pixels, draw.order, factors, draw.grayscale)
    torch.testing.assert_close(shifted, pixels.roll(1, dims=1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kernel", ["fused", "torch"])
@pytest.mark.parametrize("kind", ["exact", "linear"])
@pytest.mark.parametrize("size", [16, 32])
def test_neutral_draw_is_the_plain_transform_bit_for_bit(kind: str, size: int, kernel: str) -> None:
    views = colour(image_size=size, colour=kind, blur_probability=0.5, kernel=kernel)
    images = varied_images(9, size, size)
    assert torch.equal(views.apply(images, neutral_draw(9, size, size)), views.plain(images))


def test_flip_mirrors_left_and_right() -> None:
    images = noise_images(4, 16)
    flip = torch.tensor([True, False, True, False])
    out = colour().apply(images, replace(neutral_draw(4, 16, 16), flip=flip))
    plain = colour().plain(images)
    assert torch.equal(out[0], plain[0].flip(-1))
    assert torch.equal(out[1], plain[1])


def test_grayscale_has_equal_channels_whatever_the_jitter() -> None:
    images, views = noise_images(32, 16), colour(grayscale_probability=1.0)
    for kind in ("exact", "linear"):
        out = replace(views, colour=kind)(images, seeded())
        torch.testing.assert_close(out[:, 0], out[:, 1], rtol=0, atol=1e-6)
        torch.testing.assert_close(out[:, 0], out[:, 2], rtol=0, atol=1e-6)


def test_blur_of_a_point_is_the_gaussian() -> None:
    """Weight exp(-d^2 / (2 sigma^2)) at distance d, over the kernel's width."""
    point = torch.zeros(2, 3, 9, 9)
    point[:, :, 4, 4] = 1.0
    out = gaussian_blur(point, torch.tensor([0.0, 1.5]), 5)
    assert torch.equal(out[0], point[0])
    weights = torch.tensor([math.exp(-(d**2) / 4.5) if abs(d) <= 2 else 0.0 for d in range(-4, 5)])
    weights /= weights.sum()
    torch.testing.assert_close(out[1, 0], torch.outer(weights, weights))


# -- colour views: the draws -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(32, 32), (7, 64), (224, 3)])
def test_boxes_stay_inside_and_keep_the_ranges(height: int, width: int) -> None:
    box = colour(crop_scale=[0.2, 1.0]).draw(3000, (height, width), seeded()).box
    top, left, h, w = box.unbind(1)
    assert (torch.stack([top, left]) >= 0).all()
    assert (torch.stack([h, w]) >= 1).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    assert ((w + 0.5) / (h - 0.5) >= 3 / 4).all()  # up to rounding to whole pixels
    assert ((w - 0.5) / (h + 0.5) <= 4 / 3).all()
    if height == width:
        assert ((h + 0.5) * (w + 0.5) >= 0.2 * height * width).all()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int) -> None:
    """Two-sample Kolmogorov-Smirnov distance; 0.05 is the 1 % quantile for 2 x 2000 draws."""
    ours = colour().draw(2000, (height, width), seeded()).box
    reference = v2.RandomResizedCrop(32, scale=(0.2, 1.0))
    image = torch.empty(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        params = [reference.make_params([image]) for _ in range(2000)]
    theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in params])
    for column in range(4):
        values = torch.arange(max(height, width) + 1)
        cdfs = [(box[:, column, None] <= values).double().mean(dim=0) for box in (ours, theirs)]
        assert (cdfs[0] - cdfs[1]).abs().max() < 0.05


def test_a_box_that_never_fits_becomes_the_largest_allowed() -> None:
    """Ratio 4 of a 10 x 20 image: at most 5 x 20, half of the area that is asked for."""
    box = colour(crop_scale=[1.0, 1.0], crop_ratio=[4.0, 4.0]).draw(50, (10, 20), seeded()).box
    assert (box[:, 2:] == torch.tensor([5, 20])).all()
    assert set(box[:, 0].tolist()) == set(range(6))
    thin = colour(crop_ratio=[50.0, 60.0]).draw(50, (10, 3), seeded()).box  # not even one row: one pixel then
    assert (thin[:, 2:] == torch.tensor([1, 3])).all()


def test_draws_follow_their_probabilities_and_ranges() -> None:
    b, views = 6000, colour(blur_probability=0.3)
    draw = views.draw(b, (32, 32), seeded())
    jittered = (draw.factors != torch.tensor([1.0, 1.0, 1.0, 0.0])).any(dim=1)
    for happened, probability in (
        (draw.flip, views.flip_probability),
        (jittered, views.jitter_probability),
        (draw.grayscale, views.grayscale_probability),
        (draw.blur_sigma > 0, views.blur_probability),
    ):
        tolerance = 4 * math.sqrt(probability * (1 - probability) / b)
        assert happened.double().mean().item() == pytest.approx(probability, abs=tolerance)
    for column, (low, high) in enumerate([(0.2, 1.8), (0.2, 1.8), (0.2, 1.8), (-0.2, 0.2)]):
        factor = draw.factors[jittered, column]
        assert low <= factor.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < factor.max() <= high
    sigma = draw.blur_sigma[draw.blur_sigma > 0]
    assert 0.1 <= sigma.min() < 0.15 < 1.95 < sigma.max() <= 2.0
    orders, counts = draw.order.unique(dim=0, return_counts=True)
    assert len(orders) == 24
    assert (counts - b / 24).abs().max() < 4 * math.sqrt(b / 24)


def test_draws_of_one_batch_are_not_correlated() -> None:
    """A draw reused for two purposes (or the same for every image) would correlate two columns."""
    draw = colour(jitter_probability=1.0, blur_probability=1.0).draw(5000, (224, 224), seeded())
    area = draw.box[:, 2] * draw.box[:, 3]
    columns = [area, draw.flip, draw.order[:, 0], *draw.factors.unbind(1), draw.grayscale, draw.blur_sigma]
    correlations = torch.corrcoef(torch.stack([column.double() for column in columns]))
    assert (correlations - torch.eye(len(columns))).abs().max() < 4 / math.sqrt(5000)


# -- both kinds --------------------------------------------------------------------------------------------------------

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("colour", {}),
    ("colour", {"colour": "linear"}),
    ("colour", {"kernel": "torch"}),
    ("colour", {"colour": "linear", "kernel": "torch"}),
    ("colour", {"blur_probability": 0.5}),
    ("geometric", {}),
]


@pytest.mark.parametrize(("choice", "overrides"), KINDS)
def test_seed_fixes_the_result_and_images_differ(choice: str, overrides: dict[str, Any]) -> None:
    views = from_yaml(choice, **overrides)
    assert isinstance(views, Views)
    image = photos(2, 16)[:1].expand(8, 3, 16, 16)
    before = image.clone()
    out = views(image, seeded(3))
    assert torch.equal(out, pickle.loads(pickle.dumps(views))(image, seeded(3)))
    assert torch.equal(image, before)
    assert torch.equal(out, views(image.contiguous(memory_format=torch.channels_last), seeded(3)))
    assert out.dtype == torch.float32
    assert not out.requires_grad
    assert len(out.unique(dim=0)) == 8  # one image, eight views
    assert not torch.equal(out, views(image, seeded(4)))


@pytest.mark.parametrize(("choice", "overrides"), KINDS)
@pytest.mark.parametrize(("b", "source", "size"), [(1, 16, 16), (3, 64, 32), (2, 32, 64), (2, 224, 224), (100, 32, 32)])
def test_sizes(choice: str, overrides: dict[str, Any], b: int, source: int, size: int) -> None:
    views = from_yaml(choice, image_size=size, **overrides)
    out = views(noise_images(b, source), seeded())
    assert out.shape == (b, 3, size, size)
    assert out.min() >= -1 - 1e-5  # 0 is -1 and 255 is 1
    assert out.max() <= 1 + 1e-5
    assert out.std() > 0.1
    assert views.plain(noise_images(b, source)).shape == (b, 3, source, source)


@pytest.mark.parametrize("kernel", ["fused", "torch"])
@pytest.mark.parametrize("kind", ["exact", "linear"])
def test_a_view_depends_on_its_own_image_and_draw_alone(kind: str, kernel: str) -> None:
    """Also across the chunks in which the CPU works."""
    views = colour(image_size=32, colour=kind, kernel=kernel)
    images = noise_images(200, 32)
    draw = views.draw(200, (32, 32), seeded())
    rows = slice(190, 200)
    alone = views.apply(images[rows], draw[rows])
    torch.testing.assert_close(views.apply(images, draw)[rows], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("choice", "overrides"), KINDS)
def test_autocast_does_not_reach_the_pixels(choice: str, overrides: dict[str, Any]) -> None:
    views, images = from_yaml(choice, **overrides), noise_images(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = views(images, seeded())
    assert torch.equal(out, views(images, seeded()))


def test_plain_is_the_normalisation_and_describe_names_it() -> None:
    views = colour(mean=[0.5, 0.25, 0.0], std=[0.5, 0.25, 2])
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    expected = torch.tensor([[-1, -1, 0], [-0.6, -0.2, 0.1], [1, 3, 0.5]])
    torch.testing.assert_close(views.plain(images)[:, :, 1, 1], expected)
    assert views.describe() == "pixels / 255, then (x - mean) / std with mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0)"
    assert geometric().describe() == colour().describe() != views.describe()


@pytest.mark.parametrize(
    ("choice", "overrides", "message"),
    [
        ("colour", {"crop_scale": [0.0, 1.0]}, r"views.crop_scale must be .* 0 < from <= to <= 1, got \[0.0, 1.0\]"),
        ("colour", {"crop_scale": [0.5, 1.5]}, "views.crop_scale"),
        ("colour", {"crop_scale": [0.8, 0.2]}, "views.crop_scale"),
        ("colour", {"crop_ratio": [0.75]}, "views.crop_ratio"),
        ("colour", {"hue": 0.6}, "views.hue must be between 0 and 0.5, got 0.6"),
        ("colour", {"brightness": -0.1}, "views.brightness"),
        ("colour", {"flip_probability": 1.2}, "views.flip_probability must be between 0 and 1"),
        ("colour", {"blur_kernel": 4}, "views.blur_kernel must be odd and between 1 and 31"),
        ("colour", {"blur_kernel": 33}, "views.blur_kernel"),
        ("colour", {"blur_sigma": [0.0, 2.0]}, "views.blur_sigma"),
        ("colour", {"colour": "fast"}, "views.colour must be exact .* or linear .*, got 'fast'"),
        ("colour", {"kernel": "fast"}, "views.kernel must be fused .* or torch .*, got 'fast'"),
        ("colour", {"std": [0.5, 0.0, 0.5]}, "views.std must be three numbers above 0"),
        ("colour", {"mean": [0.5]}, "views.mean must be three numbers, one a channel"),
        ("colour", {"image_size": 0}, "views.image_size"),
        ("geometric", {"scale": [0.0, 1.0]}, "views.scale"),
        ("geometric", {"rotation": 200}, "views.rotation must be between 0 and 180, got 200"),
        ("geometric", {"shear": 85}, "views.shear"),
        ("geometric", {"shift": -0.1}, "views.shift"),
        ("geometric", {"noise": math.nan}, "views.noise"),
    ],
)
def test_impossible_numbers_are_named(choice: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_yaml(choice, **overrides)


# -- geometric views ---------------------------------------------------------------------------------------------------


def affine_draw(affine: list[list[float]], contrast: float = 1.0, brightness: float = 0.0) -> GeometricDraw:
    return GeometricDraw(
        affine=torch.tensor([affine]),
        contrast=torch.tensor([contrast]),
        brightness=torch.tensor([brightness]),
        noise=None,
    )


def test_geometric_closed_forms() -> None:
    """Identity, one pixel to the left, a quarter turn, twice as large: each moves pixels exactly."""
    views, image = geometric(), noise_images(1, 16)
    plain = views.plain(image)
    assert torch.equal(views.apply(image, affine_draw([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])), plain)
    left = views.apply(image, affine_draw([[1.0, 0.0, 2 / 16], [0.0, 1.0, 0.0]]))
    assert torch.equal(left[..., :-1], plain[..., 1:])
    assert (left[..., -1] == -1).all()  # outside is black
    turned = views.apply(image, affine_draw([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]))
    assert torch.equal(turned, plain.rot90(1, (2, 3)))
    blocks = torch.nn.functional.interpolate(image.float(), scale_factor=2).byte()
    middle = views.apply(
        blocks, affine_draw([[0.5, 0.0, 0.0], [0.0, 0.5, 0.0]])
    )  # a pixel of the view per source pixel
    assert torch.equal(middle, views.plain(blocks)[..., 8:24, 8:24])
    changed = views.apply(image, affine_draw([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], contrast=0.5, brightness=25.5))
    torch.testing.assert_close(changed, 0.5 * plain - 0.5 + 0.2)


def test_geometric_draws_keep_their_ranges_and_never_mirror() -> None:
    """Singular values and angle of the linear part, and the shift, against the configured limits."""
    assert (torch.linalg.det(geometric(shear=40).draw(3000, seeded()).affine[:, :, :2]) > 0).all()
    views = geometric(shear=0.0)
    draw = views.draw(3000, seeded())
    linear, shift = draw.affine[:, :, :2], draw.affine[:, :, 2]
    magnification = 1 / linear.norm(dim=1)  # of width and of height
    assert views.scale[0] - 1e-4 < magnification.min() < magnification.max() < views.scale[1] + 1e-4
    assert shift.abs().max() <= 2 * views.shift
    assert shift.std(dim=0).min() > views.shift  # 2 * shift / sqrt(3)
    angle = torch.rad2deg(torch.atan2(linear[:, 1, 0], linear[:, 0, 0]))
    assert 0.99 * views.rotation < angle.abs().max() <= views.rotation + 1e-3
    sheared = geometric(rotation=0.0, scale=[1.0, 1.0], shear=12.0).draw(3000, seeded()).affine
    slant = torch.rad2deg(torch.atan(sheared[:, 0, 1]))
    assert 0.99 * 12 < slant.abs().max() <= 12 + 1e-3


def test_geometric_noise_has_its_standard_deviation() -> None:
    """On a grey image nothing is clamped; noise is the same in the three channels."""
    still = {"rotation": 0, "shear": 0, "scale": [1, 1], "shift": 0, "contrast": 0, "brightness": 0}
    views = geometric(**still, noise=0.05, mean=[0, 0, 0], std=[1, 1, 1])
    out = views(torch.full((50, 3, 16, 16), 128, dtype=torch.uint8), seeded())
    assert out.std().item() == pytest.approx(0.05, rel=0.03)
    assert torch.equal(out[:, 0], out[:, 2])
    assert torch.equal(
        geometric(**still, noise=0)(noise_images(4, 16), seeded()), geometric().plain(noise_images(4, 16))
    )


# -- shifted -----------------------------------------------------------------------------------------------------------


def shifted(**overrides: Any) -> ShiftViews:
    fields = yaml.safe_load((CONF / "shift.yaml").read_text())
    del fields["_target_"]
    return ShiftViews(**{**fields, **overrides})


def test_a_shifted_view_is_torchvisions_reflect_padding_cut_out_and_flipped() -> None:
    images = noise_images(4, 10, 14)
    draw = ShiftDraw(
        offset=torch.tensor([[0, 0], [1, -2], [-1, 2], [3, 4]]), flip=torch.tensor([False, False, True, True])
    )
    views = shifted().apply(images, draw)
    for image, (down, right), flip, view in zip(images, draw.offset.tolist(), draw.flip, views, strict=True):
        padded = tv.pad(image, [4, 4, 4, 4], padding_mode="reflect")
        expected = padded[:, 4 + down : 14 + down, 4 + right : 18 + right]
        assert torch.equal(view, shifted().plain((tv.horizontal_flip(expected) if flip else expected)[None])[0])


def test_shifts_reach_their_limit_on_both_sides_and_flips_are_as_frequent_as_asked() -> None:
    draw = shifted(shift=0.2, flip_probability=0.25).draw(4000, (10, 20), seeded())
    for column, far in zip(draw.offset.T, (2, 4), strict=True):
        counts = torch.bincount(column + far, minlength=2 * far + 1)
        assert len(counts) == 2 * far + 1
        assert (counts / 4000 - 1 / (2 * far + 1)).abs().max() < 0.03
    assert draw.flip.float().mean().item() == pytest.approx(0.25, abs=0.03)
    still = shifted(shift=0.0, flip_probability=0.0)
    assert torch.equal(still(noise_images(3, 8), seeded()), still.plain(noise_images(3, 8)))


@pytest.mark.parametrize(("wrong", "message"), [({"shift": 0.6}, r"views\.shift"), ({"flip_probability": 2}, r"flip")])
def test_shifts_that_are_none_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shifted(**wrong)


# -- the GPU's kernels, interpreted ------------------------------------------------------------------------------------

INTERPRET = """
import sys
from dataclasses import replace
import torch
from fedssl.data.views import fused_gpu

def wrong_agrees(name, views, size):
    right = getattr(fused_gpu, name)
    setattr(fused_gpu, name, lambda *args, **options: BROKEN[name](right(*args, **options)))
    try:
        return fused_gpu.agree(views, torch.device("cpu"), size)
    finally:
        setattr(fused_gpu, name, right)

BROKEN = {
    "colour_views": lambda out: out + 0.01,
    "draw_colour_views": lambda draw: replace(draw, grayscale=~draw.grayscale),
}
draws, views = torch.load(sys.argv[1], weights_only=False)
torch.save(
    {
        "draws": [fused_gpu.draw_colour_views(*call) for call in draws],
        "agree": [fused_gpu.agree(views, torch.device("cpu"), size) for views, _, size in draws],
        "views": [fused_gpu.colour_views(*call, **options) for *call, options in views],
        "wrong agree": [wrong_agrees(name, views, size) for views, _, size in draws for name in BROKEN],
    },
    sys.argv[1],
)
"""


def interpreted(path: Path, *, draws: Sequence[Any] = (), views: Sequence[Any] = ()) -> dict[str, Any]:
    """What the kernels' Python says on a CPU; in a process of its own, for Triton has to know before it is imported."""
    pytest.importorskip("triton", reason="comes with torch on Linux")
    torch.save((draws, views), path)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", INTERPRET, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = torch.load(path, weights_only=False)
    return found


def test_gpu_kernel_draws_the_same(tmp_path: Path) -> None:
    cases = [
        (colour(blur_probability=0.5), 300, (32, 32)),
        (colour(jitter_probability=0.5, flip_probability=1, grayscale_probability=0), 300, (31, 7)),
        (colour(crop_scale=[0.9, 1.0]), 100, (4, 300)),  # hardly any box fits
    ]
    calls = [(views, torch.rand(sum(COLUMNS) * b, generator=seeded(1)), size) for views, b, size in cases]
    found = interpreted(tmp_path / "calls.pt", draws=calls)
    for (views, b, size), draw in zip(cases, found["draws"], strict=True):
        for name, value in vars(views.draw(b, size, seeded(1))).items():
            torch.testing.assert_close(getattr(draw, name), value, rtol=1e-6, atol=1e-7)
    assert found["agree"] == [True] * len(calls)
    assert found["wrong agree"] == [False] * 2 * len(calls)


SIZES = [
    (32, 32, 32),
    (20, 31, 33),
    (64, 50, 24),
    (8, 8, 8),
    (1, 1, 5),
    (5, 1, 3),
    (7, 3, 1),
]  # height, width; a view's


def test_gpu_kernel_computes_the_same(tmp_path: Path) -> None:
    calls, expected = [], []
    for kind in ("exact", "linear"):
        for height, width, size in SIZES:
            views = colour(
                image_size=size, hue=0.5, colour=kind, blur_kernel=1, mean=[0, 0.1, 0.2], std=[1, 1, 1], kernel="torch"
            )
            images = varied_images(8, height, width)
            draw = views.draw(len(images), (height, width), seeded(1))
            calls.append((images, draw, gpu_options(views)))
            expected.append(views.apply(images, draw))
    for out, wanted in zip(interpreted(tmp_path / "calls.pt", views=calls)["views"], expected, strict=True):
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-5)
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_a_neutral_draw_through_the_gpu_kernel_is_the_plain_transform_bit_for_bit(tmp_path: Path) -> None:
    images = varied_images(8, 16, 16)
    kinds = [colour(colour=kind) for kind in ("exact", "linear")]
    calls = [(images, neutral_draw(8, 16, 16), gpu_options(views)) for views in kinds]
    for out in interpreted(tmp_path / "calls.pt", views=calls)["views"]:
        assert torch.equal(out, kinds[0].plain(images))


def gpu_options(views: ColourViews) -> dict[str, Any]:
    scale, shift = views.scale_and_shift()
    return {"image_size": views.image_size, "linear": views.colour == "linear", "scale": scale, "shift": shift}


def test_kernels_that_do_not_work_on_a_gpu_are_not_taken_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "fedssl.data.views.fused_gpu", None)  # as where Triton is not there
    can_fuse_on.cache_clear()
    assert not can_fuse_on(torch.device("cuda"), colour(), (16, 16))
    assert "no kernels on cuda, tensor operations take their place: ModuleNotFoundError" in caplog.text
    can_fuse_on.cache_clear()


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fedssl.data.views import fused_gpu

TYPES = {"numbers": "*fp32", "box": "*i64", "flip": "*u1", "order": "*i64", "factors": "*fp32", "grayscale": "*u1",
         "sigma": "*fp32", "images": "*u8", "out": "*fp32", "b": "i32", "height": "i32", "width": "i32",
         "largest_height": "i32", "largest_width": "i32"}

def compiled(kernel, **constants):
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "fp32") for name in kernel.arg_names}
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(ASTSource(kernel, signature, constants), target=target, options={"enable_fp_fusion": False})

assert compiled(fused_gpu._draw, IMAGES=128).asm["cubin"]
assert compiled(fused_gpu._draw, IMAGES=128, b=1, height=1, width=1).asm["cubin"]  # as Triton takes a 1
for linear in (False, True):
    constants = dict(HEIGHT=20, WIDTH=31, SIZE=33, PIXELS=2048, LINEAR=linear)
    assert compiled(fused_gpu._view, **constants).asm["cubin"]
"""


def test_gpu_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    """The interpreter takes more than the compiler does."""
    pytest.importorskip("triton", reason="comes with torch on Linux")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize(("choice", "overrides"), KINDS)
def test_gpu_needs_no_synchronisation_and_agrees(choice: str, overrides: dict[str, Any]) -> None:
    views = from_yaml(choice, **overrides)
    images = noise_images(64, 16).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    views(images, generator)  # constants reach the device once
    try:
        torch.cuda.set_sync_debug_mode("error")
        views(images, generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    size = () if choice == "geometric" else ((16, 16),)
    draw = views.draw(64, *size, seeded())
    on_gpu = replace(draw, **{k: v.cuda() for k, v in vars(draw).items() if isinstance(v, Tensor)})
    torch.testing.assert_close(views.apply(images, on_gpu).cpu(), views.apply(images.cpu(), draw), rtol=0, atol=1e-4)


@pytest.mark.gpu
def test_gpu_kernel_draws_as_tensor_operations_do_there() -> None:
    views, rngs = colour(blur_probability=0.5), [torch.Generator("cuda").manual_seed(1) for _ in range(2)]
    assert can_fuse_on(rngs[0].device, views, (32, 32)), "see the log"
    draw, expected = views.draw(2001, (32, 32), rngs[0]), replace(views, kernel="torch").draw(2001, (32, 32), rngs[1])
    for name, value in vars(expected).items():
        if name == "box":  # a side may lie in the middle between two pixels
            assert (getattr(draw, name) != value).any(dim=1).sum() <= 2
        else:
            torch.testing.assert_close(getattr(draw, name), value, rtol=1e-6, atol=1e-6)
    assert torch.equal(rngs[0].get_state(), rngs[1].get_state())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["exact", "linear"])
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (20, 31, 33), (64, 50, 24), (224, 224, 64)])
def test_gpu_kernel_and_tensor_operations_agree_there(kind: str, height: int, width: int, size: int) -> None:
    views = colour(image_size=size, hue=0.5, colour=kind, blur_probability=0.5, mean=[0, 0.1, 0.2], std=[1, 1, 1])
    images = varied_images(200, height, width)
    draw = views.draw(len(images), (height, width), seeded(1))
    assert can_fuse_on(images.cuda().device, views, (height, width)), "see the log"
    expected = replace(views, kernel="torch").apply(images, draw)
    out = views.apply(images.cuda(), draw.to(torch.device("cuda")))
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=1e-5)
