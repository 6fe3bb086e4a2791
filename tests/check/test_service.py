from __future__ import annotations

from pathlib import Path

import pytest

from pocd.check.service import BOOTED, as_service, properties

# As `systemctl show` of systemd 252 prints them, for an instance with drop-ins.
SHOWN = """\
LoadState=loaded
ExecStart={ path=/opt/pocd/bin/pocd ; argv[]=/opt/pocd/bin/pocd run --config /etc/pocd/a.toml ; ignore_errors=no ; }
User=pocd
Group=pocd
SupplementaryGroups=
UMask=0077
Environment=HF_HOME=/var/cache/pocd/huggingface "POCD_MODEL__NAME=/srv/a model"
EnvironmentFiles=/etc/pocd/env (ignore_errors=no)
EnvironmentFiles=/etc/pocd/more (ignore_errors=yes)
LoadCredential=token:/etc/pocd/token receiver-secret:/etc/pocd/secret
ProtectHome=yes
ProtectSystem=strict
ReadWritePaths=/srv/store
DeviceAllow=char-nvidia* rw
StateDirectory=pocd/a
CacheDirectory=pocd
RuntimeDirectory=pocd-a:link
"""


def test_a_check_sees_what_the_service_sees_and_owns_none_of_its_folders() -> None:
    limit, *given = properties(SHOWN.splitlines())
    assert limit.startswith("RuntimeMaxSec=")
    assert given == [
        "User=pocd",
        "Group=pocd",
        "UMask=0077",
        'Environment=HF_HOME=/var/cache/pocd/huggingface "POCD_MODEL__NAME=/srv/a model"',
        "EnvironmentFile=/etc/pocd/env",
        "EnvironmentFile=-/etc/pocd/more",
        "LoadCredential=token:/etc/pocd/token",
        "LoadCredential=receiver-secret:/etc/pocd/secret",
        "ProtectHome=yes",
        "ProtectSystem=strict",
        "ReadWritePaths=/srv/store",
        "DeviceAllow=char-nvidia* rw",
        "ReadWritePaths=-/var/lib/pocd/a",
        "ReadWritePaths=-/var/cache/pocd",
        "ReadWritePaths=-/run/pocd-a",
    ]


@pytest.mark.skipif(BOOTED.is_dir(), reason="systemd runs here")
def test_without_systemd_there_is_no_service_to_check_as() -> None:
    assert as_service(Path("/etc/pocd/pocd.toml"), ["false"]) == (None, None)
