"""The command `fedssl`: what it refuses, its exit codes, resume, replay, sweeps."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import hydra
import pytest
import yaml

import fedssl
from fedssl.__main__ import main
from fedssl.config import compose, conf_dir, unread
from fedssl.errors import ConfigError
from fedssl.sweep import shares_of_machine
from tests.federation_helpers import SMALL, assert_same, final_arrays, rows, tree_hash, without_clock


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


def small(*overrides: str) -> list[str]:
    """The overrides of a run of a second, without those whose key `overrides` give."""
    given = {override.lstrip("+~").split("=")[0] for override in overrides}
    groups = {key.split(".")[0] for key in given if "." not in key}  # a chosen group has other keys
    kept = [
        override
        for override in SMALL
        if (key := override.lstrip("+").split("=")[0]) not in given
        and not (key.split(".")[0] in groups and key.split(".")[0] in ("public", "partition"))
    ]
    return [*kept, *overrides]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`fedssl` in this process and an empty folder, as a call."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*arguments: str) -> Ended:
        capsys.readouterr()
        code = main(arguments)
        captured = capsys.readouterr()
        return Ended(code=code, out=captured.out, err=captured.err)

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run of one round; tests must not change it."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    assert main(small("federation.num_rounds=1", f"run_dir={run_dir}")) == 0
    return run_dir


def shell(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`fedssl` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "fedssl", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# --- bad input ----------------------------------------------------------------------------------------------------
REFUSED: dict[str, tuple[list[str], list[str]]] = {  # overrides, and what the message has to say
    "cohort larger than the clients": (
        ["federation.cohort_size=5"],
        ["federation.cohort_size must be between 1 and federation.num_clients=4, got 5", "lower cohort_size or raise"],
    ),
    "cohort larger than those that train": (
        ["federation.cohort_size=4", "public=client_shard"],
        ["federation.cohort_size=4", "only 3 clients train", "Lower cohort_size or raise num_clients"],
    ),
    "no rounds": (["federation.num_rounds=0"], ["federation.num_rounds must be at least 1, got 0"]),
    "no checkpoints": (["federation.keep_checkpoints=0"], ["federation.keep_checkpoints must be at least 1, got 0"]),
    "more replies than clients": (
        ["federation.min_replies=5"],
        ["federation.min_replies must be between 0", "size 4, got 5", "Lower it, or raise federation.num_clients"],
    ),
    "more replies than clients that train": (
        ["federation.min_replies=4", "public=client_shard"],
        ["federation.min_replies=4", "only 3 clients train", "Lower min_replies"],
    ),
    "no families": (["federation.families=[]"], ["federation.families is empty", "e.g. [conv4_16]"]),
    "families not a list": (
        ["federation.families=conv4_16"],
        ["federation.families must be a list [...] of text", 'got "conv4_16"', "federation.families=..."],
    ),
    "unknown architecture": (
        ["federation.families=[resnet9]"],
        ["'resnet9'", "known are", "resnet8", "+models.resnet9._target_="],
    ),
    "report family without clients": (
        ["federation.report_family=resnet18"],
        ["federation.report_family=resnet18 is no client's", "[conv4_4, conv4_2, tiny]"],
    ),
    "alpha 0": (
        ["partition=dirichlet", "partition.alpha=0"],
        ["partition.alpha must be a finite number above 0, got 0"],
    ),
    "alpha negative": (["partition=quantity", "partition.alpha=-0.5"], ["partition.alpha", "above 0, got -0.5"]),
    "empty client after 100 draws": (
        ["partition=dirichlet", "partition.alpha=0.001", "partition.min_size=28"],
        ["partition.alpha=0.001", "in 100 draws", "Raise partition.alpha, lower partition.min_size or lower"],
    ),
    "part larger than the data": (
        ["partition=dirichlet", "partition.min_size=1000"],
        ["116 images cannot give each of federation.num_clients=4 clients at least 1000 (partition.min_size)"],
    ),
    "public set larger than what is left": (
        ["public.size=137"],
        ["public.size=137 is too large", "Set public.size to 136 or less"],
    ),
    "labels needed": (
        ["data=image_folder", "data.root=unlabelled", "data.num_images=null", "public.size=2", "partition=dirichlet"],
        ["partition=dirichlet skews clients by label, but the private data has no labels", "Choose partition=iid"],
    ),
    "labels needed for probes": (
        ["data=image_folder", "data.root=unlabelled", "data.num_images=null", "public.size=2"],
        ["have no class folders", "name labelled data for the probes with evaluate.data="],
    ),
    "no data root": (
        ["data=cifar10", "data.root=nowhere"],
        ["data=cifar10", "data.root=nowhere", "does not exist", "Set data.root= to the folder", "data.download=true"],
    ),
    "no image folder": (["data=image_folder", "data.root=nowhere"], ["data.root=nowhere", "is not a folder"]),
    "no public root": (["public=dataset", "public.data=cifar10", "public.root=nowhere"], ["nowhere", "does not exist"]),
    "no probe root": (["evaluate.data=cifar10", "evaluate.root=nowhere"], ["nowhere", "does not exist"]),
    "a root that is not read": (["public=dataset", "public.data=digits", "public.root=x"], ["leave public.root out"]),
    "unknown public data": (
        ["public=dataset", "public.data=mnist"],
        ["data=mnist: there is no such choice", "cifar10"],
    ),
    "unknown key": (
        ["federation.num_round=3"],
        ["no key federation.num_round.", "Did you mean federation.num_rounds?"],
    ),
    "unknown top key": (["sed=3"], ["there is no key sed. Did you mean seed?", "max_seconds"]),
    "unknown choice": (["strategy=fedsgd"], ["strategy=fedsgd: there is no such choice", "flesd, hetero_ssfl"]),
    "key left out": (["~federation.num_rounds"], ["Federation", "'num_rounds'"]),
    "group left out": (["~grid"], ["the configuration has no grid"]),
    "unknown experiment": (
        ["experiment=cifar10_smal"],
        ["experiment=cifar10_smal: there is no such choice. experiment may be cifar10_resnet18, cifar10_small, "],
    ),
    "key of one's own": (["+foo=1"], ["there is no key foo. There are seed, device,"]),
    "group of one's own": (["+uplink=similarity"], ["there is no key uplink. There are seed,"]),
    "strategy with a key of one's own": (
        ["+strategy.foo=1"],
        ["no key strategy.foo. strategy has name, client, server"],
    ),
    "strategy without its server half": (["~strategy.server"], ["strategy has no server: see the files of conf/strat"]),
    "group without a target": (["~data._target_"], ["data has no _target_", "see the files of conf/data"]),
    "seed below 0": (["seed=-1"], ["seed must be between 0 and 9223372036854775807 (2**63 - 1), got -1"]),
    "seed above": ([f"seed={2**63}"], ["seed must be between 0 and", "got 9223372036854775808"]),
    "no override": (["flesd"], ["'flesd'", "missing EQUAL"]),
    "value that is missing": (["partition=file"], ["partition.path has no default: set partition.path=..."]),
    "interpolation of nothing": (["seed=${nothing}"], ["seed: ", "'nothing' not found"]),
    "sweep without -m": (["seed=1,2"], ["seed=1,2", "--multirun"]),
    "bad device": (["device=tpu"], ["device must be auto", "cpu or cuda, got 'tpu'"]),
    "word for a number": (
        ["federation.num_rounds=abc"],
        ['federation.num_rounds must be a whole number, got "abc"', "federation.num_rounds=..."],
    ),
    "null for a number": (["client.batch_size=null"], ["client.batch_size must be a whole number, got null"]),
    "flag for a number": (["federation.num_rounds=true"], ["federation.num_rounds must be a whole number, got true"]),
    "fraction for a count": (["client.local_epochs=1.5"], ["client.local_epochs must be a whole number, got 1.5"]),
    "word for a flag": (["client.amp=maybe"], ['client.amp must be true or false, got "maybe"']),
    "number for a path": (["client.store=5"], ["client.store must be text or null, got 5"]),
    "word for a seed": (["seed=first"], ['seed must be a whole number, got "first"']),
    "word for a nested number": (
        ["client.optimisation.lr=fast"],
        ['client.optimisation.lr must be a number, got "fast"'],
    ),
    "image size": (["data.image_size=small"], ['data.image_size must be a whole number, got "small"']),
    "learning rate NaN": (["client.optimisation.lr=nan"], ["client.optimisation.lr must be a number, got NaN"]),
    "learning rate negative": (["client.optimisation.lr=-1"], ["optimisation.lr must be greater than 0, got -1"]),
    "distillation rate negative": (["distill.optimisation.lr=-1"], ["optimisation.lr must be greater than 0, got -1"]),
    "negative time": (["max_seconds=-1"], ["max_seconds must be at least 0, or null for no limit, got -1"]),
    "no image for two views": (["client.batch_size=1"], ["client.batch_size at least 2", "1"]),
    "bad grid": (["grid=ray", "grid.workers=0"], ["grid.workers must be at least 1 or null", "got 0"]),
    "target in no module": (
        ["method._target_=mypackage.Loss"],
        ["method._target_=mypackage.Loss cannot be imported: No module named 'mypackage'"],
    ),
    "target not in its module": (
        ["strategy.server._target_=strategies.flesd.Flesd"],
        ["strategy.server._target_=strategies.flesd.Flesd cannot be imported", "no attribute 'Flesd'"],
    ),
    "target of the grid": (["grid._target_=nowhere.Grid"], ["grid._target_=nowhere.Grid cannot be imported"]),
    "target that is no network": (["models.tiny._target_=collections.OrderedDict"], ["models.tiny._target_", "Module"]),
    "server half that is none": (
        ["strategy.server._target_=types.SimpleNamespace"],
        ["strategy.server must be a flwr"],
    ),
    "sweep into one directory": (["-m", "seed=1,2"], ["run_dir= is for one run", "hydra.sweep.dir="]),
    "sweep of no jobs at once": (["-m", "seed=1,2", "sweep.jobs=0"], ["sweep.jobs must be a whole number", "got '0'"]),
    "sweep of some jobs at once": (["-m", "seed=1,2", "sweep.jobs=some"], ["sweep.jobs must be", "got 'some'"]),
    "sweep over sweep.jobs": (["-m", "sweep.jobs=1,2"], ["sweep.jobs must be a whole number", "got '1,2'"]),
    "jobs at once without -m": (["sweep.jobs=2"], ["sweep.jobs=2 is for a sweep", "-m is missing"]),
    "jobs at once into one directory": (["-m", "seed=1,2", "sweep.jobs=2"], ["run_dir= is for one run"]),
    "resume of nothing": (["resume=nowhere"], ["resume=nowhere is no run directory", "nowhere/config.yaml"]),
    "resume without a name": (["resume="], ["resume= names nothing"]),
    "replay without its parts": (["replay.round=1"], ["missing: replay.run, replay.partition"]),
    "replay of nothing": (
        ["replay.run=nowhere", "replay.round=1", "replay.partition=0"],
        ["replay.run=nowhere is no run directory"],
    ),
    "replay of a word": (
        ["replay.run=x", "replay.round=last", "replay.partition=0"],
        ["whole numbers, got last and 0"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_message_before_any_work(command: Command, tmp_path: Path, case: str) -> None:
    overrides, words = REFUSED[case]
    if "data.root=unlabelled" in overrides:
        _unlabelled_images(tmp_path / "unlabelled")
    before = sorted(tmp_path.iterdir())
    of_a_run = overrides[0].startswith(("resume=", "replay."))
    ended = command(*overrides if of_a_run else small(*overrides, "run_dir=here/run"))
    assert ended.code == 2, ended
    assert ended.err.startswith("error: ")
    assert ended.err.count("error: ") == 1
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.err
    assert ended.out == ""
    assert not (tmp_path / "here" / "run").exists()
    assert [path for path in tmp_path.iterdir() if path.name != "here"] == before


def _unlabelled_images(folder: Path, count: int = 30) -> None:
    from PIL import Image

    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (16, 16), (number, 2 * number, 90)).save(folder / f"{number}.png")


def test_settings_that_the_strategy_does_not_read_are_named(command: Command) -> None:
    given = ["downlink=none", "codec=topk", "federation.num_rounds=1"]
    (note,) = [line for line in command(*small("strategy=fedavg", *given)).out.splitlines() if "does not read" in line]
    assert note.startswith("  note: strategy=fedavg does not read ")
    assert {"downlink=none", "codec=topk", "distill.epochs=1"} <= set(note.split())
    assert "federation.num_rounds=1" not in note


@pytest.mark.parametrize(
    ("strategy", "idle"),
    [
        ("fedavg", ["codec=topk", "distill.epochs=3", "downlink=none", "embedding=backbone", "ensemble=row"]),
        ("public_only", ["embedding=backbone", "ensemble=row"]),
        ("hetero_ssfl", ["distill.epochs=3", "downlink=none", "ensemble=row"]),
        ("feddf", ["codec=topk", "downlink=none"]),
        ("flesd", []),
    ],
)
def test_what_a_strategy_does_not_read(strategy: str, idle: list[str]) -> None:
    given = ["codec=topk", "distill.epochs=3", "downlink=none", "embedding=backbone", "ensemble=row", "seed=1"]
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        assert unread(hydra.compose("config", [f"strategy={strategy}", *given]), given) == idle


def test_cuda_is_refused_where_there_is_none(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ended = command(*small("device=cuda"))
    assert ended.code == 2
    assert ended.err == "error: device=cuda, but torch sees no GPU here: use device=auto or device=cpu\n"


def test_a_directory_with_something_in_it_is_refused_and_left_alone(command: Command, tmp_path: Path) -> None:
    run_dir = tmp_path / "mine"
    run_dir.mkdir()
    (run_dir / "notes.txt").write_text("important")
    before = tree_hash(run_dir)
    ended = command(*small("run_dir=mine"))
    assert ended.code == 2
    assert ended.err == "error: run_dir=mine is not empty: choose another, or go on with the run in it by resume=mine\n"
    assert tree_hash(run_dir) == before


def test_python_refuses_that_directory_too(command: Command, finished: Path) -> None:
    before = tree_hash(finished)
    with pytest.raises(ConfigError, match=r"is not empty: choose another"):
        fedssl.run(compose(small(f"run_dir={finished}")))
    assert tree_hash(finished) == before


def test_a_file_in_the_place_of_the_run_directory_is_bad_input(command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("important")
    ended = command(*small("run_dir=mine/run"))
    assert ended.code == 2
    assert ended.err.startswith("error: cannot make the run directory (run_dir=")
    assert "mine" in ended.err
    assert "Traceback" not in ended.err


def test_an_empty_directory_of_the_user_survives_bad_input(command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert command(*small("run_dir=mine", "device=tpu")).code == 2
    assert (tmp_path / "mine").is_dir()


# --- exit codes ---------------------------------------------------------------------------------------------------
def test_a_run_prints_its_figures_and_python_computes_the_same(command: Command, tmp_path: Path) -> None:
    ended = command(*small("run_dir=run", "strategy=fedavg"))
    assert (ended.code, ended.err) == (0, "")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert f"linear_top1 {summary['linear_top1']:.3f}" in ended.out
    assert "run/report.html" in ended.out
    assert (tmp_path / "run" / "report.html").is_file()
    config = compose(small("run_dir=again", "strategy=fedavg"))
    assert without_clock(fedssl.run(config)) == without_clock(summary)
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["federation"]["report_family"] = summary["report_family"]  # null was given, the choice is kept
    assert saved == {**config, "run_dir": "run"}


def test_a_report_that_fails_is_a_warning(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ValueError("no such figure")

    monkeypatch.setattr("fedssl.report.write_run_report", fails)
    ended = command(*small("run_dir=run", "strategy=public_only", "federation.num_rounds=1"))
    assert ended.code == 0
    assert ended.err.startswith(
        "warning: the results of the run in run are written, but its report could not be (ValueErr"
    )
    assert "no such figure" in ended.err
    assert "completed after 1 rounds" in ended.out
    assert "report.html" not in ended.out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "completed"


def test_clients_that_raise_end_the_run_with_code_3(command: Command, tmp_path: Path) -> None:
    (tmp_path / "quitters.py").write_text(
        "from strategies.fedavg import FedAvgClient\n\n"
        "class Quits(FedAvgClient):\n    def __call__(self, client, broadcast):\n        raise OSError('disk full')\n"
    )
    ended = command(*small("run_dir=run", "strategy=fedavg", "strategy.client._target_=quitters.Quits"))
    assert ended.code == 3
    assert "partition 3" in ended.err
    assert "OSError: disk full" in ended.err
    assert "Traceback" not in ended.err
    assert "replay.run=run replay.round=1 replay.partition=0" in ended.err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


def test_a_bug_has_a_traceback_and_code_1(command: Command, tmp_path: Path) -> None:
    (tmp_path / "buggy.py").write_text(
        "from strategies.fedavg import FedAvg\n\n"
        "class Buggy(FedAvg):\n    def aggregate_train(self, server_round, replies):\n        return 1 / 0\n"
    )
    ended = command(*small("run_dir=run", "strategy=fedavg", "strategy.server._target_=buggy.Buggy"))
    assert ended.code == 1
    assert "Traceback" in ended.err
    assert "ZeroDivisionError" in ended.err


def test_max_seconds_stops_with_code_4_and_resume_goes_on_to_the_same_end(command: Command, tmp_path: Path) -> None:
    ended = command(*small("run_dir=run", "strategy=fedavg", "federation.num_rounds=1", "max_seconds=0"))
    assert ended.code == 4
    stopped = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (stopped["status"], stopped["rounds"]) == ("stopped", 0)
    ended = command("resume=run", "max_seconds=0")
    assert ended.code == 4  # a limit for this sitting
    ended = command("resume=run")
    assert ended.code == 0
    resumed = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert command(*small("run_dir=straight", "strategy=fedavg", "federation.num_rounds=1")).code == 0
    straight = json.loads((tmp_path / "straight" / "summary.json").read_text())
    assert without_clock(resumed) == without_clock(straight)


def test_an_interrupt_keeps_the_checkpoint(tmp_path: Path) -> None:
    arguments = small("run_dir=run", "strategy=fedavg", "federation.num_rounds=1000")
    process = subprocess.Popen(
        [sys.executable, "-m", "fedssl", *_importable(arguments)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and '"scope": "server"' in metrics.read_text()) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "resume=" in err
    assert "Traceback" not in err
    rounds = [
        int(match[1])
        for path in (tmp_path / "run" / "checkpoints").iterdir()
        if (match := re.search(r"(\d+)", path.name))
    ]
    assert max(rounds) >= 1


def _importable(arguments: list[str]) -> list[str]:
    """Without the backbone that only the test process can import."""
    families = {"federation.families": "[conv4_4,conv4_2]"}
    kept = [argument for argument in arguments if "federation_helpers" not in argument]
    return [f"{key}={families[key]}" if (key := a.split("=")[0]) in families else a for a in kept]


# --- resume and replay --------------------------------------------------------------------------------------------
def test_a_completed_run_can_be_given_more_rounds(command: Command, tmp_path: Path) -> None:
    assert command(*small("run_dir=run", "strategy=fedavg", "federation.num_rounds=1")).code == 0
    assert command("resume=run", "federation.num_rounds=2").code == 0
    assert command(*small("run_dir=straight", "strategy=fedavg", "federation.num_rounds=2")).code == 0
    resumed, straight = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "straight"))
    assert without_clock(resumed) == without_clock(straight)


def test_a_completed_run_is_not_run_again(command: Command, finished: Path) -> None:
    before = tree_hash(finished)
    ended = command(f"resume={finished}")
    assert ended.code == 0
    assert ended.err == ""
    assert "flesd on digits: completed after 1 rounds" in ended.out
    assert tree_hash(finished) == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["strategy=fedavg"],
            ["strategy=fedavg would change what the run", "grid, device, client.cuda_graphs, data.root", "config.yaml"],
        ),
        (["client.local_epochs=3"], ["client.local_epochs=3 would change"]),
        (["seed=1"], ["seed=1 would change"]),
        (["-m"], ["a resume takes no option -m: it goes on with one run as ", "config.yaml says; beside resume="]),
        (["--cfg", "job"], ["a resume takes no option --cfg:"]),
        (["--config-dir", "mine"], ["a resume takes no option --config-dir:"]),
        (["federation.num_rounds=0"], ["federation.num_rounds can only grow on a resume: it is 1, got 0"]),
        (["federation.num_rounds=many"], ['federation.num_rounds must be a whole number, got "many"']),
        (["federation.num_rounds=2,3"], ["federation.num_rounds=2,3", "one value"]),
        (["grid=spark"], ["grid=spark: there is no such choice", "in_process"]),
        (["grid.workers=two"], ["grid.workers=two", "no such key"]),  # it ran in process
        (["data.root=elsewhere"], ["data.root=elsewhere: the run has no such key", "image_size"]),
        (["device=tpu", "federation.num_rounds=2"], ["device must be auto"]),
    ],
)
def test_a_resume_refuses_what_would_change_the_run(
    command: Command, finished: Path, overrides: list[str], words: list[str]
) -> None:
    before = tree_hash(finished)
    ended = command(f"resume={finished}", *overrides)
    assert ended.code == 2
    assert ended.err.startswith("error: ")
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.err
    assert tree_hash(finished) == before


def test_rounds_cannot_be_added_to_a_schedule_over_rounds(command: Command, tmp_path: Path) -> None:
    schedule = "client.optimisation.schedule=cosine_rounds"
    assert command(*small("run_dir=run", "strategy=fedavg", "federation.num_rounds=1", schedule)).code == 0
    ended = command("resume=run", "federation.num_rounds=2")
    assert ended.code == 2
    assert "cannot grow from 1 to 2: client.optimisation.schedule=cosine_rounds" in ended.err


@pytest.mark.parametrize("content", ["", '{"status": "comp', '{"status": "completed", "rounds": 1}', "[1]"])
def test_a_damaged_summary_is_named(command: Command, finished: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text((finished / "config.yaml").read_text())
    (tmp_path / "run" / "summary.json").write_text(content)
    ended = command("resume=run")
    assert ended.code == 2
    assert ended.err.startswith("error: run/summary.json is damaged. Delete it: a resume goes on from")


@pytest.mark.parametrize("content", ["", "a: [", "just: this"])
def test_a_config_that_is_none_is_refused(command: Command, tmp_path: Path, content: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(content)
    ended = command("resume=run")
    assert ended.code == 2
    assert "is not the configuration of a run" in ended.err


def test_a_client_task_is_replayed_with_its_metrics(command: Command, finished: Path) -> None:
    before = tree_hash(finished)
    ended = command(f"replay.run={finished}", "replay.round=1", "replay.partition=2")
    assert (ended.code, ended.err) == (0, "")
    replayed = json.loads(ended.out)
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["scope"] == "client" and row["partition"] == 2]
    assert replayed["metrics"]["loss"] == row["metrics"]["loss"]
    assert tree_hash(finished) == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["replay.round=7", "replay.partition=0"], ["replay.round=7", "rounds that can be replayed: [1"]),
        (["replay.round=1", "replay.partition=9"], ["replay.partition=9 was not asked in round 1", "[0, 1, 2, 3]"]),
        (["replay.round=1", "replay.partition=0", "seed=3"], ["only device= and data.root= may change, got seed=3"]),
    ],
)
def test_a_replay_refuses_what_was_not_run(
    command: Command, finished: Path, overrides: list[str], words: list[str]
) -> None:
    ended = command(f"replay.run={finished}", *overrides)
    assert ended.code == 2
    for word in words:
        assert word in ended.err
    assert "Traceback" not in ended.err


# --- sweeps -------------------------------------------------------------------------------------------------------
def test_a_sweep_records_the_job_it_refuses_and_runs_the_others(command: Command, tmp_path: Path) -> None:
    overrides = small("federation.num_rounds=1", "federation.cohort_size=4,9", "strategy=fedavg,public_only")
    ended = command("-m", *overrides, "hydra.sweep.dir=sweep")
    assert ended.code == 2
    assert ended.err.count("error: federation.cohort_size must be between") == 2
    assert "sweep: 2 of 4 jobs completed" in ended.out
    # named by what tells it from the others, without what all jobs share
    assert "  job 2 (federation.cohort_size=9 strategy=fedavg): exit code 2\n" in ended.out
    jobs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]
    assert [(job["job"], job["exit_code"]) for job in jobs] == [(0, 0), (1, 0), (2, 2), (3, 2)]
    assert "strategy=public_only" in jobs[1]["overrides"]
    assert [job.get("message", "")[:40] for job in jobs] == ["", "", *["federation.cohort_size must be between 1"] * 2]
    directories = sorted(path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    assert directories == ["0", "1"]
    for number, own, sibling in ((0, "fedavg", "public_only"), (1, "public_only", "fedavg")):
        run_dir = tmp_path / "sweep" / str(number)
        assert json.loads((run_dir / "summary.json").read_text())["strategy"] == own
        assert sibling in (run_dir / "report.html").read_text()  # the first one too: rewritten after the last job
    before = tree_hash(tmp_path / "sweep")
    again = command("-m", *overrides, "hydra.sweep.dir=sweep")
    assert (again.code, again.out) == (2, "")
    assert again.err == (
        "error: hydra.sweep.dir=sweep holds the jobs 0, 1 of an earlier sweep: choose another directory\n"
    )
    assert tree_hash(tmp_path / "sweep") == before


def test_a_sweep_of_refused_jobs_alone_keeps_its_record(command: Command, tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text('{"jobs": []}')
    ended = command("-m", *small("seed=1,2"), "hydra.sweep.dir=sweep")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: hydra.sweep.dir=sweep holds sweep.json of an earlier sweep")
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["sweep.json"]


@pytest.mark.parametrize("bad", ["strategy=fedavg,fedsgd", "federation.num_round=1,2"])
def test_a_sweep_with_a_job_that_does_not_compose_runs_none(command: Command, tmp_path: Path, bad: str) -> None:
    ended = command("-m", *small(bad), "hydra.sweep.dir=sweep")
    assert ended.code == 2
    assert ended.err.startswith("error: ")
    assert "Traceback" not in ended.err
    assert not [path for path in tmp_path.rglob("*") if path.name in ("0", "config.yaml")]


def test_jobs_at_once_leave_what_jobs_in_turn_leave(command: Command, tmp_path: Path) -> None:
    overrides = small("federation.num_rounds=1", "strategy=fedavg,flesd", "federation.cohort_size=4,9", "downlink=none")
    in_turn = command("-m", *overrides, "hydra.sweep.dir=in_turn")
    at_once = command("-m", *overrides, "hydra.sweep.dir=at_once", "sweep.jobs=2")
    assert (in_turn.code, at_once.code) == (2, 2), at_once
    a, b = (tmp_path / name for name in ("in_turn", "at_once"))
    text = (b / "sweep.json").read_text().replace(',\n        "sweep.jobs=2"', "")
    assert text == (a / "sweep.json").read_text()
    assert sorted(p.name for p in b.iterdir()) == sorted(p.name for p in a.iterdir())
    for number, sibling in (("0", "flesd"), ("2", "fedavg")):
        run = b / number
        assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in (a / number).iterdir())
        assert rows(run) == rows(a / number)
        assert_same(final_arrays(run), final_arrays(a / number))
        weights = [{p.name: p.read_bytes() for p in (r / "models").iterdir()} for r in (run, a / number)]
        assert len(weights[0]) == 3
        assert weights[0] == weights[1]
        summaries = [without_clock(json.loads((r / "summary.json").read_text())) for r in (run, a / number)]
        assert summaries[0] == summaries[1]
        assert (run / "config.yaml").read_text().replace(str(b), str(a)) == ((a / number / "config.yaml").read_text())
        assert sibling in (run / "report.html").read_text()
    for screen in ("out", "err"):  # the same lines in both, and now it is said whose they are
        said = getattr(at_once, screen).splitlines()
        own = {n: [line.removeprefix(f"job {n} | ") for line in said if line.startswith(f"job {n} | ")] for n in "02"}
        for lines in own.values():
            for line in lines:
                if line != "starts" and "report" not in line and not re.search(r" s(,|$| )", line):  # a path, a clock
                    assert line in getattr(in_turn, screen).splitlines()
    assert "\nsweep: 2 of 4 jobs completed\n" in at_once.out
    assert at_once.err.count("error: federation.cohort_size must be between") == 2


def test_a_job_that_fails_beside_others_does_not_end_them(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "troubled.py").write_text(
        "import os, signal\nfrom strategies.fedavg import FedAvgClient\n\n"
        "class Quits(FedAvgClient):\n    def __call__(self, client, broadcast):\n"
        "        raise OSError('on GPU ' + os.environ['CUDA_VISIBLE_DEVICES'])\n\n"
        "class Dies(FedAvgClient):\n    def __call__(self, client, broadcast):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,9")
    targets = "troubled.Dies,troubled.Quits,strategies.fedavg.FedAvgClient"
    overrides = small("federation.num_rounds=1", "strategy=fedavg", f"strategy.client._target_={targets}")
    ended = command("-m", *overrides, "sweep.jobs=2", "hydra.sweep.dir=sweep")
    assert ended.code == 3, ended
    jobs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]
    assert [(job["job"], job["exit_code"]) for job in jobs] == [(0, 1), (1, 3), (2, 0)]
    assert jobs[0]["message"].startswith("the process of job 0 was killed by SIGKILL. If the memory ran out, lower")
    assert f"error: {jobs[0]['message']}\n" in ended.err
    assert "OSError: on GPU 9" in jobs[1]["message"]
    assert "job 1 | error: " in ended.err
    assert json.loads((tmp_path / "sweep" / "2" / "summary.json").read_text())["status"] == "completed"


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["hydra.sweep.subdir=one", "client.store=one"])
def test_jobs_that_would_write_one_directory_never_run_at_once(command: Command, tmp_path: Path, shared: str) -> None:
    overrides = small("federation.num_rounds=1", "strategy=local_only", "seed=0,1", shared)
    ended = command("-m", *overrides, "sweep.jobs=2", "hydra.sweep.dir=sweep")
    assert ended.code == 2, ended
    jobs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]
    assert [job["exit_code"] for job in jobs] == [0, 2]
    assert "one is not empty" in jobs[1]["message"]
    assert ended.out.index("job 0 | local_only on digits: completed") < ended.out.index("job 1 | starts")


@pytest.fixture
def long_sweep(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A sweep of three long jobs, in a process group of its own, that has done a round of the first two."""
    overrides = _importable(small("strategy=fedavg", "federation.num_rounds=1000", "seed=0,1,2"))
    process = subprocess.Popen(
        [sys.executable, "-m", "fedssl", "-m", *overrides, "sweep.jobs=2", "hydra.sweep.dir=sweep"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 180
    for number in "01":
        metrics = tmp_path / "sweep" / number / "metrics.jsonl"
        while not (metrics.exists() and '"scope": "server"' in metrics.read_text()) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
    yield process
    process.kill()  # its jobs end with it
    process.communicate(timeout=60)


def test_an_interrupt_ends_all_jobs_and_keeps_their_checkpoints(
    long_sweep: subprocess.Popen[str], tmp_path: Path
) -> None:
    os.killpg(long_sweep.pid, signal.SIGINT)  # as a terminal does
    _, err = long_sweep.communicate(timeout=120)
    assert long_sweep.returncode == 130, err
    assert "Traceback" not in err
    sweep = tmp_path / "sweep"
    jobs = json.loads((sweep / "sweep.json").read_text())["jobs"]
    assert [(job["job"], job["exit_code"]) for job in jobs] == [(0, 130), (1, 130)]
    planned = json.loads((sweep / "sweep.json").read_text())["planned"]
    assert [job["job"] for job in planned] == [2]
    assert "seed=2" in planned[0]["overrides"]
    for number in "01":
        assert f"job {number} | interrupted; the last checkpoint is kept" in err
        assert final_arrays(sweep / number)
        assert json.loads((sweep / number / "summary.json").read_text())["status"] == "stopped"
    assert not (sweep / "2").exists()


def test_planned_jobs_are_recorded_from_the_start(command: Command, tmp_path: Path) -> None:
    """Each job finds itself and those after it in the plan, in Hydra's words, which another order would not be."""
    (tmp_path / "reads.py").write_text(
        "import json\nfrom pathlib import Path\nfrom strategies.fedavg import FedAvgClient\n\n"
        "class Reads(FedAvgClient):\n    def __call__(self, client, broadcast):\n"
        "        text = Path('sweep/sweep.json').read_text()\n"
        "        Path('seen' + str(json.loads(text)['planned'][0]['job'])).write_text(text)\n"
        "        raise OSError\n"
    )
    overrides = small("federation.num_rounds=1", "strategy=fedavg", "strategy.client._target_=reads.Reads")
    ended = command("-m", *overrides, "seed=range(0,2)", "client.batch_size=16,32", "hydra.sweep.dir=sweep")
    assert ended.code == 3, ended
    file = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert list(file) == ["jobs"]
    for number in range(4):
        seen = json.loads((tmp_path / f"seen{number}").read_text())
        assert [other["job"] for other in seen["jobs"]] == list(range(number))
        assert seen["planned"] == [
            {name: other[name] for name in ("job", "overrides")} for other in file["jobs"][number:]
        ]
    shuffled = command("-m", *small("federation.num_rounds=1"), "seed=shuffle(range(-6,0))", "hydra.sweep.dir=other")
    assert shuffled.code == 2
    assert len(json.loads((tmp_path / "other" / "sweep.json").read_text())["jobs"]) == 6


@pytest.mark.slow
def test_jobs_end_with_the_process_of_their_sweep(long_sweep: subprocess.Popen[str], tmp_path: Path) -> None:
    long_sweep.kill()
    deadline = time.monotonic() + 120
    for number in "01":
        summary = tmp_path / "sweep" / number / "summary.json"
        while not summary.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert json.loads(summary.read_text())["status"] == "stopped"
        assert final_arrays(summary.parent)


@pytest.mark.parametrize(
    ("at_once", "gpus", "cores_of_each", "gpus_of_each"),
    [
        (2, "4,7,9", [3, 2], ["4,9", "7"]),
        (3, "4,7", [2, 2, 1], ["4", "7", "4"]),
        (2, "", [3, 2], ["", ""]),
        (6, "GPU-a", [1] * 6, ["GPU-a"] * 6),
    ],
)
def test_jobs_at_once_share_the_machine(
    monkeypatch: pytest.MonkeyPatch, at_once: int, gpus: str, cores_of_each: list[int], gpus_of_each: list[str]
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(5)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    shares = shares_of_machine(at_once)
    assert [json.loads(share["RAY_OVERRIDE_RESOURCES"])["CPU"] for share in shares] == cores_of_each
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == gpus_of_each


@pytest.mark.ray
def test_ray_finds_the_cores_of_a_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(3)))
    module = "fedssl.federation.grids.ray_runtime"
    code = f"from {module} import start_ray\nprint(start_ray(None, None).cluster_resources()['CPU'])"
    share = shares_of_machine(1)[0]
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=share, capture_output=True, text=True, check=False
    )
    assert ended.stdout == "3.0\n", ended


