from __future__ import annotations

import re
from pathlib import Path

import pytest

from pocd.config.secrets import CredentialError, check_secrets, located, read_keys, read_token, unit_of
from pocd.config.settings import ConfigError, load

SERVICE, INSTANCE = Path("/etc/pocd/pocd.toml"), Path("/etc/pocd/a.toml")
SECRET = "whsec_" + "QUFB" * 10


def test_each_configuration_has_its_unit() -> None:
    assert [unit_of(SERVICE), unit_of(INSTANCE)] == ["pocd.service", "pocd@a.service"]


def test_the_service_finds_a_credential_where_systemd_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "token").write_text("a token\n")
    (tmp_path / "key").write_text(SECRET)
    assert located(Path("credential:token"), SERVICE) == tmp_path / "token"
    assert read_token(Path("credential:token"), SERVICE) == "a token"
    assert read_keys(Path("credential:key"), SERVICE, "main") == read_keys(tmp_path / "key", SERVICE, "main")


@pytest.mark.parametrize(("config", "unit"), [(SERVICE, "pocd.service"), (INSTANCE, "pocd@a.service")])
def test_a_command_looks_in_the_folder_of_the_services_credentials(
    config: Path, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    text = f"admin.token_file: credential:token cannot be read at /run/credentials/{unit}/token by user "
    with pytest.raises(CredentialError, match=re.escape(text)) as refused:
        read_token(Path("credential:token"), config)
    assert "LoadCredential=token:FILE" in str(refused.value)
    assert "sudo" in str(refused.value)


def test_what_the_service_alone_can_read_is_named_and_everything_else_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    path, secret = tmp_path / "pocd.toml", tmp_path / "secret"
    path.write_text(
        "node.public_key = 'k'\nchain.urls = ['http://a']\nadmin.token_file = 'credential:token'\n"
        "[delivery]\nreceivers = ["
        f"{{ name = 'a', url = 'http://a', secret_file = 'credential:key' }}, "
        f"{{ name = 'b', url = 'http://b', secret_file = '{secret}' }}]\n"
    )
    settings = load(path)
    with pytest.raises(ConfigError, match=r"^delivery.receivers, b: "):
        check_secrets(settings, path)
    secret.write_text(SECRET)
    assert check_secrets(settings, path) == ["credential:token", "credential:key"]
