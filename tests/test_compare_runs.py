"""`scripts/compare_runs`: pairs by strategy and seed, and what it calls alike."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "compare_runs"


def write_run(
    folder: Path,
    seed: int,
    linear: float,
    *,
    status: str = "completed",
    weights: bytes = b"w",
    families: Sequence[str] = ("tiny",),
    config: Mapping[str, Any] | None = None,
) -> None:
    path = folder / str(seed)
    (path / "models").mkdir(parents=True)
    (path / "models" / "tiny.safetensors").write_bytes(weights)
    (path / "config.yaml").write_text(yaml.safe_dump({"seed": seed, **(config or {})}))
    (path / "metrics.jsonl").write_text("")
    summary = {"status": status, "strategy": "flesd", "seed": seed, "report_family": families[0]}
    summary |= {"families": {family: {"linear_top1": linear, "num_clients": 2} for family in families}}
    (path / "summary.json").write_text(json.dumps(summary))


def write_runs(folder: Path, figures: Mapping[int, float], **more: Any) -> Path:
    for seed, linear in figures.items():
        write_run(folder, seed, linear, **more)
    return folder


def compared(a: Path, b: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, str(SCRIPT), str(a), str(b)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("shift", "code"), [(0.009, 0), (-0.009, 0), (0.011, 1), (-0.011, 1)])
def test_alike_within_the_spread_of_the_reference(tmp_path: Path, shift: float, code: int) -> None:
    """A's three seeds have the standard deviation 0.01; the differences themselves hardly spread."""
    a = write_runs(tmp_path / "a", {0: 0.50, 1: 0.51, 2: 0.52})
    b = write_runs(tmp_path / "b", {0: 0.50 + shift, 1: 0.51 + shift, 2: 0.52 + shift})
    done = compared(a, b)
    assert done.returncode == code, done.stderr
    assert ("NOT ALIKE" in done.stdout) == bool(code)
    assert "3 pairs, 3 with the same bits" in done.stdout
    assert f"{shift:+.4f}" in done.stdout


@pytest.mark.parametrize(
    ("differences", "code", "said"),
    [
        ((0.03, -0.02, 0.01), 3, "undecided"),
        ((-0.02, -0.1, -0.2), 3, "undecided"),
        ((0.03, 0.028, 0.032), 1, "NOT ALIKE"),
    ],
)
def test_a_large_difference_that_may_be_chance_is_undecided(
    tmp_path: Path, differences: tuple[float, ...], code: int, said: str
) -> None:
    """A's seeds have hardly any spread. Of the first, 4.303 * .0252 / sqrt(3) is .0625, about a mean of .0067."""
    a = write_runs(tmp_path / "a", {0: 0.50, 1: 0.501, 2: 0.502})
    b = write_runs(tmp_path / "b", {i: 0.5 + i / 1000 + difference for i, difference in enumerate(differences)})
    done = compared(a, b)
    assert done.returncode == code, done.stdout
    assert done.stdout.rstrip().endswith(said)
    assert ("+0.0067  -0.0558 to +0.0692" in done.stdout) == (differences[0] == -1.5 * differences[1])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ((0.5, 0.6), (0.2, 0.8)),  # half the interval is 3.2
        ((0.50, 0.52, 0.54), (0.51, 0.50, 0.55)),  # a mean of 0, 4.303 * .0173 / sqrt(3) is .043
    ],
)
def test_an_interval_beyond_the_spread_shows_nothing(
    tmp_path: Path, ours: Sequence[float], theirs: Sequence[float]
) -> None:
    done = compared(*(write_runs(tmp_path / n, dict(enumerate(v))) for n, v in (("a", ours), ("b", theirs))))
    assert done.returncode == 3, done.stdout
    assert done.stdout.rstrip().endswith("undecided")


