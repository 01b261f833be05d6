"""Which settings say what a run is."""

import copy

import pytest

from fedssl.config import compose
from fedssl.settings import INCIDENTAL, INERT, OF_A_SITTING, RESUMABLE, covers, flatten, of_every_sitting

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
