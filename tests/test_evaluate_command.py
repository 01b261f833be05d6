"""The command `fedssl-evaluate`: what it measures of which models, where it writes, what it refuses."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedssl.__main__ import main as fedssl
from fedssl.config import compose_evaluation, conf_dir
from fedssl.evaluate import linear_cka
from fedssl.evaluate.features import extract_features
from fedssl.evaluate_command import _changes, main
from fedssl.federation import simulation
from fedssl.federation.client import own_model
from fedssl.federation.evaluation import over_clients
from fedssl.federation.records import Upload, load_state, model_state
from fedssl.federation.setup import Setup
from fedssl.federation.simulation import ReplayedRound
from strategies.fedavg import FedAvg
from tests.federation_helpers import SMALL, sabotaged, small, tree_hash
from tests.test_config import nodes

PROBES = ("evaluate.finetune.shares=[]", "evaluate.label_shares.shares=[]", "evaluate.raw_pixels=false")
QUICK = (
    "evaluate.finetune.epochs=2",
    "evaluate.finetune.min_steps=0",
    "evaluate.finetune.num_draws=2",
    "evaluate.label_shares.num_draws=2",
)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`fedssl-evaluate` in this process, as a call."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Ended:
        capsys.readouterr()
        try:
            code = main(arguments)
        except SystemExit as ended:  # argparse
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return Ended(code=code, out=captured.out, err=captured.err)

    return call


def finished(folder: Path, *overrides: str) -> Path:
    run_dir = folder / "run"
    assert fedssl([*SMALL, "federation.num_rounds=1", f"run_dir={run_dir}", *overrides]) == 0
    return run_dir


def measured(run_dir: Path, name: str = "evaluation.json") -> dict[str, Any]:
    results: dict[str, Any] = json.loads((run_dir / name).read_text())
    return results


def figures(results: Mapping[str, Any], model: str, family: str | None, partition: int | None = None) -> dict[str, Any]:
    (row,) = [
        row for row in results["rows"] if (row["model"], row["family"], row["partition"]) == (model, family, partition)
    ]
    metrics: dict[str, Any] = row["metrics"]
    return metrics


@pytest.fixture(scope="module")
def flesd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with global models, evaluated; tests must not change it."""
    run_dir = finished(tmp_path_factory.mktemp("flesd"), "strategy=flesd")
    before = tree_hash(run_dir)
    assert main([str(run_dir), *QUICK]) == 0
    (run_dir / "evaluation.json").rename(run_dir.parent / "kept.json")
    assert tree_hash(run_dir) == before  # weights, metrics, summary: nothing else has changed
    (run_dir.parent / "kept.json").rename(run_dir / "evaluation.json")
    return run_dir


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a global model, evaluated."""
    run_dir = finished(tmp_path_factory.mktemp("local"), "strategy=local_only")
    assert main([str(run_dir), *QUICK, "evaluate.finetune.shares=[0.1]"]) == 0
    return run_dir


# --- what is measured


def test_every_family_has_every_figure_beside_random_init(flesd: Path) -> None:
    results = measured(flesd)
    names = {f"labels1_top1{end}" for end in ("", "_std")}
    names |= {
        f"{kind}_{share}_top1{end}"
        for kind in ("linear", "finetune")
        for share in ("1pct", "10pct")
        for end in ("", "_std")
    }
    names |= {"knn_top1", "linear_top1", "alignment", "alignment_plain", "intra_class_alignment", "uniformity"}
    names |= {"effective_rank", "entropy_rank", "mean_cosine", "instance_acc1", "instance_acc5"}
    shards = {f"shard_{kind}_top1{end}" for kind in ("knn", "linear") for end in ("", "_min", "_max")}
    for family in ("conv4_4", "conv4_2", "tiny"):
        assert figures(results, "random_init", family).keys() == names | shards
        trained = figures(results, "global", family)
        assert trained.keys() == names | shards | {"cka_random_init"}
        assert all(np.isfinite(value) for value in trained.values())
        assert trained["alignment"] != figures(results, "random_init", family)["alignment"]
    pixels = figures(results, "raw_pixels", None)
    assert {"linear_10pct_top1", "knn_top1"} <= pixels.keys()
    assert "finetune_10pct_top1" not in pixels
    (reason,) = (results["absent"].pop("cka_global"),)
    assert reason == (
        "the run holds no client's own model beside the global one; evaluate.replay_clients=true trains those of "
        "round 1 again"
    )
    assert results["absent"] == {}
    assert results["labelled_images"] == {"all": 140, "1pct": 10, "10pct": 13}
    assert results["test_images"] == 360
    assert results["settings"]["finetune"]["epochs"] == 2
    assert results["settings"]["linear"]["l2"] == [0.01]


def test_the_probes_are_the_runs_own(flesd: Path) -> None:
    """The last round's and round 0's figures come out again, to the last bit."""
    results = measured(flesd)
    rows = [json.loads(line) for line in (flesd / "metrics.jsonl").read_text().splitlines()]
    evaluated = {(row["round"], row["family"]): row["metrics"] for row in rows if row["scope"] == "eval"}
    for family in ("conv4_4", "conv4_2", "tiny"):
        for model, round_num in (("global", 1), ("random_init", 0)):
            found = figures(results, model, family)
            for name, value in evaluated[round_num, family].items():
                assert found[name] == value, (model, family, name)
    assert evaluated[0, "raw_pixels"].items() <= figures(results, "raw_pixels", None).items()


def test_the_same_command_gives_the_same_figures_and_says_what_it_replaced(
    flesd: Path, tmp_path: Path, command: Command
) -> None:
    run_dir = Path(shutil.copytree(flesd, tmp_path / "run"))
    ended = command(str(run_dir), *QUICK)
    assert ended.code == 0
    assert f"replaced {run_dir / 'evaluation.json'}" in ended.out
    again, before = measured(run_dir), measured(flesd)
    assert again["rows"] == before["rows"]
    for text in ("conv4_4 (report family)", "random init", "raw pixels", "finetune_1pct_top1", "10pct 13"):
        assert text in ended.out
    value = figures(before, "global", "conv4_4")
    assert f"{value['finetune_10pct_top1']:.3f} ± {value['finetune_10pct_top1_std']:.3f}" in ended.out
    assert "without cka_global: the run holds no client's own model" in ended.out


def test_a_clients_mix_of_classes_weighs_the_test_images(flesd: Path) -> None:
    results, arrays = measured(flesd), np.load(flesd / "partition.npz")
    setup = Setup(yaml.safe_load((flesd / "config.yaml").read_text()), flesd)
    rows = [
        figures(results, "global", "conv4_4", partition) for partition in (0, 3)
    ]  # partition p runs families[p % 3]
    model = setup.build_model("conv4_4")
    model.load_state_dict(load_file(flesd / "models" / "conv4_4.safetensors"), strict=False)
    predictions = setup.evaluator.predictions(*setup.evaluator.features(model.backbone))
    for partition, row in zip((0, 3), rows, strict=True):
        shares, test = arrays["counts"][partition] / arrays["counts"][partition].sum(), setup.evaluator.test.labels
        for name in ("knn_top1", "linear_top1"):
            right = predictions[name].numpy() == test
            by_class = [right[test == label].mean() for label in range(10)]
            assert row[f"shard_{name}"] == pytest.approx(float(shares @ by_class))
    mean = figures(results, "global", "conv4_4")
    for name in ("shard_knn_top1", "shard_linear_top1"):
        values = [row[name] for row in rows]
        assert [mean[f"{name}{end}"] for end in ("", "_min", "_max")] == [np.mean(values), min(values), max(values)]


def test_without_a_global_model_every_clients_own_is_measured(local: Path) -> None:
    """The report family lives on every shard, the others with their clients."""
    results = measured(local)
    summary = json.loads((local / "summary.json").read_text())
    for family, partitions in (("conv4_4", [0, 1, 2, 3]), ("conv4_2", [1]), ("tiny", [2])):
        own = [figures(results, "own", family, partition) for partition in partitions]
        together = figures(results, "clients", family)
        for name in ("knn_top1", "linear_top1", "labels1_top1"):
            assert together[name] == pytest.approx(summary["families"][family][name])  # the run's own figures again
        for name in ("finetune_10pct_top1", "shard_linear_top1", "uniformity", "cka_random_init"):
            values = [row[name] for row in own]
            assert together[name] == pytest.approx(np.mean(values))
            assert (together[f"{name}_min"], together[f"{name}_max"]) == (min(values), max(values))
        assert "finetune_10pct_top1_std_min" not in together
        assert ("cka_clients" in together) == (len(partitions) > 1)
    assert not [row for row in results["rows"] if row["model"] == "global"]
    assert "no global model; cka_clients compares" in results["absent"]["cka_global"]


def test_clients_are_compared_with_each_other(local: Path) -> None:
    setup = Setup(yaml.safe_load((local / "config.yaml").read_text()), local)
    features = []
    for partition in range(4):
        model = setup.build_model("conv4_4")
        memory = load_file(local / "clients" / str(partition) / "1.safetensors")
        state = own_model(memory, "conv4_4")
        model.load_state_dict(state, strict=False)
        features.append(extract_features(model.backbone, setup.evaluator.test, setup.views, 64, torch.device("cpu")))
    pairs = [linear_cka(features[i], features[j]) for i in range(4) for j in range(i)]
    assert figures(measured(local), "clients", "conv4_4")["cka_clients"] == pytest.approx(np.mean(pairs), abs=1e-6)


def test_clients_that_keep_their_models_are_compared_with_the_global_one(tmp_path: Path, command: Command) -> None:
    run_dir = finished(tmp_path, "strategy=flesd", "downlink=none")
    ended = command(str(run_dir), *QUICK, "evaluate.finetune.shares=[]", "evaluate.families=[conv4_4]")
    assert (ended.code, "cka_global" in ended.out) == (0, True)
    results = measured(run_dir)
    own = [figures(results, "own", "conv4_4", partition) for partition in (0, 3)]
    assert all(0 < row["cka_global"] < 1 for row in own)
    assert all({"knn_top1", "linear_top1", "shard_linear_top1"} <= row.keys() for row in own)
    assert figures(results, "clients", "conv4_4")["cka_global"] == np.mean([row["cka_global"] for row in own])
    assert figures(results, "global", "conv4_4", 0).keys() == {"shard_knn_top1", "shard_linear_top1"}
    assert results["absent"] == {}
    assert {row["family"] for row in results["rows"]} == {"conv4_4", None}
    assert not any("finetune" in name for row in results["rows"] for name in row["metrics"])


def test_another_data_set_has_a_file_of_its_own(flesd: Path, tmp_path: Path, command: Command) -> None:
    """Transfer: three classes of coloured squares, decoded at the run's image size."""
    from PIL import Image

    run_dir = Path(shutil.copytree(flesd, tmp_path / "run"))
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 5)):
        for channel, name in enumerate(("red", "green", "blue")):
            (tmp_path / "squares" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (20, 20, 3), dtype=np.uint8)
                pixels[:, :, channel] += 190
                Image.fromarray(pixels).save(tmp_path / "squares" / split / name / f"{i}.png")
    before = (run_dir / "evaluation.json").read_bytes()
    given = ("evaluate.data=image_folder", f"evaluate.root={tmp_path / 'squares'}", "evaluate.families=[tiny]")
    ended = command(str(run_dir), *QUICK, *given)
    assert ended.code == 0, ended.err
    results = measured(run_dir, "evaluation-image_folder.json")
    assert "wrote" in ended.out
    assert (run_dir / "evaluation.json").read_bytes() == before
    assert results["test_images"] == 15
    assert results["labelled_images"] == {"all": 36, "1pct": 3, "10pct": 3}
    assert figures(results, "raw_pixels", None)["linear_top1"] == 1
    assert "shard_linear_top1" not in figures(results, "global", "tiny")
    assert results["absent"]["shard_linear_top1"] == "the clients' images are not of the classes that are tested"


