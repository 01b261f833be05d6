import copy
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedssl import ensemble
from fedssl.anchors import Queue, filling_order
from fedssl.data.images import ImageSet
from fedssl.distill import CHOICES, Distillation, Distiller, distill
from fedssl.ensemble import EnsembleTarget, RowMean, Rule, SharpenedMean, Target
from fedssl.errors import ConfigError, FedSSLError
from fedssl.methods.simclr import SimCLR
from fedssl.models import Model, move_average
from fedssl.models.backbones import Conv4
from fedssl.models.compiled import MODES
from fedssl.models.heads import MLP
from fedssl.seeding import seeded_init
from fedssl.similarity import DenseSimilarity, FactorSimilarity, Similarity, cosine_similarity, unit_rows
from fedssl.train import Optimisation, train

CPU = torch.device("cpu")
SGD = Optimisation(optimiser="sgd", lr=0.5, weight_decay=0.0, momentum=0.0, schedule="constant", warmup_steps=0)
ADAM = replace(SGD, optimiser="adam", lr=0.01)
FROZEN = replace(SGD, lr=1e-12)
NUMBERS = Distillation(
    epochs=2,
    batch_size=3,
    queue_size=7,
    warmup="once",
    own_key=True,
    target_temperature=0.1,
    target_temperature_end=None,
    student_temperature=0.2,
    student_temperature_end=None,
    ema_decay=0.9,
    ema_buffers=True,
    loss="ce",
    num_coordinates=3,
    whitening=0.5,
    similarity_weight=1.0,
    contrastive_weight=0.0,
    contrastive_temperature=0.5,
    feature_weight=0.0,
    student_init="previous",
    init_epochs=2,
    views=None,
    optimisation=SGD,
)


class RecordingViews:
    """Pixels plus noise from the generator. Remembers which images it saw (by their first pixel) and what it made."""

    def __init__(self, noise: float = 1.0) -> None:
        self.noise = noise
        self.calls: list[tuple[list[int], Tensor]] = []

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        views = self.plain(images) + self.noise * torch.rand(images.shape, generator=generator)
        self.calls.append((images[:, 0, 0, 0].tolist(), views))
        return views

    def plain(self, images: Tensor) -> Tensor:
        return images.float() / 255

    def describe(self) -> str:
        return "pixels / 255"


def image_set(n: int, size: int = 2, seed: int = 0) -> ImageSet:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 3, size, size), dtype=np.uint8)
    pixels[:, 0, 0, 0] = np.arange(n)
    return ImageSet(pixels=pixels, indices=np.arange(n), labels=None, classes=(), name="toy/public")


