"""`experiment=flesd_faithful` against our own slow transcription of the released code's formulas, and number by number.

Per client: M_k = cos(R_k, R_k). Server: P_k = exp((M_k - 1) / tau_T), Mbar = mean_k P_k. Per epoch, in every step: the
target encoder moves, its keys enter the queue with their public index; the first m / b steps stop there. Then
p[i, j] = Mbar[i, a_j] / sum_l Mbar[i, a_l], q = softmax(z_i . key_j / tau_S), loss -(1/b) sum_ij p log q.
"""

import math
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from fedssl.codecs import Codec
from fedssl.config import compose, conf_dir, instantiate
from fedssl.distill import Distillation, distill
from fedssl.ensemble import Rule, make_target
from fedssl.federation.setup import Setup
from fedssl.methods.info_nce import InfoNCE
from fedssl.models import Model
from fedssl.models.heads import MLP
from fedssl.settings import flatten
from tests.test_distill import SGD, RecordingViews, image_set, linear_student

PRESET = compose(["experiment=flesd_faithful", "strategy=flesd"])


EXPECTED: dict[str, Any] = {
    "data.num_classes": 100,
    "partition.alpha": 1.0,
    "public._target_": "fedssl.data.public.ClientShard",
    "federation.num_clients": 6,
    "federation.cohort_size": None,
    "federation.num_rounds": 2,
    "federation.families": ["resnet18"],
    "client.local_epochs": 100,
    "client.batch_size": 1024,
    "client.optimisation.optimiser": "adam",
    "client.optimisation.lr": 1e-3,
    "client.optimisation.weight_decay": 1e-6,
    "client.optimisation.schedule": "constant",
    "client.optimisation.warmup_steps": 0,
    "method.temperature": 0.4,
    "projector.out_dim": 128,
    "projector.hidden_dim": None,
    "projector.batch_norm": False,
    "views.crop_scale": [0.2, 1.0],
    "views.brightness": 0.8,
    "views.contrast": 0.8,
    "views.saturation": 0.8,
    "views.hue": 0.2,
    "views.jitter_probability": 0.8,
    "views.grayscale_probability": 0.2,
    "views.blur_probability": 0.0,
    "views.mean": [0.5, 0.5, 0.5],
    "views.std": [0.5, 0.5, 0.5],
    "codec.dtype": "fp32",
    "downlink": "weights",
    "distill.epochs": 200,
    "distill.batch_size": 128,
    "distill.queue_size": 2048,
    "distill.warmup": "every_epoch",
    "distill.own_key": True,
    "distill.target_temperature": 0.1,
    "distill.student_temperature": 0.1,
    "distill.ema_decay": 0.999,
    "distill.ema_buffers": False,
    "distill.loss": "ce",
    "distill.contrastive_weight": 0.0,
    "distill.feature_weight": 0.0,
    "distill.student_init": "previous",
    "distill.optimisation.optimiser": "adam",
    "distill.optimisation.lr": 1e-3,
    "distill.optimisation.weight_decay": 1e-6,
    "distill.optimisation.schedule": "constant",
}
OF_A_GROUP = {"data.num_classes", "public._target_", "projector.batch_norm"}  # what `defaults` chooses


def test_every_number_is_the_released_codes() -> None:
    """Those of the INIT scripts for CIFAR, as the preset's header lists them."""
    config = PRESET
    for key, value in EXPECTED.items():
        node: Any = config
        for part in key.split("."):
            node = node[part]
        assert node == value, key
    setup = Setup(config)
    assert isinstance(setup.method, InfoNCE)
    model = setup.build_model("resnet18")
    assert isinstance(model.projector, MLP)
    stem = next(part for part in model.backbone.modules() if isinstance(part, torch.nn.Conv2d))
    assert (stem.kernel_size, stem.stride) == ((3, 3), (1, 1))
    assert not any(isinstance(part, torch.nn.MaxPool2d) for part in model.backbone.modules())
    assert not any(isinstance(part, torch.nn.BatchNorm1d) for part in model.projector.modules())


def test_the_preset_itself_says_every_number() -> None:
    """A default that changes is not to change what stands beside a published number."""
    spelled = flatten(yaml.safe_load((conf_dir() / "experiment" / "flesd_faithful.yaml").read_text()))
    assert EXPECTED.keys() - OF_A_GROUP - spelled.keys() == set()


