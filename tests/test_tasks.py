"""What a daemon leaves behind when one of its parts fails: the part's name and the traceback, once, and one line."""

from __future__ import annotations

import asyncio
import gc
import inspect
import time
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import structlog
from structlog.testing import capture_logs

from pocd.pool.causes import Cause, WorkerRefusedError
from pocd.process import EndedError
from pocd.store.errors import StoreError
from pocd.tasks import LOOK_SECONDS, shielded, start, within
from tests.support.forking import Process
from tests.support.processes import Chain, config

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from pathlib import Path

# `pocd run`, with one method of one class replaced by a coroutine that does what {fault} says.
BROKEN = """
from pocd.cli.main import main
from {module} import {name}
async def broken(self, *_):
    {fault}
{name}.{method} = broken
main()
"""


async def run(path: Path, program: str) -> tuple[int, list[dict[str, Any]], str]:
    """Run a program with the arguments of `pocd run` to its end: exit status, lines of the log, and the last line."""
    log = path.with_name("log")
    with log.open("wb") as sink:
        process = Process("-c", program, "run", "--config", str(path), out=sink.fileno(), err=sink.fileno())
    code = await process.wait()
    lines = log.read_text().splitlines()
    return code, [orjson.loads(line) for line in lines if line.startswith("{")], lines[-1]


@pytest.mark.parametrize(
    ("where", "method", "part"),
    [
        ("pocd.chain.failover Failover", "head", "chain"),
        ("pocd.delivery.dispatcher Dispatcher", "run", "receiver one"),
        ("pocd.pool.feeder Feeder", "_receive", "worker 0: results"),
        ("pocd.daemon.reports Reports", "_notify_manager", "service manager"),
    ],
)
async def test_a_part_that_fails_is_told_once_with_its_name_and_where(
    tmp_path: Path, where: str, method: str, part: str
) -> None:
    module, name = where.split()
    program = BROKEN.format(module=module, name=name, method=method, fault='raise KeyError("what broke")')
    async with Chain().served() as chain:
        code, entries, last = await run(config(tmp_path, chain.url, {"one": "http://127.0.0.1:1"}), program)
    (crash,) = [entry for entry in entries if entry["action"] == "crash"]
    assert (crash["part"], crash["level"]) == (part, "error")
    (failed,) = crash["exception"]
    assert (failed["exc_type"], failed["exc_value"]) == ("KeyError", "'what broke'")
    assert failed["frames"][-1]["name"] == "broken"
    assert code == 1
    assert last == f"pocd: {part} failed: KeyError: 'what broke'; the log says where"
    assert "stopped" in [entry["action"] for entry in entries]


async def test_a_part_that_returns_has_failed_too(tmp_path: Path) -> None:
    program = BROKEN.format(module="pocd.delivery.keeper", name="Keeper", method="run", fault="return")
    code, entries, last = await run(config(tmp_path, "http://127.0.0.1:1", {}), program)
    assert [entry["part"] for entry in entries if entry["action"] == "crash"] == ["keeper"]
    assert code == 1
    assert last.startswith("pocd: keeper failed: RuntimeError: it returned, and should run until it is cancelled")


# `pocd run`, which stops at once, before a worker is ready; {fault} may keep it from that.
STOPPING = """
from asyncio import Event
from signal import SIGTERM, raise_signal
from pocd.cli.main import main
from pocd.daemon.reports import Reports
from pocd.mining.miner import Miner
async def stop(self):
    raise_signal(SIGTERM)
    await Event().wait()
async def broken(self, _):
    raise KeyError("what broke")
Reports._log_funnel = stop
{fault}
main()
"""


async def test_a_daemon_that_is_stopped_before_it_is_ready_ends_well(tmp_path: Path) -> None:
    code, entries, _ = await run(config(tmp_path, "http://127.0.0.1:1", {}), STOPPING.format(fault=""))
    assert code == 0
    assert not [entry for entry in entries if entry["action"] == "crash"]


async def test_what_fails_while_the_daemon_stops_is_told_as_well(tmp_path: Path) -> None:
    code, entries, _ = await run(
        config(tmp_path, "http://127.0.0.1:1", {}), STOPPING.format(fault="Miner.close = broken")
    )
    assert [entry["part"] for entry in entries if entry["action"] == "crash"] == ["stopping"]
    assert code == 1


