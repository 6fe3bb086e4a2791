"""A real headless Chromium for tests, driven by the DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import re
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
import orjson
import pytest

from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: run scripts/setup-chromium as root")

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-extensions", "--hide-scrollbars"),
    *("--remote-debugging-port=0", "about:blank"),
)


@dataclass
class Tab:
    """A page of the browser, and all that went wrong in it."""

    browser: Browser
    session: str
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    loaded: asyncio.Event = field(default_factory=asyncio.Event)

    async def send(self, method: str, **params: Any) -> dict[str, Any]:  # noqa: ANN401 - the protocol's
        return await self.browser.send(method, self.session, **params)

    async def load(self, url: str) -> None:
        """Go to a page, or to the same one again."""
        self.loaded.clear()
        await self.send("Page.navigate", url=url)
        await asyncio.wait_for(self.loaded.wait(), PATIENCE)

    def heed(self, method: str, params: dict[str, Any]) -> None:
        match method:
            case "Page.loadEventFired":
                self.loaded.set()
            case "Log.entryAdded" if params["entry"]["level"] in {"warning", "error"}:
                self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled":
                self.complaints.append(str(params["args"]))
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])

    def origins(self) -> set[str]:
        """Whom the page asked for anything over the network."""
        parts = map(urlsplit, self.requests)
        return {f"{part.scheme}://{part.netloc}" for part in parts if part.scheme != "data"}

    async def value(self, expression: str) -> Any:  # noqa: ANN401 - whatever JSON has
        """What a JavaScript expression gives."""
        found = await self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def text(self, selector: str = "body") -> str:
        """What a reader sees there."""
        return str(await self.value(f"document.querySelector({orjson.dumps(selector).decode()}).innerText"))

    async def until(self, expression: str) -> Any:  # noqa: ANN401 - whatever JSON has
        """Wait until a JavaScript expression gives something true."""
        try:
            async with asyncio.timeout(PATIENCE):
                while not (found := await self.value(expression)):  # noqa: ASYNC110 - a page wakes nobody
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"never {expression}; {self.complaints}; the page:\n{await self.text()}") from None
        return found

    async def shape(self, width: int, height: int, *, dark: bool = False) -> None:
        """Be a window of that size, in one of the two colour schemes."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        await self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.send("Emulation.setEmulatedMedia", features=[scheme])

    async def picture(self, path: Path) -> None:
        """Write what is seen as a PNG, whole."""
        shot = await self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


class Browser:
    """The connection to a running Chromium."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._tabs: dict[str, Tab] = {}

    async def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        to = {"sessionId": session} if session else {}
        await self._socket.send_str(orjson.dumps({"id": number, "method": method, "params": params, **to}).decode())
        return await asyncio.wait_for(answer, PATIENCE)

    async def read(self) -> None:
        """Hand answers and events on, until the connection ends."""
        async for message in self._socket:
            body = orjson.loads(message.data)
            if "id" in body:
                assert "error" not in body, body
                self._answers.pop(body["id"]).set_result(body["result"])
            elif tab := self._tabs.get(body.get("sessionId", "")):
                tab.heed(body["method"], body["params"])

    async def open(self, url: str, width: int = 1100, height: int = 800, *, dark: bool = False) -> Tab:
        """Open a page in a profile of its own."""
        context = (await self.send("Target.createBrowserContext"))["browserContextId"]
        target = (await self.send("Target.createTarget", url="about:blank", browserContextId=context))["targetId"]
        session = (await self.send("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        tab = self._tabs[session] = Tab(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            await tab.send(f"{domain}.enable")
        await tab.shape(width, height, dark=dark)
        await tab.load(url)
        return tab


@contextlib.asynccontextmanager
async def browsing(folder: Path) -> AsyncIterator[Browser]:
    """Start Chromium, its profile in `folder`, and end it."""
    assert CHROMIUM is not None
    process = await asyncio.create_subprocess_exec(
        CHROMIUM,
        f"--user-data-dir={folder / 'profile'}",
        *FLAGS,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(PATIENCE):
            while not (found := re.search(rb"DevTools listening on (ws://\S+)", await process.stderr.readline())):
                assert not process.stderr.at_eof(), "chromium ended"
        draining = asyncio.create_task(process.stderr.read())
        async with aiohttp.ClientSession() as http, http.ws_connect(found[1].decode(), max_msg_size=0) as socket:
            browser = Browser(socket)
            reading = asyncio.create_task(browser.read())
            yield browser
            await browser.send("Browser.close")
            await asyncio.wait_for(process.wait(), PATIENCE)
            await reading
        await draining
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