def released(
    W: Tensor, R: list[Tensor], calls: list[tuple[list[int], Tensor]], numbers: Distillation, n: int
) -> tuple[Tensor, list[float], Tensor]:
    """One round with z = W x / |W x|: the final W, the loss of every gradient step, and the first one's gradient."""
    Mbar = [[0.0] * n for _ in range(n)]
    for r in R:
        for i in range(n):
            for j in range(n):
                cosine = float(r[i] @ r[j] / (r[i].norm() * r[j].norm()))
                Mbar[i][j] += math.exp((cosine - 1) / numbers.target_temperature) / len(R)
    m, b, zeta = numbers.queue_size, numbers.batch_size, numbers.ema_decay
    queue: deque[tuple[Tensor, int]] = deque(maxlen=m)
    W_k, losses, gradients, views = W.clone(), [], [], iter(calls)
    for _ in range(numbers.epochs):
        for step in range(n // b):
            if step < m // b:
                rows, x2 = next(views)
            else:
                (rows, x1), (_, x2) = next(views), next(views)
            W_k = zeta * W_k + (1 - zeta) * W
            for row, x in zip(rows, x2, strict=True):
                key = W_k @ x
                queue.append((key / key.norm(), row))
            if step < m // b:
                continue
            W = W.detach().requires_grad_()
            loss = torch.zeros((), dtype=torch.float64)
            for row, x in zip(rows, x1, strict=True):
                z = W @ x / (W @ x).norm()
                total = sum(Mbar[row][a] for _, a in queue)
                exps = [(z @ key / numbers.student_temperature).exp() for key, _ in queue]
                for (_, a), e in zip(queue, exps, strict=True):
                    loss = loss - Mbar[row][a] / total * (e / sum(exps)).log() / len(rows)
            (gradient,) = torch.autograd.grad(loss, W)
            gradients.append(gradient)
            losses.append(loss.item())
            W = (W - numbers.optimisation.lr * gradient).detach()
    return W, losses, gradients[0]


def test_a_round_is_that_of_the_transcription() -> None:
    """With the preset's codec, rule and switches, on fewer images, shorter queues and SGD (Adam would hide factors)."""
    n, small = 12, {"epochs": 2, "batch_size": 3, "queue_size": 6, "ema_decay": 0.9, "optimisation": SGD}
    numbers: Distillation = replace(instantiate(PRESET["distill"]), **small)
    codec: Codec = instantiate(PRESET["codec"])
    rule: Rule = instantiate(PRESET["ensemble"])
    R = [torch.randn(n, d, generator=torch.Generator().manual_seed(d)) for d in (4, 5, 8)]  # any dimension will do
    sent = [codec.encode(r, torch.Generator().manual_seed(0)) for r in R]
    target = make_target(
        [codec.decode(arrays, n) for arrays in sent], rule, numbers.target_temperature, [3.0, 1.0, 9.0]
    )
    views, student = RecordingViews(), linear_student()
    W = student.projector.weight.detach().double().clone()
    metrics = distill(
        student,
        target,
        image_set(n),
        distillation=numbers,
        views=views,
        seed=0,
        round_num=1,
        num_rounds=2,
        device=torch.device("cpu"),
    )
    calls = [([int(row) for row in rows], x.flatten(1).double()) for rows, x in views.calls]
    expected, losses, gradient = released(W, [r.double() for r in R], calls, numbers, n)
    assert len(losses) == metrics["steps"] == 2 * (4 - 2)  # the first two of four steps of each epoch have no gradient
    np.testing.assert_allclose(weight(student), expected.numpy(), atol=2e-5)
    assert np.abs(weight(student) - W.numpy()).max() > 1e-2
    assert float(gradient.abs().max()) > 1e-3
    assert abs(metrics["loss_first"] - np.mean(losses[:2])) < 1e-5
    assert abs(metrics["loss"] - np.mean(losses[2:])) < 1e-5


def weight(student: Model) -> np.ndarray:
    return student.projector.weight.detach().numpy()  # type: ignore[union-attr,operator,no-any-return]
