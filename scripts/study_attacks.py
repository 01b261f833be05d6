#!/usr/bin/env python
"""Which ensembling rules bear hostile clients? `scripts/study_attacks.py --out DIR`, then `--table` for the page.

Six clients train once per seed, by the default configuration, and embed the public set. Then for every rule of
conf/ensemble that gives distributions, every attack and number of attackers, the attackers' similarities are replaced,
one fresh student (conv4_16) is distilled for one round, and its frozen features are probed. Each cell is one line of
DIR/attacks.csv; lines that are there already are skipped, so an interrupted study goes on where it was, and the rows of
one rule can be made again by deleting them.
"""

import argparse
import csv
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", OMP_NUM_THREADS="1")

import torch

from fedssl.config import compose, conf_dir, instantiate
from fedssl.distill import distill
from fedssl.ensemble import make_target
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
OVERRIDES = ("device=cpu", "evaluate.linear.l2=[0.01,0.001]", "evaluate.labels.per_class=[1]")
Row = dict[str, str]


def rules() -> list[str]:
    """All of conf/ensemble that give distributions."""
    names = sorted(path.stem for path in (conf_dir() / "ensemble").glob("*.yaml"))
    return [name for name in names if not instantiate(compose([f"ensemble={name}"])["ensemble"]).kernel]


def embeddings(setup: Setup) -> list[torch.Tensor]:
    """Unit rows of the public set by each client after one round of local training."""
    rows = []
    for p in setup.data.training_partitions:
        client = setup.client(p, 1)
        model = setup.build_model(client.family)
        client.train(model, epochs=setup.local.local_epochs)
        rows.append(unit_rows(client.embed_public(model)))
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


def run_cell(setup: Setup, honest: Sequence[torch.Tensor], rule: str, attack: str, number: int) -> dict[str, Any]:
    """One line of the table."""
    started = time.perf_counter()
    student = setup.build_model(FAMILY)
    metrics: dict[str, float] = {}
    if rule != UNTRAINED:
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
        ensemble = instantiate(compose([f"ensemble={rule}"])["ensemble"])
        metrics = distill(
            student,
            make_target(similarities, ensemble, distillation.target_temperature, num_images),
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
        "rule": rule,
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


def study(out: Path, seeds: Iterable[int], names: Sequence[str], epochs: int) -> None:
    """All cells that are not in the file yet: all rules of one seed before the next seed."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "attacks.csv"
    done = {tuple(row[field] for field in FIELDS[:5]) for row in read(path)}
    for seed in seeds:
        setup = Setup(compose([*OVERRIDES, f"seed={seed}", f"distill.epochs={epochs}"]))
        cells = [(UNTRAINED, "clean", 0), *(("row", *cell) for cell in ABSENT if "row" in names)]
        cells += [(rule, *cell) for cell in CELLS for rule in names]
        cells = [cell for cell in cells if (*map(str, cell), str(seed), str(epochs)) not in done]
        honest = embeddings(setup) if cells else []
        for rule, attack, number in cells:
            row = run_cell(setup, honest, rule, attack, number)
            new = not path.exists()
            with path.open("a", newline="") as file:
                writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(row)
            print(*row.values(), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of attacks.csv")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rules", nargs="+", default=None, help="names of conf/ensemble; default: all but kernels")
    parser.add_argument("--epochs", type=int, default=10, help="of distillation; the run's default is 20")
    args = parser.parse_args()
    torch.set_num_threads(1)
    study(args.out, args.seeds, args.rules or rules(), args.epochs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
