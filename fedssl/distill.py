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
epoch (`warmup: every_epoch` does); b need not divide k, and n may be smaller than either; batch norm's buffers are
averaged like the weights, while theirs only see f_k's own batches (`ema_buffers: false`). No loss ever reads these
buffers, but they keep f_k a network that can be evaluated.

Where the target knows fewer anchors than images (`Target.num_anchors`, `codec=sharpened`), the queue holds exactly one
key of each: in every step the next b anchors of a fixed random cycle get a fresh key, instead of the batch's images.

`own_key: false` scores first and enqueues after the gradient step, in SEED's order (Fang et al. 2021,
https://arxiv.org/abs/2101.04731). SEED appends the own key to the anchors all the same; here the image goes without,
but for an older key of it that may still be in the queue.

`loss: cka` compares kernels of the batch instead (`fedssl.losses.cka_loss`). It has no anchors: neither target encoder
nor queue exist, and queue_size, ema_decay, ema_buffers and both temperatures are not read.

`loss: coordinates`, ours, has no anchors either. The clients' mean kernel over the whole public set is turned into one
point per image (`fedssl.ensemble.principal_coordinates`) before the first step, and a linear head on the student's
features learns them from one view: loss = mean_i 1 - cos(W h_i + b, c_i). The head is thrown away after the round. The
projector learns nothing, but from NT-Xent where that has a weight.

