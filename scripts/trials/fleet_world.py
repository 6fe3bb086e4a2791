"""Many hosts, one chain node and one receiver in virtual time: pocd's own loops and decisions without a network.

Each host follows the chain by pocd's follower, over its failover and its RPC client with its retries, and decides about
deliveries by pocd's policy. The chain's node answers what the development chain answers. Simulated are the network,
how fast a receiver is, the worker, and the queue between both, which is one number here.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any, cast

import orjson
import structlog
from multidict import CIMultiDict

from pocd.chain.cometbft import CometBFT
from pocd.chain.failover import Failover
from pocd.chain.rpc import Rpc
from pocd.clock import Clock
from pocd.config.settings import ChainSettings, DeliverySettings
from pocd.delivery.policy import Accept, Outcome, Retry, decide, first_age
from pocd.delivery.posting import ATTEMPT_SECONDS
from pocd.dev.chain import DevChain, answer
from pocd.mining.follower import ChainHealth, follow
from pocd.protocol.proof import ProofBatch, Proofs, Round
from pocd.protocol.rounds import RoundPolicy, active_start

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import aiohttp

    from pocd.chain.source import Head

LATENCY = 0.02  # seconds that a node takes to answer
EPOCH = 1_700_000_000.0  # wall time at the beginning
BLOCK_SECONDS = 6.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What happens, in seconds since all hosts started at one moment.

    Attributes:
        hosts: How many.
        proofs: Proofs that a host finds in a second.
        receiver: Batches that the receiver takes in a second.
        has_jitter: Whether polls and retries are spread; else each interval is exact.
        poll_interval: Seconds between polls of the chain.
        batch_seconds: Age at which a batch is formed.
        steady: Beginning of the time that counts as usual; it ends with the round's change.
        new_round: When the chain makes the block that begins another round.
        node_down: From when to when the chain's node answers HTTP 503.
        receiver_down: From when to when the receiver answers HTTP 503.
        drained: When the simulation gives up waiting for empty queues.
    """

    hosts: int
    proofs: float = 15.0
    receiver: float = 600.0
    has_jitter: bool = True
    poll_interval: float = ChainSettings.model_fields["poll_interval"].default
    batch_seconds: float = DeliverySettings.model_fields["batch_seconds"].default
    steady: float = 60.0
    new_round: float = 120.0
    node_down: tuple[float, float] = (180.0, 240.0)
    receiver_down: tuple[float, float] = (300.0, 900.0)
    drained: float = 3600.0


@dataclass(slots=True)
class Seen:
    """What node and receiver saw, by whole seconds since the beginning.

    Attributes:
        polls: Requests to the chain's node.
        posts: Attempts to deliver.
        accepted: Batches that were accepted.
        sent: Bytes of all attempts.
        proofs: Proofs in batches that were accepted.
        drained_at: When all queues were empty after the receiver's outage; None if never.
    """

    polls: Counter[int] = field(default_factory=Counter)
    posts: Counter[int] = field(default_factory=Counter)
    accepted: Counter[int] = field(default_factory=Counter)
    sent: Counter[int] = field(default_factory=Counter)
    proofs: Counter[int] = field(default_factory=Counter)
    drained_at: float | None = None


def _now() -> float:
    return asyncio.get_running_loop().time()


def is_within(now: float, span: tuple[float, float]) -> bool:
    """Tell whether a moment is in a span of time, without its end."""
    return span[0] <= now < span[1]


def policy_of(plan: Plan) -> RoundPolicy:
    """Return when rounds begin, such that one does at the block that the plan wants."""
    blocks = round(plan.new_round / BLOCK_SECONDS) + 1  # the round before it began before the hosts did
    return RoundPolicy(every=blocks, offset=0, duration=blocks)


def genesis_of(plan: Plan, began: float) -> float:
    """Return when the chain's first block is made, for a plan that begins at wall time `began`."""
    return began + plan.new_round - (2 * policy_of(plan).every - 1) * BLOCK_SECONDS


class _Answer:
    """An HTTP answer, as far as pocd's RPC client looks at one."""

    def __init__(self, status: int, body: bytes) -> None:
        self.status = status
        self.headers = CIMultiDict[str]()
        self.content = self
        self._body = body

    async def iter_chunked(self, _size: int) -> AsyncIterator[bytes]:
        """Yield the body."""
        yield self._body


class Node:
    """The chain's node, in the place of the HTTP session of every host's RPC client."""

    def __init__(self, plan: Plan, seen: Seen) -> None:
        self._plan = plan
        self._seen = seen
        self._chain = DevChain("fleet", BLOCK_SECONDS, genesis_of(plan, EPOCH))

    @contextlib.asynccontextmanager
    async def request(self, _verb: str, url: Any, **_: object) -> AsyncIterator[_Answer]:  # noqa: ANN401 - yarl's URL
        """Answer a request, and count it."""
        self._seen.polls[int(_now())] += 1
        await asyncio.sleep(LATENCY)
        if is_within(_now(), self._plan.node_down):
            yield _Answer(503, b"busy")
            return
        result = answer(self._chain, url.path.rpartition("/")[2], dict(url.query), EPOCH + _now())
        yield _Answer(200, orjson.dumps({"jsonrpc": "2.0", "id": -1, "result": result}))