def test_a_family_named_twice_is_measured_once(flesd: Path, tmp_path: Path, command: Command) -> None:
    run_dir = Path(shutil.copytree(flesd, tmp_path / "run"))
    assert command(str(run_dir), "evaluate.families=[tiny,tiny]", *PROBES, "-o", "tiny.json").code == 0
    rows = [(row["model"], row["partition"]) for row in measured(tmp_path, "tiny.json")["rows"]]
    assert len(rows) == len(set(rows))
    assert ("global", None) in rows


# --- clients that keep no model

REPLAY = (*PROBES, "evaluate.replay_clients=true", "-o", "replayed.json")


@pytest.fixture(scope="module")
def fedavg(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, Tensor]]]:
    """A run of two rounds whose clients remember their target network, and what the second round's clients uploaded."""
    uploads: dict[int, dict[str, Tensor]] = {}

    def merge(self: FedAvg, family: str, received: Sequence[Upload], before: Mapping[str, Tensor]) -> Any:
        uploads.update({
            upload.header.partition_id: {
                name.removeprefix(f"{family}/"): torch.from_numpy(value.copy()) for name, value in upload.arrays.items()
            }
            for upload in received
        })  # fmt: skip
        return averaged(self, family, received, before)

    averaged = FedAvg.merge
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FedAvg, "merge", merge)
        folder = tmp_path_factory.mktemp("fedavg")
        run_dir = finished(folder, "strategy=fedavg", "method=byol", "federation.num_rounds=2")
    return run_dir, uploads


