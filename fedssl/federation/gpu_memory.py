"""What a worker takes of its GPU, measured: the number by which `grid.clients_per_gpu=auto` divides the free memory."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from fedssl.cuda_graph import WORTH
from fedssl.errors import ConfigError
from fedssl.federation.setup import Setup
from fedssl.models import Model

FREE = "import torch; print(torch.cuda.mem_get_info()[0])"
EPOCHS = WORTH  # of a full batch and a smaller one: so many that both are recorded, as in a worker


def measure(setup: Setup, build_model: Callable[[str], Model]) -> dict[str, int]:
    """Train some steps of each client family in this process, one family after the other, and see what that takes.

    What a strategy adds to the training (a second network, a distillation) is not in it. Models stay on the GPU as
    they do in a worker, so a family's peak contains the models of those before it.

    Args:
        setup: the run's; of each family the client with most images trains.
        build_model: family -> a model that is kept, as a worker keeps it.

    Returns:
        `free`, the bytes of the GPU that were free without this process; and by family the bytes that this process
        takes at its peak, the CUDA context included.

    Raises:
        ConfigError: no GPU.
        torch.cuda.OutOfMemoryError: not even one client fits.
    """
    if setup.device.type != "cuda":
        raise ConfigError("torch sees no GPU in this worker: use device=cpu, or a build of torch with CUDA")
    left = torch.cuda.mem_get_info()[0]
    context = left - _free_beside_another_process()  # this process has one, too
    free = left + context + torch.cuda.memory_reserved()
    peaks = {}
    for family in dict.fromkeys(setup.family(p) for p in setup.data.training_partitions):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        _train_some_steps(setup, build_model, family)
        besides = free - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()  # context, libraries
        peaks[family] = besides + torch.cuda.max_memory_reserved()
    return {"free": free, **peaks}


def _free_beside_another_process() -> int:
    """Free bytes while a second process has a context on this GPU."""
    ended = subprocess.run([sys.executable, "-c", FREE], check=True, capture_output=True, text=True, timeout=300)
    return int(ended.stdout)


def _train_some_steps(setup: Setup, build_model: Callable[[str], Model], family: str) -> None:
    mine = [p for p in setup.data.training_partitions if setup.family(p) == family]
    largest = max(mine, key=lambda p: len(setup.data.partitions[p]))
    client = setup.client(largest, 1)
    images = client.private_set
    _resident = images.take(np.arange(len(images))).to(setup.device)  # training has all of them there
    full, rest = divmod(len(images), client.local.batch_size)
    batches = images.subset(range(min(full, 1) * client.local.batch_size + rest))
    replace(client, private_set=batches).train(build_model(family).to(setup.device), epochs=EPOCHS)
