"""Composing: every file of conf/ fits its class, mistakes are named, and nothing is left to a default in Python."""

import inspect
import json
import pkgutil
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedssl.config import GROUPS, check_values, compose, conf_dir, instantiate
from fedssl.data.partition import Dirichlet
from fedssl.errors import ConfigError
from fedssl.federation.client import LocalTraining
from fedssl.federation.setup import Federation

CONF = conf_dir()
CHOICES = [
    (group, path.stem)
    for group in sorted(path.name for path in CONF.iterdir() if path.is_dir())
    for path in sorted((CONF / group).glob("*.yaml"))
]
NEEDED = {("partition", "file"): ["partition.path=partition.npz"]}  # values without a default
# Parameters that code gives, not YAML: the server half's `server`, a projector's width, what `data` names.
GIVEN_BY_CODE = {"server", "in_dim", "source"}


def composed(group: str, choice: str) -> dict[str, Any]:
    return compose([f"{group}={choice}", *NEEDED.get((group, choice), [])])


def nodes(config: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every node with a `_target_`, and its key."""
    if "_target_" in config:
        yield where, config
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from nodes(value, f"{where}.{name}" if where else name)


def test_the_groups_are_the_folders() -> None:
    assert {group for group, _ in CHOICES} == {*GROUPS, "experiment"}


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_into_plain_values_of_the_right_types(group: str, choice: str) -> None:
    config = composed(group, choice)
    check_values(config)
    assert yaml.safe_load(yaml.safe_dump(config)) == config
    assert json.loads(json.dumps(config)) == config
    assert "${" not in json.dumps(config)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_yaml_lists_every_parameter_and_none_besides(group: str, choice: str) -> None:
    """So `--cfg job` shows the whole run, and Hydra refuses a mistyped key; numbers have no defaults in Python.

    Flower's strategies have more parameters than matter here (`fedssl.federation.stock` sets or refuses those).
    """
    for key, node in nodes(composed(group, choice)):
        target = pkgutil.resolve_name(node["_target_"])
        parameters = set(inspect.signature(target).parameters) - GIVEN_BY_CODE
        beside = {"store"} if key == "client" else set()  # read by the run itself
        listed = set(node) - {"_target_"} - GIVEN_BY_CODE - beside
        assert listed <= parameters if node["_target_"].startswith("flwr.") else listed == parameters, key


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_file_says_at_its_top_what_it_is(group: str, choice: str) -> None:
    lines = (CONF / group / f"{choice}.yaml").read_text().splitlines()
    first = next(line for line in lines if not line.startswith("# @package"))
    assert first.startswith("# ")


@pytest.mark.parametrize(
    ("group", "choice"),
    [
        c
        for c in CHOICES
        if c[0] in ("codec", "ensemble", "distill", "method", "views", "grid", "partition", "evaluate")
    ],
)
def test_a_choice_builds_what_its_target_names(group: str, choice: str) -> None:
    node = composed(group, choice)[group]
    target = pkgutil.resolve_name(node["_target_"])
    assert isinstance(instantiate(node), target)


# --- names that only the composition knows ------------------------------------------------------------------------
@pytest.mark.parametrize("strategy", ["fedavg", "public_only_total"])
def test_the_strategy_is_called_as_its_file(strategy: str) -> None:
    config = compose([f"strategy={strategy}"])
    assert config["strategy"]["name"] == strategy
    assert config["run_dir"].endswith(f"-{strategy}")


def test_a_named_public_set_becomes_its_source_at_the_private_size() -> None:
    config = compose(["data=stl10", "public=dataset", "public.data=cifar100", "public.root=elsewhere"])
    source = config["public"]["source"]
    assert (source["name"], source["root"], source["image_size"]) == ("cifar100", "elsewhere", 96)
    assert source["num_classes"] == 100
    assert "data" not in config["public"]


def test_named_probe_data_becomes_its_source_at_the_private_size() -> None:
    config = compose(["data=image_folder", "evaluate.data=cifar10"])
    source = config["evaluate"]["source"]
    assert (source["name"], source["root"], source["image_size"]) == ("cifar10", "data", 64)


def test_a_folder_of_ones_own_yaml_files_adds_choices(tmp_path: Path) -> None:
    (tmp_path / "partition").mkdir()
    (tmp_path / "partition" / "mine.yaml").write_text(
        "_target_: fedssl.data.partition.Dirichlet\nalpha: 9\nmin_size: 1\n"
    )
    config = compose(["partition=mine"], config_dir=tmp_path)
    assert instantiate(config["partition"]) == Dirichlet(alpha=9, min_size=1)


def test_composing_twice_is_the_same_and_a_copy() -> None:
    first, second = compose(["run_dir=x"]), compose(["run_dir=x"])
    assert first == second
    first["federation"]["families"].append("resnet18")
    assert "resnet18" not in second["federation"]["families"]


# --- mistakes -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("federation.num_round=3", r"no key federation\.num_round\. Did you mean federation\.num_rounds\?"),
        ("client.optimisation.beta=3", r"no key client\.optimisation\.beta\. client\.optimisation has optimiser, lr"),
        ("strategy=flesdd", r"strategy=flesdd: there is no such choice\. strategy may be .*flesd"),
        ("federation.num_rounds.x=3", r"no key federation\.num_rounds\.x\. federation\.num_rounds has no keys"),
        ("resume=somewhere", r"resume= and replay\.\*= are for the command"),
        ("partition=file", r"partition\.path has no default: set partition\.path="),
    ],
)
def test_a_mistake_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose([override])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_rounds", "3", 'a whole number, got "3"'),
        ("num_rounds", 3.0, "a whole number, got 3.0"),
        ("num_rounds", [3], r"a whole number, got \[3\]"),
        ("num_rounds", {"a": 3}, "a whole number, got"),
        ("cohort_size", "all", 'a whole number or null, got "all"'),
        ("round_timeout", float("nan"), "a number or null, got NaN"),
        ("round_timeout", False, "a number or null, got false"),
        ("families", "conv4_16", r"a list \[...\] of text, got \"conv4_16\""),
        ("families", [16], r"a list \[...\] of text, got \[16\]"),
        ("report_family", 16, "text or null, got 16"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_key(key: str, value: object, words: str) -> None:
    config = compose()
    config["federation"][key] = value
    with pytest.raises(ConfigError, match=rf"^federation\.{key} must be {words}"):
        check_values(config)


@pytest.mark.parametrize(("key", "value"), [("round_timeout", 3), ("round_timeout", None), ("cohort_size", 2)])
def test_values_of_the_right_type_pass(key: str, value: object) -> None:
    config = compose()
    config["federation"][key] = value
    check_values(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"foo": 1}, r"^there is no key foo\. There are seed, device, "),
        ({"sed": 1}, r"^there is no key sed\. Did you mean seed\?"),
        ({"data": {}}, r"^data has no _target_"),
        ({"codec": None}, r"^codec must be a mapping, as in the files of conf/codec, got None"),
        ({"strategy": {"name": "x", "client": None}}, r"^strategy has no server"),
        ({"strategy": {"name": "x", "server": {}}}, r"^strategy has no client"),
        ({"strategy": {"client": None, "server": {}, "foo": 1}}, r"^there is no key strategy\.foo\."),
        ({"run_dir": None}, r"^run_dir must be text, got null"),
        ({"seed": -1}, r"^seed must be between 0 and 9223372036854775807 .*, got -1"),
        ({"seed": 2**63}, r"^seed must be between 0 and 9223372036854775807 .*, got 9223372036854775808"),
        ({"seed": None}, r"^seed must be a whole number, got null"),
    ],
)
def test_a_mapping_made_in_python_is_held_to_the_same(change: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_values({**compose(), **change})


def test_no_configuration_at_all_is_named() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^the configuration has no seed, device, downlink, embedding, max_seconds, run_dir, views, data",
    ):
        check_values({})


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_the_ends_of_the_range_of_seeds_pass(seed: int) -> None:
    check_values({**compose(), "seed": seed})


def test_a_list_of_numbers_is_checked_item_by_item() -> None:
    with pytest.raises(ConfigError, match=r'views\.scale must be a list \[...\] of numbers, got \[0\.8, "big"\]'):
        check_values(compose(["views.scale=[0.8,big]"]))


def test_a_module_that_fails_to_import_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"method\._target_=broken_module\.Loss cannot be imported: division by zero"):
        check_values(compose(["method._target_=broken_module.Loss"]))


def test_a_target_whose_parameters_cannot_be_known_is_left_to_itself() -> None:
    config = compose(["method._target_=builtins.dict"])  # a builtin without signature
    check_values(config)


# --- building -----------------------------------------------------------------------------------------------------
def test_instantiate_builds_nodes_inside_nodes() -> None:
    local = instantiate({k: v for k, v in compose()["client"].items() if k != "store"})
    assert isinstance(local, LocalTraining)
    assert local.optimisation.optimiser == "adam"


def test_instantiate_leaves_values_without_a_target_alone() -> None:
    assert instantiate(None) is None
    assert instantiate({"a": 1}) == {"a": 1}


def test_arguments_reach_the_target_as_they_are() -> None:
    federation = instantiate(compose()["federation"])
    node = {"_target_": "builtins.dict"}
    assert instantiate(node, federation=federation)["federation"] is federation
    assert isinstance(federation, Federation)


def test_what_a_class_says_of_its_values_is_the_message() -> None:
    node = compose(["federation.cohort_size=9"])["federation"]
    with pytest.raises(ConfigError, match=r"^federation\.cohort_size must be between 1 and"):
        instantiate(node)


def test_so_it_is_for_a_node_inside_a_node() -> None:
    with pytest.raises(ConfigError, match=r"^optimisation\.lr must be greater than 0"):
        instantiate(compose(["distill.optimisation.lr=-1"])["distill"])


def test_arguments_that_do_not_fit_name_the_target() -> None:
    with pytest.raises(ConfigError, match=r"cannot build fedssl\.federation\.setup\.Federation: .*'colour'"):
        instantiate({**compose()["federation"], "colour": "red"})


@pytest.mark.parametrize(
    ("overrides", "loss", "embedding"),
    [
        ([], "coordinates", "backbone"),
        (["ensemble=row"], "ce", "projector"),
        (["codec=sharpened"], "ce", "projector"),  # which brings ensemble=row
        (["ensemble=median", "distill.loss=js"], "js", "projector"),
        (["distill.loss=cka", "embedding=projector"], "cka", "projector"),
        (["experiment=flesd_faithful"], "ce", "projector"),
        (["experiment=cifar10_small", "ensemble=none"], "ce", "projector"),
    ],
)
def test_loss_and_embedding_go_with_the_ensemble_unless_they_are_given(
    overrides: list[str], loss: str, embedding: str
) -> None:
    config = compose(overrides)
    assert (config["distill"]["loss"], config["embedding"]) == (loss, embedding)
    assert config["strategy"]["server"]["embedding"] == embedding


@pytest.mark.parametrize(
    ("overrides", "views"),
    [
        (["data=cifar10"], "ShiftViews"),
        (["data=cifar10", "ensemble=row"], None),  # the paper's path: the run's views
        (["data=cifar10", "distill.loss=cka"], None),
        (["data=cifar10", "views@distill.views=colour"], "ColourViews"),
        (["data=digits"], None),
        (["experiment=flesd_faithful"], None),
    ],
)
def test_a_student_of_coordinates_sees_photographs_shifted_only(overrides: list[str], views: str | None) -> None:
    config = compose(["strategy=flesd", *overrides])
    chosen = config["distill"]["views"]
    assert (chosen and chosen["_target_"].rpartition(".")[2]) == views


def test_a_student_is_distilled_on_inputs_as_it_is_evaluated_on() -> None:
    given = ["data=cifar10", "views.mean=[0,0,0]", "views.std=[0.2,0.2,0.2]", "views@distill.views=shift"]
    advice = ["distill.views.mean=[0,0,0]", "distill.views.std=[0.2,0.2,0.2]"]
    with pytest.raises(ConfigError, match=re.escape(f"Set {' '.join(advice)}, or distill.views=null.")):
        compose(["strategy=flesd", *given])
    config = compose(["strategy=flesd", *given, *advice])
    for key in ("mean", "std"):
        assert config["distill"]["views"][key] == config["views"][key]
    compose(["strategy=fedavg", *given])  # has no student


def test_what_that_advises_works_beside_a_preset_that_has_chosen_views() -> None:
    given = ["experiment=cifar10_small", "strategy=flesd", "views.mean=[0.4,0.5,0.6]"]
    with pytest.raises(ConfigError, match=r"or distill\.views=null\.$"):
        compose(given)
    for advice in ("distill.views=null", "distill.views.mean=[0.4,0.5,0.6]"):
        assert compose([*given, advice])["distill"]["views"]["mean"] == [0.4, 0.5, 0.6]


@pytest.mark.parametrize("value", ["5", "true"])
def test_views_for_students_that_are_none_are_left_to_whoever_builds_them(value: str) -> None:
    assert compose(["strategy=flesd", f"distill.views={value}"])["distill"]["views"] == yaml.safe_load(value)


def test_those_views_are_normalised_and_mirrored_as_the_runs_are() -> None:
    config = compose(["data=cifar10", "views.mean=[0.4,0.5,0.6]", "views.flip_probability=0"])
    assert config["distill"]["views"]["mean"] == [0.4, 0.5, 0.6]
    assert config["distill"]["views"]["flip_probability"] == 0
