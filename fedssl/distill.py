"""Server distillation: a student learns to see the public set as the clients' ensemble sees it.

Shi et al. 2021, https://arxiv.org/abs/2109.14611. One step, for a batch I of public images and two views of each:

    online encoder f_q (the student)      z_i = normalised f_q(view 1 of i)
    target encoder f_k (average of f_q)   key_i = normalised f_k(view 2 of i), pushed into the queue first
    queue of k anchors (key_j, a_j)       a_j is the public image that key j was made of
    target                                p_ij from the clients' similarities of images i and a_j, sums to 1 over j
    student                               q_ij = softmax_j(z_i . key_j / student_temperature)
    loss                                  -(1/b) sum_i sum_j p_ij log q_ij

The own key of an image is in the queue and has the largest target, so as the target temperature goes to 0 this becomes
MoCo on the public set. Embedding dimensions of clients and student need not agree.

As in the paper: f_q goes on from its weights; both encoders run in train mode (batch norm by the statistics of the
batch); f_k is averaged before it makes keys; epochs drop their last partial batch. Departs from the authors' code:
the queue is filled once, before the first step, by views through f_k, while they skip the first k/b steps of every
epoch; b need not divide k, and n may be smaller than either; batch norm's buffers are averaged like the weights, while
theirs only see f_k's own batches. No loss ever reads these buffers, but they keep f_k a network that can be evaluated.
"""

