#!/usr/bin/env python
"""Which ensembling rules bear hostile clients? `scripts/study_attacks.py --out DIR`, then `--table` for the page.

Six clients train once per seed, by the default configuration, and embed the public set. Then for every rule of
conf/ensemble that gives distributions, every attack and number of attackers, the attackers' similarities are replaced,
one fresh student (conv4_16) is distilled for one round, and its frozen features are probed. Each run is one line of
DIR/attacks.csv; lines that are there already are skipped, so an interrupted study goes on where it was, and the rows of
one rule can be made again by deleting them.
"""

import argparse
import csv
import os
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", OMP_NUM_THREADS="1")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, even where another is installed

import torch
import yaml

from fedssl.config import compose, conf_dir, instantiate
from fedssl.distill import distill
from fedssl.ensemble import Rule, make_target
from fedssl.federation.setup import Setup
from fedssl.seeding import generator
from fedssl.similarity import DenseSimilarity, FactorSimilarity, Similarity, cosine_similarity, unit_rows

ROOT = Path(__file__).resolve().parent.parent
FAMILY = "conv4_16"  # the student
ATTACKS = ("constant", "random", "sign_flipped", "permuted")
CELLS = (("clean", 0), *((attack, number) for number in (1, 2) for attack in ATTACKS))
ABSENT = (("absent", 1), ("absent", 2))  # row alone, without the attackers: the best that leaving them out can give
UNTRAINED = "initial weights"  # of the student, before any distillation
METRICS = ("linear_top1", "labels1_top1", "knn_top1")
FIELDS = ("rule", "attack", "attackers", "seed", "epochs", *METRICS, "loss", "target_entropy", "seconds")
OVERRIDES = ("ensemble=row", "device=cpu", "evaluate.linear.l2=[0.01,0.001]", "evaluate.labels.per_class=[1]")
Row = dict[str, str]


def rules() -> dict[str, Rule]:
    """All of conf/ensemble that give distributions."""
    found = {}
    for path in sorted((conf_dir() / "ensemble").glob("*.yaml")):
        rule: Rule = instantiate(yaml.safe_load(path.read_text()))
        if not rule.kernel:
            found[path.stem] = rule
    return found


def embeddings(setup: Setup) -> list[torch.Tensor]:
    """Unit rows of the public set by each client after one round of local training."""
    rows = []
    for p in setup.data.training_partitions:
        client = setup.client(p, 1)
        model = setup.build_model(client.family)
        client.train(model, epochs=setup.local.local_epochs)
        rows.append(unit_rows(client.embed_public(model, "projector")))
    return rows


def hostile(attack: str, factors: torch.Tensor, seed: int, partition_id: int) -> Similarity:
    """What an attacker sends in the place of its honest similarities; every attacker draws for itself."""
    n, rng = len(factors), generator(seed, f"attack/{attack}", 1, partition_id)
    if attack == "constant":
        return DenseSimilarity(matrix=torch.ones(n, n))
    if attack == "random":
        return FactorSimilarity(factors=unit_rows(torch.randn(factors.shape, generator=rng)))
    if attack == "sign_flipped":
        return DenseSimilarity(matrix=(-cosine_similarity(factors)).fill_diagonal_(1))
    assert attack == "permuted"
    return FactorSimilarity(factors=factors[torch.randperm(n, generator=rng)])


