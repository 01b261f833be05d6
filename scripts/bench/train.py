"""One epoch of a client, from uint8 images to trained weights, against the same model stepping on ready tensors."""

import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from bench.measure import Bar, Result, judge, median_interval, wait
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedssl import train as training
from fedssl.config import compose, instantiate
from fedssl.cuda_graph import Replayed, can_record
from fedssl.data.images import ImageSet
from fedssl.data.views import Views
from fedssl.errors import ConfigError
from fedssl.methods import Method
from fedssl.models import Model, calibrate_batch_norm, feature_dim

SIZE = 32  # pixels
PAIRS = 15
UNTIMED = 1  # pairs before them
HALF_PAIRS = 5  # of full precision and bfloat16
FEW = 3  # of these, and trainings whose steps are launched, where steps are replayed: a GPU's time is short
BARS = ((10e6, 0.90), (0.0, 0.75))  # (operations a view from which it holds, share of the bare loop)
LARGE = 100e6  # operations a view from which an epoch has fewer and smaller batches: one takes seconds
EPOCHS = {False: (16, 64), True: (4, 32)}  # large? -> steps, images a step
ON_A_GPU = (16, 512)
# On a GPU with the default configuration: large? -> steps an epoch, images a step.
REPLAYED = {False: (8, 512), True: (8, 256)}
REPLAYED_EPOCHS = 4  # of a training, whose steps are recorded anew in each training, as the bare ones are
PEAK = 4096  # side of the matrices whose product, in bfloat16, shows what a GPU can do


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What both loops work on."""

    model: Model  # never trained itself
    method: Method
    views: Views
    optimisation: training.Optimisation
    images: ImageSet
    batch_size: int
    device: torch.device
    amp: bool
    compile_mode: str | None = None
    cuda_graphs: bool = False
    epochs: int = 1  # bare steps are as many

    def ours(self) -> float:
        """Seconds of `fedssl.train.train`, of which a client's local training consists."""
        model = copy.deepcopy(self.model).to(self.device)  # as a worker keeps it there
        wait(self.device)
        started = time.perf_counter()
        training.train(
            model,
            self.images,
            method=self.method,
            views=self.views,
            optimisation=self.optimisation,
            batch_size=self.batch_size,
            epochs=self.epochs,
            seed=0,
            round_num=1,
            num_rounds=1,
            device=self.device,
            amp=self.amp,
            compile_mode=self.compile_mode,
            cuda_graphs=self.cuda_graphs,
        )
        wait(self.device)
        return time.perf_counter() - started

    def bare(self) -> float:
        """Seconds of as many steps of the same sizes on random tensors that are on the device, in its best layout.

        They are replayed if ours are.
        """
        model = copy.deepcopy(self.model).to(self.device).train()
        replays = self.cuda_graphs and can_record(self.device)
        optimiser, _ = self.optimisation.build(
            model.parameters(), total_steps=1, round_num=1, num_rounds=1, recorded=replays
        )
        state = self.method.new_state(model).to(self.device)
        x1, x2 = (self._random() for _ in range(2))
        rows = torch.arange(self.batch_size, device=self.device)  # nobody reads them

        def take(_rows: Tensor) -> dict[str, Tensor]:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                loss = self.method.loss(model, state, x1, x2)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            optimiser.zero_grad()
            return {"loss": loss.detach()}

        wait(self.device)
        started = time.perf_counter()
        steps = self.images_trained // self.batch_size
        networks: tuple[nn.Module, ...] = (model, state)
        replayed = Replayed(steps={self.batch_size: steps} if replays else {}, networks=networks, generators=())
        for _ in range(steps):
            loss = replayed(take, rows)["loss"]
        loss.item()
        replayed.end()
        wait(self.device)
        return time.perf_counter() - started

    @property
    def images_trained(self) -> int:
        """Of one call of either."""
        return self.epochs * len(self.images)

    def _random(self) -> Tensor:
        x = torch.randn(self.batch_size, 3, SIZE, SIZE, device=self.device)
        return x.contiguous(memory_format=torch.channels_last)


