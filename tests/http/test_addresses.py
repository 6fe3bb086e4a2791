"""Where deliveries may go: addresses judged as they are connected to, and origins that are beyond doubt."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import structlog
from hypothesis import example, given
from hypothesis import strategies as st
from yarl import URL

from pocd.http.addresses import METADATA, allowed_origin, origin, refusal
from pocd.http.client import open_session
from tests.support.delivering import expected, prepared, running, sent, serving
from tests.support.waiting import PATIENCE, soon

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.delivering import Bench

METADATA_ADDRESS = "169.254.169.254"


# Addresses


@pytest.mark.parametrize(
    "address",
    [
        METADATA_ADDRESS,
        "169.254.0.0",
        "169.254.255.255",
        "169.254.170.2",
        "fe80::1",
        "fe80::a9fe:a9fe%eth0",
        "febf::1",
        "0.0.0.0",
        "0.1.2.3",
        "::",
        "224.0.0.1",
        "239.255.255.255",
        "ff02::1",
        "255.255.255.255",
        *(network.partition("/")[0] for network in METADATA),
        "fd00:ec2::254",
        "::ffff:169.254.169.254",
        "::ffff:0.0.0.0",
        "::169.254.169.254",
        "::ffff:0:169.254.169.254",
        "64:ff9b::169.254.169.254",
        "64:ff9b:1::169.254.169.254",
        "2002:a9fe:a9fe::1",
        "2001:0:a9fe:a9fe::1",  # Teredo by a server at that address
        "2001:0:102:304:0:0:5601:5601",  # Teredo to a client at that address: all bits of it inverted
        "::ffff:100.100.100.200",
        "2002:a83f:8110::",
        "localhost",
        "",
        "169.254.169.254 ",
        "2852039166",
    ],
)
def test_what_must_not_be_called_is_refused(address: str) -> None:
    reason = refusal(address)
    assert reason is not None
    assert address in reason


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.255.255.254",
        "::1",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "100.100.100.201",
        "168.63.129.17",
        "169.253.255.255",
        "169.255.0.0",
        "fd00::1",
        "fd00:ec3::254",
        "93.184.216.34",
        "2606:2800:220:1::1",
        "::ffff:127.0.0.1",
        "::7f00:1",
        "64:ff9b::93.184.216.34",
        "2002:5db8:d822::1",
        "2001:db8::a9fe:a9fe",
    ],
)
def test_what_may_be_called_is_not(address: str) -> None:
    assert refusal(address) is None


EMBEDDINGS = ("::ffff:{}", "::ffff:0:{}", "64:ff9b::{}", "64:ff9b:1::{}")


@given(st.ip_addresses(v=4))
@example(ipaddress.IPv4Address(METADATA_ADDRESS))
def test_an_ipv4_address_is_judged_alike_however_it_is_wrapped(address: ipaddress.IPv4Address) -> None:
    plain = refusal(str(address)) is None
    for form in EMBEDDINGS:
        assert (refusal(form.format(address)) is None) == plain, form
    octets = address.packed
    assert (refusal(f"2002:{octets[0]:02x}{octets[1]:02x}:{octets[2]:02x}{octets[3]:02x}::9") is None) == plain


@given(st.ip_addresses(v=4, network="169.254.0.0/16") | st.ip_addresses(v=6, network="fe80::/10"))
def test_nothing_link_local_may_be_called(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    assert refusal(str(address)) is not None


@given(st.text())
def test_what_is_no_address_is_refused(text: str) -> None:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        assert refusal(text) is not None


# Origins


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://good", "http://good:80"),
        ("HTTPS://Good.Example/path?query#fragment", "https://good.example:443"),
        ("http://good:8080/", "http://good:8080"),
        ("http://good?x", "http://good:80"),
        ("http://good#x", "http://good:80"),
        ("http://127.0.0.1:1", "http://127.0.0.1:1"),
        ("http://[::1]:8470/x", "http://[::1]:8470"),
        ("http://[0:0:0::1]", "http://[::1]:80"),
        ("http://under_score", "http://under_score:80"),
        ("http://xn--bcher-kva.example", "http://xn--bcher-kva.example:80"),
    ],
)
def test_an_origin_has_one_form(url: str, expected: str) -> None:
    assert origin(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        "good",
        "//good",
        "ftp://good",
        "http:/good",
        "http:good",
        "http://",
        "http:///good",
        "http://good@evil/",
        "http://good:80@evil/",
        "http://evil\\@good/",
        "http://good\\.evil/",
        "http://good/\\evil",
        "http://good%2eevil/",
        "http://go%6fd/",
        "http://good .evil/",
        "http://good/a b",
        " http://good",
        "http://good\t/",
        "http://go\nod/",
        "http://good/\n",
        "http://good/\x00",
        "http://good./",
        "http://.good/",
        "http://go..od/",
        "http://good:/",
        "http://good:0/",
        "http://good:080/",
        "http://good:65536/",
        "http://good:99999999999/",
        "http://good:8080:80/",
        "http://good;evil/",
        "http://good,evil/",
        "http://g\u00f6od/",
        "http://\uff47ood/",
        "http\u017f://good/",
        "http\u017f://good:443/",
        "http://good\u3002evil/",
        "http://127.1/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0x7f.0.0.1/",
        "http://010.0.0.1/",
        "http://good.0x1/",
        "http://[::1/",
        "http://[::1]evil/",
        "http://[fe80::1%25eth0]/",
        "http://[evil]/",
        "http://[::ffff:1.2.3.4.5]/",
    ],
)
def test_what_could_be_read_in_two_ways_has_no_origin(url: str) -> None:
    assert origin(url) is None
    assert not allowed_origin(
        url, ["http://good", "https://good", "http://127.0.0.1", "http://[::1]", "http://10.0.0.1"]
    )


AWKWARD = st.text(alphabet="htps:/@\\.?#[]%0179aGg -_\t\u3002\u017f\uff47", max_size=12)


@given(rest=AWKWARD, scheme=st.sampled_from(["http://", "https://", "HTTP://", "http:", ""]))
@example(rest="good:443", scheme="https://")
def test_what_is_allowed_is_where_the_client_goes(rest: str, scheme: str) -> None:
    """The client library reads the URL by itself; it must not read another host in it than we did."""
    url = f"{scheme}{rest}"
    found = origin(url)
    if found is not None:
        read = URL(url)
        assert (read.user, read.password) == (None, None)
        assert found == f"{read.scheme}://{f'[{read.host}]' if ':' in (read.host or '') else read.host}:{read.port}"


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("http://good/callback", True),
        ("HTTP://GOOD:80", True),
        ("https://good", False),
        ("http://good:81", False),
        ("http://good.evil", False),
        ("http://evil/?http://good", False),
        ("https://receiver.example:8443/elsewhere", True),
        ("https://user:hunter2@receiver.example:8443/elsewhere", False),
        ("https://receiver.example", False),
    ],
)
def test_an_origin_is_allowed_when_it_is_configured(url: str, *, allowed: bool) -> None:
    configured = ["http://good", "https://user:hunter2@receiver.example:8443/pocd", "http://no.origin./"]
    assert allowed_origin(url, configured) == allowed
    assert not allowed_origin(url, [])


# Connecting


class Names:
    """The system's resolver, whose answers for names of a test come one after another."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: list[list[str]] = []
        system = socket.getaddrinfo

        def getaddrinfo(host: str, port: int, *rest: Any, **named: Any) -> Any:  # noqa: ANN401 - the system's own
            if not host.endswith(".test"):
                return system(host, port, *rest, **named)
            addresses = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            return [info for each in addresses for info in system(each, port, type=socket.SOCK_STREAM)]

        # The session's resolver holds the system's function from its making on.
        monkeypatch.setattr("pocd.http.client.ThreadResolver.__init__.__defaults__", (getaddrinfo,))


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with prepared(tmp_path / "store.db") as one:
        yield one