def run_cell(
    setup: Setup, honest: Sequence[torch.Tensor], name: str, rule: Rule | None, attack: str, number: int
) -> dict[str, Any]:
    """One line of the table."""
    started = time.perf_counter()
    student = setup.build_model(FAMILY)
    metrics: dict[str, float] = {}
    if rule is not None:
        attackers = torch.randperm(len(honest), generator=generator(setup.seed, "attackers"))[:number].tolist()
        similarities: list[Similarity] = []
        num_images = []
        for p, factors in enumerate(honest):
            if p in attackers and attack == "absent":
                continue
            lies = p in attackers
            similarities.append(hostile(attack, factors, setup.seed, p) if lies else FactorSimilarity(factors=factors))
            num_images.append(float(len(setup.data.partitions[p])))
        distillation = instantiate(setup.config["distill"])
        metrics = distill(
            student,
            make_target(similarities, rule, distillation.target_temperature, num_images),
            setup.public_set.images,
            distillation=distillation,
            views=setup.views,
            seed=setup.seed,
            round_num=1,
            num_rounds=1,
            device=setup.device,
        )
    metrics = metrics | setup.evaluator(student.backbone)
    wanted = {name: f"{metrics[name]:.4f}" for name in (*METRICS, "loss", "target_entropy") if name in metrics}
    return {
        "rule": name,
        "attack": attack,
        "attackers": number,
        "seed": setup.seed,
        "epochs": setup.config["distill"]["epochs"],
        **wanted,
        "seconds": f"{time.perf_counter() - started:.1f}",
    }


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def study(out: Path, seeds: Sequence[int], known: Mapping[str, Rule], epochs: int) -> None:
    """All cells that are not in the file yet: the first seed, then the others, two attackers before one."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "attacks.csv"
    done = {tuple(row[field] for field in FIELDS[:5]) for row in read(path)}
    cells = [(UNTRAINED, "clean", 0), *(("row", *cell) for cell in ABSENT if "row" in known)]
    cells += [(name, *cell) for cell in CELLS for name in known]
    jobs = [(seed, *cell) for seed in seeds for cell in cells]
    jobs = [job for job in jobs if (*map(str, job[1:]), str(job[0]), str(epochs)) not in done]
    jobs.sort(key=lambda job: (job[0] != seeds[0], job[3] == 1, seeds.index(job[0])))

    @cache
    def trained(seed: int) -> tuple[Setup, list[torch.Tensor]]:
        setup = Setup(compose([*OVERRIDES, f"seed={seed}", f"distill.epochs={epochs}"]))
        return setup, embeddings(setup)

    for seed, name, attack, number in jobs:
        row = run_cell(*trained(seed), name, known.get(name), attack, number)
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(*row.values(), flush=True)


# --- the page -----------------------------------------------------------------------------------------------------
PAGE = ROOT / "benchmarks" / "attacks.md"
MARKER = "<!-- below: scripts/study_attacks.py --table -->"
MARGIN = 1.0  # points; a rule also holds within one standard deviation of its clean runs over the seeds


class Table:
    """Accuracies in percent of one metric, by rule and cell and seed."""

    def __init__(self, rows: Sequence[Row], metric: str) -> None:
        self.values: dict[tuple[str, str, int], dict[int, float]] = {}
        for row in rows:
            key = row["rule"], row["attack"], int(row["attackers"])
            self.values.setdefault(key, {})[int(row["seed"])] = 100 * float(row[metric])

    def spread(self, rule: str) -> float:
        """The standard deviation of the rule's clean runs over the seeds."""
        clean = list(self.values[rule, "clean", 0].values())
        return stdev(clean) if len(clean) > 1 else 0.0

    def drop(self, rule: str, attack: str, number: int) -> float | None:
        """Points below the rule's own clean run, the mean over the seeds that have both."""
        clean, cell = self.values.get((rule, "clean", 0), {}), self.values.get((rule, attack, number), {})
        drops = [clean[seed] - value for seed, value in cell.items() if seed in clean]
        return mean(drops) if drops else None

    def tolerance(self, rule: str) -> float:
        """Points that a rule may lose."""
        return max(MARGIN, self.spread(rule))

    def holds(self, rule: str, attack: str, number: int) -> bool:
        """Whether the rule loses no more."""
        drop = self.drop(rule, attack, number)
        return drop is not None and drop <= self.tolerance(rule) + 1e-9

    def cell(self, rule: str, attack: str, number: int) -> str:
        """Accuracy and points against the clean run; bold where the rule does not hold."""
        drop = self.drop(rule, attack, number)
        if drop is None:
            return "-"
        text = f"{mean(self.values[rule, attack, number].values()):.1f} ({-drop:+.1f})"
        return text if self.holds(rule, attack, number) else f"**{text}**"


def markdown(rows: Sequence[Row]) -> str:
    """Tables of all metrics, and which rules hold; of those that have a clean run."""
    names = sorted({row["rule"] for row in rows if row["attack"] == "clean"} - {UNTRAINED})
    attacked = CELLS[1:]
    parts = []
    for metric in METRICS:
        table = Table(rows, metric)
        untrained = mean(table.values[UNTRAINED, "clean", 0].values())
        lines = [
            f"## {metric}",
            "",
            f"Untrained student: {untrained:.1f}. `row` of the honest clients alone, without 1 attacker: "
            f"{table.cell('row', 'absent', 1)}, without 2: {table.cell('row', 'absent', 2)}.",
            "",
            "| rule | clean | " + " | ".join(f"{number} {attack}" for attack, number in attacked) + " |",
            "| --- |" + " ---: |" * (1 + len(attacked)),
            "| *seeds* | " + " | ".join(str(min(_seeds(rows, name, *cell) for name in names)) for cell in CELLS) + " |",
        ]
        for name in names:
            clean = f"{mean(table.values[name, 'clean', 0].values()):.1f} ± {table.spread(name):.1f}"
            lines.append(f"| {name} | {clean} | " + " | ".join(table.cell(name, *cell) for cell in attacked) + " |")
        for number in (1, 2):
            some = [cell for cell in attacked if cell[1] == number]
            holding = [name for name in names if all(table.holds(name, *cell) for cell in some)]
            what = "1 attacker" if number == 1 else "2 attackers"
            lines += ["", f"Hold under every attack of {what}: {', '.join(holding) or 'none'}."]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _seeds(rows: Sequence[Row], name: str, attack: str, number: int) -> int:
    return sum((row["rule"], row["attack"], row["attackers"]) == (name, attack, str(number)) for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    known = rules()
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of attacks.csv")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rules", nargs="+", default=None, help="names of conf/ensemble; default: all but kernels")
    parser.add_argument("--epochs", type=int, default=10, help="of distillation; the run's default is 14")
    parser.add_argument("--table", action="store_true", help="write benchmarks/attacks.md from the file, run nothing")
    args = parser.parse_args(argv)
    if args.table:
        if not (rows := read(args.out / "attacks.csv")):
            parser.error(f"--out {args.out} has no attacks.csv with results")
        text = PAGE.read_text().partition(MARKER)[0] if PAGE.exists() else ""
        PAGE.write_text(f"{text}{MARKER}\n\n{markdown(rows)}")
        return 0
    if unknown := sorted({*(args.rules or ())} - known.keys()):
        parser.error(f"--rules has {', '.join(unknown)}; there are {', '.join(known)}")
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}")
    torch.set_num_threads(1)
    study(args.out, args.seeds, {name: known[name] for name in args.rules or known}, args.epochs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