def embeddings(n: int, d: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def clients(n: int, num: int = 2) -> list[Similarity]:
    return [FactorSimilarity(factors=unit_rows(embeddings(n, seed=seed))) for seed in range(num)]


def linear_student(size: int = 2, d: int = 3, seed: int = 0) -> Model:
    with seeded_init(seed, "test"):
        return Model(nn.Flatten(), nn.Linear(3 * size * size, d, bias=False))


def conv_student(seed: int = 0) -> Model:
    with seeded_init(seed, "test"):
        return Model(Conv4(width=4), MLP(in_dim=32, hidden_dim=None, out_dim=8, batch_norm=True))


@dataclass(frozen=True, kw_only=True)
class PrefixTarget:
    """Only the first public images are anchors, as where clients send their sharpened similarities to a subset."""

    inner: EnsembleTarget
    num_anchors: int
    kernel: bool = False

    @property
    def num_samples(self) -> int:
        return self.inner.num_samples

    def __call__(self, rows: Tensor, anchors: Tensor) -> Tensor:
        assert sorted(anchors.tolist()) == list(range(self.num_anchors)), "every anchor once, in every step"
        return self.inner(rows, anchors)

    def at(self, temperature: float) -> "PrefixTarget":
        return replace(self, inner=self.inner.at(temperature))

    def to(self, device: torch.device) -> "PrefixTarget":
        return self


@dataclass(frozen=True, kw_only=True)
class MeanKernel:
    """The mean of the clients' similarities."""

    similarities: list[Similarity]
    num_samples: int
    num_anchors: int
    kernel: bool = True

    def __call__(self, rows: Tensor, anchors: Tensor) -> Tensor:
        return torch.stack([s.block(rows, anchors) for s in self.similarities]).mean(dim=0)

    def at(self, temperature: float) -> "MeanKernel":
        raise AssertionError("a kernel has no temperature")

    def to(self, device: torch.device) -> "MeanKernel":
        return self


def target_of(n: int, numbers: Distillation, num_anchors: int | None = None) -> Target:
    """The kind of target that these numbers learn from."""
    if numbers.loss == "cka":
        return MeanKernel(similarities=clients(n), num_samples=n, num_anchors=n)
    if numbers.loss == "coordinates":
        return EnsembleTarget(clients(n), ensemble.MeanKernel(), numbers.target_temperature)
    target = EnsembleTarget(clients(n), RowMean(), numbers.target_temperature)
    return target if num_anchors is None else PrefixTarget(inner=target, num_anchors=num_anchors)


def run(student: Model, target: Target, images: ImageSet, numbers: Distillation, **changes: Any) -> dict[str, float]:
    options: dict[str, Any] = {"views": RecordingViews(), "seed": 0, "round_num": 1, "num_rounds": 2, "device": CPU}
    return distill(student, target, images, distillation=numbers, **(options | changes))


# --- the paper's formulas with loops, in double precision; the gradient derived by hand for a linear student --------


def target_row(S: list[list[list[float]]], i: int, anchors: list[int], rule: Rule, tau: float) -> list[float]:
    M = [0.0] * len(anchors)
    for s in S:
        P = [math.exp((s[i][a] - 1) / tau) for a in anchors]
        mass = sum(P) if isinstance(rule, RowMean) else 1.0
        for j in range(len(anchors)):
            M[j] += P[j] / mass / len(S)
    return [value / sum(M) for value in M]


def embed(W: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, float]:
    u = W @ x
    length = math.sqrt(sum(value * value for value in u))
    return u / length, length


def transcription(
    W: np.ndarray,
    S: list[list[list[float]]],
    calls: list[tuple[list[int], np.ndarray]],
    rule: Rule,
    numbers: Distillation,
) -> tuple[np.ndarray, list[float]]:
    """FLESD's server with z = W x / |W x|, replaying the recorded views: final W and the loss of every step."""
    queue: deque[tuple[np.ndarray, int]] = deque(maxlen=numbers.queue_size)
    calls = list(calls)
    while len(queue) < numbers.queue_size:
        rows, x = calls.pop(0)
        for i in range(len(rows)):
            queue.append((embed(W, x[i])[0], rows[i]))
    W_k, losses = W.copy(), []
    for (rows, x1), (rows_again, x2) in zip(calls[::2], calls[1::2], strict=True):
        assert rows == rows_again
        W_k = numbers.ema_decay * W_k + (1 - numbers.ema_decay) * W
        for i in range(len(rows)):
            queue.append((embed(W_k, x2[i])[0], rows[i]))
        loss, gradient = 0.0, np.zeros_like(W)
        for i in range(len(rows)):
            z, length = embed(W, x1[i])
            p = target_row(S, rows[i], [a for _, a in queue], rule, numbers.target_temperature)
            logits = [float(z @ key) / numbers.student_temperature for key, _ in queue]
            total = sum(math.exp(logit) for logit in logits)
            dz = np.zeros_like(z)
            for j, (key, _) in enumerate(queue):
                q = math.exp(logits[j]) / total
                loss -= p[j] * math.log(q) / len(rows)
                dz += (q - p[j]) * key / numbers.student_temperature / len(rows)
            du = (dz - z * float(z @ dz)) / length
            gradient += np.outer(du, x1[i])
        losses.append(loss)
        W = W - numbers.optimisation.lr * gradient
    return W, losses


@pytest.mark.parametrize("rule", [SharpenedMean(), RowMean()], ids=["none", "row"])
@pytest.mark.parametrize(
    ("n", "changes"),
    [
        (6, {"epochs": 1, "batch_size": 6, "queue_size": 6}),  # one step: the loss and its gradient
        (8, {}),  # two batches an epoch, the rest dropped; 3 does not divide 7
        (4, {"batch_size": 6}),  # fewer images than a batch or the queue
        (8, {"ema_decay": 0.0, "target_temperature": 0.02}),
        (8, {"ema_decay": 1.0, "student_temperature": 1.0, "queue_size": 20}),
    ],
    ids=["one-step", "default", "small-set", "no-average", "frozen-average"],
)
def test_against_a_literal_transcription(n: int, changes: dict[str, Any], rule: Rule) -> None:
    numbers = replace(NUMBERS, **changes)
    views, student, similarities = RecordingViews(), linear_student(), clients(n)
    W = student.projector.weight.detach().double().numpy().copy()
    S = [s.block(torch.arange(n), torch.arange(n)).double().tolist() for s in similarities]
    target = EnsembleTarget(similarities, rule, numbers.target_temperature)
    metrics = run(student, target, image_set(n), numbers, views=views)
    calls = [(rows, x.flatten(1).double().numpy()) for rows, x in views.calls]
    expected, losses = transcription(W, S, calls, rule, numbers)
    np.testing.assert_allclose(student.projector.weight.detach().numpy(), expected, atol=2e-5)
    assert np.abs(expected - W).max() > 1e-3
    steps = numbers.steps_per_epoch(n)
    assert len(losses) == metrics["steps"] == numbers.num_steps(n)
    assert metrics["loss_first"] == pytest.approx(np.mean(losses[:steps]), abs=1e-5)
    assert metrics["loss"] == pytest.approx(np.mean(losses[-steps:]), abs=1e-5)


# --- every option against loops, several steps long ------------------------------------------------------------------


def two_layer_student(seed: int = 0) -> Model:
    """h = A x, z = B h."""
    with seeded_init(seed, "test"):
        return Model(nn.Sequential(nn.Flatten(), nn.Linear(12, 4, bias=False)), nn.Linear(4, 3, bias=False))


@dataclass
class Replay:
    """The steps of the two-layer student in double precision, on the views that the real one saw.

    Every formula is a loop over images and anchors; the gradient is autograd's of those loops.
    """

    A: Tensor
    B: Tensor
    reference: Tensor
    S: list[list[list[float]]]
    numbers: Distillation
    num_anchors: int | None

    def embed(self, A: Tensor, B: Tensor, x: Tensor) -> Tensor:
        z = B @ (A @ x)
        return z / z.pow(2).sum().sqrt()

    def push_keys(self, rows: list[int], x: Tensor) -> None:
        self.queue.extend((self.embed(self.A_k, self.B_k, x[i]), rows[i]) for i in range(len(rows)))

    def refresh(self, rows: list[int], x: Tensor, calls: Iterator[tuple[list[int], Tensor]]) -> None:
        decay = self.numbers.ema_decay
        self.A_k = decay * self.A_k + (1 - decay) * self.A
        self.B_k = decay * self.B_k + (1 - decay) * self.B
        if self.num_anchors is not None:
            oldest = [index for _, index in self.queue][: len(rows)]
            rows, x = next(calls)
            assert rows == oldest
        self.push_keys(rows, x)

    def anchored(self, z: list[Tensor], rows: list[int], tau: float, student_tau: float) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        anchors = [index for _, index in self.queue]
        for i in range(len(rows)):
            p = target_row(self.S, rows[i], anchors, RowMean(), tau)
            scores = [(z[i] @ key / student_tau).exp() for key, _ in self.queue]
            q = [score / sum(scores) for score in scores]
            for j in range(len(anchors)):
                m = (p[j] + q[j]) / 2
                total = (
                    total
                    + {
                        "ce": -p[j] * q[j].log(),
                        "kl": p[j] * (math.log(p[j]) - q[j].log()),
                        "reverse_kl": q[j] * (q[j].log() - math.log(p[j])),
                        "js": (p[j] * (math.log(p[j]) - m.log()) + q[j] * (q[j].log() - m.log())) / 2,
                    }[self.numbers.loss]
                )
        return total / len(rows)

    def kernels(self, z: list[Tensor], rows: list[int]) -> Tensor:
        b = len(rows)
        K = torch.stack([torch.stack([z[i] @ z[j] for j in range(b)]) for i in range(b)])
        L = torch.tensor([[sum(s[i][j] for s in self.S) / len(self.S) for j in rows] for i in rows]).double()
        H = torch.eye(b, dtype=torch.float64) - 1 / b
        product = [torch.trace(X @ H @ Y @ H) for X, Y in ((K, L), (K, K), (L, L))]
        return 1 - product[0] / (product[1] * product[2]).sqrt()

    def contrastive(self, views: list[Tensor]) -> Tensor:
        b, tau = len(views) // 2, self.numbers.contrastive_temperature
        total = torch.zeros((), dtype=torch.float64)
        for i in range(2 * b):
            others = [(views[i] @ views[j] / tau).exp() for j in range(2 * b) if j != i]
            total = total - (views[i] @ views[(i + b) % (2 * b)] / tau) + torch.stack(others).sum().log()
        return total / (2 * b)

    def run(self, n: int, recorded: list[tuple[list[int], Tensor]]) -> list[float]:
        numbers, calls, losses = self.numbers, iter(recorded), []
        size = numbers.queue_size if self.num_anchors is None else self.num_anchors
        self.queue: deque[tuple[Tensor, int]] = deque(maxlen=size)
        self.A_k, self.B_k = self.A.clone(), self.B.clone()
        anchored = numbers.loss != "cka"
        while anchored and numbers.warmup == "once" and len(self.queue) < size:
            self.push_keys(*next(calls))
        skipped = math.ceil(numbers.queue_size / numbers.batch_size) if numbers.warmup == "every_epoch" else 0
        for epoch in range(numbers.epochs):
            ends = (numbers.target_temperature_end, numbers.student_temperature_end)
            starts = (numbers.target_temperature, numbers.student_temperature)
            tau, student_tau = (
                float(np.linspace(start, start if end is None else end, numbers.epochs)[epoch])
                for start, end in zip(starts, ends, strict=True)
            )
            for iteration in range(n // numbers.batch_size):
                rows, x1 = next(calls)
                if iteration < skipped:
                    self.refresh(rows, x1, calls)
                    continue
                two = numbers.contrastive_weight > 0 or (anchored and self.num_anchors is None)
                again, x2 = next(calls) if two else (rows, x1)
                assert again == rows
                if anchored and numbers.own_key:
                    self.refresh(rows, x2, calls)
                A, B = self.A.clone().requires_grad_(), self.B.clone().requires_grad_()
                z1, z2 = ([self.embed(A, B, x[i]) for i in range(len(rows))] for x in (x1, x2))
                similarity = self.anchored(z1, rows, tau, student_tau) if anchored else self.kernels(z1, rows)
                loss = numbers.similarity_weight * similarity
                if numbers.contrastive_weight > 0:
                    loss = loss + numbers.contrastive_weight * self.contrastive(z1 + z2)
                for i in range(len(rows)):
                    moved = (A @ x1[i] - self.reference @ x1[i]).pow(2).sum()
                    loss = loss + numbers.feature_weight * moved / len(rows)
                gradients = torch.autograd.grad(loss, (A, B))
                self.A, self.B = (
                    old - numbers.optimisation.lr * gradient
                    for old, gradient in zip((self.A, self.B), gradients, strict=True)
                )
                if anchored and not numbers.own_key:
                    self.refresh(rows, x2, calls)
                losses.append(loss.item())
        assert next(calls, None) is None
        return losses


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "kl": {"loss": "kl"},
    "js": {"loss": "js"},
    "reverse_kl": {"loss": "reverse_kl"},
    "cka": {"loss": "cka"},
    "own_key": {"own_key": False},
    "warmup": {"warmup": "every_epoch", "queue_size": 4},
    "target_temperature_end": {"target_temperature_end": 0.5, "epochs": 3},
    "student_temperature_end": {"student_temperature_end": 0.05, "epochs": 3},
    "similarity_weight": {"similarity_weight": 0.5},
    "contrastive": {"contrastive_weight": 0.7},
    "contrastive_temperature": {"contrastive_weight": 0.7, "contrastive_temperature": 0.2},
    "contrastive only": {"similarity_weight": 0.0, "contrastive_weight": 1.0},
    "features": {"feature_weight": 0.03},
    "cka and both": {
        "loss": "cka",
        "contrastive_weight": 0.7,
        "feature_weight": 0.03,
        "optimisation": replace(SGD, lr=0.1),
    },
    "all": {
        "loss": "js",
        "own_key": False,
        "warmup": "every_epoch",
        "queue_size": 3,
        "target_temperature_end": 0.05,
        "student_temperature_end": 0.4,
        "contrastive_weight": 0.7,
        "feature_weight": 0.03,
    },
}


def replayed(changes: dict[str, Any], num_anchors: int | None = None) -> tuple[dict[str, float], Model, Replay]:
    """A run of two or three epochs of three batches, and its replay; both must end at the same weights."""
    n, numbers = 10, replace(NUMBERS, **changes)
    views, student = RecordingViews(), two_layer_student()
    A, B = (weights.detach().double().clone() for weights in student.parameters())
    everyone = torch.arange(n)
    S = [s.block(everyone, everyone).double().tolist() for s in clients(n)]
    replay = Replay(A=A, B=B, reference=A, S=S, numbers=numbers, num_anchors=num_anchors)
    metrics = run(student, target_of(n, numbers, num_anchors), image_set(n), numbers, views=views)
    losses = replay.run(n, [([int(row) for row in rows], x.flatten(1).double()) for rows, x in views.calls])
    for ours, theirs in zip(student.parameters(), (replay.A, replay.B), strict=True):
        torch.testing.assert_close(ours.detach().double(), theirs, atol=1e-4, rtol=1e-4)
    steps = numbers.steps_per_epoch(n)
    assert len(losses) == metrics["steps"] == numbers.num_steps(n)
    assert metrics["loss_first"] == pytest.approx(np.mean(losses[:steps]), abs=1e-4)
    assert metrics["loss"] == pytest.approx(np.mean(losses[-steps:]), abs=1e-4)
    return metrics, student, replay


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_every_option_does_what_its_formula_says(changes: dict[str, Any]) -> None:
    _, student, _ = replayed(changes)
    if changes.get("loss", "ce") not in ("ce", "kl") or changes.keys() - {"loss"}:
        _, default, _ = replayed({"epochs": changes.get("epochs", NUMBERS.epochs)})
        assert (student.projector.weight - default.projector.weight).abs().max() > 1e-4, "the option was ignored"


@pytest.mark.parametrize(
    ("num_anchors", "changes"),
    [(5, {}), (2, {}), (4, {"contrastive_weight": 0.7, "loss": "js"}), (3, {"target_temperature_end": 0.5})],
)
def test_a_target_with_few_anchors_has_each_in_the_queue_at_every_step(
    num_anchors: int, changes: dict[str, Any]
) -> None:
    """`PrefixTarget` checks the anchors of each step, the replay that the oldest are renewed first."""
    metrics, _, _ = replayed(changes, num_anchors)
    assert metrics["num_anchors"] == num_anchors


# --- the queue -------------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 9), data=st.data())
def test_queue_is_first_in_first_out_and_keys_keep_their_images(size: int, data: st.DataObject) -> None:
    """Key of image a is the vector (a, -a), so a key that lost its index would show."""

    def keys(indices: Tensor) -> Tensor:
        return torch.stack([indices, -indices], dim=1).float()

    start = torch.arange(size)
    queue, expected = Queue(size), deque(range(size), maxlen=size)
    queue.push(keys(start), start)
    pushes = data.draw(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=size), max_size=6))
    for push in pushes:
        queue.push(keys(torch.tensor(push)), torch.tensor(push))
        expected.extend(push)
        assert sorted(queue.indices.tolist()) == sorted(expected)
        torch.testing.assert_close(queue.keys, keys(queue.indices))
    oldest_first = queue.indices.roll(-(sum(map(len, pushes)) % size))
    assert oldest_first.tolist() == list(expected)


