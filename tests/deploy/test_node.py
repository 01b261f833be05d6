"""A node in this process: what it brings, what it refuses, and every byte that it sends."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedssl import targets
from fedssl.config import compose, compose_node
from fedssl.deploy import client_app
from fedssl.deploy.client_app import app, within
from fedssl.deploy.command import main
from fedssl.deploy.node import NodeSetup, node_of
from fedssl.deploy.processes import NODE_FILE, RUN_CONFIG
from fedssl.errors import ConfigError, PayloadError
from fedssl.federation import flower_compat, simulation
from fedssl.federation.records import Upload
from fedssl.federation.roster import Introduction, Member
from fedssl.federation.setup import Setup, write_members
from fedssl.seeding import unforeseeable
from tests.deploy.harness import folder_of

RUN_ID = "0123456789abcdef" * 2
SMALL = (
    "federation.num_clients=2",
    "federation.families=[conv4_16]",
    "client.local_epochs=1",
    "client.batch_size=8",
    "projector.hidden_dim=16",
    "projector.out_dim=8",
    "device=cpu",
)


@pytest.fixture(autouse=True)
def _of_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a node allows holds for its process, and a SuperNode starts one for every message."""
    monkeypatch.setattr(targets, "_allowed", None)
    client_app._client_app.cache_clear()
    flower_compat.identify_process()


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    """The configuration of a run whose nodes have their own images."""
    folder_of(tmp_path / "public", 30, 1)
    folder_of(tmp_path / "probes", 40, 2, "cat", "dog")
    return compose(
        [
            *SMALL, "partition=nodes", "data=image_folder", f"data.root={tmp_path / 'probes'}", "data.image_size=16",
            "public=dataset", "public.data=image_folder", f"public.root={tmp_path / 'public'}", "public.size=24",
            f"run_dir={tmp_path / 'run'}",
        ]
    )  # fmt: skip


def node_file(tmp_path: Path, *overrides: str, num_images: int = 20) -> Path:
    """A node of partition 1 with images of its own."""
    mine = tmp_path / f"mine-{num_images}"
    if not mine.exists():
        folder_of(mine, num_images, 3)
    own = [
        "partition_id=1", "data=image_folder", f"data.root={mine}", "public.data=image_folder",
        f"public.root={tmp_path / 'public'}", f"store={tmp_path / 'store'}", "device=cpu",
    ]  # fmt: skip
    path = tmp_path / f"node-{num_images}.json"
    path.write_text(json.dumps(compose_node([*own, *overrides])))
    return path


def ask(config: Mapping[str, Any], node: Path | None, kind: str, content: RecordDict, **more: Any) -> Message:
    """What a SuperNode would hand the app, and its reply."""
    client_app._client_app.cache_clear()
    message = Message(content, 5, kind)
    flower_compat.stamp(message, "m1")
    told = {"config": config, "run_id": RUN_ID, **more}
    node_config = {"partition-id": 1, "num-partitions": 2} if node is None else {NODE_FILE: str(node)}
    return app(message, Context(1, 5, node_config, RecordDict(), {RUN_CONFIG: json.dumps(told)}))


def joined(reply: Message) -> Introduction:
    assert not reply.has_error(), reply.error.reason
    return Introduction.from_record(reply.content.config_records["join"])


def training(config: Mapping[str, Any], round_num: int = 1) -> RecordDict:
    """The server's message of a round without weights."""
    return RecordDict({"arrays": ArrayRecord(), "config": ConfigRecord({"server-round": round_num})})


NOTHING = RecordDict({"config": ConfigRecord()})


# --- joining ------------------------------------------------------------------------------------------------------
def test_a_node_says_who_it_is_and_the_server_agrees(run: dict[str, Any], tmp_path: Path) -> None:
    said = joined(ask(run, node_file(tmp_path, "family=resnet8"), "query.join", NOTHING))
    assert (said.partition_id, said.family, said.num_images, said.rehearsal) == (1, "resnet8", 20, False)
    Setup(run).check_node(said)


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("family", "perceptron", "its architecture is 'perceptron'"),
        ("public_fingerprint", "0" * 64, "its public set .* is not the server's"),
        ("rehearsal", True, "it names no images of its own"),
        ("version", "99.0.0", "it runs fedssl 99.0.0, the server"),
    ],
)
def test_the_server_refuses_what_does_not_fit(
    run: dict[str, Any], tmp_path: Path, field: str, value: object, why: str
) -> None:
    said = joined(ask(run, node_file(tmp_path), "query.join", NOTHING))
    with pytest.raises(PayloadError, match=why):
        Setup(run).check_node(Introduction(**{**vars(said), field: value}))


