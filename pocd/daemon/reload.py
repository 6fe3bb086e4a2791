"""SIGHUP: read the configuration again, and change what can be changed while the daemon runs.

All or nothing: what is in effect changes only when the whole file is good, and the files of secrets with it.
"""

from __future__ import annotations

import asyncio
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pocd.config.model import check_model
from pocd.config.settings import ConfigError, Settings, load
from pocd.daemon.compose import make_receivers
from pocd.observe import logs
from pocd.process import EndedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from pydantic import BaseModel

    from pocd.admin.parts import Parts
    from pocd.delivery.batcher import Batcher
    from pocd.delivery.posting import Receiver
    from pocd.observe.notify import Notifier

RECEIVERS, R_TARGET, LEVEL = "delivery.receivers", "round.r_target", "log.level"
AT_ONCE = frozenset({RECEIVERS, R_TARGET, LEVEL})
R_TARGET_FOLLOWS = frozenset({"model.name", "model.revision", "round.scheme", "round.seq_len"})


@dataclass(frozen=True, slots=True)
class Difference:
    """Differences between two configurations, as names of keys (`section.key`).

    Attributes:
        apply: Keys that can change at once.
        restart: Keys whose change needs a restart of the daemon.
    """

    apply: tuple[str, ...]
    restart: tuple[str, ...]


def diff(old: Settings, new: Settings) -> Difference:
    """Compare `new` with `old`, and tell apart what can change at once and what needs a restart.

    An r_target that comes with another model, scheme or length waits for the restart with them: it is meant for those,
    and would call too many or too few nonces valid before.
    """
    changed = [
        f"{section}.{key}"
        for section in Settings.model_fields
        for key in type(getattr(old, section)).model_fields
        if getattr(getattr(old, section), key) != getattr(getattr(new, section), key)
    ]
    at_once = AT_ONCE - {R_TARGET} if R_TARGET_FOLLOWS & set(changed) else AT_ONCE
    return Difference(
        tuple(name for name in changed if name in at_once), tuple(name for name in changed if name not in at_once)
    )


def merge(old: Settings, new: Settings, names: Iterable[str]) -> Settings:
    """Return `old` with the values that `new` has for `names`."""
    sections: dict[str, BaseModel] = {}
    for name in names:
        section, _, key = name.partition(".")
        value = getattr(getattr(new, section), key)
        sections[section] = sections.get(section, getattr(old, section)).model_copy(update={key: value})
    return old.model_copy(update=sections)


def compare(old: Sequence[Receiver], new: Sequence[Receiver]) -> dict[str, list[str]]:
    """Name the receivers that are `added`, `removed`, and `changed` in URL or secrets; empty where none is."""
    before, after = ({receiver.name: receiver for receiver in receivers} for receivers in (old, new))
    found = {
        "added": [name for name in after if name not in before],
        "removed": [name for name in before if name not in after],
        "changed": [name for name in after if name in before and after[name] != before[name]],
    }
    return {what: names for what, names in found.items() if names}


class Reloader:
    """Reloads the configuration at SIGHUP.

    Args:
        path: File of the configuration.
        parts: The daemon's parts, whose `settings` are replaced and which are changed accordingly.
        batcher: Woken when other receivers are configured.
        notifier: Gets RELOADING=1, and READY=1 when it is done.
    """

    def __init__(self, path: Path, parts: Parts, batcher: Batcher, notifier: Notifier) -> None:
        self._path = path
        self._parts = parts
        self._batcher = batcher
        self._notifier = notifier
        self._asked = asyncio.Event()

    def heed(self) -> None:
        """Heed SIGHUP from now on, also before `run` is under way."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._asked.set)

    async def run(self) -> None:
        """Reload for each SIGHUP, until cancelled; those that come close together are one."""
        while True:
            await self._asked.wait()  # without a bound: nobody may ever ask
            self._asked.clear()
            await self._reload()

    async def _reload(self) -> None:
        parts = self._parts
        self._notifier.reloading(parts.clock.monotonic())
        difference, problem = Difference((), ()), None
        try:
            difference = await self._apply()
        except (ConfigError, EndedError) as error:
            problem = str(error)
        if problem is not None:
            parts.log.error("configuration is not good, nothing was changed", action="reload_refused", cause=problem)
        applied, restart = list(difference.apply), list(difference.restart)
        parts.events.publish("reload", applied=applied, restart=restart, problem=problem)
        self._notifier.ready()

    async def _apply(self) -> Difference:
        """Read all, then change what can be changed.

        Raises:
            ConfigError: The configuration, or a file that it names, is not good; nothing was changed.
            EndedError: There is nothing yet where the model should be; nothing was changed.
        """
        parts = self._parts
        new = load(self._path)
        check_model(new)
        receivers = make_receivers(new, self._path)
        difference = diff(parts.settings, new)
        others = compare(parts.receivers.configured, receivers)
        if others and RECEIVERS not in difference.apply:  # a file of secrets holds others under the same name
            difference = Difference((*difference.apply, RECEIVERS), difference.restart)

        parts.settings = merge(parts.settings, new, difference.apply)
        logs.set_level(parts.settings.log.level)
        if RECEIVERS in difference.apply:
            await parts.receivers.configure(receivers)
            self._batcher.wake()  # proofs that waited for a first receiver go into batches now
        told = {"applied": list(difference.apply), **others}
        if difference.restart:
            message = "configuration read again; some of it needs a restart (systemctl restart pocd)"
            parts.log.warning(message, action="reloaded", restart=list(difference.restart), **told)
        else:
            parts.log.info("configuration read again", action="reloaded", **told)
        return difference
