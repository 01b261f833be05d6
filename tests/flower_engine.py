"""Stock strategies by Flower alone: what our loop is compared with. As a program, under Flower's simulation engine."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from jaxtyping import Float
from torch import Tensor, nn

from fedssl.config import instantiate
from fedssl.federation.setup import Setup
from fedssl.federation.simulation import load_client_app


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


def main(configs: Path, folder: Path) -> None:
    """Learn with every configuration in the JSON file `configs`, and write `<strategy>.npz` for each."""
    from flwr.simulation import run_simulation

    app = ServerApp()
    of = json.loads(configs.read_text())

    @app.main()
    def learn(grid: Grid, context: Context) -> None:
        for config in of:
            np.savez(folder / f"{config['strategy']['name']}.npz", **start(config, grid))  # type: ignore[arg-type]

    run_simulation(
        server_app=app,
        client_app=load_client_app(of[0], folder),  # all have the same client half
        num_supernodes=of[0]["federation"]["num_clients"],
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"address": "local", "num_cpus": 2, "include_dashboard": False},
        },
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
