"""FLESD's switches: families without clients, what comes down, where students start, what each client trains with."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import ConfigRecord
from torch import Tensor

from fedssl.config import conf_dir
from fedssl.distill import Distiller
from fedssl.errors import ConfigError
from fedssl.federation import simulation
from fedssl.federation.client import own_model
from fedssl.federation.grids.in_process import torch_threads
from fedssl.federation.records import family_state, model_state
from fedssl.federation.setup import Setup
from fedssl.federation.simulation import build_strategy
from fedssl.federation.store import ClientStore
from fedssl.methods.info_nce import InfoNCE
from fedssl.methods.simclr import SimCLR
from fedssl.similarity import Similarity
from strategies.flesd import FLESD
from tests.federation_helpers import (
    FAMILIES,
    Tiny,
    assert_same,
    final_arrays,
    first_round,
    numpy_of,
    open_in_process,
    rows,
    run_interrupted,
    sabotaged,
    small,
    without_clock,
)

WIDE = (
    "+models.wide={_target_: fedssl.models.backbones.Conv4, width: 6}",
    "federation.server_families=[wide]",
)


# --- every codec and every rule, from a client's training to a student's weights ---
CODECS = sorted(path.stem for path in (conf_dir() / "codec").glob("*.yaml"))
RULES = sorted(path.stem for path in (conf_dir() / "ensemble").glob("*.yaml"))


@pytest.mark.parametrize("codec", CODECS)
def test_a_round_with_every_codec(codec: str, tmp_path: Path) -> None:
    """The bytes that are counted are those that the codec states, and the names and numbers around them."""
    overrides = (f"codec={codec}", "codec.dtype=int8", "embedding=projector", "federation.num_rounds=1")
    config = small(tmp_path / "run", "strategy=flesd", *overrides)
    assert simulation.run(config)["status"] == "completed"
    stated = build_strategy(Setup(config)).codec.num_bytes(24, 8)  # type: ignore[attr-defined]
    for row in rows(tmp_path / "run", "client"):
        assert stated < row["metrics"]["uplink_bytes"] < stated + 900
    learned = [row["metrics"]["tiny/loss"] for row in rows(tmp_path / "run", "server")]
    assert np.isfinite(learned).all()


@pytest.mark.parametrize("rule", RULES)
def test_a_round_with_every_rule(rule: str, tmp_path: Path) -> None:
    more = {"krum": ["ensemble.num_byzantine=0"], "cka_kernel": ["distill.loss=cka"]}.get(rule, [])
    setup, strategy, _, replies = first_round(small(None, "strategy=flesd", f"ensemble={rule}", *more), tmp_path)
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert metrics is not None
    assert np.isfinite(metrics["tiny/loss"])
    initial = setup.server().initial_arrays()
    assert any(not np.array_equal(array.numpy(), initial[name].numpy()) for name, array in arrays.items())


@pytest.mark.parametrize("loss", ["kl", "js", "reverse_kl"])
def test_other_losses_learn_other_weights(loss: str, tmp_path: Path) -> None:
    """And KL the same as cross-entropy: they differ by a constant."""
    weights = []
    for name in ("ce", loss):
        _, strategy, _, replies = first_round(small(None, "ensemble=row", f"distill.loss={name}"), tmp_path)
        arrays, _ = strategy.aggregate_train(1, replies)
        assert arrays is not None
        weights.append(arrays["tiny/backbone.conv.weight"].numpy())
    assert np.allclose(*weights, rtol=0, atol=2e-5) == (loss == "kl")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["codec=dense", "codec.max_bytes=1000", "embedding=projector"],
            r"codec=dense needs 1,152 bytes .* codec=factor codec\.dtype=fp16",
        ),
        (["codec=sharpened", "ensemble=median"], r"codec=sharpened needs a rule that sums masses"),
        (
            ["codec=sharpened", "codec.num_anchors=8", "distill.own_key=false"],
            r"only 8 of 24 public images",
        ),
        (
            ["downlink=similarity", "embedding=projector"],
            r"its projector would have nothing to say: set embedding=backbone",
        ),
        (
            ["codec=sharpened", "distill.epochs=2", "distill.target_temperature_end=0.2"],
            r"codec=sharpened: the clients sharpen at distill\.target_temperature",
        ),
        (["codec=sharpened", "codec.temperature=0.5"], r"codec\.temperature=0\.5, and the server"),
        (["client.methods=[simclr,3]"], r"client\.methods must be a list of names of conf/method, .* got 3"),
        (["strategy=fedavg", "codec.dtype=fp99"], r"codec\.dtype must be one of"),
        (["strategy=fedavg", "distill.loss=mse"], r"distill\.loss must be one of"),
        (
            ["strategy=public_only", "ensemble=row", "distill.warmup=every_epoch", "distill.queue_size=24"],
            r"no gradient step is left",
        ),
        (["distill.loss=kl"], r"distill\.loss=kl learns from rows that sum to 1, .* choose ensemble=row"),
        (
            ["ensemble=row", "distill.loss=cka"],
            r"distill\.loss=cka learns from a kernel, .* choose ensemble=cka_kernel",
        ),
        (["ensemble=row", "distill.warmup=every_epoch", "distill.queue_size=24"], r"no gradient step is left"),
        (["distill.warmup=every_epoch"], r"distill\.loss=coordinates has no queue, .* ensemble=row has one"),
        (["ensemble=krum"], r"ensemble=krum with num_byzantine=1 needs 5 clients"),
        (["codec=topk", "codec.k=0"], r"codec\.k must be at least 1"),
        (["codec=topk", "codec.k=24"], r"codec\.k=24 entries a row, but an image has only 23 others among 24"),
    ],
)
def test_settings_that_do_not_go_together_are_said_before_any_work(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        simulation.run(small(tmp_path / "run", "strategy=flesd", *overrides))
    assert not (tmp_path / "run").exists()


def test_anchors_of_a_few_images(tmp_path: Path) -> None:
    """codec=sharpened with fewer anchors than public images: the queue holds each of them."""
    overrides = ("codec=sharpened", "codec.num_anchors=16", "federation.num_rounds=1")
    simulation.run(small(tmp_path / "run", "strategy=flesd", *overrides))
    (row,) = rows(tmp_path / "run", "server")
    assert row["metrics"]["tiny/num_anchors"] == 16


def test_a_client_cannot_claim_its_size(tmp_path: Path) -> None:
    """`size` and the family's mean weigh by what the client said before the first round, not by its upload."""
    config = small(None, "strategy=flesd", "ensemble=size")
    _, strategy, _, replies = first_round(config, tmp_path)
    lying = sabotaged(config, "a million images", round_num=1, partitions=[1])
    _, _, _, lies = first_round(lying, tmp_path)
    honest, _ = strategy.aggregate_train(1, replies)
    other, _ = strategy.aggregate_train(1, lies)
    assert honest is not None
    assert other is not None
    assert_same(numpy_of(honest), numpy_of(other))


