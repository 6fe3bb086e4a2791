"""The configuration: the shipped file, what is refused and how, and the way back to TOML."""

from __future__ import annotations

import os
import re
import tomllib
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from pocd.config.model import check_model
from pocd.config.roles import NEEDED, Role, missing
from pocd.config.settings import ConfigError, Settings, foreign_variables, load, load_admin
from pocd.config.shown import to_toml
from pocd.process import EXIT_TEMPORARY, EndedError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

SHIPPED = Path(__file__).resolve().parent.parent.parent / "config" / "pocd.toml"
SECRET = "hunter2"
GOOD = f"""
[node]
public_key = "key"
[chain]
urls = ["http://user:{SECRET}@chain.example:26657/rpc"]
"""


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("POCD_")]:
        monkeypatch.delenv(name)


def written(folder: Path, text: str) -> Path:
    path = folder / "pocd.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    """The one line that refuses the file; nowhere near it is a secret."""
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The shipped file.


def fields(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every key of the code: `section.key`, and `section.key[].key` in lists of tables."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        is_list = get_origin(field.annotation) is list
        inner = get_args(field.annotation)[0] if is_list else field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= fields(inner, f"{prefix}{name}{'[]' * is_list}.")
        else:
            found[prefix + name] = field
    return found


def leaves(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every key of a TOML document with its value, named as `fields` does."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            found |= leaves(value[0], f"{prefix}{name}[].")
        else:
            found[prefix + name] = value
    return found


def everything_set() -> str:
    """The shipped file with its commented keys and tables put in force."""
    return re.sub(r"^# (?=\[\[|\w+ = )", "", SHIPPED.read_text(encoding="utf-8"), flags=re.MULTILINE)


def everything_set_for_evm() -> str:
    """The shipped file with everything set, for the kind of chain that has all of it."""
    of_gonka = 'model = "MiniMaxAI/MiniMax-M2.7"\n'
    assert of_gonka in everything_set()
    of_distances = everything_set().replace('scheme = "poc4"', 'scheme = "poc2"')  # else r_target is refused
    return of_distances.replace('kind = "cometbft"', 'kind = "evm"').replace(of_gonka, "")


def test_the_shipped_file_shows_every_key_and_no_other() -> None:
    assert leaves(tomllib.loads(everything_set())).keys() == fields(Settings).keys()


def test_the_shipped_file_shows_the_defaults() -> None:
    shown = leaves(tomllib.loads(SHIPPED.read_text(encoding="utf-8")))
    code = {name: field for name, field in fields(Settings).items() if "[]" not in name}
    required = {name for name, field in code.items() if field.is_required()}
    unset = {name for name, field in code.items() if not field.is_required() and field.get_default() is None}
    assert required == set()
    of_a_miner = set(NEEDED[Role.MINER])
    of_one_kind = {"chain.confirmations", "chain.replaced_blocks", "chain.model"}
    assert unset == {
        "admin.token_file",
        "admin.socket",
        "model.revision",
        "chain.id",
        "validation.tolerance",
        "worker.cache",
    } | {"orchestrator.port", "orchestrator.token_file"} | {"round.r_target"} | of_one_kind | {"node.public_key"}
    assert shown.keys() == code.keys() - unset | of_a_miner
    for name in shown.keys() - of_a_miner - {"round.scheme"}:  # a new configuration has another than those before it
        default = code[name].get_default()
        assert shown[name] == (str(default) if isinstance(default, Path) else default), name
        assert type(shown[name]) is (str if isinstance(default, Path) else type(default)), name


def test_each_key_of_the_shipped_file_is_explained_right_above_it() -> None:
    lines = SHIPPED.read_text(encoding="utf-8").splitlines()
    is_key = [re.match(r"(# )?(\w+ = |\[)", line) is not None for line in lines]
    bare = [line for i, line in enumerate(lines) if is_key[i] and (is_key[i - 1] or not lines[i - 1].startswith("# "))]
    assert bare == []


def test_the_shipped_file_loads_to_the_defaults(tmp_path: Path) -> None:
    settings = load(SHIPPED)
    minimal = load(written(tmp_path, GOOD))
    changed = {"node": settings.node, "chain": minimal.chain.model_copy(update={"urls": settings.chain.urls})}
    changed["round"] = minimal.round.model_copy(update={"scheme": "poc4"})
    assert settings == minimal.model_copy(update=changed)


def test_a_new_configuration_mines_vectors_and_one_that_names_no_scheme_what_it_always_did(tmp_path: Path) -> None:
    assert (load(SHIPPED).round.scheme, load(SHIPPED).round.target) == ("poc4", None)
    before = load(written(tmp_path, GOOD)).round
    assert (before.scheme, before.target) == ("poc2", 1.4042)
    other = load(written(tmp_path, f"{GOOD}[round]\nr_target = 1.3\n")).round
    assert (other.scheme, other.target) == ("poc2", 1.3)


def test_the_shipped_file_loads_with_everything_set(tmp_path: Path) -> None:
    settings = load(written(tmp_path, everything_set_for_evm()))
    assert settings.admin.token_file == Path("/etc/pocd/token")
    assert [(receiver.name, receiver.secret_file) for receiver in settings.delivery.receivers] == [
        ("main", Path("/etc/pocd/receiver-secret"))
    ]


# What is refused.


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("[nodes]\nx = 1", "unknown key nodes", id="unknown section"),
        pytest.param("[log]\nlevle = 'info'", "unknown key log.levle", id="unknown key"),
        pytest.param(
            "[[delivery.receivers]]\nname = 'a'\nurl = 'http://h'\nx = 1",
            "unknown key delivery.receivers.0.x",
            id="nested key",
        ),
        pytest.param("[admin]\nport = 'http'", "admin.port: Input should be a valid integer", id="wrong type"),
        pytest.param("[admin]\nport = 65536", "admin.port: Input should be less than or equal to 65535", id="too big"),
        pytest.param("[round]\nr_target = 2.1", "round.r_target: Input should be less than or equal to 2", id="radius"),
        pytest.param("[worker]\nbatch_size = 0", 'worker.batch_size: must be "auto", or a whole', id="too small"),
        pytest.param("[worker]\nbatch_timeout = inf", "worker.batch_timeout: Input should be a finite", id="infinity"),
        pytest.param("[delivery]\nbatch_seconds = nan", "delivery.batch_seconds: Input should be", id="no number"),
        pytest.param(f"[round]\nevery = {2**63}", "round.every: Input should be less than", id="beyond 64 bits"),
        pytest.param(
            "[round]\nscheme = 'poc9'", "round.scheme: unknown scheme 'poc9'; allowed are: trained, ", id="scheme"
        ),
        pytest.param(
            "[round]\nscheme = 'poc4'\nr_target = 1.4",
            "round: r_target 1.4 has no meaning with scheme 'poc4', by which every nonce counts: remove it",
            id="target of vectors",
        ),
        pytest.param("[model]\ndtype = 'int8'", "model.dtype: Input should be 'float32', 'float16'", id="dtype"),
        pytest.param(
            "[model]\ndevice = 'gpu'", 'model.device: must be "auto", "cpu", "cuda", "cuda:N", or', id="device"
        ),
        pytest.param("[model]\ndevice = []", "model.device: must be", id="no device"),
        pytest.param("[model]\ndevice = ['auto']", "model.device: must be", id="auto in a list"),
        pytest.param("[model]\ndevice = 7", "model.device: must be", id="device of another type"),
        pytest.param("[model]\ndevice = ['cuda:0', 'cuda:0']", "model.device: a list must name", id="a GPU twice"),
        pytest.param("[model]\ndevice = ['cuda', 'cuda:1']", "model.device: a list must name", id="a GPU unnamed"),
        pytest.param("[model]\ndevice = ['cpu', 'cuda:1']", "model.device: a list must name", id="mixed devices"),
        pytest.param(
            "[model]\ndevice = ['cpu', 'cpu', 'cpu']\nparallel = 2",
            "model: device lists 3 devices, which must be a multiple of parallel, 2",
            id="devices left over",
        ),
        pytest.param(
            "[model]\ndevice = 'cuda:1'\nparallel = 2",
            "model: parallel is 2: list as many devices in device, or set it to 'cuda'",
            id="too few devices",
        ),
        pytest.param("[model]\nparallel = 0", "model.parallel: Input should be greater", id="parallel"),
        pytest.param(
            "[worker]\ncompile = 'maybe'", "worker.compile: Input should be 'auto', 'always' or", id="compile"
        ),
        pytest.param(
            '[round]\nscheme = "poc3"\nseq_len = 5',
            "round: seq_len 5 is too short for scheme 'poc3': 6 or more",
            id="segments",
        ),
        pytest.param("[round]\noffset = 60", "round: offset 60 must be below every 60", id="offset"),
        pytest.param("[round]\nduration = 61", "round: duration 61 must be at most every 60", id="duration"),
        pytest.param(
            "[orchestrator]\nprefix = 'v3/'", 'orchestrator.prefix: must be "", or begin with / and hold', id="prefix"
        ),
        pytest.param("[orchestrator]\nport = 70000", "orchestrator.port: Input should be less than", id="port"),
        pytest.param("[admin]\nhost = '0.0.0.0'", "admin: host '0.0.0.0' is not loopback: set token_file", id="open"),
        pytest.param(
            "[admin]\nopen_reads = true", "admin: open_reads needs a token_file", id="reads that are open anyway"
        ),
        pytest.param("[admin]\nsocket = 'admin.sock'", "admin.socket: must be an absolute path", id="relative"),
        pytest.param(f"[admin]\nsocket = '/{'x' * 107}'", "admin.socket: must be an absolute path", id="long"),
        pytest.param('[admin]\nsocket = "/run/a\\u0000"', "admin.socket: must be an absolute path", id="zero byte"),
        pytest.param("[admin]\nallowed_hosts = ['h:80']", "admin.allowed_hosts.0: String should match", id="port"),
        pytest.param("[admin]\nallowed_hosts = ['']", "admin.allowed_hosts.0: String should match", id="no name"),
        pytest.param(
            "[delivery]\nreceivers = [{name = 'a', url = 'http://h'}, {name = 'a', url = 'http://g'}]",
            "delivery: receivers must have different names; repeated: a",
            id="two receivers of one name",
        ),
        pytest.param(
            f"[[delivery.receivers]]\nname = 'a'\nurl = 'http://h/#{SECRET}'",
            "delivery.receivers.0.url: must have no fragment",
            id="fragment",
        ),
    ],
)
def test_a_wrong_value_is_refused_by_file_and_key(tmp_path: Path, text: str, reason: str) -> None:
    path = written(tmp_path, f"{GOOD}{text}\n")
    assert refusal(path).startswith(f"{path}: {reason}")


@pytest.mark.parametrize(
    "origin",
    [
        "",
        "host",
        "ftp://host",
        "http://host/",
        "http://host/path",
        "http://host?x",
        "http://host#x",
        "http://host:0",
        "http://host:65536",
        "http://host:",
        " http://host",
        "http://host\t",
        "http://host.",
        f"http://user:{SECRET}@host",
        "http://h\u00f6st",
    ],
)
def test_what_is_no_origin_is_refused(tmp_path: Path, origin: str) -> None:
    path = written(tmp_path, f"{GOOD}[admin]\ncallback_origins = {orjson.dumps([origin]).decode()}\n")
    assert refusal(path).startswith(f"{path}: admin.callback_origins.0: must be http:// or https://")


def test_origins_and_hosts_have_one_form(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        f"{GOOD}[admin]\nallowed_hosts = ['Miner.Example']\n"
        "callback_origins = ['HTTPS://Host.Example', 'http://host:8080', 'http://[0:0::1]']\n",
    )
    admin = load(path).admin
    assert admin.allowed_hosts == ["miner.example"]
    assert admin.callback_origins == ["https://host.example:443", "http://host:8080", "http://[::1]:80"]


def test_a_socket_needs_no_token_whatever_the_host(tmp_path: Path) -> None:
    admin = load(written(tmp_path, f"{GOOD}[admin]\nhost = '0.0.0.0'\nsocket = '/run/pocd/admin.sock'\n")).admin
    assert (admin.socket, admin.beyond_loopback) == (Path("/run/pocd/admin.sock"), False)


def test_a_value_in_place_of_a_section_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, f"log = 'info'\n{GOOD}")
    assert refusal(path) == f"{path}: log: must be a table of keys"


@pytest.mark.parametrize(
    "url",
    [
        f"ftp://user:{SECRET}@host",
        f"user:{SECRET}@host",
        f"http://user:{SECRET}@",
        f"http://user:{SECRET}@host:99999",
        f"http://user:{SECRET}@host:port",
        f"http://user:{SECRET}@host:0",
        f"http://user:half/{SECRET}@host",
        f"http://user:{SECRET}@[::1",
        f"http://user:{SECRET}@host\N{ACCOUNT OF}",
        f"http://user:{SECRET}@host /rpc",
        f"http://user:{SECRET}@host/\n",
    ],
)
def test_a_wrong_url_is_refused_without_its_credentials(tmp_path: Path, url: str) -> None:
    path = written(tmp_path, f'[node]\npublic_key = "key"\n[chain]\nurls = {orjson.dumps([url]).decode()}\n')
    assert refusal(path).startswith(f"{path}: chain.urls.0: must be an http:// or https:// URL")


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ("public_key = ''", "node.public_key: String should have at least 1 character"),
        ("public_key = ' key'", "node.public_key: must not begin or end with white space"),
        ("public_key = 'key'\nnode_count = 1000001", "node.node_count: Input should be less than or equal to 1000000"),
        ("public_key = 'key'\nnode_id = 2\nnode_count = 2", "node: node_id 2 must be below node_count 2"),
    ],
)
def test_a_wrong_node_is_refused(tmp_path: Path, node: str, reason: str) -> None:
    path = written(tmp_path, f"[node]\n{node}\n[chain]\nurls = ['http://chain']\n")
    assert refusal(path) == f"{path}: {reason}"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("", "node.public_key and chain.urls are missing: "),
        ("[node]\npublic_key = 'key'\n", "chain.urls is missing: "),
        ("[node]\npublic_key = 'key'\n[chain]\nurls = []\n", "chain.urls is missing: "),
        ("[chain]\nurls = ['http://chain']\n", "node.public_key is missing: "),
        ("[orchestrator]\nhost = '127.0.0.1'\n", "node.public_key and chain.urls are missing: "),
    ],
)
def test_a_miner_without_a_chain_or_a_key_is_told_which_role_needs_them(tmp_path: Path, given: str, told: str) -> None:
    path = written(tmp_path, given)
    assert refusal(path) == (
        f"{path}: {told}a miner reads its rounds from a chain; with orchestrator.port pocd is a proof engine, which "
        "needs neither"
    )


def test_a_proof_engine_needs_neither_a_chain_nor_a_key(tmp_path: Path) -> None:
    settings = load(
        written(tmp_path, "[chain]\nkind = 'gonka'\n[round]\nscheme = 'artifacts'\n[orchestrator]\nport = 0\n")
    )
    assert (settings.role, missing(settings.role, settings)) == (Role.ENGINE, [])
    assert (settings.node.public_key, settings.chain.urls) == (None, [])


def test_bad_toml_is_refused_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, f"[node]\npublic_key = {SECRET}\n")
    assert re.fullmatch(rf"{re.escape(str(path))} is not TOML: .*line 2.*", refusal(path))


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pocd.toml"
    path.write_bytes(b"\xff\xfe")
    assert refusal(path).startswith(f"{path} is not TOML: ")


def test_a_missing_file_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "pocd.toml"
    assert refusal(path) == f"{path} does not exist; give --config FILE (config/pocd.toml shows every key)"


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path} cannot be read: Is a directory"


# The environment.


def test_the_environment_goes_above_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, f"{GOOD}[log]\nlevel = 'error'\nformat = 'json'\n")
    monkeypatch.setenv("POCD_LOG__LEVEL", "debug")
    monkeypatch.setenv("POCD_NODE__NODE_COUNT", "3")
    monkeypatch.setenv("POCD_ROUND__SEQ_LEN", "16")
    monkeypatch.setenv("POCD_CHAIN__URLS", '["http://one", "http://two"]')
    settings = load(path)
    assert settings.log.model_dump() == {"level": "debug", "format": "json"}
    assert (settings.node.public_key, settings.node.node_count) == ("key", 3)
    assert (settings.round.seq_len, settings.round.every) == (16, 60)
    assert settings.chain.urls == ["http://one", "http://two"]


def test_required_keys_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCD_NODE__PUBLIC_KEY", "key")
    monkeypatch.setenv("POCD_CHAIN__URLS", '["http://chain"]')
    assert load(written(tmp_path, "")).node.public_key == "key"


def test_receivers_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCD_DELIVERY__RECEIVERS", '[{"name": "a", "url": "http://a"}]')
    path = written(tmp_path, f"{GOOD}[[delivery.receivers]]\nname = 'b'\nurl = 'http://b'\n")
    assert [receiver.name for receiver in load(path).delivery.receivers] == ["a"]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("POCD_LOG__LEVEL", SECRET, "log.level: Input should be 'debug'"),
        ("POCD_LOG__LEVLE", SECRET, "unknown key log.levle"),
        ("POCD_LOG__LEVEL__X", SECRET, "log.level: Input should be 'debug'"),
        ("POCD_ADMIN__PORT", SECRET, "admin.port: Input should be a valid integer"),
        ("POCD_CHAIN__URLS", f"http://u:{SECRET}@h", "chain.urls: must be a list (in the environment: as JSON)"),
        ("POCD_CHAIN__URLS", f'"http://u:{SECRET}@h"', "chain.urls: must be a list (in the environment: as JSON)"),
        ("POCD_CHAIN__URLS", f'["ftp://u:{SECRET}@h"]', "chain.urls.0: must be an http:// or https:// URL"),
        ("POCD_DELIVERY__RECEIVERS", f'[{{"name": "a", "url": "{SECRET}"}}]', "delivery.receivers.0.url: must be an"),
        ("POCD_DELIVERY__RECEIVERS", f'["{SECRET}"]', "delivery.receivers.0: must be a table"),
    ],
)
def test_a_wrong_variable_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(name, value)
    assert refusal(written(tmp_path, GOOD)).startswith(f"environment {name}: {reason}")


def test_a_rule_between_file_and_variable_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCD_NODE__NODE_ID", "1")
    path = written(tmp_path, GOOD)
    expected = f"{path} and environment POCD_NODE__NODE_ID: node: node_id 1 must be below node_count 1"
    assert refusal(path) == expected


def test_others_variables_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes' of a Service called pocd, docker's, and any that are no section and key."""
    path = written(tmp_path, GOOD)
    expected = load(path)
    names = ["POCD_", "POCD_LOG", "POCD_PORT", "POCD_PORT_8460_TCP_ADDR", "POCD_SERVICE_HOST", "pocd_chain"]
    for name in names:
        monkeypatch.setenv(name, "tcp://10.96.7.9:8460")
    monkeypatch.setenv("POCD_LOG__LEVEL", "info")
    assert load(path) == expected
    assert load_admin(path, None) == expected.admin
    assert foreign_variables(os.environ) == names


