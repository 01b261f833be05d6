"""What clients make of the public set, and similarities are cosines of.

`embedding=projector`: the projector's outputs, as in FLESD (https://arxiv.org/abs/2109.14611). `embedding=backbone`,
ours: the features that probes and users take, each with its mean and scale on the public set taken out. A contrastive
projector throws away what its loss cannot use (https://arxiv.org/abs/2002.05709, Sec. 4.2). Without the standardisation
features after a ReLU, none of them negative, would all point the same way.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fedssl.data.images import ImageSet
from fedssl.data.views import Views
from fedssl.errors import ConfigError
from fedssl.evaluate import extract_features, standardise
from fedssl.models import Model

EMBEDDINGS = ("projector", "backbone")


def embed(
    model: Model, embedding: str, images: ImageSet, views: Views, *, batch_size: int, device: torch.device
) -> Float[Tensor, "n d"]:
    """Embeddings of the public set: eval mode, no augmentation, its fixed order; rows not normalised, on the CPU.

    Args:
        model: of any architecture; lives on `device`.
        embedding: "projector": its outputs as they are; "backbone": standardised features, of which one that is the
            same for all images becomes 0.
        images: the public set.
        views: only the deterministic transform is used.
        batch_size: images per forward pass.
        device: where the model computes.

    Raises:
        ConfigError: an unknown `embedding`.
    """
    check_embedding(embedding)
    if embedding == "projector":
        return extract_features(model, images, views, batch_size, device)
    features = extract_features(model.backbone, images, views, batch_size, device)
    return standardise(features, features)[0]


def check_embedding(embedding: str) -> None:
    """Raise ConfigError unless it is one of `EMBEDDINGS`."""
    if embedding not in EMBEDDINGS:
        raise ConfigError(f"embedding must be one of {', '.join(EMBEDDINGS)}, got {embedding!r}")
