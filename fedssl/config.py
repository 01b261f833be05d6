"""Composing and instantiating: beside `__main__`, the only file that knows Hydra.

A *resolved* configuration is a plain mapping (numbers, strings, lists, mappings) without interpolations: what
`config.yaml` of a run directory holds and what workers receive.
"""

import collections.abc
import copy
import difflib
import inspect
import json
import math
import pkgutil
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from fedssl.errors import ConfigError
from fedssl.targets import check_allowed

CONFIG_NAME = "config"
EVALUATION_NAME = "evaluation"
AS_BEFORE_NAME = "as_before"
NODE_NAME = "node"
NODE_KEYS = (
    "partition_id", "data", "rehearsal_root", "public", "evaluate", "method", "family", "device", "store",
    "allow_targets",
)  # fmt: skip
FOR_STRATEGIES = ("codec", "distill", "downlink", "embedding", "ensemble")  # read by strategies that refer to them
OF_THE_ROUNDS = ("_target_", "every", "source")  # keys of a run's `evaluate` that mean nothing once it is over
OF_A_FINISHED_RUN = ("device", "data.root", "client.store")  # where it is evaluated, and where its files are now

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException)

OmegaConf.register_new_resolver("fedssl.first", lambda a, b: b if a is None else a, replace=True)


def conf_dir() -> Path:
    """The folder of the YAML files: a checkout's own `conf/`, or the copy that a wheel carries."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "conf"


def compose(overrides: Sequence[str] = (), *, config_dir: Path | None = None) -> dict[str, Any]:
    """The resolved configuration of `fedssl <overrides>`, for use from Python.

    Args:
        overrides: Hydra overrides, e.g. `["strategy=fedavg", "federation.num_rounds=3"]`.
        config_dir: an additional folder of YAML files, as `--config-dir`.

    Raises:
        ConfigError: an unknown key or choice.
    """
    GlobalHydra.instance().clear()
    overrides = list(overrides)
    if config_dir is not None:
        overrides.append(f"hydra.searchpath=[file://{config_dir.resolve()}]")
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = hydra.compose(CONFIG_NAME, overrides, return_hydra_config=True)
            replayed = any(value is not None for value in config.replay.values())
            if config.resume is not None or replayed or config.sweep.jobs != 1:
                raise ConfigError(
                    "sweep.jobs=, resume= and replay.*= are for the command fedssl, not for composing a new run"
                )
            if config.run_dir is None:
                HydraConfig.instance().set_config(config)  # the default names time and strategy
                config.run_dir = config.hydra.run.dir
            return resolve(config, config.hydra)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(message_of(error)) from error


def resolve(config: DictConfig, hydra_config: HydraConf | DictConfig) -> dict[str, Any]:
    """Resolve every interpolation and put in what only the composition knows.

    That is the strategy's name (the chosen YAML's), what goes with the ensemble, and what other keys name: the sources
    of `public.data` and `evaluate.data` (files of conf/data), the methods of `client.methods` (files of conf/method). A
    preset's values for a group do not outlive the group: `experiment=... partition=iid` has nothing of the preset's
    partition.

    Args:
        config: composed, inside an initialised Hydra.
        hydra_config: Hydra's own node, with choices and overrides.

    Raises:
        ConfigError: a group is missing, or a source does not exist.
    """
    choices = {str(group): choice for group, choice in hydra_config.runtime.choices.items()}
    config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    _check_groups(config)
    search_path = [o for o in hydra_config.overrides.hydra if o.split("=")[0] == "hydra.searchpath"]  # a user's folder
    if choices.get("experiment") is not None:
        _let_chosen_groups_win(config, choices, list(hydra_config.overrides.task), search_path)
    _fill_in_what_goes_together(config, search_path)
    _check_normalisation(config)
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    for key in SAID_TO_THE_COMMAND:
        del resolved[key]
    resolved["strategy"]["name"] = choices["strategy"]
    if isinstance(named := resolved["client"]["methods"], list):
        run = {choices["method"]: resolved["method"]}  # with what the command line said of it
        resolved["client"]["methods"] = [run.get(str(name)) or _method(name, search_path) for name in named]
    public, evaluate = resolved["public"], resolved["evaluate"]
    if "data" in public:
        named = public.pop("data"), public.pop("root"), public.pop("image_size")
        public["source"] = _named_source("public", *named, search_path)
    if evaluate["data"] is not None:
        image_size = resolved["data"]["image_size"]
        evaluate["source"] = _named_source("evaluate", evaluate["data"], evaluate["root"], image_size, search_path)
    return {str(key): value for key, value in resolved.items()}


def unread(config: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Those overrides of what is exchanged and distilled that the chosen strategy's YAML does not refer to.

    Args:
        config: composed, interpolations not resolved.
        overrides: as given.
    """
    text = OmegaConf.to_yaml(config.strategy)
    if "${codec" in text:
        text += OmegaConf.to_yaml(config.codec)
    idle = [key for key in FOR_STRATEGIES if f"${{{key}" not in text]
    return [override for override in overrides if override.lstrip("+").split("=")[0].split(".")[0] in idle]


