"""`scripts/study_flesd.py`: its arms, what it keeps between sittings, and its tables."""

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from fedssl.config import check_values, compose, instantiate
from fedssl.federation import client as client_module
from fedssl.federation.records import model_state
from fedssl.federation.setup import Setup
from tests.federation_helpers import SMALL, slow_unless

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))
with mock.patch.dict(os.environ):  # it sets the number of threads, for its own process
    import study_flesd

PAGE = ROOT / "benchmarks" / "flesd_study.md"
MARKER = "<!-- below: scripts/study_flesd.py --table -->"


# --- arms -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arm", study_flesd.ARMS)
@pytest.mark.parametrize("public", slow_unless([next(iter(study_flesd.PUBLIC))], study_flesd.PUBLIC))
def test_an_arm_is_a_configuration_of_600_steps(arm: str, public: str) -> None:
    whose, overrides = study_flesd.ARMS[arm]
    chosen = [override.format(data="there") for override in study_flesd.PUBLIC[public]]
    config = compose([*study_flesd.COMMON, *chosen, *overrides])
    check_values(config)
    assert whose in ("trained", "untrained", "best", "nobody")
    distillation = instantiate(config["distill"])
    size = config["public"]["size"]
    per_epoch = {2000: 15, 500: 3}[size]  # whole batches of 128
    assert (config["distill"]["batch_size"], per_epoch) == (128, size // 128)
    assert distillation.epochs * per_epoch == 600


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arms", "flesd,fedavg"], "--arms has fedavg; there are random, local, flesd, placebo"),
        (["--public", "held_out_1"], "--public has held_out_1; there are held_out_2000, held_out_500"),
        (["--seeds", "0,one"], "--seeds are whole numbers with commas between them, got '0,one'"),
    ],
)
def test_what_there_is_not_is_named_before_any_work(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        study_flesd.main(["--work", str(tmp_path / "work"), *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


# --- cells ------------------------------------------------------------------------------------------------------------
GIVEN = ("grid", "data.", "public", "partition", "distill.epochs")
TINY = [override for override in SMALL if not override.startswith(GIVEN)]
TINY += ["data=parquet", "data.image_size=16", "data.num_images=140", "federation.report_family=conv4_4"]
TINY += ["federation.num_rounds=1", "partition=iid"]
TINY_PUBLIC = {
    "held_out_2000": ("public=held_out", "public.size=24", "distill.epochs=2"),
    "other": (
        "public=dataset",
        "public.data=parquet",
        "public.root={data}/other",
        "public.size=16",
        "distill.epochs=3",
    ),
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Images in three colours, and others."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    for path, count in (("train", 150), ("test", 60), ("other/train", 20)):
        labels = rng.integers(3, size=count)
        pixels = rng.integers(120, size=(count, 16, 16, 3)).astype(np.uint8)
        pixels[np.arange(count), ..., labels] += 120
        file = folder / f"{path}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(
            pyarrow.table({"img": [{"bytes": png(image)} for image in pixels], "label": labels.tolist()}), file
        )
    return folder


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The study made tiny; what it trains that it does not remember."""
    found: list[int] = []
    train = study_flesd.train

    def counted(*args: Any, **settings: Any) -> dict[str, float]:
        found.append(settings["seed"])
        return dict(train(*args, **settings))

    monkeypatch.setattr(study_flesd, "COMMON", tuple(TINY))
    monkeypatch.setattr(study_flesd, "PUBLIC", TINY_PUBLIC)
    monkeypatch.setattr(study_flesd, "train", counted)
    return found


def lines(work: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """The rows by what they are of, without what a clock measured."""
    rows = study_flesd.read(work / "flesd_study.csv")
    key = ("public", "arm", "seed", "partition", "family")
    found = {tuple(row[name] for name in key): {k: v for k, v in row.items() if k != "seconds"} for row in rows}
    assert len(found) == len(rows)
    return found


def test_a_study_that_was_interrupted_ends_like_one_that_was_not(
    data: Path, tmp_path: Path, trainings: list[int]
) -> None:
    arms, publics = ["random", "local", "flesd", "placebo", "best_client", "public_only"], list(TINY_PUBLIC)
    study_flesd.study(tmp_path / "straight", data, [0], publics, arms)
    straight = lines(tmp_path / "straight")
    families = {0: "conv4_4", 1: "conv4_2", 2: "tiny", 3: "conv4_4"}
    local = {(str(p), family) for p, own in families.items() for family in (own, "conv4_4")}
    assert {key[3:] for key in straight if key[1] == "local"} == local
    cells = [(key[0], key[1]) for key in straight if key[1] != "local"]
    assert sorted(cells) == sorted([("none", "random"), *((p, a) for p in publics for a in arms[2:])])
    assert len(trainings) == len(local) == len(list((tmp_path / "straight" / "trained").glob("*.safetensors")))
    for public in publics:
        mine = {key[1]: row for key, row in straight.items() if key[0] == public}
        assert len({row["steps"] for row in mine.values()}) == 1  # of equal steps
        assert len({row["image_passes"] for arm, row in mine.items() if arm != "public_only"}) == 1
        assert int(mine["public_only"]["image_passes"]) >= int(mine["flesd"]["image_passes"])
        assert all(0 <= float(row[name]) <= 1 for row in mine.values() for name in study_flesd.METRICS)

    trainings.clear()
    work = tmp_path / "interrupted"
    study_flesd.study(work, data, [0], ["other"], ["local", "flesd"])
    once = len(trainings)
    header, *first = (work / "flesd_study.csv").read_text().splitlines()
    study_flesd.study(work, data, [0], publics, arms)
    assert once == len(trainings) == len(local)  # what the first sitting trained is kept
    assert (work / "flesd_study.csv").read_text().splitlines()[: len(first) + 1] == [header, *first]
    assert lines(work) == straight
    before = (work / "flesd_study.csv").read_bytes()
    study_flesd.study(work, data, [0], publics, arms)
    assert (work / "flesd_study.csv").read_bytes() == before


def test_other_images_or_settings_are_trained_anew(
    data: Path, tmp_path: Path, trainings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same is not, to the same weights."""
    setup = Setup(compose([*TINY, f"data.root={data}", *TINY_PUBLIC["held_out_2000"]]))
    monkeypatch.setattr(client_module, "train", study_flesd.remembering(tmp_path / "trained"))

    def trained(partition: int, setup: Setup = setup) -> Any:
        client = setup.client(partition, 1)
        client.family = "conv4_2"
        model = setup.build_model("conv4_2")
        metrics = client.train(model, epochs=1)
        return {name: value.clone() for name, value in model_state(model).items()}, metrics

    once, metrics = trained(0)
    again, same_metrics = trained(0)
    assert len(trainings) == 1
    assert metrics == same_metrics
    assert [name for name in once if not (once[name] == again[name]).all()] == []
    trained(1)
    assert len(trainings) == 2
    trained(0, Setup(compose([*TINY, f"data.root={data}", *TINY_PUBLIC["held_out_2000"], "client.batch_size=4"])))
    assert len(trainings) == 3


# --- five rounds ------------------------------------------------------------------------------------------------------
def test_five_rounds_are_runs_of_which_every_round_is_a_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [o for o in TINY if not o.startswith("federation.num_rounds")]
    tiny = (*few, *TINY_PUBLIC["held_out_2000"], "grid=in_process", "federation.num_rounds=2", "evaluate.every=1")
    monkeypatch.setattr(study_flesd, "ROUNDS", tiny)
    study_flesd.five_rounds(tmp_path, data, [0], ["flesd", "placebo"])
    path = tmp_path / "flesd_five_rounds.csv"
    rows = study_flesd.read(path)
    assert [(row["strategy"], row["round"]) for row in rows if row["family"] == "conv4_4"] == [
        (strategy, str(number)) for strategy in ("flesd", "placebo") for number in (0, 1, 2)
    ]
    assert {row["family"] for row in rows} == {"conv4_4", "conv4_2", "tiny"}
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in study_flesd.METRICS)
    assert [row["seconds"] == "" for row in rows] == [row["round"] == "0" for row in rows]
    flesd, placebo = ([row | {"strategy": ""} for row in rows if row["strategy"] == s] for s in ("flesd", "placebo"))
    assert flesd[:3] == placebo[:3]  # before the first round
    assert flesd[3:] != placebo[3:]

    before = path.read_bytes()
    study_flesd.five_rounds(tmp_path, data, [0], ["placebo"])
    assert path.read_bytes() == before
    path.unlink()
    study_flesd.five_rounds(tmp_path, data, [0], ["flesd", "placebo"])  # the runs are there
    assert path.read_bytes() == before
    assert study_flesd.main(["--table", "--five-rounds", "--work", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-2].startswith("|")


def test_a_table_of_rounds_by_hand() -> None:
    def line(strategy: str, seed: int, number: int, linear: float, knn: float, family: str = "conv4_32") -> Any:
        seconds = str(10 + 10 * seed) if number else ""
        what = {"strategy": strategy, "seed": str(seed), "round": str(number), "family": family, "seconds": seconds}
        return {**what, "linear_top1": str(linear), "knn_top1": str(knn), "labels1_top1": "0.1"}

    rows = [line("flesd", 0, 0, 0.4, 0.3), line("flesd", 0, 1, 0.5, 0.4), line("flesd", 0, 1, 0.9, 0.9, "resnet8")]
    rows += [line("flesd", 1, 0, 0.5, 0.3), line("flesd", 1, 1, 0.51, 0.41)]
    rows += [line("placebo", 0, 0, 0.4, 0.3), line("placebo", 0, 1, 0.45, 0.35)]
    assert study_flesd.rounds_markdown(rows, "conv4_32") == (
        "| conv4_32, linear / kNN | before | 1 | s a round |\n"
        "| --- | --- | --- | ---: |\n"
        "| `flesd` | 45.0 / 30.0 | 50.5 / 40.5 | 15 |\n"
        "| `placebo` | 40.0 / 30.0 | 45.0 / 35.0 | 10 |\n"
    )


# --- tables -----------------------------------------------------------------------------------------------------------
def row(arm: str, seed: int, linear: float, *, public: str = "held_out_2000", family: str = "conv4_16") -> Any:
    figures = {"linear_top1": f"{linear:.4f}", "knn_top1": "0.4000", "labels1_top1": "0.2000"}
    timed = {"steps": "600", "image_passes": "76800", "seconds": str(60 + 10 * seed)} if arm in study_flesd.ARMS else {}
    return dict.fromkeys(study_flesd.FIELDS, "") | {
        "public": public, "arm": arm, "seed": str(seed), "family": family, **figures, **timed,
    }  # fmt: skip


def test_a_table_by_hand() -> None:
    rows = [row("flesd", 0, 0.56), row("flesd", 1, 0.58), row("flesd", 2, 0.57)]
    rows += [row("placebo", 0, 0.54), row("placebo", 1, 0.57), row("placebo", 2, 0.555)]  # leads of 2, 1 and 1.5
    rows += [row("best_client", 0, 0.55), row("best_client", 1, 0.594)]  # leads of 1 and -1.4
    rows += [row("random", 0, 0.43, public="none")]
    rows += [row("local", 0, 0.51, public="none"), row("local", 0, 0.53, public="none")]
    rows += [row("local", 0, 0.55, public="none", family="resnet8")]
    assert study_flesd.markdown(rows) == (
        "## held_out_2000\n\n"
        "| arm | seeds | linear | kNN | one label | `flesd` is above it by (linear) | passes | s |\n"
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |\n"
        "| `best_client` | 2 | 57.2 ± 3.1 | 40.0 ± 0.0 | 20.0 ± 0.0 | -0.2 ± 1.2 (-1.4 to +1.0) | 76,800 | 65 |\n"
        "| `flesd` | 3 | 57.0 ± 1.0 | 40.0 ± 0.0 | 20.0 ± 0.0 |  | 76,800 | 70 |\n"
        "| `placebo` | 3 | 55.5 ± 1.5 | 40.0 ± 0.0 | 20.0 ± 0.0 | **+1.5 ± 0.3 (+1.0 to +2.0)** | 76,800 | 70 |\n"
        "| `local, any architecture, best` | 1 | 55.0 | 40.0 | 20.0 | +1.0 |  |  |\n"
        "| `local, best` | 1 | 53.0 | 40.0 | 20.0 | +3.0 |  |  |\n"
        "| `local, mean` | 1 | 52.0 | 40.0 | 20.0 | +4.0 |  |  |\n"
        "| `random` | 1 | 43.0 | 40.0 | 20.0 | +13.0 |  |  |\n"
    )


def test_a_public_set_without_flesd_has_no_table() -> None:
    assert study_flesd.markdown([row("placebo", 0, 0.5)]) == "\n"
    assert study_flesd.markdown([]) == "\n"


def test_the_page_has_the_tables_of_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "flesd_study.csv").write_bytes((ROOT / "benchmarks" / "results" / "flesd_study.csv").read_bytes())
    assert study_flesd.main(["--table", "--work", str(tmp_path)]) == 0
    assert PAGE.read_text().partition(MARKER)[2].strip() == capsys.readouterr().out.strip()
    for more in ([], ["--five-rounds"]):
        with pytest.raises(SystemExit) as ended:
            study_flesd.main(["--table", *more, "--work", str(tmp_path / "nothing")])
        assert ended.value.code == 2
        assert "run the study first" in capsys.readouterr().err


def test_images_that_are_not_there_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = client_module.train
    for more in ([], ["--five-rounds"]):
        arguments = ["--data", str(tmp_path / "nowhere"), "--work", str(tmp_path / "work"), "--seeds", "0", *more]
        assert study_flesd.main(arguments) == 2
        assert client_module.train is train  # what the study puts in its place is gone with it
        assert "nowhere" in (err := capsys.readouterr().err)
        assert err.startswith("error: ")


def test_the_page_has_the_table_of_the_arms_that_were_run_later() -> None:
    rows = study_flesd.read(ROOT / "benchmarks" / "results" / "flesd_study_more.csv")
    before_the_tables = PAGE.read_text().partition(MARKER)[0]
    assert {(row["arm"], row["seed"]) for row in rows} == {
        (arm, str(seed))
        for arm in ("random", "flesd", "placebo", "paper", "row", "full_views", "full_views_placebo", "public_only_128")
        for seed in range(5)
    }
    assert study_flesd.markdown(rows).partition("\n\n")[2].strip() in before_the_tables


def test_the_page_has_the_table_of_five_rounds() -> None:
    rows = study_flesd.read(ROOT / "benchmarks" / "results" / "flesd_five_rounds.csv")
    assert len(rows) == len(study_flesd.STRATEGIES) * 5 * 6 * 3  # seeds, rounds from 0, families
    assert study_flesd.rounds_markdown(rows, "conv4_32") in PAGE.read_text()