def test_enough_seeds_show_that_nothing_changes(tmp_path: Path) -> None:
    """Differences as large as the spread, .01, of eight seeds: 2.365 * .0107 / sqrt(8) is .0089."""
    a = write_runs(tmp_path / "a", {seed: 0.5 + 0.01 * (-1) ** seed for seed in range(8)})
    b = write_runs(tmp_path / "b", {i: 0.5 + 0.01 * (-1) ** i + 0.01 * (-1) ** (i // 2) for i in range(8)})
    done = compared(a, b)
    assert done.returncode == 0, done.stdout
    assert done.stdout.rstrip().endswith("alike")


def test_nothing_in_common_is_bad_input(tmp_path: Path) -> None:
    figures = {0: 0.50, 1: 0.52}
    a = write_runs(tmp_path / "a", figures, families=["conv4_16"])
    b = write_runs(tmp_path / "b", figures, families=["resnet8"])
    done = compared(a, b)
    assert done.returncode == 2
    assert "not compared: resnet8 linear_top1, which 0 of 2 runs of A and 2 of 2 runs of B have" in done.stdout
    assert "no family has a figure that all runs of A and B have" in done.stderr


def test_what_one_side_alone_has_is_named(tmp_path: Path) -> None:
    a = write_runs(tmp_path / "a", {0: 0.50, 1: 0.52}, families=["tiny", "large"])
    b = write_runs(tmp_path / "b", {0: 0.50, 1: 0.52})
    done = compared(a, b)
    assert done.returncode == 0
    assert "not compared: large linear_top1, which 2 of 2 runs of A and 0 of 2 runs of B have" in done.stdout


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    """Of those that a strategy repeats the original alone; nothing that says where a run lies."""
    for name, epochs in (("a", 10), ("b", 1)):
        client = {"local_epochs": epochs, "compile": None if name == "a" else "default"}
        config = {"client": client, "strategy": {"client": {"local_epochs": epochs}}, "run_dir": name}
        write_runs(tmp_path / name, {0: 0.50, 1: 0.52}, config=config)
        for seed in (0, 1):
            manifest = {"git": {"commit": f"of {name}"}, "data": {"digits/train": name}}
            (tmp_path / name / str(seed) / "manifest.json").write_text(json.dumps(manifest))
    done = compared(tmp_path / "a", tmp_path / "b")
    assert done.returncode == 0
    assert [line for line in done.stdout.splitlines() if line.startswith("differs: ")] == [
        "differs: client.compile is null in A, default in B",
        "differs: client.local_epochs is 10 in A, 1 in B",
        "differs: sha256 of digits/train is a in A, b in B",
        "differs: git.commit (manifest) is of a in A, of b in B",
    ]


def test_unfinished_and_unpaired_runs_are_left_out(tmp_path: Path) -> None:
    a = write_runs(tmp_path / "a", {0: 0.50, 1: 0.52, 2: 0.9})
    b = write_runs(tmp_path / "b", {0: 0.50, 1: 0.52})
    write_run(b, 2, 0.1, status="failed")
    write_run(b, 3, 0.51, weights=b"other")
    done = compared(a, b)
    assert done.returncode == 0, done.stderr
    assert "2 pairs, 2 with the same bits" in done.stdout
    assert f"left out, failed: {b / '2'}" in done.stdout
    assert "left out, in A only: strategy=flesd seed=2" in done.stdout
    assert "left out, in B only: strategy=flesd seed=3" in done.stdout


def test_other_bits_are_counted(tmp_path: Path) -> None:
    a = write_runs(tmp_path / "a", {0: 0.50, 1: 0.52})
    write_run(tmp_path / "b", 0, 0.50)
    write_run(tmp_path / "b", 1, 0.52, weights=b"other")
    assert "2 pairs, 1 with the same bits" in compared(a, tmp_path / "b").stdout


@pytest.mark.parametrize("figures", [{0: 0.5}, {7: 0.5, 8: 0.5}, {}])
def test_fewer_than_two_pairs_are_bad_input(tmp_path: Path, figures: Mapping[int, float]) -> None:
    a = write_runs(tmp_path / "a", {0: 0.50, 1: 0.52})
    b = write_runs(tmp_path / "b", figures)
    b.mkdir(exist_ok=True)
    done = compared(a, b)
    assert done.returncode == 2
    assert done.stderr.startswith("compare_runs: ")
    assert "Traceback" not in done.stderr


def test_two_runs_of_one_seed_are_told(tmp_path: Path) -> None:
    a = write_runs(tmp_path / "a", {0: 0.50, 1: 0.52})
    write_run(a / "again", 1, 0.52)
    done = compared(a, a)
    assert done.returncode == 2
    assert "seed=1" in done.stderr


def test_whoever_reads_may_stop(tmp_path: Path) -> None:
    """`compare_runs A B | head -1` ends like other commands, without a traceback."""
    a, b = (write_runs(tmp_path / side, {0: 0.50, 1: 0.51}) for side in "ab")
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), str(a), str(b)], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")