def features(setup: Setup, family: str, state: Mapping[str, Tensor]) -> Tensor:
    """Of all test images, which here are fewer than are diagnosed."""
    model = setup.build_model(family)
    load_state(model, state)
    return extract_features(model.backbone, setup.evaluator.test, setup.views, 256, torch.device("cpu"))


def test_a_client_that_uploads_weights_trains_them_again_to_the_last_bit(
    fedavg: tuple[Path, dict[int, dict[str, Tensor]]], tmp_path: Path, command: Command
) -> None:
    run_dir, uploads = fedavg
    before = tree_hash(run_dir)
    ended = command(str(run_dir), *REPLAY, "evaluate.batch_size=100")
    assert ended.code == 0, ended.err
    assert tree_hash(run_dir) == before
    results = measured(tmp_path, "replayed.json")
    setup = Setup(yaml.safe_load((run_dir / "config.yaml").read_text()), run_dir)
    replayed = ReplayedRound(setup, run_dir, 2)
    for family, partitions in (("conv4_4", [0, 3]), ("conv4_2", [1]), ("tiny", [2])):
        trained = features(setup, family, load_file(run_dir / "models" / f"{family}.safetensors"))
        own = [figures(results, "own", family, partition) for partition in partitions]
        for partition, row in zip(partitions, own, strict=True):
            state = model_state(replayed.task(partition)[1].trained[family])
            assert state.keys() == uploads[partition].keys()
            assert all(torch.equal(value, uploads[partition][name]) for name, value in state.items())
            by_hand = linear_cka(features(setup, family, uploads[partition]), trained)
            assert row["cka_global"] == pytest.approx(by_hand, abs=1e-6)
            assert {"knn_top1", "linear_top1", "shard_linear_top1"} <= row.keys()
        mean = figures(results, "clients", family)
        assert mean["cka_global"] == np.mean([row["cka_global"] for row in own])
    assert results["absent"] == {}
    assert results["settings"]["replay_clients"] is True


