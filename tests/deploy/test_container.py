"""deploy/Dockerfile and deploy/compose.yaml agree with the command, with each other and with pyproject.toml.

What they say is read; whether Docker builds and runs it is not tried here.
"""

import re
import shlex
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fedssl.config import check_values, compose, compose_node
from fedssl.deploy.command import _parser
from fedssl.deploy.node import node_of

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
ROOT = DEPLOY.parent
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
NODES = {int(name.removeprefix("node-")): service for name, service in SERVICES.items() if name != "server"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
KEYS = "/srv/fedssl/keys"


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's lines: instruction and the rest."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def parsed(service: dict[str, Any]) -> Any:
    """What `fedssl-deploy` itself makes of a service's command."""
    options, overrides = _parser().parse_known_args(service["command"])
    assert not [override for override in overrides if override.startswith("-")]
    options.overrides = overrides
    return options


@cache
def of_the_run() -> dict[str, Any]:
    """The configuration that the server's command composes."""
    return compose(parsed(SERVICES["server"]).overrides)


@cache
def of_the_node(number: int) -> dict[str, Any]:
    """What node `number` brings."""
    return compose_node(parsed(NODES[number]).overrides)


def mounts(service: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """By the path inside: where it comes from, and "ro" or ""."""
    parts = [volume.split(":") for volume in service["volumes"]]
    return {inside: (source, "".join(mode)) for source, inside, *mode in parts}


def test_the_server_is_a_run_over_nodes_of_three_families() -> None:
    options = parsed(SERVICES["server"])
    config = of_the_run()
    check_values(config)
    assert options.work.__name__ == "_server"
    assert config["partition"]["_target_"].endswith(".Nodes")
    assert config["federation"]["num_clients"] == len(NODES) == len(set(config["federation"]["families"])) == 3
    assert sorted(NODES) == [0, 1, 2]


@pytest.mark.parametrize("number", NODES)
def test_a_node_is_one_that_the_command_takes(number: int) -> None:
    options = parsed(NODES[number])
    node = node_of(of_the_node(number))
    assert options.work.__name__ == "_client"
    assert node.partition_id == number
    assert node.data is not None


def test_ports_and_names_agree() -> None:
    server = parsed(SERVICES["server"])
    assert server.host == "0.0.0.0"
    assert {parsed(service).superlink for service in NODES.values()} == {f"server:{server.port}"}
    assert [rest for name, rest in instructions() if name == "EXPOSE"] == [str(server.port)]
    assert all(service["depends_on"] == ["server"] for service in NODES.values())
    assert "scripts/make_keys deploy/keys --host server\n" in (DEPLOY / "compose.yaml").read_text()


def test_what_a_command_reads_is_mounted_read_only() -> None:
    server, config = parsed(SERVICES["server"]), of_the_run()
    inside = mounts(SERVICES["server"])
    assert str(server.certificates) == KEYS
    assert str(server.keys) == f"{KEYS}/nodes"
    read = {f"{KEYS}/{name}": f"./keys/{name}" for name in ("ca.crt", "server.pem", "server.key")}
    read |= {f"{KEYS}/nodes/node-{n}.pub": f"./keys/nodes/node-{n}.pub" for n in NODES}
    read |= {config["data"]["root"]: "./probes", config["public"]["source"]["root"]: "./public"}
    runs = str(Path(config["run_dir"]).parent)
    assert inside == {**{path: (source, "ro") for path, source in read.items()}, runs: ("runs", "")}
    for number, service in NODES.items():
        options, node = parsed(service), of_the_node(number)
        read = {f"{options.certificates}/ca.crt": "./keys/ca.crt", str(options.key): f"./keys/nodes/node-{number}"}
        read |= {node["data"]["root"]: f"./images/node-{number}", node["public"]["root"]: "./public"}
        written = {node["store"]: (f"memory-{number}", "")}
        assert mounts(service) == {**{path: (source, "ro") for path, source in read.items()}, **written}
    assert set(COMPOSE["volumes"]) == {"runs", *(f"memory-{number}" for number in NODES)}


def test_the_image_has_folders_to_write_for_any_user() -> None:
    made = next(rest for name, rest in instructions() if name == "RUN" and rest.startswith("mkdir"))
    written = {inside for service in SERVICES.values() for inside, (_, mode) in mounts(service).items() if mode != "ro"}
    mkdir, chmod = (shlex.split(part) for part in made.split("&&"))
    assert set(mkdir[2:]) == set(chmod[2:]) == written
    assert chmod[:2] == ["chmod", "1777"]


def test_the_dockerfile_installs_what_pyproject_says() -> None:
    base = next(rest for name, rest in instructions() if name == "FROM")
    python = re.fullmatch(r"python:(\d+\.\d+)-slim", base)
    assert python is not None
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(python[1])
    installs = [shlex.split(rest) for name, rest in instructions() if name == "RUN" and rest.startswith("pip install")]
    first, second = ([word for word in line[2:] if not word.startswith("-")] for line in installs)
    needed = {str(Requirement(entry)) for entry in PROJECT["project"]["dependencies"]}
    assert first[0] == "$TORCH_INDEX"
    assert {str(Requirement(word)) for word in first[1:]} <= needed
    assert {Requirement(word).name for word in first[1:]} == {"torch", "torchvision"}
    assert second == ["."]
    assert ("ENTRYPOINT", '["fedssl-deploy"]') in instructions()
    assert "fedssl-deploy" in PROJECT["project"]["scripts"]


def test_the_wheel_can_be_built_from_what_is_copied_and_nothing_else_is_sent() -> None:
    copied = {word for name, rest in instructions() if name == "COPY" for word in rest.split()[:-1]}
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    project = {"pyproject.toml", PROJECT["project"]["readme"], "LICENSE"}
    assert copied == {*wheel["packages"], *wheel["force-include"], *project}
    assert all((ROOT / name).exists() for name in copied)
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignore[1] == "*"
    assert {line.removeprefix("!") for line in ignore if line.startswith("!")} == copied
