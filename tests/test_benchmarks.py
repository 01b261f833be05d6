"""`scripts/benchmark.py`: which code it measures, how it ends, and what measures a GPU and runs on the CPU as well."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

import benchmark  # noqa: E402
from bench import compiled, measure, packed, scale, train, views  # noqa: E402
from bench.measure import judge  # noqa: E402

from fedssl.errors import ConfigError  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("name", DEVICES)
def test_clients_at_once_are_counted_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LEAD_S", 0.1)
    monkeypatch.setattr(packed, "WINDOW_S", 0.5)
    training = packed.Training(steps=5, batch_size=8, epochs=2)  # enough to be replayed
    [(family, summary)] = packed.together(["conv4_16"], (1, 2), torch.device(name), training).items()
    assert family == "conv4_16"
    assert [row["clients"] for row in summary["rows"]] == [1, 2]
    assert all(row["images_per_s"] > 0 for row in summary["rows"])
    assert summary["rows"][0]["gain"] == 1


def test_a_client_that_fails_ends_the_measurement() -> None:
    with pytest.raises(KeyError, match="no_such_family"):
        packed.together(["no_such_family"], (1,), torch.device("cpu"), packed.Training())


@pytest.mark.parametrize(("text", "percent"), [("93", 93.0), ("[N/A]", None), (None, None)])
def test_utilisation_is_none_where_nobody_says(
    text: str | None, percent: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "nvidia_smi", lambda field: text)
    assert packed.utilisation() == percent


@pytest.mark.parametrize(
    ("readings", "busy_from"), [((40.0, 90.0, 99.0), 2), ((40.0, 60.0, 89.0), None), ((None,), None)]
)
def test_a_gpu_is_busy_from_90_percent(readings: tuple[float | None, ...], busy_from: int | None) -> None:
    rows = [{"clients": i + 1, "images_per_s": 10.0 + i, "utilisation": reading} for i, reading in enumerate(readings)]
    assert packed._summary(rows)["busy_from"] == busy_from


def test_packed_needs_a_gpu() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), "packed"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the benchmark packed measures how clients share a GPU, and torch sees none here.\n"


@pytest.mark.parametrize("name", DEVICES)
def test_views_are_measured_on_any_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "PAIRS", 2)
    monkeypatch.setattr(views, "AT_LEAST_S", 0.01)
    figures = views.on_device(torch.device(name), [16])
    assert figures["fused"] == (name == "cuda")
    rates = figures["rates"]["16"]
    ours = {f"{colour}{way}" for colour in ("exact", "linear") for way in ("", "_replayed", "_operations")}
    assert rates.keys() == {"torchvision_one_draw", *ours}
    assert all(median > 0 for median, _ in rates.values())


@pytest.mark.parametrize("name", DEVICES)
def test_training_is_measured_on_any_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "PAIRS", 2)
    monkeypatch.setattr(train, "EPOCHS", {False: (2, 4)})
    monkeypatch.setattr(train, "REPLAYED", {False: (3, 4)})
    figures, bar = train.measure("conv4_16", torch.device(name))
    assert bar.name == "train.conv4_16"
    assert bar.bar == 0.75
    assert figures["images"] == {"cpu": 2 * 4, "cuda": 3 * 4 * train.REPLAYED_EPOCHS}[name]
    assert len(figures["bare_s"]) == len(figures["ours_s"]) == 2
    assert bool(figures["launched_s"]) == (name == "cuda")


def test_an_interrupted_train_returns_what_it_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(family: str, device: torch.device) -> Any:
        if family == "resnet8":
            raise KeyboardInterrupt
        return {"mflop_a_view": 1.0}, judge(f"train.{family}", [1.0, 1.0], 0.75, "higher")

    monkeypatch.setattr(train, "measure", measure)
    monkeypatch.setattr(torch, "set_num_threads", lambda num: None)  # of this process
    figures, bars = train.train(["conv4_32", "resnet8", "resnet18"])
    assert figures["families"].keys() == {"conv4_32"}
    assert figures["not_measured"] == ["resnet8", "resnet18"]
    assert [bar.name for bar in bars] == ["train.conv4_32"]
    with pytest.raises(KeyboardInterrupt):  # nothing to return
        train.train(["resnet8"])
    with pytest.raises(ConfigError, match=r"^there is no family conv5; --of takes conv4_16, "):
        train.train(["conv5"])


ENGINE = """
import sys, time
from pathlib import Path
from bench.turns import Turns

turns = Turns(Path(sys.argv[sys.argv.index("--turns") + 1]))
began = []
for lap in range(3):
    began.append(time.monotonic())
    if lap < 2:
        turns.wait()
if "fails" in sys.argv:
    sys.exit("no memory left")
