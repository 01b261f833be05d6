"""Reports of made-up run directories: the numbers must come out again, and nothing else may come in."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedssl.errors import ConfigError, DataError
from fedssl.plots import palette
from fedssl.report import compare, main, write_run_report
from fedssl.report.caveats import caveats
from fedssl.report.comparison import Comparison
from fedssl.report.curves import over_cost, over_rounds
from fedssl.report.facts import facts
from fedssl.report.found import find_runs
from fedssl.report.pages import Cell
from fedssl.report.runs import Run, read_run, tell_apart
from fedssl.report.sections import Section, sort_runs
from fedssl.report.spread import clients_pictures, spread_table

FAMILIES = ("conv4_16", "resnet8", "conv4_32")
INITIAL = {"linear_top1": 0.51, "knn_top1": 0.41, "labels1_top1": 0.31, "labels1_top1_std": 0.05}
RAW = {"linear_top1": 0.901, "knn_top1": 0.902, "labels1_top1": 0.403}


def make_run(
    path: Path,
    *,
    strategy: str = "flesd",
    seed: int = 0,
    linear: float = 0.987,  # of the report family, at the end
    status: str | None = "completed",  # None: no summary.json
    num_rounds: int = 3,
    families: Sequence[str] = FAMILIES,
    failures: Mapping[int, Sequence[Mapping[str, Any]]] | None = None,  # round -> failures
    config: Mapping[str, Any] | None = None,
    spread: float | None = None,  # of the clients' own models, where there is no global one
    seconds: float = 20.0,  # a round, of which 5 are its evaluation
    simulated: float | None = None,  # seconds a round
    data: str = "digits",
    classes: Sequence[str] = ("zero", "one", "two"),
) -> Path:
    """A run directory as INTERFACE.md describes it: 5 clients, 1 kB up and 2 kB down a client and round."""
    path.mkdir(parents=True)
    failures = failures or {}
    final = {"linear_top1": linear, "knn_top1": linear - 0.02, "labels1_top1": linear - 0.2, "labels1_top1_std": 0.06}

    def at(share: float, worse: float) -> dict[str, float]:
        metrics = {name: INITIAL[name] + share * (final[name] - worse - INITIAL[name]) for name in INITIAL}
        metrics["labels1_top1_std"] += share * worse
        if spread is not None:
            for name in INITIAL:
                metrics |= {f"{name}_min": metrics[name] - spread, f"{name}_max": metrics[name] + spread}
        return metrics

    rows: list[dict[str, Any]] = []

    def row(
        round_num: int, scope: str, metrics: Mapping[str, Any], partition: int | None = None, family: str | None = None
    ) -> None:
        rows.append(
            {"round": round_num, "scope": scope, "partition": partition, "family": family, "metrics": dict(metrics)}
        )

    row(0, "eval", RAW, family="raw_pixels")
    for round_num in range(num_rounds + 1):
        for i, family in enumerate(families):
            row(round_num, "eval", at(round_num / num_rounds, 0.01 * i), family=family)
        if round_num == 0:
            continue
        failed = {f["partition"] for f in failures.get(round_num, ()) if f["kind"] != "worker_died"}
        for partition in range(5):
            if partition not in failed:
                family = families[partition % len(families)]
                metrics = {"loss": 4 / round_num + 0.1 * partition, "effective_rank": 3.0 + partition, "seconds": 0.5}
                for own in {family, families[0]} if spread is not None else ():  # half the spread apart
                    worse = 0.01 * families.index(own) - (partition - 2) / 2 * (spread or 0.0)
                    probed = at(round_num / num_rounds, worse)
                    metrics |= {f"{own}/{name}": probed[name] for name in ("linear_top1", "knn_top1", "labels1_top1")}
                row(round_num, "client", metrics, partition, family)
        kinds = [failure["kind"] for failure in failures.get(round_num, ())]
        counts = {"num_ok": 5 - len(failed)} | {
            f"num_{kind}": kinds.count(kind) for kind in ("failed", "late", "refused")
        }
        row(round_num, "round", counts | {"failures": list(failures.get(round_num, ()))})
        traffic = {"uplink_bytes": 5000, "downlink_bytes": 10000}
        learned = {f"{family}/{name}": 3 / round_num for family in families for name in ("loss", "target_entropy")}
        phases = {"seconds": seconds, "seconds_clients": 12.5, "seconds_evaluation": 5.0, "conv4_16/seconds": 3.0}
        modelled = {} if simulated is None else {"simulated_seconds": simulated}
        row(round_num, "server", traffic | learned | phases | modelled)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    full = {
        "seed": seed,
        "strategy": {"_target_": f"strategies.{strategy}.{strategy.upper()}"},
        "data": {"name": data, "root": None},
        "federation": {"num_clients": 5, "families": list(families), "report_family": families[0]},
        "run_dir": str(path),
    } | dict(config or {})
    (path / "config.yaml").write_text(yaml.safe_dump(full))
    manifest = {"seed": seed, "versions": {"torch": "9.8.7"}, "data": {f"{data}/train": "0a1b" * 16}}
    (path / "manifest.json").write_text(json.dumps(manifest))
    counts = np.arange(15).reshape(5, 3) + seed
    indices, offsets = np.arange(counts.sum()), np.concatenate([[0], counts.sum(1).cumsum()])
    np.savez(
        path / "partition.npz",
        indices=indices, offsets=offsets, public=np.arange(4), counts=counts, classes=np.array(classes),
    )  # fmt: skip
    if status is not None:
        summary = {"status": status, "strategy": strategy, "data": data, "seed": seed, "rounds": num_rounds}
        summary |= {"report_family": families[0], **at(1.0, 0.0)}
        summary["families"] = {
            family: at(1.0, 0.01 * i) | {"num_clients": len(range(i, 5, len(families)))}
            for i, family in enumerate(families)
        }
        summary |= {"uplink_bytes": 5000 * num_rounds, "downlink_bytes": 10000 * num_rounds, "wall_seconds": 75.0}
        summary |= {} if simulated is None else {"simulated_seconds": simulated * num_rounds}
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def texts(page: str) -> str:
    """What a reader sees: the page without tags, style and pictures' inner white space."""
    page = re.sub(r"<style>.*?</style>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


def assert_self_contained(page: str) -> None:
    assert not re.search(r"<(script|link|iframe|img|object|embed)\b", page)
    assert not re.search(r"(src|href|url\()\s*=?\s*[\"']?\s*(https?:)?//", page)
    assert "@import" not in page
    references = set(re.findall(r'(?:xlink:href|clip-path)="(?:url\()?#([^")]*)', page))
    assert references <= set(re.findall(r'id="([^"]*)"', page))  # every picture brings what it uses


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that read words: drawing is nine tenths of a page's time."""
    monkeypatch.setattr("fedssl.report.pages.svg", lambda figure: "<svg></svg>")


words = pytest.mark.usefixtures("without_pictures")


# --- the report of one run


def test_the_numbers_of_a_run_are_on_its_page(tmp_path: Path) -> None:
    path = write_run_report(make_run(tmp_path / "run", linear=0.987, num_rounds=3))
    page = path.read_text()
    seen = texts(page)
    assert path == tmp_path / "run" / "report.html"
    assert "flesd on digits completed" in seen
    assert "The global conv4_16 reaches 0.987 top-1 (linear): +0.477 against random init" in seen
    assert "+0.086 against raw pixels" in seen
    assert "kNN, top-1 0.967" in seen
    assert "1 label, top-1 0.787 ± 0.060 over draws of the labels" in seen
    assert "resnet8 2 0.977" in seen  # the families' table: clients, linear one point below
    assert "conv4_32 1 0.967" in seen
    assert "15 kB" in seen  # 3 rounds x 5 clients x 1 kB up
    assert "30 kB" in seen
    assert "10 kB a round" in seen
    assert "None: all 15 client tasks of 3 rounds replied." in seen
    assert "1 min 15 s" in seen
    assert "whole round 1 min 00 s 20.0 s 20.0 s" in seen  # 3 rounds
    assert "clients 37.5 s 12.5 s 12.5 s" in seen
    assert "5 clients of 3 families" in seen
    assert "report_family: conv4_16" in seen  # the configuration
    assert "9.8.7" in seen
    assert "0a1b" * 16 in seen
    assert_self_contained(page)


def test_every_kind_of_picture_is_drawn(tmp_path: Path) -> None:
    page = write_run_report(make_run(tmp_path / "run")).read_text()
    captions = re.findall(r"<figure><figcaption>(.*?)</figcaption>\s*<svg", page.replace("&#39;", "'"))
    assert captions == [
        "Accuracy: linear",
        "Accuracy: kNN",
        "Accuracy: 1 label",
        "Loss on the server",
        "Loss of the clients: mean and range of each family",
        "Labels of the clients' images",
        "Bytes a round, all clients together",
        "clients: effective_rank",
        "server: target_entropy",
    ]


@words
def test_failed_clients_are_named_with_their_reason(tmp_path: Path) -> None:
    failure = {"partition": 3, "kind": "failed", "reason": "CUDA out of memory <2 GiB>"}
    late = {"partition": 1, "kind": "late", "reason": "no reply in 5 s"}
    page = write_run_report(make_run(tmp_path / "run", failures={2: [failure, late]})).read_text()
    seen = texts(page)
    assert "2 3 conv4_16 failed CUDA out of memory &lt;2 GiB&gt;" in seen  # partition 3 runs families[3 % 3]
    assert "2 1 resnet8 late no reply in 5 s" in seen
    assert "Of 15 client tasks: 13 ok, 1 failed, 1 late, 0 refused." in seen


@words
def test_a_task_that_ran_again_is_no_failure(tmp_path: Path) -> None:
    died = {"partition": 4, "kind": "worker_died", "reason": "actor 0x1 died: SIGKILL"}
    seen = texts(write_run_report(make_run(tmp_path / "run", failures={1: [died]})).read_text())
    assert "None: all 15 client tasks of 3 rounds replied. A task whose worker died ran again" in seen
    assert "1 4 resnet8 worker died, ran again actor 0x1 died: SIGKILL" in seen


@words
def test_finished_siblings_are_control_rows_best_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "0", linear=0.980)
    better = make_run(tmp_path / "1", strategy="centralized", linear=0.991)
    local = make_run(tmp_path / "2", strategy="local_only", linear=0.950, spread=0.02)
    level = make_run(tmp_path / "3", strategy="fedavg", linear=0.9801)
    running = make_run(tmp_path / "4", strategy="placebo", status=None)
    foreign = make_run(tmp_path / "5", strategy="public_only", data="cifar10")
    (tmp_path / "6").mkdir()
    siblings = [run, local, better, level, running, foreign, tmp_path / "6"]
    seen = texts(write_run_report(run, siblings).read_text())
    table = seen[seen.index("Against the controls") : seen.index("Families")]
    order = ["flesd (this run) 0.980", "centralized 0.991 +0.011", "fedavg 0.980 +0.000"]
    order += ["local_only 0.950 −0.030 0.930–0.970", "random init 0.510 −0.470", "raw pixels 0.901 −0.079"]
    positions = [table.index(row) for row in order]
    assert positions == sorted(positions)
    assert "placebo" not in table
    assert "public_only" not in table
    assert "1 sibling of the sweep did not complete and is left out." in seen
    assert "1 sibling with other data or probes is left out." in seen
    assert "above local_only; level with fedavg; below centralized" in seen


