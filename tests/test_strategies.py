"""The contract of every file in conf/strategy, and what each strategy alone promises."""

import dataclasses
import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result
from torch import nn

from fedssl.data.images import ImageSet
from fedssl.errors import ConfigError, PayloadError
from fedssl.federation import simulation
from fedssl.federation.arrays import to_record
from fedssl.federation.client import MODELS
from fedssl.federation.flower_compat import SERVER_NODE_ID, identify_process, make_context, stamp
from fedssl.federation.records import Header, Upload, effort, family_state, model_state, num_bytes
from fedssl.federation.server import Server, image_passes
from fedssl.federation.setup import Setup
from fedssl.federation.simulation import build_strategy
from fedssl.federation.store import ClientStore
from fedssl.federation.weights import check_weights
from fedssl.models import Model
from fedssl.seeding import generator
from strategies.fedavg import FedAvg
from strategies.flesd import FLESD
from strategies.public_only import PublicOnly
from tests.federation_helpers import (
    COHORTS,
    FAMILIES,
    ON_RAY,
    ONE_OF_EACH_KIND,
    STRATEGIES,
    WITH_CLIENTS,
    Numpy,
    assert_same,
    final_arrays,
    first_round,
    lie,
    numpy_of,
    open_in_process,
    rows,
    run_interrupted,
    sabotaged,
    slow_unless,
    small,
    without_clock,
)

FOUR_ROUNDS = ("federation.num_rounds=4", "evaluate.every=3")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Strategy -> the directory of its run of four rounds, made once."""
    runs: dict[str, Path] = {}

    def of(strategy: str) -> Path:
        if strategy not in runs:
            runs[strategy] = tmp_path_factory.mktemp("runs") / strategy
            simulation.run(small(runs[strategy], f"strategy={strategy}", *FOUR_ROUNDS))
        return runs[strategy]

    return of


# --- the contract of all ---
@pytest.mark.parametrize("strategy", slow_unless(ONE_OF_EACH_KIND, WITH_CLIENTS))
def test_clients_state_their_effort(strategy: str, finished: Any) -> None:
    """Simulated time is made of it, and with a deadline who is late (`federation.devices`)."""
    for row in rows(finished(strategy), "client"):
        assert effort(row["metrics"], "image_passes"), row


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_four_rounds_learn_something_finite(strategy: str, finished: Any) -> None:
    run_dir = finished(strategy)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["rounds"], summary["strategy"]) == ("completed", 4, strategy)
    arrays = final_arrays(run_dir)
    assert all(np.isfinite(array).all() for array in arrays.values())
    initial = numpy_of(Setup(small(None, f"strategy={strategy}")).server().initial_arrays())
    changed = any(not np.array_equal(arrays[name], initial[name]) for name in arrays)
    assert changed == (run_dir / "models").is_dir()  # or the models live with the clients
    for row in rows(run_dir, "eval"):
        assert all(0 <= value <= 1 for name, value in row["metrics"].items() if name.split("_std")[0].endswith("top1"))


@pytest.mark.parametrize("strategy", slow_unless(ONE_OF_EACH_KIND, STRATEGIES))
def test_a_run_killed_between_rounds_and_resumed_equals_one_that_was_not(
    strategy: str, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, rows, counters and the clients' memory, bit for bit; so two runs are equal, too."""
    config = small(tmp_path / "run", f"strategy={strategy}", *FOUR_ROUNDS)
    run_interrupted(config, monkeypatch, before_round=3)
    torch.manual_seed(random.randrange(10**6))  # no strategy may draw from it
    np.random.seed(random.randrange(10**6))  # noqa: NPY002
    resumed = simulation.resume(config, tmp_path / "run")
    straight = finished(strategy)
    assert_same(final_arrays(tmp_path / "run"), final_arrays(straight))
    assert rows(tmp_path / "run") == rows(straight)
    assert without_clock(resumed) == without_clock(json.loads((straight / "summary.json").read_text()))
    memories = [ClientStore(run_dir / "clients") for run_dir in (tmp_path / "run", straight)]
    for partition in range(4):
        ours, theirs = (
            {name: value.numpy() for name, value in memory.read(partition, before=9).items()} for memory in memories
        )
        assert_same(ours, theirs)
        assert ours != {} or strategy != "local_only"