async def alarm_of(bench: Bench, url: str) -> str:
    """Try to deliver a batch to `url`; returns the alarm that it makes. The batch is kept and tried again."""
    await bench.store(1, "a")
    dispatcher = bench.dispatcher(url)
    with structlog.testing.capture_logs() as logs:
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
            await bench.step(dispatcher)
    assert dispatcher.state.failures == 2
    assert await bench.states() == ["pending"]
    assert await bench.faults() == [0]
    assert [entry["log_level"] for entry in logs if entry["action"] == "receiver_alarm"] == ["error"]
    assert dispatcher.alarm is not None
    assert dispatcher.alarm.startswith("is not called: ")
    return dispatcher.alarm


@pytest.mark.parametrize(
    "host",
    [
        METADATA_ADDRESS,
        "[::ffff:169.254.169.254]",
        "[fe80::1]",
        "0xa9fea9fe",  # as the system's resolver reads it
        "0.0.0.0",
        "[::]",
    ],
)
async def test_an_address_in_a_url_is_judged_too(bench: Bench, host: str) -> None:
    assert "is refused: it " in await alarm_of(bench, f"http://{host}:8470/latest")


async def test_a_name_that_leads_to_another_address_next_time_is_not_followed(bench: Bench, names: Names) -> None:
    async with serving() as server:
        batches = await bench.store(1, "a")
        dispatcher = bench.dispatcher(server.url.replace("127.0.0.1", "rebound.test"))
        names.answers = [["127.0.0.1"]]
        async with running(dispatcher):
            assert sent(await server.take(1)) == expected(batches)
            await soon(dispatcher.settled.wait())
        names.answers = [[METADATA_ADDRESS]]
        batches = await bench.store(1, "a")
        dispatcher.wake()
        async with running(dispatcher):  # with a connection of its own
            await soon(dispatcher.settled.wait())
            await bench.step(dispatcher)
        assert dispatcher.state.failures == 2
        assert (
            dispatcher.state.error
            == f"{METADATA_ADDRESS} is refused: it is link-local, where clouds keep their metadata"
        )
        assert dispatcher.alarm is not None
        names.answers = [["127.0.0.2"]]  # where nobody listens, which is no alarm
        dispatcher.wake()
        async with running(dispatcher):
            await bench.step(dispatcher)
        assert dispatcher.state.failures == 3
        assert dispatcher.alarm is None
        names.answers = [["127.0.0.1"]]
        dispatcher.wake()
        async with running(dispatcher):
            await bench.step(dispatcher)
            assert sent(await server.take(1)) == expected(batches)
        assert dispatcher.alarm is None
    assert await bench.states() == ["delivered", "delivered"]