def test_a_public_copy_elsewhere_is_the_same_and_another_order_is_not(run: dict[str, Any], tmp_path: Path) -> None:
    copy = folder_of(tmp_path / "copy", 30, 1)
    server = Setup(run)
    server.check_node(joined(ask(run, node_file(tmp_path, f"public.root={copy}"), "query.join", NOTHING)))
    (copy / "000.png").rename(copy / "zzz.png")
    with pytest.raises(PayloadError, match="public set"):
        server.check_node(joined(ask(run, node_file(tmp_path, f"public.root={copy}"), "query.join", NOTHING)))


def test_own_images_and_a_split_data_set_do_not_go_together(tmp_path: Path) -> None:
    split = compose([*SMALL, "data.num_images=60", "public.size=20", f"run_dir={tmp_path / 'run'}"])
    reply = ask(split, node_file(tmp_path), "query.join", NOTHING)
    assert "the server must use public=dataset" in reply.error.reason
    rehearsing = joined(ask(split, None, "query.join", NOTHING))
    assert rehearsing.rehearsal
    Setup(split).check_node(rehearsing)


def test_a_simulation_cannot_have_images_on_nodes(run: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="run it with fedssl-deploy"):
        Setup(run).check()


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (("data.root=/nowhere",), "/nowhere"),
        (("family=perceptron",), "family=perceptron: the run knows conv4_16"),
        (("method=byol",), "the server must name the method in client.methods"),
        (("partition_id=7",), "partition_id=7, but the run has federation.num_clients=2"),
    ],
)
def test_what_a_node_cannot_do_it_says(
    run: dict[str, Any], tmp_path: Path, overrides: tuple[str, ...], why: str
) -> None:
    reply = ask(run, node_file(tmp_path, *overrides), "query.join", NOTHING)
    assert why in reply.error.reason


def test_a_method_that_the_server_knows_can_be_a_nodes_own(run: dict[str, Any], tmp_path: Path) -> None:
    both = {**run, "client": {**run["client"], "methods": [run["method"], compose(["method=byol"])["method"]]}}
    path = node_file(tmp_path, "method=byol")
    joined(ask(both, path, "query.join", NOTHING))
    setup = NodeSetup(both, node_of(yaml.safe_load(path.read_text())))
    assert type(setup.client_method(1)).__name__ == "BYOL"


# --- what a server cannot make it do ------------------------------------------------------------------------------
def test_a_server_cannot_make_a_node_call_anything(run: dict[str, Any], tmp_path: Path) -> None:
    loot = tmp_path / "loot"
    evil = {"_target_": "pathlib.Path.touch", "self": {"_target_": "pathlib.Path", "_args_": [str(loot)]}}
    for config in (
        {**run, "method": evil},
        {**run, "strategy": {**run["strategy"], "client": evil}},
        {**run, "models": {**run["models"], "conv4_16": {"_target_": "fedssl.tracking.write_text", "path": str(loot)}}},
        {**run, "views": {**run["views"], "extra": [evil]}},
    ):
        reply = ask(config, node_file(tmp_path), "query.join", NOTHING)
        assert "not allowed here" in reply.error.reason
    assert not loot.exists()


def test_a_server_cannot_name_private_images_as_the_public_ones(run: dict[str, Any], tmp_path: Path) -> None:
    """Where the public images are, and how they are read, is the owner's word; nothing is fetched."""
    fitting = joined(ask(run, node_file(tmp_path), "query.join", NOTHING))
    for change in ({"train_split": "../mine-20"}, {"root": str(tmp_path / "mine-20")}, {"download": True}):
        sent = {**run, "public": {**run["public"], "source": {**run["public"]["source"], **change}}}
        assert joined(ask(sent, node_file(tmp_path), "query.join", NOTHING)) == fitting
    with pytest.raises(ConfigError, match=r"says itself what the public images are: public\.data= and"):
        node_of({**compose_node(["partition_id=1", "data=digits"])})


def test_nothing_is_downloaded_on_a_servers_word(tmp_path: Path) -> None:
    config = compose([*SMALL, "data=cifar10", "data.download=true", f"data.root={tmp_path / 'x'}"])
    setup = NodeSetup(config, node_of(compose_node(["partition_id=1"])))
    assert setup.config["data"]["download"] is False
    with pytest.raises(ConfigError):
        _ = setup.train
    assert not (tmp_path / "x").exists()