@pytest.mark.parametrize("strategy", slow_unless(ONE_OF_EACH_KIND, STRATEGIES))
def test_another_seed_is_another_run(strategy: str, finished: Any, tmp_path: Path) -> None:
    """Else the test above would hold for a constant."""
    simulation.run(small(tmp_path / "run", f"strategy={strategy}", "seed=1", "federation.num_rounds=1"))
    ours, theirs = rows(tmp_path / "run", "eval"), rows(finished(strategy), "eval")
    assert ours[0]["metrics"] != theirs[0]["metrics"]


@pytest.mark.parametrize("strategy", slow_unless(ONE_OF_EACH_KIND, WITH_CLIENTS))
def test_the_order_of_replies_does_not_matter(strategy: str, tmp_path: Path) -> None:
    _, server_half, _, replies = first_round(small(None, f"strategy={strategy}"), tmp_path)
    assert len(replies) == 4
    arrays, metrics = server_half.aggregate_train(1, replies)
    for order in ([3, 2, 1, 0], [2, 0, 3, 1]):
        again, metrics_again = server_half.aggregate_train(1, [replies[i] for i in order])
        if arrays is None:
            assert again is None
            continue
        assert again is not None
        assert_same(numpy_of(arrays), numpy_of(again))
        assert without_clock(dict(metrics or {})) == without_clock(dict(metrics_again or {}))


ON_EVERY_GRID = ("fedavg", "flesd", "fedema", "orchestra")  # sums, similarities, memory, more than weights


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray leaves its log files to the garbage collector
@pytest.mark.parametrize("strategy", slow_unless(ON_EVERY_GRID, WITH_CLIENTS))
def test_ray_equals_in_process_bit_for_bit(strategy: str, finished: Any, tmp_path: Path) -> None:
    """Weights, every metric and every byte in both directions."""
    simulation.run(small(tmp_path / "run", f"strategy={strategy}", *FOUR_ROUNDS, *ON_RAY))
    assert_same(final_arrays(tmp_path / "run"), final_arrays(finished(strategy)))
    assert rows(tmp_path / "run") == rows(finished(strategy))


@pytest.mark.parametrize("strategy", slow_unless(ONE_OF_EACH_KIND, STRATEGIES))
def test_a_cohort_smaller_than_the_federation(strategy: str, tmp_path: Path) -> None:
    size = COHORTS.get(strategy, 2)
    overrides = (
        f"strategy={strategy}",
        f"federation.cohort_size={size}",
        "federation.num_rounds=3",
        "evaluate.every=9",
    )
    summary = simulation.run(small(tmp_path / "run", *overrides))
    assert summary["status"] == "completed"
    cohorts = [
        {row["partition"] for row in rows(tmp_path / "run", "client") if row["round"] == round_num}
        for round_num in (1, 2, 3)
    ]
    asked = size if strategy in WITH_CLIENTS else 0
    assert [len(cohort) for cohort in cohorts] == [asked] * 3
    assert [row["metrics"]["num_ok"] for row in rows(tmp_path / "run", "round")] == [asked] * 3
    if asked:
        assert len(set.union(*cohorts)) > size  # sampled anew in every round
    if strategy == "local_only":  # everybody is evaluated, sampled or not
        assert [summary["families"][family]["num_clients"] for family in FAMILIES] == [4, 1, 1]


