"""Flower's own strategies under our loop: the same weights as Flower's, and every way in which one cannot work."""

import copy
import dataclasses
import json
import logging
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedssl.__main__ import main
from fedssl.config import compose
from fedssl.errors import ConfigError, FedSSLError, PayloadError
from fedssl.federation import simulation
from fedssl.federation.client import Broadcast, Client
from fedssl.federation.grids.flower_sim import FlowerSim
from fedssl.federation.records import Header, Upload
from fedssl.federation.setup import Setup
from fedssl.federation.simulation import build_strategy
from fedssl.federation.stock import Stock, pack, unpack
from fedssl.seeding import seeded_globals
from strategies.fedavg import FedAvgClient
from tests.federation_helpers import (
    SMALL,
    STOCK,
    assert_same,
    final_arrays,
    first_round,
    lie,
    numpy_of,
    open_in_process,
    rows,
    small,
)
from tests.flower_engine import start

ALL_TRAINED = ("federation.families=[plain]", "+models.plain={_target_: tests.flower_engine.Plain}")
FIVE = ("federation.num_clients=5", "federation.families=[tiny]")


def with_stock(target: str, *overrides: str, **arguments: Any) -> dict[str, Any]:
    """A small federation with any strategy of Flower."""
    config = small(None, "strategy=fedmedian", *overrides)
    config["strategy"]["server"]["strategy"] = {"_target_": f"flwr.serverapp.strategy.{target}", **arguments}
    return config


def stock(config: Mapping[str, Any]) -> Stock:
    strategy = build_strategy(Setup(config))
    assert isinstance(strategy, Stock)
    return strategy


# --- against Flower ------------------------------------------------------------------------------------------------
def test_there_are_some() -> None:
    assert {"fedadam", "fedmedian", "krum"} < set(STOCK)


@pytest.mark.parametrize("name", STOCK)
def test_flowers_own_loop_learns_the_same_weights(name: str, tmp_path: Path) -> None:
    """Bit for bit, where there is one family and nothing but what is trained; all clients, by partition."""
    config = small(tmp_path / "run", f"strategy={name}", "federation.num_rounds=3", "evaluate.every=9", *ALL_TRAINED)
    simulation.run(config)
    flowers = start(config, open_in_process(config, tmp_path / "flower"))
    assert_same(flowers, final_arrays(tmp_path / "run"))
    grid, arrays = open_in_process(config, tmp_path / "again"), Setup(config).server().initial_arrays()
    assert_same(flowers, numpy_of(stock(config).start(grid, arrays, num_rounds=3).arrays))  # ours under Flower's loop
    initial = numpy_of(Setup(config).server().initial_arrays())
    assert all(not np.array_equal(flowers[weight], initial[weight]) for weight in flowers)


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray leaves its log files to the garbage collector
def test_flowers_own_engine_learns_the_same_weights(tmp_path: Path) -> None:
    """Flower's loop and its engine around Flower's strategies, bit for bit."""
    configs = [
        small(tmp_path / name, f"strategy={name}", "evaluate.every=9", *ALL_TRAINED)
        for name in ("fedadam", "fedtrimmedavg", "multikrum")
    ]
    load_app = partial(simulation.load_client_app, configs[0], tmp_path)  # all have the same client half
    engine = FlowerSim(workers=2, clients_per_gpu=1, gpus=2, max_retries=0)
    with engine.open(load_app, num_clients=4, threads=1, device="cpu") as grid:
        flowers = [start(config, grid) for config in configs]
    for config, learned in zip(configs, flowers, strict=True):
        simulation.run(config)
        assert_same(learned, final_arrays(Path(config["run_dir"])))


def test_stock_fedavg_is_our_fedavg(tmp_path: Path) -> None:
    """Over families with batch norm; ours sums in double precision."""
    config = with_stock("FedAvg")
    _, strategy, _, replies = first_round(config, tmp_path)
    merged, _ = strategy.aggregate_train(1, replies)
    own = build_strategy(Setup(small(None, "strategy=fedavg")))
    list(
        own.configure_train(
            1, Setup(config).server().initial_arrays(), ConfigRecord(), open_in_process(config, tmp_path)
        )
    )
    expected, _ = own.aggregate_train(1, replies)
    assert merged is not None
    assert expected is not None
    for name, array in expected.items():
        np.testing.assert_allclose(merged[name].numpy(), array.numpy(), rtol=1e-5, atol=1e-7)


