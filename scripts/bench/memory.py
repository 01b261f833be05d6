"""The server's private memory for 10 clients on a public set of 50,000 images, from their messages to targets."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.measure import Result, in_own_process, judge
from flwr.app import Message

from fedssl.codecs import Codec, Factor, TopK
from fedssl.ensemble import EnsembleTarget, RowMean
from fedssl.environment import keep_memory
from fedssl.federation.flower_compat import identify_process
from fedssl.federation.records import Header, Upload
from fedssl.similarity import Similarity

CLIENTS, IMAGES, DIM = 10, 50_000, 128
STEPS, BATCH, ANCHORS = 100, 128, 2_048
REPETITIONS = 3
SAMPLE_S = 0.02
LIMIT_GB = 0.6
CODECS: dict[str, Codec] = {
    "factor": Factor(dtype="fp16", max_bytes=500_000_000),
    "topk": TopK(dtype="fp16", k=64, percent=None, floor=0.0, max_bytes=500_000_000),
}


def private_bytes() -> int:
    """What this process alone holds in memory: pages that nobody shares, clean and dirty."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_") and "Hugetlb" not in line)


class Peak(threading.Thread):
    """The largest `private_bytes`, sampled until `stop`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self._stopped = threading.Event()

    def run(self) -> None:
        """Sample until `stop`."""
        while not self._stopped.wait(SAMPLE_S):
            self.bytes = max(self.bytes, private_bytes())

    def stop(self) -> int:
        """The peak so far, the last."""
        self._stopped.set()
        self.join()
        return self.bytes


def messages(codec: Codec) -> list[Message]:
    """Each client's upload as a reply, encoded one after the other; only the replies stay."""
    received = []
    for client in range(CLIENTS):
        generator = torch.Generator().manual_seed(client)
        embeddings = torch.randn(IMAGES, DIM, generator=generator)
        header = Header(
            round_num=1, partition_id=client, family="resnet8", codec=codec.name, public_fingerprint="0" * 64
        )
        upload = Upload(header=header, arrays=codec.encode(embeddings, generator), metrics={"num-examples": 1.0})
        received.append(Message(upload.to_content(), client + 1, "train"))
    return received


def targets(similarities: Sequence[Similarity]) -> float:
    """Targets of as many steps as there are; their sum, so that they are computed."""
    target = EnsembleTarget(similarities, RowMean(), 0.1)
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(STEPS):
        rows, anchors = (torch.randint(IMAGES, (size,), generator=generator) for size in (BATCH, ANCHORS))
        total += target(rows, anchors).sum().item()
    return total


def one_round(name: str) -> dict[str, float]:
    """Peak above the import baseline, in GB, and the seconds of each stage. For a fresh process."""
    identify_process()
    keep_memory()  # as a run does
    codec = CODECS[name]
    baseline = private_bytes()
    peak = Peak()
    peak.start()
    times = [time.perf_counter()]
    received = messages(codec)
    times.append(time.perf_counter())
    encoded = peak.bytes
    similarities = [codec.decode(Upload.from_message(message).arrays, IMAGES) for message in received]
    times.append(time.perf_counter())
    total = targets(similarities)  # type: ignore[arg-type]
    times.append(time.perf_counter())
    assert np.isclose(total, STEPS * BATCH, rtol=1e-4), total
    encode_s, decode_s, targets_s = np.diff(times).tolist()
    return {
        "peak_gb": (peak.stop() - baseline) / 1e9,
        "encoding_peak_gb": (encoded - baseline) / 1e9,
        "end_gb": (private_bytes() - baseline) / 1e9,
        "baseline_gb": baseline / 1e9,
        "encode_s": encode_s,
        "decode_s": decode_s,
        "targets_s": targets_s,
    }


def memory() -> Result:
    """Each codec in processes of its own, in turn."""
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in CODECS}
    for _ in range(REPETITIONS):
        for name, done in rounds.items():
            done.append(in_own_process(f"bench.memory.one_round({name!r})"))
    figures: dict[str, Any] = {
        "clients": CLIENTS,
        "images": IMAGES,
        "dim": DIM,
        "steps": STEPS,
        "wire_gb": {name: CLIENTS * codec.num_bytes(IMAGES, DIM) / 1e9 for name, codec in CODECS.items()},
        "rounds": rounds,
    }
    bars = [
        judge(f"memory.{name}_gb", [one["peak_gb"] for one in done], LIMIT_GB, "lower") for name, done in rounds.items()
    ]
    return figures, bars
