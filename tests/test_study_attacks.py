"""`scripts/study_attacks.py`: what attackers send, what it keeps between sittings, and its tables."""

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fedssl.config import compose
from fedssl.federation.setup import Setup
from fedssl.similarity import FactorSimilarity, Similarity, cosine_similarity, unit_rows
from tests.federation_helpers import SMALL

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))
with mock.patch.dict(os.environ):  # it sets the number of threads, for its own process
    import study_attacks

TINY = (*SMALL, "ensemble=row")


# --- attacks ----------------------------------------------------------------------------------------------------------
FACTORS = unit_rows(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]]))  # cosines 1, sqrt(1/2), 0


def sent(attack: str, factors: torch.Tensor = FACTORS, *, seed: int = 0, partition_id: int = 0) -> torch.Tensor:
    everything = torch.arange(len(factors))
    return study_attacks.hostile(attack, factors, seed, partition_id).block(everything, everything)


def test_what_an_attacker_sends() -> None:
    half = 0.5**0.5
    torch.testing.assert_close(sent("constant"), torch.ones(3, 3))
    torch.testing.assert_close(sent("sign_flipped"), torch.tensor([[1, -half, 0], [-half, 1, -half], [0, -half, 1]]))
    many = unit_rows(torch.randn(30, 4, generator=torch.Generator().manual_seed(0)))
    honest = cosine_similarity(many)
    permuted = sent("permuted", many)
    assert not torch.allclose(permuted, honest)
    torch.testing.assert_close(permuted.sum(1).sort().values, honest.sum(1).sort().values)  # the same images, elsewhere
    assert not torch.allclose(sent("random", many), honest)