# --- by hand -------------------------------------------------------------------------------------------------------
def asked(config: dict[str, Any], folder: Path, value: float = 0.0) -> tuple[Stock, list[Message]]:
    """A strategy and its messages of round 1, with all weights at `value`."""
    strategy = stock(config)
    return strategy, ask(strategy, 1, constant(strategy, value), open_in_process(config, folder))


def constant(strategy: Stock, value: float) -> ArrayRecord:
    arrays = strategy.server.initial_arrays()
    return ArrayRecord({name: Array(np.full(array.shape, value, np.float32)) for name, array in arrays.items()})


def ask(strategy: Stock, round_num: int, arrays: ArrayRecord, grid: Grid) -> list[Message]:
    return list(strategy.configure_train(round_num, arrays, ConfigRecord(), grid))


def replies_of(
    strategy: Stock, messages: Sequence[Message], trained: Sequence[float], statistics: Sequence[float] | None = None
) -> list[Message]:
    """Replies of tiny's: client p sends `trained[p]` in every weight, `statistics[p]` in batch norm's averages."""
    statistics = trained if statistics is None else statistics
    fingerprint = strategy.server.public_set.fingerprint
    replies = []
    for partition, message in enumerate(messages):
        arrays = {
            name: np.full(array.shape, (statistics if "running" in name else trained)[partition], np.float32)
            for name, array in message.content["arrays"].items()
        }
        header = Header(
            round_num=strategy.round_num,
            partition_id=partition,
            family="tiny",
            codec="weights",
            public_fingerprint=fingerprint,
        )
        metrics = {"num-examples": 10 * (partition + 1), "loss": 2.0}
        upload = Upload(header=header, arrays=arrays, metrics=metrics)
        replies.append(Message(upload.to_content(), reply_to=message))
    return replies


def values(strategy: Stock, replies: Iterable[Message]) -> tuple[float, float]:
    """What the merged weights and batch norm's averages are; each the same everywhere."""
    arrays, _ = strategy.aggregate_train(strategy.round_num, replies)
    assert arrays is not None
    kinds: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for name, array in arrays.items():
        assert array.dtype == "float32"
        kinds["running" in name].append(array.numpy().ravel())
    trained, statistics = np.concatenate(kinds[False]), np.concatenate(kinds[True])
    assert len(np.unique(trained)) == len(np.unique(statistics)) == 1
    return float(trained[0]), float(statistics[0])


def test_fedmedian_by_hand(tmp_path: Path) -> None:
    """The median of 1, 2, 10, 3, 4 is 3; batch norm's averages are (10*1 + 20*2 + 30*10 + 40*3 + 50*4) / 150."""
    strategy, messages = asked(with_stock("FedMedian", *FIVE), tmp_path)
    assert values(strategy, replies_of(strategy, messages, [1, 2, 10, 3, 4])) == pytest.approx((3, 670 / 150))


def test_krum_by_hand(tmp_path: Path) -> None:
    """f = 1 of 5: the sums over the 5 - 1 - 2 nearest are least for the middle one, 0.01 + 0.01; its weights win."""
    strategy, messages = asked(with_stock("Krum", *FIVE, num_malicious_nodes=1), tmp_path)
    trained, _ = values(strategy, replies_of(strategy, messages, [0.0, 0.9, 1.0, 1.1, 100.0]))
    assert trained == 1.0


def test_multikrum_by_hand(tmp_path: Path) -> None:
    """The two best are 1 (0.01 + 0.016) and 0.9 (0.01 + 0.051, against 0.066 for 1.125): (30 * 1 + 20 * 0.9) / 50."""
    config = with_stock("MultiKrum", *FIVE, num_malicious_nodes=1, num_nodes_to_select=2)
    strategy, messages = asked(config, tmp_path)
    trained, _ = values(strategy, replies_of(strategy, messages, [0.0, 0.9, 1.0, 1.125, 100.0]))
    assert trained == pytest.approx(0.96)


