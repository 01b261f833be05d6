"""Stock strategies by Flower alone: what our loop is compared with."""

from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from jaxtyping import Float
from torch import Tensor, nn

from fedssl.config import instantiate
from fedssl.federation.setup import Setup


class Plain(nn.Module):
    """A backbone without batch norm, so that all it has is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 5, stride=4)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]:
        return self.scale * torch.relu(self.conv(x)).flatten(1)


class InOrder:
    """A grid whose replies come by partition. Flower's own come as they are ready."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = self._grid.send_and_receive(messages=messages, timeout=timeout)
        return sorted(replies, key=lambda reply: cast(int, reply.content["header"]["partition_id"]))


def start(config: dict[str, Any], grid: Grid) -> dict[str, np.ndarray]:
    """The weights that the stock strategy of `config` learns by its own `start`, as a model loads them."""
    strategy: Strategy = instantiate(config["strategy"]["server"]["strategy"])
    vars(strategy)["fraction_evaluate"] = 0.0  # the clients have no `evaluate`
    arrays = Setup(config).server().initial_arrays()
    result = strategy.start(cast(Grid, InOrder(grid)), arrays, num_rounds=config["federation"]["num_rounds"])
    return {name: array.numpy().astype(np.float32) for name, array in result.arrays.items()}