@pytest.mark.parametrize(("n", "size"), [(5, 3), (5, 5), (5, 13)])
def test_the_queue_is_filled_by_whole_passes_in_random_order(n: int, size: int) -> None:
    order = filling_order(n, size, torch.Generator().manual_seed(0)).tolist()
    assert len(order) == size
    for start in range(0, size, n):
        chunk = order[start : start + n]
        assert len(set(chunk)) == len(chunk)
    assert order != sorted(order)


# --- closed forms ----------------------------------------------------------------------------------------------------


def test_a_flat_target_and_a_constant_student_cost_the_logarithm_of_the_queue() -> None:
    n = 6
    flat = EnsembleTarget([DenseSimilarity(matrix=torch.ones(n, n))], RowMean(), 0.1)
    student = linear_student()
    with torch.no_grad():
        student.projector.weight.copy_(torch.ones(3, 1).expand(3, 12))  # positive pixels: one direction for all
    metrics = run(student, flat, image_set(n), replace(NUMBERS, queue_size=9))
    for name in ("loss", "loss_first", "target_entropy"):
        assert metrics[name] == pytest.approx(math.log(9), abs=1e-5)
    assert metrics["kl"] == pytest.approx(0, abs=1e-5)


def test_the_average_moves_weights_and_buffers_and_copies_counters() -> None:
    average, online = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    for tensor in (online.weight, online.bias, online.running_mean, online.running_var):
        assert tensor is not None
        tensor.data.fill_(5.0)
    assert online.num_batches_tracked is not None
    online.num_batches_tracked.fill_(7)
    move_average(average, online, 0.75, buffers=True)
    torch.testing.assert_close(average.weight.data, torch.full((2,), 0.75 * 1 + 0.25 * 5))
    torch.testing.assert_close(average.bias.data, torch.full((2,), 0.25 * 5))
    torch.testing.assert_close(average.running_mean, torch.full((2,), 0.25 * 5))
    torch.testing.assert_close(average.running_var, torch.full((2,), 0.75 * 1 + 0.25 * 5))
    assert average.num_batches_tracked == 7


