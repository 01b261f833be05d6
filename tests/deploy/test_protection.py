"""What a node says before it starts where it and the server do not speak alike; a SuperNode would try forever."""

import contextlib
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedssl.deploy.command import main
from fedssl.deploy.processes import Certificates, check_protection, end, free_port
from fedssl.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "others"):
        subprocess.run([sys.executable, str(ROOT / "scripts/make_keys"), str(folder / name)], check=True)
    return folder


@contextlib.contextmanager
def listening(context: ssl.SSLContext | None) -> Iterator[int]:
    """A server that speaks TLS, or answers whatever it gets with an HTTP error; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):  # the test is over
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        if context is None:
                            connection.recv(10_000)
                            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                        else:
                            context.wrap_socket(connection, server_side=True).close()

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def tls(keys: Path) -> Iterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys / "ours/server.pem", keys / "ours/server.key")
    with listening(context) as port:
        yield port


def test_alike_is_no_error(keys: Path, tls: int) -> None:
    for host in ("localhost", "127.0.0.1"):
        check_protection(f"{host}:{tls}", Certificates(folder=keys / "ours"))
    with listening(None) as plain:
        check_protection(f"localhost:{plain}", None)


def test_nobody_there_is_no_error(keys: Path) -> None:
    """The server may come later, and the SuperNode waits for it."""
    check_protection(f"127.0.0.1:{free_port()}", None)
    check_protection(f"127.0.0.1:{free_port()}", Certificates(folder=keys / "ours"))


def test_plain_text_to_a_tls_server(tls: int) -> None:
    with pytest.raises(ConfigError, match=f"localhost:{tls} speaks TLS: --certificates DIR in place of --insecure"):
        check_protection(f"localhost:{tls}", None)


def test_tls_to_a_plain_text_server(keys: Path) -> None:
    with listening(None) as port, pytest.raises(ConfigError, match="speaks plain text, this node TLS"):
        check_protection(f"localhost:{port}", Certificates(folder=keys / "ours"))


def test_a_server_of_another_ca(keys: Path, tls: int) -> None:
    with pytest.raises(ConfigError, match=r"is refused: .*\. ca\.crt \(--certificates\) must be of who signed it"):
        check_protection(f"localhost:{tls}", Certificates(folder=keys / "others"))


@pytest.mark.parametrize("address", ["localhost", "localhost:", ":8000", "localhost:http"])
def test_no_address(address: str) -> None:
    with pytest.raises(ConfigError, match="is no address of a server: SERVER:PORT"):
        check_protection(address, None)


def test_a_ca_that_is_no_certificate(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("not one")
    with pytest.raises(ConfigError, match=r"ca\.crt is no certificate"):
        check_protection("localhost:1", Certificates(folder=tmp_path))


def test_the_command_ends_with_it(tls: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["client", f"localhost:{tls}", "--insecure", "partition_id=0", f"store={tmp_path}"])
    assert code == 2
    assert "speaks TLS" in capsys.readouterr().err


@pytest.mark.parametrize("leader", ["sh child & wait", "sh child &"])  # the second ends by itself
def test_the_end_of_a_process_is_that_of_its_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leader: str
) -> None:
    """Also of what does not end when asked."""
    monkeypatch.setattr("fedssl.deploy.processes.END_SECONDS", 0.5)
    (tmp_path / "child").write_text("trap '' TERM; echo $$ > new; mv new number; while true; do sleep 0.1; done")
    process = subprocess.Popen(["sh", "-c", leader], cwd=tmp_path, start_new_session=True)
    while not (tmp_path / "number").is_file():
        time.sleep(0.02)
    number = int((tmp_path / "number").read_text())
    assert alive(number)
    end(process)
    assert process.poll() is not None
    deadline = time.monotonic() + 5
    while alive(number) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(number)


def alive(process: int) -> bool:
    """Whether it runs; one that has ended may wait for its parent to notice."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
