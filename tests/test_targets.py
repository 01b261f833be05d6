"""What a server can make a node build, and what it cannot."""

from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from torch import nn

from fedssl import targets
from fedssl.config import check_values, compose, conf_dir, instantiate
from fedssl.errors import ConfigError
from fedssl.targets import OURS, check_targets


def small_network() -> nn.Module:
    return nn.Identity()


class Network(nn.Identity):
    pass


def no_network() -> int:
    return 1


@dataclass
class Mutable:
    value: int


@pytest.mark.parametrize("strategy", sorted(path.stem for path in (conf_dir() / "strategy").glob("*.yaml")))
def test_whatever_a_client_needs_of_ours_is_allowed(strategy: str) -> None:
    config = compose([f"strategy={strategy}"])
    check_targets({**config, "strategy": config["strategy"]["client"]}, OURS)


@pytest.mark.parametrize("group", ["method", "views", "codec", "ensemble", "data", "partition", "public", "projector"])
def test_every_file_of_a_clients_groups_is_allowed(group: str) -> None:
    for path in (conf_dir() / group).glob("*.yaml"):
        check_targets({k: v for k, v in yaml.safe_load(path.read_text()).items() if k == "_target_"}, OURS)


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "fedssl.config.pkgutil.resolve_name",  # through what a module of ours imports
        "fedssl.tracking.os.system",
        "fedssl.tracking.write_text",  # ours, but it writes a file
        "fedssl.tracking.Tracker",
        "fedssl.federation.store.ClientStore",
        "fedssl.federation.simulation.run",
        "fedssl.run",
        "fedssl.load_encoder",  # it reads a file
        "fedssl.federation.simulation.load_encoder",
        "fedssl.federation.grids.flower_sim._ClientApp",
        "fedssl.evaluate_command._completed",
        "fedssl.__main__.main",
        "fedssl.config.instantiate",
        "fedssl.nothing.Here",
        "fedssl",
        "fedssl.",
        "fedsslevil.Thing",
        "strategies.flesd.FLESD",  # the server's half
        7,
        None,
        ["os.system"],
    ],
)
@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"a": [{"b": t}]}])
def test_nothing_else_is(name: Any, wrap: Any) -> None:
    with pytest.raises(ConfigError, match="_target_"):
        check_targets(wrap({"_target_": name, "command": "true"}), OURS)


def test_nothing_outside_is_even_imported() -> None:
    """Importing runs code, too."""
    import sys

    assert "antigravity" not in sys.modules
    with pytest.raises(ConfigError, match="not allowed"):
        check_targets({"_target_": "antigravity.open"}, OURS)
    assert "antigravity" not in sys.modules


def test_an_interpolation_could_read_the_environment() -> None:
    with pytest.raises(ConfigError, match="interpolation"):
        check_targets({"family": "${oc.env:HOME}"}, OURS)


def test_owners_allow_their_own_package_or_single_names() -> None:
    here = __name__
    check_targets({"_target_": f"{here}.Network"}, (f"{here}.",))
    for name in ("small_network", "no_network", "Mutable"):
        with pytest.raises(ConfigError, match="only dataclasses, torch modules"):
            check_targets({"_target_": f"{here}.{name}"}, (f"{here}.",))
        check_targets({"_target_": f"{here}.{name}"}, (f"{here}.{name}",))


def test_a_process_that_is_told_builds_nothing_else_and_forgets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_allowed", None)
    assert instantiate({"_target_": "builtins.dict"}) == {}
    targets.allow_only(OURS)
    targets.allow_only([*OURS, "builtins.dict"])  # nobody can widen it
    with pytest.raises(ConfigError, match=r"builtins\.dict is not allowed here"):
        instantiate({"_target_": "builtins.dict"})
    with pytest.raises(ConfigError, match="not allowed here"):
        check_values(compose([]))  # its server half
