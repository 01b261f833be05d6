"""Local training: uint8 images on the device, two views of each, a method's loss, a fresh optimiser.

The same loop trains a client, the public-only control and the centralised control. It is a pure function of the model's
weights, the images and the seed; on the CPU with a fixed number of threads the result is the same bit for bit.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from fedssl.cuda_graph import Replayed, can_record
from fedssl.data.images import ImageSet
from fedssl.data.views import Views
from fedssl.errors import ConfigError, FedSSLError
from fedssl.methods import Method
from fedssl.models import Model, calibrate_batch_norm
from fedssl.models.compiled import compiled
from fedssl.seeding import generator, seeded_init

# What a strategy adds to the method's loss: (model, x1, x2) -> a scalar. As in a `fedssl.methods.Method`, nothing that
# Python remembers may change from step to step.
Penalty = Callable[[Model, Tensor, Tensor], Tensor]

OPTIMISERS = ("adam", "sgd")
SCHEDULES = ("constant", "cosine", "cosine_rounds")


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How weights follow gradients during one training. The numbers live in conf/client/ and conf/distill/."""

    optimiser: str  # "adam" (weight decay added to the gradient, as in FLESD) or "sgd"
    lr: float  # the highest learning rate, > 0
    weight_decay: float  # on every parameter, >= 0
    momentum: float  # 0 <= momentum < 1; read by sgd only
    schedule: str  # "constant"; "cosine" to 0 at the last step; "cosine_rounds" by round, constant inside a round
    warmup_steps: int  # steps of linear ramp at the start of each training, 0 for none

    def __post_init__(self) -> None:
        where = "set it under client.optimisation, distill.optimisation or evaluate.finetune.optimisation"
        if self.optimiser not in OPTIMISERS:
            raise ConfigError(f"optimisation.optimiser must be one of {OPTIMISERS}, got {self.optimiser!r}; {where}.")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"optimisation.schedule must be one of {SCHEDULES}, got {self.schedule!r}; {where}.")
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"optimisation.lr must be greater than 0, got {self.lr}; {where}.")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"optimisation.weight_decay must be at least 0, got {self.weight_decay}; {where}.")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"optimisation.momentum must be at least 0 and below 1, got {self.momentum}; {where}.")
        if self.warmup_steps < 0:
            raise ConfigError(f"optimisation.warmup_steps must be at least 0, got {self.warmup_steps}; {where}.")

    @property
    def depends_on_num_rounds(self) -> bool:
        """Whether more rounds would change the rounds already done; such a run cannot be resumed with more."""
        return self.schedule == "cosine_rounds"

    def learning_rate(self, step: int, *, total_steps: int, round_num: int, num_rounds: int) -> float:
        """The learning rate of one step.

        Args:
            step: 0 .. total_steps - 1. Below `warmup_steps` the rate is (step + 1) / warmup_steps of what follows;
                a training that is shorter than that ends on the ramp.
            total_steps: steps of this training; `cosine` reaches 0 after the last.
            round_num: 1 .. num_rounds; `cosine_rounds` is lr / 2 * (1 + cos(pi r / num_rounds)) with r = round_num - 1.
            num_rounds: rounds of the run.
        """
        peak = self.lr
        if self.schedule == "cosine_rounds":
            peak *= (1 + math.cos(math.pi * (round_num - 1) / num_rounds)) / 2
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        if self.schedule == "cosine":
            progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
            return peak * (1 + math.cos(math.pi * min(1.0, progress))) / 2
        return peak

    def build(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        total_steps: int,
        round_num: int,
        num_rounds: int,
        recorded: bool = False,
    ) -> tuple[Optimizer, LRScheduler]:
        """A fresh optimiser and its schedule, to be stepped together; other arguments as for `learning_rate`.

        Args:
            parameters: those that need gradients are optimised.
            recorded: whether its steps may be replayed (`fedssl.cuda_graph`); then the rate lies on the device.
        """
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trained)  # one kernel for all weights
        lr = torch.tensor(self.lr, device=trained[0].device) if recorded else self.lr
        optimiser: Optimizer
        if self.optimiser == "adam":
            optimiser = torch.optim.Adam(
                trained, lr=lr, weight_decay=self.weight_decay, fused=fused, capturable=recorded
            )
        else:
            optimiser = torch.optim.SGD(
                trained, lr=lr, momentum=self.momentum, weight_decay=self.weight_decay, fused=fused
            )

        def share(step: int) -> float:
            rate = self.learning_rate(step, total_steps=total_steps, round_num=round_num, num_rounds=num_rounds)
            return rate / self.lr

        return optimiser, LambdaLR(optimiser, share)


