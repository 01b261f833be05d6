#!/usr/bin/env python
"""Does similarity exchange win? `scripts/study_flesd.py --data ../shared/data --work DIR`, then `--table` for the page.

The same with `--five-rounds` is whether it declines when rounds follow each other.

CIFAR-10, 5 clients of 4,000 or more private images and 3 architectures, Dirichlet 0.1, and three public sets: 2,000 and
500 held-out images, 2,000 of Tiny-ImageNet. One round: every client trains 10 epochs; then, per public set and arm, one
student of the report family takes 600 steps. All arms of a seed have the same partition, the same clients, the same
initial student and as many steps, so they are compared in pairs. Each run is one line of DIR/flesd_study.csv; what is
there already is skipped, and trained clients are kept in DIR/trained, so an interrupted study goes on where it was, and
several processes can share a DIR if they are given different --seeds or --arms.

--five-rounds: whole runs of experiment=cifar10_small as `fedssl` makes them, its local epochs spread over five rounds,
every one evaluated. They are in DIR/five_rounds/<strategy>-<seed>; each round and family is one line of
DIR/flesd_five_rounds.csv. An interrupted run goes on from its last round.
"""

import argparse
import csv
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest.mock import patch

os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1")
if "--five-rounds" not in sys.argv:  # of which several processes share the cores
    os.environ["OMP_NUM_THREADS"] = "1"

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, even where another is installed

import torch
from bench.reproduce import advance
from flwr.app import ArrayRecord
from safetensors.torch import load_file, save_file

from fedssl.config import compose, instantiate
from fedssl.distill import distill
from fedssl.ensemble import make_target
from fedssl.errors import FedSSLError
from fedssl.federation import client as client_module
from fedssl.federation.client import Broadcast
from fedssl.federation.records import load_state, model_state
from fedssl.federation.setup import Setup
from fedssl.models import Model
from fedssl.report.runs import Run, read_run
from fedssl.seeding import derive_seed
from fedssl.similarity import FactorSimilarity, Similarity, unit_rows
from fedssl.train import train
from strategies.public_only import PublicOnly

COMMON = (
    "experiment=cifar10_small", "device=cpu", "data.num_images=27000", "partition.min_size=4000",
    "federation.num_rounds=1", "federation.report_family=conv4_16", "client.local_epochs=10", "method=simclr",
    "method.temperature=0.1", "distill.batch_size=128", "evaluate.linear.l2=[0.03,0.01,0.003]",
    "evaluate.labels.per_class=[1]",
)  # fmt: skip
PUBLIC = {  # by name, with epochs that make 600 steps of 128
    "held_out_2000": ("public=held_out", "public.size=2000", "distill.epochs=40"),
    "held_out_500": ("public=held_out", "public.size=500", "distill.epochs=200"),
    "tiny_imagenet_2000": (
        "public=dataset", "public.data=parquet", "public.root={data}/tiny-imagenet-32-unlabelled", "public.size=2000",
        "distill.epochs=40",
    ),
}  # fmt: skip
PAPER = ("embedding=projector", "distill.loss=ce", "views@distill.views=colour")
COORDINATES = ("embedding=backbone", "ensemble=cka_kernel", "distill.loss=coordinates")
SHIFT = (*COORDINATES, "views@distill.views=shift")
ARMS = {  # by name: whose similarities, and the settings of the distillation
    "flesd": ("trained", SHIFT),  # the default
    "placebo": ("untrained", SHIFT),
    "best_client": ("best", SHIFT),
    "public_only": ("nobody", SHIFT),
    "public_only_128": ("nobody", SHIFT),
    "public_only_total": ("nobody", SHIFT),
    "paper": ("trained", (*PAPER, "ensemble=none")),
    "row": ("trained", (*PAPER, "ensemble=row")),
    "full_views": ("trained", (*COORDINATES, "views@distill.views=colour")),
    "full_views_placebo": ("untrained", (*COORDINATES, "views@distill.views=colour")),
}
METRICS = ("linear_top1", "knn_top1", "labels1_top1")
FIELDS = ("public", "arm", "seed", "partition", "family", *METRICS, "steps", "image_passes", "seconds")
LOCAL, RANDOM = "local", "random"  # arms without a public set
ALL_ARMS = (RANDOM, LOCAL, *ARMS)
ROUNDS = (
    "experiment=cifar10_small", "device=cpu", "federation.num_rounds=5", "client.local_epochs=2", "distill.epochs=10",
    "evaluate.every=1",
)  # fmt: skip
STRATEGIES = ("flesd", "placebo", "public_only")  # of the runs of five rounds
ROUND_FIELDS = ("strategy", "seed", "round", "family", *METRICS, "seconds")  # of the round; none before the first
Row = dict[str, str]


