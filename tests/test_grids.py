"""The in-process grid, and the placement rules of the Ray grid (which need no Ray)."""

import importlib
import time
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedssl.errors import BrokenProcessError, ConfigError
from fedssl.federation.client import Broadcast, Client
from fedssl.federation.client_app import make_client_app
from fedssl.federation.grids.base import LocalGrid
from fedssl.federation.grids.in_process import InProcess, InProcessGrid
from fedssl.federation.grids.ray import Placement, Ray, fitting
from fedssl.federation.records import Upload
from fedssl.federation.setup import Setup
from fedssl.federation.store import ClientStore
from tests import grid_apps
from tests.federation_helpers import small

NUM_CLIENTS = 10


def open_grid(num_clients: int = NUM_CLIENTS, threads: int = 1) -> InProcessGrid:
    return InProcess().open(grid_apps.Behaviour, num_clients=num_clients, threads=threads, device="cpu")


def messages(grid: Grid, partitions: list[int], action: str = "echo", **header: str | float) -> list[Message]:
    """One message to each of these partitions, with its own header and a common array."""
    nodes = list(grid.get_node_ids())
    arrays = ArrayRecord({"w": Array(np.zeros(4))})
    return [
        Message(RecordDict({"header": ConfigRecord({"action": action, **header}), "arrays": arrays}), nodes[p], "train")
        for p in partitions
    ]


class SortedFedAvg(FedAvg):
    """Flower's own FedAvg, which samples with the global generator and sums in the order of its sample, sorted."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        sent = super().configure_train(server_round, arrays, config, grid)
        return sorted(sent, key=lambda message: message.metadata.dst_node_id)


def stock_fedavg(grid: Grid, num_rounds: int = 3) -> np.ndarray:
    """The weights after some rounds of Flower's strategy over our grid."""
    strategy = SortedFedAvg(fraction_train=1.0, fraction_evaluate=0.0)
    return strategy.start(grid, ArrayRecord({"w": Array(np.zeros(5))}), num_rounds=num_rounds).arrays["w"].numpy()


def plain_fedavg(num_clients: int, num_rounds: int = 3) -> np.ndarray:
    """The same without Flower: McMahan et al. 2017, https://arxiv.org/abs/1602.05629, Algorithm 1 with all clients."""
    weights = np.zeros(5)
    for _ in range(num_rounds):
        results = [grid_apps.local_weights(weights, partition) for partition in range(num_clients)]
        total = sum(rows for _, rows in results)
        weights = np.sum([w * (rows / total) for w, rows in results], axis=0)
    return weights


def test_stock_fedavg_equals_a_plain_loop_bit_for_bit() -> None:
    grid = InProcess().open(grid_apps.least_squares, num_clients=NUM_CLIENTS, threads=1, device="cpu")
    np.testing.assert_array_equal(stock_fedavg(grid), plain_fedavg(NUM_CLIENTS))


def test_every_partition_has_one_node() -> None:
    grid = open_grid()
    replies = grid.send_and_receive(messages(grid, list(range(NUM_CLIENTS))))
    facts = [reply.content["facts"] for reply in replies]
    assert [f["partition"] for f in facts] == list(range(NUM_CLIENTS))
    assert {f["partitions"] for f in facts} == {NUM_CLIENTS}
    assert len(set(grid.get_node_ids())) == NUM_CLIENTS == len(list(grid.get_nodes()))


def test_replies_come_in_the_order_of_the_messages() -> None:
    grid = open_grid()
    order = [7, 0, 3, 9]
    replies = grid.send_and_receive(messages(grid, order))
    assert [reply.content["facts"]["partition"] for reply in replies] == order
    np.testing.assert_array_equal(replies[0].content["arrays"]["w"].numpy(), np.full(4, 7.0))


def test_pulling_runs_the_clients_one_by_one() -> None:
    """A long client is handed out before the next one starts: progress can be shown."""
    grid = open_grid()
    ids = grid.push_messages(messages(grid, [0, 1, 2], "sleep", seconds=0.06))
    for expected in ids:
        (reply,) = grid.pull_messages(ids)
        assert reply.metadata.reply_to_message_id == expected
    assert grid.pull_messages(ids) == []


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("raise", "ValueError: during local training: no images in partition 1"),
        ("exit", "SystemExit: 3"),
        ("wrong", r"TypeError: a client app must return Message\(..., reply_to=message\), got NoneType"),
    ],
)
def test_a_failing_client_is_an_error_reply_and_the_others_run(action: str, reason: str) -> None:
    grid = open_grid()
    batch = [*messages(grid, [0]), *messages(grid, [1], action), *messages(grid, [2])]
    good, failed, also_good = grid.send_and_receive(batch)
    assert good.has_content()
    assert also_good.has_content()
    assert failed.error.code == 2
    with pytest.raises(AssertionError, match=f"^{reason}$"):
        raise AssertionError(failed.error.reason)
    assert failed.metadata.reply_to_message_id == batch[1].metadata.message_id


