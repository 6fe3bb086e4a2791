"""Each animal of the zoo gets what the policy says, and none of them is another one's trouble."""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING

import pytest

from pocd.delivery import policy, posting
from pocd.http import client
from pocd.http.client import ThreadResolver
from tests.support.animals import ANIMALS
from tests.support.clocks import NOW
from tests.support.delivering import Bench, expected, running, sent, serving
from tests.support.waiting import PATIENCE, soon
from tests.support.zoo import HANGING, OK, Animal, System, Visit, answer, answer_too_late, certificate, flapping, opened

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

    from pocd.delivery.dispatcher import Dispatcher
    from tests.support.zoo import Fate


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext | None:
    return certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(autouse=True)
def system(monkeypatch: pytest.MonkeyPatch) -> Iterator[System]:
    """Let the names of the zoo be looked up as its animals want it."""
    names = System()
    monkeypatch.setattr(client, "ThreadResolver", partial(ThreadResolver, names))
    yield names
    names.released.set()


class Limits:
    """How long pocd waits for a receiver: for ever, but for one of which the test wants to see that it gives up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch.setattr
        self.set()

    def set(self, *, total: float = PATIENCE, connect: float = PATIENCE, answer: float = PATIENCE) -> None:
        """From the next run of a dispatcher on."""
        self._patch(posting, "CONNECT_SECONDS", connect)
        self._patch(posting, "ATTEMPT_SECONDS", total)
        self._patch(posting, "ANSWER_SECONDS", answer)

    def suit(self, animal: Animal, fate: Fate) -> None:
        """Be hasty with an animal that takes for ever in what it does next."""
        named = animal.url.startswith(f"http://{HANGING}")
        hangs = animal.hangs and fate == "pending"
        self.set(
            total=0.5 if hangs and not named else PATIENCE,
            connect=0.25 if hangs and named else PATIENCE,
            answer=0.1 if animal.trickles else PATIENCE,
        )


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Limits:
    return Limits(monkeypatch)


async def check(bench: Bench, animal: Animal, dispatcher: Dispatcher, fate: str, attempts: int) -> None:
    """Hold what the store says of an animal's head to what the animal says."""
    head = (await bench.deliveries(animal.name))[0]
    state = bench.receiver(animal.name)
    assert head.state == ("pending" if fate == "parked" else fate)
    assert head.attempts == attempts
    assert (state.parked_at is not None) == (fate == "parked")
    if fate in ("pending", "parked"):
        assert animal.error is not None
        assert state.error
        assert animal.error in state.error
        assert (state.failures, head.reason) == (attempts, state.error)
    else:
        assert (state.failures, state.error) == (0, None)
        assert animal.error is None or fate == "delivered" or animal.error in (head.reason or "")
    if fate == "pending":
        assert (dispatcher.alarm is not None) == animal.alarm
        assert (await bench.faults(animal.name))[0] == attempts * animal.fault


@pytest.mark.parametrize("animal", ANIMALS, ids=lambda animal: animal.name)
async def test_an_animal_gets_what_the_policy_says(
    bench: Bench, tls: ssl.SSLContext | None, limits: Limits, animal: Animal
) -> None:
    if animal.tls and tls is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    await bench.store(1, animal.name, size=animal.keeps)
    batches = await bench.store(2, animal.name)
    async with opened(animal, tls) as url:
        dispatcher = bench.dispatcher(url, animal.name)
        limits.suit(animal, animal.first)
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
            await check(bench, animal, dispatcher, animal.first, 2 if animal.first == "dead" else 1)
        if animal.first == "pending":
            assert dispatcher.state.next_at == NOW + (animal.wait or 0)
            limits.suit(animal, animal.then)
            async with running(dispatcher):
                await bench.step(dispatcher)
                await check(bench, animal, dispatcher, animal.then, 2)
    states = await bench.states(animal.name)
    if animal.then == "delivered":
        assert states == ["delivered"] * 3
    if animal.then != "dead":
        first = [request for request in animal.requests if request.id not in {batch.id for batch in batches}]
        assert len({(request.id, request.body) for request in first}) <= 1, "an attempt is the same message"