@pytest.mark.parametrize(
    ("n", "steps_per_epoch", "image_passes"),
    [
        (64, 1, 10 * 1 * 2 * 64 + 200),
        (200, 3, 10 * 3 * 2 * 64 + 200),  # 192 of 200 images in an epoch
        (40, 1, 10 * 1 * 2 * 40 + 200),  # fewer images than a batch
    ],
)
def test_steps_and_image_passes_by_hand(n: int, steps_per_epoch: int, image_passes: int) -> None:
    numbers = replace(NUMBERS, epochs=10, batch_size=64, queue_size=200)
    assert numbers.steps_per_epoch(n) == steps_per_epoch
    assert numbers.num_steps(n) == 10 * steps_per_epoch
    assert numbers.image_passes(n) == image_passes


class Counting(nn.Linear):
    """A linear backbone that notes the size of every batch, its own and its copies' alike."""

    def __init__(self) -> None:
        super().__init__(12, 4, bias=False)
        self.batches: list[int] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Counting":
        twin = Counting()
        twin.load_state_dict(self.state_dict())
        twin.batches = self.batches
        return twin

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        return super().forward(x.flatten(1))


@pytest.mark.parametrize("n", [2, 5, 11])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "cka"},
        {"own_key": False},
        {"contrastive_weight": 1.0},
        {"feature_weight": 1.0},
        {"loss": "cka", "contrastive_weight": 1.0, "feature_weight": 1.0},
        {"loss": "coordinates"},
        {"loss": "coordinates", "contrastive_weight": 1.0, "feature_weight": 1.0},
        {"warmup": "every_epoch", "queue_size": 3, "feature_weight": 1.0},
    ],
    ids=str,
)
def test_image_passes_are_the_images_that_went_through_a_network(n: int, changes: dict[str, Any]) -> None:
    numbers, backbone = replace(NUMBERS, optimisation=FROZEN, **changes), Counting()
    if numbers.warmup == "every_epoch" and n < 2 * numbers.batch_size:
        with pytest.raises(ConfigError, match="no gradient step is left"):
            numbers.image_passes(n)
        return
    if numbers.loss == "coordinates" and n == 2:
        with pytest.raises(FedSSLError, match="fewer than two directions"):
            run(Model(backbone, nn.Linear(4, 3)), target_of(n, numbers), image_set(n), numbers)
        return
    metrics = run(Model(backbone, nn.Linear(4, 3)), target_of(n, numbers), image_set(n), numbers)
    measured = 2 + int(numbers.loss == "coordinates")  # empty images: does it draw, and how wide is the head
    assert sum(backbone.batches) - measured == metrics["image_passes"] == numbers.image_passes(n)
    assert max(backbone.batches) <= max(2 * 3, 7)


