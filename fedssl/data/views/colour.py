"""SimCLR's views of photographs: resized crop, flip, colour jitter, grayscale, blur.

Chen et al. 2020, section 2.1 and appendix A, https://arxiv.org/abs/2002.05709. The numbers in conf/views/colour.yaml
are FLESD's for CIFAR (https://arxiv.org/abs/2109.14611), which leave out the blur.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from fedssl.data.views.base import Normalisation, Uniform, check_number, check_range
from fedssl.data.views.blur import gaussian_blur
from fedssl.data.views.crop import NUM_ATTEMPTS, draw_boxes, resized_crop
from fedssl.data.views.jitter import HUE, jitter_, linear_jitter, luma
from fedssl.errors import ConfigError

log = logging.getLogger(__name__)

LARGEST_ON_GPU = 64  # pixels of a view's side that fit into a multiprocessor's registers
# Random numbers of an image, in the order they are used: areas and ratios of boxes; top, left, brightness, contrast,
# saturation, hue, whether these are changed, sigma, flip; the order of changes; grayscale, whether to blur.
COLUMNS = (NUM_ATTEMPTS, NUM_ATTEMPTS, *[1] * 9, 4, 1, 1)
CHUNK = 2**18  # floats of a chunk of views on the CPU: what stays in its cache from one operation to the next


@dataclass(frozen=True, kw_only=True, eq=False)
class ColourDraw:
    """Every random number of a batch's views. What is not applied to an image has its neutral value.

    Args:
        box: (top, left, height, width) in pixels, inside the image.
        flip: mirror left and right.
        order: a permutation of jitter.BRIGHTNESS, CONTRAST, SATURATION, HUE: the order they are applied in.
        factors: columns brightness, contrast, saturation (neutral: 1), hue (neutral: 0), for torchvision's `adjust_*`.
        grayscale: after the jitter.
        blur_sigma: in pixels; 0 for no blur.
    """

    box: Int64[Tensor, "b 4"]
    flip: Bool[Tensor, " b"]
    order: Int64[Tensor, "b 4"]
    factors: Float[Tensor, "b 4"]
    grayscale: Bool[Tensor, " b"]
    blur_sigma: Float[Tensor, " b"]

    def __getitem__(self, rows: slice) -> "ColourDraw":
        return ColourDraw(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def to(self, device: torch.device) -> "ColourDraw":
        """The same draw there."""
        return ColourDraw(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@dataclass(frozen=True, kw_only=True)
class ColourViews(Normalisation):
    """Random views of colour images. The numbers live in conf/views/colour.yaml.

    `colour=exact` equals torchvision's functional operations on float images within 1/255 per value, given the same
    draw. `colour=linear` replaces jitter and grayscale by one 3x3 matrix and an offset per image (`linear_jitter`):
    with the numbers of colour.yaml, on photographs, values are off by less than 0.02 of white on average, and 95 % of
    them by less than 0.1.

    Args:
        image_size: of a view, in pixels; the images may have another size.
        crop_scale: share of the image's area, from and to.
        crop_ratio: width / height of the box, from and to.
        flip_probability: of mirroring left and right.
        jitter_probability: of changing the colours at all.
        brightness: factor drawn from [max(0, 1 - brightness), 1 + brightness].
        contrast: likewise.
        saturation: likewise.
        hue: shift drawn from [-hue, hue] turns of the colour wheel; at most 0.5.
        grayscale_probability: of dropping the colours after the jitter.
        blur_probability: of a Gaussian blur at the end; 0 costs nothing.
        blur_sigma: in pixels, from and to.
        blur_kernel: odd number of pixels; SimCLR takes a tenth of the image size.
        colour: "exact" or "linear".
        kernel: "fused" compiles all steps of an image into one, on the CPU and, up to 64 pixels and but for the blur,
            on NVIDIA's GPUs; "torch" takes tensor operations for the whole batch, as other devices do in any case.
            Same draws, but for a box that rounding decides; values agree within 1e-5 of white.
    """

    image_size: int
    crop_scale: Sequence[float]
    crop_ratio: Sequence[float]
    flip_probability: float
    jitter_probability: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grayscale_probability: float
    blur_probability: float
    blur_sigma: Sequence[float]
    blur_kernel: int
    colour: str
    kernel: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("image_size", self.image_size, 1, 4096)
        for name, high in (("crop_scale", 1.0), ("crop_ratio", 100.0), ("blur_sigma", 100.0)):
            object.__setattr__(self, name, check_range(name, getattr(self, name), 0, high))
        for name in ("flip", "jitter", "grayscale", "blur"):
            check_number(f"{name}_probability", getattr(self, f"{name}_probability"), 0, 1)
        for name in ("brightness", "contrast", "saturation"):
            check_number(name, getattr(self, name), 0, 10)
        check_number("hue", self.hue, 0, 0.5)
        if self.blur_kernel % 2 == 0 or not 1 <= self.blur_kernel < 2 * self.image_size:
            raise ConfigError(
                f"views.blur_kernel must be odd and between 1 and {2 * self.image_size - 1} pixels for views of "
                f"{self.image_size}, got {self.blur_kernel}. Change views.blur_kernel."
            )
        if self.colour not in ("exact", "linear"):
            raise ConfigError(
                f"views.colour must be exact (torchvision's colours) or linear (a faster approximation), "
                f"got {self.colour!r}. Change views.colour."
            )
        if self.kernel not in ("fused", "torch"):
            raise ConfigError(
                f"views.kernel must be fused (all steps compiled into one) or torch (tensor operations), "
                f"got {self.kernel!r}. Change views.kernel."
            )

    @property
    def factor_ranges(self) -> list[tuple[float, float]]:
        """From and to, of brightness, contrast, saturation and hue."""
        widths = (self.brightness, self.contrast, self.saturation)
        return [*((max(0.0, 1 - width), 1 + width) for width in widths), (-self.hue, self.hue)]

    def __call__(self, images: UInt8[Tensor, "b 3 h w"], generator: torch.Generator) -> Float[Tensor, "b 3 s s"]:
        """One random view of each image; see Views."""
        return self.apply(images, self.draw(len(images), images.shape[2:], generator))

    def draw(self, b: int, size: Sequence[int], generator: torch.Generator) -> ColourDraw:
        """Everything random about one view of each of `b` images of `size` (height, width).

        The draw lies on the generator's device.
        """
        # All in one call, for which a GPU needs hardly longer than for a few.
        numbers = torch.rand(sum(COLUMNS) * b, generator=generator, device=generator.device)
        if self.kernel == "fused" and can_fuse_on(generator.device, self, tuple(size)):
            from fedssl.data.views.fused_gpu import draw_colour_views

            return draw_colour_views(self, numbers, size)
        return self.draw_from(numbers, size)

    def draw_from(self, numbers: Float[Tensor, " n"], size: Sequence[int]) -> ColourDraw:
        """What `numbers`, uniform on [0, 1), draw: a block for each of `COLUMNS`, with so many for each image."""
        b = len(numbers) // sum(COLUMNS)
        uniform = Uniform(b, iter(torch.split(numbers, [num * b for num in COLUMNS])))
        box = draw_boxes(uniform, size[0], size[1], self.crop_scale, self.crop_ratio)
        factors = torch.stack([uniform.between(low, high) for low, high in self.factor_ranges], dim=1)
        neutral = torch.ones_like(factors)
        neutral[:, HUE] = 0
        jittered = uniform.happens(self.jitter_probability)
        sigma = uniform.between(self.blur_sigma[0], self.blur_sigma[1])
        return ColourDraw(
            box=box,
            flip=uniform.happens(self.flip_probability),
            order=uniform.orders(4),
            factors=torch.where(jittered[:, None], factors, neutral),
            grayscale=uniform.happens(self.grayscale_probability),
            blur_sigma=sigma * uniform.happens(self.blur_probability),
        )

    def apply(self, images: UInt8[Tensor, "b 3 h w"], draw: ColourDraw) -> Float[Tensor, "b 3 s s"]:
        """The views that `draw` describes, normalised; a pure function."""
        on_cpu = images.device.type == "cpu"
        if self.kernel == "fused" and on_cpu:
            return self._fused_on_cpu(images, draw)
        if self.kernel == "fused" and can_fuse_on(images.device, self, tuple(images.shape[2:])):
            return self._fused_on_gpu(images, draw)
        if not on_cpu:
            return self._unfused(images, draw)
        size = max(1, CHUNK // (3 * self.image_size**2))
        chunks = [slice(start, start + size) for start in range(0, len(images), size)]
        return torch.cat([self._unfused(images[rows], draw[rows]) for rows in chunks])

    def _fused_on_cpu(self, images: UInt8[Tensor, "b 3 h w"], draw: ColourDraw) -> Float[Tensor, "b 3 s s"]:
        from fedssl.data.views.fused import colour_views  # numba takes a while to import, and a GPU needs none

        scale, shift = self.scale_and_shift()
        linear = self.colour == "linear"
        return colour_views(
            images, draw, image_size=self.image_size, linear=linear, blur_kernel=self.blur_kernel, scale=scale,
            shift=shift,
        )  # fmt: skip

    def _fused_on_gpu(self, images: UInt8[Tensor, "b 3 h w"], draw: ColourDraw) -> Float[Tensor, "b 3 s s"]:
        from fedssl.data.views.fused_gpu import colour_views  # triton takes a while to import, a CPU needs none

        linear = self.colour == "linear"
        if self.blur_probability == 0:
            scale, shift = self.scale_and_shift()
            return colour_views(images, draw, image_size=self.image_size, linear=linear, scale=scale, shift=shift)
        pixels = colour_views(images, draw, image_size=self.image_size, linear=linear, scale=[1.0] * 3, shift=[0.0] * 3)
        return self.normalise_(gaussian_blur(pixels, draw.blur_sigma, self.blur_kernel))

    def _unfused(self, images: UInt8[Tensor, "b 3 h w"], draw: ColourDraw) -> Float[Tensor, "b 3 s s"]:
        with torch.autocast(images.device.type, enabled=False):  # the crop is a matrix product: keep it in float32
            pixels = resized_crop(images, draw.box, draw.flip, self.image_size)
            if self.colour == "linear":
                pixels = linear_jitter(pixels, draw.order, draw.factors, draw.grayscale)
            else:
                pixels = jitter_(pixels, draw.order, draw.factors)
                pixels = torch.lerp(pixels, luma(pixels), draw.grayscale[:, None, None, None].float())
            if self.blur_probability > 0:
                pixels = gaussian_blur(pixels, draw.blur_sigma, self.blur_kernel)
            return self.normalise_(pixels)


@lru_cache
def can_fuse_on(device: torch.device, views: ColourViews, size: tuple[int, int]) -> bool:
    """Whether the kernels for GPUs work there, with images of `size` (height, width); compiles them."""
    if device.type != "cuda" or views.image_size > LARGEST_ON_GPU:
        return False
    try:
        from fedssl.data.views.fused_gpu import agree

        if agree(views, device, size):
            return True
        reason = "they give other views"
    except torch.cuda.OutOfMemoryError:  # says nothing of the kernels, and is not remembered
        raise
    except Exception as error:  # of an import, of a compiler, of the device
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    log.warning("views.kernel=fused: no kernels on %s, tensor operations take their place: %s", device, reason)
    return False
