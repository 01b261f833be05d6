"""How much of the gap between clients alone and all data in one place a run closes, in numbers and in the report."""

from pathlib import Path
from typing import Any

import pytest

from fedssl.report import compare
from fedssl.report.gap import gap_recovered, gaps_recovered
from fedssl.report.runs import read_run
from tests.test_report import make_run


def test_a_quarter_of_the_way_is_a_quarter() -> None:
    assert gap_recovered(0.65, local=0.6, central=0.8) == pytest.approx(0.25)
    assert gap_recovered(0.6, local=0.6, central=0.8) == 0
    assert gap_recovered(0.5, local=0.6, central=0.8) == pytest.approx(-0.5)  # worse than alone
    assert gap_recovered(0.9, local=0.6, central=0.8) == pytest.approx(1.5)


@pytest.mark.parametrize("central", [0.6, 0.5])
def test_without_a_gap_there_is_nothing_to_recover(central: float) -> None:
    assert gap_recovered(0.65, local=0.6, central=central) is None


def with_partition(alpha: float) -> dict[str, Any]:
    return {"partition": {"alpha": alpha}}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two seeds of FLESD with both controls, one with none, and controls of another partition."""
    for seed, (linear, local, central) in enumerate(((0.65, 0.60, 0.80), (0.75, 0.70, 0.75), (0.7, 0, 0))):
        make_run(tmp_path / f"flesd{seed}", seed=seed, linear=linear, config=with_partition(1))
        if local:
            make_run(tmp_path / f"local{seed}", strategy="local_only", seed=seed, linear=local, spread=0.05,
                     config=with_partition(1))  # fmt: skip
            make_run(tmp_path / f"central{seed}", strategy="centralized", seed=seed, linear=central,
                     config=with_partition(1))  # fmt: skip
    make_run(tmp_path / "other", seed=2, strategy="local_only", linear=0.1, config=with_partition(5))
    make_run(tmp_path / "other2", seed=2, strategy="centralized", linear=0.9, config=with_partition(5))
    return tmp_path


def test_a_run_is_measured_by_the_controls_of_its_seed_and_partition(runs: Path) -> None:
    found = [
        read_run(runs / name) for name in ("central1", "flesd0", "local0", "flesd1", "central0", "local1", "flesd2")
    ]
    others = [read_run(runs / name) for name in ("other", "other2")]
    shares = gaps_recovered([*found, *others], "linear_top1")
    assert shares == {1: pytest.approx(0.25), 3: pytest.approx(1)}
    assert gaps_recovered(found[:2], "linear_top1") == {}


def test_controls_that_did_not_complete_do_not_count(tmp_path: Path) -> None:
    make_run(tmp_path / "0", linear=0.65)
    make_run(tmp_path / "1", strategy="local_only", linear=0.6)
    make_run(tmp_path / "2", strategy="centralized", linear=0.8, status="stopped")
    assert gaps_recovered([read_run(tmp_path / str(i)) for i in range(3)], "linear_top1") == {}


def test_another_codec_is_measured_by_the_same_controls(tmp_path: Path) -> None:
    """What a control does not use does not set it apart."""
    make_run(tmp_path / "0", linear=0.65, config={"codec": {"dtype": "int8"}})
    make_run(tmp_path / "1", strategy="local_only", linear=0.6, config={"codec": {"dtype": "fp16"}})
    make_run(tmp_path / "2", strategy="centralized", linear=0.8)
    shares = gaps_recovered([read_run(tmp_path / str(i)) for i in range(3)], "linear_top1")
    assert shares == {0: pytest.approx(0.25)}


def test_the_comparison_has_a_column_where_both_controls_are(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedssl.report.pages.svg", lambda figure: "<svg></svg>")
    comparison = compare([runs], tmp_path / "out")
    head, *lines = (tmp_path / "out" / "results.md").read_text().split("\n| ")
    column = next(line for line in lines if "gap recovered" in line).split(" | ").index("gap recovered")
    first_tables_last = reversed([line for line in lines if line.count(" | ") > column])
    cells = {line.split(" | ")[0]: line.split(" | ")[column] for line in first_tables_last}
    assert cells["flesd"] == "0.625 ± 0.530"  # 0.25 and 1; the third seed has no controls
    assert cells["random init"] == ""
    assert "(linear − local_only) / (centralized − local_only) of the same seed" in head + "".join(lines)
    table = comparison.frame().set_index("run_dir")["gap_recovered"]
    assert table[str(runs / "flesd0")] == pytest.approx(0.25)
    assert table.notna().sum() == 2
    without = compare([runs / "flesd0", runs / "local0"], tmp_path / "without")
    assert "gap recovered" not in without.markdown()
    assert "gap_recovered" not in without.frame()