# --- families without clients ---
def test_a_student_that_no_client_runs(tmp_path: Path) -> None:
    """It learns from the same ensemble, is evaluated and saved; nothing of it goes to a client."""
    summary = simulation.run(small(tmp_path / "run", "strategy=flesd", *WIDE))
    assert list(summary["families"]) == [*FAMILIES, "wide"]
    assert summary["families"]["wide"]["num_clients"] == 0
    assert summary["report_family"] == "conv4_4"  # the largest that clients train
    assert (tmp_path / "run" / "models" / "wide.safetensors").exists()
    without = simulation.run(small(tmp_path / "without", "strategy=flesd"))
    assert summary["downlink_bytes"] == without["downlink_bytes"]
    arrays, initial = final_arrays(tmp_path / "run"), Setup(small(None, *WIDE)).build_model("wide")
    weight = "backbone.0.weight"
    assert not np.array_equal(arrays[f"wide/{weight}"], model_state(initial)[weight].numpy())


def test_a_student_without_clients_can_head_the_report(tmp_path: Path) -> None:
    """Then its fair control trains it on every shard, and averaging has nothing to say."""
    overrides = (*WIDE, "federation.report_family=wide")
    assert "knn_top1" in simulation.run(small(tmp_path / "flesd", "strategy=flesd", *overrides))
    local = simulation.run(small(tmp_path / "local", "strategy=local_only", *overrides))
    assert local["families"]["wide"]["num_clients"] == 4
    with pytest.raises(ConfigError, match=r"no client is of federation\.report_family=wide: choose one of conv4_4"):
        build_strategy(Setup(small(None, "strategy=fedavg", *overrides)))


def test_averaging_has_no_model_of_a_family_without_clients(tmp_path: Path) -> None:
    assert list(simulation.run(small(tmp_path / "run", "strategy=fedavg", *WIDE))["families"]) == list(FAMILIES)


