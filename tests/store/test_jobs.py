"""Jobs of orchestrators in the store: how many wait, what becomes of them, and when their callback URL may end."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from pocd.protocol.live_jobs import JudgedArtifacts
from pocd.store import callbacks, jobs
from pocd.store.deliveries import next_pending
from pocd.store.outbox import Outbox
from tests.support.clocks import NOW

if TYPE_CHECKING:
    from pathlib import Path

URL = "http://127.0.0.1:9/v2"


def ask(outbox: Outbox, name: str, *, nonces: int = 3, callback: str = "") -> bool:
    return jobs.ask(outbox, name, b"{}", nonces=nonces, callback=(callback, URL), most=10, now=NOW)


def finish(outbox: Outbox, name: str, answer: bytes, verdict: JudgedArtifacts) -> None:
    jobs.finish(outbox, name, "completed", answer, verdict=verdict, receiver="callback-1", now=NOW)


def test_a_job_waits_and_is_done_once(tmp_path: Path) -> None:
    with closing(Outbox.open(tmp_path / "outbox.db")) as outbox:
        assert ask(outbox, "first", callback="callback-1")
        assert ask(outbox, "second", nonces=7)
        assert not ask(outbox, "third", nonces=1), "10 nonces wait"
        assert jobs.oldest(outbox) == ("first", b"{}")
        assert callbacks.idle(outbox, []) == [], "a verdict is to come"
        verdict = JudgedArtifacts("first", 3, b'{"n_total":3}')
        finish(outbox, "first", b'{"n_total":3}', verdict)
        head = next_pending(outbox, "callback-1")
        assert head is not None
        assert (head.kind, head.id, head.body) == ("validated", "first", b'{"n_total":3}')
        assert jobs.find(outbox, "first") == jobs.Job("first", "completed", b'{"n_total":3}')
        assert jobs.oldest(outbox) == ("second", b"{}")
        jobs.cancel(outbox, NOW)
        finish(outbox, "second", b"{}", JudgedArtifacts("second", 7, b"{}"))
        assert jobs.find(outbox, "second") == jobs.Job("second", "cancelled", None)
        assert outbox.queues["callback-1"].pending_batches == 1, "a cancelled job has no verdict"
        jobs.prune(outbox, NOW)
        assert jobs.find(outbox, "first") is not None
        jobs.prune(outbox, NOW + 1)
        assert jobs.find(outbox, "first") is jobs.find(outbox, "second") is None


def test_jobs_outlive_the_process(tmp_path: Path) -> None:
    with closing(Outbox.open(tmp_path / "outbox.db")) as outbox:
        assert ask(outbox, "first")
    with closing(Outbox.open(tmp_path / "outbox.db")) as outbox:
        assert (jobs.oldest(outbox), jobs.waiting(outbox)) == (("first", b"{}"), 3)