async def test_another_address_of_the_same_name_is_used(bench: Bench, names: Names) -> None:
    async with serving() as server:
        names.answers = [[METADATA_ADDRESS, "fe80::1", "127.0.0.1"]]
        batches = await bench.store(1, "a")
        dispatcher = bench.dispatcher(server.url.replace("127.0.0.1", "mixed.test"))
        async with running(dispatcher):
            requests = await server.take(1)
            await soon(dispatcher.settled.wait())
        assert sent(requests) == [(batches[0].id, batches[0].body)]
        assert dispatcher.alarm is None


@pytest.mark.parametrize(
    "addresses",
    [
        pytest.param([METADATA_ADDRESS, "fd00:ec2::254"], id="of both families"),
        pytest.param([METADATA_ADDRESS, "127.0.0.1"], id="beside one that refuses connections"),
        pytest.param(["127.0.0.1", "fe80::1"], id="after one that refuses connections"),
        pytest.param([METADATA_ADDRESS, "127.0.0.1", "127.0.0.2"], id="long before the last one"),
    ],
)
async def test_whatever_else_failed_a_refused_address_is_told(bench: Bench, names: Names, addresses: list[str]) -> None:
    names.answers = [addresses]
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        assert "is refused: it " in await alarm_of(bench, f"http://barred.test:{port}")


async def test_what_goes_wrong_without_a_refusal_is_no_alarm(bench: Bench) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        await bench.store(1, "a")
        dispatcher = bench.dispatcher(f"http://127.0.0.1:{closed.getsockname()[1]}")
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
    assert dispatcher.state.failures == 1
    assert dispatcher.alarm is None


async def test_no_connection_is_made_to_an_address_that_is_refused() -> None:
    """Held against one who does listen there, and would have a connection at once."""
    asked: list[str] = []

    def refuse(address: str) -> str:
        asked.append(address)
        return "not that one"

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with open_session(aiohttp.ClientTimeout(total=PATIENCE), refuse=refuse) as session:
            with pytest.raises(aiohttp.ClientConnectorError, match="not that one"):
                await session.get(url)
        assert asked == ["127.0.0.1"]
        with pytest.raises(BlockingIOError):
            listener.accept()
        async with open_session(aiohttp.ClientTimeout(total=PATIENCE), refuse=lambda _: None) as session:
            asking = asyncio.create_task(session.get(url))
            accepted, _ = await soon(asyncio.get_running_loop().sock_accept(listener))
            accepted.close()
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