def train(
    model: Model,
    images: ImageSet,
    *,
    method: Method,
    memory: dict[str, Tensor] | None = None,
    penalty: Penalty | None = None,
    views: Views,
    optimisation: Optimisation,
    batch_size: int,
    epochs: int | None = None,
    steps: int | None = None,
    seed: int,
    round_num: int,
    num_rounds: int,
    device: torch.device,
    amp: bool = False,
    compile_mode: str | None = None,
    cuda_graphs: bool = False,
) -> dict[str, float]:
    """Train `model` in place; it ends on `device`, in eval mode and without gradients.

    An epoch shuffles the images and cuts them into batches of `batch_size`. The remainder is a batch too if it has two
    images or more (one image has nothing to be told apart from); so fewer images than `batch_size` are one batch.
    All images are copied to the device once, as uint8.

    Args:
        model: backbone, projector and the method's heads.
        images: the only images used; labels are not looked at.
        method: the loss of two views.
        memory: the method's state as the last training of this model left it, by name, changed in place; empty before
            the first. None for a state that nobody keeps.
        penalty: a term that is added to the method's loss.
        views: the random augmentation.
        optimisation: optimiser and schedule, started afresh.
        batch_size: images (not views) per step, at least 2.
        epochs: passes over the images; exactly one of `epochs` and `steps` is given.
        steps: optimiser steps, over as many epochs as they take; the last epoch may be cut short.
        seed: order, augmentation and dropout all derive from it and `round_num`.
        round_num: 1 .. num_rounds, for the schedule.
        num_rounds: rounds of the run, for the schedule.
        device: where to train.
        amp: bfloat16 autocast of the network; the losses' inner products stay fp32.
        compile_mode: how the backbone is compiled, see `fedssl.models.compiled`; None: not at all.
        cuda_graphs: on a GPU, replay one recorded step where that is possible, see `fedssl.cuda_graph`: for each size
            of batches of which there are at least 10 steps (`cuda_graph.WORTH`). The first 3 of a size are launched as
            ever, recording takes Python through one more, and keeps the memory of a step until the training ends.

    Returns:
        `loss` and `loss_first`, the means over the steps of the last and the first epoch, any penalty included;
        `penalty`, its mean over the last epoch; `steps`; `image_passes`, the views that went through the network (2 per
        image and step); `seconds`; and `projection_std`, a collapse measure
        in [0, 1] of the last full batch: the mean standard deviation of the normalised projections' entries, times
        sqrt(d). 0 is collapse to a point, 1 a uniform spread. Absent if the method does not use the projector.

    Raises:
        ConfigError: fewer than two images, or impossible `batch_size`, `epochs` or `steps`.
        FedSSLError: the loss became infinite or NaN; the message names the first such step.
    """
    started = time.perf_counter()
    batch_sizes = _batch_sizes(len(images), batch_size, images.name)
    total_steps = _total_steps(len(batch_sizes), epochs, steps)
    model.to(device).train()
    state = method.new_state(model).to(device).train()
    if memory:
        state.load_state_dict(memory)
    replays = cuda_graphs and can_record(device)
    optimiser, schedule = optimisation.build(
        model.parameters(), total_steps=total_steps, round_num=round_num, num_rounds=num_rounds, recorded=replays
    )
    pixels = images.take(np.arange(len(images))).to(device)
    order_rng = generator(seed, "order", round_num)
    views_rng = generator(seed, "views", round_num, device=device)
    epoch_losses: list[float] = []
    image_passes = done = 0
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=amp)

    def take(rows: Int64[Tensor, " b"]) -> dict[str, Tensor]:
        """One step on the images `rows`; what it measures stays on the device, for reading one would wait for it."""
        batch = pixels[rows]
        x1, x2 = (views(batch, views_rng).contiguous(memory_format=torch.channels_last) for _ in range(2))
        measures = {}
        with autocast(), step(usual=len(rows) == batch_size):
            loss = method.loss(model, state, x1, x2)
            if penalty is not None:
                added = penalty(model, x1, x2)
                measures["penalty"] = added.detach()
                loss = loss + added
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad()
        method.after_step(model, state)
        return {"loss": loss.detach(), **measures}

    # Dropout and the like draw from torch's global generator and accept no other, so it is seeded for the duration.
    with (
        seeded_init(seed, "dropout", round_num),
        _last_projections(model) as projections,
        compiled(compile_mode, device, model, state) as step,
    ):
        rows = torch.randperm(len(pixels), generator=generator(seed, "calibration", round_num))[:batch_size].to(device)
        with step(usual=False):
            calibrate_batch_norm(model, views(pixels[rows], generator(seed, "calibration", round_num, device=device)))
        with torch.no_grad(), autocast(), step(usual=False):
            method.prepare(model, state, _endless_views(pixels, views, batch_sizes, seed, round_num))
        num_epochs = math.ceil(total_steps / len(batch_sizes))
        sizes = {size: num * num_epochs for size, num in Counter(batch_sizes).items()} if replays else {}
        replayed = Replayed(steps=sizes, networks=(model, state), generators=(views_rng,))
        for epoch in count(1):
            taken: list[dict[str, Tensor]] = []
            order = torch.randperm(len(pixels), generator=order_rng).to(device)
            for rows in torch.split(order[: sum(batch_sizes)], batch_sizes)[: total_steps - done]:
                taken.append(replayed(take, rows))
                schedule.step()
                image_passes += 2 * len(rows)
            epoch_losses.append(
                _mean_loss([measures["loss"] for measures in taken], done, epoch, optimisation, images.name)
            )
            done += len(taken)
            if done == total_steps:
                break
        replayed.end()

    model.eval()
    if memory is not None:
        memory |= {name: value.to("cpu", copy=True) for name, value in state.state_dict().items()}
    metrics = {
        "loss": epoch_losses[-1],
        "loss_first": epoch_losses[0],
        "steps": float(done),
        "image_passes": float(image_passes),
        "seconds": time.perf_counter() - started,
    }
    if projections:
        metrics["projection_std"] = _spread(projections[0])
    if penalty is not None:
        metrics["penalty"] = float(torch.stack([measures["penalty"] for measures in taken]).mean())
    return metrics