@pytest.mark.parametrize("num_anchors", [2, 5, 9])
def test_image_passes_with_few_anchors(num_anchors: int) -> None:
    numbers, backbone = replace(NUMBERS, optimisation=FROZEN), Counting()
    metrics = run(Model(backbone, nn.Linear(4, 3)), target_of(10, numbers, num_anchors), image_set(10), numbers)
    drawing = 2  # empty images that tell whether it draws
    assert sum(backbone.batches) - drawing == metrics["image_passes"] == numbers.image_passes(10, num_anchors)
    assert numbers.image_passes(10, 10) == numbers.image_passes(10)


@pytest.mark.parametrize(("n", "batch_size"), [(9, 3), (10, 3), (11, 3), (4, 6)])
def test_pretraining_effort_is_that_of_as_many_epochs_of_training(n: int, batch_size: int) -> None:
    numbers = replace(NUMBERS, batch_size=batch_size, student_init="public_only", init_epochs=3)
    trained = train(
        linear_student(),
        image_set(n),
        method=SimCLR(temperature=0.5),
        views=RecordingViews(),
        optimisation=SGD,
        batch_size=batch_size,
        epochs=3,
        seed=0,
        round_num=1,
        num_rounds=1,
        device=CPU,
    )
    assert trained["steps"] == numbers.pretraining_steps(n)
    assert trained["image_passes"] == numbers.pretraining_image_passes(n)
    other = replace(numbers, student_init="scratch")
    assert other.pretraining_steps(n) == other.pretraining_image_passes(n) == 0


# --- options whose effect the student's weights do not show ----------------------------------------------------------


def test_the_defaults_are_what_they_were_before_there_were_options() -> None:
    """Recorded from the version with none of them: one with batch norm, one with more anchors than images."""
    cases: list[tuple[Model, int, dict[str, Any], Rule, dict[str, float]]] = [
        (
            conv_student(),
            20,
            {"epochs": 1, "batch_size": 6, "queue_size": 13, "optimisation": replace(SGD, lr=0.05)},
            RowMean(),
            {"loss": 3.9526207447052, "target_entropy": 0.6376296877861023},
        ),
        (
            linear_student(),
            4,
            {"batch_size": 6},
            RowMean(),
            {"loss": 2.5204169750213623, "loss_first": 1.8982441425323486, "target_entropy": 0.6997498869895935},
        ),
        (
            linear_student(),
            8,
            {},
            SharpenedMean(),
            {"loss": 1.7661497592926025, "loss_first": 1.7206652164459229, "target_entropy": 0.48282480239868164},
        ),
    ]
    for student, n, changes, rule, expected in cases:
        size = 8 if isinstance(student.backbone, Conv4) else 2
        target = EnsembleTarget(clients(n), rule, 0.1)
        metrics = run(student, target, image_set(n, size=size), replace(NUMBERS, **changes))
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=3e-4)


@pytest.mark.parametrize("loss", ["kl", "js", "reverse_kl"])
def test_kl_and_entropy_are_reported_for_every_loss(loss: str) -> None:
    """Nothing is learned, so all losses see the same p and q."""
    results = [
        run(linear_student(), target_of(8, NUMBERS), image_set(8), replace(NUMBERS, loss=name, optimisation=FROZEN))
        for name in ("ce", loss)
    ]
    assert results[0]["kl"] > 0.5
    for name in ("kl", "target_entropy"):
        assert results[1][name] == pytest.approx(results[0][name], rel=1e-5)
    assert (results[1]["loss"] == pytest.approx(results[1]["kl"], rel=1e-5)) == (loss == "kl")


def test_measures_are_reported_where_there_is_something_to_measure() -> None:
    numbers = replace(NUMBERS, contrastive_weight=0.5, feature_weight=2.0)
    metrics = run(two_layer_student(), target_of(8, numbers), image_set(8), numbers)
    total = metrics["kl"] + metrics["target_entropy"]
    total += 0.5 * metrics["contrastive_loss"] + 2 * metrics["feature_distance"]
    assert metrics["loss"] == pytest.approx(total, rel=1e-5)
    plain = run(two_layer_student(), target_of(8, NUMBERS), image_set(8), NUMBERS)
    assert not {"contrastive_loss", "feature_distance"} & plain.keys()
    assert plain["num_anchors"] == 7
    cka = replace(NUMBERS, loss="cka")
    assert (
        not {"kl", "target_entropy", "num_anchors"}
        & run(two_layer_student(), target_of(8, cka), image_set(8), cka).keys()
    )


def stepper(numbers: Distillation, student: Model, n: int = 6, **changes: Any) -> Distiller:
    options: dict[str, Any] = {"views": RecordingViews(), "seed": 0, "round_num": 1, "num_rounds": 1, "device": CPU}
    return Distiller(student, target_of(n, numbers), image_set(n, 8), distillation=numbers, **(options | changes))


@pytest.mark.parametrize("ema_buffers", [True, False])
def test_batch_norm_of_the_target_encoder_is_averaged_or_sees_its_own_batches(ema_buffers: bool) -> None:
    """Two chunks fill the queue of 7. Then a decay of 0 copies the student's untouched buffers, or none at all."""
    distiller = stepper(replace(NUMBERS, ema_decay=0.0, ema_buffers=ema_buffers), conv_student())
    distiller.step(torch.arange(3))
    counters = [value for name, value in distiller.target_encoder.named_buffers() if name.endswith("tracked")]
    assert counters
    assert all(counter == (1 if ema_buffers else 3) for counter in counters)