def test_a_process_that_cannot_go_on_ends_the_run_that_is_in_it() -> None:
    grid = open_grid()
    with pytest.raises(BrokenProcessError, match="no recording"):
        grid.send_and_receive([*messages(grid, [0]), *messages(grid, [1], "break"), *messages(grid, [2])])


def test_the_client_app_says_in_which_phase_its_process_broke(tmp_path: Path) -> None:
    def update(client: Client, broadcast: Broadcast) -> Upload:
        with client.doing("local training"):
            raise BrokenProcessError("no recording")

    setup = Setup(small(None))
    app = make_client_app(setup, update, ClientStore(tmp_path))
    grid = InProcess().open(lambda: app, num_clients=setup.federation.num_clients, threads=1, device="cpu")
    content = RecordDict({"config": ConfigRecord({"server-round": 1})})
    with pytest.raises(BrokenProcessError, match="during local training: BrokenProcessError: no recording"):
        grid.send_and_receive([Message(content, grid.get_node_ids()[0], "train")])


def test_an_interrupt_is_not_a_client_failure() -> None:
    def interrupted(message: Message, context: object) -> Message:
        raise KeyboardInterrupt

    grid = InProcess().open(lambda: interrupted, num_clients=1, threads=1, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        grid.send_and_receive(messages(grid, [0]))


def test_late_replies_are_missing_and_forgotten() -> None:
    grid = open_grid()
    batch = [*messages(grid, [0]), *messages(grid, [1, 2], "sleep", seconds=0.3)]
    started = time.monotonic()
    replies = grid.send_and_receive(batch, timeout=0.2)
    assert time.monotonic() - started < 0.5  # the second sleeper never ran
    assert [reply.content["facts"]["partition"] for reply in replies] == [0]
    assert grid.pull_messages([message.metadata.message_id for message in batch]) == []


def test_a_client_cannot_change_what_the_others_receive() -> None:
    grid = open_grid()
    batch = messages(grid, [0, 1], "mutate")
    replies = grid.send_and_receive(batch)
    assert [set(reply.content["arrays"]) for reply in replies] == [{"w", "extra"}] * 2
    assert all(set(message.content["arrays"]) == {"w"} for message in batch)
    assert batch[0].content["header"]["action"] == "mutate"


def test_state_stays_with_its_node_and_survives_a_failure() -> None:
    grid = open_grid()
    for expected in (1, 2):
        replies = grid.send_and_receive(messages(grid, [0, 1], "count"))
        assert [reply.content["facts"]["count"] for reply in replies] == [expected] * 2
    grid.send_and_receive(messages(grid, [0], "raise"))
    (reply,) = grid.send_and_receive(messages(grid, [0], "count"))
    assert reply.content["facts"]["count"] == 3


@pytest.mark.parametrize("threads", [1, 3])
def test_torch_threads_are_set_for_the_client_only(threads: int) -> None:
    before = torch.get_num_threads()
    grid = open_grid(threads=threads)
    (reply,) = grid.send_and_receive(messages(grid, [0]))
    assert reply.content["facts"]["threads"] == threads
    assert torch.get_num_threads() == before


def test_unknown_nodes_are_named() -> None:
    grid = open_grid()
    with pytest.raises(ValueError, match="there is no node 5: this grid has the nodes 1000 to 1009"):
        grid.push_messages([Message(RecordDict(), 5, "train")])


def test_closing_twice_is_fine_and_nothing_happened() -> None:
    with open_grid() as grid:
        assert isinstance(grid, LocalGrid)
        grid.push_messages(messages(grid, [0]))
    grid.close()
    assert grid.pop_events() == []


# --- where Ray's workers go ------------------------------------------------------------------------------------------


def settings(**changes: object) -> Ray:
    values: dict[str, object] = {
        "workers": None,
        "clients_per_gpu": 1,
        "max_clients_per_gpu": 8,
        "gpu_memory_share": 0.9,
        "gpus": None,
        "address": None,
        "max_retries": 2,
        "batch_seconds": 0.1,
    }
    return Ray(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "nodes", "num_clients", "threads", "device", "expected"),
    [
        ({}, [{"CPU": 8.0}], 100, 1, "auto", (8, 0, 0)),
        ({}, [{"CPU": 8.0}], 100, 3, "auto", (2, 0, 0)),
        ({}, [{"CPU": 8.0}], 5, 1, "auto", (5, 0, 0)),  # more workers than clients would idle
        ({}, [{"CPU": 2.0}], 5, 4, "auto", (1, 0, 0)),  # too many threads for the machine: one worker all the same
        ({"workers": 3}, [{"CPU": 2.0}], 5, 1, "auto", (3, 0, 0)),
        ({"address": "auto"}, [{"CPU": 3.0}, {"CPU": 3.0}], 100, 2, "cpu", (2, 2, 0)),  # one per machine, not three
        ({"address": "auto", "workers": 2}, [{"CPU": 1.0}, {"CPU": 1.0}], 9, 1, "cpu", (2, 1, 0)),
        ({"address": "auto", "workers": 3}, [{"CPU": 1.0}, {"CPU": 1.0}], 9, 1, "cpu", (3, 0, 0)),  # no room to claim
        ({"address": "auto"}, [{"CPU": 2.0}, {"CPU": 2.0}], 9, 4, "cpu", (1, 0, 0)),
        ({}, [{"CPU": 8.0, "GPU": 4.0}], 100, 1, "cpu", (8, 0, 0)),
        ({}, [{"CPU": 8.0, "GPU": 4.0}], 100, 1, "auto", (4, 0, 1)),
        ({"clients_per_gpu": 2}, [{"CPU": 8.0, "GPU": 4.0}], 100, 1, "cuda", (8, 0, 0.5)),
        ({"clients_per_gpu": 3}, [{"CPU": 8.0, "GPU": 4.0}], 100, 1, "cuda", (12, 0, 0.3333)),
        ({"clients_per_gpu": 4}, [{"GPU": 4.0}], 5, 1, "cuda", (7, 0, 0.5)),  # with 5 the last of them would idle
        ({"clients_per_gpu": 4}, [{"GPU": 4.0}], 3, 1, "cuda", (3, 0, 1)),
        ({"clients_per_gpu": 8}, [{"GPU": 2.0}], 3, 1, "cuda", (3, 0, 0.5)),
        ({}, [{"GPU": 8.0}], 1, 1, "cuda", (1, 0, 1)),
        ({}, [{"GPU": 8.0}], 5, 1, "cuda", (5, 0, 1)),
        ({"clients_per_gpu": 2, "workers": 4}, [{"GPU": 4.0}], 9, 1, "cuda", (4, 0, 1)),  # one on each, not two on two
        ({"workers": 2}, [{"GPU": 4.0}], 9, 1, "cuda", (2, 0, 1)),
    ],
)
def test_placement(
    changes: dict[str, object],
    nodes: list[dict[str, float]],
    num_clients: int,
    threads: int,
    device: str,
    expected: tuple[int, float, float],
) -> None:
    workers, num_cpus, num_gpus = expected
    placed = settings(**changes).place(nodes, num_clients=num_clients, threads=threads, device=device)
    assert placed == Placement(workers=workers, num_cpus=num_cpus, num_gpus=num_gpus)


