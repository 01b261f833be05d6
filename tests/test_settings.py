"""Which settings say what a run is."""

import copy

import pytest

from fedssl.config import compose, fill_in, without_as_before
from fedssl.settings import (
    INCIDENTAL,
    INERT,
    OF_A_SITTING,
    RESUMABLE,
    covers,
    flatten,
    of_a_result,
    of_every_sitting,
)

CONFIG = compose(["data=cifar10", "evaluate.data=cifar100", "federation.devices.availability=0.5"])
OF_THE_COMMAND = {"resume", "replay", "hydra"}  # in the config.yaml of none, or of old runs


@pytest.mark.parametrize("name", sorted({*RESUMABLE, *OF_A_SITTING, *INERT, *INCIDENTAL} - OF_THE_COMMAND))
def test_a_name_is_that_of_a_setting(name: str) -> None:
    assert any(covers([name], key) for key in flatten(CONFIG))


def test_what_a_person_may_change_costs_no_kept_reply() -> None:
    assert set(RESUMABLE) < set(OF_A_SITTING)


def test_a_comparison_tells_what_a_resume_may_change_and_figures_may_depend_on() -> None:
    assert set(OF_A_SITTING) - set(INERT) == {
        "grid", "device", "client.cuda_graphs", "federation.num_rounds", "federation.report_family",
    }  # fmt: skip
    assert set(INERT) - set(OF_A_SITTING) == {"seed", "federation.keep_checkpoints", "data.download", "evaluate.root"}


def test_covers_is_of_whole_names() -> None:
    assert covers(["grid", "data.root"], "grid.workers")
    assert covers(["grid", "data.root"], "data.root")
    assert not covers(["grid", "data.root"], "data")
    assert not covers(["grid", "data.root"], "grids")
    assert not covers(["grid", "data.root"], "data.roots")


def test_what_every_sitting_has_is_the_rest() -> None:
    before = copy.deepcopy(CONFIG)
    kept = of_every_sitting(CONFIG)
    assert before == CONFIG
    expected = {k: v for k, v in flatten(CONFIG).items() if not covers(OF_A_SITTING, k)}
    assert flatten(kept) == expected
    assert kept["federation"]["num_clients"] == CONFIG["federation"]["num_clients"]
    assert not {"grid", "device", "run_dir", "max_seconds"} & kept.keys()
    assert "root" not in kept["data"]
    assert "store" not in kept["client"]
    other = compose([
        "data=cifar10", "evaluate.data=cifar100", "federation.devices.availability=0.5", "grid=in_process",
        "device=cpu", "data.root=elsewhere", "max_seconds=3", "federation.num_rounds=77", "client.store=there",
        "federation.keep_replies_after=9",
    ])  # fmt: skip
    assert of_every_sitting(other) == kept
    assert of_every_sitting({**other, "seed": 1}) != kept


def test_what_was_so_before_a_setting_came_is_left_out_and_filled_in_again() -> None:
    for config in (CONFIG, fill_in(CONFIG, over=True)):
        shorter = without_as_before(config)
        assert fill_in(shorter) == config
        assert "compile" not in shorter["client"]
    assert "cuda_graphs" in without_as_before(CONFIG)["client"]  # true, and false before it came
    assert without_as_before(fill_in(CONFIG, over=True)).keys() == CONFIG.keys() - {"federation.devices"}


def test_figures_depend_on_the_seed_and_not_on_where_and_what_else_there_is() -> None:
    kept = of_a_result(CONFIG)
    other = compose([
        "data=cifar10", "evaluate.data=cifar100", "federation.devices.availability=0.5", "grid=in_process",
        "device=cpu", "data.root=elsewhere", "max_seconds=3", "client.store=there", "federation.min_replies=1",
        "+models.mine._target_=fedssl.models.backbones.ResNet8",
    ])  # fmt: skip
    assert of_a_result(other) == kept
    for key, value in (("seed", 1), ("federation.num_rounds", 77), ("client.optimisation.lr", 9.0)):
        assert of_a_result(compose(["data=cifar10", f"{key}={value}"]))[key] == value
    assert {key.split(".")[1] for key in kept if key.startswith("models.")} == set(CONFIG["federation"]["families"])
