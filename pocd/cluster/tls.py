"""Whether a cluster's encryption fits this machine's: where it does not, Ray waits for minutes, and never says why.

The variables are Ray's own: RAY_USE_TLS, and of files RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY and RAY_TLS_CA_CERT.
"""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

CERT, KEY, CA = "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"
WHERE = "in /etc/pocd-ray/ray.env, which is the same on every machine of the cluster"


def uses_tls(environment: Mapping[str, str]) -> bool:
    """Tell whether Ray encrypts on this machine."""
    return environment.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def mismatch(host: str, port: int, environment: Mapping[str, str], limit: float) -> str | None:
    """Return why this machine and a head that listens cannot talk to one another; None where encryption is no reason.

    Args:
        host: Name or address of the head, which its certificate has to name.
        port: Port of the head.
        environment: Ray's variables.
        limit: Seconds for the connection, and for each answer.
    """
    if uses_tls(environment):
        try:
            return _refusal(host, port, _context(environment), environment, limit)
        except ValueError as error:
            return str(error)
    if _answers_tls(host, port, limit):
        return f"the head encrypts (TLS), and this machine does not: set RAY_USE_TLS=1, {CERT}, {KEY} and {CA} {WHERE}"
    return None


def _context(environment: Mapping[str, str]) -> ssl.SSLContext:
    """Return what a connection is made with.

    Raises:
        ValueError: A variable is missing, or its file is of no use.
    """
    if missing := [name for name in (CERT, KEY, CA) if not environment.get(name)]:
        raise ValueError(f"RAY_USE_TLS is set, and {', '.join(missing)} not: give the path of each {WHERE}")
    for name in (CERT, KEY, CA):
        try:
            with open(environment[name], "rb"):  # noqa: PTH123 - for its error alone, which names what is wrong
                pass
        except OSError as error:
            raise ValueError(f"{name} {environment[name]} cannot be read: {error.strerror}") from error
    try:
        context = ssl.create_default_context(cafile=environment[CA])
    except ssl.SSLError as error:
        raise ValueError(f"{CA} {environment[CA]} is no certificate in PEM: {_text(error)}") from error
    try:
        context.load_cert_chain(environment[CERT], environment[KEY])
    except ssl.SSLError as error:
        raise ValueError(
            f"{CERT} {environment[CERT]} and {KEY} {environment[KEY]} are no certificate with its key: {_text(error)}"
        ) from error
    context.set_alpn_protocols(["h2"])  # as gRPC does
    return context


def _refusal(host: str, port: int, context: ssl.SSLContext, environment: Mapping[str, str], limit: float) -> str | None:
    """Return why one side does not accept the other's certificate, or does not encrypt; None where they can talk."""
    try:
        with (
            socket.create_connection((host, port), timeout=limit) as plain,
            context.wrap_socket(plain, server_hostname=host) as encrypted,
        ):
            return _late_refusal(encrypted, environment)
    except ssl.SSLCertVerificationError as error:
        return (
            f"the head's certificate is not accepted: {error.verify_message}; it has to be signed by {CA} "
            f"({environment[CA]}) and to name {host} as a subject alternative name"
        )
    except TimeoutError:
        return f"the head did not answer to TLS within {limit:.0f} s"
    except OSError as error:  # ssl.SSLError is one
        return f"this machine encrypts (RAY_USE_TLS), and the head does not: {_text(error)}; set the same {WHERE}"


def _late_refusal(encrypted: ssl.SSLSocket, environment: Mapping[str, str]) -> str | None:
    """Return why the head does not accept this machine's certificate, which it says after the handshake."""
    try:
        if encrypted.recv(1):
            return None
        why = "it closes the connection"  # gRPC says no more
    except TimeoutError:
        return None  # it waits for what Ray says first
    except OSError as error:
        why = _text(error)
    return (
        f"the head does not accept this machine's certificate, {CERT} {environment[CERT]}: {why}; it has to be signed "
        "by the authority that the head knows"
    )


def _answers_tls(host: str, port: int, limit: float) -> bool:
    """Tell whether a server encrypts, whatever its certificate says."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), timeout=limit) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return True
    except OSError:
        return False


def _text(error: OSError) -> str:
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return error.strerror or type(error).__name__
