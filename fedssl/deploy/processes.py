"""Flower's processes under fedssl's: a SuperLink and what is asked of it, a SuperNode and what it may start."""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedssl.environment import DEFAULTS
from fedssl.errors import ConfigError, FedSSLError
from fedssl.federation import flower_compat

READY_SECONDS = 60.0  # for a SuperLink to answer
END_SECONDS = 10.0  # for a process to end when asked, before it is killed
LOOK_SECONDS = 5.0  # for a server to say how it speaks
RUN_CONFIG = "cfg-json"  # key of Flower's run config: the run, in one JSON value
NODE_FILE = "fedssl-node"  # key of a SuperNode's node config: the file that says what it brings
PRCTL = ctypes.CDLL(None).prctl  # looked up before a fork
CONNECTION = "fedssl"  # the SuperLink's name in Flower's config.toml


@dataclass(frozen=True, kw_only=True)
class Certificates:
    """Files of one folder, as scripts/make_keys writes them."""

    folder: Path

    def __post_init__(self) -> None:
        if not self.ca.is_file():
            raise ConfigError(
                f"--certificates {self.folder}: there is no {self.ca.name}. scripts/make_keys DIR makes a development "
                f"CA and keys; --insecure does without, for trials on one machine"
            )

    @property
    def ca(self) -> Path:
        """The certificate of who signed the server's."""
        return self.folder / "ca.crt"

    @property
    def context(self) -> ssl.SSLContext:
        """For whoever connects to the server."""
        try:
            return ssl.create_default_context(cafile=str(self.ca))
        except ssl.SSLError as error:
            raise ConfigError(f"--certificates {self.folder}: {self.ca.name} is no certificate ({error})") from error

    @property
    def of_the_server(self) -> list[str]:
        """Options of `flower-superlink`."""
        files = {"--ssl-certfile": self.folder / "server.pem", "--ssl-keyfile": self.folder / "server.key"}
        for option, file in files.items():
            if not file.is_file():
                raise ConfigError(f"--certificates {self.folder}: there is no {file.name} (for {option})")
        return [
            "--ssl-ca-certfile", str(self.ca), *(text for pair in files.items() for text in (pair[0], str(pair[1])))
        ]  # fmt: skip


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind((host, 0))
        port: int = sock.getsockname()[1]
        return port


def environment(home: Path, bin_dir: Path | None = None) -> dict[str, str]:
    """What Flower's processes see: a home of their own, this environment's commands, no telemetry, no update check."""
    own = str(Path(sys.executable).parent)
    path = os.pathsep.join(filter(None, [str(bin_dir) if bin_dir else "", own, os.environ.get("PATH", "")]))
    python_path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    poll = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}  # seconds; Flower's own default is 1
    forced = {
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": path,
        "PYTHONPATH": python_path,
    }
    return {**DEFAULTS, **poll, **os.environ, **forced}


def family_tree(pid: int) -> list[int]:
    """`pid` and the processes that it and its children started, the oldest first; without those that have ended."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                parents[int(stat.parent.name)] = int(fields[1])
    found = [pid] if pid in parents else []
    new = [pid]
    while new := [child for child, parent in parents.items() if parent in new]:
        found += new
    return found


def end(process: subprocess.Popen[Any]) -> None:
    """Ask a process and all that it started to end, then make them."""
    theirs = [pid for pid in family_tree(process.pid) if pid != process.pid]
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    _signal_session(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + END_SECONDS  # Flower's processes end when those that started them have
    while time.monotonic() < deadline and (_signal_session(process.pid, 0) or any(map(family_tree, theirs))):
        time.sleep(0.05)
    _signal_session(process.pid, signal.SIGKILL)
    for pid in theirs:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _signal_session(leader: int, number: int) -> bool:
    """Send a signal to what is left of the session that this process led; False where nobody is."""
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        return False
    return True


def end_with_parent() -> None:
    """For `preexec_fn`: Linux ends this process when the one that starts it dies, however it does."""
    PRCTL(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def check_protection(address: str, certificates: Certificates | None) -> None:
    """Does who answers at `address` speak as this node does? By itself a SuperNode goes on trying, without a reason.

    Raises:
        ConfigError: it has another certificate, or one of both speaks plain text and the other TLS; or the address is
            none. Nothing where nobody answers: a server may come later.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit():
        raise ConfigError(f"{address!r} is no address of a server: SERVER:PORT, e.g. fl.example.org:8000")
    context = certificates.context if certificates else ssl.create_default_context()
    if certificates is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    try:
        with socket.create_connection((host, int(port)), timeout=LOOK_SECONDS) as plain:
            context.wrap_socket(plain, server_hostname=host).close()
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"the certificate of the server at {address} is refused: {error.verify_message}. ca.crt (--certificates) "
            f"must be of who signed it, and it must name {host} (scripts/make_keys --host)."
        ) from error
    except ssl.SSLError as error:
        if certificates is not None and error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):
            raise ConfigError(f"the server at {address} speaks plain text, this node TLS (--certificates)") from error
    except OSError:
        pass
    else:
        if certificates is None:
            raise ConfigError(f"the server at {address} speaks TLS: --certificates DIR in place of --insecure")


