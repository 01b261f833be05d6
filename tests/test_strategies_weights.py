"""The strategies that exchange weights: what each does to them, by hand; and that all do it with a target network."""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import get_class
from torch import Tensor, nn

from fedssl.errors import ConfigError, FedSSLError, PayloadError
from fedssl.federation import simulation
from fedssl.federation.client import Broadcast, Client
from fedssl.federation.per_family import WeightUploads
from fedssl.federation.records import Header, Upload, family_state, model_state, to_arrays
from fedssl.federation.setup import Setup
from fedssl.federation.simulation import build_strategy
from fedssl.federation.store import ClientStore
from fedssl.federation.weights import has_grown, largest_entries, mean_weights
from fedssl.models import Model
from strategies.fedavg import FedAvg
from strategies.fedema import SCALE, FedEMAClient, encoder_distance
from strategies.fedprox import FedProxClient, proximal_term
from strategies.fedu import FedUClient, layers, mean_distance
from strategies.l_dawa import LDAWA, agreement
from tests.federation_helpers import (
    FAMILIES,
    ONE_OF_EACH_KIND,
    SERVERS,
    WITH_CLIENTS,
    Numpy,
    assert_same,
    final_arrays,
    first_round,
    lie,
    numpy_of,
    rows,
    run_interrupted,
    sabotaged,
    slow_unless,
    small,
)

BYOL = ("method=byol", "method.predictor_dim=8")
WEIGHT_STRATEGIES = ("fedavg", "fedprox", "fedu", "fedema", "l_dawa")


def run(run_dir: Path, *overrides: str) -> Numpy:
    """The global weights after a small run."""
    simulation.run(small(run_dir, *overrides, "evaluate.every=9"))
    return final_arrays(run_dir)


def memory_of(run_dir: Path, partition: int, *, before: int = 9) -> Numpy:
    """What a client keeps."""
    kept = ClientStore(run_dir / "clients").read(partition, before=before)
    return {name: value.numpy() for name, value in kept.items()}