@words
def test_siblings_of_one_strategy_are_told_apart(tmp_path: Path) -> None:
    run = make_run(tmp_path / "0", seed=0)
    other = make_run(tmp_path / "1", seed=1, linear=0.97)
    seen = texts(write_run_report(run, [other]).read_text())
    assert "flesd (seed=0) (this run) 0.987" in seen
    assert "flesd (seed=1) 0.970 −0.017" in seen


@words
def test_a_strategy_without_a_global_model_shows_mean_and_range(tmp_path: Path) -> None:
    seen = texts(write_run_report(make_run(tmp_path / "run", linear=0.9, spread=0.05)).read_text())
    assert "The clients&#39; own conv4_16 models reach a mean of 0.900 top-1 (linear)" in seen
    assert "clients 0.850 to 0.950" in seen


def test_text_from_the_run_cannot_become_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    run = make_run(
        tmp_path / "run",
        strategy=evil,
        data=evil,
        families=[evil, "$x$", "_hidden"],
        failures={1: [{"partition": 0, "kind": evil, "reason": evil}]},
        config={"note": evil},
        classes=(evil, "$\\broken{", "_c"),
    )
    page = write_run_report(run, [make_run(tmp_path / "other", strategy=evil + "2", data=evil)]).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "$\\broken{" in page  # printed as it is, not as mathematics
    compare([tmp_path], tmp_path / "out")
    assert "<script" not in (tmp_path / "out" / "report.html").read_text()