# --- Flower's own loop ---
def test_flowers_own_loop_learns_the_same_weights(finished: Any, tmp_path: Path) -> None:
    """FLESD is a Flower strategy: `start` over our grid equals our loop, bit for bit."""
    config = small(None, "strategy=flesd", *FOUR_ROUNDS)
    setup = Setup(config)
    grid = open_in_process(config, tmp_path)
    result = build_strategy(setup).start(grid, setup.server().initial_arrays(), num_rounds=4)
    assert_same(numpy_of(result.arrays), final_arrays(finished("flesd")))
    losses = [row["metrics"]["tiny/loss"] for row in rows(finished("flesd"), "server")]
    assert [result.train_metrics_clientapp[r]["tiny/loss"] for r in (1, 2, 3, 4)] == losses


def test_a_plain_server_app_learns_the_same_weights(finished: Any, tmp_path: Path) -> None:
    """The strategy in an ordinary Flower `ServerApp`, which knows nothing of our loop."""
    config = small(None, "strategy=flesd", *FOUR_ROUNDS)
    learned: list[Result] = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        setup = Setup(config)
        learned.append(build_strategy(setup).start(grid, setup.server().initial_arrays(), num_rounds=4))

    app(open_in_process(config, tmp_path), make_context(SERVER_NODE_ID, {}, RecordDict()))
    assert_same(numpy_of(learned[0].arrays), final_arrays(finished("flesd")))


# --- FedAvg ---
class Weights(Model):
    """Weights by name; nothing that computes."""

    def __init__(self, **values: list[float] | float) -> None:
        super().__init__(nn.Identity(), nn.Identity())
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value)))


@pytest.fixture
def fedavg(monkeypatch: pytest.MonkeyPatch) -> FedAvg:
    identify_process()
    monkeypatch.setattr(Server, "try_out", lambda self, family, state: None)
    models = {"a": Weights(w=[0.0, 0.0], s=0.0), "b": Weights(w=[0.0, 0.0, 0.0])}
    setup = Setup(small(None, "strategy=fedavg"))
    families = {"families": ("a", "b"), "client_families": ("a", "b"), "report_family": "a"}
    known = {"num_trainers_of": {"a": 2, "b": 2}, "build_model": models.__getitem__}
    strategy = FedAvg(server=dataclasses.replace(setup.server(), **families, **known), weighted=True)
    strategy.round_num = 1
    strategy.arrays = ArrayRecord(
        {
            "a/w": Array(np.zeros(2, np.float32)),
            "a/s": Array(np.array(0, np.float32)),
            "b/w": Array(np.float32([7, 8, 9])),
        }
    )
    return strategy


def weights_reply(strategy: FedAvg, partition: int, arrays: Numpy, num_examples: float, family: str = "a") -> Message:
    fingerprint = strategy.server.public_set.fingerprint
    header = Header(round_num=1, partition_id=partition, family=family, codec="weights", public_fingerprint=fingerprint)
    upload = Upload(header=header, arrays=arrays, metrics={"num-examples": num_examples})
    message = Message(RecordDict(), 1000 + partition, "train")
    stamp(message, str(partition))
    return Message(upload.to_content(), reply_to=message)


def two_replies(strategy: FedAvg) -> list[Message]:
    first = {"a/w": np.float32([1, 2]), "a/s": np.float32(4)}
    second = {"a/w": np.float32([5, -2]), "a/s": np.float32(0)}
    return [
        weights_reply(strategy, 0, {name: np.asarray(value) for name, value in first.items()}, 30),
        weights_reply(strategy, 3, {name: np.asarray(value) for name, value in second.items()}, 10),
    ]


@pytest.mark.parametrize(("weighted", "w", "s"), [(True, [2.0, 1.0], 3.0), (False, [3.0, 0.0], 2.0)])
def test_fedavg_by_hand(fedavg: FedAvg, weighted: bool, w: list[float], s: float) -> None:
    """(30 * 1 + 10 * 5) / 40 = 2; the family nobody answered for keeps its weights."""
    fedavg.weighted = weighted
    arrays, _ = fedavg.aggregate_train(1, two_replies(fedavg))
    assert arrays is not None
    expected = {"a/w": np.float32(w), "a/s": np.array(s, np.float32), "b/w": np.float32([7, 8, 9])}
    assert_same(numpy_of(arrays), expected)