def test_fedadam_by_hand(tmp_path: Path) -> None:
    """Reddi et al. 2021, Algorithm 2, with Adam's bias correction, in which Flower's round r has the exponent r + 1.

    All clients agree, so the mean change is d: 0.5 in round 1, and what brings them to 2 in round 2.
    """
    eta, beta_1, beta_2, tau = 0.125, 0.5, 0.75, 0.25
    config = with_stock("FedAdam", *FIVE, eta=eta, beta_1=beta_1, beta_2=beta_2, tau=tau)
    strategy, messages = asked(config, tmp_path, value=1.0)
    grid = open_in_process(config, tmp_path)
    x, m, v = 1.0, 0.0, 0.0
    for round_num, target in ((1, 1.5), (2, 2.0), (3, 2.0)):
        d = target - x
        m, v = beta_1 * m + (1 - beta_1) * d, beta_2 * v + (1 - beta_2) * d**2
        step = eta * math.sqrt(1 - beta_2 ** (round_num + 1)) / (1 - beta_1 ** (round_num + 1))
        x += step * m / (math.sqrt(v) + tau)
        replies = replies_of(strategy, messages, [target] * 5, [0.25] * 5)
        assert values(strategy, replies) == pytest.approx((x, 0.25), rel=1e-6)
        arrays, _ = strategy.aggregate_train(round_num, replies)  # again: a round is merged from where it began
        assert arrays is not None
        assert values(strategy, replies) == pytest.approx((x, 0.25), rel=1e-6)
        messages = ask(strategy, round_num + 1, arrays, grid)


def test_qfedavg_by_hand(tmp_path: Path) -> None:
    """Li et al. 2020, https://arxiv.org/abs/1905.10497, Algorithm 1, with the clients' losses F.

    Delta = F^q * L * (w - w_k), h = q F^(q-1) ||L (w - w_k)||^2 + L F^q, and w - sum(Delta) / sum(h).
    """
    q, rate, loss = 1.0, 0.5, 2.0
    config = with_stock("QFedAvg", *FIVE, client_learning_rate=rate, q=q, train_loss_key="loss")
    config["strategy"]["server"]["metrics"] = ["loss"]
    strategy, messages = asked(config, tmp_path, value=1.0)
    clients = [1.5, 2.0, 1.0, 0.5, 1.25]
    gradients = [(1.0 - client) / rate for client in clients]
    size = sum(math.prod(array.shape) for name, array in messages[0].content["arrays"].items() if "running" not in name)
    h = sum(q * loss ** (q - 1) * size * g**2 + loss**q / rate for g in gradients)
    expected = 1.0 - sum(loss**q * g for g in gradients) / h
    assert values(strategy, replies_of(strategy, messages, clients))[0] == pytest.approx(expected, rel=1e-5)


# --- what it is told, and draws ------------------------------------------------------------------------------------
def test_cohort_and_draws_are_the_runs_own(tmp_path: Path) -> None:
    """Flower samples, and its wrappers for privacy draw, with global generators: their states do not matter."""
    inner = {"_target_": "flwr.serverapp.strategy.FedAvg"}
    config = with_stock(
        "DifferentialPrivacyServerSideAdaptiveClipping",
        "federation.cohort_size=4",
        *FIVE,
        strategy=inner,
        noise_multiplier=0.01,
        num_sampled_clients=4,
    )
    results = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        setup, strategy, messages, replies = first_round(config, tmp_path)
        arrays, _ = strategy.aggregate_train(1, replies)
        assert arrays is not None
        results.append(numpy_of(arrays))
        cohort = setup.server().sample_cohort(1, open_in_process(config, tmp_path))
        assert [message.metadata.dst_node_id for message in messages] == [member.node_id for member in cohort]
    assert isinstance(strategy, Stock)
    assert_same(*results)
    assert b'"clipping_norm": ' in bytes(strategy.state_dict()["tiny"].numpy())  # it adapts


def test_seeded_globals_leave_no_trace() -> None:
    def draw() -> tuple[float, float]:
        return random.random(), float(np.random.random())  # noqa: NPY002

    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    first, second = draw(), draw()
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert draw() == first
    with seeded_globals(0, "a"):
        inside = draw()
    assert draw() == second
    with seeded_globals(0, "a"):
        assert draw() == inside
    for other in ((1, "a", 0), (0, "b", 0), (0, "a", 1)):
        with seeded_globals(*other):
            assert draw() != inside


