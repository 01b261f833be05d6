"""Published rows: presets with the references' numbers, `scripts/reproduce`, `scripts/gpu_acceptance`, their table."""

import ast
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from PIL import Image

from fedssl.config import check_values, compose
from fedssl.errors import ConfigError
from fedssl.federation.replies import KeptReplies
from fedssl.lock import NAME as LOCK
from fedssl.lock import held
from tests.federation_helpers import SMALL

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from bench import gpu_acceptance, reproduce, rows  # noqa: E402

TABLE = rows.load_table()
COMMITTED = sorted(path.name for path in rows.RESULTS.glob("reproduce-*.json"))

COLOUR = {
    "views.flip_probability": 0.5,
    "views.jitter_probability": 0.8,
    "views.grayscale_probability": 0.2,
    "views.blur_probability": 0.0,
    "views.colour": "exact",
    "federation.families": ["resnet18"],
    "federation.cohort_size": None,
    "client.optimisation.warmup_steps": 0,
    "evaluate.knn.k": 200,
    "evaluate.knn.temperature": 0.1,
}
STRONG_JITTER = {"views.brightness": 0.8, "views.contrast": 0.8, "views.saturation": 0.8, "views.hue": 0.2}
REFERENCE: dict[str, dict[str, Any]] = {
    "fedema_cifar10": {
        **COLOUR,
        **STRONG_JITTER,
        "data.num_images": None,
        "partition._target_": "fedssl.data.partition.Classes",
        "partition.classes_per_client": 2,
        "federation.num_clients": 5,
        "federation.num_rounds": 100,
        "client.local_epochs": 5,
        "client.batch_size": 128,
        "client.optimisation.optimiser": "sgd",
        "client.optimisation.lr": 0.032,
        "client.optimisation.momentum": 0.9,
        "client.optimisation.weight_decay": 5e-4,
        "client.optimisation.schedule": "cosine_rounds",
        "method._target_": "fedssl.methods.byol.BYOL",
        "method.ema_decay": 0.99,
        "method.predictor_dim": 4096,
        "projector.hidden_dim": 4096,
        "projector.out_dim": 2048,
        "projector.batch_norm": True,
        "views.crop_scale": [0.08, 1.0],
        "views.mean": [0.0, 0.0, 0.0],
        "views.std": [1.0, 1.0, 1.0],
    },
    "flesd_local": {
        **COLOUR,
        **STRONG_JITTER,
        "partition._target_": "fedssl.data.partition.Dirichlet",
        "partition.alpha": 1.0,
        "federation.num_clients": 6,
        "federation.num_rounds": 1,
        "client.local_epochs": 200,
        "client.batch_size": 1024,
        "client.optimisation.optimiser": "adam",
        "client.optimisation.lr": 1e-3,
        "client.optimisation.weight_decay": 1e-6,
        "client.optimisation.schedule": "constant",
        "method._target_": "fedssl.methods.info_nce.InfoNCE",
        "method.temperature": 0.4,
        "projector.hidden_dim": None,
        "projector.out_dim": 128,
        "projector.batch_norm": False,
        "views.crop_scale": [0.2, 1.0],
        "views.mean": [0.5, 0.5, 0.5],
        "views.std": [0.5, 0.5, 0.5],
    },
    "lightly_simclr": {
        **COLOUR,
        "federation.num_clients": 1,
        "federation.num_rounds": 200,
        "client.local_epochs": 1,
        "client.batch_size": 512,
        "client.optimisation.optimiser": "sgd",
        "client.optimisation.lr": 0.06 * 512 / 128,
        "client.optimisation.momentum": 0.9,
        "client.optimisation.weight_decay": 5e-4,
        "client.optimisation.schedule": "cosine_rounds",
        "method._target_": "fedssl.methods.simclr.SimCLR",
        "method.temperature": 0.5,
        "projector.hidden_dim": None,
        "projector.out_dim": 128,
        "projector.batch_norm": True,
        "views.crop_scale": [0.08, 1.0],
        "views.brightness": 0.4,
        "views.contrast": 0.4,
        "views.saturation": 0.4,
        "views.hue": 0.1,
        "views.mean": [0.485, 0.456, 0.406],
    },
}


def at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize("strategy", ["local_only", "fedema", "centralized", "flesd"])
@pytest.mark.parametrize("experiment", REFERENCE)
def test_a_preset_has_the_references_settings_with_any_strategy(experiment: str, strategy: str) -> None:
    config = compose([f"experiment={experiment}", f"strategy={strategy}"])
    assert {key: at(config, key) for key in REFERENCE[experiment]} == REFERENCE[experiment]


WITHOUT_PANDAS = """
import sys
sys.modules["pandas"] = None
from bench.reproduce import _differing
from fedssl.config import compose
print(_differing(compose(["seed=1"]), compose(["seed=2"])))
"""


def test_a_row_goes_on_without_pandas() -> None:
    """Which only reports need."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"}
    command = [sys.executable, "-c", WITHOUT_PANDAS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "['seed 1 and not 2']\n", done.stderr


# --- the table of rows ------------------------------------------------------------------------------------------------
PUBLISHED = {
    "flesd_local_cifar10": 0.726, "fedema_standalone": 0.7495, "lightly_simclr": 0.848, "fedema_fedbyol": 0.7944,
    "fedema_fedu": 0.8052, "fedema_fedema": 0.8334, "fedema_centralized": 0.9046, "lightly_byol": 0.868,
    "fedema_iid_standalone": 0.8242, "fedema_iid_fedbyol": 0.8429, "fedema_iid_fedu": 0.8396,
    "fedema_iid_fedema": 0.8626, "flesd_cifar100_a1_t2": 0.438, "flesd_cifar100_a001_t2_fedavg": 0.342,
    "flesd_cifar100_a1_t1": 0.421, "flesd_cifar100_a001_t1": 0.414, "flesd_cifar100_a1_t1_fedavg": 0.109,
    "flesd_cifar100_a001_t1_fedavg": 0.103, "flesd_local_tiny_a1": 0.356, "flesd_local_tiny_a100": 0.353,
    "flesd_local_tiny_a001": 0.356,
    "flesd_cifar100_a001_t2": 0.422, "flesd_cifar100_a1_t2_fedavg": 0.370, "flesd_cifar100_a1_t10_fedavg": 0.432,
    "flesd_cifar100_a1_t10": 0.379, "flesd_cifar100_a001_t10": 0.333, "flesd_cifar100_a001_t10_fedavg": 0.448,
    "flesd_local_cifar100": 0.427, "flesd_local_cifar10_a001": 0.667,
    "flesd_local_cifar10_a01": 0.689, "flesd_local_cifar10_a10": 0.741, "flesd_local_cifar10_a100": 0.728,
    "flesd_local_cifar100_a001": 0.426, "flesd_local_cifar100_a01": 0.395, "flesd_local_cifar100_a10": 0.398,
    "flesd_local_cifar100_a100": 0.298,
}  # fmt: skip


def test_the_published_numbers_and_the_order_of_measuring() -> None:
    assert {row.name: row.expected for row in TABLE.rows.values() if row.expected is not None} == PUBLISHED
    assert list(TABLE.rows)[:8] == [
        "flesd_local_cifar10", "flesd_centralized_cifar10", "fedema_standalone", "lightly_simclr",
        "fedema20_standalone", "fedema20_fedbyol", "fedema20_fedema", "fedema20_flesd",
    ]  # fmt: skip
    assert all(row.tolerance_jpeg > row.tolerance for row in TABLE.rows.values() if row.tolerance is not None)  # type: ignore[operator]


@pytest.mark.parametrize("shrunken", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TABLE.rows)
def test_a_row_composes(name: str, shrunken: bool) -> None:
    row = TABLE.row(name)
    config = compose(TABLE.overrides(row, shrunken=shrunken))
    check_values(config)
    assert config["federation"]["families"] == (["conv4_16"] if shrunken else ["resnet18"])
    assert config["grid"]["_target_"].endswith("InProcess")


def test_the_mean_of_a_local_row_is_that_of_its_sources_clients() -> None:
    """The notebook's numbers of the six clients are in `source`."""
    local = [row for row in TABLE.rows.values() if row.name.startswith("flesd_local")]
    assert len(local) == 13
    for row in local:
        clients = [float(number) for number in row.source.split(": ")[-1].split()]
        assert row.expected == pytest.approx(sum(clients) / 600, abs=6e-4), row.name
        assert len(clients) == 6


@pytest.mark.slow
def test_what_stands_beside_a_row_is_comparable() -> None:
    def described(row: rows.Row) -> tuple[str, int, str]:
        config = compose(TABLE.overrides(row, shrunken=False))
        return row.metric, config["federation"]["num_rounds"] * config["client"]["local_epochs"], config["data"]["name"]

    for row in TABLE.rows.values():
        if row.beside is None:
            assert "strategy=centralized" in row.overrides
            continue
        beside = TABLE.row(row.beside)
        assert "strategy=centralized" in beside.overrides
        assert described(row) == described(beside), row.name