@pytest.mark.parametrize("name", ["POCD_LOG__", "POCD_LOGS__LEVEL", "pocd_log__level", "POCD___LEVEL"])
def test_a_variable_that_names_no_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, SECRET)
    expected = f"environment: {name} names no key; variables are called POCD_SECTION__KEY"
    assert refusal(written(tmp_path, GOOD)) == expected


# Back to TOML.


def test_what_is_shown_loads_again_and_is_equal(tmp_path: Path) -> None:
    settings = load(written(tmp_path, everything_set_for_evm()))
    assert load(written(tmp_path, to_toml(settings))) == settings


def test_what_is_shown_names_unset_keys(tmp_path: Path) -> None:
    assert "\n# token_file is not set\n" in to_toml(load(written(tmp_path, GOOD)))


plain = st.text(min_size=1).filter(lambda text: text == text.strip() and "://" not in text)


@given(
    key=plain,
    model=plain,
    seconds=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    every=st.integers(60, 2**63 - 1),
)
def test_any_text_and_number_is_shown_so_that_it_loads(key: str, model: str, seconds: float, every: int) -> None:
    settings = Settings.model_validate(
        {
            "node": {"public_key": key},
            "chain": {"urls": ["http://chain"]},
            "round": {"every": every},
            "model": {"name": model},
            "worker": {"batch_timeout": seconds},
        }
    )
    assert Settings.model_validate(tomllib.loads(to_toml(settings))) == settings