def test_the_student_may_see_other_views_than_clients_do() -> None:
    """distill.views replaces the run's, in the queue as well."""
    runs, own = RecordingViews(), RecordingViews()
    stepper(replace(NUMBERS, views=own), conv_student(), views=runs).step(torch.arange(4))
    assert own.calls
    assert not runs.calls


def test_both_views_go_through_the_student_in_one_pass() -> None:
    """So batch norm sees them together: the contrastive loss is that of the concatenated batch."""
    student, views = conv_student(), RecordingViews()
    before = copy.deepcopy(student).train()
    numbers = replace(NUMBERS, contrastive_weight=1.0, similarity_weight=0.5)
    measures = stepper(numbers, student, views=views).step(torch.arange(4))
    x1, x2 = (x for _, x in views.calls[-2:])
    z = nn.functional.normalize(before(torch.cat([x1, x2])).detach(), dim=1)
    cosines = (z @ z.T / 0.5).exp()
    expected = [-math.log(cosines[i, (i + 4) % 8] / (cosines[i].sum() - cosines[i, i])) for i in range(8)]
    assert measures["contrastive_loss"].item() == pytest.approx(np.mean(expected), rel=1e-4)


def test_the_reference_runs_in_eval_mode_and_is_left_as_it_is() -> None:
    student, reference, views = conv_student(), conv_student(seed=1).train(), RecordingViews()
    before, kept = copy.deepcopy(student).train(), copy.deepcopy(reference.state_dict())
    distiller = stepper(replace(NUMBERS, feature_weight=1.0), student, views=views, reference=reference)
    measures = distiller.step(torch.arange(4))
    x1 = views.calls[-2][1]
    with torch.no_grad():
        expected = (before.backbone(x1) - copy.deepcopy(reference).eval().backbone(x1)).square().sum(dim=1).mean()
    assert measures["feature_distance"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert reference.training
    assert all(parameter.requires_grad for parameter in reference.parameters())
    for name, value in reference.state_dict().items():
        assert torch.equal(value, kept[name]), name


def test_a_reference_without_a_weight_is_not_computed() -> None:
    class Refuses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("computed")

    broken = Model(Refuses(), nn.Identity())
    run(linear_student(), target_of(6, NUMBERS), image_set(6), NUMBERS, reference=broken)
    numbers = replace(NUMBERS, feature_weight=1.0)
    with pytest.raises(AssertionError, match="computed"):
        run(linear_student(), target_of(6, numbers), image_set(6), numbers, reference=broken)


@dataclass(frozen=True, kw_only=True)
class WatchedTarget(PrefixTarget):
    """Notes the temperatures that it is brought to."""

    asked: list[float]

    def __call__(self, rows: Tensor, anchors: Tensor) -> Tensor:
        return self.inner(rows, anchors)

    def at(self, temperature: float) -> "WatchedTarget":
        self.asked.append(temperature)
        return replace(self, inner=self.inner.at(temperature))


@pytest.mark.parametrize(
    ("end", "asked"), [(None, []), (0.1, []), (0.4, [0.2, 0.3, 0.4])], ids=["constant", "same", "rising"]
)
def test_the_target_is_brought_to_another_temperature_only_where_it_changes(
    end: float | None, asked: list[float]
) -> None:
    numbers = replace(NUMBERS, epochs=4, target_temperature_end=end)
    inner = EnsembleTarget(clients(6), RowMean(), 0.1)
    target = WatchedTarget(inner=inner, num_anchors=6, asked=[])
    run(linear_student(), target, image_set(6), numbers)
    assert target.asked == pytest.approx(asked)


def test_skipped_batches_move_the_anchors_but_not_the_student() -> None:
    """n = 10 in batches of 3: of three batches, the first two renew a queue of 5, the last one teaches."""
    numbers = replace(NUMBERS, warmup="every_epoch", queue_size=5)
    assert (numbers.skipped_batches(10), numbers.steps_per_epoch(10)) == (2, 1)
    views, student = RecordingViews(), linear_student()
    metrics = run(student, target_of(10, numbers), image_set(10), numbers, views=views)
    assert metrics["steps"] == 2
    rows = [tuple(rows) for rows, _ in views.calls]
    assert len(rows) == 2 * 4  # one view in a skipped batch, two in the other
    for first, second, third, again in (rows[:4], rows[4:]):
        assert third == again
        assert len({*first, *second, *third}) == 9  # the batches of one epoch


# --- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "batch_size", "queue_size", "changes"),
    [
        (10, 4, 9, {}),
        (3, 8, 17, {}),
        (12, 4, 4, {}),
        (12, 4, 8, OPTIONS["all"] | {"queue_size": 8, "ema_buffers": False}),
        (10, 4, 9, OPTIONS["cka and both"]),
        (10, 4, 9, {"loss": "coordinates"}),
    ],
)
def test_the_result_is_a_function_of_weights_target_images_and_seed(
    n: int, batch_size: int, queue_size: int, changes: dict[str, Any]
) -> None:
    """Conv net with batch norm in the head too; odd sizes; no trace in torch's global generator."""
    numbers = replace(NUMBERS, **({"batch_size": batch_size, "queue_size": queue_size, "optimisation": ADAM} | changes))
    images, before = image_set(n, size=8), torch.get_rng_state()

    def weights(seed: int, round_num: int = 1) -> dict[str, Tensor]:
        student = conv_student()
        metrics = run(student, target_of(n, numbers), images, numbers, seed=seed, round_num=round_num)
        assert all(math.isfinite(value) for value in metrics.values())
        assert not student.training
        assert all(p.grad is None for p in student.parameters())
        return student.state_dict()

    first = weights(0)
    assert torch.equal(torch.get_rng_state(), before)
    for name, again in weights(0).items():
        assert torch.equal(again, first[name]), name
    for other in (weights(1), weights(0, round_num=2)):
        assert any(not torch.equal(other[name], first[name]) for name in first)