@words
def test_a_run_that_was_killed_reports_what_it_has(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", status=None, num_rounds=2, linear=0.9)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "scope": "cli')
    for name in ("manifest.json", "partition.npz"):
        (run / name).unlink()
    seen = texts(write_run_report(run).read_text())
    assert "flesd on digits unfinished" in seen
    assert "Not finished, evaluated last after round 2. The global conv4_16 reaches 0.900" in seen
    assert "2 rounds" in seen
    assert "10 kB" in seen  # summed from the rounds' rows


@words
def test_a_run_without_rows_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", status=None)
    (run / "metrics.jsonl").write_text("")
    seen = texts(write_run_report(run).read_text())
    assert "Nothing was evaluated yet." in seen
    assert "No round has ended yet." in seen


def test_null_metrics_are_gaps(tmp_path: Path) -> None:
    """A diverged client's loss is null in metrics.jsonl."""
    run = make_run(tmp_path / "run")
    text = (run / "metrics.jsonl").read_text()
    assert '"loss": 4.0' in text
    (run / "metrics.jsonl").write_text(
        text.replace('"loss": 4.0', '"loss": null').replace('/loss": 3.0', '/loss": null')
    )
    assert "nan" not in texts(write_run_report(run).read_text()).lower()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.yaml", "a: [", "config.yaml cannot be read"),
        ("config.yaml", "- list", "config.yaml is missing or holds no mapping"),
        ("summary.json", "{", "summary.json cannot be read"),
        ("summary.json", "[]", "summary.json holds no mapping"),
        ("metrics.jsonl", "{}\n", "line 1 is no row with round and scope"),
        ("metrics.jsonl", "{\n{}\n", "metrics.jsonl cannot be read"),
        ("partition.npz", "PK", "partition.npz cannot be read"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, file: str, text: str, message: str) -> None:
    run = make_run(tmp_path / "run")
    (run / file).write_text(text)
    with pytest.raises(DataError, match=message):
        write_run_report(run)


# --- the comparison


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two strategies of three and two seeds, one alone, one stopped, one killed, two broken."""
    root = tmp_path_factory.mktemp("sweep")
    for seed, linear in enumerate((0.97, 0.98, 0.99)):
        make_run(root / str(seed), seed=seed, linear=linear)
    for seed, linear in enumerate((0.95, 0.96)):
        make_run(root / str(3 + seed), strategy="fedavg", seed=seed, linear=linear)
    make_run(root / "10", strategy="local_only", linear=0.90, spread=0.05)
    make_run(root / "11", strategy="placebo", linear=0.6, status="stopped")
    make_run(root / "12", strategy="centralized", linear=0.61, status=None)
    (make_run(root / "13") / "summary.json").write_text("{")
    (make_run(root / "14") / "config.yaml").unlink()
    write_run_report(root / "0")
    return root


@words
def test_means_over_seeds(sweep: Path, tmp_path: Path) -> None:
    compare([sweep], tmp_path)
    lines = (tmp_path / "results.md").read_text().partition("\n### ")[0].splitlines()
    means = {line.split(" | ")[0].lstrip("| "): line.split(" | ") for line in lines if line.startswith("| ")}
    assert means["flesd"][1:3] == ["3", "0.980 ± 0.010"]
    assert means["fedavg"][1:3] == ["2", f"0.955 ± {math.sqrt(0.5) * 0.01:.3f}"]  # the sample's deviation
    assert means["local_only"][1:3] == ["1", "0.900 (0.850–0.950)"]
    assert means["placebo"][1:3] == ["0 of 1", "–"]  # a run that was stopped enters no mean
    assert means["random init"][1:3] == ["3", "0.510 ± 0.000"]
    assert means["raw pixels"][1:3] == ["3", "0.901 ± 0.000"]
    seen = texts((tmp_path / "report.html").read_text())
    for cells in (means["flesd"], means["fedavg"]):
        assert " ".join(cells[1:4]) in seen
    assert "local_only 1 0.900 0.850–0.950 0.880 0.830–0.930" in seen
    assert "2 runs did not complete: not in the means." in seen


@words
def test_every_run_is_a_row_of_the_csv(sweep: Path, tmp_path: Path) -> None:
    compare([sweep], tmp_path)
    with (tmp_path / "results.csv").open() as file:
        rows = {row["run_dir"]: row for row in csv.DictReader(file)}
    assert list(rows) == [str(sweep / name) for name in ("0", "1", "2", "3", "4", "10", "11", "12")]
    first = rows[str(sweep / "0")]
    assert first["strategy"] == "flesd"
    assert float(first["linear_top1"]) == 0.97
    assert float(first["families.resnet8.linear_top1"]) == pytest.approx(0.96)
    assert first["uplink_bytes"] == "15000"
    assert float(first["raw_pixels.knn_top1"]) == 0.902
    assert float(first["random_init.labels1_top1"]) == 0.31
    assert [rows[str(sweep / name)]["status"] for name in ("11", "12")] == ["stopped", "unfinished"]
    assert rows[str(sweep / "12")]["strategy"] == "centralized"  # told from the configuration
    assert float(rows[str(sweep / "12")]["linear_top1"]) == 0.61  # its last evaluation
    assert float(rows[str(sweep / "10")]["linear_top1_max"]) == pytest.approx(0.95)


def test_the_page_shows_controls_partitions_and_links(sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    compare([sweep], out)
    page = (out / "report.html").read_text()
    assert_self_contained(page)
    links = re.findall(r'<a href="([^"]*)"', page)
    assert len(links) == 1  # only run 0 has a report
    assert (out / links[0]).resolve() == sweep / "0" / "report.html"
    assert page.count("<table>") == len(re.findall(r'<div class="scroll(?: dense)?"><table>', page))
    assert page.index('<div class="scroll dense">') > page.index("All runs")
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert "linear: at the end" in captions
    assert "linear: over the rounds" in captions
    assert "seed 0, 5 runs" in captions  # one picture a partition, not one a run
    assert "seed 2, 1 run" in captions


@words
def test_broken_runs_are_named_and_skipped(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sweep), "-o", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    for where in (printed.err, (tmp_path / "results.md").read_text(), (tmp_path / "report.html").read_text()):
        assert str(sweep / "13" / "summary.json") in where
        assert str(sweep / "14" / "config.yaml") in where
        assert "(flesd, seed 0)" in where
    assert str(tmp_path / "report.html") in printed.out


@words
@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (("metrics.jsonl", "summary.json"), "1 (fedavg, seed 1) has neither metrics.jsonl nor summary.json"),
        (("metrics.jsonl", "summary.json", "partition.npz"), "1 (fedavg, seed 1) has neither metrics.jsonl nor"),
        (("metrics.jsonl", "config.yaml"), "config.yaml is missing"),
        (("metrics.jsonl", "config.yaml", "summary.json"), "config.yaml is missing"),
    ],
)
def test_what_is_left_of_a_run_is_named(
    lost: Sequence[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "runs" / "good")
    other = make_run(tmp_path / "runs" / "1", strategy="fedavg", seed=1)
    for name in lost:
        (other / name).unlink()
    job = {"job": 1, "overrides": ["strategy=fedavg"], "exit_code": 1, "message": "out of memory"}
    (tmp_path / "runs" / "sweep.json").write_text(json.dumps({"jobs": [job]}))
    assert main([str(tmp_path / "runs"), "-o", str(tmp_path / "out")]) == 0
    for text in (capsys.readouterr().err, (tmp_path / "out" / "results.md").read_text()):
        assert message in text
        assert str(other) in text
        assert "exit code 1: out of memory" in text
    assert len(find_runs([tmp_path / "runs"])[0]) == 1


def test_one_file_of_such_a_name_is_no_run(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "good")
    for name in ("config.yaml", "manifest.json", "summary.json"):
        (tmp_path / "runs" / name.partition(".")[0]).mkdir()
        (tmp_path / "runs" / name.partition(".")[0] / name).write_text("{")
    runs, broken = find_runs([tmp_path])
    assert (len(runs), broken) == (1, {})


@words
@words
def test_links_are_followed_once(tmp_path: Path) -> None:
    """To runs elsewhere, to one that is there anyway, and upwards."""
    make_run(tmp_path / "elsewhere" / "0", seed=0)
    make_run(tmp_path / "runs" / "deep" / "1", seed=1)
    (tmp_path / "runs" / "0").symlink_to(tmp_path / "elsewhere" / "0")
    (tmp_path / "runs" / "a").symlink_to(tmp_path / "runs" / "deep" / "1")
    (tmp_path / "runs" / "deep" / "up").symlink_to(tmp_path / "runs")
    (tmp_path / "runs" / "nowhere").symlink_to(tmp_path / "gone")
    runs, broken = find_runs([tmp_path / "runs"])
    assert [run.path for run in runs] == [tmp_path / "runs" / "deep" / "1", tmp_path / "runs" / "0"]
    assert not broken
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    assert len(find_runs([tmp_path / "link"])[0]) == 2


@words
def test_an_argument_without_runs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not one below another, and not the sweep of refused jobs, which are named."""
    run = make_run(tmp_path / "runs" / "0")
    for name in ("empty", "sweep"):
        (tmp_path / name).mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"jobs": [REFUSED]}))
    names = ["runs", "runs/0", "empty", "runs/0/metrics.jsonl", "sweep"]
    assert main([*(str(tmp_path / name) for name in names), "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err.splitlines()
    page = texts((tmp_path / "out" / "report.html").read_text())
    assert said[:2] == [
        f"skipped: no run in {tmp_path / 'empty'}: a run directory holds config.yaml and metrics.jsonl.",
        f"skipped: no run in {run / 'metrics.jsonl'}: it is a file, and runs are directories.",
    ]
    assert len(said) == 3
    assert f"no run in {tmp_path / 'empty'}" in page


def test_a_completed_run_without_its_rows_is_a_warning(tmp_path: Path) -> None:
    for seed in range(3):
        make_run(tmp_path / "runs" / str(seed), seed=seed)
    (tmp_path / "runs" / "0" / "metrics.jsonl").unlink()
    cut = tmp_path / "runs" / "1" / "metrics.jsonl"
    cut.write_text("".join(line for line in cut.read_text().splitlines(keepends=True) if '"round": 3' not in line))
    text = compare([tmp_path / "runs"], tmp_path / "out").summary()
    assert (
        f"flesd, seed 0: none of 3 rounds ({tmp_path / 'runs' / '0'}); "
        f"flesd, seed 1: to round 2 of 3 rounds ({tmp_path / 'runs' / '1'})." in text
    )
    assert "seed 2: " not in text


@words
def test_out_may_lie_inside_and_a_second_call_finds_the_same(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "a")
    out = tmp_path / "runs" / "report"
    assert main([str(tmp_path / "runs"), "-o", str(out)]) == 0
    first = (out / "results.csv").read_text()
    assert main([str(tmp_path / "runs"), str(tmp_path / "runs" / "a"), "-o", str(out)]) == 0  # a run counts once
    assert (out / "results.csv").read_text() == first


@pytest.mark.parametrize(
    ("argument", "message"), [("nowhere", "No such directory: .*nowhere"), ("empty", "No run in ")]
)
def test_nothing_to_compare_is_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argument: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / argument), "-o", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert re.search(message, printed.err)
    assert "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [("summary.json", "families", [1]), ("summary.json", "seed", [1]), ("metrics.jsonl", "metrics", [1])],
)
def test_files_that_hold_something_else_are_a_broken_run(file: str, key: str, value: Any, tmp_path: Path) -> None:
    make_run(tmp_path / "good", seed=0)
    make_run(tmp_path / "other", seed=1)
    path = tmp_path / "other" / file
    if file == "metrics.jsonl":
        lines = [{**json.loads(line), key: value} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        held = yaml.safe_load(path.read_text())
        path.write_text(json.dumps({**held, key: value}))
    runs, broken = find_runs([tmp_path])
    assert [run.path.name for run in runs] == ["good"]
    assert "other holds something else than a run" in broken[tmp_path / "other"]


ODD = [None, True, -1, 1.5, math.inf, 10**400, "x", [1], {}, {"a": 1}]


def replace(path: Path, keys: Sequence[str], value: Any) -> None:
    """Set the entry `keys` of a JSON or YAML file; of metrics.jsonl, of the rows of the scope `keys[0]`."""
    read = json.loads if path.suffix == ".json" else yaml.safe_load
    rows = path.suffix == ".jsonl"
    held = [json.loads(line) for line in path.read_text().splitlines()] if rows else [read(path.read_text())]
    for node in held:
        if rows and node["scope"] != keys[0]:
            continue
        *parents, last = keys[1:] if rows else keys
        for key in parents:
            node = node[key]
        node[last] = value
    path.write_text("".join(json.dumps(entry) + "\n" for entry in held))


@words
@pytest.mark.parametrize("file", ["summary.json", "manifest.json", "config.yaml", "metrics.jsonl"])
def test_no_odd_entry_takes_the_others_down(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run for each entry and odd value, all in one report: each is a row of the table or is named as skipped."""
    whole = make_run(tmp_path / "runs" / "whole", num_rounds=1, families=["a"])
    held = json.loads((whole / "summary.json").read_text())
    entries = {
        "summary.json": [[key] for key in (*held, "simulated_seconds", "notes")]
        + [["families", "a"], ["families", "a", "num_clients"], ["families", "a", "linear_top1"]],
        "manifest.json": [
            ["seed"],
            ["versions"],
            ["data"],
            ["data", "digits/train"],
            ["git"],
            ["hardware"],
            ["resumed"],
        ],
        "config.yaml": [["seed"], ["strategy"], ["data"], ["data", "name"], ["federation"], ["partition"], ["client"]]
        + [
            ["federation", key]
            for key in ("families", "report_family", "num_clients", "devices", "num_rounds", "cohort_size")
        ],
        "metrics.jsonl": [
            [scope, key] for scope in ("eval", "client", "round") for key in ("round", "partition", "family")
        ]
        + [[scope, "metrics"] for scope in ("eval", "client", "round", "server")]
        + [["eval", "metrics", "linear_top1"], ["client", "metrics", "loss"], ["server", "metrics", "uplink_bytes"]]
        + [["round", "metrics", "num_ok"], ["round", "metrics", "failures"]],
    }[file]
    for i, keys in enumerate(entries):
        for j, value in enumerate(ODD):
            run = tmp_path / "runs" / f"{i}-{j}"
            shutil.copytree(whole, run)
            replace(run / file, keys, value)
            if keys[0] == "server":  # what a summary would answer instead
                (run / "summary.json").unlink()
    monkeypatch.setattr("fedssl.report.comparison.Comparison.page", lambda self, out: "")
    assert main([str(tmp_path / "runs"), "-o", str(tmp_path / "out")]) == 0
    skipped = capsys.readouterr().err
    with (tmp_path / "out" / "results.csv").open() as table:
        rows = {Path(row["run_dir"]).name for row in csv.DictReader(table)}
    for run in (tmp_path / "runs").iterdir():
        assert (run.name in rows) != (f"{run} " in skipped or f"{run}/" in skipped), run.name
    assert "whole" in rows


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rounds", "x"),
        ("rounds", [1]),
        ("rounds", {"a": 1}),
        ("rounds", math.inf),
        ("seed", "x"),
        ("notes", "x"),
        ("families", {"a": 1}),
        ("uplink_bytes", 1.5),
        ("wall_seconds", math.inf),
        ("linear_top1", "x"),
    ],
)
def test_an_odd_summary_is_named_and_skipped(key: str, value: Any, tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "good", seed=0)
    replace(make_run(tmp_path / "runs" / "other", seed=1) / "summary.json", [key], value)
    runs, broken = find_runs([tmp_path])
    assert [run.path.name for run in runs] == ["good"]
    (reason,) = broken.values()
    assert reason.startswith(f"{tmp_path / 'runs' / 'other'} holds something else than a run (ValueError: ")
    assert key.split("_")[0] in reason


@words
@pytest.mark.parametrize(("key", "value"), [("num_clients", "x"), ("families", [["conv4_16"]]), ("num_clients", None)])
def test_an_odd_configuration_has_no_page_or_a_whole_one(key: str, value: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    replace(run / "config.yaml", ["federation", key], value)
    if value is None:
        assert "0.987 top-1" in write_run_report(run).read_text()
        return
    with pytest.raises(DataError, match=f"federation.{key} is"):
        write_run_report(run)


def test_what_simulated_seconds_are_of_is_said(tmp_path: Path) -> None:
    devices = {"_target_": "fedssl.federation.devices.Devices", "uplink_mbps": 10, "deadline_s": None}
    for seed in (0, 1, 2):
        own = devices | ({"images_per_second": 500 if seed == 1 else None} if seed else {})
        make_run(tmp_path / str(seed), seed=seed, config={"federation": {"devices": own}})
        summary = json.loads((tmp_path / str(seed) / "summary.json").read_text())
        (tmp_path / str(seed) / "summary.json").write_text(json.dumps({**summary, "simulated_seconds": 12.0}))
    text = compare([tmp_path], tmp_path / "out").markdown()
    said = (
        "Simulated: bytes over each client's link and its training, as federation.devices says, and the server's work "
    )
    assert text.count(f"{said}as measured: deadline_s=none, uplink_mbps=10.") == 1
    assert text.count(f"{said}as measured: deadline_s=none, images_per_second=500, uplink_mbps=10.") == 1
    assert text.count(f"{said}as measured: deadline_s=none, images_per_second=measured, uplink_mbps=10.") == 1


def test_only_broken_runs_is_an_error_that_names_them(tmp_path: Path) -> None:
    (make_run(tmp_path / "a") / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match=r"No run in .*\nskipped: .*summary\.json cannot be read"):
        compare([tmp_path], tmp_path / "out")


@pytest.mark.parametrize("out", ["runs/0", "runs/0/models", "runs/broken", "other"])
def test_a_run_directory_is_no_output(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("runs/0", "runs/broken", "other"):
        make_run(tmp_path / name)
    (tmp_path / "runs" / "broken" / "summary.json").write_text("{")
    write_run_report(tmp_path / "runs" / "0")
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    assert main([str(tmp_path / "runs"), "-o", str(tmp_path / out)]) == 2
    run = tmp_path / out.removesuffix("/models")
    assert f"-o {tmp_path / out} lies in the run directory {run}, whose files stay" in capsys.readouterr().err
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("long", ["runs", "-o"])
def test_a_path_that_cannot_be_is_exit_code_2(long: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, out = make_run(tmp_path / "0"), tmp_path / "out"
    if long == "runs":
        runs = tmp_path / ("x" * 300)
    else:
        out = tmp_path / ("x" * 300)
    assert main([str(runs), "-o", str(out)]) == 2
    assert "x" * 300 in capsys.readouterr().err


@pytest.mark.parametrize("depth", [100, 300, 900, 5000])
@pytest.mark.parametrize("file", ["config.yaml", "summary.json", "manifest.json", "metrics.jsonl"])
@words
def test_absurd_nesting_has_no_page_or_a_whole_one(file: str, depth: int, tmp_path: Path) -> None:
    make_run(tmp_path / "0")
    path = make_run(tmp_path / "1", seed=1) / file
    nested = '{"a": ' * depth + "1" + "}" * depth
    if file == "metrics.jsonl":
        rows = path.read_text().splitlines()
        path.write_text(
            "\n".join([*rows, json.dumps({"round": 3, "scope": "round"})[:-1] + f', "metrics": {nested}}}'])
        )
    else:
        whole = yaml.safe_load(path.read_text())
        path.write_text(json.dumps(whole)[:-1] + f', "odd": {nested}}}')
    comparison = compare([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    assert len(comparison.runs) + len(comparison.broken) == 2
    assert all(str(tmp_path / "1") in reason for reason in comparison.broken.values())
    if depth == 5000 and file != "metrics.jsonl":  # of which the last line may be half
        assert len(comparison.broken) == 1


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match=r"-o .* cannot be made a folder"):
        compare([tmp_path], tmp_path / "out")


def test_settings_tell_groups_of_one_strategy_apart(tmp_path: Path) -> None:
    for i, (dim, seed) in enumerate([(64, 0), (64, 1), (128, 0)]):
        codec = {"codec": {"_target_": "fedssl.codecs.Factor", "dim": dim}}
        make_run(tmp_path / str(i), seed=seed, linear=0.9 + dim / 10_000, config=codec)
    runs, broken = find_runs([tmp_path])
    text = Comparison(runs=runs, broken=broken, sections=sort_runs(runs)).summary()
    assert "| flesd (dim=128) | 1 | 0.913 |" in text
    assert "| flesd (dim=64) | 2 | 0.906 ± 0.000 |" in text


def test_other_data_or_another_family_is_another_section(tmp_path: Path) -> None:
    make_run(tmp_path / "0")
    make_run(tmp_path / "1", data="cifar10")
    make_run(tmp_path / "2", families=["resnet8"])
    make_run(tmp_path / "3", config={"data": {"name": "digits", "root": None, "num_images": 100}})
    titles = [section.title for section in sort_runs(find_runs([tmp_path])[0])]
    assert titles == [
        "digits, conv4_16 (num_images=unset)",
        "cifar10, conv4_16",
        "digits, resnet8 (num_images=unset)",
        "digits, conv4_16 (num_images=100)",
    ]


def test_where_and_when_a_run_ran_does_not_split_groups(tmp_path: Path) -> None:
    make_run(tmp_path / "0", seed=0, config={"device": "cpu", "grid": {"_target_": "a.Ray", "x": 1}})
    make_run(tmp_path / "1", seed=1, config={"device": "cuda", "grid": {"_target_": "a.InProcess"}, "max_seconds": 9})
    (section,) = sort_runs(find_runs([tmp_path])[0])
    assert [(group.label, len(group.runs)) for group in section.groups] == [("flesd", 2)]


def test_the_images_decide_not_where_they_lie(tmp_path: Path) -> None:
    for i in range(3):
        make_run(tmp_path / str(i), seed=i, config={"data": {"name": "digits", "root": f"/disk{i}"}})
    manifest = json.loads((tmp_path / "2" / "manifest.json").read_text())
    manifest["data"] = {"digits/train": "ffff" * 16, "public set": "abcd"}
    (tmp_path / "2" / "manifest.json").write_text(json.dumps(manifest))
    sections = sort_runs(find_runs([tmp_path])[0])
    assert [section.title for section in sections] == [
        "digits, conv4_16 (sha256 of digits/train=0a1b0a1b)",
        "digits, conv4_16 (sha256 of digits/train=ffffffff)",
    ]


def test_a_killed_run_stands_beside_its_peers(tmp_path: Path) -> None:
    """Without a summary it may not say which family it reports."""
    federation = {"federation": {"num_clients": 5, "families": list(FAMILIES), "report_family": None}}
    make_run(tmp_path / "0", status=None, config=federation)
    done = make_run(tmp_path / "1", config=federation)
    summary = json.loads((done / "summary.json").read_text())
    (done / "summary.json").write_text(json.dumps(summary | {"report_family": "resnet8"}))
    (section,) = sort_runs(find_runs([tmp_path])[0])
    assert section.title == "digits, resnet8"
    assert [len(group.runs) for group in section.groups] == [2]


def test_unlabelled_partitions_show_sizes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    np.savez(
        run / "partition.npz",
        indices=np.arange(9), offsets=np.array([0, 2, 9]), public=np.arange(1),
        counts=np.zeros((0, 0), dtype=np.int64), classes=np.array([], dtype=str),
    )  # fmt: skip
    assert "Images of the clients" in write_run_report(run).read_text()


@pytest.mark.parametrize(
    ("settings", "notes"),
    [
        ([{"a": "1"}, {"a": "1"}], ["", ""]),
        ([{"c.dim": "64"}, {"c.dim": "128"}], ["dim=64", "dim=128"]),
        ([{"c.dim": "1", "d.dim": "1"}, {"c.dim": "2", "d.dim": "3"}], ["c.dim=1, d.dim=1", "c.dim=2, d.dim=3"]),
        ([{"codec._target_": "f.Dense"}, {"codec._target_": "f.Factor"}], ["codec=Dense", "codec=Factor"]),
        ([{"a": "1"}, {}], ["a=1", "a=unset"]),
    ],
)
def test_tell_apart(settings: list[dict[str, str]], notes: list[str]) -> None:
    assert tell_apart(settings) == notes


def test_the_command_does_not_import_torch() -> None:
    code = "import sys, fedssl.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- what a sceptical reader asks of a comparison


def sections_of(root: Path, *compared: str) -> list[Section]:
    return sort_runs(find_runs([root])[0], compared)


def rows_of(text: str, title: str) -> dict[str, list[str]]:
    """The table under a title of results.md: first cell -> the others."""
    paragraphs = text[text.index(title) :].split("\n\n")
    lines = next(paragraph for paragraph in paragraphs if paragraph.startswith("|")).splitlines()
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}


@words
def test_paired_differences_are_from_the_best_group(sweep: Path, tmp_path: Path) -> None:
    """fedavg is 0.02 below flesd on both seeds that it has; local_only has one seed in common with it."""
    compare([sweep], tmp_path)
    rows = rows_of((tmp_path / "results.md").read_text(), "### Differences from flesd, same seeds")
    assert rows["fedavg"] == ["2", *["−0.020 (−0.020 to −0.020)"] * 3]
    assert rows["local_only"] == rows["placebo"] == ["–"] * 4
    half = 4.30265 * 0.01 / math.sqrt(3)  # random init is the same on all seeds: flesd's own spread remains
    assert rows["random init"][:2] == ["3", f"−0.470 (−{0.47 + half:.3f} to −{0.47 - half:.3f})"]
    seen = texts((tmp_path / "report.html").read_text())
    assert "fedavg 2 −0.020 −0.020 to −0.020" in seen


@words
@pytest.mark.parametrize("against", ["fedavg", "flesd"])
def test_the_reference_may_be_chosen(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], against: str
) -> None:
    assert main([str(sweep), "-o", str(tmp_path), "--against", against]) == 0
    other = {"fedavg": "flesd", "flesd": "fedavg"}[against]
    rows = rows_of(capsys.readouterr().out, f"### Differences from {against}, same seeds")
    sign = {"fedavg": "+", "flesd": "−"}[against]
    assert rows[other][1] == f"{sign}0.020 ({sign}0.020 to {sign}0.020)"
    assert against not in rows


@words
def test_a_section_without_the_reference_says_so(tmp_path: Path) -> None:
    for seed in range(2):
        make_run(tmp_path / "runs" / str(seed), seed=seed)
        make_run(tmp_path / "runs" / f"1{seed}", seed=seed, strategy="fedavg", data="cifar10")
    comparison = compare([tmp_path / "runs"], tmp_path / "out", against="fedavg")
    digits, cifar10 = comparison.summary().split("## cifar10")
    assert "No run of fedavg is here to take differences from." in digits
    assert "No run of fedavg" not in cifar10
    assert "### Differences from fedavg, same seeds" in cifar10


def test_colour_says_whether_the_interval_leaves_out_zero() -> None:
    intervals = ((-0.1, 0.3), (0.05, 0.15), (-0.3, -0.1), (0.1, 0.1))
    trends = [Cell(text="", delta=0.1, interval=ends).trend for ends in intervals]
    assert trends == ["", "up", "down", ""]  # without a width it knows of no spread


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--against", "fedprox"], "--against fedprox: no run is of it. Choose one of: flesd; fedavg"),
        (["--compare", "strategy,lokal.epochs"], "--compare lokal.epochs: no run has such a setting"),
    ],
)
def test_a_group_or_key_that_no_run_has_is_refused(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str], message: str
) -> None:
    assert main([str(sweep), "-o", str(tmp_path / "out"), *option]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@words
def test_an_interval_without_width_is_not_coloured_and_says_why(sweep: Path, tmp_path: Path) -> None:
    """fedavg is 0.02 below flesd on both seeds."""
    said = "An interval without width does not count (and is not coloured)"
    compare([sweep], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert '<span class="">−0.020</span>' in page
    assert '<span class="down">−0.470</span>' in page
    assert said in page
    for i, linear in enumerate((0.9, 0.91, 0.92, 0.95)):
        make_run(tmp_path / "runs" / str(i), seed=i % 2, strategy=("flesd", "fedavg")[i // 2], linear=linear)
    assert said not in compare([tmp_path / "runs"], tmp_path / "out").summary()


@words
def test_a_reference_that_was_chosen_among_several_says_so(tmp_path: Path) -> None:
    for i in range(6):
        linear = 0.95 + (i // 2) / 100 + (i % 2) * i / 1000
        config = epochs(1 + i // 2) if i < 4 else {}
        make_run(tmp_path / str(i), seed=i % 2, linear=linear, strategy="flesd" if i < 4 else "fedavg", config=config)
    text = compare([tmp_path], tmp_path / "out", against="flesd").summary()
    assert "### Differences from flesd (local_epochs=2), same seeds" in text
    assert "The reference is the best of the 2 groups of flesd on these very seeds, which flatters it" in text
    assert "--against 'flesd (local_epochs=2)' names one" in text
    for against in ("flesd (local_epochs=2)", "fedavg"):
        assert "flatters" not in compare([tmp_path], tmp_path / "out", against=against).summary()
    assert "The reference is the best on these very seeds" in compare([tmp_path], tmp_path / "out").summary()


@words
@pytest.mark.parametrize("against", [None, "flesd"])
def test_one_seed_gives_no_interval(against: str | None, tmp_path: Path) -> None:
    for i, strategy in enumerate(("flesd", "fedavg")):
        make_run(tmp_path / str(i), strategy=strategy)
    text = compare([tmp_path], tmp_path / "out", against=against).summary()
    assert "No differences with an interval: that takes two seeds that both have, and one seed gives none." in text
    assert "### Differences" not in text


@words
def test_pictures_that_are_left_out_are_counted(tmp_path: Path) -> None:
    for i in range(10):
        run = make_run(tmp_path / "runs" / str(i), strategy=f"s{i}", seed=i)
        write_map(run)
    compare([tmp_path / "runs"], tmp_path / "out")
    seen = texts((tmp_path / "out" / "report.html").read_text())
    assert "4 more partitions not shown here: each run&#39;s own report.html has its." in seen
    assert "2 more maps not shown here" in seen  # eight and the one before training
    captions = re.findall(r"<figcaption>([^<]*, seed \d)</figcaption>", (tmp_path / "out" / "report.html").read_text())
    assert len(captions) == 9
    compare([tmp_path / "runs" / str(i) for i in range(6)], tmp_path / "out")
    assert "not shown here" not in texts((tmp_path / "out" / "report.html").read_text())


def test_missing_controls_are_named(tmp_path: Path) -> None:
    strategies = ("flesd", "public_only", "public_only_total", "placebo", "best_client", "fedavg", "centralized")
    for strategy in strategies:
        make_run(tmp_path / strategy, strategy=strategy, status="stopped" if strategy == "placebo" else "completed")
    without_range = make_run(tmp_path / "local_only", strategy="local_only")
    found = caveats(sections_of(tmp_path)[0])[-1]
    assert found.startswith("Controls that are missing here: placebo, lowest and highest client of local_only. ")
    shutil.rmtree(without_range)
    shutil.rmtree(tmp_path / "placebo")
    make_run(tmp_path / "local_only", strategy="local_only", spread=0.01)
    make_run(tmp_path / "placebo", strategy="placebo")
    assert not any("missing" in warning for warning in caveats(sections_of(tmp_path)[0]))
    for run in tmp_path.iterdir():
        rewrite_rows(
            run,
            lambda row: None if (row["scope"], row["round"]) == ("eval", 0) and row["family"] != "raw_pixels" else row,
        )
    assert caveats(sections_of(tmp_path)[0])[-1].startswith("Controls that are missing here: random init. ")
    for run in tmp_path.iterdir():
        rewrite_rows(run, lambda row: None if row["family"] == "raw_pixels" else row)
    shutil.rmtree(tmp_path / "public_only_total")
    assert caveats(sections_of(tmp_path)[0])[-1] == (
        "Controls that are missing here: random init, raw pixels, public_only_total. Without them nobody knows what "
        "the rest is worth; strategy=<name> runs one; evaluate.raw_pixels=true measures the pixels."
    )


def test_warnings_are_found_once_and_said_in_every_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "runs" / "a", data="digits")
    make_run(tmp_path / "runs" / "b", data="cifar10")
    asked: list[str] = []

    def counted(section: Section) -> list[str]:
        asked.append(section.title)
        return [f"a warning of {section.title}"]

    monkeypatch.setattr("fedssl.report.comparison.caveats", counted)
    assert main([str(tmp_path / "runs"), "-o", str(tmp_path / "out")]) == 0
    assert sorted(asked) == ["cifar10, conv4_16", "digits, conv4_16"]
    pages = [(tmp_path / "out" / name).read_text() for name in ("results.md", "report.html")]
    for text in (*pages, capsys.readouterr().out):
        for title in asked:
            assert text.count(f"a warning of {title}") == 1


def test_controls_that_differ_within_a_seed_are_a_warning(tmp_path: Path) -> None:
    """Of seed 1; a difference that no reader would see is none."""
    for i, (strategy, seed, initial) in enumerate(
        [("flesd", 0, "0.51"), ("fedavg", 0, "0.5101"), ("flesd", 1, "0.51"), ("fedavg", 1, "0.55")]
    ):
        path = make_run(tmp_path / str(i), strategy=strategy, seed=seed) / "metrics.jsonl"
        path.write_text(path.read_text().replace('"linear_top1": 0.51,', f'"linear_top1": {initial},'))
    (section,) = sections_of(tmp_path)
    assert [warning for warning in caveats(section) if "not one control" in warning] == [
        "random init is not one control: of seed 1 its linear is 0.510 in the table and 0.550 in fedavg (seed 1). "
        "These runs' settings or machines differ in what it is made of."
    ]


# --- jobs that left no run
REFUSED = {"job": 1, "overrides": ["seed=0", "strategy=krum"], "exit_code": 2, "message": "krum needs\n3 clients"}


@words
def test_jobs_that_left_no_run_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Job 1 was refused; 2 ended with an error and left a run, which is named as such; 3 is of before messages."""
    make_run(tmp_path / "sweep" / "0")
    make_run(tmp_path / "sweep" / "2", status="failed")
    jobs = [
        {"job": 0, "overrides": ["seed=0", "strategy=flesd"], "exit_code": 0},
        REFUSED,
        {"job": 2, "overrides": ["seed=0", "strategy=fedavg"], "exit_code": 3, "message": "too few"},
        {"job": 3, "overrides": ["seed=0", "strategy=fedprox"], "exit_code": 2},
    ]
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    assert main([str(tmp_path), str(tmp_path / "sweep"), "-o", str(tmp_path / "out")]) == 0
    sweep = tmp_path / "sweep"
    said = f"job 1 of {sweep} (strategy=krum): exit code 2: krum needs 3 clients"
    page = texts((tmp_path / "out" / "report.html").read_text())
    for text in (capsys.readouterr().err, page, (tmp_path / "out" / "results.md").read_text()):
        assert text.count(said) == 1
        assert f"job 3 of {sweep} (strategy=fedprox): exit code 2" in text
        assert "too few" not in text
        assert "job 0" not in text


@words
def test_a_job_whose_run_has_gone_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of three that completed one is whole, and one is broken and named as such; a fourth is broken for a reason."""
    make_run(tmp_path / "0")
    (make_run(tmp_path / "1", seed=1) / "summary.json").write_text("{")
    (make_run(tmp_path / "3", seed=3) / "summary.json").write_text("{")
    jobs: list[dict[str, Any]] = [{"job": i, "overrides": [f"seed={i}"], "exit_code": 0} for i in range(3)]
    jobs.append({"job": 3, "overrides": ["seed=3"], "exit_code": 1, "message": "no memory"})
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    assert main([str(tmp_path), "-o", str(tmp_path / "out")]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("no run: ")]
    assert said == [
        f"no run: job 2 of {tmp_path} (seed=2): completed, and its directory has gone",
        f"no run: job 3 of {tmp_path} (seed=3): exit code 1: no memory",
    ]


@words
def test_planned_jobs_that_never_began_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sweep was killed in job 1, which has a directory; Hydra has made that of job 2 as well."""
    sweep = tmp_path / "sweep"
    make_run(sweep / "0")
    make_run(sweep / "1", strategy="fedavg", status=None)
    (sweep / "2").mkdir()
    jobs = [{"job": 0, "overrides": ["strategy=flesd", "seed=0"], "exit_code": 0}]
    planned = [{"job": i, "overrides": ["strategy=fedavg", f"seed={i}"]} for i in (1, 2, 3)]
    planned += [{"job": 4, "overrides": ["seed=4"]}]
    (sweep / "sweep.json").write_text(json.dumps({"jobs": jobs, "planned": planned}))
    assert main([str(sweep), "-o", str(tmp_path / "out")]) == 0
    page = texts((tmp_path / "out" / "report.html").read_text())
    for text in (capsys.readouterr().err, page, (tmp_path / "out" / "results.md").read_text()):
        assert f"fedavg: 2 planned runs were not started: jobs 2, 3 of {sweep}, which was ended or is still" in text
        assert f" 1 planned run was not started: job 4 of {sweep}" in text
        assert "job 1" not in text
    (sweep / "sweep.json").write_text(json.dumps({"planned": planned[1:]}))
    for name in ("0", "1"):
        shutil.rmtree(sweep / name)
    with pytest.raises(ConfigError, match=r"No run in .*\nfedavg: 2 planned runs were not started: jobs 2, 3 of"):
        compare([sweep], tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"planned": [{"job": "../x", "overrides": []}]}', "sweep.json holds something else than a sweep's jobs"),
        ("{", "sweep.json cannot be read"),
        ("[]", "sweep.json holds no mapping"),
        ('{"jobs": [{"job": 1}]}', "sweep.json holds something else than a sweep's jobs"),
        ('{"jobs": 7}', "sweep.json holds something else than a sweep's jobs"),
    ],
)
@words
def test_a_broken_sweep_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    make_run(tmp_path / "sweep" / "0")
    (tmp_path / "sweep" / "sweep.json").write_text(text)
    assert message in compare([tmp_path], tmp_path / "out").broken[tmp_path / "sweep" / "sweep.json"]