def test_fedavg_never_mixes_families(fedavg: FedAvg) -> None:
    only_b = weights_reply(fedavg, 1, {"b/w": np.float32([1, 1, 1])}, 1000, family="b")
    arrays, _ = fedavg.aggregate_train(1, [*two_replies(fedavg), only_b])
    assert arrays is not None
    np.testing.assert_array_equal(arrays["a/w"].numpy(), [2, 1])
    np.testing.assert_array_equal(arrays["b/w"].numpy(), [1, 1, 1])


def test_fedavg_of_equal_clients_is_one_of_them(fedavg: FedAvg) -> None:
    value = np.float32([0.1, 1 / 3])
    replies = [weights_reply(fedavg, p, {"a/w": value, "a/s": np.asarray(np.float32(p))}, 7 + p) for p in range(5)]
    arrays, _ = fedavg.aggregate_train(1, replies)
    assert arrays is not None
    np.testing.assert_array_equal(arrays["a/w"].numpy(), value)


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("nan", "'a/w' holds NaN or infinity"),
        ("wrong dtype", r"'a/w' is float64\(2,\), not float32\(2,\)"),
        ("wrong shape", r"'a/w' is float32\(1,\), not float32\(2,\)"),
        ("other name", r"its weights are not those of a: \['a/w', 'loot'\]"),
        ("wrong round", "it is for round 2, this is round 1"),
        ("wrong codec", "it is encoded as 'morse', the server expects 'weights'"),
        ("wrong public set", r"its public set \(000000000000\) is not the server's"),
        ("infinite weight", "it declares num-examples=inf"),
        ("no weight", "it declares num-examples=None"),
        ("overflowing weight", "it declares num-examples=1e\\+308"),
    ],
)
def test_fedavg_refuses_a_lie_and_averages_the_rest(
    fedavg: FedAvg, action: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    honest, other = two_replies(fedavg)
    message = Message(RecordDict(), 1000, "train")
    stamp(message, "0")
    liar = Message(lie(Upload.from_message(honest), action).to_content(), reply_to=message)
    with caplog.at_level(logging.WARNING):
        arrays, _ = fedavg.aggregate_train(1, [liar, other])
    assert arrays is not None
    np.testing.assert_array_equal(arrays["a/w"].numpy(), [5, -2])
    assert caplog.records
    with pytest.raises(ValueError, match=reason):
        fedavg.check(liar)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [("a/w", 1e30, r"'a/w' holds 1e\+30, no trained"), ("a/running_var", -1.0, "negative variance -1")],
)
def test_weights_that_would_end_everybodys_run_are_refused(name: str, value: float, reason: str) -> None:
    weights = {name: np.full(2, value, np.float32)}
    with pytest.raises(PayloadError, match=reason):
        check_weights(weights, ArrayRecord({name: Array(np.zeros(2, np.float32))}), "a")


def test_big_endian_weights_are_refused_before_torch_sees_them(fedavg: FedAvg) -> None:
    reply = weights_reply(fedavg, 0, {"a/w": np.array([1, 2], ">f4"), "a/s": np.asarray(np.float32(0))}, 1)
    with pytest.raises(ValueError, match=r"'a/w' is >f4\(2,\), not float32"):
        fedavg.check(reply)


