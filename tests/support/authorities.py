"""Certificates for tests, made by the command openssl."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


def _openssl(words: str, *more: str) -> None:
    subprocess.run(["openssl", *words.split(), *more], check=True, capture_output=True)


class Authority:
    """An authority that signs the certificates of a cluster's machines.

    Args:
        folder: Where all files are.
        name: Name of the authority, and of its files.
    """

    def __init__(self, folder: Path, name: str) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("openssl, which makes the certificates, is not installed")
        self._path = folder / name
        _openssl(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2",
            *("-subj", f"/CN={name}", "-keyout", f"{self._path}.key", "-out", f"{self._path}.crt"),
        )

    def certify(self, name: str, *addresses: str) -> dict[str, str]:
        """Make a certificate of the addresses; returns Ray's variables for the machine that has it."""
        path = self._path.with_name(name)
        extensions = path.with_suffix(".ext")
        extensions.write_text("subjectAltName=" + ",".join(f"IP:{address}" for address in addresses))
        _openssl(
            "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes",
            *("-subj", f"/CN={name}", "-keyout", f"{path}.key", "-out", f"{path}.csr"),
        )
        _openssl(
            f"x509 -req -days 2 -CAcreateserial -CA {self._path}.crt -CAkey {self._path}.key",
            *("-in", f"{path}.csr", "-out", f"{path}.crt", "-extfile", f"{extensions}"),
        )
        return {
            "RAY_USE_TLS": "1",
            "RAY_TLS_SERVER_CERT": f"{path}.crt",
            "RAY_TLS_SERVER_KEY": f"{path}.key",
            "RAY_TLS_CA_CERT": f"{self._path}.crt",
        }