def test_an_unknown_server_family() -> None:
    with pytest.raises(ConfigError, match=r"federation\.server_families names the architecture 'huge'; known are"):
        _ = Setup(small(None, "federation.server_families=[huge]")).federation


# --- what comes down ---
@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Downlink -> the directory of its run of three rounds, made once."""
    runs: dict[str, Path] = {}

    def of(downlink: str) -> Path:
        if downlink not in runs:
            runs[downlink] = tmp_path_factory.mktemp("runs") / downlink
            simulation.run(small(runs[downlink], "strategy=flesd", f"downlink={downlink}", "federation.num_rounds=3"))
        return runs[downlink]

    return of


@pytest.mark.parametrize("downlink", ["similarity", "none"])
def test_clients_keep_their_models(downlink: str, kept: Any) -> None:
    """What each goes on with is what it had, not the family's global model."""
    for partition in range(4):
        memory = ClientStore(kept(downlink) / "clients").read(partition, before=9)
        family = FAMILIES[partition % 3]
        own = {name: value.numpy() for name, value in own_model(memory, family).items()}
        assert len(own) == len(memory)
        assert own.keys() == model_state(Setup(small(None)).build_model(family)).keys()
        globally = {k.removeprefix(f"{family}/"): v for k, v in final_arrays(kept(downlink)).items()}
        assert any(not np.array_equal(own[name], globally[name]) for name in own)
    assert not ClientStore(kept("weights") / "clients").read(0, before=9)


def test_a_similarity_comes_down_from_the_second_round_on(kept: Any) -> None:
    """Round 1 has no student worth hearing; later each client distils the student's similarities, then trains."""
    client = rows(kept("similarity"), "client")
    assert ["distill_loss" in row["metrics"] for row in client] == [False] * 4 + [True] * 8
    down = [row["metrics"]["downlink_bytes"] for row in rows(kept("similarity"), "server")]
    nothing = [row["metrics"]["downlink_bytes"] for row in rows(kept("none"), "server")]
    assert down[0] == nothing[0]
    assert down[1] == down[2] > nothing[1] + 4 * 24 * 8 * 2  # 24 images, 8 dimensions, 2 bytes
    weights = [row["metrics"]["downlink_bytes"] for row in rows(kept("weights"), "server")]
    assert down[1] < weights[1]


def test_what_comes_down_is_the_report_familys_student(tmp_path: Path) -> None:
    config = small(None, "strategy=flesd", "downlink=similarity")
    setup, strategy, messages, replies = first_round(config, tmp_path)
    assert all(len(message.content["arrays"]) == 0 for message in messages)
    learned, _ = strategy.aggregate_train(1, replies)
    assert isinstance(strategy, FLESD)
    assert learned is not None
    grid = open_in_process(config, tmp_path)
    second = list(strategy.configure_train(2, learned, ConfigRecord(), grid))
    sent = [numpy_of(message.content["arrays"]) for message in second]
    for other in sent[1:]:
        assert_same(sent[0], other)
    student = setup.server().load(learned, setup.report_family)
    z = torch.nn.functional.normalize(setup.server().embed_public(student, "backbone"), dim=1)
    similarity = strategy.codec.decode(sent[0], 24).block(torch.arange(24), torch.arange(24))
    torch.testing.assert_close(similarity, z @ z.T, atol=2e-3, rtol=0)


@pytest.mark.parametrize("downlink", ["similarity", "none"])
def test_resume_with_models_that_clients_keep(
    downlink: str, kept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path / "run", "strategy=flesd", f"downlink={downlink}", "federation.num_rounds=3")
    run_interrupted(config, monkeypatch, before_round=2)
    resumed = simulation.resume(config, tmp_path / "run")
    assert_same(final_arrays(tmp_path / "run"), final_arrays(kept(downlink)))
    assert rows(tmp_path / "run") == rows(kept(downlink))
    assert without_clock(resumed) == without_clock(json.loads((kept(downlink) / "summary.json").read_text()))


def test_similarities_of_the_backbone(tmp_path: Path) -> None:
    """What is sent are cosines of standardised features, whatever their number; the projector's are others."""
    overrides = ("strategy=flesd", "embedding=backbone", "codec.dtype=fp32")
    setup, strategy, _, replies = first_round(small(None, *overrides), tmp_path)
    assert isinstance(strategy, FLESD)
    everything = torch.arange(24)
    for partition, reply in enumerate(replies):
        client = setup.client(partition, 1)
        model = setup.build_model(client.family)
        client.train(model, epochs=setup.local.local_epochs)
        with torch.no_grad():
            features = model.backbone(setup.views.plain(setup.public_set.images.take(everything)))
        features = (features - features.mean(dim=0)) / features.std(dim=0, correction=0).clamp_min(1e-12)
        features[:, features.isnan().any(dim=0)] = 0
        z = torch.nn.functional.normalize(features, dim=1)
        _, sent = strategy.check(reply)
        assert isinstance(sent, Similarity)
        torch.testing.assert_close(sent.block(everything, everything), z @ z.T, atol=1e-3, rtol=0)