# --- FLESD ---
@pytest.mark.parametrize(
    "action",
    ["nan", "wrong dtype", "wrong shape", "other name", "wrong round", "wrong codec", "infinite weight", "no weight"],
)
def test_flesd_refuses_a_lie_and_learns_from_the_rest(action: str, tmp_path: Path) -> None:
    """The target is that of the three others: the result is the one without the liar."""
    config = small(None, "strategy=flesd")
    _, strategy, _, replies = first_round(sabotaged(config, action, round_num=1, partitions=[2]), tmp_path)
    assert isinstance(strategy, FLESD)
    with pytest.raises(ValueError, match=r"NaN|dtype|shape|named|round 2|morse|num-examples=(inf|None)"):
        strategy.check(replies[2])
    arrays, _ = strategy.aggregate_train(1, replies)
    without, _ = strategy.aggregate_train(1, [replies[0], replies[1], replies[3]])
    assert arrays is not None
    assert without is not None
    assert_same(numpy_of(arrays), numpy_of(without))
    _, _, _, honest = first_round(config, tmp_path)
    all_four, _ = strategy.aggregate_train(1, honest)
    assert all_four is not None
    assert not np.array_equal(
        all_four["tiny/backbone.conv.weight"].numpy(), arrays["tiny/backbone.conv.weight"].numpy()
    )


def test_flesd_names_a_collapsed_client_and_only_that_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = small(None, "strategy=flesd")
    config["strategy"]["server"] |= {"warn_mean_cosine": 0.9999, "warn_effective_rank": 1.0001}
    _, strategy, _, replies = first_round(sabotaged(config, "collapsed", round_num=1, partitions=[1]), tmp_path)
    with caplog.at_level(logging.WARNING, logger="strategies"):
        strategy.aggregate_train(1, replies)
    (record,) = caplog.records
    assert record.getMessage().startswith("round 1: client 1 (conv4_2) has collapsed: mean cosine 1.000, effective")


def test_flesd_without_a_usable_upload_changes_nothing(tmp_path: Path) -> None:
    config = sabotaged(small(None, "strategy=flesd"), "nan", round_num=1, partitions=[0, 1, 2, 3])
    _, strategy, _, replies = first_round(config, tmp_path)
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert metrics is None
    assert arrays is not None
    assert_same(numpy_of(arrays), numpy_of(Setup(small(None)).server().initial_arrays()))


def test_flesd_gives_each_family_its_own_weights_back(tmp_path: Path) -> None:
    """And nobody's weights go up: what travels up has the public set's rows and nothing of the client's size."""
    setup, strategy, messages, replies = first_round(small(None, "strategy=flesd", "embedding=projector"), tmp_path)
    learned, _ = strategy.aggregate_train(1, replies)
    assert learned is not None
    grid = open_in_process(setup.config, tmp_path)
    for server_round, arrays in ((1, setup.server().initial_arrays()), (2, learned)):
        for partition, message in enumerate(strategy.configure_train(server_round, arrays, ConfigRecord(), grid)):
            family = FAMILIES[partition % 3]
            sent = numpy_of(message.content["arrays"])
            assert_same(sent, {name: a.numpy() for name, a in arrays.items() if name.startswith(f"{family}/")})
            assert len(sent) == len(model_state(setup.build_model(family)))
    assert len({num_bytes(message) for message in messages}) == 3
    assert [Upload.from_message(reply).arrays["factors"].shape for reply in replies] == [(24, 8)] * 4
    assert len({num_bytes(reply) - len(FAMILIES[i % 3]) for i, reply in enumerate(replies)}) == 1


# --- the controls ---
def test_placebo_knows_nothing_of_the_private_data(tmp_path: Path) -> None:
    """The same similarities whatever the clients own; FLESD's differ."""

    def factors(strategy: str, partition: str) -> list[np.ndarray]:
        config = small(None, f"strategy={strategy}", f"partition={partition}")
        _, _, _, replies = first_round(config, tmp_path)
        return [Upload.from_message(reply).arrays["factors"] for reply in replies]

    for iid, skewed in zip(factors("placebo", "iid"), factors("placebo", "dirichlet"), strict=True):
        np.testing.assert_array_equal(iid, skewed)
    for iid, skewed in zip(factors("flesd", "iid"), factors("flesd", "dirichlet"), strict=True):
        assert not np.array_equal(iid, skewed)


