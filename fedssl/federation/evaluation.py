"""The evaluation of a finished run: every model it left, beside the same networks before training.

A strategy with global models is measured by them. One without, such as `local_only`, keeps its clients' models in their
memory, and each of them is measured. A strategy that has both also gets a row for every client's own model; where
clients keep none, those of the last round can be trained again (`evaluate.replay_clients`).
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fedssl.data.partition import read_npz
from fedssl.errors import ConfigError, DataError
from fedssl.evaluate import Examiner, Findings, Thorough, linear_cka
from fedssl.federation.client import own_model
from fedssl.federation.records import load_state, model_state
from fedssl.federation.setup import Setup
from fedssl.federation.simulation import ReplayedRound
from fedssl.federation.store import ClientStore

GLOBAL, OWN, CLIENTS = "global", "own", "clients"  # `model` of a row: the last is the mean over the clients' own
RANDOM_INIT, RAW_PIXELS = "random_init", "raw_pixels"  # the controls


class LostMemoryError(DataError):
    """A client remembers, but the store does not hold what it wrote."""


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """The models that a completed run left, as backbones on its device.

    Args:
        setup: built from the run's configuration, with the probes of this evaluation.
        as_it_ran: with the run's own probes, as its client tasks are replayed.
        run_dir: where it lies.
        store: its clients' memory.
        rounds: how many it did.
        replied: the clients whose uploads the last of them used.
    """

    setup: Setup
    as_it_ran: Setup
    run_dir: Path
    store: ClientStore
    rounds: int
    replied: Sequence[int]

    def initial(self, family: str) -> nn.Module:
        """The run's network of `family` before round 1, as its round 0 was probed."""
        return self.setup.build_model(family).backbone.to(self.setup.device)

    def global_model(self, family: str) -> nn.Module | None:
        """The trained one; None where the run has none."""
        path = self.run_dir / "models" / f"{family}.safetensors"
        return self._load(family, load_file(path)) if path.is_file() else None

    def own_model(self, partition_id: int, family: str) -> nn.Module | None:
        """The one of `family` that this client kept after its last round; None where it keeps none."""
        state = own_model(self.store.read(partition_id, before=self.rounds + 1), family)
        return self._load(family, state) if state else None

    @cached_property
    def lost_memory(self) -> bool:
        """Whether the folder of the clients' memory is not there, though they keep their models."""
        downlink = (self.setup.config["strategy"]["client"] or {}).get("downlink", "weights")
        return downlink != "weights" and not self.store.root.is_dir()

    @cached_property
    def unreplayable(self) -> str | None:
        """Why no client's last task can run again; None if it can."""
        setup, last = self.as_it_ran, self.rounds
        if setup.client_half is None:
            return f"strategy={setup.config['strategy']['name']} asks no client to train"
        if setup.members is not None:
            return "none can be trained again here: the run is a deployment, and its clients are on their nodes"
        if last not in ReplayedRound.replayable(setup, self.run_dir):
            return (
                f"none can be trained again: {self.run_dir / 'checkpoints'} has no state after round {last - 1}, where "
                f"round {last} began (federation.keep_checkpoints={setup.federation.keep_checkpoints})"
            )
        return None

    @cached_property
    def last_round(self) -> ReplayedRound:
        """To run the tasks of its clients again."""
        return ReplayedRound(self.as_it_ran, self.run_dir, self.rounds)

    def replayed_model(self, partition_id: int, family: str) -> nn.Module | None:
        """What this client had at the end of its last training, trained again; None where it trained no `family`.

        On the device that the run had, bit for bit the same.

        Raises:
            LostMemoryError: what the client remembered from earlier rounds is not in the store.
        """
        _, client = self.last_round.task(partition_id)
        if client.memory and self.rounds not in self.store.versions(partition_id):
            raise LostMemoryError(
                f"{self.store.root} has no memory of client {partition_id} after round {self.rounds}; client.store=DIR "
                f"says where it is"
            )
        model = client.trained.get(family)
        return None if model is None else self._load(family, model_state(model))

    def _load(self, family: str, state: Mapping[str, Tensor]) -> nn.Module:
        model = self.setup.build_model(family)
        load_state(model, state)
        return model.backbone.to(self.setup.device)

    @cached_property
    def partition(self) -> dict[str, np.ndarray]:
        """The arrays of `partition.npz`."""
        path = self.run_dir / "partition.npz"
        try:
            arrays = read_npz(path)
            _ = arrays["counts"], arrays["classes"], arrays["offsets"], arrays["public_partition"]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"cannot read {path}, which says who owned which images: {error}") from error
        return arrays

    @property
    def partition_ids(self) -> list[int]:
        """Of the clients that train."""
        return [p for p in range(len(self.partition["offsets"]) - 1) if p != int(self.partition["public_partition"])]