@pytest.mark.parametrize("downlink", ["weights", "similarity"])
def test_students_learn_the_coordinates_of_the_ensemble(downlink: str, tmp_path: Path) -> None:
    """Two rounds; a run of the same seed with the paper's loss ends elsewhere; the projector is left alone."""
    coordinates = ("ensemble=cka_kernel", "distill.loss=coordinates", "embedding=backbone")
    config = small(tmp_path / "a", "strategy=flesd", f"downlink={downlink}", "federation.num_rounds=2", *coordinates)
    summary = simulation.run(config)
    assert summary["status"] == "completed"
    losses = [row["metrics"]["conv4_4/loss"] for row in rows(tmp_path / "a", "server")]
    assert all(0 < loss < 2 for loss in losses)
    initial = numpy_of(Setup(config).server().initial_arrays())
    for name, final in final_arrays(tmp_path / "a").items():
        assert np.array_equal(final, initial[name]) == ("/projector." in name), name


@pytest.mark.parametrize("strategy", ["flesd", "placebo", "public_only", "fedavg"])
def test_an_unknown_embedding(strategy: str) -> None:
    with pytest.raises(ConfigError, match=r"embedding must be one of projector, backbone, got 'head'"):
        Setup(small(None, f"strategy={strategy}", "embedding=head")).check()


@pytest.mark.parametrize("strategy", ["flesd", "placebo", "public_only", "fedavg"])
def test_an_unknown_downlink(strategy: str) -> None:
    with pytest.raises(ConfigError, match=r"downlink must be one of weights, similarity, none, got 'all'"):
        Setup(small(None, f"strategy={strategy}", "downlink=all")).check()


@pytest.mark.parametrize("dropout", [False, True])
def test_students_that_learn_at_once_learn_the_same(
    dropout: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where they draw from torch's one global generator, which lets one thread in at a time."""
    threads_of: dict[int, set[int]] = {1: set(), 2: set()}
    step, forward = Distiller.step, Tiny.forward

    def noted(self: Distiller, rows: Tensor) -> dict[str, Tensor]:
        threads_of[threads].add(threading.get_ident())
        return step(self, rows)

    monkeypatch.setattr(Distiller, "step", noted)
    if dropout:
        monkeypatch.setattr(Tiny, "forward", lambda self, x: F.dropout(forward(self, x), 0.5, self.training))
    learned = []
    for threads in (1, 2):
        _, strategy, _, replies = first_round(small(None, "strategy=flesd"), tmp_path / str(threads))
        with torch_threads(threads):
            arrays, metrics = strategy.aggregate_train(1, replies)
        assert arrays is not None
        assert metrics is not None
        learned.append((numpy_of(arrays), without_clock(metrics)))
    assert threads_of[1] == {threading.get_ident()}
    assert len(threads_of[2]) == 2
    assert equal(learned[0][0], learned[1][0])
    assert learned[0][1] == learned[1][1]


# --- where students start ---
def starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, init: str, *more: str) -> tuple[Any, ...]:
    """Setup, messages, replies, and for each family what `distill` is given as student and as reference."""
    given: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    families = iter(FAMILIES)

    def spy(student: Any, *_: Any, reference: Any, **__: Any) -> dict[str, float]:
        copies = [{k: v.clone() for k, v in model_state(model).items()} for model in (student, reference)]
        given[next(families)] = (copies[0], copies[1])
        return {"loss": 0.0}

    config = small(None, "strategy=flesd", f"distill.student_init={init}", *more)
    setup, strategy, messages, replies = first_round(config, tmp_path)
    monkeypatch.setattr("fedssl.federation.server.distill", spy)
    strategy.aggregate_train(1, replies)
    return setup, messages, replies, given


def equal(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(np.asarray(a[name]), np.asarray(b[name])) for name in a)


