"""One epoch of a client with its backbone compiled against the same epoch without, for every family."""

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


def _mode(plain: Epoch, mode: str) -> dict[str, Any]:
    """What one mode of compilation costs once, and saves from then on."""
    fast = replace(plain, compile_mode=mode)
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
    """On the GPU where there is one, without and with CUDA graphs; else with one thread, as a worker has it."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    families = {}
    with compiled_networks(MODES[0], device):
        pass  # torch's own start, and whether it can at all
    for family in compose([])["models"]:
        one, _ = epoch(family, device)
        families[family] = {mode: _mode(one, mode) for mode in (MODES if device.type == "cuda" else MODES[:1])}
    return {"unit": "seconds per epoch", "pairs": PAIRS, "device": str(device), "families": families}, []