def test_a_client_that_uploads_similarities_trains_again(flesd: Path, tmp_path: Path, command: Command) -> None:
    before = tree_hash(flesd)
    ended = command(str(flesd), *REPLAY)
    assert ended.code == 0, ended.err
    assert "conv4_4: client 3, which trains again as in round 1" in ended.err
    assert tree_hash(flesd) == before
    results = measured(tmp_path, "replayed.json")
    own = [figures(results, "own", "conv4_4", partition) for partition in (0, 3)]
    assert len({row["cka_global"] for row in own}) == 2
    assert all(0 < row["cka_global"] < 1 for row in own)
    assert figures(results, "clients", "tiny")["cka_global"] == figures(results, "own", "tiny", 2)["cka_global"]


def test_what_is_kept_is_not_trained_again(tmp_path: Path, command: Command) -> None:
    run_dir = finished(tmp_path, "strategy=flesd", "downlink=none", "federation.keep_checkpoints=1")
    ended = command(str(run_dir), *REPLAY)
    assert (ended.code, "trains again" in ended.err) == (0, False)
    assert measured(tmp_path, "replayed.json")["absent"] == {}


def test_why_no_client_trains_again(tmp_path: Path, command: Command) -> None:
    run_dir = finished(tmp_path, "strategy=fedavg", "federation.keep_checkpoints=1")
    for given in (REPLAY, (*PROBES, "-o", "replayed.json")):
        ended = command(str(run_dir), *given)
        assert ended.code == 0
        reason = measured(tmp_path, "replayed.json")["absent"]["cka_global"]
        assert f"{run_dir / 'checkpoints'} has no state after round 0, where round 1 began" in reason
        assert "federation.keep_checkpoints=1" in reason
        assert f"without cka_global: {reason}" in ended.out
    shutil.rmtree(run_dir)
    run_dir = finished(tmp_path, "strategy=public_only")
    assert command(str(run_dir), *REPLAY).code == 0
    reason = measured(tmp_path, "replayed.json")["absent"]["cka_global"]
    assert reason.endswith("and strategy=public_only asks no client to train")