async def test_no_animal_delays_another_receiver(
    bench: Bench, tls: ssl.SSLContext | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once: those that hang still do when the others have everything."""
    monkeypatch.setattr(posting, "CONNECT_SECONDS", 600.0)
    monkeypatch.setattr(posting, "ATTEMPT_SECONDS", 600.0)
    animals = [animal for animal in ANIMALS if not animal.tls or tls is not None]
    await bench.store(5, "before", *(animal.name for animal in animals), "behind")
    async with AsyncExitStack() as zoo:
        before, behind = [await zoo.enter_async_context(serving()) for _ in range(2)]
        urls = [await zoo.enter_async_context(opened(animal, tls)) for animal in animals]
        herd = {animal.name: bench.dispatcher(url, animal.name) for animal, url in zip(animals, urls, strict=True)}
        first, last = bench.dispatcher(before.url, "before"), bench.dispatcher(behind.url, "behind")
        async with running(first, *herd.values(), last):
            for server, well in ((before, first), (behind, last)):
                assert [request.sequence for request in await server.take(5)] == [1, 2, 3, 4, 5]
                await soon(well.settled.wait())
            hanging = {animal.name for animal in animals if animal.hangs}
            assert [name for name in hanging if herd[name].settled.is_set()] == []
            for animal in animals:
                if not animal.hangs:
                    await soon(herd[animal.name].settled.wait())
    assert await bench.states("before") == await bench.states("behind") == ["delivered"] * 5


async def test_what_was_answered_too_late_comes_again_with_the_same_id_and_bytes(bench: Bench, limits: Limits) -> None:
    batches = await bench.store(2, "a")
    late = Animal("late", "", answer_too_late, "pending")
    async with opened(late) as url:
        dispatcher = bench.dispatcher(url)
        limits.set(total=0.5)
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
        limits.set()
        async with running(dispatcher):
            await bench.step(dispatcher)
    assert sent(late.requests) == expected([batches[0], *batches])
    assert [request.sequence for request in late.requests] == [1, 1, 2]
    assert late.requests[1].timestamp == late.requests[0].timestamp + 1


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize("seed", range(8))
async def test_whatever_a_receiver_does_by_turns_it_gets_each_batch_in_order(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(policy, "BACKOFF_SECONDS", (0.0,))
    batches = await bench.store(15, "a")
    flaps = Animal("flaps", "", flapping(seed), "pending")
    async with opened(flaps) as url:
        dispatcher = bench.dispatcher(url)
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
    assert await bench.states() == ["delivered"] * 15
    places = [expected(batches).index(each) for each in sent(flaps.requests)]
    assert places == sorted(places)
    assert set(places) == set(range(15))
    attempts = [delivery.attempts for delivery in await bench.deliveries()]
    assert attempts == [places.count(place) for place in range(15)]


@pytest.mark.usefixtures("limits")
async def test_a_large_batch_that_is_cut_off_at_once_does_not_hold_up_small_ones_for_ever(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receiver that answers 413 and resets: whether the answer survives the reset is chance."""
    monkeypatch.setattr(policy, "BACKOFF_SECONDS", (0.0,))

    async def talk(visit: Visit) -> None:
        while True:
            head = await visit.reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
            if length > 10_000:
                await visit.say(answer("413 Too Large"))
                visit.reset()
                return
            await visit.reader.readexactly(length)
            await visit.say(OK)

    await bench.store(1, "a", size=100_000)
    await bench.store(2, "a")
    async with opened(Animal("rude", "", talk, "dead")) as url:
        dispatcher = bench.dispatcher(url)
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
    assert await bench.states() == ["dead", "delivered", "delivered"]
