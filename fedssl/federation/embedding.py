"""What clients make of the public set, and similarities are cosines of.

`embedding=projector`: the projector's outputs, as in FLESD (https://arxiv.org/abs/2109.14611). `embedding=backbone`,
ours: the features that probes and users take, each with its mean and scale on the public set taken out. A contrastive
projector throws away what its loss cannot use (https://arxiv.org/abs/2002.05709, Sec. 4.2). Without the standardisation
features after a ReLU, none of them negative, would all point the same way.
"""

import torch
import torch.nn.functional as F
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


def embed_batch(model: Model, embedding: str, x: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]:
    """What `embed` makes of one batch, with gradients and in the mode that the model is in.

    Features are standardised by the batch's own means and variances, as batch norm does it: a feature that hardly
    varies in a batch stays small, where `embed` scales whatever is not constant.
    """
    if embedding == "projector":
        projections: Tensor = model(x)
        return projections
    return F.batch_norm(model.backbone(x).float(), None, None, training=True)


def check_embedding(embedding: str) -> None:
    """Raise ConfigError unless it is one of `EMBEDDINGS`."""
    if embedding not in EMBEDDINGS:
        raise ConfigError(f"embedding must be one of {', '.join(EMBEDDINGS)}, got {embedding!r}")