class Receiver:
    """A receiver that takes one batch after another, each in the same time."""

    def __init__(self, plan: Plan, seen: Seen) -> None:
        self._plan = plan
        self._seen = seen
        self._free_at = 0.0

    async def post(self, proofs: int) -> Outcome:
        """Take a batch, or not; the sender gives up as pocd does."""
        now = _now()
        self._seen.posts[int(now)] += 1
        self._seen.sent[int(now)] += batch_bytes(proofs)
        if is_within(now, self._plan.receiver_down):
            await asyncio.sleep(LATENCY)
            return Outcome(503, "HTTP 503")
        self._free_at = max(now, self._free_at) + 1 / self._plan.receiver
        wait = self._free_at - now
        await asyncio.sleep(min(wait, ATTEMPT_SECONDS))
        if wait > ATTEMPT_SECONDS:
            return Outcome(None, "no answer", broke=True)
        self._seen.accepted[int(_now())] += 1
        self._seen.proofs[int(_now())] += proofs
        return Outcome(200, "HTTP 200")


@cache
def batch_bytes(proofs: int) -> int:
    """Return the bytes of a batch of so many proofs by distance."""
    round_ = Round("AB" * 32, 1_000_000, "0x" + "5a" * 20, 1.4042, "poc2", "bundled:tiny-llama", 256)
    found = Proofs.of_distances((10_000_019 * number % 2**31, 1.3 + number / 7e5) for number in range(proofs))
    return len(ProofBatch(round_, 1, "5a" * 32, "float32", found).to_json())


class Host:
    """One daemon, as far as others see it."""

    def __init__(self, plan: Plan, node: Node, receiver: Receiver, seed: int) -> None:
        self._plan = plan
        self._node = cast("aiohttp.ClientSession", node)
        self._receiver = receiver
        self._random = random.Random(seed)  # noqa: S311 - a simulation
        self._start: int | None = None
        self._turned = asyncio.Event()  # another round began
        self._stored = asyncio.Event()
        self.queue: deque[int] = deque()  # proofs of each batch that waits

    def jitter(self) -> float:
        """Return a number in [-1, 1], or 0 where nothing is spread."""
        return self._random.uniform(-1, 1) if self._plan.has_jitter else 0.0

    async def follow(self) -> None:
        """Follow the chain as the daemon does."""
        clock = Clock(wall=lambda: EPOCH + _now(), monotonic=_now)
        log = structlog.get_logger()
        node = CometBFT(Rpc(self._node, "http://node", wall=clock.wall))
        source = Failover([node], chain_id=None, hashes={}, highest=None, clock=clock, log=log)
        await follow(
            source,
            poll_interval=self._plan.poll_interval,
            on_head=partial(self._on_head, source.block),
            health=ChainHealth(),
            log=log,
            clock=clock,
            jitter=self.jitter,
        )

    async def _on_head(self, block: Callable[[int], Any], head: Head) -> None:
        start = active_start(head.block.height, policy_of(self._plan))
        if start is None or start == self._start:
            return
        if start != head.block.height:
            await block(start)
        self._start = start
        self._turned.set()

    async def mine(self) -> None:
        """Form batches of what is found: when it is old enough, and what is left of a round that is over."""
        await self._turned.wait()
        owed = 0.0
        while True:
            age, began = self._plan.batch_seconds, _now()
            if self._turned.is_set():
                age = first_age(age, self.jitter() if self._plan.has_jitter else 1.0)
                self._turned.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(age + self._random.expovariate(self._plan.proofs)):
                    await self._turned.wait()
            owed += (_now() - began) * self._plan.proofs
            if owed >= 1:
                self.queue.append(int(owed))
                owed -= int(owed)
                self._stored.set()

    async def deliver(self) -> None:
        """Deliver by pocd's policy: one request at a time, in order."""
        failures = faults = 0
        while True:
            while not self.queue:
                self._stored.clear()
                await self._stored.wait()
            outcome = await self._receiver.post(self.queue[0])
            faults += outcome.fault
            decision = decide(
                outcome,
                failures=failures + 1,
                faults=faults,
                overtaken=False,
                others_pass=False,
                jitter=self.jitter(),
            )
            if isinstance(decision, Accept):
                failures = faults = 0
                self.queue.popleft()
            else:
                assert isinstance(decision, Retry), decision
                failures += 1
                await asyncio.sleep(decision.seconds)


async def simulate(plan: Plan) -> Seen:
    """Let a fleet run through the plan; returns what node and receiver saw."""
    random.seed(plan.hosts)  # of the waits between the attempts of one call to the node
    seen = Seen()
    node, receiver = Node(plan, seen), Receiver(plan, seen)
    hosts = [Host(plan, node, receiver, number) for number in range(plan.hosts)]
    followers = [asyncio.create_task(host.follow()) for host in hosts]
    others = [asyncio.create_task(work) for host in hosts for work in (host.mine(), host.deliver())]
    await asyncio.sleep(plan.receiver_down[0])
    for each in followers:
        each.cancel()  # what is left is about the receiver alone
    await asyncio.sleep(plan.receiver_down[1] - _now())
    while seen.drained_at is None and _now() < plan.drained:
        await asyncio.sleep(1.0)
        if all(len(host.queue) <= 1 for host in hosts):
            seen.drained_at = _now()
    for each in (*followers, *others):
        each.cancel()
    done = await asyncio.gather(*followers, *others, return_exceptions=True)
    for error in done:
        if not isinstance(error, asyncio.CancelledError):
            raise error if isinstance(error, BaseException) else AssertionError("a host ended")
    return seen