def test_credentials_are_never_shown(tmp_path: Path) -> None:
    receiver = f"[[delivery.receivers]]\nname = 'a'\nurl = 'https://:{SECRET}@receiver.example'\n"
    shown = to_toml(load(written(tmp_path, GOOD + receiver)))
    assert SECRET not in shown
    assert 'urls = ["http://***@chain.example:26657/rpc"]' in shown
    assert 'url = "https://***@receiver.example"' in shown


@pytest.mark.parametrize("name", ["loop/model", "x" * 300])
def test_a_models_folder_that_cannot_be_one_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    settings = load(written(tmp_path, f"{GOOD}[model]\nname = '{tmp_path / name}'\n"))
    with pytest.raises(ConfigError, match=r"^model\.name: "):
        check_model(settings)


# Secrets by credential, and keys of one kind of chain.


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b"])
def test_a_credentials_name_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    text = refusal(written(tmp_path, f'{GOOD}[admin]\ntoken_file = "credential:{name}"\n'))
    assert "takes a name of letters" in text


@pytest.mark.parametrize("line", ["confirmations = 1", 'replaced_blocks = "deliver"'])
def test_what_only_one_kind_of_chain_has_is_refused_for_another(tmp_path: Path, line: str) -> None:
    text = refusal(written(tmp_path, f"{GOOD}{line}\n"))
    assert f'{line.partition(" ")[0]} can be set for kind "evm" only' in text
    settings = load(written(tmp_path, f'{GOOD}kind = "evm"\n{line}\n'))
    assert settings.chain.kind == "evm"


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ('model = "other"\n', 'model can be set for kind "gonka" only'),
        ('kind = "gonka"\n', 'round.scheme must be "artifacts" with chain.kind "gonka"'),
        ('kind = "gonka"\n[round]\nevery = 40\nduration = 40\n', 'round.every cannot be set with chain.kind "gonka"'),
        ('kind = "gonka"\n[round]\noffset = 3\n', 'round.offset cannot be set with chain.kind "gonka"'),
        ('kind = "gonka"\nconfirmations = 1\n', 'confirmations can be set for kind "evm" only'),
    ],
)
def test_what_does_not_fit_rounds_by_epoch_is_refused(tmp_path: Path, text: str, refused: str) -> None:
    assert refused in refusal(written(tmp_path, f"{GOOD}{text}"))


def test_a_models_folder_that_is_not_mounted_yet_may_come_and_one_that_holds_something_else_does_not(
    tmp_path: Path,
) -> None:
    mount = tmp_path / "models"
    settings = load(written(tmp_path, f"{GOOD}[model]\nname = '{mount}'\n"))
    with pytest.raises(
        EndedError, match=r"model\.name: .*models/config\.json, nor anything beside it; mount"
    ) as missing:
        check_model(settings)
    mount.mkdir()
    with pytest.raises(EndedError, match=r"nor anything beside it") as empty:
        check_model(settings)
    assert missing.value.code == empty.value.code == EXIT_TEMPORARY
    (mount / "README").touch()
    with pytest.raises(ConfigError, match="give a model's folder"):
        check_model(settings)
