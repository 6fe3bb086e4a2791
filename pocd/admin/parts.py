"""The daemon's parts that the admin API reads and calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from pocd.clock import Clock
    from pocd.config.settings import Settings
    from pocd.delivery.receivers import Receivers
    from pocd.mining.control import Control
    from pocd.mining.follower import ChainHealth
    from pocd.mining.miner import Miner
    from pocd.observe.events import Events
    from pocd.pool.cards import Cards
    from pocd.pool.pool import Pool
    from pocd.store.thread import OutboxThread
    from pocd.validation.queue import Validator


@dataclass(slots=True)
class Parts:
    """The daemon's parts that the admin API reads and calls.

    Attributes:
        settings: Settings in effect; replaced as a whole when the configuration is read again.
        started_at: When the daemon was started, in seconds of the monotonic clock.
    """

    settings: Settings
    outbox: OutboxThread
    miner: Miner
    control: Control
    workers: Pool
    cards: Cards
    validator: Validator
    chain: ChainHealth
    receivers: Receivers
    clock: Clock
    started_at: float
    log: FilteringBoundLogger
    events: Events
