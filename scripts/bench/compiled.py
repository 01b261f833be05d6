"""One epoch of a client with its backbone compiled, or its steps replayed, against the epoch without, by family."""

import os
import tempfile
from dataclasses import replace
from typing import Any

import torch
from bench.measure import Result, median_interval
from bench.train import Epoch, epoch

from fedssl.config import compose
from fedssl.models.compiled import MODES
from fedssl.models.compiled import compiled as compiled_networks

PAIRS = 7


def _way(plain: Epoch, **changes: Any) -> dict[str, Any]:
    """What one way costs once, and saves from then on."""
    fast = replace(plain, **changes)
    plain.ours()
    torch.compiler.reset()
    with tempfile.TemporaryDirectory(prefix="fedssl-compiled-") as folder:  # nothing is compiled already
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        first, second = fast.ours(), fast.ours()
    pairs = [(plain.ours(), fast.ours()) for _ in range(PAIRS)]
    return {
        "compilation_s": first - second,
        "times_faster": median_interval([without / compiled for without, compiled in pairs]),
        "plain_s": [without for without, _ in pairs],
        "compiled_s": [compiled for _, compiled in pairs],
    }


def compiled() -> Result:
    """On the GPU where there is one, CUDA graphs too; else with one thread, as a worker has it."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    families = {}
    with compiled_networks(MODES[0], device):
        pass  # torch's own start, and whether it can at all
    for family in compose([])["models"]:
        plain = replace(epoch(family, device)[0], cuda_graphs=False)
        families[family] = {mode: _way(plain, compile_mode=mode) for mode in MODES}
        if device.type == "cuda":
            families[family]["cuda_graphs"] = _way(plain, cuda_graphs=True)
    return {"unit": "seconds per epoch", "pairs": PAIRS, "device": str(device), "families": families}, []