# --- trained once ---------------------------------------------------------------------------------------------------
def remembering(folder: Path) -> Any:
    """`fedssl.train.train` that looks into `folder` first: it is a pure function of weights, images and settings."""
    folder.mkdir(parents=True, exist_ok=True)

    def remembered(model: Model, images: Any, **settings: Any) -> dict[str, float]:
        device = settings.pop("device")
        unknown_to_the_key = settings.pop("memory", None), settings.pop("penalty", None)
        assert not any(unknown_to_the_key), "SimCLR keeps nothing, and no arm of the study has a penalty"
        key = hashlib.sha256()
        for name, value in model_state(model).items():
            key.update(name.encode())
            key.update(value.cpu().contiguous().numpy().tobytes())
        key.update(images.digest.encode())
        said = {name: repr(value) for name, value in settings.items()}
        if not settings["optimisation"].depends_on_num_rounds:
            del said["num_rounds"]
        key.update(repr(sorted(said.items())).encode())
        path = folder / f"{key.hexdigest()}.safetensors"
        if path.exists():
            load_state(model, load_file(path))
            model.to(device).eval()
            metrics: dict[str, float] = json.loads(path.with_suffix(".json").read_text())
            return metrics
        metrics = train(model, images, device=device, **settings)
        path.with_suffix(".json").write_text(json.dumps(metrics))
        unfinished = path.with_suffix(f".{os.getpid()}")
        save_file({name: value.cpu().contiguous() for name, value in model_state(model).items()}, unfinished)
        unfinished.replace(path)
        return metrics

    return remembered