class RunEvaluation:
    """Every model of one run, measured.

    Args:
        run: a completed one.
        thorough: what is measured beside the run's probes.
        say: is told what is being measured.

    Raises:
        ConfigError: an unknown family, labels that cannot be used, or a damaged checkpoint where clients are to be
            replayed.
    """

    def __init__(self, run: FinishedRun, thorough: Thorough, say: Callable[[str], None]) -> None:
        self.run, self.thorough, self.say = run, thorough, say
        self.families = _chosen(run, thorough)
        self.examiner = Examiner(run.setup.evaluator, thorough)
        self.rows: list[dict[str, Any]] = []
        self.absent: dict[str, str] = {}
        self.counts = self._counts()
        self.replays = thorough.replay_clients and not run.lost_memory and run.unreplayable is None
        self.unreplayed: str | None = None  # why a client's task was of no use
        if self.replays:
            _ = run.last_round  # whatever is wrong with its checkpoint is said before the work

    def __call__(self) -> dict[str, Any]:
        """Do the work.

        Returns:
            `labelled_images` and `test_images`, counts; `absent`, for each figure that could not be had the reason; and
            `rows`, each with `model` (global, own, clients, random_init or raw_pixels), `family`, `partition` and
            `metrics`. A row of a family has, beside what `Examiner` names, the mean over its clients of
            `shard_knn_top1` and `shard_linear_top1` (`fedssl.evaluate.shards`), with `_min` and `_max`. `clients` is
            the mean over the clients' own models, likewise: those that they kept, or with `replay_clients` those that
            the last round's clients had when they made their uploads. Linear CKA is `cka_random_init` with the
            untrained network, `cka_global` of a client's own model with the global one, `cka_clients` the mean over
            pairs of clients.

        Raises:
            ConfigError: there is no model at all.
        """
        setup = self.run.setup
        found = False
        for family in self.families:
            trained = self.run.global_model(family)
            if trained is not None:
                self._global(family, trained)
            elif not self._clients(family):
                self.absent[family] = "the run left no model of it"
                continue
            found = True
        if not found:
            memory = self.run.store.root
            raise ConfigError(
                f"{self.run.run_dir} holds no model of {', '.join(self.families)}: neither in models/, nor in its "
                f"clients' memory, {memory}{'' if memory.is_dir() else ', which does not exist'}. Put models/ back, or "
                f"name the folder where the clients' memory is now by client.store=DIR."
            )
        if setup.evaluation.raw_pixels:
            self.say("raw pixels")
            self._row(RAW_PIXELS, None, None, self.examiner.frozen(nn.Flatten()).metrics)
        if not any("cka_global" in row["metrics"] for row in self.rows):
            self.absent["cka_global"] = self._why_no_own_model()
        return {
            "labelled_images": {"all": len(setup.evaluator.train), **self.examiner.labelled_images()},
            "test_images": len(setup.evaluator.test),
            "absent": self.absent,
            "rows": self.rows,
        }

    def _global(self, family: str, trained: nn.Module) -> None:
        """Rows of a family with a global model, its control, and what its clients kept."""
        self.say(f"{family}: the global model")
        found = self.examiner(trained)
        control = self._control(family)
        clients = self._clients_of(family)
        self._row(GLOBAL, family, None, {
            **found.metrics,
            **self._shards(found, clients),
            "cka_random_init": linear_cka(found.features, control.features),
        })  # fmt: skip
        self._row(RANDOM_INIT, family, None, {**control.metrics, **self._shards(control, clients)})
        kept = []
        for partition_id in clients:
            if shard := self._shard(found, partition_id):
                self._row(GLOBAL, family, partition_id, shard)
            own = self.run.own_model(partition_id, family)
            if own is None:
                own = self._replayed(partition_id, family)
            if own is not None:
                self.say(f"{family}: the model of client {partition_id}")
                probed = self.examiner.probe(own)
                cka = linear_cka(probed.features, found.features)
                kept.append({**probed.metrics, **self._shard(probed, partition_id), "cka_global": cka})
                self._row(OWN, family, partition_id, kept[-1])
        if kept:
            self._row(CLIENTS, family, None, over_clients(kept))

    def _replayed(self, partition_id: int, family: str) -> nn.Module | None:
        """The model of a client that kept none, trained again; None where that is not asked for, or of no use."""
        last = self.run.rounds
        if not self.replays or partition_id not in self.run.replied or partition_id not in self.run.last_round.asked:
            return None
        self.say(f"{family}: client {partition_id}, which trains again as in round {last}")
        try:
            return self.run.replayed_model(partition_id, family)
        except LostMemoryError as error:
            self.replays, self.unreplayed = False, f"none can be trained again: {error}"
            return None

    def _why_no_own_model(self) -> str:
        run, last = self.run, self.run.rounds
        if not any(row["model"] == GLOBAL for row in self.rows):
            return "the run has no global model; cka_clients compares its clients with each other"
        if run.lost_memory and run.as_it_ran.members is None:
            return (
                f"the clients' memory was in {run.store.root}, which does not exist; client.store=DIR says where it is"
            )
        if not self.thorough.replay_clients and run.unreplayable is None:
            more = f"; evaluate.replay_clients=true trains those of round {last} again"
        else:
            more = f", and {run.unreplayable or self.unreplayed or f'none trained one in round {last}'}"
        return f"the run holds no client's own model beside the global one{more}"

    def _clients(self, family: str) -> bool:
        """Rows of a family without a global model; False where no client has kept one either."""
        kept: list[tuple[int, Findings]] = []
        for partition_id in self.run.partition_ids:  # of any family: a client may keep the report family's too
            if (own := self.run.own_model(partition_id, family)) is not None:
                self.say(f"{family}: the model of client {partition_id}")
                kept.append((partition_id, self.examiner(own)))
        if not kept:
            return False
        control = self._control(family)
        metrics = []
        for partition_id, found in kept:
            cka = linear_cka(found.features, control.features)
            metrics.append({**found.metrics, **self._shard(found, partition_id), "cka_random_init": cka})
            self._row(OWN, family, partition_id, metrics[-1])
        alike = [linear_cka(a.features, b.features) for (_, a), (_, b) in itertools.combinations(kept, 2)]
        together = {"cka_clients": float(np.mean(alike))} if alike else {}
        self._row(CLIENTS, family, None, {**over_clients(metrics), **together})
        shards = self._shards(control, [partition_id for partition_id, _ in kept])
        self._row(RANDOM_INIT, family, None, {**control.metrics, **shards})
        return True

    def _control(self, family: str) -> Findings:
        self.say(f"{family}: random init")
        return self.examiner(self.run.initial(family))

    def _clients_of(self, family: str) -> list[int]:
        return [p for p in self.run.partition_ids if self.run.setup.family(p) == family]

    def _counts(self) -> Tensor | None:
        """(clients, classes): images by client and class; None where they say nothing about the test images."""
        arrays, classes = self.run.partition, self.run.setup.evaluator.train.classes
        if arrays["counts"].size == 0:
            self.absent["shard_linear_top1"] = "the private images have no labels"
        elif tuple(map(str, arrays["classes"])) != classes:
            self.absent["shard_linear_top1"] = "the clients' images are not of the classes that are tested"
        else:
            return torch.from_numpy(arrays["counts"].astype(np.int64))
        return None

    def _shard(self, found: Findings, partition_id: int) -> dict[str, float]:
        if self.counts is None:
            return {}
        return found.on_shards(self.run.setup.evaluator.test_labels, self.counts[partition_id])

    def _shards(self, found: Findings, partition_ids: list[int]) -> dict[str, float]:
        """Mean, minimum and maximum over these clients' distributions; nothing for students without clients."""
        return over_clients([self._shard(found, partition_id) for partition_id in partition_ids])

    def _row(self, model: str, family: str | None, partition_id: int | None, metrics: Mapping[str, float]) -> None:
        self.rows.append({"model": model, "family": family, "partition": partition_id, "metrics": dict(metrics)})


def over_clients(metrics: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric, and its `_min` and `_max`; of a `_std` over draws the mean alone."""
    summary = {}
    for name in metrics[0] if metrics else ():
        values = [row[name] for row in metrics]
        summary[name] = float(np.mean(values))
        if not name.endswith("_std"):
            summary |= {f"{name}_min": min(values), f"{name}_max": max(values)}
    return summary


def _chosen(run: FinishedRun, thorough: Thorough) -> list[str]:
    """The families to measure, the report family first."""
    known = run.setup.families
    for family in thorough.families or ():
        if family not in known:
            raise ConfigError(
                f"evaluate.families names {family!r}; the architectures of {run.run_dir} are {', '.join(known)}."
            )
    report = run.setup.report_family
    return sorted(dict.fromkeys(thorough.families or known), key=lambda family: family != report)