@dataclasses.dataclass(frozen=True, kw_only=True)
class Told(FedAvgClient):
    """Says what it was told."""

    def __call__(self, client: Client, broadcast: Broadcast) -> Upload:
        upload = super().__call__(client, broadcast)
        told = {name: float(value) for name, value in broadcast.config.items()}  # type: ignore[arg-type]
        return dataclasses.replace(upload, metrics={**upload.metrics, **told})


def test_what_it_tells_clients_reaches_those_that_read_it(tmp_path: Path) -> None:
    config = with_stock("FedProx", proximal_mu=0.25)
    with pytest.raises(ConfigError, match="FedProx tells clients proximal-mu, which the client half does not read"):
        build_strategy(Setup(config))
    config["strategy"]["server"]["client_reads"] = ["proximal-mu"]
    config["strategy"]["client"]["_target_"] = "tests.test_stock.Told"
    config["run_dir"] = str(tmp_path / "run")
    simulation.run(config)
    assert [row["metrics"]["proximal-mu"] for row in rows(tmp_path / "run", "client")] == [0.25] * 8


# --- resume ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["fedadam", "fedavgm"])
def test_its_state_goes_on(name: str, tmp_path: Path) -> None:
    """After two rounds: kept and loaded it goes on the same; without, it does not, so there was something to keep.

    The arrays come back in another order, as a checkpoint gives them.
    """
    config = small(None, f"strategy={name}")
    grid = open_in_process(config, tmp_path)
    arrays = Setup(config).server().initial_arrays()

    def one_round(strategy: Stock, round_num: int, arrays: ArrayRecord) -> ArrayRecord:
        replies = grid.send_and_receive(ask(strategy, round_num, arrays, grid))
        merged, _ = strategy.aggregate_train(round_num, replies)
        assert merged is not None
        return merged

    straight, forgetful, resumed = stock(config), stock(config), stock(config)
    for round_num in (1, 2):
        arrays = one_round(straight, round_num, arrays)
    state = copy.deepcopy(straight.state_dict())
    assert any(".m_t" in key or ".momentum_vector" in key for key in state)
    resumed.load_state_dict(state)
    expected = numpy_of(one_round(straight, 3, arrays))
    sorted_arrays = ArrayRecord({key: arrays[key] for key in sorted(arrays)})
    assert_same(numpy_of(one_round(resumed, 3, sorted_arrays)), expected)
    forgotten = numpy_of(one_round(forgetful, 3, arrays))
    assert any(not np.array_equal(forgotten[key], expected[key]) for key in expected)


def test_what_is_kept_comes_back() -> None:
    value = {
        "numbers": [None, True, 3, 0.5, math.inf, "text"],
        4: (np.float64(0.1), np.float32([[1, 2]]), np.array(7, np.int64)),
        "record": ArrayRecord({"b": _array([1.5]), "a": _array([])}),
    }
    tensors: dict[str, torch.Tensor] = {}
    again = unpack(json.loads(json.dumps(pack(value, "x", tensors))), tensors)
    assert again["numbers"] == value["numbers"]
    assert list(again) == list(value)
    scalar, array, zero_dim = again[4]
    assert (type(scalar), scalar, type(again[4])) == (np.float64, 0.1, tuple)
    assert (array.dtype, array.tolist(), zero_dim.shape, zero_dim.dtype) == (np.float32, [[1, 2]], (), np.int64)
    assert list(again["record"]) == ["b", "a"]
    assert again["record"]["b"].data == value["record"]["b"].data  # type: ignore[index]


def _array(values: list[float]) -> Array:
    return Array(np.array(values, np.float32))


# --- what cannot work ------------------------------------------------------------------------------------------------
class Remembers(FedAvg):
    """A strategy of somebody's with a memory that is no array."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self.seen = {server_round}
        return super().aggregate_train(server_round, replies)


class Renames(FedAvg):
    """A strategy of somebody's that returns something else."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return ArrayRecord({"mine": _array([1.0])}), None


class Explodes(FedAvg):
    """A strategy of somebody's that fails after the rehearsal, or diverges."""

    def __init__(self, *, how: str) -> None:
        super().__init__()
        self.how = how

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, metrics = super().aggregate_train(server_round, replies)
        assert arrays is not None
        if "w" in arrays:
            return arrays, metrics
        if self.how == "raises":
            raise ZeroDivisionError("no clients left")
        return ArrayRecord({name: Array(np.full(a.shape, np.nan, a.dtype)) for name, a in arrays.items()}), metrics