print("RESULT", f'{{"began": {began}}}')
sys.exit(int("crashes" in sys.argv))
"""


def engine(folder: Path, name: str, *words: str, crashes: bool = False) -> Any:
    """What starts an engine of three rounds."""
    sitting = pytest.importorskip("bench.sitting", exc_type=ImportError)  # no psutil on some GPU machines
    command = [sys.executable, "-c", ENGINE, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    return partial(sitting.Sitting, name, command, folder, environment, crashes_at_its_end=crashes)


def test_rounds_of_engines_are_taken_in_turn(tmp_path: Path) -> None:
    sitting = pytest.importorskip("bench.sitting", exc_type=ImportError)
    starts = [engine(tmp_path, "a"), engine(tmp_path, "b", "crashes", crashes=True)]
    results = sitting.rounds_in_turn(starts, 2)
    a, b = (results[name]["began"] for name in "ab")
    assert sorted([*a, *b]) == [a[0], b[0], a[1], b[1], a[2], b[2]]
    assert (results["a"]["exit"], results["b"]["exit"]) == (0, 1)


def test_two_sittings_of_opposite_order_make_one_figure() -> None:
    """The engine that starts first is slower: by a factor of 2 here, which cancels."""
    sitting = pytest.importorskip("bench.sitting", exc_type=ImportError)
    ours, theirs = [[6.0, 9.0, 9.0], [12.0, 12.0, 12.0]], [[2.0, 3.0, 9.0], [1.0, 1.0, 2.0]]  # by median of pairs 3, 12
    assert sitting.ratios(ours, theirs) == pytest.approx([6.0])
    with pytest.raises(ValueError, match="shorter"):
        sitting.ratios(ours[:1], theirs[:1])


def test_an_engine_is_frozen_while_it_is_not_its_turn(tmp_path: Path) -> None:
    with engine(tmp_path, "a")() as sitting:
        sitting.round()
        for _ in range(100):  # the signal is sent, and comes
            if sitting._process.status() == "stopped":
                break
            time.sleep(0.05)
        assert sitting._process.status() == "stopped"
        sitting.round()
        sitting.round()
        assert sitting.result["exit"] == 0


@pytest.mark.parametrize("words", [("fails",), ("crashes",)])
def test_an_engine_that_fails_ends_the_benchmark_with_what_it_said(tmp_path: Path, words: tuple[str, ...]) -> None:
    sitting = pytest.importorskip("bench.sitting", exc_type=ImportError)
    said = "a ended with 1:.*no memory left" if words == ("fails",) else "a ended with 1:.*RESULT"
    with pytest.raises(RuntimeError, match=f"(?s){said}"):
        sitting.rounds_in_turn([engine(tmp_path, "b"), engine(tmp_path, "a", *words)], 2)


@pytest.fixture
def another_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `fedssl` that is installed and not this one."""
    (tmp_path / "fedssl").mkdir()
    (tmp_path / "fedssl" / "__init__.py").write_text('raise ImportError("another checkout")\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("another_checkout")
@pytest.mark.parametrize(
    "name", ["benchmark.py", "compare_runs", "gpu_acceptance", "reproduce", "study_attacks.py", "study_flesd.py"]
)
def test_scripts_run_their_own_checkout(name: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / name), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.usefixtures("another_checkout")
def test_processes_that_measure_import_this_checkout() -> None:
    assert measure.in_own_process("fedssl.config.conf_dir().as_posix()") == str(ROOT / "conf")


def run_main(name: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """`scripts/benchmark.py NAME` in this process."""
    monkeypatch.setattr(sys, "argv", ["benchmark.py", name])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr("fedssl.environment.keep_memory", lambda: None)
    return benchmark.main()


def test_without_git_the_figures_are_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And the commit is the one that was measured, not one made meanwhile."""
    order: list[str] = []

    def run(command: list[str], **_: Any) -> Any:
        order.append(command[0])
        raise FileNotFoundError(command[0])

    def measured() -> Any:
        order.append("measured")
        return {"unit": "s"}, []

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(train, "train", measured)
    assert run_main("train", monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["commit"] == "unknown"
    assert order[:2] == ["git", "measured"]


def test_a_benchmark_that_fails_is_not_a_false_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing() -> Any:
        raise RuntimeError("an engine ended with 1:\nits last words")

    monkeypatch.setattr(train, "train", failing)
    assert run_main("train", monkeypatch) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("Traceback")
    assert said.err.splitlines()[-1] == "error: train failed: RuntimeError: an engine ended with 1: its last words"
    monkeypatch.setattr(train, "train", lambda: ({}, [judge("train.x", [1.0, 1.0], 2.0, "higher")]))
    assert run_main("train", monkeypatch) == 1


def test_a_compilers_cache_that_is_gone_is_not_where_later_ones_look(monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[str] = []

    @dataclass(frozen=True)
    class Timed:
        compile_mode: str | None = None

        def ours(self) -> float:
            if self.compile_mode:
                folders.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
            return 2.0 if self.compile_mode else 1.0

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/kept")
    plain: Any = Timed()
    assert compiled._compiled(plain, "default")["times_faster"][0] == 0.5
    assert folders[0] == folders[1] != "/kept"
    assert set(folders[2:]) == {"/kept"}
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/kept"


def test_growth_is_from_the_tenth_round_to_the_last_ones() -> None:
    """A server that takes 1 MB more in every round, and 100 MB more while it is warmed up."""
    memory = [100.0] + [200.0 + number for number in range(2, scale.LONG_ROUNDS + 1)]
    assert scale.growth_mb(memory) == [float(number - 10) for number in range(41, 51)]