@pytest.mark.parametrize("init", ["previous", "scratch"])
def test_students_go_on_or_start_anew(init: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a second round the two differ: `previous` is what the first round learned."""
    config = small(None, "strategy=flesd", f"distill.student_init={init}")
    setup, strategy, _, replies = first_round(config, tmp_path)
    learned, _ = strategy.aggregate_train(1, replies)
    assert isinstance(strategy, FLESD)
    assert learned is not None
    strategy.arrays = learned
    student, before = (model_state(model) for model in strategy._student("tiny", []))
    initial = model_state(setup.build_model("tiny"))
    assert equal(before, family_state(learned, "tiny"))
    assert equal(student, initial if init == "scratch" else before)
    assert not equal(before, initial)


def test_students_that_start_from_the_familys_mean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setup, _, replies, given = starts(monkeypatch, tmp_path, "fedavg_of_family")
    sent = [{k: a.numpy() for k, a in reply.content["arrays"].items()} for reply in replies]
    sizes = [len(setup.data.partitions[p]) for p in range(4)]
    student, reference = given["conv4_4"]  # of partitions 0 and 3
    for name, value in student.items():
        by_hand = (sizes[0] * sent[0][f"conv4_4/{name}"] + sizes[3] * sent[3][f"conv4_4/{name}"]) / (
            sizes[0] + sizes[3]
        )
        np.testing.assert_allclose(value.numpy(), by_hand, rtol=1e-5, atol=1e-7)
    assert equal(given["tiny"][0], {k.removeprefix("tiny/"): v for k, v in sent[2].items() if k.startswith("tiny/")})
    assert equal(reference, model_state(setup.build_model("conv4_4")))


def test_placebo_starts_students_from_untrained_means(tmp_path: Path) -> None:
    overrides = ("strategy=placebo", "distill.student_init=fedavg_of_family")
    assert simulation.run(small(tmp_path / "run", *overrides))["status"] == "completed"


def test_students_and_clients_that_start_from_public_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setup, messages, _, given = starts(monkeypatch, tmp_path, "public_only", "distill.init_epochs=2")
    for partition, message in enumerate(messages):
        family = FAMILIES[partition % 3]
        broadcast = family_state(message.content["arrays"], family)
        assert equal(broadcast, given[family][0])
        assert not equal(broadcast, model_state(setup.build_model(family)))


def test_public_only_makes_up_for_the_pre_training(tmp_path: Path) -> None:
    """Equal steps over the run: the control takes in round 1 what `distill.init_epochs` gave the student."""

    def steps(*overrides: str) -> list[float]:
        run_dir = tmp_path / str(len(list(tmp_path.iterdir())))
        simulation.run(small(run_dir, "strategy=public_only", *overrides))
        return [row["metrics"]["tiny/steps"] for row in rows(run_dir, "server")]

    plain, more = steps(), steps("distill.student_init=public_only", "distill.init_epochs=4")
    assert more[0] >= plain[0] + 4 * (24 // 8)
    assert more[1] == plain[1]


# --- what each client trains with ---
def test_a_method_for_each_client(tmp_path: Path) -> None:
    setup = Setup(small(tmp_path / "run", "client.methods=[info_nce,simclr]", "method=simclr"))
    assert [type(setup.client(p, 1).method) for p in range(4)] == [InfoNCE, SimCLR, InfoNCE, SimCLR]
    assert isinstance(setup.server().method, SimCLR)
    assert simulation.run(dict(setup.config))["status"] == "completed"


def test_an_unknown_method_of_a_client() -> None:
    with pytest.raises(ConfigError, match=r"client\.methods: method=simlcr: there is no such choice"):
        small(None, "client.methods=[simlcr]")


def test_a_clients_method_has_the_numbers_of_the_command_line() -> None:
    config = small(None, "client.methods=[info_nce,simclr]", "method=info_nce", "method.temperature=0.3")
    assert [method["temperature"] for method in config["client"]["methods"]] == [0.3, 0.5]


def test_public_only_matches_a_queue_of_few_anchors(tmp_path: Path) -> None:
    """codec=sharpened fills and refreshes a queue of its own size; the control's images are counted against that."""
    overrides = ("codec=sharpened", "codec.num_anchors=20", "federation.num_rounds=1", "evaluate.every=9")
    for strategy in ("flesd", "public_only"):
        simulation.run(small(tmp_path / strategy, f"strategy={strategy}", *overrides))
    student, control = (rows(tmp_path / name, "server")[0]["metrics"] for name in ("flesd", "public_only"))
    assert control["tiny/image_passes"] >= student["tiny/image_passes"]