class SuperLink:
    """A `flower-superlink` of this run alone, and Flower's commands about it. A context manager.

    Args:
        home: an existing folder for Flower's files.
        host: address that it listens on.
        port: likewise.
        certificates: for TLS; None: plain text.
        authenticated: nodes need a key that `register` has taken.
    """

    def __init__(
        self, home: Path, *, host: str, port: int, certificates: Certificates | None, authenticated: bool
    ) -> None:
        self.home = home
        self.log = home / "superlink.log"
        self.environment = environment(home)
        self.certificates = certificates
        if authenticated and certificates is None:
            raise ConfigError("nodes can be known by their keys only over TLS: --keys needs --certificates")
        with contextlib.closing(socket.socket()) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((host, port))
            except OSError as error:
                raise ConfigError(f"--host {host} --port {port} cannot be listened on: {error.strerror}") from error
        tls = certificates.of_the_server if certificates else ["--insecure"]
        authentication = ["--enable-supernode-auth"] if authenticated else []
        self._log = self.log.open("wb")
        self.process = subprocess.Popen(
            ["flower-superlink", *tls, *authentication, "--host", host, "--port", str(port),
             "--disable-runtime-dependency-installation"],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT, env=self.environment,
            start_new_session=True,  # Ctrl-C reaches us, and we end it
            preexec_fn=end_with_parent,
        )  # fmt: skip
        self.address = f"127.0.0.1:{port}" if host in ("0.0.0.0", "::") else f"{host}:{port}"
        lines = [f"[superlink.{CONNECTION}]", f'address = "{self.address}"']
        lines.append(f'root-certificates = "{certificates.ca.resolve()}"' if certificates else "insecure = true")
        (home / "config.toml").write_text("\n".join(lines) + "\n")

    def wait_until_ready(self) -> None:
        """Return once it answers; `FedSSLError` with its last lines where it does not."""
        context = self.certificates.context if self.certificates else None
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), *([urllib.request.HTTPSHandler(context=context)] if context else [])
        )
        url = f"{'https' if context else 'http'}://{self.address}/health"
        deadline = time.monotonic() + READY_SECONDS
        reason = ""
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with opener.open(url, timeout=5):
                    return
            except (urllib.error.URLError, OSError) as error:
                reason = str(error)
                time.sleep(0.2)
        raise FedSSLError(f"the SuperLink does not answer at {url} ({reason}); its last lines:\n{self.last_lines()}")

    def last_lines(self, count: int = 30) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])

    def register(self, public_key: Path) -> None:
        """Let the node with this key in."""
        self.flwr("supernode", "register", str(public_key.resolve()), CONNECTION)

    def submit(self, app: Path, run_config: Path) -> int:
        """Start a run of the app; Flower's number of it."""
        said = self.flwr("run", str(app), CONNECTION, "--run-config", str(run_config), "--format", "json")
        try:
            answer = json.loads(said[said.index("{") :])
            return int(answer["run-id"])
        except (ValueError, KeyError) as error:
            raise FedSSLError(f"flwr run did not start the run: {said.strip()}") from error

    def status(self, flower_run: int) -> tuple[str, str]:
        """Status ("running", "finished:failed", ...) and details of a run, as `flwr list` has them."""
        said = self.flwr("list", "--run-id", str(flower_run), CONNECTION, "--format", "json")
        run = json.loads(said[said.index("{") :])["runs"][0]
        return str(run["status"]), str(run.get("status-details", ""))

    def interrupt(self) -> None:
        """Let the ServerApp end in order, with its summary, while the SuperLink still answers it."""
        for pid in family_tree(self.process.pid):
            with contextlib.suppress(OSError):
                if flower_compat.SERVERAPP_COMMAND.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGINT)
                    deadline = time.monotonic() + END_SECONDS
                    while family_tree(pid) and time.monotonic() < deadline:
                        time.sleep(0.05)

    def flwr(self, *arguments: str) -> str:
        """What `flwr <arguments>` prints; `FedSSLError` where it fails."""
        done = subprocess.run(
            ["flwr", *arguments], env=self.environment, capture_output=True, text=True, check=False, cwd=self.home
        )
        if done.returncode != 0:
            raise FedSSLError(f"flwr {' '.join(arguments)} failed: {(done.stdout + done.stderr).strip()}")
        return done.stdout

    def __enter__(self) -> "SuperLink":
        return self

    def __exit__(self, *_: object) -> None:
        end(self.process)
        self._log.close()