def _fill_in_what_goes_together(config: DictConfig, search_path: Sequence[str]) -> None:
    """Fill in `embedding`, `distill.loss` and `distill.views` where they are null.

    Rows that sum to 1 are the paper's path. A student that learns coordinates of photographs sees them shifted and
    mirrored only: with the run's strong colours it is no better than one that untrained clients teach
    (benchmarks/flesd_study.md).
    """
    kernel = config.ensemble.get("_target_") == KERNEL_RULE
    if config.distill.loss is None:
        config.distill.loss = "coordinates" if kernel else "ce"
    if config.embedding is None:
        config.embedding = "backbone" if kernel else "projector"
    photographs = config.views.get("_target_") == COLOUR_VIEWS
    if config.distill.views is None and config.distill.loss == "coordinates" and photographs:
        same = {key: config.views[key] for key in ("flip_probability", "mean", "std")}
        shift = hydra.compose("views/shift", list(search_path)).views
        config.distill.views = OmegaConf.merge(shift, same)


def _check_normalisation(config: DictConfig) -> None:
    """A student is distilled on inputs like those on which it is trained, embedded and evaluated."""
    student, usual = config.distill.views, config.views
    if not isinstance(student, DictConfig) or "${distill" not in OmegaConf.to_yaml(config.strategy):  # nobody reads it
        return
    numbers = {key: (student.get(key), usual.get(key)) for key in ("mean", "std")}
    both = {key: pair for key, pair in numbers.items() if all(isinstance(one, ListConfig) for one in pair)}
    if unlike := {key: (one, other) for key, (one, other) in both.items() if one != other and len(other) == 3}:
        said = " and ".join(
            f"distill.views.{key} is {one}, views.{key} {other}" for key, (one, other) in unlike.items()
        )
        alike = " ".join(f"distill.views.{key}={other}".replace(" ", "") for key, (_, other) in unlike.items())
        raise ConfigError(
            f"{said}: a student would learn on other inputs than it is evaluated on. Set {alike}, or "
            f"distill.views=null."
        )


def _let_chosen_groups_win(
    config: DictConfig, choices: Mapping[str, Any], overrides: Sequence[str], search_path: Sequence[str]
) -> None:
    """Replace every group of which the preset had chosen another file by what it is without the preset."""
    if not choices.keys() & {override.lstrip("+~").split("=")[0] for override in overrides} - {"experiment"}:
        return  # no file was chosen beside the preset's; what follows composes twice, .13 s each
    named = [f"experiment={choices['experiment']}", *search_path]
    preset = hydra.compose(CONFIG_NAME, named, return_hydra_config=True)
    chosen = [group for group in GROUPS if choices[group] != preset.hydra.runtime.choices[group]]
    if not chosen:  # without the preset, values of what only the preset chooses would be unknown keys
        return
    values = [override for override in overrides if override.split("=")[0] not in (*choices, "experiment")]
    files = [f"{group}={choices[group]}" for group in GROUPS]
    plain = hydra.compose(CONFIG_NAME, [*files, *values, *search_path])
    for group in chosen:
        config[group] = plain[group]