def test_a_sweep_of_refused_jobs_alone_says_why(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": [REFUSED]}))
    with pytest.raises(ConfigError, match=r"No run in .*\njob 1 of .*: exit code 2: krum needs 3 clients"):
        compare([tmp_path], tmp_path / "out")


@words
def test_missing_seeds_and_unfinished_runs_are_named(sweep: Path, tmp_path: Path) -> None:
    compare([sweep], tmp_path)
    for text in ((tmp_path / "results.md").read_text(), texts((tmp_path / "report.html").read_text())):
        assert "fedavg has no run of seed 2." in text
        assert "local_only has no run of seed 1, 2." in text
        assert f"placebo, seed 0: stopped after round 3 ({sweep / '11'})" in text
        assert f"centralized, seed 0: unfinished after round 3 ({sweep / '12'})" in text
        assert "flesd has no run" not in text
        assert "Not only" not in text


@words
def test_clients_whose_uploads_were_not_merged_are_a_warning(tmp_path: Path) -> None:
    late = [{"partition": partition, "kind": "late", "reason": "beyond the deadline"} for partition in range(5)]
    again = {"partition": 0, "kind": "worker_died", "reason": "SIGKILL"}
    refused = {"partition": 3, "kind": "refused", "reason": "not finite"}
    make_run(tmp_path / "0", seed=3, failures=dict.fromkeys((1, 2, 3), late))
    make_run(tmp_path / "1", seed=4, failures={1: [*late[1:3], refused, again]})
    make_run(tmp_path / "2", seed=5, failures={1: [again]})
    make_run(tmp_path / "3", seed=6, failures={num: [refused] for num in (1, 2, 3)})
    (make_run(tmp_path / "4", seed=7, status=None) / "metrics.jsonl").write_text("")
    comparison = compare([tmp_path], tmp_path / "out")
    (warning,) = [warning for warning in beside_missing(comparison.sections[0]) if "merged" in warning]
    assert warning == (
        "Not every client had its part in the result. "
        "flesd, seed 3: 0 of 15 client tasks merged (15 late), 5 partitions were never merged: 0, 1, 2, 3, 1 more; "
        "flesd, seed 4: 12 of 15 client tasks merged (2 late, 1 refused); "
        "flesd, seed 6: 12 of 15 client tasks merged (3 refused), partition 3 was never merged."
    )
    for file in ("results.md", "report.html"):
        assert warning in texts((tmp_path / "out" / file).read_text())
    with (tmp_path / "out" / "results.csv").open() as file:
        counts = [[row[f"num_{kind}"] for kind in ("ok", "failed", "late", "refused")] for row in csv.DictReader(file)]
    expected = [["0", "0", "15", "0"], ["12", "0", "2", "1"], ["15", "0", "0", "0"], ["12", "0", "0", "3"], [""] * 4]
    assert counts == expected
    rows = rows_of((tmp_path / "out" / "results.md").read_text(), "## All runs")
    heads = rows["run"]
    shown = [row[heads.index("ok") : heads.index("refused") + 1] for row in list(rows.values())[2:]]
    assert shown == [*expected[:-1], ["–"] * 4]


def test_two_names_of_one_strategy_are_a_warning(tmp_path: Path) -> None:
    for i, (name, rate) in enumerate([("flesd", 1), ("mine", 1), ("other", 2)]):
        node = {"_target_": "strategies.flesd.FLESD", "name": name, "rate": rate}
        make_run(tmp_path / str(i), strategy=name, config={"strategy": node})
    (section,) = sections_of(tmp_path)
    assert [warning for warning in caveats(section) if "same configuration" in warning] == [
        "flesd, mine have the same configuration: they differ in the strategy's name alone."
    ]


def test_rounds_in_which_nobody_was_there_are_a_warning(tmp_path: Path) -> None:
    """A strategy without clients asks nobody anyway."""
    for seed, client in enumerate(({"_target_": "a.Client"}, None)):
        strategy = {"_target_": "strategies.flesd.FLESD", "client": client}
        config = {"strategy": strategy, "federation": {"devices": {"availability": 0.1}}}
        path = make_run(tmp_path / str(seed), seed=seed, config=config) / "metrics.jsonl"
        path.write_text(path.read_text().replace('"num_ok": 5', '"num_ok": 0'))
    found = [warning for section in sections_of(tmp_path) for warning in caveats(section) if "asked" in warning]
    assert len(found) == 1
    assert found[0].endswith("seed 0: nobody asked in 3 of 3 rounds.")


def beside_missing(section: Section) -> list[str]:
    """The warnings without the one of missing controls, which these runs all have."""
    *warnings, missing = caveats(section)
    assert missing.startswith("Controls that are missing here: ")
    return warnings


def epochs(num: int) -> dict[str, Any]:
    """A configuration as it is saved: the strategy's YAML repeats the client's epochs."""
    strategy = {"_target_": "strategies.flesd.FLESD", "client": {"local_epochs": num}}
    return {"client": {"local_epochs": num}, "strategy": strategy}


def test_the_cost_is_linear_in_the_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not groups x runs: 300 runs did not end in ten minutes."""
    counted, final = [0], Run.final

    def count(run: Run, family: str | None = None) -> dict[str, float]:
        counted[0] += 1
        return final(run, family)

    calls = []
    for num in (4, 8):
        for i in range(len(calls) * 4, num):
            for seed in (0, 1):
                make_run(tmp_path / f"{i}-{seed}", seed=seed, families=["conv4_16"], num_rounds=1, config=epochs(i))
        runs, _ = find_runs([tmp_path])
        comparison = Comparison(runs=runs, broken={}, sections=sort_runs(runs))
        with monkeypatch.context() as patch:
            patch.setattr(Run, "final", count)
            counted[0] = 0
            comparison.markdown()
            calls.append(counted[0])
    assert calls[1] <= 2 * calls[0]


def test_a_setting_that_differs_beside_the_strategy_is_a_warning(tmp_path: Path) -> None:
    make_run(tmp_path / "0", config={"client": {"local_epochs": 1}})
    make_run(tmp_path / "1", seed=1, config={"client": {"local_epochs": 1}})
    make_run(tmp_path / "2", strategy="fedavg", config={"client": {"local_epochs": 5}})
    (section,) = sections_of(tmp_path)
    assert section.compared == ("strategy",)
    assert caveats(section)[0] == "Not only strategy: client.local_epochs is 1 in flesd; 5 in fedavg."
    (section,) = sections_of(tmp_path, "strategy", "client")
    assert not any("Not only" in warning for warning in caveats(section))


def test_a_sweep_over_one_setting_compares_that_setting(tmp_path: Path) -> None:
    for i, num in enumerate((1, 1, 2, 2)):
        make_run(tmp_path / str(i), seed=i % 2, config=epochs(num), linear=0.9 - num / 100)
    (section,) = sections_of(tmp_path)
    assert section.compared == ("client.local_epochs",)
    assert [group.label for group in section.groups] == ["flesd (local_epochs=1)", "flesd (local_epochs=2)"]
    assert beside_missing(section) == []
    assert section.reference("flesd") is section.groups[0]  # the better of its two
    assert section.reference("flesd (local_epochs=2)") is section.groups[1]


def test_another_class_may_bring_other_settings(tmp_path: Path) -> None:
    for i, codec in enumerate(({"_target_": "c.Dense"}, {"_target_": "c.TopK", "k": 3})):
        make_run(tmp_path / str(i), config={"codec": codec})
    (section,) = sections_of(tmp_path)
    assert section.compared == ("codec",)
    assert [warning for warning in caveats(section) if "Not only" in warning] == []


@pytest.mark.parametrize("names", [["rate"], ["rate", "decay"]])
def test_a_strategys_own_setting_is_of_the_strategy(names: Sequence[str], tmp_path: Path) -> None:
    for i in range(2):
        own = dict.fromkeys(names, i)
        make_run(tmp_path / str(i), config={"strategy": {"_target_": "strategies.flesd.FLESD", **own}})
    (section,) = sections_of(tmp_path)
    assert section.compared == (("strategy.rate",) if len(names) == 1 else ("strategy",))
    assert not any("Not only" in warning for warning in caveats(section))


def test_a_copy_in_the_strategy_is_excused_by_its_original_alone(tmp_path: Path) -> None:
    """One strategy alone trains for five epochs, which client.local_epochs does not say."""
    for i, (strategy, own) in enumerate([("flesd", 5), ("fedavg", 1), ("placebo", None)]):
        client = {} if own is None else {"local_epochs": own, "name": strategy}
        node = {"_target_": f"strategies.{strategy}.X", "client": client, "rate": i}
        make_run(tmp_path / str(i), strategy=strategy, config={"client": {"local_epochs": 1}, "strategy": node})
    (section,) = sections_of(tmp_path)
    assert section.compared == ("strategy",)
    named = "Not only strategy: strategy.client.local_epochs is 5 in flesd; 1 in fedavg; unset in placebo."
    assert [warning for warning in caveats(section) if "Not only" in warning] == [named]
    (section,) = sections_of(tmp_path, "strategy", "strategy.client.local_epochs")
    assert not any("Not only" in warning for warning in caveats(section))


def test_a_setting_of_the_same_name_is_no_original(tmp_path: Path) -> None:
    """flesd distils in batches of distill.batch_size=64, and client.batch_size is 64 as well in one of its groups."""
    for i, (strategy, client) in enumerate([("flesd", 32), ("flesd", 64), ("fedavg", 64)]):
        node: dict[str, Any] = {"_target_": f"strategies.{strategy}.X"}
        node |= {"client": {"distillation": {"batch_size": 64}}} if strategy == "flesd" else {}
        config = {"client": {"batch_size": client}, "distill": {"batch_size": 64}, "strategy": node}
        make_run(tmp_path / str(i), strategy=strategy, config=config)
    (section,) = sections_of(tmp_path)
    assert section.compared == ("strategy",)
    (named,) = [warning for warning in caveats(section) if "Not only" in warning]
    assert named.startswith("Not only strategy: client.batch_size is 32 in flesd (")


def test_a_copy_that_one_strategy_does_not_have_is_no_difference(tmp_path: Path) -> None:
    for i, strategy in enumerate(("flesd", "placebo")):
        node = {"_target_": f"strategies.{strategy}.X", **({"local_epochs": 1} if i == 0 else {})}
        make_run(tmp_path / str(i), strategy=strategy, config={"client": {"local_epochs": 1}, "strategy": node})
    assert not any("Not only" in warning for warning in caveats(sections_of(tmp_path)[0]))


def test_two_settings_at_once_are_a_warning(tmp_path: Path) -> None:
    for i in range(2):
        make_run(tmp_path / str(i), config={"client": {"batch_size": 8 + i}, "codec": {"dtype": f"fp{i}"}})
    (section,) = sections_of(tmp_path)
    who = "flesd (batch_size={0}, dtype=fp{1})".format
    assert caveats(section)[:2] == [
        f"Not only the seed: client.batch_size is 8 in {who(8, 0)}; 9 in {who(9, 1)}.",
        f"Not only the seed: codec.dtype is fp0 in {who(8, 0)}; fp1 in {who(9, 1)}.",
    ]
    (section,) = sections_of(tmp_path, "client.batch_size")
    assert [w for w in caveats(section) if "Not only" in w] == [
        f"Not only client.batch_size: codec.dtype is fp0 in {who(8, 0)}; fp1 in {who(9, 1)}."
    ]


def test_another_machine_or_commit_is_a_warning(tmp_path: Path) -> None:
    for i, device in enumerate(("cpu", "cuda")):
        run = make_run(tmp_path / str(i), seed=i, config={"device": device})
        manifest = json.loads((run / "manifest.json").read_text()) | {"git": {"commit": f"abc{i}"}}
        (run / "manifest.json").write_text(json.dumps(manifest))
    silent = make_run(tmp_path / "2", seed=2, config={"device": "cpu"})
    (silent / "manifest.json").write_text(json.dumps({"data": manifest["data"]}))
    (section,) = sections_of(tmp_path)
    assert beside_missing(section) == [
        "Not only the seed: device is cpu in flesd (seed 0, 2); cuda in flesd (seed 1).",
        "Not only the seed: git.commit (manifest) is abc0 in flesd (seed 0); abc1 in flesd (seed 1).",
    ]


SHOWN = {
    "data": {"name": "digits", "num_images": 140},
    "partition": {"_target_": "fedssl.data.partition.Dirichlet", "alpha": 0.3, "min_size": 10},
    "federation": {"num_clients": 5, "cohort_size": None, "num_rounds": 3, "families": ["conv4_16", "resnet8"]},
    "client": {"local_epochs": 1},
}


def write_manifest(run: Path, **entries: Any) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | entries))


@words
def test_setting_and_origin_are_said_though_all_runs_share_them(tmp_path: Path) -> None:
    for seed, epochs in enumerate((1, 5)):
        run = make_run(tmp_path / str(seed), seed=seed, config={**SHOWN, "client": {"local_epochs": epochs}})
        hardware = {"cpu": "EPYC 7", "cores": 2, "gpus": ["H100, 85 GB"]}
        write_manifest(run, git={"commit": "abcdef0123456789", "dirty": False}, hardware=hardware)
    compare([tmp_path], tmp_path / "out")
    for text in ((tmp_path / "out" / "results.md").read_text(), texts((tmp_path / "out" / "report.html").read_text())):
        assert (
            "Setting: digits (data.num_images=140); 5 clients; all in a round; partition dirichlet (alpha=0.3, "
            "min_size=10); conv4_16, resnet8; 3 rounds; 1 local epoch or 5 local epochs; seeds 0, 1."
        ) in text
        assert "Origin: commit abcdef0123; EPYC 7, 2 cores, H100, 85 GB; torch 9.8.7." in text


def test_a_fact_that_no_run_knows_is_left_out(tmp_path: Path) -> None:
    (make_run(tmp_path / "0") / "manifest.json").unlink()
    (section,) = sections_of(tmp_path)
    assert facts(section) == ["Setting: digits; 5 clients; conv4_16, resnet8, conv4_32; seed 0."]


def test_runs_of_uncommitted_code_are_a_warning(tmp_path: Path) -> None:
    """Also where all runs are."""
    for i, strategy in enumerate(("flesd", "fedavg")):
        for seed in range(2):
            dirty = strategy == "flesd" or seed == 1
            run = make_run(tmp_path / f"{i}{seed}", seed=seed, strategy=strategy)
            write_manifest(run, git={"commit": "abc", "dirty": dirty})
    (section,) = sections_of(tmp_path)
    said = [warning for warning in beside_missing(section) if "dirty" in warning]
    assert said == [
        "Code with uncommitted changes (git.dirty in manifest.json), so that no commit gives these runs again: flesd, "
        "fedavg (seed 1)."
    ]
    assert facts(section)[1].startswith("Origin: commit abc with uncommitted changes or commit abc; ")


def test_a_run_that_went_on_elsewhere_is_a_warning(tmp_path: Path) -> None:
    """Seed 1 went on as it began."""
    for seed in range(2):
        first = {"git": {"commit": "abc", "dirty": False}, "hardware": {"cpu": "one"}}
        later = {"started": "then", "versions": {"torch": "9.8.7"}, **first}
        moved = later | ({"git": {"commit": "def", "dirty": True}, "hardware": {"cpu": "two"}} if seed == 0 else {})
        write_manifest(make_run(tmp_path / str(seed), seed=seed), **first, resumed=[later, moved])
    (section,) = sections_of(tmp_path)
    assert beside_missing(section) == [
        "Code with uncommitted changes (git.dirty in manifest.json), so that no commit gives these runs again: flesd "
        "(seed 0).",
        f"Went on with other code or on another machine than before. flesd, seed 0: git.commit abc, then def; "
        f"git.dirty False, then True; hardware.cpu one, then two ({tmp_path / '0'}).",
    ]
    assert facts(section)[1] == (
        "Origin: commit abc or commit def with uncommitted changes; one, no GPU or two, no GPU; torch 9.8.7."
    )
    assert "resumed 2.git.commit" in write_run_report(tmp_path / "0").read_text()


def test_many_differences_are_named_without_their_values(tmp_path: Path) -> None:
    for i in range(2):
        make_run(tmp_path / str(i), seed=i, strategy=f"s{i}", config={"many": {f"k{j:02}": i for j in range(15)}})
    (section,) = sections_of(tmp_path)
    assert caveats(section)[12] == "And 3 more settings: many.k12, many.k13, many.k14."


@words
def test_a_seed_that_ran_twice_counts_once(tmp_path: Path) -> None:
    for i, (seed, linear) in enumerate([(0, 0.90), (0, 0.94), (1, 0.96)]):
        make_run(tmp_path / str(i), seed=seed, linear=linear)
    (section,) = sections_of(tmp_path)
    assert section.groups[0].by_seed("linear_top1") == pytest.approx({0: 0.92, 1: 0.96})
    assert beside_missing(section) == ["flesd has more than one run of seed 0: their mean counts, once."]
    curve = over_rounds(section.groups[0], "linear_top1")
    assert curve is not None
    assert curve.y[-1] == pytest.approx(0.94)
    compare([tmp_path], tmp_path / "out")
    row = rows_of((tmp_path / "out" / "results.md").read_text(), "## digits, conv4_16")["flesd"]
    assert row[:2] == ["2", "0.940 ± 0.028"]


@words
def test_a_copy_of_a_run_is_no_second_seed(tmp_path: Path) -> None:
    for name in ("0", "copy"):
        make_run(tmp_path / "runs" / name, spread=0.02)
    make_run(tmp_path / "runs" / "1", seed=1, status="stopped", spread=0.02)
    compare([tmp_path / "runs"], tmp_path / "out")
    text = (tmp_path / "out" / "results.md").read_text()
    table = rows_of(text, "## digits, conv4_16")
    assert table[""][0] == "seeds"
    assert table["flesd"][:2] == ["1 of 2", "0.987 (0.967–1.007)"]
    assert rows_of(text, "## Families and clients")["flesd"][2] == "0.967 (0.947–0.987)"  # of the last family


def test_accuracy_against_what_was_spent(tmp_path: Path) -> None:
    """5 kB up a round; 15 and 25 seconds of work a round; 60 and 90 simulated ones."""
    for seed, (seconds, simulated) in enumerate([(20.0, 60.0), (30.0, 90.0)]):
        make_run(tmp_path / str(seed), seed=seed, seconds=seconds, simulated=simulated, linear=0.9 + 0.04 * seed)
    (group,) = sections_of(tmp_path)[0].groups
    expected = {
        "uplink_bytes": [0, 5000, 10_000, 15_000],
        "seconds": [0, 20, 40, 60],
        "simulated_seconds": [0, 75, 150, 225],
    }
    for cost, spent in expected.items():
        curve = over_cost(group, "linear_top1", cost)
        assert curve is not None
        assert curve.x == pytest.approx(spent)
        assert (curve.y[-1], curve.low[-1], curve.high[-1]) == pytest.approx((0.92, 0.9, 0.94))  # type: ignore[index]
    make_run(tmp_path / "2", seed=2)  # of before there was a model of time: the mean would be of other runs
    (group,) = sections_of(tmp_path)[0].groups
    assert over_cost(group, "linear_top1", "simulated_seconds") is None


def test_simulated_time_is_shown_where_there_is_one(tmp_path: Path) -> None:
    for seed, simulated in enumerate((60.0, 120.0)):
        make_run(tmp_path / "runs" / str(seed), seed=seed, simulated=simulated)
    rows = make_run(tmp_path / "runs" / "2", strategy="fedavg") / "metrics.jsonl"
    rows.write_text(rows.read_text().replace('"uplink_bytes": 5000', '"uplink_bytes": 5000, "simulated_seconds": null'))
    compare([tmp_path / "runs"], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<figcaption>linear: against simulated time</figcaption>" in page
    rows = rows_of((tmp_path / "out" / "results.md").read_text(), "## digits")
    assert rows[""][-1] == "simulated"
    assert (rows["flesd"][-1], rows["fedavg"][-1], rows["random init"][-1]) == ("4 min 30 s", "–", "")
    alone = texts(write_run_report(tmp_path / "runs" / "0").read_text())
    assert "simulated: 3 min 00 s" in alone
    assert "simulated_" not in alone[alone.index("Where the time went") : alone.index("Configuration")]
    compare([tmp_path / "runs" / "2"], tmp_path / "other")
    assert "against simulated" not in (tmp_path / "other" / "report.html").read_text()


def test_families_and_clients_have_their_spread(tmp_path: Path) -> None:
    """local_only: five clients of the reported family at -2, -1, 0, 1, 2 quarters of 0.1 around the mean client."""
    for seed in range(2):
        make_run(tmp_path / "runs" / str(seed), seed=seed, linear=0.95 + 0.02 * seed)
        make_run(
            tmp_path / "runs" / f"1{seed}", seed=seed, strategy="local_only", linear=0.80 + 0.02 * seed, spread=0.05
        )
    compare([tmp_path / "runs"], tmp_path / "out")
    text = (tmp_path / "out" / "results.md").read_text()
    table = text[text.index("## Families and clients") :].split("\n\n")[1].splitlines()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    std = math.sqrt(2) * 0.01
    assert lines[0] == ["", "family", "clients", "linear", "kNN", "1 label", "linear: std over clients"]
    assert lines[2][:4] == ["flesd", "conv4_16", "2", f"0.960 ± {std:.3f}"]
    assert lines[2][-1] == "–"
    assert lines[3][:4] == ["flesd", "resnet8", "2", f"0.950 ± {std:.3f}"]
    assert lines[5][:4] == ["local_only", "conv4_16", "2", f"0.810 ± {std:.3f} (0.750–0.870)"]
    assert lines[5][-1] == f"{math.sqrt(2 * (0.05**2 + 0.025**2) / 4):.3f}"
    assert lines[7][-1] == "–"  # of one client there is no spread
    (section,) = sections_of(tmp_path / "runs")
    run = next(run for run in section.groups[1].runs if run.seed == 0)
    expected = {0: 0.75, 1: 0.775, 2: 0.80, 3: 0.825, 4: 0.85}
    assert run.client_values("conv4_16", "linear_top1") == pytest.approx(expected)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<figcaption>linear: clients&#39; own models at the end</figcaption>" in page
    assert "flesd, global" in page


def test_clients_are_compared_with_the_best_federated_model(tmp_path: Path) -> None:
    """Not with the bound, nor with the model that is the best by another metric."""
    make_run(tmp_path / "local", strategy="local_only", linear=0.90, spread=0.02)
    for strategy, linear in (("flesd", 0.93), ("fedavg", 0.92), ("centralized", 0.95), ("public_only", 0.94)):
        make_run(tmp_path / strategy, strategy=strategy, linear=linear)
    summary = json.loads((tmp_path / "fedavg" / "summary.json").read_text())
    (tmp_path / "fedavg" / "summary.json").write_text(json.dumps(summary | {"knn_top1": 0.96}))
    (section,) = sections_of(tmp_path)
    pictures = clients_pictures(section, palette([group.label for group in section.groups]))
    legends = [[text.get_text() for text in picture.figure.legends[0].get_texts()] for picture in pictures]
    assert legends == [["flesd, global"], ["fedavg, global"], ["flesd, global"]]


def test_clients_that_sat_out_the_last_round_keep_their_values(tmp_path: Path) -> None:
    """A client trains in the round of its number at the latest, and client 4 never does."""
    path = make_run(tmp_path / "0", strategy="local_only", spread=0.04, linear=0.9)
    full = read_run(path).clients.set_index(["round", "partition"])["conv4_16/linear_top1"]

    def with_a_cohort(row: dict[str, Any]) -> dict[str, Any] | None:
        return None if row["scope"] == "client" and row["round"] > row["partition"] % 4 else row

    rewrite_rows(path, with_a_cohort)
    values = read_run(path).client_values("conv4_16", "linear_top1")
    assert values == {partition: full[partition, partition] for partition in (1, 2, 3)}
    table = spread_table(sections_of(tmp_path)[0])
    assert table is not None
    assert str(table.rows[0].cells[-1]) == f"{np.std(list(values.values()), ddof=1):.3f}"


def rewrite_rows(run: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Replace each row of `metrics.jsonl` by what `change` makes of it; None leaves it out."""
    path = run / "metrics.jsonl"
    rows = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not None))


