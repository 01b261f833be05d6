"""`scripts/make_keys`: what it writes is what TLS and Flower take, and it overwrites nothing."""

import datetime
import ipaddress
import socket
import ssl
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from cryptography.x509.verification import PolicyBuilder, Store

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "make_keys"


def make_keys(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "new"
    made = make_keys(
        str(folder), "--nodes", "2", "--host", "fl.example.org", "10.1.2.3", "--host", "other", "--days", "9"
    )
    assert made.returncode == 0, made.stderr
    for name in ("ca.crt", "ca.key", "server.pem", "server.key", "nodes/node-K", "nodes/*.pub"):
        assert f"\n  {name} " in made.stdout
    assert "ca.key         signs certificates: keep it away from the server" in made.stdout
    return folder


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "fl.example.org", "10.1.2.3", "other"])
def test_the_chain_verifies_for_every_host(keys: Path, name: str) -> None:
    subject = x509.IPAddress(ipaddress.ip_address(name)) if name[0].isdigit() else x509.DNSName(name)
    verifier = PolicyBuilder().store(Store([certificate(keys / "ca.crt")])).build_server_verifier(subject)
    assert len(verifier.verify(certificate(keys / "server.pem"), [])) == 2


def test_the_certificate_names_the_hosts_and_nothing_else(keys: Path) -> None:
    names = certificate(keys / "server.pem").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "fl.example.org", "other"]
    assert list(map(str, names.get_values_for_type(x509.IPAddress))) == ["127.0.0.1", "10.1.2.3"]


def test_it_is_valid_as_long_as_said(keys: Path) -> None:
    left = certificate(keys / "server.pem").not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=8) < left <= datetime.timedelta(days=9)


def handshake(folder: Path, trusted: Path, host: str) -> None:
    """A client that trusts `trusted` connects to a server with the certificate in `folder`, by the name `host`."""
    ours, theirs = socket.socketpair()
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(folder / "server.pem", folder / "server.key")

    def serve() -> None:
        try:
            server_context.wrap_socket(theirs, server_side=True).close()
        except OSError:  # the client has refused
            theirs.close()

    server = threading.Thread(target=serve)
    server.start()
    context = ssl.create_default_context(cafile=str(trusted))
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # as newer Pythons do
    try:
        context.wrap_socket(ours, server_hostname=host).close()
    finally:
        ours.close()
        server.join()


def test_a_client_of_the_ca_connects_and_others_do_not(keys: Path, tmp_path: Path) -> None:
    handshake(keys, keys / "ca.crt", "localhost")
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(keys, keys / "ca.crt", "elsewhere.example.org")
    assert make_keys(str(tmp_path)).returncode == 0
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        handshake(keys, tmp_path / "ca.crt", "localhost")


def test_private_files_are_their_owners_alone(keys: Path) -> None:
    modes = {
        str(path.relative_to(keys)): stat.S_IMODE(path.stat().st_mode) for path in keys.rglob("*") if path.is_file()
    }
    private = {"ca.key", "server.key", "nodes/node-0", "nodes/node-1"}
    public = {"ca.crt", "server.pem", "nodes/node-0.pub", "nodes/node-1.pub"}
    assert modes == {**dict.fromkeys(private, 0o600), **dict.fromkeys(public, 0o644)}


def test_each_node_has_a_p384_pair_in_openssh_format(keys: Path) -> None:
    numbers = []
    for number in (0, 1):
        private = load_ssh_private_key((keys / f"nodes/node-{number}").read_bytes(), None)
        public = load_ssh_public_key((keys / f"nodes/node-{number}.pub").read_bytes())
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert isinstance(public, ec.EllipticCurvePublicKey)
        assert isinstance(public.curve, ec.SECP384R1)
        assert private.public_key().public_numbers() == public.public_numbers()
        numbers.append(public.public_numbers())
    assert numbers[0] != numbers[1]


@pytest.mark.parametrize("present", ["ca.key", "nodes/node-1.pub"])
def test_nothing_is_overwritten(tmp_path: Path, present: str) -> None:
    (tmp_path / "nodes").mkdir()
    (tmp_path / present).write_text("mine")
    made = make_keys(str(tmp_path), "--nodes", "2")
    assert made.returncode == 2
    assert f"has {present} already, and keys are not overwritten: name another folder" in made.stderr
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [Path(present).name]
    assert (tmp_path / present).read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "fl.example.org:8000"], "'fl.example.org:8000' is neither an IP address nor a host name"),
        (["--host", "a b"], "'a b' is neither an IP address nor a host name"),
        (["--nodes", "0"], "--nodes and --days must be at least 1, got 0 and 365"),
    ],
)
def test_what_makes_no_keys_is_said(tmp_path: Path, arguments: list[str], message: str) -> None:
    made = make_keys(str(tmp_path / "new"), *arguments)
    assert made.returncode == 2
    assert message in made.stderr
    assert not (tmp_path / "new").exists()