# --- one cell -------------------------------------------------------------------------------------------------------
class Study:
    """The runs of one seed; what several of them need is made once."""

    def __init__(self, seed: int, data: Path, work: Path) -> None:
        self.seed, self.data, self.work = seed, data, work

    @cache  # noqa: B019 - as long as the study
    def setup(self, public: str, overrides: tuple[str, ...] = ()) -> Setup:
        """A run's parts; partitions are those of the first public set, whichever it is."""
        partition = self.work / f"partition-{self.seed}.npz"
        common = [*COMMON, f"data.root={self.data}", f"seed={self.seed}"]
        if not partition.exists():
            Setup(compose([*common, *PUBLIC["held_out_2000"]])).data.save(partition)
        chosen = [override.format(data=self.data) for override in PUBLIC[public]]
        kept = [override for override in common if not override.startswith("partition.")]
        return Setup(compose([*kept, *chosen, "partition=file", f"partition.path={partition}", *overrides]))

    @cache  # noqa: B019
    def trained(self, partition_id: int, family: str) -> tuple[Model, dict[str, float]]:
        """This client's model of that architecture after its 10 epochs, as `local_only` and FLESD train it."""
        client = self.setup("held_out_2000").client(partition_id, 1)
        client.family = family
        model = client.load(Broadcast(round_num=1, num_rounds=1, family=family, arrays=ArrayRecord()))
        return model, client.train(model, epochs=client.local.local_epochs)

    def evaluated(self, model: Model) -> dict[str, float]:
        """Probes of its backbone; the same images for all."""
        return self.setup("held_out_2000").evaluator(model.backbone)

    @cache  # noqa: B019
    def local(self, partition_id: int, family: str) -> dict[str, float]:
        """How one client's training went, and probes of its model."""
        model, learned = self.trained(partition_id, family)
        return {**learned, **self.evaluated(model)}

    def similarities(self, whose: str, public: str, embedding: str) -> tuple[list[Similarity], list[float]]:
        """What clients say of the public set, and how many images they have."""
        setup = self.setup(public)
        partitions = list(setup.data.training_partitions)
        if whose == "best":
            partitions = [max(partitions, key=lambda p: self.local(p, setup.family(p))["linear_top1"])]
        said: list[Similarity] = []
        for p in partitions:
            client = setup.client(p, 1)
            model = client.untrained() if whose == "untrained" else self.trained(p, client.family)[0]
            said.append(FactorSimilarity(factors=unit_rows(client.embed_public(model, embedding))))
        return said, [float(len(setup.data.partitions[p])) for p in partitions]

    def student(self, public: str, arm: str) -> tuple[Model, dict[str, float]]:
        """The report family's model after one round of this arm."""
        whose, overrides = ARMS[arm]
        setup = self.setup(public, overrides)
        family, distillation = setup.report_family, instantiate(setup.config["distill"])
        model = setup.build_model(family)
        images = setup.public_set.images
        if whose == "nobody":
            total = arm == "public_only_total"
            codec, downlink = instantiate(setup.config["codec"]), setup.config["downlink"]
            control = PublicOnly(
                server=setup.server(), distillation=distillation, total=total, downlink=downlink, codec=codec
            )
            private = sum(len(setup.data.partitions[p]) for p in setup.data.training_partitions)
            steps, batch_size = control.effort(1, 2 * setup.local.local_epochs * private if total else 0)
            if arm == "public_only_128":  # as many images a step as the distillation, so nearly twice the passes
                steps, batch_size = distillation.num_steps(len(images)), distillation.batch_size
            purpose = f"public-only/{family}"
            return model, setup.server().train(
                model, images, steps=steps, batch_size=batch_size, purpose=purpose, round_num=1
            )
        said, num_images = self.similarities(whose, public, setup.config["embedding"])
        target = make_target(said, instantiate(setup.config["ensemble"]), distillation.target_temperature, num_images)
        return model, distill(
            model, target, images, distillation=distillation, views=setup.views,
            seed=derive_seed(self.seed, f"distillation/{family}", 1), round_num=1, num_rounds=1, device=setup.device,
        )  # fmt: skip

    def rows(self, public: str, arm: str) -> Iterator[dict[str, Any]]:
        """The lines of one cell."""
        base = {"public": public, "arm": arm, "seed": self.seed}
        setup = self.setup("held_out_2000")
        if arm == RANDOM:
            yield {**base, "family": setup.report_family, **self.evaluated(setup.build_model(setup.report_family))}
            return
        if arm == LOCAL:
            for p in setup.data.training_partitions:
                for family in dict.fromkeys([setup.family(p), setup.report_family]):
                    yield {**base, "partition": p, "family": family, **self.local(p, family)}
            return
        model, learned = self.student(public, arm)
        yield {**base, "family": setup.report_family, **learned, **self.evaluated(model)}


# --- five rounds ----------------------------------------------------------------------------------------------------
def five_rounds(work: Path, data: Path, seeds: Sequence[int], strategies: Sequence[str]) -> None:
    """All runs that are not in the file yet, seed by seed."""
    path = work / "flesd_five_rounds.csv"
    for seed in seeds:
        for strategy in strategies:
            if any((row["strategy"], row["seed"]) == (strategy, str(seed)) for row in read(path)):
                continue
            run_dir = work / "five_rounds" / f"{strategy}-{seed}"
            advance(compose([*ROUNDS, f"strategy={strategy}", f"seed={seed}", f"data.root={data}"]), run_dir, None)
            append(path, ROUND_FIELDS, lines_of(read_run(run_dir), strategy, seed))