async def test_a_worker_that_refuses_is_no_crash(tmp_path: Path) -> None:
    program = "from pocd.cli.main import main; main()"
    code, entries, last = await run(config(tmp_path, "http://127.0.0.1:1", {}, model__device="cuda:9"), program)
    assert code == 75
    assert last.startswith("pocd: device 'cuda:9'")
    assert not [entry for entry in entries if entry["action"] == "crash" or "exception" in entry]


# The tasks


async def outcome(*works: Coroutine[Any, Any, object], **how: Any) -> tuple[list[str], list[BaseException]]:  # noqa: ANN401 - of `start`
    """Run tasks until all have ended: the parts that crashed, and what the group raised."""
    raised: tuple[BaseException, ...] = ()
    with capture_logs() as logs:
        try:
            async with asyncio.TaskGroup() as group:
                for number, work in enumerate(works):
                    start(group, f"part {number}", work, structlog.get_logger(), **how)
        except BaseExceptionGroup as errors:
            raised = errors.exceptions
    return [entry["part"] for entry in logs if entry["action"] == "crash"], list(raised)


async def fail(error: BaseException) -> None:
    raise error


async def test_a_task_that_is_cancelled_has_not_crashed() -> None:
    crashed, raised = await outcome(asyncio.Event().wait(), fail(KeyError("x")))
    assert crashed == ["part 1"]
    assert [type(each) for each in raised] == [EndedError]


@pytest.mark.parametrize(
    "error", [WorkerRefusedError(Cause.DEVICE, "x"), StoreError("x"), EndedError(78, "x"), EOFError("x")]
)
async def test_what_was_foreseen_is_raised_as_it_is_and_not_logged(error: Exception) -> None:
    assert await outcome(fail(error), foreseen=(EOFError,)) == ([], [error])


async def test_a_crash_within_a_part_is_told_once_by_the_name_that_is_nearest() -> None:
    async def nested() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                start(group, "inner", fail(ValueError("x")), structlog.get_logger())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    crashed, (raised,) = await outcome(nested())
    assert crashed == ["inner"]
    assert str(raised) == "inner failed: ValueError: x; the log says where"


async def test_a_task_that_is_cancelled_before_it_begins_leaves_nothing_behind() -> None:
    work = asyncio.Event().wait()
    async with asyncio.TaskGroup() as group:
        start(group, "part", work, structlog.get_logger()).cancel()
    assert inspect.getcoroutinestate(work) == inspect.CORO_CLOSED


async def test_what_goes_on_without_its_caller_leaves_no_error_that_nobody_takes() -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    may_fail, endless = asyncio.Event(), asyncio.Event()

    async def failing() -> None:
        await may_fail.wait()
        raise StoreError("closed")

    with capture_logs() as logs:
        callers = [
            asyncio.create_task(shielded(name, work, structlog.get_logger()))
            for name, work in (("failing", failing()), ("endless", endless.wait()))
        ]
        await asyncio.sleep(0)
        for caller in callers:
            caller.cancel()
        await asyncio.wait(callers)
        assert all(caller.cancelled() for caller in callers)
        works = [task for task in asyncio.all_tasks() if task.get_name() in {"failing", "endless"}]
        assert len(works) == 2
        may_fail.set()
        await asyncio.wait([task for task in works if task.get_name() == "failing"])
        for task in works:  # as the end of the loop does
            task.cancel()
        await asyncio.wait(works)
    del task, works
    gc.collect()
    assert [(entry["part"], entry["action"]) for entry in logs] == [("failing", "given_up"), ("endless", "given_up")]
    assert not complaints


async def test_a_pause_of_the_process_is_not_time_in_which_others_were_silent() -> None:
    async def answer() -> str:
        await asyncio.sleep(2 * LOOK_SECONDS)
        return "here"

    asyncio.get_running_loop().call_later(LOOK_SECONDS / 2, time.sleep, 6 * LOOK_SECONDS)
    assert await within(4 * LOOK_SECONDS, answer()) == "here"


async def test_silence_while_the_process_runs_has_an_end() -> None:
    ended = asyncio.Event()

    async def silent() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    with pytest.raises(TimeoutError):
        await within(0.01, silent())
    assert ended.is_set()
