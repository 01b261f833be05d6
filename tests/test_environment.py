"""What a process of ours is told before its work."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedssl import environment, evaluate_command
from fedssl.environment import keep_start
from fedssl.federation import simulation
from tests.federation_helpers import small

ROOT = Path(__file__).parents[1]
CODE = """
import threading
from fedssl.environment import keep_memory
from tests.grid_apps import page_faults
print(keep_memory({arguments}))
thread = threading.Thread(target=lambda: print(page_faults()))
thread.{start}()
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="of glibc")


def said_and_faults(arguments: str = "", *, in_a_thread: bool = False, **variables: str) -> tuple[str, int]:
    """What `keep_memory` returns, and `page_faults` thereafter, in a process of its own."""
    own = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    code = CODE.format(arguments=arguments, start="start" if in_a_thread else "run")
    done = subprocess.run(
        [sys.executable, "-c", code], env={**own, **variables}, cwd=ROOT, capture_output=True, text=True, check=True
    )
    said, count = done.stdout.split()
    return said, int(count)


@linux
def test_a_step_finds_the_memory_of_the_one_before() -> None:
    said, count = said_and_faults()
    assert said == "True"
    assert count < 1000


@linux
def test_a_thread_does_where_all_share_a_heap() -> None:
    said, count = said_and_faults("of_threads=True", in_a_thread=True)
    assert said == "True"
    assert count < 1000


@linux
@pytest.mark.parametrize(
    "variables", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_thresholds_of_the_users_own_stay(variables: dict[str, str]) -> None:
    said, count = said_and_faults(**variables)
    assert said == "False"
    assert count > 10_000


@linux
def test_an_older_glibc_takes_a_smaller_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that refuses it, and was told another first, would map every large block anew."""
    told: list[tuple[int, int]] = []

    class Old:
        @staticmethod
        def mallopt(name: int, value: int) -> int:
            taken = name != environment.M_MMAP_THRESHOLD or value <= environment.GLIBC_LIMIT
            told.extend([(name, value)] if taken else [])
            return int(taken)

    monkeypatch.setattr(environment.ctypes, "CDLL", lambda name: Old)
    assert environment.keep_memory()
    assert told == [
        (environment.M_MMAP_THRESHOLD, environment.GLIBC_LIMIT),
        (environment.M_TRIM_THRESHOLD, environment.KEPT_BYTES),
    ]


def test_a_run_and_an_evaluation_keep_their_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(simulation, "keep_memory", lambda *, of_threads: asked.append(f"run {of_threads}"))
    monkeypatch.setattr(evaluate_command, "keep_memory", lambda: asked.append("evaluation"))
    simulation.run(small(tmp_path / "run", "federation.num_rounds=1", "strategy=local_only"))
    assert evaluate_command.main([str(tmp_path / "nowhere")]) == 2
    assert asked == ["run True", "evaluation"]


def test_the_collector_does_not_look_at_what_was_there_before() -> None:
    before = gc.get_freeze_count()
    with keep_start():
        assert gc.get_freeze_count() > before + 10_000
        assert len(gc.get_objects()) < 10_000
        within = gc.get_freeze_count()
        with keep_start():
            pass
        assert gc.get_freeze_count() == within
    assert gc.get_freeze_count() == 0