def own_commands(folder: Path, warm: Path) -> Path:
    """A folder for the front of a SuperNode's PATH: its tasks run the installed fedssl, and nothing that is sent.

    Args:
        folder: is made.
        warm: the socket of `fedssl.deploy.warm`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in flower_compat.task_commands():
        if name == flower_compat.CLIENTAPP_COMMAND:
            text = f'#!/bin/sh\nexec "{sys.executable}" -m fedssl.deploy.front "{warm}" "$@"\n'
        else:
            text = f'#!/bin/sh\necho "this node runs clients of fedssl, no {name}" >&2\nexit 1\n'
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def supernode_command(
    address: str, *, certificates: Certificates | None, key: Path | None, node_config: Mapping[str, str | int]
) -> list[str]:
    """`flower-supernode` with a free port for its own processes."""
    if key is not None and certificates is None:
        raise ConfigError("a node is known by its key only over TLS: --key needs --certificates")
    tls = ["--root-certificates", str(certificates.ca)] if certificates else ["--insecure"]
    authentication = ["--auth-supernode-private-key", str(key)] if key else []
    pairs = " ".join(
        f'{name}="{value}"' if isinstance(value, str) else f"{name}={value}" for name, value in node_config.items()
    )
    return [
        "flower-supernode", *tls, *authentication, "--superlink", address,
        "--host", "127.0.0.1", "--port", str(free_port()), "--node-config", pairs,
    ]  # fmt: skip


@contextlib.contextmanager
def ending_on_signals(*numbers: signal.Signals) -> Iterator[None]:
    """Inside, these signals are what Ctrl-C is, a KeyboardInterrupt: what was started is ended in order.

    Afterwards the handlers before come back. Outside the main thread, which alone can have handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def bundle_dir() -> Path:
    """The folder of the thin Flower app: a checkout's own `deploy/app`, or the copy that a wheel carries."""
    inside = Path(__file__).parent / "app"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "deploy" / "app"


def copy_bundle(folder: Path) -> Path:
    """A copy of the thin app, which Flower may rewrite."""
    shutil.copytree(bundle_dir(), folder, dirs_exist_ok=True)
    return folder


def run_config(path: Path, told: Mapping[str, Any]) -> Path:
    """Write what the apps are told as Flower's run configuration: a TOML file with one string of JSON."""
    text = json.dumps(json.dumps(told), ensure_ascii=True)  # JSON's escapes are TOML's, too
    path.write_text(f"{RUN_CONFIG} = {text}\n")
    return path


def last_chunk(path: Path, offset: int) -> tuple[str, int]:
    """What was written to a file since `offset`, and where it ends now."""
    if not path.is_file():
        return "", offset
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    return data.decode(errors="replace"), offset + len(data)
