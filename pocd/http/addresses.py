"""Rules for outgoing calls: IP addresses, judged when connecting, and origins, named in the configuration.

A URL that comes by the API must not make us call what only this host can reach: above all the metadata service of
its cloud, which gives credentials to whoever asks. Receivers beside us are common, so loopback and private addresses
are allowed; the origins are what bounds those.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

# Metadata that is not at a link-local address, where most clouds have it (169.254.169.254), with who says so.
METADATA = {
    # Amazon EC2, "Instance metadata" and "IPv6 on AWS": fd00:ec2::254, and beside it EKS Pod Identity (::23), DNS, time
    "fd00:ec2::/32": "EC2's services for instances",
    # Google Compute Engine, "View and query VM metadata": instances that have IPv6 only
    "fd20:ce::254/128": "Google Cloud's metadata",
    # Microsoft Azure, "What is IP address 168.63.129.16?"
    "168.63.129.16/32": "Azure's platform",
    # Alibaba Cloud ECS, "Obtain instance metadata"
    "100.100.100.200/32": "Alibaba Cloud's metadata",
    "fd00:100::100:200/128": "Alibaba Cloud's metadata",
    # Oracle Cloud Infrastructure Classic, "Retrieving instance metadata"
    "192.0.0.192/32": "Oracle Cloud's metadata",
    # Oracle Cloud Infrastructure: its Python SDK's instance principals
    "fd00:c1::a9fe:a9fe/128": "Oracle Cloud's metadata",
    # Scaleway: cloud-init's documentation of its data source
    "fd00:42::42/128": "Scaleway's metadata",
    # Akamai, formerly Linode: "Metadata service API"
    "fd00:a9fe:a9fe::1/128": "Akamai's metadata",
    # Volcano Engine ECS, "Instance metadata"
    "100.96.0.96/32": "Volcano Engine's metadata",
}
_METADATA = {ipaddress.ip_network(network): name for network, name in METADATA.items()}
_THIS_NETWORK = ipaddress.IPv4Network(
    "0.0.0.0/8"
)  # RFC 1122 section 3.2.1.3: no destination; Linux takes it for itself

# IPv6 networks in which the last four bytes are an IPv4 address.
_EMBEDDING = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "::ffff:0:0/96",  # mapped: RFC 4291 section 2.5.5.2
        "::ffff:0:0:0/96",  # translated: RFC 7915 (formerly RFC 2765)
        "::/96",  # compatible: RFC 4291 section 2.5.5.1
        "64:ff9b::/96",  # NAT64: RFC 6052 section 2.1
        "64:ff9b:1::/48",  # NAT64 within a network: RFC 8215; of its forms the one with a prefix of 96 bits
    )
)
_ONLY_IPV6 = {ipaddress.IPv6Address("::"), ipaddress.IPv6Address("::1")}  # and nothing compatible

_ORIGIN = re.compile(r"(https?)://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([1-9][0-9]{0,4}))?", re.ASCII | re.IGNORECASE)
NUMERIC = re.compile("0x[0-9a-f]*|[0-9]+")  # the last part of a host that some take for an address
_DEFAULT_PORTS = {"http": 80, "https": 443}


def refusal(address: str) -> str | None:
    """Return why `address` must not be called; None when it may be.

    Args:
        address: An IP address as the kernel gets it: IPv4, or IPv6 with or without a scope. Anything else is refused.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return f"{address!r} is not an IP address"
    for each in (parsed, *_embedded(parsed)):
        if reason := _reason(each):
            return f"{address} is refused: {reason}"
    return None


def _reason(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str | None:
    if address.is_link_local:  # RFC 3927 section 2, RFC 4291 section 2.5.6
        return "it is link-local, where clouds keep their metadata"
    if address.is_multicast:
        return "it is multicast"
    if address.is_unspecified or address in _THIS_NETWORK:
        return "it names no host"
    if address == ipaddress.IPv4Address("255.255.255.255"):
        return "it is broadcast"
    return next((f"it is {name}" for network, name in _METADATA.items() if address in network), None)


def _embedded(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """Return the IPv4 addresses that packets to an IPv6 address may end at."""
    if address.version == 4 or address in _ONLY_IPV6:
        return []
    if address.sixtofour:  # RFC 3056
        return [address.sixtofour]
    if address.teredo:  # RFC 4380: the server, and the client behind it
        return list(address.teredo)
    if any(address in network for network in _EMBEDDING):
        return [ipaddress.IPv4Address(address.packed[-4:])]
    return []


def origin(url: str) -> str | None:
    """Return scheme, host and port of `url` in one form (`https://host:443`), or None where they are not beyond doubt.

    What two programs may read differently has no origin: user info, backslashes, blanks and control characters, names
    that are not ASCII or end with a dot, numbers that only some take for an address (127.1, 0x7f000001, 010.0.0.1).
    """
    found = _ORIGIN.match(url)
    if found is None or not url.isprintable() or " " in url or "\\" in url:
        return None
    if url[found.end() : found.end() + 1] not in {"", "/", "?", "#"}:
        return None
    scheme, host = found[1].lower(), found[2].lower()
    port = int(found[3]) if found[3] else _DEFAULT_PORTS[scheme]
    name = _host(host)
    return f"{scheme}://{name}:{port}" if name and port <= 65535 else None


def _host(host: str) -> str | None:
    """Return a host in lower case in the one form that it has, or None where it has several."""
    try:
        if host.startswith("["):
            return f"[{ipaddress.IPv6Address(host[1:-1])}]"
        if NUMERIC.fullmatch(host.rpartition(".")[2]):
            return str(ipaddress.IPv4Address(host))
    except ValueError:
        return None
    return host if all(host.split(".")) else None


def allowed_origin(url: str, origins: Iterable[str]) -> bool:
    """Tell whether `url` leads to one of `origins`: the same scheme, host and port; when in doubt, it does not.

    Args:
        url: From anybody.
        origins: From the configuration: origins, or URLs, which stand for theirs; user info in them does not count.
    """
    asked = origin(url)
    return asked is not None and asked in {origin(re.sub("://[^/?#]*@", "://", each)) for each in origins}