def test_a_client_that_failed_in_the_last_round_does_not_train_again(tmp_path: Path, command: Command) -> None:
    config = small(tmp_path / "run", "strategy=fedavg", "federation.num_rounds=1")
    simulation.run(sabotaged(config, "raise", round_num=1, partitions=[3]))
    ended = command(str(tmp_path / "run"), *REPLAY, "evaluate.families=[conv4_4]")
    assert ended.code == 0, ended.err
    rows = measured(tmp_path, "replayed.json")["rows"]
    assert [row["partition"] for row in rows if row["model"] == "own"] == [0]


def test_without_their_memory_clients_do_not_train_again_as_others(
    fedavg: tuple[Path, dict[int, dict[str, Tensor]]], tmp_path: Path, command: Command
) -> None:
    """Without the target networks of round 1 they would end elsewhere."""
    run_dir = Path(shutil.copytree(fedavg[0], tmp_path / "run"))
    (run_dir / "clients").rename(tmp_path / "memory")
    given = (str(run_dir), *REPLAY, "evaluate.families=[tiny]")
    ended = command(*given)
    assert ended.code == 0
    lost = measured(tmp_path, "replayed.json")
    reason = lost["absent"]["cka_global"]
    assert f"{run_dir / 'clients'} has no memory of client 2 after round 2; client.store=DIR says where" in reason
    assert not [row for row in lost["rows"] if row["model"] == "own"]
    assert command(*given, "client.store=memory").code == 0
    assert "cka_global" in figures(measured(tmp_path, "replayed.json"), "own", "tiny", 2)


# --- the clients' memory elsewhere


