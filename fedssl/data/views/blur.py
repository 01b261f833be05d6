"""Gaussian blur of a batch, with one sigma per image."""

import torch
from jaxtyping import Float
from torch import Tensor


def gaussian_blur(
    pixels: Float[Tensor, "b 3 h w"], sigma: Float[Tensor, " b"], kernel_size: int
) -> Float[Tensor, "b 3 h w"]:
    """Equals torchvision's gaussian_blur (edges reflected) with each image's sigma; sigma 0 leaves it as it is.

    Args:
        pixels: any range.
        sigma: in pixels, >= 0.
        kernel_size: odd, at most 2 * min(h, w) - 1.
    """
    reach = kernel_size // 2
    offsets = torch.arange(-reach, reach + 1, device=pixels.device)
    weights = torch.exp(-0.5 * (offsets / sigma.clamp_min(1e-6)[:, None]) ** 2)  # sigma 1e-6: exactly 1 in the middle
    weights /= weights.sum(dim=1, keepdim=True)
    for dim in (2, 3):  # separable; one multiply-add of the whole batch per tap
        margins = (0, 0, reach, reach) if dim == 2 else (reach, reach, 0, 0)
        padded = torch.nn.functional.pad(pixels, margins, mode="reflect")
        pixels = torch.zeros_like(pixels)
        for tap in range(kernel_size):
            shifted = padded.narrow(dim, tap, pixels.shape[dim])
            pixels.addcmul_(shifted, weights[:, tap, None, None, None])
    return pixels