def test_coordinates_by_hand() -> None:
    """One step of a linear student: the head's and the weights' gradients of mean_i 1 - cos(W A x_i + b, c_i)."""
    n, images = 6, image_set(6, 8)
    numbers = replace(NUMBERS, loss="coordinates", batch_size=n, queue_size=n, epochs=1)
    with seeded_init(0, "test"):
        student = Model(nn.Sequential(nn.Flatten(), nn.Linear(192, 4, bias=False)), nn.Linear(4, 3))
        distiller = stepper(numbers, student, n, views=RecordingViews(noise=0.0))
    head = distiller.head
    assert isinstance(head, nn.Linear)
    A, W, b = (value.detach().double() for value in (student.backbone[1].weight, head.weight, head.bias))
    A.requires_grad_()
    x = images.take(torch.arange(n)).flatten(1).double() / 255
    kernel = torch.zeros(n, n, dtype=torch.float64)
    for similarity in clients(n):
        S = similarity.block(torch.arange(n), torch.arange(n)).double()
        C = torch.eye(n, dtype=torch.float64) - 1 / n
        kernel += C @ S @ C / torch.linalg.matrix_norm(C @ S @ C) / 2
    values, vectors = torch.linalg.eigh(kernel)
    exact = vectors[:, -3:].flip(1) * values[-3:].flip(0) ** 0.25
    c = distiller.coordinates.double()
    torch.testing.assert_close(c.abs(), exact.abs(), atol=1e-4, rtol=1e-3)  # signs are free
    loss = torch.stack([1 - torch.cosine_similarity(W @ (A @ x[i]) + b, c[i], dim=0) for i in range(n)]).mean()
    (gradient,) = torch.autograd.grad(loss, A)
    stepped = distiller.step(torch.arange(n))
    assert stepped["loss"].item() == pytest.approx(loss.item(), abs=1e-5)
    expected = (A - SGD.lr * gradient).detach().float()
    torch.testing.assert_close(student.backbone[1].weight.detach(), expected, atol=1e-4, rtol=1e-4)


def test_clients_that_all_collapsed_have_nothing_to_teach() -> None:
    numbers = replace(NUMBERS, loss="coordinates")
    collapsed = FactorSimilarity(factors=torch.ones(6, 1))
    with pytest.raises(FedSSLError, match="fewer than two directions"):
        run(linear_student(), EnsembleTarget([collapsed], ensemble.MeanKernel(), 0.1), image_set(6), numbers)


def test_factors_and_matrix_teach_the_same() -> None:
    n = 9
    matrices = [DenseSimilarity(matrix=cosine_similarity(embeddings(n, seed=seed))) for seed in range(2)]
    ends = []
    for similarities in (clients(n), matrices):
        student = linear_student()
        run(student, EnsembleTarget(similarities, RowMean(), 0.1), image_set(n), NUMBERS)
        ends.append(student.projector.weight.detach())
    torch.testing.assert_close(ends[0], ends[1], atol=1e-5, rtol=0)


def test_another_order_of_embeddings_teaches_something_else() -> None:
    """Row i of a target belongs to image i: the trap that the public set's fingerprint guards against."""
    n, ends = 9, []
    for permutation in (torch.arange(n), torch.arange(n).roll(1)):
        student = linear_student()
        similarity = FactorSimilarity(factors=unit_rows(embeddings(n)[permutation]))
        run(student, EnsembleTarget([similarity], RowMean(), 0.1), image_set(n), NUMBERS)
        ends.append(student.projector.weight.detach())
    assert (ends[0] - ends[1]).abs().max() > 1e-3


def separation(student: Model, images: ImageSet, labels: Tensor) -> float:
    """Mean cosine of two images with the same label, minus that of two images with different ones."""
    with torch.no_grad():
        S = cosine_similarity(student(RecordingViews().plain(images.take(torch.arange(len(images))))))
    same = labels[:, None] == labels
    return float(S[same].mean() - S[~same].mean())


@pytest.mark.parametrize(("optimisation", "learns"), [(ADAM, True), (FROZEN, False)], ids=["lr 0.01", "lr 0"])
def test_the_student_learns_similarities_that_its_pixels_do_not_show(optimisation: Optimisation, learns: bool) -> None:
    """Pixels are noise and the target groups the images at random, so the groups can only come from the target."""
    n = 24
    images, labels = image_set(n, size=4), torch.arange(n) % 3
    with seeded_init(0, "test"):
        student = Model(nn.Flatten(), MLP(in_dim=48, hidden_dim=64, out_dim=8, batch_norm=True))
    teacher = FactorSimilarity(factors=nn.functional.one_hot(labels).float())
    numbers = replace(NUMBERS, epochs=40, batch_size=12, queue_size=24, optimisation=optimisation)
    before = separation(student.eval(), images, labels)
    metrics = run(student, EnsembleTarget([teacher], RowMean(), 0.1), images, numbers, views=RecordingViews(noise=0.1))
    after = separation(student, images, labels)
    assert abs(before) < 0.1
    if learns:
        assert after > 0.7
        assert metrics["kl"] < 0.2
    else:
        assert after < 0.1
        assert metrics["kl"] > 1


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_coordinates": 1}, r"distill.num_coordinates must be at least 2, got 1"),
        ({"whitening": 1.5}, r"distill.whitening must be between 0 and 1, got 1.5"),
        ({"epochs": 0}, r"distill.epochs must be at least 1, got 0"),
        ({"batch_size": 1}, r"distill.batch_size must be at least 2 .*, got 1"),
        ({"queue_size": 2}, r"distill.queue_size must be at least distill.batch_size=3, got 2"),
        ({"target_temperature": 0}, r"distill.target_temperature must be > 0, got 0"),
        ({"student_temperature": -1.0}, r"distill.student_temperature must be > 0, got -1.0"),
        ({"ema_decay": 1.5}, r"distill.ema_decay must be between 0 .* and 1 .*, got 1.5"),
        ({"loss": "mse"}, r"distill.loss must be one of ce, kl, js, reverse_kl, cka, coordinates, got 'mse'"),
        ({"warmup": "never"}, r"distill.warmup must be one of once, every_epoch, got 'never'"),
        ({"student_init": "best"}, r"distill.student_init must be one of previous, scratch, .*, got 'best'"),
        ({"target_temperature_end": 0.0}, r"distill.target_temperature_end must be > 0, got 0"),
        ({"student_temperature_end": 0.1, "epochs": 1}, r"student_temperature_end=0.1 .* raise epochs or set it to nu"),
        ({"contrastive_temperature": 0.0}, r"distill.contrastive_temperature must be > 0, got 0"),
        ({"similarity_weight": -1.0}, r"distill.similarity_weight must be at least 0, got -1"),
        ({"contrastive_weight": math.nan}, r"distill.contrastive_weight must be at least 0, got nan"),
        ({"feature_weight": math.inf}, r"distill.feature_weight must be at least 0, got inf"),
        ({"similarity_weight": 0.0, "feature_weight": 1.0}, r"are both 0, which leaves nothing to learn"),
        ({"loss": "cka", "warmup": "every_epoch"}, r"distill.loss=cka has no queue, so distill.warmup must be once"),
        ({"loss": "cka", "own_key": False}, r"loss=cka has no queue.* distill.own_key true, got once and false"),
        (
            {"loss": "cka", "student_temperature_end": 0.3},
            r"cka knows no temperature, so distill.student_temp",
        ),
        ({"student_init": "public_only", "init_epochs": 0}, r"public_only needs distill.init_epochs of at least 1"),
    ],
)
def test_impossible_numbers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(NUMBERS, **changes)


