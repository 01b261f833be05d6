"""MoCo v2: a query finds its image's key, made by a slowly following copy of the network, among a queue of older keys.

He et al. 2019, https://arxiv.org/abs/1911.05722; Chen et al. 2020, https://arxiv.org/abs/2003.04297. Key encoder and
queue are the client's own: they outlast its rounds and are sent to nobody. Departs from the paper: the queue starts
with keys of the client's images instead of noise; batch norm is not shuffled between devices, because a client is one
device. FedEMA's authors (https://arxiv.org/abs/2204.04385) copy the key encoder anew in every round; here it goes on,
as BYOL's target does.

The queue does not know whose keys it holds. Where it is large beside the client's images, an image's own older keys are
among its negatives: with k of n images about k/n of the time. In the paper that is 5 %.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fedssl.anchors import EmbeddingQueue
from fedssl.errors import ConfigError
from fedssl.losses import momentum_contrast
from fedssl.methods import Method
from fedssl.models import Model, TargetEncoder


class MoCoState(nn.Module):
    """The key encoder, and unit keys of the last images it saw.

    Args:
        model: the key encoder starts as a copy of it.
        queue_size: keys.
    """

    def __init__(self, model: Model, queue_size: int) -> None:
        super().__init__()
        self.encoder = TargetEncoder(model)
        self.queue = EmbeddingQueue(queue_size)

    def keys(self, x: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]:
        """The unit keys of a batch of views, without gradient."""
        return F.normalize(self.encoder(x).float(), dim=1)


@dataclass(frozen=True, kw_only=True)
class MoCo(Method):
    """Contrast with a queue, in two forward passes. The numbers live in conf/method/moco.yaml."""

    temperature: float  # > 0
    queue_size: int  # negatives, at least 1
    ema_decay: float  # of the key encoder, per step: 0 copies the trained one, 1 stays at its start
    symmetric: bool  # each view is query and key once, as in FedEMA; False: x1 is the query, x2 the key

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(
                f"method.temperature must be greater than 0, got {self.temperature}. MoCo divides cosines by it; "
                f"0.07 to 0.5 is usual."
            )
        if self.queue_size < 1:
            raise ConfigError(
                f"method.queue_size must be at least 1, got {self.queue_size}: the queue holds all negatives."
            )
        if not 0 <= self.ema_decay <= 1:
            raise ConfigError(
                f"method.ema_decay must be between 0 (a copy of the trained encoder) and 1 (frozen), "
                f"got {self.ema_decay}; .99 to .999 is usual."
            )

    def new_state(self, model: Model) -> MoCoState:
        """A copy of the encoder and an empty queue."""
        return MoCoState(model, self.queue_size)

    def prepare(self, model: Model, state: nn.Module, views: Iterator[Float[Tensor, "b 3 s s"]]) -> None:
        """Fill a new queue."""
        assert isinstance(state, MoCoState)
        while len(state.queue) < self.queue_size:
            state.queue.push(state.keys(next(views)))

    def loss(
        self, model: Model, state: nn.Module, x1: Float[Tensor, "b 3 s s"], x2: Float[Tensor, "b 3 s s"]
    ) -> Float[Tensor, ""]:
        """Algorithm 1: first score, then enqueue. Symmetric, it is the sum of both orders, and 2b keys enter."""
        assert isinstance(state, MoCoState)
        orders = [(x1, x2), (x2, x1)] if self.symmetric else [(x1, x2)]
        made = [state.keys(x) for _, x in orders]
        losses = [
            momentum_contrast(model(x), keys, state.queue.rows, self.temperature)
            for (x, _), keys in zip(orders, made, strict=True)
        ]
        state.queue.push(torch.cat(made))
        return torch.stack(losses).sum()

    def after_step(self, model: Model, state: nn.Module) -> None:
        """Eq. 2: the key encoder follows."""
        assert isinstance(state, MoCoState)
        state.encoder.follow(model, self.ema_decay)
