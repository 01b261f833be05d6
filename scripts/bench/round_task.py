"""The work of one round, the same for every engine: pfl-research's CIFAR-10 setting on synthetic images.

Batches of `pfl_1` and `pfl_N` alone have torch's usual layout and not channels last.
Needs torch and numpy alone: the peers' environments have no fedssl.
"""

import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from bench.turns import Turns
from torch import Tensor, nn

NUM_CLIENTS = 1_000
NUM_IMAGES = 50  # a client's
COHORT = 50
BATCH = 10
LEARNING_RATE = 0.1
NUM_CLASSES = 10
NUM_PARAMETERS = 167_562


class CNN(nn.Module):
    """Two 3x3 convolutions of 32 and 64 channels with pooling, two linear layers of 64 and 10."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.linear1 = nn.Linear(2304, 64)
        self.linear2 = nn.Linear(64, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, 32, 32) images to (b, 10) logits."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        logits: Tensor = self.linear2(F.relu(self.linear1(x.flatten(1))))
        return logits


class Task:
    """Images, labels, initial weights and cohorts in `folder`; images are mapped, so all processes share them."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.images = torch.from_numpy(np.load(folder / "images.npy", mmap_mode="c"))  # (clients, n, 3, 32, 32)
        self.labels = torch.from_numpy(np.load(folder / "labels.npy"))  # (clients, n)
        self.initial = torch.from_numpy(np.load(folder / "initial.npy"))  # (parameters,)
        self.cohorts: list[list[int]] = np.load(folder / "cohorts.npy").tolist()  # of rounds 1, 2, ...

    @staticmethod
    def write(folder: Path, cohorts: np.ndarray) -> None:
        """Make the folder's files; noise, because no time here depends on values."""
        torch.manual_seed(0)
        model = CNN()
        initial = nn.utils.parameters_to_vector(model.parameters()).detach()
        assert len(initial) == NUM_PARAMETERS
        rng = np.random.default_rng(0)
        np.save(folder / "images.npy", rng.standard_normal((NUM_CLIENTS, NUM_IMAGES, 3, 32, 32), dtype=np.float32))
        np.save(folder / "labels.npy", rng.integers(NUM_CLASSES, size=(NUM_CLIENTS, NUM_IMAGES)))
        np.save(folder / "initial.npy", initial.numpy())
        np.save(folder / "cohorts.npy", cohorts)

    def model(self) -> CNN:
        """A network with the initial weights."""
        model = CNN()
        nn.utils.vector_to_parameters(self.initial.clone(), model.parameters())
        return model

    def train(self, model: nn.Module, client: int) -> float:
        """One epoch of one client in place, in the order of its images; the last batch's loss.

        A batch is laid out channels last, as our clients' are: compare `pfl_N` with `pfl_N_channels_last`.
        """
        images, labels = self.images[client], self.labels[client]
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        for start in range(0, NUM_IMAGES, BATCH):
            x = images[start : start + BATCH].contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(x), labels[start : start + BATCH])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()


def arguments() -> Namespace:
    """What `round.py` tells an engine: its name, the task's folder, rounds, processes, turns, when it was started."""
    parser = ArgumentParser()
    parser.add_argument("engine")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--turns", type=Path)
    parser.add_argument("--started", type=float)
    return parser.parse_args()


class Clock:
    """Times the rounds of an engine; made when everything is there and the first one can begin.

    After each but the last the engine waits until `round.py` gives it another turn.
    """

    def __init__(self, given: Namespace) -> None:
        self._given = given
        self._start_s = time.time() - given.started
        self._turns = Turns(given.turns)
        self._seconds: list[float] = []
        self.begin()

    def begin(self) -> None:
        """The next round begins now, not at the end of `lap`: an engine of several processes has told them all."""
        self._last = time.perf_counter()

    def lap(self, weights: Callable[[], Tensor]) -> None:
        """A round has ended with these (parameters,), the first round's are kept, to be compared; wait for a turn."""
        self._seconds.append(time.perf_counter() - self._last)
        if len(self._seconds) == 1:
            np.save(self._given.folder / f"weights_{self._given.engine}.npy", weights().detach().double().numpy())
        if len(self._seconds) < self._given.rounds:
            self._turns.wait()
        self.begin()

    def report(self, **more: float | str) -> None:
        """Tell `round.py`, and what else is worth keeping."""
        measured = {"start_s": self._start_s, "seconds": self._seconds, "torch": torch.__version__, **more}
        print("RESULT", json.dumps(measured), flush=True)