def test_weights_that_nobody_trained_are_no_result(tmp_path: Path) -> None:
    """centralized trains the reported family alone, without clients: of the other there is round 0."""
    make_run(tmp_path / "0", families=["conv4_16", "resnet8"])
    path = make_run(tmp_path / "1", families=["conv4_16", "resnet8"], strategy="centralized")

    def centralized(row: dict[str, Any]) -> dict[str, Any] | None:
        if row["scope"] == "round":
            row["metrics"]["num_ok"] = 0
        return None if row["scope"] == "client" or (row["family"] == "resnet8" and row["round"]) else row

    rewrite_rows(path, centralized)
    summary = json.loads((path / "summary.json").read_text())
    del summary["families"]["resnet8"]
    (path / "summary.json").write_text(json.dumps(summary))
    (section,) = sections_of(tmp_path)
    table = spread_table(section)
    assert table is not None
    first = [[str(cell) for cell in row.cells[:4]] for row in table.rows]
    assert [row[:2] for row in first] == [["flesd", "conv4_16"], ["flesd", "resnet8"], ["centralized", "conv4_16"]]
    assert first[2][2:] == ["–", "0.987"]  # no client trained it
    assert [row.kind for row in table.rows] == ["self", "", "self"]
    run = next(run for run in section.runs if run.strategy == "centralized")
    assert run.families == ("conv4_16",)
    assert run.final("resnet8") == {}
    assert run.controls("resnet8")["random init"] == INITIAL
    assert run.controls()["raw pixels"] == RAW
    page = texts(write_run_report(path).read_text())
    assert "resnet8" not in page[page.index("Families") : page.index("The federation")]


