"""What an engine of which rounds are taken in turn with others' does between them; needs nothing but Python.

The other side, which starts, freezes and times them: `bench.sitting`.
"""

from pathlib import Path


class Turns:
    """The engine's end of the pipe that it was told as `--turns`."""

    def __init__(self, turns: Path) -> None:
        self._pipe = turns.open("rb", buffering=0)

    def wait(self) -> None:
        """A round has ended and another is to come: give the machine away until it is this engine's turn."""
        print("LAP", flush=True)
        self._pipe.read(1)
