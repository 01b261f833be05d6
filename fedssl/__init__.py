"""Federated self-supervised learning: simulate, deploy, compare.

From Python: `fedssl.config.compose([...])` makes a configuration, `run` runs it, `load_encoder` loads what it learned.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def run(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Run one simulation; see `fedssl.federation.simulation.run`."""
    from fedssl.federation import simulation  # torch, Flower: seconds that `import fedssl` does not cost

    return simulation.run(cfg)


def load_encoder(run_dir: str | Path, family: str | None = None) -> "nn.Module":
    """The trained backbone of one family of a completed run: (b, 3, s, s) images to (b, feature_dim) features.

    Args:
        run_dir: a completed run.
        family: an architecture of `federation.families`; None: the report family.

    Returns:
        The backbone on the CPU, in eval mode. It expects images as the run's `views.plain` makes them.

    Raises:
        ConfigError: the run has no global model of that family.
    """
    from fedssl.federation import simulation

    return simulation.load_encoder(Path(run_dir), family)