def test_placebo_does_not_learn_from_the_broadcast(tmp_path: Path) -> None:
    """The clients of round 2 know as little as those of round 1: an untrained model, not the distilled one."""
    _, strategy, _, replies = first_round(small(None, "strategy=placebo"), tmp_path)
    learned, _ = strategy.aggregate_train(1, replies)
    assert learned is not None
    grid = open_in_process(small(None, "strategy=placebo"), tmp_path)
    again = list(grid.send_and_receive(strategy.configure_train(1, learned, ConfigRecord(), grid)))
    for before, after in zip(replies, again, strict=True):
        np.testing.assert_array_equal(
            Upload.from_message(before).arrays["factors"], Upload.from_message(after).arrays["factors"]
        )


def test_best_client_learns_from_the_one_with_the_highest_accuracy(tmp_path: Path) -> None:
    """The student of four uploads is that of the best one alone, which is not the first."""
    config = small(None, "strategy=best_client")
    _, strategy, _, replies = first_round(config, tmp_path)
    accuracies = [0.2, 0.4, 0.9, 0.4]
    for reply, accuracy in zip(replies, accuracies, strict=True):
        assert 0 < reply.content["metrics"]["linear_top1"] < 1  # measured, before we say otherwise
        reply.content["metrics"]["linear_top1"] = accuracy
    of_all, _ = strategy.aggregate_train(1, replies)
    of_one, _ = first_round(config, tmp_path)[1].aggregate_train(1, [replies[2]])
    assert_same(numpy_of(of_all), numpy_of(of_one))


@pytest.mark.parametrize("accuracy", [None, float("nan"), 1.5])
def test_best_client_refuses_an_accuracy_that_is_none(accuracy: float | None, tmp_path: Path) -> None:
    _, strategy, _, replies = first_round(small(None, "strategy=best_client"), tmp_path)
    metrics = replies[1].content["metrics"]
    if accuracy is None:
        del metrics["linear_top1"]
    else:
        metrics["linear_top1"] = accuracy
    with pytest.raises(PayloadError, match="linear_top1"):
        strategy.check(replies[1])


def test_local_only_refuses_arrays(tmp_path: Path) -> None:
    _, strategy, _, replies = first_round(small(None, "strategy=local_only"), tmp_path)
    assert strategy.check(replies[0]).arrays == {}  # type: ignore[attr-defined]
    replies[0].content["arrays"] = to_record({"pixels": np.zeros(3)})
    with pytest.raises(PayloadError, match="it sends 1 arrays, and none are exchanged"):
        strategy.check(replies[0])  # type: ignore[attr-defined]