# --- with a target network ---
@pytest.mark.parametrize("strategy", WEIGHT_STRATEGIES)
def test_byol_interrupted_and_resumed_equals_byol(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, rows and the clients' memories, bit for bit, where one client of four sits out every round."""
    overrides = (f"strategy={strategy}", *BYOL, "federation.cohort_size=3", "federation.num_rounds=4")
    straight = run(tmp_path / "straight", *overrides)
    config = small(tmp_path / "resumed", *overrides, "evaluate.every=9")
    run_interrupted(config, monkeypatch, before_round=3)
    simulation.resume(config, tmp_path / "resumed")
    assert_same(final_arrays(tmp_path / "resumed"), straight)
    assert rows(tmp_path / "resumed") == rows(tmp_path / "straight")
    assert all(np.isfinite(array).all() for array in straight.values())
    came: dict[int, list[int]] = {}
    for row in rows(tmp_path / "straight", "client"):
        came.setdefault(row["partition"], []).append(row["round"])
        assert all(value is not None and math.isfinite(value) for value in row["metrics"].values())
    assert any(b - a > 1 for its in came.values() for a, b in itertools.pairwise(its))  # sat out, came back
    for partition in came:
        memory = memory_of(tmp_path / "straight", partition)
        assert_same(memory_of(tmp_path / "resumed", partition), memory)
        assert any(name.startswith(f"method/{FAMILIES[partition % 3]}/backbone") for name in memory)


@pytest.mark.parametrize("strategy", WEIGHT_STRATEGIES)
def test_an_upload_is_the_model_and_no_target_network(strategy: str, tmp_path: Path) -> None:
    setup, _, _, replies = first_round(small(None, f"strategy={strategy}", *BYOL), tmp_path)
    for partition, reply in enumerate(replies):
        family = FAMILIES[partition % 3]
        own = {f"{family}/{name}" for name in model_state(setup.build_model(family))}
        assert Upload.from_message(reply).arrays.keys() == own
        assert f"{family}/heads.predictor.out.weight" in own
        target = {name for name in memory_of(tmp_path, partition) if name.startswith(f"method/{family}/")}
        assert target  # which there is, but it stays


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedu", "fedema"])
def test_a_cohorts_mean_is_over_the_cohort(strategy: str, tmp_path: Path) -> None:
    """Shares are of those who came: of conv4_4's two clients both, or the one that did; others' weights stay."""
    setup, server_half, _, replies = first_round(
        small(None, f"strategy={strategy}", *BYOL, "federation.cohort_size=2", "partition=dirichlet"), tmp_path
    )
    merged, _ = server_half.aggregate_train(1, replies)
    assert merged is not None
    uploads = [Upload.from_message(reply) for reply in replies]
    assert len(uploads) == 2
    for family in FAMILIES:
        its = [upload for upload in uploads if upload.header.family == family]
        total = sum(upload.num_images for upload in its)
        for name, initial in model_state(setup.build_model(family)).items():
            key = f"{family}/{name}"
            mean = sum(upload.num_images / total * upload.arrays[key].astype(np.float64) for upload in its)
            np.testing.assert_allclose(merged[key].numpy(), mean if its else initial.numpy(), rtol=1e-5, atol=1e-8)


# --- what overflows ---
EXCHANGE_WEIGHTS = [name for name in WITH_CLIENTS if issubclass(get_class(SERVERS[name]), WeightUploads)]


@pytest.mark.parametrize("strategy", slow_unless(ONE_OF_EACH_KIND, EXCHANGE_WEIGHTS))
def test_a_model_that_overflows_is_refused_and_the_rest_used(strategy: str, tmp_path: Path) -> None:
    """A mean with it would end the run, and a server's Adam would stand still from then on."""
    _, server_half, _, replies = first_round(small(None, f"strategy={strategy}"), tmp_path)
    assert isinstance(server_half, WeightUploads)
    without, _ = server_half.aggregate_train(1, replies[1:])
    replies[0].content["arrays"] = lie(Upload.from_message(replies[0]), "huge").to_content()["arrays"]
    with pytest.raises(PayloadError, match="the model makes NaN or infinity of public images"):
        server_half.check(replies[0])
    merged, _ = server_half.aggregate_train(1, replies)
    assert merged is not None
    assert without is not None
    assert_same(numpy_of(merged), numpy_of(without))


def test_a_refused_upload_is_in_the_rounds_report(tmp_path: Path) -> None:
    config = small(tmp_path / "run", "strategy=fedavg", "federation.num_rounds=3", "evaluate.every=1")
    simulation.run(sabotaged(config, "huge", round_num=2, partitions=[3]))
    by_round = [row["metrics"] for row in rows(tmp_path / "run", "round")]
    assert [(row["num_ok"], row["num_refused"]) for row in by_round] == [(4, 0), (3, 1), (4, 0)]
    reason = "the model makes NaN or infinity of public images"
    assert by_round[1]["failures"] == [{"partition": 3, "kind": "refused", "reason": reason}]
    assert [row["partition"] for row in rows(tmp_path / "run", "client") if row["round"] == 2] == [0, 1, 2]


def test_heads_are_tried_out_too() -> None:
    """A predictor travels, and the next round's clients would train with it."""
    server = Setup(small(None, *BYOL)).server()
    state = model_state(server.build_model("conv4_4"))
    server.try_out("conv4_4", state)
    state["heads.predictor.out.bias"] = torch.full_like(state["heads.predictor.out.bias"], math.inf)
    with pytest.raises(PayloadError, match="the model makes NaN or infinity of public images"):
        server.try_out("conv4_4", state)


def test_weights_that_honest_training_brings_back_do_not_end_the_run(tmp_path: Path) -> None:
    """They pass the check, and make batch norm's averages large in everybody's next round."""
    overrides = ("strategy=fedavg", "federation.families=[conv4_4]", "federation.num_rounds=3")
    simulation.run(sabotaged(small(tmp_path / "run", *overrides), "large", round_num=1, partitions=[3]))
    by_round = [row["metrics"] for row in rows(tmp_path / "run", "round")]
    assert [row["num_ok"] for row in by_round] == [4, 4, 4]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda merged: {name: value.double() for name, value in merged.items()}, "is float64"),
        (lambda merged: dict(list(merged.items())[1:]), "its weights are not those of"),
    ],
)
def test_a_merge_that_returns_something_else_is_an_error_that_names_the_strategy(
    wrong: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a lost round: it would be lost for good."""
    merge = FedAvg.merge
    monkeypatch.setattr(FedAvg, "merge", lambda self, *args: wrong(merge(self, *args)))
    _, server_half, _, replies = first_round(small(None, "strategy=fedavg"), tmp_path)
    with pytest.raises(FedSSLError, match=f"FedAvg made something else than weights of conv4_4: .*{message}"):
        server_half.aggregate_train(1, replies)


def test_parameters_may_be_returned_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = FedAvg.merge
    wrapped = lambda self, *args: {name: nn.Parameter(value) for name, value in merge(self, *args).items()}  # noqa: E731
    _, server_half, _, replies = first_round(small(None, "strategy=fedavg"), tmp_path)
    plain, _ = server_half.aggregate_train(1, replies)
    monkeypatch.setattr(FedAvg, "merge", wrapped)
    merged, _ = server_half.aggregate_train(1, replies)
    assert plain is not None
    assert merged is not None
    assert_same(numpy_of(merged), numpy_of(plain))


def test_means_of_no_use_lose_the_round_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients may send weights that only together are of no use."""
    merge = FedAvg.merge

    def overflowing(self: FedAvg, family: str, *args: Any) -> Mapping[str, Tensor]:
        merged = merge(self, family, *args)
        if family == "conv4_4" and self.round_num == 2:
            return {name: torch.full_like(value, 9e9) for name, value in merged.items()}
        return merged

    monkeypatch.setattr(FedAvg, "merge", overflowing)
    summary = simulation.run(small(tmp_path / "run", "strategy=fedavg", "federation.num_rounds=3", "evaluate.every=1"))
    assert summary["status"] == "completed"
    assert any(note.startswith("conv4_4 kept its weights in 1 of the rounds (2)") for note in summary["notes"])
    linear = {(row["round"], row["family"]): row["metrics"]["linear_top1"] for row in rows(tmp_path / "run", "eval")}
    assert linear[2, "conv4_4"] == linear[1, "conv4_4"]
    assert linear[3, "conv4_4"] != linear[2, "conv4_4"]
    lost = [row["metrics"].get("conv4_4/lost") for row in rows(tmp_path / "run", "server")]
    assert lost == [None, 1.0, None]


# --- names ---
def test_a_family_may_be_called_as_what_clients_keep_is(tmp_path: Path) -> None:
    """In a client's memory are its model and its method's state; here a family is named after either."""
    memories = []
    for name in ("tiny", "method", "fedema"):
        named = (f"federation.families=[{name}]", f"+models.{name}._target_=tests.federation_helpers.Tiny")
        run(tmp_path / name, "strategy=fedema", *BYOL, *named[: 1 if name == "tiny" else 2])
        kept = memory_of(tmp_path / name, 0)
        memories.append({key.replace(f"/{name}/", "/"): value.shape for key, value in kept.items()})
    assert memories[0] == memories[1] == memories[2]


# --- what is FedAvg in disguise ---
@pytest.fixture(scope="module")
def fedavg(tmp_path_factory: pytest.TempPathFactory) -> Numpy:
    """Weights of FedAvg with BYOL after three rounds."""
    return run(tmp_path_factory.mktemp("runs") / "fedavg", "strategy=fedavg", *BYOL, "federation.num_rounds=3")


@pytest.mark.parametrize(
    ("overrides", "equal"),
    [
        (("strategy=fedprox", "strategy.client.mu=0"), True),
        (("strategy=fedprox",), False),
        (("strategy=fedu", "strategy.client.threshold=inf"), True),
        (("strategy=fedu", "strategy.client.threshold=0"), False),
        (("strategy=fedema", "strategy.client.tau=0"), True),
        (("strategy=fedema", "strategy.client.scale=0"), True),
        (("strategy=fedema",), False),
        (("strategy=l_dawa", "strategy.server.warmup_rounds=3"), True),
        (("strategy=l_dawa",), False),
    ],
    ids=lambda value: "-".join(value).replace("strategy", "") if isinstance(value, tuple) else str(value),
)
def test_the_setting_that_makes_it_fedavg(
    overrides: tuple[str, ...], equal: bool, fedavg: Numpy, tmp_path: Path
) -> None:
    """Bit for bit; and with the shipped setting, or the opposite, it is not."""
    arrays = run(tmp_path / "run", *overrides, *BYOL, "federation.num_rounds=3")
    assert arrays.keys() == fedavg.keys()
    assert equal == all(np.array_equal(arrays[name], fedavg[name]) for name in arrays)
    if equal:
        assert_same(arrays, fedavg)


def test_fedu_without_a_predictor_is_fedavg_and_says_so(tmp_path: Path) -> None:
    assert_same(run(tmp_path / "fedu", "strategy=fedu"), run(tmp_path / "fedavg", "strategy=fedavg"))
    summary = json.loads((tmp_path / "fedu/summary.json").read_text())
    assert "the method has no predictor: here FedU is FedAvg" in summary["notes"]
    assert all("divergence" not in row["metrics"] for row in rows(tmp_path / "fedu", "client"))
    with_predictor = build_strategy(Setup(small(None, "strategy=fedu", *BYOL)))
    assert not any("FedU" in note for note in with_predictor.notes())


# --- clients whose training is known ---
def client_of(client_half: str, *, partition: int = 2) -> tuple[Client, Broadcast]:
    """A client of family `tiny`, and the broadcast of the initial weights."""
    setup = Setup(small(None, f"strategy={client_half}", *BYOL))
    client = setup.client(partition, 1)
    return client, broadcast(model_state(setup.build_model("tiny")))


def broadcast(state: Mapping[str, Tensor]) -> Broadcast:
    return Broadcast(round_num=1, num_rounds=9, family="tiny", arrays=to_arrays({"tiny": state}))


def trains_by(client: Client, change: float) -> list[dict[str, Tensor]]:
    """Let the client's training add `change` to every number of the model; returns the states it starts from."""
    starts: list[dict[str, Tensor]] = []

    def train(model: Model, *, epochs: int, **_: Any) -> dict[str, float]:
        starts.append({name: value.clone() for name, value in model_state(model).items()})
        with torch.no_grad():
            for value in model_state(model).values():
                value.add_(change)
        return {"loss": 0.0}

    client.train = train  # type: ignore[method-assign, assignment]
    return starts


def assert_moved(state: Mapping[str, Tensor], start: Mapping[str, Tensor], by: float, *, part: str = "") -> None:
    """Every weight of `part` is the one of `start` plus a number."""
    names = [name for name in start if name.startswith(part)]
    assert names
    for name in names:
        torch.testing.assert_close(state[name], start[name] + by, rtol=1e-5, atol=1e-6)


def trained_names(client: Client) -> set[str]:
    return {name for name, _ in client.build_model("tiny").named_parameters()}


# --- FedProx ---
def test_the_proximal_term_by_hand() -> None:
    """mu / 2 * (3^2 + 4^2 + 2^2), and its gradient mu * (w - w_global); the head counts as the backbone does."""
    model = Model(nn.Linear(2, 1, bias=False), nn.Identity(), {"predictor": nn.Linear(1, 1, bias=False)})
    backbone, head = model.backbone.weight, model.heads["predictor"].weight  # type: ignore[union-attr]
    with torch.no_grad():
        backbone.copy_(torch.tensor([[1.0, 2.0]]))  # type: ignore[operator]
        head.fill_(5.0)  # type: ignore[operator]
    term = proximal_term(model, 0.5)
    x = torch.zeros(1, 2)
    assert term(model, x, x) == 0
    with torch.no_grad():
        backbone.add_(torch.tensor([[3.0, 4.0]]))  # type: ignore[operator]
        head.sub_(2.0)  # type: ignore[operator]
    value = term(model, x, x)
    value.backward()  # type: ignore[no-untyped-call]
    assert value == 0.5 / 2 * 29
    torch.testing.assert_close(backbone.grad, torch.tensor([[1.5, 2.0]]))
    torch.testing.assert_close(head.grad, torch.tensor([[-1.0]]))


def test_the_proximal_term_leaves_running_averages_alone() -> None:
    model = Model(nn.BatchNorm1d(2), nn.Identity()).train()
    term = proximal_term(model, 1.0)
    model.backbone(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    assert model.backbone.running_mean[0] != 0  # type: ignore[index, union-attr]
    assert term(model, torch.zeros(1, 2), torch.zeros(1, 2)) == 0


def test_a_larger_mu_stays_nearer() -> None:
    """Trained for real: the distance from the broadcast falls with mu."""
    distances = []
    for mu in (0.0, 1.0, 100.0):
        client, initial = client_of("fedprox")
        upload = FedProxClient(local_epochs=2, mu=mu)(client, initial)
        start = family_state(initial.arrays, "tiny")
        moved = [upload.arrays[f"tiny/{name}"] - start[name].numpy() for name in trained_names(client)]
        distances.append(math.sqrt(sum(float((d**2).sum()) for d in moved)))
        assert (upload.metrics.get("penalty", 0) > 0) == (mu > 0)
    assert distances[0] > distances[1] > distances[2] > 0


def test_without_mu_a_head_that_the_method_does_not_train_stays(tmp_path: Path) -> None:
    """A SimCLR client also holds BYOL's predictor: no gradient and so no weight decay, as under FedAvg."""
    mixed = ("client.methods=[simclr,byol]", "client.optimisation.weight_decay=0.1", "federation.num_rounds=1")
    fedavg = run(tmp_path / "fedavg", "strategy=fedavg", *mixed)
    assert_same(run(tmp_path / "fedprox", "strategy=fedprox", "strategy.client.mu=0", *mixed), fedavg)


# --- FedU ---
def test_fedus_divergence_by_hand() -> None:
    """|(3, 4)| = 5 and |(1)| = 1: 3 on average."""
    start = [torch.zeros(1, 2), torch.ones(1, 1)]
    assert mean_distance(start, [torch.tensor([[3.0, 4.0]]), torch.zeros(1, 1)]) == 3
    assert mean_distance(start, start) == 0
    assert mean_distance([], []) == 0


def test_fedus_layers_are_the_backbones_convolutions() -> None:
    setup = Setup(small(None, *BYOL))
    assert [tuple(weight.shape) for weight in layers(setup.build_model("tiny"))] == [(6, 3, 5, 5)]
    assert [len(weight) for weight in layers(setup.build_model("conv4_2"))] == [2, 4, 8, 16]


@pytest.mark.parametrize(("change", "keeps_own"), [(0.01, False), (0.1, True)])
def test_fedu_keeps_its_predictor_after_a_training_that_changed_much(change: float, keeps_own: bool) -> None:
    """450 numbers of one convolution moved by .01 or .1 are .21 or 2.1 away, to either side of .4."""
    client, initial = client_of("fedu")
    starts = trains_by(client, change)
    half = FedUClient(local_epochs=1, threshold=0.4)
    first = half(client, initial)
    assert first.metrics["divergence"] == pytest.approx(change * math.sqrt(450), rel=1e-4)
    assert first.metrics["own_predictor"] == 0
    state = family_state(initial.arrays, "tiny")
    assert_moved(starts[0], state, 0)
    aggregated = {name: value + 1 for name, value in state.items()}
    second = half(client, broadcast(aggregated))
    assert second.metrics["own_predictor"] == keeps_own
    assert_moved(starts[1], state, change if keeps_own else 1, part="heads.predictor")  # its running averages, too
    assert_moved(starts[1], state, 1, part="backbone")
    assert_moved(starts[1], state, 1, part="projector")


def test_fedu_decides_by_the_last_training_alone() -> None:
    """A large change and then a small one: the third round takes the global predictor again."""
    client, initial = client_of("fedu")
    half = FedUClient(local_epochs=1, threshold=0.4)
    own = []
    for change in (0.1, 0.01, 0.01):
        trains_by(client, change)
        own.append(half(client, initial).metrics["own_predictor"])
    assert own == [0, 1, 0]


# --- FedEMA ---
def test_fedemas_divergence_by_hand() -> None:
    """sqrt(3^2 + 4^2 + 12^2) = 13 over backbone and projector; the predictor does not count."""
    a, b = (
        Model(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False), {"predictor": nn.Linear(1, 1)})
        for _ in range(2)
    )
    with torch.no_grad():
        for model, backbone, projector, head in ((a, [0.0, 0.0], 0.0, 0.0), (b, [3.0, -4.0], 12.0, 9.0)):
            model.backbone.weight.copy_(torch.tensor([backbone]))  # type: ignore[union-attr, operator]
            model.projector.weight.fill_(projector)  # type: ignore[union-attr, operator]
            model.heads["predictor"].weight.fill_(head)  # type: ignore[union-attr, operator]
    assert encoder_distance(a, b) == encoder_distance(b, a) == 13
    assert encoder_distance(a, a) == 0


def test_fedema_three_rounds_by_hand() -> None:
    """The global weights stay at W while the client's move, in units of c: the autoscaler makes mu = .7 at distance c.

    Round 1 starts at W and ends at 1. Round 2: distance 1, mu .7, start .7, and training adds .5. Round 3: distance
    1.2, mu .84, start .84 * 1.2 = 1.008.
    """
    client, initial = client_of("fedema")
    half = FedEMAClient(local_epochs=1, scale=None, tau=0.7)
    state, trained, c = family_state(initial.arrays, "tiny"), trained_names(client), 0.01
    encoder = [name for name in trained if not name.startswith("heads")]
    norm = math.sqrt(sum(state[name].numel() for name in encoder))
    expected = [(c, 0.0, None, 0.0), (c / 2, 0.7, 1.0, 0.7), (0.0, 0.84, 1.2, 1.008)]
    for change, mu, divergence, start in expected:
        starts = trains_by(client, change)
        metrics = half(client, initial).metrics
        assert metrics["mu"] == pytest.approx(mu, rel=1e-3)
        assert metrics.get("divergence") == (divergence and pytest.approx(divergence * c * norm, rel=1e-3))
        for name, value in starts[0].items():  # running averages are the broadcast's
            torch.testing.assert_close(value, state[name] + c * start * (name in trained), rtol=0, atol=1e-6)
    assert float(client.memory[SCALE]) == pytest.approx(0.7 / (c * norm), rel=1e-3)  # measured once


@pytest.mark.parametrize(("share", "mu"), [(0.25, 0.25), (4.0, 1.0)])
def test_fedemas_fixed_lambda_and_its_bound(share: float, mu: float) -> None:
    client, initial = client_of("fedema")
    state, trained = family_state(initial.arrays, "tiny"), trained_names(client)
    norm = math.sqrt(sum(state[name].numel() for name in trained if not name.startswith("heads")))
    half = FedEMAClient(local_epochs=1, scale=share / (0.01 * norm), tau=0.7)
    starts = trains_by(client, 0.01)
    half(client, initial)
    assert half(client, initial).metrics["mu"] == pytest.approx(mu, rel=1e-3)
    for name in trained:
        torch.testing.assert_close(starts[1][name], state[name] + mu * 0.01, rtol=0, atol=1e-6)
    assert SCALE not in client.memory


def test_fedemas_autoscaler_waits_for_a_divergence() -> None:
    """The only client of its family gets its own weights back: no division by zero, and FedAvg."""
    client, initial = client_of("fedema")
    half = FedEMAClient(local_epochs=1, scale=None, tau=0.7)
    trains_by(client, 0.5)
    first = half(client, initial)
    back = broadcast({name.removeprefix("tiny/"): torch.from_numpy(a.copy()) for name, a in first.arrays.items()})
    metrics = half(client, back).metrics
    assert (metrics["mu"], metrics["divergence"]) == (0, 0)
    assert SCALE not in client.memory
    assert half(client, back).metrics["mu"] == pytest.approx(0.7)


# --- L-DAWA ---
class Toy(nn.Module):
    """A kernel, a bias, a scalar and running averages."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b, self.s = (nn.Parameter(torch.zeros(shape)) for shape in ((2,), (2,), ()))
        self.register_buffer("m", torch.zeros(2))


def upload_of(w: list[float], b: list[float], s: float, m: list[float], *, partition: int, num_images: int) -> Upload:
    header = Header(round_num=1, partition_id=partition, family="toy", codec="weights", public_fingerprint="")
    arrays = {f"toy/{name}": np.float32(value) for name, value in (("w", w), ("b", b), ("s", s), ("m", m))}
    return Upload(
        header=header,
        arrays={name: np.asarray(value) for name, value in arrays.items()},
        metrics={"num-examples": num_images},
    )


def l_dawa(*, warmup_rounds: int, weighted: bool, round_num: int) -> LDAWA:
    server = dataclasses.replace(Setup(small(None)).server(), build_model=lambda family: Toy())
    strategy = LDAWA(server=server, warmup_rounds=warmup_rounds, weighted=weighted)
    strategy.round_num = round_num
    return strategy


@pytest.mark.parametrize(
    ("round_num", "weighted", "expected"),
    [  # in round 1, as FedAvg: (30 * (1, 1) + 10 * (0, 2)) / 40
        (1, False, {"w": [0.75, 1.25], "b": [1.5, 0], "s": 2.5, "m": [0, 1.5]}),
        (1, True, {"w": [0.75, 1.25], "b": [1.5, 0], "s": 2.5, "m": [0, 1.5]}),
        (2, False, {"w": [math.sqrt(0.5) / 2] * 2, "b": [2, 0], "s": 3, "m": [0, 2]}),
        (2, True, {"w": [math.sqrt(0.5) * 3 / 4] * 2, "b": [1.5, 0], "s": 2.5, "m": [0, 1.5]}),
    ],
)
def test_l_dawa_by_hand(round_num: int, weighted: bool, expected: dict[str, Any]) -> None:
    """Kernels at 45 and 90 degrees from the global one; a global bias of zero, a scalar and running averages."""
    before = {"w": torch.tensor([1.0, 0]), "b": torch.zeros(2), "s": torch.tensor(1.0), "m": torch.tensor([1.0, 0])}
    uploads = [
        upload_of([1, 1], [1, 0], 2, [0, 1], partition=0, num_images=30),
        upload_of([0, 2], [3, 0], 4, [0, 3], partition=3, num_images=10),
    ]
    merged = l_dawa(warmup_rounds=1, weighted=weighted, round_num=round_num).merge("toy", uploads, before)
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], torch.tensor(value, dtype=torch.float32))


def test_agreement_by_hand() -> None:
    one = np.float32([[3, 0], [0, 0]])
    assert agreement(one, 7 * one) == 1
    assert agreement(-one, one) == -1  # as the formula has it: it comes back turned around
    assert agreement(np.float32([[3, 0], [0, 4]]), one) == pytest.approx(0.6)
    assert agreement(np.zeros((2, 2), np.float32), one) == agreement(one, np.zeros((2, 2), np.float32)) == 1


def test_l_dawa_of_a_real_round_is_the_papers_formula(tmp_path: Path) -> None:
    """A loop over layers and clients; running averages are plain means."""
    setup, strategy, messages, replies = first_round(
        small(None, "strategy=l_dawa", "strategy.server.warmup_rounds=0", "client.optimisation.lr=0.05", *BYOL),
        tmp_path,
    )
    merged, _ = strategy.aggregate_train(1, replies)
    assert merged is not None
    uploads = [Upload.from_message(replies[partition]).arrays for partition in (0, 3)]
    parameters = dict(setup.build_model("conv4_4").named_parameters())
    agreements = []
    for key, sent in numpy_of(messages[0].content["arrays"]).items():
        total = np.zeros(sent.shape)
        for arrays in uploads:
            w_k, w_g, cosine = arrays[key].astype(float), sent.astype(float), 1.0
            if key.removeprefix("conv4_4/") in parameters and w_g.any():
                cosine = (w_k * w_g).sum() / math.sqrt((w_k * w_k).sum() * (w_g * w_g).sum())
                agreements.append(cosine)
            total += cosine * w_k
        np.testing.assert_allclose(merged[key].numpy(), total / 2, rtol=1e-5, atol=1e-7)
    assert min(agreements) < 0.95


def test_l_dawa_says_when_it_was_only_warming_up() -> None:
    notes = {
        rounds: build_strategy(Setup(small(None, "strategy=l_dawa", f"strategy.server.warmup_rounds={rounds}"))).notes()
        for rounds in (1, 2)
    }
    assert not any("L-DAWA" in note for note in notes[1])
    assert "every round was a warm-up round: here L-DAWA is FedAvg" in notes[2]


# --- families ---
@pytest.mark.parametrize("strategy", ["fedavg", "hetero_ssfl"])
def test_a_family_whose_only_client_is_the_public_set_heads_no_report(strategy: str) -> None:
    """It would head it untrained, or without any figures."""
    shard = ("public=client_shard", "federation.num_clients=3", "federation.server_families=[conv4_4]")
    setup = Setup(small(None, f"strategy={strategy}", *shard, "federation.report_family=conv4_4"))
    with pytest.raises(ConfigError, match=r"report_family=conv4_4: choose one of conv4_2, tiny\."):
        build_strategy(setup)


def test_notes_name_the_families_that_learn_nothing_or_alone() -> None:
    shard = ("public=client_shard", "federation.server_families=[wide]", "federation.families=[conv4_4,conv4_2,tiny]")
    wide = "+models.wide={_target_: fedssl.models.backbones.Conv4, width: 6}"
    setup = Setup(small(None, "strategy=fedavg", *shard, wide, "federation.num_clients=3"))
    assert build_strategy(setup).notes() == [
        "conv4_2 has one client: its global model is local training",
        "tiny has one client: its global model is local training",
        "conv4_4 has no client that trains: it learns nothing here",
        "wide has no client that trains: it learns nothing here",
    ]


# --- settings ---
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("strategy=fedprox strategy.client.mu=-1", r"strategy\.client\.mu must be at least 0 .* got -1"),
        ("strategy=fedprox strategy.client.mu=inf", r"strategy\.client\.mu must be at least 0 .* got inf"),
        ("strategy=fedu strategy.client.threshold=-.1", r"strategy\.client\.threshold must be at least 0 .* got -0\.1"),
        ("strategy=fedema strategy.client.scale=-1", r"strategy\.client\.scale .* must be at least 0, .* got -1"),
        ("strategy=fedema strategy.client.tau=1.1", r"strategy\.client\.tau must be between 0 .* and 1 .*got 1\.1"),
        ("strategy=l_dawa strategy.server.warmup_rounds=-1", r"warmup_rounds must be at least 0, got -1"),
    ],
)
def test_settings_that_cannot_work_are_refused(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        simulation.run(small(tmp_path / "run", *override.split()))


@pytest.mark.parametrize(("value", "grown"), [(4.9, False), (-4.9, False), (5.1, True), (-5.1, True)])
def test_a_weight_that_has_grown_tenfold_is_tried_out(value: float, grown: bool) -> None:
    before = largest_entries({"f/w": np.array([0.1, -0.5]), "f/bias": np.zeros(2)})
    assert before == {"f/w": 0.5, "f/bias": 0.0}
    arrays = {"f/w": np.array([0.0, value]), "f/bias": np.array([9.0, 0.0]), "f/none": np.zeros(0)}
    assert has_grown(largest_entries(arrays), before) == grown
    assert has_grown(largest_entries({**arrays, "f/bias": np.array([0.0, 11.0])}), before)
    assert has_grown(largest_entries({"f/centroids": np.array([1e9])}), before) is False


def test_mean_weights_by_hand() -> None:
    """In double precision and in order, scalars and what is not contiguous too."""
    rng = np.random.default_rng(0)
    states = [
        {"f/w": rng.normal(size=(3, 4)).astype(np.float32).T, "f/s": np.float32(i) * np.ones(())} for i in range(3)
    ]
    shares = [3, 1, 2]
    mean = mean_weights(states, shares)
    assert list(mean) == ["w", "s"]
    expected = sum(share * state["f/w"].astype(np.float64) for share, state in zip(shares, states, strict=True)) / 6
    assert np.array_equal(mean["w"].numpy(), np.asarray(expected).astype(np.float32))
    assert mean["s"].shape == ()
    assert float(mean["s"]) == np.float32((0 * 3 + 1 + 2 * 2) / 6)