def _endless_views(
    pixels: UInt8[Tensor, "n 3 h w"], views: Views, batch_sizes: list[int], seed: int, round_num: int
) -> Iterator[Float[Tensor, "b 3 s s"]]:
    """Epochs of views in random order, in batches like training's; draws of their own."""
    order_rng = generator(seed, "preparation", round_num)
    views_rng = generator(seed, "preparation", round_num, device=pixels.device)
    while True:
        order = torch.randperm(len(pixels), generator=order_rng).to(pixels.device)
        for rows in torch.split(order[: sum(batch_sizes)], batch_sizes):
            yield views(pixels[rows], views_rng)


def _batch_sizes(num_images: int, batch_size: int, name: str) -> list[int]:
    """Images in each batch of one epoch; a remainder of one image is left out."""
    if batch_size < 2:
        raise ConfigError(
            f"client.batch_size must be at least 2, got {batch_size}: a contrastive loss compares a batch's images."
        )
    if num_images < 2:
        raise ConfigError(
            f"cannot train on {num_images} image(s) of {name}: a contrastive loss compares images, so a client needs 2 "
            f"or more. Raise partition.min_size, lower federation.num_clients or use more images."
        )
    full, rest = divmod(num_images, batch_size)
    return [batch_size] * full + [rest] * (rest >= 2)


def _total_steps(steps_per_epoch: int, epochs: int | None, steps: int | None) -> int:
    if (epochs is None) == (steps is None):
        raise ConfigError(f"training takes either epochs or steps, got epochs={epochs} and steps={steps}.")
    wanted, unit = (epochs, steps_per_epoch) if epochs is not None else (steps, 1)
    if wanted is None or wanted < 1:
        raise ConfigError(f"client.local_epochs (or the number of steps) must be at least 1, got {wanted}.")
    return wanted * unit


def _mean_loss(losses: list[Tensor], done: int, epoch: int, optimisation: Optimisation, name: str) -> float:
    """The mean of an epoch's losses, read from the device once; `done` steps were taken before it."""
    values = torch.stack(losses).tolist()
    for i, value in enumerate(values):
        if not math.isfinite(value):
            raise FedSSLError(
                f"the loss became {value} in step {done + i + 1} (epoch {epoch}) of training on {name}, with "
                f"{optimisation.optimiser} and lr={optimisation.lr}. Lower client.optimisation.lr, raise its "
                f"warmup_steps, or, where the method has one, raise method.temperature."
            )
    return math.fsum(values) / len(values)


@contextmanager
def _last_projections(model: Model) -> Iterator[list[Tensor]]:
    """A list that will hold the projector's latest output among those of the largest batch; reads no values."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not kept or len(output) >= len(kept[0]):
            kept[:] = [output.detach()]

    handle = model.projector.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def _spread(projections: Float[Tensor, "b d"]) -> float:
    """Mean standard deviation of the entries of unit-norm projections, times sqrt(d), as in SimSiam's Figure 2.

    Chen and He 2020, https://arxiv.org/abs/2011.10566.
    """
    z = F.normalize(projections.float(), dim=1)
    return float(z.std(dim=0, correction=0).mean()) * math.sqrt(z.shape[1])