@pytest.mark.parametrize(
    ("target", "arguments", "overrides", "message"),
    [
        ("Bulyan", {}, (), r"Bulyan cannot work with conv4_4, of which a round has at most 2 replies: it makes nothing "
         r"of 2 replies. It needs 3. Raise federation.num_clients"),
        ("Bulyan", {"num_malicious_nodes": 1}, FIVE, "at most 5 replies: .* It needs 7"),
        ("Bulyan", {}, (*FIVE, "federation.cohort_size=2"), "at most 2 replies"),
        ("Krum", {"num_malicious_nodes": 1}, ("federation.families=[tiny]",), "fewer than 5. It needs 5. Raise"),
        ("Krum", {"num_malicious_nodes": -1}, (), "num_malicious_nodes must be at least 0, got -1"),
        ("MultiKrum", {"num_nodes_to_select": 0}, (), "MultiKrum does not return the weights"),
        ("FedTrimmedAvg", {"beta": 0.5}, (), r"beta.* must be in the range \[0, 0.5\)"),
        ("FedAdam", {"etta": 0.1}, (), "unexpected keyword argument 'etta'"),
        ("FedAdam", {"eta": "fast"}, (), 'strategy.server.strategy.eta must be a number, got "fast"'),
        ("FedAvg", {"fraction_train": 0.5}, (), "fraction_train=0.5 would decide what is decided by federation.cohort"),
        ("FedAvg", {"min_available_nodes": 9}, (), "min_available_nodes=9 would decide"),
        ("FedAvg", {"fraction_evaluate": 0.5}, (), "fraction_evaluate=0.5 would decide what is decided by nobody"),
        ("QFedAvg", {"client_learning_rate": 0.1}, (), "QFedAvg does not work here: .*training loss.*server.metrics"),
        ("FedXgbBagging", {}, (), "FedXgbBagging does not work here"),
        ("Result", {}, (), "must name a flwr.serverapp.strategy.Strategy, got a Result"),
        ("Nobody", {}, (), "strategy.server.strategy._target_=flwr.serverapp.strategy.Nobody cannot be imported"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_the_run(
    target: str, arguments: dict[str, Any], overrides: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    config = with_stock(target, *overrides, **arguments)
    config["run_dir"] = str(tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        simulation.run(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Remembers", "Remembers.seen is a set, which a checkpoint cannot keep"),
        ("Renames", "Renames does not return the weights that it was given"),
    ],
)
def test_a_strategy_of_somebodys_that_cannot_work(name: str, message: str) -> None:
    config = with_stock("FedAvg")
    config["strategy"]["server"]["strategy"]["_target_"] = f"tests.test_stock.{name}"
    with pytest.raises(ConfigError, match=message):
        build_strategy(Setup(config))


def test_the_command_says_it_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for override, message in (
        ("strategy.server.strategy.beta=0.7", "beta"),
        ("+strategy.server.strategy.betta=0.1", "betta"),
        ("strategy.server.strategy.beta=much", "beta must be a number"),
        ("+strategy.server.strategy.min_train_nodes=7", "min_train_nodes=7"),
    ):
        assert main([*SMALL, "strategy=fedtrimmedavg", override, "run_dir=run"]) == 2
        ended = capsys.readouterr()
        assert message in ended.err
        assert "Traceback" not in ended.err
        assert ended.err.count("error") == 1 or ended.err.startswith("error: ")
        assert not (tmp_path / "run").exists()


def exploding(how: str) -> dict[str, Any]:
    config = with_stock("FedAvg", how=how)
    config["strategy"]["server"]["strategy"]["_target_"] = "tests.test_stock.Explodes"
    return config


def test_a_failure_in_the_run_names_family_and_round(tmp_path: Path) -> None:
    _, strategy, _, replies = first_round(exploding("raises"), tmp_path)
    with pytest.raises(
        FedSSLError, match="Explodes failed in round 1 on 2 replies of conv4_4: ZeroDivisionError: no clients left"
    ):
        strategy.aggregate_train(1, replies)


def test_a_strategy_that_diverges_loses_the_round_and_forgets_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    setup, strategy, _, replies = first_round(exploding("diverges"), tmp_path)
    assert isinstance(strategy, Stock)
    held = dict(strategy.held)
    with caplog.at_level(logging.WARNING, logger="fedssl"):
        arrays, metrics = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert metrics is not None
    assert_same(numpy_of(arrays), numpy_of(setup.server().initial_arrays()))
    assert metrics["conv4_4/lost"] == 1
    assert "round 1: conv4_4 keeps its weights, because no network works with the merged ones (weight" in caplog.text
    assert strategy.held == held
    resumed = stock(exploding("diverges"))
    resumed.load_state_dict(strategy.state_dict())
    assert resumed.notes() == strategy.notes()
    assert any("conv4_4 kept its weights in 1 of the rounds (1)" in note for note in resumed.notes())


@pytest.mark.parametrize(("target", "malicious"), [("Bulyan", 0), ("Krum", 1)])
def test_too_few_replies_in_a_round_keep_the_weights(
    target: str, malicious: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And the next round goes on."""
    config = with_stock(target, *FIVE, num_malicious_nodes=malicious)
    strategy, messages = asked(config, tmp_path, value=0.5)
    with caplog.at_level(logging.WARNING, logger="fedssl"):
        assert values(strategy, replies_of(strategy, messages, [1.0] * 5)[:2]) == (0.5, 0.5)
    assert "round 1: tiny keeps its weights" in caplog.text
    messages = ask(strategy, 2, constant(strategy, 0.5), open_in_process(config, tmp_path))
    assert values(strategy, replies_of(strategy, messages, [1.0] * 5)) == (1.0, 1.0)


# --- untrusted uploads -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("action", ["nan", "wrong dtype", "other name", "wrong round", "infinite weight", "no weight"])
def test_a_lie_is_refused_and_the_rest_is_merged(action: str, tmp_path: Path) -> None:
    strategy, messages = asked(with_stock("FedMedian", *FIVE), tmp_path)
    replies = replies_of(strategy, messages, [1, 2, 10, 3, 4])
    liar = Message(lie(Upload.from_message(replies[2]), action).to_content(), reply_to=messages[2])
    with pytest.raises(PayloadError):
        strategy.check(liar)
    merged = values(strategy, [*replies[:2], liar, *replies[3:]])
    assert merged == values(strategy, [*replies[:2], *replies[3:]])
    assert merged[0] == 2.5


def test_a_client_that_was_not_asked_is_refused(tmp_path: Path) -> None:
    config = with_stock("FedMedian", *FIVE)
    strategy, messages = asked(config, tmp_path)
    replies = replies_of(strategy, messages, [1.0] * 5)
    strategy.asked["tiny"] = dataclasses.replace(
        strategy.asked["tiny"], nodes={p: n for p, n in strategy.asked["tiny"].nodes.items() if p != 3}
    )
    with pytest.raises(PayloadError, match="partition 3 was not asked in this round"):
        strategy.check(replies[3])


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_a_number_that_the_strategy_reads_is_checked(loss: float | None, tmp_path: Path) -> None:
    config = with_stock("QFedAvg", *FIVE, client_learning_rate=0.5, train_loss_key="loss")
    config["strategy"]["server"]["metrics"] = ["loss"]
    strategy, messages = asked(config, tmp_path)
    replies = replies_of(strategy, messages, [1.0] * 5)
    strategy.check(replies[0])
    upload = Upload.from_message(replies[0])
    metrics = {k: v for k, v in upload.metrics.items() if k != "loss"} | ({} if loss is None else {"loss": loss})
    liar = Message(dataclasses.replace(upload, metrics=metrics).to_content(), reply_to=messages[0])
    with pytest.raises(PayloadError, match=r"it declares loss=.*, which QFedAvg reads"):
        strategy.check(liar)


def test_notes_name_a_choice_that_is_none() -> None:
    notes = stock(with_stock("Krum")).notes()
    assert notes[-1].startswith("conv4_4 has two replies a round, each as far from the other: Krum's choice")
    assert [note.split(" ")[0] for note in notes] == ["conv4_2", "tiny", "conv4_4"]
    assert len(stock(with_stock("FedMedian")).notes()) == 2


def test_the_files_list_what_stock_takes() -> None:
    for name in STOCK:
        server = compose([f"strategy={name}"])["strategy"]["server"]
        assert server.keys() == {"_target_", "strategy", "metrics", "client_reads"}
