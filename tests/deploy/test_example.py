"""`deploy/example` as a person starts it; and who is not let in. Real Flower processes on loopback, over TLS."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from fedssl.deploy.processes import end, free_port

ROOT = Path(__file__).resolve().parents[2]
MARK = "FEDSSL_TEST_MARK"  # in the environment of what a test starts, and so of all that this starts
DEPLOY = [sys.executable, "-m", "fedssl.deploy.command"]

pytestmark = pytest.mark.deploy


def marked(mark: str) -> dict[int, str]:
    """Running processes with the mark, and their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has ended, or is another user's
            continue
    return found


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Of processes of which none may be left when the test is over."""
    mark = uuid4().hex
    yield {**os.environ, MARK: mark, "PYTHONPATH": str(ROOT)}
    deadline = time.monotonic() + 10  # flower-superexec looks once a second whether its SuperLink is still there
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == {}


def test_the_example_completes_and_leaves_no_process(tmp_path: Path, environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "deploy/example"), str(tmp_path)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    seen: set[str] = set()
    while process.poll() is None:
        seen |= set(marked(environment[MARK]).values())
        time.sleep(0.5)
    assert process.stdout is not None
    said = process.stdout.read()
    process.stdout.close()
    assert process.returncode == 0, said
    (superlink,) = {command for command in seen if "/flower-superlink --" in command}
    assert "--ssl-certfile" in superlink
    assert "--enable-supernode-auth" in superlink
    supernodes = [command for command in seen if "/flower-supernode --" in command]
    assert {key for c in supernodes for key in re.findall(r"--auth-supernode-private-key \S+/(node-\d) ", c)} == {
        "node-0", "node-1", "node-2",
    }  # fmt: skip
    assert not [command for command in (superlink, *supernodes) if "--insecure" in command]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["status"] == "completed"
    assert {family: result["num_clients"] for family, result in summary["families"].items()} == {
        "conv4_16": 1, "conv4_32": 1, "resnet8": 1,
    }  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["metrics"]["num_ok"] for row in rows if row["scope"] == "round"] == [3]


def test_an_example_of_bad_settings_ends_with_the_code_of_its_server(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    ended = subprocess.run(
        [sys.executable, str(ROOT / "deploy/example"), str(tmp_path), "strategy=nothing"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    assert "nothing" in ended.stderr


def test_who_is_not_let_in(tmp_path: Path, environment: dict[str, str]) -> None:
    """No key, a strange key, plain text: each node ends, while the server waits for the right one and runs with it."""
    for name in ("ours", "others"):
        subprocess.run(
            [sys.executable, str(ROOT / "scripts/make_keys"), str(tmp_path / name), "--nodes", "1"], check=True
        )
    port = free_port()
    ours = ["--certificates", str(tmp_path / "ours")]
    server = subprocess.Popen(
        [
            *DEPLOY, "server", "--port", str(port), *ours, "--keys", str(tmp_path / "ours/nodes"), "--wait", "240",
            f"run_dir={tmp_path / 'run'}", "federation.num_clients=1", "federation.families=[conv4_16]",
            "federation.num_rounds=1", "data.num_images=200", "public.size=50", "client.local_epochs=1",
            "distill.epochs=1",
        ],
        env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip

    def client(*options: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*DEPLOY, "client", f"localhost:{port}", "--restarts", "0", *options, "partition_id=0"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def refused(*options: str) -> tuple[int, str]:
        node = client(*options, f"store={tmp_path / uuid4().hex}")
        try:
            said, _ = node.communicate(timeout=120)
        finally:
            end(node)
        return node.returncode, said

    started = [server]
    try:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("SuperLink at ")
        for options, reason in (
            (["--key", str(tmp_path / "others/nodes/node-0")], "Failed to activate SuperNode"),
            ([], "SuperNode authentication is enabled"),
        ):
            code, said = refused(*ours, *options)
            assert code == 1, said
            assert reason in said
        code, said = refused("--insecure")
        assert code == 2, said
        assert f"the server at localhost:{port} speaks TLS" in said
        code, said = refused("--certificates", str(tmp_path / "others"))
        assert code == 2, said
        assert f"the certificate of the server at localhost:{port} is refused" in said
        assert server.poll() is None
        started.append(client(*ours, "--key", str(tmp_path / "ours/nodes/node-0"), f"store={tmp_path / 'node'}"))
        said, _ = server.communicate(timeout=240)
        assert server.returncode == 0, said
        assert "1 node is there: 0 (conv4_16)" in said
    finally:
        for process in reversed(started):
            end(process)
            assert process.stdout is not None
            process.stdout.close()