def lines_of(run: Run, strategy: str, seed: int) -> Iterator[dict[str, Any]]:
    """Of a run: a line for every round and family."""
    seconds = dict(zip(run.server["round"], run.server["seconds"], strict=True))
    for line in run.eval.to_dict("records"):
        if line["family"] not in run.families:  # raw pixels
            continue
        line |= {"strategy": strategy, "seed": seed}
        yield line | {"seconds": seconds[line["round"]]} if line["round"] else line


def rounds_markdown(rows: Sequence[Row], family: str) -> str:
    """The table of one family: after each round the mean over seeds, linear / kNN."""
    rows = [row for row in rows if row["family"] == family]
    rounds = sorted({int(row["round"]) for row in rows})
    lines = [
        f"| {family}, linear / kNN | before | {' | '.join(map(str, rounds[1:]))} | s a round |",
        f"|{' --- |' * (len(rounds) + 1)} ---: |",
    ]
    for strategy in dict.fromkeys(row["strategy"] for row in rows):
        own = [row for row in rows if row["strategy"] == strategy]
        cells = []
        for number in rounds:
            there = [row for row in own if row["round"] == str(number)]
            cells.append(" / ".join(f"{100 * mean(float(row[m]) for row in there):.1f}" for m in METRICS[:2]))
        seconds = [float(row["seconds"]) for row in own if row["seconds"]]
        lines.append(f"| `{strategy}` | {' | '.join(cells)} | {mean(seconds):.0f} |")
    return "\n".join(lines) + "\n"


# --- the table ------------------------------------------------------------------------------------------------------
def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, fields: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write lines, all or none, and show them."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, restval="", extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            row |= {name: f"{row[name]:.4f}" for name in METRICS}
            row |= {name: f"{row[name]:.0f}" for name in ("steps", "image_passes", "seconds") if name in row}
            writer.writerow(row)
            print(*(row.get(name, "") for name in fields), flush=True)