def test_more_gpus_than_a_job_has_are_refused(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    ended = command("-m", *small("seed=0,1", "grid=ray", "grid.gpus=2"), "sweep.jobs=2", "hydra.sweep.dir=sweep")
    assert ended.code == 2, ended
    assert ended.err.count("error: grid.gpus=2, but a job of this sweep has 1 (sweep.jobs= shares them out)") == 2
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["multirun.yaml", "sweep.json"]


def test_jobs_at_once_are_not_for_composing_from_python() -> None:
    with pytest.raises(ConfigError, match=r"^sweep\.jobs=, .* are for the command fedssl"):
        compose(["sweep.jobs=2"])


# --- help ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job", "--resolve"]])
def test_the_whole_run_is_printed_and_nothing_is_made(tmp_path: Path, arguments: list[str]) -> None:
    ended = shell(*arguments, folder=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    for key in ("num_clients: 6", "queue_size:", "temperature:", "local_epochs:", "families:"):
        assert key in ended.stdout
    assert "???" not in ended.stdout
    if arguments != ["--help"]:  # which shows where a value comes from
        assert "${" not in ended.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_lists_ways_to_call_and_choices(tmp_path: Path) -> None:
    ended = shell("--help", folder=tmp_path)
    for words in ("fedssl -m key=a,b", "fedssl resume=DIR", "codec: dense, ", "0 completed, 2 bad input, 3 too few"):
        assert words in ended.stdout


def test_printing_the_configuration_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom fedssl.__main__ import main\nassert main(['--cfg', 'job', '--resolve']) == 0\n"
        "assert not {'torch', 'flwr', 'ray'} & sys.modules.keys()"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_what_is_printed_is_what_is_run(command: Command) -> None:
    """Even where a preset's partition is replaced: its alpha goes with it."""
    overrides = ["experiment=cifar10_small", "partition=iid", "run_dir=x"]
    ended = command("--cfg", "job", "--resolve", *overrides)
    assert ended.code == 0
    printed = yaml.safe_load(ended.out)
    assert printed == compose(overrides)
    assert printed["partition"] == {"_target_": "fedssl.data.partition.IID"}


def test_what_is_printed_is_what_is_run_from_a_folder_of_ones_own(command: Command, tmp_path: Path) -> None:
    """A preset, the partition it chooses and the probe data it names: none of them is in fedssl's conf/."""
    files = {
        "experiment/mine.yaml": (
            "# @package _global_\ndefaults:\n  - override /partition: mine\nevaluate:\n  data: letters\n"
        ),
        "partition/mine.yaml": "_target_: fedssl.data.partition.Dirichlet\nalpha: 9\nmin_size: 8\n",
        "data/letters.yaml": (conf_dir() / "data" / "digits.yaml").read_text(),
    }
    for name, text in files.items():
        (tmp_path / "yaml" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "yaml" / name).write_text(text)
    shorter = small("federation.num_rounds=1", "strategy=public_only", "experiment=mine")
    overrides = [override for override in shorter if not override.startswith("partition=")]
    printed = command("--cfg", "job", "--resolve", "--config-dir", "yaml", *overrides, "run_dir=run")
    assert (printed.code, printed.err) == (0, "")
    config = yaml.safe_load(printed.out)
    assert config["partition"]["alpha"] == 9
    assert config["evaluate"]["source"]["_target_"] == config["data"]["_target_"]
    assert compose([*overrides, "run_dir=run"], config_dir=tmp_path / "yaml") == config
    ended = command("--config-dir", "yaml", *overrides, "run_dir=run")
    assert (ended.code, ended.err) == (0, "")
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    saved["federation"]["report_family"] = None  # null was given, the choice is kept
    assert saved == config


def test_printing_a_wrong_configuration_is_bad_input(command: Command) -> None:
    ended = command("--cfg", "job", "--resolve", "federation.num_round=3")
    assert ended.code == 2
    assert ended.err.startswith("error: there is no key federation.num_round.")
    assert ended.out == ""


def test_what_is_not_built_is_absent(command: Command) -> None:
    """The choices that a message lists are the files there are."""
    conf = Path(fedssl.__file__).parents[1] / "conf"
    for group in ("codec", "ensemble", "grid", "method", "strategy"):
        choices = ", ".join(sorted(path.stem for path in (conf / group).glob("*.yaml")))
        assert f"{group} may be {choices}." in command(f"{group}=nosuch").err


def test_the_command_as_a_process(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("fedssl")
    for command in ([str(script)], [sys.executable, "-m", "fedssl"]):
        ended = subprocess.run(
            [*command, "federation.cohort_size=9"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 2
        assert ended.stderr.startswith("error: federation.cohort_size must be between 1 and")
        assert ended.stderr.count("\n") == 1
        assert ended.stdout == ""


def test_arguments_that_hydra_does_not_know_end_with_code_2(tmp_path: Path) -> None:
    ended = shell("--fast", folder=tmp_path)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
