"""How many times as fast clients train with a choice as without it, by family: choices we made, and one we did not."""

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from bench.measure import Result, in_own_process, median_interval, wait
from bench.train import LARGE, Epoch, epoch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fedssl.config import compose
from fedssl.environment import keep_memory
from fedssl.models.backbones import Conv4
from fedssl.train import Optimisation

PAIRS = 15
LARGE_PAIRS = 7  # of families whose epoch takes seconds, and of processes
STEPS, GPU_STEPS = 2, 8  # of an epoch
FAMILIES = ("conv4_16", "resnet8", "mobilenet_v3_small")  # in processes of their own, and in turn in one
EPOCHS = 2  # of a family, whose median counts: in such a process, and before and after a switch
LOCAL_STEPS, LR = 3, 0.1  # of each client that is trained with others at once
STACKS = (  # width, side, images a step, clients
    (4, 16, 64, 4), (4, 16, 64, 16), (16, 32, 10, 4), (16, 32, 10, 16), (16, 32, 64, 4),
)  # fmt: skip
TOLERANCE = 1e-4  # of losses, relative: networks trained at once and apart differ in the order of their sums

Run = Callable[[], float]  # seconds of what it measures


def in_turn(runs: dict[str, Run], pairs: int) -> dict[str, list[float]]:
    """Seconds of each, forwards and backwards in turn, after an untimed run of each."""
    done: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for i in range(pairs):
        for name in runs if i % 2 == 0 else reversed(runs):
            done[name].append(runs[name]())
    return done


def compared(without: Sequence[float], chosen: Sequence[float]) -> dict[str, Any]:
    """The figures of one choice for one network."""
    return {
        "times_faster": median_interval([a / b for a, b in zip(without, chosen, strict=True)]),
        "without_s": list(without),
        "with_s": list(chosen),
    }


# --- channels last, fused optimisers --------------------------------------------------------------------------------
class Unfused(Optimisation):
    """With torch's own choice of kernels: on a CPU one weight after the other, on a GPU `foreach`."""

    def build(self, *args: Any, **kwargs: Any) -> tuple[Optimizer, LRScheduler]:
        """As trainings do it, but for that."""
        optimiser, schedule = super().build(*args, **kwargs)
        for group in optimiser.param_groups:
            group["fused"] = None
        return optimiser, schedule


def layouts_and_optimisers(family: str, device: torch.device) -> dict[str, dict[str, Any]]:
    """The epoch of `train`, shorter, and the same without either choice."""
    one, large = short_epoch(family, device)
    unfused = replace(one, optimisation=Unfused(**asdict(one.optimisation)))

    def contiguous() -> float:
        with patch.object(torch, "channels_last", torch.contiguous_format):  # what `train` asks views to be
            return one.ours()

    runs = {"ours": one.ours, "channels_last": contiguous, "fused": unfused.ours}
    seconds = in_turn(runs, LARGE_PAIRS if large else PAIRS)
    return {choice: compared(seconds[choice], seconds["ours"]) for choice in ("channels_last", "fused")}


def short_epoch(family: str, device: torch.device) -> tuple[Epoch, bool]:
    """The epoch of `train` with fewer steps of the same size; whether one takes seconds all the same."""
    one, cost = epoch(family, device)
    large = device.type == "cpu" and cost >= LARGE
    steps = GPU_STEPS if device.type == "cuda" else STEPS
    return replace(one, images=one.images.subset(range(steps * one.batch_size))), large


# --- memory that is kept --------------------------------------------------------------------------------------------
def seconds_of_families(*, keep: bool) -> list[float]:
    """An epoch of each of FAMILIES, in this process, which keeps the memory that steps free, or does not."""
    if keep and not keep_memory():
        raise RuntimeError("this process cannot be told to keep memory: see fedssl.environment.keep_memory")
    torch.set_num_threads(1)
    done = []
    for family in FAMILIES:
        one, _ = short_epoch(family, torch.device("cpu"))
        done.append(median([one.ours() for _ in range(1 + EPOCHS)][1:]))
    return done


