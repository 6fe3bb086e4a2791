"""What is said where a cluster's encryption does not fit this machine's: real sockets, without Ray."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from typing import TYPE_CHECKING

import pytest

from pocd.cluster.tls import CERT, mismatch
from tests.support.authorities import Authority
from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

HOST = "127.0.0.1"
SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"  # the frame that HTTP/2 begins with


@contextlib.contextmanager
def head(variables: Mapping[str, str], *, closes: bool = False) -> Iterator[int]:
    """A head's port: with TLS it wants a certificate, as Ray does; then it speaks as HTTP/2 servers do, or closes."""
    context = None
    if variables:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(variables["RAY_TLS_SERVER_CERT"], variables["RAY_TLS_SERVER_KEY"])
        context.load_verify_locations(variables["RAY_TLS_CA_CERT"])
        context.verify_mode = ssl.CERT_NONE if closes else ssl.CERT_REQUIRED

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # it was closed
            with connection, contextlib.suppress(OSError):
                connection.settimeout(PATIENCE)
                with context.wrap_socket(connection, server_side=True) if context else connection as speaking:
                    if not closes:
                        speaking.sendall(SETTINGS)
                        speaking.recv(1)

    with socket.create_server((HOST, 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_what_fits_is_no_reason(tmp_path: Path) -> None:
    ours = Authority(tmp_path, "ours").certify("machine", HOST)
    with head(ours) as port:
        assert mismatch(HOST, port, ours, PATIENCE) is None
    with head({}) as port:
        assert mismatch(HOST, port, {}, PATIENCE) is None


def test_one_side_alone_encrypts(tmp_path: Path) -> None:
    ours = Authority(tmp_path, "ours").certify("machine", HOST)
    with head(ours) as port:
        assert "the head encrypts (TLS), and this machine does not: set RAY_USE_TLS=1" in str(
            mismatch(HOST, port, {}, PATIENCE)
        )
    with head({}) as port:
        assert "this machine encrypts (RAY_USE_TLS), and the head does not" in str(mismatch(HOST, port, ours, PATIENCE))


def test_a_certificate_that_is_not_accepted_is_named(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ours")
    ours, elsewhere = authority.certify("machine", HOST), authority.certify("elsewhere", "10.9.9.9")
    strange = Authority(tmp_path, "theirs").certify("strange", HOST)
    with head(ours) as port:
        told = mismatch(HOST, port, strange, PATIENCE)
        assert str(told).startswith("the head's certificate is not accepted: ")
        told = mismatch(HOST, port, strange | {"RAY_TLS_CA_CERT": ours["RAY_TLS_CA_CERT"]}, PATIENCE)
        assert str(told).startswith(f"the head does not accept this machine's certificate, {CERT} {strange[CERT]}: ")
    with head(ours, closes=True) as port:
        assert "does not accept this machine's certificate" in str(mismatch(HOST, port, ours, PATIENCE))
    with head(elsewhere) as port:
        assert f"to name {HOST} as a subject alternative name" in str(mismatch(HOST, port, ours, PATIENCE))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"RAY_TLS_CA_CERT": ""}, "RAY_USE_TLS is set, and RAY_TLS_CA_CERT not"),
        ({"RAY_TLS_SERVER_CERT": "/nowhere"}, "RAY_TLS_SERVER_CERT /nowhere cannot be read: No such file or directory"),
        ({"RAY_TLS_CA_CERT": "/dev/null"}, "RAY_TLS_CA_CERT /dev/null is no certificate in PEM"),
        ({"RAY_TLS_SERVER_KEY": "/dev/null"}, "RAY_TLS_SERVER_KEY /dev/null are no certificate with its key"),
    ],
)
def test_files_of_no_use_are_named(tmp_path: Path, change: dict[str, str], told: str) -> None:
    ours = Authority(tmp_path, "ours").certify("machine", HOST)
    assert told in str(mismatch(HOST, 1, ours | change, PATIENCE)), "before anything is sent"
