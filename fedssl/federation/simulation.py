"""One run from configuration to summary; resume; replay.

A simulation opens its own grid; in a deployment the nodes are there already, and the grid comes in (`deployed`).
"""

import contextlib
import copy
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import yaml
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fedssl.config import check_values, fill_in, instantiate
from fedssl.environment import keep_memory, keep_start
from fedssl.errors import ConfigError
from fedssl.evaluate import Plane, extract_features, principal_plane
from fedssl.federation.checkpoint import Checkpoints
from fedssl.federation.client import Broadcast, Client, check_names
from fedssl.federation.client_app import make_client_app
from fedssl.federation.flower_compat import make_context
from fedssl.federation.grids.base import node_config
from fedssl.federation.grids.deployed import DeployedGrid
from fedssl.federation.grids.in_process import InProcess, torch_threads
from fedssl.federation.records import Upload, family_state, load_state
from fedssl.federation.roster import ask_roster
from fedssl.federation.rounds import Rounds, State
from fedssl.federation.setup import Setup, write_members
from fedssl.federation.store import ClientStore
from fedssl.lock import NAME as LOCK
from fedssl.lock import check_free, held
from fedssl.resuming import DEPLOYMENT
from fedssl.tracking import Progress, Tracker, manifest, sitting, warnings_shown_by, write_json, write_text

MAX_MAPPED = 1000  # public images on the map
OTHER_STORE = "choose another folder for each run (in a sweep, leave client.store out)"


