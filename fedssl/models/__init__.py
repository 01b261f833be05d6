"""A backbone, a projector, and what the rest of the library asks of them."""

import copy
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from fedssl.errors import ConfigError


class Model(nn.Module):
    """What a client trains: `projector(backbone(x))`. Evaluation sees the backbone alone.

    Args:
        backbone: (b, 3, s, s) images to (b, feature_dim) features, pooled and flattened.
        projector: (b, feature_dim) features to (b, d) projections, which need not be normalised.
        heads: what the method trains on top of projections, by name (`fedssl.methods.Method.heads`).
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module, heads: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.heads = nn.ModuleDict(heads)

    def forward(self, x: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]:
        """The projections of a batch of views."""
        projections: Tensor = self.projector(self.backbone(x))
        return projections


class TargetEncoder(nn.Module):
    """A copy of a model's backbone and projector that no gradient reaches: it follows the model, or stays as it is.

    The target network of BYOL and the key encoder of MoCo. In train mode its batch norm sees its own batches.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(model.backbone)
        self.projector = copy.deepcopy(model.projector)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]:
        """The projections of a batch of views."""
        projections: Tensor = self.projector(self.backbone(x))
        return projections

    def follow(self, model: Model, decay: float) -> None:
        """See `move_average`; batch norm's running averages are its own."""
        move_average(self.backbone, model.backbone, decay, buffers=False)
        move_average(self.projector, model.projector, decay, buffers=False)


@torch.no_grad()
def move_average(average: nn.Module, online: nn.Module, decay: float, *, buffers: bool) -> None:
    """Move the average's weights towards the online network's: decay * average + (1 - decay) * online.

    Args:
        average: the target encoder, changed in place.
        online: a network of the same architecture.
        decay: 0 copies, 1 changes nothing.
        buffers: average the buffers too; those of integers (batch counters) are copied. If not, they are left alone.
    """
    ours, theirs = (
        itertools.chain(network.parameters(), network.buffers() if buffers else ()) for network in (average, online)
    )
    for old, new in zip(ours, theirs, strict=True):
        if old.is_floating_point():
            old.lerp_(new, 1 - decay)
        else:
            old.copy_(new)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, `module` is in eval mode; afterwards each of its parts is back in the mode it had."""
    with _mode(module, training=False):
        yield


@contextmanager
def _mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for part, before in modes:
            part.training = before


def calibrate_batch_norm(module: nn.Module, x: Float[Tensor, "b 3 s s"]) -> None:
    """Give batch-norm layers that have seen no batch the mean and variance of `x` as their running averages.

    Layers start with mean 0 and variance 1 and forget that by a factor 0.9 a step. In a fresh deep network the true
    variances are far from 1 and the error multiplies over the layers: after a first training of 20 steps, a MobileNet
    in eval mode maps all images to one point, although in train mode it works. Layers that have averages keep them.
    One forward pass without gradient; the module's modes are as before.
    """
    tracked = [
        (part, part.num_batches_tracked, part.momentum)
        for part in module.modules()
        if isinstance(part, _BatchNorm) and part.num_batches_tracked is not None
    ]
    seen = torch.stack([batches for _, batches, _ in tracked]).tolist() if tracked else []  # one read from the device
    if all(seen):
        return
    with torch.no_grad(), _mode(module, training=True):
        for (norm, _, _), batches in zip(tracked, seen, strict=True):
            norm.momentum = 0.0 if batches else 1.0  # the weight of `x` in the averages
        try:
            module(x)
        finally:
            for (norm, count, momentum), batches in zip(tracked, seen, strict=True):
                norm.momentum = momentum
                count.fill_(max(1, batches))


def recount_batches(module: nn.Module) -> None:
    """Tell batch-norm layers whose averages were loaded from those that have seen no batch, as they were told before.

    Weights travel and are kept without batch counters. A layer whose averages still are mean 0 and variance 1 has seen
    nothing; any other has, so `calibrate_batch_norm` leaves it alone.
    """
    for part in module.modules():
        if isinstance(part, _BatchNorm) and part.num_batches_tracked is not None:
            assert part.running_mean is not None
            assert part.running_var is not None
            fresh = bool((part.running_mean == 0).all() and (part.running_var == 1).all())
            part.num_batches_tracked.fill_(0 if fresh else 1)


def feature_dim(backbone: nn.Module, image_size: int) -> int:
    """The number of features per image, measured by one dry pass in eval mode: nothing in `backbone` changes.

    Args:
        backbone: any module that keeps the promise of `Model`, a user's own included.
        image_size: side of the (square) images in pixels.

    Raises:
        ConfigError: the backbone cannot take such images, or returns anything but (1, feature_dim) floats.
    """
    name = type(backbone).__name__
    anchor = next(backbone.parameters(), torch.zeros(()))
    image = torch.zeros(1, 3, image_size, image_size, device=anchor.device, dtype=anchor.dtype)
    with torch.no_grad(), evaluating(backbone):
        try:
            features = backbone(image)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:  # AssertionError: torch._assert on sizes
            raise ConfigError(
                f"the backbone {name} cannot take (b, 3, {image_size}, {image_size}) images: {error}. "
                f"Its entry under `models` must build a network for data.image_size={image_size}."
            ) from error
    if not isinstance(features, Tensor) or features.ndim != 2 or not features.is_floating_point():
        got = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else f"a {type(features).__name__}"
        raise ConfigError(
            f"a backbone returns (b, feature_dim) float features, pooled and flattened; for one image {name} returned "
            f"{got}. Pool in its forward, or for a timm model set num_classes: 0 in its entry under `models`."
        )
    return features.shape[1]


def draws_globally(model: Model, image_size: int) -> bool:
    """Whether the model in train mode, dropout say, draws from torch's global generators: one dry pass of a copy.

    What it does in this pass forward counts: neither draws of some passes alone nor of the backward pass are seen.
    """
    copied = copy.deepcopy(model).train()
    anchor = next(copied.parameters())
    noted = _GlobalDraws()  # type: ignore[no-untyped-call]
    with torch.no_grad(), torch.random.fork_rng(devices=[]), noted:
        copied(torch.zeros(2, 3, image_size, image_size, device=anchor.device, dtype=anchor.dtype))
    return noted.found


class _GlobalDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether an operation inside draws from a global generator."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own = any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values()))
        self.found |= torch.Tag.nondeterministic_seeded in func.tags and not own
        return func(*args, **kwargs)


def num_parameters(module: nn.Module) -> int:
    """Number of trainable scalars; buffers (batch norm's averages) are not counted."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