def test_a_run_that_has_not_gone_on_ends_at_its_initial_weights(tmp_path: Path) -> None:
    for name, status in (("new", None), ("killed", None), ("stopped", "stopped")):
        kept = () if name == "new" else ("client", "round", "server")  # evaluate.every is beyond the last round
        path = make_run(tmp_path / name, status=status)
        rewrite_rows(path, lambda row, kept=kept: row if row["round"] == 0 or row["scope"] in kept else None)  # type: ignore[misc]
    new, killed, stopped = (read_run(tmp_path / name) for name in ("new", "killed", "stopped"))
    assert (new.rounds, new.final()) == (0, INITIAL)
    for run in (killed, stopped):
        assert run.rounds > 0
        assert run.final() == {}
        assert run.controls()["random init"] == INITIAL
        assert "Only the initial weights were evaluated yet." in texts(write_run_report(run.path).read_text())


def test_one_family_with_a_global_model_needs_no_second_table(tmp_path: Path) -> None:
    make_run(tmp_path / "0", families=["conv4_16"])
    assert spread_table(sections_of(tmp_path)[0]) is None


def write_map(run: Path, *, labels: Sequence[int] = (0, 1, 2, 0), **more: Any) -> None:
    """A `public_map.npz` of four images."""
    planes = np.arange(16.0).reshape(2, 4, 2)
    arrays: dict[str, Any] = {
        "family": np.array("conv4_16"), "initial": planes[0], "trained": planes[1], "labels": np.array(labels, int),
        "initial_shares": np.array([0.3, 0.1]), "trained_shares": np.array([0.6, 0.2]),
        "classes": np.array(("zero", "one", "two") if labels else (), dtype=str),
    }  # fmt: skip
    np.savez(run / "public_map.npz", **(arrays | more))