@pytest.mark.parametrize("attack", ["random", "permuted"])
def test_every_attacker_draws_for_itself_and_again_the_same(attack: str) -> None:
    many = unit_rows(torch.randn(30, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(sent(attack, many, seed=1, partition_id=2), sent(attack, many, seed=1, partition_id=2))
    assert not torch.allclose(sent(attack, many, seed=1, partition_id=2), sent(attack, many, seed=1, partition_id=3))
    assert not torch.allclose(sent(attack, many, seed=1, partition_id=2), sent(attack, many, seed=2, partition_id=2))


# --- cells ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The study made tiny; the seeds whose clients it trains."""
    found: list[int] = []
    embeddings = study_attacks.embeddings

    def counted(setup: Setup) -> list[torch.Tensor]:
        found.append(setup.seed)
        return list(embeddings(setup))

    monkeypatch.setattr(study_attacks, "OVERRIDES", TINY)
    monkeypatch.setattr(study_attacks, "FAMILY", "conv4_4")
    monkeypatch.setattr(study_attacks, "CELLS", (("clean", 0), ("constant", 1), ("permuted", 2)))
    monkeypatch.setattr(study_attacks, "embeddings", counted)
    return found


def test_the_server_hears_the_honest_and_the_attackers_and_nobody_who_is_absent(
    tiny: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second attacker joins the first; who is absent is who would have attacked."""
    setup = Setup(compose(TINY))
    honest = [FACTORS[[p % 3, 1, 2]] for p in range(4)]
    heard: list[tuple[list[Similarity], list[float]]] = []

    def make_target(similarities: Any, rule: Any, temperature: float, num_images: Any) -> None:
        heard.append((similarities, num_images))

    monkeypatch.setattr(study_attacks, "make_target", make_target)
    monkeypatch.setattr(study_attacks, "distill", lambda *_, **__: {"loss": 1.0})
    monkeypatch.setattr(Setup, "evaluator", property(lambda _: lambda _: dict.fromkeys(study_attacks.METRICS, 0.5)))

    def liars(attack: str, number: int) -> set[int]:
        line = study_attacks.run_cell(setup, honest, "row", study_attacks.rules()["row"], attack, number)
        assert (line["rule"], line["attack"], line["attackers"], line["linear_top1"]) == (
            "row",
            attack,
            number,
            "0.5000",
        )
        similarities, num_images = heard.pop()
        sizes = [float(len(partition)) for partition in setup.data.partitions]
        truth = [
            any(isinstance(s, FactorSimilarity) and s.factors is factors for s in similarities) for factors in honest
        ]
        absent = attack == "absent"
        assert len(similarities) == 4 - number * absent
        assert num_images == [size for size, honestly in zip(sizes, truth, strict=True) if honestly or not absent]
        return {p for p, honestly in enumerate(truth) if not honestly}

    assert liars("clean", 0) == set()
    one, two = liars("constant", 1), liars("constant", 2)
    assert (len(one), len(two), one < two) == (1, 2, True)
    assert [liars("absent", 1), liars("absent", 2), liars("permuted", 2)] == [one, two, two]


def lines(out: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """The rows by what they are of, without what a clock measured."""
    rows = study_attacks.read(out / "attacks.csv")
    found = {
        tuple(row[k] for k in study_attacks.FIELDS[:5]): {k: row[k] for k in row if k != "seconds"} for row in rows
    }
    assert len(found) == len(rows)
    return found


def test_a_study_that_was_interrupted_ends_like_one_that_was_not(tmp_path: Path, tiny: list[int]) -> None:
    known = {name: study_attacks.rules()[name] for name in ("row", "krum")}
    study_attacks.study(tmp_path / "straight", [1, 0], known, 2)
    straight = lines(tmp_path / "straight")
    cells = [("row", "absent", "1"), ("row", "absent", "2")]
    cells += [(rule, *cell) for rule in known for cell in (("clean", "0"), ("constant", "1"), ("permuted", "2"))]
    cells += [(study_attacks.UNTRAINED, "clean", "0")]
    assert sorted(straight) == sorted((*cell, seed, "2") for cell in cells for seed in ("0", "1"))
    assert [key[3] for key in straight] == ["1"] * len(cells) + ["0"] * len(cells)  # the first seed first
    assert all(0 <= float(row[name]) <= 1 for row in straight.values() for name in study_attacks.METRICS)
    assert all(bool(row["loss"]) == (key[0] in known) for key, row in straight.items())
    assert tiny == [1, 0]

    out = tmp_path / "interrupted"
    study_attacks.study(out, [1], {"krum": known["krum"]}, 2)
    first = (out / "attacks.csv").read_text()
    study_attacks.study(out, [1, 0], known, 2)
    assert (out / "attacks.csv").read_text().startswith(first)
    assert lines(out) == straight

    tiny.clear()
    before = (out / "attacks.csv").read_bytes()
    study_attacks.study(out, [1, 0], known, 2)
    assert (out / "attacks.csv").read_bytes() == before
    assert tiny == []  # nobody trains for nothing
    study_attacks.study(out, [0], {"krum": known["krum"]}, 1)
    assert {key[4] for key in lines(out).keys() - straight.keys()} == {"1"}  # of other epochs


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--rules", "row", "cka_kernel"],
            "--rules has cka_kernel; there are agreement, attention, certainty, entropy, ",
        ),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--seeds", "one"], "argument --seeds: invalid int value: 'one'"),
        (["--table"], "work has no attacks.csv with results"),
    ],
)
def test_what_there_is_not_is_named_before_any_work(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_attacks, "PAGE", tmp_path / "page.md")
    with pytest.raises(SystemExit) as ended:
        study_attacks.main(["--out", str(tmp_path / "work"), *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- tables -----------------------------------------------------------------------------------------------------------
def row(rule: str, attack: str, attackers: int, seed: int, linear: float) -> dict[str, str]:
    figures = {"linear_top1": f"{linear:.4f}", "labels1_top1": "0.5000", "knn_top1": "0.8000"}
    return dict.fromkeys(study_attacks.FIELDS, "") | {
        "rule": rule, "attack": attack, "attackers": str(attackers), "seed": str(seed), **figures,
    }  # fmt: skip


def test_a_table_by_hand() -> None:
    rows = [row(study_attacks.UNTRAINED, "clean", 0, 0, 0.4)]
    rows += [row("row", "clean", 0, 0, 0.9), row("row", "clean", 0, 1, 0.94)]  # 92.0, deviation sqrt(8) = 2.8
    rows += [row("row", "absent", 1, 0, 0.89)]
    rows += [row("row", attack, 1, 0, 0.875) for attack in study_attacks.ATTACKS]  # 2.5 less: within the deviation
    rows += [row("row", attack, 2, 0, 0.87) for attack in study_attacks.ATTACKS]  # 3 less
    rows += [row("krum", "clean", 0, 0, 0.8), row("krum", "constant", 1, 0, 0.79), row("krum", "constant", 2, 0, 0.788)]
    rows += [row("krum", "random", 1, 1, 0.1)]  # of a seed without a clean run: no comparison
    rows += [row("median", "constant", 1, 0, 0.8)]  # nor has this rule one
    linear, labels1, knn = study_attacks.markdown(rows).split("\n\n## ")
    assert linear == (
        "## linear_top1\n\n"
        "Untrained student: 40.0. `row` of the honest clients alone, without 1 attacker: 89.0 (-1.0), without 2: -.\n\n"
        "| rule | clean | 1 constant | 1 random | 1 sign_flipped | 1 permuted "
        "| 2 constant | 2 random | 2 sign_flipped | 2 permuted |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| *seeds* | 1 | 1 | 1 | 0 | 0 | 1 | 0 | 0 | 0 |\n"
        "| krum | 80.0 ± 0.0 | 79.0 (-1.0) | - | - | - | **78.8 (-1.2)** | - | - | - |\n"
        f"| row | 92.0 ± 2.8 |{' 87.5 (-2.5) |' * 4}{' **87.0 (-3.0)** |' * 4}\n\n"
        "Hold under every attack of 1 attacker: row.\n\n"
        "Hold under every attack of 2 attackers: none."
    )
    assert "Hold under every attack of 2 attackers: row." in labels1  # all alike
    assert knn.endswith("Hold under every attack of 2 attackers: row.\n")


def test_the_page_has_the_tables_of_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = study_attacks.PAGE.read_text()
    text, marker, _ = page.partition(study_attacks.MARKER)
    monkeypatch.setattr(study_attacks, "PAGE", tmp_path / "page.md")
    study_attacks.PAGE.write_text(f"{text}{marker}\n\nstale")
    assert study_attacks.main(["--table"]) == 0
    assert study_attacks.PAGE.read_text() == page
