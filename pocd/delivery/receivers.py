"""All receivers at once: those of the configuration, and those that came with a callback URL through the API."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING

from pocd.config.types import CALLBACK_PREFIX
from pocd.delivery.posting import Receiver
from pocd.http.addresses import allowed_origin
from pocd.observe.mask import mask_url
from pocd.store import callbacks
from pocd.tasks import first_error, start

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from structlog.typing import FilteringBoundLogger

    from pocd.delivery.dispatcher import Dispatcher
    from pocd.store.thread import OutboxThread

MOST_CALLBACKS = 16  # that are served at a time
MOST_KNOWN = 64  # that the store knows: with those of which only batches are left that were set aside


class CallbackError(Exception):
    """A callback URL cannot be taken; the message says why.

    Attributes:
        full: Whether too many callback URLs are in use; else the URL is not allowed.
    """

    def __init__(self, message: str, *, full: bool = False) -> None:
        super().__init__(message)
        self.full = full


def callback_name(url: str) -> str:
    """Return the name of the queue of a callback URL: the same URL always has the same."""
    return CALLBACK_PREFIX + hashlib.sha256(url.encode()).hexdigest()[:12]


class Receivers:
    """All receivers, each with its dispatcher; those of callback URLs come and go.

    Args:
        receivers: The configured receivers.
        make: Makes a dispatcher.
        outbox: Store of earlier callback URLs and of all queues.
        origins: Origins that a callback URL may have, beside those of `receivers`.
        at_work: Gives the ids of the rounds in which nonces are being checked.
        log: Gets a line for each callback URL that is no longer allowed.
    """

    def __init__(
        self,
        receivers: Sequence[Receiver],
        make: Callable[[Receiver], Dispatcher],
        outbox: OutboxThread,
        *,
        origins: Sequence[str],
        at_work: Callable[[], Sequence[str]],
        log: FilteringBoundLogger,
    ) -> None:
        self._make = make
        self._at_work = at_work
        self._outbox = outbox
        self._log = log
        self._callback_origins = origins
        self._origins = [*origins, *(receiver.url for receiver in receivers)]
        self._configured = [make(receiver) for receiver in receivers]
        self._callbacks: dict[str, Dispatcher] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None
        self._refused: set[str] = set()  # callbacks that were said to be no longer allowed

    def __iter__(self) -> Iterator[Dispatcher]:
        """Give all dispatchers, the configured receivers' first."""
        return iter([*self._configured, *self._callbacks.values()])

    def names(self, callback: str | None = None) -> list[str]:
        """Return the names of the receivers of a round's batches: all configured ones, and the round's `callback`."""
        names = [receiver.name for receiver in self.configured]
        return names if callback is None or callback in names else [*names, callback]

    @property
    def configured(self) -> list[Receiver]:
        """The configured receivers, which get every batch."""
        return [dispatcher.receiver for dispatcher in self._configured]

    def wake(self) -> None:
        """Make every dispatcher look at its queue, also those of callback URLs that had got everything before."""
        self._serve_callbacks(None)
        for dispatcher in self:
            dispatcher.wake()

    async def run(self, callback: str | None) -> None:
        """Deliver until cancelled; `callback` is the receiver of the round that was asked for before."""
        try:
            async with asyncio.TaskGroup() as group:
                self._serve_callbacks(callback)
                self._tasks = {each.receiver.name: self._begin(group, each) for each in self}
                self._group = group
                await asyncio.Event().wait()  # until cancelled, so without a bound
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None

    async def configure(self, receivers: Sequence[Receiver]) -> None:
        """Deliver to `receivers` from now on, as after a restart: the queue of one that is gone is kept.

        A request that is under way to one that is gone or changed is given up, and sent again by whoever has the queue.
        """
        kept = {each.receiver.name: each for each in self._configured if each.receiver in receivers}
        gone = [each.receiver.name for each in self._configured if each.receiver.name not in kept]
        self._origins = [*self._callback_origins, *(receiver.url for receiver in receivers)]
        self._configured = [kept.get(receiver.name) or self._make(receiver) for receiver in receivers]
        for name in [n for n, each in self._callbacks.items() if not allowed_origin(each.receiver.url, self._origins)]:
            del self._callbacks[name]
            gone.append(name)
        tasks = [task for name in gone if (task := self._tasks.pop(name, None))]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # a queue has one dispatcher at a time
        if self._group is not None:  # before that, `run` will
            for each in self._configured:
                if each.receiver.name not in self._tasks:
                    self._tasks[each.receiver.name] = self._begin(self._group, each)
        self._serve_callbacks(None)  # a callback URL may be allowed now, or is said to be no longer

    def _serve_callbacks(self, callback: str | None) -> None:
        """Serve earlier callback URLs whose queues are not empty."""
        outbox = self._outbox.view
        for name, state in outbox.receivers.items():
            queue = outbox.queues.get(name)
            if state.url is None or name in self._callbacks:
                continue
            if name != callback and not (queue and queue.pending_batches):
                continue
            if allowed_origin(state.url, self._origins):
                self._start(Receiver(name, state.url, None))
            elif name not in self._refused:
                self._refused.add(name)
                self._log.error(
                    "callback URL is no longer allowed: its queue is kept; see admin.callback_origins",
                    action="callback_refused",
                    receiver=name,
                    url=mask_url(state.url),
                )

    async def callback(self, url: str, *, wanted: str | None) -> Receiver:
        """Return the receiver at `url`, which is served from now on.

        The store knows it from when it is told what is to be sent there: a round, or a validation.

        Args:
            url: Callback URL, to which /generated and /validated are appended.
            wanted: Name of the callback in use, which is kept when others have to go.

        Raises:
            CallbackError: The origin is not allowed, or too many callback URLs are in use.
            StoreUnavailableError: The store cannot be written now.
        """
        if not allowed_origin(url, self._origins):
            raise CallbackError(
                f"{mask_url(url)} is not of a configured origin: name it in admin.callback_origins, or use one of "
                f"{', '.join(map(mask_url, self._origins)) or 'none so far'}"
            )
        for dispatcher in self:
            if dispatcher.receiver.url.rstrip("/") == url.rstrip("/"):
                return dispatcher.receiver
        receiver = Receiver(callback_name(url), url, None)
        if receiver.name not in self._known() and len(self._known()) >= MOST_KNOWN:
            await self.end_idle()
            if len(self._known()) >= MOST_KNOWN:
                raise CallbackError(
                    f"{MOST_KNOWN} callback URLs have batches that wait or were set aside, or were named just now; "
                    "wait, or send again or purge what was set aside (pocd outbox)",
                    full=True,
                )
        self._retire(wanted)
        if len(self._callbacks) >= MOST_CALLBACKS:
            raise CallbackError(
                f"{MOST_CALLBACKS} callback URLs still have batches to get; wait, or purge one's queue", full=True
            )
        if receiver.name not in self._callbacks:  # another call may have come first
            self._start(receiver)
        return receiver

    def _known(self) -> list[str]:
        return [name for name, state in self._outbox.view.receivers.items() if state.url is not None]

    async def end_idle(self) -> None:
        """End the callback receivers to which nothing will be sent any more: their rows, their tasks, their figures.

        Raises:
            StoreUnavailableError: The store cannot be written now.
        """
        for name in await self._outbox(callbacks.idle, self._at_work()):
            while await self._outbox(callbacks.forget_delivered, name):
                pass  # in pieces, so that others get their turn
            if await self._outbox(callbacks.end, name, self._at_work()):
                self._refused.discard(name)
                self._stop(name)
                self._log.info("receiver has got everything and ends", action="receiver_ended", receiver=name)

    def _stop(self, name: str) -> None:
        self._callbacks.pop(name, None)
        task = self._tasks.pop(name, None)
        if task is not None:
            task.cancel()

    def _start(self, receiver: Receiver) -> None:
        dispatcher = self._callbacks[receiver.name] = self._make(receiver)
        if self._group is not None:  # before that, `run` will
            self._tasks[receiver.name] = self._begin(self._group, dispatcher)

    def _begin(self, group: asyncio.TaskGroup, dispatcher: Dispatcher) -> asyncio.Task[None]:
        return start(group, f"receiver {dispatcher.receiver.name}", dispatcher.run(), self._log)

    def _retire(self, wanted: str | None) -> None:
        """Drop callback URLs whose queues are empty, where there is no room for one more."""
        if len(self._callbacks) < MOST_CALLBACKS:
            return
        for name in list(self._callbacks):
            queue = self._outbox.view.queues.get(name)
            if name != wanted and not (queue and queue.pending_batches):
                self._stop(name)