import itertools
import math
import time
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from fedssl.data.images import ImageSet
from fedssl.data.views import Views
from fedssl.ensemble import EnsembleTarget, check_temperature
from fedssl.errors import ConfigError, FedSSLError
from fedssl.models import Model
from fedssl.seeding import generator, seeded_init
from fedssl.train import Optimisation


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How long and how sharply the server distils in each round. The numbers live in conf/distill/."""

    epochs: int  # passes over the public set per round
    batch_size: int  # public images per step, >= 2; all of them if there are fewer
    queue_size: int  # anchors, >= batch_size, so that the images' own keys are among them
    target_temperature: float  # of the clients' similarities, > 0; given to `EnsembleTarget`
    student_temperature: float  # of the student's, > 0
    ema_decay: float  # of the target encoder, per step: 0 copies the student, 1 stays at its start
    optimisation: Optimisation

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ConfigError(f"distill.epochs must be at least 1, got {self.epochs}.")
        if self.batch_size < 2:
            raise ConfigError(f"distill.batch_size must be at least 2 (batch norm), got {self.batch_size}.")
        if self.queue_size < self.batch_size:
            raise ConfigError(
                f"distill.queue_size must be at least distill.batch_size={self.batch_size}, got {self.queue_size}. "
                f"Every image's own key has to be in the queue: raise queue_size or lower batch_size."
            )
        check_temperature("distill.target_temperature", self.target_temperature)
        check_temperature("distill.student_temperature", self.student_temperature)
        if not 0 <= self.ema_decay <= 1:
            raise ConfigError(
                f"distill.ema_decay must be between 0 (copy of the student) and 1 (frozen), got {self.ema_decay}."
            )

    def steps_per_epoch(self, n: int) -> int:
        """Gradient steps in one pass over n public images; the last partial batch is dropped unless it is the only."""
        return max(1, n // self.batch_size)

    def num_steps(self, n: int) -> int:
        """Gradient steps in one round."""
        return self.epochs * self.steps_per_epoch(n)

    def image_passes(self, n: int) -> int:
        """Images that go through a network in one round: two views a step (one per encoder), and filling the queue."""
        return 2 * self.num_steps(n) * min(self.batch_size, n) + self.queue_size


class Queue:
    """The anchors: the k newest keys, each with the public image it was made of. Always full.

    Args:
        keys: the initial content, oldest first.
        indices: positions in the public set, row i belongs to key i.
    """

    def __init__(self, keys: Float[Tensor, "k d"], indices: Int64[Tensor, " k"]) -> None:
        self.keys = keys.clone()
        self.indices = indices.clone()
        self._oldest = 0

    def push(self, keys: Float[Tensor, "b d"], indices: Int64[Tensor, " b"]) -> None:
        """Overwrite the b <= k oldest entries, in order."""
        size = len(self.keys)
        assert len(keys) <= size, f"{len(keys)} keys do not fit a queue of {size}"
        slots = (self._oldest + torch.arange(len(keys), device=self.keys.device)) % size
        self.keys[slots] = keys
        self.indices[slots] = indices
        self._oldest = (self._oldest + len(keys)) % size


def distill(
    student: Model,
    target: EnsembleTarget,
    images: ImageSet,
    *,
    distillation: Distillation,
    views: Views,
    seed: int,
    round_num: int,
    num_rounds: int,
    device: torch.device,
    amp: bool = False,
) -> dict[str, float]:
    """Train `student` in place for one round; it ends on `device`, in eval mode and without gradients.

    All public images are copied to the device once, as uint8. On the CPU with one thread the result is a pure function
    of the student's weights, the target, the images and the seed, bit for bit.

    Args:
        student: the global model of one architecture family, as the last round left it.
        target: the clients' ensemble on the same images in the same order.
        images: the public set; labels are not looked at.
        distillation: the numbers.
        views: the random augmentation.
        seed: order, augmentation and dropout all derive from it and `round_num`.
        round_num: 1 .. num_rounds, for the schedule.
        num_rounds: rounds of the run, for the schedule.
        device: where to train; the target's similarities are moved there.
        amp: bfloat16 autocast in the encoders; CUDA only, ignored elsewhere. Logits and loss are always fp32.

    Returns:
        `loss` and `loss_first`, cross-entropies in nats, the means over the steps of the last and the first epoch;
        `target_entropy` of the last epoch, the lowest loss there is; `kl` = loss - target_entropy; `steps`;
        `image_passes` (see `Distillation.image_passes`); `seconds`.

    Raises:
        ConfigError: fewer than two public images, or a target of another public set.
        FedSSLError: the loss became infinite or NaN; the message names the first such step.
    """
    started = time.perf_counter()
    n = len(images)
    if n < 2:
        raise ConfigError(f"cannot distil on {n} public image(s) of {images.name}: raise public.size to 2 or more.")
    if target.num_samples != n:
        raise ConfigError(f"the target is of {target.num_samples} public images, but {images.name} has {n}.")
    target = target.to(device)
    student.to(device).train()
    target_encoder = deepcopy(student).requires_grad_(False)
    batch_size, num_steps = min(distillation.batch_size, n), distillation.num_steps(n)
    steps_per_epoch = distillation.steps_per_epoch(n)
    optimiser, schedule = distillation.optimisation.build(
        student.parameters(), total_steps=num_steps, round_num=round_num, num_rounds=num_rounds
    )
    pixels = images.take(np.arange(n)).to(device)
    order_rng = generator(seed, "distillation order", round_num)
    views_rng = generator(seed, "distillation views", round_num, device=device)

    def view(rows: Int64[Tensor, " b"]) -> Float[Tensor, "b 3 s s"]:
        return views(pixels[rows], views_rng).contiguous(memory_format=torch.channels_last)

    def embed(model: Model, x: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp and device.type == "cuda"):
            projections = model(x)
        return F.normalize(projections.float(), dim=1)

    losses: list[float] = []
    entropies: list[float] = []
    # Dropout and the like draw from torch's global generator and accept no other, so it is seeded for the duration.
    with seeded_init(seed, "distillation dropout", round_num):
        fill = _filling_order(n, distillation.queue_size, order_rng).to(device)
        chunks = fill.tensor_split(distillation.queue_size // distillation.batch_size)  # none smaller than a batch
        queue = Queue(torch.cat([embed(target_encoder, view(rows)) for rows in chunks]), fill)
        for epoch in range(distillation.epochs):
            step_losses, step_entropies = [], []  # stay on the device: reading one would wait for it
            order = torch.randperm(n, generator=order_rng).to(device)
            for rows in torch.split(order[: steps_per_epoch * batch_size], batch_size):
                x1, x2 = view(rows), view(rows)
                _average(target_encoder, student, distillation.ema_decay)
                queue.push(embed(target_encoder, x2), rows)
                p = target(rows, queue.indices)
                logits = embed(student, x1) @ queue.keys.T / distillation.student_temperature
                loss = F.cross_entropy(logits, p)
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                optimiser.zero_grad()
                schedule.step()
                step_losses.append(loss.detach())
                step_entropies.append(torch.special.entr(p).sum(dim=1).mean())
            losses.append(_finite_mean(step_losses, epoch * steps_per_epoch, images.name))
            entropies.append(torch.stack(step_entropies).mean().item())

    student.eval()
    return {
        "loss": losses[-1],
        "loss_first": losses[0],
        "target_entropy": entropies[-1],
        "kl": losses[-1] - entropies[-1],
        "steps": float(num_steps),
        "image_passes": float(distillation.image_passes(n)),
        "seconds": time.perf_counter() - started,
    }


def _filling_order(n: int, size: int, rng: torch.Generator) -> Int64[Tensor, " k"]:
    """`size` public images in random order, each once before any comes twice."""
    passes = [torch.randperm(n, generator=rng) for _ in range(math.ceil(size / n))]
    return torch.cat(passes)[:size]


@torch.no_grad()
def _average(target_encoder: Model, online: Model, decay: float) -> None:
    """Move weights and buffers towards the online encoder's; integer buffers (batch counters) are copied."""
    ours = itertools.chain(target_encoder.parameters(), target_encoder.buffers())
    theirs = itertools.chain(online.parameters(), online.buffers())
    for average, new in zip(ours, theirs, strict=True):
        if average.is_floating_point():
            average.lerp_(new, 1 - decay)
        else:
            average.copy_(new)


def _finite_mean(losses: list[Tensor], steps_before: int, name: str) -> float:
    """The mean loss of an epoch, read from the device at once."""
    values = torch.stack(losses)
    if not values.isfinite().all():
        step = steps_before + int((~values.isfinite()).nonzero()[0]) + 1
        raise FedSSLError(
            f"the distillation loss on {name} became {values[step - steps_before - 1].item()} at step {step}. "
            f"Lower distill.optimisation.lr or raise distill.student_temperature."
        )
    return values.mean().item()
