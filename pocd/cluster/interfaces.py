"""The network interface by which a machine of a cluster is reached."""

from __future__ import annotations

import psutil  # Ray brings it


def interface_of(address: str) -> str:
    """Return the name of this machine's network interface that has an address.

    Raises:
        OSError: None has it.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return str(name)
    raise OSError(
        f"no network interface has the address {address}, which Ray has for this machine: give `ray start` its own as "
        "--node-ip-address, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME for Ray here"
    )