def test_clients_are_probed_with_the_servers_images_or_not_at_all(run: dict[str, Any], tmp_path: Path) -> None:
    """Not with a node's own: figures of clients would not be of the same test."""
    own = node_of(yaml.safe_load(node_file(tmp_path).read_text()))
    with pytest.raises(ConfigError, match="has no copy of them"):
        _ = NodeSetup(run, own).probe_data
    copy = [f"evaluate.root={tmp_path / 'probes'}", "evaluate.data=image_folder"]
    with_copy = node_of(yaml.safe_load(node_file(tmp_path, *copy).read_text()))
    ours, theirs = Setup(run).probe_data, NodeSetup(run, with_copy).probe_data
    assert [s.digest for s in ours] == [s.digest for s in theirs]


def test_a_configuration_of_nonsense_is_named(run: dict[str, Any], tmp_path: Path) -> None:
    for group in ("federation", "data", "views", "public", "client"):
        for nonsense in (None, {}, [], "x"):
            reply = ask({**run, group: nonsense}, node_file(tmp_path), "query.join", NOTHING)
            assert reply.has_error(), (group, nonsense)


def test_a_refusal_reaches_the_owner(run: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told = RecordDict({"config": ConfigRecord({"reason": "another public set"})})
    assert not ask(run, node_file(tmp_path), "query.refused", told).has_error()
    assert "the server refuses this node: another public set" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["partition_id=x"], 'partition_id must be a whole number, got "x"'),
        (["partition_id=-1"], "partition_id counts from 0, got -1"),
        (["partition_id=0", "device=tpu"], "device must be auto"),
        (["partition_id=0", "allow_targets=fedssl."], "allow_targets must be a list"),
        (["partition_id=0", "data=image_folder", "data.root=/nowhere", "public.data=digits"], "/nowhere"),
        (["partition_id=0", "rehearsal_root=/x", "data=digits", "public.data=digits"], "without data="),
        ([], "partition_id"),
    ],
)
def test_a_node_is_checked_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], why: str
) -> None:
    assert main(["client", "127.0.0.1:1", "--insecure", f"store={tmp_path}", *overrides]) == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--port", "99999"], ["--port", "x"]])
def test_a_port_is_a_port(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["server", "--insecure", *option]) == 2
    assert "a port is a number from 1 to 65535" in capsys.readouterr().err


@pytest.mark.parametrize("run_id", ["../../etc", "", "x" * 32, 5])
def test_a_runs_name_is_no_path(run: dict[str, Any], tmp_path: Path, run_id: Any) -> None:
    reply = ask(run, node_file(tmp_path), "query.join", NOTHING, run_id=run_id)
    assert "no name that fedssl gives" in reply.error.reason


def test_a_run_that_is_none_is_named(tmp_path: Path) -> None:
    message = Message(NOTHING, 5, "query.join")
    flower_compat.stamp(message, "m1")
    for told in ("", "{}", '{"config": 3, "run_id": "a"}'):
        reply = app(message, Context(1, 5, {"partition-id": 0}, RecordDict(), {RUN_CONFIG: told}))
        assert "the run configuration has no cfg-json of fedssl" in reply.error.reason


# --- what it sends ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("codec", ["factor", "dense", "topk", "triangle"])
def test_every_byte_that_a_client_sends_is_declared_and_none_tells_how_many_images_it_has(
    run: dict[str, Any], tmp_path: Path, codec: str
) -> None:
    """The objects that Flower puts on the wire, from nodes of the same partition with 20 and with 200 images."""
    config = {**run, "codec": compose([f"codec={codec}"])["codec"]}
    config["strategy"] = compose([*SMALL, f"codec={codec}"])["strategy"]
    replies = [ask(config, node_file(tmp_path, num_images=n), "train", training(config)) for n in (20, 200)]
    sent = []
    for reply in replies:
        assert not reply.has_error(), reply.error.reason
        content = reply.content
        assert {name: type(record) for name, record in content.items()} == {
            "arrays": ArrayRecord,
            "metrics": MetricRecord,
            "header": ConfigRecord,
        }
        assert set(content.config_records["header"]) == {
            "round_num", "partition_id", "family", "codec", "public_fingerprint",
        }  # fmt: skip
        assert all(type(value) is float for value in content.metric_records["metrics"].values())
        upload = Upload.from_message(reply)
        for array in upload.arrays.values():
            assert 24 in array.shape or array.size == 24 * 23 // 2 or array.size == 24 * 25 // 2  # of public images
        objects = get_all_nested_objects(reply).values()
        metadata_free = [obj for obj in objects if not isinstance(obj, Message)]
        sent.append(sorted((type(obj).__name__, len(obj.deflate())) for obj in metadata_free))
        everything = b"".join(obj.deflate() for obj in objects)
        assert str(tmp_path).encode() not in everything
    assert sent[0] == sent[1]
    few, many = (Upload.from_message(reply).num_images for reply in replies)
    assert (few, many) == (20, 200)  # declared as a number, in eight bytes


