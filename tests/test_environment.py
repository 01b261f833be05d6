"""What a process of ours is told before its work."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="of glibc")

PAGES = """
import resource
import numpy as np
from fedssl.environment import keep_memory
print(keep_memory())
def step():
    return [np.ones(1 << 22) for _ in range(8)]  # 256 MiB
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages(**environment: str) -> tuple[str, int]:
    """What `keep_memory` returns, and how many pages the system gave for a step like the ones before."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", PAGES], env={**own, **environment}, capture_output=True, text=True, check=True
    )
    said, count = done.stdout.split()
    return said, int(count)


def test_a_step_finds_the_memory_of_the_one_before() -> None:
    said, count = pages()
    assert said == "True"
    assert count < 100


def test_the_users_own_settings_of_malloc_stay() -> None:
    said, count = pages(MALLOC_TRIM_THRESHOLD_="131072")
    assert said == "False"
    assert count > 1000