def study(work: Path, data: Path, seeds: Sequence[int], publics: Sequence[str], arms: Sequence[str]) -> None:
    """All cells that are not in the file yet, seed by seed."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "flesd_study.csv"
    cells = [(p, a) for a in arms for p in (["none"] if a in (LOCAL, RANDOM) else publics)]
    with patch.object(client_module, "train", remembering(work / "trained")):
        for seed in seeds:
            one = Study(seed, data, work)
            for public, arm in cells:
                if not any((row["public"], row["arm"], row["seed"]) == (public, arm, str(seed)) for row in read(path)):
                    append(path, FIELDS, one.rows(public, arm))


class Figures:
    """Accuracies in percent of one metric, by public set, arm and seed; those of local models by their extremes."""

    def __init__(self, rows: Sequence[Row], metric: str) -> None:
        self.values: dict[tuple[str, str], dict[int, float]] = {}
        shares: dict[tuple[str, int], list[float]] = {}
        reported = next((row["family"] for row in rows if row["arm"] == RANDOM), "")
        for row in rows:
            seed, value = int(row["seed"]), 100 * float(row[metric])
            if row["arm"] != LOCAL:
                self.values.setdefault((row["public"], row["arm"]), {})[seed] = value
                continue
            shares.setdefault(("local, any architecture, best", seed), []).append(value)
            if row["family"] == reported:
                shares.setdefault(("local, mean", seed), []).append(value)
                shares.setdefault(("local, best", seed), []).append(value)
        for (name, seed), values in shares.items():
            value = max(values) if name.endswith("best") else mean(values)
            self.values.setdefault(("none", name), {})[seed] = value

    def arms(self, public: str) -> list[str]:
        """Those of this public set, the best mean first, and those without any."""
        found = [key for key in self.values if key[0] in (public, "none")]
        return [arm for _, arm in sorted(found, key=lambda key: -mean(self.values[key].values()))]

    def of(self, public: str, arm: str) -> dict[int, float]:
        """By seed."""
        return self.values.get((public, arm)) or self.values.get(("none", arm), {})

    def cell(self, public: str, arm: str) -> str:
        """Mean and standard deviation over the seeds."""
        values = list(self.of(public, arm).values())
        if not values:
            return "not measured"
        return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")

    def lead(self, public: str, arm: str) -> str:
        """How far `flesd` is above an arm, paired by seed: mean, standard error, the smallest; bold where it wins.

        It wins where it is above for every seed, of two or more, and by more than two standard errors in the mean.
        """
        ours, other = self.of(public, "flesd"), self.of(public, arm)
        leads = [ours[seed] - other[seed] for seed in sorted(ours.keys() & other.keys())]
        if not leads or arm == "flesd":
            return ""
        if len(leads) == 1:
            return f"{leads[0]:+.1f}"
        error = stdev(leads) / len(leads) ** 0.5
        text = f"{mean(leads):+.1f} ± {error:.1f} ({min(leads):+.1f} to {max(leads):+.1f})"
        return f"**{text}**" if min(leads) > 0 and mean(leads) > 2 * error else text


def markdown(rows: Sequence[Row]) -> str:
    """One table for each public set."""
    figures = {metric: Figures(rows, metric) for metric in METRICS}
    linear = figures["linear_top1"]
    parts = []
    for public in PUBLIC:
        if not linear.of(public, "flesd"):
            continue
        lines = [
            f"## {public}",
            "",
            "| arm | seeds | linear | kNN | one label | `flesd` is above it by (linear) | passes | s |",
            "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
        ]
        for arm in linear.arms(public):
            cells = [figures[metric].cell(public, arm) for metric in METRICS]
            runs = [row for row in rows if row["arm"] == arm and row["public"] == public and row["seconds"]]
            passes = f"{mean(float(row['image_passes']) for row in runs):,.0f}" if runs else ""
            seconds = f"{mean(float(row['seconds']) for row in runs):.0f}" if runs else ""
            seeds = len(linear.of(public, arm))
            lines.append(
                f"| `{arm}` | {seeds} | {' | '.join(cells)} | {linear.lead(public, arm)} | {passes} | {seconds} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="holds cifar10/ and tiny-imagenet-32-unlabelled/"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/study_flesd"), help="(%(default)s)")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="(%(default)s)")
    parser.add_argument("--public", default=",".join(PUBLIC), help="(%(default)s)")
    parser.add_argument("--arms", default=None, help="by default all")
    parser.add_argument(
        "--five-rounds", action="store_true", help=f"runs of {', '.join(STRATEGIES)} (--arms), no --public"
    )
    parser.add_argument("--table", action="store_true", help="only print the tables of WORK/flesd_study.csv")
    given = parser.parse_args(argv)
    known_arms = STRATEGIES if given.five_rounds else ALL_ARMS
    results = given.work / ("flesd_five_rounds.csv" if given.five_rounds else "flesd_study.csv")
    if given.table:
        if not results.is_file():
            parser.error(f"there is no {results}: run the study first, or name its folder with --work")
        print(rounds_markdown(read(results), "conv4_32") if given.five_rounds else markdown(read(results)), end="")
        return 0
    publics, arms = given.public.split(","), known_arms if given.arms is None else given.arms.split(",")
    for option, names, known in (("--public", publics, PUBLIC), ("--arms", arms, known_arms)):
        if unknown := [name for name in names if name not in known]:
            parser.error(f"{option} has {', '.join(unknown)}; there are {', '.join(known)}")
    if not all(seed.strip().isdecimal() for seed in given.seeds.split(",")):
        parser.error(f"--seeds are whole numbers with commas between them, got {given.seeds!r}")
    seeds = [int(seed) for seed in given.seeds.split(",")]
    try:
        if given.five_rounds:
            five_rounds(given.work, given.data, seeds, arms)
        else:
            torch.set_num_threads(1)
            study(given.work, given.data, seeds, publics, arms)
    except FedSSLError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
