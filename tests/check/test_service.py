from __future__ import annotations

from pathlib import Path

import pytest

from pocd.check.service import BOOTED, as_service, credentials, properties

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
        "ProtectHome=yes",
        "ProtectSystem=strict",
        "ReadWritePaths=/srv/store",
        "DeviceAllow=char-nvidia* rw",
        "ReadWritePaths=-/var/lib/pocd/a",
        "ReadWritePaths=-/var/cache/pocd",
        "ReadWritePaths=-/run/pocd-a",
    ]


def test_its_credentials_are_those_of_the_last_files_for_this_instance() -> None:
    written = ["[Service]", "#LoadCredential=no:/no", "LoadCredential=old:/old", "LoadCredential="]
    written += ["LoadCredential=token:/etc/pocd/%i.token", "LoadCredential=secret:/etc/pocd/secret"]
    expected = ["LoadCredential=token:/etc/pocd/a.token", "LoadCredential=secret:/etc/pocd/secret"]
    assert credentials(written, "pocd@a.service") == expected


@pytest.mark.skipif(BOOTED.is_dir(), reason="systemd runs here")
def test_without_systemd_there_is_no_service_to_check_as() -> None:
    assert as_service(Path("/etc/pocd/pocd.toml"), ["false"]) == (None, None)