def test_clients_memory_that_was_moved_is_missed_and_found(tmp_path: Path, command: Command) -> None:
    run_dir = finished(tmp_path, "strategy=local_only", f"client.store={tmp_path / 'store'}")
    (tmp_path / "store").rename(tmp_path / "moved")
    given = (str(run_dir), *PROBES, "evaluate.families=[tiny]")
    ended = command(*given)
    assert ended.code == 2
    assert f"nor in its clients' memory, {tmp_path / 'store'}, which does not exist" in ended.err
    assert "client.store=DIR" in ended.err
    ended = command(*given, "client.store=nowhere")
    assert ended.code == 2
    assert "client.store=nowhere is no folder" in ended.err
    assert command(*given, "client.store=moved").code == 0
    assert figures(measured(run_dir), "own", "tiny", 2)["knn_top1"] > 0


def test_models_that_clients_kept_and_lost_are_said_to_be_lost(tmp_path: Path, command: Command) -> None:
    run_dir = finished(tmp_path, "strategy=flesd", "downlink=none")
    (run_dir / "clients").rename(tmp_path / "moved")
    given = (str(run_dir), *REPLAY, "evaluate.families=[tiny]")
    assert command(*given).code == 0
    assert measured(tmp_path, "replayed.json")["absent"]["cka_global"] == (
        f"the clients' memory was in {run_dir / 'clients'}, which does not exist; client.store=DIR says where it is"
    )
    assert command(*given, "client.store=moved").code == 0
    assert measured(tmp_path, "replayed.json")["absent"] == {}


# --- where results go


def test_a_file_of_other_settings_is_not_replaced_unless_it_is_named(
    flesd: Path, tmp_path: Path, command: Command
) -> None:
    run_dir = Path(shutil.copytree(flesd, tmp_path / "run"))
    before = tree_hash(run_dir)
    ended = command(str(run_dir), *QUICK, "evaluate.finetune.shares=[]", "device=cpu")
    assert (ended.code, ended.out) == (2, "")
    assert "evaluating" not in ended.err
    assert f"{run_dir / 'evaluation.json'} was made with other settings" in ended.err
    assert "(evaluate.finetune.shares was [0.01, 0.1], now [])" in ended.err
    assert f"-o {run_dir / 'evaluation.json'} replaces it" in ended.err
    assert tree_hash(run_dir) == before
    ended = command(str(run_dir), *PROBES, "evaluate.families=[tiny]", "-o", "run/evaluation.json")
    assert (ended.code, "replaced run/evaluation.json" in ended.out) == (0, True)
    assert measured(run_dir)["settings"]["finetune"]["shares"] == []


def test_two_roots_of_one_data_set_are_two_evaluations(flesd: Path, tmp_path: Path, command: Command) -> None:
    from PIL import Image

    run_dir = Path(shutil.copytree(flesd, tmp_path / "run"))
    for root in ("a", "b"):
        for split in ("train", "test"):
            for name, level in (("dark", 20), ("light", 220)):
                folder = tmp_path / root / split / name
                folder.mkdir(parents=True)
                for i in range(6):
                    Image.new("RGB", (20, 20), (level + i, level, level)).save(folder / f"{i}.png")
    given = (str(run_dir), *PROBES, "evaluate.families=[tiny]", "evaluate.data=image_folder")
    assert command(*given, "evaluate.root=a").code == 0
    ended = command(*given, "evaluate.root=b")
    assert ended.code == 2
    assert 'evaluate.root was "a", now "b"' in ended.err
    assert command(*given, "evaluate.root=b", "-o", "new/b.json").code == 0
    assert measured(tmp_path / "new", "b.json")["settings"]["root"] == "b"
    assert measured(run_dir, "evaluation-image_folder.json")["settings"]["root"] == "a"


def test_a_setting_that_is_newer_than_the_file_is_no_other_setting() -> None:
    before = {"finetune": {"epochs": 2}}
    assert _changes(before, {"finetune": {"epochs": 2, "new": 1}, "replay_clients": False}) == []
    assert _changes(before, {"finetune": {"epochs": 3}}) == ["evaluate.finetune.epochs was 2, now 3"]


