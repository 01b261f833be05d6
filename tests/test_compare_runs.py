"""`scripts/compare_runs`: pairs by strategy and seed, and what it calls alike."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "compare_runs"


def write_run(folder: Path, seed: int, linear: float, *, status: str = "completed", weights: bytes = b"w") -> None:
    path = folder / str(seed)
    (path / "models").mkdir(parents=True)
    (path / "models" / "tiny.safetensors").write_bytes(weights)
    (path / "config.yaml").write_text(yaml.safe_dump({"seed": seed}))
    (path / "metrics.jsonl").write_text("")
    summary = {"status": status, "strategy": "flesd", "seed": seed, "report_family": "tiny"}
    summary |= {"families": {"tiny": {"linear_top1": linear, "num_clients": 2}}}
    (path / "summary.json").write_text(json.dumps(summary))


def write_runs(folder: Path, figures: Mapping[int, float]) -> Path:
    for seed, linear in figures.items():
        write_run(folder, seed, linear)
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


def test_unfinished_and_unpaired_runs_are_left_out(tmp_path: Path) -> None:
    a = write_runs(tmp_path / "a", {0: 0.50, 1: 0.52, 2: 0.9})
    b = write_runs(tmp_path / "b", {0: 0.50, 1: 0.52})
    write_run(b, 2, 0.1, status="failed")
    write_run(b, 3, 0.51, weights=b"other")
    done = compared(a, b)
    assert done.returncode == 0, done.stderr
    assert "2 pairs, 2 with the same bits" in done.stdout
    assert "strategy=flesd seed=2" in done.stdout
    assert "strategy=flesd seed=3" in done.stdout


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
