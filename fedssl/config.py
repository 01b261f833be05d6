"""Composing and instantiating: beside `__main__`, the only file that knows Hydra.

A *resolved* configuration is a plain mapping (numbers, strings, lists, mappings) without interpolations: what
`config.yaml` of a run directory holds and what workers receive.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedssl.errors import ConfigError

CONFIG_NAME = "config"


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
            choices = OmegaConf.to_container(config.hydra.runtime.choices)
            assert isinstance(choices, dict)
            return resolve(config, choices)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(message_of(error)) from error


def resolve(config: DictConfig, choices: Mapping[Any, Any]) -> dict[str, Any]:
    """Resolve every interpolation and put in what only the composition knows.

    That is the strategy's name (the chosen YAML's), and the sources that `public.data` and `evaluate.data` name
    (files of conf/data).

    Args:
        config: composed, inside an initialised Hydra.
        choices: Hydra's group choices.
    """
    config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    resolved["strategy"]["name"] = choices["strategy"]
    public, evaluate = resolved["public"], resolved["evaluate"]
    image_size = int(resolved["data"]["image_size"])
    if "data" in public:
        public["source"] = _named_source(public.pop("data"), public.pop("root"), public.pop("image_size"))
    if evaluate["data"] is not None:
        evaluate["source"] = _named_source(evaluate["data"], evaluate["root"], image_size)
    return {str(key): value for key, value in resolved.items()}


def _named_source(name: str, root: str | None, image_size: int) -> dict[str, Any]:
    """The node of conf/data/<name>.yaml, decoded at `image_size` pixels."""
    source = hydra.compose(CONFIG_NAME, [f"data={name}"]).data
    OmegaConf.set_struct(source, False)
    if root is not None:
        source.root = root
    source.image_size = image_size
    resolved = OmegaConf.to_container(source, resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def instantiate(node: Any, **arguments: Any) -> Any:
    """Build what a node's `_target_` names, and what the nodes inside it name.

    Args:
        node: a resolved mapping with `_target_`, or a value without, which is returned as it is.
        arguments: further arguments of the outermost target.

    Raises:
        ConfigError: the target does not exist, or refuses its arguments.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        return node
    try:
        # Arguments are not handed to Hydra: it would turn a dataclass into a mapping.
        build = hydra.utils.instantiate(dict(node), _convert_="all", _partial_=True)
        return build(**arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise ConfigError(f"cannot build {node['_target_']}: {message_of(error)}") from error
    except TypeError as error:
        raise ConfigError(f"cannot build {node['_target_']}: {error}") from error


def message_of(error: BaseException) -> str:
    """What a person needs of a Hydra or OmegaConf error: its message and its cause's, without a traceback."""
    cause = error.__cause__
    text = str(error).strip()
    if cause is not None and str(cause) and str(cause) not in text:
        text += f"\n{cause}"
    return text