def test_the_rotation_of_own_images_comes_from_no_seed(run: dict[str, Any], tmp_path: Path) -> None:
    """The same task twice: the same similarities under two rotations. A rehearsal repeats itself."""
    factors = []
    for _ in range(2):
        reply = ask(run, node_file(tmp_path), "train", training(run))
        (value,) = Upload.from_message(reply).arrays.values()
        factors.append(torch.from_numpy(value.astype(np.float32)))
    assert (factors[0] - factors[1]).abs().max() > 0.1
    torch.testing.assert_close(factors[0] @ factors[0].T, factors[1] @ factors[1].T, atol=0.01, rtol=0.01)


def test_so_does_the_servers_own_rotation(run: dict[str, Any]) -> None:
    first, second = (Setup(run).server().secret for _ in range(2))
    assert first is not None
    assert second is not None
    assert not torch.equal(torch.randn(4, generator=first()), torch.randn(4, generator=second()))
    assert Setup(compose(list(SMALL))).server().secret is None


def test_a_secret_generator_is_never_the_same_and_as_good_as_another() -> None:
    draws = torch.stack([torch.randn(1000, generator=unforeseeable()) for _ in range(20)])
    assert len({tuple(draw[:4].tolist()) for draw in draws}) == 20
    assert abs(draws.mean()) < 0.05  # of 20,000: 7 standard errors
    assert abs(draws.std() - 1) < 0.05


# --- memory and time ----------------------------------------------------------------------------------------------
def test_memory_is_kept_by_run_and_only_as_long_as_a_resume_may_need_it(run: dict[str, Any], tmp_path: Path) -> None:
    config = {**run, "downlink": "none", "strategy": compose([*SMALL, "downlink=none"])["strategy"]}
    config["federation"] = {**run["federation"], "num_rounds": 9, "keep_checkpoints": 2}
    path = node_file(tmp_path)
    for round_num in range(1, 7):
        assert not ask(config, path, "train", training(config, round_num)).has_error()
    kept = sorted(int(file.stem) for file in (tmp_path / "store" / RUN_ID / "1").iterdir())
    assert kept == [4, 5, 6]


def test_what_hangs_is_answered_when_nobody_waits_any_more() -> None:
    message = Message(NOTHING, 5, "train")
    started = time.monotonic()
    reply = within(0.2, lambda *_: time.sleep(3), message, Context(1, 5, {}, RecordDict(), {}))
    assert time.monotonic() - started < 2
    assert "still at work after 0 s" in reply.error.reason


def test_what_a_client_raises_goes_on_to_flower() -> None:
    def fails(*_: object) -> Message:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        within(5, fails, Message(NOTHING, 5, "train"), Context(1, 5, {}, RecordDict(), {}))


# --- a run directory of a deployment ------------------------------------------------------------------------------
def test_what_is_on_the_nodes_cannot_be_had_on_the_server(run: dict[str, Any], tmp_path: Path) -> None:
    """A resume, a replay and an evaluation know who took part, and that they are elsewhere."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    members = {
        p: Member(node_id=1000 + p, partition_id=p, family="conv4_16", num_images=20 + p, trains=True) for p in (0, 1)
    }
    write_members(run_dir, RUN_ID, members)
    setup = Setup(run, run_dir)
    setup.check()
    assert setup.members == members
    assert [setup.num_images(p) for p in (0, 1)] == [20, 21]
    with pytest.raises(ConfigError, match="fedssl-deploy server resume="):
        simulation.resume(run, run_dir)
    with pytest.raises(ConfigError, match="on their nodes"):
        simulation.replay(run, run_dir, round_num=1, partition_id=0)


def test_a_strategy_that_needs_all_images_in_one_place_is_refused(run: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_members(
        tmp_path / "run",
        RUN_ID,
        {0: Member(node_id=1000, partition_id=0, family="conv4_16", num_images=9, trains=True)},
    )
    with pytest.raises(ConfigError, match="they are on the clients' machines"):
        Setup(run, tmp_path / "run").private_union()