@pytest.mark.parametrize(
    ("free", "peak", "share", "most", "expected"),
    [
        (10, 3, 1.0, 8, 2),  # the server is a third
        (10, 2.5, 1.0, 8, 3),  # to the last byte
        (10, 2.5, 0.7, 8, 2),
        (10, 1, 0.9, 8, 8),
        (10, 1, 0.9, 20, 9),
        (10, 0.5, 0.9, 20, 18),  # there is room for the server anyway
        (10, 11, 0.9, 8, 1),  # it was measured, so one does run
    ],
)
def test_as_many_fit_as_their_memory_does(free: float, peak: float, share: float, most: int, expected: int) -> None:
    assert fitting(1e9 * free, 1e9 * peak, share=share, most=most) == expected


def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="device=cuda, but Ray finds no GPU"):
        settings().place([{"CPU": 8.0}], num_clients=4, threads=1, device="cuda")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 0}, "grid.workers must be at least 1"),
        ({"clients_per_gpu": 0}, "grid.clients_per_gpu must be a whole number of at least 1, got 0"),
        ({"clients_per_gpu": -2}, "grid.clients_per_gpu must be a whole number"),
        (
            {"clients_per_gpu": "many"},
            "grid.clients_per_gpu must be a whole number of at least 1, got many: .*also be auto",
        ),
        ({"clients_per_gpu": 10_001}, "grid.clients_per_gpu must be at most 10000, got 10001: Ray counts a GPU in"),
        ({"max_clients_per_gpu": 0}, "grid.max_clients_per_gpu must be at least 1, got 0"),
        ({"gpu_memory_share": 0.0}, "grid.gpu_memory_share is a share .* above 0 and at most 1, got 0"),
        ({"gpu_memory_share": 1.1}, "grid.gpu_memory_share is a share"),
        ({"gpus": -1}, "grid.gpus must be at least 0"),
        ({"max_retries": -1}, "grid.max_retries must be at least 0"),
        ({"batch_seconds": -0.1}, "grid.batch_seconds must be at least 0"),
    ],
)
def test_settings_check_themselves(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


@pytest.mark.parametrize("name", ["ray", "in_process", "flower_sim"])
def test_every_setting_is_listed_in_its_yaml(name: str) -> None:
    values = yaml.safe_load((Path(__file__).parent.parent / "conf" / "grid" / f"{name}.yaml").read_text())
    module, _, class_name = values.pop("_target_").rpartition(".")
    settings_class = getattr(importlib.import_module(module), class_name)
    assert set(values) == {field.name for field in fields(settings_class)}
    settings_class(**values)