def operations(model: Model) -> float:
    """Multiplications and additions of one view's forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).eval()(torch.zeros(1, 3, SIZE, SIZE))
    return float(counter.get_total_flops())


def peak_gflop_per_s(device: torch.device) -> float | None:
    """What a GPU reaches in a large matrix product; None on the CPU, of which one thread is used."""
    if device.type != "cuda":
        return None
    a, b = torch.randn(2, PEAK, PEAK, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(UNTIMED + PAIRS):
        wait(device)
        started = time.perf_counter()
        for _ in range(10):
            a @ b
        wait(device)
        seconds.append((time.perf_counter() - started) / 10)
    return 2 * PEAK**3 / median_interval(seconds[UNTIMED:])[0] / 1e9


def epoch(family: str, device: torch.device, sizes: tuple[int, int] | None = None) -> tuple[Epoch, float]:
    """A client's epoch of `family` with the default configuration, and `operations`.

    Args:
        sizes: steps and images a step; None: what suits the device and the family.
    """
    config = compose(["data=cifar10"])
    backbone = instantiate(config["models"][family])
    model = Model(backbone, instantiate(config["projector"], in_dim=feature_dim(backbone, SIZE)))
    calibrate_batch_norm(model, torch.randn(16, 3, SIZE, SIZE))  # as after a first round
    cost = operations(model)
    steps, batch_size = sizes or (ON_A_GPU if device.type == "cuda" else EPOCHS[cost >= LARGE])
    pixels = np.random.default_rng(0).integers(0, 256, (steps * batch_size, 3, SIZE, SIZE), dtype=np.uint8)
    one = Epoch(
        model=model,
        method=instantiate(config["method"]),
        views=instantiate(config["views"]),
        optimisation=instantiate(config["client"]["optimisation"]),
        images=ImageSet(pixels=pixels, indices=np.arange(len(pixels)), labels=None, classes=(), name="noise"),
        batch_size=batch_size,
        device=device,
        amp=config["client"]["amp"] and device.type == "cuda",
    )
    return one, cost


def train(families: Sequence[str] | None = None) -> Result:
    """Families (None: all), on the GPU where there is one, else with one thread, as a worker has it.

    An interruption, as where the time on a GPU is up, ends it with those that are measured; `not_measured` names the
    others.
    """
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = list(compose([])["models"])
    wanted = known if families is None else list(families)
    if unknown := set(wanted) - set(known):
        raise ConfigError(f"there is no family {', '.join(sorted(unknown))}; --of takes {', '.join(known)}.")
    peak = peak_gflop_per_s(device)
    measured: dict[str, Any] = {}
    bars: list[Bar] = []
    try:
        for family in wanted:
            measured[family], bar = measure(family, device)
            bars.append(bar)
            print(f"{bar.name}: {bar.ratio:.2f}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        if not measured:
            raise
    return {
        "unit": "seconds per training",
        "pairs": PAIRS,
        "device": str(device),
        "families": measured,
        "not_measured": [family for family in wanted if family not in measured],
        "peak_gflop_per_s": peak,
    }, bars


def measure(family: str, device: torch.device) -> tuple[dict[str, Any], Bar]:
    """Of a client's training on `device` with the default configuration: one epoch, some where steps are replayed."""
    one, cost = epoch(family, device)
    if replays := compose([])["client"]["cuda_graphs"] and can_record(device):
        one = replace(epoch(family, device, REPLAYED[cost >= LARGE])[0], cuda_graphs=True, epochs=REPLAYED_EPOCHS)
    pairs = [(one.bare(), one.ours()) for _ in range(UNTIMED + PAIRS)][UNTIMED:]
    shares = [bare / ours for bare, ours in pairs]
    limit = next(limit for least, limit in BARS if cost >= least)
    images = one.images_trained
    half = replace(one, amp=not one.amp)
    half.ours()
    few = FEW if replays else HALF_PAIRS
    others = [(one.ours(), half.ours()) for _ in range(few)]
    faster = [a / b if half.amp else b / a for a, b in others]
    launched = replace(one, cuda_graphs=False)  # every step by itself
    return {
        "mflop_a_view": cost / 1e6,
        "images": images,
        "batch_size": one.batch_size,
        "bare_s": [bare for bare, _ in pairs],
        "ours_s": [ours for _, ours in pairs],
        "launched_s": [launched.ours() for _ in range(UNTIMED + few)][UNTIMED:] if replays else [],
        "bfloat16_times_faster": median_interval(faster),
        "images_per_s": median_interval([images / ours for _, ours in pairs]),
        "gflop_per_s": median_interval([6 * images * cost / ours / 1e9 for _, ours in pairs])[0],
    }, judge(f"train.{family}", shares, limit, "higher")