def test_local_only_sends_no_arrays_in_either_direction(tmp_path: Path) -> None:
    setup, strategy, messages, replies = first_round(small(None, "strategy=local_only"), tmp_path)
    assert all(len(message.content["arrays"]) == 0 for message in [*messages, *replies])
    assert strategy.aggregate_train(1, replies) == (None, None)
    assert setup.report_family == "conv4_4"
    for partition, reply in enumerate(replies):  # everybody trains the report family on its own shard
        metrics = Upload.from_message(reply).metrics
        assert ("report_loss" in metrics) == (FAMILIES[partition % 3] != "conv4_4")
        memory = ClientStore(tmp_path / "clients").read(partition, before=2)
        trained = {name.split("/")[1] for name in memory if name.startswith(MODELS)}
        assert trained == {FAMILIES[partition % 3], "conv4_4"}
        initial = model_state(setup.build_model("conv4_4"))
        assert any(not torch.equal(memory[f"{MODELS}conv4_4/{name}"], value) for name, value in initial.items())


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"knn_top1": 0.5}, r"it calls a figure 'knn_top1', not <family>/<metric>"),
        ({"resnet18/knn_top1": 0.5}, "it calls a figure 'resnet18/knn_top1'"),
        ({"tiny/knn_top1": [0.5, 0.6]}, r"it declares tiny/knn_top1=\[0\.5, 0\.6\]"),
        ({"tiny/knn_top1": float("nan")}, "it declares tiny/knn_top1=nan"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_figures_that_are_none_are_refused_and_the_others_reported(figures: dict[str, Any], message: str) -> None:
    """They would end the run with a traceback, or make everybody's mean nan."""
    identify_process()
    strategy = build_strategy(Setup(small(None, "strategy=local_only")))
    honest, liar = figures_reply(3, {"tiny/knn_top1": 0.25}), figures_reply(1, figures)
    with pytest.raises(PayloadError, match=message):
        strategy.check_evaluation(liar)
    assert dict(strategy.aggregate_evaluate(1, [liar, honest]) or {}) == {"tiny/knn_top1": [0.25]}


def figures_reply(partition: int, figures: dict[str, Any]) -> Message:
    message = Message(RecordDict(), 1000 + partition, "evaluate")
    stamp(message, str(partition))
    records = {"metrics": MetricRecord(figures), "header": ConfigRecord({"partition_id": partition})}
    return Message(RecordDict(records), reply_to=message)


def test_what_a_client_remembers_is_a_copy() -> None:
    """What is done to the model afterwards is not in it; another family has another model."""
    client = Setup(small(None, "strategy=local_only")).client(2, 1)
    model = client.remembered("tiny")
    with torch.no_grad():
        model.backbone.scale.fill_(7.0)
        client.remember(model, "tiny")
        model.backbone.scale.fill_(8.0)
    assert model_state(client.remembered("tiny"))["backbone.scale"] == 7
    initial, other = (model_state(m) for m in (client.build_model("conv4_4"), client.remembered("conv4_4")))
    assert all(torch.equal(other[name], value) for name, value in initial.items())


def test_local_only_reports_mean_and_range_over_its_clients(finished: Any) -> None:
    summary = json.loads((finished("local_only") / "summary.json").read_text())
    assert [summary["families"][family]["num_clients"] for family in FAMILIES] == [4, 1, 1]
    last = [row["metrics"] for row in rows(finished("local_only"), "client") if row["round"] == 4]
    for name in ("linear_top1", "knn_top1", "labels1_top1"):
        by_client = [metrics[f"conv4_4/{name}"] for metrics in last]
        assert len(set(by_client)) > 1
        assert summary[name] == pytest.approx(np.mean(by_client))
        assert (summary[f"{name}_min"], summary[f"{name}_max"]) == (min(by_client), max(by_client))
    assert not (finished("local_only") / "models").exists()
    assert not (finished("local_only") / "public_map.npz").exists()


@pytest.mark.parametrize("num_images", [2, 3, 7, 24, 25])
@pytest.mark.parametrize("batch_size", [2, 3, 8, 11, 24])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_image_passes_are_those_of_the_training_loop(num_images: int, batch_size: int, steps: int) -> None:
    setup = Setup(small(None))
    images: ImageSet = setup.train.subset(range(num_images))
    metrics = setup.server().train(
        setup.build_model("tiny"), images, steps=steps, batch_size=batch_size, purpose="test", round_num=1
    )
    assert metrics["steps"] == steps
    assert metrics["image_passes"] == image_passes(num_images, batch_size, steps)


def test_public_only_takes_the_students_steps_and_at_least_its_images(finished: Any) -> None:
    for student, control in zip(
        rows(finished("flesd"), "server"), rows(finished("public_only"), "server"), strict=True
    ):
        for family in FAMILIES:
            assert control["metrics"][f"{family}/steps"] == student["metrics"][f"{family}/steps"]
            assert control["metrics"][f"{family}/image_passes"] >= student["metrics"][f"{family}/image_passes"]


@pytest.mark.parametrize(
    ("public", "epochs", "batch_size", "queue_size"),
    [(400, 20, 64, 256), (2000, 10, 128, 1024), (24, 1, 8, 16), (24, 1, 24, 24), (10, 1, 16, 512), (101, 3, 50, 50)],
)
def test_public_only_matches_any_distillation(public: int, epochs: int, batch_size: int, queue_size: int) -> None:
    """As few images more as whole batches allow; more steps only where the public set is too small."""
    setup = Setup(small(None, "strategy=public_only"))
    strategy = build_strategy(setup)
    assert isinstance(strategy, PublicOnly)
    distillation = dataclasses.replace(
        strategy.distillation, epochs=epochs, batch_size=batch_size, queue_size=queue_size
    )
    rows_of_public = np.arange(public) % 24
    images = setup.public_set.images.subset(rows_of_public)
    server = dataclasses.replace(setup.server(), public_set=dataclasses.replace(setup.public_set, images=images))
    strategy = PublicOnly(
        server=server, distillation=distillation, total=False, downlink="weights", codec=strategy.codec
    )
    steps, size = strategy.effort(1, 0)
    wanted_steps, wanted = distillation.num_steps(public), distillation.image_passes(public)
    assert image_passes(public, size, steps) >= wanted
    if size < public:
        assert steps == wanted_steps
        assert size == 2 or image_passes(public, size - 1, steps) < wanted
    else:
        assert steps == max(wanted_steps, -(-wanted // (2 * public)))


def test_public_only_total_also_sees_as_many_images_as_the_clients(finished: Any) -> None:
    clients = sum(row["metrics"]["image_passes"] for row in rows(finished("flesd"), "client"))
    student = sum(row["metrics"]["conv4_4/image_passes"] for row in rows(finished("flesd"), "server"))
    control = sum(row["metrics"]["conv4_4/image_passes"] for row in rows(finished("public_only_total"), "server"))
    assert clients + student <= control < 1.1 * (clients + student)


def test_centralised_sees_as_many_images_as_all_clients(finished: Any) -> None:
    clients = [row["metrics"] for row in rows(finished("fedavg"), "client")]
    wanted = 2 * sum(metrics["num-examples"] for metrics in clients)  # one local epoch
    central = sum(row["metrics"]["conv4_4/image_passes"] for row in rows(finished("centralized"), "server"))
    assert wanted <= central < 1.1 * wanted
    assert wanted >= sum(metrics["image_passes"] for metrics in clients)
    setup = Setup(small(None))
    union = np.sort(setup.private_union().indices)
    assert len(union) == 140 - 24
    assert not np.isin(union, setup.data.public_images.indices).any()


def test_only_a_strategy_is_a_strategy() -> None:
    config = small(None)
    config["strategy"]["server"] = {"_target_": "tests.federation_helpers.CountsThreads", "inner": None}
    with pytest.raises(ConfigError, match=r"unexpected keyword argument 'server'|must be a flwr"):
        build_strategy(Setup(config))


def test_the_placebos_models_are_reproducible() -> None:
    """Untrained models come from the run's seed and the partition, not from a global generator."""
    setup = Setup(small(None))
    torch.manual_seed(1)
    first = model_state(setup.build_untrained("tiny", 2))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert all(torch.equal(value, first[name]) for name, value in model_state(setup.build_untrained("tiny", 2)).items())
    weight = "backbone.conv.weight"
    assert not torch.equal(first[weight], model_state(setup.build_untrained("tiny", 1))[weight])  # each client its own
    assert not torch.equal(first[weight], model_state(setup.build_model("tiny"))[weight])
    assert torch.equal(torch.get_rng_state(), state)
    assert generator(0, "x").initial_seed() != generator(0, "y").initial_seed()
    assert family_state(setup.server().initial_arrays(), "tiny").keys() == first.keys()