def _named_source(
    group: str, name: Any, root: str | None, image_size: int, search_path: Sequence[str]
) -> dict[str, Any]:
    """The node of conf/data/<name>.yaml, decoded at `image_size` pixels."""
    if not isinstance(name, str):  # Hydra would end with a traceback
        raise ConfigError(f"{group}.data must be a name of conf/data, e.g. cifar10, got {name!r}.")
    source = hydra.compose(CONFIG_NAME, [f"data={name}", *search_path]).data
    OmegaConf.set_struct(source, False)
    if root is not None:
        if "root" not in source:
            raise ConfigError(f"{group}.root={root}: {group}.data={name} reads no files, leave {group}.root out.")
        source.root = root
    source.image_size = image_size
    resolved = OmegaConf.to_container(source, resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def fill_in(config: Mapping[str, Any], *, over: bool = False) -> dict[str, Any]:
    """A configuration as a run has saved it, with the settings that have come since (conf/as_before.yaml).

    Args:
        config: resolved.
        over: also those that it has: a configuration of today as a run from before would have it.
    """
    as_before = _as_before()
    filled = _filled(config, as_before["keys"], over)
    return {key: _of_targets(value, as_before["targets"], over) for key, value in filled.items()}


def without_as_before(config: Mapping[str, Any]) -> dict[str, Any]:
    """The opposite of `fill_in`: without the settings that have the value of conf/as_before.yaml.

    What it returns for a configuration does not change when a setting comes that means nothing new by its default.
    """
    as_before = _as_before()
    emptied = _of_targets_emptied(_emptied(config, as_before["keys"]), as_before["targets"])
    assert isinstance(emptied, dict)
    return emptied


def _emptied(node: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    both = [key for key in before if isinstance(before[key], Mapping) and isinstance(node.get(key), Mapping)]
    emptied = {**node, **{key: _emptied(node[key], before[key]) for key in both}}
    return {key: value for key, value in emptied.items() if key not in before or value not in (before[key], {})}


def _of_targets_emptied(node: Any, targets: Mapping[str, Mapping[str, Any]]) -> Any:
    if isinstance(node, Mapping):
        before = targets.get(str(node.get("_target_")), {})
        own = {key: _of_targets_emptied(value, targets) for key, value in node.items()}
        return {key: value for key, value in own.items() if key not in before or value != before[key]}
    return [_of_targets_emptied(value, targets) for value in node] if isinstance(node, list) else node


@cache
def _as_before() -> dict[str, Any]:
    node: dict[str, Any] = yaml.safe_load((conf_dir() / f"{AS_BEFORE_NAME}.yaml").read_text())
    return node


def _filled(saved: Mapping[str, Any], node: Mapping[str, Any], over: bool) -> dict[str, Any]:
    added = {key: copy.deepcopy(value) for key, value in node.items() if over or key not in saved}
    both = [key for key in node if isinstance(node[key], Mapping) and isinstance(saved.get(key), Mapping)]
    return {**saved, **added, **{key: _filled(saved[key], node[key], over) for key in both}}


def _of_targets(node: Any, targets: Mapping[str, Mapping[str, Any]], over: bool) -> Any:
    if isinstance(node, Mapping):
        added = targets.get(str(node.get("_target_")), {})
        own = {key: _of_targets(value, targets, over) for key, value in node.items()}
        return {**own, **added} if over else {**added, **own}
    return [_of_targets(value, targets, over) for value in node] if isinstance(node, list) else node


def overridden(config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A resolved configuration with the values that overrides `key=value` give; every key must be there already.

    Raises:
        ConfigError: an unknown key, a group instead of one of its values, or an override that is no value (a sweep, a
            deletion, half a list).
    """
    changed: dict[str, Any] = json.loads(json.dumps(config))
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise ConfigError(f"{text} is no override as in key=value: {message_of(error)}") from error
        if override.is_sweep_override() or override.is_delete():
            raise ConfigError(f"{override.input_line}: here an override gives one value, as in key=value")
        *path, last = override.key_or_group.split(".")
        node: Any = changed
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            known = f"; {'.'.join(path)} has {', '.join(node)}" if isinstance(node, dict) else ""
            raise ConfigError(f"{override.input_line}: the run has no such key{known}")
        if isinstance(node[last], dict):
            group, names = override.key_or_group, [name for name in node[last] if name != "_target_"]
            raise ConfigError(
                f"{override.input_line}: {group} is a group of settings; override one of them, {', '.join(names)}, "
                f"as in {group}.<key>=..."
            )
        node[last] = override.value()
    return changed


def compose_evaluation(
    config: Mapping[str, Any], overrides: Sequence[str], *, config_dir: Path | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `fedssl-evaluate RUN <overrides>` is made of.

    Args:
        config: the run's own, as its `config.yaml` holds it.
        overrides: of `evaluate.*` (the run's probes, and the keys of conf/evaluation.yaml), `device`, `data.root`,
            `client.store`.
        config_dir: an additional folder of YAML files, for `evaluate.data`.

    Returns:
        The run's configuration with its probes, device and folders as overridden, and the node of conf/evaluation.yaml.

    Raises:
        ConfigError: a key that there is not, a value of another type, or an unknown data set.
    """
    for override in overrides:
        key = override.split("=", 1)[0]
        if "=" not in override or not (key.startswith("evaluate.") or key in OF_A_FINISHED_RUN):
            raise ConfigError(
                f"{override}: a finished run stays as it is; its evaluation takes evaluate.<key>=..., device=, "
                f"data.root= and client.store=. fedssl-evaluate --help lists the keys."
            )
    node = yaml.safe_load((conf_dir() / f"{EVALUATION_NAME}.yaml").read_text())
    probes = {key: value for key, value in config["evaluate"].items() if key not in OF_THE_ROUNDS}
    merged = {**probes, **{key: value for key, value in node.items() if key != "_target_"}}
    changed = overridden({**config, "evaluate": merged}, overrides)
    chosen = changed["evaluate"]
    node |= {key: chosen.pop(key) for key in node if key != "_target_"}
    changed["evaluate"] = {**config["evaluate"], **chosen}
    if any(chosen[key] != config["evaluate"][key] for key in ("data", "root")):
        changed["evaluate"].pop("source", None)
    if chosen["data"] is not None and "source" not in changed["evaluate"]:
        search_path = [] if config_dir is None else [f"hydra.searchpath=[file://{config_dir.resolve()}]"]
        GlobalHydra.instance().clear()
        try:
            with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
                changed["evaluate"]["source"] = _named_source(
                    "evaluate", chosen["data"], chosen["root"], changed["data"]["image_size"], search_path
                )
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(message_of(error)) from error
    check_values(changed)
    _check_node({"evaluate": node}, "", {})
    return changed, node


def compose_node(overrides: Sequence[str], *, config_dir: Path | None = None) -> dict[str, Any]:
    """What `fedssl-deploy client SERVER <overrides>` brings to a federation: conf/node.yaml with the overrides.

    Args:
        overrides: Hydra overrides.
        config_dir: an additional folder of YAML files, for `data` and `method`.

    Returns:
        What `fedssl.deploy.node.Node` takes: `data`, `public.data` and `method` as nodes with `_target_`, or None.

    Raises:
        ConfigError: an unknown key or choice, or no partition_id.
    """
    GlobalHydra.instance().clear()
    search_path = [] if config_dir is None else [f"hydra.searchpath=[file://{config_dir.resolve()}]"]
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            composed = hydra.compose(NODE_NAME, [*overrides, *search_path])
            composed = OmegaConf.masked_copy(
                composed, [key for key in NODE_KEYS if key in composed or OmegaConf.is_missing(composed, key)]
            )
            node = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
            assert isinstance(node, dict)
            image_size = 32  # the run's own is put in its place
            for copy_of in ("public", "evaluate"):
                data, root = node[copy_of]["data"], node[copy_of]["root"]
                if data is not None:
                    node[copy_of]["data"] = _named_source(copy_of, data, root, image_size, search_path)
            whole: dict[str, Any] = {"data": None, "method": None, **{str(key): value for key, value in node.items()}}
            _check_node(whole, "", _annotations({"_target_": "fedssl.deploy.node.Node"}, "node"))
            return whole
    except COMPOSITION_ERRORS as error:
        raise ConfigError(message_of(error)) from error


def _method(name: Any, search_path: Sequence[str]) -> Any:
    """The node of conf/method/<name>.yaml; what is a node already stays as it is."""
    if isinstance(name, Mapping) and "_target_" in name:
        return name
    if not isinstance(name, str):
        raise ConfigError(
            f"client.methods must be a list of names of conf/method, e.g. [simclr,info_nce], or null, got {name!r}."
        )
    try:
        config = hydra.compose(CONFIG_NAME, [f"method={name}", *search_path])
    except MissingConfigException as error:
        raise ConfigError(f"client.methods: {message_of(error)}") from None
    return OmegaConf.to_container(config.method, resolve=True)


def instantiate(node: Any, **arguments: Any) -> Any:
    """Build what a node's `_target_` names, and what the nodes inside it name.

    Args:
        node: a resolved mapping with `_target_`, or a value without, which is returned as it is.
        arguments: further arguments of the outermost target.

    Raises:
        ConfigError: the target does not exist, is not allowed here (`fedssl.targets`), or refuses its arguments.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        return node
    check_allowed(node)
    try:
        # Arguments are not handed to Hydra: it would turn a dataclass into a mapping.
        build = hydra.utils.instantiate(dict(node), _convert_="all", _partial_=True)
        return build(**arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise ConfigError(f"cannot build {node['_target_']}: {message_of(error)}") from error
    except ConfigError:
        raise
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"cannot build {node['_target_']}: {error}") from error


# What the keys are that no `_target_` takes.
TOP_LEVEL: dict[str, Any] = {
    "seed": int,
    "device": str,
    "downlink": str,
    "embedding": str,
    "max_seconds": float | None,
    "run_dir": str,
}
COLOUR_VIEWS = "fedssl.data.views.ColourViews"
KERNEL_RULE = "fedssl.ensemble.MeanKernel"  # by name: to print a configuration takes no torch
SAID_TO_THE_COMMAND = ("resume", "replay", "sweep")  # no part of a run
CLIENT_STORE = {"store": str | None}
STRATEGY = ("name", "client", "server")
MAX_SEED = 2**63 - 1
GROUPS = (
    "views", "data", "partition", "public", "models", "projector", "method", "client", "codec", "ensemble", "distill",
    "strategy", "federation", "evaluate", "grid",
)  # fmt: skip


def check_values(config: Mapping[str, Any]) -> None:
    """Hold every value against the parameter of its `_target_` that it is for, before anything is built.

    YAML and the command line know numbers, text, flags, null, lists and mappings; a parameter says by its annotation
    which of them it takes. Parameters of other types (a model, a codec) are left to their own checks.

    Args:
        config: a whole resolved configuration.

    Raises:
        ConfigError: a key that nothing reads, a value of another type, a target that cannot be imported, or no value
            at all.
    """
    check_allowed(config)
    _check_groups(config)
    _check_node({"data": config["data"], **config}, "", TOP_LEVEL)  # its image_size is repeated in others
    if not 0 <= config["seed"] <= MAX_SEED:
        raise ConfigError(f"seed must be between 0 and {MAX_SEED} (2**63 - 1), got {config['seed']}")


def _check_groups(config: Mapping[Any, Any]) -> None:
    """Every group is there, nothing besides, and every node says by `_target_` what to build."""
    missing = [key for key in (*TOP_LEVEL, *GROUPS) if key not in config]
    if missing:
        raise ConfigError(f"the configuration has no {', '.join(missing)}: conf/config.yaml lists what a run needs.")
    known = (*TOP_LEVEL, *GROUPS, *SAID_TO_THE_COMMAND)
    for key in config:
        if key not in known:
            raise ConfigError(_unknown_key(str(key), str(key), known))
    for group in GROUPS:
        node = config[group]
        if not isinstance(node, Mapping):
            raise ConfigError(f"{group} must be a mapping, as in the files of conf/{group}, got {node!r}")
        if group not in ("models", "strategy") and "_target_" not in node:
            raise ConfigError(
                f"{group} has no _target_, the Python path of what to build: see the files of conf/{group}"
            )
    strategy = config["strategy"]
    for key in strategy:
        if key not in STRATEGY:
            raise ConfigError(_unknown_key(f"strategy.{key}", str(key), STRATEGY))
    for half in ("client", "server"):
        if half not in strategy:
            raise ConfigError(
                f"strategy has no {half}: see the files of conf/strategy (client: null where none trains)"
            )


def _check_node(node: Mapping[str, Any], where: str, annotations: Mapping[str, Any]) -> None:
    for name, value in node.items():
        key = f"{where}.{name}" if where else name
        if name in annotations and not _fits(value, annotations[name]):
            raise ConfigError(
                f"{key} must be {_in_words(annotations[name])}, got {json.dumps(value)}. "
                f"Change it on the command line ({key}=...) or in its file under conf/."
            )
        if isinstance(value, Mapping):
            _check_node(value, key, _annotations(value, key) | (CLIENT_STORE if key == "client" else {}))


def _annotations(node: Mapping[str, Any], where: str) -> dict[str, Any]:
    """By name, the parameters of what the node's `_target_` names; none where they cannot be known."""
    if "_target_" not in node:
        return {}
    try:
        target = pkgutil.resolve_name(node["_target_"])
    except Exception as error:  # importing runs the module: anything can happen
        raise ConfigError(
            f"{where}._target_={node['_target_']} cannot be imported: {error}. It is the Python path of a "
            f"class or function: in an installed package, or in the folder where the command is started."
        ) from error
    try:
        parameters = inspect.signature(target, eval_str=True).parameters
    except (NameError, TypeError, ValueError):  # an annotation that names nothing; a builtin without signature
        return {}
    return {name: parameter.annotation for name, parameter in parameters.items()}


def _fits(value: Any, annotation: Any) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, argument) for argument in arguments)
    if origin in (collections.abc.Sequence, list, tuple):
        return isinstance(value, list | tuple) and all(_fits(item, arguments[0]) for item in value)
    if origin is collections.abc.Mapping:
        return isinstance(value, Mapping) and all(_fits(item, arguments[1]) for item in value.values())
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (None, types.NoneType):
        return value is None
    return annotation not in _WORDS or isinstance(value, annotation)


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    types.NoneType: "null",
}


