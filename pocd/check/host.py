"""All checks of a host, at the same time where they wait, each with a limit."""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pocd.chain.gonka import Gonka
from pocd.chain.make import CHAIN_TIMEOUT, confirmations_of, make_sources
from pocd.chain.rpc import Rpc
from pocd.check import api, chain, cluster, devices, files, live, model, store
from pocd.check.finding import Finding, bounded, green, in_thread, red, yellow
from pocd.check.model import Place
from pocd.check.probe import Probe, probe
from pocd.check.receivers import check_receiver
from pocd.clock import SYSTEM, Clock
from pocd.compute.toolchain import find_lack
from pocd.config.roles import Role
from pocd.config.secrets import read_keys
from pocd.config.settings import ConfigError
from pocd.delivery.policy import certificate_problem
from pocd.delivery.posting import Receiver
from pocd.http.client import open_session
from pocd.observe.mask import mask_url
from pocd.pool import cards
from pocd.pool.cards import NoDriverError
from pocd.pool.pool import cache_folder

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from pocd.config.settings import ReceiverSettings, Settings

T = TypeVar("T")

EXAMPLE_KEY = "replace-with-the-miner-public-key"  # as in config/pocd.toml


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of single checks in seconds; all together take at most `torch` and `local`, or three calls, or `cluster`.

    Attributes:
        local: For a question to a disk, a driver or the kernel.
        call: For one question to a node or a receiver.
        torch: For torch to be imported, read the weights and find the cards.
        cluster: For a Ray cluster to be joined, and each of its machines to tell its versions.
    """

    local: float = 5.0
    call: float = 5.0
    torch: float = 14.0
    cluster: float = 110.0


DEFAULT_LIMITS = Limits()


async def check_host(
    config: Path, settings: Settings, *, clock: Clock = SYSTEM, limits: Limits = DEFAULT_LIMITS
) -> list[Finding]:
    """Check everything that `settings` name; `config` is the file they come from."""
    local, long = limits.local, limits.torch + limits.local
    async with asyncio.TaskGroup() as group:
        # What several checks need to know.
        path = settings.store.path
        held = group.create_task(_within(local / 2, in_thread(partial(store.holder, path)), None))
        lost = Place(None, error=f"{settings.model.name} was not found within {local / 2:g} s")
        place = group.create_task(_within(local / 2, in_thread(partial(model.find, settings.model)), lost))
        seen = group.create_task(_probe(place, settings, limits.torch))
        checks = {
            "secrets": (in_thread(partial(files.check_secrets, settings, config)), local),
            **(
                {"cluster": (cluster.check_cluster(settings), limits.cluster)}
                if settings.worker.engine == "ray"  # whose machines have the devices
                else {
                    "torch": (_torch(seen, settings), long),
                    "compiler": (_compiler(settings), local),
                    "driver": (_driver(settings), local),
                    "gpu memory": (_cards(seen, held, settings), long),
                }
            ),
            "model": (_model(place, seen, settings), long),
            "memory": (_memory(seen, held, settings), long),
            "store": (_store(held, settings), local),
            "fsync": (_syncs(settings, clock), local),
            "disk space": (_space(settings), local),
            "chain": (_chain(held, settings, clock, limits.call), 3 * limits.call),
            **({"epoch": (_epoch(seen, settings, limits.call), long)} if _has_epochs(settings) else {}),
            **{
                f"receiver {each.name}": (_receiver(each, config, clock, limits.call), 2 * limits.call)
                for each in settings.delivery.receivers
            },
            "admin API": (_api(held, settings, limits.call), local + limits.call),
            "rounding": (_rounding(held, settings, config, limits.call), local + limits.call),
        }
        found = [group.create_task(bounded(name, check, limit)) for name, (check, limit) in checks.items()]
    first = [*check_configuration(config, settings), *live.check_role(settings)]
    return [*first, *(finding for task in found for finding in task.result())]


def check_configuration(config: Path, settings: Settings) -> list[Finding]:
    """Return findings about a valid configuration that is useless all the same."""
    name, findings = "configuration", []
    if settings.node.public_key == EXAMPLE_KEY:
        findings.append(
            red(name, "node.public_key is the example's: nobody is paid", "set it to the miner's public key")
        )
    is_miner = settings.role is Role.MINER
    if is_miner and not settings.delivery.receivers:
        remedy = "add a table [[delivery.receivers]]"
        findings.append(yellow(name, "no receiver is configured: proofs are kept until there is one", remedy))
    if is_miner and "scheme" not in settings.round.model_fields_set:
        findings.append(
            yellow(
                name,
                f"round.scheme is not named, so it is {settings.round.scheme!r}, as before there was another: in deep "
                "models of half precision honest hosts do not agree on its distances",
                "name the scheme of your network under [round]: 'poc4', as new configurations do, agrees at any depth; "
                f"name {settings.round.scheme!r} to keep it",
            )
        )
    return findings or [green(name, f"{config} can be used")]


async def _within(limit: float, work: Awaitable[T], otherwise: T) -> T:
    try:
        async with asyncio.timeout(limit):
            return await work
    except TimeoutError:
        return otherwise


async def _probe(place: asyncio.Task[Place], settings: Settings, limit: float) -> Probe:
    return await probe((await place).folder, cuda=devices.needs_cuda(settings.model), limit=limit)


async def _torch(seen: asyncio.Task[Probe], settings: Settings) -> list[Finding]:
    return [devices.check_torch(await seen, settings.model)]


async def _model(place: asyncio.Task[Place], seen: asyncio.Task[Probe], settings: Settings) -> list[Finding]:
    return [model.check(await place, await seen, settings.model)]


async def _compiler(settings: Settings) -> list[Finding]:
    device = "cuda" if devices.needs_cuda(settings.model) else "cpu"
    cache = os.environ.get("TRITON_CACHE_DIR") or cache_folder(settings)
    lack = await in_thread(partial(find_lack, device, os.environ, cache=Path(cache)))
    finding = devices.check_compiler(lack, settings.model, settings.worker.compile)
    return [finding] if finding else []


async def _driver(settings: Settings) -> list[Finding]:
    driver: devices.Driver | NoDriverError = NoDriverError("nobody asked")
    if devices.needs_cuda(settings.model):
        try:
            driver = await in_thread(partial(devices.ask_driver, os.environ.get("CUDA_VISIBLE_DEVICES")))
        except NoDriverError as error:
            driver = error
    return [devices.check_driver(driver, settings.model)]


async def _cards(seen: asyncio.Task[Probe], held: asyncio.Task[int | None], settings: Settings) -> list[Finding]:
    found = await seen
    card = devices.check_cards(found, settings.model)
    used = devices.used_cards(found, settings.model)
    readings, _ = await in_thread(partial(cards.read, used)) if used else ({}, None)
    runs = await held is not None
    memory = devices.check_memory(readings, used, found, settings.model, runs=runs)
    return [card, *memory] if card else memory


async def _memory(seen: asyncio.Task[Probe], held: asyncio.Task[int | None], settings: Settings) -> list[Finding]:
    memory = await in_thread(devices.host_memory)
    return devices.check_host_memory(memory, await seen, settings.model, runs=await held is not None)


async def _store(held: asyncio.Task[int | None], settings: Settings) -> list[Finding]:
    return [await in_thread(partial(store.check_store, settings.store.path, await held))]


async def _syncs(settings: Settings, clock: Clock) -> list[Finding]:
    finding = await in_thread(partial(store.check_syncs, settings.store.path, clock.monotonic))
    return [finding] if finding else []


async def _space(settings: Settings) -> list[Finding]:
    finding = await in_thread(partial(store.check_space, settings.store))
    return [finding] if finding else []


async def _chain(held: asyncio.Task[int | None], settings: Settings, clock: Clock, limit: float) -> list[Finding]:
    configured, path = settings.chain, settings.store.path
    if not configured.urls:
        return []
    known = None if await held is not None else await in_thread(partial(store.chain_of, path))
    wanted = chain.expected(configured.id, known)
    if isinstance(wanted, Finding):
        return [wanted]
    expiries: dict[str, float] = {}
    async with contextlib.AsyncExitStack() as stack:
        sessions = [
            await stack.enter_async_context(open_session(CHAIN_TIMEOUT, certificate=partial(expiries.__setitem__, url)))
            for url in configured.urls
        ]
        nodes = [
            Rpc(session, url, attempts=1, timeout=limit) for session, url in zip(sessions, configured.urls, strict=True)
        ]
        behind = confirmations_of(configured.kind, configured.confirmations)
        sources = make_sources(configured.kind, nodes, confirmations=behind)
        found = await chain.check_chain(sources, wanted, confirmations=behind, wall=clock.wall, limit=limit)
    expiring = {url: certificate_problem(expires, clock.wall()) for url, expires in expiries.items()}
    remedy = "renew the certificate of this node, or ask its operator to"
    return found + [yellow("chain", f"{mask_url(url)}: {text}", remedy) for url, text in expiring.items() if text]


def _has_epochs(settings: Settings) -> bool:
    return settings.chain.kind == "gonka" and bool(settings.chain.urls)


async def _epoch(seen: asyncio.Task[Probe], settings: Settings, limit: float) -> list[Finding]:
    async with contextlib.AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(open_session(CHAIN_TIMEOUT)) for _ in settings.chain.urls]
        nodes = [
            Gonka(Rpc(session, url, attempts=1, timeout=limit))
            for session, url in zip(sessions, settings.chain.urls, strict=True)
        ]
        return await live.check_epoch(nodes, settings, (await seen).longest_seq_len, limit)


async def _receiver(configured: ReceiverSettings, config: Path, clock: Clock, limit: float) -> list[Finding]:
    try:
        keys = read_keys(configured.secret_file, config, configured.name)
    except ConfigError:
        text = "not asked: its secret_file cannot be used"
        return [yellow(f"receiver {configured.name}", text, "mend the secret first, see above")]
    receiver = Receiver(configured.name, configured.url, keys)
    return [await check_receiver(receiver, clock=clock, limit=limit)]


async def _api(held: asyncio.Task[int | None], settings: Settings, limit: float) -> list[Finding]:
    return [await api.check_api(settings.admin, runs=await held is not None, limit=limit)]


async def _rounding(held: asyncio.Task[int | None], settings: Settings, config: Path, limit: float) -> list[Finding]:
    return [await api.check_rounding(settings.admin, config, runs=await held is not None, limit=limit)]
