import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedssl.errors import ConfigError
from fedssl.tracking import Progress, Screen, Tracker, duration, manifest, write_json


def rows(run_dir: Path) -> list[dict[str, Any]]:
    def no_constants(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=no_constants) for line in text.splitlines()]


def curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return {tag: [(e.step, round(e.value, 4)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# --- Tracker


def test_a_row_has_exactly_the_documented_keys(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        tracker.row(0, "eval", {"knn_top1": 0.5}, family="conv4_16")
        tracker.row(1, "client", {"loss": 2.0}, partition=3, family="resnet8")
        tracker.row(1, "round", {"num_ok": 1, "failures": [{"partition": 2, "kind": "failed", "reason": "é\nno"}]})
    assert rows(tmp_path) == [
        {"round": 0, "scope": "eval", "partition": None, "family": "conv4_16", "metrics": {"knn_top1": 0.5}},
        {"round": 1, "scope": "client", "partition": 3, "family": "resnet8", "metrics": {"loss": 2.0}},
        {
            "round": 1,
            "scope": "round",
            "partition": None,
            "family": None,
            "metrics": {"num_ok": 1, "failures": [{"partition": 2, "kind": "failed", "reason": "é\nno"}]},
        },
    ]


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (float("nan"), None),
        (np.float32("inf"), None),
        (torch.tensor(float("nan")), None),
        ([1.0, {"deep": -np.inf}], [1.0, {"deep": None}]),
        (np.float64(0.25), 0.25),
        (np.int64(7), 7),
        (np.bool_(True), True),
        (torch.tensor(3), 3),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (np.arange(2), [0, 1]),
        ("text", "text"),
    ],
)
def test_metrics_are_written_as_valid_json(tmp_path: Path, value: object, written: object) -> None:
    with Tracker(tmp_path) as tracker:
        tracker.row(1, "server", {"value": value})
    assert rows(tmp_path)[0]["metrics"] == {"value": written}


def test_a_resumed_file_equals_one_that_was_never_interrupted(tmp_path: Path) -> None:
    """Two rounds and a checkpoint, a third round that is lost, then rounds three and four again."""

    def round_rows(tracker: Tracker, round_num: int, loss: float) -> None:
        tracker.row(round_num, "client", {"loss": loss}, partition=0)
        tracker.row(round_num, "client", {"loss": loss + 1}, partition=1)
        tracker.row(round_num, "server", {"loss": loss})
        tracker.row(round_num, "eval", {"knn_top1": loss / 10}, family="conv4_16")

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    with Tracker(whole) as tracker:
        for i in (1, 2, 3, 4):
            round_rows(tracker, i, loss=float(i))
    with Tracker(killed) as tracker:
        round_rows(tracker, 1, 1.0)
        round_rows(tracker, 2, 2.0)
        offset = tracker.offset
        round_rows(tracker, 3, 99.0)
    with Tracker(killed, offset=offset) as tracker:
        assert tracker.offset == offset
        round_rows(tracker, 3, 3.0)
        round_rows(tracker, 4, 4.0)
    assert rows(killed) == rows(whole)
    assert curves(killed) == curves(whole)
    assert curves(whole)["clients/loss"] == [(1, 1.5), (2, 2.5), (3, 3.5), (4, 4.5)]  # a mean over the clients
    assert curves(whole)["knn_top1/conv4_16"] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]


def test_offset_zero_starts_anew(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        tracker.row(0, "eval", {"knn_top1": 0.1}, family="a")
    with Tracker(tmp_path) as tracker:
        tracker.row(0, "eval", {"knn_top1": 0.2}, family="a")
    assert [row["metrics"]["knn_top1"] for row in rows(tmp_path)] == [0.2]
    assert curves(tmp_path)["knn_top1/a"] == [(0, 0.2)]


def test_offset_counts_bytes_on_the_disk(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        tracker.row(1, "client", {"name": "ü"}, partition=0)  # client rows alone are buffered
        assert tracker.offset == (tmp_path / "metrics.jsonl").stat().st_size > 0


@pytest.mark.parametrize("offset", [5, 10_000])
def test_an_offset_that_does_not_fit_the_file_is_refused(tmp_path: Path, offset: int) -> None:
    with Tracker(tmp_path) as tracker:
        tracker.row(1, "server", {"loss": 1.0})
    with pytest.raises(ConfigError, match=f"no whole line that ends at byte {offset}"):
        Tracker(tmp_path, offset=offset)
    assert len(rows(tmp_path)) == 1  # nothing was cut


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.row(1, "client", {"loss": 1.0}, partition=0)
    tracker.close()
    tracker.close()
    assert curves(tmp_path) == {"clients/loss": [(1, 1.0)]}


# --- write_json


def test_write_json_replaces_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"a": np.float32(1), "b": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1.0, "b": None}
    with pytest.raises(TypeError):
        write_json(path, {"a": {1, 2}})  # a set is not JSON
    assert json.loads(path.read_text()) == {"a": 1.0, "b": None}  # the old file still stands


def test_write_json_leaves_nothing_else_behind(tmp_path: Path) -> None:
    write_json(tmp_path / "summary.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


# --- manifest


def test_manifest_names_code_machine_and_data() -> None:
    found = manifest({"seed": 3, "strategy": {}}, data={"digits/train": "ab" * 32})
    assert found["seed"] == 3
    assert found["data"] == {"digits/train": "ab" * 32}
    assert (
        found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"] == torch.__version__
    )
    assert found["versions"]["python"] == sys.version.split()[0]
    assert found["hardware"]["cores"] >= 1
    assert found["hardware"]["memory_gb"] > 0.1
    assert len(found["hardware"]["gpus"]) == torch.cuda.device_count()
    json.dumps(found, allow_nan=False)


def test_manifest_says_the_commit_of_the_checkout() -> None:
    here = Path(__file__).parent
    inside = subprocess.run(
        ["git", "ls-files", "--error-unmatch", __file__], cwd=here, capture_output=True, check=False
    )
    if inside.returncode:
        pytest.skip("the tests do not run from a checkout")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
    assert manifest({}, data={})["git"]["commit"] == head.stdout.strip()


# --- Progress


def play(console: Screen, *, quiet: bool = False) -> None:
    with Progress(2, title="flesd on digits", quiet=quiet, console=console) as progress:
        progress.phase("evaluating")
        for round_num in (1, 2):
            progress.round_started(round_num, 2)
            progress.client_finished(0, "conv4_16", 2.0)
            progress.client_finished(1, "resnet8", None)
            progress.phase("distilling")
            if round_num == 1:
                progress.note("partition 1 failed: [Errno 5] no such disk")
            progress.round_finished(round_num, {"loss": 1.23456, "ok": "2/2", "knn_top1": 0.9})


def test_off_a_terminal_there_is_one_line_a_round() -> None:
    screen = io.StringIO()
    play(Screen(file=screen, width=40))  # narrow: lines must not wrap
    first, second, third = screen.getvalue().splitlines()
    assert first == "partition 1 failed: [Errno 5] no such disk"  # brackets are not markup
    assert second.startswith("round 1/2  loss 1.235  ok 2/2  knn_top1 0.9  0.0 s  ")
    assert second.endswith("left")
    assert third.startswith("round 2/2  loss 1.235  ok 2/2  knn_top1 0.9")
    assert "left" not in third


def test_quiet_keeps_only_the_notes() -> None:
    screen = io.StringIO()
    play(Screen(file=screen, width=80), quiet=True)
    assert screen.getvalue().splitlines() == ["partition 1 failed: [Errno 5] no such disk"]


def test_a_terminal_shows_bars_and_keeps_lines_and_notes() -> None:
    screen = io.StringIO()
    play(Screen(file=screen, width=120, force_terminal=True, _environ={"TERM": "xterm"}))
    for text in ("flesd on digits", "partition 1 failed: [Errno 5] no such disk", "round 1/2  loss", "round 2/2  loss"):
        assert text in screen.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_screen_that_goes_away_does_not_stop_the_run(terminal: bool) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    play(Screen(file=Gone(), width=80, force_terminal=terminal, _environ={"TERM": "xterm"}))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said
