"""FedDF: what each student starts from, what it learns from, and what of that the server computes itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message

from fedssl.distill import distill
from fedssl.ensemble import Target
from fedssl.errors import ConfigError
from fedssl.federation import simulation
from fedssl.federation.arrays import to_record
from fedssl.federation.records import Upload, load_state, model_state
from fedssl.federation.setup import Setup
from fedssl.federation.simulation import build_strategy
from fedssl.models import Model
from fedssl.seeding import derive_seed
from strategies.feddf import FedDF
from tests.federation_helpers import FAMILIES, assert_same, final_arrays, first_round, numpy_of, rows, small

WIDE = (
    "+models.wide={_target_: fedssl.models.backbones.Conv4, width: 6}",
    "federation.server_families=[wide]",
)
PAPER = ("ensemble=row", "embedding=projector", "distill.loss=kl")


def declare(reply: Message, arrays: dict[str, np.ndarray], num_images: float) -> None:
    """Let the client have sent this."""
    reply.content["arrays"] = to_record(arrays)
    reply.content["metrics"]["num-examples"] = num_images


def first(*overrides: str, tmp_path: Path) -> tuple[Setup, FedDF, list[Message]]:
    setup, strategy, _, replies = first_round(small(None, "strategy=feddf", *overrides), tmp_path)
    assert isinstance(strategy, FedDF)
    return setup, strategy, replies


@pytest.mark.parametrize(("weighted", "share"), [(True, 0.75), (False, 0.5)])
def test_students_start_from_the_mean_of_their_family_and_learn_from_everybody(
    weighted: bool, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """conv4_4 has the clients 0 and 3, here with 30 and 10 images: (30 a + 10 b) / 40. The target, written out, is
    the mean over all four clients of the softmax of their cosines."""
    setup, strategy, replies = first(*PAPER, tmp_path=tmp_path)
    strategy.weighted = weighted
    sent = [dict(Upload.from_message(reply).arrays) for reply in replies]
    for reply, arrays, num_images in zip(replies, sent, (30, 5, 7, 10), strict=True):
        declare(reply, arrays, num_images)
    given: dict[str, dict[str, np.ndarray]] = {}
    targets: list[Target] = []

    def spy(student: Model, target: Target, *_: Any, **__: Any) -> dict[str, float]:
        family = FAMILIES[len(given)]
        given[family] = {f"{family}/{name}": value.numpy().copy() for name, value in model_state(student).items()}
        targets.append(target)
        return {"loss": 0.0}

    monkeypatch.setattr("fedssl.federation.server.distill", spy)
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert metrics is not None
    assert metrics["teacher_passes"] == 4 * 24
    assert_same(given["conv4_2"], sent[1])
    assert_same(given["tiny"], sent[2])
    for name, mean in given["conv4_4"].items():
        by_hand = share * sent[0][name].astype(np.float64) + (1 - share) * sent[3][name]
        np.testing.assert_array_equal(mean, by_hand.astype(np.float32))
    assert arrays is not None  # the spy taught them nothing
    assert_same(numpy_of(arrays), given["conv4_4"] | given["conv4_2"] | given["tiny"])

    expected = np.zeros((24, 24))
    images = setup.views.plain(setup.public_set.images.take(np.arange(24)))
    for partition, weights in enumerate(sent):
        family = FAMILIES[partition % 3]
        model = setup.build_model(family)
        load_state(model, {k.removeprefix(f"{family}/"): torch.from_numpy(v.copy()) for k, v in weights.items()})
        with torch.no_grad():
            z = model.eval()(images).double().numpy()
        z /= np.linalg.norm(z, axis=1, keepdims=True)
        p = np.exp(z @ z.T / 0.1)
        expected += p / p.sum(axis=1, keepdims=True) / 4
    everything = torch.arange(24)
    np.testing.assert_allclose(targets[0](everything, everything).numpy(), expected, atol=1e-5)


def test_what_a_student_has_learned_is_the_distillation_of_that_mean(tmp_path: Path) -> None:
    """Client 3 sends twice what client 0 does, so that with equal sizes the mean is 1.5 times that; the update is
    `distill` from there, bit for bit."""
    setup, strategy, replies = first("distill.feature_weight=0.5", tmp_path=tmp_path)
    sent = dict(Upload.from_message(replies[0]).arrays)
    declare(replies[0], sent, 8)
    declare(replies[3], {name: 2 * value for name, value in sent.items()}, 8)
    learned, _ = strategy.aggregate_train(1, replies)
    assert learned is not None

    student = setup.build_model("conv4_4")
    mean = {name.removeprefix("conv4_4/"): torch.from_numpy(np.float32(1.5) * value) for name, value in sent.items()}
    load_state(student, mean)
    targets: list[Target] = []

    def keep(_student: Model, target: Target, *_: Any, **__: Any) -> dict[str, float]:
        targets.append(target)
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedssl.federation.server.distill", keep)
        strategy.aggregate_train(1, replies)
    distill(
        student,
        targets[0],
        setup.public_set.images,
        distillation=strategy.distillation,
        views=setup.views,
        seed=derive_seed(0, "distillation/conv4_4", 1),
        round_num=1,
        num_rounds=2,
        device=torch.device("cpu"),
    )
    expected = {f"conv4_4/{name}": value.numpy() for name, value in model_state(student).items()}
    assert_same({k: v for k, v in numpy_of(learned).items() if k.startswith("conv4_4/")}, expected)


def test_a_student_without_clients_goes_on_from_where_it_was(tmp_path: Path) -> None:
    """It heads the report here; nothing of it travels, and averaging never touches it."""
    overrides = (*WIDE, "federation.report_family=wide")
    summary = simulation.run(small(tmp_path / "run", "strategy=feddf", *overrides))
    assert summary["families"]["wide"]["num_clients"] == 0
    without = simulation.run(small(tmp_path / "without", "strategy=feddf"))
    assert summary["uplink_bytes"] == without["uplink_bytes"]
    assert summary["downlink_bytes"] == without["downlink_bytes"]
    weight = "backbone.0.weight"
    initial = model_state(Setup(small(None, *overrides)).build_model("wide"))[weight].numpy()
    assert not np.array_equal(final_arrays(tmp_path / "run")[f"wide/{weight}"], initial)
    _, strategy, replies = first(*overrides, tmp_path=tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedssl.federation.server.distill", lambda *_, **__: {})
        arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    np.testing.assert_array_equal(arrays[f"wide/{weight}"].numpy(), initial)


def test_a_family_that_nobody_answered_for_still_learns(tmp_path: Path) -> None:
    setup, strategy, replies = first(tmp_path=tmp_path)
    arrays, _ = strategy.aggregate_train(1, replies[:2])
    assert arrays is not None
    initial = numpy_of(setup.server().initial_arrays())
    assert not np.array_equal(arrays["tiny/backbone.conv.weight"].numpy(), initial["tiny/backbone.conv.weight"])


def test_without_a_usable_upload_nothing_changes(tmp_path: Path) -> None:
    setup, strategy, _ = first(tmp_path=tmp_path)
    arrays, metrics = strategy.aggregate_train(1, [])
    assert arrays is not None
    assert metrics is None
    assert_same(numpy_of(arrays), numpy_of(setup.server().initial_arrays()))


def test_the_public_set_is_embedded_once_a_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our loop checks a reply before it aggregates; the model runs in one of the two."""
    _, strategy, replies = first(tmp_path=tmp_path)
    for reply in replies:
        strategy.check(reply)

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("fedssl.federation.server.embed", again)
    assert strategy.aggregate_train(1, replies)[0] is not None


def test_bytes_are_fedavgs(tmp_path: Path) -> None:
    sent = {}
    for strategy in ("feddf", "fedavg"):
        run_dir = tmp_path / strategy
        simulation.run(small(run_dir, f"strategy={strategy}", "federation.num_rounds=1"))
        sent[strategy] = [row["metrics"]["uplink_bytes"] for row in rows(run_dir, "client")]
    assert sent["feddf"] == sent["fedavg"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["distill.student_init=scratch"],
            r"feddf starts every student from its family's mean, got .*=scratch",
        ),
        (["distill.student_init=public_only"], r"got distill\.student_init=public_only: leave it out"),
        (["ensemble=krum"], r"ensemble=krum with num_byzantine=1 needs 5 clients"),
        (["ensemble=row", "distill.loss=cka"], r"distill\.loss=cka learns from a kernel"),
    ],
)
def test_settings_that_do_not_go_together(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_strategy(Setup(small(None, "strategy=feddf", *overrides)))