def test_rows_that_are_wrong_are_named(tmp_path: Path) -> None:
    text = rows.ROWS.read_text()
    for before, after, message in (
        ("gpu_minutes: 6 # one a shard", "gpu_minute: 18", "row flesd_local_cifar10 has the unknown keys.*gpu_minute"),
        ("beside: fedema_centralized", "beside: fedema_central", "there is no row 'fedema_central'"),
        ("expected: 0.726", "expected: null", "row flesd_local_cifar10: expected, tolerance"),
        ("name: fedema_standalone", "name: lightly_simclr", "two rows lightly_simclr"),
        ("expected: 0.726", "expected: a lot", "row flesd_local_cifar10 has expected='a lot'"),
        ("[experiment=flesd_local, strategy=local_only]", "strategy=local_only", "has overrides='strategy=local_only'"),
        ("shards: [0, 1, 2, 3, 4, 5]", "shards: 6", "row flesd_local_cifar10 has shards=6"),
    ):
        path = tmp_path / "rows.yaml"
        assert before in text
        path.write_text(text.replace(before, after, 1))
        with pytest.raises(ConfigError, match=message):
            rows.load_table(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have the lists rows, cpu, orderings; rows, cpu, orderings is none or missing"),
        ("{rows: [], cpu: []}", "orderings is none or missing"),
        ("{rows: [a], cpu: [], orderings: []}", "rows holds 'a'; each needs name"),
        ("{rows: [], cpu: [], orderings: [{what: x}]}", "each needs rows, what"),
        ("{rows: [], cpu: [], orderings: [], left_out: [{what: x}]}", "each needs what, why"),
    ],
)
def test_a_file_of_no_rows_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"{re.escape(str(path))}.*{message}"):
        rows.load_table(path)


# --- tiny rows --------------------------------------------------------------------------------------------------------
TINY = [o for o in SMALL if not o.startswith(("grid", "federation.families"))] + ["federation.families=[conv4_4]"]


def tiny_row(name: str, *overrides: str, shards: list[int] | None = None, **fields: Any) -> dict[str, Any]:
    return {
        "name": name, "what": "a test", "source": "nowhere", "overrides": [*TINY, *overrides], "shards": shards,
        "metric": "linear_top1", "expected": 0.5, "tolerance": 0.5, "tolerance_jpeg": 0.6, "gpu_minutes": 0,
        "cpu": ["federation.num_rounds=2"],
    } | fields  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A file of rows of a second each."""
    entries = [
        tiny_row("averaged", "strategy=fedavg", "federation.num_rounds=3"),
        tiny_row("alone", "strategy=local_only", "federation.num_rounds=3", shards=[0, 2], beside="averaged"),
        tiny_row("missed", "strategy=fedavg", "federation.num_rounds=1", expected=2.0, tolerance=0.1),
        tiny_row("broken", "strategy=fedavg", metric="knn_top5"),
    ]
    path = tmp_path / "rows.yaml"
    orderings = [{"what": "test", "rows": ["alone", "averaged"]}]
    path.write_text(yaml.safe_dump({"cpu": ["device=cpu"], "rows": entries, "orderings": orderings}))
    return path


def measure(tiny: Path, name: str, work: str, *more: str) -> tuple[int, dict[str, Any]]:
    output = tiny.parent / f"{work}-{name}.json"
    arguments = [name, "--rows", str(tiny), "--work", str(tiny.parent / work), "-o", str(output), *more]
    code = reproduce.main(arguments)
    return code, json.loads(output.read_text()) if output.exists() else {}


def without_clock(result: dict[str, Any]) -> dict[str, Any]:
    def timeless(mapping: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in mapping.items() if key != "seconds"}

    return {**timeless(result), "runs": [timeless(run) for run in result["runs"]]}


def test_a_row_that_was_stopped_and_killed_has_the_result_of_one_that_was_not(tiny: Path) -> None:
    code, whole = measure(tiny, "averaged", "whole")
    assert code == reproduce.OK
    assert whole["holds"] is True
    assert [run["rounds"] for run in whole["runs"]] == [3]
    assert 0 < whole["runs"][0]["untrained"] != whole["measured"]

    command = [sys.executable, str(ROOT / "scripts" / "reproduce"), "averaged", "--rows", str(tiny)]
    command += ["--work", str(tiny.parent / "killed"), "-o", str(tiny.parent / "killed-averaged.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    run_dir = tiny.parent / "killed" / "averaged" / "run"
    deadline = time.monotonic() + 120
    while reproduce.rounds_kept(run_dir) < 1 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert reproduce.rounds_kept(run_dir) >= 1
    assert json.loads((tiny.parent / "killed-averaged.json").read_text())["measured"] is None  # as it began

    code, stopped = measure(tiny, "averaged", "killed", "--seconds", "0.001")
    assert code == reproduce.STOPPED
    assert (stopped["measured"], stopped["holds"]) == (None, None)
    assert 1 <= stopped["runs"][0]["rounds"] < 3
    assert stopped["runs"][0]["status"] in ("interrupted", "stopped")
    assert stopped["seconds"] == stopped["runs"][0]["seconds"] > 0
    code, resumed = measure(tiny, "averaged", "killed")
    assert code == reproduce.OK
    assert without_clock(resumed) == without_clock(whole)
    assert measure(tiny, "averaged", "killed") == (reproduce.OK, resumed)  # nothing is run again


def lines_of(scope: str, *metrics: dict[str, float], round_num: int = 1) -> str:
    return "".join(
        json.dumps({"round": round_num, "scope": scope, "partition": i, "family": "f", "metrics": m}) + "\n"
        for i, m in enumerate(metrics)
    )


def test_what_an_interruption_can_cost(tmp_path: Path) -> None:
    """Of a round of 570 s: nothing known, a round without clients, short clients, long ones, one short among them."""
    assert reproduce.longest_piece(tmp_path, 30) == 0
    server = {"seconds": 570.0, "seconds_clients": 440.0, "seconds_aggregation": 120.0, "seconds_evaluation": 10.0}
    long = [{"seconds": 100.0, "simulated_seconds": 900.0}, {"seconds": 90.0, "distill_seconds": 10.0}]

    def piece(keep_after: float | None, *clients: dict[str, float]) -> float:
        (tmp_path / "metrics.jsonl").write_text(lines_of("client", *clients) + lines_of("server", server))
        return reproduce.longest_piece(tmp_path, keep_after)

    assert piece(30) == 570
    assert piece(101, *long) == piece(None, *long) == 570
    assert piece(30, *long * 2) == 130  # 400 s stated, 440 s taken: 110 a client; the server takes longer
    assert piece(30, *long, {"seconds": 20.0}) == pytest.approx(440 / 220 * 120)


def test_a_fresh_shard_starts_only_where_it_fits(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """By the time of the shard before, its start included."""
    advance = reproduce.advance
    started: list[str] = []

    def slow(config: Any, run_dir: Path, max_seconds: float | None) -> dict[str, Any]:
        started.append(run_dir.name)
        summary = advance(config, run_dir, None)
        path = run_dir / "metrics.jsonl"
        path.write_text(lines_of("server", {"seconds": 500.0}) + path.read_text().replace('"server"', '"before"'))
        (run_dir / "summary.json").write_text(json.dumps({**summary, "wall_seconds": 540.0}))
        return summary

    monkeypatch.setattr(reproduce, "advance", slow)
    assert measure(tiny, "alone", "work", "--seconds", "530")[0] == reproduce.STOPPED  # 500 and 40 are needed
    assert started == ["shard-0"]
    code, result = measure(tiny, "alone", "work", "--seconds", "600")
    assert (code, started[-1]) == (reproduce.OK, "shard-2")
    assert [run["attempts"] for run in result["runs"]] == [[], []]


@pytest.mark.slow
def test_an_attempt_that_got_nowhere_is_remembered(tiny: Path, capsys: Any) -> None:
    tiny.write_text(tiny.read_text().replace("client.local_epochs=1", "client.local_epochs=1000000"))
    code, result = measure(tiny, "alone", "work", "--seconds", "15")
    assert code == reproduce.STOPPED
    [attempt] = result["runs"][0]["attempts"]
    assert (attempt["rounds"], attempt["replies"]) == (0, 0)
    assert 5 < attempt["seconds"] < 20
    assert "shard 0, round 1 got nowhere in 1" in capsys.readouterr().out
    assert "got nowhere in 1" in rows.verdict(TABLE.row("lightly_simclr"), result)

    began = time.monotonic()
    assert measure(tiny, "alone", "work", "--seconds", str(attempt["seconds"] - 1)) == (reproduce.STOPPED, result)
    assert time.monotonic() - began < 10
    assert "call again with more time" in capsys.readouterr().out
    output = tiny.parent / "work-alone.json"  # as a kill in the next attempt would leave it
    result["runs"][0]["attempts"].append({**attempt, "seconds": 400.0})
    output.write_text(json.dumps(result))
    assert measure(tiny, "alone", "work", "--seconds", "300") == (reproduce.STOPPED, result)
    result["runs"][0]["attempts"] = [{**attempt, "rounds": 1, "seconds": 1e9}]  # it has got on since, or begun anew
    output.write_text(json.dumps(result))
    _, again = measure(tiny, "alone", "work", "--seconds", "3")
    assert [a["rounds"] for a in again["runs"][0]["attempts"]] == [0]


def test_time_that_is_spent_before_a_run_begins_got_nowhere_too(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    jobs_of = reproduce.jobs_of

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(2.0)
        return jobs_of(*args, **kwargs)

    monkeypatch.setattr(reproduce, "jobs_of", slow)
    for _ in range(2):
        code, result = measure(tiny, "averaged", "work", "--seconds", "2")
        assert (code, [a["seconds"] for a in result["runs"][0]["attempts"]]) == (reproduce.STOPPED, [2.0])
        assert "round 1 got nowhere in 2 s; call again with more time" in capsys.readouterr().out
    monkeypatch.setattr(reproduce, "advance", lambda *_: time.sleep(60))
    code, result = measure(tiny, "averaged", "work", "--seconds", "4")
    assert code == reproduce.STOPPED
    assert 4 <= result["runs"][0]["attempts"][-1]["seconds"] < 15


def test_a_round_that_is_longer_than_a_sitting_ends(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A sitting of one client each: four for each of three rounds, and the last one's aggregation."""
    entries = yaml.safe_load(tiny.read_text())
    entries["rows"][0]["overrides"].append("federation.keep_replies_after=0")
    tiny.write_text(yaml.safe_dump(entries))
    _, whole = measure(tiny, "averaged", "whole")
    keep = KeptReplies.keep

    def keep_one(self: KeptReplies, *args: Any) -> None:
        keep(self, *args)
        raise reproduce.OutOfTime

    monkeypatch.setattr(KeptReplies, "keep", keep_one)
    codes = []
    while reproduce.OK not in codes and len(codes) < 20:
        code, result = measure(tiny, "averaged", "work", "--seconds", "500")
        codes.append(code)
        if len(codes) == 2:
            assert (result["runs"][0]["rounds"], result["runs"][0]["replies"]) == (0, 2)
            assert "0 of 3 rounds, 2 clients of the next; call again to go on" in capsys.readouterr().out
    assert codes == [reproduce.STOPPED] * 12 + [reproduce.OK]
    assert without_clock(result) == without_clock(whole)


