"""One epoch of a client with its backbone compiled, or its steps replayed, against the epoch without, by family."""

import os
import tempfile
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from bench.measure import Result, median_interval
from bench.train import Epoch, epoch

from fedssl.config import compose
from fedssl.models.compiled import MODES
from fedssl.models.compiled import compiled as compiled_networks

PAIRS = 7


def _compiled(plain: Epoch, mode: str) -> dict[str, Any]:
    """What a mode of compilation costs once, and saves from then on."""
    fast = replace(plain, compile_mode=mode)
    plain.ours()
    torch.compiler.reset()
    with (
        tempfile.TemporaryDirectory(prefix="fedssl-compiled-") as folder,  # nothing is compiled already
        mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
    ):
        first, second = fast.ours(), fast.ours()
    return {"compilation_s": first - second, **_against(plain, fast, "compiled_s")}


def _against(plain: Epoch, fast: Epoch, name: str) -> dict[str, Any]:
    """Both epochs in turn."""
    pairs = [(plain.ours(), fast.ours()) for _ in range(PAIRS)]
    return {
        "times_faster": median_interval([without / other for without, other in pairs]),
        "plain_s": [without for without, _ in pairs],
        name: [other for _, other in pairs],
    }


def compiled() -> Result:
    """On the GPU where there is one, replayed steps too; else with one thread, as a worker has it."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    families = {}
    with compiled_networks(MODES[0], device):
        pass  # torch's own start, and whether it can at all
    for family in compose([])["models"]:
        plain = epoch(family, device)[0]
        families[family] = {mode: _compiled(plain, mode) for mode in MODES}
        if device.type == "cuda":
            replayed = replace(plain, cuda_graphs=True)
            replayed.ours()
            families[family]["cuda_graphs"] = _against(plain, replayed, "replayed_s")
    return {"unit": "seconds per epoch", "pairs": PAIRS, "device": str(device), "families": families}, []