def test_no_other_file_is_replaced(flesd: Path, tmp_path: Path, command: Command) -> None:
    before = tree_hash(flesd)
    (tmp_path / "broken.json").write_text('{"rows": [')
    other = "is no file that fedssl-evaluate has made"
    for given, reason in (
        (flesd / "summary.json", other),
        (flesd / "config.yaml", other),
        (tmp_path / "broken.json", other),
        (flesd, "is a folder: give -o the name of a file"),
    ):
        ended = command(str(flesd), *QUICK, "-o", str(given))
        assert (ended.code, ended.out) == (2, "")
        assert f"{given} {reason}" in ended.err
    assert tree_hash(flesd) == before


def test_mean_and_range_over_clients() -> None:
    assert over_clients([]) == {}
    rows = [{"a": 1.0, "a_std": 0.2}, {"a": 4.0, "a_std": 0.4}]
    assert over_clients(rows) == pytest.approx({"a": 2.5, "a_min": 1, "a_max": 4, "a_std": 0.3})


# --- settings


def test_yaml_lists_every_parameter_and_none_besides() -> None:
    import inspect
    import pkgutil

    settings = yaml.safe_load((conf_dir() / "evaluation.yaml").read_text())
    for key, node in nodes(settings):
        parameters = set(inspect.signature(pkgutil.resolve_name(node["_target_"])).parameters)
        assert parameters == set(node) - {"_target_"}, key


def test_overrides_reach_the_runs_probes_and_the_new_settings(flesd: Path) -> None:
    saved = yaml.safe_load((flesd / "config.yaml").read_text())
    overrides = ["evaluate.knn.k=7", "evaluate.finetune.optimisation.lr=0.5", "device=cpu", "evaluate.families=[tiny]"]
    config, node = compose_evaluation(saved, overrides)
    assert config["evaluate"] == {**saved["evaluate"], "knn": {**saved["evaluate"]["knn"], "k": 7}}
    assert node["finetune"]["optimisation"]["lr"] == 0.5
    assert node["families"] == ["tiny"]
    assert saved["evaluate"]["knn"]["k"] == 200


def test_the_runs_own_labelled_data_stays_unless_another_is_named(flesd: Path) -> None:
    saved = yaml.safe_load((flesd / "config.yaml").read_text())
    kept = {**saved, "evaluate": {**saved["evaluate"], "data": "cifar10", "root": "here", "source": {"name": "mine"}}}
    assert compose_evaluation(kept, [])[0]["evaluate"]["source"] == {"name": "mine"}
    moved = compose_evaluation(kept, ["evaluate.root=there"])[0]["evaluate"]["source"]
    assert (moved["name"], moved["root"], moved["image_size"]) == ("cifar10", "there", 16)
    assert "source" not in compose_evaluation(kept, ["evaluate.data=null", "evaluate.root=null"])[0]["evaluate"]


REFUSED = {
    "a typo": (["evaluate.finetune.epoch=3"], ["evaluate.finetune.epoch=3: the run has no such key", "epochs"]),
    "a key of the rounds": (
        ["evaluate.every=2"],
        ["evaluate.every=2: the run has no such key", "evaluate has data, root"],
    ),
    "a setting of the run": (["strategy=fedavg"], ["strategy=fedavg: a finished run stays as it is", "--help"]),
    "a new key": (["+evaluate.new=1"], ["+evaluate.new=1: a finished run stays as it is"]),
    "no override": (["linear"], ["linear: a finished run stays as it is"]),
    "a word for a number": (["evaluate.finetune.epochs=many"], ["evaluate.finetune.epochs must be a whole number"]),
    "a sweep": (["evaluate.knn.k=1,2"], ["evaluate.knn.k=1,2", "one value"]),
    "half a list": (["evaluate.families=[tiny"], ["evaluate.families=[tiny is no override as in key=value"]),
    "nothing for a group": (
        ["evaluate.finetune=null"],
        ["evaluate.finetune=null: evaluate.finetune is a group of settings", "override one of them, shares, num_draws"],
    ),
    "a number for a data set": (["evaluate.data=5"], ["evaluate.data must be a name of conf/data", "got 5"]),
    "a value that cannot work": (["evaluate.diagnostics.num_images=1"], ["num_images must be at least 2"]),
    "a probe that cannot work": (["evaluate.knn.k=0"], ["evaluate.knn.k must be at least 1, got 0"]),
    "an unknown family": (["evaluate.families=[resnet99]"], ["'resnet99'", "conv4_4, conv4_2, tiny"]),
    "no family": (["evaluate.families=[]"], ["evaluate.families is empty"]),
    "an unknown data set": (["evaluate.data=mnist99"], ["there is no such choice", "cifar10"]),
    "data without files": (["evaluate.data=cifar10", "evaluate.root=nowhere"], ["nowhere"]),
    "a root alone": (["evaluate.root=here"], ["evaluate.root=here has no effect without evaluate.data"]),
    "an unknown device": (["device=tpu"], ["device must be auto"]),
}