def test_all_machines_of_a_row_are_recorded(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every shard and sitting, each once."""
    ours, elsewhere = reproduce.this_machine(), {"hardware": {"gpus": ["another"]}, "commit": None, "versions": {}}
    monkeypatch.setattr(reproduce, "this_machine", lambda: elsewhere)
    _, result = measure(tiny, "alone", "work")
    assert result["machines"] == [elsewhere, ours]  # of the sitting; of the runs' manifests
    monkeypatch.undo()
    assert measure(tiny, "alone", "work")[1]["machines"] == [elsewhere, ours]  # nothing ran
    path = tiny.parent / "work" / "alone" / "shard-0" / "manifest.json"
    moved = {"hardware": {"gpus": ["a third"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resumed": [json.loads(path.read_text()) | moved]}))
    (tiny.parent / "work-alone.json").unlink()
    assert measure(tiny, "alone", "work")[1]["machines"] == [ours, ours | moved]  # by `fedssl run_dir=`
    shutil.rmtree(tiny.parent / "work")
    assert measure(tiny, "alone", "work", "--again")[1]["machines"] == [ours]  # a new row


def test_a_row_of_shards_is_the_mean_of_runs_on_the_partitions_of_the_whole(tiny: Path) -> None:
    code, alone = measure(tiny, "alone", "work")
    assert code == reproduce.OK
    assert [run["shard"] for run in alone["runs"]] == [0, 2]
    assert alone["measured"] == pytest.approx(sum(run["measured"] for run in alone["runs"]) / 2)
    assert alone["beside"] == {"row": "averaged", "measured": None, "status": "not measured"}
    from fedssl.federation.setup import Setup

    row = rows.load_table(tiny).row("alone")
    whole = Setup(compose([*row.overrides, "grid=in_process"])).data
    for shard in (0, 2):
        run_dir = tiny.parent / "work" / "alone" / f"shard-{shard}"
        own = Setup(yaml.safe_load((run_dir / "config.yaml").read_text()), run_dir).data
        assert [list(part) for part in own.partitions] == [list(whole.partitions[shard])]


def test_runs_that_a_result_has_complete_are_not_made_again_on_another_machine(tiny: Path, capsys: Any) -> None:
    _, whole = measure(tiny, "alone", "work")
    output = tiny.parent / "elsewhere-alone.json"
    second = {**whole["runs"][1], "status": "not started", "rounds": 0, "measured": None, "untrained": None}
    began = {**whole, "measured": None, "holds": None, "runs": [whole["runs"][0], second]}
    output.write_text(json.dumps(began))
    assert "3 of 6 rounds, mean of 1 so far" in rows.progress(began)
    code, result = measure(tiny, "alone", "elsewhere")
    assert code == reproduce.OK
    assert without_clock(result) == without_clock(whole)
    assert [path.name for path in (tiny.parent / "elsewhere" / "alone").glob("shard-?")] == ["shard-2"]
    capsys.readouterr()
    output.write_text(json.dumps({**began, "data_sha256": dict.fromkeys(whole["data_sha256"], "0" * 64)}))
    assert measure(tiny, "alone", "elsewhere")[0] == 2
    assert "were trained on different images" in capsys.readouterr().err


def test_a_whole_result_is_not_measured_again_unless_one_says_so(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, whole = measure(tiny, "averaged", "work")
    output = tiny.parent / "new-averaged.json"
    output.write_text(json.dumps(whole))
    capsys.readouterr()
    assert measure(tiny, "averaged", "new", "--data", "/nowhere") == (reproduce.OK, whole)
    assert re.search(r"averaged: measured already, linear_top1 .*; --again measures it anew", capsys.readouterr().out)
    assert not list((tiny.parent / "new" / "averaged").iterdir())

    code, result = measure(tiny, "averaged", "new", "--again", "--seconds", "0.001")
    assert (code, result) == (reproduce.STOPPED, whole)
    assert f"{output} keeps its result until" in capsys.readouterr().out
    output.write_text(json.dumps({**whole, "seed": "of the old one"}))
    code, result = measure(tiny, "averaged", "new", "--again")
    assert code == reproduce.OK
    assert without_clock(result) == without_clock(whole)  # so it was replaced
    assert measure(tiny, "averaged", "new", "--again") == (2, result)
    assert f"{tiny.parent / 'new' / 'averaged'} holds averaged whole: delete it" in capsys.readouterr().err


def test_a_result_is_never_replaced_by_one_with_fewer_complete_runs(tiny: Path) -> None:
    """Whether the row goes on from it, or its settings are others."""
    _, whole = measure(tiny, "alone", "work")
    output = tiny.parent / "other-alone.json"
    second = {**whole["runs"][1], "status": "interrupted", "rounds": 1, "measured": None}
    some = {**whole, "measured": None, "holds": None, "runs": [whole["runs"][0], second]}
    output.write_text(json.dumps(some))
    code, result = measure(tiny, "alone", "other", "--seconds", "0.001")
    assert code == reproduce.STOPPED
    assert [run["measured"] for run in result["runs"]] == [whole["runs"][0]["measured"], None]
    changed = {**whole, "settings": "0" * 64}
    output.write_text(json.dumps(changed))
    assert measure(tiny, "alone", "other", "--seconds", "0.001") == (reproduce.STOPPED, changed)
    code, result = measure(tiny, "alone", "other")
    assert code == reproduce.OK
    assert without_clock(result) == without_clock(whole)


def test_a_whole_result_is_told_what_the_row_says_now(tiny: Path) -> None:
    _, whole = measure(tiny, "averaged", "work")
    tiny.write_text(tiny.read_text().replace("expected: 0.5\n", "expected: 2.0\n", 1))
    code, result = measure(tiny, "averaged", "work")
    assert (code, result) == (reproduce.MISSED, {**whole, "expected": 2.0, "holds": False})


def test_what_a_result_holds(tiny: Path) -> None:
    code, full = measure(tiny, "missed", "work")
    assert code == reproduce.MISSED
    assert full["holds"] is False
    code, shrunken = measure(tiny, "missed", "work", "--cpu")
    assert code == reproduce.OK
    assert (shrunken["shrunken"], shrunken["holds"]) == (True, None)
    assert shrunken["runs"][0]["num_rounds"] == 2  # what `cpu` says, instead of the row's own
    keys = {
        "name", "what", "source", "shrunken", "overrides", "settings", "metric", "epochs", "expected", "tolerance",
        "copy", "measured", "holds", "runs", "beside", "seed", "seconds", "data_sha256", "machines",
    }  # fmt: skip
    assert full.keys() == shrunken.keys() == keys
    assert {len(digest) for digest in full["data_sha256"].values()} == {64}
    assert (full["epochs"], shrunken["epochs"]) == (1, 2)
    [machine] = full["machines"]
    assert machine["hardware"]["cores"] >= 1
    assert machine["versions"]["torch"]
    assert machine.keys() == {"hardware", "commit", "versions"}
    assert full["copy"] == "as published"


def test_a_jpeg_copy_has_a_tolerance_of_its_own(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "copy_of", lambda config: "jpeg")
    _, result = measure(tiny, "averaged", "work")
    assert (result["copy"], result["tolerance"]) == ("jpeg", 0.6)
    monkeypatch.setattr(reproduce, "copy_of", lambda config: "as published")  # as another --data would be
    assert measure(tiny, "averaged", "work")[1] == result
    (tiny.parent / "work-averaged.json").unlink()
    assert measure(tiny, "averaged", "work")[1]["copy"] == "jpeg"  # as the folder of the runs says
    noted = tiny.parent / "work" / "averaged" / "copy.json"
    noted.write_text(json.dumps({**json.loads(noted.read_text()), "data_sha256": {"digits/train": "0" * 64}}))
    (tiny.parent / "work-averaged.json").unlink()
    assert measure(tiny, "averaged", "work")[1]["copy"] == "as published"  # that was of other images


def test_which_copy_it_is_is_settled_when_images_were_read(tiny: Path) -> None:
    """Not by a mistyped --data."""
    entry = tiny_row("imageless", "strategy=fedavg", "data=cifar10")
    tiny.write_text(yaml.safe_dump({"cpu": ["device=cpu"], "rows": [entry], "orderings": []}))
    assert measure(tiny, "imageless", "work", "--data", str(tiny.parent / "nowhere")) == (2, {})
    assert not list((tiny.parent / "work" / "imageless").glob("copy*"))
    assert reproduce.copy_of(compose(["data=cifar10", f"data.root={tiny.parent / 'nowhere'}"])) == reproduce.UNKNOWN


@pytest.mark.parametrize(("kind", "copy"), [("JPEG", "jpeg"), ("PNG", "as published")])
def test_a_jpeg_copy_is_known_by_its_bytes(tmp_path: Path, kind: str, copy: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (10, 200, 30)).save(buffer, kind)
    (tmp_path / "cifar10").mkdir()
    column = pyarrow.array([{"bytes": buffer.getvalue(), "path": ""}])
    table = pyarrow.table({"img": column, "label": [0]})
    pyarrow.parquet.write_table(table, tmp_path / "cifar10" / "train-00000-of-00001.parquet")
    assert reproduce.copy_of(compose(["data=cifar10", f"data.root={tmp_path}"])) == copy


# --- bad input --------------------------------------------------------------------------------------------------------
def test_shards_of_different_images_are_no_row(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure(tiny, "alone", "work")
    (tiny.parent / "work-alone.json").unlink()
    manifest = next((tiny.parent / "work").glob("*/*2*/manifest.json"), None)
    manifest = manifest or sorted((tiny.parent / "work").rglob("manifest.json"))[-1]
    said = json.loads(manifest.read_text())
    said["data"] = dict.fromkeys(said["data"], "0" * 64)
    manifest.write_text(json.dumps(said))
    capsys.readouterr()
    assert measure(tiny, "alone", "work")[0] == 2
    assert "were trained on different images" in capsys.readouterr().err


def test_parts_that_went_well() -> None:
    def part(name: str, code: int | None, interrupted: bool = False) -> gpu_acceptance.Part:
        return gpu_acceptance.Part(name=name, command=[], code=code, interrupted=interrupted, seconds=0.0, tail="")

    assert part("row alone", 4).went_well
    assert part("tests", None, interrupted=True).went_well
    assert not part("tests", 4).went_well  # pytest could not start
    assert not part("row alone", 2).went_well


def test_bad_input_ends_with_2(tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: str) -> str:
        capsys.readouterr()
        assert reproduce.main([*arguments, "--work", str(tiny.parent / "refused")]) == 2
        return capsys.readouterr().err

    assert "there is no row 'fedema_fedprox'; there are flesd_local_cifar10" in refused("fedema_fedprox")
    assert "name a row" in refused()
    assert "--seconds must be above 0" in refused("averaged", "--rows", str(tiny), "--seconds", "0")
    assert "cannot read the rows" in refused("averaged", "--rows", str(tiny.parent / "none.yaml"))
    assert "no metric 'knn_top5'" in refused("broken", "--rows", str(tiny), "-o", str(tiny.parent / "broken.json"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "torch sees no GPU here, and fedema_fedu would take days" in refused("fedema_fedu")
    (tiny.parent / "brought.json").write_text('{"reproduce-nothing.json": {}}')
    assert "which is of no row" in refused("--add", str(tiny.parent / "brought.json"))


def test_a_row_that_changed_since_does_not_go_on(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure(tiny, "averaged", "work")[0] == reproduce.OK
    tiny.write_text(tiny.read_text().replace("client.batch_size=8", "client.batch_size=16"))
    assert measure(tiny, "averaged", "work")[0] == 2
    assert "holds a run with client.batch_size 8 and not 16: the row" in capsys.readouterr().err


def test_a_row_is_one_process_at_a_time(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one folder; another row, or folder, does not wait for it."""
    work = tiny.parent / "work" / "averaged"
    work.mkdir(parents=True)
    with held(work, "", ""):
        assert measure(tiny, "averaged", "work") == (2, {})
        said = f"error: {work} is in use by process {os.getpid()} on "
        assert said in (err := capsys.readouterr().err)
        assert "name another folder with --work" in err
        assert [path.name for path in work.iterdir()] == [LOCK]
        assert measure(tiny, "missed", "work")[0] == reproduce.MISSED
    assert measure(tiny, "averaged", "work", "--seconds", "0.001")[0] == reproduce.STOPPED
    assert not (work / LOCK).exists()


def test_a_result_is_one_process_at_a_time(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever the two work."""
    output = tiny.parent / "results" / "one.json"
    output.parent.mkdir()
    arguments = [
        "averaged",
        "--rows",
        str(tiny),
        "--work",
        str(tiny.parent / "w"),
        "-o",
        str(output),
        "--seconds",
        "0.001",
    ]
    with held(output.parent, "", "", name=".one.json.lock"):
        assert reproduce.main(arguments) == 2
        assert f"error: {output} is in use by process {os.getpid()} on " in (err := capsys.readouterr().err)
        assert "name another file with -o" in err
        assert (
            reproduce.main([*arguments[:-3], str(output.with_name("other.json")), *arguments[-2:]]) == reproduce.STOPPED
        )
    assert reproduce.main(arguments) == reproduce.STOPPED
    assert sorted(path.name for path in output.parent.iterdir()) == ["one.json", "other.json"]


@pytest.mark.parametrize(
    ("change", "lacking"),
    [
        ({"measured": ...}, "measured"),
        ({"runs": [{"status": ...}]}, "status"),
        ({"runs": [{"attempts": None}]}, "attempts"),
        ({"runs": [{"attempts": [{"rounds": 0}]}]}, "replies, seconds"),
        ({"machines": None}, "machines"),
    ],
)
def test_a_damaged_result_is_named(
    change: dict[str, Any], lacking: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And left as it is."""

    def changed(node: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in {**node, **values}.items() if value is not ...}

    table = rows.load_table(tiny)
    result = {**A_RESULT, "overrides": table.overrides(table.row("averaged"), shrunken=False)}
    runs = [changed(result["runs"][0], run) for run in change.get("runs", [{}])]
    output = tiny.parent / "work-averaged.json"
    output.write_text(json.dumps(changed(result, {**change, "runs": runs})))
    before = output.read_text()
    assert measure(tiny, "averaged", "work")[0] == 2
    assert f"error: {output} is no result of scripts/reproduce: it lacks {lacking}, or" in capsys.readouterr().err
    assert output.read_text() == before


@pytest.mark.parametrize(("content", "message"), [("", "cannot read"), ("{}", "no summary"), ("[]", "no summary")])
def test_a_damaged_summary_is_named(content: str, message: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.parent / "work" / "averaged" / "run" / "summary.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert measure(tiny, "averaged", "work")[0] == 2
    said = capsys.readouterr().err
    assert message in said
    assert str(path) in said


def test_a_row_goes_on_that_began_before_a_setting_came(tiny: Path) -> None:
    config = compose(rows.load_table(tiny).overrides(rows.load_table(tiny).row("averaged"), shrunken=False))
    run_dir = tiny.parent / "work" / "averaged" / "run"
    first = {**config, "federation": {**config["federation"], "num_rounds": 1}}
    reproduce.advance(first, run_dir, None)
    saved = yaml.safe_load((run_dir / "config.yaml").read_text())
    saved["federation"]["num_rounds"] = 3
    del saved["client"]["cpu_amp"], saved["federation"]["keep_replies_after"], saved["federation"]["devices"]["idle_s"]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(saved))
    (run_dir / "summary.json").unlink()
    reproduce.advance(config, run_dir, 0.001)  # which writes what came since
    now = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert (now["federation"]["devices"]["idle_s"], config["federation"]["devices"]["idle_s"]) == (0, 60)
    assert (now["client"]["cpu_amp"], now["federation"]["keep_replies_after"]) == (False, 30)
    code, result = measure(tiny, "averaged", "work")
    assert (code, result["runs"][0]["rounds"]) == (reproduce.OK, 3)
    saved["federation"]["devices"]["idle_s"] = 7
    (run_dir / "config.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(ConfigError, match=r"holds a run with federation\.devices.idle_s 7 and not 60"):
        reproduce.advance(config, run_dir, None)


# --- the table --------------------------------------------------------------------------------------------------------
def test_the_list_shows_what_is_measured_and_what_is_not(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(rows, "RESULTS", tiny.parent / "results")
    row = rows.load_table(tiny).row("averaged")
    assert reproduce.main(["--list", "--rows", str(tiny)]) == 0
    assert capsys.readouterr().out.count("not measured") == 4 + 2  # rows; the ordering, twice
    output = tiny.parent / "results" / row.file(False)
    code = reproduce.main(["averaged", "--rows", str(tiny), "--work", str(tiny.parent / "w"), "-o", str(output)])
    assert code == 0
    capsys.readouterr()
    assert reproduce.main(["--list", "--rows", str(tiny)]) == 0
    listed = capsys.readouterr().out.splitlines()
    measured = rows.percent(json.loads(output.read_text())["measured"])
    [line] = [line for line in listed if line.startswith("averaged")]
    assert measured in line
    assert "holds" in line
    output = tiny.parent / "results" / "reproduce-alone.json"
    reproduce.main(["alone", "--rows", str(tiny), "--work", str(tiny.parent / "w"), "-o", str(output)])
    capsys.readouterr()
    reproduce.main(["--list", "--rows", str(tiny)])
    [beside] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("alone  ")]
    assert measured in beside
    row_of_it = {"row": "averaged", "measured": json.loads(output.with_name(row.file(False)).read_text())["measured"]}
    assert json.loads(output.read_text())["beside"] == {**row_of_it, "status": "measured"}
    result, alone = (
        json.loads((output.parent / f"reproduce-{name}.json").read_text()) for name in ("averaged", "alone")
    )
    for key, value in (("metric", "knn_top1"), ("epochs", 4), ("data_sha256", {"digits/train": "0" * 64})):
        other = {row.file(False): {**result, key: value}, "reproduce-alone.json": alone}
        [line] = [line for line in rows.lines(rows.load_table(tiny), other) if line[0] == "alone"]
        assert line[rows.HEAD.index("centralised beside")] == "of other images or epochs", key


def test_a_verdict_is_of_the_rows_numbers_and_settings_of_today(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "RESULTS", tiny.parent)

    def line() -> list[str]:
        table = rows.load_table(tiny)
        return rows.lines(table, rows.read_results(table, tiny.parent))[0]

    _, result = measure(tiny, "averaged", "work")
    (tiny.parent / "reproduce-averaged.json").write_text(json.dumps(result))
    verdict = rows.HEAD.index("verdict")
    assert line()[verdict] == "holds"
    text = tiny.read_text()
    tiny.write_text(text.replace("expected: 0.5\n", "expected: 2.0\n", 1))
    assert line()[verdict] == "does not hold"
    for before, after in (
        ("client.batch_size=8", "client.batch_size=16"),
        ("metric: linear_top1", "metric: knn_top1"),
        ("shards: null", "shards: [0]"),
    ):
        assert before in text
        tiny.write_text(text.replace(before, after))
        assert line()[verdict] == "not measured (the result is of other settings)"
        assert line()[rows.HEAD.index("measured")] == ""
    tiny.write_text(text)
    assert line()[verdict] == "holds"
    composed = compose  # the preset's numbers have changed, the row's overrides have not

    def changed(overrides: Any) -> Any:
        config = composed(overrides)
        return {**config, "method": {**config["method"], "temperature": 9.0}}

    rows.settings_digest.cache_clear()
    monkeypatch.setattr("fedssl.config.compose", changed)
    assert line()[verdict] == "not measured (the result is of other settings)"
    rows.settings_digest.cache_clear()
    del result["settings"]  # as before there were digests
    (tiny.parent / "reproduce-averaged.json").write_text(json.dumps(result))
    assert line()[verdict] == "holds"


def test_results_are_added_to_the_table(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    _, result = measure(tiny, "averaged", "work")
    none = {**result, "runs": [{**run, "measured": None} for run in result["runs"]]}
    folder = tiny.parent / "results"
    folder.mkdir()
    monkeypatch.setattr(rows, "RESULTS", folder)
    brought = {
        "reproduce-averaged.json": result,
        "reproduce-alone.json": {**none, "measured": None},
    }
    (tiny.parent / "brought.json").write_text(json.dumps(brought))
    assert reproduce.main(["--add", str(tiny.parent / "brought.json"), "--rows", str(tiny)]) == 0
    assert [path.name for path in folder.iterdir()] == ["reproduce-averaged.json"]
    said = capsys.readouterr().out
    assert "reproduce-averaged.json: added" in said
    assert "reproduce-alone.json: no run of it is complete, left out" in said


def test_a_result_with_some_runs_is_added_and_replaced_by_one_with_more(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    _, whole = measure(tiny, "alone", "work")
    some = {
        **whole,
        "measured": None,
        "holds": None,
        "runs": [whole["runs"][0], {**whole["runs"][1], "measured": None}],
    }
    folder = tiny.parent / "results"
    folder.mkdir()
    monkeypatch.setattr(rows, "RESULTS", folder)
    for brought, kept, said in (
        (some, some, "added, "),
        (whole, whole, "added\n"),
        (some, whole, "has more, left out"),
    ):
        (tiny.parent / "brought.json").write_text(json.dumps({"reproduce-alone.json": brought}))
        assert reproduce.main(["--add", str(tiny.parent / "brought.json"), "--rows", str(tiny)]) == 0
        assert json.loads((folder / "reproduce-alone.json").read_text()) == kept
        assert said in capsys.readouterr().out


A_RESULT: dict[str, Any] = {
    "name": "averaged", "shrunken": False, "metric": "linear_top1", "epochs": 3, "copy": "as published",
    "measured": 0.6, "data_sha256": {},
    "runs": [
        {
            "shard": None, "status": "completed", "rounds": 3, "num_rounds": 3, "measured": 0.6, "untrained": 0.1,
            "seconds": 1.0,
        }
    ],
}  # fmt: skip


def test_only_results_of_the_rows_settings_are_added(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = rows.load_table(tiny)
    good = {**A_RESULT, "overrides": table.overrides(table.row("averaged"), shrunken=False)}
    monkeypatch.setattr(rows, "RESULTS", tiny.parent / "results")
    rows.RESULTS.mkdir()
    kept = rows.RESULTS / "reproduce-averaged.json"
    brought = tiny.parent / "brought.json"

    def add(content: Any) -> tuple[int, str]:
        brought.write_text(json.dumps(content))
        code = reproduce.main(["--add", str(brought), "--rows", str(tiny)])
        said = capsys.readouterr()
        return code, said.out + said.err

    assert add({kept.name: good})[0] == 0
    before = kept.read_text()
    for other in ({"overrides": ["x"]}, {"metric": "knn_top1"}, {"shrunken": True}, {"changed": True}):
        code, said = add({kept.name: {**good, "measured": 0.99, **other}})
        assert (code, kept.read_text()) == (0, before), other
        assert "made with other settings than the row has now, left out" in said
    for content, message in (
        ([], "must hold a mapping of file names to results"),
        ({kept.name: {"measured": 0.99, "overrides": ["x"]}}, "it lacks name, shrunken, metric"),
        ({kept.name: {**good, "measured": "much"}}, "it lacks measured, or has another type"),
        (
            {kept.name: {**good, "measured": 0.99}, "reproduce-alone.json": []},
            "reproduce-alone.json in .*it lacks name",
        ),
        ({kept.name: {**good, "runs": [{}]}}, "it lacks shard, status, rounds, num_rounds"),
    ):
        code, said = add(content)
        assert (code, kept.read_text()) == (2, before), content
        assert re.search(message, said)


@pytest.mark.parametrize("content", ["", "{}", "[]", "{"])
def test_a_result_that_is_none_is_named(
    content: str, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rows, "RESULTS", tiny.parent)
    (tiny.parent / "reproduce-averaged.json").write_text(content)
    assert reproduce.main(["--list", "--rows", str(tiny)]) == 2
    assert str(tiny.parent / "reproduce-averaged.json") in capsys.readouterr().err


def test_an_ordering_is_judged_strictly_and_by_one_seed() -> None:
    names = ("fedema20_standalone", "fedema20_fedbyol", "fedema20_fedema")
    results = {
        TABLE.row(name).file(True): {"name": name, "measured": value, "runs": [{"untrained": 0.2}]}
        for name, value in zip(names, (0.3, 0.4, 0.4), strict=True)
    }

    def judged() -> list[str]:
        [line] = [
            line for line in rows.ordering_lines(TABLE, results) if line[2] == ", ".join(names) and line[1] != "full"
        ]
        return line[3:]

    unsure = "(one seed, which cannot tell so small a gap)"
    assert judged() == ["30.00, 40.00, 40.00", "0.00", f"does not hold {unsure}"]
    results[TABLE.row(names[2]).file(True)]["measured"] = 0.41
    assert judged() == ["30.00, 40.00, 41.00", "1.00", f"holds {unsure}"]
    results[TABLE.row(names[2]).file(True)]["measured"] = 0.44
    assert judged() == ["30.00, 40.00, 44.00", "4.00", "holds (one seed)"]
    results[TABLE.row(names[2]).file(True)]["measured"] = 0.34
    assert judged()[1:] == ["-6.00", "does not hold (one seed)"]
    results[TABLE.row(names[2]).file(True)]["measured"] = 0.44
    results[TABLE.row(names[0]).file(True)]["runs"] = [{"untrained": 0.3}]
    assert judged()[2] == "holds (one seed); fedema20_standalone is no better than untrained"
    results[TABLE.row(names[1]).file(True)]["runs"] = [{"untrained": 0.4}]
    assert judged()[2] == "says nothing, no better than untrained: fedema20_standalone, fedema20_fedbyol"
    del results[TABLE.row(names[1]).file(True)]
    assert judged() == ["30.00, -, 44.00", "", "not measured"]


def test_an_ordering_of_rows_that_were_shrunken_onto_other_images_says_so() -> None:
    sizes = {line[0]: line[1] for line in rows.ordering_lines(TABLE, {})}  # of both sizes the latter
    assert sizes["FLESD over FedAvg at 2 rounds, CIFAR-100, alpha 1"] == "shrunken, CPU, on cifar10"
    assert sizes["FedEMA's table, 20 rounds"] == "shrunken, CPU"


def test_a_shrunken_run_of_two_rows_is_shown_once() -> None:
    a, b = TABLE.row("flesd_cifar100_a1_t2"), TABLE.row("flesd_cifar10_a1_t2")
    assert (TABLE.twin(b), TABLE.twin(a)) == (a, None)
    cells = {line[0]: line[rows.HEAD.index("CPU (untrained)")] for line in rows.lines(TABLE, {})}
    assert [name for name, cell in cells.items() if cell] == [b.name]
    assert cells[b.name] == f"as {a.name}"


def test_a_measured_value_carries_what_has_to_be_known_of_it() -> None:
    row = TABLE.row("flesd_local_cifar10")
    overrides = TABLE.overrides(row, shrunken=False)
    result = {**A_RESULT, "overrides": overrides, "copy": "jpeg", "measured": 0.7231, "epochs": 200}
    centralised = {**result, "name": row.beside, "measured": 0.8}

    def cells(**changed: Any) -> tuple[str, str]:
        found = {row.file(False): {**result, **changed}}
        found |= {TABLE.row(str(row.beside)).file(False): centralised} if centralised else {}
        line = next(line for line in rows.lines(TABLE, found) if line[0] == row.name)
        return line[rows.HEAD.index("measured")], line[rows.HEAD.index("centralised beside")]

    assert cells() == ("72.31 (JPEG, ±5.0)", "80.00")
    assert cells(machines=[{"commit": {"dirty": True}}])[0] == "72.31 (JPEG, ±5.0, uncommitted changes)"
    assert cells(copy="as published", machines=[{"commit": None}])[0] == "72.31"
    assert cells(copy="unknown")[0] == "72.31 (copy unknown, ±3.0)"
    assert cells(epochs=100, data_sha256={"cifar10/train": "0"})[1] == "of other images or epochs"
    centralised = {}
    assert cells()[1] == "not measured"


def test_the_page_has_the_sources_of_the_rows_and_what_is_left_out() -> None:
    page = rows.PAGE.read_text()
    before = page.partition(rows.BEGIN)[0]
    published = [row.source for row in TABLE.rows.values() if row.expected is not None]
    ids = {found for source in published for found in re.findall(r"\d{4}\.\d{5}", source)}
    assert ids == {"2109.14611", "2204.04385"}
    assert all(f"arXiv {found}" in before for found in ids)
    assert "lightly" in before
    assert all(f"- {entry['what']}: {entry['why']}." in page for entry in TABLE.left_out)


@cache
def pages() -> dict[Path, str]:
    return rows.pages(TABLE, rows.read_results(TABLE, rows.RESULTS))


@pytest.mark.parametrize("path", [rows.PAGE, rows.README], ids=lambda path: path.name)
def test_the_pages_agree_with_the_results(path: Path) -> None:
    text, page = pages()[path], path.read_text()
    assert rows.rendered(page, text) == page, f"scripts/reproduce --table writes {path.name} anew"
    shown = list(TABLE.rows) if path == rows.PAGE else list(TABLE.rows)[: rows.IN_README]
    assert all(f"| {name} |" in page for name in shown)


def test_the_pages_are_written_anew(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name in ("RESULTS", "PAGE", "README"):
        monkeypatch.setattr(rows, name, tiny.parent / name)
    for path in (rows.PAGE, rows.README):
        path.write_text(f"before\n{rows.BEGIN}\nstale\n{rows.END}\nafter\n")
    output = tiny.parent / "RESULTS" / "reproduce-averaged.json"
    command = ["--rows", str(tiny)]
    assert reproduce.main(["averaged", *command, "--work", str(tiny.parent / "w"), "-o", str(output)]) == 0
    assert reproduce.main(["--table", *command]) == 0
    measured = rows.percent(json.loads(output.read_text())["measured"])
    for path in (rows.PAGE, rows.README):
        text = path.read_text()
        assert text.startswith(f"before\n{rows.BEGIN}\n| row | what | published | ")
        assert text.endswith(f"{rows.END}\nafter\n")
        assert "stale" not in text
        [line] = [line for line in text.splitlines() if line.startswith("| averaged |")]
        assert re.search(rf"\| {measured}( \(uncommitted changes\))? \| holds \|", line)
    assert "| alone | a test | 50.00 |  | not measured |" in rows.README.read_text()
    assert "1 of 4 rows are measured." in rows.README.read_text()
    rows.README.write_text("no markers")
    assert reproduce.main(["--table", *command]) == 2
    assert "the page has no lines" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMITTED)
def test_a_committed_result_is_of_the_row_as_it_is_now(name: str) -> None:
    result = rows.checked(rows.read_json(rows.RESULTS / name), name)
    row = TABLE.row(result["name"])
    assert name == row.file(result["shrunken"])
    assert TABLE.is_of(row, result)
    assert result["expected"] == row.expected
    values = [run["measured"] for run in result["runs"] if run["measured"] is not None]
    assert values
    whole = len(values) == len(result["runs"])
    assert result["measured"] == (pytest.approx(sum(values) / len(values)) if whole else None)
    if not whole or result["shrunken"] or row.expected is None:
        assert result["holds"] is None
    else:
        assert result["holds"] == row.holds(result)
    assert result["machines"]
    assert (row.beside is None) == (result["beside"] is None)
    assert result["beside"] is None or result["beside"].keys() == {"row", "measured", "status"}


# --- scripts/gpu_acceptance -------------------------------------------------------------------------------------------
def accept(tiny: Path, *more: str) -> tuple[int, dict[str, Any]]:
    out = tiny.parent / "out"
    command = [sys.executable, str(ROOT / "scripts" / "gpu_acceptance"), "--dry", "--rows", str(tiny)]
    command += ["--out", str(out), "--work", str(tiny.parent / "acceptance"), *more]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300, check=False
    )
    files = {path.name: path for path in out.iterdir()}
    assert files.keys() == {"acceptance.json", "benchmarks.json", "rows.json", "log.txt"}, done.stderr
    assert all(path.stat().st_size <= 16 * 2**20 for path in files.values())
    return done.returncode, {name: json.loads(files[f"{name}.json"].read_text()) for name in ("acceptance", "rows")}


def test_a_rehearsal_measures_rows_and_a_failure_ends_none_of_the_others(tiny: Path) -> None:
    code, left = accept(tiny, "--parts", "rows", "--names", "broken,averaged,alone", "--seconds", "200")
    assert code == 1  # of the broken one
    parts = {part["name"]: part["code"] for part in left["acceptance"]["parts"]}
    assert parts == {"row broken": 2, "row averaged": 0, "row alone": 0}
    assert all(result["shrunken"] for result in left["rows"].values())
    measured = {result["name"]: result["measured"] is not None for result in left["rows"].values()}
    assert measured == {"broken": False, "averaged": True, "alone": True}
    assert left["acceptance"]["machine"]["hardware"]["cores"] >= 1

    code, left = accept(tiny, "--parts", "rows", "--names", "averaged,alone", "--seconds", "100")
    assert code == 0
    assert left["acceptance"]["parts"] == []  # both are measured

    shutil.rmtree(tiny.parent / "acceptance")  # another machine, with what came back from the first
    code, again = accept(tiny, "--parts", "rows", "--names", "averaged,alone", "--seconds", "100")
    assert (code, again["acceptance"]["parts"]) == (0, [])
    assert again["rows"] == left["rows"]


def test_why_a_row_could_not_be_measured_is_said_at_once(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And where its images are looked for."""
    entry = tiny_row("imageless", "strategy=fedavg", "data=cifar10")
    another = {**entry, "name": "another"}
    tiny.write_text(yaml.safe_dump({"cpu": ["device=cpu"], "rows": [entry, another], "orderings": []}))
    (tiny.parent / "nowhere").mkdir()
    arguments = ["--rows", str(tiny), "--data", str(tiny.parent / "nowhere"), "--work", str(tiny.parent / "w")]
    why = r"error: data=cifar10: the train split is neither in data\.root=.*nowhere .*\(Here data\.root is --data\.\)"
    output = tiny.parent / "result.json"
    assert reproduce.main(["imageless", "--cpu", *arguments, "-o", str(output), "--seconds", "60"]) == 2
    assert re.search(f"^{why}$", capfd.readouterr().err)
    assert not output.exists()  # it was no attempt
    assert gpu_acceptance.main([*arguments, "--out", str(tiny.parent / "o"), "--dry", "--parts", "rows"]) == 1
    out = capfd.readouterr().out
    assert re.search(f"^row imageless: exit code 2, {why}$", out, re.MULTILINE)
    assert out.endswith("row another: passed over, has the images of imageless, which were not read\n")
    with pytest.raises(SystemExit, match="2"):
        gpu_acceptance.main([*arguments, "--data", str(tiny.parent / "missing")])


@pytest.mark.slow
def test_a_row_that_outlasts_the_sitting_writes_how_far_it_is(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_acceptance, "LAST", 15.0)
    entry = tiny_row("endless", "strategy=fedavg", "client.local_epochs=1000000")
    tiny.write_text(yaml.safe_dump({"cpu": ["device=cpu"], "rows": [entry], "orderings": []}))
    arguments = ["--dry", "--rows", str(tiny), "--out", str(tiny.parent / "o"), "--work", str(tiny.parent / "w")]
    assert gpu_acceptance.main([*arguments, "--parts", "rows", "--seconds", "60"]) == 0
    [part] = json.loads((tiny.parent / "o" / "acceptance.json").read_text())["parts"]
    assert (part["interrupted"], part["code"]) == (True, reproduce.INTERRUPTED)
    result = json.loads((tiny.parent / "o" / "rows.json").read_text())["reproduce-endless-cpu.json"]
    assert (result["measured"], result["runs"][0]["status"], result["runs"][0]["rounds"]) == (None, "stopped", 0)


def test_a_sitting_without_time_leaves_its_files(tiny: Path) -> None:
    code, left = accept(tiny, "--parts", "rows", "--seconds", "5")
    assert (code, left["rows"], left["acceptance"]["parts"]) == (0, {}, [])


def test_a_sitting_is_one_process_at_a_time(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rows that it measures are no second one."""
    out, work = tiny.parent / "o", tiny.parent / "w"
    arguments = ["--dry", "--rows", str(tiny), "--out", str(out), "--work", str(work), "--parts", "rows"]
    arguments += ["--names", "averaged", "--seconds", "200"]
    work.mkdir()
    with held(work, "", ""):
        assert gpu_acceptance.main(arguments) == 2
        assert f"error: --work {work} is in use by process {os.getpid()} on " in capsys.readouterr().err
        assert list(out.iterdir()) == []
    assert gpu_acceptance.main(arguments) == 0
    [part] = json.loads((out / "acceptance.json").read_text())["parts"]
    assert (part["name"], part["code"]) == ("row averaged", 0)


HOLDING = """
import sys, time
from pathlib import Path
from bench import gpu_acceptance
gpu_acceptance.Acceptance.__call__ = lambda sitting: print("there", flush=True) or time.sleep(600)
sys.exit(gpu_acceptance.main(sys.argv[1:]))
"""


def test_two_sittings_share_no_out(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By whatever name; a killed one holds nobody up, and what travels has no lock in it."""
    out = tiny.parent / "o"
    (tiny.parent / "link").symlink_to(out)
    arguments = ["--dry", "--rows", str(tiny), "--parts", "rows", "--seconds", "1"]
    first = ["--out", str(out), "--work", str(tiny.parent / "first")]
    second = ["--out", str(tiny.parent / "link"), "--work", str(tiny.parent / "second")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"}
    command = [sys.executable, "-c", HOLDING, *arguments, *first]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "there\n"
            assert gpu_acceptance.main([*arguments, *second]) == 2
            said = f"error: --out {tiny.parent / 'link'} is in use by process {holder.pid} on "
            assert capsys.readouterr().err.startswith(said)
            assert list(out.iterdir()) == list((tiny.parent / "second").iterdir()) == []
        finally:
            holder.kill()
    assert gpu_acceptance.main([*arguments, *second]) == 0
    assert {path.name for path in out.iterdir()} == {"acceptance.json", "benchmarks.json", "rows.json", "log.txt"}
    assert gpu_acceptance.main([*arguments, *first]) == 0  # one after the other they may
    assert not [path.name for path in tiny.parent.iterdir() if path.name.endswith(".lock")]


def test_a_part_is_ended_at_its_limit_with_all_it_started(tmp_path: Path) -> None:
    marker = tmp_path / "pid"
    inner = f"import os, time, pathlib; pathlib.Path({str(marker)!r}).write_text(str(os.getpid())); time.sleep(600)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    part = gpu_acceptance.run("sleeper", [sys.executable, "-c", outer], gpu_acceptance.LAST + 3, tmp_path / "log")
    assert part.interrupted
    assert part.seconds < gpu_acceptance.LAST + 3
    deadline = time.monotonic() + 10
    while Path(f"/proc/{marker.read_text()}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{marker.read_text()}").exists()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_part_that_runs(tiny: Path, number: signal.Signals) -> None:
    """Which has written how far it is."""
    entry = tiny_row("endless", "strategy=fedavg", "client.local_epochs=1000000")
    tiny.write_text(yaml.safe_dump({"cpu": ["device=cpu"], "rows": [entry], "orderings": []}))
    command = [sys.executable, str(ROOT / "scripts" / "gpu_acceptance"), "--dry", "--rows", str(tiny)]
    command += ["--out", str(tiny.parent / "o"), "--work", str(tiny.parent / "w"), "--parts", "rows"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*command, "--seconds", "500"], env=environment, stdout=subprocess.DEVNULL)
    run_dir = tiny.parent / "w" / "endless-cpu" / "run"
    deadline = time.monotonic() + 120
    while not (run_dir / "checkpoints" / "00000").is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    [child] = children(process.pid)
    process.send_signal(number)
    assert process.wait(60) == gpu_acceptance.INTERRUPTED
    assert not Path(f"/proc/{child}").exists()
    result = json.loads((tiny.parent / "o" / "rows.json").read_text())["reproduce-endless-cpu.json"]
    assert (result["measured"], result["runs"][0]["status"]) == (None, "stopped")
    [part] = json.loads((tiny.parent / "o" / "acceptance.json").read_text())["parts"]
    assert (part["name"], part["code"], part["interrupted"]) == ("row endless", None, True)


def test_a_part_ends_with_a_sitting_that_is_killed(tmp_path: Path) -> None:
    """And what it has done until then was looked at."""
    code = (
        "import sys, time; from pathlib import Path; from bench import gpu_acceptance as ga; ga.REFRESH = 0.1;"
        "ga.run('sleeper', [sys.executable, '-c', 'import time; time.sleep(600)'], 600, Path(sys.argv[1]),"
        " lambda: print('looked', flush=True))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"}
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as sitting:
        assert sitting.stdout is not None
        assert sitting.stdout.readline() == sitting.stdout.readline() == "looked\n"
        [child] = children(sitting.pid)
        sitting.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def test_gpu_tests_run_once_with_the_same_code(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    ends: list[tuple[int | None, bool]] = [(None, True), (1, False), (0, False)]

    def run(name: str, command: Any, limit: float, log: Path, meanwhile: Any) -> gpu_acceptance.Part:
        ran.append(name)
        code, interrupted = ends[len(ran) - 1]
        return gpu_acceptance.Part(
            name=name, command=[], code=code, interrupted=interrupted, seconds=1.0, tail=f"sitting {len(ran)}"
        )

    monkeypatch.setattr(gpu_acceptance, "run", run)
    monkeypatch.setattr(gpu_acceptance, "code_digest", lambda: "a")
    arguments = ["--dry", "--rows", str(tiny), "--out", str(tiny.parent / "o"), "--work", str(tiny.parent / "w")]

    def sitting(seconds: int = 30) -> tuple[int, int, bool, str]:
        code = gpu_acceptance.main([*arguments, "--parts", "tests", "--seconds", str(seconds)])
        [part] = json.loads((tiny.parent / "o" / "acceptance.json").read_text())["parts"]
        return code, len(ran), part["earlier"], (tiny.parent / "o" / "log.txt").read_text().split("\n")[1]

    assert sitting() == (0, 1, False, "sitting 1")
    assert gpu_acceptance.main([*arguments, "--parts", "tests", "--seconds", "31"]) == 0
    assert len(ran) == 1  # as little time again
    assert sitting(60) == (1, 2, False, "sitting 2")
    assert sitting() == (1, 2, True, "sitting 2")  # what failed is still told
    shutil.rmtree(tiny.parent / "w")
    assert sitting() == (1, 2, True, "sitting 2")
    monkeypatch.setattr(gpu_acceptance, "code_digest", lambda: "b")
    assert sitting() == (0, 3, False, "sitting 3")


def test_a_benchmark_that_is_too_long_starves_no_other(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes 300 s, the others 10; nothing follows, so a sitting is theirs."""
    clock = [1000.0]
    ran: list[str] = []

    def run(name: str, command: Any, limit: float, log: Path, meanwhile: Any) -> gpu_acceptance.Part:
        ran.append(name.removeprefix("benchmark "))
        needs = 300.0 if ran[-1] == "views" else 10.0
        clock[0] += min(needs, limit)
        log.write_text("{a warning}\n" + ('{"name": "", "figures": {}}\nbye' if needs <= limit else '{"name'))
        code, interrupted = (0, False) if needs <= limit else (None, True)
        return gpu_acceptance.Part(name=name, command=[], code=code, interrupted=interrupted, seconds=1.0, tail="")

    monkeypatch.setattr(gpu_acceptance, "run", run)
    monkeypatch.setattr(gpu_acceptance, "code_digest", lambda: "a")
    monkeypatch.setattr(gpu_acceptance.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpu_acceptance, "machine", lambda: {"missing": [], "python": "3"})
    arguments = ["--dry", "--rows", str(tiny), "--out", str(tiny.parent / "o"), "--work", str(tiny.parent / "w")]

    def sitting(seconds: int) -> list[str]:
        ran.clear()
        more = ["--parts", "benchmarks", "--benchmarks", "views,train,round", "--seconds", str(seconds)]
        assert gpu_acceptance.main([*arguments, *more]) == 0
        return list(ran)

    assert sitting(200) == ["views"]
    shutil.rmtree(tiny.parent / "w")  # what came back is enough
    assert sitting(200) == ["train", "round"]
    assert "benchmark views: passed over, 200 s were not enough and 180 s are left" in capsys.readouterr().out
    assert sitting(215) == []
    assert sitting(350) == ["views"]
    results = json.loads((tiny.parent / "o" / "benchmarks.json").read_text())
    assert results.keys() == {"benchmark-views", "benchmark-train", "benchmark-round"}


def test_an_interrupted_train_goes_on_with_the_families_that_are_left(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run(name: str, command: Any, limit: float, log: Path, meanwhile: Any) -> gpu_acceptance.Part:
        families = command[command.index("--of") + 1].split(",") if "--of" in command else ["a", "b", "c"]
        asked.append(families)
        figures = {"families": {families[0]: len(asked)}, "not_measured": families[1:]}
        log.write_text(json.dumps({"name": "train", "figures": figures, "bars": [families[0]]}))
        return gpu_acceptance.Part(name=name, command=[], code=130, interrupted=True, seconds=1.0, tail="")

    monkeypatch.setattr(gpu_acceptance, "run", run)
    arguments = ["--dry", "--rows", str(tiny), "--out", str(tiny.parent / "o"), "--work", str(tiny.parent / "w")]
    for _ in range(4):
        more = ["--parts", "benchmarks", "--benchmarks", "train", "--seconds", "90"]
        assert gpu_acceptance.main([*arguments, *more]) == 0
    result = json.loads((tiny.parent / "o" / "benchmarks.json").read_text())["benchmark-train"]
    assert asked == [["a", "b", "c"], ["b", "c"], ["c"]]
    assert result["figures"] == {"families": {"a": 1, "b": 2, "c": 3}, "not_measured": []}
    assert result["bars"] == ["a", "b", "c"]


def test_parts_share_the_time_with_those_that_follow(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {}

    def run(name: str, command: Any, limit: float, log: Path, meanwhile: Any) -> gpu_acceptance.Part:
        limits[name] = limit
        log.write_text("{}")
        return gpu_acceptance.Part(name=name, command=[], code=0, interrupted=False, seconds=1.0, tail="")

    monkeypatch.setattr(gpu_acceptance, "run", run)
    monkeypatch.setattr(gpu_acceptance.time, "monotonic", lambda: 1000.0)
    arguments = ["--dry", "--rows", str(tiny), "--benchmarks", "train", "--seconds", "400"]
    for i, parts in enumerate(("tests,benchmarks,rows", "tests,benchmarks")):
        folders = ["--out", str(tiny.parent / f"o{i}"), "--work", str(tiny.parent / f"w{i}")]
        gpu_acceptance.main([*arguments, *folders, "--parts", parts, "--names", "averaged"])
        limits |= {f"{name} {i}": limits.pop(name) for name in ("tests", "benchmark train")}
    assert limits == {
        "row averaged": 400, "tests 0": 100, "benchmark train 0": 200, "tests 1": 100, "benchmark train 1": 400
    }  # fmt: skip


def test_the_digest_of_the_code_is_of_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    (tmp_path / "fedssl").mkdir()
    (tmp_path / "fedssl" / "a.py").write_text("x = 1")
    before = gpu_acceptance.code_digest()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "b.py").write_text("")
    assert gpu_acceptance.code_digest() == before
    (tmp_path / "fedssl" / "a.py").write_text("x = 2")
    assert gpu_acceptance.code_digest() != before


def test_every_module_that_rows_and_tests_import_is_known_to_be_needed() -> None:
    """But for what only other grids, downloads and other commands use."""
    elsewhere = {"ray", "timm", "playwright", "datasets"}
    files = [path for folder in ("fedssl", "strategies", "tests") for path in (ROOT / folder).rglob("*.py")]
    imported = {
        name.partition(".")[0]
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    ours = {"fedssl", "strategies", "tests", "bench", "benchmark", "study_attacks", "study_flesd", ""}
    known = {module.partition(".")[0] for module in gpu_acceptance.NEEDED}
    assert imported - set(sys.stdlib_module_names) - ours - elsewhere <= known


OF_FLOWER = """
import sys
import fedssl.federation.simulation, tests.federation_helpers
print(*{module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "flwr"}, sep="\\n")
"""


def test_every_module_that_flower_imports_for_a_row_is_known_to_be_needed() -> None:
    """What its files, as far as a row loads them, import whatever the circumstances."""
    done = subprocess.run(
        [sys.executable, "-c", OF_FLOWER],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    imported = {
        name
        for path in done.stdout.split()
        for node in ast.parse(Path(path).read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    foreign = {name for name in imported if name.partition(".")[0] not in {*sys.stdlib_module_names, "flwr"}}
    assert {"grpc", "google.protobuf.message"} <= foreign
    assert {name for name in foreign if not any(f"{name}.".startswith(f"{m}.") for m in gpu_acceptance.NEEDED)} == set()


def test_gpu_tests_are_not_tried_without_what_they_need(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_acceptance, "NEEDED", {"no_such_module": "no-such-package: tests"})
    arguments = ["--dry", "--rows", str(tiny), "--out", str(tiny.parent / "o"), "--work", str(tiny.parent / "w")]
    assert gpu_acceptance.main([*arguments, "--parts", "tests", "--seconds", "30"]) == 1
    left = json.loads((tiny.parent / "o" / "acceptance.json").read_text())
    assert left["machine"]["missing"] == ["no-such-package: tests"]
    assert "cannot run without no-such-package" in (tiny.parent / "o" / "log.txt").read_text()


def test_unknown_parts_and_rows_end_with_2(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_acceptance.main(["--parts", "fun"])
    assert ended.value.code == 2
    arguments = ["--out", str(tiny.parent / "o"), "--work", str(tiny.parent / "w"), "--rows", str(tiny)]
    assert gpu_acceptance.main([*arguments, "--names", "nothing"]) == 2
    assert "there is no row 'nothing'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        gpu_acceptance.main([*arguments, "--benchmarks", "fun,train"])
    assert ended.value.code == 2
    assert "--benchmarks has fun; there are " in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[1]", '{"reproduce-'])
def test_what_a_sitting_did_not_leave_is_named(content: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.parent / "o" / "rows.json"
    path.parent.mkdir()
    path.write_text(content)
    arguments = ["--out", str(path.parent), "--work", str(tiny.parent / "w"), "--rows", str(tiny), "--parts", "rows"]
    assert gpu_acceptance.main(arguments) == 2
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("name", ["futile.json", "tests.json", "benchmark-train.json", "reproduce-averaged.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"of": 3}', '{"of": {}, "seconds": 3}'])
def test_damaged_notes_of_a_sitting_are_named(
    content: str, name: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.parent / "w" / "results" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    arguments = ["--out", str(tiny.parent / "o"), "--work", str(tiny.parent / "w"), "--rows", str(tiny)]
    assert gpu_acceptance.main([*arguments, "--parts", "rows", "--seconds", "1"]) == 2
    assert str(path) in (said := capsys.readouterr().err)
    assert "elete it" in said


def test_what_came_back_damaged_or_under_a_foreign_name_is_passed_over(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing is written outside of --work."""
    out = tiny.parent / "a" / "o"
    out.mkdir(parents=True)
    table = rows.load_table(tiny)
    good = {**A_RESULT, "overrides": table.overrides(table.row("averaged"), shrunken=False)}
    brought = {"../../evil": good, "reproduce-averaged.json": good, "reproduce-alone.json": {"runs": None}}
    (out / "rows.json").write_text(json.dumps(brought))
    (out / "benchmarks.json").write_text('{"../../evil": {"name": "", "figures": {}}, "benchmark-train": 3}')
    (out / "acceptance.json").write_text('{"futile": 3, "tests": []}')
    work = tiny.parent / "a" / "b" / "w"
    arguments = ["--out", str(out), "--work", str(work), "--rows", str(tiny), "--parts", "rows", "--seconds", "1"]
    assert gpu_acceptance.main(arguments) == 0
    said = capsys.readouterr().out
    for name in ("'../../evil', which is of no row", "reproduce-alone.json in ", "'../../evil.json'"):
        assert name in said
    for name in ("'benchmark-train.json'", "'futile.json'"):
        assert f"passed over: {out} has {name}, which is damaged, or none of its own" in said
    assert [path.name for path in (work / "results").iterdir()] == ["reproduce-averaged.json"]
    assert {path.name for path in (tiny.parent / "a").iterdir()} == {"o", "b"}
    assert {path.name for path in (tiny.parent / "a" / "b").iterdir()} == {"w"}


def test_of_two_results_the_one_with_more_complete_runs_counts(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unfinished one of an earlier sitting does not stand before what was committed since."""
    asked: list[str] = []

    def run(name: str, command: Any, limit: float, log: Path, meanwhile: Any) -> gpu_acceptance.Part:
        asked.append(name)
        log.write_text("")
        return gpu_acceptance.Part(name=name, command=[], code=0, interrupted=False, seconds=1.0, tail="")

    monkeypatch.setattr(gpu_acceptance, "run", run)
    monkeypatch.setattr(rows, "RESULTS", tiny.parent / "committed")
    own = tiny.parent / "w" / "results"
    table = rows.load_table(tiny)
    for folder, num_averaged, num_alone in ((rows.RESULTS, 1, 1), (own, 0, 0)):
        folder.mkdir(parents=True)
        for name, shards, num in (("averaged", [None], num_averaged), ("alone", [0, 2], num_alone)):
            runs = [
                {**A_RESULT["runs"][0], "shard": shard, "measured": 0.6 if i < num else None}
                for i, shard in enumerate(shards)
            ]
            overrides = table.overrides(table.row(name), shrunken=False)
            measured = 0.6 if num == len(shards) else None
            result = {**A_RESULT, "name": name, "overrides": overrides, "measured": measured, "runs": runs}
            (folder / f"reproduce-{name}.json").write_text(json.dumps(result))
    arguments = ["--out", str(tiny.parent / "o"), "--work", str(tiny.parent / "w"), "--rows", str(tiny)]
    arguments += ["--parts", "rows", "--names", "averaged,alone", "--seconds", "100"]
    assert gpu_acceptance.main(arguments) == 0
    assert asked == ["row alone"]
    left = json.loads((tiny.parent / "o" / "rows.json").read_text())
    assert [run["measured"] for run in left["reproduce-alone.json"]["runs"]] == [0.6, None]
    path = own / "reproduce-alone.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "overrides": ["of another time"]}))
    assert gpu_acceptance.main(arguments) == 0
    assert rows.num_completed(json.loads(path.read_text())) == 1  # the committed one
    assert json.loads(path.with_suffix(".old").read_text())["overrides"] == ["of another time"]


def test_a_folder_that_cannot_be_made(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = str(tiny / "w")  # below a file
    assert gpu_acceptance.main(["--out", str(tiny.parent / "o"), "--work", work, "--rows", str(tiny)]) == 2
    assert "name another one with --work" in capsys.readouterr().err
    assert reproduce.main(["alone", "--cpu", "--rows", str(tiny), "--work", work]) == 2
    assert "name another one with --work" in capsys.readouterr().err
    assert reproduce.main(["alone", "--cpu", "--rows", str(tiny), "-o", str(tiny.parent)]) == 2
    assert "is a folder; name the file" in capsys.readouterr().err