def kept_memory() -> dict[str, Any]:
    """Processes with and without it, in turn."""
    done: dict[bool, list[list[float]]] = {False: [], True: []}
    for i in range(LARGE_PAIRS):
        for keep in done if i % 2 == 0 else reversed(done):
            done[keep].append(in_own_process(f"bench.choices.seconds_of_families(keep={keep})"))
    of_family = {keep: list(zip(*processes, strict=True)) for keep, processes in done.items()}
    return {family: compared(of_family[False][i], of_family[True][i]) for i, family in enumerate(FAMILIES)}


# --- one architecture after the other -------------------------------------------------------------------------------
def switching(device: torch.device) -> dict[str, Any]:
    """Epochs that follow one of another family, against epochs that follow one of their own."""
    epochs = {family: short_epoch(family, device)[0] for family in FAMILIES}
    stayed: dict[str, list[float]] = {family: [] for family in FAMILIES}
    switched: dict[str, list[float]] = {family: [] for family in FAMILIES}

    def blocks() -> None:
        for family, one in epochs.items():
            stayed[family].append(median([one.ours() for _ in range(1 + EPOCHS)][1:]))

    def alternating() -> None:
        rounds = [[one.ours() for one in epochs.values()] for _ in range(EPOCHS)]
        for family, seconds in zip(FAMILIES, zip(*rounds, strict=True), strict=True):
            switched[family].append(median(seconds))

    for one in epochs.values():
        one.ours()
    for i in range(PAIRS):
        for part in (blocks, alternating) if i % 2 == 0 else (alternating, blocks):
            part()
    return {family: compared(stayed[family], switched[family]) for family in FAMILIES}


# --- several clients at once ----------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Stack:
    """Clients with a Conv4 and one batch each, on which they take some steps."""

    networks: Sequence[Conv4]  # never trained themselves
    x: Tensor  # (clients, b, 3, s, s)
    labels: Tensor  # (clients, b), each the index of a feature

    @property
    def clients(self) -> int:
        """How many there are."""
        return len(self.networks)

    @staticmethod
    def new(width: int, side: int, images: int, clients: int, device: torch.device) -> "Stack":
        """Other weights and noise for each."""
        torch.manual_seed(0)
        return Stack(
            networks=[Conv4(width=width).to(device).train() for _ in range(clients)],
            x=torch.randn(clients, images, 3, side, side, device=device),
            labels=torch.randint(8 * width, (clients, images), device=device),
        )

    def separate(self) -> tuple[float, Tensor]:
        """One client after the other: seconds, losses."""
        networks = copy.deepcopy(self.networks)
        batches = [x.contiguous(memory_format=torch.channels_last) for x in self.x]
        optimisers = [_sgd(network.parameters()) for network in networks]
        losses = []
        started = self._now()
        for network, x, labels, optimiser in zip(networks, batches, self.labels, optimisers, strict=True):
            for _ in range(LOCAL_STEPS):
                losses.append(_step(F.cross_entropy(network(x), labels), optimiser))
        seconds = self._now() - started
        return seconds, torch.stack(losses).view(self.clients, LOCAL_STEPS)

    def grouped(self) -> tuple[float, Tensor]:
        """One network whose channels are all clients' channels, each convolution in as many groups as clients."""
        network = self._grouped_network()
        x = self.x.transpose(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)  # (b, clients * 3, s, s)

        def losses() -> Tensor:
            features = network(x).view(len(x), self.clients, -1).transpose(0, 1)
            return self._losses(features)

        return self._train(losses, _sgd(network.parameters()))

    def mapped(self) -> tuple[float, Tensor]:
        """One network mapped over stacked weights, as torch does it."""
        weights, buffers = stack_module_state(list(copy.deepcopy(self.networks)))
        skeleton = copy.deepcopy(self.networks[0]).to("meta")
        forward = vmap(lambda weights, buffers, x: functional_call(skeleton, (weights, buffers), (x,)))

        def losses() -> Tensor:
            return self._losses(forward(weights, buffers, self.x))

        return self._train(losses, _sgd(weights.values()))

    def check(self) -> float:
        """The largest relative difference of losses, of any step, to those of one client after the other."""
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            expected, *others = (run()[1] for run in (self.separate, self.grouped, self.mapped))
        found = float((torch.stack(others) / expected - 1).abs().max())
        if not found <= TOLERANCE:
            raise RuntimeError(f"clients trained at once have other losses than apart: they differ by {found:.1e}")
        return found

    def _train(self, losses: Callable[[], Tensor], optimiser: Optimizer) -> tuple[float, Tensor]:
        started = self._now()
        done = [_step(losses(), optimiser) for _ in range(LOCAL_STEPS)]
        seconds = self._now() - started
        return seconds, torch.stack(done, dim=1)

    def _losses(self, features: Tensor) -> Tensor:
        """(clients, b, d) features to each client's loss."""
        each = F.cross_entropy(features.flatten(0, 1), self.labels.flatten(), reduction="none")
        return each.view(self.clients, -1).mean(dim=1)

    def _now(self) -> float:
        wait(self.x.device)
        return time.perf_counter()

    def _grouped_network(self) -> nn.Sequential:
        layers: list[nn.Module] = []
        for parts in zip(*self.networks, strict=True):
            layer = copy.deepcopy(parts[0])
            if isinstance(layer, nn.Conv2d):
                layer = nn.Conv2d(
                    self.clients * layer.in_channels, self.clients * layer.out_channels, 3,
                    padding=1, groups=self.clients, bias=False,
                )  # fmt: skip
            elif isinstance(layer, nn.BatchNorm2d):
                layer = nn.BatchNorm2d(self.clients * layer.num_features)
            for name in dict(layer.named_parameters()):
                setattr(layer, name, nn.Parameter(torch.cat([part.get_parameter(name).data for part in parts])))
            layers.append(layer.to(self.x.device))
        return nn.Sequential(*layers).train()