@pytest.mark.parametrize(("overrides", "texts"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_one_message_and_exit_code_2(
    flesd: Path, command: Command, overrides: list[str], texts: list[str]
) -> None:
    before = tree_hash(flesd)
    ended = command(str(flesd), *overrides)
    assert ended.code == 2
    assert ended.err.startswith("error: ")
    assert "Traceback" not in ended.err
    for text in texts:
        assert text in ended.err
    assert (ended.out, tree_hash(flesd)) == ("", before)


def test_only_a_completed_run_is_evaluated(flesd: Path, tmp_path: Path, command: Command) -> None:
    ended = command(str(tmp_path / "nowhere"))
    assert (ended.code, ended.out) == (2, "")
    assert "is no run directory: it has no config.yaml" in ended.err
    run_dir = Path(shutil.copytree(flesd, tmp_path / "run"))
    summary = json.loads((run_dir / "summary.json").read_text())
    (run_dir / "summary.json").write_text(json.dumps({**summary, "status": "stopped"}))
    ended = command(str(run_dir))
    assert ended.code == 2
    assert (
        f"is stopped, and only a completed one has models to evaluate: go on with it by fedssl resume={run_dir}"
        in ended.err
    )
    (run_dir / "summary.json").unlink()
    assert "is unfinished" in command(str(run_dir)).err
    (run_dir / "config.yaml").write_text("a: 1\n")
    ended = command(str(run_dir))
    assert (ended.code, "is not the configuration of a run" in ended.err) == (2, True)


def test_models_that_were_cleared_away_are_missed(flesd: Path, tmp_path: Path, command: Command) -> None:
    run_dir = Path(shutil.copytree(flesd, tmp_path / "run"))
    shutil.rmtree(run_dir / "models")
    ended = command(str(run_dir), *QUICK)
    assert ended.code == 2
    assert "holds no model of conv4_4, conv4_2, tiny: neither in models/, nor in its clients' memory" in ended.err
    assert "Put models/ back" in ended.err


def test_weights_of_no_use_are_said(flesd: Path, tmp_path: Path, command: Command) -> None:
    run_dir = Path(shutil.copytree(flesd, tmp_path / "run"))
    path = run_dir / "models" / "conv4_4.safetensors"
    state = load_file(path)
    save_file({name: value * float("nan") for name, value in state.items()}, path)
    before = (run_dir / "evaluation.json").read_bytes()
    ended = command(str(run_dir), *QUICK)
    assert ended.code == 1
    assert "contain NaN or infinity" in ended.err
    assert "Traceback" not in ended.err
    assert (run_dir / "evaluation.json").read_bytes() == before


def test_help_shows_the_settings(command: Command) -> None:
    ended = command("--help")
    assert ended.code == 0
    assert "usage: fedssl-evaluate" in ended.out
    assert "evaluate.data=cifar100" in ended.out
    assert (conf_dir() / "evaluation.yaml").read_text() in ended.out
    assert command().code == 2
