"""Features of a frozen backbone, and their scale."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedssl.data.images import ImageSet
from fedssl.data.views import Views
from fedssl.models import evaluating

CPU_BATCH = 64  # images a pass: the activations of more do not fit a core's cache, and every layer would wait for them


def extract_features(
    backbone: nn.Module,
    images: ImageSet,
    views: Views,
    batch_size: int,
    device: torch.device,
    rng: torch.Generator | None = None,
) -> Float[Tensor, "n d"]:
    """The features of all `images`, in order, on the CPU in float32.

    The backbone runs in eval mode, without gradients; neither its weights, its batch norm buffers nor its mode are
    changed.

    Args:
        backbone: (b, 3, h, w) to (b, d); lives on `device`.
        images: n > 0 images.
        views: its deterministic transform is used, unless there is an `rng`.
        batch_size: images for which views are drawn at once; a forward pass takes as many, on the CPU `CPU_BATCH`.
        device: where the backbone computes.
        rng: a generator on `device`: the features are those of one random view of each image, drawn from it.
    """
    features = []
    a_pass = CPU_BATCH if device.type == "cpu" else batch_size
    with torch.no_grad(), evaluating(backbone):
        for rows in torch.split(torch.arange(len(images)), batch_size):
            pixels = images.take(rows).to(device)
            x = views.plain(pixels) if rng is None else views(pixels, rng)
            for part in torch.split(x.contiguous(memory_format=torch.channels_last), a_pass):
                features.append(backbone(part).float().cpu())
    return torch.cat(features)


def standardise(
    train: Float[Tensor, "n d"], test: Float[Tensor, "t d"]
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "t d"]]:
    """Both sets of features with the mean and standard deviation of *all* training images taken out.

    No label is involved and nothing of the test images. A feature that is constant in training becomes 0 in both.
    """
    std, mean = torch.std_mean(train, dim=0, correction=0)
    std = torch.where(std > 1e-6 * mean.abs(), std, torch.inf)  # constant up to rounding
    return (train - mean) / std, (test - mean) / std