def _sgd(weights: Iterable[Tensor]) -> Optimizer:
    return torch.optim.SGD(weights, lr=LR, fused=True)


def _step(losses: Tensor, optimiser: Optimizer) -> Tensor:
    """The losses before it, of all clients that take it."""
    losses.sum().backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    optimiser.zero_grad()
    return losses.detach()


def _seconds(run: Callable[[], tuple[float, Tensor]]) -> float:
    return run()[0]


def stacked(device: torch.device) -> dict[str, dict[str, Any]]:
    """The networks of several clients trained at once, either way, against one after the other."""
    figures: dict[str, dict[str, Any]] = {}
    for width, side, images, clients in STACKS:
        stack = Stack.new(width, side, images, clients, device)
        difference = stack.check()
        runs = {"separate": stack.separate, "grouped": stack.grouped, "mapped": stack.mapped}
        seconds = in_turn({how: partial(_seconds, run) for how, run in runs.items()}, PAIRS)
        figures[f"{clients} clients, width {width}, {images} of {side} x {side}"] = {
            "grouped_convolutions": compared(seconds["separate"], seconds["grouped"]),
            "vmap": compared(seconds["separate"], seconds["mapped"]),
            "largest_difference": difference,
        }
    return figures


# --- together -------------------------------------------------------------------------------------------------------
def choices() -> Result:
    """On the GPU where there is one, else with one thread, as a worker has it."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    of_family = {family: layouts_and_optimisers(family, device) for family in compose([])["models"]}
    figures: dict[str, Any] = {
        "unit": "seconds: of an epoch; of `stacked`, of the steps of all clients",
        "device": str(device),
        "pairs": PAIRS,
        "pairs_of_large_families_and_of_processes": LARGE_PAIRS,
        "tolerance": TOLERANCE,
    }
    for choice in ("channels_last", "fused"):
        figures[choice] = {family: found[choice] for family, found in of_family.items()}
    figures["kept_memory"] = kept_memory() if device.type == "cpu" else None
    figures["switching"] = switching(device)
    figures["stacked"] = stacked(device)
    return figures, []
