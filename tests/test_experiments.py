"""Every preset in conf/experiment composes with every strategy, builds, and yields to the command line."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedssl.config import check_values, compose, conf_dir, instantiate
from fedssl.federation.setup import Setup
from tests.federation_helpers import STRATEGIES

CONF = conf_dir()
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))

PAIRS = [  # each strategy with one of the presets, the others where there is time
    pytest.param(experiment, strategy, marks=[] if (i + j) % len(EXPERIMENTS) == 0 else pytest.mark.slow)
    for i, experiment in enumerate(EXPERIMENTS)
    for j, strategy in enumerate(STRATEGIES)
]


@cache
def composed(*overrides: str) -> Any:
    """To be looked at only: half a second each."""
    return compose(overrides)


def test_there_are_presets() -> None:
    assert "cifar10_small" in EXPERIMENTS


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_preset_sets_no_strategy(experiment: str) -> None:
    """So that any preset composes with any strategy: the numbers belong to the groups that all share."""
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    assert text.startswith("# @package _global_\n")
    preset = yaml.safe_load(text)
    assert "strategy" not in preset
    assert not [default for default in preset.get("defaults", []) if "strategy" in str(default)]


@pytest.mark.parametrize(("experiment", "strategy"), PAIRS)
def test_a_preset_composes_with_every_strategy(experiment: str, strategy: str) -> None:
    config = compose([f"experiment={experiment}", f"strategy={strategy}"])
    check_values(config)
    alone = composed(f"strategy={strategy}")
    assert config["strategy"]["name"] == strategy
    assert config["strategy"]["server"].keys() == alone["strategy"]["server"].keys()
    if config["strategy"]["client"] is not None:
        instantiate(config["strategy"]["client"])
        if "local_epochs" in config["strategy"]["client"]:
            assert config["strategy"]["client"]["local_epochs"] == config["client"]["local_epochs"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_preset_builds_everything_that_needs_no_images(experiment: str) -> None:
    config = compose([f"experiment={experiment}", "device=cpu"])
    setup = Setup(config)
    assert setup.federation.num_rounds >= 1
    assert setup.local.local_epochs == config["client"]["local_epochs"]
    assert setup.evaluation.every >= 1
    assert setup.views.describe()
    for family in setup.families:
        setup.build_model(family)
    for group in ("method", "partition", "public", "codec", "ensemble", "distill", "grid", "data"):
        instantiate(config[group])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("choice", ["partition=iid", "partition=quantity", "public=client_shard", "data=digits"])
def test_a_group_chosen_on_the_command_line_wins(experiment: str, choice: str) -> None:
    group = choice.split("=")[0]
    config = compose([f"experiment={experiment}", choice])
    preset, default = composed(f"experiment={experiment}"), composed(choice)
    if preset[group]["_target_"] == default[group]["_target_"]:
        pytest.skip(f"the preset has {choice}")
    assert config[group] == default[group]  # nothing of the preset's group is left in it
    others = [key for key in preset if key not in (group, "run_dir", "views", "models", "public", "evaluate")]
    assert {key: config[key] for key in others} == {key: preset[key] for key in others}
    check_values(config)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_value_on_the_command_line_wins(experiment: str) -> None:
    config = compose(
        [f"experiment={experiment}", "federation.num_rounds=77", "partition=quantity", "partition.alpha=7"]
    )
    assert config["federation"]["num_rounds"] == 77
    assert config["partition"]["alpha"] == 7


def test_a_file_that_a_group_of_ones_own_chooses_has_nothing_of_the_presets(tmp_path: Path) -> None:
    (tmp_path / "machine").mkdir()
    (tmp_path / "machine" / "small.yaml").write_text("# @package _global_\ndefaults:\n  - override /partition: iid\n")
    assert composed("experiment=cifar10_small")["partition"] != {"_target_": "fedssl.data.partition.IID"}
    config = compose(["experiment=cifar10_small", "+machine=small"], config_dir=tmp_path)
    assert config["partition"] == {"_target_": "fedssl.data.partition.IID"}


def test_a_preset_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /partition: iid\nfederation:\n  num_rounds: 5\n"
    )
    config = compose(["experiment=mine"], config_dir=tmp_path)
    assert config["federation"]["num_rounds"] == 5
    assert config["partition"] == {"_target_": "fedssl.data.partition.IID"}