def run(config: Mapping[str, Any], *, deployed: DeployedGrid | None = None) -> dict[str, Any]:
    """Run one simulation, or one deployment, from its start.

    Args:
        config: the resolved configuration, as `config.yaml` of a run directory holds it (`fedssl.config.compose`).
        deployed: the way to real clients; None: those that `grid=` simulates.

    Returns:
        What `summary.json` holds. `status` is "stopped" where `max_seconds` ended the run.

    Raises:
        FedSSLError: bad input (`ConfigError`), also another process in the run directory or in `client.store`, or too
            few replies (`TooFewRepliesError`).
    """
    config = _own_copy(config)
    check_values(config)
    run_dir = Path(config["run_dir"])
    in_use = (f"run_dir={run_dir}", f"choose another, or go on with that run by resume={run_dir} when it has ended")
    check_free(run_dir, *in_use)
    _check_empty(run_dir)
    if moved := config["client"].get("store"):
        store = Path(moved).expanduser().absolute()
        config["client"]["store"] = str(store)  # wherever the run is resumed
        check_free(store, f"client.store={store}", OTHER_STORE)
        _check_unclaimed(store)
    setup = _setup(config, None, deployed)
    strategy = build_strategy(setup)
    config["federation"]["report_family"] = setup.report_family  # the one that was chosen, for those who read the run
    _make_writable(run_dir, "run_dir")
    with held(run_dir, *in_use), _held_store(config, run_dir, OTHER_STORE):
        _check_empty(run_dir)  # another may have begun since
        if moved:
            _check_unclaimed(store)
        write_text(run_dir / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
        setup.data.save(run_dir / "partition.npz")
        write_json(run_dir / "manifest.json", manifest(config, data=_digests(setup)))
        if deployed is not None and setup.members is not None:
            write_members(run_dir, deployed.run_id, setup.members)
        return _simulate(setup, strategy, run_dir, deployed)


def resume(config: Mapping[str, Any], run_dir: Path, *, deployed: DeployedGrid | None = None) -> dict[str, Any]:
    """Go on from the newest checkpoint of `run_dir`, or from the start where there is none yet.

    Args:
        config: the run's own configuration, with the overrides that a resume allows.
        run_dir: the run.
        deployed: as for `run`.

    Returns, Raises: as `run`. A data set that is not the one the run began with is a `ConfigError`.
    """
    config = fill_in(config)
    if deployed is None and (run_dir / DEPLOYMENT).is_file():
        raise ConfigError(
            f"{run_dir} is a deployment, whose clients' memory is on their nodes: fedssl-deploy server "
            f"resume={run_dir} goes on with it"
        )
    _make_writable(run_dir, "resume")
    advice = "end it there, or wait until it has ended, and resume again"
    if moved := config["client"].get("store"):
        _make_writable(Path(moved), "client.store")
    with held(run_dir, f"resume={run_dir}", advice), _held_store(config, run_dir, advice):
        setup = _setup(config, run_dir, deployed)
        _check_memory(setup, run_dir)
        strategy = build_strategy(setup)
        manifest_path = run_dir / "manifest.json"
        if manifest_path.exists():
            before = json.loads(manifest_path.read_text())
            if before["data"] != _digests(setup):
                raise ConfigError(
                    f"the images are not those that {run_dir} began with (manifest.json: data): set data.root"
                )
            write_json(manifest_path, {**before, "resumed": [*before.get("resumed", ()), sitting()]})
        else:
            write_json(manifest_path, manifest(config, data=_digests(setup)))
        if not (run_dir / "partition.npz").exists():
            setup.data.save(run_dir / "partition.npz")
        write_text(run_dir / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
        return _simulate(setup, strategy, run_dir, deployed)


def replay(config: Mapping[str, Any], run_dir: Path, *, round_num: int, partition_id: int) -> dict[str, float]:
    """Run one client task of a finished or failed round again, in this process; writes nothing into `run_dir`.

    Returns:
        The metrics of the client's upload.

    Raises:
        ConfigError: the round's base is not kept, or the client was not asked in it.
        Exception: whatever the client raises, with its traceback.
    """
    setup = Setup(fill_in(config), run_dir)
    setup.check()
    replayed = ReplayedRound(setup, run_dir, round_num)
    if partition_id not in replayed.asked:
        raise ConfigError(
            f"replay.partition={partition_id} was not asked in round {round_num}; asked were {replayed.asked}"
        )
    reply, _ = replayed.task(partition_id)
    return {name: float(v) for name, v in reply.content.metric_records["metrics"].items() if isinstance(v, int | float)}


class ReplayedRound:
    """A round of a finished or failed run, whose client tasks can run again in this process; the run stays as it is.

    Args:
        setup: the run's.
        run_dir: where it lies.
        round_num: one of `replayable`.

    Raises:
        ConfigError: the strategy has no client half, or the round's base is not kept.
    """

    def __init__(self, setup: Setup, run_dir: Path, round_num: int) -> None:
        config = setup.config
        if setup.members is not None:
            raise ConfigError(
                f"{run_dir} is a deployment: what its clients have and remember is on their nodes, and so is the log "
                f"of what went wrong there."
            )
        if setup.client_half is None:
            raise ConfigError(
                f"strategy={config['strategy']['name']} asks no client to do anything, so there is no client's task to "
                f"replay in {run_dir}."
            )
        if round_num not in (known := self.replayable(setup, run_dir)):
            raise ConfigError(
                f"replay.round={round_num} would start from the state after round {round_num - 1}, which is not kept; "
                f"rounds that can be replayed: {known}. Kept are the last federation.keep_checkpoints="
                f"{setup.federation.keep_checkpoints} states and the bases of rounds with failures."
            )
        arrays, strategy_state, _ = _checkpoints(setup, run_dir).load(round_num - 1)
        strategy = build_strategy(setup)
        _restore(strategy, strategy_state)
        self._setup = setup
        store = ClientStore(store_root(config, run_dir), writable=False)
        self._app = make_client_app(setup, self._observed, store, explain=False)
        with InProcess().open(
            lambda: self._app,
            num_clients=setup.federation.num_clients,
            threads=setup.local.threads,
            device=config["device"],
        ) as grid:
            partitions = {member.node_id: member.partition_id for member in ask_roster(grid).values()}
            with torch_threads(setup.federation.server_threads):  # it may compute what it sends: part of the result
                messages = list(strategy.configure_train(round_num, arrays, ConfigRecord(), grid))
        self._messages = {partitions[message.metadata.dst_node_id]: message for message in messages}

    @staticmethod
    def replayable(setup: Setup, run_dir: Path) -> list[int]:
        """The rounds of which the base is kept, ascending; none of a deployment, whose clients are elsewhere."""
        if setup.members is not None:
            return []
        return [r + 1 for r in _checkpoints(setup, run_dir).rounds() if r < setup.federation.num_rounds]

    @property
    def asked(self) -> list[int]:
        """The clients that were asked in it."""
        return sorted(self._messages)

    def task(self, partition_id: int) -> tuple[Message, Client]:
        """Run the task of one that was asked; its reply, and the client as its half left it."""
        message = self._messages[partition_id]
        node_id = message.metadata.dst_node_id
        context = make_context(node_id, node_config(node_id, self._setup.federation.num_clients), RecordDict())
        with torch_threads(self._setup.local.threads):  # part of the result
            reply = self._app(message, context)
        return reply, self._client

    def _observed(self, client: Client, broadcast: Broadcast) -> Upload:
        self._client = client
        upload: Upload = self._setup.client_half(client, broadcast)
        return upload


def _own_copy(config: Mapping[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(dict(config))


def _check_empty(run_dir: Path) -> None:
    if run_dir.is_dir() and any(path.name != LOCK for path in run_dir.iterdir()):
        raise ConfigError(
            f"run_dir={run_dir} is not empty: choose another, or go on with the run in it by resume={run_dir}"
        )


def _setup(config: dict[str, Any], run_dir: Path | None, deployed: DeployedGrid | None) -> Setup:
    """The run's parts, checked; those of a deployment know its nodes, for which they wait, and their architectures."""
    setup = Setup(config, run_dir)
    if deployed is not None:
        setup.check(nodes_to_come=True)
        build_strategy(setup)  # what cannot work is said before anybody waits
        members = deployed.join(setup)
        for partition, before in (setup.members or {}).items():
            if members[partition].family != before.family:
                raise ConfigError(
                    f"the node of partition {partition} is now of family {members[partition].family!r}, and the run in "
                    f"{run_dir} began with {before.family!r} (family= of the node)"
                )
        config["federation"]["families"] = [members[p].family for p in sorted(members)]
        setup = Setup(config, run_dir, members)
    setup.check()
    return setup


# --- parts -------------------------------------------------------------------------------------------------------
def build_strategy(setup: Setup) -> Strategy:
    """The server half that the configuration names."""
    strategy = instantiate(setup.config["strategy"]["server"], server=setup.server())
    _ = setup.client_half  # bad client settings are bad input, not a failure of every client
    if not isinstance(strategy, Strategy):
        raise ConfigError(f"strategy.server must be a flwr.serverapp.strategy.Strategy, got {type(strategy).__name__}")
    return strategy


def store_root(config: Mapping[str, Any], run_dir: Path) -> Path:
    """Where the clients' memory lies: `client.store=`, or the run directory."""
    moved = config["client"].get("store")
    return Path(moved).expanduser() if moved else run_dir / "clients"


@contextlib.contextmanager
def _held_store(config: Mapping[str, Any], run_dir: Path, advice: str) -> Iterator[None]:
    """Inside, no other run has this one's `client.store`, which is there; the clients' own writes need no lock."""
    folder = store_root(config, run_dir)
    if config["client"].get("store") and folder.resolve() != run_dir.resolve():  # which is held already
        with held(folder, f"client.store={folder}", advice):
            yield
    else:
        yield


def _check_unclaimed(folder: Path) -> None:
    """Refuse a folder with the memory of another run: this run's clients would read it as their own."""
    _make_writable(folder, "client.store")
    if any(path.name != LOCK for path in folder.iterdir()):
        raise ConfigError(
            f"client.store={folder} is not empty, so it may hold what the clients of another run remember: "
            f"{OTHER_STORE}, or go on with the other run by resume="
        )


def _check_memory(setup: Setup, run_dir: Path) -> None:
    """Refuse clients' memories that this version cannot read."""
    store = ClientStore(store_root(setup.config, run_dir), writable=False)
    after = max(_checkpoints(setup, run_dir).rounds(), default=0)
    for partition_id in setup.data.training_partitions:
        with contextlib.suppress(SafetensorError):  # damaged: that client will fail by it, and say so
            names = store.names(partition_id, before=after + 1)
            check_names(names, setup.families, f"the memory of client {partition_id} in {store.root}")


def _make_writable(folder: Path, key: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{key}={folder} cannot be written: {error.strerror or error}. Name a folder in which files may be made."
        ) from error


def load_client_app(config: Mapping[str, Any], run_dir: Path) -> Any:
    """The `ClientApp` of a run, built where the clients run (a Ray worker imports this by name)."""
    setup = Setup(config, run_dir)
    return make_client_app(setup, setup.client_half, ClientStore(store_root(config, run_dir)))


@contextlib.contextmanager
def _open_grid(setup: Setup, run_dir: Path) -> Iterator[Grid]:
    """The configured grid; a strategy without client half needs none, so it does not wait for Ray to start."""
    config = setup.config
    settings = InProcess() if config["strategy"]["client"] is None else instantiate(config["grid"])
    if isinstance(settings, InProcess):
        app = make_client_app(setup, setup.client_half, ClientStore(store_root(config, run_dir)))
        load_app = lambda: app  # noqa: E731
    else:
        load_app = partial(load_client_app, dict(config), run_dir.resolve())
    grid = settings.open(
        load_app,
        num_clients=setup.federation.num_clients,
        threads=setup.local.threads,
        device=config["device"],
    )
    with grid:
        if measured := getattr(grid, "gpu_memory", None):
            path = run_dir / "manifest.json"
            write_json(path, {**json.loads(path.read_text()), "gpu_memory": measured})
        yield grid


def _simulate(setup: Setup, strategy: Strategy, run_dir: Path, deployed: DeployedGrid | None) -> dict[str, Any]:
    """From the newest checkpoint, or the start, to the summary; a run that is killed on the way has none."""
    keep_memory(of_threads=True)  # for the server's distillation and probes, and for clients in this process
    checkpoints = _checkpoints(setup, run_dir)
    state: State | None = None
    if rounds := checkpoints.rounds():
        arrays, strategy_state, progressed = checkpoints.load(rounds[-1])
        _restore(strategy, strategy_state)
        state = State(arrays=arrays, progressed=progressed)
    (run_dir / "summary.json").unlink(missing_ok=True)  # of the sitting before
    try:
        state, status = _work(setup, strategy, run_dir, checkpoints, state, deployed)
    except (Exception, KeyboardInterrupt, SystemExit) as error:  # the last is how Flower ends a ServerApp
        if rounds := checkpoints.rounds():
            arrays, _, progressed = checkpoints.load(rounds[-1])
            newest = State(arrays=arrays, progressed=progressed)
            ended = "failed" if isinstance(error, Exception) else "stopped"
            _finish(setup, strategy, run_dir, newest, ended)
        raise
    return _finish(setup, strategy, run_dir, state, status)


def _work(
    setup: Setup,
    strategy: Strategy,
    run_dir: Path,
    checkpoints: Checkpoints,
    state: State | None,
    deployed: DeployedGrid | None,
) -> tuple[State, str]:
    """The rounds after `state` (None: all, and the initial evaluation); returns the last state and how it ended."""
    started = time.monotonic()
    config, federation = setup.config, setup.federation
    title = f"{config['strategy']['name']} on {config['data']['name']}"
    max_seconds = config.get("max_seconds")
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(
            Progress(federation.num_rounds, title=title, first_round=state.round_num + 1 if state else 1)
        )
        stack.enter_context(warnings_shown_by(progress))
        stack.enter_context(torch_threads(federation.server_threads))
        tracker = stack.enter_context(Tracker(run_dir, offset=state.progressed.metrics_offset if state else 0))
        if state and state.round_num > 0:
            tracker.row(state.round_num, "server", state.progressed.server_row)
        progress.phase("starting")
        grid = deployed or stack.enter_context(_open_grid(setup, run_dir))
        loop = Rounds(
            setup=setup,
            strategy=strategy,
            grid=grid,
            tracker=tracker,
            progress=progress,
            checkpoints=checkpoints,
            store=ClientStore(store_root(config, run_dir)),
            replay_hint=None
            if deployed
            else f"fedssl replay.run={run_dir} replay.round={{round}} replay.partition={{partition}}",
        )
        strategy.summary()
        stack.enter_context(keep_start())
        deadline = None if max_seconds is None else started + float(max_seconds)
        state = state or loop.initialise(setup.server().initial_arrays(), started)
        return loop.run(state, deadline=deadline)


def _finish(setup: Setup, strategy: Strategy, run_dir: Path, state: State, status: str) -> dict[str, Any]:
    if status == "completed" and state.progressed.global_model:
        save_models(setup, state.arrays, run_dir / "models")
        save_public_map(setup, state.arrays, run_dir / "public_map.npz")
    summary = summarise(setup, strategy, state, status)
    write_json(run_dir / "summary.json", summary)
    return summary


def summarise(setup: Setup, strategy: Strategy, state: State, status: str) -> dict[str, Any]:
    """What `summary.json` holds after the last finished round; `notes` is what the strategy has to say of itself."""
    progressed = state.progressed
    families = {
        family: {**metrics, "num_clients": int(metrics.get("num_clients", progressed.num_trained.get(family, 0)))}
        for family, metrics in progressed.evaluation.items()
    }
    reported = {k: v for k, v in families.get(setup.report_family, {}).items() if k != "num_clients"}
    return {
        "status": status,
        "strategy": setup.config["strategy"]["name"],
        "data": setup.config["data"]["name"],
        "seed": setup.seed,
        "rounds": progressed.round_num,
        "report_family": setup.report_family,
        **reported,
        "families": families,
        "notes": strategy.notes() if hasattr(strategy, "notes") else [],
        "uplink_bytes": progressed.uplink_bytes,
        "downlink_bytes": progressed.downlink_bytes,
        "wall_seconds": progressed.wall_seconds,
        "simulated_seconds": progressed.simulated_seconds,
    }


def save_models(setup: Setup, arrays: ArrayRecord, folder: Path) -> None:
    """`<family>.safetensors` for every family with a global model."""
    folder.mkdir(exist_ok=True)
    for family in setup.families:
        if state := family_state(arrays, family):
            save_file({name: value.contiguous() for name, value in state.items()}, folder / f"{family}.safetensors")


def save_public_map(setup: Setup, arrays: ArrayRecord, path: Path) -> None:
    """Write `public_map.npz`: where the report family's network puts public images, before and after training.

    Arrays: `initial` and `trained`, (n, 2) coordinates of the first n = min(1000, all) public images (their order is
    random); `initial_shares` and `trained_shares`, (2,) shares of the variance along the two axes
    (`fedssl.evaluate.principal_plane`); `labels` (n,) and `classes` (names), empty where the images have no labels;
    `family`, the network's. There is no file where the family has no global model, or features that are not finite.
    """
    family = setup.report_family
    if not (state := family_state(arrays, family)):
        return
    images = setup.labelled_public_images()
    images = images.subset(range(min(len(images), MAX_MAPPED)))
    model = setup.build_model(family)

    def plane() -> Plane | None:
        backbone = model.backbone.to(setup.device)
        features = extract_features(backbone, images, setup.views, setup.evaluation.batch_size, setup.device)
        return principal_plane(features)

    with torch_threads(setup.federation.server_threads):
        initial = plane()
        load_state(model, state)
        trained = plane()
    if initial is None or trained is None:
        return
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}")
    with unfinished.open("wb") as file:
        np.savez_compressed(
            file,
            initial=initial.coordinates.numpy(),
            initial_shares=initial.shares.numpy(),
            trained=trained.coordinates.numpy(),
            trained_shares=trained.shares.numpy(),
            labels=np.empty(0, np.int64) if images.labels is None else images.labels,
            classes=np.array(images.classes, dtype=np.str_),
            family=np.array(family),
        )
    unfinished.replace(path)


def load_encoder(run_dir: Path, family: str | None) -> nn.Module:
    """See `fedssl.load_encoder`."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir} is no run directory: it has no config.yaml")
    setup = Setup(fill_in(yaml.safe_load(path.read_text())), run_dir)
    family = family or setup.federation.report_family or setup.report_family  # config.yaml names it, without the data
    weights = run_dir / "models" / f"{family}.safetensors"
    if not weights.is_file():
        known = sorted(file.stem for file in (run_dir / "models").glob("*.safetensors"))
        raise ConfigError(
            f"{run_dir} has no global model of {family!r}; it has {known or 'none'}. Only completed runs of strategies "
            f"with a global model keep one."
        )
    model = setup.build_model(family)
    load_state(model, load_file(weights))
    return model.backbone.eval()


def _checkpoints(setup: Setup, run_dir: Path) -> Checkpoints:
    return Checkpoints(run_dir / "checkpoints", keep=setup.federation.keep_checkpoints)


def _restore(strategy: Strategy, state: Mapping[str, Any]) -> None:
    if hasattr(strategy, "load_state_dict"):
        strategy.load_state_dict(state)


def _digests(setup: Setup) -> dict[str, str]:
    """sha256 of the images that the run is made of."""
    train, test = setup.probe_data
    sets = {image_set.name: image_set.digest for image_set in (setup.train, train, test)}
    return {**sets, "public set": setup.public_set.fingerprint}