def _in_words(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_in_words(argument) for argument in arguments)
    if origin in (collections.abc.Sequence, list, tuple):
        return f"a list [...] of {_in_words(arguments[0]).removeprefix('a ').replace('number', 'numbers')}"
    if origin is collections.abc.Mapping:
        return f"a mapping {{name: {_in_words(arguments[1])}}}"
    return _WORDS.get(annotation, str(annotation))


def message_of(error: BaseException) -> str:
    """What a person needs of a Hydra or OmegaConf error, without a traceback: what was given and what would work."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return f"{group}={choice}: there is no such choice. {group} may be {', '.join(error.options)}."
    cause = error.__cause__
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and isinstance(cause.parent_node, DictConfig):
        return _unknown_key(str(cause.full_key), str(cause.key), [str(name) for name in cause.parent_node])
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no default: set {error.full_key}=..."
    if isinstance(error, OmegaConfBaseException) and error.msg and error.full_key:
        return f"{error.full_key}: {error.msg.splitlines()[0]}"
    text = str(error).strip()
    if cause is not None and str(cause) and str(cause) not in text:
        text += f"\n{cause}"
    return text


def _unknown_key(full_key: str, key: str, siblings: Sequence[str]) -> str:
    prefix = full_key.removesuffix(key)
    known = [name for name in siblings if not name.startswith("_") and name != "hydra"]
    similar = difflib.get_close_matches(key, known, n=1)
    hint = f" Did you mean {prefix}{similar[0]}?" if similar else ""
    under = f"{prefix[:-1]} has" if prefix else "There are"
    return f"there is no key {full_key}.{hint} {under} {', '.join(known) or 'no keys'}."