Two terms may be added: an NT-Xent loss between two views of the batch (the authors' code had an InfoNCE for a while,
with weight 0), and, ours, the distance of the features to those of a frozen reference, against forgetting between
rounds:

    total = similarity_weight * loss + contrastive_weight * NT-Xent(z, z') + feature_weight * (1/b) sum_i |h_i - h_i'|^2
"""

import math
import time
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from fedssl.anchors import Queue, filling_order
from fedssl.cuda_graph import Replayed, can_record
from fedssl.data.images import ImageSet
from fedssl.data.views import Views
from fedssl.ensemble import EnsembleTarget, Target, check_temperature
from fedssl.errors import ConfigError, FedSSLError
from fedssl.losses import (
    cka_loss,
    cosine_distance,
    cross_entropy,
    entropy,
    feature_distance,
    js_divergence,
    kl_divergence,
    nt_xent,
    reverse_kl_divergence,
)
from fedssl.models import Model, draws_globally, feature_dim, move_average
from fedssl.models.compiled import Step, compiled, plain
from fedssl.seeding import generator, seeded_init
from fedssl.train import Optimisation

ANCHORED_LOSSES = {
    "ce": cross_entropy,
    "kl": kl_divergence,
    "js": js_divergence,
    "reverse_kl": reverse_kl_divergence,
}
KERNEL_LOSSES = ("cka", "coordinates")
CHOICES = {
    "loss": (*ANCHORED_LOSSES, *KERNEL_LOSSES),
    "warmup": ("once", "every_epoch"),
    "student_init": ("previous", "scratch", "fedavg_of_family", "public_only"),
}


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How long, how sharply and by which loss the server distils in each round. The numbers live in conf/distill/.

    A pass of an image is one view of it through one network, forward: the student, its target encoder and the
    reference count alike, although only the student's passes also go backward.
    """

    epochs: int  # passes over the public set per round
    batch_size: int  # public images per step, >= 2; all of them if there are fewer
    queue_size: int  # anchors, >= batch_size; where the target knows fewer anchors than images, these are the queue
    warmup: str  # "once": fill the queue before the first step. "every_epoch": the authors' code, see `skipped_batches`
    own_key: (
        bool  # an image's fresh key is among its anchors (FLESD); False: it joins them after the step (SEED's order)
    )
    target_temperature: float  # of the clients' similarities, > 0; the target comes with it
    target_temperature_end: float | None  # reached linearly from the first epoch to the last; None: constant
    student_temperature: float  # of the student's, > 0
    student_temperature_end: float | None  # likewise
    ema_decay: float  # of the target encoder, per step: 0 copies the student, 1 stays at its start
    ema_buffers: bool  # average batch norm's buffers too; False: they see the target encoder's own batches
    loss: str  # between target p and student q: "ce", "kl", "js", "reverse_kl"; to a kernel: "cka", "coordinates"
    num_coordinates: int  # per public image, >= 2; read by "coordinates" only
    whitening: float  # of them, 0 (none) .. 1 (all directions alike); read by "coordinates" only
    similarity_weight: float  # of that loss, >= 0
    contrastive_weight: float  # of NT-Xent on the public batch, >= 0; 0 does not compute it
    contrastive_temperature: float  # its temperature, > 0
    feature_weight: float  # of the squared distance to the reference's features, >= 0; 0 does not compute it
    student_init: str  # where a round's student starts; the strategy's part
    init_epochs: int  # passes over the public set of "public_only" pre-training, >= 1; others do not read it
    views: Views | None  # what the student sees of the public set; None: the run's views
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
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"distill.{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        for name in ("target_temperature", "student_temperature", "contrastive_temperature"):
            check_temperature(f"distill.{name}", getattr(self, name))
        for name in ("target_temperature_end", "student_temperature_end"):
            self._check_schedule(name, getattr(self, name))
        if not 0 <= self.ema_decay <= 1:
            raise ConfigError(
                f"distill.ema_decay must be between 0 (copy of the student) and 1 (frozen), got {self.ema_decay}."
            )
        for name in ("similarity_weight", "contrastive_weight", "feature_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"distill.{name} must be at least 0, got {getattr(self, name)}.")
        if self.similarity_weight == 0 and self.contrastive_weight == 0:
            raise ConfigError(
                "distill.similarity_weight and distill.contrastive_weight are both 0, which leaves nothing to learn: "
                "raise one."
            )
        if self.num_coordinates < 2:
            raise ConfigError(
                f"distill.num_coordinates must be at least 2, got {self.num_coordinates}: "
                f"the cosine of two numbers has no gradient."
            )
        if not 0 <= self.whitening <= 1:
            raise ConfigError(f"distill.whitening must be between 0 and 1, got {self.whitening}.")
        if self.loss in KERNEL_LOSSES and (self.warmup != "once" or not self.own_key):
            raise ConfigError(
                f"distill.loss={self.loss} has no queue, so distill.warmup must be once and distill.own_key true, "
                f"got {self.warmup} and {str(self.own_key).lower()}: leave them out; ensemble=row has one."
            )
        if self.student_init == "public_only" and self.init_epochs < 1:
            raise ConfigError(
                f"distill.student_init=public_only needs distill.init_epochs of at least 1, got {self.init_epochs}."
            )

    def _check_schedule(self, name: str, end: float | None) -> None:
        if end is None:
            return
        check_temperature(f"distill.{name}", end)
        if self.epochs == 1:
            raise ConfigError(
                f"distill.{name}={end} is reached in the last epoch, but distill.epochs=1 has only a first one: "
                f"raise epochs or set it to null."
            )
        if self.loss in KERNEL_LOSSES:
            raise ConfigError(
                f"distill.loss={self.loss} knows no temperature, so distill.{name} must be null, got {end}; "
                f"ensemble=row has temperatures."
            )

    def temperatures(self, epoch: int) -> tuple[float, float]:
        """The target's and the student's temperature in an epoch, 0 .. epochs - 1."""

        def linear(start: float, end: float | None) -> float:
            return start if end is None else start + (end - start) * epoch / (self.epochs - 1)

        return (
            linear(self.target_temperature, self.target_temperature_end),
            linear(self.student_temperature, self.student_temperature_end),
        )

    @property
    def changes_temperature(self) -> bool:
        """Whether one epoch has another temperature than the next."""
        return self.target_temperature_end is not None or self.student_temperature_end is not None

    def batches_per_epoch(self, n: int) -> int:
        """Batches in one pass over n public images; the last partial one is dropped unless it is the only."""
        return max(1, n // self.batch_size)

    def skipped_batches(self, n: int) -> int:
        """The first batches of every epoch, which advance the target encoder and the queue without a gradient step.

        The authors' code waits in every epoch until queue_size keys were pushed, although only its first epoch starts
        with a queue of noise. That noise is gone before anyone looks, so here there is none: the queue starts empty.
        """
        if self.warmup == "once":
            return 0
        return math.ceil(self.queue_size / min(self.batch_size, n))

    def steps_per_epoch(self, n: int) -> int:
        """Gradient steps in one pass over n public images."""
        steps = self.batches_per_epoch(n) - self.skipped_batches(n)
        if steps < 1:
            raise ConfigError(
                f"distill.warmup=every_epoch skips the first {self.skipped_batches(n)} batches of an epoch "
                f"(distill.queue_size={self.queue_size}, distill.batch_size={self.batch_size}), but {n} public images "
                f"make only {self.batches_per_epoch(n)}: no gradient step is left. Lower queue_size, raise "
                f"public.size, or set warmup: once."
            )
        return steps

    def num_steps(self, n: int) -> int:
        """Gradient steps in one round."""
        return self.epochs * self.steps_per_epoch(n)

    def image_passes(self, n: int, num_anchors: int | None = None) -> int:
        """Passes of public images in one round: of the student, of the target encoder and of the reference.

        Args:
            n: public images.
            num_anchors: public positions that may be anchors (`Target.num_anchors`); None: all n.
        """
        steps, batch_size = self.num_steps(n), min(self.batch_size, n)
        if self.loss in KERNEL_LOSSES:
            keys = 0
        elif num_anchors is not None and num_anchors < n:
            keys = num_anchors + steps * min(batch_size, num_anchors)
        elif self.warmup == "once":
            keys = self.queue_size + steps * batch_size
        else:
            keys = self.epochs * self.batches_per_epoch(n) * batch_size
        views = 1 + (self.contrastive_weight > 0)  # the student sees both
        references = int(self.feature_weight > 0)
        return keys + steps * batch_size * (views + references)

    def pretraining_steps(self, n: int) -> int:
        """Steps of `fedssl.train.train` in one public-only pre-training, with `batch_size` images each; 0 without."""
        full, rest = divmod(n, self.batch_size)
        return self.init_epochs * (full + (rest >= 2)) if self.student_init == "public_only" else 0

    def pretraining_image_passes(self, n: int) -> int:
        """Passes in one public-only pre-training: two views of each image an epoch, less a last image on its own."""
        images = n - (n % self.batch_size == 1)
        return self.init_epochs * 2 * images if self.student_init == "public_only" else 0

    def check_target(self, *, kernel: bool, num_anchors: int, num_samples: int) -> None:
        """Raise ConfigError unless this loss and this queue can learn from such a `Target`, here by its attributes."""
        wants_kernel = self.loss in KERNEL_LOSSES
        if kernel != wants_kernel:
            raise ConfigError(
                f"distill.loss={self.loss} learns from {'a kernel' if wants_kernel else 'rows that sum to 1'}, "
                f"but the chosen ensemble makes {'a kernel' if kernel else 'rows that sum to 1'}: choose "
                f"ensemble={'cka_kernel' if wants_kernel else 'row (or another that makes rows)'}, or leave "
                f"distill.loss null."
            )
        self.steps_per_epoch(num_samples)
        if num_anchors == num_samples:
            return
        if num_anchors < 2:
            raise ConfigError(f"the target has {num_anchors} anchor(s), and telling them apart takes 2 or more.")
        if self.warmup != "once" or not self.own_key:
            raise ConfigError(
                f"only {num_anchors} of {num_samples} public images are anchors of this target "
                f"(codec=sharpened), and the queue holds each of them at every step. So distill.warmup must be once "
                f"and distill.own_key true, got {self.warmup} and {str(self.own_key).lower()}."
            )


class Distiller:
    """One student in one round, step by step: what `distill` loops over. Arguments as there.

    It changes the student, the target encoder and the queue in place. Dropout draws from torch's global generator,
    also while the queue is filled here.
    """

    def __init__(
        self,
        student: Model,
        target: Target,
        images: ImageSet,
        *,
        distillation: Distillation,
        views: Views,
        seed: int,
        round_num: int,
        num_rounds: int,
        device: torch.device,
        amp: bool = False,
        cuda_graphs: bool = False,
        reference: Model | None = None,
    ) -> None:
        n = len(images)
        if n < 2:
            raise ConfigError(f"cannot distil on {n} public image(s) of {images.name}: raise public.size to 2 or more.")
        if target.num_samples != n:
            raise ConfigError(f"the target is of {target.num_samples} public images, but {images.name} has {n}.")
        distillation.check_target(kernel=target.kernel, num_anchors=target.num_anchors, num_samples=n)
        self.distillation = distillation
        self.device = device
        self.amp = amp
        self.student = student.to(device).train()
        self.networks: tuple[Model, ...] = (self.student,)  # whose batches are all of one size
        self.target = target.to(device)
        self.target_temperature, self.student_temperature = distillation.temperatures(epoch=0)
        self.pixels = images.take(np.arange(n)).to(device)
        self.head: nn.Module | None = None
        if distillation.loss == "coordinates":
            self.coordinates, self.head = self._regression(target, generator(seed, "coordinates", round_num))
        replays = cuda_graphs and can_record(device) and not distillation.changes_temperature
        self.optimiser, self.schedule = distillation.optimisation.build(
            [*student.parameters(), *(self.head.parameters() if self.head else ())],
            total_steps=distillation.num_steps(n),
            round_num=round_num,
            num_rounds=num_rounds,
            recorded=replays,
        )
        self.views = distillation.views or views
        self.order_rng = generator(seed, "distillation order", round_num)
        self.views_rng = generator(seed, "distillation views", round_num, device=device)
        if distillation.feature_weight > 0:
            # In eval mode it is one function of one image, whatever else is in the batch, and stays as it was.
            self.reference = self._frozen(student if reference is None else reference).eval()
        self.cyclic = target.num_anchors < n  # keys are of the next anchors, not of the batch
        self.num_views = 2 if distillation.contrastive_weight > 0 or not (self.cyclic or target.kernel) else 1
        if not target.kernel:
            self.target_encoder = self._frozen(student)
            self.networks += (self.target_encoder,)
            self.queue = Queue(target.num_anchors if self.cyclic else distillation.queue_size)
            if distillation.warmup == "once":
                self._fill_queue()
        steps = {min(distillation.batch_size, n): distillation.num_steps(n)} if replays else {}
        self._replayed = Replayed(steps=steps, networks=self.networks, generators=(self.views_rng,))

    def epoch(self, epoch: int, inside: Step = plain) -> dict[str, Float[Tensor, " steps"]]:
        """One pass over the public set, `epoch` counts from 0; what `step` returns for each of its gradient steps.

        Each batch is `inside` what `compiled` says, where networks are.
        """
        distillation, n = self.distillation, len(self.pixels)
        target_temperature, self.student_temperature = distillation.temperatures(epoch)
        if target_temperature != self.target_temperature:
            self.target, self.target_temperature = self.target.at(target_temperature), target_temperature
        batch_size, skipped = min(distillation.batch_size, n), distillation.skipped_batches(n)
        order = torch.randperm(n, generator=self.order_rng).to(self.device)
        batches = torch.split(order[: distillation.batches_per_epoch(n) * batch_size], batch_size)
        for rows in batches[:skipped]:
            with inside(usual=True):
                self._advance_anchors(rows, self._view(rows))
        steps = []
        for rows in batches[skipped:]:
            with inside(usual=True):
                steps.append(self.step(rows))
        return {name: torch.stack([step[name] for step in steps]) for name in steps[0]}

    def end(self) -> None:
        """After the last epoch."""
        self._replayed.end()

    def step(self, rows: Int64[Tensor, " b"]) -> dict[str, Float[Tensor, ""]]:
        """One gradient step on the public images `rows`.

        Returns:
            Scalars that stay on the device, for reading one would wait for it: `loss`, the weighted sum; where there
            are anchors, `cross_entropy` and `target_entropy`; where they have a weight, `contrastive_loss` and
            `feature_distance`.
        """
        measures = self._replayed(self._take, rows)
        self.schedule.step()
        return measures

    def _take(self, rows: Int64[Tensor, " b"]) -> dict[str, Float[Tensor, ""]]:
        distillation, b = self.distillation, len(rows)
        contrastive = distillation.contrastive_weight > 0
        views = [self._view(rows) for _ in range(self.num_views)]
        if distillation.own_key:
            self._advance_anchors(rows, views[-1])
        h, z = self._embed(self.student, torch.cat(views) if contrastive else views[0])  # one pass, one batch norm
        similarity, measures = self._similarity_loss(h, z, rows)
        loss = distillation.similarity_weight * similarity
        if contrastive:
            measures["contrastive_loss"] = nt_xent(z[:b], z[b:], distillation.contrastive_temperature)
            loss = loss + distillation.contrastive_weight * measures["contrastive_loss"]
        if distillation.feature_weight > 0:
            with torch.no_grad():
                reference, _ = self._embed(self.reference, views[0])
            measures["feature_distance"] = feature_distance(h[:b], reference)
            loss = loss + distillation.feature_weight * measures["feature_distance"]
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        self.optimiser.zero_grad()
        if not distillation.own_key:
            self._advance_anchors(rows, views[-1])
        return {name: value.detach() for name, value in {"loss": loss, **measures}.items()}

    def _regression(self, target: Target, rng: torch.Generator) -> tuple[Float[Tensor, "n c"], nn.Module]:
        """One point per public image, and the head that is to find it in the student's features."""
        assert isinstance(target, EnsembleTarget)  # `check_target`: of a kernel
        coordinates = target.to(self.device).coordinates(
            self.distillation.num_coordinates, rng, whitening=self.distillation.whitening
        )
        num_coordinates = coordinates.shape[1]
        if num_coordinates < 2:
            raise FedSSLError(
                "the clients tell public images apart in fewer than two directions, so there is nothing to distil: "
                "all have collapsed. Lower client.optimisation.lr."
            )
        width = feature_dim(self.student.backbone, self.pixels.shape[-1])
        return coordinates, nn.Linear(width, num_coordinates).to(self.device)

    def _similarity_loss(
        self, h: Float[Tensor, "v f"], z: Float[Tensor, "v d"], rows: Int64[Tensor, " b"]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """What a batch lacks of the target, and what is known about it on the way.

        Points are learned from all views there are, kernels and anchors from the first view of each image.
        """
        if self.head is not None:
            return cosine_distance(self.head(h), self.coordinates[rows].repeat(len(h) // len(rows), 1)), {}
        z = z[: len(rows)]
        if self.target.kernel:
            return cka_loss(z, self.target(rows, rows)), {}
        p = self.target(rows, self.queue.indices)
        logits = z @ self.queue.keys.T / self.student_temperature
        loss = ANCHORED_LOSSES[self.distillation.loss](logits, p)
        ce = loss if self.distillation.loss == "ce" else cross_entropy(logits.detach(), p)
        return loss, {"cross_entropy": ce, "target_entropy": entropy(p)}

    def _advance_anchors(self, rows: Int64[Tensor, " b"], x: Float[Tensor, "b 3 s s"]) -> None:
        """Move the target encoder, then push its keys: of the batch's views `x`, or of the cycle's next anchors."""
        if self.target.kernel:
            return
        distillation = self.distillation
        move_average(self.target_encoder, self.student, distillation.ema_decay, buffers=distillation.ema_buffers)
        if self.cyclic:
            rows = self.queue.oldest(min(len(rows), self.queue.size))
            x = self._view(rows)
        _, keys = self._embed(self.target_encoder, x)
        self.queue.push(keys, rows)

    def _fill_queue(self) -> None:
        size = self.queue.size
        order = filling_order(self.target.num_anchors, size, self.order_rng).to(self.device)
        for rows in order.tensor_split(max(1, size // self.distillation.batch_size)):  # none smaller than a batch
            _, keys = self._embed(self.target_encoder, self._view(rows))
            self.queue.push(keys, rows)

    def _view(self, rows: Int64[Tensor, " b"]) -> Float[Tensor, "b 3 s s"]:
        return self.views(self.pixels[rows], self.views_rng).contiguous(memory_format=torch.channels_last)

    def _embed(self, model: Model, x: Float[Tensor, "b 3 s s"]) -> tuple[Float[Tensor, "b f"], Float[Tensor, "b d"]]:
        """Features and normalised projections, fp32."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            features = model.backbone(x)
            projections = model.projector(features)
        return features.float(), F.normalize(projections.float(), dim=1)

    def _frozen(self, model: Model) -> Model:
        """A copy on the device that gets no gradients, in the mode that the model is in."""
        return deepcopy(model).to(self.device).requires_grad_(False)


def distill(
    student: Model,
    target: Target,
    images: ImageSet,
    *,
    distillation: Distillation,
    views: Views,
    seed: int,
    round_num: int,
    num_rounds: int,
    device: torch.device,
    amp: bool = False,
    compile_mode: str | None = None,
    cuda_graphs: bool = False,
    reference: Model | None = None,
) -> dict[str, float]:
    """Train `student` in place for one round; it ends on `device`, in eval mode and without gradients.

    All public images are copied to the device once, as uint8. On the CPU with one thread the result is a pure function
    of the student's weights, the target, the images, the reference and the seed, bit for bit.

    Args:
        student: the global model of one architecture family, where `distillation.student_init` says it starts.
        target: the clients' ensemble on the same images in the same order, at the first epoch's target temperature.
        images: the public set; labels are not looked at.
        distillation: the numbers.
        views: the random augmentation, unless `distillation.views` has another.
        seed: order, augmentation and dropout all derive from it and `round_num`.
        round_num: 1 .. num_rounds, for the schedule.
        num_rounds: rounds of the run, for the schedule.
        device: where to train; the target's similarities are moved there.
        amp: bfloat16 autocast in the encoders. Logits and loss are always fp32.
        compile_mode: how student and target encoder are compiled, see `fedssl.models.compiled`; None: not at all.
        cuda_graphs: on a GPU, replay one recorded step where that is possible, see `fedssl.cuda_graph`.
        reference: whose features the student is to keep, with the student's number of them; it is left as it is. None:
            the student's own at the start. Read only if `distillation.feature_weight` is not 0.

    Returns:
        `loss` and `loss_first`, the minimised sum, the means over the gradient steps of the last and the first epoch;
        `steps` and `image_passes` (see `Distillation`); `seconds`. Of the last epoch, with anchors: `target_entropy`,
        the lowest cross-entropy there is; `kl`, the cross-entropy less that, in nats, whatever the loss; `num_anchors`,
        keys in the queue. Also of the last epoch, where they have a weight: `contrastive_loss`; `feature_distance`.

    Raises:
        ConfigError: fewer than two public images, a target of another public set or one that the loss cannot learn
            from, or no gradient step in an epoch.
        FedSSLError: the loss became infinite or NaN; the message names the first such step.
    """
    epochs = []
    with ExitStack() as stack:
        # Dropout and the like draw from torch's global generator and accept no other, so it is seeded for the duration.
        stack.enter_context(seeded_init(seed, "distillation dropout", round_num))
        started = time.perf_counter()
        distiller = Distiller(
            student,
            target,
            images,
            distillation=distillation,
            views=views,
            seed=seed,
            round_num=round_num,
            num_rounds=num_rounds,
            device=device,
            amp=amp,
            cuda_graphs=cuda_graphs,
            reference=reference,
        )
        if device.type == "cpu" and not draws_globally(student, images.pixels.shape[-1]):
            stack.close()  # so that other students can learn at the same time
        with compiled(compile_mode, device, *distiller.networks) as inside:
            for epoch in range(distillation.epochs):
                measures = distiller.epoch(epoch, inside)
                _check_finite(measures["loss"], epoch * len(measures["loss"]), images.name)
                epochs.append({name: values.mean().item() for name, values in measures.items()})
        distiller.end()

    student.eval()
    n, last = len(images), epochs[-1]
    if "cross_entropy" in last:
        last["kl"] = last.pop("cross_entropy") - last["target_entropy"]
        last["num_anchors"] = float(distiller.queue.size)
    return {
        **last,
        "loss_first": epochs[0]["loss"],
        "steps": float(distillation.num_steps(n)),
        "image_passes": float(distillation.image_passes(n, target.num_anchors)),
        "seconds": time.perf_counter() - started,
    }


def _check_finite(losses: Float[Tensor, " steps"], steps_before: int, name: str) -> None:
    if not losses.isfinite().all():
        first = int((~losses.isfinite()).nonzero()[0])
        raise FedSSLError(
            f"the distillation loss on {name} became {losses[first].item()} at step {steps_before + first + 1}. "
            f"Lower distill.optimisation.lr or raise distill.student_temperature."
        )