def test_another_public_set_and_a_single_image_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"target is of 5 public images, but toy/public has 6"):
        run(linear_student(), EnsembleTarget(clients(5), RowMean(), 0.1), image_set(6), NUMBERS)
    with pytest.raises(ConfigError, match=r"raise public.size to 2 or more"):
        run(linear_student(), EnsembleTarget(clients(1), RowMean(), 0.1), image_set(1), NUMBERS)


def test_an_epoch_without_a_gradient_step_is_refused() -> None:
    numbers = replace(NUMBERS, warmup="every_epoch")  # 3 batches of 3 renew a queue of 7
    assert numbers.steps_per_epoch(12) == 1
    message = r"skips the first 3 batches .*distill.queue_size=7, .* 11 public images make only 3: no gradient step"
    for call in (numbers.num_steps, numbers.image_passes):
        with pytest.raises(ConfigError, match=message):
            call(11)
    with pytest.raises(ConfigError, match=message):
        run(linear_student(), target_of(11, numbers), image_set(11), numbers)


def test_a_loss_and_a_target_that_do_not_belong_together_are_refused() -> None:
    cka = replace(NUMBERS, loss="cka")
    with pytest.raises(ConfigError, match=r"distill.loss=cka learns from a kernel.*choose ensemble=cka_kernel, or"):
        run(linear_student(), target_of(6, NUMBERS), image_set(6), cka)
    with pytest.raises(ConfigError, match=r"distill.loss=ce learns from rows that sum to 1, but the chosen ensemble m"):
        run(linear_student(), target_of(6, cka), image_set(6), NUMBERS)


@pytest.mark.parametrize("changes", [{"warmup": "every_epoch"}, {"own_key": False}])
def test_few_anchors_leave_no_choice_of_keys(changes: dict[str, Any]) -> None:
    numbers = replace(NUMBERS, **changes)
    with pytest.raises(ConfigError, match=r"only 4 of 20 public images are anchors .*codec=sharpened"):
        run(linear_student(), target_of(20, numbers, num_anchors=4), image_set(20), numbers)
    with pytest.raises(ConfigError, match=r"has 1 anchor\(s\)"):
        run(linear_student(), target_of(20, NUMBERS, num_anchors=1), image_set(20), NUMBERS)


def test_a_loss_that_diverges_names_its_step() -> None:
    class BreaksInTheThirdStep(RecordingViews):
        def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
            views = super().__call__(images, generator)
            return views * math.nan if len(self.calls) == 7 else views  # 2 chunks fill the queue, 2 views a step

    target = EnsembleTarget(clients(6), RowMean(), 0.1)
    with pytest.raises(FedSSLError, match=r"loss on toy/public became nan at step 3. Lower distill.optimisation.lr"):
        run(linear_student(), target, image_set(6), NUMBERS, views=BreaksInTheThirdStep())


def test_the_yaml_lists_every_field() -> None:
    config = yaml.safe_load((Path(__file__).parents[1] / "conf/distill/default.yaml").read_text())
    assert config.pop("_target_") == "fedssl.distill.Distillation"
    assert config.pop("defaults") == ["_self_", {"/views@views": None}]
    optimisation = config.pop("optimisation")
    assert optimisation.pop("_target_") == "fedssl.train.Optimisation"
    assert config.pop("loss") is None  # what goes with the ensemble
    distillation = Distillation(**config, loss="ce", optimisation=Optimisation(**optimisation))
    for name, choices in CHOICES.items():
        assert getattr(distillation, name) == choices[0]


@pytest.mark.gpu
def test_cuda_with_autocast_agrees_with_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # torch's default for convolutions
    images, first, losses = image_set(32, size=8), [], []
    cuda = torch.device("cuda")
    ways = ((CPU, False, None), (cuda, False, None), (cuda, True, None), *((cuda, False, mode) for mode in MODES))
    for device, amp, mode in ways:
        student = conv_student()
        numbers = replace(NUMBERS, epochs=4, batch_size=32, queue_size=64)
        target = EnsembleTarget(clients(32), RowMean(), 0.1)
        changes = {"device": device, "amp": amp, "compile_mode": mode, "views": _DeviceViews()}
        metrics = run(student, target, images, numbers, **changes)
        assert next(student.parameters()).device.type == device.type
        losses.append(metrics["loss"])
        first.append(metrics["loss_first"])
    assert first[1] == pytest.approx(first[0], abs=1e-4)
    assert first[2] == pytest.approx(first[0], abs=0.1)
    assert losses[3:] == pytest.approx([losses[1]] * len(MODES), abs=1e-3)


class _DeviceViews(RecordingViews):
    """The pixels themselves: nothing random, so devices can be compared."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        assert generator.device.type == images.device.type
        return self.plain(images)
