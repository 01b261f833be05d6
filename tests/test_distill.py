import math
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedssl.data.images import ImageSet
from fedssl.distill import Distillation, Queue, _average, _filling_order, distill
from fedssl.ensemble import EnsembleTarget, RowMean, Rule, SharpenedMean
from fedssl.errors import ConfigError, FedSSLError
from fedssl.models import Model
from fedssl.models.backbones import Conv4
from fedssl.models.heads import MLP
from fedssl.seeding import seeded_init
from fedssl.similarity import DenseSimilarity, FactorSimilarity, Similarity, cosine_similarity, unit_rows
from fedssl.train import Optimisation

CPU = torch.device("cpu")
SGD = Optimisation(optimiser="sgd", lr=0.5, weight_decay=0.0, momentum=0.0, schedule="constant", warmup_steps=0)
ADAM = replace(SGD, optimiser="adam", lr=0.01)
FROZEN = replace(SGD, lr=1e-12)
NUMBERS = Distillation(
    epochs=2,
    batch_size=3,
    queue_size=7,
    target_temperature=0.1,
    student_temperature=0.2,
    ema_decay=0.9,
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


def run(
    student: Model, target: EnsembleTarget, images: ImageSet, numbers: Distillation, **changes: Any
) -> dict[str, float]:
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


# --- the queue -------------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 9), data=st.data())
def test_queue_is_first_in_first_out_and_keys_keep_their_images(size: int, data: st.DataObject) -> None:
    """Key of image a is the vector (a, -a), so a key that lost its index would show."""

    def keys(indices: Tensor) -> Tensor:
        return torch.stack([indices, -indices], dim=1).float()

    start = torch.arange(size)
    queue, expected = Queue(keys(start), start), deque(range(size), maxlen=size)
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
    order = _filling_order(n, size, torch.Generator().manual_seed(0)).tolist()
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
    _average(Model(average, nn.Identity()), Model(online, nn.Identity()), decay=0.75)
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


@pytest.mark.parametrize("n", [2, 5, 11])
def test_image_passes_are_the_images_that_views_were_made_of(n: int) -> None:
    views = RecordingViews()
    metrics = run(linear_student(), EnsembleTarget(clients(n), RowMean(), 0.1), image_set(n), NUMBERS, views=views)
    assert sum(len(rows) for rows, _ in views.calls) == metrics["image_passes"] == NUMBERS.image_passes(n)


# --- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch_size", "queue_size"), [(10, 4, 9), (3, 8, 17), (12, 4, 4)])
def test_the_result_is_a_function_of_weights_target_images_and_seed(n: int, batch_size: int, queue_size: int) -> None:
    """Conv net with batch norm in the head too; odd sizes; no trace in torch's global generator."""
    numbers = replace(NUMBERS, batch_size=batch_size, queue_size=queue_size, optimisation=ADAM)
    images, before = image_set(n, size=8), torch.get_rng_state()

    def weights(seed: int, round_num: int = 1) -> dict[str, Tensor]:
        student = conv_student()
        metrics = run(
            student, EnsembleTarget(clients(n), RowMean(), 0.1), images, numbers, seed=seed, round_num=round_num
        )
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
        ({"epochs": 0}, r"distill.epochs must be at least 1, got 0"),
        ({"batch_size": 1}, r"distill.batch_size must be at least 2 .*, got 1"),
        ({"queue_size": 2}, r"distill.queue_size must be at least distill.batch_size=3, got 2"),
        ({"target_temperature": 0}, r"distill.target_temperature must be > 0, got 0"),
        ({"student_temperature": -1.0}, r"distill.student_temperature must be > 0, got -1.0"),
        ({"ema_decay": 1.5}, r"distill.ema_decay must be between 0 .* and 1 .*, got 1.5"),
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
    optimisation = config.pop("optimisation")
    assert optimisation.pop("_target_") == "fedssl.train.Optimisation"
    Distillation(**config, optimisation=Optimisation(**optimisation))


@pytest.mark.gpu
def test_cuda_with_autocast_agrees_with_the_cpu() -> None:
    images, losses = image_set(32, size=8), []
    for device, amp in ((CPU, False), (torch.device("cuda"), False), (torch.device("cuda"), True)):
        student = conv_student()
        numbers = replace(NUMBERS, epochs=1, batch_size=32, queue_size=64)
        target = EnsembleTarget(clients(32), RowMean(), 0.1)
        metrics = run(student, target, images, numbers, device=device, amp=amp, views=_DeviceViews())
        assert next(student.parameters()).device.type == device.type
        losses.append(metrics["loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert losses[2] == pytest.approx(losses[0], abs=0.1)


class _DeviceViews(RecordingViews):
    """The pixels themselves: nothing random, so devices can be compared."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        assert generator.device.type == images.device.type
        return self.plain(images)