def test_maps_are_drawn_where_there_are_some(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "runs" / str(seed), seed=seed) for seed in (1, 0)]
    make_run(tmp_path / "runs" / "2", strategy="local_only")
    for run in runs:
        write_map(run)
    page = write_run_report(runs[0]).read_text()
    assert re.findall(r"<figcaption>(conv4_16, .*?)</figcaption>", page) == [
        "conv4_16, random init",
        "conv4_16, trained",
    ]
    assert "first component, 60% of the variance" in page
    compare([tmp_path / "runs"], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert re.findall(r"<figcaption>([^<]*, seed \d)</figcaption>", page) == ["random init, seed 0", "flesd, seed 0"]
    assert_self_contained(page)
    assert "Where the network puts" not in write_run_report(tmp_path / "runs" / "2").read_text()


def test_maps_without_labels_are_drawn_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "0")
    write_map(run, labels=())
    assert "conv4_16, trained" in write_run_report(run).read_text()


@pytest.mark.parametrize(
    "more", [{"trained": np.zeros((3, 2))}, {"trained_shares": np.zeros(3)}, {"labels": [0, 1, 2, 3]}]
)
def test_a_map_that_does_not_fit_together_is_named(tmp_path: Path, more: dict[str, Any]) -> None:
    run = make_run(tmp_path / "0")
    write_map(run, **more)
    with pytest.raises(DataError, match=r"public_map\.npz holds no two dimensions of 4 images"):
        write_run_report(run)
